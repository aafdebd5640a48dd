package main

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode/utf8"
)

func TestEventFrame(t *testing.T) {
	for _, size := range []int{0, 60, 200, 70_000} {
		payload := `{ "a":"` + strings.Repeat("é", size) + `" }`
		ev := &event{seq: 1<<63 + 5, kind: kindMessage, payload: []byte(payload)}
		for _, replay := range []bool{false, true} {
			f := newEventFrame(ev, replay, false)
			c := &testClient{t: t, br: newBufReader(f.b)}
			op, p, err := c.frame()
			if op != opText || err != nil || c.br.Buffered() != 0 {
				t.Fatal(op, err)
			}
			want := `{"type":"event","event_type":"message","seq":9223372036854775813,"payload":` + payload
			if replay {
				want += `,"replay":true`
			}
			if string(p) != want+"}" || !json.Valid(p) {
				t.Fatalf("got %.200q", p)
			}
		}
	}
}

// TestTypeInPayload: an object that has no event_type at its top gets one, and stays the same otherwise.
func TestTypeInPayload(t *testing.T) {
	for payload, want := range map[string]string{
		`{}`:                                   `{"event_type":"chat"}`,
		" {\n} ":                               " {\"event_type\":\"chat\"\n} ",
		"\t{ \"a\" : 1 }":                      "\t{\"event_type\":\"chat\", \"a\" : 1 }",
		`{"a":{"event_type":"x"}}`:             `{"event_type":"chat","a":{"event_type":"x"}}`,
		`{"a":"event_type"}`:                   `{"event_type":"chat","a":"event_type"}`,
		`{"a":"{\"event_type\":1}"}`:           `{"event_type":"chat","a":"{\"event_type\":1}"}`,
		`{"Event_Type":"x"}`:                   `{"event_type":"chat","Event_Type":"x"}`,
		`{"a":"\u00e9"}`:                       `{"event_type":"chat","a":"\u00e9"}`,
		`{"event_type":"chats","a":1}`:         "",
		`{"a":1, "event_type" : null}`:         "",
		`{"a":[{}],"event\u005ftype":"chats"}`: "",
		`{"\u0065vent_type":"chats"}`:          "",
	} {
		if err := checkPayload([]byte(payload)); err != nil {
			t.Fatalf("%s: %v", payload, err)
		}
		if want == "" {
			want = payload
		}
		for tail, replay := range map[string]bool{"}": false, `,"replay":true}`: true} {
			f := newEventFrame(&event{seq: 7, kind: kindChat, payload: []byte(payload)}, replay, true)
			_, p, err := (&testClient{t: t, br: newBufReader(f.b)}).frame()
			if whole := `{"type":"event","event_type":"chat","seq":7,"payload":` + want + tail; err != nil || string(p) != whole || !json.Valid(p) {
				t.Errorf("%s becomes %s, %v, want %s", payload, p, err, whole)
			}
		}
	}
}

func TestCloseFrame(t *testing.T) {
	if closeFrame(closeAbnormal, "x") != nil {
		t.Fatal("1006 must not be sent")
	}
	if b := closeFrame(closeNoStatus, "x"); !bytes.Equal(b, []byte{0x88, 0}) {
		t.Fatalf("%x", b)
	}
	b := closeFrame(1001, strings.Repeat("é", 100))
	if len(b) > 2+maxControl || !utf8.Valid(b[4:]) || int(b[1]) != len(b)-2 {
		t.Fatalf("%d %x", len(b), b)
	}
}

const (
	fragText = opText // without FIN
	fragBin  = opBinary
	cont     = opContinuation
)

