package criimage

import (
	"context"
	"encoding/base64"
	"fmt"
	"maps"
	"net"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	runtime "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/gantryd/gantry/core/registry"
	"github.com/gantryd/gantry/internal/edge/cri/cristate"
)

// hostAuth is a credential and the one host that may see it.
type hostAuth struct {
	host string // see hostOf
	cred registry.Credential
}

// docker is the registry that has several names.
const docker = "docker.io"

// hostOf is the form in which hosts are compared: lower case, without the port
// that https implies, and one name for Docker's registry. The address may be a
// URL. "" if it is no host.
func hostOf(address string) string {
	scheme := "https"
	if !strings.Contains(address, "://") {
		address = scheme + "://" + address
	}
	u, err := url.Parse(address)
	if err != nil || u.User != nil {
		return ""
	}
	host := strings.ToLower(u.Host)
	if h, port, err := net.SplitHostPort(host); err == nil && port == "443" && u.Scheme == scheme {
		if strings.Contains(h, ":") {
			h = "[" + h + "]"
		}
		host = h
	}
	switch host {
	case "index.docker.io", "registry-1.docker.io":
		return docker
	}
	return host
}

// credentialOf reads the forms of AuthConfig (contract 7.2.1): a user and a
// password, an identity token, both in base64, or a token for the registry
// itself. The zero Credential if there is none. Errors never quote a secret.
func credentialOf(a *runtime.AuthConfig) (registry.Credential, error) {
	switch {
	case a.GetUsername() != "":
		return registry.Credential{Username: a.Username, Secret: a.Password}, nil
	case a.GetIdentityToken() != "":
		return registry.Credential{Secret: a.IdentityToken, Refresh: true}, nil
	case a.GetAuth() != "":
		b, err := base64.StdEncoding.DecodeString(a.Auth)
		if err != nil {
			return registry.Credential{}, fmt.Errorf("auth is not base64: %w", errdefs.ErrInvalidArgument)
		}
		user, password, ok := strings.Cut(string(b), ":")
		if !ok {
			return registry.Credential{}, fmt.Errorf("auth is not user:password in base64: %w", errdefs.ErrInvalidArgument)
		}
		return registry.Credential{Username: user, Secret: strings.Trim(password, "\x00")}, nil
	case a.GetRegistryToken() != "":
		if strings.ContainsFunc(a.RegistryToken, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return registry.Credential{}, fmt.Errorf("registry_token has characters that no header can have: %w", errdefs.ErrInvalidArgument)
		}
		return registry.Credential{Header: "Bearer " + a.RegistryToken}, nil
	}
	return registry.Credential{}, nil
}

// configured are the credentials of the configuration, in the order in which
// they are looked at.
func configured(c cristate.RegistryConfig) ([]hostAuth, error) {
	var all []hostAuth
	add := func(key, address string, a cristate.RegistryAuth) error {
		cred, err := credentialOf(&runtime.AuthConfig{Username: a.Username, Password: a.Password, Auth: a.Auth, IdentityToken: a.IdentityToken})
		host := hostOf(address)
		if err == nil && host == "" {
			err = fmt.Errorf("not a host: %w", errdefs.ErrInvalidArgument)
		}
		if err != nil {
			return fmt.Errorf("registry.%s.%q: %w", key, address, err)
		}
		all = append(all, hostAuth{host, cred})
		return nil
	}
	for _, h := range slices.Sorted(maps.Keys(c.Configs)) {
		if a := c.Configs[h].Auth; a != nil {
			if err := add("configs", h, *a); err != nil {
				return nil, err
			}
		}
	}
	for _, h := range slices.Sorted(maps.Keys(c.Auths)) {
		if err := add("auths", h, c.Auths[h]); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// credentials answers for the hosts that a pull really contacts. The request's
// are for server_address, or else for the registry that the reference names,
// and never for a mirror of it; what the configuration has comes after
// (promise P14).
func (s *Service) credentials(named reference.Named, a *runtime.AuthConfig) (registry.Credentials, error) {
	auths := s.auths
	if a != nil {
		cred, err := credentialOf(a)
		host := hostOf(reference.Domain(named))
		if err == nil && a.ServerAddress != "" {
			if host = hostOf(a.ServerAddress); host == "" {
				err = fmt.Errorf("server_address %.256q is not a host: %w", redacted(a.ServerAddress), errdefs.ErrInvalidArgument)
			}
		}
		if err != nil {
			return nil, fmt.Errorf("credentials: %w", err)
		}
		if cred != (registry.Credential{}) {
			auths = append([]hostAuth{{host, cred}}, auths...)
		}
	}
	if len(auths) == 0 {
		return nil, nil
	}
	return func(_ context.Context, req registry.AuthRequest) (registry.Credential, error) {
		host := hostOf(req.Host)
		for _, h := range auths {
			if h.host == host {
				return h.cred, nil
			}
		}
		return registry.Credential{}, nil
	}, nil
}

// redacted is an address without a user and password that it may have.
func redacted(address string) string {
	if i := strings.LastIndexByte(address, '@'); i >= 0 {
		return "..." + address[i:]
	}
	return address
}
