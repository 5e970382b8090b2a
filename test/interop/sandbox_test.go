package interop

import (
	"os"
	"testing"
	"time"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/pkg/cio"
	"github.com/containerd/containerd/v2/pkg/oci"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// containerd's client makes a sandbox in our shim, finds it again after the
// daemon was killed, runs a container in it, and removes it.
//
// contract: 1.3.29, 1.3.30, 1.4.4, 1.5.13, 5.6.6, 7.3.25
func TestClientSandbox(t *testing.T) {
	_, _, ref := served(t)
	d := newGantry(t)
	d.start()
	ctx := testContext(t)
	c := d.connect()
	img := pull(t, c, ref)
	if err := c.NamespaceService().SetLabel(ctx, "default", "containerd.io/defaults/sandboxer", "shim"); err != nil {
		t.Fatal(err)
	}
	events, errs := c.Subscribe(ctx, `topic~=|^/sandboxes/|`)
	sb, err := d.connect().NewSandbox(ctx, "pod", containerd.WithSandboxRuntime("io.containerd.runc.v2", nil), containerd.WithSandboxLabels(map[string]string{"a": "b"}))
	if err != nil {
		t.Fatal(err)
	}
	if s := sb.Metadata().Sandboxer; s != "shim" {
		t.Errorf("sandboxer %q", s)
	}
	if err := sb.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"/sandboxes/create", "/sandboxes/start"} {
		select {
		case e := <-events:
			if e.Topic != want || e.Namespace != "default" {
				t.Errorf("event %s in %s, want %s", e.Topic, e.Namespace, want)
			}
		case err := <-errs:
			t.Fatalf("events: %v", err)
		case <-time.After(10 * time.Second):
			t.Fatalf("no event %s", want)
		}
	}
	ctrl := c.SandboxController("shim")
	if p, err := ctrl.Platform(ctx, "pod"); err != nil || p.OS != "linux" {
		t.Errorf("platform %v, %v", p, err)
	}
	before, err := ctrl.Status(ctx, "pod", true)
	if err != nil || before.State != "SANDBOX_READY" || before.Address == "" || before.Version != 3 {
		t.Errorf("status %+v, %v", before, err)
	}
	p, err := os.FindProcess(d.Pid())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	d.Ended(10 * time.Second)
	d.start()
	c = d.connect()
	ctrl = c.SandboxController("shim")
	if sb, err = c.LoadSandbox(ctx, "pod"); err != nil {
		t.Fatal(err)
	}
	if st, err := ctrl.Status(ctx, "pod", false); err != nil || st.State != before.State || st.Address != before.Address || !st.CreatedAt.Equal(before.CreatedAt) {
		t.Errorf("status %+v, before %+v, %v", st, before, err)
	}
	img, err = c.GetImage(ctx, img.Name())
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut buffer
	ctr, err := sb.NewContainer(ctx, "run", containerd.WithImage(img), containerd.WithNewSnapshot("run", img), containerd.WithNewSpec(oci.WithImageConfig(img)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ctr.Delete(testContext(t), containerd.WithSnapshotCleanup); err != nil {
			t.Errorf("delete container: %v", err)
		}
	})
	task, wait := start(t, ctr, cio.NewCreator(cio.WithStreams(nil, &out, &errOut), cio.WithFIFODir(d.Dir)))
	if code := exit(t, wait); code != 0 || out.String() == "" {
		t.Errorf("exit code %d, %q %q", code, out.String(), errOut.String())
	}
	if _, err := task.Delete(ctx); err != nil {
		t.Error(err)
	}
	ended, err := sb.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.Stop(ctx); err != nil {
		t.Error(err)
	}
	select {
	case x := <-ended:
		if x.Error() != nil || x.ExitCode() != 0 {
			t.Errorf("exit %v, %v", x.ExitCode(), x.Error())
		}
	case <-time.After(10 * time.Second):
		t.Error("the wait does not end")
	}
	if err := sb.Shutdown(ctx); err != nil {
		t.Error(err)
	}
	if _, err := ctrl.Status(ctx, "pod", false); !errdefs.IsNotFound(err) {
		t.Errorf("status of one that is gone: %v", err)
	}
	if err := ctrl.Stop(ctx, "pod"); err != nil {
		t.Errorf("stop of one that is gone: %v", err)
	}
	if _, err := c.SandboxController("nobody").Status(ctx, "pod", false); !errdefs.IsNotFound(err) {
		t.Errorf("unknown sandboxer: %v", err)
	}
	if _, err := c.SandboxController("").Status(ctx, "pod", false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no sandboxer: %v", err)
	}
}
