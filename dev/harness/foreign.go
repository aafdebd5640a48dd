package harness

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/rig"
)

// Actor is a script in another program (Node, Python, a page of a browser). It is told what to do by JSON, and says by
// JSON what has happened.
type Actor struct {
	Said <-chan json.RawMessage // closed when the program has ended

	page   bool // of a browser
	tell   func(line []byte) error
	freeze func(on bool)
	end    func() // may be called twice
}

// Tell makes the script do something; v is encoded as JSON.
func (a *Actor) Tell(v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return a.tell(line)
}

// Freeze stops and continues the whole program by signals.
func (a *Actor) Freeze(on bool) { a.freeze(on) }

// End ends the program, or closes the page.
func (a *Actor) End() { a.end() }

// Library is a client library in a program of its own: one process, or one page, per socket.
type Library struct {
	Name string
	act  func(ctx context.Context, page string) (*Actor, error)
}

var actors atomic.Int64 // started so far; each has a log of its own

// program starts a script that is spoken to by lines. env is added to this program's own environment.
func program(dir, name, bin string, env []string, args ...string) (*Actor, error) {
	log := filepath.Join(dir, fmt.Sprintf("%s-%d.log", name, actors.Add(1)))
	p, in, out, err := rig.Converse(name, log, append(os.Environ(), env...), bin, args...)
	if err != nil {
		return nil, err
	}
	said := make(chan json.RawMessage, 64) // closed by the reader below
	ended := make(chan struct{})           // closed by end
	go func() {
		defer close(said)
		defer out.Close()
		lines := bufio.NewScanner(out)
		lines.Buffer(nil, 64<<20)
		for lines.Scan() {
			select {
			case said <- append(json.RawMessage(nil), lines.Bytes()...):
			case <-ended:
				return
			}
		}
	}()
	return &Actor{
		Said:   said,
		tell:   func(line []byte) error { _, err := in.Write(append(line, '\n')); return err },
		freeze: func(on bool) { p.SignalGroup(stopOrGo(on)) },
		end: sync.OnceFunc(func() {
			close(ended)
			p.SignalGroup(syscall.SIGKILL)
			<-p.Done()
			in.Close()
		}),
	}, nil
}

func stopOrGo(stop bool) syscall.Signal {
	if stop {
		return syscall.SIGSTOP
	}
	return syscall.SIGCONT
}

// testdata is the path of a file beside the end-to-end tests.
func testdata(t testing.TB, name string) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(root, "dev", "e2e", "testdata", name)
}

// need skips a test where something that it needs is missing. In CI a skip is a failure.
func need(t testing.TB, err error, install string) {
	t.Helper()
	if err != nil {
		t.Skipf("SKIPPED: %v; install it (Debian: apt-get install %s)", err, install)
	}
}

// nodeModules is a folder with the npm package ws, of the version that its lock file names.
var nodeModules = sync.OnceValues(func() (string, error) {
	npm, err := exec.LookPath("npm")
	if err != nil {
		return "", err
	}
	root, err := rig.Root()
	if err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(shared.dir, "npm-")
	if err != nil {
		return "", err
	}
	if err := os.CopyFS(dir, os.DirFS(filepath.Join(root, "dev", "e2e", "testdata", "npm"))); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-update-notifier", "--fetch-retries=1")
	cmd.Dir, cmd.WaitDelay = dir, time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("npm ci (it needs the network): %w\n%s", err, out)
	}
	return filepath.Join(dir, "node_modules"), nil
})

// NodeScript returns what starts a script under Node, with the package ws to be had by require.
func NodeScript(t testing.TB, script string, args ...string) func() (*Actor, error) {
	t.Helper()
	node, err := exec.LookPath("node")
	need(t, err, "nodejs npm")
	modules, err := nodeModules()
	need(t, err, "nodejs npm")
	dir, path := logDir(t), testdata(t, script)
	return func() (*Actor, error) {
		return program(dir, "node", node, []string{"NODE_PATH=" + modules}, append([]string{path}, args...)...)
	}
}

// Node is the npm package ws.
func Node(t testing.TB) *Library {
	t.Helper()
	start := NodeScript(t, "guest.js")
	return &Library{Name: "ws of npm", act: func(context.Context, string) (*Actor, error) { return start() }}
}

// Python is Debian's python3-websockets. The first python3 on the PATH need not be the one that has Debian's modules.
func Python(t testing.TB) *Library {
	t.Helper()
	const python = "/usr/bin/python3"
	need(t, exec.Command(python, "-c", "import websockets").Run(), "python3-websockets")
	dir, path := logDir(t), testdata(t, "guest.py")
	return &Library{Name: "websockets of Python", act: func(context.Context, string) (*Actor, error) {
		return program(dir, "python", python, nil, path)
	}}
}

