package main

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	containersapi "github.com/containerd/containerd/api/services/containers/v1"
	contentapi "github.com/containerd/containerd/api/services/content/v1"
	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	eventsapi "github.com/containerd/containerd/api/services/events/v1"
	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	introspectionapi "github.com/containerd/containerd/api/services/introspection/v1"
	leasesapi "github.com/containerd/containerd/api/services/leases/v1"
	namespacesapi "github.com/containerd/containerd/api/services/namespaces/v1"
	sandboxapi "github.com/containerd/containerd/api/services/sandbox/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	streamingapi "github.com/containerd/containerd/api/services/streaming/v1"
	tasksapi "github.com/containerd/containerd/api/services/tasks/v1"
	transferapi "github.com/containerd/containerd/api/services/transfer/v1"
	versionapi "github.com/containerd/containerd/api/services/version/v1"
	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/gantryd/gantry/core/event"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/sandbox"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/daemon/config"
	"github.com/gantryd/gantry/internal/daemon/lifecycle"
	"github.com/gantryd/gantry/internal/edge/shimclient"
	"github.com/gantryd/gantry/internal/edge/wire"
	"github.com/gantryd/gantry/internal/edge/wire/containerrpc"
	"github.com/gantryd/gantry/internal/edge/wire/contentrpc"
	"github.com/gantryd/gantry/internal/edge/wire/diffrpc"
	"github.com/gantryd/gantry/internal/edge/wire/eventrpc"
	"github.com/gantryd/gantry/internal/edge/wire/eventttrpc"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
	"github.com/gantryd/gantry/internal/edge/wire/introspectionrpc"
	"github.com/gantryd/gantry/internal/edge/wire/leaserpc"
	"github.com/gantryd/gantry/internal/edge/wire/namespacerpc"
	"github.com/gantryd/gantry/internal/edge/wire/sandboxrpc"
	"github.com/gantryd/gantry/internal/edge/wire/snapshotrpc"
	"github.com/gantryd/gantry/internal/edge/wire/streamrpc"
	"github.com/gantryd/gantry/internal/edge/wire/taskrpc"
	"github.com/gantryd/gantry/internal/edge/wire/transferrpc"
	"github.com/gantryd/gantry/internal/edge/wire/versionrpc"
	"github.com/gantryd/gantry/internal/lib/plugin"
)

// api is what the servers serve.
type api struct {
	views      view.Source
	namespaces namespace.Store
	bus        event.Bus
	streams    streamrpc.Managers
	manager    *shimclient.Manager
	host       *plugin.Host
	uuid       string
	// controllers run sandboxes, by the names of sandboxers.
	controllers sandbox.Controllers
	kube        *cri // nil if Kubernetes' part is disabled
	log         *slog.Logger
}

// register adds all of containerd's services to a server.
func (a *api) register(s *grpc.Server) {
	containersapi.RegisterContainersServer(s, containerrpc.NewServer(a.views))
	contentapi.RegisterContentServer(s, contentrpc.NewServer(a.views))
	diffapi.RegisterDiffServer(s, diffrpc.NewServer(a.views))
	eventsapi.RegisterEventsServer(s, eventrpc.NewServer(a.bus, a.manager))
	imagesapi.RegisterImagesServer(s, imagerpc.NewServer(a.views))
	introspectionapi.RegisterIntrospectionServer(s, introspectionrpc.NewServer(a.introspection()))
	leasesapi.RegisterLeasesServer(s, leaserpc.NewServer(a.views))
	namespacesapi.RegisterNamespacesServer(s, namespacerpc.NewServer(a.namespaces))
	sandboxapi.RegisterStoreServer(s, sandboxrpc.NewServer(a.views))
	sandboxapi.RegisterControllerServer(s, sandboxrpc.NewControllerServer(a.views, a.controllers))
	snapshotsapi.RegisterSnapshotsServer(s, snapshotrpc.NewServer(a.views))
	streamingapi.RegisterStreamingServer(s, streamrpc.NewServer(a.streams))
	tasksapi.RegisterTasksServer(s, taskrpc.NewServer(a.views))
	transferapi.RegisterTransferServer(s, transferrpc.NewServer(a.views, a.streams))
	versionapi.RegisterVersionServer(s, versionrpc.NewServer(version, revision))
	healthpb.RegisterHealthServer(s, health.NewServer())
}

