package main

import (
	"bufio"
	"bytes"
	"compress/flate"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// testHub is a hub on a real loopback listener, with owners that live in memory.
type testHub struct {
	*hub
	t   *testing.T
	srv *httptest.Server

	mu       sync.Mutex // guards all below
	index    map[route][]*conn
	fail     error // of attach
	released []string
	attached func(route) // called within attach, before it answers
}

func testSettings(change func(*Config)) *settings {
	c := &Config{
		ServerMaxConnections: 100, ServerDrainSpread: 50 * time.Millisecond,
		WebsocketPingInterval: time.Minute, WebsocketMaxMissedPongs: 2, WebsocketWriteTimeout: 10 * time.Second,
		WebsocketBlockTimeout: 3 * time.Second, WebsocketBufferSize: 128, WebsocketDropPolicy: "drop_oldest",
		WebsocketMaxMessage: 64 << 10, WebsocketCompression: "disabled", WebsocketCompressionThreshold: 1 << 10, WebsocketRateLimit: 1000, WebsocketRateBurst: 1000,
	}
	if change != nil {
		change(c)
	}
	s := &settings{}
	s.Store(c)
	return s
}

// newTestHub ends with all its goroutines: what is left over fails the test.
func newTestHub(t *testing.T, change func(*Config)) *testHub {
	t.Helper()
	before := runtime.NumGoroutine()
	th := &testHub{t: t, index: map[route][]*conn{}}
	th.hub = newHub(testSettings(change), newMetrics(), nil, func(context.Context) (uint64, error) { return 41, nil })
	th.hub.attach, th.hub.detach, th.hub.confirm = th.attachRoute, th.detachRoute, func() {}
	th.hub.resumeFrom = func(since uint64, _ route) uint64 { return since }
	th.hub.openPast = func(context.Context, uint64, []string) (*replay, error) { return nil, errTooFar }
	th.hub.expectPast = func() func() { return func() {} }
	th.hub.openToken = func(_ context.Context, token string, admin bool) (*claims, *apiError) {
		if user, ok := strings.CutPrefix(token, "good-"); ok {
			return &claims{company: "c", agent: "a", user: user, expires: time.Now().Add(2 * time.Hour)}, nil
		}
		return nil, invalidToken("malformed", "bad token")
	}
	th.srv = httptest.NewServer(http.HandlerFunc(th.handle))
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { th.hub.run(ctx) })
	t.Cleanup(func() {
		limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := th.drain(limit); err != nil {
			t.Errorf("drain: %v", err)
		}
		stop()
		wg.Wait()
		th.srv.Close()
		wantEventually(t, "goroutines left over", func() bool { return runtime.NumGoroutine() <= before })
		if n := th.count.used.Get(); n != 0 {
			t.Errorf("%v events still count as waiting", n)
		}
		if n := th.stuck(); n != 0 {
			t.Errorf("%v events still count as stuck", n)
		}
		th.wantLedger()
	})
	return th
}

// wantLedger holds the ledger of targets against itself.
func (th *testHub) wantLedger() {
	th.t.Helper()
	n := func(o string) uint64 { return th.m.targetsTotal.with(o).Get() }
	if in, out := n("pushed"), n("written")+n("dropped")+n("duplicate")+n("failed"); in != out {
		th.t.Errorf("ledger: pushed %d, ended %d", in, out)
	}
}

func (th *testHub) handle(w http.ResponseWriter, r *http.Request) {
	if e := checkUpgrade(w, r); e != nil {
		writeError(w, e)
		return
	}
	if r.URL.Query().Get("errors") == "close" {
		th.reject(w, r, invalidToken("expired", "no"))
		return
	}
	if !th.reserve() {
		writeError(w, unavailable("full"))
		return
	}
	cl := &claims{company: "c", agent: "a", user: "u", expires: time.Now().Add(time.Hour)}
	if r.URL.Path == "/admin" {
		cl = &claims{admin: "root", scopeCompany: "c", scopeAgent: "*", expires: time.Now().Add(time.Hour)}
	}
	id := fmt.Sprintf("s%d", time.Now().UnixNano())
	th.start(w, r, cl, lock{id, func(func(int, string)) {}, func() {
		th.mu.Lock()
		defer th.mu.Unlock()
		th.released = append(th.released, id)
	}}, "req")
}

