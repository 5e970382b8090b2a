package criimage

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/manifest"
	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/core/transfer"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
	"github.com/gantryd/gantry/internal/edge/metrics"
)

// PullImage implements runtime.ImageServiceServer (contract 7.2.1).
func (s *Service) PullImage(ctx context.Context, r *runtime.PullImageRequest) (*runtime.PullImageResponse, error) {
	handler := r.GetImage().GetRuntimeHandler()
	if handler == "" {
		handler = r.GetImage().GetAnnotations()[cristate.AnnotationRuntimeHandler]
	}
	id, err := s.Pull(ctx, r.GetImage().GetImage(), handler, r.GetAuth())
	if err != nil {
		return nil, err
	}
	return &runtime.PullImageResponse{ImageRef: id}, nil
}

// Pull brings an image from its registry, unpacks it for a runtime handler and
// names it. It returns the image's id. It ends with ctx, or when nothing has
// been received for image_pull_progress_timeout. Errors: ErrInvalidArgument
// for a bad reference, handler or credential; those of transfer.Service.
func (s *Service) Pull(ctx context.Context, name, handler string, auth *runtime.AuthConfig) (id string, err error) {
	s.counts.running.Inc()
	began := time.Now()
	var size int64
	defer func() { s.counts.done(err, size, time.Since(began)) }()

	named, err := reference.ParseDockerRef(name)
	if err != nil {
		return "", fmt.Errorf("pull %.256q: %v: %w", name, err, errdefs.ErrInvalidArgument)
	}
	t, err := s.target(handler)
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", named, err)
	}
	creds, err := s.credentials(named, auth)
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", named, err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := &watch{limit: s.d.Config.ImagePullProgressTimeout, busy: map[string]string{resolving: ""}, cancel: cancel, complete: func(ingest string) bool {
		st, err := s.view.Content().Status(ctx, ingest)
		return err == nil && st.Total > 0 && st.Offset >= st.Total
	}}
	w.arm()
	defer w.stop()
	labels := s.labels(image.Image{Name: named.String()})
	src := transfer.Registry{Reference: named.String(), Options: registry.Options{Headers: s.d.Config.Registry.Headers, HostDir: s.hostDir, Credentials: creds}}
	dst := transfer.ImageStore{Name: named.String(), Labels: labels, Platforms: []ocispec.Platform{t.platform}, Describe: !s.d.Config.DisableSnapshotAnnotations,
		References: []transfer.Reference{{Name: reference.TrimNamed(named).String(), AddDigest: true}},
		Unpacks:    []transfer.Unpack{{Platform: &t.platform, Snapshotter: t.snapshotter}}}
	if err := s.view.Transfer().Transfer(ctx, src, dst, transfer.Options{Progress: w.progress}); err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) && errors.Is(cause, errStalled) {
			err = fmt.Errorf("%w: %v", cause, err)
		}
		return "", err // it says "pull" and the reference
	}
	w.stop()
	// The image is here. What is missing takes no time, and a caller that goes
	// away now shall not leave it half named.
	rest, done := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer done()
	f, err := s.inspect(rest, w.saved, "", []target{t})
	if err != nil {
		return "", fmt.Errorf("pull %s: %w", named, err)
	}
	if s.d.Config.DiscardUnpackedLayers {
		if err := s.discard(rest, f.manifest); err != nil {
			return "", fmt.Errorf("pull %s: %w", named, err)
		}
	}
	id, size = f.config.Digest.String(), f.size
	if err := s.record(rest, id, labels, w.saved); err != nil {
		return "", fmt.Errorf("pull %s: %w", named, err)
	}
	for _, n := range []string{named.String(), reference.TrimNamed(named).String() + "@" + w.saved.Digest.String()} {
		if _, err := s.refresh(rest, n); err != nil {
			return "", fmt.Errorf("pull %s: %w", named, err)
		}
	}
	return id, nil
}

