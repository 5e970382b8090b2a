package criimage

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	goruntime "runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	core "github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	edge "github.com/gantryd/gantry/internal/edge/registry"
	"github.com/gantryd/gantry/internal/edge/registry/registrytest"
)

// Every form of AuthConfig, and which host gets to see it.
//
// contract: 7.2.1
// promise: P14
func TestCredentials(t *testing.T) {
	user := registry.Credential{Username: "u", Secret: "p:q"}
	both := base64.StdEncoding.EncodeToString([]byte("u:p:q"))
	for _, c := range []struct {
		ref  string
		auth *runtime.AuthConfig
		host string // that is contacted
		want registry.Credential
	}{
		{"reg.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "reg.io", user},
		{"reg.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "reg.io:443", user},
		{"reg.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "reg.io:5000", registry.Credential{}},
		{"reg.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "mirror.io", registry.Credential{}},
		{"reg.io/a", &runtime.AuthConfig{Auth: both}, "reg.io", user},
		{"reg.io/a", &runtime.AuthConfig{Auth: base64.StdEncoding.EncodeToString([]byte("u:p:q\x00\x00"))}, "reg.io", user},
		{"reg.io/a", &runtime.AuthConfig{IdentityToken: "i"}, "reg.io", registry.Credential{Secret: "i", Refresh: true}},
		{"reg.io/a", &runtime.AuthConfig{RegistryToken: "r"}, "reg.io", registry.Credential{Header: "Bearer r"}},
		{"reg.io/a", &runtime.AuthConfig{Auth: both, ServerAddress: "https://other.io/v1/"}, "reg.io", registry.Credential{}},
		{"reg.io/a", &runtime.AuthConfig{Auth: both, ServerAddress: "mirror.io:5000"}, "mirror.io:5000", user},
		{"reg.io/a", &runtime.AuthConfig{Auth: both, ServerAddress: "http://REG.io:5000/v2/"}, "reg.io:5000", user},
		{"reg.io/a", &runtime.AuthConfig{Auth: both, ServerAddress: "[::1]:443"}, "[::1]", user},
		{"reg.io/a", &runtime.AuthConfig{Auth: both, ServerAddress: "reg.io.evil.io"}, "reg.io", registry.Credential{}},
		{"busybox", &runtime.AuthConfig{Auth: both}, "registry-1.docker.io", user},
		{"busybox", &runtime.AuthConfig{Auth: both, ServerAddress: "https://index.docker.io/v1/"}, "registry-1.docker.io", user},
		{"busybox", &runtime.AuthConfig{}, "registry-1.docker.io", registry.Credential{}},
		{"busybox", nil, "registry-1.docker.io", registry.Credential{}},
		// Those of the configuration come second, and are for their own host as well.
		{"conf.io/a", nil, "conf.io", registry.Credential{Username: "c", Secret: "s"}},
		{"conf.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "conf.io", user},
		{"reg.io/a", &runtime.AuthConfig{Username: "u", Password: "p:q"}, "conf.io", registry.Credential{Username: "c", Secret: "s"}},
		{"reg.io/a", nil, "old.io", user},
	} {
		s := &Service{}
		var err error
		if s.auths, err = configured(cristate.RegistryConfig{Configs: map[string]cristate.RegistryHost{"conf.io": {Auth: &cristate.RegistryAuth{Username: "c", Password: "s"}}},
			Auths: map[string]cristate.RegistryAuth{"https://old.io/v1": {Auth: both}}}); err != nil {
			t.Fatal(err)
		}
		named, err := reference.ParseDockerRef(c.ref)
		if err != nil {
			t.Fatal(err)
		}
		ask, err := s.credentials(named, c.auth)
		if err != nil {
			t.Errorf("%s %v: %v", c.ref, c.auth, err)
			continue
		}
		got, err := ask(t.Context(), registry.AuthRequest{Host: c.host})
		if err != nil || got != c.want {
			t.Errorf("%s with %v at %s: %+v, %v", c.ref, c.auth, c.host, got, err)
		}
	}
	h := newHouse(t)
	s := h.open()
	for _, a := range []*runtime.AuthConfig{{Auth: "secret!"}, {Auth: base64.StdEncoding.EncodeToString([]byte("secret"))}, {RegistryToken: "secret\r\nHost: x"},
		{Username: "u", ServerAddress: "://"}, {Username: "u", ServerAddress: "https://x:secret@reg.io"}} {
		_, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: "localhost:1/x"}, Auth: a})
		if !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v", err)
		}
	}
}

// Debian's registry with a password, as the kubelet sends it; without or with a
// wrong one, nothing is made.
//
// contract: 7.2.1
func TestPrivateRegistry(t *testing.T) {
	host := registrytest.Debian(t, true)
	h := newHouse(t)
	s := h.open()
	src := registrytest.New(t)
	img := registrytest.Build(arch, 30_000, registrytest.Gzip)
	src.AddImage("app", "1", img)
	seed := src.Host() + "/app:1"
	h.foreign(seed)
	ref := host + "/team/app:1"
	err := h.view.Transfer().Transfer(t.Context(), core.ImageStore{Name: seed}, core.Registry{Reference: ref, Options: registry.Options{
		Credentials: func(context.Context, registry.AuthRequest) (registry.Credential, error) {
			return registry.Credential{Username: registrytest.User, Secret: registrytest.Password}, nil
		}}}, core.Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []*runtime.AuthConfig{nil, {Username: registrytest.User, Password: "wrong"}, {Username: registrytest.User, Password: registrytest.Password, ServerAddress: "other.io"}} {
		_, err := s.PullImage(t.Context(), &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: ref}, Auth: a})
		if !errdefs.IsUnauthorized(err) || strings.Contains(err.Error(), registrytest.Password) {
			t.Errorf("%v: %v", a, err)
		}
	}
	if _, ok := h.records()[ref]; ok {
		t.Error("there is a record")
	}
	good := base64.StdEncoding.EncodeToString([]byte(registrytest.User + ":" + registrytest.Password))
	if id := pullOf(t, s, ref, &runtime.AuthConfig{Auth: good, ServerAddress: "http://" + host}); id != img.Config.Digest.String() {
		t.Errorf("id %s", id)
	}
}

