package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// soon is how long a server may take for what it must do at once, on a busy machine.
const soon = 5 * time.Second

var (
	sizes  = []int{0, 1, 2, 124, 125, 126, 127, 128, 129, 255, 256, 1000, 4095, 4096, 4097, 65534, 65535, 65536, 65537, 100_000}
	filler = strings.Repeat("0123456789abcdef*", 1<<13)
)

// echoes sends frames and wants these texts back.
func echoes(frames []frame, texts ...string) func(*peer) {
	return func(p *peer) {
		p.send(frames...)
		for _, s := range texts {
			p.wantText(s)
		}
		p.finish()
	}
}

// fails sends frames, wants these texts and then a close with one of the codes. A ping behind must find nobody.
func fails(codes []int, frames []frame, texts ...string) func(*peer) {
	return func(p *peer) {
		p.send(append(slices.Clone(frames), ping("late"))...)
		p.within(soon)
		for _, s := range texts {
			p.wantText(s)
		}
		p.wantClose(codes...)
	}
}

var protocolError = []int{1002}

// framing are the cases of RFC 6455, chapter 5, but for close frames.
func framing() []kase {
	return slices.Concat(lengths(), controls(), reserved(), fragments(), broken())
}

func lengths() []kase {
	var all list
	for _, n := range sizes {
		for name, op := range map[string]byte{"text": opText, "binary": opBinary} {
			add := func(how string, chop int, f frame) {
				all.add("6455 5.2: a message of any length is echoed", fmt.Sprintf("framing/%s of %d%s", name, n, how), func(p *peer) {
					p.chop = chop
					p.send(f)
					p.wantMessage(op, f.payload)
					p.finish()
				})
			}
			f := frame{op: op, payload: filler[:n]}
			add("", 0, f)
			add(" with a key of 0", 0, frame{op: op, payload: filler[:n], zeroKey: true})
			if n > 0 && n < 5000 {
				add(" in chops of 1", 1, f)
			}
			add(" in chops of 997", 997, f)
		}
		if n <= 0xffff {
			var f16, f64 = frame{op: opText, payload: filler[:n], form: 16}, frame{op: opText, payload: filler[:n], form: 64}
			rule := "6455 5.2: the minimal number of bytes MUST be used for a length, else 1002"
			if n <= 125 {
				all.add(rule, fmt.Sprintf("framing/length %d in 16 bits", n), fails(protocolError, []frame{f16}))
			}
			all.add(rule, fmt.Sprintf("framing/length %d in 64 bits", n), fails(protocolError, []frame{f64}))
		}
	}
	rule := "6455 5.2: the most significant bit of a 64-bit length MUST be 0, else 1002"
	for _, n := range []uint64{1 << 63, 1<<63 | 5, 1<<64 - 1} {
		for _, op := range []byte{opText, opBinary} {
			all.add(rule, fmt.Sprintf("framing/opcode %d with length %x", op, n), fails(protocolError, []frame{{op: op, announce: n, payload: "hello"}}))
		}
	}
	rule = "6455 5.1: an unmasked frame fails the connection with 1002"
	for _, op := range []byte{opText, opBinary, opClose, opPing, opPong, opContinuation} {
		for _, s := range []string{"", "hello"} {
			f := frame{op: op, payload: s, unmasked: true}
			all.add(rule, fmt.Sprintf("framing/unmasked %x with %q", op, s), fails(protocolError, []frame{text("a"), f}, "a"))
		}
	}
	return all
}

