package registry

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/containerd/errdefs"
)

// StatusError is an answer that says no (contract 6.1.13). It has the class
// of its code.
type StatusError struct {
	Method string
	URL    string // without query: it may hold a signature
	Status string
	Code   int
	Body   string // at most maxErrorBody bytes of what the server said
}

const maxErrorBody = 8 << 10

func newStatusError(resp *http.Response) *StatusError {
	u := *resp.Request.URL
	u.RawQuery, u.User = "", nil
	e := &StatusError{Method: resp.Request.Method, URL: u.String(), Status: resp.Status, Code: resp.StatusCode}
	var b strings.Builder
	_, _ = io.Copy(&b, io.LimitReader(resp.Body, maxErrorBody))
	e.Body = b.String()
	return e
}

func (e *StatusError) Error() string {
	s := fmt.Sprintf("%s %s: %s", e.Method, e.URL, e.Status)
	if d := e.detail(); d != "" {
		s += ": " + d
	}
	return s
}

// detail is what the registry says in the form of the distribution
// specification, or the beginning of what else it says.
func (e *StatusError) detail() string {
	var doc struct {
		Errors []struct {
			Code    string `json:"code"`
			Message string `json:"message"`
		} `json:"errors"`
		Details string `json:"details"`
	}
	if json.Unmarshal([]byte(e.Body), &doc) == nil {
		var s []string
		for _, d := range doc.Errors {
			s = append(s, strings.ToLower(strings.ReplaceAll(d.Code, "_", " "))+": "+d.Message)
		}
		if doc.Details != "" {
			s = append(s, doc.Details)
		}
		return clip(printable(strings.Join(s, "; ")), 1024)
	}
	if strings.HasPrefix(strings.TrimSpace(e.Body), "<") {
		return ""
	}
	return clip(printable(strings.TrimSpace(e.Body)), 256)
}

// printable keeps what a registry says from moving the cursor of a terminal.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
}

// Is gives the answer its class.
func (e *StatusError) Is(target error) bool {
	switch e.Code {
	case http.StatusUnauthorized:
		return target == errdefs.ErrUnauthenticated
	case http.StatusForbidden:
		return target == errdefs.ErrPermissionDenied
	case http.StatusNotFound:
		return target == errdefs.ErrNotFound
	case http.StatusBadRequest:
		return target == errdefs.ErrInvalidArgument
	case http.StatusRequestedRangeNotSatisfiable:
		return target == errdefs.ErrOutOfRange
	case http.StatusTooManyRequests:
		return target == errdefs.ErrResourceExhausted
	case http.StatusNotImplemented, http.StatusMethodNotAllowed:
		return target == errdefs.ErrNotImplemented
	}
	if e.Code >= 500 {
		return target == errdefs.ErrUnavailable
	}
	return target == errdefs.ErrUnknown
}

// deniedError is what kubelet and nerdctl show and look for (contract 6.1.2).
type deniedError struct{ err error }

func (e *deniedError) Error() string {
	return "pull access denied, repository does not exist or may require authorization: " + e.err.Error()
}
func (e *deniedError) Unwrap() error { return e.err }

// HostError is what happened at one host.
type HostError struct {
	Host string
	Err  error
	rank int
}

// How far a request got: the error that got furthest tells most.
const (
	rankTransport = iota + 1
	rankNotFound
	rankStatus
	rankOversize
)

// Error is the outcome of trying all hosts in order. Its class and first words
// are those of the host that got furthest.
type Error struct {
	Hosts []HostError
}

func (e *Error) add(host string, err error) {
	rank := rankTransport
	if s, ok := errorAs[*StatusError](err); ok {
		switch {
		case s.Code == http.StatusNotFound:
			rank = rankNotFound
		case s.Code != http.StatusUnauthorized && s.Code != http.StatusForbidden:
			rank = rankStatus
		}
	}
	if _, ok := errorAs[*oversizeError](err); ok {
		rank = rankOversize
	}
	e.Hosts = append(e.Hosts, HostError{Host: host, Err: err, rank: rank})
}

func (e *Error) first() int {
	best := 0
	for i, h := range e.Hosts {
		if h.rank > e.Hosts[best].rank {
			best = i
		}
	}
	return best
}

func (e *Error) Error() string {
	best := e.first()
	s := e.Hosts[best].Err.Error()
	for i, h := range e.Hosts {
		if i == best {
			continue
		}
		s += fmt.Sprintf("; also tried %s: %v", h.Host, h.Err)
	}
	return s
}

// Unwrap is the error of the host that got furthest, so that the class is one.
func (e *Error) Unwrap() error { return e.Hosts[e.first()].Err }

type oversizeError struct {
	what  string
	limit int64
}

func (e *oversizeError) Error() string {
	return fmt.Sprintf("%s is larger than %d bytes", e.what, e.limit)
}
func (e *oversizeError) Is(target error) bool { return target == errdefs.ErrInvalidArgument }
