package wire

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/containerd/containerd/api/types"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/fieldmaskpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/gantryd/gantry/core/mount"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
)

func native(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return errgrpc.ToNative(err)
}

// Each converts a list. The result is never nil.
func Each[A, B any](list []A, convert func(A) B) []B {
	out := make([]B, len(list))
	for i, v := range list {
		out[i] = convert(v)
	}
	return out
}

// Receive hands the messages of a stream to fn until the stream or fn ends it.
func Receive[M any](stream interface{ Recv() (M, error) }, fn func(M) error) error {
	for {
		m, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := fn(m); err != nil {
			return err
		}
	}
}

// Mask is what an update is limited to: nil, which is everything, without fields.
func Mask(fields []string) *fieldmaskpb.FieldMask {
	if len(fields) == 0 {
		return nil
	}
	return &fieldmaskpb.FieldMask{Paths: fields}
}

// MetricToProto converts one.
func MetricToProto(m task.Metric) *types.Metric {
	return &types.Metric{ID: m.ID, Timestamp: TimeToProto(m.At), Data: AnyToProto(m.Data)}
}

// MetricFromProto converts one; nil is the zero metric.
func MetricFromProto(m *types.Metric) task.Metric {
	return task.Metric{ID: m.GetID(), At: TimeFromProto(m.GetTimestamp()), Data: AnyFromProto(m.GetData())}
}

// Missing is the error for a message that a request must have and does not
// (contract 15, row 13).
func Missing(field string) error {
	return fmt.Errorf("field %q is required: %w", field, errdefs.ErrInvalidArgument)
}

// AnyToProto returns nil for the zero Any.
func AnyToProto(a typed.Any) *anypb.Any {
	if a.IsZero() {
		return nil
	}
	return &anypb.Any{TypeUrl: a.URL, Value: a.Value}
}

// AnyFromProto drops the prefix that some clients put before a type's name
// (contract 1.2.10, 13.1).
func AnyFromProto(a *anypb.Any) typed.Any {
	if a == nil {
		return typed.Any{}
	}
	return typed.Any{URL: strings.TrimPrefix(a.TypeUrl, "type.googleapis.com/"), Value: a.Value}
}

// AnysToProto converts a map.
func AnysToProto(m map[string]typed.Any) map[string]*anypb.Any {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]*anypb.Any, len(m))
	for k, v := range m {
		out[k] = &anypb.Any{TypeUrl: v.URL, Value: v.Value}
	}
	return out
}

// AnysFromProto converts a map.
func AnysFromProto(m map[string]*anypb.Any) map[string]typed.Any {
	if len(m) == 0 {
		return nil
	}
	out := make(map[string]typed.Any, len(m))
	for k, v := range m {
		out[k] = AnyFromProto(v)
	}
	return out
}

// TimeToProto returns nil for the zero time.
func TimeToProto(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

// TimeFromProto returns the zero time for nil.
func TimeFromProto(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

// DescToProto converts the fields that the wire has.
func DescToProto(d ocispec.Descriptor) *types.Descriptor {
	return &types.Descriptor{MediaType: d.MediaType, Digest: d.Digest.String(), Size: d.Size, Annotations: d.Annotations}
}

// DescFromProto does not check anything; nil is the zero descriptor.
func DescFromProto(d *types.Descriptor) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: d.GetMediaType(), Digest: digest.Digest(d.GetDigest()), Size: d.GetSize(), Annotations: d.GetAnnotations()}
}

// MountsToProto converts a list.
func MountsToProto(ms []mount.Mount) []*types.Mount {
	return Each(ms, func(m mount.Mount) *types.Mount {
		return &types.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options}
	})
}

// MountsFromProto converts a list; absent entries are left out.
func MountsFromProto(ms []*types.Mount) []mount.Mount {
	var out []mount.Mount
	for _, m := range ms {
		if m != nil {
			out = append(out, mount.Mount{Type: m.Type, Source: m.Source, Target: m.Target, Options: m.Options})
		}
	}
	return out
}

// PlatformToProto converts one.
func PlatformToProto(p ocispec.Platform) *types.Platform {
	return &types.Platform{OS: p.OS, Architecture: p.Architecture, Variant: p.Variant, OSVersion: p.OSVersion, OSFeatures: p.OSFeatures}
}

// PlatformFromProto converts one; nil is the zero platform.
func PlatformFromProto(p *types.Platform) ocispec.Platform {
	return ocispec.Platform{OS: p.GetOS(), Architecture: p.GetArchitecture(), Variant: p.GetVariant(), OSVersion: p.GetOsVersion(), OSFeatures: p.GetOsFeatures()}
}