func controls() []kase {
	var all list
	rule := "6455 5.5.3: a ping is answered by a pong with its payload, in order"
	pongs := func(chop int, payloads ...string) func(*peer) {
		return func(p *peer) {
			p.chop = chop
			var frames []frame
			for _, s := range payloads {
				frames = append(frames, ping(s))
			}
			p.send(frames...)
			p.wantPongs(payloads...)
			p.finish()
		}
	}
	for _, s := range []string{"", "a", "hello", filler[:124], filler[:125], "\x00\xff\xfe\xfd", strings.Repeat("\xfe", 125)} {
		for _, chop := range []int{0, 1, 3} {
			all.add(rule, fmt.Sprintf("control/ping of %s in chops of %d", short(s), chop), pongs(chop, s))
		}
	}
	for _, n := range []int{2, 10, 100, 1000} {
		var many []string
		for i := range n {
			many = append(many, fmt.Sprint("ping ", i))
		}
		all.add(rule, fmt.Sprintf("control/%d pings in one write", n), pongs(0, many...))
		all.add(rule, fmt.Sprintf("control/%d pings in chops of 5", n), pongs(5, many...))
	}
	rule = "6455 5.5.3: an unsolicited pong is not answered"
	for _, s := range []string{"", "unsolicited", filler[:125]} {
		all.add(rule, "control/pong of "+short(s), func(p *peer) {
			p.send(pong(s), pong(s), ping("p"), text("t"), pong(s))
			p.wantPongs("p")
			p.wantText("t")
			p.finish()
		})
	}
	rule = "6455 5.5: a control frame has at most 125 octets and is not fragmented, else 1002"
	for _, op := range []byte{opPing, opPong, opClose} {
		for _, n := range []int{126, 127, 1000, 65536} {
			all.add(rule, fmt.Sprintf("control/opcode %x of %d octets", op, n),
				fails(protocolError, []frame{{op: op, payload: "\x03\xe8" + filler[:n-2]}}))
		}
		all.add(rule, fmt.Sprintf("control/opcode %x that announces 126 octets, without them", op),
			fails(protocolError, []frame{{op: op, announce: 126}}))
		for _, n := range []int{5, 125} {
			all.add(rule, fmt.Sprintf("control/opcode %x of %d octets, length in 16 bits", op, n),
				fails(protocolError, []frame{{op: op, payload: "\x03\xe8" + filler[:n-2], form: 16}}))
			all.add(rule, fmt.Sprintf("control/opcode %x of %d octets, length in 64 bits", op, n),
				fails(protocolError, []frame{{op: op, payload: "\x03\xe8" + filler[:n-2], form: 64}}))
		}
		for _, s := range []string{"", "\x03\xe8"} {
			all.add(rule, fmt.Sprintf("control/opcode %x with %q, not final", op, s),
				fails(protocolError, []frame{{op: op, more: true, payload: s}}))
			all.add(rule, fmt.Sprintf("control/opcode %x with %q, not final, continued", op, s),
				fails(protocolError, []frame{{op: op, more: true, payload: s}, {op: opContinuation, payload: "x"}}))
			all.add(rule, fmt.Sprintf("control/opcode %x with %q, not final, inside a message", op, s),
				fails(protocolError, []frame{{op: opText, more: true, payload: "x"}, {op: op, more: true, payload: s}}))
		}
	}
	return all
}

func reserved() []kase {
	var all list
	rule := "6455 5.2: a reserved opcode fails the connection with 1002"
	for _, op := range []byte{3, 4, 5, 6, 7, 0xB, 0xC, 0xD, 0xE, 0xF} {
		for _, s := range []string{"", "hello", filler[:126]} {
			f := frame{op: op, payload: s}
			name := fmt.Sprintf("opcode %x with %d octets", op, len(s))
			all.add(rule, "reserved/"+name, fails(protocolError, []frame{f}))
			all.add(rule, "reserved/"+name+" after a message", fails(protocolError, []frame{text("a"), f}, "a"))
			all.add(rule, "reserved/"+name+" inside a message",
				fails(protocolError, []frame{{op: opText, more: true, payload: "a"}, f, {payload: "b"}}))
		}
		all.add(rule, fmt.Sprintf("reserved/opcode %x, not final", op),
			fails(protocolError, []frame{{op: op, more: true, payload: "x"}, {payload: "y"}}))
		all.add(rule, fmt.Sprintf("reserved/opcode %x, announced only", op), fails(protocolError, []frame{{op: op, announce: 100}}))
		all.add(rule, fmt.Sprintf("reserved/opcode %x in chops of 1", op), func(p *peer) {
			p.chop = 1
			fails(protocolError, []frame{text("a"), {op: op, payload: "hello"}}, "a")(p)
		})
	}
	rule = "6455 5.2, 7692 6: an RSV bit that no extension gave a meaning fails the connection with 1002"
	for rsv := byte(rsv3); rsv <= rsv1|rsv2|rsv3; rsv += rsv3 {
		for _, op := range []byte{opText, opBinary, opPing, opPong, opClose} {
			for _, s := range []string{"", "\x03\xe8"} {
				f := frame{op: op, rsv: rsv, payload: s}
				data := op == opText || op == opBinary
				run := fails(protocolError, []frame{text("a"), f}, "a")
				all.add(rule, fmt.Sprintf("reserved/RSV %03b on opcode %x with %d octets", rsv>>4, op, len(s)), func(p *peer) {
					if data && rsv == rsv1 && p.deflate {
						return // a compressed message, of which compressed() has more to say
					}
					run(p)
				})
			}
		}
		all.add(rule, fmt.Sprintf("reserved/RSV %03b on a continuation", rsv>>4),
			fails(protocolError, []frame{{op: opText, more: true, payload: "a"}, {rsv: rsv, payload: "b"}}))
		all.add(rule, fmt.Sprintf("reserved/RSV %03b on an empty continuation, more to come", rsv>>4),
			fails(protocolError, []frame{{op: opBinary, more: true, payload: "a"}, {rsv: rsv, more: true}}))
		all.add(rule, fmt.Sprintf("reserved/RSV %03b on a ping inside a message", rsv>>4),
			fails(protocolError, []frame{{op: opText, more: true, payload: "a"}, {op: opPing, rsv: rsv, payload: "b"}, {payload: "b"}}))
	}
	return all
}

