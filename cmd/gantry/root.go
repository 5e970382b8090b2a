package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
)

// app is one run of the program: its streams, the flags that all commands
// have, and the connection, which is made when the first command needs it.
type app struct {
	in       *os.File
	out, err *os.File

	address   string
	namespace string
	all       bool
	// podNamespace is a namespace of Kubernetes, "" for all.
	podNamespace string
	format       string
	wide         bool // tables are not cut to the terminal's width
	timeout      time.Duration
	client       *client.Client
}

func newApp(in, out, err *os.File) *app { return &app{in: in, out: out, err: err} }

func (a *app) close() {
	if a.client != nil {
		a.client.Close()
	}
}

func env(name, def string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return def
}

func defaultNamespace() string {
	return env("GANTRY_NAMESPACE", env("CONTAINERD_NAMESPACE", string(namespace.Default)))
}

func (a *app) command() *cobra.Command {
	root := &cobra.Command{
		Use:           "gantry",
		Short:         "Run containers",
		Long:          "gantry runs containers and shows what the daemon, gantryd, has: images, containers, snapshots, content.\n\nStart with:  gantry run -it docker.io/library/alpine\nOr see all of it work on this machine, without a network:  gantry demo",
		SilenceErrors: true, SilenceUsage: true,
		Version: version + " " + revision,
	}
	f := root.PersistentFlags()
	f.StringVar(&a.address, "address", env("GANTRY_ADDRESS", env("CONTAINERD_ADDRESS", client.DefaultAddress)), "`path` of the daemon's socket [$GANTRY_ADDRESS, $CONTAINERD_ADDRESS]")
	f.StringVarP(&a.namespace, "namespace", "n", defaultNamespace(), "`namespace` to work in [$GANTRY_NAMESPACE, $CONTAINERD_NAMESPACE]")
	f.BoolVarP(&a.all, "all-namespaces", "A", false, "list what is in all namespaces")
	f.StringVarP(&a.format, "output", "o", "", "`format`: table or json")
	f.DurationVar(&a.timeout, "timeout", 0, "give up after this `duration` (0 is never)")
	root.AddGroup(&cobra.Group{ID: "run", Title: "Containers:"}, &cobra.Group{ID: "image", Title: "Images:"}, &cobra.Group{ID: "daemon", Title: "Daemon:"}, &cobra.Group{ID: "low", Title: "Low level:"})
	root.SetHelpCommandGroupID("daemon")
	root.SetCompletionCommandGroupID("daemon")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if a.format != "" && a.format != "table" && a.format != "json" {
			return fmt.Errorf("unknown output format %q, use table or json", a.format)
		}
		if a.timeout > 0 {
			ctx, cancel := context.WithTimeout(cmd.Context(), a.timeout)
			context.AfterFunc(ctx, cancel)
			cmd.SetContext(ctx)
		}
		return nil
	}
	a.addCommands(root)
	return root
}

// connectTimeout bounds how long a command waits for the daemon to answer.
const connectTimeout = 10 * time.Second

// dial returns the connection, once the daemon has answered on it.
func (a *app) dial(ctx context.Context) (*client.Client, error) {
	if a.client != nil {
		return a.client, nil
	}
	path := strings.TrimPrefix(a.address, "unix://")
	if strings.Contains(path, "://") {
		return nil, &hinted{fmt.Errorf("address %s: %w", a.address, errdefs.ErrInvalidArgument), "it is the path of a Unix socket, such as " + client.DefaultAddress}
	}
	switch info, err := os.Stat(path); {
	case errors.Is(err, os.ErrNotExist):
		return nil, fmt.Errorf("no daemon at %s: %w", a.address, errdefs.ErrUnavailable)
	case err != nil:
		return nil, fmt.Errorf("connect to the daemon: %w", err)
	case info.Mode().Type() != os.ModeSocket:
		return nil, fmt.Errorf("no daemon at %s: it is not a socket: %w", a.address, errdefs.ErrUnavailable)
	}
	// A socket that nobody listens on would be tried again until the time is over.
	probe, err := net.DialTimeout("unix", path, connectTimeout)
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("connect to the daemon: %w", err)
	case err != nil:
		return nil, fmt.Errorf("no daemon listens on %s: %w: %w", a.address, err, errdefs.ErrUnavailable)
	}
	probe.Close()
	c, err := client.Dial(a.address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	if err := c.Serving(ctx); err != nil {
		c.Close()
		return nil, err
	}
	a.client = c
	return c, nil
}

// view opens the namespace that the flags name.
func (a *app) view(ctx context.Context) (view.View, error) { return a.leased(ctx, "") }

func (a *app) leased(ctx context.Context, under lease.ID) (view.View, error) {
	c, err := a.dial(ctx)
	if err != nil {
		return nil, err
	}
	return c.In(namespace.ID(a.namespace), under)
}

