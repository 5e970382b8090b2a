package registry

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	core "github.com/gantryd/gantry/core/registry"
)

// authScheme is how a host wants to be asked.
type authScheme uint8

const (
	schemeNone authScheme = iota
	schemeBearer
	schemeFixed // Basic, or a whole header from the credentials
)

// challenge is one WWW-Authenticate header.
type challenge struct {
	scheme string // lower case
	params map[string]string
}

// token is an access token and when it ends.
type token struct {
	value   string
	expires time.Time
}

// asking is a token request under way; others with the same scope wait for it.
type asking struct {
	done chan struct{}
	tok  token
	err  error
}

// maxToken is the most bytes a token server's answer may have.
const maxToken = 1 << 20

// scopes is the access that a request needs, in the token server's words.
func (p *peer) scopes(req request) []string {
	if req.scope == "" {
		return nil
	}
	s := []string{"repository:" + p.r.ref.Repository + ":" + req.scope}
	if req.mount != "" {
		s = append(s, "repository:"+req.mount+":pull")
	}
	return s
}

// authorization is the header for a request, as far as the host has said what
// it wants; "" before its first challenge.
func (p *peer) authorization(ctx context.Context, req request) (string, error) {
	p.mu.Lock()
	scheme, header, ch := p.scheme, p.header, p.challenge
	p.mu.Unlock()
	switch scheme {
	case schemeFixed:
		return header, nil
	case schemeBearer:
		tok, err := p.token(ctx, ch, p.scopes(req))
		if err != nil {
			return "", err
		}
		return "Bearer " + tok.value, nil
	}
	return "", nil
}

// authenticate takes the challenges of a 401 and reports whether the request
// may be sent again, now with other credentials than the header it showed.
func (p *peer) authenticate(ctx context.Context, headers []string, req request, shown string) (bool, error) {
	if p.Header.Get("Authorization") != "" || p.extra.Get("Authorization") != "" {
		return false, nil // configured, and refused
	}
	var basic, bearer *challenge
	for _, h := range headers {
		for _, ch := range parseChallenges(h) {
			switch {
			case ch.scheme == "basic" && basic == nil:
				basic = &ch
			case ch.scheme == "bearer" && bearer == nil && ch.params["realm"] != "":
				bearer = &ch
			}
		}
	}
	cred, err := p.credential(ctx, headers)
	if err != nil {
		return false, err
	}
	if cred.Header != "" {
		return p.fix(cred.Header, shown), nil
	}
	switch {
	case bearer != nil:
		p.mu.Lock()
		p.scheme, p.challenge = schemeBearer, *bearer
		// A token that was refused (insufficient_scope, invalid_token, expired)
		// is not shown again.
		for key, t := range p.tokens {
			if "Bearer "+t.value == shown {
				delete(p.tokens, key)
			}
		}
		p.mu.Unlock()
		return true, nil
	case basic != nil && cred.Secret != "" && !cred.Refresh:
		return p.fix("Basic "+base64.StdEncoding.EncodeToString([]byte(cred.Username+":"+cred.Secret)), shown), nil
	}
	return false, nil
}

// fix sets a header and reports whether it is another one than was shown.
func (p *peer) fix(header, shown string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.scheme, p.header = schemeFixed, header
	return header != shown
}

// credential asks for what to show this host. The answer is kept until it expires.
func (p *peer) credential(ctx context.Context, headers []string) (core.Credential, error) {
	// One question at a time: who answers may be a person.
	unlock, err := p.asking.Lock(ctx, "credential")
	if err != nil {
		return core.Credential{}, fmt.Errorf("credentials for %s: %w", p.Address, err)
	}
	defer unlock()
	p.mu.Lock()
	if c := p.cred; c != nil && (c.Expires.IsZero() || time.Now().Before(c.Expires)) {
		p.mu.Unlock()
		return *c, nil
	}
	p.mu.Unlock()
	var cred core.Credential
	if p.credentials != nil {
		actx, cancel := context.WithTimeoutCause(ctx, p.r.c.cfg.HeaderTimeout, &timeoutError{fmt.Sprintf("no answer within %s", p.r.c.cfg.HeaderTimeout)})
		defer cancel()
		cred, err = p.credentials(actx, core.AuthRequest{Host: p.Address, Reference: p.r.ref.String(), Authenticate: headers})
		if err != nil {
			if actx.Err() != nil {
				err = context.Cause(actx)
			}
			return cred, fmt.Errorf("credentials for %s: %w", p.Address, err)
		}
	}
	p.mu.Lock()
	p.cred = &cred
	p.mu.Unlock()
	return cred, nil
}

