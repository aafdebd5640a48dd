package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

const sampleKey = "dGhlIHNhbXBsZSBub25jZQ=="

// header is a header's lines in a request; without values the request lacks it.
type header struct {
	name   string
	values []string
}

func lines(name string, values ...string) header { return header{name, values} }

// request is the handshake's text with some headers changed or added.
func request(first string, changes ...header) string {
	headers := []header{lines("Host", "conformance.test"), lines("Upgrade", "websocket"), lines("Connection", "Upgrade"),
		lines("Sec-WebSocket-Key", sampleKey), lines("Sec-WebSocket-Version", "13")}
	for _, c := range changes {
		if i := slices.IndexFunc(headers, func(h header) bool { return h.name == c.name }); i >= 0 {
			headers[i] = c
		} else {
			headers = append(headers, c)
		}
	}
	var b strings.Builder
	b.WriteString(first + "\r\n")
	for _, h := range headers {
		for _, v := range h.values {
			fmt.Fprintf(&b, "%s: %s\r\n", h.name, v)
		}
	}
	return b.String() + "\r\n"
}

const get = "GET / HTTP/1.1"

func newPeer(nc net.Conn, o *options) *peer {
	return &peer{nc: nc, br: bufio.NewReader(nc), options: o}
}

// open101 makes the handshake and wants it to succeed.
func (p *peer) open101(offers ...string) {
	offers = slices.DeleteFunc(offers, func(s string) bool { return s == "" })
	p.write([]byte(request(get, lines("Sec-WebSocket-Extensions", offers...))))
	p.want101(sampleKey, offers...)
	if p.options.compression == "no_context_takeover" && len(offers) == 1 && offers[0] == "permessage-deflate" && !p.deflate {
		failf("permessage-deflate was declined")
	}
}

// want101 reads the server's handshake and holds it against RFC 6455, 4.2.2, and RFC 7692, 7.1.
func (p *peer) want101(key string, offers ...string) {
	res := p.response()
	if res.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(io.LimitReader(res.Body, 100))
		failf("%s instead of 101: %s", res.Status, body)
	}
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"))
	h := res.Header
	if accept := base64.StdEncoding.EncodeToString(sum[:]); !slices.Equal(h["Sec-Websocket-Accept"], []string{accept}) {
		failf("Sec-WebSocket-Accept %q instead of %q", h["Sec-Websocket-Accept"], accept)
	}
	if !strings.EqualFold(h.Get("Upgrade"), "websocket") || !strings.EqualFold(h.Get("Connection"), "upgrade") {
		failf("Upgrade %q, Connection %q", h["Upgrade"], h["Connection"])
	}
	for _, name := range []string{"Sec-Websocket-Protocol", "Content-Length", "Transfer-Encoding"} {
		if h[name] != nil {
			failf("%s: %q", name, h[name])
		}
	}
	p.wantExtension(h["Sec-Websocket-Extensions"], strings.Join(offers, ","))
}

// wantExtension accepts what a server may answer to the offers.
func (p *peer) wantExtension(answer []string, offers string) {
	if len(answer) == 0 {
		return
	}
	offers = strings.ReplaceAll(strings.ReplaceAll(offers, " ", ""), `"`, "")
	name, rest, _ := strings.Cut(strings.Join(answer, ","), ";")
	if strings.TrimSpace(name) != "permessage-deflate" || !strings.Contains(strings.ToLower(offers), "permessage-deflate") {
		failf("extension %q was not offered", answer)
	}
	p.deflate, p.takeover = true, true
	seen := map[string]bool{}
	for param := range strings.SplitSeq(rest, ";") {
		name, value, _ := strings.Cut(strings.TrimSpace(param), "=")
		bits, _ := strconv.Atoi(strings.Trim(value, `"`))
		switch {
		case seen[name]:
			failf("%q twice in %q", name, answer)
		case name == "server_no_context_takeover" && value == "":
			p.takeover = false
		case name == "client_no_context_takeover" && value == "", name == "" && rest == "":
		case name == "server_max_window_bits" && bits >= 8 && bits <= 15:
		case name == "client_max_window_bits" && bits >= 8 && bits <= 15 && strings.Contains(offers, name):
		default:
			failf("parameter %q in %q", param, answer)
		}
		seen[name] = true
	}
	if p.options.compression == "no_context_takeover" && !(seen["server_no_context_takeover"] && seen["client_no_context_takeover"]) {
		failf("%q of a server that keeps no context", answer)
	}
	if p.options.compression == "disabled" {
		failf("extension %q of a server without compression", answer)
	}
}

