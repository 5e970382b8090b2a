package arch

import "strings"

// suiteModules are what a noun's conformance suite may use besides: it is a
// test that others call.
var suiteModules = []string{"github.com/google/go-cmp", "golang.org/x/sys"}

// module is the path of the main module.
const module = "github.com/gantryd/gantry"

// layer is one row of the table: the packages below dir may import the
// packages below one of local, the modules of external, and the standard
// library but for never.
type layer struct {
	dir      string   // "" is the root package
	local    []string // directories of this module; "*" is all
	external []string // module or package prefixes; "*" is all
	never    []string // packages of the standard library
	// apart says that two different folders right below dir never import each
	// other: engines, services. except names those that the others may use.
	apart  bool
	except []string
}

// Modules that are vetted for several layers.
var (
	vocabulary = []string{ // values without behaviour
		"github.com/containerd/errdefs",
		"github.com/containerd/platforms",
		"github.com/opencontainers/go-digest",
		"github.com/opencontainers/image-spec",
		"github.com/opencontainers/runtime-spec/specs-go",
		"github.com/distribution/reference",
	}
	system = []string{ // the kernel, thinly wrapped
		"cyphar.com/go-pathrs",
		"github.com/cyphar/filepath-securejoin",
		"github.com/moby/sys",
		"github.com/vishvananda/netlink",
		"golang.org/x/sync",
		"golang.org/x/sys",
	}
	compression = []string{"github.com/klauspost/compress"}
	wireModules = []string{ // API modules and transports
		"github.com/containerd/containerd/api",
		"github.com/containerd/errdefs/pkg",
		"github.com/containerd/ttrpc",
		"github.com/containerd/typeurl/v2",
		"google.golang.org/genproto/googleapis/rpc",
		"google.golang.org/grpc",
		"google.golang.org/protobuf",
	}
	execution = []string{ // what makes a container
		"github.com/containerd/cgroups/v3",
		"github.com/containerd/console",
		"github.com/containerd/fifo",
		"github.com/containerd/go-runc",
		"github.com/opencontainers/cgroups",
		"github.com/opencontainers/runc",
		"github.com/opencontainers/selinux",
		"github.com/coreos/go-systemd/v22",
		"github.com/godbus/dbus/v5",
	}
)

func concat(lists ...[]string) []string {
	var all []string
	for _, l := range lists {
		all = append(all, l...)
	}
	return all
}

// layers is the table of design.md section 2. The longest dir that is a prefix
// of a package decides. Test files are exempt.
var layers = []layer{
	{dir: "internal/lib", local: []string{"internal/lib"},
		external: concat(system, compression, []string{"github.com/containerd/errdefs", "github.com/containerd/fifo", "github.com/opencontainers/go-digest"})},
	{dir: "core", local: []string{"core", "internal/lib"}, external: vocabulary, never: []string{"os", "os/exec", "net", "net/http", "syscall"}},
	{dir: "oci", local: []string{"core", "internal/lib", "oci"}, external: vocabulary, never: []string{"os", "os/exec", "os/user", "net", "net/http", "syscall"}},
	{dir: "internal/engine", local: []string{"core", "internal/lib"}, apart: true, except: []string{"snapmeta"},
		external: concat(vocabulary, system, compression, []string{"github.com/erofs/go-erofs", "github.com/google/uuid", "github.com/opencontainers/selinux"})},
	{dir: "internal/service", local: []string{"core", "internal/lib", "oci"}, apart: true,
		external: concat(vocabulary, compression, []string{"golang.org/x/sync", "golang.org/x/sys"})},
	{dir: "internal/edge", local: []string{"internal/service", "oci", "core", "internal/lib", "internal/edge"},
		external: concat(vocabulary, system, compression, wireModules, []string{
			"github.com/containerd/cgroups/v3", "github.com/containerd/fifo", "github.com/containerd/go-cni", "github.com/containerd/nri",
			"github.com/containerd/otelttrpc", "github.com/opencontainers/selinux", "github.com/pelletier/go-toml/v2",
			"github.com/fsnotify/fsnotify", "github.com/prometheus", "go.opentelemetry.io", "k8s.io", "github.com/containernetworking/cni", "tags.cncf.io", "golang.org/x/net",
		})},
	{dir: "client", local: []string{"client", "core", "internal/lib", "oci", "internal/edge/wire"},
		external: concat(vocabulary, wireModules, []string{"github.com/containerd/cgroups/v3", "github.com/containerd/console", "github.com/containerd/fifo", "golang.org/x/sync", "golang.org/x/sys"})},
	{dir: "internal/shim", local: []string{"internal/shim", "internal/lib"},
		external: concat(vocabulary, system, wireModules, execution)},
	{dir: "internal/shim/libct", local: []string{"internal/shim", "internal/lib"}, // libcontainer logs through logrus
		external: concat(vocabulary, system, wireModules, execution, []string{"github.com/sirupsen/logrus"})},
	{dir: "internal/daemon", local: []string{"internal/lib", "internal/daemon"},
		external: []string{"github.com/containerd/errdefs", "github.com/pelletier/go-toml/v2", "golang.org/x/sys", "golang.org/x/sync", "google.golang.org/grpc"}},
	{dir: "internal/arch"},
	{dir: "cmd", local: []string{"*"}, external: []string{"*"}},
	{dir: "test", local: []string{"*"}, external: []string{"*"}},
	{dir: "", local: []string{"*"}, external: []string{"*"}}, // gantry.Main and what a distribution compiles
}

// owned are modules that only a few places may import, whatever their layer
// allows.
var owned = []struct {
	module string
	only   []string
}{
	{"go.etcd.io/bbolt", []string{"internal/engine/boltmeta", "internal/engine/snapmeta", "cmd"}},
	{"google.golang.org/grpc", []string{"internal/edge", "client", "internal/daemon", "cmd", "test/critest"}},
	{"github.com/containerd/containerd", nil}, // the program being written here; the API module is another
}

// ownedExcept are prefixes of an owned module that everybody whose layer lists
// them may import: a module of its own, and the error codes of the wire, which
// ttrpc shares and which bring no transport.
var ownedExcept = []string{"github.com/containerd/containerd/api", "google.golang.org/grpc/codes", "google.golang.org/grpc/status"}

// allowed are single exceptions to the house rules, with the reason. One that
// is not needed any more fails the test.
var allowed = []struct{ rule, file, why string }{
	{"init", "internal/shim/libct/reexec/reexec.go", "libcontainer's own first process must not initialise the rest of the program"},
}

func below(pkg, dir string) bool {
	return dir == "" || pkg == dir || strings.HasPrefix(pkg, dir+"/")
}

func belowAny(pkg string, dirs []string) bool {
	for _, d := range dirs {
		if d == "*" || below(pkg, d) {
			return true
		}
	}
	return false
}

// layerOf finds the row of a package, given as a path below the module.
func layerOf(pkg string) *layer {
	var best *layer
	for i := range layers {
		l := &layers[i]
		if below(pkg, l.dir) && (best == nil || len(l.dir) > len(best.dir)) {
			best = l
		}
	}
	if best.dir == "" && pkg != "" {
		return nil // only the root package itself
	}
	return best
}
