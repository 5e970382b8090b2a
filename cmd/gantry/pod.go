package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/lib/typo"
)

// kubernetesNamespace is where the CRI keeps what it makes.
const kubernetesNamespace namespace.ID = "k8s.io"

// podTimeout bounds a call of the CRI that only reads.
const podTimeout = 30 * time.Second

// podAsks is how many pods are asked at once for what only their status tells.
const podAsks = 8

// pods is Kubernetes' interface of the daemon, and the namespace (of
// Kubernetes) that is asked about, "" for all.
type pods struct {
	runtime.RuntimeServiceClient
	namespace string
}

func (a *app) podCommand() *cobra.Command {
	pod := group("pod", "Show and manage Kubernetes' pods", []string{"pods"},
		a.podLsCommand(), a.podInspectCommand(), a.podStopCommand(), a.podRmCommand(), a.podLogsCommand(), a.podExecCommand(), a.podAttachCommand(), a.podForwardCommand(), a.podStatsCommand())
	pod.GroupID = "run"
	pod.Long = "Shows the pods that a kubelet has made on this machine, and manages them without the kubelet.\n\n" +
		"POD is a name, NAMESPACE/NAME, or the beginning of an id.\n" +
		"What Kubernetes wants is its API server's affair: a pod that is stopped or removed here, the kubelet makes anew."
	// In the place of the flag that all commands have: pods are in no namespace of containers.
	pod.PersistentFlags().StringVarP(&a.podNamespace, "namespace", "n", "", "`namespace` of Kubernetes, such as kube-system (all)")
	pod.PersistentFlags().BoolVarP(&a.all, "all-namespaces", "A", false, "look at all namespaces, as without -n")
	if err := pod.RegisterFlagCompletionFunc("namespace", a.completePodNamespaces); err != nil {
		panic(err) // it was just defined
	}
	for _, c := range pod.Commands() {
		c.ValidArgsFunction = a.completePods
		if c.Flags().Lookup("container") != nil {
			if err := c.RegisterFlagCompletionFunc("container", a.completeContainers); err != nil {
				panic(err) // the flag was just looked up
			}
		}
	}
	return pod
}

// pods connects to the daemon's CRI.
func (a *app) pods(cmd *cobra.Command) (*pods, error) {
	c, err := a.dial(cmd.Context())
	if err != nil {
		return nil, err
	}
	p := &pods{RuntimeServiceClient: runtime.NewRuntimeServiceClient(c.Conn())}
	if !a.all && a.podNamespace != string(kubernetesNamespace) { // who says -n k8s.io means all that is there
		p.namespace = a.podNamespace
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), connectTimeout)
	defer cancel()
	for {
		// A daemon that was just started may serve it a moment later.
		if _, err = p.Version(ctx, &runtime.VersionRequest{}); !errdefs.IsUnavailable(err) {
			break
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(poll):
		}
	}
	if errdefs.IsNotImplemented(err) {
		return nil, &hinted{fmt.Errorf("pods: the daemon at %s does not serve Kubernetes: %w", a.address, errdefs.ErrNotImplemented), "its configuration disables io.containerd.grpc.v1.cri (disabled_plugins), or it could not start: gantry plugin ls"}
	}
	return p, err
}

// podRow is a pod in a listing.
type podRow struct {
	ID         string            `json:"id"`
	Namespace  string            `json:"namespace"`
	Name       string            `json:"name"`
	UID        string            `json:"uid"`
	Attempt    uint32            `json:"attempt"`
	State      string            `json:"state"` // "ready" or "stopped"
	IPs        []string          `json:"ips"`
	Running    int               `json:"running"`
	Containers []podContainerRow `json:"containers"`
	Handler    string            `json:"handler"`
	Labels     map[string]string `json:"labels,omitempty"`
	CreatedAt  time.Time         `json:"created_at"`
}

