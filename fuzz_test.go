package main

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
	"unicode/utf8"
)

// heard is what reading a client's bytes has come to: messages and pings in their order, then an end.
type heard struct {
	messages, controls []string
	code               int
}

// trickle gives a few bytes at a time, then the end.
type trickle struct {
	net.Conn
	rest []byte
	step int
}

func (c *trickle) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.rest[:min(c.step, len(c.rest))])
	c.rest = c.rest[n:]
	return n, nil
}

// hear reads as a socket does.
func hear(data []byte, deflate bool, limit, step int) heard {
	var h heard
	in := &inbound{nc: &trickle{rest: data, step: step}, max: limit, binary: true, deflate: deflate, begun: new(atomic.Int64)}
	in.control = func(op byte, p []byte) error {
		h.controls = append(h.controls, fmt.Sprint(op, string(p)))
		return nil
	}
	defer in.idle()
	for {
		op, buf, err := in.next()
		switch {
		case err == errNothingYet:
			in.wait()
			continue
		case err != nil:
			h.code, _ = closeOf(err)
			recycle(buf)
			return h
		case op == opClose:
			if h.code, err = parseClose(*buf); err != nil {
				h.code, _ = closeOf(err)
			}
			return h
		}
		h.messages = append(h.messages, fmt.Sprint(op, string(*buf)))
		recycle(buf)
	}
}

// slowReader is the reference: all bytes at hand, one frame after the other, as RFC 6455 chapter 5 tells it.
type slowReader struct {
	data    []byte
	deflate bool
	limit   int
	heard

	op      byte
	packed  bool
	message []byte // of which so much came; compressed bytes if packed
}

// frame takes one frame off and says whether there is more to read.
func (r *slowReader) frame() bool {
	end := func(code int) bool {
		r.code = code
		return false
	}
	d := r.data
	if len(d) < 2 {
		return end(closeAbnormal)
	}
	op, fin, rsv, n, at := d[0]&15, d[0] >= 128, d[0]>>4&7, uint64(d[1]&127), 2
	if rsv != 0 && (rsv != 4 || !r.deflate || op != opText && op != opBinary) ||
		op > 2 && op < 8 || op > 10 || d[1] < 128 || op >= 8 && (!fin || n > 125) {
		return end(closeProtocol)
	}
	if n >= 126 {
		at = map[uint64]int{126: 4, 127: 10}[n]
		if len(d) < at {
			return end(closeAbnormal)
		}
		n = binary.BigEndian.Uint64(append(make([]byte, 10-at, 8), d[2:at]...))
		if at == 10 && d[2] >= 128 || n < map[int]uint64{4: 126, 10: 1 << 16}[at] {
			return end(closeProtocol)
		}
	}
	if op < 8 {
		if (op == 0) == (r.op == 0) {
			return end(closeProtocol)
		}
		if op != 0 {
			r.op, r.packed, r.message = op, rsv == 4, nil
		}
		limit := r.limit
		if r.packed {
			limit = 2*limit + 1024
		}
		if n > uint64(limit-len(r.message)) {
			return end(closeTooBig)
		}
	}
	if len(d) < at+4 {
		return end(closeAbnormal)
	}
	p := slices.Clone(d[at+4 : at+4+int(min(n, uint64(len(d)-at-4)))])
	for i := range p {
		p[i] ^= d[at+i%4]
	}
	whole := uint64(len(p)) == n
	r.data = d[at+4+len(p):]
	if op >= 8 {
		return r.controlFrame(op, p, whole)
	}
	return r.dataFrame(p, fin, whole)
}

func (r *slowReader) controlFrame(op byte, p []byte, whole bool) bool {
	r.code = closeAbnormal
	if !whole {
		return false
	}
	if op != opClose {
		r.controls = append(r.controls, fmt.Sprint(op, string(p)))
		return true
	}
	var err error
	if r.code, err = parseClose(p); err != nil {
		r.code, _ = closeOf(err)
	}
	return false
}

