package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// TestServersKeepTheirData: what NATS and Redis had acknowledged is there again after SIGKILL, on the same ports.
func TestServersKeepTheirData(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.OwnNATS())
	rdb := w.RedisClient()
	ctx := harness.Within(t, harness.Patience)
	if err := rdb.Set(ctx, "k", "v", 0).Err(); err != nil {
		t.Fatal(err)
	}
	seq := w.Chat("acme", "desk1")
	w.NATS.Kill()
	w.Redis.Kill()
	if err := rdb.Ping(ctx).Err(); err == nil {
		t.Fatal("a killed Redis answers")
	}
	if err := w.NATS.Restart(); err != nil {
		t.Fatal(err)
	}
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	if got, err := rdb.Get(ctx, "k").Result(); err != nil || got != "v" {
		t.Errorf("after the restart k is %q, %v", got, err)
	}
	if next := w.Chat("acme", "desk1"); next != seq+1 {
		t.Errorf("after the restart the next sequence is %d, want %d", next, seq+1)
	}
	w.Redis.Kill()
	if err := w.Redis.LoseData(); err != nil {
		t.Fatal(err)
	}
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	if n, err := rdb.DBSize(ctx).Result(); err != nil || n != 0 {
		t.Errorf("after the loss there are %d keys, %v", n, err)
	}
}

// TestAlarms: a child that prints a race or a panic, or ends by itself, is found out.
func TestAlarms(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct{ script, want string }{
		{"echo WARNING: DATA RACE; exec sleep 60", `printed "WARNING: DATA RACE"`},
		{"printf 'panic: no line feed'", `printed "panic: no line feed"`},
		{"exit 3", "ended by itself with status 3"},
		{"echo all is well; exec sleep 60", ""},
	} {
		p, err := rig.Start("child", filepath.Join(t.TempDir(), "log"), os.Environ(), "/bin/sh", "-c", tc.script)
		if err != nil {
			t.Fatal(err)
		}
		if tc.want == "" {
			p.Log.Find(harness.Within(t, harness.Patience), func(line string) bool { return line == "all is well" })
		} else {
			harness.Eventually(t, harness.Patience, "a fault", func() bool { return p.Fault() != "" })
		}
		if got := p.Fault(); tc.want == "" && got != "" || !strings.Contains(got, tc.want) {
			t.Errorf("%s: fault %q, want %q", tc.script, got, tc.want)
		}
		p.Kill()
	}
}

// TestChildrenDieWithTheirParent: a test program that is killed leaves no process. The parent is this test binary again.
func TestChildrenDieWithTheirParent(t *testing.T) {
	if os.Getenv("DWS_TEST_PARENT") == "1" {
		p, err := rig.Start("child", os.DevNull, nil, "/bin/sleep", "60")
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("child %d\n", p.PID())
		p.Wait(context.Background())
		return
	}
	t.Parallel()
	parent := exec.Command(os.Args[0], "-test.run=^TestChildrenDieWithTheirParent$")
	parent.Env = append(os.Environ(), "DWS_TEST_PARENT=1")
	out, err := parent.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := parent.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanf(out, "child %d\n", &pid); err != nil {
		t.Fatalf("the parent does not name its child: %v", err)
	}
	parent.Process.Kill()
	parent.Wait()
	harness.Eventually(t, harness.Patience, "the child to be gone", func() bool {
		return syscall.Kill(pid, 0) == syscall.ESRCH
	})
}

// TestProxy: latency, cut, black hole and back.
func TestProxy(t *testing.T) {
	t.Parallel()
	echo, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	p, err := rig.StartProxy(echo.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, err := net.Dial("tcp", p.Address())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ping := func(limit time.Duration) error {
		c.SetDeadline(time.Now().Add(limit))
		if _, err := c.Write([]byte("x")); err != nil {
			return err
		}
		_, err := io.ReadFull(c, make([]byte, 1))
		return err
	}
	if err := ping(harness.Patience); err != nil {
		t.Fatal(err)
	}
	p.Latency(50 * time.Millisecond)
	begin := time.Now()
	if err := ping(harness.Patience); err != nil || time.Since(begin) < 100*time.Millisecond {
		t.Errorf("with 50 ms each way: %v, %v", time.Since(begin), err)
	}
	p.Latency(0)
	p.BlackHole()
	if err := ping(100 * time.Millisecond); err == nil {
		t.Error("an answer out of a black hole")
	}
	p.Restore()
	c.SetDeadline(time.Now().Add(harness.Patience))
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Errorf("what the black hole held does not arrive: %v", err)
	}
	p.Cut()
	if err := ping(harness.Patience); err == nil {
		t.Error("an answer over a cut connection")
	}
}
