package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"strings"
	"testing"
	"time"
)

var (
	echoAddress     = flag.String("echo", "", "address for TestEchoServer to serve on")
	echoCompression = flag.String("echo-compression", "disabled", "permessage-deflate of TestEchoServer: disabled or no_context_takeover")
	echoMax         = flag.Int("echo-max", 1<<20, "largest message of TestEchoServer")
)

// TestEchoServer serves an echo of text and binary messages over the service's own socket code, for the conformance
// clients of others:
//
//	go test -run '^TestEchoServer$' -timeout 0 . -args -echo 127.0.0.1:9001 -echo-compression no_context_takeover
//
// It ends on SIGINT or SIGTERM. Without its flag it is skipped.
func TestEchoServer(t *testing.T) {
	if *echoAddress == "" {
		t.Skip("a server for conformance clients; -args -echo ADDRESS starts it")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	l, err := net.Listen("tcp", *echoAddress)
	if err != nil {
		t.Fatal(err)
	}
	e := newEcho(t, *echoCompression, *echoMax)
	srv := &http.Server{Handler: http.HandlerFunc(e.handle)}
	go srv.Serve(l) // ends with the Close
	defer srv.Close()
	slog.Info("echo", "address", l.Addr().String(), "compression", *echoCompression, "max", *echoMax)
	<-ctx.Done()
}

// echo is a hub whose sockets say what they hear. Its own rules (rate, heartbeat, tokens) are out of the way.
type echo struct{ *testHub }

func newEcho(t *testing.T, compression string, limit int) echo {
	t.Helper()
	return echo{newTestHub(t, func(c *Config) {
		c.ServerMaxConnections, c.ServerDrainSpread = 10_000, 0
		c.WebsocketCompression, c.WebsocketCompressionThreshold = compression, 0
		c.WebsocketMaxMessage = byteSize(limit)
		c.WebsocketRateLimit, c.WebsocketRateBurst = 1e12, 1<<30
		c.WebsocketPingInterval, c.WebsocketWriteTimeout = 24*time.Hour, 10*time.Minute
	})}
}

func (e echo) handle(w http.ResponseWriter, r *http.Request) {
	r.Header.Del("Sec-WebSocket-Protocol") // it has none, so it agrees to none (RFC 6455 section 4.2.2)
	if fault := checkUpgrade(w, r); fault != nil {
		writeError(w, fault)
		return
	}
	if !e.reserve() {
		writeError(w, unavailable("full"))
		return
	}
	e.turn(context.Background())
	cl := &claims{company: "c", agent: "a", user: "u", expires: time.Now().AddDate(100, 0, 0)}
	e.launch(w, r, cl, lock{id: "echo", release: func() {}}, "echo", (*conn).echo)
}

// echo is serve without session and greeting: handshake, ring, writers and message assembly are the service's.
func (c *conn) echo(u *upgrade) {
	if err := u.shake(c.h.cfg.Load().WebsocketWriteTimeout); err != nil {
		c.lost()
		c.leave()
		return
	}
	c.begin()
	c.ring.beginReplay() // messages may be written, though `ready` was not
	in := c.inbound(u)
	in.binary = true
	in.message = func(op byte, p []byte) {
		b := appendHeader(make([]byte, 0, 10+len(p)), op, len(p))
		c.kick(c.ring.reply(&frame{b: append(b, p...), label: "echo"}, time.Now()))
	}
	c.attend(in)
}

// client dials an echo server of the test's own.
func (e echo) client(t *testing.T, srv *httptest.Server, offer string) *testClient {
	t.Helper()
	nc, err := net.Dial("tcp", srv.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	nc.SetDeadline(time.Now().Add(time.Minute))
	c := &testClient{t: t, nc: nc, br: bufio.NewReader(nc), deflate: offer != ""}
	if offer != "" {
		offer = "Sec-WebSocket-Extensions: " + offer + "\r\n"
	}
	c.send(upgradeRequest("/", offer))
	res, err := http.ReadResponse(c.br, nil)
	if err != nil || res.StatusCode != http.StatusSwitchingProtocols || (res.Header.Get("Sec-WebSocket-Extensions") != "") != c.deflate {
		t.Fatalf("upgrade: %v %v", res, err)
	}
	return c
}

// dialogue is what a client sends and what it must get. Pongs and messages are told apart: a pong may overtake.
type dialogue struct {
	send     []string // frames
	messages []string // echoed, in order; binary ones begin with a NUL
	pongs    []string
	code     int // of the close frame at the end; closeAbnormal = the client half-closes instead
}

// whole and pieces are messages in one frame and in several.
func whole(op byte, p string) string { return clientFrame(finBit|op, p) }

func pieces(op byte, parts ...string) []string {
	var frames []string
	for i, p := range parts {
		first := op
		if i > 0 {
			first = opContinuation
		}
		if i == len(parts)-1 {
			first |= finBit
		}
		frames = append(frames, clientFrame(first, p))
	}
	return frames
}

func closeWith(code int, reason string) string {
	return whole(opClose, string(binary.BigEndian.AppendUint16(nil, uint16(code)))+reason)
}

// joined makes one list of frames and lists of frames.
func joined(parts ...any) []string {
	var all []string
	for _, p := range parts {
		switch p := p.(type) {
		case string:
			all = append(all, p)
		case []string:
			all = append(all, p...)
		}
	}
	return all
}

const bye = "\x88\x82\x01\x02\x03\x04\x02\xea" // close 1000, masked

// dialogues covers RFC 6455 group by group, in the order in which the known conformance suites do.
func dialogues() map[string]dialogue {
	x := map[string]dialogue{}
	for _, n := range []int{0, 1, 125, 126, 127, 128, 65535, 65536, 70_000} {
		text := strings.Repeat("*", n)
		x[fmt.Sprint("text of ", n)] = dialogue{send: joined(whole(opText, text), bye), messages: []string{text}, code: 1000}
		x[fmt.Sprint("binary of ", n)] = dialogue{send: joined(whole(opBinary, text), bye), messages: []string{"\x00" + text}, code: 1000}
	}
	addPings(x)
	addFaults(x)
	addFragments(x)
	addUTF8(x)
	addCloses(x)
	return x
}

func addPings(x map[string]dialogue) {
	long := strings.Repeat("p", 125)
	x["empty ping"] = dialogue{send: joined(whole(opPing, ""), bye), pongs: []string{""}, code: 1000}
	x["ping of 125"] = dialogue{send: joined(whole(opPing, long), bye), pongs: []string{long}, code: 1000}
	x["binary ping"] = dialogue{send: joined(whole(opPing, "\x00\xff\xfe"), bye), pongs: []string{"\x00\xff\xfe"}, code: 1000}
	x["ping of 126"] = dialogue{send: joined(whole(opPing, long+"p")), code: 1002}
	x["pong nobody asked for"] = dialogue{send: joined(whole(opPong, "x"), whole(opPong, ""), whole(opPing, "y"), bye), pongs: []string{"y"}, code: 1000}
	many := dialogue{code: 1000}
	for i := range 100 {
		many.send = append(many.send, whole(opPing, fmt.Sprint(i)))
		many.pongs = append(many.pongs, fmt.Sprint(i))
	}
	many.send = append(many.send, bye)
	x["a hundred pings"] = many
	order := dialogue{code: 1000}
	for i := range 100 {
		order.send = append(order.send, whole(opText, fmt.Sprint(i)))
		order.messages = append(order.messages, fmt.Sprint(i))
	}
	order.send = append(order.send, bye)
	x["a hundred messages"] = order
}

func addFaults(x map[string]dialogue) {
	for rsv := byte(1); rsv < 8; rsv++ {
		for _, op := range []byte{opText, opBinary, opPing, opPong, opClose} {
			x[fmt.Sprintf("RSV %d of opcode %d", rsv, op)] = dialogue{
				send: joined(whole(opText, "before"), clientFrame(finBit|rsv<<4|op, "")), messages: []string{"before"}, code: 1002}
		}
	}
	for _, op := range []byte{3, 4, 5, 6, 7, 11, 12, 13, 14, 15} {
		for _, p := range []string{"", "x", strings.Repeat("x", 126)} {
			x[fmt.Sprintf("opcode %d, %d bytes", op, len(p))] = dialogue{send: joined(whole(opText, "a"), whole(op, p), whole(opPing, "")), messages: []string{"a"}, code: 1002}
		}
	}
	for _, op := range []byte{opClose, opPing, opPong} {
		x[fmt.Sprint("fragmented control frame ", op)] = dialogue{send: pieces(op, "", ""), code: 1002}
		x[fmt.Sprint("long control frame ", op)] = dialogue{send: joined(whole(op, strings.Repeat("x", 126))), code: 1002}
	}
	x["not masked"] = dialogue{send: joined("\x81\x01a"), code: 1002}
	x["top bit of the length"] = dialogue{send: joined("\x82\xff\x80\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x00x"), code: 1002}
	x["too big"] = dialogue{send: joined("\x82\xff\x00\x00\x00\x00\x00\x10\x00\x01\x00\x00\x00\x00"), code: 1009}
	x["too big in fragments"] = dialogue{send: pieces(opBinary, strings.Repeat("x", 1<<19), strings.Repeat("x", 1<<19), "x"), code: 1009}
}

func addFragments(x map[string]dialogue) {
	ping := whole(opPing, "p")
	x["two fragments"] = dialogue{send: joined(pieces(opText, "ab", "cd"), bye), messages: []string{"abcd"}, code: 1000}
	x["empty fragments"] = dialogue{send: joined(pieces(opText, "", "", ""), pieces(opText, "", "x", ""), pieces(opBinary, "", ""), bye), messages: []string{"", "x", "\x00"}, code: 1000}
	f := pieces(opText, "one", "two", "three")
	x["pings between fragments"] = dialogue{send: joined(f[0], ping, f[1], ping, whole(opPong, "z"), f[2], bye), messages: []string{"onetwothree"}, pongs: []string{"p", "p"}, code: 1000}
	x["continuation of nothing"] = dialogue{send: joined(clientFrame(finBit, "x")), code: 1002}
	x["continuation of nothing, not final"] = dialogue{send: joined(clientFrame(0, "x"), whole(opText, "y")), code: 1002}
	x["continuation behind a whole message"] = dialogue{send: joined(whole(opText, "a"), clientFrame(finBit, "x")), messages: []string{"a"}, code: 1002}
	x["text inside a text"] = dialogue{send: joined(f[0], whole(opText, "x")), code: 1002}
	x["binary inside a text"] = dialogue{send: joined(f[0], f[1], whole(opBinary, "x")), code: 1002}
	x["first frame twice"] = dialogue{send: joined(f[0], f[0]), code: 1002}
	x["close inside a message"] = dialogue{send: joined(f[0], bye, f[1], f[2]), code: 1000}
	var parts []string
	for range 5000 {
		parts = append(parts, "0123456789")
	}
	x["5000 fragments"] = dialogue{send: joined(pieces(opBinary, parts...), bye), messages: []string{"\x00" + strings.Join(parts, "")}, code: 1000}
}

func addUTF8(x map[string]dialogue) {
	good := "Hello-µ@ßöäüàá-κόσμε-\U0001F4E6-\U0010FFFF-\uFFFF-\x00-\uD7FF\uE000"
	x["UTF-8"] = dialogue{send: joined(whole(opText, good), bye), messages: []string{good}, code: 1000}
	x["UTF-8, a byte per fragment"] = dialogue{send: joined(pieces(opText, strings.Split(good, "")...), bye), messages: []string{good}, code: 1000}
	var bytewise []string
	for i := range len(good) {
		bytewise = append(bytewise, good[i:i+1])
	}
	x["UTF-8, runes over fragments"] = dialogue{send: joined(pieces(opText, bytewise...), bye), messages: []string{good}, code: 1000}
	x["binary is no UTF-8"] = dialogue{send: joined(whole(opBinary, "\xff\xfe"), bye), messages: []string{"\x00\xff\xfe"}, code: 1000}
	for name, bad := range map[string]string{
		"lone continuation": "\x80", "0xff": "\xff", "0xc0": "\xc0\xaf", "overlong": "\xe0\x80\xaf", "overlong of four": "\xf0\x80\x80\xaf",
		"surrogate": "\xed\xa0\x80", "second surrogate": "\xed\xbf\xbf", "beyond U+10FFFF": "\xf4\x90\x80\x80", "five bytes": "\xf8\x88\x80\x80\x80",
		"six bytes": "\xfc\x84\x80\x80\x80\x80", "incomplete": "\xce", "incomplete of four": "\xf0\x9f\x93", "cut, then text": "\xe2\x82a",
	} {
		x["not UTF-8: "+name] = dialogue{send: joined(whole(opText, "κόσμε"+bad)), code: 1007}
		x["not UTF-8, cut: "+name] = dialogue{send: joined(pieces(opText, "κόσμε"+bad[:1], bad[1:], "")), code: 1007}
	}
	// The fault ends the connection before the message does, within a frame too.
	x["not UTF-8, early"] = dialogue{send: joined(clientFrame(opText, "κόσμε\xed"), clientFrame(opContinuation, "\xa0")), code: 1007}
	x["not UTF-8, within a frame"] = dialogue{send: joined(whole(opText, "κόσμε\xf4\x90"+strings.Repeat("x", 1000))[:40]), code: 1007}
}

func addCloses(x map[string]dialogue) {
	x["close of nothing"] = dialogue{send: joined(whole(opClose, "")), code: closeNoStatus}
	x["close of one byte"] = dialogue{send: joined(whole(opClose, "\x03")), code: 1002}
	for _, code := range []int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3999, 4000, 4999} {
		x[fmt.Sprint("close ", code)] = dialogue{send: joined(closeWith(code, "")), code: code}
		x[fmt.Sprint("close with reason ", code)] = dialogue{send: joined(closeWith(code, "größer")), code: code}
	}
	for _, code := range []int{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535} {
		x[fmt.Sprint("invalid close ", code)] = dialogue{send: joined(closeWith(code, "")), code: 1002}
		x[fmt.Sprint("invalid close with reason ", code)] = dialogue{send: joined(closeWith(code, "x")), code: 1002}
	}
	x["close with 123 bytes of reason"] = dialogue{send: joined(closeWith(1000, strings.Repeat("r", 123))), code: 1000}
	x["close with 124 bytes of reason"] = dialogue{send: joined(closeWith(1000, strings.Repeat("r", 124))), code: 1002}
	x["close reason not UTF-8"] = dialogue{send: joined(closeWith(1000, "κό\xf4\x90\x80\x80")), code: 1007}
	x["echo, then close"] = dialogue{send: joined(whole(opText, strings.Repeat("x", 256<<10)), bye, whole(opPing, "late")), messages: []string{strings.Repeat("x", 256<<10)}, code: 1000}
	x["data behind a close"] = dialogue{send: joined(bye, whole(opText, "late"), whole(opPing, "late"), bye), code: 1000}
	x["garbage behind a close"] = dialogue{send: joined(bye, "\xff\xff\xff\xff"), code: 1000}
	x["half-close"] = dialogue{send: joined(whole(opText, "a")), messages: []string{"a"}, code: closeAbnormal}
	x["half-close within a message"] = dialogue{send: joined(clientFrame(opText, "a")), code: closeAbnormal}
	x["half-close within a frame"] = dialogue{send: joined(whole(opText, "abcdef")[:9]), code: closeAbnormal}
}

// play sends and holds what comes against what must come.
func (x dialogue) play(t *testing.T, c *testClient, bytewise bool) {
	t.Helper()
	sent := strings.Join(x.send, "")
	go func() { // ends with the connection; the server may close it before all is sent
		if bytewise {
			for i := range len(sent) {
				c.nc.Write([]byte{sent[i]})
			}
		} else {
			io.WriteString(c.nc, sent)
		}
	}()
	var messages, pongs []string
	for {
		if x.code == closeAbnormal && len(messages) == len(x.messages) {
			wantEndAfterHalfClose(t, c)
			return
		}
		op, p, err := c.frame()
		if err != nil {
			t.Fatalf("after %d messages, %d pongs: %v", len(messages), len(pongs), err)
		}
		switch op {
		case opText:
			messages = append(messages, string(p))
		case opBinary:
			messages = append(messages, "\x00"+string(p))
		case opPong:
			pongs = append(pongs, string(p))
		case opClose:
			x.wantEnd(t, c, messages, pongs, p)
			return
		}
	}
}

func (x dialogue) wantEnd(t *testing.T, c *testClient, messages, pongs []string, p []byte) {
	t.Helper()
	if code, err := parseClose(p); err != nil || code != x.code {
		t.Errorf("closed %d %v, want %d", code, err, x.code)
	}
	if strings.Join(messages, "|") != strings.Join(x.messages, "|") || len(messages) != len(x.messages) {
		t.Errorf("%d messages, %.80q; want %d, %.80q", len(messages), messages, len(x.messages), x.messages)
	}
	if strings.Join(pongs, "|") != strings.Join(x.pongs, "|") || len(pongs) != len(x.pongs) {
		t.Errorf("%d pongs, %.80q; want %d, %.80q", len(pongs), pongs, len(x.pongs), x.pongs)
	}
	if _, err := c.br.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("after the close frame: %v", err)
	}
}

