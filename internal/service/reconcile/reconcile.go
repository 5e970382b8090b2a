// Package reconcile decides what becomes of a container's runtime state after
// the daemon has started, or after any other surprise: what is found on disk
// and at the shim's socket, and what the store says, go in; one action comes
// out. Deciding is a pure function over a table; whoever calls it acts.
package reconcile

// Shim is what a container's shim is found to be.
type Shim uint8

// What a shim can be.
const (
	ShimNone   Shim = iota // no address was ever recorded
	ShimDead               // nobody listens at the address
	ShimSilent             // somebody listens and does not answer in time
	ShimAlive              // it answers
)

// Known is what a question was answered with.
type Known uint8

// The answers. Unsure is an error, never a no: what may be alive stays.
const (
	Unsure Known = iota
	No
	Yes
)

// Facts are about one container.
type Facts struct {
	// Deleted: the bundle is renamed for its deletion, which did not end.
	Deleted bool
	// Bundle: there is a bundle; if not, only a work directory.
	Bundle bool
	// Unfinished: the create that made the bundle was never answered.
	Unfinished bool
	Shim       Shim
	// Task: the shim knows the task.
	Task Known
	// Record: the store has the container's record.
	Record Known
	// Sandbox: the store has a sandbox of this name.
	Sandbox Known
}

// Action is what to do.
type Action uint8

// The actions.
const (
	// Leave it to its owner: it is a sandbox's shim.
	Leave Action = iota
	// Adopt the task as it is, and report what its exit was if it ended meanwhile.
	Adopt
	// Await: keep it, and decide again when the shim answers.
	Await
	// Bury: the shim died; clean up by its delete command, report exit and deletion.
	Bury
	// Discard what a create left that nobody was told of; no events.
	Discard
	// Evict: kill the task that is nobody's, delete it, stop its shim.
	Evict
	// Sweep directories that nothing refers to.
	Sweep
)

func (a Action) String() string {
	return [...]string{"leave", "adopt", "await", "bury", "discard", "evict", "sweep"}[a]
}

// rule is a row of the table: the first one whose conditions all hold decides.
type rule struct {
	when   func(Facts) bool
	action Action
}

// rules is the table. It is a function because nothing may change it.
func rules() []rule {
	return []rule{
		{func(f Facts) bool { return f.Deleted || !f.Bundle }, Sweep},
		// A silent shim may be stopped in a debugger or starved: its container
		// may run. Nothing is taken from it before it can be asked.
		{func(f Facts) bool { return f.Shim == ShimSilent }, Await},
		{func(f Facts) bool { return f.Unfinished && f.Shim == ShimAlive }, Evict},
		{func(f Facts) bool { return f.Unfinished }, Discard},
		{func(f Facts) bool { return f.Shim == ShimNone }, Discard},
		{func(f Facts) bool { return f.Shim == ShimDead }, Bury},
		{func(f Facts) bool { return f.Task == No && f.Sandbox != No }, Leave},
		{func(f Facts) bool { return f.Task == No }, Evict},
		{func(f Facts) bool { return f.Record == No && f.Sandbox == No }, Evict},
		{func(f Facts) bool { return true }, Adopt},
	}
}

// Decide returns the action for facts.
func Decide(f Facts) Action {
	for _, r := range rules() {
		if r.when(f) {
			return r.action
		}
	}
	return Adopt
}
