package snapmeta

import (
	"fmt"

	"github.com/gantryd/gantry/core/snapshot"
)

// check compares the records with each other and with the index of children.
func (tx *Tx) check() (out []Problem) {
	report := func(object, format string, args ...any) {
		out = append(out, Problem{Object: object, What: fmt.Sprintf(format, args...)})
	}
	ids := map[uint64]string{}
	children := map[string]string{} // key of the index to the child's name
	err := tx.Walk(func(r Record) error {
		if other, ok := ids[r.ID]; ok {
			report(r.Name, "has the same id %d as %s", r.ID, other)
		}
		ids[r.ID] = r.Name
		if r.ID > tx.Sequence() {
			report(r.Name, "id %d was never given away, the last is %d", r.ID, tx.Sequence())
		}
		if r.Parent == "" {
			return nil
		}
		p, err := tx.Get(r.Parent)
		if err != nil {
			report(r.Name, "parent: %v", err)
			return nil
		}
		if p.Kind != snapshot.KindCommitted {
			report(r.Name, "parent %s is %s", p.Name, p.Kind)
		}
		children[string(childKey(p.ID, r.ID))] = r.Name
		return nil
	})
	if err != nil {
		report("metadata.db", "%v", err)
		return out
	}
	if tx.parents == nil {
		return out
	}
	err = tx.parents.ForEach(func(k, v []byte) error {
		if children[string(k)] != string(v) {
			report(string(v), "index of children names it at % x, its record does not", k)
		}
		delete(children, string(k))
		return nil
	})
	if err != nil {
		report("metadata.db", "%v", err)
	}
	for _, name := range children {
		report(name, "missing in the index of children")
	}
	return out
}
