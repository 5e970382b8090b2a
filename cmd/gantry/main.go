// Command gantry is what people use: it runs containers, shows what is there,
// and reaches every part of the daemon. root.go has what all commands share.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Set by the linker, see the Makefile.
var (
	version  = "unknown"
	revision = "unknown"
)

func main() { os.Exit(run(os.Args[1:])) }

// run executes one command line and returns the exit code: that of a
// container's process, 125 if Gantry itself could not do it, 126 and 127 if
// the process could not be executed or found.
func run(args []string) int {
	// The second interrupt kills: a command that hangs can always be left.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	defer stop()
	a := newApp(os.Stdin, os.Stdout, os.Stderr)
	defer a.close()
	root := a.command()
	root.SetArgs(args)
	cmd, err := root.ExecuteContextC(ctx)
	var code exitCode
	switch {
	case err == nil:
		return 0
	case errors.As(err, &code):
		return int(code)
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		fmt.Fprintln(os.Stderr, "gantry: interrupted")
		return 130
	}
	a.explain(cmd, err)
	return failureCode(err)
}

// exitCode is the exit of a container's process, passed on by the command line.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("the process ended with exit code %d", int(c)) }
