package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func newTestRing(size int, block bool) (*ring, *sendPolicy) {
	p := &sendPolicy{size: size, block: block, blockTimeout: time.Second, gaps: func(string) {}}
	r := &ring{policy: p}
	r.open(time.Now())
	r.greet(newReply("ready", nil), time.Now())
	return r, p
}

// settleAll does what the hub does.
func settleAll(ends []settlement) {
	for _, e := range ends {
		e.d.settle(e.o)
	}
}

// ringModel drives one ring through random interleavings and holds what it says against what it wrote.
type ringModel struct {
	t      *testing.T
	r      *ring
	p      *sendPolicy
	rnd    *rand.Rand
	l      ledger
	pushed []*delivery
	seq    uint64
	out    []byte // everything written
	turn   bool   // the writer has it
	closed bool
	packed int // frames written compressed

	replays  int // 0 = none runs, 1 = its passes, 2 = its last pass
	replayed map[uint64]bool
}

func (m *ringModel) kick(kick bool) {
	if kick && m.turn {
		m.t.Fatal("the turn was given twice")
	}
	m.turn = m.turn || kick
}

func (m *ringModel) push() {
	seq, count := m.seq+1, uint64(1)
	if m.seq > 0 && m.rnd.IntN(4) == 0 { // a redelivery
		seq, count = max(1, m.seq-min(m.seq-1, uint64(m.rnd.IntN(8)))), 2
	} else {
		m.seq++
	}
	k, chat := kindChat, ""
	if m.rnd.IntN(3) == 0 {
		k, chat = kindMessage, fmt.Sprint("chat", seq%2) // a redelivery is of the same kind as its event is of no matter here
	}
	d := newDelivery(&m.l, k, chat, seq, count, m.rnd.IntN(40))
	m.pushed = append(m.pushed, d)
	ends, kick := m.r.push(d, time.Now(), nil)
	settleAll(ends)
	m.kick(kick)
}

// other does something that may happen at any time, between take and wrote too.
func (m *ringModel) other() {
	now := time.Now()
	switch m.rnd.IntN(26) {
	case 0:
		m.kick(m.r.reply(newReply("pong", nil), now))
	case 1:
		m.kick(m.r.control(opPing, []byte("p"), now))
	case 2:
		settleAll(m.r.shed(nil))
	case 3:
		m.kick(m.r.gap(m.seq, "owner", now))
	case 4:
		settleAll(m.r.expire(now, nil))
	case 5:
		time.Sleep(time.Duration(m.rnd.IntN(900)) * time.Millisecond)
	case 6:
		if m.replays == 0 { // the read loop does one thing after the other
			m.r.selecting(fmt.Sprint("chat", m.rnd.IntN(2)))
		}
	case 7:
		if m.replays > 0 {
			break
		}
		var f *frame
		if m.rnd.IntN(4) != 0 {
			f = newReply("chat_selected", nil)
		}
		m.r.mu.Lock()
		chat := m.r.pending
		m.r.mu.Unlock()
		ends, _, _, kick := m.r.selected(chat, f, 0, now, nil)
		settleAll(ends)
		m.kick(kick)
	case 8:
		m.r.mu.Lock()
		if m.r.state != idle {
			m.r.state = alone
			m.r.stuckLocked(m.rnd.IntN(2) == 0)
		}
		m.r.mu.Unlock()
	case 9:
		if m.rnd.IntN(40) == 0 {
			m.close()
		}
	case 10:
		m.replay(now)
	case 11:
		m.r.trim()
	default:
		m.push()
	}
	m.check()
}

// replay is the read loop's next step of a replay of everything.
func (m *ringModel) replay(now time.Time) {
	switch {
	case m.r.pending != "": // it is selecting
	case m.replays == 0:
		m.replays = 1
		m.kick(m.r.replaying(leaveAll, 0, now))
	case m.rnd.IntN(2) == 0 && m.seq > 0:
		seq := 1 + m.rnd.Uint64N(m.seq)
		m.replayed[seq] = true
		m.kick(m.r.replay(&event{frame: newDelivery(&m.l, kindChat, "", seq, 1, 10).frame, seq: seq}, now))
	case m.replays == 1:
		m.replays = 2
		m.r.goLive()
	default:
		m.replays = 0
		ends, kick := m.r.resumed(newReply("resumed", nil), m.seq*m.rnd.Uint64N(2), now, nil)
		settleAll(ends)
		m.kick(kick)
	}
}

