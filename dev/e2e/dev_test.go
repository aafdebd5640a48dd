package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/sys/unix"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// output collects what a demo prints.
type output struct {
	mu   sync.Mutex // guards text
	text bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return strings.ReplaceAll(o.text.String(), "\r\n", "\n") // a terminal's line ends
}

// demo is a make dev under test, in a temporary folder of its own.
type demo struct {
	*exec.Cmd
	out *output
	tmp string
}

// startDemo runs make dev in a session of its own with nothing but PATH and HOME; tty, if any, is its terminal.
func startDemo(t *testing.T, tty *os.File) *demo {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	d := &demo{Cmd: exec.Command("make", "dev"), out: &output{}, tmp: t.TempDir()}
	d.Dir = root
	d.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + d.tmp}
	d.Stdout, d.Stderr = d.out, d.out
	d.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	if tty != nil {
		d.Stdin, d.Stdout, d.Stderr = tty, tty, tty
		d.SysProcAttr.Setctty = true
	}
	d.start(t)
	return d
}

// start has the demo end with the test.
func (d *demo) start(t *testing.T) {
	t.Helper()
	if err := d.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if d.ProcessState == nil {
			syscall.Kill(-d.Process.Pid, syscall.SIGINT)
			d.Wait()
		}
		if t.Failed() {
			t.Logf("the demo printed:\n%s", d.out)
		}
	})
}

// line waits for the line that the demo prints and pattern matches.
func (d *demo) line(t *testing.T, pattern string) string {
	t.Helper()
	re := regexp.MustCompile("(?m)^" + pattern + "$")
	found := ""
	harness.Eventually(t, 5*time.Minute, "a line of make dev like "+pattern, func() bool {
		found = re.FindString(d.out.String())
		return found != ""
	})
	return found
}

// wantGone waits for make's end and looks for what the demo may have left: processes that have its folder in their
// environment or arguments, files, and open ports.
func (d *demo) wantGone(t *testing.T, status int, addresses ...string) {
	t.Helper()
	begin := time.Now()
	done := make(chan error, 1)
	go func() { done <- d.Wait() }()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatal("make dev still runs 10 s after its interrupt")
	}
	t.Logf("ended within %v", time.Since(begin))
	if got := d.ProcessState.ExitCode(); got != status {
		t.Errorf("make dev ended with %v, want status %d", d.ProcessState, status)
	}
	harness.Eventually(t, 10*time.Second-time.Since(begin), "all processes of make dev to be gone", func() bool { return len(processesIn(d.tmp)) == 0 })
	left, err := os.ReadDir(d.tmp)
	if err != nil || len(left) > 0 {
		t.Errorf("left in the temporary folder: %v, %v", left, err)
	}
	for _, a := range addresses {
		if c, err := net.Dial("tcp", a); err == nil {
			c.Close()
			t.Errorf("%s still answers", a)
		}
	}
}

// processesIn are the processes whose environment or arguments name dir.
func processesIn(dir string) []string {
	var pids []string
	files, _ := filepath.Glob("/proc/[0-9]*")
	for _, proc := range files {
		for _, name := range []string{"/environ", "/cmdline"} {
			if text, err := os.ReadFile(proc + name); err == nil && bytes.Contains(text, []byte(dir)) {
				pids = append(pids, proc)
				break
			}
		}
	}
	return pids
}

// TestMakeDev runs the README's first command as a newcomer does, in a terminal: each printed line works as pasted, and
// ^C ends it with status 0.
func TestMakeDev(t *testing.T) {
	t.Parallel()
	terminal, tty := openTerminal(t)
	d := startDemo(t, tty)
	tty.Close()
	go io.Copy(d.out, terminal) // ends with the terminal
	ws := d.line(t, `/.*/ws 'ws://.*'`)
	page := d.line(t, `http://127\.0\.0\.1:\d+/`)
	curl := d.line(t, `curl .*`)

	wantPage(t, page)
	if _, err := exec.LookPath("nats"); err == nil {
		if line := d.line(t, `nats -s .*`); !strings.Contains(shell(t, line), "Stored in Stream: wa_stream") {
			t.Errorf("%s: not stored", line)
		}
	}
	if _, err := exec.LookPath("curl"); err == nil {
		if got := shell(t, curl); !strings.Contains(got, `"token":"`) {
			t.Errorf("%s: %s", curl, got)
		}
	}
	got := shell(t, strings.Replace(ws, " '", " -n 3 '", 1))
	if lines := strings.Split(strings.TrimSpace(got), "\n"); len(lines) != 3 ||
		!strings.HasPrefix(lines[0], `{"type":"ready"`) || !strings.HasPrefix(lines[1], `{"type":"event"`) {
		t.Errorf("%s: %s", ws, got)
	}

	u, _ := url.Parse(page)
	socket := regexp.MustCompile(`ws://[^']+`).FindString(ws)
	if !strings.HasPrefix(socket, "ws://"+u.Host+"/") || !strings.Contains(curl, "http://"+u.Host+"/") {
		t.Errorf("not one address for all: %s, %s, %s", page, curl, ws)
	}
	wantPods(t, page, socket)

	terminal.Write([]byte{3}) // ^C
	addresses := []string{u.Host}
	for _, m := range regexp.MustCompile(`(?m)^# pod-\d: http://([^/]+)/`).FindAllStringSubmatch(d.out.String(), -1) {
		addresses = append(addresses, m[1])
	}
	if len(addresses) < 4 {
		t.Errorf("want the addresses of three pods, got %v", addresses[1:])
	}
	d.wantGone(t, 0, addresses...)
}

