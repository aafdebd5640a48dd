package main

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"time"
)

// validCodes may stand in a close frame: RFC 6455, 7.4, and IANA's registry.
var validCodes = []int{1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 3001, 3999, 4000, 4001, 4402,
	4998, 4999}

// closings are the cases of RFC 6455, chapter 7.
func closings() []kase {
	var all list
	rule := "6455 5.5.1, 7.1: a close frame is answered with its code, the server ends TCP"
	answered := func(f frame, codes ...int) func(*peer) {
		return func(p *peer) {
			p.send(f)
			p.within(soon)
			p.wantClose(codes...)
		}
	}
	all.add(rule, "close/empty", answered(frame{op: opClose}, noCode, 1000))
	all.add(rule, "close/empty, in chops of 1", func(p *peer) {
		p.chop = 1
		answered(frame{op: opClose}, noCode, 1000)(p)
	})
	for _, code := range validCodes {
		for _, reason := range []string{"", "bye", filler[:121], filler[:122], filler[:123], strings.Repeat("é", 61), "κόσμε\U0001f600"} {
			all.add(rule, fmt.Sprintf("close/%d %s", code, short(reason)), answered(closing(code, reason), code))
		}
	}
	rule = "6455 7.4: a code that may not be sent fails the connection with 1002"
	for _, code := range []int{0, 1, 999, 1004, 1005, 1006, 1015, 1016, 1100, 1999, 2000, 2999, 5000, 5001, 10_000, 32_768, 65_535} {
		for _, reason := range []string{"", "bye"} {
			all.add(rule, fmt.Sprintf("close/%d %s", code, short(reason)), answered(closing(code, reason), 1002))
		}
	}
	for _, s := range []string{"\x00", "\x03", "\xff"} {
		all.add("6455 5.5.1: a body has at least the two octets of a code, else 1002", fmt.Sprintf("close/of the octet % x", s),
			answered(frame{op: opClose, payload: s}, 1002))
	}
	rule = "6455 5.5.1, 8.1: a reason that is not UTF-8 fails the connection with 1007 (or 1002)"
	for class, list := range badText() {
		for _, s := range list {
			all.add(rule, fmt.Sprintf("close/reason: %s % x", class, s), answered(closing(1000, s), 1007, 1002))
		}
	}
	for _, s := range []string{"\xc3", "\xe2\x82", "\xf0\x9f\x98", filler[:122] + "\xc3"} {
		all.add(rule, fmt.Sprintf("close/reason ends in % x", s[len(s)-1:])+short(s), answered(closing(1000, s), 1007, 1002))
	}
	all.add("6455 7.1.1: the client may end its side of TCP right behind its close frame", "close/and the end of TCP", func(p *peer) {
		p.send(text("hello"), closing(1000, ""))
		p.nc.(*net.TCPConn).CloseWrite()
		p.wantText("hello")
		p.wantClose(1000)
	})
	all = append(all, afterClose()...)
	return append(all, ends()...)
}

// afterClose are cases of what may surround a close frame.
func afterClose() []kase {
	var all list
	add := func(rule, name string, frames []frame, texts ...string) {
		for _, chop := range []int{0, 1} {
			name := fmt.Sprintf("close/%s, chops of %d", name, chop)
			all.add(rule, name, func(p *peer) {
				p.chop = chop
				p.send(frames...)
				p.within(soon)
				for _, s := range texts {
					p.wantText(s)
				}
				p.wantClose(1000)
			})
		}
	}
	bye := closing(1000, "bye")
	rule := "6455 5.5.1: what comes after a close frame is ignored"
	for name, f := range map[string]frame{"text": text("late"), "ping": ping("late"), "pong": pong("late"),
		"close": closing(1001, "again"), "empty close": {op: opClose},
		"reserved opcode": {op: 3}, "unmasked frame": {op: opText, payload: "late", unmasked: true}, "bad UTF-8": text("\xff"),
		"invalid close": closing(999, "")} {
		add(rule, name+" after close", []frame{bye, f})
	}
	add(rule, "much after close", []frame{bye, text(filler), text(filler), ping("late")})
	add("6455 5.4: a close frame may come inside a message, which is lost then", "inside a message",
		[]frame{{op: opText, more: true, payload: "a"}, bye, {payload: "b"}})
	rule = "6455 5.5.1: what came before a close frame is answered before it"
	add(rule, "after a message", []frame{text("hello"), bye}, "hello")
	add(rule, "after three messages", []frame{text("a"), text("b"), text("c"), bye}, "a", "b", "c")
	add(rule, "after a message in pieces", append(pieces(opText, "a", "b"), bye), "ab")
	all.add(rule, "close/after a message of 256 KiB", func(p *peer) {
		s := strings.Repeat("x", min(256<<10, p.limit()))
		p.send(text(s), bye)
		p.wantText(s)
		p.wantClose(1000)
	})
	all.add(rule, "close/after pings", func(p *peer) {
		p.send(ping("1"), ping("2"), text("t"), ping("3"), bye, ping("4"))
		p.wantPongs("1", "2", "3")
		p.wantText("t")
		p.wantClose(1000)
	})
	return all
}

// limit is the largest message that surely is taken.
func (p *peer) limit() int {
	if p.options.max > 0 {
		return p.options.max
	}
	return 1 << 20
}

// ends are cases of a TCP connection that ends, or does not.
func ends() []kase {
	var all list
	rule := "6455 7.1.5, 7.1.7: TCP ends without a close frame: the server ends too, and answers nothing half"
	header := string(text(filler[:200]).encode())
	for name, b := range map[string]string{"after the handshake": "", "inside a header": header[:1], "inside a length": header[:3],
		"inside a key":    header[:6],
		"behind a header": header[:8], "inside a payload": header[:100],
		"inside a message": string(frame{op: opText, more: true, payload: "a"}.encode()),
		"inside a ping":    string(ping("hello").encode()[:8]), "inside a close frame": string(closing(1000, "bye").encode()[:8])} {
		all.add(rule, "end/"+name, func(p *peer) {
			p.write([]byte(b))
			p.nc.(*net.TCPConn).CloseWrite()
			p.within(soon)
			for err := error(nil); err == nil; {
				if err = p.next(); err != nil && reason(err) != "the end of TCP" {
					failf("%s instead of the end of TCP", reason(err))
				}
			}
			if len(p.messages) > 0 || p.code != 0 && !slices.Contains([]int{1000, 1001, 1002, 1006, 1011}, p.code) {
				failf("%v, close %d", p.messages, p.code)
			}
		})
		all.add("6455 7.1.5: a whole message before the end is answered", "end/a message, then the end "+name, func(p *peer) {
			p.write(append(text("whole").encode(), b...))
			p.wantText("whole")
			p.nc.(*net.TCPConn).CloseWrite()
			p.within(soon)
			for err := error(nil); err == nil; err = p.next() {
			}
		})
	}
	rule = "6455 7.1.1: the server waits a bounded time for the client, whatever that does"
	for name, b := range map[string][]byte{"failed": text("\xff").encode(), "was asked to close": closing(1000, "").encode()} {
		all.add(rule, "end/a client that goes on after the server "+name, func(p *peer) {
			p.write(b)
			p.wantCloseFrame()
			p.wantEnd()
			for begin := time.Now(); time.Since(begin) < 8*time.Second; time.Sleep(50 * time.Millisecond) {
				if _, err := p.nc.Write(ping("still here").encode()); err != nil {
					return // the server has gone
				}
			}
			failf("the server still reads after 8 s")
		})
	}
	return all
}
