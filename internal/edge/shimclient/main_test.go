package shimclient

import (
	"os"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Getenv(fakeEnv) != "" {
		fakeShim()
		return
	}
	code := m.Run()
	if ownShimUsed {
		if dir, err := ownShim(); err == nil {
			os.RemoveAll(dir)
		}
	}
	os.Exit(code)
}
