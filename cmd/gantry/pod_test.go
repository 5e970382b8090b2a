package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/image"
)

func TestParseForward(t *testing.T) {
	for s, want := range map[string]forwarded{"80": {80, 80}, "8080:80": {8080, 80}, ":80": {0, 80}, "0:80": {0, 80}, "65535:1": {65535, 1}} {
		if got, err := parseForward(s); err != nil || got != want {
			t.Errorf("%q: %v %v", s, got, err)
		}
	}
	for _, s := range []string{"", ":", "0", "80:", "80:0", "65536", "-1", "+80", "http", "1:2:3", "80 ", "127.0.0.1:80:80"} {
		if got, err := parseForward(s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v %v", s, got, err)
		}
	}
}

func TestRemoteStatus(t *testing.T) {
	for _, c := range []struct {
		text string
		code uint32
		err  string
	}{
		{`{"status":"Success"}`, 0, ""},
		{`{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"137"}]}}`, 137, ""},
		{`{"status":"Failure","reason":"InternalError","message":"Internal error occurred: no such file"}`, 0, "no such file"},
		{`{"status":"Failure","details":{"causes":[{"reason":"ExitCode","message":"many"}]}}`, 0, `exit code "many"`},
		{`plain words`, 0, "plain words"},
	} {
		code, err := remoteStatus([]byte(c.text))
		if code != c.code || (err == nil) != (c.err == "") || err != nil && !strings.HasPrefix(err.Error(), c.err) {
			t.Errorf("%s: %d %v", c.text, code, err)
		}
	}
}

// An image is listed once for each name that it has, and never only to repeat
// its digest.
// promise: P52
func TestOnce(t *testing.T) {
	a, b, c := digest.FromString("a"), digest.FromString("b"), digest.FromString("c")
	id := func(s string) string { return digest.FromString(s).String() }
	var list []image.Image
	for _, x := range []struct {
		name string
		of   digest.Digest
	}{
		{id("config of a"), a}, {"r/a:1", a}, {"r/a:2", a}, {"r/a@" + a.String(), a}, // tags
		{id("config of b"), b}, {"r/b@" + b.String(), b}, // pulled by digest
		{id("config of c"), c}, // nothing else is left
	} {
		list = append(list, image.Image{Name: x.name, Target: ocispec.Descriptor{Digest: x.of}})
	}
	kept, also := once(list)
	var names []string
	for _, k := range kept {
		names = append(names, k.Name)
	}
	if want := []string{"r/a:1", "r/a:2", "r/b@" + b.String(), id("config of c")}; !slices.Equal(names, want) {
		t.Errorf("%q", names)
	}
	if !slices.Equal(also["r/a:1"], []string{id("config of a"), "r/a@" + a.String()}) || len(also["r/b@"+b.String()]) != 1 || len(also) != 2 {
		t.Errorf("%q", also)
	}
}

// sickCRI is a daemon that cannot say how one pod is, and has just lost another.
type sickCRI struct{ runtime.RuntimeServiceClient }

func (sickCRI) ListContainers(context.Context, *runtime.ListContainersRequest, ...grpc.CallOption) (*runtime.ListContainersResponse, error) {
	return &runtime.ListContainersResponse{}, nil
}

func (sickCRI) PodSandboxStatus(_ context.Context, r *runtime.PodSandboxStatusRequest, _ ...grpc.CallOption) (*runtime.PodSandboxStatusResponse, error) {
	switch r.PodSandboxId {
	case "sick":
		return nil, fmt.Errorf("its shim does not answer: %w", context.DeadlineExceeded)
	case "gone":
		return nil, errdefs.ErrNotFound
	}
	return &runtime.PodSandboxStatusResponse{Status: &runtime.PodSandboxStatus{Network: &runtime.PodSandboxNetworkStatus{Ip: "10.0.0.1"}}}, nil
}

// One sick pod does not keep the others from being listed.
func TestRowsOfSickPod(t *testing.T) {
	var found []*runtime.PodSandbox
	for _, id := range []string{"a", "gone", "sick", "z"} {
		found = append(found, &runtime.PodSandbox{Id: id, Metadata: &runtime.PodSandboxMetadata{Namespace: "n", Name: id}})
	}
	rows, err := (&pods{RuntimeServiceClient: sickCRI{}}).rows(t.Context(), found)
	if err == nil || err.Error() != "status of pod n/sick: its shim does not answer: context deadline exceeded" {
		t.Error(err)
	}
	if len(rows) != 3 || rows[0].IPs[0] != "10.0.0.1" || rows[1].ID != "sick" || len(rows[1].IPs) != 0 || rows[2].IPs[0] != "10.0.0.1" {
		t.Errorf("%+v", rows)
	}
}

func TestShortIDsInErrors(t *testing.T) {
	id := strings.Repeat("0123456789abcdef", 4)
	for text, want := range map[string]string{
		"container " + id + ": task k8s.io/" + id + ": no": "container 0123456789ab: task k8s.io/0123456789ab: no",
		`container "` + id + `": not found`:                `container "0123456789ab": not found`,
		"open /run/x/k8s.io/" + id + "/log: no":            "open /run/x/k8s.io/" + id + "/log: no",
		"blob sha256:" + id + ": not found":                "blob sha256:" + id + ": not found",
		id + "0 is too long":                               id + "0 is too long",
	} {
		if got := legible(text); got != want {
			t.Errorf("%q: %q", text, got)
		}
	}
}
