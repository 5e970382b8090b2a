//go:build linux

package libct

import (
	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runc/libcontainer/configs"
	"github.com/opencontainers/runtime-spec/specs-go"
)

func set[T any](dst *T, src *T) {
	if src != nil {
		*dst = *src
	}
}

// update changes those limits of config that r sets, and no others. The
// groups' resources are copied first, as config shares them with the running
// container.
func update(config *configs.Config, r *specs.LinuxResources) error {
	cg := *config.Cgroups
	res := *cg.Resources
	cg.Resources = &res
	config.Cgroups = &cg

	if b := r.BlockIO; b != nil {
		set(&res.BlkioWeight, b.Weight)
		set(&res.BlkioLeafWeight, b.LeafWeight)
		res.BlkioWeightDevice = weightDevices(res.BlkioWeightDevice, b.WeightDevice)
		res.BlkioThrottleReadBpsDevice = throttleDevices(res.BlkioThrottleReadBpsDevice, b.ThrottleReadBpsDevice)
		res.BlkioThrottleWriteBpsDevice = throttleDevices(res.BlkioThrottleWriteBpsDevice, b.ThrottleWriteBpsDevice)
		res.BlkioThrottleReadIOPSDevice = throttleDevices(res.BlkioThrottleReadIOPSDevice, b.ThrottleReadIOPSDevice)
		res.BlkioThrottleWriteIOPSDevice = throttleDevices(res.BlkioThrottleWriteIOPSDevice, b.ThrottleWriteIOPSDevice)
	}
	if c := r.CPU; c != nil {
		set(&res.CpuPeriod, c.Period)
		set(&res.CpuQuota, c.Quota)
		set(&res.CpuRtPeriod, c.RealtimePeriod)
		set(&res.CpuRtRuntime, c.RealtimeRuntime)
		if c.Burst != nil {
			res.CpuBurst = c.Burst
		}
		if c.Idle != nil {
			res.CPUIdle = c.Idle
		}
		if c.Shares != nil {
			res.CpuShares = *c.Shares
			res.CpuWeight = cgroups.ConvertCPUSharesToCgroupV2Value(*c.Shares)
		}
		if c.Cpus != "" {
			res.CpusetCpus = c.Cpus
		}
		if c.Mems != "" {
			res.CpusetMems = c.Mems
		}
	}
	if m := r.Memory; m != nil {
		set(&res.Memory, m.Limit)
		set(&res.MemoryReservation, m.Reservation)
		set(&res.MemorySwap, m.Swap)
		set(&res.MemoryCheckBeforeUpdate, m.CheckBeforeUpdate)
		if m.Limit != nil && *m.Limit == -1 && m.Swap == nil {
			res.MemorySwap = -1 // a swap limit cannot be below no limit
		}
	}
	if p := r.Pids; p != nil && p.Limit != nil {
		res.PidsLimit = p.Limit
	}
	for _, h := range r.HugepageLimits {
		res.HugetlbLimit = append(res.HugetlbLimit[:len(res.HugetlbLimit):len(res.HugetlbLimit)],
			&cgroups.HugepageLimit{Pagesize: h.Pagesize, Limit: h.Limit})
	}
	if r.Unified != nil {
		res.Unified = r.Unified
	}
	// What a hook or a device plugin allowed since is not taken back.
	res.SkipDevices = true
	return nil
}

func weightDevices(old []*cgroups.WeightDevice, changes []specs.LinuxWeightDevice) []*cgroups.WeightDevice {
	out := append([]*cgroups.WeightDevice(nil), old...)
next:
	for _, c := range changes {
		var w cgroups.WeightDevice
		w.Major, w.Minor = c.Major, c.Minor
		for i, o := range out {
			if o.Major == c.Major && o.Minor == c.Minor {
				w = *o
				set(&w.Weight, c.Weight)
				set(&w.LeafWeight, c.LeafWeight)
				out[i] = &w
				continue next
			}
		}
		set(&w.Weight, c.Weight)
		set(&w.LeafWeight, c.LeafWeight)
		out = append(out, &w)
	}
	return out
}

func throttleDevices(old []*cgroups.ThrottleDevice, changes []specs.LinuxThrottleDevice) []*cgroups.ThrottleDevice {
	out := append([]*cgroups.ThrottleDevice(nil), old...)
next:
	for _, c := range changes {
		var t cgroups.ThrottleDevice
		t.Major, t.Minor, t.Rate = c.Major, c.Minor, c.Rate
		for i, o := range out {
			if o.Major == c.Major && o.Minor == c.Minor {
				out[i] = &t
				continue next
			}
		}
		out = append(out, &t)
	}
	return out
}
