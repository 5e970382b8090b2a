package blobdir

import (
	"context"
	"testing"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/content/contenttest"
	"github.com/gantryd/gantry/internal/lib/fsx"
)

// checked makes the test fail if the store is not clean at its end.
func checked(t testing.TB, s *Store) *Store {
	t.Helper()
	t.Cleanup(func() {
		problems, err := s.Check(context.WithoutCancel(t.Context()))
		if err != nil {
			t.Errorf("check: %v", err)
		}
		for _, p := range problems {
			t.Errorf("check: %s", p)
		}
	})
	return s
}

func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return checked(t, s)
}

// contract: 4.1.1, 4.1.2, 4.1.3, 4.1.4, 4.1.11, 1.2.8
func TestConformance(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		return open(t, t.TempDir(), Options{})
	}, contenttest.Options{NoLabels: true})
}

func TestConformanceNoSync(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		return open(t, t.TempDir(), Options{NoSync: true})
	}, contenttest.Options{NoLabels: true})
}

func TestConformanceInMemory(t *testing.T) {
	contenttest.Run(t, func(t *testing.T) content.Store {
		s, err := OpenFS(fsx.NewMem(), Options{})
		if err != nil {
			t.Fatal(err)
		}
		return checked(t, s)
	}, contenttest.Options{NoLabels: true})
}
