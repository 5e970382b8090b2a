package fault

import (
	"errors"
	"os"
	"os/exec"
	"slices"
	"syscall"
	"testing"
)

func TestPass(t *testing.T) {
	var hits []string
	p, err := Parse("a:3,b.c:1", func(point string) { hits = append(hits, point) })
	if err != nil {
		t.Fatal(err)
	}
	for _, point := range []string{"a", "x", "a", "b.c", "b.c", "a", "a"} {
		p.Pass(point)
	}
	if !slices.Equal(hits, []string{"b.c", "a"}) {
		t.Fatalf("acted at %v", hits)
	}
	var none *Points
	none.Pass("a")
	for _, spec := range []string{"a", "a:", "a:0", "a:x", ":1", "a:1,"} {
		if _, err := Parse(spec, Kill); err == nil {
			t.Errorf("%q was accepted", spec)
		}
	}
	if p, err := Parse("", Kill); p != nil || err != nil {
		t.Errorf("empty spec: %v, %v", p, err)
	}
}

func TestKill(t *testing.T) {
	if os.Getenv("FAULT_TEST_CHILD") != "" {
		p, err := Parse("here:2", Kill)
		if err != nil {
			t.Fatal(err)
		}
		p.Pass("here")
		p.Pass("here")
		t.Fatal("alive")
	}
	cmd := exec.Command(os.Args[0], "-test.run=^TestKill$")
	cmd.Env = append(os.Environ(), "FAULT_TEST_CHILD=1")
	err := cmd.Run()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("the child ended with %v", err)
	}
}
