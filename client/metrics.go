package client

import (
	"fmt"
	"time"

	cgroup1 "github.com/containerd/cgroups/v3/cgroup1/stats"
	cgroup2 "github.com/containerd/cgroups/v3/cgroup2/stats"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/task"
)

// Usage is what a task uses, the same for both versions of cgroups.
type Usage struct {
	ID          string        `json:"id"`
	At          time.Time     `json:"timestamp"`
	CPU         time.Duration `json:"cpu_ns"`           // since its start
	Memory      uint64        `json:"memory"`           // bytes, without what the kernel can drop at once
	MemoryLimit uint64        `json:"memory_limit"`     // bytes, 0 if there is none
	Pids        uint64        `json:"pids"`             //
	PidsLimit   uint64        `json:"pids_limit"`       // 0 if there is none
	ReadBytes   uint64        `json:"io_read_bytes"`    // from block devices
	WriteBytes  uint64        `json:"io_write_bytes"`   // to block devices
	OOMKills    uint64        `json:"oom_kills"`        // as far as the cgroup counts them
	Throttled   time.Duration `json:"cpu_throttled_ns"` // kept from running by its limit
}

// noLimit is where the kernel's way to say "none" begins.
const noLimit = 1 << 62

func limit(n uint64) uint64 {
	if n >= noLimit {
		return 0
	}
	return n
}

// DecodeMetric makes the runtime's form of statistics legible.
// ErrNotImplemented for one that is not of cgroups.
func DecodeMetric(m task.Metric) (Usage, error) {
	u := Usage{ID: m.ID, At: m.At}
	bad := func(err error) (Usage, error) { return u, fmt.Errorf("metrics of %s: %w", m.ID, err) }
	switch m.Data.URL {
	case "io.containerd.cgroups.v1.Metrics":
		var s cgroup1.Metrics
		if err := proto.Unmarshal(m.Data.Value, &s); err != nil {
			return bad(err)
		}
		u.CPU = time.Duration(s.GetCPU().GetUsage().GetTotal())
		u.Throttled = time.Duration(s.GetCPU().GetThrottling().GetThrottledTime())
		mem := s.GetMemory()
		u.Memory, u.MemoryLimit = mem.GetUsage().GetUsage(), limit(mem.GetUsage().GetLimit())
		if c := mem.GetTotalInactiveFile(); c <= u.Memory {
			u.Memory -= c
		}
		u.Pids, u.PidsLimit = s.GetPids().GetCurrent(), limit(s.GetPids().GetLimit())
		for _, e := range s.GetBlkio().GetIoServiceBytesRecursive() {
			switch e.Op {
			case "Read":
				u.ReadBytes += e.Value
			case "Write":
				u.WriteBytes += e.Value
			}
		}
		u.OOMKills = s.GetMemoryOomControl().GetOomKill()
	case "io.containerd.cgroups.v2.Metrics":
		var s cgroup2.Metrics
		if err := proto.Unmarshal(m.Data.Value, &s); err != nil {
			return bad(err)
		}
		u.CPU = time.Duration(s.GetCPU().GetUsageUsec()) * time.Microsecond
		u.Throttled = time.Duration(s.GetCPU().GetThrottledUsec()) * time.Microsecond
		u.Memory, u.MemoryLimit = s.GetMemory().GetUsage(), limit(s.GetMemory().GetUsageLimit())
		if c := s.GetMemory().GetInactiveFile(); c <= u.Memory {
			u.Memory -= c
		}
		u.Pids, u.PidsLimit = s.GetPids().GetCurrent(), limit(s.GetPids().GetLimit())
		for _, e := range s.GetIo().GetUsage() {
			u.ReadBytes += e.Rbytes
			u.WriteBytes += e.Wbytes
		}
		u.OOMKills = s.GetMemoryEvents().GetOomKill()
	default:
		return bad(fmt.Errorf("unknown form %q: %w", m.Data.URL, errdefs.ErrNotImplemented))
	}
	return u, nil
}