// introspection shows the host's table, who the daemon is, and its shims.
func (a *api) introspection() introspectionrpc.Source {
	return introspectionrpc.Source{
		Plugins: func() []introspectionrpc.Plugin {
			rows := a.host.Plugins()
			out := make([]introspectionrpc.Plugin, len(rows))
			for i, r := range rows {
				out[i] = introspectionrpc.Plugin{Type: r.Type, ID: r.ID, Requires: r.Requires, Exports: r.Exports, Capabilities: r.Capabilities}
				for _, p := range r.Platforms {
					out[i].Platforms = append(out[i].Platforms, ocispec.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion})
				}
				if r.Err != nil {
					out[i].InitErr = r.Err.Error()
				}
			}
			return out
		},
		Info: func() introspectionrpc.ServerInfo {
			info := introspectionrpc.ServerInfo{UUID: a.uuid, Pid: uint64(os.Getpid())}
			if link, err := os.Readlink("/proc/self/ns/pid"); err == nil {
				fmt.Sscanf(link, "pid:[%d]", &info.PidNS)
			}
			return info
		},
		Runtime: func(ctx context.Context, path string, options typed.Any) (introspectionrpc.RuntimeInfo, error) {
			path = cmp.Or(path, defaultRuntime)
			i, err := a.manager.Info(ctx, path, options)
			return introspectionrpc.RuntimeInfo{Name: i.Name, Version: i.Version, Revision: i.Revision, Options: i.Options, Features: i.Features, Annotations: i.Annotations}, err
		},
	}
}

// defaultRuntime is the runtime whose shim is installed with the daemon.
const defaultRuntime = "io.containerd.runc.v2"

// stopTimeout is how long requests under way may take when the daemon stops.
const stopTimeout = 5 * time.Second

// grpc serves all services on a Unix socket (contract 1.1.1).
func (a *api) grpc(c config.ServerGRPC) lifecycle.Component {
	return a.serveGRPC("gRPC server", c.Address != "", a.kube, wire.ServerOptions(a.log, c.MaxRecvMsgSize, c.MaxSendMsgSize, nil),
		func() (net.Listener, error) { return listenUnix(c.Address, c.UID, c.GID) })
}

// tcp serves all services over TCP, with TLS if there is a certificate
// (contract 1.1.3).
func (a *api) tcp(c config.ServerTCP) lifecycle.Component {
	const name = "gRPC TCP server"
	opts := wire.ServerOptions(a.log, c.MaxRecvMsgSize, c.MaxSendMsgSize, nil)
	conf, err := tlsConfig(c)
	if err != nil {
		return lifecycle.Component{Name: name, Start: func(context.Context) error { return err }}
	}
	if conf != nil {
		opts = append(opts, grpc.Creds(credentials.NewTLS(conf)))
	}
	kube := a.kube
	if kube != nil && !kube.tcp {
		kube = nil // contract 7.4.1
	}
	return a.serveGRPC(name, c.Address != "", kube, opts, func() (net.Listener, error) { return net.Listen("tcp", c.Address) })
}

func tlsConfig(c config.ServerTCP) (*tls.Config, error) {
	if c.TLSCert == "" && c.TLSKey == "" {
		if c.TLSCA != "" {
			return nil, fmt.Errorf("tls_ca needs tls_cert and tls_key: %w", errdefs.ErrInvalidArgument)
		}
		return nil, nil
	}
	cert, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
	if err != nil {
		return nil, fmt.Errorf("load the certificate: %w", err)
	}
	conf := &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
	if c.TLSCA != "" {
		pem, err := os.ReadFile(c.TLSCA)
		if err != nil {
			return nil, fmt.Errorf("load tls_ca: %w", err)
		}
		conf.ClientCAs = x509.NewCertPool()
		if !conf.ClientCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("load tls_ca: %s has no certificate: %w", c.TLSCA, errdefs.ErrInvalidArgument)
		}
		conf.ClientAuth = tls.RequireAndVerifyClientCert
	}
	return conf, nil
}