func (th *testHub) attachRoute(_ context.Context, c *conn, r route) error {
	th.mu.Lock()
	err, during := th.fail, th.attached
	if err == nil {
		th.index[r] = append(th.index[r], c)
	}
	th.mu.Unlock()
	if during != nil {
		during(r)
	}
	return err
}

func (th *testHub) detachRoute(c *conn, r route) {
	th.mu.Lock()
	defer th.mu.Unlock()
	i := slices.Index(th.index[r], c)
	if i < 0 {
		th.t.Errorf("detach of %v: not attached", r)
		return
	}
	th.index[r] = slices.Delete(th.index[r], i, i+1)
}

// targets is who gets the events of r.
func (th *testHub) targets(r route) []*conn {
	th.mu.Lock()
	defer th.mu.Unlock()
	return slices.Clone(th.index[r])
}

var general = route{kind: routeGeneral, company: "c", agent: "a"}

func messagesOf(chat string) route { return route{routeMessages, "c", "a", chat} }

// ledger is a source that remembers how each delivery ended.
type ledger struct {
	mu   sync.Mutex // guards ends
	ends map[*delivery][]outcome
}

func (l *ledger) settled(d *delivery, worst outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ends == nil {
		l.ends = map[*delivery][]outcome{}
	}
	l.ends[d] = append(l.ends[d], worst)
}

func (l *ledger) of(d *delivery) []outcome {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.ends[d])
}

// counted is how many deliveries ended with o.
func (l *ledger) counted(o outcome) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, ends := range l.ends {
		if slices.Contains(ends, o) {
			n++
		}
	}
	return n
}

func newDelivery(l *ledger, k kind, chat string, seq, count uint64, size int) *delivery {
	ev := &event{seq: seq, kind: k, company: "c", agent: "a", chat: chat, stored: time.Now(), payload: []byte(`{"x":"` + strings.Repeat("y", size) + `"}`)}
	ev.frame = newEventFrame(ev, false, false)
	d := &delivery{event: ev, count: count, arrived: time.Now(), src: l}
	d.open.Store(1)
	return d
}

// publish pushes one event to all targets of its route, as the router does, and returns it.
func (th *testHub) publish(l *ledger, k kind, chat string, seq uint64, size int) *delivery {
	d := newDelivery(l, k, chat, seq, 1, size)
	r := general
	if k == kindMessage {
		r = messagesOf(chat)
	}
	targets := th.targets(r)
	d.open.Store(int32(len(targets)) + 1)
	for _, c := range targets {
		c.push(d)
	}
	d.settle(written)
	return d
}

// testClient speaks RFC 6455 by hand, so that it can break it.
type testClient struct {
	t  *testing.T
	nc net.Conn
	br *bufio.Reader

	deflate bool // compression was negotiated
	packed  bool // the last frame was compressed
}

const testKey = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"

func upgradeRequest(path, more string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" + testKey + more + "\r\n"
}

func (th *testHub) dialRaw(request string) *testClient {
	th.t.Helper()
	nc, err := net.Dial("tcp", th.srv.Listener.Addr().String())
	if err != nil {
		th.t.Fatal(err)
	}
	th.t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(nc, request); err != nil {
		th.t.Fatal(err)
	}
	return &testClient{t: th.t, nc: nc, br: bufio.NewReader(nc)}
}

// dial opens a socket; behind is sent in the same segment as the handshake.
func (th *testHub) dial(path, behind string) *testClient {
	th.t.Helper()
	c := th.dialRaw(upgradeRequest(path, "") + behind)
	res, err := http.ReadResponse(c.br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		th.t.Fatalf("upgrade: %v %v", res, err)
	}
	return c
}

// open dials and reads `ready`.
func (th *testHub) open(path string) *testClient {
	th.t.Helper()
	c := th.dial(path, "")
	c.want("ready")
	return c
}

// clientFrame builds a masked frame.
func clientFrame(first byte, payload string) string {
	b := appendHeader(nil, 0, len(payload))
	b[0], b[1] = first, b[1]|maskBit
	mask := [4]byte{1, 2, 3, 4}
	b = append(b, mask[:]...)
	for i := range len(payload) {
		b = append(b, payload[i]^mask[i%4])
	}
	return string(b)
}

func textFrame(s string) string { return clientFrame(finBit|opText, s) }

func (c *testClient) send(frames ...string) {
	c.t.Helper()
	if _, err := io.WriteString(c.nc, strings.Join(frames, "")); err != nil {
		c.t.Fatalf("send: %v", err)
	}
}

