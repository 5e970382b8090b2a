package cricontainer

import (
	"path/filepath"
	"strings"
	"testing"

	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A log is below the pod's directory, or refused.
//
// contract: 7.3.20
func FuzzLogPath(f *testing.F) {
	for _, name := range []string{"c/0.log", "../x", "a/../../x", "/etc/x", ".", "", "a\x00b", "..", "a/..", "a/./b", "..a/b", "a//b", "%2e%2e/x", "\xff/x", strings.Repeat("a/", 3000)} {
		f.Add("/var/log/pods/x", name)
	}
	f.Add("relative", "x")
	f.Add("/", "x")
	f.Fuzz(func(t *testing.T, dir, name string) {
		path, err := logPath(&runtime.PodSandboxConfig{LogDirectory: dir}, &runtime.ContainerConfig{LogPath: name})
		if err != nil || path == "" {
			return
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil || rel == "." || rel == ".." || strings.HasPrefix(rel, "../") || strings.ContainsRune(path, 0) && !strings.ContainsRune(dir, 0) {
			t.Errorf("%q in %q is %q", name, dir, path)
		}
	})
}
