package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/typo"
	"github.com/gantryd/gantry/oci"
)

// addCommands is the list of all commands.
func (a *app) addCommands(root *cobra.Command) {
	root.AddCommand(
		a.runCommand(), a.createCommand(), a.startCommand(), a.stopCommand(), a.killCommand(), a.pauseCommand(), a.unpauseCommand(),
		a.rmCommand(), a.psCommand(), a.logsCommand(), a.execCommand(), a.attachCommand(), a.statsCommand(), a.inspectCommand(), a.waitCommand(), a.podCommand(),
		a.pullCommand(), a.pushCommand(), a.imagesCommand(), a.rmiCommand(), a.tagCommand(), a.saveCommand(), a.loadCommand(),
		a.eventsCommand(), a.infoCommand(), a.versionCommand(), a.demoCommand(),
		a.contentCommand(), a.snapshotCommand(), a.leaseCommand(), a.namespaceCommand(), a.pluginCommand(), a.taskCommand(),
		manCommand(), demoWorkCommand(),
	)
	a.complete(root)
}

// Bounds of what a command waits for after it has asked for it.
const (
	killTimeout  = 30 * time.Second // for the end of a process that was killed
	cleanTimeout = time.Minute      // for all of a container to go
)

// find looks a container up by its id or the beginning of it, if that is
// unique. It says where the container is if another namespace has it, and
// which one may have been meant.
func (a *app) find(ctx context.Context, v view.View, ref string) (container.Container, error) {
	if c, ok, err := findKubernetes(ctx, v, ref); ok || err != nil {
		return c, err
	}
	c, err := v.Containers().Get(ctx, container.ID(ref))
	if err == nil || !errdefs.IsNotFound(err) {
		return c, err
	}
	var found []container.Container
	if ferr := v.Containers().Walk(ctx, func(c container.Container) error {
		found = append(found, c)
		return nil
	}, "id~=|^"+regexp.QuoteMeta(ref)+"|"); ferr != nil { // the store has checked its letters
		return c, ferr
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
	default:
		return c, fmt.Errorf("container %q: several ids begin like that: %s and %s: %w", ref, found[0].ID, found[1].ID, errdefs.ErrInvalidArgument)
	}
	err = a.missing(ctx, err, func(other view.View) error {
		var found error = errdefs.ErrNotFound
		if err := other.Containers().Walk(ctx, func(container.Container) error { found = nil; return nil }, "id~=|^"+regexp.QuoteMeta(ref)+"|"); err != nil {
			return err
		}
		return found
	})
	var h *hinted
	if errors.As(err, &h) {
		return c, err
	}
	var names []string
	if v.Containers().Walk(ctx, func(c container.Container) error {
		names = append(names, string(c.ID))
		if spec, err := client.Spec(c); err == nil {
			if k := kubernetesOf(spec); k != nil && !k.Pause {
				names = append(names, k.String())
			}
		}
		return nil
	}) == nil {
		if best := typo.Closest(ref, names, max(1, len(ref)/3)); best != "" {
			return c, &hinted{err, fmt.Sprintf("did you mean %s?", best)}
		}
	}
	return c, &hinted{err, "list all containers with: " + a.us() + " ps -a"}
}

// onContainers makes a command of what it does with several containers.
func (a *app) onContainers(use, short string, run func(ctx context.Context, v view.View, args []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, GroupID: "run", Args: cobra.MinimumNArgs(1), RunE: a.inView(run)}
}

// each makes a command of what it does with every container that was named.
func (a *app) each(use, short string, run func(ctx context.Context, v view.View, c container.Container) error) *cobra.Command {
	return a.onContainers(use, short, func(ctx context.Context, v view.View, args []string) error {
		return a.eachOf(ctx, v, args, false, func(c container.Container) error { return run(ctx, v, c) })
	})
}

func (a *app) eachOf(ctx context.Context, v view.View, refs []string, absentOK bool, do func(c container.Container) error) error {
	return each(a, refs, absentOK, func(ref string) (container.Container, error) { return a.find(ctx, v, ref) }, do,
		func(c container.Container) string { return string(c.ID) })
}