// podContainerRow is the last attempt at a container of a pod.
type podContainerRow struct {
	ID      string `json:"id"`
	Name    string `json:"name"`
	Image   string `json:"image"`
	State   string `json:"state"` // "created", "running", "exited" or "unknown"
	Attempt uint32 `json:"attempt"`
}

func podState(s runtime.PodSandboxState) string {
	if s == runtime.PodSandboxState_SANDBOX_READY {
		return "ready"
	}
	return "stopped"
}

func containerState(s runtime.ContainerState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "CONTAINER_"))
}

// list lists the pods that match, those of the namespace only: ready ones
// first, then the newest.
func (p *pods) list(ctx context.Context, filter *runtime.PodSandboxFilter) ([]*runtime.PodSandbox, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	r, err := p.ListPodSandbox(ctx, &runtime.ListPodSandboxRequest{Filter: filter})
	if err != nil {
		return nil, err
	}
	list := slices.DeleteFunc(r.Items, func(x *runtime.PodSandbox) bool {
		return p.namespace != "" && x.GetMetadata().GetNamespace() != p.namespace
	})
	slices.SortStableFunc(list, func(x, y *runtime.PodSandbox) int {
		return cmp.Or(cmp.Compare(x.State, y.State), cmp.Compare(y.CreatedAt, x.CreatedAt))
	})
	return list, nil
}

// containers lists the last attempts at the containers of a pod, or of all
// pods if pod is "", oldest first.
func (p *pods) containers(ctx context.Context, pod string) ([]*runtime.Container, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	r, err := p.ListContainers(ctx, &runtime.ListContainersRequest{Filter: &runtime.ContainerFilter{PodSandboxId: pod}})
	if err != nil {
		return nil, err
	}
	last := map[string]*runtime.Container{}
	for _, c := range r.Containers {
		key := c.PodSandboxId + "/" + c.GetMetadata().GetName()
		if l := last[key]; l == nil || l.GetMetadata().GetAttempt() <= c.GetMetadata().GetAttempt() {
			last[key] = c
		}
	}
	return slices.SortedFunc(maps.Values(last), func(x, y *runtime.Container) int {
		return cmp.Or(cmp.Compare(x.CreatedAt, y.CreatedAt), cmp.Compare(x.GetMetadata().GetName(), y.GetMetadata().GetName()))
	}), nil
}

// find looks a pod up by its name, NAMESPACE/NAME, or the beginning of its id.
// Of several sandboxes of one pod it is the one that is ready, or the newest.
func (p *pods) find(ctx context.Context, ref string) (*runtime.PodSandbox, error) {
	list, err := p.list(ctx, nil)
	if err != nil {
		return nil, err
	}
	var named, begin []*runtime.PodSandbox
	for _, x := range list {
		m := x.GetMetadata()
		switch {
		case x.Id == ref:
			return x, nil
		case ref == m.GetName() || ref == m.GetNamespace()+"/"+m.GetName():
			named = append(named, x)
		case ref != "" && strings.HasPrefix(x.Id, ref):
			begin = append(begin, x)
		}
	}
	for _, other := range named {
		if m := other.GetMetadata(); m.GetNamespace() != named[0].GetMetadata().GetNamespace() {
			return nil, &hinted{fmt.Errorf("pod %q: several namespaces have one: %w", ref, errdefs.ErrInvalidArgument), fmt.Sprintf("say which: %s/%s or %s", named[0].GetMetadata().GetNamespace(), ref, podTitle(m))}
		}
	}
	switch {
	case len(named) > 0:
		return named[0], nil
	case len(begin) == 1:
		return begin[0], nil
	case len(begin) > 1:
		return nil, fmt.Errorf("pod %q: several ids begin like that: %.16s and %.16s: %w", ref, begin[0].Id, begin[1].Id, errdefs.ErrInvalidArgument)
	}
	absent := fmt.Errorf("pod %q: %w", ref, errdefs.ErrNotFound)
	if p.namespace != "" {
		all := &pods{RuntimeServiceClient: p.RuntimeServiceClient}
		if x, err := all.find(ctx, ref); err == nil {
			return nil, &hinted{absent, fmt.Sprintf("it is in namespace %s: say %s", x.GetMetadata().GetNamespace(), podTitle(x.GetMetadata()))}
		}
	}
	var names []string
	for _, x := range list {
		names = append(names, x.GetMetadata().GetName(), podTitle(x.GetMetadata()))
	}
	best := typo.Closest(ref, names, max(1, len(ref)/3))
	// People leave out what a deployment has added to the name.
	for _, x := range list {
		if name := x.GetMetadata().GetName(); best == "" && strings.HasPrefix(name, ref) {
			best = name
		}
	}
	if best != "" {
		return nil, &hinted{absent, fmt.Sprintf("did you mean %s?", best)}
	}
	return nil, &hinted{absent, "list all pods with: gantry pod ls"}
}

