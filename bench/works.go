package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	timage "github.com/containerd/containerd/v2/core/transfer/image"
	"github.com/containerd/containerd/v2/core/transfer/registry"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// work is something both daemons do in turn. It gives one sample a row, and
// leaves the daemon as it found it.
type work struct {
	key    string
	rows   []row
	rounds int // at most; 0: as many as asked for
	run    func(ctx context.Context, b *bench, d *daemon) ([]sample, error)
}

func works() []work {
	return []work{
		{"pull", []row{{"pull and unpack, 64 MiB in 6 layers", "ms"}}, 0, func(ctx context.Context, b *bench, d *daemon) ([]sample, error) { return pulled(ctx, d, b.large, pull) }},
		{"transfer", []row{{"the same by Transfer (containerd 1.6: as above)", "ms"}}, 0, func(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
			return pulled(ctx, d, b.large, b.transfer)
		}},
		{"files", []row{{"pull and unpack, 20,000 small files", "ms"}}, 3, files},
		{"loop", []row{{"create to deleted, /bin/true", "ms"}, {"of it: new container and snapshot", "ms"}, {"of it: task create", "ms"}, {"of it: start to exit", "ms"}, {"of it: task delete", "ms"}, {"of it: container and snapshot delete", "ms"}}, 0, loop},
		{"exec", []row{{"exec of /bin/true, add to delete", "ms"}}, 0, execs},
		{"records", []row{{"container record, create and delete, 4 writers", "ms"}}, 0, records},
		{"blobs", []row{{"blob of 4 KiB, 4 writers", "ms"}}, 0, blobs},
		{"fleet", []row{{"cold start to first answer", "ms"}, {"daemon's RSS, empty", "MiB"}, {"daemon's RSS, 20 containers", "MiB"}, {"PSS of an idle shim", "MiB"}, {"kill -9 to first list of 20 tasks", "ms"}}, 3, fleet},
		{"pods", podRows("both with pause"), 3, func(ctx context.Context, b *bench, d *daemon) ([]sample, error) { return pods(ctx, b, d, "runc") }},
		{"pauseless", podRows("gantry's without pause"), 3, func(ctx context.Context, b *bench, d *daemon) ([]sample, error) { return pods(ctx, b, d, "pauseless") }},
	}
}

// choose picks works by their keys, comma separated; all of them for "".
func choose(only string) ([]work, error) {
	if only == "" {
		return works(), nil
	}
	var out []work
	for _, key := range strings.Split(only, ",") {
		n := len(out)
		for _, w := range works() {
			if w.key == key {
				out = append(out, w)
			}
		}
		if len(out) == n {
			return nil, fmt.Errorf("there is no work %q", key)
		}
	}
	return out, nil
}

// pull is the client's own: it fetches, the daemon stores and unpacks.
func pull(ctx context.Context, d *daemon, ref string) error {
	_, err := d.client.Pull(ctx, ref, containerd.WithPullUnpack, containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{PlainHTTP: true})))
	return err
}

// transfer has the daemon pull. containerd 1.6 has no such service: there the
// client pulls, as its users have to.
func (b *bench) transfer(ctx context.Context, d *daemon, ref string) error {
	if d.version < 3 {
		return pull(ctx, d, ref)
	}
	src, err := registry.NewOCIRegistry(ctx, ref, registry.WithDefaultScheme("http"))
	if err != nil {
		return err
	}
	return d.client.Transfer(ctx, src, timage.NewStore(ref, timage.WithUnpack(platforms.DefaultSpec(), "overlayfs")))
}

// pulled measures one pull and deletes the image with all its content.
func pulled(ctx context.Context, d *daemon, ref string, pull func(context.Context, *daemon, string) error) ([]sample, error) {
	s, err := d.measure(1, func() error { return pull(ctx, d, ref) })
	if err != nil {
		return nil, err
	}
	return []sample{s}, d.client.ImageService().Delete(ctx, ref, images.SynchronousDelete())
}

// files pulls an image that is another one in every round and stays until the
// daemon is removed: ext4 does not reuse an inode soon after its deletion, and
// looks at each of them again for every file it makes, so that deleting would
// make the next round many times slower for whoever comes then.
func files(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
	for len(b.many) <= b.round {
		img, err := many(uint64(len(b.many)))
		if err != nil {
			return nil, err
		}
		b.many = append(b.many, b.reg.Put(fmt.Sprintf("bench/many%d", len(b.many)), "latest", img))
	}
	s, err := d.measure(1, func() error { return pull(ctx, d, b.many[b.round]) })
	return []sample{s}, err
}

