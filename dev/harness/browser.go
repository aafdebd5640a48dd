package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	coder "github.com/coder/websocket"

	"daisi-ws-service/dev/rig"
)

// Browser is a headless chromium, told what to do by its DevTools protocol over one WebSocket: each request has an id
// that its answer repeats, and pages have a session each.
type Browser struct {
	p  *rig.Process
	ws *coder.Conn

	mu      sync.Mutex // guards all below
	id      int
	waiting map[int]chan devtools
	pages   map[string]chan json.RawMessage // by session
	errors  map[string][]string             // that a page's console shows, by session
	closed  bool
}

// devtools is a request, an answer or an event.
type devtools struct {
	ID        int             `json:"id,omitempty"`
	Session   string          `json:"sessionId,omitempty"`
	Method    string          `json:"method,omitempty"`
	Params    any             `json:"params,omitempty"`
	Result    json.RawMessage `json:"result,omitempty"`
	Error     json.RawMessage `json:"error,omitempty"`
	rawParams json.RawMessage
}

// UnmarshalJSON leaves the parameters as they are: only those of few events are looked at.
func (d *devtools) UnmarshalJSON(b []byte) error {
	type plain devtools
	var in struct {
		*plain
		Params json.RawMessage `json:"params"`
	}
	in.plain = (*plain)(d)
	err := json.Unmarshal(b, &in)
	d.rawParams = in.Params
	return err
}

// StartBrowser starts chromium with a profile of its own; it ends with the test. A machine without it skips the test.
func StartBrowser(t testing.TB) *Browser {
	t.Helper()
	bin, err := exec.LookPath("chromium")
	need(t, err, "chromium")
	dir := logDir(t)
	// Without the sandbox root may run it. What it would ask Google's servers it shall not ask; background pages are as
	// quick as others.
	p, err := rig.Start("chromium", filepath.Join(dir, "chromium.log"), append(os.Environ(), "HOME="+dir), bin,
		"--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--user-data-dir="+filepath.Join(dir, "profile"),
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions", "--no-proxy-server",
		"--disable-background-timer-throttling", "--disable-renderer-backgrounding", "--remote-debugging-port=0", "about:blank")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.SignalGroup(syscall.SIGKILL)
		<-p.Done()
	})
	const says = "DevTools listening on "
	ctx := Within(t, 2*Patience)
	line, err := p.Log.Find(ctx, func(line string) bool { return strings.HasPrefix(line, says) })
	if err != nil {
		t.Fatalf("chromium does not start: %v", err)
	}
	b := &Browser{p: p, waiting: map[int]chan devtools{}, pages: map[string]chan json.RawMessage{}, errors: map[string][]string{}}
	if b.ws, _, err = coder.Dial(ctx, strings.TrimPrefix(line, says), nil); err != nil {
		t.Fatalf("chromium's DevTools: %v", err)
	}
	b.ws.SetReadLimit(-1)
	go b.read() // ends with the process
	return b
}

func (b *Browser) read() {
	defer b.close()
	for {
		_, data, err := b.ws.Read(context.Background())
		if err != nil {
			return
		}
		var m devtools
		if json.Unmarshal(data, &m) != nil {
			return
		}
		b.take(m)
	}
}

func (b *Browser) take(m devtools) {
	var said struct {
		Payload string                 // of a call of say
		Type    string                 // of a line that the page writes to its console
		Entry   struct{ Level string } // of a line that the browser writes there
	}
	json.Unmarshal(m.rawParams, &said) // other events have other parameters
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case m.ID != 0:
		b.waiting[m.ID] <- m // has room for the one answer
		delete(b.waiting, m.ID)
	case m.Method == "Runtime.bindingCalled" && b.pages[m.Session] != nil:
		b.pages[m.Session] <- json.RawMessage(said.Payload)
	case m.Method == "Runtime.exceptionThrown", m.Method == "Runtime.consoleAPICalled" && said.Type == "error", m.Method == "Log.entryAdded" && said.Entry.Level == "error":
		b.errors[m.Session] = append(b.errors[m.Session], string(m.rawParams))
	}
}

// close ends all waits and tells the pages' listeners that there is no more to hear.
func (b *Browser) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	for _, c := range b.waiting {
		close(c)
	}
	for _, c := range b.pages {
		close(c)
	}
}

// forget ends what a page has to say.
func (b *Browser) forget(session string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if said := b.pages[session]; said != nil && !b.closed {
		close(said)
	}
	delete(b.pages, session)
	delete(b.errors, session)
}

