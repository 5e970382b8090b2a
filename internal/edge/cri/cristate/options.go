package cristate

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	runcoptions "github.com/containerd/containerd/api/types/runc/options"
	runtimeoptions "github.com/containerd/containerd/api/types/runtimeoptions/v1"
	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/typed"
)

// runcType is the runtime whose options are runc's; all others get the general
// form, with what they do not know in its body.
const runcType = "io.containerd.runc.v2"

// Record makes of a handler what container and sandbox records hold. The
// options are written in the file by the names of the message's fields, as in
// BinaryName; one that the runtime does not know is left out, as older files
// have some. ErrInvalidArgument names the one whose value is wrong.
func (r Runtime) Record() (container.Runtime, error) {
	out := container.Runtime{Name: r.Type}
	if r.Path != "" {
		out.Name = r.Path
	}
	if len(r.Options) == 0 {
		return out, nil
	}
	var m proto.Message = &runcoptions.Options{}
	if r.Type != runcType {
		general := &runtimeoptions.Options{}
		m = general
		if _, ok := r.Options["ConfigPath"]; !ok {
			body, err := toml.Marshal(r.Options)
			if err != nil {
				return out, fmt.Errorf("options of runtime %s: %v: %w", r.Type, err, errdefs.ErrInvalidArgument)
			}
			general.ConfigBody = body
		}
	}
	msg := m.ProtoReflect()
	for key, v := range r.Options {
		field := fieldOf(msg.Descriptor(), key)
		if field == nil {
			continue
		}
		value, ok := convert(field.Kind(), v)
		if !ok {
			return out, fmt.Errorf("option %s of runtime %s: %v is of the wrong type, want %s: %w", key, r.Type, v, field.Kind(), errdefs.ErrInvalidArgument)
		}
		msg.Set(field, value)
	}
	data, err := proto.Marshal(m)
	if err != nil {
		return out, fmt.Errorf("options of runtime %s: %v: %w", r.Type, err, errdefs.ErrInvalidArgument)
	}
	out.Options = typed.Any{URL: string(msg.Descriptor().FullName()), Value: data}
	return out, nil
}

func fieldOf(d protoreflect.MessageDescriptor, option string) protoreflect.FieldDescriptor {
	for i := range d.Fields().Len() {
		if f := d.Fields().Get(i); camel(string(f.Name())) == option {
			return f
		}
	}
	return nil
}

// unknownOptions are those of runc that there are not; of what other runtimes
// have, only they know.
func (r Runtime) unknownOptions() []string {
	var out []string
	for _, key := range slices.Sorted(maps.Keys(r.Options)) {
		if r.Type == runcType && fieldOf((&runcoptions.Options{}).ProtoReflect().Descriptor(), key) == nil {
			out = append(out, key)
		}
	}
	return out
}

// camel makes BinaryName of binary_name.
func camel(s string) string {
	var b strings.Builder
	for part := range strings.SplitSeq(s, "_") {
		if part != "" {
			b.WriteString(strings.ToUpper(part[:1]) + part[1:])
		}
	}
	return b.String()
}

func convert(kind protoreflect.Kind, v any) (protoreflect.Value, bool) {
	switch v := v.(type) {
	case string:
		if kind == protoreflect.BytesKind {
			return protoreflect.ValueOfBytes([]byte(v)), true
		}
		return protoreflect.ValueOfString(v), kind == protoreflect.StringKind
	case bool:
		return protoreflect.ValueOfBool(v), kind == protoreflect.BoolKind
	case int64:
		switch kind {
		case protoreflect.Uint32Kind:
			return protoreflect.ValueOfUint32(uint32(v)), v >= 0 && v <= math.MaxUint32
		case protoreflect.Int32Kind:
			return protoreflect.ValueOfInt32(int32(v)), v >= math.MinInt32 && v <= math.MaxInt32
		case protoreflect.Int64Kind:
			return protoreflect.ValueOfInt64(v), true
		}
	}
	return protoreflect.Value{}, false
}

// SystemdCgroup says that the runtime makes cgroups through systemd.
func (r Runtime) SystemdCgroup() bool {
	on, ok := r.Options["SystemdCgroup"].(bool)
	return ok && on
}

// Runc says that the runtime has runc's options.
func (r Runtime) Runc() bool { return r.Type == runcType }

// VM says that the runtime puts pods into virtual machines, whose processes
// have an SELinux type of their own (contract 10.7).
func (r Runtime) VM() bool { return strings.HasPrefix(r.Type, "io.containerd.kata.") }
