package main

import "github.com/spf13/cobra"

func (a *app) demoCommand() *cobra.Command { return &cobra.Command{Use: "demo", GroupID: "daemon"} }
func demoWorkCommand() *cobra.Command      { return &cobra.Command{Use: "demo-work", Hidden: true} }
