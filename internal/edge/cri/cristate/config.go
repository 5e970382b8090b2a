package cristate

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
)

// The blocks of the configuration (contract 7.4, Appendix B).
const (
	RuntimeURI = "io.containerd.cri.v1.runtime"
	ImagesURI  = "io.containerd.cri.v1.images"
)

// RuntimeConfig is the block of pods and containers. As JSON it has containerd's
// names, which scripts read in a verbose status.
type RuntimeConfig struct {
	EnableSELinux                      bool     `toml:"enable_selinux" json:"enableSelinux"`
	SELinuxCategoryRange               int      `toml:"selinux_category_range" json:"selinuxCategoryRange"`
	MaxContainerLogLineSize            int      `toml:"max_container_log_line_size" json:"maxContainerLogLineSize"`
	DisableAppArmor                    bool     `toml:"disable_apparmor" json:"disableApparmor"`
	RestrictOOMScoreAdj                bool     `toml:"restrict_oom_score_adj" json:"restrictOOMScoreAdj"`
	DisableProcMount                   bool     `toml:"disable_proc_mount" json:"disableProcMount"`
	UnsetSeccompProfile                string   `toml:"unset_seccomp_profile" json:"unsetSeccompProfile"`
	TolerateMissingHugetlbController   bool     `toml:"tolerate_missing_hugetlb_controller" json:"tolerateMissingHugetlbController"`
	DisableHugetlbController           bool     `toml:"disable_hugetlb_controller" json:"disableHugetlbController"`
	DeviceOwnershipFromSecurityContext bool     `toml:"device_ownership_from_security_context" json:"device_ownership_from_security_context"`
	IgnoreImageDefinedVolumes          bool     `toml:"ignore_image_defined_volumes" json:"ignoreImageDefinedVolumes"`
	NetNSMountsUnderStateDir           bool     `toml:"netns_mounts_under_state_dir" json:"netnsMountsUnderStateDir"`
	EnableUnprivilegedPorts            bool     `toml:"enable_unprivileged_ports" json:"enableUnprivilegedPorts"`
	EnableUnprivilegedICMP             bool     `toml:"enable_unprivileged_icmp" json:"enableUnprivilegedICMP"`
	EnableCDI                          bool     `toml:"enable_cdi" json:"enableCDI"`
	CDISpecDirs                        []string `toml:"cdi_spec_dirs" json:"cdiSpecDirs"`
	DrainExecSyncIOTimeout             string   `toml:"drain_exec_sync_io_timeout" json:"drainExecSyncIOTimeout"`
	IgnoreDeprecationWarnings          []string `toml:"ignore_deprecation_warnings" json:"ignoreDeprecationWarnings"`
	StatsCollectPeriod                 string   `toml:"stats_collect_period" json:"statsCollectPeriod"`
	StatsRetentionPeriod               string   `toml:"stats_retention_period" json:"statsRetentionPeriod"`
	// Gantry's own bounds of a container's log: bytes after which it is rotated
	// and files that are kept then, bytes a second beyond which output is dropped
	// and counted; 0 is unbounded (promise P21). A kubelet rotates by itself.
	MaxContainerLogSize  int64 `toml:"max_container_log_size" json:"maxContainerLogSize"`
	MaxContainerLogFiles int   `toml:"max_container_log_files" json:"maxContainerLogFiles"`
	MaxContainerLogRate  int64 `toml:"max_container_log_rate" json:"maxContainerLogRate"`
	EnableCRIU           bool  `toml:"enable_criu" json:"enableCRIU"`

	Containerd RuntimesConfig `toml:"containerd" json:"containerd"`
	CNI        CNIConfig      `toml:"cni" json:"cni"`
}

// RuntimesConfig is the table of runtime handlers.
type RuntimesConfig struct {
	DefaultRuntimeName            string             `toml:"default_runtime_name" json:"defaultRuntimeName"`
	IgnoreBlockIONotEnabledErrors bool               `toml:"ignore_blockio_not_enabled_errors" json:"ignoreBlockIONotEnabledErrors"`
	IgnoreRdtNotEnabledErrors     bool               `toml:"ignore_rdt_not_enabled_errors" json:"ignoreRdtNotEnabledErrors"`
	Runtimes                      map[string]Runtime `toml:"runtimes" json:"runtimes"`
}

