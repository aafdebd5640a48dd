package main

import (
	"bufio"
	"bytes"
	"compress/flate"
	"crypto/tls"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

const (
	deflateYes   = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
	deflateYes15 = deflateYes + "; server_max_window_bits=15"
)

func TestDeflateOffers(t *testing.T) {
	for _, test := range []struct {
		offers string // lines of the header
		want   string
	}{
		{"", ""},
		{"permessage-deflate", deflateYes},
		{" PerMessage-Deflate ", deflateYes},
		{"permessage-deflate; server_no_context_takeover; client_no_context_takeover", deflateYes},
		{"permessage-deflate;client_max_window_bits", deflateYes},
		{"permessage-deflate; client_max_window_bits=8", deflateYes},
		{"permessage-deflate; client_max_window_bits=15; server_max_window_bits=15", deflateYes15},
		{`permessage-deflate; server_max_window_bits="15"`, deflateYes15},
		{`permessage-deflate; server_max_window_bits = "1\5"`, deflateYes15},
		{"permessage-deflate; server_max_window_bits=14", ""},
		{"permessage-deflate; server_max_window_bits=8, permessage-deflate", deflateYes},
		{"permessage-deflate; server_max_window_bits=8\npermessage-deflate; server_max_window_bits=15", deflateYes15},
		{"x-webkit-deflate-frame, permessage-deflate", deflateYes},
		{`foo; bar="a, permessage-deflate"`, ""},
		{`foo; bar="a\", permessage-deflate", permessage-deflate`, deflateYes},
		{`foo; bar="a, permessage-deflate`, ""},
		{", ,permessage-deflate,", deflateYes},
		{"permessage-deflated", ""},
		{"permessage-deflate;", ""},
		{"permessage-deflate; =15", ""},
		{"permessage-deflate server_no_context_takeover", ""},
		{"permessage-deflate; server_no_context_takeover=", ""},
		{"permessage-deflate; server_no_context_takeover=true", ""},
		{"permessage-deflate; client_no_context_takeover=1", ""},
		{"permessage-deflate; server_no_context_takeover; server_no_context_takeover", ""},
		{"permessage-deflate; client_max_window_bits; client_max_window_bits=10", ""},
		{"permessage-deflate; server_max_window_bits", ""},
		{"permessage-deflate; server_max_window_bits=16", ""},
		{"permessage-deflate; server_max_window_bits=015", ""},
		{`permessage-deflate; server_max_window_bits="15`, ""},
		{`permessage-deflate; server_max_window_bits="15"x`, ""},
		{`permessage-deflate; server_max_window_bits=15"`, ""},
		{"permessage-deflate; client_max_window_bits=", ""},
		{`permessage-deflate; client_max_window_bits=""`, ""},
		{"permessage-deflate; client_max_window_bits=7", ""},
		{"permessage-deflate; client_max_window_bits=16", ""},
		{"permessage-deflate; client_max_window_bits=09", ""},
		{"permessage-deflate; client_max_window_bits=+9", ""},
		{"permessage-deflate; client_max_window_bits=100", ""},
		{"permessage-deflate; mode=fast", ""},
		{"permessage-deflate; mode=fast, permessage-deflate; client_max_window_bits", deflateYes},
	} {
		h := http.Header{}
		for line := range strings.Lines(test.offers) {
			h.Add("Sec-WebSocket-Extensions", strings.TrimRight(line, "\n"))
		}
		if got := deflateAnswer(h); got != test.want {
			t.Errorf("%q: got %q, want %q", test.offers, got, test.want)
		}
	}
}

func withDeflate(c *Config) { c.WebsocketCompression = "no_context_takeover" }

// dialDeflate opens a socket with an offer, which is met or not.
func (th *testHub) dialDeflate(offer string, met bool) *testClient {
	th.t.Helper()
	c := th.dialRaw(upgradeRequest("/", "Sec-WebSocket-Extensions: "+offer+"\r\n"))
	res, err := http.ReadResponse(c.br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		th.t.Fatalf("upgrade: %v %v", res, err)
	}
	if got := res.Header.Get("Sec-WebSocket-Extensions"); (got != "") != met {
		th.t.Fatalf("%s: answered by %q", offer, got)
	}
	c.deflate = met
	c.want("ready")
	return c
}

// deflated compresses a message as RFC 7692 section 7.2.1 says.
func deflated(message string, level int) string {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, level)
	io.WriteString(w, message)
	w.Flush()
	return strings.TrimSuffix(b.String(), deflateCut)
}