func podTitle(m *runtime.PodSandboxMetadata) string { return m.GetNamespace() + "/" + m.GetName() }

// container chooses a container of a pod by name, or the only one.
func (p *pods) container(ctx context.Context, pod *runtime.PodSandbox, name string) (*runtime.Container, error) {
	list, err := p.containers(ctx, pod.Id)
	if err != nil {
		return nil, err
	}
	var names []string
	for _, c := range list {
		if n := c.GetMetadata().GetName(); n == name || name == "" && len(list) == 1 || name != "" && strings.HasPrefix(c.Id, name) {
			return c, nil
		}
		names = append(names, c.GetMetadata().GetName())
	}
	title := podTitle(pod.GetMetadata())
	switch {
	case len(list) == 0:
		return nil, fmt.Errorf("pod %s has no container: %w", title, errdefs.ErrNotFound)
	case name == "":
		return nil, &hinted{fmt.Errorf("pod %s has several containers: %w", title, errdefs.ErrInvalidArgument), "choose one with -c: " + strings.Join(names, ", ")}
	}
	return nil, &hinted{fmt.Errorf("container %q of pod %s: %w", name, title, errdefs.ErrNotFound), "it has: " + strings.Join(names, ", ")}
}

// chosen finds the container that a command of one pod is about.
func (a *app) chosen(cmd *cobra.Command, pod, name string) (p *pods, x *runtime.PodSandbox, c *runtime.Container, err error) {
	if p, err = a.pods(cmd); err != nil {
		return nil, nil, nil, err
	}
	if x, err = p.find(cmd.Context(), pod); err == nil {
		c, err = p.container(cmd.Context(), x, name)
	}
	return p, x, c, err
}

// mustRun is an error if a container does not run.
func mustRun(verb string, pod *runtime.PodSandbox, c *runtime.Container) error {
	if c.State == runtime.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	name := c.GetMetadata().GetName()
	return &hinted{fmt.Errorf("%s container %s of pod %s: it is not running, but %s: %w", verb, name, podTitle(pod.GetMetadata()), containerState(c.State), errdefs.ErrFailedPrecondition),
		fmt.Sprintf("see why: gantry pod logs -c %s %s", name, podTitle(pod.GetMetadata()))}
}