// Runtime is a runtime handler (contract 7.3.1).
type Runtime struct {
	Type                                          string         `toml:"runtime_type" json:"runtimeType"`
	Path                                          string         `toml:"runtime_path" json:"runtimePath"`
	PodAnnotations                                []string       `toml:"pod_annotations" json:"PodAnnotations"`
	ContainerAnnotations                          []string       `toml:"container_annotations" json:"ContainerAnnotations"`
	Options                                       map[string]any `toml:"options" json:"options"`
	PrivilegedWithoutHostDevices                  bool           `toml:"privileged_without_host_devices" json:"privileged_without_host_devices"`
	PrivilegedWithoutHostDevicesAllDevicesAllowed bool           `toml:"privileged_without_host_devices_all_devices_allowed" json:"privileged_without_host_devices_all_devices_allowed"`
	CgroupWritable                                bool           `toml:"cgroup_writable" json:"cgroupWritable"`
	BaseRuntimeSpec                               string         `toml:"base_runtime_spec" json:"baseRuntimeSpec"`
	CNIConfDir                                    string         `toml:"cni_conf_dir" json:"cniConfDir"`
	CNIMaxConfNum                                 int            `toml:"cni_max_conf_num" json:"cniMaxConfNum"`
	Snapshotter                                   string         `toml:"snapshotter" json:"snapshotter"`
	// Sandboxer is the controller of its pods: "podsandbox" (a pause container),
	// "shim" (the shim's Sandbox API), or "pauseless", which is Gantry's own: no
	// process and no image, unless a pod asks for a shared PID namespace (promise P55).
	Sandboxer             string `toml:"sandboxer" json:"sandboxer"`
	DisablePauseImagePull bool   `toml:"disable_pause_image_pull" json:"disablePauseImagePull"`
	IOType                string `toml:"io_type" json:"io_type"`
}

// The sandboxers.
const (
	SandboxerPodSandbox = "podsandbox"
	SandboxerShim       = "shim"
	SandboxerPauseless  = "pauseless"
)

// CNIConfig is the block of pod networks (contract 7.3.21).
type CNIConfig struct {
	BinDir              string   `toml:"bin_dir" json:"binDir"` // deprecated
	BinDirs             []string `toml:"bin_dirs" json:"binDirs"`
	ConfDir             string   `toml:"conf_dir" json:"confDir"`
	MaxConfNum          int      `toml:"max_conf_num" json:"maxConfNum"`
	SetupSerially       bool     `toml:"setup_serially" json:"setupSerially"`
	ConfTemplate        string   `toml:"conf_template" json:"confTemplate"`
	IPPref              string   `toml:"ip_pref" json:"ipPref"` // "ipv4", "ipv6" or "cni"
	UseInternalLoopback bool     `toml:"use_internal_loopback" json:"useInternalLoopback"`
}

// ImagesConfig is the block of images (contract 7.4.3).
type ImagesConfig struct {
	Snapshotter                string                     `toml:"snapshotter"`
	DisableSnapshotAnnotations bool                       `toml:"disable_snapshot_annotations"`
	DiscardUnpackedLayers      bool                       `toml:"discard_unpacked_layers"`
	MaxConcurrentDownloads     int                        `toml:"max_concurrent_downloads"`
	ConcurrentLayerFetchBuffer int                        `toml:"concurrent_layer_fetch_buffer"`
	ImagePullProgressTimeout   time.Duration              `toml:"image_pull_progress_timeout"`
	ImagePullWithSyncFS        bool                       `toml:"image_pull_with_sync_fs"`
	StatsCollectPeriod         int                        `toml:"stats_collect_period"` // seconds
	UseLocalImagePull          bool                       `toml:"use_local_image_pull"`
	PinnedImages               map[string]string          `toml:"pinned_images"`
	RuntimePlatforms           map[string]RuntimePlatform `toml:"runtime_platforms"`
	Registry                   RegistryConfig             `toml:"registry"`
	ImageDecryption            struct {
		KeyModel string `toml:"key_model"`
	} `toml:"image_decryption"`
}