// frame reads one frame.
func (c *testClient) frame() (op byte, payload []byte, err error) {
	var h [2]byte
	if _, err = io.ReadFull(c.br, h[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(h[1])
	switch n {
	case 126:
		var l uint16
		err = binary.Read(c.br, binary.BigEndian, &l)
		n = uint64(l)
	case 127:
		err = binary.Read(c.br, binary.BigEndian, &n)
	}
	if err != nil {
		return 0, nil, err
	}
	op, rsv := h[0]&0x0F, h[0]&rsvBits
	c.packed = rsv == rsv1 && c.deflate && op < opClose
	if h[0]&finBit == 0 || rsv != 0 && !c.packed || h[1]&maskBit != 0 {
		return 0, nil, fmt.Errorf("header %x", h)
	}
	payload = make([]byte, n)
	if _, err = io.ReadFull(c.br, payload); err == nil && c.packed {
		payload, err = io.ReadAll(flate.NewReader(io.MultiReader(bytes.NewReader(payload), strings.NewReader(deflateTail))))
	}
	return op, payload, err
}

// serverMessage is any json.v1 message of the server.
type serverMessage struct {
	Type      string         `json:"type"`
	EventType string         `json:"event_type"`
	Seq       uint64         `json:"seq"`
	Payload   map[string]any `json:"payload"`
}

// message reads the next text message; pings are passed over.
func (c *testClient) message() serverMessage {
	c.t.Helper()
	for {
		op, p, err := c.frame()
		if err != nil {
			c.t.Fatalf("read: %v", err)
		}
		switch op {
		case opPing:
			continue
		case opText:
		default:
			c.t.Fatalf("got opcode %d: %q", op, p)
		}
		var m serverMessage
		if err := json.Unmarshal(p, &m); err != nil {
			c.t.Fatalf("message %q: %v", p, err)
		}
		return m
	}
}

func (c *testClient) want(typ string) serverMessage {
	c.t.Helper()
	m := c.message()
	if m.Type != typ {
		c.t.Fatalf("got %+v, want %s", m, typ)
	}
	return m
}

func (c *testClient) wantError(code string) {
	c.t.Helper()
	if m := c.want("error"); m.Payload["code"] != code {
		c.t.Fatalf("got error %v, want %s", m.Payload, code)
	}
}

// wantClose reads up to the close frame and the end of the connection. Code 0 is an empty close frame.
func (c *testClient) wantClose(code int, reason string) {
	c.t.Helper()
	for {
		op, p, err := c.frame()
		if err != nil {
			c.t.Fatalf("want close %d, got %v", code, err)
		}
		if op != opClose {
			continue
		}
		got, text := 0, ""
		if len(p) >= 2 {
			got, text = int(binary.BigEndian.Uint16(p)), string(p[2:])
		}
		if got != code || reason != "" && text != reason {
			c.t.Fatalf("closed %d %q, want %d %q", got, text, code, reason)
		}
		break
	}
	if _, err := c.br.ReadByte(); !errors.Is(err, io.EOF) {
		c.t.Fatalf("after the close frame: %v", err)
	}
	c.nc.Close()
}

func wantEventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.NewTimer(10 * time.Second)
	defer deadline.Stop()
	poll := time.NewTicker(2 * time.Millisecond)
	defer poll.Stop()
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline.C:
			buf := make([]byte, 1<<20)
			os.Stderr.Write(buf[:runtime.Stack(buf, true)])
			t.Fatal(what)
		}
	}
}

func TestReadyEventsClose(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.dial("/?since=7", "")
	if m := c.want("ready"); m.Payload["seq"] != 41.0 || m.Payload["gap"] != true || m.Payload["session_id"] == "" {
		t.Fatalf("ready: %v", m.Payload)
	}
	var l ledger
	d := th.publish(&l, kindChat, "", 42, 10)
	if m := c.want("event"); m.Seq != 42 || m.EventType != "chat" || m.Payload["x"] != strings.Repeat("y", 10) {
		t.Fatalf("event: %+v", m)
	}
	wantEventually(t, "the delivery is settled", func() bool { return len(l.of(d)) == 1 })
	if got := l.of(d); got[0] != written {
		t.Fatalf("settled %v", got)
	}
	c.send(clientFrame(finBit|opClose, "\x03\xe8bye"))
	c.wantClose(1000, "")
	wantEventually(t, "detached and released", func() bool {
		th.mu.Lock()
		defer th.mu.Unlock()
		return len(th.index[general]) == 0 && len(th.released) == 1
	})
}

