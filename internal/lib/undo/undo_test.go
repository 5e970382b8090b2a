package undo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
)

func TestStack(t *testing.T) {
	var done []string
	var s Stack
	broken := errors.New("broken")
	for _, name := range []string{"a", "b", "c"} {
		s.Push("undo "+name, func(context.Context) error {
			done = append(done, name)
			if name == "b" {
				return broken
			}
			return nil
		})
	}
	err := s.Run(t.Context())
	if !errors.Is(err, broken) || !strings.Contains(err.Error(), "undo b: broken") {
		t.Fatalf("error %v does not name the step and its cause", err)
	}
	if !slices.Equal(done, []string{"c", "b", "a"}) {
		t.Fatalf("order %v", done)
	}
	if err := s.Run(t.Context()); err != nil || len(done) != 3 {
		t.Fatalf("a second run did something: %v %v", err, done)
	}
	var kept Stack
	kept.Push("x", func(context.Context) error { t.Error("ran although kept"); return nil })
	kept.Keep()
	if err := kept.Run(t.Context()); err != nil {
		t.Fatal(err)
	}
}
