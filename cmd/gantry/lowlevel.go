package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/spf13/cobra"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire/introspectionrpc"
)

// group makes a command that only has others below it.
func group(use, short string, aliases []string, sub ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Aliases: aliases, GroupID: "low", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	cmd.AddCommand(sub...)
	return cmd
}

// simple makes a command that works on one namespace.
func (a *app) simple(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, v view.View, args []string) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, Args: args, RunE: a.inView(run)}
}

// labelText shows labels in a table.
func labelText(labels map[string]string) string {
	var out []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		out = append(out, k+"="+labels[k])
	}
	return strings.Join(out, ",")
}

// kept are the labels of what is stored by hand: it stays until it is deleted by hand.
func kept() map[string]string {
	return map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)}
}

// parseLabels reads key=value arguments; an empty value deletes.
func parseLabels(args []string) (map[string]string, []string, error) {
	labels := map[string]string{}
	var fields []string
	for _, arg := range args {
		k, v, _ := strings.Cut(arg, "=")
		if k == "" {
			return nil, nil, fmt.Errorf("label %q has no name, use name=value: %w", arg, errdefs.ErrInvalidArgument)
		}
		labels[k] = v
		fields = append(fields, "labels."+k)
	}
	return labels, fields, nil
}

func (a *app) contentCommand() *cobra.Command {
	var quiet bool
	ls := a.simple("ls [FILTER...]", "List blobs", cobra.ArbitraryArgs, nil)
	ls.RunE = func(cmd *cobra.Command, args []string) error {
		vs, err := a.views(cmd.Context())
		if err != nil {
			return err
		}
		list := []content.Info{}
		var rows [][]string
		for _, v := range vs {
			err := v.Content().Walk(cmd.Context(), func(i content.Info) error {
				list = append(list, i)
				if quiet {
					_, err := fmt.Fprintln(a.out, i.Digest)
					return err
				}
				rows = append(rows, []string{i.Digest.String(), size(i.Size), ago(i.CreatedAt), labelText(i.Labels)})
				return nil
			}, args...)
			if err != nil {
				return err
			}
		}
		if quiet {
			return nil
		}
		return a.table(list, "DIGEST|SIZE|AGE|LABELS", rows)
	}
	ls.Flags().BoolVarP(&quiet, "quiet", "q", false, "print only digests")
	get := a.simple("get DIGEST", "Write a blob to standard output", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) error {
		d, err := parseDigest(args[0])
		if err != nil {
			return err
		}
		r, err := v.Content().Open(ctx, d)
		if err != nil {
			return a.missing(ctx, err, func(o view.View) error { _, err := o.Content().Info(ctx, d); return err })
		}
		defer r.Close()
		_, err = io.Copy(a.out, io.NewSectionReader(r, 0, r.Size()))
		return err
	})
	var expected string
	put := a.simple("put REF", "Store standard input as a blob", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) (err error) {
		opts := content.WriterOptions{}
		if expected != "" {
			if opts.Expected, err = parseDigest(expected); err != nil {
				return err
			}
		}
		w, err := v.Content().Writer(ctx, args[0], opts)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, w.Close()) }()
		if err := w.Truncate(0); err != nil {
			return err
		}
		n, err := io.Copy(w, a.in)
		if err != nil {
			return err
		}
		if err := w.Commit(ctx, n, opts.Expected, kept()); err != nil {
			return err
		}
		fmt.Fprintln(a.out, w.Digest())
		return nil
	})
	put.Flags().StringVar(&expected, "digest", "", "`digest` that the input must have")
	rm := a.simple("rm DIGEST...", "Remove blobs", cobra.MinimumNArgs(1), func(ctx context.Context, v view.View, args []string) error {
		return every(args, func(arg string) error {
			d, err := parseDigest(arg)
			if err == nil {
				err = v.Content().Delete(ctx, d)
			}
			return err
		})
	})
	label := a.simple("label DIGEST KEY=VALUE...", "Set labels, or remove them with an empty value", cobra.MinimumNArgs(2), func(ctx context.Context, v view.View, args []string) error {
		d, err := parseDigest(args[0])
		if err != nil {
			return err
		}
		labels, fields, err := parseLabels(args[1:])
		if err != nil {
			return err
		}
		i, err := v.Content().Update(ctx, content.Info{Digest: d, Labels: labels}, fields...)
		if err != nil {
			return err
		}
		fmt.Fprintln(a.out, labelText(i.Labels))
		return nil
	})
	active := a.simple("active", "List what is being written", cobra.NoArgs, func(ctx context.Context, v view.View, _ []string) error {
		list, err := v.Content().Statuses(ctx)
		if err != nil {
			return err
		}
		return tableOf(a, list, "REF|WRITTEN|TOTAL|STARTED", func(s content.Status) []string {
			return []string{s.Ref, size(s.Offset), size(s.Total), ago(s.StartedAt)}
		})
	})
	abort := a.simple("abort REF", "Drop what was being written", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) error {
		return v.Content().Abort(ctx, args[0])
	})
	return group("content", "Look at blobs", nil, ls, get, put, rm, label, active, abort)
}

