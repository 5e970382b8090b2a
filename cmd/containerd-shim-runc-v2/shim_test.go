//go:build linux

package main_test

import (
	"testing"
)

// contract: 5.3.1, 5.3.2
func TestSmoke(t *testing.T) {
	k := newDaemon(t).newTask("c1", "sh", "-c", "echo hello; exit 7").fifos().run()
	if w := k.wait(""); w.ExitStatus != 7 {
		t.Errorf("status %d", w.ExitStatus)
	}
	k.out.await(t, "hello\n")
	k.delete("")
	k.finish()
}