// demoPods is what the page asks for to show the pods.
type demoPods struct {
	Pods   []struct{ Name, State string }
	Pulled map[uint64]string
}

func podsOf(t *testing.T, page string) (p demoPods) {
	t.Helper()
	if err := json.Unmarshal([]byte(get(t, page+"pods")), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p demoPods) ready() (names []string) {
	for _, pod := range p.Pods {
		if pod.State == "ready" {
			names = append(names, pod.Name)
		}
	}
	return names
}

// wantPods opens a socket as the page does: events that another pod pulled reach it; when its pod is killed, another one
// takes it over and replays what was missed, and the fleet is whole again after a while.
func wantPods(t *testing.T, page, socket string) {
	t.Helper()
	if got := podsOf(t, page).ready(); len(got) != 3 {
		t.Fatalf("want three pods that are ready, got %v", got)
	}
	next, first := openSocket(t, socket+"&since=")
	serving := servingPod(t, page, first)
	seen := map[uint64]bool{}
	harness.Eventually(t, harness.Patience, "an event that another pod than "+serving+" pulled", func() bool {
		m, err := next()
		if err != nil {
			t.Fatal(err)
		}
		if m.Type == "event" {
			seen[m.Seq] = true
		}
		for seq, by := range podsOf(t, page).Pulled {
			if seen[seq] && by != serving {
				return true
			}
		}
		return false
	})

	resp, err := http.Post(page+"end", "application/json", strings.NewReader(`{"pod":"`+serving+`","kill":true}`))
	if err != nil || resp.StatusCode != http.StatusNoContent {
		t.Fatalf("POST end: %v, %v", resp, err)
	}
	resp.Body.Close()
	for err == nil {
		_, err = next()
	}
	next, second := openSocket(t, socket+fmt.Sprintf("&since=%d&stream=%s", first.Payload.Position, first.Payload.Stream))
	if second.Payload.Gap || second.replayed == 0 {
		t.Errorf("after the end of its pod: %+v, want a replay", second)
	}
	if other := servingPod(t, page, second); other == serving {
		t.Errorf("served by %s, which was killed a moment ago", other)
	}
	m, err := next()
	for err == nil && m.Type == "position" {
		m, err = next()
	}
	if err != nil || m.Type != "event" || m.Replay {
		t.Errorf("got %+v (%v), want a live event", m, err)
	}
	harness.Eventually(t, time.Minute, serving+" to be there again", func() bool { return len(podsOf(t, page).ready()) == 3 })
}

// servingPod asks which pod has the socket. Pods learn of each other with the renewals of their leases.
func servingPod(t *testing.T, page string, ready wsMessage) string {
	t.Helper()
	var serving struct{ Pod string }
	harness.Eventually(t, harness.Patience, "the pod of session "+ready.Payload.SessionID, func() bool {
		return json.Unmarshal([]byte(get(t, page+"serving?session="+ready.Payload.SessionID)), &serving) == nil && serving.Pod != ""
	})
	return serving.Pod
}

// wsMessage is what a socket of the demo sends.
type wsMessage struct {
	Type    string
	Seq     uint64
	Replay  bool
	Payload struct {
		SessionID string `json:"session_id"`
		Position  uint64
		Stream    string
		Gap       bool
	}

	replayed int // of ready: events before it
}

// openSocket returns ready, and what reads the messages after it. It tries as a client does: the killed pod's place may
// not be known to the proxy yet.
func openSocket(t *testing.T, address string) (next func() (wsMessage, error), ready wsMessage) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	t.Cleanup(cancel)
	c, _, err := websocket.Dial(ctx, address, nil)
	for err != nil && ctx.Err() == nil {
		c, _, err = websocket.Dial(ctx, address, nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.CloseNow() })
	c.SetReadLimit(-1)
	next = func() (m wsMessage, err error) {
		_, data, err := c.Read(ctx)
		if err == nil {
			json.Unmarshal(data, &m) // an event's payload may have anything in these fields
		}
		return m, err
	}
	for n := 0; ; n++ {
		m, err := next()
		if err != nil {
			t.Fatal(err)
		}
		if m.Type == "ready" {
			m.replayed = n
			return next, m
		}
	}
}