func parseDigest(s string) (digest.Digest, error) {
	d, err := digest.Parse(s)
	if err != nil {
		return "", fmt.Errorf("digest %q: %w: %w", s, err, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

func (a *app) snapshotCommand() *cobra.Command {
	var name string
	with := func(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, st snapshot.Store, args []string) error) *cobra.Command {
		return a.simple(use, short, args, func(ctx context.Context, v view.View, args []string) error {
			sn, err := a.snapshotter(ctx, name)
			if err != nil {
				return err
			}
			st, err := v.Snapshots(sn)
			if err != nil {
				return err
			}
			return run(ctx, st, args)
		})
	}
	ls := with("ls [FILTER...]", "List snapshots", cobra.ArbitraryArgs, func(ctx context.Context, st snapshot.Store, args []string) error {
		var list []snapshot.Info
		err := st.Walk(ctx, func(i snapshot.Info) error { list = append(list, i); return nil }, args...)
		if err != nil {
			return err
		}
		return tableOf(a, list, "KEY|KIND|CREATED|PARENT", func(i snapshot.Info) []string {
			return []string{i.Name, i.Kind.String(), ago(i.CreatedAt), i.Parent}
		})
	})
	tree := with("tree", "Show which snapshot stands on which", cobra.NoArgs, func(ctx context.Context, st snapshot.Store, _ []string) error {
		children := map[string][]string{}
		if err := st.Walk(ctx, func(i snapshot.Info) error {
			children[i.Parent] = append(children[i.Parent], i.Name)
			return nil
		}); err != nil {
			return err
		}
		if a.format == "json" {
			return a.json(children)
		}
		var show func(parent, indent string)
		show = func(parent, indent string) {
			names := children[parent]
			slices.Sort(names)
			for i, n := range names {
				branch, next := "├─ ", "│  "
				if i == len(names)-1 {
					branch, next = "└─ ", "   "
				}
				if parent == "" {
					branch, next = "", ""
				}
				fmt.Fprintln(a.out, indent+branch+n)
				show(n, indent+next)
			}
		}
		show("", "")
		return nil
	})
	inspect := with("inspect KEY", "Show a snapshot", cobra.ExactArgs(1), func(ctx context.Context, st snapshot.Store, args []string) error {
		i, err := st.Stat(ctx, args[0])
		if err != nil {
			return err
		}
		u, err := st.Usage(ctx, args[0])
		if err != nil {
			return err
		}
		return a.json(struct {
			snapshot.Info
			Usage snapshot.Usage `json:"usage"`
		}{i, u})
	})
	usage := with("usage [KEY...]", "Measure snapshots without their parents", cobra.ArbitraryArgs, func(ctx context.Context, st snapshot.Store, args []string) error {
		if len(args) == 0 {
			if err := st.Walk(ctx, func(i snapshot.Info) error { args = append(args, i.Name); return nil }); err != nil {
				return err
			}
		}
		list := map[string]snapshot.Usage{}
		var rows [][]string
		for _, key := range args {
			u, err := st.Usage(ctx, key)
			if err != nil {
				return err
			}
			list[key] = u
			rows = append(rows, []string{key, size(u.Size), fmt.Sprint(u.Inodes)})
		}
		return a.table(list, "KEY|SIZE|INODES", rows)
	})
	printMounts := func(mounts []mount.Mount, target string) error {
		if a.format == "json" {
			return a.json(mounts)
		}
		for _, m := range mounts {
			fmt.Fprintf(a.out, "mount -t %s %s %s -o %s\n", m.Type, m.Source, target, strings.Join(m.Options, ","))
		}
		return nil
	}
	mounts := with("mounts TARGET KEY", "Print the command that mounts a snapshot at a target", cobra.ExactArgs(2), func(ctx context.Context, st snapshot.Store, args []string) error {
		ms, err := st.Mounts(ctx, args[1])
		if err != nil {
			return err
		}
		return printMounts(ms, args[0])
	})
	create := func(use, short string, run func(st snapshot.Store, ctx context.Context, key, parent string, labels map[string]string) ([]mount.Mount, error)) *cobra.Command {
		return with(use, short, cobra.RangeArgs(1, 2), func(ctx context.Context, st snapshot.Store, args []string) error {
			ms, err := run(st, ctx, args[0], append(args, "")[1], kept())
			if err != nil {
				return err
			}
			return printMounts(ms, "TARGET")
		})
	}
	prepare := create("prepare KEY [PARENT]", "Make a writable snapshot", snapshot.Store.Prepare)
	viewCmd := create("view KEY [PARENT]", "Make a read-only snapshot", snapshot.Store.View)
	commit := with("commit NAME KEY", "Commit a writable snapshot under a name", cobra.ExactArgs(2), func(ctx context.Context, st snapshot.Store, args []string) error {
		return st.Commit(ctx, args[0], args[1], snapshot.CommitOptions{Labels: kept()})
	})
	rm := with("rm KEY...", "Remove snapshots", cobra.MinimumNArgs(1), func(ctx context.Context, st snapshot.Store, args []string) error {
		return every(args, func(key string) error { return st.Remove(ctx, key) })
	})
	cmd := group("snapshot", "Look at snapshots", []string{"snapshots"}, ls, tree, inspect, usage, mounts, prepare, viewCmd, commit, rm)
	cmd.PersistentFlags().StringVar(&name, "snapshotter", "", "`name` of the snapshotter")
	return cmd
}

func (a *app) leaseCommand() *cobra.Command {
	ls := &cobra.Command{Use: "ls [FILTER...]", Short: "List leases", RunE: func(cmd *cobra.Command, args []string) error {
		list, err := listAll(cmd.Context(), a, func(v view.View) ([]lease.Lease, error) { return v.Leases().List(cmd.Context(), args...) })
		if err != nil {
			return err
		}
		return tableOf(a, list, "ID|CREATED|LABELS", func(l lease.Lease) []string {
			return []string{string(l.ID), ago(l.CreatedAt), labelText(l.Labels)}
		})
	}}
	var expires time.Duration
	create := a.simple("create [ID] [KEY=VALUE...]", "Make a lease", cobra.ArbitraryArgs, func(ctx context.Context, v view.View, args []string) error {
		var l lease.Lease
		if len(args) > 0 && !strings.Contains(args[0], "=") {
			l.ID, args = lease.ID(args[0]), args[1:]
		}
		labels, _, err := parseLabels(args)
		if err != nil {
			return err
		}
		if expires > 0 {
			labels[lease.LabelExpire] = time.Now().Add(expires).UTC().Format(time.RFC3339)
		}
		l.Labels = labels
		if l, err = v.Leases().Create(ctx, l); err != nil {
			return err
		}
		fmt.Fprintln(a.out, l.ID)
		return nil
	})
	create.Flags().DurationVarP(&expires, "expires", "x", 24*time.Hour, "let it end after this `duration` (0 is never)")
	var sync bool
	rm := a.simple("rm ID...", "End leases", cobra.MinimumNArgs(1), func(ctx context.Context, v view.View, args []string) error {
		var all error
		for i, id := range args {
			all = errors.Join(all, v.Leases().Delete(ctx, lease.ID(id), sync && i == len(args)-1))
		}
		return all
	})
	rm.Flags().BoolVar(&sync, "sync", false, "wait until what they alone held is gone")
	resources := a.simple("resources ID", "List what a lease holds", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) error {
		list, err := v.Leases().Resources(ctx, lease.ID(args[0]))
		if err != nil {
			return err
		}
		return tableOf(a, list, "TYPE|ID", func(r lease.Resource) []string { return []string{r.Type, r.ID} })
	})
	add := a.simple("add ID TYPE RESOURCE", "Let a lease hold something", cobra.ExactArgs(3), func(ctx context.Context, v view.View, args []string) error {
		return v.Leases().AddResource(ctx, lease.ID(args[0]), lease.Resource{Type: args[1], ID: args[2]})
	})
	return group("lease", "Keep objects alive", []string{"leases"}, ls, create, rm, resources, add)
}

func (a *app) namespaceCommand() *cobra.Command {
	on := func(use, short string, args cobra.PositionalArgs, run func(ctx context.Context, st namespace.Store, args []string) error) *cobra.Command {
		return &cobra.Command{Use: use, Short: short, Args: args, RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.dial(cmd.Context())
			if err != nil {
				return err
			}
			return run(cmd.Context(), c.Namespaces(), args)
		}}
	}
	ls := on("ls", "List namespaces", cobra.NoArgs, func(ctx context.Context, st namespace.Store, _ []string) error {
		list, err := st.List(ctx)
		if err != nil {
			return err
		}
		return tableOf(a, list, "NAME|LABELS", func(ns namespace.Namespace) []string { return []string{string(ns.ID), labelText(ns.Labels)} })
	})
	create := on("create NAME [KEY=VALUE...]", "Make a namespace", cobra.MinimumNArgs(1), func(ctx context.Context, st namespace.Store, args []string) error {
		labels, _, err := parseLabels(args[1:])
		if err == nil {
			_, err = st.Create(ctx, namespace.Namespace{ID: namespace.ID(args[0]), Labels: labels})
		}
		return err
	})
	label := on("label NAME KEY=VALUE...", "Set labels, or remove them with an empty value", cobra.MinimumNArgs(2), func(ctx context.Context, st namespace.Store, args []string) error {
		labels, fields, err := parseLabels(args[1:])
		if err == nil {
			_, err = st.Update(ctx, namespace.Namespace{ID: namespace.ID(args[0]), Labels: labels}, fields...)
		}
		return err
	})
	rm := on("rm NAME...", "Remove empty namespaces", cobra.MinimumNArgs(1), func(ctx context.Context, st namespace.Store, args []string) error {
		return every(args, func(name string) error { return st.Delete(ctx, namespace.ID(name)) })
	})
	return group("namespace", "Partitions of everything", []string{"namespaces", "ns"}, ls, create, label, rm)
}

