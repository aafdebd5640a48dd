// Package rig builds and runs the processes that the end-to-end tests and the demo need: the service itself,
// NATS with JetStream and Redis, each on a free port of 127.0.0.1. It knows nothing of testing; package harness
// puts it into the hands of tests.
package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
)

// Binaries are the programs that Build made.
type Binaries struct {
	Service string
	NATS    string
}

// Root is the folder of the main module, found from the working directory upwards.
func Root() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		mod, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && bytes.HasPrefix(mod, []byte("module daisi-ws-service\n")) {
			return dir, nil
		}
		parent := filepath.Dir(dir)
		if parent == dir {
			return "", errors.New("no go.mod of daisi-ws-service in this folder or above it")
		}
		dir = parent
	}
}

// Build puts the service, with the race detector if race says so, and the pinned NATS server into dir, and further
// commands of the dev module, named as from there (./cmd/ws).
func Build(ctx context.Context, dir string, race bool, more ...string) (Binaries, error) {
	root, err := Root()
	if err != nil {
		return Binaries{}, err
	}
	bin := Binaries{Service: filepath.Join(dir, "daisi-ws-service"), NATS: filepath.Join(dir, "nats-server")}
	cgo, args := "CGO_ENABLED=0", []string{"-o", bin.Service}
	if race {
		cgo, args = "CGO_ENABLED=1", append(args, "-race")
	}
	var serviceErr, natsErr error
	var wg sync.WaitGroup
	wg.Go(func() { serviceErr = goBuild(ctx, root, cgo, append(args, ".")...) })
	wg.Go(func() {
		dev := filepath.Join(root, "dev")
		args := append([]string{"-o", dir + "/", "github.com/nats-io/nats-server/v2"}, more...)
		natsErr = goBuild(ctx, dev, "CGO_ENABLED=0", args...)
	})
	wg.Wait()
	return bin, errors.Join(serviceErr, natsErr)
}

func goBuild(ctx context.Context, dir, cgo string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-buildvcs=false"}, args...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build %v in %s: %w\n%s", args, dir, err, out)
	}
	return nil
}