// wants makes a registry ask for a password, and tells what it was shown.
func wants(r *registrytest.Registry, user, password string) {
	r.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if u, p, ok := q.BasicAuth(); ok && u == user && p == password {
			return false
		}
		w.Header().Set("WWW-Authenticate", `Basic realm="x"`)
		registrytest.Fail(w, http.StatusUnauthorized, "UNAUTHORIZED", "authentication required")
		return true
	}
}

func shown(r *registrytest.Registry) []string {
	var s []string
	for _, q := range r.Requests() {
		if a := q.Header.Get("Authorization"); a != "" && !slices.Contains(s, a) {
			s = append(s, a)
		}
	}
	return s
}

func basic(user, password string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(user+":"+password))
}

// The deprecated tables: the mirror is asked first, with its own password, and
// neither sees the other's; headers are for the registry alone.
//
// contract: 7.2.1
// promise: P14
func TestMirror(t *testing.T) {
	h := newHouse(t)
	reg, mirror, dead := registrytest.New(t), registrytest.New(t), registrytest.New(t)
	img := registrytest.Build(arch, 30_000, registrytest.Gzip)
	reg.AddImage("app", "1", img)
	mirror.AddImage("app", "1", img)
	reg.AddImage("app", "2", registrytest.Build(arch, 20_000, registrytest.Gzip))
	wants(reg, "r", "registry's")
	wants(mirror, "m", "mirror's")
	h.deps.Config.Registry = cristate.RegistryConfig{
		Mirrors: map[string]cristate.RegistryMirror{"*": {Endpoints: []string{dead.URL}}, reg.Host(): {Endpoints: []string{mirror.URL, "http://" + reg.Host()}}},
		Configs: map[string]cristate.RegistryHost{mirror.Host(): {Auth: &cristate.RegistryAuth{Username: "m", Password: "mirror's"}}},
		Headers: map[string][]string{"X-Meta": {"v"}},
	}
	s := h.open()
	auth := &runtime.AuthConfig{Username: "r", Password: "registry's"}
	pullOf(t, s, reg.Host()+"/app:1", auth)
	if n := len(reg.Requests()); n != 0 {
		t.Errorf("the registry was asked %d times though the mirror has it", n)
	}
	pullOf(t, s, reg.Host()+"/app:2", auth)
	if got := shown(mirror); !slices.Equal(got, []string{basic("m", "mirror's")}) {
		t.Errorf("the mirror was shown %q", got)
	}
	if got := shown(reg); !slices.Equal(got, []string{basic("r", "registry's")}) {
		t.Errorf("the registry was shown %q", got)
	}
	for _, q := range mirror.Requests() {
		if q.Header.Get("X-Meta") != "" {
			t.Error("the mirror was shown the registry's header")
		}
	}
	if q := reg.Requests(); q[0].Header.Get("X-Meta") != "v" || len(dead.Requests()) != 0 {
		t.Errorf("%+v, %d", q[0], len(dead.Requests()))
	}
}