func (a *api) serveGRPC(name string, enabled bool, kube *cri, opts []grpc.ServerOption, listen func() (net.Listener, error)) lifecycle.Component {
	if !enabled {
		return lifecycle.Component{Name: name}
	}
	var l net.Listener
	srv := grpc.NewServer(opts...)
	a.register(srv)
	if kube != nil {
		kube.server.Register(srv)
	}
	return lifecycle.Component{
		Name: name,
		Start: func(context.Context) (err error) {
			l, err = listen()
			if err == nil {
				a.log.Info("serving...", "address", l.Addr().String())
			}
			return err
		},
		Run: func(ctx context.Context) error {
			return serveUntil(ctx, func() error { return srv.Serve(l) }, func() {
				// Streams such as Subscribe have no end of their own: what is not
				// done soon is cut off.
				timer := time.AfterFunc(stopTimeout, srv.Stop)
				defer timer.Stop()
				srv.GracefulStop()
			})
		},
		Timeout: stopTimeout + 5*time.Second,
	}
}

// ttrpc takes events from shims (contract 1.1.2).
func (a *api) ttrpc(c config.ServerSocket) lifecycle.Component {
	if c.Address == "" {
		return lifecycle.Component{Name: "ttrpc server"}
	}
	var l net.Listener
	var srv *ttrpc.Server
	return lifecycle.Component{
		Name: "ttrpc server",
		Start: func(context.Context) (err error) {
			if srv, err = eventttrpc.NewServer(a.manager, a.log); err != nil {
				return err
			}
			if l, err = listenUnix(c.Address, c.UID, c.GID); err == nil {
				a.log.Info("serving...", "address", l.Addr().String())
			}
			return err
		},
		Run: func(ctx context.Context) error {
			return serveUntil(ctx, func() error { return srv.Serve(ctx, l) }, func() {
				wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
				defer cancel()
				if srv.Shutdown(wait) != nil {
					srv.Close()
				}
			})
		},
		Timeout: stopTimeout + 5*time.Second,
	}
}

// serveUntil runs serve, and stop when ctx is done. The error that serve
// returns because of stop is none.
func serveUntil(ctx context.Context, serve func() error, stop func()) error {
	var wg sync.WaitGroup
	done := make(chan struct{})
	wg.Go(func() {
		select {
		case <-ctx.Done():
			stop()
		case <-done:
		}
	})
	err := serve()
	close(done)
	wg.Wait()
	if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// listenUnix binds a socket with mode 0660 and an owner. One that a dead daemon
// left is removed; one that somebody listens on is not.
func listenUnix(path string, uid, gid int) (net.Listener, error) {
	path = strings.TrimPrefix(path, "unix://")
	if len(path) > 104 {
		return nil, fmt.Errorf("listen on %s: the path is longer than a socket's can be: %w", path, errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if info, err := os.Lstat(path); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, fmt.Errorf("listen on %s: it exists and is not a socket: %w", path, errdefs.ErrAlreadyExists)
		}
		if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
			c.Close()
			return nil, fmt.Errorf("listen on %s: another process serves it: %w", path, errdefs.ErrAlreadyExists)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("listen on %s: remove the stale socket: %w", path, err)
		}
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	if err := errors.Join(os.Chmod(path, 0o660), os.Chown(path, uid, gid)); err != nil {
		l.Close()
		return nil, fmt.Errorf("listen on %s: %w", path, err)
	}
	return l, nil
}

// newUUID is a random UUID (RFC 9562, version 4).
func newUUID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", err
	}
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:]), nil
}
