package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/gantryd/gantry/internal/edge/cri/crispec"
)

// appArmorWithin is how long the parser may take to load the profile.
const appArmorWithin = 15 * time.Second

// appArmor keeps the default profile of containers in the kernel (contract 10.6).
type appArmor struct {
	mu   sync.Mutex // guards said, and keeps two loads apart
	said bool
}

// ready loads the profile unless the kernel has it. usable is false, and that
// is said once, where the host has no AppArmor: without its parser it has none.
func (a *appArmor) ready(ctx context.Context, log *slog.Logger) (usable bool, err error) {
	if b, err := os.ReadFile("/sys/module/apparmor/parameters/enabled"); err != nil || !strings.HasPrefix(string(b), "Y") {
		return false, nil
	}
	if appArmorLoaded(crispec.AppArmorDefault) {
		return true, nil
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	parser, err := appArmorParser()
	if err != nil {
		if !a.said {
			log.Warn("containers are not confined by AppArmor, which the kernel has", "error", err)
		}
		a.said = true
		return false, nil
	}
	if appArmorLoaded(crispec.AppArmorDefault) {
		return true, nil
	}
	text, err := crispec.AppArmorProfile(crispec.AppArmorDefault, appArmorFacts())
	if err != nil {
		return true, err
	}
	ctx, cancel := context.WithTimeout(ctx, appArmorWithin)
	defer cancel()
	// -K: what an older policy left in a cache is not used, and nothing is left there.
	cmd := exec.CommandContext(ctx, parser, "-K", "-r")
	cmd.Stdin = strings.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		return true, fmt.Errorf("load AppArmor profile %s: %s: %v: %.500s: %w", crispec.AppArmorDefault, parser, err, strings.TrimSpace(string(out)), errdefs.ErrFailedPrecondition)
	}
	log.Info("AppArmor profile is loaded", "profile", crispec.AppArmorDefault)
	return true, nil
}

// appArmorParser finds the program, also where PATH does not have those of
// administrators.
func appArmorParser() (string, error) {
	if path, err := exec.LookPath("apparmor_parser"); err == nil {
		return path, nil
	}
	for _, path := range []string{"/sbin/apparmor_parser", "/usr/sbin/apparmor_parser"} {
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("apparmor_parser is not installed: %w", errdefs.ErrNotFound)
}

// appArmorFacts are those of the host's own policy.
func appArmorFacts() crispec.AppArmorFacts {
	var f crispec.AppArmorFacts
	exists := func(name string) bool {
		_, err := os.Stat("/etc/apparmor.d/" + name)
		return err == nil
	}
	f.Tunables, f.Base = exists("tunables/global"), exists("abstractions/base")
	// The oldest that is known: the rules ask for nothing that later ones have.
	for _, abi := range []string{"3.0", "4.0"} {
		if exists("abi/" + abi) {
			f.ABI = abi
			break
		}
	}
	// Shims and runtimes, who signal containers, are confined as the daemon is.
	if b, err := os.ReadFile("/proc/self/attr/current"); err == nil {
		if name, _, _ := strings.Cut(strings.Trim(string(b), "\x00\n"), " ("); name != "" && name != "unconfined" {
			f.Peers = append(f.Peers, name)
		}
	}
	return f
}

// appArmorLoaded says that the kernel has a profile.
func appArmorLoaded(profile string) bool {
	b, err := os.ReadFile("/sys/kernel/security/apparmor/profiles")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if strings.HasPrefix(line, profile+" (") {
			return true
		}
	}
	return false
}