// What becomes of the tables.
//
// contract: 7.2.1
func TestHostsFiles(t *testing.T) {
	var c cristate.RegistryConfig
	for _, path := range []string{"", "/x:/y"} {
		c.ConfigPath = path
		dir, err := writeHosts(c, "/nowhere")
		if want := map[bool]string{true: edge.ConfigPath, false: path}[path == ""]; err != nil || dir != want {
			t.Errorf("%q, %v", dir, err)
		}
	}
	certs := cristate.RegistryHost{}
	certs.TLS = &struct {
		InsecureSkipVerify bool   `toml:"insecure_skip_verify"`
		CAFile             string `toml:"ca_file"`
		CertFile           string `toml:"cert_file"`
		KeyFile            string `toml:"key_file"`
	}{true, "/ca.pem", "/c.pem", "/k.pem"}
	c = cristate.RegistryConfig{Mirrors: map[string]cristate.RegistryMirror{
		"docker.io":      {Endpoints: []string{"https://b.io", "https://a.io/proxy", "https://b.io", "http://c.io:80/v2"}},
		"localhost:5000": {Endpoints: []string{"http://localhost:5000", "https://a.io"}},
		"*":              {Endpoints: []string{"https://any.io"}},
	}, Configs: map[string]cristate.RegistryHost{"a.io": certs, "tls.io": certs}}
	dir := filepath.Join(t.TempDir(), "hosts")
	for range 2 {
		if _, err := writeHosts(c, dir); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string][]string{
		"docker.io":      {"https://b.io/v2", "https://a.io/proxy insecure", "http://c.io:80/v2", "https://registry-1.docker.io/v2"},
		"localhost:5000": {"https://a.io/v2 insecure", "http://localhost:5000/v2"},
		"tls.io":         {"https://any.io/v2", "https://tls.io/v2 insecure"},
		"else.io":        {"https://any.io/v2", "https://else.io/v2"},
	} {
		hosts, warnings, err := edge.LookupHosts(dir, name, "")
		if err != nil || len(warnings) != 0 {
			t.Errorf("%s: %v, %v", name, warnings, err)
		}
		var got []string
		for _, x := range hosts {
			u := x.URL()
			if x.SkipVerify && len(x.CA) == 1 && x.CA[0] == "/ca.pem" && len(x.Client) == 1 && x.Client[0] == [2]string{"/c.pem", "/k.pem"} {
				u += " insecure"
			}
			got = append(got, u)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", name, got, want)
		}
	}
	if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", st, err)
	}
	c.ConfigPath = "/x"
	if _, err := writeHosts(c, dir); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
	for _, bad := range []cristate.RegistryConfig{
		{Mirrors: map[string]cristate.RegistryMirror{"../x": {}}}, {Mirrors: map[string]cristate.RegistryMirror{"": {}}},
		{Mirrors: map[string]cristate.RegistryMirror{"x": {Endpoints: []string{"ftp://x"}}}}, {Mirrors: map[string]cristate.RegistryMirror{"x": {Endpoints: []string{"https://u:secret@x"}}}},
	} {
		if _, err := writeHosts(bad, dir); !errdefs.IsInvalidArgument(err) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// stall makes a registry answer a layer's request with half of it, and no more.
func stall(t *testing.T, reg *registrytest.Registry, layer ocispec.Descriptor, healthy *atomic.Bool) (reached chan struct{}) {
	reached = make(chan struct{}, 16)
	over := make(chan struct{})
	t.Cleanup(func() { close(over) })
	reg.Hook = func(w http.ResponseWriter, q *http.Request) bool {
		if healthy.Load() || !strings.Contains(q.URL.Path, layer.Digest.String()) {
			return false
		}
		w.Header().Set("Content-Length", strconv.FormatInt(layer.Size, 10))
		_, _ = w.Write(make([]byte, 1000))
		w.(http.Flusher).Flush()
		reached <- struct{}{}
		select {
		case <-over:
		case <-q.Context().Done():
		}
		return true
	}
	return reached
}

// A registry that goes silent ends the pull after image_pull_progress_timeout,
// a client that goes away at once; either way nothing is left.
//
// contract: 7.2.1
func TestStalled(t *testing.T) {
	for _, cancelled := range []bool{false, true} {
		h := newHouse(t)
		h.deps.Config.ImagePullProgressTimeout = 300 * time.Millisecond
		if cancelled {
			h.deps.Config.ImagePullProgressTimeout = 0 // no limit
		}
		s := h.open()
		reg := registrytest.New(t)
		img := registrytest.Build(arch, 1_000_000, registrytest.Gzip)
		reg.AddImage("app", "1", img)
		layer := img.Layers[0].Digest.String()
		var healthy atomic.Bool
		reached := stall(t, reg, img.Layers[0], &healthy)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		if cancelled {
			go func() { <-reached; cancel() }()
		}
		began := time.Now()
		_, err := s.PullImage(ctx, &runtime.PullImageRequest{Image: &runtime.ImageSpec{Image: reg.Host() + "/app:1"}})
		if time.Since(began) > 10*time.Second {
			t.Errorf("it took %s", time.Since(began))
		}
		if cancelled {
			if !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		} else if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "image_pull_progress_timeout") || !strings.Contains(err.Error(), layer) || !strings.Contains(err.Error(), reg.Host()+"/app:1") {
			t.Errorf("%v", err)
		}
		if got := h.records(); len(got) != 0 {
			t.Errorf("records %v", got)
		}
		if l, err := h.view.Leases().List(t.Context()); err != nil || len(l) != 0 {
			t.Errorf("leases %v, %v", l, err)
		}
		// The next attempt succeeds.
		healthy.Store(true)
		pullOf(t, s, reg.Host()+"/app:1", nil)
	}
}

