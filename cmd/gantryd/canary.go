package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/gantryd/gantry/core/snapshot"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/daemon/lifecycle"
	"github.com/gantryd/gantry/internal/edge/debughttp"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/lib/mountx"
	"github.com/gantryd/gantry/internal/service/canary"
)

// canaryName is the snapshot that checks write to. It has no record: nobody is
// shown it.
const canaryName = "gantry-canary"

// checks are the parts that every container needs (promise P34).
func checks(probe func(context.Context) error, snapshotters map[string]snapshot.Store, manager *shimclient.Manager, tmp string) []canary.Check {
	all := []canary.Check{{Name: "store", Run: probe}, {Name: "shim", Run: func(ctx context.Context) error {
		_, err := manager.Info(ctx, defaultRuntime, typed.Any{})
		return err
	}}}
	for _, name := range slices.Sorted(maps.Keys(snapshotters)) { // /readyz lists them in one order
		s := snapshotters[name]
		all = append(all, canary.Check{Name: "snapshotter " + name, Run: func(ctx context.Context) error {
			// Collection takes snapshots without a record, this one now and then
			// while it is in use.
			if err := tryMount(ctx, s, tmp); err == nil || ctx.Err() != nil {
				return err
			}
			return tryMount(ctx, s, tmp)
		}})
	}
	return all
}

// tryMount writes into a snapshot of nothing where it is mounted. The snapshot
// stays for the next time.
func tryMount(ctx context.Context, s snapshot.Store, tmp string) error {
	mounts, err := s.Mounts(ctx, canaryName)
	if errdefs.IsNotFound(err) {
		mounts, err = s.Prepare(ctx, canaryName, "", nil)
	}
	if err != nil {
		return err
	}
	return mountx.WithTemp(ctx, tmp, mounts, func(root string) error {
		return os.WriteFile(filepath.Join(root, "canary"), []byte("alive"), 0o600)
	})
}

// buryCanaries removes the snapshots of tryMount.
func buryCanaries(ctx context.Context, snapshotters map[string]snapshot.Store) error {
	var errs []error
	for name, s := range snapshotters {
		err := s.Remove(ctx, canaryName)
		if errdefs.IsNotFound(err) {
			continue
		}
		if c, ok := s.(snapshot.Cleaner); ok && err == nil {
			err = c.Cleanup(ctx)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("remove what readiness wrote to snapshotter %s: %w", name, err))
		}
	}
	return errors.Join(errs...)
}

// debugHTTP serves readiness and metrics at an address, if there is one.
func debugHTTP(name, address string, listen func() (net.Listener, error), c *canary.Canary, metrics prometheus.Gatherer) lifecycle.Component {
	if address == "" {
		return lifecycle.Component{Name: name}
	}
	var l net.Listener
	srv := &http.Server{Handler: debughttp.Handler(c.Results, metrics), ReadHeaderTimeout: 5 * time.Second, WriteTimeout: 30 * time.Second, IdleTimeout: 2 * time.Minute}
	return lifecycle.Component{Name: name,
		Start: func(context.Context) (err error) {
			if l, err = listen(); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		},
		Run: func(ctx context.Context) error {
			return serveUntil(ctx, func() error {
				if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) {
					return err
				}
				return nil
			}, func() { _ = srv.Close() })
		}}
}
