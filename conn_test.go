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

// testHub is a hub on a real loopback listener, with a Redis and a NATS in memory.
type testHub struct {
	*hub
	t    *testing.T
	srv  *httptest.Server
	rds  *redisServer
	past *natsServer

	mu       sync.Mutex // guards released
	released []string
}

func testSettings(change func(*Config)) *settings {
	c := &Config{
		ServerPodID: "pod-1", ServerMaxConnections: 100, ServerDrainSpread: 50 * time.Millisecond, PodLease: 6 * time.Second,
		NATSStreamName: "wa_stream", NATSSubjectPrefix: "wa", ResumeMaxEvents: 1000, ResumeMaxBehind: 1000000, ResumeConcurrency: 4,
		AuthTokenAESKey: vectorKey, AuthAdminTokenAESKey: otherKey,
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
	t.Cleanup(func() {
		wantEventually(t, "goroutines left over", func() bool { return runtime.NumGoroutine() <= before })
	})
	th := &testHub{t: t, rds: newRedisServer(t), past: newNATSServer()}
	th.past.last = 41
	cfg, m := testSettings(change), newMetrics()
	o := newOwners(cfg, th.rds.client(t), m, testLease(t, th.rds, cfg))
	th.hub = newHub(cfg, m, o, testConsumer(t, th.past, cfg, m, o.lease), newAuth(cfg, o.rdb, m))
	th.srv = httptest.NewServer(http.HandlerFunc(th.handle))
	ctx, stop := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { o.run(ctx) })
	wg.Go(func() { th.hub.run(ctx) })
	t.Cleanup(func() {
		limit, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := th.drain(limit); err != nil {
			t.Errorf("drain: %v", err)
		}
		if err := o.releaseAll(limit); err != nil || len(o.claims) > 0 {
			t.Errorf("%d claims are left, %v", len(o.claims), err)
		}
		stop()
		wg.Wait()
		th.srv.Close()
		if n := th.count.used.Get(); n != 0 {
			t.Errorf("%v events still count as waiting", n)
		}
		th.wantLedger()
	})
	return th
}

// wantLedger holds the ledger of targets against itself.
func (th *testHub) wantLedger() {
	th.t.Helper()
	in, out := th.m.targetsTotal.with("pushed").Get(), uint64(0)
	for _, o := range outcomeNames {
		out += th.m.targetsTotal.with(o).Get()
	}
	if in != out {
		th.t.Errorf("ledger: pushed %d, ended %d", in, out)
	}
}

// stuck counts the events in the rings of sockets that do not take them.
func (th *testHub) stuck() (n int) {
	for _, c := range th.slowOnes() {
		n += c.ring.stuckEvents(time.Now())
	}
	return n
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
	th.turn(context.Background())
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

var general = route{"c", "a"}

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

// publish pushes one event to all sockets on its route, as the router does, and returns it.
func (th *testHub) publish(l *ledger, k kind, chat string, seq uint64, size int) *delivery {
	d := newDelivery(l, k, chat, seq, 1, size)
	for r := range d.routes() {
		d.push(th.sockets(r))
	}
	d.settle(gone)
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
	c := th.dial("/", "")
	m := c.want("ready")
	if p := m.Payload; p["seq"] != 41.0 || p["gap"] != false || p["resumed"] != 0.0 || p["session_id"] == "" || p["stream"] != th.stream() {
		t.Fatalf("ready: %v", p)
	}
	if _, has := m.Payload["position"]; has {
		t.Fatalf("a client that did not ask for positions got one: %v", m.Payload)
	}
	if claims := th.rds.members(general.key()); len(claims) != 1 {
		t.Fatalf("claims in Redis when the client is ready: %v", claims)
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
	wantEventually(t, "it is no target any more, and lock and claim are released", func() bool {
		th.mu.Lock()
		defer th.mu.Unlock()
		return len(th.sockets(general)) == 0 && len(th.released) == 1 && len(th.rds.members(general.key())) == 0
	})
}

func TestEarlyFrame(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.dial("/", textFrame(`{"type":"ping"}`)+textFrame(`{"type":"select_chat","chat_id":"x"}`))
	c.want("ready")
	c.want("pong")
	c.want("chat_selected")
}

// What comes while a fresh socket is set up waits behind its greeting, also for a client that never resumes.
func TestEventsBeforeReady(t *testing.T) {
	th := newTestHub(t, nil)
	var l ledger
	var early, late *delivery
	th.rds.before = func(args []string) {
		if args[0] == "sadd" && args[1] == general.key() {
			early = th.publish(&l, kindChat, "", 8, 10)
		}
	}
	th.past.before = func(string) { late = th.publish(&l, kindChat, "", 9, 10) }
	c := th.dial("/", "")
	c.want("ready")
	for seq := uint64(8); seq <= 9; seq++ {
		if m := c.want("event"); m.Seq != seq {
			t.Fatal(m)
		}
	}
	wantEventually(t, "both are settled", func() bool { return len(l.of(late)) == 1 })
	wantEnd(t, &l, early, written)
	wantEnd(t, &l, late, written)
}

// What happens to all sockets of a pod happens to those that are being set up, too.
func TestGapsWhileConnecting(t *testing.T) {
	th := newTestHub(t, nil)
	th.issue(place{40, th.stream()})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(20 * time.Microsecond)
		defer tick.Stop()
		for {
			select {
			case <-stop:
				return
			case <-tick.C:
			}
			th.gapAll("owner")
			th.each(func(c *conn) {
				c.ring.look()
				c.ring.wantPosition()
			})
		}
	})
	defer wg.Wait()
	defer close(stop)
	for i := range 30 {
		c := th.open([]string{"/?since=", "/?since=&chat=x", "/"}[i%3])
		for c.message().Type != "gap" { // a position may come before
		}
		c.nc.Close()
	}
}

