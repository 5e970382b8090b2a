package crispec

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/opencontainers/selinux/go-selinux"
	"github.com/opencontainers/selinux/go-selinux/label"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/oci"
)

// security is what a container's process may do (contract 7.3.4 to 7.3.8).
func (in ContainerInput) security() ([]oci.Option, error) {
	sc := in.Config.GetLinux().GetSecurityContext()
	privileged := sc.GetPrivileged()
	var opts []oci.Option
	add := func(o ...oci.Option) { opts = append(opts, o...) }
	if sc.GetReadonlyRootfs() {
		add(oci.WithReadonlyRoot())
	}
	if !sc.GetNoNewPrivs() {
		add(oci.WithNewPrivileges())
	}
	caps := sc.GetCapabilities()
	if len(caps.GetAddAmbientCapabilities()) > 0 {
		in.Log.Warn("ambient capabilities are not given to containers", "asked", caps.GetAddAmbientCapabilities())
	}
	if privileged {
		add(oci.WithCapabilities([]string{"ALL"}, nil))
	} else {
		// What is dropped is dropped, whatever else is asked for.
		dropped := func(c string) bool {
			return slices.ContainsFunc(caps.GetDropCapabilities(), func(d string) bool { return plainCap(d) == plainCap(c) })
		}
		add(oci.WithCapabilities(slices.DeleteFunc(slices.Clone(caps.GetAddCapabilities()), dropped), caps.GetDropCapabilities()))
	}
	masked, readonly := sc.GetMaskedPaths(), sc.GetReadonlyPaths()
	for _, p := range slices.Concat(masked, readonly) {
		if !strings.HasPrefix(p, "/") || strings.ContainsRune(p, 0) {
			return nil, fmt.Errorf("masked or read-only path %q: want an absolute path: %w", short(p), errdefs.ErrInvalidArgument)
		}
	}
	disableProc := in.RuntimeConfig.DisableProcMount
	add(oci.WithSpec(func(s *specs.Spec) error {
		switch {
		case privileged:
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = nil, nil
			s.Process.NoNewPrivileges = sc.GetNoNewPrivs()
		case !disableProc: // none means none: the kubelet always says what to mask
			s.Linux.MaskedPaths, s.Linux.ReadonlyPaths = masked, readonly
		}
		s.Process.Capabilities.Ambient, s.Process.Capabilities.Inheritable = nil, nil
		return nil
	}))
	seccomp, err := seccompOf(profiles{sc.GetSeccomp(), sc.GetSeccompProfilePath(), privileged, in.Base != nil}, in.RuntimeConfig, in.Host, in.Seccomp)
	if err != nil {
		return nil, err
	}
	add(seccomp...)
	profile, err := appArmorOf(profiles{sc.GetApparmor(), sc.GetApparmorProfile(), privileged, in.Base != nil}, in.Host)
	if err != nil {
		return nil, err
	}
	if profile != "" || in.Base == nil || privileged {
		add(oci.WithAppArmor(profile))
	}
	process := in.ProcessLabel
	if privileged && sc.GetSelinuxOptions() == nil {
		process = ""
	}
	return append(opts, oci.WithSELinux(process, in.MountLabel)), nil
}

func plainCap(c string) string { return strings.TrimPrefix(strings.ToUpper(c), "CAP_") }

// profiles is what a request says about a profile: the field, the deprecated
// string, and what changes their meaning.
type profiles struct {
	field      *runtime.SecurityProfile
	old        string
	privileged bool
	based      bool
}

const localhostPrefix = "localhost/"

// get brings both forms to one; nil is unset.
func (p profiles) get(what string) (*runtime.SecurityProfile, error) {
	if p.field != nil {
		t := p.field.GetProfileType()
		if _, ok := runtime.SecurityProfile_ProfileType_name[int32(t)]; !ok {
			return nil, fmt.Errorf("%s profile of type %d: %w", what, t, errdefs.ErrInvalidArgument)
		}
		if t == runtime.SecurityProfile_Localhost && strings.TrimPrefix(p.field.GetLocalhostRef(), localhostPrefix) == "" {
			return nil, fmt.Errorf("%s profile of type Localhost without a name: %w", what, errdefs.ErrInvalidArgument)
		}
		return p.field, nil
	}
	return parseProfile(what, p.old)
}

