package main

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/view"
)

// statsRow is what a container uses. CPUPercent is of one CPU, between two looks.
type statsRow struct {
	Namespace string `json:"namespace"`
	client.Usage
	CPUPercent float64 `json:"cpu_percent"`
	// Kubernetes is set if a kubelet made it.
	Kubernetes *kubernetesName `json:"kubernetes,omitempty"`
}

// kubernetesNames are those of containers by namespace and id, nil for one that
// has none. It is for one goroutine.
type kubernetesNames map[string]*kubernetesName

// of returns the name of a container, after a look at all of its namespace if
// it is a new one.
func (k kubernetesNames) of(ctx context.Context, v view.View, id string) (*kubernetesName, error) {
	key := func(id string) string { return string(v.Namespace()) + "/" + id }
	if name, known := k[key(id)]; known {
		return name, nil
	}
	k[key(id)] = nil // it may be gone already
	err := v.Containers().Walk(ctx, func(c container.Container) error {
		if spec, err := client.Spec(c); err == nil {
			k[key(string(c.ID))] = kubernetesOf(spec)
		}
		return nil
	})
	return k[key(id)], err
}

func (a *app) statsCommand() *cobra.Command {
	var flags watchFlags
	cmd := &cobra.Command{
		Use: "stats [CONTAINER...]", Short: "Show what containers use", GroupID: "run",
		Long: "Shows CPU, memory, processes and block I/O of the containers named, or of all that run. CPU is in percent of one CPU.\nOn a terminal the table is renewed until it is interrupted.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if err := flags.check(); err != nil {
				return err
			}
			vs, err := a.views(ctx)
			if err != nil {
				return err
			}
			var ids []container.ID
			for _, ref := range args {
				c, err := a.find(ctx, vs[0], ref)
				if err != nil {
					return err
				}
				if _, err := vs[0].Tasks().Get(ctx, c.ID, ""); err != nil {
					return a.notRunning(c, "stats of", err)
				}
				ids = append(ids, c.ID)
			}
			names := kubernetesNames{}
			before, err := usages(ctx, vs, ids, names)
			if err != nil {
				return err
			}
			select {
			case <-ctx.Done():
				return stopOf(ctx)
			case <-time.After(min(flags.interval, 500*time.Millisecond)): // the first look is wanted soon
			}
			return watch(ctx, a, flags, func() ([]statsRow, error) {
				now, err := usages(ctx, vs, ids, names)
				if err != nil {
					return nil, err
				}
				list := compare(before, now)
				before = now
				return list, nil
			}, a.statsTable)
		},
	}
	flags.add(cmd)
	return cmd
}

// watchFlags say how often something is looked at.
type watchFlags struct {
	once     bool
	interval time.Duration
}

func (w *watchFlags) add(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&w.once, "no-stream", false, "look once")
	cmd.Flags().DurationVar(&w.interval, "interval", time.Second, "`time` between two looks")
}

func (w *watchFlags) check() error {
	if w.interval < 100*time.Millisecond {
		return fmt.Errorf("--interval %v: use 100ms or more", w.interval)
	}
	return nil
}

// watch looks and shows what it sees until it is interrupted: on a terminal in
// the place of what it has shown before. Elsewhere it ends with an empty list.
func watch[T any](ctx context.Context, a *app, flags watchFlags, look func() ([]T, error), table func(io.Writer, []T) error) error {
	live := !flags.once && a.format != "json" && term.IsTerminal(int(a.out.Fd()))
	for drawn := 0; ; {
		list, err := look()
		if err != nil {
			if ctx.Err() != nil {
				return stopOf(ctx)
			}
			return err
		}
		if !live {
			if err := table(a.out, list); err != nil || flags.once || a.format != "json" && len(list) == 0 {
				return err
			}
		} else {
			var b bytes.Buffer
			if err := table(&b, list); err != nil {
				return err
			}
			if drawn, err = a.redraw(b.String(), drawn); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return stopOf(ctx)
		case <-time.After(flags.interval):
		}
	}
}

