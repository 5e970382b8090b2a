package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/cobra/doc"

	"github.com/gantryd/gantry/core/container"
	"github.com/gantryd/gantry/core/view"
)

// completeTimeout bounds what the shell waits for when somebody presses Tab.
const completeTimeout = 2 * time.Second

// complete makes the shell know containers, images, namespaces and snapshotters.
func (a *app) complete(root *cobra.Command) {
	images := a.completion(func(ctx context.Context, v view.View) ([]string, error) {
		list, err := v.Images().List(ctx)
		var names []string
		for _, i := range list {
			names = append(names, i.Name)
		}
		return names, err
	})
	containers := a.completion(func(ctx context.Context, v view.View) (ids []string, err error) {
		err = v.Containers().Walk(ctx, func(c container.Container) error {
			ids = append(ids, string(c.ID))
			return nil
		})
		return ids, err
	})
	for _, cmd := range root.Commands() {
		_, args, _ := strings.Cut(cmd.Use, " ")
		switch {
		case cmd.GroupID == "low" || cmd.GroupID == "daemon":
		case strings.HasPrefix(args, "IMAGE"):
			cmd.ValidArgsFunction = images
		case strings.HasPrefix(args, "CONTAINER") || strings.HasPrefix(args, "[CONTAINER") || strings.HasPrefix(args, "NAME"):
			cmd.ValidArgsFunction = containers
		}
	}
	namespaces := a.completion(func(ctx context.Context, _ view.View) (names []string, err error) {
		list, err := a.client.Namespaces().List(ctx)
		for _, ns := range list {
			names = append(names, string(ns.ID))
		}
		return names, err
	})
	for name, values := range map[string]cobra.CompletionFunc{"namespace": namespaces, "output": cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)} {
		if err := root.RegisterFlagCompletionFunc(name, values); err != nil {
			panic(err) // a flag of that name is defined above
		}
	}
}

// completion makes a list from the daemon an answer for the shell. It never
// says why there is none: the shell would print it into the command line.
func (a *app) completion(list func(ctx context.Context, v view.View) ([]string, error)) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		ctx, cancel := context.WithTimeout(ctx, completeTimeout)
		defer cancel()
		// What follows the first name of these is a command in the container.
		if len(args) > 0 && strings.Contains(cmd.Use, "COMMAND") {
			return nil, cobra.ShellCompDirectiveDefault
		}
		v, err := a.view(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		names, err := list(ctx, v)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

// manCommand writes the manual pages, for packages and make install.
func manCommand() *cobra.Command {
	return &cobra.Command{Use: "man DIRECTORY", Short: "Write the manual pages", Hidden: true, Args: cobra.ExactArgs(1), RunE: func(cmd *cobra.Command, args []string) error {
		if err := os.MkdirAll(args[0], 0o755); err != nil {
			return fmt.Errorf("write manual pages: %w", err)
		}
		root := cmd.Root()
		root.DisableAutoGenTag = true
		if err := doc.GenManTree(root, &doc.GenManHeader{Title: "GANTRY", Section: "1", Source: "Gantry", Manual: "Gantry"}, args[0]); err != nil {
			return fmt.Errorf("write manual pages: %w", err)
		}
		return nil
	}}
}
