package view

import (
	"github.com/gantryd/gantry/core/diff"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/stream"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/transfer"
)

// Services are the part of a View that is not stored.
type Services struct {
	Diff     diff.Service
	Tasks    task.Store
	Transfer transfer.Service
	Streams  stream.Manager
}

// Join makes Views of Records and of the services that with makes for them.
func Join(src RecordSource, with func(Records) Services) Source {
	return joiner{src, with}
}

type joiner struct {
	src  RecordSource
	with func(Records) Services
}

func (j joiner) In(ns namespace.ID, under lease.ID) (View, error) {
	r, err := j.src.In(ns, under)
	if err != nil {
		return nil, err
	}
	return joined{r, j.with(r)}, nil
}

type joined struct {
	Records
	s Services
}

func (v joined) Diff() diff.Service         { return v.s.Diff }
func (v joined) Tasks() task.Store          { return v.s.Tasks }
func (v joined) Transfer() transfer.Service { return v.s.Transfer }
func (v joined) Streams() stream.Manager    { return v.s.Streams }
