package crispec

import (
	"maps"
	"path"
	"slices"
	"strconv"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
	"tags.cncf.io/container-device-interface/pkg/parser"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }

func isCDIDevice(name string) bool { return parser.IsQualifiedName(name) }

// reserved are annotations that only Gantry sets: shims and monitoring believe
// them.
var reserved = []string{
	cristate.AnnotationContainerType, cristate.AnnotationSandboxID, cristate.AnnotationSandboxName, cristate.AnnotationSandboxNamespace,
	cristate.AnnotationSandboxUID, cristate.AnnotationSandboxLogDirectory, cristate.AnnotationContainerName, cristate.AnnotationImageName,
	cristate.AnnotationSandboxImageName, cristate.AnnotationSandboxCPUPeriod, cristate.AnnotationSandboxCPUQuota,
	cristate.AnnotationSandboxCPUShares, cristate.AnnotationSandboxMemory,
}

// Passthrough are the annotations that a runtime handler lets through: those
// whose name one of the shell patterns matches (contract 7.3.1).
func Passthrough(annotations map[string]string, patterns []string) map[string]string {
	out := map[string]string{}
	for k, v := range annotations {
		if k == "" || slices.Contains(reserved, k) {
			continue
		}
		for _, p := range patterns {
			if ok, err := path.Match(p, k); ok && err == nil {
				out[k] = v
				break
			}
		}
	}
	return out
}

// podAnnotations are those of a pod and of all in it (contract 7.3.28).
func podAnnotations(id string, c *runtime.PodSandboxConfig, patterns []string) map[string]string {
	a := Passthrough(c.GetAnnotations(), patterns)
	m := c.GetMetadata()
	a[cristate.AnnotationSandboxID] = id
	a[cristate.AnnotationSandboxName] = m.GetName()
	a[cristate.AnnotationSandboxNamespace] = m.GetNamespace()
	a[cristate.AnnotationSandboxUID] = m.GetUid()
	return a
}

func sandboxAnnotations(in SandboxInput) map[string]string {
	a := podAnnotations(in.ID, in.Config, in.Runtime.PodAnnotations)
	a[cristate.AnnotationContainerType] = "sandbox"
	a[cristate.AnnotationSandboxLogDirectory] = in.Config.GetLogDirectory()
	a[cristate.AnnotationSandboxImageName] = in.ImageName
	if v, ok := in.Config.GetAnnotations()[cristate.AnnotationUntrustedWorkload]; ok {
		a[cristate.AnnotationUntrustedWorkload] = v
	}
	if r := in.Config.GetLinux().GetResources(); r != nil {
		a[cristate.AnnotationSandboxCPUPeriod] = strconv.FormatInt(r.GetCpuPeriod(), 10)
		a[cristate.AnnotationSandboxCPUQuota] = strconv.FormatInt(r.GetCpuQuota(), 10)
		a[cristate.AnnotationSandboxCPUShares] = strconv.FormatInt(r.GetCpuShares(), 10)
		a[cristate.AnnotationSandboxMemory] = strconv.FormatInt(r.GetMemoryLimitInBytes(), 10)
	}
	return a
}

func containerAnnotations(in ContainerInput) map[string]string {
	a := podAnnotations(in.PodID, in.Pod, in.Runtime.PodAnnotations)
	maps.Copy(a, Passthrough(in.Config.GetAnnotations(), in.Runtime.ContainerAnnotations)) // the container's win
	a[cristate.AnnotationContainerType] = "container"
	a[cristate.AnnotationContainerName] = in.Config.GetMetadata().GetName()
	a[cristate.AnnotationImageName] = in.ImageName
	return a
}
