package criimage

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/image"
)

var _ runtime.ImageServiceServer = (*Service)(nil)

// answer is an image as the kubelet reads it.
func (e *entry) answer() *runtime.Image {
	out := &runtime.Image{Id: e.id, Size: uint64(max(e.facts.size, 0)), Pinned: e.pinned()}
	out.RepoTags, out.RepoDigests = e.split()
	user, _, _ := strings.Cut(e.facts.user, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtime.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}

// filtered are the images that a filter names, all if it is empty; a repository
// names all of its images.
func (s *Service) filtered(f *runtime.ImageFilter) ([]*entry, error) {
	name := f.GetImage().GetImage()
	if name == "" {
		return s.index.list(), nil
	}
	if named, err := reference.ParseNormalizedNamed(name); err == nil && reference.IsNameOnly(named) {
		of := slices.DeleteFunc(s.index.list(), func(e *entry) bool {
			tags, digests := e.split()
			return !slices.ContainsFunc(append(tags, digests...), func(ref string) bool {
				rest, ok := strings.CutPrefix(ref, named.Name())
				return ok && strings.IndexAny(rest, ":@") == 0
			})
		})
		if len(of) > 0 {
			return of, nil
		}
	}
	e, err := s.index.find(name)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	return []*entry{e}, err
}

// ListImages implements runtime.ImageServiceServer (contract 7.2.2).
func (s *Service) ListImages(_ context.Context, r *runtime.ListImagesRequest) (*runtime.ListImagesResponse, error) {
	all, err := s.filtered(r.GetFilter())
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	out := &runtime.ListImagesResponse{}
	for _, e := range all {
		out.Images = append(out.Images, e.answer())
	}
	return out, nil
}

// StreamImages implements runtime.ImageServiceServer: a hundred at a time.
func (s *Service) StreamImages(r *runtime.StreamImagesRequest, to grpc.ServerStreamingServer[runtime.StreamImagesResponse]) error {
	all, err := s.filtered(r.GetFilter())
	if err != nil {
		return fmt.Errorf("list images: %w", err)
	}
	for some := range slices.Chunk(all, 100) {
		out := &runtime.StreamImagesResponse{}
		for _, e := range some {
			out.Images = append(out.Images, e.answer())
		}
		if err := to.Send(out); err != nil {
			return err
		}
	}
	return nil
}

// ImageStatus implements runtime.ImageServiceServer (contract 7.2.2): an image
// that is not here is an empty answer. For a runtime handler it is here only
// if it is unpacked for it.
func (s *Service) ImageStatus(ctx context.Context, r *runtime.ImageStatusRequest) (*runtime.ImageStatusResponse, error) {
	name, handler := r.GetImage().GetImage(), r.GetImage().GetRuntimeHandler()
	e, err := s.index.find(name)
	if errdefs.IsNotFound(err) {
		return &runtime.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("image status: %w", err)
	}
	out := &runtime.ImageStatusResponse{Image: e.answer()}
	if handler == "" && !r.GetVerbose() {
		return out, nil
	}
	img, err := s.Resolve(ctx, name, handler)
	if errdefs.IsNotFound(err) || err == nil && handler != "" && !s.unpacked(ctx, img.ConfigDesc.Digest, img.ChainID, img.Snapshotter) {
		return &runtime.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("image status: %w", err)
	}
	out.Image.Id = img.ID
	if r.GetVerbose() {
		b, err := json.Marshal(struct {
			ChainID   string        `json:"chainID"`
			ImageSpec ocispec.Image `json:"imageSpec"`
		}{img.ChainID, img.Spec})
		if err != nil {
			return nil, fmt.Errorf("image status of %s: %w", img.ID, err)
		}
		out.Info = map[string]string{"info": string(b)}
	}
	return out, nil
}

// RemoveImage implements runtime.ImageServiceServer (contract 7.2.2): all names
// go, and with the last one, before this returns, what they alone kept. A name
// that points elsewhere meanwhile stays. An unknown image is no error.
func (s *Service) RemoveImage(ctx context.Context, r *runtime.RemoveImageRequest) (*runtime.RemoveImageResponse, error) {
	e, err := s.index.find(r.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &runtime.RemoveImageResponse{}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("remove image: %w", err)
	}
	// The id is last: until then, the rest can be removed by it.
	names := slices.SortedFunc(maps.Keys(e.refs), func(a, b string) int {
		if (a == e.id) != (b == e.id) {
			if a == e.id {
				return 1
			}
			return -1
		}
		return strings.Compare(a, b)
	})
	for i, name := range names {
		target := ocispec.Descriptor{Digest: e.refs[name].target}
		err := s.view.Images().Delete(ctx, name, image.DeleteOptions{Sync: i == len(names)-1, Target: &target})
		if err != nil && !errdefs.IsNotFound(err) {
			return nil, fmt.Errorf("remove image %s: %w", name, err)
		}
		if _, err := s.refresh(ctx, name); err != nil && ctx.Err() != nil {
			return nil, fmt.Errorf("remove image %s: %w", name, err)
		}
	}
	return &runtime.RemoveImageResponse{}, nil
}

// ImageFsInfo implements runtime.ImageServiceServer (contract 7.2.3) from the
// last measurement. The usual snapshotter comes first.
func (s *Service) ImageFsInfo(context.Context, *runtime.ImageFsInfoRequest) (*runtime.ImageFsInfoResponse, error) {
	all := s.usage.sums()
	first := s.d.Config.Snapshotter
	if _, ok := all[first]; !ok {
		all[first] = Sum{At: time.Now()}
	}
	out := &runtime.ImageFsInfoResponse{}
	for _, name := range slices.SortedFunc(maps.Keys(all), func(a, b string) int {
		if a == first || b == first {
			return strings.Compare(strconv.FormatBool(b == first), strconv.FormatBool(a == first))
		}
		return strings.Compare(a, b)
	}) {
		u := all[name]
		if name != first && u.Inodes == 0 && u.Size == 0 {
			continue
		}
		out.ImageFilesystems = append(out.ImageFilesystems, &runtime.FilesystemUsage{Timestamp: u.At.UnixNano(), FsId: &runtime.FilesystemIdentifier{Mountpoint: s.d.Roots[name]},
			UsedBytes: &runtime.UInt64Value{Value: uint64(u.Size)}, InodesUsed: &runtime.UInt64Value{Value: uint64(u.Inodes)}})
	}
	out.ContainerFilesystems = out.ImageFilesystems
	return out, nil
}
