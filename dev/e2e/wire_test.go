package e2e

import (
	"fmt"
	"strings"
	"testing"

	"daisi-ws-service/dev/harness"
)

const pingText = `{"type":"ping"}`

// TestFrameBehindTheHandshake: what a client sends in the same TCP segment as its request is handled, behind ready.
func TestFrameBehindTheHandshake(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	selects := harness.Frame(harness.FIN|harness.Text, []byte(`{"type":"select_chat","payload":{"chat_id":"c1"}}`))
	long := harness.Frame(harness.FIN|harness.Text, []byte(`{"type":"ping","pad":"`+strings.Repeat("x", 3000)+`"}`)) // beyond the service's own read buffer
	half := len(long) / 2
	for i := range 50 {
		d := harness.User("acme", "desk1", fmt.Sprintf("ann%d", i))
		r := pod.DialRaw(d, selects, harness.Frame(harness.FIN|harness.Text, []byte(pingText)), long[:half])
		r.WantMessage("ready")
		if m := r.WantMessage("chat_selected"); !strings.Contains(m.Raw, `"chat_id":"c1"`) {
			t.Fatalf("round %d: %s", i, m.Raw)
		}
		r.WantMessage("pong")
		r.Write(long[half:])
		r.WantMessage("pong")
		seq := w.Message("acme", "desk1", "c1")
		if m := r.WantMessage("event"); m.Seq != seq {
			t.Fatalf("round %d: want event %d, got %s", i, seq, m.Raw)
		}
		r.Abort()
	}
	// Nor is a close lost: the socket is set up, closed, and its session is free.
	r := pod.DialRaw(harness.User("acme", "desk2", "bob"), harness.Frame(harness.FIN|harness.CloseFrame, []byte("\x03\xe8")))
	op, p, err := r.Read()
	if err == nil && op == harness.Text { // ready may be faster
		op, p, err = r.Read()
	}
	if err != nil || op != harness.CloseFrame || string(p) != "\x03\xe8" {
		t.Errorf("a close behind the handshake is answered by frame %d %q, %v", op, p, err)
	}
	wantNoLock(t, w.RedisClient(), harness.User("acme", "desk2", "bob"))
}

// TestFragments: a message may come in pieces, with control frames between them and a rune cut in two.
func TestFragments(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	r := pod.DialRaw(harness.User("acme", "desk1", "ann"))
	r.WantMessage("ready")
	text := `{"type":"ping","note":"größer 📦"}`
	for size := 1; size <= len(text); size++ {
		r.Write(harness.Frame(harness.Text, nil)) // an empty first fragment is allowed
		for rest := text; rest != ""; {
			n := min(size, len(rest))
			r.Write(harness.Frame(harness.Continuation, []byte(rest[:n])))
			rest = rest[n:]
		}
		r.Write(harness.Frame(harness.FIN|harness.Ping, []byte(fmt.Sprint(size))))
		r.Write(harness.Frame(harness.FIN|harness.Continuation, nil))
		r.WantFrame(harness.Pong, fmt.Sprint(size))
		r.WantMessage("pong")
		if size%10 == 0 { // within the rate
			r.Abort()
			r = pod.DialRaw(harness.User("acme", "desk1", "ann"))
			r.WantMessage("ready")
		}
	}
}

