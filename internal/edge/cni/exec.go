package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

const (
	maxAnswer = 4 << 20
	maxStderr = 16 << 10 // also of what an answer says is wrong
	// killedFor is how long a killed plugin is waited for: one that the kernel
	// does not let go is left to itself.
	killedFor = 5 * time.Second
	// callEnv marks the processes of one call, wherever they went.
	callEnv = "GANTRY_CNI_CALL"
)

// plugins runs plugins so that none outlives its call's deadline. It is what
// libcni runs them with.
type plugins struct {
	version.PluginDecoder
	log *slog.Logger
}

func (p *plugins) FindInPath(plugin string, paths []string) (string, error) {
	path, err := invoke.FindInPath(plugin, paths)
	if err != nil {
		return "", fmt.Errorf("plugin %q is not in %q: %w", plugin, paths, errdefs.ErrNotFound)
	}
	return path, nil
}

// ExecPlugin runs one command. At ctx's end the plugin is killed, and all that
// it started.
func (p *plugins) ExecPlugin(ctx context.Context, path string, conf []byte, env []string) ([]byte, error) {
	for try := 1; ; try++ {
		out, err := p.once(ctx, path, conf, env)
		if !errors.Is(err, syscall.ETXTBSY) || try > 25 {
			return out, err
		}
		select { // it is being replaced
		case <-ctx.Done():
			return nil, err
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func (p *plugins) once(ctx context.Context, path string, conf []byte, env []string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("not started: %w", err)
	}
	name, command := filepath.Base(path), lookup(env, "CNI_COMMAND")
	call := fmt.Sprintf("%s=%d.%d", callEnv, os.Getpid(), time.Now().UnixNano())
	start := time.Now()
	stdout, stderr := &bounded{max: maxAnswer}, &bounded{max: maxStderr}
	cmd := exec.Command(path)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = append(slices.Clone(env), call), bytes.NewReader(conf), stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = time.Second // for what a plugin left behind with its output open
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start plugin %s: %w", name, err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	var err error
	select {
	case err = <-ended:
	case <-ctx.Done():
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		kill(func(environ []string) bool { return slices.Contains(environ, call) })
		state := "killed"
		select {
		case <-ended:
		case <-time.After(killedFor):
			state = "killed, but the kernel does not let it go,"
		}
		return nil, fmt.Errorf("%s by plugin %s: %s after %s: %w", command, name, state, time.Since(start).Round(time.Millisecond), context.Cause(ctx))
	}
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil // it ended well
	}
	if err == nil {
		if stdout.over {
			return nil, fmt.Errorf("%s by plugin %s: the answer is longer than %d bytes: %w", command, name, maxAnswer, errdefs.ErrResourceExhausted)
		}
		if holes(stdout.buf.Bytes()) {
			return nil, fmt.Errorf("%s by plugin %s: null among the interfaces, addresses or routes of its answer", command, name)
		}
		if stderr.buf.Len() > 0 {
			p.log.Debug("network plugin", "plugin", name, "command", command, "id", lookup(env, "CNI_CONTAINERID"), "stderr", stderr.buf.String())
		}
		return stdout.buf.Bytes(), nil
	}
	err = answer(err, stdout.buf.Bytes(), stderr.buf.String())
	if command == "DEL" && gone(err.Error(), lookup(env, "CNI_NETNS")) {
		// What is to be deleted is not there. The other plugins of the list go on.
		p.log.Info("network plugin finds nothing to delete", "plugin", name, "id", lookup(env, "CNI_CONTAINERID"), "err", err)
		return nil, nil
	}
	return nil, err
}

// holes says whether an answer has null where the library, which converts it,
// follows a pointer.
func holes(stdout []byte) bool {
	var r struct{ Interfaces, IPs, Routes []*json.RawMessage }
	_ = json.Unmarshal(stdout, &r) // what else is wrong with it the library says
	return slices.Contains(slices.Concat(r.Interfaces, r.IPs, r.Routes), nil)
}

// answer is the error that a plugin reports, or what can be told of it.
func answer(err error, stdout []byte, stderr string) error {
	var e types.Error
	if len(stdout) > 0 && json.Unmarshal(stdout, &e) == nil && (e.Msg != "" || e.Code != 0) {
		e.Msg, e.Details = e.Msg[:min(len(e.Msg), maxStderr)], e.Details[:min(len(e.Details), maxStderr)]
		return &e
	}
	if said := strings.TrimSpace(stderr + " " + string(stdout[:min(len(stdout), 1024)])); said != "" {
		return fmt.Errorf("%w: %q", err, said)
	}
	return err
}

// gone says whether a failed deletion is one of something that is not there,
// as containerd decides it, but for a program that the plugin misses.
func gone(msg, netns string) bool {
	if strings.Contains(msg, "executable file not found") || strings.Contains(msg, "command not found") {
		return false
	}
	return strings.Contains(msg, "not found") || netns == "" && strings.Contains(msg, "no such file or directory")
}

func lookup(env []string, name string) string {
	for _, kv := range slices.Backward(env) {
		if v, ok := strings.CutPrefix(kv, name+"="); ok {
			return v
		}
	}
	return ""
}

// kill ends the processes with such an environment, and those that they start
// meanwhile. It gives up waiting when the kernel is slow to show or to end one.
func kill(match func(environ []string) bool) {
	done, over := make(chan struct{}), time.Now().Add(killedFor)
	go func() {
		defer close(done)
		for scan(match) && time.Now().Before(over) {
			time.Sleep(time.Millisecond)
		}
	}()
	select {
	case <-done:
	case <-time.After(killedFor):
	}
}

// scan kills those that are there now, and says whether there were any.
func scan(match func(environ []string) bool) (found bool) {
	dir, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil || pid == os.Getpid() {
			continue
		}
		// The descriptor keeps the pid from meaning another process.
		proc, err := os.FindProcess(pid)
		if err != nil {
			continue
		}
		data, err := os.ReadFile("/proc/" + name + "/environ")
		if err == nil && match(strings.Split(string(data), "\x00")) {
			_ = proc.Kill()
			found = true
		}
		_ = proc.Release()
	}
	return found
}

// bounded keeps what is written up to max bytes, and drops the rest. The buffer
// is not embedded: whoever copies to it would use its ReadFrom, which has no bound.
type bounded struct {
	buf  bytes.Buffer
	max  int
	over bool
}

func (b *bounded) Write(p []byte) (int, error) {
	room := b.max - b.buf.Len()
	b.over = b.over || len(p) > room
	b.buf.Write(p[:min(len(p), room)])
	return len(p), nil
}