func packedFrame(s string) string {
	return clientFrame(finBit|rsv1|opText, deflated(s, flate.DefaultCompression))
}

func TestCompressionIsNegotiated(t *testing.T) {
	off := newTestHub(t, nil)
	c := off.dialDeflate("permessage-deflate", false)
	c.send(packedFrame(`{"type":"ping"}`))
	c.wantClose(1002, "RSV bit without an extension")

	on := newTestHub(t, withDeflate)
	c = on.dialDeflate("permessage-deflate; server_max_window_bits=9", false)
	c.send(textFrame(`{"type":"ping"}`))
	c.want("pong")
	c.send(packedFrame(`{"type":"ping"}`))
	c.wantClose(1002, "")
	c = on.dialDeflate("permessage-deflate; server_max_window_bits=9, permessage-deflate", true)
	c.send(packedFrame(`{"type":"ping"}`))
	c.want("pong")
	c.nc.Close()
}

// One event reaches sockets with and without compression, compressed once for all of those that want it, from the
// threshold on.
func TestCompressedEvents(t *testing.T) {
	th := newTestHub(t, withDeflate)
	plain := th.open("/")
	a, b := th.dialDeflate("permessage-deflate", true), th.dialDeflate("permessage-deflate", true)
	var l ledger
	for i, test := range []struct {
		size   int
		packed bool
	}{{10, false}, {800, false}, {1100, true}, {70_000, true}, {3_000_000, true}} {
		seq := uint64(50 + i)
		d := th.publish(&l, kindChat, "", seq, test.size)
		for _, c := range []*testClient{plain, a, b} {
			if m := c.want("event"); m.Seq != seq || len(m.Payload["x"].(string)) != test.size {
				t.Fatalf("event %d: %.100v", seq, m)
			}
			if c.packed != (test.packed && c != plain) {
				t.Fatalf("%d bytes: compressed %v", test.size, c.packed)
			}
		}
		wantEventually(t, "settled", func() bool { return len(l.of(d)) == 1 })
		if d.frame.packed.Load() != test.packed || test.packed && len(d.frame.z) > len(d.frame.b)/10 {
			t.Fatalf("%d bytes: compressed to %d", len(d.frame.b), len(d.frame.z))
		}
	}
	// Nobody needs it compressed: it is not.
	a.nc.Close()
	b.nc.Close()
	wantEventually(t, "detached", func() bool { return len(th.sockets(general)) == 1 })
	d := th.publish(&l, kindChat, "", 60, 5000)
	plain.want("event")
	if d.frame.packed.Load() {
		t.Error("compressed for nobody")
	}
	plain.nc.Close()
}

func TestThresholdCountsTheMessage(t *testing.T) {
	f := newReply("pong", strings.Repeat("x", 2000))
	n := len(payloadOf(f.b))
	for threshold, want := range map[int]bool{0: true, n: true, n + 1: false} {
		p := sendPolicy{threshold: threshold}
		if p.compressible(f) != want {
			t.Errorf("%d bytes, threshold %d: compressible %v", n, threshold, !want)
		}
	}
}

func TestCompressedReplies(t *testing.T) {
	th := newTestHub(t, func(c *Config) { withDeflate(c); c.WebsocketCompressionThreshold = 0 })
	c := th.dialDeflate("permessage-deflate", true)
	if !c.packed {
		t.Error("ready is not compressed")
	}
	for _, conn := range th.sockets(general) {
		conn.gap("owner")
	}
	if c.want("gap"); !c.packed {
		t.Error("gap is not compressed")
	}
	c.send(packedFrame(`{"type":"select_chat","payload":{"chat_id":"x"}}`) + clientFrame(finBit|opPing, "p"))
	for range 2 { // the client refuses a control frame with RSV1
		if op, p, err := c.frame(); err != nil || op == opText != c.packed {
			t.Fatal(op, string(p), err)
		}
	}
	c.send(clientFrame(finBit|opClose, "\x03\xe8"))
	c.wantClose(1000, "")
}

