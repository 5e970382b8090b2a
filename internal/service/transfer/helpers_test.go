package transfer_test

import (
	"context"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

type contextT = context.Context

var isUnauthenticated = errdefs.IsUnauthorized

func wantError(t *testing.T, err error, class func(error) bool, parts ...string) {
	t.Helper()
	if err == nil {
		t.Fatal("no error")
	}
	if !class(err) {
		t.Errorf("wrong class: %v", err)
	}
	for _, p := range parts {
		if !strings.Contains(err.Error(), p) {
			t.Errorf("error does not say %q: %v", p, err)
		}
	}
}