// Everything that a client may do to a connection's framing, and the code that it is closed with.
func TestFrameFaults(t *testing.T) {
	th := newTestHub(t, nil)
	ping := clientFrame(finBit|opPing, "x")
	for name, test := range map[string]struct {
		send string
		code int
	}{
		"RSV1":                            {clientFrame(finBit|0x40|opText, "{}"), 1002},
		"RSV2 of a control frame":         {clientFrame(finBit|0x20|opPing, ""), 1002},
		"RSV3 of a continuation":          {clientFrame(fragText, "{") + clientFrame(finBit|0x10|cont, "}"), 1002},
		"reserved opcode 3":               {clientFrame(finBit|3, ""), 1002},
		"reserved opcode 7":               {clientFrame(finBit|7, "x"), 1002},
		"reserved control opcode 11":      {clientFrame(finBit|0xB, ""), 1002},
		"reserved control opcode 15":      {clientFrame(finBit|0xF, "x"), 1002},
		"not masked":                      {"\x81\x02{}", 1002},
		"ping not masked":                 {"\x89\x00", 1002},
		"fragmented ping":                 {clientFrame(opPing, "x"), 1002},
		"fragmented close":                {clientFrame(opClose, "\x03\xe8"), 1002},
		"long ping":                       {clientFrame(finBit|opPing, strings.Repeat("x", 126)), 1002},
		"long close":                      {clientFrame(finBit|opClose, "\x03\xe8"+strings.Repeat("x", 124)), 1002},
		"continuation of nothing":         {clientFrame(finBit|cont, "x"), 1002},
		"continuation after the end":      {clientFrame(finBit|opText, "{}") + clientFrame(cont, "x"), 1002},
		"text inside a text":              {clientFrame(fragText, "{") + clientFrame(finBit|opText, "{}"), 1002},
		"text inside a text, behind ping": {clientFrame(fragText, "{") + ping + clientFrame(fragText, "{}"), 1002},
		"binary inside a text":            {clientFrame(fragText, "{") + clientFrame(finBit|opBinary, "{}"), 1002},
		"length 125 in 16 bits":           {"\x81\xfe\x00\x7d\x00\x00\x00\x00" + strings.Repeat("x", 125), 1002},
		"length 65,535 in 64 bits":        {"\x81\xff\x00\x00\x00\x00\x00\x00\xff\xff\x00\x00\x00\x00", 1002},
		"64-bit length with its top bit":  {"\x81\xff\x80\x00\x00\x00\x00\x00\x00\x02\x00\x00\x00\x00{}", 1002},
		"huge 64-bit length":              {"\x81\xff\x7f\xff\xff\xff\xff\xff\xff\xff\x00\x00\x00\x00{}", 1009},
		"binary":                          {clientFrame(finBit|opBinary, "x"), 1003},
		"fragmented binary":               {clientFrame(fragBin, ""), 1003},
		"too big":                         {clientFrame(finBit|opText, strings.Repeat(" ", 64<<10+1)), 1009},
		"too big in parts":                {clientFrame(fragText, strings.Repeat(" ", 64<<10)) + clientFrame(cont, " "), 1009},
		"not UTF-8":                       {textFrame("\xff"), 1007},
		"overlong":                        {textFrame("a\xc0\xaf"), 1007},
		"surrogate":                       {textFrame("\xed\xa0\x80"), 1007},
		"rune cut at the end":             {textFrame("x\xe2\x82"), 1007},
		"rune cut at the end of parts":    {clientFrame(fragText, "\xe2") + clientFrame(finBit|cont, "\x82"), 1007},
		"bad rune over a border, early":   {clientFrame(fragText, "\xf0") + clientFrame(cont, "\x28"), 1007},
		"bad rune within a frame, early":  {clientFrame(fragText, "abc\xff"), 1007},
		"close of one byte":               {clientFrame(finBit|opClose, "\x03"), 1002},
		"close 999":                       {clientFrame(finBit|opClose, "\x03\xe7"), 1002},
		"close 1004":                      {clientFrame(finBit|opClose, "\x03\xec"), 1002},
		"close 1005":                      {clientFrame(finBit|opClose, "\x03\xed"), 1002},
		"close 1006":                      {clientFrame(finBit|opClose, "\x03\xee"), 1002},
		"close 1015":                      {clientFrame(finBit|opClose, "\x03\xf7"), 1002},
		"close 2999":                      {clientFrame(finBit|opClose, "\x0b\xb7"), 1002},
		"close 5000":                      {clientFrame(finBit|opClose, "\x13\x88"), 1002},
		"close reason not UTF-8":          {clientFrame(finBit|opClose, "\x03\xe8\xff"), 1007},
		"close":                           {clientFrame(finBit|opClose, ""), 0},
		"close 1000":                      {clientFrame(finBit|opClose, "\x03\xe8"), 1000},
		"close 1011 with reason":          {clientFrame(finBit|opClose, "\x03\xf3höchst"), 1011},
		"close 3000":                      {clientFrame(finBit|opClose, "\x0b\xb8"), 3000},
		"close 4999":                      {clientFrame(finBit|opClose, "\x13\x87"), 4999},
		"close within a message":          {clientFrame(fragText, "{") + clientFrame(finBit|opClose, "\x03\xe8"), 1000},
		"data behind a close":             {clientFrame(finBit|opClose, "\x03\xe8") + clientFrame(finBit|3, "x") + ping, 1000},
	} {
		t.Run(name, func(t *testing.T) {
			c := th.open("/")
			c.t = t
			c.send(test.send)
			c.wantClose(test.code, "")
		})
	}
}