func (a *app) startCommand() *cobra.Command {
	var attach, interactive bool
	cmd := a.onContainers("start CONTAINER...", "Start containers that were created or have stopped", func(ctx context.Context, v view.View, args []string) error {
		if !attach && !interactive {
			return a.eachOf(ctx, v, args, false, func(c container.Container) error {
				if err := a.clearTask(ctx, v, c); err != nil {
					return err
				}
				return a.startDetached(ctx, v, c)
			})
		}
		if len(args) > 1 {
			return fmt.Errorf("--attach and --interactive are for one container, not %d", len(args))
		}
		c, err := a.find(ctx, v, args[0])
		if err != nil {
			return err
		}
		if err := a.clearTask(ctx, v, c); err != nil {
			return err
		}
		spec, err := client.Spec(c)
		if err != nil {
			return err
		}
		code, err := a.runAttached(ctx, v, c, interactive, spec.Process != nil && spec.Process.Terminal)
		return exitError(code, err)
	})
	cmd.Flags().BoolVarP(&attach, "attach", "a", false, "show its output and return its exit code")
	cmd.Flags().BoolVarP(&interactive, "interactive", "i", false, "connect standard input as well")
	return cmd
}

// clearTask deletes what is left of a container's last run, so that it can be
// started again.
func (a *app) clearTask(ctx context.Context, v view.View, c container.Container) error {
	p, err := v.Tasks().Get(ctx, c.ID, "")
	switch {
	case errdefs.IsNotFound(err):
		return nil
	case err != nil:
		return err
	case p.Status == task.StatusStopped, p.Status == task.StatusCreated:
		_, err := v.Tasks().Delete(ctx, c.ID)
		return ignoreNotFound(err)
	case p.Status == task.StatusPaused:
		return &hinted{fmt.Errorf("start container %s: it is paused: %w", c.ID, errdefs.ErrFailedPrecondition), fmt.Sprintf("use %s unpause %s", a.us(), c.ID)}
	}
	return fmt.Errorf("start container %s: it is %s already: %w", c.ID, strings.ToLower(p.Status.String()), errdefs.ErrFailedPrecondition)
}

func ignoreNotFound(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}

func (a *app) stopCommand() *cobra.Command {
	var seconds int
	var sig string
	cmd := a.each("stop CONTAINER...", "Ask containers to end, and kill those that do not", func(ctx context.Context, v view.View, c container.Container) error {
		return a.stop(ctx, v, c, sig, time.Duration(seconds)*time.Second)
	})
	cmd.Flags().IntVarP(&seconds, "time", "t", 10, "`seconds` until it is killed, -1 for never")
	cmd.Flags().StringVarP(&sig, "signal", "s", "", "`signal` to ask with (that of the image, or SIGTERM)")
	return cmd
}