// wantEndAfterHalfClose: the client has said its last word without a close frame; the server ends the connection.
func wantEndAfterHalfClose(t *testing.T, c *testClient) {
	t.Helper()
	c.nc.(*net.TCPConn).CloseWrite()
	if rest, err := io.ReadAll(c.br); err != nil || len(rest) > 0 {
		t.Errorf("after a half-close: %d bytes, %v", len(rest), err)
	}
}

func TestConformance(t *testing.T) {
	captureLog(t)
	e := newEcho(t, "disabled", 1<<20)
	srv := httptest.NewServer(http.HandlerFunc(e.handle))
	defer srv.Close()
	for name, x := range dialogues() {
		t.Run(name, func(t *testing.T) { x.play(t, e.client(t, srv, ""), false) })
		if len(strings.Join(x.send, "")) < 200 {
			t.Run(name+", bytewise", func(t *testing.T) { x.play(t, e.client(t, srv, ""), true) })
		}
	}
}

// TestConformanceDeflated plays the same with compression negotiated, where RSV1 alone is another matter.
func TestConformanceDeflated(t *testing.T) {
	captureLog(t)
	e := newEcho(t, "no_context_takeover", 1<<20)
	srv := httptest.NewServer(http.HandlerFunc(e.handle))
	defer srv.Close()
	for name, x := range dialogues() {
		if strings.HasPrefix(name, "RSV 4 of opcode 1") || strings.HasPrefix(name, "RSV 4 of opcode 2") {
			continue
		}
		t.Run(name, func(t *testing.T) { x.play(t, e.client(t, srv, "permessage-deflate"), false) })
	}
	for _, size := range []int{0, 1, 16, 1000, 30_000, 130_000} {
		for _, chop := range []int{1 << 20, 4096, 100, 3} {
			x := dialogue{code: 1000}
			for i := range 20 {
				text := strings.Repeat(fmt.Sprintf("message %d, ", i), size/11+1)[:size]
				x.send = append(x.send, chopped(deflated(text, 1+i%9), chop)...)
				x.messages = append(x.messages, text)
			}
			x.send = append(x.send, bye)
			t.Run(fmt.Sprintf("%d bytes by %d", size, chop), func(t *testing.T) {
				x.play(t, e.client(t, srv, "permessage-deflate; client_max_window_bits"), false)
			})
		}
	}
}