func TestFragments(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	c.send(
		clientFrame(fragText, ""), clientFrame(finBit|opPing, "one"), clientFrame(cont, `{"type":"select_chat",`),
		clientFrame(finBit|opPing, strings.Repeat("z", 125)), clientFrame(finBit|opPong, "unasked"),
		clientFrame(cont, ""), clientFrame(finBit|cont, `"chat_id":"x"}`), clientFrame(finBit|opPing, ""))
	for _, want := range []string{"one", strings.Repeat("z", 125)} {
		if op, p, err := c.frame(); op != opPong || string(p) != want || err != nil {
			t.Fatal(op, p, err)
		}
	}
	selected, ponged := false, false
	for !selected || !ponged { // a pong goes before a reply that waits
		op, p, err := c.frame()
		if err != nil {
			t.Fatal(err)
		}
		selected = selected || op == opText && bytes.Contains(p, []byte("chat_selected"))
		ponged = ponged || op == opPong && len(p) == 0
	}
	// A rune over the border of two frames, sent byte by byte.
	for _, b := range []byte(clientFrame(fragText, "{\"type\":\"\xe2\x82") + clientFrame(finBit|cont, "\xac\"}")) {
		c.send(string([]byte{b}))
	}
	c.wantError("BadRequest")
	// The largest message, in pieces of a size that no buffer has.
	big := `{"type":"ping","x":"` + strings.Repeat("é", 32<<10-12) + `"}`
	big += strings.Repeat(" ", 64<<10-len(big))
	first := byte(fragText)
	for len(big) > 777 {
		c.send(clientFrame(first, big[:777]))
		big, first = big[777:], cont
	}
	c.send(clientFrame(finBit|first, big))
	c.want("pong")
}

// A client that vanishes within a message, or within a header, leaves nothing behind.
func TestConnectionEndsInsideAMessage(t *testing.T) {
	th := newTestHub(t, nil)
	for _, part := range []string{"", "\x81", clientFrame(fragText, "x"), clientFrame(finBit|opText, "xyz")[:7], "\x81\xfe\x01"} {
		c := th.open("/")
		c.send(part)
		c.nc.Close()
	}
	wantEventually(t, "sockets left over", func() bool { return th.m.closesTotal.with("1006").Get() == 5 })
}

// The client learns why it is closed even if it sends all the time and reads late.
func TestCloseReachesABusySender(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	stop := make(chan struct{})
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
			}
			c.nc.Write([]byte(textFrame(`{"type":"ping"}`)))
		}
	}()
	th.each(func(c *conn) { c.close(4402, "session-replaced") })
	for {
		op, p, err := c.frame()
		if err != nil {
			t.Fatal(err)
		}
		if op == opClose {
			if string(p[2:]) != "session-replaced" {
				t.Fatalf("%q", p)
			}
			break
		}
	}
	close(stop)
	<-done
	c.nc.Close()
}

// A socket whose client does nothing at all is released before the closing handshake and gone soon after it.
func TestCloseDoesNotWaitForTheClient(t *testing.T) {
	th := newTestHub(t, nil)
	c := th.open("/")
	begun := time.Now()
	th.each(func(c *conn) { c.close(4403, "revoked"); c.close(1011, "too late") })
	th.mu.Lock()
	released := len(th.released)
	th.mu.Unlock()
	if released != 1 {
		t.Fatalf("released %d times by close", released)
	}
	wantEventually(t, "gone", func() bool { return th.m.closesTotal.with("4403").Get() == 1 })
	if d := time.Since(begun); d > 2*lingerTime {
		t.Fatalf("took %v", d)
	}
	c.wantClose(4403, "revoked")
}