func parseProfile(what, s string) (*runtime.SecurityProfile, error) {
	switch {
	case s == "":
		return nil, nil
	case s == "runtime/default" || s == "docker/default":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_RuntimeDefault}, nil
	case s == "unconfined":
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Unconfined}, nil
	case strings.HasPrefix(s, localhostPrefix) && s != localhostPrefix:
		return &runtime.SecurityProfile{ProfileType: runtime.SecurityProfile_Localhost, LocalhostRef: s}, nil
	}
	return nil, fmt.Errorf("%s profile %q: want runtime/default, unconfined or localhost/<name>: %w", what, short(s), errdefs.ErrInvalidArgument)
}

// seccompOf picks the system call filter (contract 7.3.4). No option leaves the
// default.
func seccompOf(p profiles, cfg cristate.RuntimeConfig, h Host, localhost *specs.LinuxSeccomp) ([]oci.Option, error) {
	off := []oci.Option{oci.WithSeccomp(nil)}
	if p.privileged {
		return off, nil
	}
	sp, err := p.get("seccomp")
	if err == nil && sp == nil {
		if p.based && cfg.UnsetSeccompProfile == "" {
			return nil, nil // what the administrator's specification has
		}
		sp, err = parseProfile("unset_seccomp_profile: seccomp", cfg.UnsetSeccompProfile)
	}
	if err != nil {
		return nil, err
	}
	if sp == nil || sp.GetProfileType() == runtime.SecurityProfile_Unconfined {
		return off, nil
	}
	if h.NoSeccomp {
		return nil, fmt.Errorf("seccomp profile: this kernel or runtime cannot filter system calls: %w", errdefs.ErrFailedPrecondition)
	}
	if sp.GetProfileType() == runtime.SecurityProfile_Localhost {
		if localhost == nil {
			return nil, fmt.Errorf("seccomp profile %s was not read: %w", short(sp.GetLocalhostRef()), errdefs.ErrFailedPrecondition)
		}
		return []oci.Option{oci.WithSeccomp(localhost)}, nil
	}
	return []oci.Option{oci.WithDefaultSeccomp()}, nil
}

// SeccompRef is the path of the profile that has to be read for a container or
// pod, "" for none: field and old are the security context's two forms.
func SeccompRef(field *runtime.SecurityProfile, old string, privileged bool, cfg cristate.RuntimeConfig) (string, error) {
	if privileged {
		return "", nil
	}
	sp, err := profiles{field: field, old: old}.get("seccomp")
	if err == nil && sp == nil {
		sp, err = parseProfile("unset_seccomp_profile: seccomp", cfg.UnsetSeccompProfile)
	}
	if err != nil || sp.GetProfileType() != runtime.SecurityProfile_Localhost {
		return "", err
	}
	ref := strings.TrimPrefix(sp.GetLocalhostRef(), localhostPrefix)
	if !strings.HasPrefix(ref, "/") || strings.Contains(ref, "\x00") {
		return "", fmt.Errorf("seccomp profile %q: want an absolute path: %w", short(ref), errdefs.ErrInvalidArgument)
	}
	return ref, nil
}

// MaxSeccomp is the most bytes that a profile may have.
const MaxSeccomp = 4 << 20

