package blobdir

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/gantryd/gantry/core/content"
	"github.com/gantryd/gantry/internal/lib/fault"
	"github.com/gantryd/gantry/internal/lib/fsx"
)

// spills are how much of an ingest is kept in memory: nothing, so that all of
// it is on disk, and as usual.
func spills(t *testing.T, test func(t *testing.T, spill int)) {
	for _, n := range []int{0, spill} {
		t.Run(fmt.Sprintf("spill=%d", n), func(t *testing.T) { test(t, n) })
	}
}

func openMem(f fsx.FS, spill int) (*Store, error) {
	s, err := OpenFS(f, Options{})
	if err == nil {
		s.spill = spill
	}
	return s, err
}

// ledger is what the store has told its user about each blob.
type ledger struct {
	data  map[digest.Digest][]byte
	acked map[digest.Digest]bool // committed and not deleted
}

func newLedger() *ledger {
	return &ledger{map[digest.Digest][]byte{}, map[digest.Digest]bool{}}
}

func (l *ledger) commit(ctx context.Context, s *Store, ref string, data []byte, alg digest.Algorithm) error {
	dgst := alg.FromBytes(data)
	l.data[dgst] = data
	w, err := s.Writer(ctx, ref, content.WriterOptions{Total: int64(len(data)), Expected: dgst})
	if errdefs.IsAlreadyExists(err) {
		l.acked[dgst] = true
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	st, err := w.Status()
	if err != nil {
		return err
	}
	for off := st.Offset; off < int64(len(data)); off += 4 {
		if _, err := w.Write(data[off:min(off+4, int64(len(data)))]); err != nil {
			return err
		}
	}
	err = w.Commit(ctx, int64(len(data)), dgst, nil)
	if errdefs.IsFailedPrecondition(err) {
		// What a power cut left of an ingest was not what had been written:
		// start it over, as a pull does.
		if err := w.Truncate(0); err != nil {
			return err
		}
		if _, err := w.Write(data); err != nil {
			return err
		}
		err = w.Commit(ctx, int64(len(data)), dgst, nil)
	}
	if err == nil || errdefs.IsAlreadyExists(err) {
		l.acked[dgst] = true
		return nil
	}
	return err
}

func (l *ledger) delete(ctx context.Context, s *Store, dgst digest.Digest) error {
	err := s.Delete(ctx, dgst)
	if err == nil {
		l.acked[dgst] = false // whole or absent from now on
	}
	return err
}

// script is a life of a store. It goes on after errors, as the daemon does,
// and returns the first one.
func (l *ledger) script(ctx context.Context, s *Store) error {
	var errs []error
	step := func(err error) { errs = append(errs, err) }
	one, two, three := []byte("the first blob"), []byte("the second, longer blob"), []byte("the third")
	step(l.commit(ctx, s, "one", one, digest.SHA256))
	step(l.commit(ctx, s, "two", two, digest.SHA512))
	step(func() error { // an interrupted ingest, resumed
		w, err := s.Writer(ctx, "three", content.WriterOptions{Total: 9})
		if err != nil {
			return err
		}
		if _, err := w.Write(three[:5]); err != nil {
			return errors.Join(err, w.Close())
		}
		return w.Close()
	}())
	step(l.commit(ctx, s, "three", three, digest.SHA256))
	step(l.commit(ctx, s, "one again", one, digest.SHA256))
	step(l.delete(ctx, s, digest.FromBytes(one)))
	step(l.commit(ctx, s, "one more", one, digest.SHA256))
	step(func() error { // one that is given up
		w, err := s.Writer(ctx, "dropped", content.WriterOptions{})
		if err != nil {
			return err
		}
		if err := w.Close(); err != nil {
			return err
		}
		return s.Abort(ctx, "dropped")
	}())
	step(l.delete(ctx, s, digest.SHA512.FromBytes(two)))
	step(l.commit(ctx, s, "four", []byte("the fourth"), digest.SHA256))
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// audit compares the store with the ledger.
func (l *ledger) audit(ctx context.Context, s *Store) error {
	problems, err := s.Check(ctx)
	if err != nil {
		return err
	}
	for _, p := range problems {
		return fmt.Errorf("check: %s", p)
	}
	for dgst, data := range l.data {
		info, err := s.Info(ctx, dgst)
		switch {
		case l.acked[dgst] && err != nil:
			return fmt.Errorf("acknowledged blob is lost: %w", err)
		case err == nil && info.Size != int64(len(data)):
			return fmt.Errorf("blob %s has %d bytes of %d", dgst, info.Size, len(data))
		case err != nil && !errdefs.IsNotFound(err):
			return err
		}
	}
	return s.Walk(ctx, func(i content.Info) error {
		if l.data[i.Digest] == nil {
			return fmt.Errorf("blob %s was never written", i.Digest)
		}
		return nil
	})
}

// contract: 4.1.3
// promise: P3
func TestPowerCutBeforeEveryOperation(t *testing.T) { spills(t, powerCutBeforeEveryOperation) }

func powerCutBeforeEveryOperation(t *testing.T, spill int) {
	ctx := t.Context()
	whole := fsx.NewMem()
	s, err := openMem(whole, spill)
	if err != nil {
		t.Fatal(err)
	}
	if err := newLedger().script(ctx, s); err != nil {
		t.Fatal(err)
	}
	ops := whole.Ops()
	if ops < 60 {
		t.Fatalf("the script has only %d operations", ops)
	}
	for k := 1; k <= ops+1; k++ {
		for keep := fsx.KeepNothing; keep <= fsx.KeepSome; keep++ {
			for seed := range uint64(3) {
				if keep != fsx.KeepSome && seed > 0 {
					break
				}
				if err := cutAt(ctx, spill, k, keep, seed); err != nil {
					t.Errorf("power cut before operation %d, keep %d, seed %d: %v", k, keep, seed, err)
				}
			}
		}
	}
}

// cutAt runs the script until the k-th operation, cuts the power, checks what
// was promised, and runs the whole script again on what is left.
func cutAt(ctx context.Context, spill, k int, keep fsx.Keep, seed uint64) error {
	disk, l := fsx.NewMem(), newLedger()
	disk.CutBefore(k)
	if s, err := openMem(disk, spill); err == nil {
		l.script(ctx, s) // its error is the cut
	} else if !errors.Is(err, fsx.ErrCut) {
		return err
	}
	disk = disk.Restart(keep, seed)
	s, err := openMem(disk, spill)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	if err := l.audit(ctx, s); err != nil {
		return err
	}
	if err := l.script(ctx, s); err != nil && !errdefs.IsNotFound(err) {
		return fmt.Errorf("second life: %w", err)
	}
	if err := l.audit(ctx, s); err != nil {
		return fmt.Errorf("second life: %w", err)
	}
	// And what the second life promised survives the worst that can come.
	if s, err = openMem(disk.Restart(fsx.KeepNothing, 0), spill); err != nil {
		return err
	}
	return l.audit(ctx, s)
}

// contract: 4.1.3
func TestFailureOfEveryOperation(t *testing.T) { spills(t, failureOfEveryOperation) }

func failureOfEveryOperation(t *testing.T, spill int) {
	ctx := t.Context()
	for _, errno := range []error{syscall.ENOSPC, syscall.EIO} {
		for k, failed := 1, true; failed; k++ {
			disk, l := fsx.NewMem(), newLedger()
			disk.FailAt(k, errno)
			s, err := openMem(disk, spill)
			if err == nil {
				err = l.script(ctx, s)
			}
			failed = disk.Ops() >= k
			// The removal of litter is best effort; all else must be reported.
			if err != nil && !errors.Is(err, errno) && !errdefs.IsNotFound(err) {
				t.Errorf("%v at operation %d: reported as %v", errno, k, err)
			}
			if errors.Is(err, syscall.ENOSPC) && s != nil && !errdefs.IsResourceExhausted(err) {
				t.Errorf("%v at operation %d has no class: %v", errno, k, err)
			}
			disk.FailAt(0, nil)
			if s != nil {
				if err := l.promised(ctx, s); err != nil {
					t.Errorf("%v at operation %d: %v", errno, k, err)
				}
				// Nothing is locked or spoilt: the same work succeeds now.
				if err := l.script(ctx, s); err != nil && !errdefs.IsNotFound(err) {
					t.Errorf("%v at operation %d: afterwards: %v", errno, k, err)
				}
			}
			for _, keep := range []fsx.Keep{fsx.KeepNothing, fsx.KeepNames, fsx.KeepAll} {
				again, err := openMem(disk.Restart(keep, 0), spill)
				if err == nil {
					err = l.audit(ctx, again)
				}
				if err != nil {
					t.Errorf("%v at operation %d, then a power cut, keep %d: %v", errno, k, keep, err)
				}
			}
		}
	}
}

// promised is audit without the litter that a failure may leave until the next start.
func (l *ledger) promised(ctx context.Context, s *Store) error {
	for dgst := range l.data {
		if _, err := s.Info(ctx, dgst); l.acked[dgst] && err != nil {
			return fmt.Errorf("acknowledged blob is lost: %w", err)
		}
	}
	problems, err := s.Check(ctx)
	for _, p := range problems {
		if p.Damaged {
			return fmt.Errorf("check: %s", p)
		}
	}
	return err
}

// A process that dies leaves names in the cache that no one synced. Who sees
// them after the restart may rely on them.
//
// contract: 4.1.3
func TestKillBeforeEveryOperation(t *testing.T) { spills(t, killBeforeEveryOperation) }

func killBeforeEveryOperation(t *testing.T, spill int) {
	ctx := t.Context()
	for k, died := 1, true; died; k++ {
		disk, l := fsx.NewMem(), newLedger()
		disk.CutBefore(k)
		if s, err := openMem(disk, spill); err == nil {
			l.script(ctx, s)
		}
		died = disk.Ops() >= k
		disk.CutBefore(0) // the machine lives on
		s, err := openMem(disk, spill)
		if err == nil {
			err = l.audit(ctx, s)
		}
		if err != nil {
			t.Errorf("killed before operation %d: %v", k, err)
			continue
		}
		for dgst := range l.data {
			if _, err := s.Info(ctx, dgst); err == nil {
				l.acked[dgst] = true
			}
		}
		if err := l.commit(ctx, s, "after", []byte("after the kill"), digest.SHA256); err != nil {
			t.Errorf("killed before operation %d: next commit: %v", k, err)
		}
		if s, err = openMem(disk.Restart(fsx.KeepNothing, 0), spill); err == nil {
			err = l.audit(ctx, s)
		}
		if err != nil {
			t.Errorf("killed before operation %d, then a power cut: %v", k, err)
		}
	}
}

// The same with a real process and a real disk, at the named points.
//
// contract: 4.1.3
// promise: P32
func TestKillAtFaultPoints(t *testing.T) {
	ctx, data := t.Context(), bytes.Repeat([]byte("a layer "), 20_000)
	if spec := os.Getenv("BLOBDIR_TEST_FAULT"); spec != "" {
		points, err := fault.Parse(spec, fault.Kill)
		if err != nil {
			t.Fatal(err)
		}
		s, err := Open(os.Getenv("BLOBDIR_TEST_DIR"), Options{Faults: points})
		if err != nil {
			t.Fatal(err)
		}
		w, err := s.Writer(ctx, "layer", content.WriterOptions{Total: int64(len(data))})
		if err == nil {
			_, err = w.Write(data)
		}
		if err == nil {
			err = w.Commit(ctx, 0, "", nil)
		}
		t.Fatal("alive: ", err)
	}
	for _, point := range []string{"synced", "renamed", "done"} {
		dir := t.TempDir()
		cmd := exec.CommandContext(ctx, os.Args[0], "-test.run=^TestKillAtFaultPoints$")
		cmd.Env = append(os.Environ(), "BLOBDIR_TEST_FAULT=blobdir.commit."+point+":1", "BLOBDIR_TEST_DIR="+dir)
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Fatalf("%s: the child ended with %v: %s", point, err, out)
		}
		s := open(t, dir, Options{})
		_, err = s.Info(ctx, digest.FromBytes(data))
		if errdefs.IsNotFound(err) == (point != "synced") {
			t.Errorf("killed when %s: the blob: %v", point, err)
		}
		st, err := s.Status(ctx, "layer")
		if (err == nil) != (point == "synced") || err == nil && st.Offset != int64(len(data)) {
			t.Errorf("killed when %s: the ingest: %+v, %v", point, st, err)
		}
		l := newLedger()
		if err := l.commit(ctx, s, "layer", data, digest.SHA256); err != nil {
			t.Errorf("killed when %s: the next commit: %v", point, err)
		}
		if err := l.audit(ctx, s); err != nil {
			t.Errorf("killed when %s: %v", point, err)
		}
	}
}

// faulty fails the calls that a test asks it to.
type faulty struct {
	fsx.FS
	syncDir, rename func(name string) error
}

func (f *faulty) SyncDir(name string) error {
	if f.syncDir != nil {
		if err := f.syncDir(name); err != nil {
			return err
		}
	}
	return f.FS.SyncDir(name)
}

func (f *faulty) Rename(oldname, newname string) error {
	if f.rename != nil {
		if err := f.rename(oldname); err != nil {
			return err
		}
	}
	return f.FS.Rename(oldname, newname)
}

// contract: 4.1.3
func TestNameThatCannotBeSynced(t *testing.T) { spills(t, nameThatCannotBeSynced) }

func nameThatCannotBeSynced(t *testing.T, spill int) {
	ctx := t.Context()
	for _, back := range []bool{true, false} {
		disk := fsx.NewMem()
		f := &faulty{FS: disk}
		s, err := openMem(f, spill)
		if err != nil {
			t.Fatal(err)
		}
		data := []byte("named, but for how long")
		dgst := digest.FromBytes(data)
		w, err := s.Writer(ctx, "r", content.WriterOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		f.syncDir = func(string) error { return syscall.EIO }
		if !back {
			f.rename = func(name string) error {
				if name == "blobs/sha256/"+dgst.Encoded() {
					return syscall.EIO
				}
				return nil
			}
		}
		if err := w.Commit(ctx, 0, dgst, nil); !errors.Is(err, syscall.EIO) {
			t.Fatalf("commit: %v", err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Info(ctx, dgst); !errdefs.IsNotFound(err) {
			t.Fatalf("a blob that was not acknowledged is shown: %v", err)
		}
		st, err := s.Status(ctx, "r")
		if back && (err != nil || st.Offset != int64(len(data))) {
			t.Fatalf("the ingest is %+v, %v", st, err)
		}
		f.syncDir, f.rename = nil, nil
		l := newLedger()
		if err := l.commit(ctx, s, "r", data, digest.SHA256); err != nil {
			t.Fatal(err)
		}
		if s, err = openMem(disk.Restart(fsx.KeepNothing, 0), spill); err == nil {
			err = l.audit(ctx, s)
		}
		if err != nil {
			t.Fatalf("name taken back: %v: %v", back, err)
		}
	}
}
