package shimclient

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// shimLog reads what a shim writes to its log FIFO and logs it. A shim blocks
// if nobody reads, so reading begins before the shim is started and goes on as
// long as there is a link to it, even after the bundle with the FIFO's name is
// gone (contract 5.2.8, 13.19).
type shimLog struct{ f *os.File }

// openLog starts to drain the bundle's FIFO. It is opened for writing as well,
// so that a shim that reopens it does not end the reading.
func (m *Manager) openLog(k key, b bundle) (*shimLog, error) {
	f, err := os.OpenFile(b.file(fileLog), os.O_RDWR|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("open shim log: %w", err)
	}
	if info, err := f.Stat(); err != nil || info.Mode().Type() != os.ModeNamedPipe {
		f.Close()
		return nil, fmt.Errorf("open shim log: %s is not a FIFO", b.file(fileLog))
	}
	s := &shimLog{f}
	log := m.log.With("namespace", k.ns, "id", k.id, "source", "shim")
	m.spawn(func() {
		r := bufio.NewReaderSize(f, 4<<10) // one a shim
		for {
			line, err := r.ReadSlice('\n') // a longer line is logged in parts
			if len(line) > 0 {
				logLine(log, strings.TrimRight(string(line), "\r\n"))
			}
			if err != nil && err != bufio.ErrBufferFull {
				return // closed
			}
		}
	})
	return s, nil
}

func (s *shimLog) close() { s.f.Close() }

// keepLog lets the link drain logs as long as it lasts, if it has no other: a
// shim has the log of the container that it was started for.
func (l *link) keepLog(logs *shimLog) {
	l.mu.Lock()
	if l.logs == nil && !l.isOver {
		l.logs, logs = logs, nil
	}
	l.mu.Unlock()
	if logs != nil {
		logs.close()
	}
}

// logLine logs a shim's line under the level and with the message it has, in
// either of the two forms that shims use; other lines as they are.
func logLine(log *slog.Logger, line string) {
	if strings.TrimSpace(line) == "" {
		return
	}
	level, msg := "", line
	if line[0] == '{' {
		var j struct{ Level, Msg string }
		if json.Unmarshal([]byte(line), &j) == nil && j.Msg != "" {
			level, msg = j.Level, j.Msg
		}
	} else if _, rest, ok := strings.Cut(line, "level="); ok {
		level, _, _ = strings.Cut(rest, " ")
	}
	log.Log(context.Background(), slogLevel(level), msg)
}

func slogLevel(name string) slog.Level {
	switch strings.ToLower(name) {
	case "trace", "debug":
		return slog.LevelDebug
	case "warn", "warning":
		return slog.LevelWarn
	case "error", "fatal", "panic":
		return slog.LevelError
	}
	return slog.LevelInfo
}
