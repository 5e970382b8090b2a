// Package ident holds the grammar that namespaces, container ids, exec ids
// and sandbox ids share (contract 1.2.2), and the limits on labels (1.2.5).
package ident

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// MaxLength is the most bytes an identifier may have.
const MaxLength = 76

// MaxLabel is the most bytes that a label's key and value may have together.
const MaxLabel = 4096

// Check returns ErrInvalidArgument, naming what is wrong, unless id is made of
// ASCII alphanumeric words joined by single '.', '_' or '-'. kind says what is
// being named ("namespace", "container id") and stands in the message.
func Check(kind, id string) error {
	if id == "" {
		return fmt.Errorf("%s must not be empty: %w", kind, errdefs.ErrInvalidArgument)
	}
	if len(id) > MaxLength {
		return fmt.Errorf("%s %q... has %d characters, at most %d are allowed: %w", kind, id[:16], len(id), MaxLength, errdefs.ErrInvalidArgument)
	}
	word := false
	for i := 0; i < len(id); i++ {
		switch c := id[i]; {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9':
			word = true
		case (c == '.' || c == '_' || c == '-') && word && i < len(id)-1:
			word = false
		default:
			return fmt.Errorf("%s %q: character %d must be a letter or a digit, or one of '.', '_', '-' between two of them: %w", kind, id, i+1, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// CheckLabels returns ErrInvalidArgument if a label's key is empty, or key and
// value are together longer than MaxLabel.
func CheckLabels(labels map[string]string) error {
	for k, v := range labels {
		if k == "" {
			return fmt.Errorf("label key must not be empty: %w", errdefs.ErrInvalidArgument)
		}
		if len(k)+len(v) > MaxLabel {
			if len(k) > 64 {
				k = k[:64] + "..."
			}
			return fmt.Errorf("label %q: key and value are longer than %d bytes: %w", k, MaxLabel, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
