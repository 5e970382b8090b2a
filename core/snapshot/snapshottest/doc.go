// Package snapshottest is the conformance suite of snapshot.Store: what its
// comments say, and no more, is asked of every implementation.
package snapshottest
