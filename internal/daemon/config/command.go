package config

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
)

// WriteDefault prints the default configuration (`config default`). Its
// imports line is only here: drop-ins load when the loaded file lists them.
func WriteDefault(w io.Writer) error {
	_, err := w.Write(marshal(defaultTree(), false))
	return err
}

// WriteDump prints the effective configuration: files, imports, flags and
// defaults in one (`config dump`).
func WriteDump(w io.Writer, c *Config) error {
	t := c.effective()
	// The dump already holds what was imported.
	delete(t.table, "imports")
	_, err := w.Write(marshal(t, false))
	return err
}

// WriteEffective prints the same with the origin of each value as a comment
// (`config effective`).
func WriteEffective(w io.Writer, c *Config) error {
	_, err := w.Write(c.Marshal(true))
	return err
}

// WriteMigrated prints one file brought to the current version, without its
// imports and without defaults (`config migrate`). An empty path is
// DefaultPath; a missing file is ErrNotFound.
func WriteMigrated(w io.Writer, path string) ([]Warning, error) {
	path = cmp.Or(path, DefaultPath)
	data, err := readFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("migrate configuration %s: %w", path, err)
	}
	out, ws, err := Migrate(path, data)
	if err != nil {
		return ws, err
	}
	_, err = w.Write(out)
	return ws, err
}

// Migrate brings the text of a file to the current version; file is its name
// in messages. Errors are those of Load.
func Migrate(file string, data []byte) ([]byte, []Warning, error) {
	tree, _, ws, err := migrateFile(file, data)
	if err != nil {
		return nil, ws, err
	}
	return marshal(tree, false), ws, nil
}

// CheckOptions say what Check holds a file against.
type CheckOptions struct {
	Options
	// ForVersion is the newest file version that a reader understands, 0 for
	// Current: a file for it must not be newer.
	ForVersion int
	// Components are the blocks that the daemon implements: plugin URI to a
	// pointer to a struct with the defaults.
	Components map[string]any
}

// Check loads a configuration without a daemon, prints one line a finding and
// returns how many there are (`config check`). The error is that of Load, in
// strict mode also for findings.
func Check(w io.Writer, path string, opt CheckOptions) (int, error) {
	lenient := opt.Options
	lenient.Strict = false
	c, ws, err := Load(path, lenient)
	if err == nil {
		more, serr := c.check(opt)
		ws, err = append(ws, more...), serr
	}
	for _, f := range ws {
		fmt.Fprintln(w, f)
	}
	if err != nil {
		return len(ws), err
	}
	if opt.Strict {
		return len(ws), strictError(ws)
	}
	return len(ws), nil
}

func (c *Config) check(opt CheckOptions) ([]Warning, error) {
	if opt.ForVersion != 0 && c.Version > opt.ForVersion {
		file := DefaultPath
		if len(c.Files) > 0 {
			file = filepath.Clean(c.Files[0])
		}
		return nil, fmt.Errorf("check %s: it has version %d, a reader of version %d refuses it: %w", file, c.Version, opt.ForVersion, errdefs.ErrFailedPrecondition)
	}
	_, ws, err := c.Servers()
	if err != nil {
		return ws, err
	}
	for _, uri := range slices.Sorted(maps.Keys(opt.Components)) {
		more, err := c.Decode(uri, opt.Components[uri])
		ws = append(ws, more...)
		if err != nil {
			return ws, err
		}
	}
	more, err := c.Rest()
	return append(ws, more...), err
}