// ask sends a request and decodes the answer's result into result, which may be nil.
func (b *Browser) ask(ctx context.Context, session, method string, params, result any) error {
	answer := make(chan devtools, 1)
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return errors.New("chromium has ended")
	}
	b.id++
	m := devtools{ID: b.id, Session: session, Method: method, Params: params}
	b.waiting[m.ID] = answer
	b.mu.Unlock()
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if err := b.ws.Write(ctx, coder.MessageText, data); err != nil {
		return fmt.Errorf("%s: %w", method, err)
	}
	select {
	case m, ok := <-answer:
		if !ok || m.Error != nil {
			return fmt.Errorf("%s: %s", method, m.Error)
		}
		if result == nil {
			return nil
		}
		return json.Unmarshal(m.Result, result)
	case <-ctx.Done():
		return fmt.Errorf("%s: %w", method, ctx.Err())
	}
}

// evaluate runs JavaScript in a page and decodes its value into result, unless that is nil; an exception is an error.
func (b *Browser) evaluate(ctx context.Context, session, expression string, result any) error {
	var out struct {
		Result           struct{ Value json.RawMessage }
		ExceptionDetails *struct {
			Exception struct{ Description string }
		}
	}
	err := b.ask(ctx, session, "Runtime.evaluate", map[string]any{"expression": expression, "returnByValue": result != nil}, &out)
	if err == nil && out.ExceptionDetails != nil {
		err = fmt.Errorf("the page throws %s", out.ExceptionDetails.Exception.Description)
	}
	if err != nil || result == nil {
		return err
	}
	return json.Unmarshal(out.Result.Value, result)
}

// newPage makes an empty page and returns its id, and that of a session with it.
func (b *Browser) newPage(ctx context.Context) (target, session string, err error) {
	var made struct{ TargetID string }
	var attached struct{ SessionID string }
	if err = b.ask(ctx, "", "Target.createTarget", map[string]any{"url": "about:blank"}, &made); err == nil {
		err = b.ask(ctx, "", "Target.attachToTarget", map[string]any{"targetId": made.TargetID, "flatten": true}, &attached)
	}
	return made.TargetID, attached.SessionID, err
}

// Open opens a page and runs scripts in it, which say what happens by a function say and are told by one named command.
func (b *Browser) Open(ctx context.Context, address string, scripts ...string) (*Actor, error) {
	target, session, err := b.newPage(ctx)
	said := make(chan json.RawMessage, 1<<14) // more than any page says unheard; closed with the browser
	b.mu.Lock()
	b.pages[session] = said
	b.mu.Unlock()
	if err == nil {
		err = b.load(ctx, session, address)
	}
	for _, path := range scripts {
		var text []byte
		if err == nil {
			text, err = os.ReadFile(path)
		}
		if err == nil {
			err = b.evaluate(ctx, session, string(text), nil)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open %s in chromium: %w", address, err)
	}
	return &Actor{
		Said: said,
		page: true,
		tell: func(line []byte) error {
			ctx, cancel := context.WithTimeout(context.Background(), Patience)
			defer cancel()
			return b.evaluate(ctx, session, fmt.Sprintf("command(%s)", line), nil)
		},
		freeze: func(on bool) { b.p.SignalGroup(stopOrGo(on)) },
		end: sync.OnceFunc(func() {
			b.forget(session)
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second) // the browser may stand still
			defer cancel()
			b.ask(ctx, "", "Target.closeTarget", map[string]any{"targetId": target}, nil)
		}),
	}, nil
}

// load goes to an address and returns when the page is complete. The binding outlives the change of documents.
func (b *Browser) load(ctx context.Context, session, address string) error {
	const script = `if (document.readyState === "complete") say("{}"); else addEventListener("load", () => say("{}"));`
	var went struct{ ErrorText string }
	err := b.ask(ctx, session, "Runtime.enable", nil, nil)
	if err == nil {
		err = b.ask(ctx, session, "Runtime.addBinding", map[string]any{"name": "say"}, nil)
	}
	if err == nil {
		err = b.ask(ctx, session, "Page.navigate", map[string]any{"url": address}, &went)
	}
	if err == nil && went.ErrorText != "" {
		err = errors.New(went.ErrorText)
	}
	if err == nil {
		err = b.evaluate(ctx, session, script, nil)
	}
	if err != nil {
		return err
	}
	b.mu.Lock()
	said := b.pages[session]
	b.mu.Unlock()
	select {
	case <-said:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
