package oci

import (
	"bufio"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
)

// defaultPath is used when neither the image nor the user sets PATH.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

const (
	maxEnvFile = 4 << 20 // bytes of an environment file: the kernel takes less
	maxEnvLine = 1 << 20
)

// MergeEnv puts changes over an environment. "KEY=value" replaces in place or
// is appended, "KEY" without a value removes. Later changes win.
func MergeEnv(base, changes []string) []string {
	type entry struct {
		text string
		gone bool
	}
	entries := make([]entry, 0, len(base)+len(changes))
	index := make(map[string]int, len(base)+len(changes))
	put := func(kv string, change bool) {
		key, _, hasValue := strings.Cut(kv, "=")
		i, ok := index[key]
		switch {
		case change && !hasValue:
			if ok {
				entries[i].gone = true
				delete(index, key)
			}
		case ok:
			entries[i].text = kv
		default:
			index[key] = len(entries)
			entries = append(entries, entry{text: kv})
		}
	}
	for _, kv := range base {
		put(kv, false)
	}
	for _, kv := range changes {
		put(kv, true)
	}
	out := make([]string, 0, len(entries))
	for _, e := range entries {
		if !e.gone {
			out = append(out, e.text)
		}
	}
	return out
}

// checkEnv refuses what cannot be an environment.
func checkEnv(env []string) error {
	for _, kv := range env {
		key, _, _ := strings.Cut(kv, "=")
		if key == "" || strings.ContainsRune(kv, 0) {
			return fmt.Errorf("environment variable %q: want KEY=value without NUL: %w", shorten(kv), errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// ParseEnvFile reads KEY=value lines. Empty lines and those that begin with #
// are left out; a line with only KEY takes the value that lookup has for it,
// and nothing if there is none. Values are taken as they are, quotes and
// spaces included. Bad lines and more than 4 MiB are ErrInvalidArgument with
// the number of the line.
func ParseEnvFile(r io.Reader, lookup func(key string) (string, bool)) ([]string, error) {
	limited := &io.LimitedReader{R: r, N: maxEnvFile + 1}
	sc := bufio.NewScanner(limited)
	sc.Buffer(make([]byte, 0, 4096), maxEnvLine)
	var env []string
	n := 0
	for sc.Scan() {
		n++
		line := strings.TrimSuffix(sc.Text(), "\r")
		if n == 1 {
			line = strings.TrimPrefix(line, "\ufeff")
		}
		line = strings.TrimLeft(line, " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		key, _, hasValue := strings.Cut(line, "=")
		if key == "" || strings.ContainsAny(key, " \t") || strings.ContainsRune(line, 0) {
			return nil, fmt.Errorf("parse environment file: line %d: %q is no KEY=value: %w", n, shorten(line), errdefs.ErrInvalidArgument)
		}
		if hasValue {
			env = append(env, line)
			continue
		}
		if lookup != nil {
			if v, ok := lookup(key); ok {
				env = append(env, key+"="+v)
			}
		}
	}
	if err := sc.Err(); err != nil {
		if err == bufio.ErrTooLong {
			return nil, fmt.Errorf("parse environment file: line %d is longer than %d bytes: %w", n+1, maxEnvLine, errdefs.ErrInvalidArgument)
		}
		return nil, fmt.Errorf("parse environment file: %w", err)
	}
	if limited.N <= 0 {
		return nil, fmt.Errorf("parse environment file: larger than %d bytes: %w", maxEnvFile, errdefs.ErrInvalidArgument)
	}
	return env, nil
}