func TestEarlyFrame(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.dial("/", textFrame(`{"type":"ping"}`)+textFrame(`{"type":"select_chat","chat_id":"x"}`))
	c.want("ready")
	c.want("pong")
	c.want("chat_selected")
}

func TestEventsBeforeReadyComeBehindIt(t *testing.T) {
	th := newTestHub(t, nil)
	var l ledger
	th.attached = func(r route) { th.publish(&l, kindChat, "", 9, 10) }
	c := th.dial("/", "")
	c.want("ready")
	c.want("event")
	if m := th.m.targetsTotal.with("pushed").Get(); m != 1 {
		t.Fatalf("pushed %d", m)
	}
}

func TestSelectChat(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	var l ledger
	c.send(textFrame(`{"type":"select_chat","payload":{"chat_id":"one"}}`))
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "one" || m.Payload["gap"] != false {
		t.Fatal(m)
	}
	th.publish(&l, kindMessage, "one", 1, 10)
	c.want("event")
	// A message of the new chat that comes while it is being claimed stands behind the confirmation.
	th.mu.Lock()
	th.attached = func(r route) { th.publish(&l, kindMessage, r.chat, 2, 10) }
	th.mu.Unlock()
	c.send(textFrame(`{"type":"select_chat","chat_id":"two"}`))
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "two" || m.Payload["gap"] != false {
		t.Fatal(m)
	}
	if m := c.want("event"); m.Seq != 2 {
		t.Fatal(m)
	}
	// It is left once the confirmation is queued, which may be written by then.
	wantEventually(t, "the chat before is left", func() bool { return len(th.targets(messagesOf("one"))) == 0 })
	// A claim that fails leaves the selection as it is; what came for the chat meanwhile is not written.
	th.mu.Lock()
	th.fail = errUnavailable
	th.attached = nil
	th.mu.Unlock()
	c.send(textFrame(`{"type":"select_chat","chat_id":"three"}`))
	c.wantError("Unavailable")
	th.publish(&l, kindMessage, "two", 3, 10)
	if m := c.want("event"); m.Seq != 3 {
		t.Fatal(m)
	}
	c.send(textFrame(`{"type":"select_chat","chat_id":"two"}`), textFrame(`{"type":"select_chat","chat_id":""}`))
	c.want("chat_selected")
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "" {
		t.Fatal(m)
	}
	wantEventually(t, "deselected", func() bool { return len(th.targets(messagesOf("two"))) == 0 })
}

func TestMessageFaults(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	for _, bad := range []string{
		`x`, `[]`, `{}`, `{"type":"nope"}`, `{"type":"select_chat"}`, `{"type":"select_chat","chat_id":"a b"}`,
		`{"type":"select_chat","chat_id":7}`, `{"type":"resume"}`, `{"type":"resume","payload":{"since":-1}}`,
		`{"type":"refresh_token"}`, `{"type":"ping"}{"type":"ping"}`, ``,
	} {
		c.send(textFrame(bad))
		c.wantError("BadRequest")
	}
	c.send(textFrame(`{"type":"ready"}`), textFrame(`{"type":"ping","payload":null}`)) // the first one is ignored
	c.want("pong")
	c.send(textFrame(`{"type":"resume","payload":{"since":12}}`))
	if m := c.want("resumed"); m.Payload["gap"] != true || m.Payload["seq"] != 41.0 || m.Payload["resumed"] != 0.0 {
		t.Fatal(m)
	}
	a := th.open("/admin")
	a.send(textFrame(`{"type":"ready"}`), textFrame(`{"type":"select_chat","chat_id":"x"}`), textFrame(`{"type":"select_chat"}`), textFrame(`{"type":"ping"}`))
	a.want("pong")
	if n := len(th.targets(route{kind: routeAgents, company: "c", agent: "*"})); n != 1 {
		t.Fatalf("admin is attached %d times", n)
	}
}

func TestRefreshToken(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	c.send(textFrame(`{"type":"refresh_token","payload":{"token":"bad"}}`))
	c.wantError("InvalidToken")
	c.send(textFrame(`{"type":"refresh_token","payload":{"token":"good-other"}}`))
	c.wantError("InvalidToken")
	c.send(textFrame(`{"type":"refresh_token","payload":{"token":"good-u"}}`))
	at, err := time.Parse(time.RFC3339, c.want("token_refreshed").Payload["expires_at"].(string))
	if err != nil || time.Until(at) < time.Hour {
		t.Fatal(at, err)
	}
	th.each(func(c *conn) {
		c.tend(time.Now().Add(90 * time.Minute))
		if c.closing() {
			t.Error("closed although the token was refreshed")
		}
		c.tend(time.Now().Add(3 * time.Hour))
	})
	c.wantClose(4403, "token-expired")
}