func (a *app) podLsCommand() *cobra.Command {
	var quiet, noTrunc bool
	var state string
	var labels []string
	cmd := &cobra.Command{
		Use: "ls [POD...]", Short: "List pods", Aliases: []string{"ps", "list"},
		Long:    "Lists all pods, or those named. READY is how many containers run, of how many.",
		Example: "  gantry pod ls -n kube-system\n  gantry pod ls --state ready -l app=web -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			filter := &runtime.PodSandboxFilter{LabelSelector: map[string]string{}}
			switch state {
			case "":
			case "ready":
				filter.State = &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_READY}
			case "stopped", "notready":
				filter.State = &runtime.PodSandboxStateValue{State: runtime.PodSandboxState_SANDBOX_NOTREADY}
			default:
				return fmt.Errorf("--state %q: use ready or stopped", state)
			}
			for _, l := range labels {
				k, v, ok := strings.Cut(l, "=")
				if !ok {
					return fmt.Errorf("--selector %q: use KEY=VALUE", l)
				}
				filter.LabelSelector[k] = v
			}
			p, err := a.pods(cmd)
			if err != nil {
				return err
			}
			found, err := p.list(ctx, filter)
			if err == nil && len(args) > 0 {
				some := found[:0:0]
				err = every(args, func(ref string) error {
					x, err := p.find(ctx, ref)
					if err == nil && slices.ContainsFunc(found, func(f *runtime.PodSandbox) bool { return f.Id == x.Id }) {
						some = append(some, x)
					}
					return err
				})
				found = some
			}
			if err != nil {
				return err
			}
			slices.SortStableFunc(found, func(x, y *runtime.PodSandbox) int {
				return cmp.Or(strings.Compare(x.GetMetadata().GetNamespace(), y.GetMetadata().GetNamespace()), strings.Compare(x.GetMetadata().GetName(), y.GetMetadata().GetName()))
			})
			if quiet {
				var ids []string
				for _, x := range found {
					ids = append(ids, x.Id)
				}
				return a.names(ids...)
			}
			list, sick := p.rows(ctx, found)
			var rows [][]string
			for _, r := range list {
				handler, ip, id := r.Handler, "", r.ID
				handler = cmp.Or(handler, "(default)")
				if len(r.IPs) > 0 {
					ip = r.IPs[0]
				}
				if !noTrunc {
					id = shortID(id)
				}
				rows = append(rows, []string{r.Namespace, printable(r.Name), r.State, fmt.Sprintf("%d/%d", r.Running, len(r.Containers)), age(r.CreatedAt), ip, handler, id})
			}
			header := "NAMESPACE|NAME|STATE|READY|AGE|IP|HANDLER|ID"
			if noTrunc {
				a.wide = true
			} else {
				header, rows = a.squeeze(header, rows, "ID", "HANDLER", "IP")
			}
			return errors.Join(a.table(list, header, rows), sick)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&quiet, "quiet", "q", false, "print only ids")
	f.BoolVar(&noTrunc, "no-trunc", false, "do not shorten anything")
	f.StringVar(&state, "state", "", "only those in this `state`: ready or stopped")
	f.StringArrayVarP(&labels, "selector", "l", nil, "only those with a label `KEY=VALUE`")
	return cmd
}

// rows asks for what the list of pods does not tell. One that goes meanwhile is
// left out; of one whose status cannot be had, the rest is shown. The error is
// that of all of those.
func (p *pods) rows(ctx context.Context, found []*runtime.PodSandbox) ([]podRow, error) {
	list := []podRow{}
	containers, err := p.containers(ctx, "")
	if err != nil {
		return list, err
	}
	of := map[string][]*runtime.Container{}
	for _, c := range containers {
		of[c.PodSandboxId] = append(of[c.PodSandboxId], c)
	}
	all, sick := make([]*podRow, len(found)), make([]error, len(found))
	var g errgroup.Group
	g.SetLimit(podAsks)
	for i, x := range found {
		g.Go(func() error {
			m := x.GetMetadata()
			r := podRow{ID: x.Id, Namespace: m.GetNamespace(), Name: m.GetName(), UID: m.GetUid(), Attempt: m.GetAttempt(), State: podState(x.State), IPs: []string{}, Containers: []podContainerRow{},
				Handler: x.RuntimeHandler, Labels: x.Labels, CreatedAt: time.Unix(0, x.CreatedAt)}
			for _, c := range of[x.Id] {
				if c.State == runtime.ContainerState_CONTAINER_RUNNING {
					r.Running++
				}
				image := c.GetImage().GetUserSpecifiedImage()
				if image == "" {
					image = c.GetImage().GetImage()
				}
				r.Containers = append(r.Containers, podContainerRow{ID: c.Id, Name: c.GetMetadata().GetName(), Image: image, State: containerState(c.State), Attempt: c.GetMetadata().GetAttempt()})
			}
			ctx, cancel := context.WithTimeout(ctx, podTimeout)
			defer cancel()
			st, err := p.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: x.Id})
			if errdefs.IsNotFound(err) {
				return nil
			}
			if err != nil {
				sick[i] = fmt.Errorf("status of pod %s: %w", podTitle(m), err)
			}
			if n := st.GetStatus().GetNetwork(); n.GetIp() != "" {
				r.IPs = append(r.IPs, n.GetIp())
				for _, more := range n.GetAdditionalIps() {
					r.IPs = append(r.IPs, more.GetIp())
				}
			}
			all[i] = &r
			return nil
		})
	}
	g.Wait() // each has its own error
	for _, r := range all {
		if r != nil {
			list = append(list, *r)
		}
	}
	return list, errors.Join(sick...)
}