// A socket that is closed before its claim is answered gets its close frame at once, also if it owes a gap; and no claim of its stays.
func TestCloseWhileClaiming(t *testing.T) {
	th := newTestHub(t, nil)
	claims := make(chan struct{}, 100)
	th.rds.down = true
	th.rds.before = func([]string) {
		select {
		case claims <- struct{}{}:
		default:
		}
	}
	c := th.dial("/?since=", "")
	<-claims
	th.gapAll("owner")
	th.each(func(c *conn) { c.tend(time.Now().Add(3 * time.Hour)) })
	c.wantClose(4403, "token-expired")
	th.rds.change(func() { th.rds.down = false })
	wantEventually(t, "no claim is left", func() bool { return len(th.rds.members(general.key())) == 0 && th.owners.left() == 0 })
}

func TestSelectChat(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	var l ledger
	c.send(textFrame(`{"type":"select_chat","payload":{"chat_id":"one"}}`))
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "one" || m.Payload["seq"] != 41.0 || len(m.Payload) != 2 {
		t.Fatal(m)
	}
	mine, other := th.publish(&l, kindMessage, "one", 1, 10), th.publish(&l, kindMessage, "two", 2, 10)
	c.want("event")
	wantEventually(t, "both are settled", func() bool { return len(l.of(mine)) == 1 })
	wantEnd(t, &l, mine, written)
	wantEnd(t, &l, other, unselected)
	// It asks neither Redis nor, where an older sequence is known, NATS.
	th.rds.change(func() { th.rds.down = true })
	th.past.change(func() { th.past.fails = func(string, uint64) bool { return true } })
	c.send(textFrame(`{"type":"select_chat","chat_id":"two"}`))
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "two" || m.Payload["seq"] != 41.0 {
		t.Fatal(m)
	}
	th.rds.change(func() { th.rds.down = false })
	gone := th.publish(&l, kindMessage, "one", 3, 10)
	wantEnd(t, &l, gone, unselected)
	th.publish(&l, kindMessage, "two", 4, 10)
	if m := c.want("event"); m.Seq != 4 {
		t.Fatal(m)
	}
	c.send(textFrame(`{"type":"select_chat","chat_id":"two"}`), textFrame(`{"type":"select_chat","chat_id":""}`))
	c.want("chat_selected")
	if m := c.want("chat_selected"); m.Payload["chat_id"] != "" {
		t.Fatal(m)
	}
	wantEnd(t, &l, th.publish(&l, kindMessage, "two", 5, 10), unselected)
}

func TestMessageFaults(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	for _, bad := range []string{
		`x`, `[]`, `{}`, `{"type":"nope"}`, `{"type":"select_chat"}`, `{"type":"select_chat","chat_id":"a b"}`,
		`{"type":"select_chat","chat_id":7}`, `{"type":"resume","payload":7}`, `{"type":"refresh_token"}`, `{"type":"ping"}{"type":"ping"}`, ``,
	} {
		c.send(textFrame(bad))
		c.wantError("BadRequest")
	}
	c.send(textFrame(`{"type":"ready"}`), textFrame(`{"type":"ping","payload":null}`)) // the first one is ignored
	c.want("pong")
	a := th.open("/admin")
	a.send(textFrame(`{"type":"ready"}`), textFrame(`{"type":"select_chat","chat_id":"x"}`), textFrame(`{"type":"select_chat"}`), textFrame(`{"type":"ping"}`))
	a.want("pong")
	if n := len(th.sockets(admins)); n != 1 {
		t.Fatalf("an admin is a target %d times", n)
	}
}