func (m *ringModel) close() {
	frame := closeFrame(1001, "bye")
	if m.rnd.IntN(3) == 0 {
		frame = nil
	}
	ends, _, kick := m.r.close(frame, time.Now(), nil)
	settleAll(ends)
	m.kick(kick)
	m.closed = true
}

// write is one turn of the writer: a write of any length, sometimes a failing one.
func (m *ringModel) write() {
	b, raw := m.r.take(make([]byte, 0, 64), time.Now())
	for raw != nil {
		for m.rnd.IntN(2) == 0 {
			m.other()
		}
		raw.deflate()
		b, raw = m.r.take(make([]byte, 0, 64), time.Now())
	}
	for m.rnd.IntN(2) == 0 {
		m.other()
	}
	if len(b) > 0 {
		n := len(b)
		if m.rnd.IntN(2) == 0 {
			n = m.rnd.IntN(len(b) + 1)
		}
		m.out = append(m.out, b[:n]...)
		ends, _ := m.r.wrote(n, time.Now(), nil, func(*frame, *delivery) {})
		settleAll(ends)
		if m.closed && m.rnd.IntN(20) == 0 {
			settleAll(m.r.fail(nil))
		}
	}
	m.turn = !m.r.rest()
}

// check holds the ring's own counts against its contents.
func (m *ringModel) check() {
	r := m.r
	r.mu.Lock()
	defer r.mu.Unlock()
	events := 0
	for i := range r.n {
		if r.at(i).d != nil {
			events++
		}
	}
	limit := m.p.size
	if m.p.block {
		limit *= 2
	}
	// What a partial write gave back comes on top of what came meanwhile.
	if w := r.waitingLocked(); events != r.events || w > limit+8 || len(r.held) > m.p.size {
		m.t.Fatalf("%d events, counted %d, waiting %d, held %d", events, r.events, w, len(r.held))
	}
	if want := map[bool]int{true: events}[r.stuck]; int(m.p.stuck.Load()) != want {
		m.t.Fatalf("stuck %d, want %d", m.p.stuck.Load(), want)
	}
}

// frames parses what was written; a cut frame may stand at the end.
func (m *ringModel) frames() (events []uint64, types []string) {
	for b := m.out; len(b) >= 2 && len(b) >= 2+int(b[1]); {
		n, first := int(b[1]), b[0]
		if n > 125 {
			if len(b) < 4 || len(b) < 4+int(b[2])<<8+int(b[3]) {
				break
			}
			n = int(b[2])<<8 + int(b[3])
			b = b[2:]
		}
		op, p := first&0x0F, b[2:2+n]
		b = b[2+n:]
		if first&rsv1 != 0 && m.r.deflate {
			p, _ = slowInflate(p, 1<<10)
			m.packed++
		}
		switch op {
		case opPing, opPong:
			types = append(types, "ping")
		case opClose:
			types = append(types, "close")
			if len(b) > 0 {
				m.t.Fatalf("%q behind the close frame", b)
			}
		case opText:
			var msg serverMessage
			if err := json.Unmarshal(p, &msg); err != nil {
				m.t.Fatalf("frame %q: %v", p, err)
			}
			types = append(types, msg.Type)
			if msg.Type == "event" {
				events = append(events, msg.Seq)
			}
		default:
			m.t.Fatalf("opcode %x in %q", op, m.out)
		}
	}
	return events, types
}

func (m *ringModel) finish() {
	m.close()
	for m.turn {
		m.write()
	}
	if !m.r.ended {
		m.t.Fatal("not at its end")
	}
	if n := m.p.stuck.Load(); n != 0 {
		m.t.Fatalf("stuck %d", n)
	}
	events, types := m.frames()
	if len(types) > 0 && types[0] != "ready" && types[0] != "ping" && types[0] != "close" {
		m.t.Fatalf("%s came first", types[0])
	}
	wrote := map[uint64]bool{}
	for _, seq := range events {
		if wrote[seq] && !m.replayed[seq] {
			m.t.Fatalf("event %d was written twice", seq)
		}
		wrote[seq] = true
	}
	for _, d := range m.pushed {
		ends := m.l.of(d)
		if len(ends) != 1 {
			m.t.Fatalf("delivery %d/%d settled %v", d.seq, d.count, ends)
		}
		if ends[0] == written && !wrote[d.seq] {
			m.t.Fatalf("event %d is settled as written and was not", d.seq)
		}
	}
}