// A client that does not read for a while gets everything, though its frames are cut anywhere.
func TestCompressedSlowClient(t *testing.T) {
	th := newTestHub(t, func(c *Config) { withDeflate(c); c.WebsocketWriteTimeout = time.Minute })
	c := th.dialDeflate("permessage-deflate", true)
	conn := th.sockets(general)[0]
	var l ledger
	noise := make([]byte, 200_000)
	for i := range noise {
		noise[i] = '#' + byte(rand.N(50))
	}
	const events = 60
	for seq := range uint64(events) {
		ev := &event{seq: seq + 1, kind: kindChat, payload: fmt.Appendf(nil, `{"x":"%s"}`, noise[seq:])}
		ev.frame = newEventFrame(ev, false, false)
		d := &delivery{event: ev, count: 1, src: &l}
		d.open.Store(1)
		conn.push(d)
	}
	wantEventually(t, "the socket takes no more", func() bool { return th.stuck() > 0 })
	for seq := range uint64(events) {
		if m := c.want("event"); m.Seq != seq+1 || m.Payload["x"] != string(noise[seq:]) || !c.packed {
			t.Fatalf("want %d, got %d", seq+1, m.Seq)
		}
	}
	c.nc.Close()
}

// inboundOf reads messages from what a client sent, and then meets the connection's end.
func inboundOf(sent string, limit int) *inbound {
	return &inbound{
		nc: goneConn{}, early: []byte(sent), max: limit, binary: true, deflate: true,
		control: func(byte, []byte) error { return nil }, begun: new(atomic.Int64),
	}
}

type goneConn struct{ net.Conn }

func (goneConn) Read([]byte) (int, error)        { return 0, io.EOF }
func (goneConn) SetReadDeadline(time.Time) error { return nil }

const raw = finBit | rsv1 | opText

