package main

import (
	"fmt"
	"strings"
	"time"
)

// limits are cases of size and speed: as many octets as the server takes, in large and in tiny pieces.
func limits(o *options) []kase {
	top, rounds := 1<<20, 100
	if o.long {
		top, rounds = 16<<20, 1000
	}
	if o.max > 0 {
		top = min(top, o.max)
	}
	block := strings.Repeat("0123456789abcdef", top/16)
	var all list
	all.large(block)
	for _, n := range []int{0, 16, 64, 256, 1024, 4096} {
		all.add("6455 5.2: many messages are echoed", fmt.Sprintf("limits/%d round trips of %d", rounds, n), func(p *peer) {
			for i := range rounds {
				op := byte(opText + i%2)
				p.send(frame{op: op, payload: block[:n]})
				p.wantMessage(op, block[:n])
			}
			p.finish()
		})
	}
	all.busy(block[:min(top, 1<<20)])
	if o.max > 0 {
		all.around(o.max)
	}
	return all
}

func (l *list) large(block string) {
	rule := "6455 5.2, 5.4: large messages are echoed"
	for n := 64 << 10; n <= len(block); n *= 4 {
		for name, op := range map[string]byte{"text": opText, "binary": opBinary} {
			l.add(rule, fmt.Sprintf("limits/%s of %d KiB", name, n>>10), func(p *peer) {
				p.send(frame{op: op, payload: block[:n]})
				p.wantMessage(op, block[:n])
				p.finish()
			})
		}
	}
	whole := block[:min(len(block), 4<<20)]
	for size := 64; size <= len(whole); size *= 4 {
		l.add(rule, fmt.Sprintf("limits/%d KiB in fragments of %d", len(whole)>>10, size), func(p *peer) {
			p.send(pieces(opBinary, split(whole, size)...)...)
			p.wantMessage(opBinary, whole)
			p.finish()
		})
	}
	whole = block[:min(len(block), 1<<20)]
	for _, chop := range []int{128, 256, 512, 1024, 2048} {
		l.add(rule, fmt.Sprintf("limits/%d KiB in chops of %d", len(whole)>>10, chop), func(p *peer) {
			p.chop = chop
			p.send(text(whole))
			p.wantText(whole)
			p.finish()
		})
	}
}

// busy are pings beside a large message, in both directions.
func (l *list) busy(whole string) {
	l.add("6455 5.5.2: pings are answered in order while a large message arrives", "limits/pings while a message arrives", func(p *peer) {
		parts := pieces(opText, split(whole, 16<<10)...)
		for i, f := range parts {
			p.send(f, ping(fmt.Sprint(i)))
		}
		for i := range parts {
			p.wantPongs(fmt.Sprint(i))
		}
		p.wantText(whole)
		p.finish()
	})
	l.add("6455 5.5.2: pings are answered in order while large messages leave", "limits/pings while messages leave", func(p *peer) {
		for i := range 3 {
			p.send(text(whole), ping(fmt.Sprint(i)))
		}
		time.Sleep(50 * time.Millisecond) // the server's send buffer is full by now
		p.wantPongs("0", "1", "2")
		for range 3 {
			p.wantText(whole)
		}
		p.finish()
	})
}

// around are messages around the server's limit.
func (l *list) around(limit int) {
	add := func(name string, run func(*peer)) {
		l.add("6455 7.4.1: a message that is too big fails the connection with 1009, one that is not is echoed", "limits/"+name, run)
	}
	full := strings.Repeat("x", limit)
	add("exactly the limit", echoes([]frame{text(full)}, full))
	add("exactly the limit, in two", echoes(pieces(opText, full[1:], "x"), full))
	add("exactly the limit, and an empty fragment", echoes(pieces(opText, full, "", ""), full))
	add("twice the limit in two messages", echoes([]frame{text(full), text(full)}, full, full))
	big := []int{1009}
	add("one more", fails(big, []frame{text(full + "x")}))
	add("one more, in two", fails(big, pieces(opText, full, "x")))
	add("one more, in two, binary", fails(big, pieces(opBinary, full[1:], "xx")))
	add("ten times the limit, after a message", fails(big, []frame{text("a"), text(strings.Repeat(full, 10))}, "a"))
	for _, n := range []uint64{uint64(limit) + 1, 1 << 31, 1 << 32, 1<<32 + 5, 1 << 62, 1<<63 - 1} {
		for _, op := range []byte{opText, opBinary} {
			add(fmt.Sprintf("opcode %d announces %d", op, n), fails(big, []frame{{op: op, announce: n}}))
			add(fmt.Sprintf("a continuation of %d announces %d", op, n),
				fails(big, []frame{{op: op, more: true, payload: "a"}, {announce: n}}))
		}
	}
}
