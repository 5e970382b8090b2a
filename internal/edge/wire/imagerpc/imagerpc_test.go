package imagerpc

import (
	"testing"

	imagesapi "github.com/containerd/containerd/api/services/images/v1"
	"google.golang.org/grpc"

	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/image/imagetest"
	"github.com/gantryd/gantry/internal/edge/wire/wiretest"
	"github.com/gantryd/gantry/internal/engine/memory"
)

func over(t *testing.T, st image.Store) image.Store {
	conn := wiretest.Serve(t, func(s *grpc.Server) {
		imagesapi.RegisterImagesServer(s, NewServer(wiretest.Source{ImageStore: st}))
	})
	return NewClient(conn, "test", "")
}

// contract: 1.3.16, 1.3.17, 1.3.18, 1.3.19, 4.2.1, 4.2.2
func TestStore(t *testing.T) {
	t.Run("gRPC", func(t *testing.T) {
		imagetest.Run(t, func(t *testing.T) image.Store { return over(t, memory.NewImages()) })
	})
	t.Run("gRPC twice", func(t *testing.T) {
		imagetest.Run(t, func(t *testing.T) image.Store { return over(t, over(t, memory.NewImages())) })
	})
}