// TestMakeDevInterrupted: without a terminal, a SIGINT to the whole group, or to make alone, ends the demo too. make
// itself then dies of the signal, as it always does.
func TestMakeDevInterrupted(t *testing.T) {
	t.Parallel()
	for name, interrupt := range map[string]func(d *demo) error{
		"group": func(d *demo) error { return syscall.Kill(-d.Process.Pid, syscall.SIGINT) },
		"make":  func(d *demo) error { return d.Process.Signal(syscall.SIGINT) },
		"kill":  func(d *demo) error { return d.Process.Kill() },
	} {
		t.Run(name, func(t *testing.T) {
			d := startDemo(t, nil)
			page := d.line(t, `http://127\.0\.0\.1:\d+/`)
			if err := interrupt(d); err != nil {
				t.Fatal(err)
			}
			u, _ := url.Parse(page)
			d.wantGone(t, -1, u.Host)
			if strings.Contains(d.out.String(), "dev: ") {
				t.Errorf("it complains:\n%s", d.out)
			}
		})
	}
}

// startAlone runs the demo without make.
func startAlone(t *testing.T, args ...string) *demo {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(t.TempDir(), "cluster")
	if out, err := exec.Command("go", "-C", filepath.Join(root, "dev"), "build", "-buildvcs=false", "-o", bin, "./cluster").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v\n%s", err, out)
	}
	d := &demo{Cmd: exec.Command(bin, args...), out: &output{}, tmp: t.TempDir()}
	d.Dir, d.Stdout, d.Stderr = root, d.out, d.out
	d.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"), "TMPDIR=" + d.tmp}
	d.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	d.start(t)
	return d
}

// TestDemoAlone: the demo's own status after a SIGINT to its whole group is 0.
func TestDemoAlone(t *testing.T) {
	t.Parallel()
	d := startAlone(t)
	d.line(t, `http://127\.0\.0\.1:\d+/`)
	syscall.Kill(-d.Process.Pid, syscall.SIGINT)
	d.wantGone(t, 0)
}

// wantPage looks at the page as a browser would, and mints a token the way it does.
func wantPage(t *testing.T, page string) {
	t.Helper()
	for path, want := range map[string]string{"": "<!doctype html>", "app.js": "select", "client.js": "new WebSocket", "style.css": "body", "chats": `"chat_id"`} {
		if got := get(t, page+path); !strings.Contains(got, want) {
			t.Errorf("GET %s%s: %.200s", page, path, got)
		}
	}
	for _, secret := range []string{"http://", "https://"} {
		for _, path := range []string{"", "app.js", "client.js", "style.css"} {
			if strings.Contains(get(t, page+path), secret) {
				t.Errorf("%s%s names an external resource", page, path)
			}
		}
	}
	resp, err := http.Post(page+"token", "application/json", strings.NewReader(`{"user":"ann"}`))
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK || !strings.Contains(string(body), `"token":"`) {
		t.Errorf("POST %stoken: %s %s", page, resp.Status, body)
	}
}

func get(t *testing.T, address string) string {
	t.Helper()
	resp, err := http.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, %v", address, resp.Status, err)
	}
	return string(body)
}

// shell runs a line as pasted into a terminal with a bare environment.
func shell(t *testing.T, line string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", line)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH")}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v\n%s", line, err, out)
	}
	return string(out)
}

// openTerminal makes a pseudo-terminal and returns both ends.
func openTerminal(t *testing.T) (terminal, tty *os.File) {
	t.Helper()
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { terminal.Close() })
	fd := int(terminal.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err = errors.Join(err, unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)); err != nil {
		t.Fatal(err)
	}
	tty, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return terminal, tty
}