func (r *slowReader) dataFrame(p []byte, fin, whole bool) bool {
	r.message = append(r.message, p...)
	text := r.message
	r.code = closeAbnormal
	if r.packed {
		if !fin || !whole {
			return whole
		}
		if text, r.code = slowInflate(r.message, r.limit); r.code != 0 {
			return false
		}
	}
	if r.op == opText {
		if r.code = closeBadUTF8; !startsAsText(text) || fin && whole && !utf8.Valid(text) {
			return false
		}
	}
	r.code = closeAbnormal
	if fin && whole {
		r.messages = append(r.messages, fmt.Sprint(r.op, string(text)))
		r.op = 0
	}
	return whole
}

// startsAsText says whether more bytes could make valid UTF-8 of b.
func startsAsText(b []byte) bool {
	for cut := range min(4, len(b)+1) {
		if head, tail := b[:len(b)-cut], b[len(b)-cut:]; utf8.Valid(head) && (cut == 0 || !utf8.FullRune(tail)) {
			return true
		}
	}
	return false
}

// slowInflate undoes RFC 7692 section 7.2.1 in memory.
func slowInflate(p []byte, limit int) ([]byte, int) {
	src := bytes.NewReader(append(slices.Clone(p), deflateTail...))
	var out []byte
	for finals := 0; src.Len() > len(deflateTail); finals++ {
		if finals > maxFinals {
			return nil, closeProtocol
		}
		more, err := io.ReadAll(io.LimitReader(flate.NewReaderDict(src, out[max(0, len(out)-32768):]), int64(limit+1-len(out))))
		if out = append(out, more...); len(out) > limit {
			return nil, closeTooBig
		}
		if err != nil {
			return nil, closeProtocol
		}
	}
	return out, 0
}

// FuzzInbound: whatever a client sends, in whatever pieces it arrives, what is read is what the reference reads.
func FuzzInbound(f *testing.F) {
	for _, d := range dialogues() {
		if all := strings.Join(d.send, ""); len(all) < 2000 {
			f.Add([]byte(all), false, uint16(200), uint8(3))
			f.Add([]byte(all), true, uint16(30), uint8(200))
		}
	}
	f.Add([]byte(packedFrame("hello, hello, hello")+packedFrame("")), true, uint16(19), uint8(1))
	f.Add([]byte(packedFrame(strings.Repeat("x", 5000))), true, uint16(4999), uint8(255))
	f.Add([]byte(clientFrame(finBit|rsv1|opText, "\xf3\x48\xcd\xc9\xc9\x07\x00\xf2\x00\x11\x00\x00")), true, uint16(10), uint8(9))
	f.Fuzz(func(t *testing.T, data []byte, deflate bool, limit uint16, step uint8) {
		got := hear(data, deflate, int(limit), max(1, int(step)))
		want := slowReader{data: data, deflate: deflate, limit: int(limit)}
		for want.frame() {
		}
		for _, m := range got.messages {
			if len(m) > int(limit)+1 {
				t.Fatalf("a message of %d bytes, the limit is %d", len(m)-1, limit)
			}
		}
		// Within a compressed message a fault of the data may be met before one of the framing behind it, or after.
		early := want.op != 0 && want.packed
		if !slices.Equal(got.messages, want.messages) || !early && (got.code != want.code || !slices.Equal(got.controls, want.controls)) {
			t.Fatalf("heard %+v, want %+v", got, want.heard)
		}
		if early && (got.code != want.code && !slices.Contains([]int{closeProtocol, closeBadUTF8, closeTooBig}, got.code) ||
			len(got.controls) > len(want.controls) || !slices.Equal(got.controls, want.controls[:len(got.controls)])) {
			t.Fatalf("heard %+v, want %+v or less", got, want.heard)
		}
	})
}