// create makes a container with a snapshot. Its cgroup is below that of the
// daemon, so that its CPU time is counted too.
func create(ctx context.Context, d *daemon, id string, args ...string) (containerd.Container, error) {
	return d.client.NewContainer(ctx, id, containerd.WithImage(d.image), containerd.WithNewSnapshot(id, d.image),
		containerd.WithNewSpec(oci.WithImageConfig(d.image), oci.WithProcessArgs(args...), oci.WithCgroup("/"+d.Mark+"/"+id)))
}

// exited waits for an exit with code 0.
func exited(ch <-chan containerd.ExitStatus) error {
	select {
	case s := <-ch:
		if code, _, err := s.Result(); err != nil || code != 0 {
			return fmt.Errorf("exit code %d: %w", code, err)
		}
		return nil
	case <-time.After(30 * time.Second):
		return errors.New("no exit within 30 s")
	}
}

// loop is what a user of short containers does, one after another.
func loop(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
	n := b.scaled(20)
	var stage [5]time.Duration
	whole, err := d.measure(n, func() error {
		for i := range n {
			last := time.Now()
			lap := func(i int) { now := time.Now(); stage[i] += now.Sub(last); last = now }
			ctr, err := create(ctx, d, fmt.Sprintf("loop%d", i), "/bin/true")
			if err != nil {
				return err
			}
			lap(0)
			task, err := ctr.NewTask(ctx, cio.NullIO)
			if err != nil {
				return err
			}
			lap(1)
			wait, err := task.Wait(ctx)
			if err != nil {
				return err
			}
			if err := task.Start(ctx); err != nil {
				return err
			}
			if err := exited(wait); err != nil {
				return err
			}
			lap(2)
			if _, err := task.Delete(ctx); err != nil {
				return err
			}
			lap(3)
			if err := ctr.Delete(ctx, containerd.WithSnapshotCleanup); err != nil {
				return err
			}
			lap(4)
		}
		return nil
	})
	out := []sample{whole}
	for _, t := range stage {
		out = append(out, sample{t.Seconds() * 1000 / float64(n), -1})
	}
	return out, err
}

// running starts a container that sleeps.
func running(ctx context.Context, d *daemon, id string) (containerd.Container, containerd.Task, error) {
	ctr, err := create(ctx, d, id, "/bin/sleep", "600")
	if err != nil {
		return nil, nil, err
	}
	task, err := ctr.NewTask(ctx, cio.NullIO)
	if err != nil {
		return nil, nil, err
	}
	return ctr, task, task.Start(ctx)
}

func gone(ctx context.Context, ctr containerd.Container, task containerd.Task) error {
	if _, err := task.Delete(ctx, containerd.WithProcessKill); err != nil {
		return err
	}
	return ctr.Delete(ctx, containerd.WithSnapshotCleanup)
}

