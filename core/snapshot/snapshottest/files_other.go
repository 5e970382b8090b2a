//go:build !linux

package snapshottest

import "testing"

// Files are looked at on Linux only.
func skip(t *testing.T, _ env) { t.Skip("mounts are tested on Linux only") }

var testFiles, testReadOnly, testSiblings, testWhiteouts, testOpaque, testKinds, testRootDir, testChain, testSizes, testRebaseFiles = skip, skip, skip, skip, skip, skip, skip, skip, skip, skip
