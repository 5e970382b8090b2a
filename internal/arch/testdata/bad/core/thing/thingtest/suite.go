// Package thingtest is a conformance suite: it may use os.
package thingtest

import (
	_ "os"
	_ "testing"

	_ "github.com/gantryd/gantry/core/thing"
)