func execs(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
	n := b.scaled(30)
	ctr, task, err := running(ctx, d, "exec")
	if err != nil {
		return nil, err
	}
	spec, err := ctr.Spec(ctx)
	if err != nil {
		return nil, err
	}
	proc := *spec.Process
	proc.Args = []string{"/bin/true"}
	s, err := d.measure(n, func() error {
		for i := range n {
			p, err := task.Exec(ctx, fmt.Sprintf("e%d", i), &proc, cio.NullIO)
			if err != nil {
				return err
			}
			wait, err := p.Wait(ctx)
			if err != nil {
				return err
			}
			if err := p.Start(ctx); err != nil {
				return err
			}
			if err := exited(wait); err != nil {
				return err
			}
			if _, err := p.Delete(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	return []sample{s}, errors.Join(err, gone(ctx, ctr, task))
}

// writers runs n operations in four goroutines.
func writers(n int, f func(i int) error) error {
	var next atomic.Int64
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for w := range errs {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n) && errs[w] == nil; i = next.Add(1) {
				errs[w] = f(int(i))
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func records(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
	n := b.scaled(400)
	spec, err := oci.GenerateSpec(ctx, nil, &containers.Container{ID: "x"})
	if err != nil {
		return nil, err
	}
	any, err := typeurlAny(spec)
	if err != nil {
		return nil, err
	}
	store := d.client.ContainerService()
	s, err := d.measure(n, func() error {
		return writers(n, func(i int) error {
			id := fmt.Sprintf("record%d", i)
			if _, err := store.Create(ctx, containers.Container{ID: id, Runtime: containers.RuntimeInfo{Name: "io.containerd.runc.v2"}, Spec: any}); err != nil {
				return err
			}
			return store.Delete(ctx, id)
		})
	})
	return []sample{s}, err
}

// blobs writes content that is new in every round, as pushes and builds do.
func blobs(ctx context.Context, b *bench, d *daemon) ([]sample, error) {
	n := b.scaled(200)
	store := d.client.ContentStore()
	// Without a lease the garbage collection that the deletes of other works
	// have asked for may take them away before they are deleted below.
	ctx, done, err := d.client.WithLease(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var made []digest.Digest
	s, err := d.measure(n, func() error {
		return writers(n, func(i int) error {
			body := bytes.Repeat([]byte("blob "), 1000)[:4096]
			binary.LittleEndian.PutUint64(body, uint64(i))
			binary.LittleEndian.PutUint64(body[8:], uint64(b.unique.Add(1)))
			desc := ocispec.Descriptor{MediaType: "application/octet-stream", Digest: digest.FromBytes(body), Size: int64(len(body))}
			mu.Lock()
			made = append(made, desc.Digest)
			mu.Unlock()
			return content.WriteBlob(ctx, store, "blob-"+desc.Digest.String(), bytes.NewReader(body), desc)
		})
	})
	for _, dgst := range made {
		err = errors.Join(err, store.Delete(ctx, dgst))
	}
	return []sample{s}, errors.Join(err, done(ctx))
}

// settle is how long a process has to be idle before its memory is measured:
// what it needed for its last request has been given back by then.
const settle = 3 * time.Second

// fleet takes a daemon of its own from an empty root to twenty containers,
// kills it and starts it again.
func fleet(ctx context.Context, b *bench, shared *daemon) (_ []sample, err error) {
	d, err := newDaemon(shared.kind)
	if err != nil {
		return nil, err
	}
	defer func() {
		if left := d.remove(); err == nil && len(left) > 0 {
			err = fmt.Errorf("%s left behind: %s", d.name, strings.Join(left, "; "))
		}
	}()
	cold, err := d.start(ctx)
	if err != nil {
		return nil, err
	}
	time.Sleep(settle)
	empty, err := status(d.Pid(), "status", "VmRSS")
	if err != nil {
		return nil, err
	}
	if err := d.prepare(ctx, b.small); err != nil {
		return nil, err
	}
	const n = 20
	for i := range n {
		if _, _, err := running(ctx, d, fmt.Sprintf("fleet%d", i)); err != nil {
			return nil, err
		}
	}
	time.Sleep(settle)
	full, err := status(d.Pid(), "status", "VmRSS")
	if err != nil {
		return nil, err
	}
	var pss, shims float64
	for pid, args := range d.Processes() {
		if strings.Contains(args, "containerd-shim") {
			p, err := status(pid, "smaps_rollup", "Pss")
			if err != nil {
				return nil, err
			}
			pss += p
			shims++
		}
	}
	if shims != n {
		return nil, fmt.Errorf("%s has %v shims for %d containers", d.name, shims, n)
	}
	d.kill()
	begin := time.Now()
	if _, err := d.start(ctx); err != nil {
		return nil, err
	}
	tasks, err := listed(ctx, d)
	if err != nil {
		return nil, err
	}
	again := time.Since(begin)
	if tasks != n {
		return nil, fmt.Errorf("%s lists %d tasks of %d after a crash", d.name, tasks, n)
	}
	for i := range n {
		ctr, err := d.client.LoadContainer(ctx, fmt.Sprintf("fleet%d", i))
		if err != nil {
			return nil, err
		}
		task, err := ctr.Task(ctx, nil)
		if err != nil {
			return nil, err
		}
		if err := gone(ctx, ctr, task); err != nil {
			return nil, err
		}
	}
	ms := func(t time.Duration) sample { return sample{t.Seconds() * 1000, -1} }
	return []sample{ms(cold), {empty, -1}, {full, -1}, {pss / shims, -1}, ms(again)}, nil
}