// plainOffer is an offer that can be met, written without quotes.
var plainOffer = regexp.MustCompile(`(?i)^[ \t]*permessage-deflate[ \t]*(;[ \t]*(server_no_context_takeover|client_no_context_takeover|` +
	`server_max_window_bits[ \t]*=[ \t]*15|client_max_window_bits([ \t]*=[ \t]*([89]|1[0-5]))?)[ \t]*)*$`)

// meets is the reference for offers without quotes.
func meets(offer string) bool {
	if !plainOffer.MatchString(offer) || strings.ContainsFunc(offer, func(r rune) bool { return r >= utf8.RuneSelf }) {
		return false
	}
	var names []string
	for _, p := range strings.Split(offer, ";")[1:] {
		name, _, _ := strings.Cut(strings.ToLower(p), "=")
		names = append(names, strings.Trim(name, " \t"))
	}
	slices.Sort(names)
	return len(slices.Compact(names)) == strings.Count(offer, ";")
}

// FuzzDeflateOffers: any header is answered by one of two answers or none; without quotes, by the first offer that a
// regular expression says can be met.
func FuzzDeflateOffers(f *testing.F) {
	f.Add("permessage-deflate; client_max_window_bits")
	f.Add("permessage-deflate; server_max_window_bits=10, permessage-deflate;server_max_window_bits = 15;\tclient_max_window_bits=9")
	f.Add(`foo; bar="permessage-deflate, \"", permessage-deflate; server_max_window_bits="1\5"`)
	f.Add("permessage-deflate; server_no_context_takeover; server_no_context_takeover,,; ,PERMESSAGE-DEFLATE")
	f.Add("permessage-deflate; server_max_window_bits; client_max_window_bits=")
	f.Add("permeſſage-deflate")
	f.Fuzz(func(t *testing.T, header string) {
		got := deflateAnswer(http.Header{"Sec-Websocket-Extensions": {header}})
		if got != "" && got != deflateYes && got != deflateYes15 {
			t.Fatalf("%q is answered by %q", header, got)
		}
		if strings.Contains(header, `"`) {
			return
		}
		want := ""
		for offer := range strings.SplitSeq(header, ",") {
			if meets(offer) {
				want = deflateYes
				if strings.Contains(strings.ToLower(offer), "server_max_window_bits") {
					want = deflateYes15
				}
				break
			}
		}
		if got != want {
			t.Fatalf("%q is answered by %q, want %q", header, got, want)
		}
	})
}

