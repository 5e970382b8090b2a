package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/spf13/cobra"

	"github.com/gantryd/gantry/client"
	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/image"
	"github.com/gantryd/gantry/core/task"
	"github.com/gantryd/gantry/core/typed"
	"github.com/gantryd/gantry/core/view"
)

// inspected is a container as inspect shows it: the record with its spec
// decoded, and the task.
type inspected struct {
	Namespace string `json:"namespace"`
	container.Container
	Runtime inspectedRuntime `json:"runtime"` // hides the record's
	Spec    json.RawMessage  `json:"spec,omitempty"`
	Task    *task.Process    `json:"task"`
	Log     string           `json:"log,omitempty"`
}

type inspectedRuntime struct {
	Name    string     `json:"name"`
	Binary  string     `json:"binary,omitempty"`
	Options *typed.Any `json:"options,omitempty"`
}

// inspectedImage is an image with what its blobs say.
type inspectedImage struct {
	Namespace string `json:"namespace"`
	image.Image
	Info    *client.ImageInfo `json:"content,omitempty"`
	Missing string            `json:"missing,omitempty"`
}

func (a *app) inspectCommand() *cobra.Command {
	var kind, platform string
	cmd := &cobra.Command{
		Use: "inspect NAME...", Short: "Show all about containers and images, as JSON", GroupID: "run", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx := cmd.Context()
			if kind != "" && kind != "container" && kind != "image" {
				return fmt.Errorf("--type %q: use container or image", kind)
			}
			v, err := a.view(ctx)
			if err != nil {
				return err
			}
			list := []any{}
			all := every(args, func(ref string) error {
				o, err := a.inspect(ctx, v, ref, kind, platform)
				if err == nil {
					list = append(list, o)
				}
				return err
			})
			return errors.Join(a.json(list), all)
		},
	}
	cmd.Flags().StringVar(&kind, "type", "", "`kind` of object: container or image")
	cmd.Flags().StringVar(&platform, "platform", "", "`os/arch` of an image that has several (the host's)")
	return cmd
}

func (a *app) inspect(ctx context.Context, v view.View, ref, kind, platform string) (any, error) {
	var absent error
	if kind != "image" {
		c, err := a.find(ctx, v, ref)
		if err == nil {
			return inspectContainer(ctx, v, c)
		}
		// What is no id can still be an image's name.
		if kind != "" || !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
			return nil, err
		}
		absent = err
	}
	img, err := a.findImage(ctx, v, ref)
	switch {
	case err == nil:
	case absent != nil && errdefs.IsNotFound(err):
		var h *hinted
		if errors.As(err, &h) {
			return nil, err
		}
		if errors.As(absent, &h) {
			return nil, &hinted{fmt.Errorf("no container or image %q: %w", ref, errdefs.ErrNotFound), h.hint}
		}
		return nil, fmt.Errorf("no container or image %q: %w", ref, errdefs.ErrNotFound)
	default:
		return nil, err
	}
	p, err := parsePlatform(platform)
	if err != nil {
		return nil, err
	}
	o := inspectedImage{Namespace: string(v.Namespace()), Image: img}
	if info, err := client.InspectImage(ctx, v, img.Name, p); err != nil {
		o.Missing = err.Error()
	} else {
		o.Info = &info
	}
	return o, nil
}

func inspectContainer(ctx context.Context, v view.View, c container.Container) (any, error) {
	o := inspected{Namespace: string(v.Namespace()), Container: c, Runtime: inspectedRuntime{Name: c.Runtime.Name}}
	if json.Valid(c.Spec.Value) {
		o.Spec = c.Spec.Value
	}
	if opts := client.DecodeRuncOptions(c.Runtime.Options); opts != nil {
		o.Runtime.Binary = opts.BinaryName
	}
	if !c.Runtime.Options.IsZero() {
		o.Runtime.Options = &c.Runtime.Options
	}
	p, err := v.Tasks().Get(ctx, c.ID, "")
	switch {
	case err == nil:
		o.Task = &p
	case !errdefs.IsNotFound(err):
		return nil, err
	}
	o.Log, _ = logFiles(c, p.IO.Stdout)
	return o, nil
}