// discard lets go of the layers of an image that is unpacked.
func (s *Service) discard(ctx context.Context, desc ocispec.Descriptor) error {
	info, err := s.view.Content().Info(ctx, desc.Digest)
	if err != nil {
		return err
	}
	labels := map[string]string{}
	for k := range info.Labels {
		if strings.HasPrefix(k, manifest.LabelRef+".l.") {
			labels[k] = ""
		}
	}
	if len(labels) == 0 {
		return nil
	}
	_, err = s.view.Content().Update(ctx, content.Info{Digest: desc.Digest, Labels: labels}, fieldsOf(labels)...)
	return err
}

// errStalled is the class of a pull that the watchdog ended.
var errStalled = fmt.Errorf("no progress: %w", context.DeadlineExceeded)

// resolving is what is busy until the registry has answered.
const resolving = "resolving the reference"

// watch cancels a pull that waits for bytes and has got none for limit. While
// nothing is being received (another pull has the turn, layers are being
// unpacked), nothing is missing.
type watch struct {
	limit    time.Duration // none if not positive
	cancel   context.CancelCauseFunc
	complete func(ingest string) bool // whether all of it is here, and being verified and synced
	saved    ocispec.Descriptor       // what the image's names point at

	mu    sync.Mutex
	busy  map[string]string // what is done, and the ingest
	moves uint64            // how often progress was made
	timer *time.Timer
}

func (w *watch) arm() {
	if w.limit <= 0 {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.timer = time.AfterFunc(w.limit, w.expire)
}

func (w *watch) expire() {
	w.mu.Lock()
	busy, moves := maps.Clone(w.busy), w.moves
	w.mu.Unlock()
	var stuck []string
	for what, ingest := range busy {
		if ingest == "" || !w.complete(ingest) {
			stuck = append(stuck, what)
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.moves != moves: // and so the timer runs again
	case len(stuck) > 0 && len(w.busy) > 0:
		slices.Sort(stuck)
		w.cancel(fmt.Errorf("%w: nothing received for %s (image_pull_progress_timeout) while %s", errStalled, w.limit, strings.Join(stuck, ", ")))
	case len(w.busy) > 0:
		w.timer.Reset(w.limit)
	}
}

func (w *watch) stop() {
	w.mu.Lock()
	defer w.mu.Unlock()
	clear(w.busy)
	if w.timer != nil {
		w.timer.Stop()
	}
}

func (w *watch) progress(p transfer.Progress) {
	w.mu.Lock()
	defer w.mu.Unlock()
	what := "downloading " + p.Name
	switch p.Event {
	case "downloading":
		w.busy[what] = p.Name
	case "complete", "already exists":
		delete(w.busy, what)
	case "saved":
		w.saved = *p.Desc
	case "extracting", "extracted", "waiting":
		return // says nothing of what is received
	default:
		delete(w.busy, resolving)
	}
	w.moves++
	if w.timer != nil {
		w.timer.Reset(w.limit)
	}
}

// counters are the metrics of pulls (contract 7.2.7, 9.1.9).
type counters struct {
	pulls       *prometheus.CounterVec
	running     prometheus.Gauge
	speed, fast prometheus.Histogram
}

func newCounters(r prometheus.Registerer) counters {
	const name = "sandboxed_image_pulling_throughput"
	made := promauto.With(r)
	histogram := func(name string, buckets []float64) prometheus.Histogram {
		return made.NewHistogram(prometheus.HistogramOpts{Namespace: "containerd", Subsystem: "cri", Name: name, Help: "sizes of images by the times of their pulls, in MiB/s", Buckets: buckets})
	}
	return counters{pulls: metrics.Counter(r, "sandboxed_image_pulls", "pulls of images by how they ended", "status"),
		running: made.NewGauge(prometheus.GaugeOpts{Namespace: "containerd", Subsystem: "cri", Name: "sandboxed_in_progress_image_pulls_total", Help: "pulls of images under way"}),
		speed:   histogram(name, prometheus.DefBuckets), fast: histogram(name+"_mibps", prometheus.ExponentialBuckets(1, 2, 12))}
}

func (c counters) done(err error, size int64, took time.Duration) {
	c.running.Dec()
	if err != nil {
		c.pulls.WithLabelValues("failure").Inc()
		return
	}
	c.pulls.WithLabelValues("success").Inc()
	speed := float64(size) / (1 << 20) / max(took.Seconds(), 1e-9)
	c.speed.Observe(speed)
	c.fast.Observe(speed)
}
