package memory

import (
	"testing"

	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
)

// contract: 1.3.30
func TestSandboxController(t *testing.T) {
	sandboxtest.RunController(t, sandboxtest.ControllerOptions{Open: func(*testing.T) sandbox.Controller { return NewSandboxController() }})
}
