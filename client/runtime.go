package client

import (
	"fmt"

	"github.com/containerd/containerd/api/types/runc/options"
	"google.golang.org/protobuf/proto"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/typed"
)

// RuncOptionsURL is the type of the options of DefaultRuntime (contract 5.3.10).
const RuncOptionsURL = "containerd.runc.v1.Options"

// CommandRuntime is DefaultRuntime with the command line of an external OCI
// runtime instead of the shim's own: a name that the shim finds on its PATH, or
// a path.
func CommandRuntime(binary string) (container.Runtime, error) {
	b, err := proto.Marshal(&options.Options{BinaryName: binary})
	if err != nil {
		return container.Runtime{}, fmt.Errorf("encode the options of runtime %s: %w", binary, err)
	}
	return container.Runtime{Name: DefaultRuntime, Options: typed.Any{URL: RuncOptionsURL, Value: b}}, nil
}

// DecodeRuncOptions is the reverse: what the options of a container say, nil if
// they are none of this kind.
func DecodeRuncOptions(a typed.Any) *options.Options {
	if a.URL != RuncOptionsURL {
		return nil
	}
	var o options.Options
	if proto.Unmarshal(a.Value, &o) != nil {
		return nil
	}
	return &o
}