func mergeScopes(want []string, asked string) []string {
	seen := map[string]bool{}
	var s []string
	for _, v := range append(append([]string(nil), want...), strings.Fields(asked)...) {
		if !seen[v] {
			seen[v] = true
			s = append(s, v)
		}
	}
	// "repository:x:pull" is part of "repository:x:pull,push".
	kept := s[:0]
	for _, v := range s {
		if strings.HasSuffix(v, ":pull") && (seen[v+",push"] || seen[strings.TrimSuffix(v, "pull")+"push,pull"]) {
			continue
		}
		kept = append(kept, v)
	}
	slices.Sort(kept)
	return kept
}

func scopeKey(scopes []string) string { return strings.Join(scopes, " ") }

// token returns the token for scopes, from the cache or the token server.
func (p *peer) token(ctx context.Context, ch challenge, want []string) (token, error) {
	asked := ch.params["scope"]
	if len(want) > 0 {
		// What an earlier request was challenged for is not what this one needs.
		var own []string
		for _, s := range strings.Fields(asked) {
			if strings.HasPrefix(s, "repository:"+p.r.ref.Repository+":") || !strings.HasPrefix(s, "repository:") {
				own = append(own, s)
			}
		}
		asked = strings.Join(own, " ")
	}
	scopes := mergeScopes(want, asked)
	key := scopeKey(scopes)
	for {
		p.mu.Lock()
		if t, ok := p.tokens[key]; ok && time.Now().Before(t.expires) {
			p.mu.Unlock()
			return t, nil
		}
		a := p.asked[key]
		if a == nil {
			a = &asking{done: make(chan struct{})}
			p.asked[key] = a
			p.mu.Unlock()
			a.tok, a.err = p.fetchToken(ctx, ch, scopes)
			p.mu.Lock()
			delete(p.asked, key)
			if a.err == nil {
				p.tokens[key] = a.tok
			}
			p.mu.Unlock()
			close(a.done)
			return a.tok, a.err
		}
		p.mu.Unlock()
		select {
		case <-a.done:
		case <-ctx.Done():
			return token{}, context.Cause(ctx)
		}
		if a.err == nil {
			return a.tok, nil
		}
		if !errors.Is(a.err, context.Canceled) && !errors.Is(a.err, context.DeadlineExceeded) {
			return token{}, a.err
		}
		// Whoever asked gave up; ask again.
	}
}

// fetchToken asks the token server: OAuth2 POST with credentials, GET where
// that is not understood or there are none (contract 6.1.7).
func (p *peer) fetchToken(ctx context.Context, ch challenge, scopes []string) (token, error) {
	realm, err := url.Parse(ch.params["realm"])
	if err != nil || realm.Host == "" || (realm.Scheme != "https" && realm.Scheme != "http") {
		return token{}, fmt.Errorf("token for %s: realm %q is not a URL: %w", p.Address, clip(ch.params["realm"], 256), errdefs.ErrUnauthenticated)
	}
	cred, err := p.credential(ctx, nil)
	if err != nil {
		return token{}, err
	}
	if cred.Secret != "" && realm.Scheme == "http" && p.base(request{}).Scheme == "https" {
		return token{}, fmt.Errorf("token for %s: refusing to send credentials to %s without TLS: %w", p.Address, redact(realm), errdefs.ErrUnauthenticated)
	}
	service := ch.params["service"]
	if cred.Secret != "" {
		form := url.Values{"service": {service}, "client_id": {"containerd-client"}}
		if len(scopes) > 0 {
			form.Set("scope", strings.Join(scopes, " "))
		}
		if cred.Refresh || cred.Username == "" {
			form.Set("grant_type", "refresh_token")
			form.Set("refresh_token", cred.Secret)
		} else {
			form.Set("grant_type", "password")
			form.Set("username", cred.Username)
			form.Set("password", cred.Secret)
			form.Set("access_type", "offline")
		}
		tok, err := p.askToken(ctx, http.MethodPost, realm, form, "")
		if err == nil {
			return tok, nil
		}
		st, ok := errorAs[*StatusError](err)
		if !ok || cred.Refresh || cred.Username == "" || (st.Code != 400 && st.Code != 401 && st.Code != 404 && st.Code != 405) {
			return token{}, err
		}
	}
	u := *realm
	q := u.Query()
	if service != "" {
		q.Set("service", service)
	}
	for _, s := range scopes {
		q.Add("scope", s)
	}
	basic := ""
	if cred.Secret != "" {
		q.Set("account", cred.Username)
		q.Set("offline_token", "true")
		basic = "Basic " + base64.StdEncoding.EncodeToString([]byte(cred.Username+":"+cred.Secret))
	}
	u.RawQuery = q.Encode()
	return p.askToken(ctx, http.MethodGet, &u, nil, basic)
}

