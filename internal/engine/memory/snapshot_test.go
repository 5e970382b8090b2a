package memory

import (
	"testing"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/snapshot/snapshottest"
)

// contract: 3.1.1, 3.1.5, 1.2.6, 1.2.8, 13.10
func TestSnapshots(t *testing.T) {
	snapshottest.Run(t, func(*testing.T) snapshot.Store { return NewSnapshots() }, snapshottest.Options{Rebase: true})
}
