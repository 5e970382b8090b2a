// Package imagerpc is containerd.services.images.v1 on both sides.
package imagerpc

import (
	"context"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/lease"
	"github.com/gantryd/gantry/core/namespace"
	"github.com/gantryd/gantry/core/view"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// Server answers from views (contract 1.3.16 to 1.3.19).
type Server struct {
	imagesapi.UnimplementedImagesServer
	views view.Source
}

// NewServer makes a server.
func NewServer(views view.Source) *Server { return &Server{views: views} }

// Get implements the RPC.
func (s *Server) Get(ctx context.Context, r *imagesapi.GetImageRequest) (*imagesapi.GetImageResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	img, err := v.Images().Get(ctx, r.Name)
	return &imagesapi.GetImageResponse{Image: toProto(img)}, err
}

// List implements the RPC.
func (s *Server) List(ctx context.Context, r *imagesapi.ListImagesRequest) (*imagesapi.ListImagesResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	images, err := v.Images().List(ctx, r.Filters...)
	return &imagesapi.ListImagesResponse{Images: wire.Each(images, toProto)}, err
}

// Create implements the RPC. The source date epoch is the time of creation.
func (s *Server) Create(ctx context.Context, r *imagesapi.CreateImageRequest) (*imagesapi.CreateImageResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Image == nil {
		return nil, wire.Missing("image")
	}
	img := fromProto(r.Image)
	img.CreatedAt = wire.TimeFromProto(r.SourceDateEpoch)
	img.UpdatedAt = img.CreatedAt
	img, err = v.Images().Create(ctx, img)
	return &imagesapi.CreateImageResponse{Image: toProto(img)}, err
}

// Update implements the RPC. The source date epoch is the time of the update.
func (s *Server) Update(ctx context.Context, r *imagesapi.UpdateImageRequest) (*imagesapi.UpdateImageResponse, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	if r.Image == nil {
		return nil, wire.Missing("image")
	}
	img := fromProto(r.Image)
	img.UpdatedAt = wire.TimeFromProto(r.SourceDateEpoch)
	img, err = v.Images().Update(ctx, img, r.UpdateMask.GetPaths()...)
	return &imagesapi.UpdateImageResponse{Image: toProto(img)}, err
}

// Delete implements the RPC.
func (s *Server) Delete(ctx context.Context, r *imagesapi.DeleteImageRequest) (*emptypb.Empty, error) {
	v, err := wire.View(ctx, s.views)
	if err != nil {
		return nil, err
	}
	opts := image.DeleteOptions{Sync: r.Sync}
	if r.Target != nil {
		target := wire.DescFromProto(r.Target)
		opts.Target = &target
	}
	return &emptypb.Empty{}, v.Images().Delete(ctx, r.Name, opts)
}

type client struct {
	api   imagesapi.ImagesClient
	ns    namespace.ID
	under lease.ID
}

// NewClient makes the store of a namespace at the other end of a connection,
// which it does not own.
func NewClient(conn grpc.ClientConnInterface, ns namespace.ID, under lease.ID) image.Store {
	return &client{imagesapi.NewImagesClient(conn), ns, under}
}

func (c *client) out(ctx context.Context) context.Context { return wire.Outgoing(ctx, c.ns, c.under) }

func (c *client) Get(ctx context.Context, name string) (image.Image, error) {
	r, err := c.api.Get(c.out(ctx), &imagesapi.GetImageRequest{Name: name})
	return fromProto(r.GetImage()), err
}

func (c *client) List(ctx context.Context, filters ...string) ([]image.Image, error) {
	r, err := c.api.List(c.out(ctx), &imagesapi.ListImagesRequest{Filters: filters})
	return wire.Each(r.GetImages(), fromProto), err
}

func (c *client) Create(ctx context.Context, img image.Image) (image.Image, error) {
	r, err := c.api.Create(c.out(ctx), &imagesapi.CreateImageRequest{Image: toProto(img), SourceDateEpoch: wire.TimeToProto(img.CreatedAt)})
	return fromProto(r.GetImage()), err
}

func (c *client) Update(ctx context.Context, img image.Image, fields ...string) (image.Image, error) {
	r, err := c.api.Update(c.out(ctx), &imagesapi.UpdateImageRequest{Image: toProto(img), SourceDateEpoch: wire.TimeToProto(img.UpdatedAt), UpdateMask: wire.Mask(fields)})
	return fromProto(r.GetImage()), err
}

func (c *client) Delete(ctx context.Context, name string, opts image.DeleteOptions) error {
	req := &imagesapi.DeleteImageRequest{Name: name, Sync: opts.Sync}
	if opts.Target != nil {
		req.Target = wire.DescToProto(*opts.Target)
	}
	_, err := c.api.Delete(c.out(ctx), req)
	return err
}

func toProto(img image.Image) *imagesapi.Image {
	return &imagesapi.Image{Name: img.Name, Labels: img.Labels, Target: wire.DescToProto(img.Target),
		CreatedAt: wire.TimeToProto(img.CreatedAt), UpdatedAt: wire.TimeToProto(img.UpdatedAt)}
}

func fromProto(img *imagesapi.Image) image.Image {
	return image.Image{Name: img.GetName(), Labels: img.GetLabels(), Target: wire.DescFromProto(img.GetTarget()),
		CreatedAt: wire.TimeFromProto(img.GetCreatedAt()), UpdatedAt: wire.TimeFromProto(img.GetUpdatedAt())}
}
