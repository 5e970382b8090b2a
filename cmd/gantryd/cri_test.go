package main

import (
	"strings"
	"testing"
)

// What is wrong with Kubernetes' part does not end the daemon, unless somebody
// requires it.
// contract: 2.1.4, 13.43
func TestBrokenCRI(t *testing.T) {
	const broken = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\nbase_runtime_spec = '/no/such/spec.json'\n"
	s := newServer(t, broken)
	s.start()
	if log := s.log.String(); !strings.Contains(log, "Kubernetes' services are not available") || !strings.Contains(log, "/no/such/spec.json") {
		t.Errorf("%s", log)
	}
	s.stop()
	s = newServer(t, "required_plugins = ['io.containerd.grpc.v1.cri']\n"+broken)
	if out, err := s.command().CombinedOutput(); err == nil || !strings.Contains(string(out), "/no/such/spec.json") {
		t.Errorf("%v: %s", err, out)
	}
}
