package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/core/view"
)

// defaultSnapshotter is that of containerd; a namespace may name another by
// its label (contract 1.5.13).
const defaultSnapshotter = "overlayfs"

// labelSnapshotter on a namespace chooses its snapshotter.
const labelSnapshotter = "containerd.io/defaults/snapshotter"

// snapshotter is what the flag says, the environment, the namespace, or the default.
func (a *app) snapshotter(ctx context.Context, flag string) (string, error) {
	if flag == "" {
		flag = os.Getenv("CONTAINERD_SNAPSHOTTER")
	}
	v, err := a.view(ctx)
	if err != nil {
		return "", err
	}
	if flag != "" {
		plugins, err := a.client.Introspection().Plugins(ctx, "type==io.containerd.snapshotter.v1")
		if err != nil {
			return "", err
		}
		var loaded []string
		for _, p := range plugins {
			if p.InitErr == "" {
				loaded = append(loaded, p.ID)
			}
			if p.ID == flag && p.InitErr == "" {
				return flag, nil
			}
			if p.ID == flag {
				return "", fmt.Errorf("snapshotter %s: %s: %w", flag, p.InitErr, errdefs.ErrUnavailable)
			}
		}
		slices.Sort(loaded)
		return "", &hinted{fmt.Errorf("snapshotter %s: %w", flag, errdefs.ErrNotFound), "the daemon has: " + strings.Join(loaded, ", ")}
	}
	ns, err := a.client.Namespaces().Get(ctx, v.Namespace())
	if err != nil {
		return "", err
	}
	if s := ns.Labels[labelSnapshotter]; s != "" {
		return s, nil
	}
	return defaultSnapshotter, nil
}

// normalize makes a full reference of what people type: "alpine" becomes
// "docker.io/library/alpine:latest".
func normalize(ref string) (string, error) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return "", fmt.Errorf("image reference %q: %w: %w", ref, err, errdefs.ErrInvalidArgument)
	}
	return named.String(), nil
}

// parsePlatform reads "linux/arm64"; "" is the zero platform, which stands for
// the host's.
func parsePlatform(s string) (ocispec.Platform, error) {
	if s == "" {
		return ocispec.Platform{}, nil
	}
	p, err := platforms.Parse(s)
	if err != nil {
		return p, fmt.Errorf("platform %q: %w", s, err)
	}
	return platforms.Normalize(p), nil
}

// remoteFlags say how to reach a registry.
type remoteFlags struct {
	user      string
	stdin     bool
	plainHTTP bool
	hostsDir  string
}

func (r *remoteFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVarP(&r.user, "user", "u", "", "`name[:password]` at the registry; the password is asked for if it is missing")
	f.BoolVar(&r.stdin, "password-stdin", false, "read the password from standard input")
	f.BoolVar(&r.plainHTTP, "plain-http", false, "speak HTTP without TLS to the registry")
	f.StringVar(&r.hostsDir, "hosts-dir", "", "`directory` of hosts.toml files, as the daemon sees it")
}

func (r *remoteFlags) options(a *app) (registry.Options, error) {
	o := registry.Options{HostDir: r.hostsDir}
	if r.plainHTTP {
		o.DefaultScheme = "http"
	}
	if r.user == "" {
		return o, nil
	}
	name, password, given := strings.Cut(r.user, ":")
	switch {
	case given:
	case r.stdin:
		line, err := bufio.NewReader(io.LimitReader(a.in, 64<<10)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return o, fmt.Errorf("read the password: %w", err)
		}
		password = strings.TrimRight(line, "\r\n")
	case term.IsTerminal(int(a.in.Fd())):
		fmt.Fprintf(a.err, "Password of %s: ", name)
		b, err := term.ReadPassword(int(a.in.Fd()))
		fmt.Fprintln(a.err)
		if err != nil {
			return o, fmt.Errorf("read the password: %w", err)
		}
		password = string(b)
	default:
		return o, errors.New("the password is missing: use --user name:password or --password-stdin")
	}
	o.Credentials = func(context.Context, registry.AuthRequest) (registry.Credential, error) {
		return registry.Credential{Username: name, Secret: password}, nil
	}
	return o, nil
}

// pullFlags say what to pull and where to unpack it.
type pullFlags struct {
	remote       remoteFlags
	platform     string
	allPlatforms bool
	snapshotter  string
	noUnpack     bool
	quiet        bool
}

// into says which platforms are taken and where they are unpacked.
func (p *pullFlags) into(ctx context.Context, a *app, dst *transfer.ImageStore) error {
	wanted, err := parsePlatform(p.platform)
	if err != nil {
		return err
	}
	if wanted.OS == "" {
		wanted = platforms.DefaultSpec()
	}
	if !p.allPlatforms {
		dst.Platforms = []ocispec.Platform{wanted}
	}
	if !p.noUnpack {
		sn, err := a.snapshotter(ctx, p.snapshotter)
		if err != nil {
			return err
		}
		dst.Unpacks = []transfer.Unpack{{Platform: &wanted, Snapshotter: sn}}
	}
	return nil
}

