// Package cristate is what the CRI remembers of pods and containers: their
// metadata in the form in which containerd stores them, the status of
// containers on disk, both by id and by name, the events that the kubelet
// watches, and the configuration. It decides nothing: cripod and cricontainer
// act, cristats and criserver read.
package cristate

import (
	"crypto/rand"
	"encoding/hex"
	"strconv"
	"strings"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/namespace"
)

// Namespace is where everything of the CRI lives (contract 7).
const Namespace namespace.ID = "k8s.io"

// PluginID names the directories of the CRI below root and state (contract 7.3.29).
const PluginID = "io.containerd.grpc.v1.cri"

// Labels of records (contract 1.5.21).
const (
	LabelKind      = "io.cri-containerd.kind"
	KindSandbox    = "sandbox"
	KindContainer  = "container"
	LabelImage     = "io.cri-containerd.image" // "managed"
	LabelPinned    = "io.cri-containerd.pinned"
	ImageManaged   = "managed"
	ImagePinned    = "pinned"
	ReservedPrefix = "io.cri-containerd" // image labels with it are not copied (contract 1.5.22)
)

// Annotations of specifications (contract 7.3.28).
const (
	AnnotationContainerType       = "io.kubernetes.cri.container-type" // "sandbox" or "container"
	AnnotationSandboxID           = "io.kubernetes.cri.sandbox-id"
	AnnotationSandboxName         = "io.kubernetes.cri.sandbox-name"
	AnnotationSandboxNamespace    = "io.kubernetes.cri.sandbox-namespace"
	AnnotationSandboxUID          = "io.kubernetes.cri.sandbox-uid"
	AnnotationSandboxLogDirectory = "io.kubernetes.cri.sandbox-log-directory"
	AnnotationContainerName       = "io.kubernetes.cri.container-name"
	AnnotationImageName           = "io.kubernetes.cri.image-name"
	AnnotationSandboxImageName    = "io.kubernetes.cri.podsandbox.image-name"
	AnnotationSandboxCPUPeriod    = "io.kubernetes.cri.sandbox-cpu-period"
	AnnotationSandboxCPUQuota     = "io.kubernetes.cri.sandbox-cpu-quota"
	AnnotationSandboxCPUShares    = "io.kubernetes.cri.sandbox-cpu-shares"
	AnnotationSandboxMemory       = "io.kubernetes.cri.sandbox-memory"
	AnnotationUntrustedWorkload   = "io.kubernetes.cri.untrusted-workload"
	AnnotationPodAnnotations      = "io.kubernetes.cri.pod-annotations" // CNI capability argument
	AnnotationRuntimeHandler      = "io.containerd.cri.runtime-handler" // image pull for a handler's snapshotter
)

// NewID makes the id of a pod or container: 64 hexadecimal digits.
func NewID() string {
	b := make([]byte, 32)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

// PodName is the name under which a pod is reserved (contract 7.1.5).
func PodName(m *runtime.PodSandboxMetadata) string {
	return strings.Join([]string{m.GetName(), m.GetNamespace(), m.GetUid(), strconv.FormatUint(uint64(m.GetAttempt()), 10)}, "_")
}

// ContainerName is the name under which a container is reserved (contract 7.1.11).
func ContainerName(c *runtime.ContainerMetadata, p *runtime.PodSandboxMetadata) string {
	return strings.Join([]string{c.GetName(), p.GetName(), p.GetNamespace(), p.GetUid(), strconv.FormatUint(uint64(c.GetAttempt()), 10)}, "_")
}