// TestBrokenFrames: each fault of the framing, or of what a frame holds, ends the socket with its own code and reason, at once,
// and costs nobody else anything.
func TestBrokenFrames(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_MAX_MESSAGE=64KiB"))
	pod := w.Start()
	rdb := w.RedisClient()
	bob := pod.Connect(harness.User("acme", "desk1", "bob"))
	frame, fin := harness.Frame, harness.FIN
	join := func(frames ...[]byte) (all []byte) {
		for _, f := range frames {
			all = append(all, f...)
		}
		return all
	}
	unmasked := append(harness.FrameHeader(fin|harness.Text, false, uint64(len(pingText))), pingText...)
	for name, tc := range map[string]struct {
		send   []byte
		code   int
		reason string
	}{
		"binary":                      {frame(fin|harness.Binary, []byte("x")), 1003, "binary messages are not taken"},
		"binary, empty":               {frame(fin|harness.Binary, nil), 1003, "binary messages are not taken"},
		"binary, only begun":          {harness.FrameHeader(harness.Binary, true, 1<<20), 1003, "binary messages are not taken"},
		"bad UTF-8":                   {frame(fin|harness.Text, []byte("{\"type\":\"p\xffing\"}")), 1007, "text is not UTF-8"},
		"surrogate":                   {frame(fin|harness.Text, []byte("\xed\xa0\x80")), 1007, "text is not UTF-8"},
		"rune cut off":                {frame(fin|harness.Text, []byte("\"\xf0\x9f")), 1007, "text is not UTF-8"},
		"bad UTF-8 in a fragment":     {frame(harness.Text, []byte("\xc3\xc3")), 1007, "text is not UTF-8"}, // before the message ends
		"too big":                     {frame(fin|harness.Text, make([]byte, 64<<10+1)), 1009, "message too big"},
		"too big, only announced":     {harness.FrameHeader(fin|harness.Text, true, 1<<40), 1009, "message too big"},
		"too big in fragments":        {join(frame(harness.Text, []byte(strings.Repeat("x", 64<<10))), frame(fin|harness.Continuation, []byte("x"))), 1009, "message too big"},
		"unmasked":                    {unmasked, 1002, "frame is not masked"},
		"RSV1":                        {frame(fin|0x40|harness.Text, []byte(pingText)), 1002, "RSV bit without an extension"},
		"RSV3 on a ping":              {frame(fin|0x10|harness.Ping, nil), 1002, "RSV bit without an extension"},
		"opcode 3":                    {frame(fin|0x3, nil), 1002, "reserved opcode"},
		"opcode 15":                   {frame(fin|0xF, nil), 1002, "reserved opcode"},
		"fragmented ping":             {frame(harness.Ping, nil), 1002, "fragmented control frame"},
		"long ping":                   {frame(fin|harness.Ping, make([]byte, 126)), 1002, "control frame too long"},
		"continuation of nothing":     {frame(fin|harness.Continuation, []byte(pingText)), 1002, "continuation of nothing"},
		"text within a text":          {join(frame(harness.Text, []byte("{")), frame(fin|harness.Text, []byte(pingText))), 1002, "new message inside another"},
		"length with its top bit":     {append(harness.FrameHeader(fin|harness.Text, true, 1<<63), 0, 0, 0, 0), 1002, "length has its top bit set"},
		"close of one byte":           {frame(fin|harness.CloseFrame, []byte("x")), 1002, "close frame of one byte"},
		"close with a forbidden code": {frame(fin|harness.CloseFrame, []byte("\x03\xee")), 1002, "invalid close code"}, // 1006
		"close with code 0":           {frame(fin|harness.CloseFrame, []byte("\x00\x00")), 1002, "invalid close code"},
		"close with a bad reason":     {frame(fin|harness.CloseFrame, []byte("\x03\xe8\xff")), 1007, "close reason is not UTF-8"},
		"close":                       {frame(fin|harness.CloseFrame, []byte("\x03\xe8bye")), 1000, ""},
		"close of an application":     {frame(fin|harness.CloseFrame, []byte("\x0f\xa0")), 4000, ""},
		"close without a code":        {frame(fin|harness.CloseFrame, nil), 1005, ""},
	} {
		d := harness.User("acme", "desk1", "ann")
		r := pod.DialRaw(d)
		r.WantMessage("ready")
		pings := frame(fin|harness.Text, []byte(pingText))
		r.TryWrite(join(pings, tc.send, pings)) // the second is not looked at; the write may find the connection closed
		if op, p, err := r.Read(); err != nil || op != harness.Text || string(p) != `{"type":"pong"}` {
			t.Fatalf("%s: before the fault: frame %d %q, %v", name, op, p, err)
		}
		if err := r.ReadClose(tc.code, tc.reason); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		wantNoLock(t, rdb, d)
		bob.WantNothingElse()
	}
	whole := pingText + strings.Repeat(" ", 64<<10-len(pingText))
	bob.SendRaw(true, []byte(whole)) // as big as may be
	bob.TakeType("pong")
}

// TestFaultyMessages: what is no message of json.v1 is answered by an error and changes nothing. With other people's clients.
func TestFaultyMessages(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("WEBSOCKET_RATE_BURST=1000"))
		pod := w.Start()
		c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		c.SelectChat("c1")
		n := 0
		for _, text := range []string{
			"", " ", "hello", "{", "[]", "null", "7", `"ping"`, "{}", `{"type":""}`, `{"type":null}`, `{"type":7}`, `{"type":"Ping"}`, `{"type":"pong"}`, `{"type":"Ready"}`,
			`{"type":"event","seq":1,"payload":{}}`, `{"type":"ping"}{"type":"ping"}`, `{"type":"ping"} x`, `{"type":"ping",}`,
			`{"type":"refresh_token"}`, `{"type":"refresh_token","payload":{}}`, `{"type":"refresh_token","payload":{"token":7}}`, `{"type":"select_chat"}`,
			`{"type":"` + strings.Repeat("x", 60_000) + `"}`, strings.Repeat("[", 30_000),
		} {
			c.SendRaw(true, []byte(text))
			if e := c.WantError("BadRequest"); e.Message == "" {
				t.Errorf("%.100q: an error without a message", text)
			}
			n++
		}
		c.SendRaw(true, []byte(`{"type":"refresh_token","payload":{"token":"nonsense"}}`))
		c.WantError("InvalidToken")
		c.SendRaw(true, []byte(`{"type":"ready"}`)) // of clients of the earlier service: ignored
		c.SendRaw(true, []byte(" {\"future\":[1], \"type\" : \"ping\", \"payload\":{\"more\":true}}\n"))
		if m := c.Next(); m.Raw != `{"type":"pong"}` {
			t.Errorf("ping is answered by %s", m.Raw)
		}
		c.WantEvent(w.Message("acme", "desk1", "c1"))
		if got := pod.Metric("dws_messages_sent_total", `message_type="error"`); got != float64(n+1) {
			t.Errorf("%v errors sent, want %d", got, n+1)
		}
	})
}