// pull fetches and unpacks an image, which it returns the full name of.
func (a *app) pull(ctx context.Context, ref string, p *pullFlags) (string, error) {
	name, err := normalize(ref)
	if err != nil {
		return "", err
	}
	v, err := a.view(ctx)
	if err != nil {
		return "", err
	}
	opts, err := p.remote.options(a)
	if err != nil {
		return "", err
	}
	dst := transfer.ImageStore{Name: name}
	if err := p.into(ctx, a, &dst); err != nil {
		return "", err
	}
	show := a.progress(p.quiet)
	err = v.Transfer().Transfer(ctx, transfer.Registry{Reference: name, Options: opts}, dst, transfer.Options{Progress: show.update})
	show.done(err, "Pulled "+name)
	return name, err
}

func (a *app) pullCommand() *cobra.Command {
	var p pullFlags
	cmd := &cobra.Command{
		Use: "pull IMAGE", Short: "Fetch an image from a registry and unpack it", GroupID: "image", Args: cobra.ExactArgs(1),
		Example: "  gantry pull alpine\n  gantry pull --platform linux/arm64 ghcr.io/owner/name:tag",
		RunE: func(cmd *cobra.Command, args []string) error {
			name, err := a.pull(cmd.Context(), args[0], &p)
			if err == nil && (p.quiet || a.format == "json") {
				err = a.names(name)
			}
			return err
		},
	}
	p.remote.add(cmd)
	f := cmd.Flags()
	f.StringVar(&p.platform, "platform", "", "`os/arch` to take of an image that has several (the host's)")
	f.BoolVar(&p.allPlatforms, "all-platforms", false, "fetch all platforms")
	f.StringVar(&p.snapshotter, "snapshotter", "", "`name` of the snapshotter to unpack into")
	f.BoolVar(&p.noUnpack, "no-unpack", false, "fetch only")
	f.BoolVarP(&p.quiet, "quiet", "q", false, "print only the image's name")
	return cmd
}

func (a *app) pushCommand() *cobra.Command {
	var r remoteFlags
	var quiet bool
	cmd := &cobra.Command{
		Use: "push IMAGE [REFERENCE]", Short: "Send an image to a registry", GroupID: "image", Args: cobra.RangeArgs(1, 2),
		RunE: a.inView(func(ctx context.Context, v view.View, args []string) error {
			img, err := a.findImage(ctx, v, args[0])
			if err != nil {
				return err
			}
			to := img.Name
			if len(args) == 2 {
				if to, err = normalize(args[1]); err != nil {
					return err
				}
			}
			opts, err := r.options(a)
			if err != nil {
				return err
			}
			show := a.progress(quiet)
			err = v.Transfer().Transfer(ctx, transfer.ImageStore{Name: img.Name}, transfer.Registry{Reference: to, Options: opts}, transfer.Options{Progress: show.update})
			show.done(err, "Pushed "+to)
			return err
		}),
	}
	r.add(cmd)
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "show no progress")
	return cmd
}

// findImage looks an image up by what people type: its full name, a short
// name, or the beginning of its digest.
func (a *app) findImage(ctx context.Context, v view.View, ref string) (image.Image, error) {
	img, err := v.Images().Get(ctx, ref)
	if err == nil || !errdefs.IsNotFound(err) {
		return img, err
	}
	if name, nerr := normalize(ref); nerr == nil && name != ref {
		if found, ferr := v.Images().Get(ctx, name); ferr == nil {
			return found, nil
		}
	}
	if prefix := strings.TrimPrefix(ref, "sha256:"); len(prefix) >= 4 && strings.Trim(prefix, "0123456789abcdef") == "" {
		all, lerr := v.Images().List(ctx, fmt.Sprintf("target.digest~=|^sha256:%s|", prefix))
		if lerr == nil && len(all) > 0 {
			for _, other := range all[1:] {
				if other.Target.Digest != all[0].Target.Digest {
					return img, fmt.Errorf("image %q: several digests begin like that: %w", ref, errdefs.ErrInvalidArgument)
				}
			}
			return all[0], nil
		}
	}
	return img, a.missing(ctx, err, func(other view.View) error {
		if _, err := other.Images().Get(ctx, ref); err == nil {
			return nil
		}
		name, err := normalize(ref)
		if err == nil {
			_, err = other.Images().Get(ctx, name)
		}
		return err
	})
}

// imageRow is an image in a listing.
type imageRow struct {
	Namespace string `json:"namespace"`
	image.Image
	Platforms []string `json:"platforms,omitempty"`
	Size      int64    `json:"size"`
	Missing   string   `json:"missing,omitempty"`
	// AlsoNamed are records of the same image that only repeat a digest.
	AlsoNamed []string `json:"also_named,omitempty"`
}