// What is in the table below are the examples of RFC 7692 section 7.2.3, and what may go wrong with them.
func TestInflate(t *testing.T) {
	long := strings.Repeat("hello ", 20_000)
	split := func(s string, first byte, size int) string { // in frames
		var b strings.Builder
		for ; len(s) > size; s = s[size:] {
			b.WriteString(clientFrame(first&^finBit, s[:size]) + clientFrame(finBit|opPing, ""))
			first = opContinuation
		}
		return b.String() + clientFrame(finBit|first, s)
	}
	for name, test := range map[string]struct {
		sent string
		want string
		code int
	}{
		"one block":                   {clientFrame(raw, "\xf2\x48\xcd\xc9\xc9\x07\x00"), "Hello", 0},
		"in fragments":                {split("\xf2\x48\xcd\xc9\xc9\x07\x00", raw, 3), "Hello", 0},
		"in fragments of a byte":      {split("\xf2\x48\xcd\xc9\xc9\x07\x00", raw, 1), "Hello", 0},
		"last fragment empty":         {clientFrame(rsv1|opText, "\xf2\x48\xcd\xc9\xc9\x07\x00") + clientFrame(finBit|cont, ""), "Hello", 0},
		"stored":                      {clientFrame(raw, "\x00\x05\x00\xfa\xff\x48\x65\x6c\x6c\x6f\x00"), "Hello", 0},
		"BFINAL":                      {clientFrame(raw, "\xf3\x48\xcd\xc9\xc9\x07\x00\x00"), "Hello", 0},
		"BFINAL at the very end":      {clientFrame(raw, "\xf3\x48\xcd\xc9\xc9\x07\x00"), "Hello", 0},
		"BFINAL and another block":    {clientFrame(raw, "\xf3\x48\xcd\xc9\xc9\x07\x00\xf2\x48\xcd\xc9\xc9\x07\x00"), "HelloHello", 0},
		"BFINAL, then its window":     {clientFrame(raw, "\xf3\x48\xcd\xc9\xc9\x07\x00\xf2\x00\x11\x00\x00"), "HelloHello", 0},
		"BFINAL thrice, in fragments": {split(strings.Repeat("\xf3\x48\xcd\xc9\xc9\x07\x00", 3)+"\x00", raw, 5), "HelloHelloHello", 0},
		"two blocks":                  {clientFrame(raw, "\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00"), "Hello", 0},
		"empty":                       {clientFrame(raw, "\x00"), "", 0},
		"empty, of nothing":           {clientFrame(raw, ""), "", 0},
		"empty, in fragments":         {split("\x00", raw, 1), "", 0},
		"not compressed":              {clientFrame(finBit|opText, "Hello"), "Hello", 0},
		"long":                        {clientFrame(raw, deflated(long, 9)), long, 0},
		"long, not compressible":      {clientFrame(raw, deflated(long, flate.NoCompression)), long, 0},
		"long, Huffman, in fragments": {split(deflated(long, flate.HuffmanOnly), raw, 700), long, 0},
		"two messages":                {packedFrame("a") + packedFrame("bcd"), "a|bcd", 0},

		"the window of the one before":  {clientFrame(raw, "\xf2\x48\xcd\xc9\xc9\x07\x00") + clientFrame(raw, "\xf2\x00\x11\x00\x00"), "Hello", 1002},
		"reserved block type":           {clientFrame(raw, "\x06\x00"), "", 1002},
		"broken stored block":           {clientFrame(raw, "\x00\x05\x00\xfa\xfe\x48\x65\x6c\x6c\x6f\x00"), "", 1002},
		"cut short":                     {clientFrame(raw, "\xf2\x48\xcd"), "", 1002},
		"RSV1 on a continuation":        {clientFrame(rsv1|opText, "\xf2\x48") + clientFrame(raw&^opText, "\xcd\xc9\xc9\x07\x00"), "", 1002},
		"RSV1 only on a continuation":   {clientFrame(opText, "He") + clientFrame(finBit|rsv1, "\xcd\xc9\xc9\x07\x00"), "", 1002},
		"RSV2":                          {clientFrame(raw|0x20, "\x00"), "", 1002},
		"RSV3":                          {clientFrame(raw|0x10, "\x00"), "", 1002},
		"ping with RSV1":                {clientFrame(finBit|rsv1|opPing, ""), "", 1002},
		"close with RSV1":               {clientFrame(finBit|rsv1|opClose, ""), "", 1002},
		"not UTF-8":                     {packedFrame("a\xff"), "", 1007},
		"cut rune":                      {packedFrame("a\xe2\x82"), "", 1007},
		"as long as allowed":            {packedFrame(strings.Repeat("x", 200_000)), strings.Repeat("x", 200_000), 0},
		"one too many":                  {packedFrame(strings.Repeat("x", 200_001)), "", 1009},
		"blocks of nothing, no end":     {strings.Repeat(clientFrame(cont, strings.Repeat("\x00\x00\x00\xff\xff", 20_000)), 6), "", 1009},
		"final blocks of nothing":       {clientFrame(raw, strings.Repeat("\x03\x00", 900)), "", 0},
		"final blocks of nothing, many": {clientFrame(raw, strings.Repeat("\x03\x00", 5000)), "", 1002},
		"end of the connection":         {clientFrame(rsv1|opText, "\xf2\x48\xcd\xc9\xc9\x07\x00"), "", 1006},
		"end within a frame":            {clientFrame(raw, "\xf2\x48\xcd\xc9\xc9\x07\x00")[:10], "", 1006},
		"close between fragments":       {clientFrame(rsv1|opText, "\xf2\x48\xcd") + clientFrame(finBit|opClose, "\x03\xe8"), "", 1000},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "blocks of nothing, no end" {
				test.sent = clientFrame(rsv1|opText, "") + test.sent
			}
			in := inboundOf(test.sent, 200_000)
			defer in.idle()
			var got []string
			code := 0
			for {
				op, buf, err := in.next()
				if err == nil && op == opText {
					got = append(got, string(*buf))
					recycle(buf)
					continue
				}
				if err != nil {
					code, _ = closeOf(err)
				} else if code, err = parseClose(*buf); err != nil {
					t.Fatal(err)
				}
				break
			}
			if test.code == 0 {
				test.code = closeAbnormal // what was sent ends there
			}
			if joined := strings.Join(got, "|"); joined != test.want || code != test.code {
				t.Fatalf("got %d messages, %.60q, then %d; want %.60q, then %d", len(got), joined, code, test.want, test.code)
			}
			if in.frame != nil {
				t.Error("an idle socket holds a frame's reader")
			}
		})
	}
}

// A message that would inflate to a GiB costs no more memory than the limit, give or take the reader and the steps of
// the buffer's growth.
func TestBombCostsTheLimit(t *testing.T) {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	zeros := make([]byte, 1<<20)
	for range 256 {
		w.Write(zeros)
	}
	w.Flush()
	const limit = 1 << 20
	bomb := clientFrame(finBit|rsv1|opBinary, strings.TrimSuffix(b.String(), deflateCut))
	in := inboundOf(bomb, limit)
	defer in.idle()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, buf, err := in.next()
	runtime.ReadMemStats(&after)
	if code, _ := closeOf(err); code != closeTooBig {
		t.Fatal(err)
	}
	if cap(*buf) > limit+1 {
		t.Errorf("the buffer grew to %d", cap(*buf))
	}
	// The sum of all steps of doubling is twice the limit; alive at once are one and a half.
	if spent := after.TotalAlloc - before.TotalAlloc; spent > 2*limit+128<<10 {
		t.Errorf("%d bytes were allocated", spent)
	}
}

