// Package harness lets a test drive the real binary from outside: a World of NATS, Redis and pods, clients that other
// people wrote, a publisher, and a look at what JetStream and /metrics say. It fails the test when any child process
// prints DATA RACE or panic:, or ends without being asked to, and keeps the logs of a failed test.
package harness

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9/logging"

	"daisi-ws-service/dev/rig"
)

// Race says whether the service was built with the race detector (DWS_RACE=1).
var Race = os.Getenv("DWS_RACE") == "1"

// Patience is how long a test waits for something that should happen at once: generous, since it is only ever
// waited out by a test that fails.
const Patience = 20 * time.Second

var shared struct {
	dir  string // of this run: binaries, data and logs
	bin  rig.Binaries
	nats *rig.NATS
}

// Main is what TestMain calls: it builds the binaries once, starts the NATS server that ordinary tests share, runs the
// tests and removes everything but the logs of failed ones.
func Main(m *testing.M) {
	flag.Parse()
	// The tests wait more than they compute.
	if f := flag.Lookup("test.parallel"); f.Value.String() == f.DefValue {
		f.Value.Set("6")
	}
	os.Exit(run(m))
}

func run(m *testing.M) int {
	logging.Disable() // go-redis complains of every server that a test kills
	if err := setUp(); err != nil {
		fmt.Fprintln(os.Stderr, "harness:", err)
		tearDown(true)
		return 1
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-interrupted
		tearDown(true) // the kernel ends the other children
		os.Exit(130)
	}()
	code := m.Run()
	if fault := shared.nats.Process().Fault(); fault != "" {
		fmt.Fprintln(os.Stderr, "harness:", fault)
		code = max(code, 1)
	}
	tearDown(code == 0)
	return code
}

func setUp() (err error) {
	if shared.dir, err = os.MkdirTemp("", "dws-e2e-"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Minute)
	defer cancel()
	begin := time.Now()
	if shared.bin, err = rig.Build(ctx, shared.dir, Race); err != nil {
		return err
	}
	redis := rig.RedisServer()
	if redis == "" {
		redis = "in-process (redis-server is not installed)"
	}
	fmt.Printf("harness: built in %.1f s, race detector %t, Redis %s\n", time.Since(begin).Seconds(), Race, redis)
	dir := filepath.Join(shared.dir, "nats")
	if err = os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	shared.nats, err = rig.StartNATS(shared.bin.NATS, dir)
	return err
}

// tearDown ends the shared server and removes what this run made, or only what nobody wants to read.
func tearDown(all bool) {
	if shared.nats != nil {
		shared.nats.Stop()
	}
	if all {
		os.RemoveAll(shared.dir)
		return
	}
	os.RemoveAll(filepath.Join(shared.dir, "nats", "jetstream"))
	os.Remove(shared.bin.Service)
	os.Remove(shared.bin.NATS)
	fmt.Println("harness: logs of this run are in", shared.dir)
}

// Binaries are the programs under test, for tests of the command line.
func Binaries() rig.Binaries { return shared.bin }

// RealRedis says whether redis-server is installed; without it an in-process Redis serves that cannot be killed and
// whose keys expire by a ticker.
func RealRedis() bool { return rig.RedisServer() != "" }

// NeedRealRedis skips a test about expiry, restart or take-over where there is no redis-server. In CI a skip is a failure.
func NeedRealRedis(t testing.TB) {
	t.Helper()
	if !RealRedis() {
		t.Skip("SKIPPED: this test proves nothing without a real redis-server; install it (Debian: apt-get install redis-server)")
	}
}

// logDir makes a folder for the logs of t, which goes when t has passed.
func logDir(t testing.TB) string {
	t.Helper()
	name := strings.Map(func(r rune) rune {
		if r == '/' || r == ' ' {
			return '_'
		}
		return r
	}, t.Name())
	dir, err := os.MkdirTemp(shared.dir, name+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("logs of this test are in %s", dir)
			return
		}
		os.RemoveAll(dir)
	})
	return dir
}

// Within is a context for one step of a test.
func Within(t testing.TB, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// Eventually asks every 10 ms until ok says yes. what completes the sentence "waited ... for".
func Eventually(t testing.TB, d time.Duration, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(d)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline.C:
			t.Fatalf("waited %v in vain for %s", d, what)
		}
	}
}