// While nothing is being received, nothing is missing: not while layers are
// unpacked, not while another pull has the turn, not while what has come is
// made durable.
//
// contract: 7.2.1
func TestWatch(t *testing.T) {
	for _, c := range []struct {
		name     string
		events   []string
		complete bool
		ends     bool
	}{
		{"resolve", nil, false, true},
		{"download", []string{"Pulling from x", "waiting", "downloading"}, false, true},
		{"durable", []string{"Pulling from x", "waiting", "downloading"}, true, false},
		{"turn", []string{"Pulling from x", "waiting"}, false, false},
		{"unpack", []string{"Pulling from x", "downloading", "complete", "extracting"}, false, false},
	} {
		ended := make(chan error, 1)
		w := &watch{limit: time.Hour, busy: map[string]string{resolving: ""}, complete: func(string) bool { return c.complete }, cancel: func(err error) { ended <- err }}
		w.arm()
		for _, e := range c.events {
			w.progress(core.Progress{Event: e, Name: "layer-x"})
		}
		w.expire()
		if (len(ended) == 1) != c.ends {
			t.Errorf("%s: ended %v", c.name, !c.ends)
		}
		w.stop()
	}
}

// Small indexes that name each other many times are more paths than anybody
// can walk.
//
// promise: P36, C4
func TestIndexBomb(t *testing.T) {
	s := newHouse(t).open()
	reg := registrytest.New(t)
	img := registrytest.Build(goruntime.GOARCH, 1000, registrytest.Gzip)
	d := reg.AddImage("app", "plain", img)
	for range manifest.MaxDepth {
		b, err := json.Marshal(ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: slices.Repeat([]ocispec.Descriptor{d}, 200)})
		if err != nil {
			t.Fatal(err)
		}
		d = reg.AddManifest("app", "bomb", ocispec.MediaTypeImageIndex, b)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if id, err := s.Pull(ctx, reg.Host()+"/app:bomb", "", nil); err != nil || id != img.Config.Digest.String() {
		t.Errorf("%s, %v", id, err)
	}
}
