// Package badinput sends the daemon what it must refuse: requests with fields
// missing, hostile registries, layers and records, and impossible tasks. Each
// is answered with a clear error, and leaves nothing behind.
package badinput