func (p *peer) askToken(ctx context.Context, method string, u *url.URL, form url.Values, authorization string) (token, error) {
	cfg := &p.r.c.cfg
	t, err := p.r.c.transport(&p.Host, u.Host == p.Address)
	if err != nil {
		return token{}, err
	}
	req := request{method: method}
	h := http.Header{"User-Agent": {cfg.UserAgent}, "Accept": {"application/json"}}
	if form != nil {
		s := form.Encode()
		req.body = func() io.Reader { return strings.NewReader(s) }
		req.size = int64(len(s))
		h.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	if authorization != "" {
		h.Set("Authorization", authorization)
	}
	var resp *http.Response
	for attempt := 1; ; attempt++ {
		if err := p.r.c.waitGate(ctx, u.Host); err != nil {
			return token{}, fmt.Errorf("token for %s: %w", p.Address, err)
		}
		// Redirects are not followed: the credentials are for this URL.
		resp, err = exchange(ctx, cfg, t, req, u, h)
		if err != nil {
			if ctx.Err() == nil && attempt < cfg.Attempts && transient(err) {
				if err := p.r.c.pause(ctx, attempt); err != nil {
					return token{}, err
				}
				continue
			}
			return token{}, fmt.Errorf("token for %s: %w", p.Address, err)
		}
		if resp.StatusCode == http.StatusTooManyRequests || resp.StatusCode >= 500 {
			if after, _ := parseRetryAfter(resp.Header.Get("Retry-After"), time.Now()); attempt < cfg.Attempts && after <= cfg.MaxRetryAfter {
				resp.Body.Close()
				p.r.c.closeGate(u.Host, max(after, cfg.BackOff<<min(attempt-1, 8)))
				continue
			}
		}
		break
	}
	defer resp.Body.Close()
	if resp.StatusCode < 200 || resp.StatusCode >= 300 {
		return token{}, fmt.Errorf("token for %s: %w", p.Address, newStatusError(resp))
	}
	var answer struct {
		Token       string    `json:"token"`
		AccessToken string    `json:"access_token"`
		ExpiresIn   int       `json:"expires_in"`
		IssuedAt    time.Time `json:"issued_at"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxToken)).Decode(&answer); err != nil {
		return token{}, fmt.Errorf("token for %s: answer of %s: %v: %w", p.Address, redact(u), err, errdefs.ErrUnavailable)
	}
	tok := token{value: answer.AccessToken}
	tok.value = cmp.Or(tok.value, answer.Token)
	if tok.value == "" || strings.ContainsAny(tok.value, "\r\n") {
		return token{}, fmt.Errorf("token for %s: answer of %s has no usable token: %w", p.Address, redact(u), errdefs.ErrUnauthenticated)
	}
	if answer.ExpiresIn < 60 || answer.ExpiresIn > 1<<30 {
		answer.ExpiresIn = 60
	}
	// A token is renewed a little before it ends; the clocks may differ, so it
	// counts from now and not from issued_at.
	tok.expires = time.Now().Add(time.Duration(answer.ExpiresIn)*time.Second - 10*time.Second)
	return tok, nil
}

// parseChallenges reads one WWW-Authenticate header, which may hold several
// challenges: scheme, then key=value or key="value" pairs with commas.
func parseChallenges(s string) []challenge {
	var all []challenge
	s = clip(s, 16<<10)
	for {
		s = strings.TrimLeft(s, " \t,")
		if s == "" {
			return all
		}
		word, rest := cutWord(s)
		if word == "" {
			return all
		}
		rest = strings.TrimLeft(rest, " \t")
		if !strings.HasPrefix(rest, "=") {
			all = append(all, challenge{scheme: strings.ToLower(word), params: map[string]string{}})
			s = rest
			continue
		}
		rest = strings.TrimLeft(rest[1:], " \t")
		var value string
		if strings.HasPrefix(rest, `"`) {
			var b strings.Builder
			i := 1
			for ; i < len(rest) && rest[i] != '"'; i++ {
				if rest[i] == '\\' && i+1 < len(rest) {
					i++
				}
				b.WriteByte(rest[i])
			}
			value, rest = b.String(), rest[min(i+1, len(rest)):]
		} else {
			i := strings.IndexAny(rest, ", \t")
			if i < 0 {
				i = len(rest)
			}
			value, rest = rest[:i], rest[i:]
		}
		if len(all) > 0 {
			all[len(all)-1].params[strings.ToLower(word)] = value
		}
		s = rest
	}
}

func cutWord(s string) (string, string) {
	i := 0
	for i < len(s) && !strings.ContainsRune(" \t,=\"", rune(s[i])) {
		i++
	}
	return s[:i], s[i:]
}
