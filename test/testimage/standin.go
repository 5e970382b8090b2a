package testimage

import (
	_ "embed"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

//go:embed standin/standin.c
var standinSource []byte

// PutValidation makes stand-ins for all images that Kubernetes' validation
// suite (critest 1.36) pulls, under the names they have behind their registry,
// and returns the digest of test-image-digest.
func (r *Registry) PutValidation() (digest.Digest, error) {
	files, err := busyboxFiles()
	if err != nil {
		return "", err
	}
	program, err := compile(standinSource)
	if err != nil {
		return "", err
	}
	for i := range files {
		switch files[i].Name {
		case "bin/sh":
			files[i] = File{Name: "bin/sh", Body: program, Mode: 0o755}
		case "bin/ls": // a file of its own, which can be masked alone
			files[i] = File{Name: "bin/ls", Body: files[1].Body, Mode: 0o755}
		case "etc/passwd":
			files[i].Body = []byte("root:x:0:0:root:/root:/bin/sh\ndefault-user:x:1000:1000::/home:/bin/sh\nwww-data:x:33:33::/var/www:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n")
		case "etc/group":
			files[i].Body = []byte("root:x:0:\nwww-data:x:33:\ndefault-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\nnobody:x:65534:\n")
		}
	}
	script := func(name, body string) File {
		return File{Name: name, Body: []byte("#!/bin/busybox sh\n" + body + "\n"), Mode: 0o755}
	}
	base := Layer{append(files, script("bin/pgrep", `exec pidof "$1"`), script("bin/ipcs", "exec cat /proc/sysvipc/shm")), ""}
	put := func(config ocispec.ImageConfig, extra []File, names ...[2]string) (*Image, error) {
		config.Env = []string{"PATH=/bin"}
		if config.Cmd == nil {
			config.Cmd = []string{"sh"}
		}
		layers := []Layer{base}
		if extra != nil {
			layers = append(layers, Layer{extra, "gzip"})
		}
		img, err := New(config, layers...)
		if err != nil {
			return nil, err
		}
		for _, n := range names {
			r.Put(n[0], n[1], img)
		}
		return img, nil
	}
	const e2e, staging, library = "e2e-test-images/", "k8s-staging-cri-tools/", "docker/library/"
	web := func(name, port string) (ocispec.ImageConfig, []File) {
		return ocispec.ImageConfig{Cmd: []string{"/bin/" + name, "master process"}}, []File{
			{Name: "www", Dir: true}, {Name: "www/index.html", Body: []byte("it works\n")}, {Name: "var", Dir: true}, {Name: "var/run", Dir: true},
			script("bin/"+name, "echo "+name+"\necho $$ >/var/run/nginx.pid\nhttpd -f -p "+port+" -h /www")}
	}
	var failed error
	must := func(_ *Image, err error) {
		if failed == nil {
			failed = err
		}
	}
	must(put(ocispec.ImageConfig{}, nil, [2]string{e2e + "busybox", "1.29-2"}))
	config, extra := web("nginx", "80")
	must(put(config, extra, [2]string{e2e + "nginx", "1.14-2"}))
	config, extra = web("httpd", "80")
	must(put(config, extra, [2]string{e2e + "httpd", "2.4.39-4"}))
	config, extra = web("nginx", "12003")
	for _, arch := range []string{"amd64", "arm64"} {
		must(put(config, extra, [2]string{staging + "hostnet-nginx-" + arch, "latest"}))
	}
	must(put(ocispec.ImageConfig{Cmd: []string{"/bin/nonewprivs"}}, []File{{Name: "bin/nonewprivs", Body: program, Mode: 0o4755}}, [2]string{e2e + "nonewprivs", "1.3"}))
	for name, user := range map[string]string{"user-uid": "1002", "user-username": "www-data", "user-uid-group": "1003:1004", "user-username-group": "www-data:1004", "predefined-group": "1000"} {
		must(put(ocispec.ImageConfig{User: user}, nil, [2]string{staging + "test-image-" + name, "latest"}))
	}
	small := func(text string, names ...[2]string) (*Image, error) {
		return put(ocispec.ImageConfig{Labels: map[string]string{"text": text}}, nil, names...)
	}
	for _, name := range []string{"1", "2", "3", "latest"} {
		must(small(name, [2]string{staging + "test-image-" + name, "latest"}))
	}
	must(small("tags", [2]string{staging + "test-image-tags", "1"}, [2]string{staging + "test-image-tags", "2"}, [2]string{staging + "test-image-tags", "3"}))
	for _, tag := range []string{"test", "all"} {
		must(small("tag "+tag, [2]string{staging + "test-image-tag", tag}))
	}
	must(small("pause", [2]string{"pause", "3.9"}))
	for _, tag := range []string{"1.35.0-glibc", "1-uclibc", "1", "1-glibc", "1-musl"} { // of its benchmarks
		must(small("library "+tag, [2]string{library + "busybox", tag}))
	}
	img, err := small("digest", [2]string{staging + "test-image-digest", "latest"})
	must(img, err)
	if failed != nil {
		return "", failed
	}
	return img.Target.Digest, nil
}
