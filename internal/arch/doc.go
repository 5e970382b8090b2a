// Package arch keeps the shape of the house. It has no code, only tests: who
// may import whom, which modules a layer may use, what no file may contain,
// and the full list of what each binary is made of.
package arch