// shortID is what a table shows of a random id: as much as tells them apart.
// Names that people gave are shown whole.
func shortID(id string) string {
	if len(id) == 64 && strings.Trim(id, "0123456789abcdef") == "" {
		return id[:12]
	}
	return id
}

// age is how old something is, in as few letters as Kubernetes' tools use.
func age(t time.Time) string {
	d := time.Since(t)
	switch {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", max(0, int(d.Seconds())))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// inspectedPod is a pod as inspect shows it: the CRI's own messages, and what
// a verbose status tells, with the JSON in it unfolded.
type inspectedPod struct {
	Status     json.RawMessage            `json:"status"`
	Info       map[string]json.RawMessage `json:"info"`
	Containers []inspectedPodContainer    `json:"containers"`
}

type inspectedPodContainer struct {
	Status json.RawMessage            `json:"status"`
	Info   map[string]json.RawMessage `json:"info"`
}

func (a *app) podInspectCommand() *cobra.Command {
	return &cobra.Command{
		Use: "inspect POD...", Short: "Show all about pods and their containers, as JSON", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := a.pods(cmd)
			if err != nil {
				return err
			}
			list := []inspectedPod{}
			all := every(args, func(ref string) error {
				o, err := p.inspect(cmd.Context(), ref)
				if err == nil {
					list = append(list, o)
				}
				return err
			})
			return errors.Join(a.json(list), all)
		},
	}
}

func (p *pods) inspect(ctx context.Context, ref string) (inspectedPod, error) {
	var o inspectedPod
	x, err := p.find(ctx, ref)
	if err != nil {
		return o, err
	}
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	st, err := p.PodSandboxStatus(ctx, &runtime.PodSandboxStatusRequest{PodSandboxId: x.Id, Verbose: true})
	if err != nil {
		return o, err
	}
	if o.Status, err = protoJSON(st.GetStatus()); err != nil {
		return o, err
	}
	o.Info, o.Containers = unfold(st.GetInfo()), []inspectedPodContainer{}
	list, err := p.containers(ctx, x.Id)
	if err != nil {
		return o, err
	}
	for _, c := range list {
		st, err := p.ContainerStatus(ctx, &runtime.ContainerStatusRequest{ContainerId: c.Id, Verbose: true})
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return o, err
		}
		status, err := protoJSON(st.GetStatus())
		if err != nil {
			return o, err
		}
		o.Containers = append(o.Containers, inspectedPodContainer{Status: status, Info: unfold(st.GetInfo())})
	}
	return o, nil
}

// protoJSON is a message in the form that crictl and scripts know.
func protoJSON(m proto.Message) (json.RawMessage, error) {
	return protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
}

// unfold makes JSON of texts that are JSON, and strings of the others.
func unfold(info map[string]string) map[string]json.RawMessage {
	out := map[string]json.RawMessage{}
	for k, v := range info {
		if out[k] = json.RawMessage(v); !json.Valid(out[k]) {
			out[k], _ = json.Marshal(v) // a string always has a form
		}
	}
	return out
}