func TestFanOutOfACompressedFrame(t *testing.T) {
	f := newReply("pong", strings.Repeat("x", 4000))
	allocs := testing.AllocsPerRun(100, f.deflate)
	if allocs != 0 {
		t.Errorf("%v allocations for a frame that is compressed already", allocs)
	}
	if f.b[0] != finBit|opText || f.z[0] != finBit|rsv1|opText {
		t.Errorf("first bytes %x, %x", f.b[0], f.z[0])
	}
}

// BenchmarkDeflate is why the level is the fastest.
func BenchmarkDeflate(b *testing.B) {
	var msg strings.Builder
	for i := 0; msg.Len() < 2000; i++ {
		fmt.Fprintf(&msg, `{"id":"%08x","chat_id":"628%09d@c.us","from_me":%v,"body":"message number %d of many","timestamp":%d},`,
			rand.Uint32(), rand.N(999999999), i%2 == 0, i, 1700000000+rand.N(99999))
	}
	for _, level := range []int{1, 2, 6, flate.HuffmanOnly} {
		b.Run(fmt.Sprint("level ", level), func(b *testing.B) {
			b.ReportAllocs()
			w, _ := flate.NewWriter(nil, level)
			p := &packer{w: w}
			n := 0
			for b.Loop() {
				n = len(p.frame(opText, []byte(msg.String())))
			}
			b.ReportMetric(100*float64(n)/float64(msg.Len()), "%")
		})
	}
}

// With TLS each socket's own goroutine writes, and compresses where it is the first to need it.
func TestCompressedTLS(t *testing.T) {
	th := newTestHub(t, withDeflate)
	srv := httptest.NewTLSServer(http.HandlerFunc(th.handle))
	defer srv.Close()
	var clients []*testClient
	for range 8 {
		nc, err := tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer nc.Close()
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		c := &testClient{t: t, nc: nc, br: bufio.NewReader(nc), deflate: true}
		c.send(upgradeRequest("/", "Sec-WebSocket-Extensions: permessage-deflate\r\n"))
		if res, err := http.ReadResponse(c.br, nil); err != nil || res.Header.Get("Sec-WebSocket-Extensions") != deflateYes {
			t.Fatal(res, err)
		}
		c.want("ready")
		clients = append(clients, c)
	}
	var l ledger
	for seq := range uint64(20) {
		th.publish(&l, kindChat, "", seq+1, 50_000)
	}
	for _, c := range clients {
		for seq := range uint64(20) {
			if m := c.want("event"); m.Seq != seq+1 || !c.packed {
				t.Fatalf("want event %d compressed, got %d, %v", seq+1, m.Seq, c.packed)
			}
		}
	}
}

// An idle socket that has compressed and decompressed holds no more than one that never did: all is back in the pools,
// which the garbage collector empties.
func TestIdleCompressedSocket(t *testing.T) {
	captureLog(t)
	const sockets = 100
	cost := func(deflate bool) int {
		th := newTestHub(t, func(c *Config) { withDeflate(c); c.WebsocketCompressionThreshold = 0 })
		heap := func() int {
			var m runtime.MemStats
			for range 3 { // a pool lives through two
				runtime.GC()
			}
			runtime.ReadMemStats(&m)
			return int(m.HeapAlloc)
		}
		before := heap()
		for range sockets {
			c := th.dialRaw(upgradeRequest("/", map[bool]string{true: "Sec-WebSocket-Extensions: permessage-deflate\r\n"}[deflate]))
			if _, err := http.ReadResponse(c.br, nil); err != nil {
				t.Fatal(err)
			}
			c.deflate = deflate
			c.want("ready")
			ping := `{"type":"ping"}`
			if deflate {
				c.send(packedFrame(ping))
			} else {
				c.send(textFrame(ping))
			}
			if c.want("pong"); c.packed != deflate {
				t.Fatal("compressed", c.packed)
			}
			c.br = nil
		}
		return (heap() - before) / sockets
	}
	plain, deflated := cost(false), cost(true)
	t.Logf("%d bytes per socket and its client, %d with compression", plain, deflated)
	// The smaller of the two, a reader, takes 40 KB; what else lives on the heap differs by a kilobyte from run to run.
	if deflated > plain+16<<10 {
		t.Errorf("%d bytes per socket and its client, %d with compression", plain, deflated)
	}
}
