// Package registry speaks the OCI distribution protocol to registries and
// their mirrors. It promises that nothing hangs (every request has a deadline
// for connecting, for the answer's header and for progress of its body), that
// a credential reaches only the host it was issued for, and that an error
// names every host that was tried, the one that got furthest first.
//
// What is read is not verified here, except manifests that are resolved by
// reading them: whoever writes bytes down compares them with their digest.
package registry
