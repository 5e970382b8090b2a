package shimclient

import (
	"bytes"
	"encoding/json"
	"fmt"
	"strings"

	bootapi "github.com/containerd/containerd/api/runtime/bootstrap/v1"
	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/internal/edge/wire"
)

// legacy says whether a shim is of the two kinds that read the options from
// stdin instead of the parameters (contract 5.2.3, 5.2.4).
func legacy(shim string) bool {
	return strings.Contains(shim, "shim-runc-v1") || strings.Contains(shim, "shim-runhcs-v1")
}

// bootstrapInput is what a shim's start reads; old is for shims that know the
// options only.
func (m *Manager) bootstrapInput(k key, old bool, options typed.Any) ([]byte, error) {
	if old {
		if options.IsZero() {
			return nil, nil
		}
		return proto.Marshal(wire.AnyToProto(options))
	}
	p := &bootapi.BootstrapParams{
		InstanceID:             string(k.id),
		Namespace:              string(k.ns),
		ContainerdVersion:      m.opt.Version,
		ContainerdTtrpcAddress: m.opt.TTRPCAddress,
		ContainerdGrpcAddress:  m.opt.GRPCAddress,
		ContainerdBinary:       m.opt.SelfPath,
	}
	if m.opt.Debug {
		p.LogLevel = bootapi.LogLevel_LOG_LEVEL_DEBUG
	}
	if m.opt.SocketDir != "" {
		p.SocketDir = &m.opt.SocketDir
	}
	if !options.IsZero() {
		p.Extensions = append(p.Extensions, &bootapi.Extension{Value: wire.AnyToProto(options)})
	}
	return proto.Marshal(p)
}

// parseBootstrap finds a shim's answer in what its start wrote: a
// BootstrapResult, JSON, or a bare address (contract 5.2.5). Shims and the
// runtimes that they call write other things as well, so what is on stdout is
// taken first, and lines around the answer are ignored.
func parseBootstrap(stdout, stderr []byte) (endpoint, error) {
	for _, out := range [][]byte{stdout, stderr} {
		if e, ok := findProto(out); ok {
			return e.normal(), e.normal().known()
		}
		if e, ok := findText(out); ok {
			return e.normal(), e.normal().known()
		}
	}
	return endpoint{}, fmt.Errorf("no address in the shim's output %q: %w", excerpt(stdout, stderr), errdefs.ErrInvalidArgument)
}

func findText(out []byte) (found endpoint, ok bool) {
	var e endpoint
	// JSON may be spread over lines.
	if i := bytes.IndexByte(out, '{'); i >= 0 {
		if json.NewDecoder(bytes.NewReader(out[i:])).Decode(&e) == nil && e.Address != "" {
			return e, true
		}
	}
	for line := range bytes.Lines(out) {
		line = bytes.TrimSpace(line)
		if i := bytes.IndexByte(line, '{'); i >= 0 {
			var e endpoint
			if json.Unmarshal(line[i:], &e) == nil && e.Address != "" {
				found, ok = e, true
				continue
			}
		}
		if isAddress(string(line)) {
			found, ok = endpoint{Version: 2, Protocol: "ttrpc", Address: string(line)}, true
		}
	}
	return found, ok
}

func isAddress(s string) bool {
	if len(s) == 0 || len(s) > 512 || strings.ContainsAny(s, " \t\n\"") {
		return false
	}
	_, _, err := splitAddress(strings.TrimPrefix(strings.TrimPrefix(s, "ttrpc+"), "grpc+"))
	return err == nil
}

// findProto looks for a BootstrapResult. Its first field is the version, a
// small number, so every place that could be one is tried; it may be followed
// by other output, so reading ends at what is no field of it.
func findProto(out []byte) (endpoint, bool) {
	for i := 0; i+4 < len(out); i++ {
		if out[i] == 0x08 && out[i+1] < 0x20 && out[i+2] == 0x12 || out[i] == 0x12 && i == 0 {
			if e, ok := readProto(out[i:]); ok {
				return e, true
			}
		}
	}
	return endpoint{}, false
}

func readProto(b []byte) (e endpoint, ok bool) {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			break
		}
		if num == 1 && typ == protowire.VarintType {
			v, vn := protowire.ConsumeVarint(b[n:])
			if vn < 0 || v > 1<<16 {
				break
			}
			e.Version = int(v)
			b = b[n+vn:]
			continue
		}
		if num < 1 || num > 6 || typ != protowire.BytesType {
			break
		}
		v, vn := protowire.ConsumeBytes(b[n:])
		if vn < 0 {
			break
		}
		switch num {
		case 2:
			e.Address = string(v)
		case 3:
			e.Protocol = string(v)
		}
		b = b[n+vn:]
	}
	return e, isAddress(e.Address)
}

// excerpt is output for an error message.
func excerpt(parts ...[]byte) string {
	s := strings.TrimSpace(string(bytes.Join(parts, []byte(" "))))
	if len(s) > 2048 {
		s = s[:2048] + "..."
	}
	return s
}
