package arch

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden dependency lists")

// binaries whose whole dependency list is kept.
var binaries = []string{"gantryd", "gantry", "containerd-shim-runc-v2"}

// TestDependencies compares what each binary is made of with a golden file, so
// that a new dependency is a line someone sees in review:
//
//	go test ./internal/arch -run TestDependencies -update
func TestDependencies(t *testing.T) {
	for _, bin := range binaries {
		t.Run(bin, func(t *testing.T) {
			if files, _ := filepath.Glob(filepath.Join("..", "..", "cmd", bin, "*.go")); len(files) == 0 {
				t.Skipf("cmd/%s does not exist", bin)
			}
			cmd := exec.Command("go", "list", "-deps", "./cmd/"+bin)
			cmd.Dir = filepath.Join("..", "..")
			cmd.Env = append(os.Environ(), "GOOS=linux", "GOARCH=amd64", "CGO_ENABLED=1", "GOWORK=off", "GOFLAGS=")
			var stderr bytes.Buffer
			cmd.Stderr = &stderr
			out, err := cmd.Output()
			if err != nil {
				t.Fatalf("go list ./cmd/%s: %v\n%s", bin, err, stderr.String())
			}
			got := public(strings.Fields(string(out)))
			golden := filepath.Join("testdata", "deps-"+bin+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(strings.Join(got, "\n")+"\n"), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			data, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Fields(string(data))
			for _, d := range got {
				if !slices.Contains(want, d) {
					t.Errorf("new dependency %s", d)
				}
			}
			for _, d := range want {
				if !slices.Contains(got, d) {
					t.Errorf("gone: %s", d)
				}
			}
			if t.Failed() {
				t.Log("if that is meant: go test ./internal/arch -run TestDependencies -update")
			}
		})
	}
}

// public leaves out the inner packages of the standard library, which are
// Go's own affair and change with each release.
func public(deps []string) []string {
	var keep []string
	for _, d := range deps {
		root, _, _ := strings.Cut(d, "/")
		std := !strings.Contains(root, ".")
		if std && (root == "vendor" || slices.Contains(strings.Split(d, "/"), "internal") || d == "C" || d == "unsafe") {
			continue
		}
		keep = append(keep, d)
	}
	slices.Sort(keep)
	return slices.Compact(keep)
}