// once leaves one row for an image that has a name, and records named by a
// digest beside it, as Kubernetes makes them: REPOSITORY@DIGEST, and the
// image's id. If it has no name, the first of those stands for it.
func once(images []image.Image) ([]image.Image, map[string][]string) {
	nameless := func(name string) bool {
		return strings.Contains(name, "@") || digest.Digest(name).Validate() == nil
	}
	first := map[digest.Digest]string{}
	for _, better := range []bool{true, false} {
		for _, img := range images {
			// A repository's name says more than an id.
			if d := img.Target.Digest; first[d] == "" && (!nameless(img.Name) || !better && strings.Contains(img.Name, "@")) {
				first[d] = img.Name
			}
		}
	}
	also := map[string][]string{}
	var out []image.Image
	for _, img := range images {
		if f := first[img.Target.Digest]; f != "" && f != img.Name && nameless(img.Name) {
			also[f] = append(also[f], img.Name)
			continue
		}
		out = append(out, img)
	}
	return out, also
}

func (a *app) imagesCommand() *cobra.Command {
	var quiet, everything bool
	cmd := &cobra.Command{
		Use: "images [FILTER]", Short: "List images", Aliases: []string{"image-ls"}, GroupID: "image", Args: cobra.MaximumNArgs(1),
		Long:    "Lists images by name. Records that only repeat the digest of an image with a name, as Kubernetes makes them, are left out without -a.",
		Example: "  gantry images\n  gantry images 'name~=alpine'",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			vs, err := a.views(ctx)
			if err != nil {
				return err
			}
			list := []imageRow{}
			var rows [][]string
			for _, v := range vs {
				images, err := v.Images().List(ctx, args...)
				if err != nil {
					return err
				}
				var also map[string][]string
				if !everything {
					images, also = once(images)
				}
				for _, img := range images {
					row := imageRow{Namespace: string(v.Namespace()), Image: img, AlsoNamed: also[img.Name]}
					if info, err := client.InspectImage(ctx, v, img.Name, ocispec.Platform{}); err != nil {
						row.Missing = err.Error()
					} else {
						row.Size = info.Size()
						row.Platforms = []string{platforms.Format(info.Config.Platform)}
					}
					list = append(list, row)
					if quiet {
						fmt.Fprintln(a.out, img.Name)
						continue
					}
					shown := size(row.Size)
					if row.Missing != "" {
						shown = "incomplete"
					}
					cells := []string{img.Name, cut(strings.TrimPrefix(img.Target.Digest.String(), "sha256:"), 15), shown, strings.Join(row.Platforms, ","), ago(img.UpdatedAt)}
					if a.all {
						cells = append([]string{row.Namespace}, cells...)
					}
					rows = append(rows, cells)
				}
			}
			if quiet {
				return nil
			}
			if len(list) == 0 && len(args) == 0 {
				defer a.elsewhere(ctx, "images", hasImages)
			}
			header := "NAME|DIGEST|SIZE|PLATFORM|UPDATED"
			if a.all {
				header = "NAMESPACE|" + header
			}
			return a.table(list, header, rows)
		},
	}
	cmd.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only names")
	cmd.Flags().BoolVarP(&everything, "all", "a", false, "list every record")
	return cmd
}

func (a *app) rmiCommand() *cobra.Command {
	var async, force bool
	cmd := &cobra.Command{
		Use: "rmi IMAGE...", Short: "Remove images", GroupID: "image", Args: cobra.MinimumNArgs(1),
		RunE: a.inView(func(ctx context.Context, v view.View, args []string) error {
			var all error
			var done []string
			for i, ref := range args {
				img, err := a.findImage(ctx, v, ref)
				if err == nil {
					err = v.Images().Delete(ctx, img.Name, image.DeleteOptions{Sync: !async && i == len(args)-1})
				}
				switch {
				case err == nil:
					done = append(done, img.Name)
				case force && errdefs.IsNotFound(err):
				default:
					all = errors.Join(all, err)
				}
			}
			return errors.Join(a.names(done...), all)
		}),
	}
	cmd.Flags().BoolVar(&async, "async", false, "do not wait until the disk space is free")
	cmd.Flags().BoolVarP(&force, "force", "f", false, "an image that is not there is no error")
	return cmd
}