func TestRingModel(t *testing.T) {
	packed := 0
	for _, block := range []bool{false, true} {
		for seed := range uint64(150) {
			synctest.Test(t, func(t *testing.T) {
				m := &ringModel{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), replayed: map[uint64]bool{}}
				m.r, m.p = newTestRing(4, block)
				m.r.deflate, m.p.threshold = seed%2 == 0, m.rnd.IntN(120)
				m.turn = true // greet kicked
				for range 300 {
					if m.turn && m.rnd.IntN(3) == 0 {
						m.write()
					} else {
						m.other()
					}
				}
				m.finish()
				packed += m.packed
			})
			if t.Failed() {
				t.Fatalf("block %v, seed %d", block, seed)
			}
		}
	}
	if packed < 1000 {
		t.Errorf("%d frames were compressed", packed)
	}
}

// The same with goroutines, for the race detector: everything at once, and each delivery still ends once.
func TestRingConcurrently(t *testing.T) {
	for _, block := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, _ := newTestRing(16, block)
			var l ledger
			kicks := make(chan struct{}, 1) // the turn; never closed
			kicks <- struct{}{}             // that of greet
			kick := func(yes bool) {
				if yes {
					kicks <- struct{}{}
				}
			}
			stop := make(chan struct{})
			var writer, wg sync.WaitGroup
			writer.Go(func() {
				buf := make([]byte, 0, 256)
				for {
					select {
					case <-kicks:
					case <-stop:
						return
					}
					for {
						if b, _ := r.take(buf, time.Now()); len(b) > 0 {
							ends, _ := r.wrote(rand.IntN(len(b)+1), time.Now(), nil, func(*frame, *delivery) {})
							settleAll(ends)
						}
						if r.rest() {
							break
						}
					}
				}
			})
			var all [4][]*delivery
			for i := range all {
				wg.Go(func() {
					for seq := range uint64(500) {
						d := newDelivery(&l, kindChat, "", seq+1, uint64(i)+1, 10)
						all[i] = append(all[i], d)
						ends, k := r.push(d, time.Now(), nil)
						settleAll(ends)
						kick(k)
						if seq%50 == 0 {
							time.Sleep(time.Millisecond)
							settleAll(r.shed(nil))
						}
					}
				})
			}
			time.Sleep(7 * time.Millisecond)
			ends, _, k := r.close(closeFrame(1000, ""), time.Now(), nil)
			settleAll(ends)
			kick(k)
			wg.Wait()
			if !r.waitDone(time.After(time.Hour)) {
				t.Fatal("not done")
			}
			close(stop)
			writer.Wait()
			for _, d := range slices.Concat(all[:]...) {
				if ends := l.of(d); len(ends) != 1 {
					t.Fatalf("settled %v", ends)
				}
			}
		})
	}
}

// pushAll pushes seqs, count 1, and returns their deliveries.
func pushAll(r *ring, l *ledger, seqs ...uint64) []*delivery {
	var all []*delivery
	for _, seq := range seqs {
		d := newDelivery(l, kindChat, "", seq, 1, 10)
		ends, _ := r.push(d, time.Now(), nil)
		settleAll(ends)
		all = append(all, d)
	}
	return all
}

// writeAll writes what waits.
func writeAll(r *ring) string {
	var out bytes.Buffer
	for {
		b, _ := r.take(make([]byte, 0, 1024), time.Now())
		out.Write(b)
		if len(b) == 0 {
			r.rest()
			return out.String()
		}
		ends, _ := r.wrote(len(b), time.Now(), nil, func(*frame, *delivery) {})
		settleAll(ends)
	}
}

func wantEnd(t *testing.T, l *ledger, d *delivery, want ...outcome) {
	t.Helper()
	if got := l.of(d); !slices.Equal(got, want) {
		t.Fatalf("delivery of %d settled %v, want %v", d.seq, got, want)
	}
}

