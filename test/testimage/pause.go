package testimage

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

//go:embed pause/pause.c
var pauseSource []byte

// NewPause makes the image of a pod's first process: one static program. It
// needs a C compiler, as the build of Gantry does.
func NewPause() (*Image, error) {
	dir, err := os.MkdirTemp("", "gantry-pause")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	source, bin := filepath.Join(dir, "pause.c"), filepath.Join(dir, "pause")
	if err := os.WriteFile(source, pauseSource, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command("cc", "-Os", "-static", "-s", "-o", bin, source).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile pause.c: %w: %s", err, out)
	}
	body, err := os.ReadFile(bin)
	if err != nil {
		return nil, err
	}
	return New(ocispec.ImageConfig{Entrypoint: []string{"/pause"}, User: "65535:65535"}, Layer{[]File{{Name: "pause", Body: body, Mode: 0o755}}, "gzip"})
}