// FuzzClientMessage: any text is answered by exactly one message of json.v1, and what is refused changes nothing.
func FuzzClientMessage(f *testing.F) {
	for _, m := range []string{
		`{"type":"ping"}`, `{"type":"select_chat","payload":{"chat_id":"628@c.us"}}`, `{"type":"select_chat","chat_id":"x","payload":{"since":3}}`,
		`{"type":"select_chat","payload":{"chat_id":""}}`, `{"type":"select_chat","payload":{"chat_id":".x"}}`, `{"type":"select_chat"}`,
		`{"type":"resume","payload":{"since":18446744073709551615}}`, `{"type":"resume","payload":{"since":-1}}`, `{"type":"resume"}`,
		`{"type":"refresh_token","payload":{"token":"` + userVector + `"}}`, `{"type":"refresh_token","payload":{"token":"` + userVector2 + `"}}`, `{"type":"refresh_token","payload":null}`,
		`{"type":"nothing"}`, `{}`, `[]`, `null`, `"`, ``, `{"type":7}`, `{"type":"ping","payload":"x"}`, "{\"type\":\"ping\",\"x\":\"\xff\"}",
	} {
		f.Add([]byte(m))
	}
	old := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler))
	f.Cleanup(func() { slog.SetDefault(old) })
	cfg, m := testSettings(nil), newMetrics()
	h := newHub(cfg, m, nil, &consumer{cfg: cfg, lease: newLease(cfg, nil, m)}, newAuth(cfg, nil, m))
	h.replays.last, h.replays.asked = 41, time.Now().Add(24*time.Hour) // so that nobody asks NATS
	cl := claims{company: "acme", agent: "a-1", user: "u@x", expires: time.Now().Add(time.Hour)}
	f.Fuzz(func(t *testing.T, message []byte) {
		// Its ring was never opened, so that what is queued stays there to be looked at.
		c := h.newConn(goneConn{}, &cl, lock{release: func() {}}, "req")
		c.ring.chat = "before"
		c.message(opText, message)
		if c.closing() || c.ring.n != 1 {
			t.Fatalf("%q: closed %v, %d replies", message, c.closing(), c.ring.n)
		}
		reply := payloadOf(c.ring.at(0).f.b)
		var m struct {
			Type    string
			Payload struct {
				ChatID string `json:"chat_id"`
				Code   string
			}
		}
		if err := json.Unmarshal(reply, &m); err != nil || !utf8.Valid(reply) {
			t.Fatalf("%q is answered by %q: %v", message, reply, err)
		}
		if m.Type == "error" && m.Payload.Code == "" || !json.Valid(message) && m.Type != "error" {
			t.Fatalf("%q is answered by %q", message, reply)
		}
		chat := c.ring.selection()
		if m.Type != "chat_selected" && chat != "before" || m.Type == "chat_selected" && (chat != m.Payload.ChatID || chat != "" && checkChatID(chat) != nil) {
			t.Fatalf("%q is answered by %q and selects %q", message, reply, chat)
		}
	})
}

// FuzzSubject: what a subject is for is what its tokens say, and what can't be told again is refused; so for notes.
func FuzzSubject(f *testing.F) {
	for _, s := range []string{
		"wa.c.a.chats", "wa.c.a.contacts", "wa.c.a.agents", "wa.c.a.messages.628@c.us", "wa.c.a.messages.x..y", "wa.c.a.messages.", "wa.c.a.messages",
		"wa.c.a.chats.x", "wa.c..chats", "wa.*.a.chats", "wa", "wax.c.a.chats", "wa.c.a.messages.a:b", "wa.c.a.messages.é",
	} {
		f.Add(s)
	}
	id, chat := regexp.MustCompile(`^[A-Za-z0-9_@+=~-]{1,128}$`), regexp.MustCompile(`^[!-)+-=?-~]{1,256}$`)
	f.Fuzz(func(t *testing.T, s string) {
		ev, err := parseSubject("wa", s)
		p := strings.SplitN(s, ".", 5)
		want := kindUnknown
		if len(p) >= 4 && p[0] == "wa" && id.MatchString(p[1]) && id.MatchString(p[2]) {
			switch kinds := map[string]kind{"chats": kindChat, "contacts": kindContact, "agents": kindAgent}; {
			case len(p) == 4:
				if k, ok := kinds[p[3]]; ok {
					want = k
				}
			case p[3] == "messages" && chat.MatchString(p[4]) && !slices.Contains(strings.Split(p[4], "."), ""):
				want = kindMessage
			}
		}
		if (err == nil) != (want != kindUnknown) || err == nil && (ev.kind != want || ev.company != p[1] || ev.agent != p[2]) {
			t.Fatalf("%q is %+v, %v; want kind %s", s, ev, err, want)
		}
		if err == nil && (want == kindMessage) != (ev.chat != "") || ev.chat != "" && ev.chat != p[4] {
			t.Fatalf("%q is for chat %q", s, ev.chat)
		}
		if err != nil {
			return
		}
		if company, agent, toAdmins := parseNote(noteRoute(&ev) + "#life.1"); company != ev.company || agent != ev.agent || toAdmins != (want == kindAgent) {
			t.Fatalf("a note of %q reads as %q, %q, %v", s, company, agent, toAdmins)
		}
	})
}