func (a *app) pluginCommand() *cobra.Command {
	ls := &cobra.Command{Use: "ls [FILTER...]", Short: "List what the daemon is made of", RunE: func(cmd *cobra.Command, args []string) error {
		c, err := a.dial(cmd.Context())
		if err != nil {
			return err
		}
		list, err := c.Introspection().Plugins(cmd.Context(), args...)
		if err != nil {
			return err
		}
		return tableOf(a, list, "TYPE|ID|STATUS|WHY", func(p introspectionrpc.Plugin) []string {
			status := "ok"
			switch {
			case p.InitErr != "" && p.Skipped():
				status = "skip"
			case p.InitErr != "":
				status = "error"
			}
			return []string{p.Type, p.ID, status, p.InitErr}
		})
	}}
	return group("plugin", "The parts of the daemon", []string{"plugins"}, ls)
}

func (a *app) taskCommand() *cobra.Command {
	ls := &cobra.Command{Use: "ls", Short: "List tasks", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		list, err := listAll(cmd.Context(), a, func(v view.View) ([]task.Process, error) { return v.Tasks().List(cmd.Context()) })
		if err != nil {
			return err
		}
		return tableOf(a, list, "CONTAINER|PID|STATUS", func(p task.Process) []string {
			return []string{string(p.ContainerID), fmt.Sprint(p.Pid), p.Status.String()}
		})
	}}
	pids := a.simple("pids CONTAINER", "List the processes of a task", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) error {
		list, err := v.Tasks().Pids(ctx, container.ID(args[0]))
		if err != nil {
			return err
		}
		return tableOf(a, list, "PID|INFO", func(p task.ProcessInfo) []string { return []string{fmt.Sprint(p.Pid), p.Info.URL} })
	})
	get := a.simple("get CONTAINER [EXEC]", "Show a process", cobra.RangeArgs(1, 2), func(ctx context.Context, v view.View, args []string) error {
		p, err := v.Tasks().Get(ctx, container.ID(args[0]), task.ExecID(append(args, "")[1]))
		if err != nil {
			return err
		}
		return a.json(p)
	})
	metrics := a.simple("metrics [CONTAINER]", "Show the raw metrics of tasks", cobra.MaximumNArgs(1), func(ctx context.Context, v view.View, args []string) error {
		var filters []string
		if len(args) == 1 {
			filters = []string{fmt.Sprintf("id==%q", args[0])}
		}
		list, err := v.Tasks().Metrics(ctx, filters...)
		if err != nil {
			return err
		}
		return a.json(list)
	})
	rm := a.simple("rm CONTAINER", "Delete a stopped task", cobra.ExactArgs(1), func(ctx context.Context, v view.View, args []string) error {
		exit, err := v.Tasks().Delete(ctx, container.ID(args[0]))
		if err != nil {
			return err
		}
		if a.format == "json" {
			return a.json(exit)
		}
		fmt.Fprintf(a.out, "pid %d ended with exit code %d at %s\n", exit.Pid, exit.Status, inspectTime(exit.At))
		return nil
	})
	return group("task", "Running containers as the API sees them", []string{"tasks"}, ls, get, pids, metrics, rm)
}