// stop ends a container's process: first with the signal that its image asks
// for, then, after grace, with SIGKILL. A negative grace never kills.
func (a *app) stop(ctx context.Context, v view.View, c container.Container, name string, grace time.Duration) error {
	sig, err := parseSignal(cmp.Or(name, c.Labels[oci.StopSignalLabel], "SIGTERM"))
	if err != nil {
		return err
	}
	p, err := v.Tasks().Get(ctx, c.ID, "")
	switch {
	case errdefs.IsNotFound(err), err == nil && p.Status == task.StatusStopped:
		return nil // as docker has it, that is no error
	case err != nil:
		return err
	case p.Status == task.StatusCreated:
		// It has no program yet that could listen.
		sig, grace = uint32(unix.SIGKILL), max(grace, 0)
	}
	err = v.Tasks().Kill(ctx, c.ID, "", sig, false)
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	if p.Status == task.StatusPaused {
		if err := v.Tasks().Resume(ctx, c.ID); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	waiting, cancel := ctx, context.CancelFunc(func() {})
	if grace >= 0 {
		waiting, cancel = context.WithTimeout(ctx, grace)
	}
	_, err = v.Tasks().Wait(waiting, c.ID, "")
	// The daemon may be the first to notice that the time is over.
	over := ctx.Err() == nil && (waiting.Err() != nil || errors.Is(err, context.DeadlineExceeded))
	cancel()
	if err != nil && over {
		err = a.kill9(ctx, v, c)
	}
	return ignoreNotFound(err)
}

// kill9 kills all processes of a container and waits for the end.
func (a *app) kill9(ctx context.Context, v view.View, c container.Container) error {
	ctx, cancel := context.WithTimeout(ctx, killTimeout)
	defer cancel()
	// A frozen process does not even die, so it is thawed with its death ahead.
	if p, err := v.Tasks().Get(ctx, c.ID, ""); err == nil && p.Status == task.StatusPaused {
		if err := v.Tasks().Kill(ctx, c.ID, "", uint32(unix.SIGKILL), false); err != nil && !errdefs.IsNotFound(err) {
			return err
		}
		if err := v.Tasks().Resume(ctx, c.ID); err != nil && !errdefs.IsNotFound(err) && !errdefs.IsFailedPrecondition(err) {
			return err
		}
	}
	if err := v.Tasks().Kill(ctx, c.ID, "", uint32(unix.SIGKILL), true); err != nil {
		return err
	}
	if _, err := v.Tasks().Wait(ctx, c.ID, ""); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("container %s survives SIGKILL for %v: %w", c.ID, killTimeout, err)
		}
		return err
	}
	return nil
}

// parseSignal reads a signal's number or name, with or without SIG, real-time
// ones too (RTMIN+3).
func parseSignal(s string) (uint32, error) {
	if n, err := strconv.ParseUint(s, 10, 8); err == nil && n > 0 && n <= 64 {
		return uint32(n), nil
	}
	name := strings.ToUpper(s)
	if !strings.HasPrefix(name, "SIG") {
		name = "SIG" + name
	}
	if n := unix.SignalNum(name); n != 0 {
		return uint32(n), nil
	}
	const first, last = 34, 64 // as the C library has them
	for prefix, base := range map[string]int{"SIGRTMIN": first, "SIGRTMAX": last} {
		if rest, ok := strings.CutPrefix(name, prefix); ok {
			n, err := strconv.Atoi(rest)
			if n += base; (rest == "" || err == nil) && n >= first && n <= last {
				return uint32(n), nil
			}
		}
	}
	return 0, fmt.Errorf("unknown signal %q: %w", s, errdefs.ErrInvalidArgument)
}

func (a *app) killCommand() *cobra.Command {
	var name string
	var all bool
	cmd := a.each("kill CONTAINER...", "Send a signal to containers", func(ctx context.Context, v view.View, c container.Container) error {
		sig, err := parseSignal(name)
		if err != nil {
			return err
		}
		p, err := v.Tasks().Get(ctx, c.ID, "")
		switch {
		case err != nil:
		case p.Status == task.StatusStopped:
			err = errdefs.ErrNotFound
		case sig == uint32(unix.SIGKILL):
			err = a.kill9(ctx, v, c)
		default:
			err = v.Tasks().Kill(ctx, c.ID, "", sig, all)
		}
		if err != nil {
			if errdefs.IsNotFound(err) {
				return &hinted{fmt.Errorf("kill container %s: it is not running: %w", c.ID, errdefs.ErrFailedPrecondition), "see: " + a.us() + " ps -a"}
			}
			return err
		}
		return nil
	})
	cmd.Flags().StringVarP(&name, "signal", "s", "SIGKILL", "`signal` by name or number")
	cmd.Flags().BoolVar(&all, "all", false, "send it to all processes of the container")
	return cmd
}

func (a *app) pauseCommand() *cobra.Command {
	return a.each("pause CONTAINER...", "Freeze the processes of containers", func(ctx context.Context, v view.View, c container.Container) error {
		return a.notRunning(c, "pause", v.Tasks().Pause(ctx, c.ID))
	})
}