func (a *app) tagCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use: "tag IMAGE NAME...", Short: "Give an image further names", GroupID: "image", Args: cobra.MinimumNArgs(2),
		RunE: a.inView(func(ctx context.Context, v view.View, args []string) error {
			img, err := a.findImage(ctx, v, args[0])
			if err != nil {
				return err
			}
			var done []string
			for _, ref := range args[1:] {
				name, err := normalize(ref)
				if err != nil {
					return err
				}
				to := image.Image{Name: name, Target: img.Target, Labels: img.Labels}
				_, err = v.Images().Create(ctx, to)
				if errdefs.IsAlreadyExists(err) && force {
					_, err = v.Images().Update(ctx, to, "target", "labels")
				}
				if errdefs.IsAlreadyExists(err) {
					err = &hinted{err, "use --force to point the name at another image"}
				}
				if err != nil {
					return errors.Join(a.names(done...), err)
				}
				done = append(done, name)
			}
			return a.names(done...)
		}),
	}
	cmd.Flags().BoolVarP(&force, "force", "f", false, "a name that exists is pointed at the image")
	return cmd
}

func (a *app) saveCommand() *cobra.Command {
	var out, platform string
	var all bool
	cmd := &cobra.Command{
		Use: "save IMAGE", Short: "Write an image to an archive", GroupID: "image", Args: cobra.ExactArgs(1),
		Long: "Writes a tar archive that is an OCI image layout and that docker load reads as well.",
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			ctx := cmd.Context()
			if out == "" && term.IsTerminal(int(a.out.Fd())) {
				return errors.New("an archive is not for a terminal: use --file PATH, or redirect the output")
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			img, err := a.findImage(ctx, v, args[0])
			if err != nil {
				return err
			}
			exp := transfer.Export{Writer: keepOpen{a.out}, AllPlatforms: all}
			p, err := parsePlatform(platform)
			if err != nil {
				return err
			}
			if p.OS != "" {
				exp.Platforms = []ocispec.Platform{p}
			} else if !all {
				exp.Platforms = []ocispec.Platform{platforms.DefaultSpec()}
			}
			if out != "" {
				// A file appears under its name when it is whole.
				part := out + ".part"
				f, ferr := os.Create(part)
				if ferr != nil {
					return fmt.Errorf("save %s: %w", img.Name, ferr)
				}
				defer func() {
					if cerr := f.Close(); err == nil && cerr != nil {
						err = fmt.Errorf("save %s: %w", img.Name, cerr)
					}
					if err == nil {
						err = os.Rename(part, out)
					} else {
						os.Remove(part)
					}
				}()
				exp.Writer = keepOpen{f}
			}
			return v.Transfer().Transfer(ctx, transfer.ImageStore{Name: img.Name}, exp, transfer.Options{})
		},
	}
	f := cmd.Flags()
	f.StringVarP(&out, "file", "f", "", "`path` to write to (standard output)")
	f.StringVar(&platform, "platform", "", "`os/arch` to write (the host's)")
	f.BoolVar(&all, "all-platforms", false, "write all platforms")
	return cmd
}

// keepOpen is a writer that somebody else closes.
type keepOpen struct{ io.Writer }

func (keepOpen) Close() error { return nil }

func (a *app) loadCommand() *cobra.Command {
	var in string
	var p pullFlags
	cmd := &cobra.Command{
		Use: "load", Short: "Read images from an archive", GroupID: "image", Args: cobra.NoArgs,
		Long: "Reads a tar archive, compressed or not: an OCI image layout, or what docker save writes.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			src := a.in
			if in != "" {
				f, err := os.Open(in)
				if err != nil {
					return fmt.Errorf("load: %w", err)
				}
				defer f.Close()
				src = f
			} else if term.IsTerminal(int(a.in.Fd())) {
				return errors.New("no archive: use --file PATH, or redirect the input")
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			dst := transfer.ImageStore{References: []transfer.Reference{{IsPrefix: true, AllowOverwrite: true}}}
			if err := p.into(ctx, a, &dst); err != nil {
				return err
			}
			show := a.progress(p.quiet)
			var names []string
			err = v.Transfer().Transfer(ctx, transfer.Import{Reader: src}, dst, transfer.Options{Progress: func(e transfer.Progress) {
				if e.Event == "saved" && !slices.Contains(names, e.Name) {
					names = append(names, e.Name)
				}
				show.update(e)
			}})
			show.done(err, "Loaded "+strings.Join(names, ", "))
			if err != nil {
				return err
			}
			return a.names(names...)
		},
	}
	f := cmd.Flags()
	f.StringVarP(&in, "file", "f", "", "`path` to read from (standard input)")
	f.StringVar(&p.snapshotter, "snapshotter", "", "`name` of the snapshotter to unpack into")
	f.StringVar(&p.platform, "platform", "", "`os/arch` to load (the host's)")
	f.BoolVar(&p.allPlatforms, "all-platforms", false, "load all platforms")
	f.BoolVar(&p.noUnpack, "no-unpack", false, "load only")
	f.BoolVarP(&p.quiet, "quiet", "q", false, "show no progress")
	return cmd
}

// inspectTime makes times in listings the same everywhere.
func inspectTime(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format(time.RFC3339)
}
