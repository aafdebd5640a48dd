package main

import (
	"bytes"
	"compress/flate"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
)

// corrupt is what a server may say of a compressed message that it cannot inflate: RFC 7692 names no code.
var corrupt = []int{1007, 1002}

// squeezed is a message in one compressed frame.
func squeezed(op byte, s string) frame {
	return frame{op: op, rsv: rsv1, payload: deflated(s, flate.DefaultCompression)}
}

// squeezedPieces is a compressed message cut into frames of n octets.
func squeezedPieces(op byte, s string, n int) []frame {
	f := pieces(op, split(deflated(s, flate.DefaultCompression), n)...)
	f[0].rsv = rsv1
	return f
}

// raw is one compressed text message of these octets.
func raw(b string) []frame { return []frame{{op: opText, rsv: rsv1, payload: b}} }

// noise compresses badly, being seeded it is the same in every run.
func noise(n int) string {
	r := rand.New(rand.NewPCG(1, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('!' + r.IntN(90))
	}
	return string(b)
}

// stored is a stored block (RFC 1951, 3.2.4).
func stored(s string, final byte) string {
	n := len(s)
	return string([]byte{final, byte(n), byte(n >> 8), ^byte(n), ^byte(n >> 8)}) + s
}

// finals is a message whose last block has BFINAL set (RFC 7692, 7.2.3.4), without what must follow.
func final(s string) string {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	w.Write([]byte(s))
	w.Close()
	return b.String()
}

// compressed are the cases of RFC 7692, 6 and 7.2.
func compressed(o *options) []kase {
	all := slices.Concat(squeezedCases(o), blocks(), squeezedFaults(), bombs(o))
	for i := range all {
		all[i].offer = "permessage-deflate; client_max_window_bits"
	}
	for i, offer := range []string{"permessage-deflate", "permessage-deflate; server_no_context_takeover",
		"permessage-deflate; server_max_window_bits=9",
		"permessage-deflate; server_max_window_bits=15", "permessage-deflate; server_no_context_takeover; server_max_window_bits=9",
		"permessage-deflate; server_no_context_takeover; server_max_window_bits=15",
		"permessage-deflate; server_no_context_takeover; server_max_window_bits=9, permessage-deflate; server_no_context_takeover, permessage-deflate"} {
		for _, n := range []int{16, 256, 1024, 8192, 32 << 10, 128 << 10} {
			all = append(all, roundTrips(o, fmt.Sprintf("deflate/offer %d, %d octets", i+1, n), offer, n, n))
			all = append(all, roundTrips(o, fmt.Sprintf("deflate/offer %d, %d octets in fragments of 256", i+1, n), offer, n, 256))
		}
	}
	return all
}

// roundTrips sends texts of n octets, compressed if the offer was met, in fragments of cut octets.
func roundTrips(o *options, name, offer string, n, cut int) kase {
	rounds := max(2, min(50, 1<<18/n))
	if o.long {
		rounds = 1000
	}
	return kase{name: name, rule: "7692 7.2: messages of any size", offer: offer, run: func(p *peer) {
		s := strings.Repeat("The quick brown fox jumps over the lazy dog. ", n/40+50) + noise(n)
		n := min(n, p.limit())
		for i := range rounds {
			m := s[i%1000:][:n]
			f := pieces(opText, split(m, cut)...)
			if p.deflate {
				f = squeezedPieces(opText, m, cut)
			}
			p.send(f...)
			p.wantText(m)
		}
		p.finish()
	}}
}

func squeezedCases(o *options) []kase {
	var all list
	rule := "7692 7.2: a compressed message is echoed, wherever it is cut"
	large := noise(1 << 17)
	for _, n := range slices.Concat(sizes, []int{32_767, 32_768, 32_769, 131_072}) {
		if o.max > 0 && n > o.max {
			continue
		}
		for kind, s := range map[string]string{"pattern": filler[:n], "noise": large[:n]} {
			for _, op := range []byte{opText, opBinary} {
				all.add(rule, fmt.Sprintf("deflate/%d octets of %s, opcode %d", n, kind, op), func(p *peer) {
					p.send(squeezed(op, s))
					p.wantMessage(op, s)
					p.send(frame{op: op, payload: s}, squeezed(op, s)) // one of them as it is
					p.wantMessage(op, s)
					p.wantMessage(op, s)
					p.finish()
				})
			}
			if n > 0 {
				size := max(1, n/50)
				all.add(rule, fmt.Sprintf("deflate/%d octets of %s in fragments of %d", n, kind, size),
					echoes(squeezedPieces(opText, s, size), s))
			}
		}
	}
	all.add("7692 7: a server that negotiates compression makes use of it", "deflate/the server compresses", func(p *peer) {
		p.send(text(filler[:50_000]))
		p.wantText(filler[:50_000])
		if p.squeezed != 1 {
			failf("50 KB of a pattern came as they are")
		}
		p.finish()
	})
	for level := flate.HuffmanOnly; level <= 9; level++ {
		s := filler[:1500] + large[:1500]
		all.add(rule, fmt.Sprintf("deflate/level %d", level), echoes(raw(deflated(s, level)), s))
	}
	const hello = "hello, hello, hello"
	all.add(rule, "deflate/a fragment per octet", echoes(squeezedPieces(opText, hello, 1), hello))
	all.add(rule, "deflate/in chops of 1", func(p *peer) {
		p.chop = 1
		echoes([]frame{squeezed(opText, hello), text("plain"), squeezed(opText, hello)}, hello, "plain", hello)(p)
	})
	f := squeezedPieces(opText, hello, 4)
	empty := frame{more: true}
	all.add(rule, "deflate/empty fragments", echoes(slices.Concat([]frame{{op: opText, rsv: rsv1, more: true}, empty,
		{more: true, payload: f[0].payload}, empty}, f[1:]), hello))
	f2 := slices.Clone(f)
	f2[len(f2)-1].more = true
	all.add(rule, "deflate/an empty fragment at the end", echoes(append(f2, frame{}), hello))
	all.add("7692 6.1, 6455 5.5: control frames stand between compressed fragments", "deflate/pings between fragments", func(p *peer) {
		for i, part := range f {
			p.send(part, ping(fmt.Sprint(i)))
			p.wantPongs(fmt.Sprint(i))
		}
		p.wantText(hello)
		p.finish()
	})
	all.add("7692 7.2.3.6: an empty message is one octet of 0", "deflate/empty",
		echoes(slices.Concat(raw("\x00"), raw("\x00"), raw(deflated("", 6))), "", "", ""))
	all.add("7692 7.2.2: no octet at all inflates to nothing, or to an error", "deflate/no octet", func(p *peer) {
		p.send(raw("")...)
		if err := p.next(); err != nil || p.code != 0 && !slices.Contains(corrupt,
			p.code) || len(p.messages) > 0 && p.messages[0].data != "" {
			failf("%v, close %d, %v", p.messages, p.code, err)
		}
	})
	all.add("7692 7.2.3.6: an empty message is one octet of 0", "deflate/empty, then not",
		echoes(append(raw("\x00"), squeezed(opText, hello), text("")), "", hello, ""))
	return all
}

// blocks are messages of several DEFLATE blocks of all kinds.
func blocks() []kase {
	var all list
	add := func(rule, name, bytes, want string) {
		all.add(rule, "deflate/"+name, echoes(append(raw(bytes), squeezed(opText, "next")), want, "next"))
	}
	fixed := "\xf2\x48\xcd\xc9\xc9\x07\x00" // RFC 7692, 7.2.3.1: Hello
	sync := "\x00\x00\xff\xff"
	rule := "7692 7.2.3: a message is any number of blocks of any kind"
	add(rule, "one fixed block", fixed, "Hello")
	add(rule, "two blocks", "\xf2\x48\x05\x00\x00\x00\xff\xff\xca\xc9\xc9\x07\x00", "Hello")
	add(rule, "stored block", "\x00\x05\x00\xfa\xffHello\x00", "Hello")
	add(rule, "stored blocks", stored("Hel", 0)+stored("", 0)+stored("lo", 0)+"\x00", "Hello")
	add(rule, "empty stored blocks", stored("", 0)+stored("", 0)+"\x00", "")
	add(rule, "stored block of 65,535", stored(filler[:65_535], 0)+"\x00", filler[:65_535])
	add(rule, "a block per octet", sync[:0]+deflated("H", 9)+sync+deflated("e", 9)+sync+deflated("y", 9), "Hey")
	add(rule, "fixed, stored, fixed", fixed+sync+stored(", ", 0)+fixed, "Hello, Hello")
	add(rule, "sync marks in a row", fixed+strings.Repeat(sync+"\x00", 50), "Hello")
	rule = "7692 7.2.3.4: a block with BFINAL may end a message, an octet of 0 behind it"
	add(rule, "BFINAL", "\xf3\x48\xcd\xc9\xc9\x07\x00\x00", "Hello")
	add(rule, "BFINAL, stored", stored("Hello", 1)+"\x00", "Hello")
	add(rule, "BFINAL, dynamic", final(filler[:3000])+"\x00", filler[:3000])
	add(rule, "BFINAL, nothing in it", "\x03\x00\x00", "")
	rule = "7692 7.2.3.4, 7.2.3.5: blocks may follow one with BFINAL"
	add(rule, "BFINAL, then a block", final("Hel")+deflated("lo", 9), "Hello")
	add(rule, "BFINAL twice", final("Hel")+final("lo")+"\x00", "Hello")
	add(rule, "BFINAL, stored, then a fixed block", stored("Hel", 1)+deflated("lo", 9), "Hello")
	add(rule, "BFINAL 200 times", strings.Repeat(final("x"), 200)+"\x00", strings.Repeat("x", 200))
	for _, n := range []int{1, 2, 3} {
		s := final(filler[:500]) + deflated(noise(500), 9)
		f := pieces(opText, split(s, len(s)/n+1)...)
		f[0].rsv = rsv1
		all.add(rule, fmt.Sprintf("deflate/BFINAL in %d fragments", n), echoes(f, filler[:500]+noise(500)))
	}
	return all
}

// squeezedFaults are compressed messages that break a rule.
func squeezedFaults() []kase {
	var all list
	add := func(rule, name string, codes []int, frames []frame, texts ...string) {
		all.add(rule, "deflate/"+name, fails(codes, frames, texts...))
	}
	rule := "7692 7.2.2: what does not inflate fails the connection"
	whole := deflated(filler[:5000]+noise(5000), 6)
	for name, b := range map[string]string{"block of type 3": "\x07\x00", "rubbish": "\xff\xff\xff\xff\xff",
		"text": "hello, this is not compressed", "stored with a wrong length": "\x00\x05\x00\x00\x00Hello\x00",
		"stored and cut": stored("Hello", 0)[:7], "cut": whole[:len(whole)/2], "cut by an octet": whole[:len(whole)-1],
		"distance before the start": "\x4b\x04\x22\x00\x00", "rubbish after BFINAL": final("Hello") + "\xff\xff\xff",
		"gzip": "\x1f\x8b\x08\x00\x00\x00\x00\x00", "zlib": "\x78\x9c\xf3\x48\xcd\xc9\xc9\x07\x00"} {
		add(rule, name, corrupt, raw(b))
		add(rule, name+", after a message", corrupt, slices.Concat([]frame{squeezed(opText, "ok")}, raw(b)), "ok")
		if len(b) > 1 {
			f := pieces(opText, split(b, 1+len(b)/2)...)
			f[0].rsv = rsv1
			add(rule, name+", in two", corrupt, f)
		}
	}
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, 9)
	w.Write([]byte(filler[:2000]))
	w.Flush()
	first := b.Len()
	w.Write([]byte(filler[:2000]))
	w.Flush()
	taken := strings.TrimSuffix(b.String()[first:], "\x00\x00\xff\xff")
	all.add("7692 7.1.1.2: a client that takes its context over, against the server's answer, is failed", "deflate/context taken over", func(p *peer) {
		p.send(raw(strings.TrimSuffix(b.String()[:first], "\x00\x00\xff\xff"))...)
		p.wantText(filler[:2000])
		p.send(raw(taken)...)
		if p.options.compression == "any" {
			return
		}
		p.wantClose(corrupt...)
	})
	rule = "7692 6.1: RSV1 stands on the first frame of a message only, else 1002"
	f := squeezedPieces(opText, "hello, hello", 3)
	for i := 1; i < len(f); i++ {
		g := slices.Clone(f)
		g[i].rsv = rsv1
		add(rule, fmt.Sprintf("RSV1 on fragment %d", i), protocolError, g)
	}
	rule = "6455 8.1, 7692 7.2.2: compressed text is UTF-8, else 1007"
	for class, list := range badText() {
		s := list[len(list)-1]
		add(rule, "text: "+class, []int{1007}, []frame{squeezed(opText, "κόσμε"+s)})
		add(rule, "text in fragments: "+class, []int{1007}, squeezedPieces(opText, filler[:100]+s, 5))
	}
	add(rule, "text that ends in a half character", []int{1007}, []frame{squeezed(opText, "\xe2\x82")})
	return all
}