func TestHeartbeat(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	now := time.Now()
	step := func() { now = now.Add(time.Minute); th.each(func(c *conn) { c.tend(now) }) }
	th.each(func(c *conn) { c.expires.Store(now.Add(24 * time.Hour).UnixNano()) })
	for range 3 { // answered: the socket stays
		step()
		op, p, err := c.frame()
		if op != opPing || err != nil {
			t.Fatal(op, p, err)
		}
		c.send(clientFrame(finBit|opPong, string(p)))
		th.each(func(c *conn) { wantEventually(t, "pong seen", func() bool { return c.missed.Load() == 0 }) })
	}
	step()
	step()
	step()
	c.wantClose(1011, "ping-timeout")
}

// A client that sends a byte now and then and answers pings holds what came of its message for a minute, not for ever.
func TestMessageTime(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	c.send(textFrame(`{"type":"ping"}`))
	c.want("pong")
	later := func(d time.Duration) {
		th.each(func(c *conn) {
			c.nextPing = time.Now().Add(time.Hour)
			c.tend(time.Now().Add(d))
		})
	}
	later(2 * messageTime) // no message is under way
	c.send(clientFrame(opText, `{"type":`) + clientFrame(finBit|opPing, "x"))
	if op, _, err := c.frame(); op != opPong || err != nil {
		t.Fatal(op, err)
	}
	later(messageTime - 10*time.Second)
	th.each(func(c *conn) {
		if c.closing() {
			t.Error("closed within the time")
		}
	})
	later(messageTime + time.Second)
	c.wantClose(1008, "message-timeout")
}

func TestRateLimit(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.WebsocketRateLimit, c.WebsocketRateBurst = 0.001, 4 })
	c := th.open("/")
	for range 4 {
		c.send(textFrame(`{"type":"ping"}`))
		c.want("pong")
	}
	for range 11 {
		c.send(textFrame(`{"type":"ping"}`))
		c.wantError("RateLimitExceeded")
	}
	c.send(textFrame(`{"type":"ping"}`))
	c.wantClose(4429, "rate-limit-exceeded")
}

func TestDrain(t *testing.T) {
	th := newTestHub(t, nil)
	var clients []*testClient
	for range 5 {
		clients = append(clients, th.open("/"))
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- th.drain(ctx) }()
	for _, c := range clients {
		op, p, err := c.frame()
		if err != nil || op != opClose || !bytes.HasPrefix(p, []byte("\x03\xe9drain retry-after-ms=")) {
			t.Fatalf("%d %q %v", op, p, err)
		}
		c.nc.Close()
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if th.reserve() {
		t.Fatal("a place was given after the drain")
	}
}

func TestReject(t *testing.T) {
	th := newTestHub(t, nil)
	th.dial("/?errors=close", "").wantClose(4403, "invalid-token")
}

func TestNoRoute(t *testing.T) {
	th := newTestHub(t, nil)
	th.fail = errUnavailable
	th.dial("/", "").wantClose(1013, "unavailable")
}

func TestMaxConnections(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.ServerMaxConnections = 1 })
	c := th.open("/")
	res, err := http.ReadResponse(th.dialRaw(upgradeRequest("/", "")).br, nil)
	if err != nil || res.StatusCode != 503 {
		t.Fatal(res, err)
	}
	c.send(clientFrame(finBit|opClose, ""))
	c.wantClose(0, "")
	wantEventually(t, "the place is free again", func() bool {
		ok := th.reserve()
		if ok {
			th.free()
		}
		return ok
	})
}

func TestPanicClosesTheSocket(t *testing.T) {
	th := newTestHub(t, nil)
	th.hub.openToken = func(context.Context, string, bool) (*claims, *apiError) { panic("boom") }
	c := th.open("/")
	c.send(textFrame(`{"type":"refresh_token","payload":{"token":"t"}}`))
	c.wantClose(1011, "internal-error")
}

