// Package typed is a value that travels under the name of its type: what the
// wire calls google.protobuf.Any. Gantry passes such values through untouched
// when it does not know them, which is what lets shims, snapshotters and
// clients carry options that this program has never heard of.
package typed

// Any is an encoded value and the name of its type. URL has no
// "type.googleapis.com/" prefix (contract 1.2.10). The zero Any means absent.
type Any struct {
	URL   string `json:"type_url"`
	Value []byte `json:"value,omitempty"`
}

// IsZero reports whether there is no value.
func (a Any) IsZero() bool { return a.URL == "" && len(a.Value) == 0 }
