package memory

import (
	"testing"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/content/contenttest"
)

// contract: 1.2.8, 4.1.11
func TestContent(t *testing.T) {
	contenttest.Run(t, func(*testing.T) content.Store { return NewContent() }, contenttest.Options{})
}