// Chromium is a page's WebSocket. Pages are served by the pod that they connect to.
func Chromium(t testing.TB) *Library {
	t.Helper()
	b := StartBrowser(t)
	path := testdata(t, "guest.js")
	return &Library{Name: "chromium", act: func(ctx context.Context, page string) (*Actor, error) { return b.Open(ctx, page, path) }}
}

// told is a command to a guest script, and what it says of its socket.
type told struct {
	Do        string            `json:"do,omitempty"`
	URL       string            `json:"url,omitempty"`
	Protocols []string          `json:"protocols,omitempty"`
	Headers   map[string]string `json:"headers,omitempty"`
	Compress  bool              `json:"compress,omitempty"`
	Text      bool              `json:"text,omitempty"`
	Bytes     []byte            `json:"bytes,omitempty"` // base64

	Got      string `json:"got,omitempty"`
	Data     string `json:"data,omitempty"`
	Protocol string `json:"protocol,omitempty"`
	Code     int    `json:"code,omitempty"`
	Reason   string `json:"reason,omitempty"`
}

// foreignClose is the end of a socket as its library tells it.
type foreignClose struct {
	Code   int
	Reason string
}

func (c foreignClose) Error() string { return fmt.Sprintf("close %d %q", c.Code, c.Reason) }

// foreignWire is the socket of a guest script.
type foreignWire struct {
	a      *Actor
	chosen string // sub-protocol
	pongs  pongs
}

// dial returns a response for its status alone, and only where the library tells it: a page's does not.
func (l *Library) dial(ctx context.Context, d dialer) (wire, *http.Response, error) {
	u, err := url.Parse(d.url)
	if err != nil {
		return nil, nil, err
	}
	a, err := l.act(ctx, "http://"+u.Host+"/health")
	if err != nil {
		return nil, nil, fmt.Errorf("start %s: %w", l.Name, err)
	}
	open := told{Do: "open", URL: d.url, Protocols: d.protocols, Headers: map[string]string{}, Compress: d.compression}
	for name := range d.header {
		open.Headers[name] = d.header.Get(name)
	}
	w := &foreignWire{a: a, pongs: make(pongs, 16)}
	m, err := w.first(ctx, open)
	if err == nil && m.Got != "open" {
		err = fmt.Errorf("%s did not open the socket: %+v", l.Name, m)
	}
	if err != nil {
		a.End()
		if m.Got == "refused" {
			return nil, &http.Response{Status: http.StatusText(m.Code), StatusCode: m.Code, Body: http.NoBody}, err
		}
		return nil, nil, err
	}
	w.chosen = m.Protocol
	return w, nil, nil
}

func (w *foreignWire) first(ctx context.Context, open told) (told, error) {
	if err := w.a.Tell(open); err != nil {
		return told{}, err
	}
	select {
	case line := <-w.a.Said:
		return parse(line)
	case <-ctx.Done():
		return told{}, ctx.Err()
	}
}

func parse(line []byte) (m told, err error) {
	if line == nil {
		return m, errors.New("the program has ended")
	}
	if err = json.Unmarshal(line, &m); err != nil {
		err = fmt.Errorf("the program says %.200q: %w", line, err)
	}
	return m, err
}

func (w *foreignWire) read() (bool, []byte, error) {
	for line := range w.a.Said {
		m, err := parse(line)
		switch {
		case err != nil:
			return false, nil, err
		case m.Got == "text" || m.Got == "binary":
			return m.Got == "text", []byte(m.Data), nil
		case m.Got == "pong":
			w.pongs.add(m.Data)
		case m.Got == "close":
			return false, nil, foreignClose{m.Code, m.Reason}
		default:
			return false, nil, fmt.Errorf("the program says %s", line)
		}
	}
	return false, nil, errors.New("the program has ended")
}

func (w *foreignWire) write(_ context.Context, text bool, data []byte) error {
	return w.a.Tell(told{Do: "send", Text: text, Bytes: data})
}

func (w *foreignWire) raw(data []byte) error {
	if w.a.page {
		return errCannot
	}
	return w.a.Tell(told{Do: "raw", Bytes: data})
}

func (w *foreignWire) ping(ctx context.Context, payload string) error {
	if w.a.page {
		return errCannot
	}
	if err := w.a.Tell(told{Do: "ping", Bytes: []byte(payload)}); err != nil {
		return err
	}
	return w.pongs.wait(ctx, payload)
}

func (w *foreignWire) close(code int, reason string) {
	w.a.Tell(told{Do: "close", Code: code, Reason: reason})
}

func (w *foreignWire) abort()           { w.a.End() }
func (w *foreignWire) pause(on bool)    { w.a.Freeze(on) }
func (w *foreignWire) protocol() string { return w.chosen }
