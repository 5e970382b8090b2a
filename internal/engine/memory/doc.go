// Package memory implements every noun of the core without a disk. Its stores
// pass the same conformance suites as the real ones, so tests that need a
// store take one of these; the event bus is the one that the daemon uses.
package memory
