// Command gantryd is the daemon. main.go has flags, subcommands and the life
// of the process; wire.go builds the program.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	ttrpclog "github.com/containerd/log"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"k8s.io/klog/v2"

	"github.com/gantryd/gantry/internal/daemon/config"
	"github.com/gantryd/gantry/internal/daemon/lifecycle"
	"github.com/gantryd/gantry/internal/daemon/logging"
	"github.com/gantryd/gantry/internal/daemon/notify"
	"github.com/gantryd/gantry/internal/lib/plugin"
)

// Set by the linker, see the Makefile.
var (
	version  = "unknown"
	revision = "unknown"
)

func main() {
	cmd := command()
	if err := cmd.ExecuteContext(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "gantryd: "+err.Error())
		os.Exit(1)
	}
}

// flags are those of the command line (contract 8.2.1, 2.3.15).
type flags struct {
	path string
	config.Options
}

// load reads the configuration. The default file may be missing.
func (f *flags) load() (*config.Config, []config.Warning, error) {
	return config.Load(f.path, f.Options)
}

func command() *cobra.Command {
	var f flags
	var showVersion bool
	root := &cobra.Command{
		Use:           "gantryd",
		Short:         "The container runtime daemon",
		Long:          "gantryd serves containerd's API on a Unix socket: it pulls images, keeps them as snapshots, and runs containers through shims.",
		Args:          cobra.NoArgs,
		SilenceErrors: true, SilenceUsage: true,
		RunE: func(cmd *cobra.Command, args []string) error {
			if showVersion {
				fmt.Printf("gantryd github.com/gantryd/gantry %s %s\n", version, revision)
				return nil
			}
			return serve(cmd.Context(), &f)
		},
	}
	p := root.PersistentFlags()
	p.StringVarP(&f.path, "config", "c", "", "configuration `file` (default "+config.DefaultPath+", which may be missing)")
	p.BoolVar(&f.Strict, "strict", false, "unknown and ineffective settings are errors")
	p.StringVar(&f.Root, "root", "", "`directory` of what is kept (default "+config.DefaultRoot+")")
	p.StringVar(&f.State, "state", "", "`directory` of what a reboot may drop (default "+config.DefaultState+")")
	p.StringVarP(&f.Address, "address", "a", "", "`path` of the gRPC socket (default "+config.DefaultAddress+")")
	p.StringVarP(&f.LogLevel, "log-level", "l", "", "`level`: trace, debug, info, warn, error, fatal or panic")
	root.Flags().BoolVarP(&showVersion, "version", "v", false, "print the version")
	root.AddCommand(configCommand(&f))
	return root
}

func configCommand(f *flags) *cobra.Command {
	cmd := &cobra.Command{Use: "config", Short: "Look at the configuration without starting anything", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() }}
	add := func(use, short string, run func(w io.Writer) error) *cobra.Command {
		c := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(c *cobra.Command, _ []string) error { return run(c.OutOrStdout()) }}
		cmd.AddCommand(c)
		return c
	}
	add("default", "Print the default configuration", config.WriteDefault)
	add("dump", "Print the effective configuration: files, imports, flags and defaults", func(w io.Writer) error {
		c, warnings, err := f.load()
		if err != nil {
			return err
		}
		printWarnings(warnings)
		return config.WriteDump(w, c)
	})
	add("effective", "Print the effective configuration with the origin of each value", func(w io.Writer) error {
		c, warnings, err := f.load()
		if err != nil {
			return err
		}
		printWarnings(warnings)
		return config.WriteEffective(w, c)
	})
	add("migrate", "Print the configuration in the current version", func(w io.Writer) error {
		warnings, err := config.WriteMigrated(w, f.path)
		printWarnings(warnings)
		return err
	})
	var forVersion int
	check := add("check [FILE]", "Report everything in the configuration that would not take effect", func(w io.Writer) error {
		n, err := config.Check(w, f.path, config.CheckOptions{Options: f.Options, ForVersion: forVersion, Components: components()})
		if err == nil && n > 0 {
			err = fmt.Errorf("%d findings", n)
		}
		return err
	})
	check.Args = func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) > 1, len(args) == 1 && f.path != "":
			return errors.New("config check: one file is checked at a time")
		case len(args) == 1:
			f.path = args[0]
		}
		return nil
	}
	check.Flags().IntVar(&forVersion, "for-version", 0, "newest `version` of the format that the reader knows (default 4)")
	return cmd
}