func (p *peer) response() *http.Response {
	res, err := http.ReadResponse(p.br, nil)
	if err != nil {
		failf("%s instead of an answer", reason(err))
	}
	return res
}

// refused wants an ordinary answer with one of the codes, and no upgrade.
func (p *peer) refused(codes ...int) *http.Response {
	res := p.response()
	if !slices.Contains(codes, res.StatusCode) {
		failf("%s instead of %v", res.Status, codes)
	}
	switch res.StatusCode {
	case http.StatusMethodNotAllowed:
		if res.Header.Get("Allow") != "GET" {
			failf("405 with Allow %q", res.Header.Get("Allow"))
		}
	case http.StatusUpgradeRequired:
		if !strings.Contains(res.Header.Get("Sec-WebSocket-Version"), "13") || !strings.EqualFold(res.Header.Get("Upgrade"), "websocket") {
			failf("426 with Sec-WebSocket-Version %q, Upgrade %q", res.Header.Get("Sec-WebSocket-Version"), res.Header.Get("Upgrade"))
		}
	}
	return res
}

// shakes collects cases that make the handshake themselves.
type shakes []kase

func (s *shakes) add(rule, name string, run func(*peer)) {
	*s = append(*s, kase{name, rule, true, "", run})
}

// good is a request that leads to a socket.
func (s *shakes) good(rule, name, first string, changes ...header) {
	s.add(rule, "handshake/"+name, func(p *peer) {
		p.write([]byte(request(first, changes...)))
		p.want101(sampleKey)
		p.send(text("hello"))
		p.wantText("hello")
		p.finish()
	})
}

// bad is one that is refused with one of the codes.
func (s *shakes) bad(rule, name, first string, codes []int, changes ...header) {
	s.add(rule, "handshake/"+name, func(p *peer) {
		p.write([]byte(request(first, changes...)))
		p.refused(codes...)
	})
}

var badRequest, needsUpgrade = []int{400}, []int{426, 400}

// handshakes are the opening handshake's cases.
func handshakes() []kase {
	var s shakes
	s.requestLines()
	s.upgradeHeaders()
	s.keysAndVersions()
	s.otherHeaders()
	s.segments()
	s.bodies()
	return s
}

func (s *shakes) requestLines() {
	for _, method := range []string{"POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "FOO", "get"} {
		s.bad("6455 4.1 2: the method is GET, else 405 (or 501)", "method "+method, method+" / HTTP/1.1", []int{405, 501},
			lines("Content-Length", "0"))
	}
	for _, proto := range []string{"HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "HTTP/1"} {
		s.bad("6455 4.1 2: at least HTTP/1.1, else an error", "version of HTTP "+proto, "GET / "+proto, []int{400, 426, 505})
	}
	for _, target := range []string{"/chat?a=b&c=d", "http://conformance.test/", "//x", "/%20%C3%A9"} {
		s.good("6455 4.2.1 1: a request URI, absolute or not", "target "+target, "GET "+target+" HTTP/1.1")
	}
	s.bad("9112 2.2: rubbish is refused", "rubbish", "\x16\x03\x01\x02\x00", badRequest)
}

