// Package overlay keeps every snapshot as the upper directory of an overlay
// over those of its ancestors: snapshots/<id>/fs, beside the work directory,
// as containerd's snapshotter "overlayfs" does (contract 3.2.1), on the same
// metastore, so that a root directory can change hands. A committed layer is
// on disk before its record says so. Where a feature is missing, the error is
// a host.Lacks.
package overlay