func (a *app) eventsCommand() *cobra.Command {
	return &cobra.Command{
		Use: "events [FILTER...]", Short: "Show what happens, until interrupted", GroupID: "daemon",
		Example: "  gantry events 'topic~=|^/tasks/|'\n  gantry events -o json",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			c, err := a.dial(ctx)
			if err != nil {
				return err
			}
			sub, err := c.Events().Subscribe(ctx, args...)
			if err != nil {
				return err
			}
			defer sub.Close()
			for {
				e, err := sub.Next(ctx)
				if errors.Is(err, context.Canceled) && ctx.Err() != nil {
					return nil
				}
				if err != nil {
					return err
				}
				body, err := json.Marshal(e.Event)
				if err != nil {
					return fmt.Errorf("show %s: %w", e.Topic, err)
				}
				if a.format == "json" {
					body, err = json.Marshal(e)
					if err == nil {
						_, err = fmt.Fprintf(a.out, "%s\n", body)
					}
				} else {
					_, err = fmt.Fprintf(a.out, "%s %s %s %s\n", e.Timestamp.Local().Format("2006-01-02 15:04:05.000"), e.Namespace, e.Topic, body)
				}
				if err != nil {
					return err
				}
			}
		},
	}
}

func (a *app) infoCommand() *cobra.Command {
	return &cobra.Command{Use: "info", Short: "Describe the daemon and what it holds", GroupID: "daemon", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		c, err := a.dial(ctx)
		if err != nil {
			return err
		}
		var info struct {
			Address    string            `json:"address"`
			Version    string            `json:"version"`
			Revision   string            `json:"revision"`
			UUID       string            `json:"uuid"`
			Pid        uint64            `json:"pid"`
			Platform   ocispec.Platform  `json:"platform"`
			Namespaces []string          `json:"namespaces"`
			Snapshots  map[string]string `json:"snapshotters"`
			Images     int               `json:"images"`
			Containers int               `json:"containers"`
			Running    int               `json:"running"`
		}
		info.Address, info.Platform, info.Snapshots = c.Address(), platforms.DefaultSpec(), map[string]string{}
		if info.Version, info.Revision, err = c.Version(ctx); err != nil {
			return err
		}
		server, err := c.Introspection().Server(ctx)
		if err != nil {
			return err
		}
		info.UUID, info.Pid = server.UUID, server.Pid
		plugins, err := c.Introspection().Plugins(ctx, "type==io.containerd.snapshotter.v1")
		if err != nil {
			return err
		}
		for _, p := range plugins {
			if p.InitErr == "" {
				info.Snapshots[p.ID] = p.Exports["root"]
			}
		}
		all, err := c.Namespaces().List(ctx)
		if err != nil {
			return err
		}
		for _, ns := range all {
			info.Namespaces = append(info.Namespaces, string(ns.ID))
			v, err := c.In(ns.ID, "")
			if err != nil {
				return err
			}
			images, err := v.Images().List(ctx)
			if err != nil {
				return err
			}
			info.Images += len(images)
			if err := v.Containers().Walk(ctx, func(container.Container) error { info.Containers++; return nil }); err != nil {
				return err
			}
			tasks, err := v.Tasks().List(ctx)
			if err != nil {
				return err
			}
			for _, t := range tasks {
				if t.Status == task.StatusRunning {
					info.Running++
				}
			}
		}
		if a.format == "json" {
			return a.json(info)
		}
		fmt.Fprintf(a.out, "daemon        %s, pid %d, at %s\nuuid          %s\nplatform      %s\nnamespaces    %s\nsnapshotters  %s\nimages        %d\ncontainers    %d, %d running\n",
			info.Version, info.Pid, info.Address, info.UUID, platforms.Format(info.Platform), strings.Join(info.Namespaces, ", "),
			strings.Join(slices.Sorted(maps.Keys(info.Snapshots)), ", "), info.Images, info.Containers, info.Running)
		return nil
	}}
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{Use: "version", Short: "Print the versions of client and daemon", GroupID: "daemon", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		type one struct {
			Version  string `json:"version"`
			Revision string `json:"revision"`
			Go       string `json:"go,omitempty"`
		}
		both := struct {
			Client one  `json:"client"`
			Server *one `json:"server,omitempty"`
		}{Client: one{version, revision, runtime.Version()}}
		c, err := a.dial(cmd.Context())
		if err == nil {
			both.Server = &one{}
			both.Server.Version, both.Server.Revision, err = c.Version(cmd.Context())
		}
		if a.format == "json" {
			return errors.Join(a.json(both), err)
		}
		fmt.Fprintf(a.out, "client  %s %s %s\n", version, revision, runtime.Version())
		if both.Server != nil {
			fmt.Fprintf(a.out, "daemon  %s %s\n", both.Server.Version, both.Server.Revision)
		}
		return err
	}}
}