// A client that floods pings and reads nothing costs no memory: the read loop waits for it, and then it is closed as slow.
func TestPingFloodIsBounded(t *testing.T) {
	th := newTestHub(t, func(c *Config) {
		c.WebsocketRateBurst, c.WebsocketRateLimit = 1<<30, 1<<30
		c.WebsocketWriteTimeout = 500 * time.Millisecond
	})
	c := th.open("/")
	th.each(func(c *conn) { c.nc.(*net.TCPConn).SetWriteBuffer(4096) })
	flood := strings.Repeat(clientFrame(finBit|opPing, strings.Repeat("p", 125)), 1000)
	var most atomic.Int64
	for {
		if _, err := io.WriteString(c.nc, flood); err != nil {
			break
		}
		th.each(func(c *conn) {
			c.ring.mu.Lock()
			defer c.ring.mu.Unlock()
			most.Store(max(most.Load(), int64(cap(c.ring.ctrl)), int64(c.ring.n)))
		})
	}
	if most.Load() > 4096 {
		t.Fatalf("%d bytes of pongs waited", most.Load())
	}
	wantEventually(t, "closed as slow", func() bool { return th.m.closesTotal.with("4408").Get() == 1 })
}

// A client that does not read is given up after the write time-out; its neighbour gets everything meanwhile.
func TestSlowClient(t *testing.T) {
	for _, policy := range []string{"drop_oldest", "block"} {
		t.Run(policy, func(t *testing.T) {
			th := newTestHub(t, func(c *Config) {
				c.WebsocketWriteTimeout, c.WebsocketBlockTimeout = 3*time.Second, 300*time.Millisecond
				c.WebsocketBufferSize, c.WebsocketDropPolicy = 8, policy
			})
			slow, good := th.open("/"), th.open("/admin")
			var l, lg ledger
			const n = 40 // as much as 24 MB: no kernel takes that
			var a []*conn
			wantEventually(t, "both attached", func() bool {
				a = th.targets(route{kind: routeAgents, company: "c", agent: "*"})
				return len(a) == 1 && len(th.targets(general)) == 1
			})
			for seq := range uint64(n) {
				th.publish(&l, kindChat, "", seq+1, 600<<10)
				d := newDelivery(&lg, kindAgent, "", seq+1, 1, 100)
				a[0].push(d)
				if m := good.want("event"); m.Seq != seq+1 {
					t.Fatal(m)
				}
			}
			wantEventually(t, "events that count as stuck", func() bool { return th.stuck() > 0 })
			if !th.shedOldest() {
				t.Error("nothing to shed")
			}
			wantEventually(t, "closed as slow", func() bool { return th.m.closesTotal.with("4408").Get() == 1 })
			if policy == "drop_oldest" && (l.counted(dropped) < 10 || th.m.gapsTotal.with("buffer").Get() == 0) {
				t.Errorf("dropped %d", l.counted(dropped))
			}
			if policy == "block" && (l.counted(failed) < 10 || l.counted(dropped) != 0 || l.counted(shed) != 1) {
				t.Errorf("failed %d, dropped %d, shed %d", l.counted(failed), l.counted(dropped), l.counted(shed))
			}
			if all := l.counted(written) + l.counted(dropped) + l.counted(shed) + l.counted(failed); all != n || lg.counted(written) != n {
				t.Errorf("%d of %d settled, neighbour %d", all, n, lg.counted(written))
			}
			slow.nc.Close()
		})
	}
}

// What was dropped is announced before the events that come after it, once there is room again.
func TestGapAfterDrop(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.WebsocketBufferSize = 4 })
	c := th.open("/")
	var l ledger
	wantEventually(t, "attached", func() bool { return len(th.targets(general)) == 1 })
	const n = 60
	for seq := range uint64(n) {
		th.publish(&l, kindChat, "", seq+1, 300<<10)
	}
	seen, since := map[uint64]bool{}, uint64(n)
	for last := uint64(0); last != n; {
		switch m := c.message(); m.Type {
		case "event":
			seen[m.Seq], last = true, m.Seq
		case "gap":
			since = min(since, uint64(m.Payload["since"].(float64)))
			if m.Payload["reason"] != "buffer" {
				t.Fatal(m)
			}
		}
	}
	for seq := uint64(1); seq <= n; seq++ {
		if !seen[seq] && seq <= since {
			t.Fatalf("%d is missing but the gap is since %d", seq, since)
		}
	}
	wantEventually(t, "all settled", func() bool { return l.counted(written)+l.counted(dropped) == n })
	if l.counted(written) != len(seen) {
		t.Fatalf("written %d, seen %d", l.counted(written), len(seen))
	}
}