// views opens what a listing is about: the namespace of the flags, or all.
func (a *app) views(ctx context.Context) ([]view.View, error) {
	if !a.all {
		v, err := a.view(ctx)
		return []view.View{v}, err
	}
	c, err := a.dial(ctx)
	if err != nil {
		return nil, err
	}
	all, err := c.Namespaces().List(ctx)
	if err != nil {
		return nil, err
	}
	var out []view.View
	for _, ns := range all {
		v, err := c.In(ns.ID, "")
		if err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, nil
}

// listAll lists what is in the namespace of the flags, or in all.
func listAll[T any](ctx context.Context, a *app, list func(v view.View) ([]T, error)) ([]T, error) {
	vs, err := a.views(ctx)
	if err != nil {
		return nil, err
	}
	var all []T
	for _, v := range vs {
		some, err := list(v)
		if err != nil {
			return nil, err
		}
		all = append(all, some...)
	}
	return all, nil
}

// inView makes of run what a command of one namespace does.
func (a *app) inView(run func(ctx context.Context, v view.View, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		v, err := a.view(cmd.Context())
		if err != nil {
			return err
		}
		return run(cmd.Context(), v, args)
	}
}

// every does something with every argument. One that fails does not keep the
// others from their turn; the error is that of all.
func every(args []string, do func(arg string) error) error {
	var all error
	for _, arg := range args {
		all = errors.Join(all, do(arg))
	}
	return all
}

// each does something with every object that was named, and prints the titles
// of those for which it succeeded, as a list if JSON was asked for. With absentOK,
// one that is not there is no error.
func each[T any](a *app, refs []string, absentOK bool, find func(ref string) (T, error), do func(T) error, title func(T) string) error {
	done := []string{}
	err := every(refs, func(ref string) error {
		o, err := find(ref)
		if absentOK && errdefs.IsNotFound(err) {
			return nil
		}
		if err == nil {
			err = do(o)
		}
		if err == nil {
			if done = append(done, title(o)); a.format != "json" {
				return a.names(title(o)) // each as soon as it is done
			}
		}
		return err
	})
	if a.format == "json" {
		err = errors.Join(err, a.names(done...))
	}
	return err
}

// missing makes a "not found" say where the object is, if another namespace
// has it. find looks for it in one namespace.
func (a *app) missing(ctx context.Context, err error, find func(view.View) error) error {
	if err == nil || !errdefs.IsNotFound(err) || a.client == nil {
		return err
	}
	// The hint is worth a moment, not more.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	all, lerr := a.client.Namespaces().List(ctx)
	if lerr != nil {
		return err
	}
	for _, ns := range all {
		if string(ns.ID) == a.namespace {
			continue
		}
		if v, verr := a.client.In(ns.ID, ""); verr == nil && find(v) == nil {
			return &hinted{err, fmt.Sprintf("it is in namespace %s: use gantry -n %s", ns.ID, ns.ID)}
		}
	}
	return err
}

// us is how advice names this program: with the namespace that the command was
// given, so that what it says to type looks at the same place.
func (a *app) us() string {
	if a.namespace == defaultNamespace() {
		return "gantry"
	}
	return "gantry -n " + a.namespace
}

// hinted is an error with advice.
type hinted struct {
	error
	hint string
}

func (h *hinted) Unwrap() error { return h.error }

// explain prints an error and what to do next.
func (a *app) explain(cmd *cobra.Command, err error) {
	fmt.Fprintln(a.err, "gantry: "+legible(err.Error()))
	if hint := advice(a, cmd, err); hint != "" {
		fmt.Fprintln(a.err, "hint: "+legible(hint)) // the beginning of an id is enough to type
	}
}

// longID is a random id among words, with or without its namespace; not a digest
// and not a part of a path.
var longID = regexp.MustCompile(`(^|[ "(])((?:[\w.-]+/)?[0-9a-f]{12})[0-9a-f]{52}\b`)

// legible shortens random ids, and leaves out lines that only repeat how the one
// before ends: the class of an error, once for every hop that it has made.
func legible(text string) string {
	text = longID.ReplaceAllString(text, "$1$2")
	var lines []string
	for line := range strings.SplitSeq(text, "\n") {
		if n := len(lines); n > 0 && (lines[n-1] == line || strings.HasSuffix(lines[n-1], ": "+line)) {
			continue
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "\n")
}

func advice(a *app, cmd *cobra.Command, err error) string {
	var h *hinted
	text := err.Error()
	switch {
	case errors.As(err, &h):
		return h.hint
	case errors.Is(err, os.ErrPermission) || strings.Contains(text, "permission denied") && strings.Contains(text, a.address):
		return "the daemon's socket belongs to root: use sudo"
	case errdefs.IsUnavailable(err) && a.client == nil:
		return fmt.Sprintf("is gantryd running? Start it with: systemctl start gantry, or: sudo gantryd. For another socket: gantry --address PATH (now %s)", a.address)
	case errdefs.IsUnauthorized(err), strings.Contains(text, ": 401 "), strings.Contains(text, ": 403 "):
		return "the registry wants a login, or the name is wrong: gantry pull --user NAME IMAGE"
	case isUsage(text):
		return fmt.Sprintf("see: %s --help", cmd.CommandPath())
	}
	return ""
}

// isUsage says whether an error is of the command line itself.
func isUsage(text string) bool {
	for _, p := range []string{"unknown command", "unknown flag", "unknown shorthand", "unknown output format", "requires at least", "accepts ", "invalid argument ", "flag needs an argument", "bad flag syntax"} {
		if strings.HasPrefix(text, p) {
			return true
		}
	}
	return false
}

// failureCode is the exit code for an error of Gantry's own (docker's
// convention, which scripts know).
func failureCode(err error) int {
	text := err.Error()
	switch {
	case strings.Contains(text, "executable file not found"), strings.Contains(text, "no such file or directory") && strings.Contains(text, "exec"):
		return 127
	case strings.Contains(text, "permission denied") && strings.Contains(text, "exec"), strings.Contains(text, ": is a directory") && strings.Contains(text, "exec"):
		return 126
	case isUsage(text):
		return 2
	}
	return 125
}
