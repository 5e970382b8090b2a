package blobdir

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Problem is something in the directory that should not be there.
type Problem struct {
	// Path is relative to the store's directory.
	Path string
	What string
	// Damaged is set if it is a blob whose bytes are not its digest's, as
	// opposed to litter that harms nobody.
	Damaged bool
}

func (p Problem) String() string { return p.Path + ": " + p.What }

// Check reads every blob and compares it with its name, and looks for what is
// neither a blob nor an ingest. It may run beside other calls; ingests that a
// Writer has are not looked at. The error is ctx's or the disk's.
func (s *Store) Check(ctx context.Context) ([]Problem, error) {
	var out []Problem
	algs, err := s.fs.ReadDir(blobs)
	if err != nil {
		return nil, fmt.Errorf("check blobs: %w", err)
	}
	for _, alg := range algs {
		dir := blobs + "/" + alg.Name()
		if !alg.IsDir() || !digest.Algorithm(alg.Name()).Available() {
			out = append(out, Problem{Path: dir, What: "is no directory of a digest algorithm"})
			continue
		}
		names, err := s.fs.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("check blobs: %w", err)
		}
		for _, e := range names {
			p, err := s.checkBlob(ctx, digest.Digest(alg.Name()+":"+e.Name()), dir+"/"+e.Name())
			if err != nil {
				return nil, fmt.Errorf("check blobs: %w", err)
			}
			if p != nil {
				out = append(out, *p)
			}
		}
	}
	entries, err := s.fs.ReadDir(ingest)
	if err != nil {
		return nil, fmt.Errorf("check ingests: %w", err)
	}
	for _, e := range entries {
		dir := ingest + "/" + e.Name()
		if s.isWriting(strings.TrimSuffix(dir, staged)) {
			continue
		}
		_, err := s.readIngest(dir)
		if errors.Is(err, errGarbage) {
			out = append(out, Problem{Path: dir, What: err.Error()})
		} else if err != nil {
			return nil, fmt.Errorf("check ingests: %w", err)
		}
	}
	return out, nil
}

func (s *Store) checkBlob(ctx context.Context, dgst digest.Digest, path string) (*Problem, error) {
	if dgst.Validate() != nil {
		return &Problem{Path: path, What: "is not named by a digest"}, nil
	}
	fi, err := s.stat(dgst)
	if errdefs.IsNotFound(err) { // it has gone, or is not settled yet
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	f, err := s.fs.OpenFile(path, os.O_RDONLY, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	h := dgst.Algorithm().Hash()
	if err := hashFile(ctx, h, f, fi.Size()); err != nil {
		if ctx.Err() != nil {
			return nil, err
		}
		return &Problem{Path: path, What: "cannot be read: " + err.Error(), Damaged: true}, nil
	}
	if got := digest.NewDigest(dgst.Algorithm(), h); got != dgst {
		return &Problem{Path: path, What: fmt.Sprintf("has %d bytes with digest %s", fi.Size(), got), Damaged: true}, nil
	}
	return nil, nil
}

func (s *Store) isWriting(dir string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for ref := range s.writers {
		if ingestDir(ref) == dir {
			return true
		}
	}
	return false
}
