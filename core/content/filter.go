package content

import (
	"strconv"
	"strings"
)

// Field gives a filter a blob's fields (contract 1.2.8): digest, size in
// decimal, labels.<key>.
func (i Info) Field(path []string) (string, bool) {
	if len(path) == 0 {
		return "", false
	}
	switch path[0] {
	case "digest":
		return i.Digest.String(), len(path) == 1
	case "size":
		return strconv.FormatInt(i.Size, 10), len(path) == 1
	case "labels":
		v, ok := i.Labels[strings.Join(path[1:], ".")]
		return v, ok
	}
	return "", false
}

// Field gives a filter an ingest's fields (contract 1.2.8): ref.
func (s Status) Field(path []string) (string, bool) {
	if len(path) == 1 && path[0] == "ref" {
		return s.Ref, true
	}
	return "", false
}