func (s *shakes) upgradeHeaders() {
	for name, list := range map[string][]string{
		"Upgrade": {"WebSocket", "WEBSOCKET", "foo, websocket", "websocket, foo", ",websocket ,", " websocket\t"},
		"Connection": {"upgrade", "UPGRADE", "keep-alive, Upgrade", "keep-alive,upgrade", "Upgrade , keep-alive", ", Upgrade",
			"\tupgrade\t", "close, Upgrade"},
	} {
		rule := "6455 4.2.1 3 and 4: " + name + " holds the token, in any case, in a list or one of several lines"
		for _, v := range list {
			s.good(rule, fmt.Sprintf("%s %q", name, v), get, lines(name, v))
		}
		s.good(rule, name+" in the second line", get, lines(name, "foo", list[0]))
		s.good(rule, name+" in the first line", get, lines(name, list[0], "foo"))
	}
	for name, list := range map[string][]string{
		"Upgrade":    {"websockets", "web socket", "foo", "xwebsocket", `"websocket"`, "websocket;q=1", ""},
		"Connection": {"keep-alive", "close", "Upgrade2", "xUpgrade", "keep-alive Upgrade", `"Upgrade"`, ""},
	} {
		rule := "6455 4.2.1 3 and 4: without the token in " + name + " there is no upgrade"
		for _, v := range list {
			s.bad(rule, fmt.Sprintf("%s %q", name, v), get, needsUpgrade, lines(name, v))
		}
		s.bad(rule, "no "+name, get, needsUpgrade, lines(name))
	}
}

func (s *shakes) keysAndVersions() {
	const key, version = "Sec-WebSocket-Key", "Sec-WebSocket-Version"
	rule := "6455 4.2.1 5: one Sec-WebSocket-Key, base64 of 16 octets"
	for _, n := range []int{0, 1, 15, 17, 24, 32} {
		s.bad(rule, fmt.Sprintf("key of %d octets", n), get, badRequest, lines(key, base64.StdEncoding.EncodeToString(make([]byte, n))))
	}
	for _, v := range []string{"dGhlIHNhbXBsZSBub25jZQ", "dGhlIHNhbXBsZSBub25jZQ=", "dGhlIHNhbXBsZSBub25jZQ===", "dGhl!HNhbXBsZSBub25jZQ==",
		"------------------------", "dGhlIHNhbXBsZSBub25jZ_==", "dGhlIHNhbX BsZSBub25jZQ==", sampleKey + "," + sampleKey,
		"AAAAAAAAAAAAAAAAAAAAAAAA"} {
		s.bad(rule, fmt.Sprintf("key %q", v), get, badRequest, lines(key, v))
	}
	s.bad(rule, "no key", get, badRequest, lines(key))
	s.bad(rule, "key twice", get, badRequest, lines(key, sampleKey, sampleKey))
	s.bad(rule, "two keys", get, badRequest, lines(key, sampleKey, "AAAAAAAAAAAAAAAAAAAAAA=="))
	s.good(rule, "key with spaces around", get, lines(key, "  "+sampleKey+" \t"))

	rule = "6455 4.2.1 6 and 4.4: Sec-WebSocket-Version is 13, else 426 with the version"
	for _, v := range []string{"0", "7", "8", "12", "14", "130", "255", "13, 8", "8, 13", "013", "+13", "13.0", "thirteen", ""} {
		s.bad(rule, fmt.Sprintf("version %q", v), get, needsUpgrade, lines(version, v))
	}
	s.bad(rule, "no version", get, needsUpgrade, lines(version))
	s.bad(rule, "versions in two lines", get, needsUpgrade, lines(version, "8", "13"))
	s.bad(rule, "version twice", get, needsUpgrade, lines(version, "13", "13"))
}