// TestFaultsByLibrary: how other people's clients see it when they send what the service does not take.
func TestFaultsByLibrary(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("WEBSOCKET_MAX_MESSAGE=4KiB"))
		pod := w.Start()
		for _, tc := range []struct {
			text bool
			data string
			code int
		}{
			{false, pingText, 1003}, {true, "{\"type\":\"\xc3\"}", 1007}, {true, strings.Repeat("x", 4<<10+1), 1009},
		} {
			c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
			c.SendRaw(tc.text, []byte(tc.data))
			c.WantClose(tc.code, "*")
			pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_closes_total", fmt.Sprintf(`code="%d"`, tc.code))
		}
	})
}

// TestRateLimit: messages above the rate are refused, not handled, and after three bursts of them the socket is closed;
// events go on until then, and a neighbour notices nothing.
func TestRateLimit(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		const burst = 5
		w := harness.New(t, harness.Settings("WEBSOCKET_RATE_LIMIT=0.01/s", fmt.Sprint("WEBSOCKET_RATE_BURST=", burst)))
		pod := w.Start()
		c, bob := pod.Connect(as(harness.User("acme", "desk1", "ann"))), pod.Connect(harness.User("acme", "desk2", "bob"))
		for range burst {
			c.SendRaw(true, []byte(pingText))
			c.TakeType("pong")
		}
		for i := range 3*burst - 1 {
			text := pingText
			if i == 0 {
				text = `{"type":"select_chat","payload":{"chat_id":"c1"}}`
			}
			c.SendRaw(true, []byte(text))
			if e := harness.Message(c.Next()); e.Type != "error" || !strings.Contains(e.Raw, `"code":"RateLimitExceeded"`) {
				t.Fatalf("message %d above the burst is answered by %s", i, e.Raw)
			}
			w.Message("acme", "desk1", "c1") // not selected
			c.WantNothingElse()
		}
		c.SendRaw(true, []byte(pingText))
		c.WantClose(4429, "rate-limit-exceeded")
		bob.SendRaw(true, []byte(pingText))
		bob.TakeType("pong")
		bob.WantNothingElse()
		pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_closes_total", `code="4429"`)
		// The ban ends with the socket.
		again := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		again.SendRaw(true, []byte(pingText))
		again.TakeType("pong")
	})
}

// TestPingFrames: each WebSocket ping is answered by its own payload; a flood of them ends like a flood of messages.
func TestPingFrames(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_RATE_LIMIT=0.01/s", "WEBSOCKET_RATE_BURST=10"))
	pod := w.Start()
	r := pod.DialRaw(harness.User("acme", "desk1", "ann"))
	r.WantMessage("ready")
	for i := range 10 + 29 {
		payload := strings.Repeat("p", min(125, i*12))
		r.Write(harness.Frame(harness.FIN|harness.Pong, []byte("unasked"))) // is allowed, and not counted
		r.Write(harness.Frame(harness.FIN|harness.Ping, []byte(payload)))
		r.WantFrame(harness.Pong, payload)
	}
	r.Write(harness.Frame(harness.FIN|harness.Ping, nil))
	r.WantClose(4429, "rate-limit-exceeded")
}

// TestMissedPongs: a client that never answers is closed after two pings; those that answer, or at least answer every
// other ping, stay.
func TestMissedPongs(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("WEBSOCKET_PING_INTERVAL=1s", "WEBSOCKET_RATE_LIMIT=1000/s", "WEBSOCKET_RATE_BURST=1000"))
		pod := w.Start()
		c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		lazy := pod.DialRaw(harness.User("acme", "desk2", "lazy"))
		mute := pod.DialRaw(harness.User("acme", "desk3", "mute"))
		lazy.WantMessage("ready")
		mute.WantMessage("ready")
		for range 2 {
			lazy.WantFrame(harness.Ping, "")
			lazy.WantFrame(harness.Ping, "")
			lazy.Write(harness.Frame(harness.FIN|harness.Pong, nil))
		}
		mute.WantFrame(harness.Ping, "")
		mute.WantFrame(harness.Ping, "")
		mute.WantClose(1011, "ping-timeout")
		c.WantNothingElse()
		mute.Abort()
		pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_closes_total", `code="1011"`)
		if n := pod.Metric("dws_active_connections"); n != 2 {
			t.Errorf("%v sockets are open, want 2", n)
		}
	})
}