// Ineffective reports the settings that do nothing, or less than they say.
func (c *ImagesConfig) Ineffective(report func(why string, key ...string)) {
	if d := DefaultImagesConfig().MaxConcurrentDownloads; c.MaxConcurrentDownloads != d {
		report(`the limit is that of all pulls together, max_concurrent_downloads of plugins.'io.containerd.transfer.v1.local'`, "max_concurrent_downloads")
	}
	if c.ConcurrentLayerFetchBuffer != 0 {
		report("a layer is fetched in one piece, several layers at a time", "concurrent_layer_fetch_buffer")
	}
	if c.ImagePullWithSyncFS {
		report(`what is synced is the same for all clients, sync_fs of plugins.'io.containerd.service.v1.diff-service'`, "image_pull_with_sync_fs")
	}
	if c.UseLocalImagePull {
		report("there is one way of pulling, which honours all settings", "use_local_image_pull")
	}
	if c.ImageDecryption.KeyModel != "" && c.ImageDecryption.KeyModel != "node" {
		report("encrypted layers are decrypted by stream processors with keys of the node, or not at all", "image_decryption", "key_model")
	}
	if r := c.Registry; r.ConfigPath != "" {
		const both = "config_path is set too, which cannot be" + fatal
		if len(r.Mirrors) > 0 {
			report(both, "registry", "mirrors")
		}
		for _, host := range slices.Sorted(maps.Keys(r.Configs)) {
			if r.Configs[host].TLS != nil {
				report(both, "registry", "configs", host, "tls")
			}
		}
	}
}

// fatal is said of a setting with which Kubernetes' services do not start.
const fatal = "; pods cannot be run"

// noDuration reports a text that is none; "" is the default.
func noDuration(report func(why string, key ...string), key, text string) {
	if d, err := time.ParseDuration(text); text != "" && (err != nil || d < 0) {
		report(fmt.Sprintf("%.80q is no duration such as 10s", text)+fatal, key)
	}
}

// Ineffective reports the settings of streaming with which nothing starts.
func (c *ServerConfig) Ineffective(report func(why string, key ...string)) {
	noDuration(report, "stream_idle_timeout", c.StreamIdleTimeout)
	if _, err := strconv.ParseUint(c.StreamServerPort, 10, 16); c.StreamServerPort != "" && err != nil {
		report(fmt.Sprintf("%.80q is no port", c.StreamServerPort)+fatal, "stream_server_port")
	}
	if pair := c.X509KeyPair; !c.EnableTLSStreaming && (pair.CertFile != "" || pair.KeyFile != "") {
		report("enable_tls_streaming is not set, which cannot be"+fatal, "x509_key_pair_streaming")
	}
}

// Ineffective reports the settings of pods and of runtime handlers that do
// nothing, or with which nothing starts.
func (c *RuntimeConfig) Ineffective(report func(why string, key ...string)) {
	noDuration(report, "stats_collect_period", c.StatsCollectPeriod)
	noDuration(report, "stats_retention_period", c.StatsRetentionPeriod)
	noDuration(report, "drain_exec_sync_io_timeout", c.DrainExecSyncIOTimeout)
	if _, _, err := c.Handler(""); err != nil {
		report(fmt.Sprintf("there is no such runtime handler (there are %q)", slices.Sorted(maps.Keys(c.Containerd.Runtimes)))+fatal, "containerd", "default_runtime_name")
	}
	for _, name := range slices.Sorted(maps.Keys(c.Containerd.Runtimes)) {
		r := c.Containerd.Runtimes[name]
		at := func(why string, key ...string) {
			report(why, append([]string{"containerd", "runtimes", name}, key...)...)
		}
		if r.Type == "" && r.Path == "" {
			at("it has no runtime_type; pods of this handler are refused")
		}
		if r.IOType != "" && r.IOType != "fifo" {
			at("streams are files and FIFOs", "io_type")
		}
		switch r.Sandboxer {
		case "", SandboxerPodSandbox, SandboxerPauseless, SandboxerShim:
		default:
			at(fmt.Sprintf("there is no such sandboxer; pods of this handler are refused (there are %s, %s and %s)", SandboxerPodSandbox, SandboxerPauseless, SandboxerShim), "sandboxer")
		}
		for _, option := range r.unknownOptions() {
			at("the runtime has no such option", "options", option)
		}
		if _, err := r.Record(); err != nil {
			at(err.Error()+fatal, "options")
		}
	}
}

// RuntimePlatform says what a runtime handler's images are unpacked for.
type RuntimePlatform struct {
	Platform    string `toml:"platform"`
	Snapshotter string `toml:"snapshotter"`
}