// redraw puts a text in the place of the one before, which had so many lines,
// cut to the height of the terminal. It returns the number of lines.
func (a *app) redraw(text string, before int) (drawn int, err error) {
	lines := strings.SplitAfter(text, "\n")
	if _, h, err := term.GetSize(int(a.out.Fd())); err == nil && len(lines) > h {
		lines = lines[:h-1]
	}
	up := ""
	if before > 0 {
		up = fmt.Sprintf("\x1b[%dA", before)
	}
	_, err = io.WriteString(a.out, up+"\r\x1b[J"+strings.Join(lines, ""))
	return len(lines) - 1, err
}

// stopOf is nil if somebody left a command that goes on for ever.
func stopOf(ctx context.Context) error {
	if ctx.Err() == context.Canceled {
		return nil
	}
	return ctx.Err()
}

// usages looks at the tasks of namespaces, or only at those with ids.
func usages(ctx context.Context, vs []view.View, ids []container.ID, names kubernetesNames) ([]statsRow, error) {
	list := []statsRow{}
	for _, v := range vs {
		var filters []string
		for _, id := range ids {
			filters = append(filters, fmt.Sprintf("id==%q", id))
		}
		metrics, err := v.Tasks().Metrics(ctx, filters...)
		if err != nil {
			return nil, err
		}
		for _, m := range metrics {
			if len(ids) > 0 && !slices.Contains(ids, container.ID(m.ID)) {
				continue
			}
			u, err := client.DecodeMetric(m)
			if err != nil {
				if errdefs.IsNotImplemented(err) && len(ids) == 0 {
					continue // another runtime's form, and nobody asked for it
				}
				return nil, err
			}
			if u.At.IsZero() {
				u.At = time.Now()
			}
			name, err := names.of(ctx, v, u.ID)
			if err != nil {
				return nil, err
			}
			list = append(list, statsRow{Namespace: string(v.Namespace()), Usage: u, Kubernetes: name})
		}
	}
	slices.SortFunc(list, func(x, y statsRow) int {
		return cmp.Or(strings.Compare(x.Namespace, y.Namespace), strings.Compare(x.Kubernetes.String(), y.Kubernetes.String()), strings.Compare(x.ID, y.ID))
	})
	return list, nil
}

// compare fills in what only two looks tell.
func compare(before, now []statsRow) []statsRow {
	for i := range now {
		n := &now[i]
		for _, b := range before {
			if took := n.At.Sub(b.At); b.Namespace == n.Namespace && b.ID == n.ID && took > 0 && n.CPU >= b.CPU {
				n.CPUPercent = 100 * float64(n.CPU-b.CPU) / float64(took)
			}
		}
	}
	return now
}

func (a *app) statsTable(w io.Writer, list []statsRow) error {
	if a.format == "json" {
		return a.json(list)
	}
	header := "ID|CPU|MEMORY|LIMIT|PIDS|READ|WRITTEN"
	kube := slices.ContainsFunc(list, func(r statsRow) bool { return r.Kubernetes != nil })
	if kube {
		header = "ID|POD AND CONTAINER|CPU|MEMORY|LIMIT|PIDS|READ|WRITTEN"
	}
	if a.all {
		header += "|NAMESPACE"
	}
	var rows [][]string
	for _, r := range list {
		limit := "none"
		if r.MemoryLimit > 0 {
			limit = size(int64(r.MemoryLimit))
		}
		row := []string{shortID(r.ID), fmt.Sprintf("%.1f%%", r.CPUPercent), size(int64(r.Memory)), limit, fmt.Sprint(r.Pids), size(int64(r.ReadBytes)), size(int64(r.WriteBytes))}
		if kube {
			row = slices.Insert(row, 1, r.Kubernetes.String())
		}
		if a.all {
			row = append(row, r.Namespace)
		}
		rows = append(rows, row)
	}
	header, rows = a.squeeze(header, rows, "WRITTEN", "READ", "LIMIT")
	return writeTable(w, a.width(), strings.Split(header, "|"), rows)
}
