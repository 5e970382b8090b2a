// Package main should say Command prog.
// breaks: package comment
package main

func main() {}
