package config

import (
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/internal/lib/typo"
)

// Kind says what sort of a finding a Warning is.
type Kind string

// The kinds. The first four are errors in strict mode, the others never are.
const (
	Unknown     Kind = "unknown"     // no one reads this key
	Ineffective Kind = "ineffective" // known, accepted, but it changes nothing
	WrongType   Kind = "wrong-type"  // a value of another type; the default stays
	Invalid     Kind = "invalid"     // right type, impossible value; the default stays
	Deprecated  Kind = "deprecated"  // works, but has a successor
	Migrated    Kind = "migrated"    // an older version, or a key that moved
	Import      Kind = "import"      // a drop-in that cannot be read
	NoEffect    Kind = "no-effect"   // what it asks for happens without it, or is decided elsewhere
)

// Warning is one finding about a configuration: where, which key, what.
type Warning struct {
	Pos  Pos
	Key  string // full TOML path
	Kind Kind
	Msg  string // what is wrong and what to do, without the position
	// ID is the deprecation's id (contract 2.4.1) and else "".
	ID string
}

// String is one line: file:line:col: message.
func (w Warning) String() string { return w.Pos.String() + ": " + w.Msg }

// Fatal tells whether strict mode makes an error of it.
func (w Warning) Fatal() bool {
	switch w.Kind {
	case Unknown, Ineffective, WrongType, Invalid:
		return true
	}
	return false
}

// strictError makes one error of the fatal warnings, nil if there are none.
// errdefs: InvalidArgument.
func strictError(ws []Warning) error {
	var errs []error
	for _, w := range ws {
		if w.Fatal() {
			errs = append(errs, errors.New(w.String()))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("strict configuration: %w: %w", errdefs.ErrInvalidArgument, errors.Join(errs...))
}

// nearest finds a known key that was probably meant, "" if none is close.
func nearest(key string, known []string) string {
	best, most := "", 2
	for _, k := range known {
		if k == "*" || len(key) > 256 {
			continue
		}
		if d := typo.Distance(strings.ToLower(key), strings.ToLower(k), most); d <= most && d < len(k) {
			best, most = k, d-1
		}
	}
	return best
}
