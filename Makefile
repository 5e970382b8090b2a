# Gantry. `make` builds, `make demo` shows the main job, `make test` proves it.
SHELL := /bin/bash
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
REVISION ?= $(shell git rev-parse HEAD 2>/dev/null || echo unknown)
PREFIX ?= /usr/local
TAGS := seccomp nri_no_wasm
LDFLAGS := -s -w -X main.version=$(VERSION) -X main.revision=$(REVISION)
GOBUILD := go build -trimpath -tags '$(TAGS)' -ldflags '$(LDFLAGS)'
export GANTRY_DEBIAN_CONTAINERD ?= $(CURDIR)/.cache/debian/usr/bin
PACKAGES ?= ./...

.PHONY: all demo test vm kubelet docker bench lint install clean help
all: ## build gantryd, gantry and the shim into bin/
	@scripts/deps build
	$(GOBUILD) -o bin/ ./cmd/gantryd ./cmd/containerd-shim-runc-v2
	CGO_ENABLED=0 $(GOBUILD) -o bin/ ./cmd/gantry

demo: all ## the main job in one command: pull from a registry, run, clean up
	bin/gantry demo

test: all ## install what the tests need and run them all
	@scripts/deps test
	go vet -race -tags '$(TAGS)' $(PACKAGES)
	scripts/test $(PACKAGES)

kubelet: ## the kubelet of Kubernetes on gantryd; builds it first, which takes minutes
	GANTRY_KUBELET=$(or $(GANTRY_KUBELET),1) go test -count=1 -v -timeout 90m ./test/kubelet

docker: ## Docker and BuildKit on gantryd; GANTRY_DOCKER is a directory with dockerd, docker, docker-init, buildkitd and buildctl
	GANTRY_DOCKER='$(GANTRY_DOCKER)' go test -count=1 -v -timeout 30m ./test/docker

vm: ## the CRI's suite in a virtual machine with cgroup v2 and AppArmor; GANTRY_VM=all runs all of it (hours)
	@scripts/deps vm
	GANTRY_VM=$(or $(GANTRY_VM),1) go test -count=1 -v -timeout 4h ./test/vm

bench: all ## compare with Debian's containerd in one run; see bench/RESULTS.md
	@scripts/deps test
	scripts/bench

lint: ## formatting, vet and the architecture tests
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet -tags '$(TAGS)' ./...
	go test ./internal/arch

install: all ## install into PREFIX (/usr/local), the shim into libexec
	install -D -m 0755 bin/gantryd $(DESTDIR)$(PREFIX)/bin/gantryd
	install -D -m 0755 bin/gantry $(DESTDIR)$(PREFIX)/bin/gantry
	install -D -m 0755 bin/containerd-shim-runc-v2 $(DESTDIR)$(PREFIX)/libexec/gantry/containerd-shim-runc-v2
	bin/gantry man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/lib/systemd/system
	sed 's#/usr/local#$(PREFIX)#' docs/gantry.service >$(DESTDIR)$(PREFIX)/lib/systemd/system/gantry.service

clean: ## remove what was built
	rm -rf bin .cache

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | column -t -s "$$(printf '\t')"
