package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// podStatsRow is what a pod uses, or, if Container is set, one of its
// containers. CPUPercent is of one CPU.
type podStatsRow struct {
	ID         string  `json:"id"`
	Namespace  string  `json:"namespace"`
	Name       string  `json:"name"`
	Container  string  `json:"container,omitempty"`
	CPUPercent float64 `json:"cpu_percent"`
	Memory     uint64  `json:"memory_working_set"`
	// What only pods have, and the network only those with one of their own.
	Processes     *uint64 `json:"processes,omitempty"`
	ReceivedBytes *uint64 `json:"received_bytes,omitempty"`
	SentBytes     *uint64 `json:"sent_bytes,omitempty"`
	WritableLayer uint64  `json:"writable_layer_bytes"`
}

func (a *app) podStatsCommand() *cobra.Command {
	var containers bool
	var flags watchFlags
	cmd := &cobra.Command{
		Use: "stats [POD...]", Short: "Show what pods use",
		Long: "Shows CPU, memory, processes and network of the pods named, or of all that are ready. CPU is in percent of one CPU; memory is the working set.\nOn a terminal the table is renewed until it is interrupted.",
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if err := flags.check(); err != nil {
				return err
			}
			p, err := a.pods(cmd)
			if err != nil {
				return err
			}
			var ids []string
			for _, ref := range args {
				x, err := p.find(ctx, ref)
				if err != nil {
					return err
				}
				if x.State != runtime.PodSandboxState_SANDBOX_READY {
					return &hinted{fmt.Errorf("stats of pod %s: it is stopped", podTitle(x.GetMetadata())), "list those that are ready: gantry pod ls --state ready"}
				}
				ids = append(ids, x.Id)
			}
			return watch(ctx, a, flags, func() ([]podStatsRow, error) { return p.usage(ctx, ids, containers) }, a.podStatsTable)
		},
	}
	flags.add(cmd)
	cmd.Flags().BoolVar(&containers, "containers", false, "show every container")
	return cmd
}

// usage looks at all pods, or only at those with ids.
func (p *pods) usage(ctx context.Context, ids []string, containers bool) ([]podStatsRow, error) {
	ctx, cancel := context.WithTimeout(ctx, podTimeout)
	defer cancel()
	r, err := p.ListPodSandboxStats(ctx, &runtime.ListPodSandboxStatsRequest{})
	if err != nil {
		return nil, err
	}
	list := []podStatsRow{}
	for _, s := range r.Stats {
		m, l := s.GetAttributes().GetMetadata(), s.GetLinux()
		if id := s.GetAttributes().GetId(); len(ids) > 0 && !slices.Contains(ids, id) || len(ids) == 0 && p.namespace != "" && m.GetNamespace() != p.namespace {
			continue
		}
		row := podStatsRow{ID: s.GetAttributes().GetId(), Namespace: m.GetNamespace(), Name: m.GetName(), CPUPercent: percent(l.GetCpu()), Memory: l.GetMemory().GetWorkingSetBytes().GetValue(),
			Processes: valueOf(l.GetProcess().GetProcessCount()), ReceivedBytes: valueOf(l.GetNetwork().GetDefaultInterface().GetRxBytes()), SentBytes: valueOf(l.GetNetwork().GetDefaultInterface().GetTxBytes())}
		for _, c := range l.GetContainers() {
			row.WritableLayer += c.GetWritableLayer().GetUsedBytes().GetValue()
		}
		list = append(list, row)
		if !containers {
			continue
		}
		for _, c := range l.GetContainers() {
			list = append(list, podStatsRow{ID: c.GetAttributes().GetId(), Namespace: row.Namespace, Name: row.Name, Container: c.GetAttributes().GetMetadata().GetName(), CPUPercent: percent(c.GetCpu()),
				Memory: c.GetMemory().GetWorkingSetBytes().GetValue(), WritableLayer: c.GetWritableLayer().GetUsedBytes().GetValue()})
		}
	}
	key := func(r podStatsRow) string { return r.Namespace + "/" + r.Name + "/" + r.Container }
	slices.SortStableFunc(list, func(x, y podStatsRow) int { return strings.Compare(key(x), key(y)) })
	return list, nil
}

// percent is the share of one CPU, as the daemon's own sampler has seen it.
func percent(c *runtime.CpuUsage) float64 { return float64(c.GetUsageNanoCores().GetValue()) / 1e7 }

// valueOf is nil if the daemon does not know it.
func valueOf(n *runtime.UInt64Value) *uint64 {
	if n == nil {
		return nil
	}
	return &n.Value
}

func (a *app) podStatsTable(w io.Writer, list []podStatsRow) error {
	if a.format == "json" {
		return a.json(list)
	}
	cell := func(n *uint64, text func(int64) string) string {
		if n == nil {
			return ""
		}
		return text(int64(*n))
	}
	var rows [][]string
	for _, r := range list {
		name := printable(r.Name)
		if r.Container != "" {
			name = "  " + printable(r.Container)
		}
		pids := cell(r.Processes, func(n int64) string { return fmt.Sprint(n) })
		rows = append(rows, []string{r.Namespace, name, fmt.Sprintf("%.1f%%", r.CPUPercent), size(int64(r.Memory)), pids, cell(r.ReceivedBytes, size), cell(r.SentBytes, size), size(int64(r.WritableLayer))})
	}
	header, rows := a.squeeze("NAMESPACE|NAME|CPU|MEMORY|PIDS|RECEIVED|SENT|WRITTEN", rows, "WRITTEN", "SENT", "RECEIVED")
	return writeTable(w, a.width(), strings.Split(header, "|"), rows)
}
