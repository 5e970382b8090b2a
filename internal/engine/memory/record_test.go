package memory

import (
	"testing"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/container/containertest"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/lease/leasetest"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/namespace/namespacetest"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/sandbox/sandboxtest"
)

func TestImages(t *testing.T) {
	imagetest.Run(t, func(*testing.T) image.Store { return NewImages() })
}

func TestContainers(t *testing.T) {
	containertest.Run(t, func(*testing.T) container.Store { return NewContainers() })
}

func TestSandboxes(t *testing.T) {
	sandboxtest.Run(t, func(*testing.T) sandbox.Store { return NewSandboxes() })
}

func TestLeases(t *testing.T) {
	leasetest.Run(t, func(*testing.T) lease.Store { return NewLeases() })
}

func TestNamespaces(t *testing.T) {
	namespacetest.Run(t, func(*testing.T) namespace.Store { return NewNamespaces() })
}
