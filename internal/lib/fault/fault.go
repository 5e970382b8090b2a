// Package fault names points in a program where a test may make it die. A
// *Points is handed to who passes them; nil, the usual value, has no effect.
package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// Points counts the passages of named points. It is safe for concurrent use.
type Points struct {
	act func(point string)

	mu   sync.Mutex // guards left
	left map[string]int
}

// Parse reads "name:3,other:1": act is called at the third passage of name and
// at the first of other. An empty spec is nil.
func Parse(spec string, act func(point string)) (*Points, error) {
	if spec == "" {
		return nil, nil
	}
	p := &Points{act: act, left: make(map[string]int)}
	for item := range strings.SplitSeq(spec, ",") {
		name, count, ok := strings.Cut(item, ":")
		n, err := strconv.Atoi(count)
		if !ok || name == "" || err != nil || n < 1 {
			return nil, fmt.Errorf("fault point %q: want name:count", item)
		}
		p.left[name] = n
	}
	return p, nil
}

// Pass is called where the program passes the point.
func (p *Points) Pass(point string) {
	if p == nil {
		return
	}
	p.mu.Lock()
	n := p.left[point]
	if n > 0 {
		p.left[point] = n - 1
	}
	p.mu.Unlock()
	if n == 1 {
		p.act(point)
	}
}

// Kill is the act of a test of crashes: the process dies at once by SIGKILL.
func Kill(string) {
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		panic(err)
	}
	select {} // the signal is on its way
}