// fragments are messages in pieces, as they may be.
func fragments() []kase {
	var all list
	rule := "6455 5.4: fragments are one message, however many, however empty"
	for i, parts := range [][]string{{"a", "b"}, {"", "a"}, {"a", ""}, {"", ""}, {"", "", ""}, {"", "a", ""}, {"a", "", "b"},
		{"a", "", "", "b", ""},
		split(filler[:300], 1), split(filler[:70_000], 65_535), split(filler[:70_000], 65_536), split(filler[:70_000], 1300)} {
		for _, op := range []byte{opText, opBinary} {
			for _, chop := range []int{0, 1, 1000} {
				s := strings.Join(parts, "")
				if chop == 1 && len(s) > 1000 {
					continue
				}
				all.add(rule, fmt.Sprintf("fragments/message %d of %d fragments, opcode %d, chops of %d", i, len(parts), op, chop),
					func(p *peer) {
						p.chop = chop
						p.send(pieces(op, parts...)...)
						p.wantMessage(op, s)
						p.finish()
					})
			}
		}
	}
	rule = "6455 5.4, 5.5: control frames stand between fragments, and are answered at once"
	for _, payload := range []string{"", "ping", filler[:125]} {
		for n := 2; n <= 5; n++ {
			all.add(rule, fmt.Sprintf("fragments/ping of %s between %d fragments", short(payload), n), func(p *peer) {
				parts := pieces(opText, split(filler[:n*3], 3)...)
				for _, f := range parts[:n-1] {
					p.send(f, pong(payload), ping(payload))
					p.wantPongs(payload)
				}
				p.send(parts[n-1])
				p.wantText(filler[:n*3])
				p.finish()
			})
		}
	}
	for _, chop := range []int{0, 1} {
		all.add(rule, fmt.Sprintf("fragments/pings between fragments in one write, chops of %d", chop), func(p *peer) {
			p.chop = chop
			f := pieces(opText, "a", "b", "c", "d")
			p.send(f[0], ping("1"), f[1], ping("2"), ping("3"), f[2], f[3], ping("4"), text("x"))
			p.wantPongs("1", "2", "3", "4")
			p.wantText("abcd")
			p.wantText("x")
			p.finish()
		})
	}
	all.add("6455 5.4: messages follow each other", "fragments/messages in a row", echoes(
		slices.Concat(pieces(opText, "a", "b"), pieces(opText, "c"), pieces(opText, "", "d", ""), []frame{text("")},
			pieces(opText, "e", "f")),
		"ab", "c", "d", "", "ef"))
	return all
}

// broken are fragments in orders that they may not have.
func broken() []kase {
	var all list
	lone := "6455 5.4: a continuation without a start fails the connection with 1002"
	for _, s := range []string{"", "hello"} {
		for _, more := range []bool{true, false} {
			f := frame{payload: s, more: more}
			name := fmt.Sprintf("continuation with %q, more %v, ", s, more)
			all.add(lone, "fragments/"+name+"first", fails(protocolError, []frame{f}))
			all.add(lone, "fragments/"+name+"first, then a message", fails(protocolError, []frame{f, text("b")}))
			all.add(lone, "fragments/"+name+"first, then a continuation", fails(protocolError, []frame{f, {payload: "b"}}))
			all.add(lone, "fragments/"+name+"after a message", fails(protocolError, []frame{text("a"), f}, "a"))
			all.add(lone, "fragments/"+name+"after a message of two",
				fails(protocolError, append(pieces(opText, "a", "b"), f, text("c")), "ab"))
			all.add(lone, "fragments/"+name+"after a ping", func(p *peer) {
				p.send(ping("p"), f)
				p.wantPongs("p")
				p.wantClose(1002)
			})
		}
	}
	inside := "6455 5.4: a new message inside another fails the connection with 1002"
	for _, first := range []byte{opText, opBinary} {
		for _, second := range []byte{opText, opBinary} {
			for _, s := range []string{"", "hello"} {
				for _, more := range []bool{true, false} {
					f := frame{op: second, payload: s, more: more}
					name := fmt.Sprintf("opcode %d inside %d with %q, more %v, ", second, first, s, more)
					all.add(inside, "fragments/"+name+"second", fails(protocolError, []frame{{op: first, more: true, payload: "a"}, f}))
					all.add(inside, "fragments/"+name+"third",
						fails(protocolError, []frame{{op: first, more: true, payload: "a"}, {more: true}, f, {payload: "b"}}))
					all.add(inside, "fragments/"+name+"after an empty start", fails(protocolError, []frame{{op: first, more: true}, f}))
				}
			}
		}
	}
	return all
}