func printWarnings(ws []config.Warning) {
	for _, w := range ws {
		fmt.Fprintln(os.Stderr, "gantryd: warning: "+w.String())
	}
}

// serve is the life of the daemon, in the order of contract 8.2.5.
func serve(ctx context.Context, f *flags) error {
	start := time.Now()
	unix.Umask(0o022) // whatever the caller's: modes mean what they say, and containers inherit it (class C7)
	if _, err := logging.ParseLevel(f.LogLevel); err != nil {
		return fmt.Errorf("--log-level: %w", err)
	}
	cfg, warnings, err := f.load()
	if err != nil {
		return err
	}
	level, err := logging.ParseLevel(cfg.Debug.Level)
	if err != nil {
		return err
	}
	log := slog.New(logging.New(os.Stderr, logging.Options{Level: level, JSON: cfg.Debug.Format == "json"}))
	for _, w := range warnings {
		log.Warn(w.String())
	}
	// The modules of ttrpc and of Kubernetes' streams have loggers of their own,
	// which would write to standard error.
	ttrpclog.L.Logger.SetOutput(debugWriter{log.With("source", "ttrpc")})
	klog.SetSlogLogger(log.With("source", "k8s.io/streaming"))
	dirs := lifecycle.Dirs{Root: cfg.Root, State: cfg.State, Temp: cfg.Temp}
	if err := dirs.Prepare(); err != nil {
		return err
	}
	lock, err := lifecycle.LockRoot(cfg.Root)
	if err != nil {
		return err
	}
	defer lock.Close()
	tmp := filepath.Join(cfg.Root, "tmpmounts")
	if err := lifecycle.CleanTempMounts(tmp); err != nil {
		log.Warn("clean temporary mounts", "error", err)
	}
	if score, err := lifecycle.SetOOMScore(lifecycle.OOMScoreFile, cfg.OOMScore); err != nil {
		return err
	} else if cfg.OOMScore != 0 && score != cfg.OOMScore {
		log.Warn("oom_score cannot be set on this host; it stays as it is", "wanted", cfg.OOMScore, "is", score)
	}
	if err := lifecycle.JoinCgroup(lifecycle.CgroupMount, cfg.Cgroup.Path); err != nil {
		return err
	}
	notifier, err := notify.New(os.Getenv(notify.Env))
	if err != nil {
		return err
	}
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	// A signal that comes while the program is being built ends it as well.
	signals := &lifecycle.Signals{Log: log, Temp: cfg.Temp}
	signals.Catch(lifecycle.Policy())
	go signals.Run(ctx, stop)
	deprecations := map[string]string{}
	for _, w := range warnings {
		if w.ID != "" {
			deprecations[w.ID] = w.Msg
		}
	}
	d, err := assemble(ctx, cfg, deprecations, log)
	if err != nil {
		return err
	}
	started := make(chan struct{})
	// The last component is the first to stop.
	notification := lifecycle.Component{Name: "notification", Run: func(ctx context.Context) error {
		select {
		case <-started:
			waitReady(ctx, d.host, log)
		case <-ctx.Done():
		}
		if ctx.Err() == nil {
			// Scripts wait for this very text (contract 8.2.5).
			log.Info(fmt.Sprintf("containerd successfully booted in %.6fs", time.Since(start).Seconds()), "version", version, "root", cfg.Root, "state", cfg.State)
			if err := notifier.Ready(); err != nil {
				log.Warn("notify the service manager", "error", err)
			}
			<-ctx.Done()
		}
		return notifier.Stopping()
	}}
	err = lifecycle.Run(ctx, log, func() { close(started) }, append(d.components, notification)...)
	return errors.Join(err, d.host.Close())
}

// readyWithin is how long a part that is not ready keeps the news that the
// daemon is. The service manager's patience is 90 s by default, and what it
// starts next can wait as well as it.
const readyWithin = 30 * time.Second

// waitReady waits until all parts that asked for it are ready (contract 2.1.5).
func waitReady(ctx context.Context, host *plugin.Host, log *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	if err := host.WaitReady(ctx); errors.Is(err, context.DeadlineExceeded) {
		log.Warn("not all of the daemon is ready, it goes on without", "error", err)
	}
}

// debugWriter logs each line that is written to it.
type debugWriter struct{ log *slog.Logger }

func (w debugWriter) Write(p []byte) (int, error) {
	w.log.Debug(strings.TrimSpace(string(p)))
	return len(p), nil
}