// ParseSeccomp reads a profile of the host, in the form of the runtime
// specification. ErrInvalidArgument.
func ParseSeccomp(data []byte) (*specs.LinuxSeccomp, error) {
	if len(data) > MaxSeccomp {
		return nil, fmt.Errorf("seccomp profile of more than %d bytes: %w", MaxSeccomp, errdefs.ErrInvalidArgument)
	}
	var p specs.LinuxSeccomp
	if err := json.Unmarshal(data, &p); err != nil {
		return nil, fmt.Errorf("seccomp profile: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if !strings.HasPrefix(string(p.DefaultAction), "SCMP_ACT_") {
		return nil, fmt.Errorf("seccomp profile: defaultAction is %q: %w", short(string(p.DefaultAction)), errdefs.ErrInvalidArgument)
	}
	return &p, nil
}

// AppArmorDefault is the name of the profile that containers have by default
// (contract 7.3.5, 10.6).
const AppArmorDefault = "cri-containerd.apparmor.d"

// appArmorOf picks the profile, "" is unconfined.
func appArmorOf(p profiles, h Host) (string, error) {
	sp, err := p.get("AppArmor")
	if err != nil {
		return "", err
	}
	if h.AppArmor == "" {
		if sp != nil && sp.GetProfileType() != runtime.SecurityProfile_Unconfined {
			return "", fmt.Errorf("AppArmor profile: AppArmor is not usable on this host or disabled: %w", errdefs.ErrFailedPrecondition)
		}
		return "", nil
	}
	switch {
	case sp == nil && p.based: // the administrator's specification decides
		return "", nil
	case sp == nil || sp.GetProfileType() == runtime.SecurityProfile_RuntimeDefault:
		if p.privileged {
			return "", nil
		}
		return h.AppArmor, h.AppArmorMissing
	case sp.GetProfileType() == runtime.SecurityProfile_Unconfined:
		return "", nil
	}
	name := strings.TrimPrefix(sp.GetLocalhostRef(), localhostPrefix)
	if h.AppArmorLoaded != nil && !h.AppArmorLoaded(name) {
		return "", fmt.Errorf("AppArmor profile %q is not loaded: %w", short(name), errdefs.ErrNotFound)
	}
	return name, nil
}

var selinuxLevel = regexp.MustCompile(`^s\d{1,2}(-s\d{1,2})?(:c\d{1,4}(\.c\d{1,4})?(,c\d{1,4}(\.c\d{1,4})?)*)?$`)

// Labels are the SELinux labels of a process and of its files, "" without
// SELinux (contract 7.3.6). pod is the process label of the pod that a
// container is in, "" for the pod itself: a container has the pod's label, or
// at least its level, unless the options say otherwise. A label that was made
// for a pod's categories is reserved until selinux.ReleaseLabel. vm says that
// the runtime runs virtual machines. ErrInvalidArgument.
func Labels(o *runtime.SELinuxOption, pod string, vm bool) (process, mount string, err error) {
	opts, err := labelOptions(o, pod)
	if err != nil {
		return "", "", err
	}
	process, mount, err = label.InitLabels(opts)
	if err != nil {
		return "", "", fmt.Errorf("SELinux labels: %v: %w", err, errdefs.ErrInvalidArgument)
	}
	if vm && process != "" && o.GetType() == "" {
		if process, err = selinux.SetProcessKind(process, selinux.ProcessKindKVM); err != nil {
			return "", "", fmt.Errorf("SELinux label of virtual machines: %w", err)
		}
	}
	return process, mount, nil
}

// labelOptions are the parts of a label that are not the host's choice.
func labelOptions(o *runtime.SELinuxOption, pod string) ([]string, error) {
	for _, f := range []string{o.GetUser(), o.GetRole(), o.GetType()} {
		if strings.ContainsAny(f, ": \t\n\x00,") {
			return nil, fmt.Errorf("SELinux option %q: %w", short(f), errdefs.ErrInvalidArgument)
		}
	}
	if l := o.GetLevel(); l != "" && !selinuxLevel.MatchString(l) {
		return nil, fmt.Errorf("SELinux level %q: %w", short(l), errdefs.ErrInvalidArgument)
	}
	var shared selinux.Context
	if pod != "" {
		var err error
		if shared, err = selinux.NewContext(pod); err != nil {
			return nil, fmt.Errorf("SELinux label %q of the pod: %w", short(pod), err)
		}
	}
	own := o.GetUser()+o.GetRole()+o.GetType()+o.GetLevel() != ""
	var opts []string
	for _, f := range [][2]string{{"user", o.GetUser()}, {"role", o.GetRole()}, {"type", o.GetType()}, {"level", o.GetLevel()}} {
		if f[1] == "" && (!own || f[0] == "level") {
			f[1] = shared[f[0]]
		}
		if f[1] != "" {
			opts = append(opts, f[0]+":"+f[1])
		}
	}
	return opts, nil
}
