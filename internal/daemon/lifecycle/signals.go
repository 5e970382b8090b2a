package lifecycle

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
)

// Action is what a signal does.
type Action int

// The actions.
const (
	Stop   Action = iota + 1 // orderly end
	Dump                     // write all goroutines to the log and a file
	Ignore                   // nothing, silently
	Reload                   // read the configuration again; until that exists it is logged
)

// Rule is one row of the signal policy.
type Rule struct {
	Signal os.Signal
	Action Action
}

// Policy is what the daemon does with signals (contract 8.2.4, promise P38).
// SIGPIPE is caught and dropped: an ignored signal would be inherited by every
// process that is started.
func Policy() []Rule {
	return []Rule{
		{syscall.SIGTERM, Stop},
		{syscall.SIGINT, Stop},
		{syscall.SIGUSR1, Dump},
		{syscall.SIGPIPE, Ignore},
		{syscall.SIGHUP, Reload},
	}
}

// Signals applies a policy to the process.
type Signals struct {
	Log  *slog.Logger
	Temp string // directory of goroutine dumps, "" is the system's
	// Reload is called for the action of that name; nil only logs.
	Reload func()
	rules  map[os.Signal]Action
	ch     chan os.Signal
}

// Catch begins to catch the policy's signals. Call it first in main: before,
// SIGHUP kills. Signals wait until Run.
func (s *Signals) Catch(rules []Rule) {
	s.rules = make(map[os.Signal]Action, len(rules))
	// Room for bursts; a signal too many is dropped by the runtime, and a
	// second one of a kind says nothing new.
	s.ch = make(chan os.Signal, 32)
	list := make([]os.Signal, 0, len(rules))
	for _, r := range rules {
		s.rules[r.Signal] = r.Action
		list = append(list, r.Signal)
	}
	signal.Notify(s.ch, list...)
}

// Run acts on signals until ctx is done; stop is called for Stop, possibly
// more than once. Afterwards the signals stay caught, so that a SIGHUP during
// the orderly end does not cut it short.
func (s *Signals) Run(ctx context.Context, stop func()) {
	for {
		select {
		case <-ctx.Done():
			return
		case sig := <-s.ch:
			switch s.rules[sig] {
			case Stop:
				s.Log.Info("stopping", "signal", sig.String())
				stop()
			case Dump:
				path, err := s.dump()
				if err != nil {
					s.Log.Error("goroutine dump", "error", err)
				} else {
					s.Log.Info("goroutine stacks written", "path", path)
				}
			case Reload:
				if s.Reload == nil {
					s.Log.Warn("signal has no effect: the configuration cannot be reloaded while the daemon runs, restart it", "signal", sig.String())
				} else {
					s.Reload()
				}
			}
		}
	}
}

// DumpFile is where process pid writes its goroutines.
func DumpFile(temp string, pid int) string {
	if temp == "" {
		temp = os.TempDir()
	}
	return filepath.Join(temp, fmt.Sprintf("gantry.%d.stacks.log", pid))
}

// maxDump bounds a goroutine dump in bytes.
const maxDump = 64 << 20

// dump writes all goroutines to the log and to a file that only the owner can
// read. The name is known to everyone and the directory often open to
// everyone: an existing file is replaced, never written into.
func (s *Signals) dump() (string, error) {
	buf := make([]byte, 256<<10)
	for {
		n := runtime.Stack(buf, true)
		if n < len(buf) || len(buf) >= maxDump {
			buf = buf[:n]
			break
		}
		buf = make([]byte, 2*len(buf))
	}
	s.Log.Info(fmt.Sprintf("=== BEGIN goroutine stack dump ===\n%s\n=== END goroutine stack dump ===", bytes.TrimSpace(buf)))
	path := DumpFile(s.Temp, os.Getpid())
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return "", fmt.Errorf("write goroutine stacks: %w", err)
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fmt.Errorf("write goroutine stacks: %w", err)
	}
	if _, err := f.Write(buf); err != nil {
		f.Close()
		return "", fmt.Errorf("write goroutine stacks: %w", err)
	}
	if err := f.Close(); err != nil {
		return "", fmt.Errorf("write goroutine stacks: %w", err)
	}
	return path, nil
}
