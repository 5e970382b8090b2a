//go:build linux

// Package cri is the conformance suite of Kubernetes' interface: each test does
// over the socket what a kubelet does, and looks at what the kernel shows.
package cri

import (
	"fmt"
	"os"
	"sync"
	"testing"

	"github.com/gantryd/gantry/test/critest"
)

var binDir string

// shared is the node of all tests that do not stop the daemon.
var shared struct {
	sync.Once
	node *critest.Node
	err  error
}

// node returns the shared node, running.
func node(t *testing.T) *critest.Node {
	t.Helper()
	shared.Do(func() {
		if shared.node, shared.err = critest.NewNode(binDir, ""); shared.err == nil {
			shared.err = shared.node.Start()
		}
	})
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the end of the daemon's log:\n%s", shared.node.Log(4<<10))
		}
	})
	return shared.node
}

// suite runs the tests and then looks at what they have left on the shared node.
type suite struct{ m *testing.M }

func (s suite) Run() int {
	code := s.m.Run()
	if shared.node == nil {
		return code
	}
	if err := shared.node.Stop(); err != nil {
		fmt.Println("FAIL: stop the daemon:", err)
		code = 1
	}
	for _, left := range shared.node.Left() {
		fmt.Println("FAIL: left behind:", left)
		code = 1
	}
	if err := shared.node.Close(); err != nil {
		fmt.Println("FAIL: close the node:", err)
		code = 1
	}
	return code
}

func TestMain(m *testing.M) { os.Exit(critest.Main(suite{m}, "../..", &binDir)) }
