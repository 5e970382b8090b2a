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
	body, err := compile(pauseSource)
	if err != nil {
		return nil, err
	}
	return New(ocispec.ImageConfig{Entrypoint: []string{"/pause"}, User: "65535:65535"}, Layer{[]File{{Name: "pause", Body: body, Mode: 0o755}}, "gzip"})
}

// compile makes a static program of C.
func compile(source []byte) ([]byte, error) {
	dir, err := os.MkdirTemp("", "gantry-cc")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	in, bin := filepath.Join(dir, "in.c"), filepath.Join(dir, "out")
	if err := os.WriteFile(in, source, 0o600); err != nil {
		return nil, err
	}
	if out, err := exec.Command("cc", "-Os", "-static", "-s", "-o", bin, in).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("compile for an image: %w: %s", err, out)
	}
	return os.ReadFile(bin)
}