func TestRefreshToken(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	of := func(user string) string {
		token := mustSeal(t, vectorKey, userToken{CompanyID: "c", AgentID: "a", UserID: user, ExpiresAt: time.Now().Add(2 * time.Hour)})
		return textFrame(`{"type":"refresh_token","payload":{"token":"` + token + `"}}`)
	}
	c.send(textFrame(`{"type":"refresh_token","payload":{"token":"bad"}}`))
	c.wantError("InvalidToken")
	c.send(of("other"))
	c.wantError("InvalidToken")
	c.send(of("u"))
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

// A socket whose stream can't be asked for its sequence is told to come again, and leaves no claim.
func TestNoSequence(t *testing.T) {
	th := newTestHub(t, nil)
	th.past.fails = func(string, uint64) bool { return true }
	th.dial("/", "").wantClose(1013, "unavailable")
	wantEventually(t, "no claim is left", func() bool { return len(th.rds.members(general.key())) == 0 && th.owners.left() == 0 })
}

// TestReadyDuringAStorm: while replays take every turn to read the stream, other sockets are greeted.
func TestReadyDuringAStorm(t *testing.T) {
	th := newTestHub(t, nil)
	for range cap(th.replays.slots) {
		th.replays.slots <- struct{}{}
	}
	th.open("/")
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
	th.hub.auth = nil
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
			for seq := range uint64(n) {
				th.publish(&l, kindChat, "", seq+1, 600<<10)
				th.publish(&lg, kindAgent, "", seq+1, 100)
				if m := good.want("event"); m.Seq != seq+1 {
					t.Fatal(m)
				}
			}
			wantEventually(t, "closed as slow", func() bool { return th.m.closesTotal.with("4408").Get() == 1 })
			if policy == "drop_oldest" && (l.counted(dropped) < 10 || th.m.gapsTotal.with("buffer").Get() == 0) {
				t.Errorf("dropped %d", l.counted(dropped))
			}
			if policy == "block" && (l.counted(failed) < 10 || l.counted(dropped) != 0) {
				t.Errorf("failed %d, dropped %d", l.counted(failed), l.counted(dropped))
			}
			if l.counted(gone) == 0 {
				t.Error("nothing waited when it was closed")
			}
			if all := l.counted(written) + l.counted(dropped) + l.counted(gone) + l.counted(failed); all != n || lg.counted(written) != n {
				t.Errorf("%d of %d settled, neighbour %d", all, n, lg.counted(written))
			}
			slow.nc.Close()
		})
	}
}

// The socket that holds most events and does not take them is closed when room is needed; those that read are left alone.
func TestMostStuckIsClosed(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.WebsocketBufferSize = 100 })
	more, less, good := th.open("/?n=1"), th.open("/?n=2"), th.open("/admin")
	var l ledger
	if th.closeMostStuck() {
		t.Fatal("a socket was closed though none is stuck")
	}
	conns := th.sockets(general)
	for seq := range uint64(60) {
		d := newDelivery(&l, kindChat, "", seq+1, 1, 600<<10)
		d.push(conns[seq/40:]) // the first 40 to both
		d.settle(gone)
	}
	wantEventually(t, "both are stuck", func() bool {
		return conns[0].ring.stuckEvents(time.Now()) > 0 && conns[1].ring.stuckEvents(time.Now()) > 20
	})
	if !th.closeMostStuck() || !conns[1].closing() || conns[0].closing() || th.m.slowClientsDisconnectedTotal.with().Get() != 1 {
		t.Fatal("the most stuck socket was not closed")
	}
	if !th.closeMostStuck() || th.closeMostStuck() {
		t.Fatal("want the other stuck one closed, and then none")
	}
	th.publish(&l, kindAgent, "", 50, 10)
	good.want("event")
	more.nc.Close()
	less.nc.Close()
}

// What was dropped is announced before the events that come after it, once there is room again.
func TestGapAfterDrop(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.WebsocketBufferSize = 4 })
	c := th.open("/")
	var l ledger
	const n = 60
	for seq := range uint64(n) {
		th.publish(&l, kindChat, "", seq+1, 300<<10)
	}
	seen, announced := 0, false
	for last := uint64(0); last != n; {
		switch m := c.message(); m.Type {
		case "event":
			if m.Seq != last+1 && !announced {
				t.Fatalf("%d follows %d without a gap", m.Seq, last)
			}
			last, announced = m.Seq, false
			seen++
		case "gap":
			announced = true
			if m.Payload["reason"] != "buffer" || m.Payload["since"] != 0.0 {
				t.Fatal(m)
			}
		}
	}
	wantEventually(t, "all settled", func() bool { return l.counted(written)+l.counted(dropped) == n })
	if l.counted(written) != seen || seen == n {
		t.Fatalf("written %d, seen %d of %d", l.counted(written), seen, n)
	}
}