// eachPod does something with every pod that was named, and prints the names
// of those for which it succeeded.
func (a *app) eachPod(use, short string, absentOK *bool, run func(ctx context.Context, p *pods, x *runtime.PodSandbox) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: cobra.MinimumNArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		p, err := a.pods(cmd)
		if err != nil {
			return err
		}
		ctx := cmd.Context()
		return each(a, args, absentOK != nil && *absentOK, func(ref string) (*runtime.PodSandbox, error) { return p.find(ctx, ref) },
			func(x *runtime.PodSandbox) error { return run(ctx, p, x) }, func(x *runtime.PodSandbox) string { return podTitle(x.GetMetadata()) })
	}}
}

func (a *app) podStopCommand() *cobra.Command {
	return a.eachPod("stop POD...", "Stop pods: their containers end, their network goes", nil, func(ctx context.Context, p *pods, x *runtime.PodSandbox) error {
		_, err := p.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: x.Id})
		return err
	})
}

func (a *app) podRmCommand() *cobra.Command {
	var force bool
	cmd := a.eachPod("rm POD...", "Remove stopped pods with their containers", &force, func(ctx context.Context, p *pods, x *runtime.PodSandbox) error {
		if x.State == runtime.PodSandboxState_SANDBOX_READY {
			title := podTitle(x.GetMetadata())
			if !force {
				return &hinted{fmt.Errorf("remove pod %s: it is ready: %w", title, errdefs.ErrFailedPrecondition), fmt.Sprintf("stop it first (gantry pod stop %s), or use rm --force", title)}
			}
			if _, err := p.StopPodSandbox(ctx, &runtime.StopPodSandboxRequest{PodSandboxId: x.Id}); err != nil {
				return err
			}
		}
		_, err := p.RemovePodSandbox(ctx, &runtime.RemovePodSandboxRequest{PodSandboxId: x.Id})
		return err
	})
	cmd.Flags().BoolVarP(&force, "force", "f", false, "stop what is ready; one that is not there is no error")
	return cmd
}

// completePods makes the shell know pods.
func (a *app) completePods(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	if many := strings.HasSuffix(cmd.Use, "...") || strings.HasSuffix(cmd.Use, "...]"); len(args) > 0 && (!many || strings.Contains(cmd.Use, "COMMAND") || strings.Contains(cmd.Use, "PORT")) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	return a.completion(func(ctx context.Context, _ view.View) (names []string, err error) {
		list, err := (&pods{RuntimeServiceClient: runtime.NewRuntimeServiceClient(a.client.Conn())}).list(ctx, nil)
		for _, x := range list {
			if strings.Contains(word, "/") {
				names = append(names, podTitle(x.GetMetadata()))
			} else {
				names = append(names, x.GetMetadata().GetName())
			}
		}
		slices.Sort(names)
		return slices.Compact(names), err
	})(cmd, nil, word)
}

// completePodNamespaces makes the shell know the namespaces that have pods here.
func (a *app) completePodNamespaces(cmd *cobra.Command, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	return a.completion(func(ctx context.Context, _ view.View) (names []string, err error) {
		list, err := (&pods{RuntimeServiceClient: runtime.NewRuntimeServiceClient(a.client.Conn())}).list(ctx, nil)
		for _, x := range list {
			names = append(names, x.GetMetadata().GetNamespace())
		}
		slices.Sort(names)
		return slices.Compact(names), err
	})(cmd, nil, word)
}

// completeContainers makes the shell know the containers of the pod that was named.
func (a *app) completeContainers(cmd *cobra.Command, args []string, word string) ([]string, cobra.ShellCompDirective) {
	return a.completion(func(ctx context.Context, _ view.View) (names []string, err error) {
		p := &pods{RuntimeServiceClient: runtime.NewRuntimeServiceClient(a.client.Conn())}
		var id string
		if len(args) > 0 {
			x, err := p.find(ctx, args[0])
			if err != nil {
				return nil, err
			}
			id = x.Id
		}
		list, err := p.containers(ctx, id)
		for _, c := range list {
			names = append(names, c.GetMetadata().GetName())
		}
		slices.Sort(names)
		return slices.Compact(names), err
	})(cmd, nil, word)
}
