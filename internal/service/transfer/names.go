package transfer

import (
	"maps"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	core "github.com/gantryd/gantry/core/transfer"
)

// refSource marks a descriptor of an imported index, whose names come from
// its annotations (contract 1.5.20).
const refSource = "io.containerd.import.ref-source"

// imported marks the images of an archive.
func imported(children []ocispec.Descriptor) []ocispec.Descriptor {
	s := make([]ocispec.Descriptor, len(children))
	for i, c := range children {
		annotations := map[string]string{}
		maps.Copy(annotations, c.Annotations)
		annotations[refSource] = "annotation"
		c.Annotations = annotations
		s[i] = c
	}
	return s
}

// names lists what an image is to be called (contract 6.3.8): complete names
// for what was pulled; for what was imported, its own name if it fits a prefix.
func names(desc ocispec.Descriptor, want core.ImageStore) []string {
	var s []string
	add := func(name string) {
		if name != "" && !slices.Contains(s, name) {
			s = append(s, name)
		}
	}
	if desc.Annotations[refSource] != "annotation" {
		add(want.Name)
		for _, r := range want.References {
			switch {
			case r.IsPrefix || r.Name == "":
			case r.AddDigest:
				add(r.Name + "@" + desc.Digest.String())
			default:
				add(r.Name)
			}
		}
		return s
	}
	for _, r := range want.References {
		if !r.IsPrefix {
			continue
		}
		name := own(desc.Annotations, r)
		add(name)
		if r.AddDigest && r.Name != "" && (name == "" || !r.SkipNamedDigest) {
			add(r.Name + "@" + desc.Digest.String())
		}
	}
	return s
}

// own is the name that an imported image has itself, as far as a prefix allows.
func own(annotations map[string]string, r core.Reference) string {
	if name := annotations["io.containerd.image.name"]; name != "" {
		if r.AllowOverwrite || hasPrefix(name, r.Name) {
			return name
		}
		return ""
	}
	name := annotations[ocispec.AnnotationRefName]
	switch {
	case name == "" || r.Name == "":
		return ""
	case !strings.ContainsAny(name, "/:@"):
		return r.Name + ":" + name
	case r.AllowOverwrite || hasPrefix(name, r.Name):
		return name
	}
	return ""
}