func (a *app) unpauseCommand() *cobra.Command {
	return a.each("unpause CONTAINER...", "Thaw the processes of containers", func(ctx context.Context, v view.View, c container.Container) error {
		return a.notRunning(c, "unpause", v.Tasks().Resume(ctx, c.ID))
	})
}

// notRunning makes legible that a container has no task. One of a pod is
// started by the kubelet, never again under the same id.
func (a *app) notRunning(c container.Container, verb string, err error) error {
	if !errdefs.IsNotFound(err) {
		return err
	}
	hint := fmt.Sprintf("start it with: %s start %s", a.us(), c.ID)
	if spec, err := client.Spec(c); err == nil {
		if k := kubernetesOf(spec); k != nil {
			hint = fmt.Sprintf("it is of a pod, see: gantry pod ls %s/%s", k.Namespace, k.Pod)
		}
	}
	return &hinted{fmt.Errorf("%s container %s: it is not running: %w", verb, c.ID, errdefs.ErrFailedPrecondition), hint}
}

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := a.onContainers("rm CONTAINER...", "Remove containers with their kept output", func(ctx context.Context, v view.View, args []string) error {
		return a.eachOf(ctx, v, args, force, func(c container.Container) error { return a.remove(ctx, v, c, force) })
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "kill what runs; one that is not there is no error")
	return cmd
}

