// Package undo takes back the steps of an operation that did not succeed. The
// undo of a step is written next to the step; a Stack that is not kept runs
// them all, the last one first, and one that fails does not stop the others.
package undo

import (
	"context"
	"errors"
	"fmt"
)

// Stack is the steps done so far. The zero Stack is empty and ready. It is not
// safe for concurrent use.
type Stack struct {
	steps []step
	kept  bool
}

type step struct {
	name string
	back func(context.Context) error
}

// Push adds a step that was done. name stands in the error if it cannot be
// taken back: "remove bundle /run/x".
func (s *Stack) Push(name string, back func(context.Context) error) {
	s.steps = append(s.steps, step{name, back})
}

// Keep makes Run do nothing from now on: the operation has succeeded.
func (s *Stack) Keep() { s.kept = true }

// Run takes back what was pushed since the last Run, unless Keep was called,
// and returns the errors joined, each with its step's name. ctx is handed to
// the steps; a caller whose own context may be over passes one that is not.
func (s *Stack) Run(ctx context.Context) error {
	if s.kept {
		return nil
	}
	var errs []error
	for len(s.steps) > 0 {
		last := s.steps[len(s.steps)-1]
		s.steps = s.steps[:len(s.steps)-1]
		if err := last.back(ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", last.name, err))
		}
	}
	return errors.Join(errs...)
}