func TestRedeliveries(t *testing.T) {
	r, _ := newTestRing(8, false)
	var l ledger
	first := pushAll(r, &l, 5)[0]
	again := newDelivery(&l, kindChat, "", 5, 2, 10)
	r.push(again, time.Now(), nil)
	wantEnd(t, &l, again) // it joined the one that waits
	if out := writeAll(r); bytes.Count([]byte(out), []byte(`"seq":5`)) != 1 {
		t.Fatalf("wrote %q", out)
	}
	wantEnd(t, &l, first, written)
	wantEnd(t, &l, again, written)
	third := newDelivery(&l, kindChat, "", 5, 3, 10)
	ends, _ := r.push(third, time.Now(), nil)
	settleAll(ends)
	wantEnd(t, &l, third, duplicate)
	for seq := range uint64(writtenSeqs) {
		pushAll(r, &l, 100+seq)
		writeAll(r)
	}
	fourth := newDelivery(&l, kindChat, "", 5, 4, 10)
	ends, _ = r.push(fourth, time.Now(), nil)
	settleAll(ends)
	wantEnd(t, &l, fourth) // long forgotten: it is written again
}

// What a whole replay covers is not written again, whenever JetStream gives it out. Of one that failed it may be.
func TestEventsOfAReplay(t *testing.T) {
	for _, whole := range []bool{true, false} {
		r, _ := newTestRing(8, false)
		var l ledger
		to := uint64(0)
		if whole {
			to = 9
		}
		push := func(k kind, chat string, seq uint64) *delivery {
			d := newDelivery(&l, k, chat, seq, 1, 10)
			ends, _ := r.push(d, time.Now(), nil)
			settleAll(ends)
			return d
		}
		r.replaying(leaveAll, 0, time.Now())
		r.replay(newDelivery(&l, kindChat, "", 7, 1, 10).event, time.Now())
		r.goLive()
		held := push(kindChat, "", 8)
		ends, _ := r.resumed(newReply("resumed", nil), to, time.Now(), nil)
		settleAll(ends)
		inside, before, behind := push(kindContact, "", 9), push(kindChat, "", 6), push(kindChat, "", 10)
		// Its messages are of a chat that is selected later.
		r.selecting("c")
		ends, _, _, _ = r.selected("c", newReply("chat_selected", nil), 0, time.Now(), nil)
		settleAll(ends)
		message := push(kindMessage, "c", 8)
		writeAll(r)
		covered := written
		if whole {
			covered = duplicate
		}
		for _, c := range []struct {
			d    *delivery
			want outcome
		}{{held, covered}, {inside, covered}, {before, written}, {behind, written}, {message, written}} {
			wantEnd(t, &l, c.d, c.want)
		}
	}
}

// TestGapDuringAReplay: what a replay of everything fetches by itself is not announced; what it may not fetch is.
func TestGapDuringAReplay(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name  string
		begin func(*ring)
		since uint64
		told  bool
	}{
		{"no replay", func(*ring) {}, 7, true},
		{"behind its start", func(r *ring) { r.replaying(leaveAll, 7, now) }, 7, false},
		{"before its start", func(r *ring) { r.replaying(leaveAll, 7, now) }, 6, true},
		{"at its last pass, whose end is known", func(r *ring) { r.replaying(leaveAll, 7, now); r.goLive() }, 7, true},
		{"of one chat", func(r *ring) { r.replaying("c", 7, now) }, 7, true},
		{"of a stream that is gone", func(r *ring) { r.replaying(leaveAll, 7, now); r.forgetWritten() }, 7, true},
	} {
		r, _ := newTestRing(8, false)
		c.begin(r)
		r.gap(c.since, "shed", now)
		if r.gapNoted != c.told {
			t.Errorf("%s: a gap since %d is announced: %t, want %t", c.name, c.since, r.gapNoted, c.told)
		}
	}
}

func TestEventsOfAChatsReplay(t *testing.T) {
	r, _ := newTestRing(8, false)
	var l ledger
	push := func(k kind, chat string, seq uint64) *delivery {
		d := newDelivery(&l, k, chat, seq, 1, 10)
		ends, _ := r.push(d, time.Now(), nil)
		settleAll(ends)
		return d
	}
	pick := func(chat string, to uint64) {
		r.selecting(chat)
		ends, _, _, _ := r.selected(chat, newReply("chat_selected", nil), to, time.Now(), nil)
		settleAll(ends)
	}
	r.replaying("c", 0, time.Now())
	r.replay(newDelivery(&l, kindMessage, "c", 7, 1, 10).event, time.Now())
	r.goLive()
	pick("c", 9)
	message, general := push(kindMessage, "c", 8), push(kindChat, "", 8)
	writeAll(r)
	wantEnd(t, &l, message, duplicate)
	wantEnd(t, &l, general, written)
	pick("d", 0)
	other := push(kindMessage, "d", 9)
	writeAll(r)
	wantEnd(t, &l, other, written)
}

