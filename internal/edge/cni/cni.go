// Package cni gives pods their networks through CNI plugins. What is about to
// be added is on disk before a plugin runs, and is deleted again, by the very
// configuration it was added with, until that has succeeded: across failures
// and restarts (promise P22). No plugin holds up anybody but its own pod.
package cni

import (
	"encoding/json"
	"log/slog"
	"time"

	gocni "github.com/containerd/go-cni"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gantryd/gantry/internal/lib/fault"
)

// Config is the block of pod networks (contract 7.3.21).
type Config struct {
	BinDirs             []string
	ConfDir             string
	MaxConfNum          int // files that are used, the first by name; 0 is all
	SetupSerially       bool
	ConfTemplate        string
	IPPref              string // "ipv4", "ipv6" or "cni"; "" is ipv4
	UseInternalLoopback bool   // instead of the plugin "loopback"
}

// HandlerConfig is what a runtime handler has of its own.
type HandlerConfig struct {
	ConfDir    string
	MaxConfNum int // 0 is Config's
}

// Options of Open.
type Options struct {
	// Dir keeps the intents: <root>/io.gantry.cni.
	Dir string
	// CacheDir is where results are kept for the plugins' sake; "" is
	// /var/lib/cni, which containerd uses too.
	CacheDir string
	Config   Config
	// PerRuntime are the runtime handlers with a configuration of their own.
	PerRuntime map[string]HandlerConfig
	Log        *slog.Logger
	Faults     *fault.Points         // may be nil
	Metrics    prometheus.Registerer // may be nil
	// Limit is how long the plugins of one call may take together, beside the
	// caller's deadline; 0 is two minutes. Retry is the first pause before a
	// deletion is tried again; 0 is a second. It doubles up to a minute.
	Limit, Retry time.Duration
}

// Pod is what a network needs to know of one.
type Pod struct {
	ID, Name, Namespace, UID string
	NetNS                    string // path
	Handler                  string // runtime handler
	Ports                    []PortMapping
	// Annotations are handed to plugins that ask for them. Those of the
	// bandwidth, AnnotationIPs and AnnotationMAC are read.
	Annotations  map[string]string
	CgroupParent string
	DNS          *DNS // may be nil
}

// PortMapping maps a port of the host; one without HostPort is ignored.
type PortMapping struct {
	HostPort, ContainerPort int32
	Protocol                string // "tcp", "udp" or "sctp"
	HostIP                  string
}

// DNS is what the pod's resolv.conf says.
type DNS struct{ Servers, Searches, Options []string }

// The annotations that are read (those of the bandwidth are Kubernetes' own,
// quantities in bits a second). Addresses are comma separated. A plugin gets
// what it declares as its capability, and nothing else.
const (
	AnnotationIngress = "kubernetes.io/ingress-bandwidth"
	AnnotationEgress  = "kubernetes.io/egress-bandwidth"
	AnnotationIPs     = "io.gantry.cni.ips"
	AnnotationMAC     = "io.gantry.cni.mac"
)

// Result is a pod's network. Raw is the JSON of what the plugins answered, as
// containerd keeps it.
type Result struct {
	IP            string
	AdditionalIPs []string
	Raw           json.RawMessage
}

// Intent is a network that was added, or may have been.
type Intent struct {
	ID, Name, Namespace string
	NetNS               string
	Deleting            bool // and so it will be deleted whatever comes
	Tries               int  // failed deletions since the start
	Last                string
}

// Info is what a verbose status tells of the networks of a runtime handler.
type Info struct {
	// Config is what was loaded last.
	Config *gocni.ConfigResult
	// LoadStatus is "OK", or why the configuration was not loaded.
	LoadStatus string
}