// remove deletes the task, the record with its snapshot, and the kept output.
// What another command removes at the same time is no error.
func (a *app) remove(ctx context.Context, v view.View, c container.Container, force bool) error {
	ctx, cancel := context.WithTimeout(ctx, cleanTimeout)
	defer cancel()
	_, err := v.Tasks().Delete(ctx, c.ID)
	if errdefs.IsFailedPrecondition(err) && force {
		if kerr := a.kill9(ctx, v, c); kerr != nil && !errdefs.IsNotFound(kerr) {
			return kerr
		}
		_, err = v.Tasks().Delete(ctx, c.ID)
	}
	if err != nil && !errdefs.IsNotFound(err) {
		if errdefs.IsFailedPrecondition(err) {
			err = &hinted{err, fmt.Sprintf("stop it first (%s stop %s), or use rm --force", a.us(), c.ID)}
		}
		return err
	}
	// While the id is taken, nobody else's output can be in that folder.
	if dir := keptDir(c); dir != "" {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	return ignoreNotFound(client.DeleteContainer(ctx, v, c.ID))
}

// keptDir is the folder of a container's kept output, "" if there is none. Another
// client may have written the note: only what looks like ours is believed.
func keptDir(c container.Container) string {
	u, err := url.Parse(c.Note(noteLog))
	if err != nil || u.Scheme != "file" || !filepath.IsAbs(u.Path) || filepath.Clean(u.Path) != u.Path {
		return ""
	}
	dir := filepath.Dir(u.Path)
	if filepath.Base(u.Path) != "log" || filepath.Base(dir) != string(c.ID) || filepath.Base(filepath.Dir(filepath.Dir(dir))) != logFolder {
		return ""
	}
	return dir
}

func (a *app) waitCommand() *cobra.Command {
	return a.onContainers("wait CONTAINER...", "Wait until containers have ended and print their exit codes", func(ctx context.Context, v view.View, args []string) error {
		exits := []task.Exit{}
		for _, ref := range args {
			c, err := a.find(ctx, v, ref)
			if err != nil {
				return err
			}
			exit, err := v.Tasks().Wait(ctx, c.ID, "")
			if err != nil {
				return a.notRunning(c, "wait for", err)
			}
			exits = append(exits, exit)
			if a.format != "json" {
				fmt.Fprintln(a.out, exit.Status)
			}
		}
		if a.format == "json" {
			return a.json(exits)
		}
		return nil
	})
}

// containerRow is a container in a listing.
type containerRow struct {
	Namespace string            `json:"namespace"`
	ID        container.ID      `json:"id"`
	Image     string            `json:"image"`
	Command   []string          `json:"command"`
	Status    string            `json:"status"`
	Pid       uint32            `json:"pid,omitempty"`
	ExitCode  *uint32           `json:"exit_code,omitempty"`
	ExitedAt  *time.Time        `json:"exited_at,omitempty"`
	Runtime   string            `json:"runtime"`
	Labels    map[string]string `json:"labels,omitempty"`
	CreatedAt time.Time         `json:"created_at"`
	// Kubernetes is set if a kubelet made it.
	Kubernetes *kubernetesName `json:"kubernetes,omitempty"`
}

// statusText is what the table says.
func (r containerRow) statusText() string {
	if r.ExitCode == nil {
		return r.Status
	}
	s := fmt.Sprintf("exited (%d)", *r.ExitCode)
	if r.ExitedAt != nil {
		s += " " + ago(*r.ExitedAt)
	}
	return s
}

func (a *app) psCommand() *cobra.Command {
	var all, quiet, noTrunc bool
	var filters []string
	cmd := &cobra.Command{
		Use: "ps", Short: "List containers", Aliases: []string{"container-ls"}, GroupID: "run", Args: cobra.NoArgs,
		Long:    "Lists the containers that run, or all with -a, Kubernetes' pause containers too.\n\nA filter is status=running|paused|created|exited, id=PREFIX, image=NAME, label=KEY[=VALUE],\nor what the API understands: 'labels.\"KEY\"==VALUE', 'id~=REGEX'. All of them must match.",
		Example: "  gantry ps -a\n  gantry ps --filter status=exited -q\n  gantry ps -A -o json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx := cmd.Context()
			statuses, match, err := parsePsFilters(filters)
			if err != nil {
				return err
			}
			vs, err := a.views(ctx)
			if err != nil {
				return err
			}
			list := []containerRow{}
			for _, v := range vs {
				some, err := a.containers(ctx, v, match)
				if err == nil && (all || len(statuses) > 0) {
					err = a.kubernetesEnds(ctx, some)
				}
				if err != nil {
					return err
				}
				for _, r := range some {
					state, _, _ := strings.Cut(r.Status, " ")
					switch {
					case !all && len(filters) == 0 && r.Kubernetes != nil && r.Kubernetes.Pause: // it is the pod, see gantry pod ls
					case len(statuses) > 0 && !slices.Contains(statuses, state):
					case len(statuses) == 0 && !all && state != "running" && state != "paused" && state != "pausing" && state != "unknown":
					default:
						list = append(list, r)
					}
				}
			}
			if quiet {
				var ids []string
				for _, r := range list {
					ids = append(ids, string(r.ID))
				}
				return a.names(ids...)
			}
			var rows [][]string
			kube := slices.ContainsFunc(list, func(r containerRow) bool { return r.Kubernetes != nil })
			for _, r := range list {
				command, id := strings.Join(r.Command, " "), string(r.ID)
				if !noTrunc {
					command, id = cut(command, 40), shortID(id)
				}
				cells := []string{id, r.Image, printable(command), r.statusText(), ago(r.CreatedAt)}
				if kube {
					cells = slices.Insert(cells, 1, r.Kubernetes.String())
				}
				if a.all {
					cells = append(cells, r.Namespace)
				}
				rows = append(rows, cells)
			}
			header := "ID|IMAGE|COMMAND|STATUS|CREATED"
			if kube {
				header = "ID|POD AND CONTAINER|IMAGE|COMMAND|STATUS|CREATED"
			}
			if a.all {
				header += "|NAMESPACE"
			}
			if len(list) == 0 && len(filters) == 0 {
				defer a.elsewhere(ctx, "ps", hasContainers)
			}
			if noTrunc {
				a.wide = true
			} else if kube {
				header, rows = a.squeeze(header, rows, "COMMAND", "CREATED", "IMAGE")
			}
			return a.table(list, header, rows)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&all, "all", "a", false, "list those that do not run as well")
	f.BoolVarP(&quiet, "quiet", "q", false, "print only ids")
	f.BoolVar(&noTrunc, "no-trunc", false, "do not shorten anything")
	f.StringArrayVarP(&filters, "filter", "f", nil, "`condition`, see above")
	return cmd
}

// printable replaces what would break a table or drive a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// parsePsFilters divides filters into statuses, which only tasks know, and one
// filter for the store.
func parsePsFilters(list []string) (statuses []string, match []string, err error) {
	var terms []string
	for _, s := range list {
		k, v, ok := strings.Cut(s, "=")
		if ok && strings.HasPrefix(v, "=") || strings.HasSuffix(k, "~") || strings.HasSuffix(k, "!") {
			terms = append(terms, s)
			continue
		}
		switch {
		case !ok && !strings.HasPrefix(s, "labels."):
			return nil, nil, fmt.Errorf("filter %q: use name=value: %w", s, errdefs.ErrInvalidArgument)
		case !ok:
			terms = append(terms, s)
		case k == "status":
			if v == "stopped" {
				v = "exited"
			}
			if !slices.Contains([]string{"running", "paused", "pausing", "created", "exited", "unknown"}, v) {
				return nil, nil, fmt.Errorf("filter %q: a status is running, paused, created or exited: %w", s, errdefs.ErrInvalidArgument)
			}
			statuses = append(statuses, v)
		case k == "id" || k == "name":
			if strings.Contains(v, "|") {
				return nil, nil, fmt.Errorf("filter %q: no id has a bar: %w", s, errdefs.ErrInvalidArgument)
			}
			terms = append(terms, "id~=|"+regexp.QuoteMeta(v)+"|")
		case k == "image" || k == "ancestor":
			name, err := normalize(v)
			if err != nil {
				return nil, nil, err
			}
			terms = append(terms, fmt.Sprintf("image==%q", name))
		case k == "label":
			key, value, has := strings.Cut(v, "=")
			term := fmt.Sprintf("labels.%q", key)
			if has {
				term += fmt.Sprintf("==%q", value)
			}
			terms = append(terms, term)
		default:
			return nil, nil, fmt.Errorf("filter %q: use status, id, image or label: %w", s, errdefs.ErrInvalidArgument)
		}
	}
	if len(terms) > 0 {
		match = []string{strings.Join(terms, ",")}
	}
	return statuses, match, nil
}

// containers lists the containers of one namespace with the state of their tasks.
func (a *app) containers(ctx context.Context, v view.View, match []string) ([]containerRow, error) {
	tasks, err := v.Tasks().List(ctx)
	if err != nil {
		return nil, err
	}
	state := map[container.ID]task.Process{}
	for _, p := range tasks {
		state[p.ContainerID] = p
	}
	var rows []containerRow
	err = v.Containers().Walk(ctx, func(c container.Container) error {
		r := containerRow{Namespace: string(v.Namespace()), ID: c.ID, Image: c.Image, Runtime: c.Runtime.Name, Labels: c.Labels, CreatedAt: c.CreatedAt, Status: "created"}
		if spec, err := client.Spec(c); err == nil {
			if spec.Process != nil {
				r.Command = spec.Process.Args
			}
			if r.Kubernetes = kubernetesOf(spec); r.Kubernetes != nil && spec.Annotations[annotationImage] != "" {
				r.Image = spec.Annotations[annotationImage] // the record has the image's id
			}
		}
		if p, ok := state[c.ID]; ok {
			r.Pid = p.Pid
			switch p.Status {
			case task.StatusStopped:
				r.Status, r.Pid, r.ExitCode = "exited", 0, &p.ExitStatus
				if !p.ExitedAt.IsZero() {
					r.ExitedAt = &p.ExitedAt
				}
			default:
				r.Status = strings.ToLower(p.Status.String())
			}
		}
		rows = append(rows, r)
		return nil
	}, match...)
	slices.SortStableFunc(rows, func(x, y containerRow) int { return y.CreatedAt.Compare(x.CreatedAt) })
	return rows, err
}