func TestDropOldest(t *testing.T) {
	r, _ := newTestRing(2, false)
	var l ledger
	all := pushAll(r, &l, 1, 2, 3, 4)
	wantEnd(t, &l, all[0], dropped)
	wantEnd(t, &l, all[1], dropped)
	wantEnd(t, &l, all[2])
	out := writeAll(r)
	gap, three := bytes.Index([]byte(out), []byte(`{"since":0,"reason":"buffer"}`)), bytes.Index([]byte(out), []byte(`"seq":3`))
	if gap < 0 || three < gap {
		t.Fatalf("wrote %q", out)
	}
}

func TestBlock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRing(2, true)
		var l ledger
		all := pushAll(r, &l, 1, 2, 3)
		time.Sleep(600 * time.Millisecond)
		all = append(all, pushAll(r, &l, 4, 5)...)
		wantEnd(t, &l, all[4], failed) // behind the ring is as much room as in it
		time.Sleep(600 * time.Millisecond)
		settleAll(r.expire(time.Now(), nil))
		wantEnd(t, &l, all[2], failed) // waited for room for 1.2 s
		wantEnd(t, &l, all[3])
		wantEnd(t, &l, all[0]) // in the ring, where that time does not count
		writeAll(r)
		wantEnd(t, &l, all[0], written)
		wantEnd(t, &l, all[3], written)
		late := pushAll(r, &l, 6, 7, 8, 9)
		time.Sleep(time.Second)
		settleAll(r.expire(time.Now(), nil))
		wantEnd(t, &l, late[1])
		wantEnd(t, &l, late[2], failed)
		wantEnd(t, &l, late[3], failed)
	})
}

// A socket that writes alone is stuck when it has taken nothing for a while, or too little; not because it was refused once.
func TestStuckEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, p := newTestRing(8, true)
		var l ledger
		writeAll(r)
		wantStuck := func(n int64) {
			t.Helper()
			r.noteStuck(time.Now())
			if got := p.stuck.Load(); got != n {
				t.Fatalf("%d events are stuck, want %d", got, n)
			}
		}
		all := pushAll(r, &l, 1, 2)
		r.goAlone()
		wantStuck(0)
		time.Sleep(slowPause)
		wantStuck(2)
		pushAll(r, &l, 3)
		wantStuck(3)
		settleAll(r.shed(nil))
		wantEnd(t, &l, all[0], shed)
		wantStuck(2)
		trickle := func() {
			t.Helper()
			r.take(make([]byte, 0, 10), time.Now())
			if ends, _ := r.wrote(1, time.Now(), nil, nil); len(ends) != 0 {
				t.Fatal("a frame of one byte")
			}
		}
		trickle()
		wantStuck(0) // it takes bytes again
		for range slowAge / slowPause * 2 {
			time.Sleep(slowPause / 2)
			trickle()
		}
		wantStuck(2)
		writeAll(r)
		pushAll(r, &l, 4)
		wantStuck(0)
	})
}

// From a confirmation on, nothing of the chat before is written, what waited included.
func TestSelectionTakesOutTheChatBefore(t *testing.T) {
	r, _ := newTestRing(8, false)
	var l ledger
	push := func(chat string, seq uint64) *delivery {
		d := newDelivery(&l, kindMessage, chat, seq, 1, 10)
		ends, _ := r.push(d, time.Now(), nil)
		settleAll(ends)
		return d
	}
	pick := func(chat string) {
		ends, _, _, _ := r.selected(chat, newReply("chat_selected", nil), 0, time.Now(), nil)
		settleAll(ends)
	}
	r.selecting("a")
	pick("a")
	writeAll(r)
	old, other := push("a", 1), pushAll(r, &l, 2)[0]
	r.selecting("b")
	late, held := push("a", 3), push("b", 4)
	pick("b")
	gone := push("a", 5)
	wantEnd(t, &l, old, duplicate)
	wantEnd(t, &l, late, duplicate)
	wantEnd(t, &l, gone, duplicate)
	_, types := (&ringModel{t: t, out: []byte(writeAll(r))}).frames()
	if !slices.Equal(types, []string{"event", "chat_selected", "event"}) {
		t.Fatalf("wrote %v", types)
	}
	wantEnd(t, &l, other, written)
	wantEnd(t, &l, held, written)
}