// chopped is a compressed text in frames of at most size bytes.
func chopped(p string, size int) []string {
	var parts []string
	for ; len(p) > size; p = p[size:] {
		parts = append(parts, p[:size])
	}
	frames := pieces(opText, append(parts, p)...)
	frames[0] = string([]byte{frames[0][0] | rsv1}) + frames[0][1:]
	return frames
}

// TestEchoOfBigMessages: whatever the limit is set to, a message of that size comes back, whole and in fragments.
func TestEchoOfBigMessages(t *testing.T) {
	const limit = 16 << 20
	captureLog(t)
	e := newEcho(t, "no_context_takeover", limit)
	srv := httptest.NewServer(http.HandlerFunc(e.handle))
	defer srv.Close()
	big := strings.Repeat("0123456789abcdef", limit/16)
	want := func(c *testClient) {
		t.Helper()
		op, p, err := c.frame()
		if err != nil || op != opBinary || !bytes.Equal(p, []byte(big)) {
			t.Fatalf("%d bytes, %v", len(p), err)
		}
	}
	c := e.client(t, srv, "")
	c.send(whole(opBinary, big))
	want(c)
	var parts []string
	for rest := big; rest != ""; rest = rest[min(len(rest), 100_000):] {
		parts = append(parts, rest[:min(len(rest), 100_000)])
	}
	c.send(pieces(opBinary, parts...)...)
	want(c)
	c = e.client(t, srv, "permessage-deflate")
	c.send(clientFrame(finBit|rsv1|opBinary, deflated(big, 1)))
	want(c)
	if !c.packed {
		t.Error("the echo is not compressed")
	}
}