// RegistryConfig says how registries are reached; all but ConfigPath and
// Headers is deprecated.
type RegistryConfig struct {
	ConfigPath string                    `toml:"config_path"`
	Mirrors    map[string]RegistryMirror `toml:"mirrors"`
	Configs    map[string]RegistryHost   `toml:"configs"`
	Auths      map[string]RegistryAuth   `toml:"auths"`
	Headers    map[string][]string       `toml:"headers"`
}

// RegistryMirror lists the addresses to ask for a registry's images.
type RegistryMirror struct {
	Endpoints []string `toml:"endpoint"`
}

// RegistryHost is how one host is reached.
type RegistryHost struct {
	Auth *RegistryAuth `toml:"auth"`
	TLS  *struct {
		InsecureSkipVerify bool   `toml:"insecure_skip_verify"`
		CAFile             string `toml:"ca_file"`
		CertFile           string `toml:"cert_file"`
		KeyFile            string `toml:"key_file"`
	} `toml:"tls"`
}

// RegistryAuth are credentials in a file.
type RegistryAuth struct {
	Username      string `toml:"username"`
	Password      string `toml:"password"`
	Auth          string `toml:"auth"`
	IdentityToken string `toml:"identitytoken"`
}

// ServerConfig is the block of the server and of streaming (contract 7.4.1).
type ServerConfig struct {
	DisableTCPService   bool   `toml:"disable_tcp_service"`
	StreamServerAddress string `toml:"stream_server_address"`
	StreamServerPort    string `toml:"stream_server_port"`
	StreamIdleTimeout   string `toml:"stream_idle_timeout"`
	EnableTLSStreaming  bool   `toml:"enable_tls_streaming"`
	X509KeyPair         struct {
		CertFile string `toml:"tls_cert_file"`
		KeyFile  string `toml:"tls_key_file"`
	} `toml:"x509_key_pair_streaming"`
}

// PauseImage is what a pod's first process runs (contract 7.3.26).
const PauseImage = "registry.k8s.io/pause:3.10.2"

// DefaultRuntimeConfig is containerd's.
func DefaultRuntimeConfig() RuntimeConfig {
	return RuntimeConfig{
		SELinuxCategoryRange: 1024, MaxContainerLogLineSize: 16 << 10, TolerateMissingHugetlbController: true, DisableHugetlbController: true,
		EnableUnprivilegedPorts: true, EnableUnprivilegedICMP: true, EnableCDI: true, CDISpecDirs: []string{"/etc/cdi", "/var/run/cdi"},
		DrainExecSyncIOTimeout: "0s", EnableCRIU: true,
		Containerd: RuntimesConfig{DefaultRuntimeName: "runc", Runtimes: map[string]Runtime{"runc": {Type: "io.containerd.runc.v2", Sandboxer: SandboxerPodSandbox}}},
		CNI:        CNIConfig{BinDirs: []string{"/opt/cni/bin"}, ConfDir: "/etc/cni/net.d", MaxConfNum: 1},
	}
}

// DefaultImagesConfig is containerd's.
func DefaultImagesConfig() ImagesConfig {
	c := ImagesConfig{Snapshotter: "overlayfs", DisableSnapshotAnnotations: true, MaxConcurrentDownloads: 3, ImagePullProgressTimeout: 5 * time.Minute,
		StatsCollectPeriod: 10, PinnedImages: map[string]string{"sandbox": PauseImage}}
	c.ImageDecryption.KeyModel = "node"
	return c
}

// DefaultServerConfig is containerd's.
func DefaultServerConfig() ServerConfig {
	return ServerConfig{DisableTCPService: true, StreamServerAddress: "127.0.0.1", StreamServerPort: "0", StreamIdleTimeout: "4h0m0s"}
}

// Handler returns a runtime handler and its name; "" is the default one.
// ErrNotFound, naming those there are.
func (c RuntimeConfig) Handler(name string) (string, Runtime, error) {
	if name == "" {
		name = c.Containerd.DefaultRuntimeName
	}
	r, ok := c.Containerd.Runtimes[name]
	if !ok {
		return "", Runtime{}, fmt.Errorf("runtime handler %.80q is not configured, there are %q: %w", name, slices.Sorted(maps.Keys(c.Containerd.Runtimes)), errdefs.ErrNotFound)
	}
	if r.Sandboxer == "" {
		r.Sandboxer = SandboxerPodSandbox
	}
	return name, r, nil
}