func TestOverdue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, _ := newTestRing(2, false)
		writeAll(r)
		time.Sleep(time.Minute)
		if r.overdue(time.Now(), time.Second) {
			t.Fatal("overdue with nothing to write")
		}
		var l ledger
		pushAll(r, &l, 1)
		for seq := range uint64(5) { // each drop makes the oldest younger: no progress still counts
			time.Sleep(300 * time.Millisecond)
			pushAll(r, &l, 2+seq, 10+seq)
		}
		if !r.overdue(time.Now(), time.Second) {
			t.Fatal("not overdue")
		}
	})
}

func TestRingAllocations(t *testing.T) {
	r, _ := newTestRing(128, false)
	var l noLedger
	d := newDelivery(nil, kindChat, "", 1, 1, 10)
	d.src = l
	buf, ends := make([]byte, 0, scratchBytes), make([]settlement, 0, 64)
	sent := func(*frame, *delivery) {}
	now := time.Now()
	n := testing.AllocsPerRun(2000, func() {
		var room [4]settlement
		out, _ := r.push(d, now, room[:0])
		for _, e := range out {
			e.d.settle(e.o)
		}
		b, _ := r.take(buf, now)
		ends, _ = r.wrote(len(b), now, ends[:0], sent)
		r.rest()
	})
	if n != 0 {
		t.Fatalf("%v allocations per push and pop", n)
	}
}

// newFanOut returns a function that hands one event to n sockets, up to its settlement there.
func newFanOut(n int) func() {
	h := newHub(testSettings(nil), newMetrics(), nil, nil)
	h.confirm = func() {}
	d := newDelivery(nil, kindChat, "", 1, 1, 600)
	d.src = noLedger{}
	buf, ends := make([]byte, 0, scratchBytes), make([]settlement, 0, 64)
	conns := make([]*conn, n)
	for i := range conns {
		c := &conn{h: h, w: h.writers[0]}
		c.ring.policy = &h.policy
		c.ring.open(time.Now())
		c.ring.greet(newReply("ready", nil), time.Now())
		conns[i] = c
	}
	now := time.Now()
	return func() {
		for _, c := range conns {
			d.open.Store(1)
			c.push(d)
			b, _ := c.ring.take(buf, now)
			ends, _ = c.ring.wrote(len(b), now, ends[:0], h.count.sent)
			h.settle(ends, "")
			c.ring.rest()
		}
		h.writers[0].dirty = h.writers[0].dirty[:0]
	}
}

// Handing one event to many sockets allocates nothing per socket.
func TestFanOutAllocations(t *testing.T) {
	const sockets = 1000
	hand := newFanOut(sockets)
	for range writtenSeqs { // until the sets of written sequences are full
		hand()
	}
	if n := testing.AllocsPerRun(100, hand); n != 0 {
		t.Fatalf("%v allocations for an event to %d sockets", n, sockets)
	}
}

func BenchmarkFanOut(b *testing.B) {
	const sockets = 1000
	hand := newFanOut(sockets)
	b.ReportAllocs()
	for b.Loop() {
		hand()
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/sockets, "ns/socket")
}

// noLedger forgets.
type noLedger struct{}

func (noLedger) settled(*delivery, outcome) {}

func BenchmarkPushPop(b *testing.B) {
	r, _ := newTestRing(128, false)
	d := newDelivery(nil, kindChat, "", 1, 1, 600)
	d.src = noLedger{}
	buf, ends := make([]byte, 0, scratchBytes), make([]settlement, 0, 64)
	sent := func(*frame, *delivery) {}
	b.ReportAllocs()
	for b.Loop() {
		r.push(d, time.Now(), nil)
		w, _ := r.take(buf, time.Now())
		ends, _ = r.wrote(len(w), time.Now(), ends[:0], sent)
		r.rest()
	}
}
