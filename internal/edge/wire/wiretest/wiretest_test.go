package wiretest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/internal/edge/wire/imagerpc"
)

// failing is an image store of which every Get fails in a given way.
type failing struct {
	image.Store
	err error
}

func (f failing) Get(context.Context, string) (image.Image, error) {
	if f.err == nil {
		panic("broken")
	}
	return image.Image{}, fmt.Errorf("image %q: %w", "x", f.err)
}

// contract: 1.2.9, 13.7
func TestErrorsCrossTheWire(t *testing.T) {
	for _, tc := range []struct {
		err    error
		code   codes.Code
		suffix string
	}{
		{errdefs.ErrUnknown, codes.Unknown, ": unknown"},
		{errdefs.ErrInvalidArgument, codes.InvalidArgument, ": invalid argument"},
		{errdefs.ErrNotFound, codes.NotFound, ": not found"},
		{errdefs.ErrAlreadyExists, codes.AlreadyExists, ": already exists"},
		{errdefs.ErrPermissionDenied, codes.PermissionDenied, ": permission denied"},
		{errdefs.ErrResourceExhausted, codes.ResourceExhausted, ": resource exhausted"},
		{errdefs.ErrFailedPrecondition, codes.FailedPrecondition, ": failed precondition"},
		{errdefs.ErrConflict, codes.FailedPrecondition, ": conflict"},
		{errdefs.ErrNotModified, codes.FailedPrecondition, ": not modified"},
		{errdefs.ErrAborted, codes.Aborted, ": aborted"},
		{errdefs.ErrOutOfRange, codes.OutOfRange, ": out of range"},
		{errdefs.ErrNotImplemented, codes.Unimplemented, ": not implemented"},
		{errdefs.ErrInternal, codes.Internal, ": internal"},
		{errdefs.ErrUnavailable, codes.Unavailable, ": unavailable"},
		{errdefs.ErrDataLoss, codes.DataLoss, ": data loss"},
		{errdefs.ErrUnauthenticated, codes.Unauthenticated, ": unauthorized"},
		{context.Canceled, codes.Canceled, ": context canceled"},
		{context.DeadlineExceeded, codes.DeadlineExceeded, ": context deadline exceeded"},
	} {
		conn := Serve(t, func(s *grpc.Server) {
			imagesapi.RegisterImagesServer(s, imagerpc.NewServer(Source{ImageStore: failing{err: tc.err}}))
		})
		_, err := imagerpc.NewClient(conn, "test", "").Get(t.Context(), "x")
		if !errors.Is(err, tc.err) || err.Error() != `image "x"`+tc.suffix {
			t.Errorf("%v arrives as %v", tc.err, err)
		}
		twice := Serve(t, func(s *grpc.Server) {
			imagesapi.RegisterImagesServer(s, imagerpc.NewServer(Source{ImageStore: imagerpc.NewClient(conn, "test", "")}))
		})
		if _, err := imagerpc.NewClient(twice, "test", "").Get(t.Context(), "x"); !errors.Is(err, tc.err) || err.Error() != `image "x"`+tc.suffix {
			t.Errorf("%v arrives over two connections as %v", tc.err, err)
		}
		raw, derr := grpc.NewClient("unix://"+strings.TrimPrefix(conn.Target(), "unix://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
		if derr != nil {
			t.Fatal(derr)
		}
		_, err = imagesapi.NewImagesClient(raw).Get(Context(t), &imagesapi.GetImageRequest{Name: "x"})
		raw.Close()
		if st := status.Convert(err); st.Code() != tc.code || !strings.HasSuffix(st.Message(), tc.suffix) {
			t.Errorf("%v is the status %v", tc.err, st)
		}
	}
}

// An error that wraps several is one line, with the class of the first.
//
// contract: 1.2.9
func TestWrappedErrorsAreToldOnce(t *testing.T) {
	several := fmt.Errorf("open it: %w: %w", fmt.Errorf("disk: %w", errdefs.ErrUnavailable), errors.Join(errdefs.ErrNotFound))
	conn := Serve(t, func(s *grpc.Server) {
		imagesapi.RegisterImagesServer(s, imagerpc.NewServer(Source{ImageStore: failing{err: several}}))
	})
	twice := Serve(t, func(s *grpc.Server) {
		imagesapi.RegisterImagesServer(s, imagerpc.NewServer(Source{ImageStore: imagerpc.NewClient(conn, "test", "")}))
	})
	for _, c := range []*grpc.ClientConn{conn, twice} {
		_, err := imagerpc.NewClient(c, "test", "").Get(t.Context(), "x")
		if want := `image "x": open it: disk: unavailable: not found`; err == nil || err.Error() != want && err.Error() != want+": unavailable" || !errors.Is(err, errdefs.ErrUnavailable) {
			t.Errorf("%q arrives as %q", want, err)
		}
	}
}

// A panic is that request's error and nobody else's.
func TestPanicIsAnError(t *testing.T) {
	conn := Serve(t, func(s *grpc.Server) {
		imagesapi.RegisterImagesServer(s, imagerpc.NewServer(Source{ImageStore: failing{}}))
	})
	for range 2 {
		if _, err := imagerpc.NewClient(conn, "test", "").Get(t.Context(), "x"); !errors.Is(err, errdefs.ErrInternal) {
			t.Errorf("a panic arrives as %v", err)
		}
	}
}