// bombs inflate to more than the server takes.
func bombs(o *options) []kase {
	if o.max == 0 {
		return nil
	}
	var all list
	add := func(name string, codes []int, frames ...frame) {
		all.add("6455 7.4.1: a message that is too big once inflated fails the connection with 1009", "deflate/"+name, fails(codes, frames))
	}
	big := []int{1009}
	s := strings.Repeat("x", o.max)
	bomb := strings.Repeat(s, 20)
	add("one more than the limit", big, squeezed(opText, s+"x"))
	add("twenty times the limit", big, squeezed(opText, bomb))
	add("twenty times the limit in fragments", big, squeezedPieces(opBinary, bomb, 1000)...)
	half := squeezedPieces(opBinary, bomb, 1000)
	add("ten times the limit, the message never ends", big, half[:(len(half)+1)/2]...)
	// How much nothing a server takes is its own affair; it must not be without end.
	add("twenty times the limit that inflates to nothing", []int{1009, 1007, 1002},
		raw(strings.Repeat(stored("", 0), 4*o.max)+"\x00")...)
	all.add("7692 7.2.3.4: a message of final blocks that hold nothing is bounded", "deflate/final blocks without end", func(p *peer) {
		p.send(raw(stored(filler[:32<<10], 0) + strings.Repeat("\x03\x00", o.max-32<<10))...)
		if err := p.next(); err != nil {
			failf("%s instead of an answer", reason(err))
		}
	})
	all.add("6455 7.4.1: a message at the limit is echoed", "deflate/exactly the limit", echoes([]frame{squeezed(opText, s)}, s))
	return all
}