func (s *shakes) otherHeaders() {
	s.bad("6455 4.2.1 2: a Host", "no host", get, badRequest, lines("Host"))
	s.bad("6455 4.2.1 2: one Host", "host twice", get, badRequest, lines("Host", "a.test", "b.test"))
	rule := "6455 4.2.2 5.5: a sub-protocol that the server does not know is not answered"
	for _, v := range []string{"chat", "chat, superchat", "x,", "a/b"} {
		s.good(rule, fmt.Sprintf("protocol %q", v), get, lines("Sec-WebSocket-Protocol", v))
	}
	s.good(rule, "protocols in two lines", get, lines("Sec-WebSocket-Protocol", "chat", "superchat"))
	s.good("6455 4.2.1: other headers are ignored", "headers of a browser", get, lines("Origin", "http://conformance.test"),
		lines("Cookie", "a=b"),
		lines("Cache-Control", "no-cache"), lines("User-Agent", "x"), lines("Accept-Encoding", "gzip"), lines("Sec-WebSocket-Accept", "x"))
	for name, change := range map[string]func(string) string{"lower": strings.ToLower, "upper": strings.ToUpper} {
		s.good("9110 5.1: names of headers in any case", "headers in "+name+" case", get, lines("Upgrade"), lines("Connection"),
			lines("Sec-WebSocket-Key"),
			lines("Sec-WebSocket-Version"), lines(change("Upgrade"), "websocket"), lines(change("Connection"), "Upgrade"),
			lines(change("Sec-WebSocket-Key"), sampleKey), lines(change("Sec-WebSocket-Version"), "13"))
	}
	s.bad("9112 5.1: no space before the colon", "space before colon", get, badRequest, lines("X-Space ", "a"))
	s.bad("9110 5.4: an endless header is refused", "header of 2 MiB", get, []int{400, 413, 431},
		lines("X-Long", strings.Repeat("x", 2<<20)))
	s.add("9112 9.3: a connection may be upgraded after a refusal", "handshake/upgrade after a refusal", func(p *peer) {
		p.write([]byte(request(get, lines("Upgrade"))))
		io.Copy(io.Discard, p.refused(needsUpgrade...).Body)
		p.write([]byte(request(get)))
		p.want101(sampleKey)
		p.finish()
	})
}

// segments are handshakes by where TCP cuts them, and what may stand behind them.
func (s *shakes) segments() {
	rule := "6455 4.1: frames may follow the handshake at once, TCP may cut anywhere"
	hello := string(text("hello").encode())
	cut := func(name, bytes string, chop, pause int) {
		s.add(rule, "handshake/"+name, func(p *peer) {
			p.chop = chop
			p.write([]byte(bytes[:pause]))
			if pause > 0 {
				time.Sleep(20 * time.Millisecond) // so that the server reads two segments
			}
			p.write([]byte(bytes[pause:]))
			p.want101(sampleKey)
			if !strings.HasSuffix(bytes, hello) {
				p.send(text("hello"))
			}
			p.wantText("hello")
			p.finish()
		})
	}
	req := request(get)
	for _, chop := range []int{1, 2, 7, 64} {
		cut(fmt.Sprintf("in chops of %d", chop), req, chop, 0)
		cut(fmt.Sprintf("and a frame in chops of %d", chop), req+hello, chop, 0)
	}
	for _, n := range []int{1, 3, 4, 5, len(req) - 2, len(req) - 1, len(req), len(req) + 1, len(req) + 2, len(req) + 4,
		len(req) + 6, len(req) + 10} {
		cut(fmt.Sprintf("and a frame, cut at %d", n), req+hello, 0, n)
	}
	for _, n := range []int{0, 1, 126, 4096, 5000, 65536} {
		s.add(rule, fmt.Sprintf("handshake/with a frame of %d octets in its segment", n), func(p *peer) {
			long := strings.Repeat("x", n)
			p.write(slices.Concat([]byte(req), text(long).encode(), ping("p").encode(), closing(1000, "").encode()))
			p.sentClose = true
			p.want101(sampleKey)
			p.wantText(long)
			p.wantPongs("p")
			p.wantClose(1000)
		})
	}
	s.add("6455 4.1: TCP ends in the handshake: the server ends too", "handshake/ended in its middle", func(p *peer) {
		p.write([]byte(req[:40]))
		p.nc.(*net.TCPConn).CloseWrite()
		if _, err := io.Copy(io.Discard, p.br); err != nil {
			failf("%s instead of the end of TCP", reason(err))
		}
	})
}

func (s *shakes) bodies() {
	for name, body := range map[string]string{"Content-Length": "hello", "Transfer-Encoding": "5\r\nhello\r\n0\r\n\r\n"} {
		value := map[string]string{"Content-Length": "5", "Transfer-Encoding": "chunked"}[name]
		s.add("9110 7.8: a body is no frame", "handshake/with a body, "+name, func(p *peer) {
			p.write([]byte(request(get, lines(name, value)) + body))
			if b, err := p.br.Peek(12); err == nil && string(b) == "HTTP/1.1 101" {
				p.want101(sampleKey)
				p.send(text("hello"))
				p.wantText("hello")
				p.finish()
				return
			}
			p.refused(400, 411, 413)
		})
	}
}
