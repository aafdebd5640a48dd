package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/rig"
)

const limit = 1 << 20

// TestConformance runs every case against the echo server over the service's socket code, with compression and without.
// DWS_RACE=1 builds the server with the race detector.
func TestConformance(t *testing.T) {
	bin := buildEcho(t)
	for _, compression := range []string{"disabled", "no_context_takeover"} {
		t.Run(compression, func(t *testing.T) {
			o := options{address: startEcho(t, bin, compression), compression: compression, max: limit}
			all := cases(&o)
			for _, r := range run(&o, all, 8) {
				t.Error(r)
			}
			fmt.Printf("harness: conformance, %s: %d cases\n", compression, len(all))
			if len(all) < 2000 {
				t.Error("cases are missing")
			}
		})
	}
}

// buildEcho compiles the main module's tests, of which TestEchoServer is the server.
func buildEcho(t *testing.T) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "echo")
	cgo, args := "CGO_ENABLED=0", []string{"test", "-c", "-o", bin}
	if os.Getenv("DWS_RACE") == "1" {
		cgo, args = "CGO_ENABLED=1", append(args, "-race")
	}
	cmd := exec.Command("go", append(args, ".")...)
	cmd.Dir, cmd.Env = root, append(os.Environ(), cgo)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go %v: %v\n%s", args, err, out)
	}
	return bin
}

// startEcho runs the server until the test ends and returns its address.
func startEcho(t *testing.T, bin, compression string) string {
	t.Helper()
	p, err := rig.Start("echo server", filepath.Join(t.TempDir(), "log"), os.Environ(), bin, "-test.run", "^TestEchoServer$",
		"-test.timeout", "0",
		"-echo", "127.0.0.1:0", "-echo-compression", compression, "-echo-max", strconv.Itoa(limit))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if fault := p.Fault(); fault != "" {
			t.Error(fault)
		}
		p.Kill()
	})
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	line, err := p.Log.Find(ctx, func(line string) bool { return strings.Contains(line, "echo address=") })
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(line, "echo address=")
	address, _, _ := strings.Cut(rest, " ")
	return address
}
