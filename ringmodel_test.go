package main

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// ringModel drives one ring through random interleavings of all that happens to it, and reads what was written as a client does: events
// up to a position that it was given are events that it has had, or has loaded.
type ringModel struct {
	t      *testing.T
	r      *ring
	p      *sendPolicy
	rnd    *rand.Rand
	l      ledger
	events []*event // what the stream holds; the sequence is the place in it, from 1 on
	unsent []uint64 // of these, what was not pushed yet
	lost   map[uint64]bool
	pushed []*delivery
	floor  uint64 // all up to it was settled, and not as failed
	out    []byte // everything written
	turn   bool   // the writer has it
	shared batch  // the shared writer's
	own    *batch // that of a goroutine of the socket's own; nil = it does not write alone
	closed bool
	packed int // frames written compressed

	since  *uint64 // the client came back with this position
	joined bool    // `ready` is queued
	step   replayStep
	next   int    // of events, for the replay
	end    uint64 // up to which its pass reads

	moment  int            // counts what was queued
	queued  map[uint64]int // when an event was queued last
	debts   []debt
	gapsOut int // gaps written
}

// replayStep is where the read loop is in a replay.
type replayStep uint8

const (
	noReplay replayStep = iota
	firstPass
	lastPass
)

// debt is a gap that is owed since that moment: it is the n-th on the wire.
type debt struct{ moment, n int }

// answer is what the model's ready, resumed, chat_selected and pong carry.
type answer struct {
	Moment   int     `json:"moment"`
	Position *uint64 `json:"position,omitempty"`
	Gap      bool    `json:"gap"`
	ChatID   string  `json:"chat_id"`
	Load     uint64  `json:"load"` // what the client loads now holds all up to here
}

func newRingModel(t *testing.T, seed uint64, block bool) *ringModel {
	m := &ringModel{t: t, rnd: rand.New(rand.NewPCG(seed, 1)), lost: map[uint64]bool{}, queued: map[uint64]int{}}
	m.p = &sendPolicy{size: 4, block: block, blockTimeout: time.Second, gaps: func(string) {}}
	m.r = &ring{policy: m.p, deflate: seed%2 == 0, positions: seed%8 != 0}
	m.p.threshold = m.rnd.IntN(120)
	for range 10 {
		m.store()
	}
	m.floor = m.rnd.Uint64N(10)
	m.unsent = m.unsent[m.floor:] // the rest was settled elsewhere
	m.p.issue(m.floor, "s")
	if m.r.positions && seed%3 == 0 {
		since := m.rnd.Uint64N(m.floor + 1)
		m.since, m.r.place, m.r.chat = &since, place{since, "s"}, "chat0"
	} else {
		m.r.goLive()
	}
	m.kick(m.r.open())
	return m
}

func (m *ringModel) kick(kick bool) {
	if kick && m.turn {
		m.t.Fatal("the turn was given twice")
	}
	m.turn = m.turn || kick
}

// store publishes an event; the pods get it some time later.
func (m *ringModel) store() {
	ev := &event{seq: uint64(len(m.events) + 1), kind: kindChat, company: "c", agent: "a", payload: fmt.Appendf(nil, `{"x":"%0*d"}`, m.rnd.IntN(40), 0)}
	if m.rnd.IntN(3) == 0 {
		ev.kind, ev.chat = kindMessage, fmt.Sprint("chat", m.rnd.IntN(2))
	}
	ev.frame = newEventFrame(ev, false, false)
	m.events, m.unsent = append(m.events, ev), append(m.unsent, ev.seq)
}

// push delivers an event, for the first time or again.
func (m *ringModel) push() {
	var seq uint64
	count := uint64(1)
	if len(m.unsent) > 0 && m.rnd.IntN(4) != 0 {
		i := m.rnd.IntN(min(3, len(m.unsent)))
		seq = m.unsent[i]
		m.unsent = slices.Delete(m.unsent, i, i+1)
	} else {
		if seq = m.rnd.Uint64N(uint64(len(m.events))) + 1; slices.Contains(m.unsent, seq) {
			return
		}
		count = 2
	}
	d := &delivery{event: m.events[seq-1], count: count, arrived: time.Now(), src: &m.l}
	d.open.Store(1)
	m.pushed = append(m.pushed, d)
	before, moment := m.r.events, m.moment
	m.moment++
	ends, kick := m.r.push(d, time.Now(), nil)
	settleAll(ends)
	m.kick(kick)
	if slices.ContainsFunc(ends, func(e settlement) bool { return e.o == dropped }) {
		m.owe(moment)
	}
	if len(m.l.of(d)) == 0 && (m.r.events > before || len(ends) > 0) {
		m.queued[seq] = m.moment
	}
}

// owe notes that one gap more is to be on the wire before all that is queued after that moment.
func (m *ringModel) owe(moment int) {
	taken := 0
	if m.r.out != nil {
		taken = len(m.r.out.items)
	}
	m.debts = append(m.debts, debt{moment, m.gapsOut + count(m.unwritten()[:taken], "gap") + 1})
}

// unwritten is what the writer has taken, and what waits behind it.
func (m *ringModel) unwritten() (all []item) {
	if m.r.out != nil {
		all = slices.Clone(m.r.out.items)
	}
	for i := range m.r.n {
		all = append(all, *m.r.at(i))
	}
	return all
}

func count(items []item, label string) (n int) {
	for _, it := range items {
		if it.f.label == label {
			n++
		}
	}
	return n
}

// issue makes the floor the pod's position, as far as all was settled up to it, the pod's notes being read.
func (m *ringModel) issue() {
	done := map[uint64]bool{}
	for _, d := range m.pushed {
		for _, o := range m.l.of(d) {
			done[d.seq] = done[d.seq] || o != failed
		}
	}
	for done[m.floor+1] || m.lost[m.floor+1] {
		m.floor++
	}
	m.p.issue(max(m.floor, m.p.latest.Load().seq), "s")
}

// lose is an event that was given up for this pod, or passed it by: its sockets are told before the next position.
func (m *ringModel) lose() {
	if len(m.unsent) == 0 {
		return
	}
	i := m.rnd.IntN(len(m.unsent))
	m.lost[m.unsent[i]] = true
	m.unsent = slices.Delete(m.unsent, i, i+1)
	m.kick(m.r.gap("expired", time.Now()))
	if !m.closed {
		m.owe(m.moment)
	}
}

// reply makes an answer that tells the moment, and how far what the client loads then goes.
func (m *ringModel) reply(typ string, a answer) *frame {
	m.moment++
	a.Moment, a.Load = m.moment, uint64(len(m.events))
	return newReply(typ, a)
}

// other does something that may happen at any time, between take and wrote too.
func (m *ringModel) other() {
	now := time.Now()
	switch m.rnd.IntN(26) {
	case 0:
		m.r.wantPosition()
		m.kick(m.r.control(opPing, []byte("p")))
	case 1:
		if m.rnd.IntN(6) == 0 {
			m.lose()
		}
	case 2:
		settleAll(m.r.expire(now, nil))
	case 3:
		time.Sleep(time.Duration(m.rnd.IntN(900)) * time.Millisecond)
	case 4:
		if n := m.r.stuckEvents(now); n > 0 && m.own == nil || m.r.overdue(now, time.Minute) {
			m.t.Fatalf("%d events are stuck with the shared writer, or overdue", n)
		}
	case 5:
		if m.rnd.IntN(40) == 0 {
			m.close()
		}
	case 6:
		m.r.trim()
	case 7, 8:
		m.issue()
	case 9:
		m.r.wantPosition()
	case 10, 11, 12, 13:
		m.readLoop(now)
	case 14, 15, 16, 17:
		m.store()
	default:
		m.push()
	}
	m.check()
}

// readLoop is the next thing that the socket's read loop does: it does one after the other.
func (m *ringModel) readLoop(now time.Time) {
	switch {
	case m.step != noReplay:
		m.replay(now)
	case !m.joined && m.since != nil:
		m.beginReplay()
	case !m.joined:
		m.joined = true
		a := answer{Position: m.newest()}
		f := m.reply("ready", a)
		m.kick(m.r.greet(f, "s", a.Position, now))
	case m.rnd.IntN(4) == 0:
		m.beginReplay()
	case m.rnd.IntN(2) == 0:
		chat := []string{"", "chat0", "chat1"}[m.rnd.IntN(3)]
		ends, kick := m.r.selected(chat, m.reply("chat_selected", answer{ChatID: chat}), now, nil)
		settleAll(ends)
		m.kick(kick)
	default:
		m.kick(m.r.reply(m.reply("pong", answer{}), now))
	}
}

func (m *ringModel) newest() *uint64 {
	if !m.r.positions {
		return nil
	}
	seq := m.p.latest.Load().seq
	return &seq
}

func (m *ringModel) beginReplay() {
	from, stream := m.r.beginReplay()
	if stream == "" { // it has no position yet
		m.goLive()
		m.answer(answer{Gap: true, Position: m.newest()})
		return
	}
	m.step, m.next, m.end = firstPass, int(from), uint64(len(m.events))
}

func (m *ringModel) goLive() {
	m.r.goLive()
	m.debts = slices.DeleteFunc(m.debts, func(d debt) bool { return d.n > m.gapsOut+count(m.unwritten(), "gap") })
}

func (m *ringModel) answer(a answer) {
	typ := "resumed"
	if !m.joined {
		m.joined, typ = true, "ready"
	}
	m.step = noReplay
	m.kick(m.r.confirm(m.reply(typ, a), "s", a.Position, time.Now()))
}

// replay is the next step of conn.replay.
func (m *ringModel) replay(now time.Time) {
	chat := m.r.selection()
	for m.next < int(m.end) && m.events[m.next].kind == kindMessage && m.events[m.next].chat != chat {
		m.next++
	}
	switch {
	case m.rnd.IntN(30) == 0: // it fails
		m.goLive()
		m.answer(answer{Gap: true, Position: m.newest()})
	case m.next < int(m.end):
		m.kick(m.r.replay(newEventFrame(m.events[m.next], true, false), now))
		m.next++
	case m.step == lastPass:
		end := m.end
		m.answer(answer{Position: &end})
	case m.rnd.IntN(2) == 0: // one more pass
		m.end = uint64(len(m.events))
	default:
		m.step = lastPass
		m.goLive()
		m.store()
		m.end = uint64(len(m.events)) // asked for after the socket is live
	}
}

func (m *ringModel) close() {
	frame := closeFrame(1001, "bye")
	if m.rnd.IntN(3) == 0 {
		frame = nil
	}
	ends, kick := m.r.close(frame, time.Now(), nil)
	settleAll(ends)
	m.kick(kick)
	m.closed = true
}

// take is the ring's, held against what the ring says of itself: a writer that is told of something to write and finds nothing would
// spin.
func (m *ringModel) take() ([]byte, *frame) {
	r := m.r
	r.mu.Lock()
	something, given, positions := r.somethingLocked(), r.given, count(m.unwritten(), "position")
	r.mu.Unlock()
	w := m.own
	if w == nil {
		w = &m.shared
	}
	raw := r.take(w, 64, time.Now())
	b := w.join(make([]byte, 0, 64))
	if something != (len(b) > 0 || raw != nil) {
		m.t.Fatalf("something to write: %v, taken: %d bytes", something, len(b))
	}
	for i, it := range w.items {
		if it.f.control() && i > 1 && i < len(w.items)-1 || len(r.ctrl) > 0 && raw == nil && !w.items[min(w.begun, 1)].f.control() {
			m.t.Fatalf("a control frame does not go first, at %d", i)
		}
	}
	if count(m.unwritten(), "position") > positions && (r.phase != live || !r.answered || r.owes || !r.positions) || r.given < given {
		m.t.Fatalf("a position was queued in phase %d, answered: %v, owes a gap: %v; %d after %d", r.phase, r.answered, r.owes, r.given, given)
	}
	return b, raw
}

// write is one turn of the writer: a write of any length, sometimes a failing one.
func (m *ringModel) write() {
	b, raw := m.take()
	for raw != nil {
		for m.rnd.IntN(2) == 0 {
			m.other()
		}
		raw.deflate()
		b, raw = m.take()
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
		ends, _ := m.r.wrote(n, time.Now(), nil, func(f *frame, _ *delivery) {
			if f.label == "gap" {
				m.gapsOut++
			}
		})
		settleAll(ends)
		if m.closed && m.rnd.IntN(20) == 0 {
			settleAll(m.r.fail(nil))
		} else if m.own == nil && n < len(b) {
			for m.rnd.IntN(2) == 0 {
				m.other()
			}
			m.own = m.r.goAlone()
			clear(m.shared.items[:cap(m.shared.items)]) // as other sockets use it
		}
		if m.own == nil && m.r.out != nil {
			m.t.Fatal("the shared writer has gone on to other sockets, and its batch is not its own")
		}
		m.check()
	}
	if m.turn = !m.r.rest(); !m.turn {
		m.own = nil
	}
}

// check holds the ring's own counts against its contents.
func (m *ringModel) check() {
	r := m.r
	r.mu.Lock()
	defer r.mu.Unlock()
	events, gap := 0, false
	for i := range r.n {
		if r.at(i).d != nil {
			events++
		}
	}
	for _, it := range m.unwritten() {
		switch it.f.label {
		case "gap":
			gap = true
		case "ready", "resumed":
			gap = false
		case "position":
			if gap {
				m.t.Fatal("a position waits behind a gap")
			}
		}
	}
	limit := m.p.size
	if m.p.block {
		limit *= 2
	}
	if events != r.events || events > limit {
		m.t.Fatalf("%d events wait, counted %d", events, r.events)
	}
	if r.out == nil {
		return
	}
	if b := r.out; len(b.items) == 0 || b.begun >= len(b.items[0].bytes()) {
		m.t.Fatalf("a writer has %d items, and has written %d bytes of the first", len(b.items), b.begun)
	}
	if r.phase >= closing && !r.out.writing && slices.ContainsFunc(r.out.items, func(it item) bool { return it.d != nil }) {
		m.t.Fatal("an event of a closed ring is not settled, and no write is under way")
	}
}

// modelMessage is what the model reads back.
type modelMessage struct {
	Type    string          `json:"type"`
	Seq     uint64          `json:"seq"`
	Replay  bool            `json:"replay"`
	Payload json.RawMessage `json:"payload"`
	answer
}

// frames parses what was written; a cut frame may stand at the end.
func (m *ringModel) frames() (all []modelMessage) {
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
			all = append(all, modelMessage{Type: "ping"})
		case opClose:
			all = append(all, modelMessage{Type: "close"})
			if len(b) > 0 {
				m.t.Fatalf("%q behind the close frame", b)
			}
		case opText:
			var msg modelMessage
			if err := json.Unmarshal(p, &msg); err != nil {
				m.t.Fatalf("frame %q: %v", p, err)
			}
			if len(msg.Payload) > 0 && msg.Type != "event" {
				if err := json.Unmarshal(msg.Payload, &msg.answer); err != nil {
					m.t.Fatalf("frame %q: %v", p, err)
				}
			}
			all = append(all, msg)
		default:
			m.t.Fatalf("opcode %x in %q", op, m.out)
		}
	}
	return all
}

// finish closes the ring, writes what is left and reads everything as the client did.
func (m *ringModel) finish() {
	m.close()
	for m.turn {
		m.write()
	}
	if m.r.phase != closed || m.r.n != 0 || m.r.out != nil {
		m.t.Fatal("not at its end")
	}
	wrote := m.readAsClient(m.frames())
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

// readAsClient checks the order of what was written and each position, and returns which live events were written.
func (m *ringModel) readAsClient(all []modelMessage) (wrote map[uint64]bool) {
	wrote, had := map[uint64]bool{}, map[uint64]bool{}
	load, chat, chatLoad := uint64(0), "", uint64(0)
	if m.since != nil {
		load, chat, chatLoad = *m.since, "chat0", *m.since
	}
	ready, gaps := false, 0
	wantAll := func(to uint64) {
		for _, ev := range m.events[:to] {
			due := ev.seq > load && (ev.kind != kindMessage || ev.chat == chat && ev.seq > chatLoad)
			if due && !had[ev.seq] {
				m.t.Fatalf("the client is told that it has had all up to %d, and has not had %d", to, ev.seq)
			}
		}
	}
	for _, msg := range all {
		moment := msg.Moment
		switch msg.Type {
		case "gap":
			gaps++
		case "event":
			ev := m.events[msg.Seq-1]
			if ev.kind == kindMessage && ev.chat != chat {
				m.t.Fatalf("a message of %s follows the selection of %q", ev.chat, chat)
			}
			had[msg.Seq] = true
			if msg.Replay {
				break
			}
			if moment = m.queued[msg.Seq]; wrote[msg.Seq] {
				m.t.Fatalf("event %d was written twice", msg.Seq)
			}
			wrote[msg.Seq] = true
		case "position":
			if !ready || !m.r.positions {
				m.t.Fatalf("a position to a client that is to have none yet (ready: %v)", ready)
			}
			wantAll(msg.Seq)
		case "chat_selected":
			chat, chatLoad = msg.ChatID, msg.Load
		case "ready", "resumed":
			ready = true
			if msg.Gap || msg.Type == "ready" && m.since == nil {
				load = msg.Load
			}
			if msg.Position != nil {
				wantAll(*msg.Position)
			}
			if msg.Type == "ready" && m.since == nil {
				moment = 0 // it stands before all
			}
		}
		if !ready && msg.Type != "ping" && msg.Type != "close" && (msg.Type != "event" && msg.Type != "gap" || m.since == nil) {
			m.t.Fatalf("%s came before ready", msg.Type)
		}
		for _, d := range m.debts {
			if d.moment < moment && gaps < d.n {
				m.t.Fatalf("%s, queued at %d, comes before the gap of %d", msg.Type, moment, d.moment)
			}
		}
	}
	return wrote
}

func TestRingModel(t *testing.T) {
	packed, seen := 0, map[string]int{}
	for _, block := range []bool{false, true} {
		for seed := range uint64(150) {
			synctest.Test(t, func(t *testing.T) {
				defer func() {
					if t.Failed() {
						t.Logf("block %v, seed %d", block, seed)
					}
				}()
				m := newRingModel(t, seed, block)
				for range 400 {
					if m.turn && m.rnd.IntN(3) == 0 {
						m.write()
					} else {
						m.other()
					}
				}
				m.finish()
				packed += m.packed
				for _, msg := range m.frames() {
					seen[msg.Type]++
				}
			})
		}
	}
	for _, typ := range []string{"event", "gap", "position", "resumed", "chat_selected", "ready"} {
		if seen[typ] < 200 {
			t.Errorf("only %d times %s: the model proves little", seen[typ], typ)
		}
	}
	if packed < 1000 {
		t.Errorf("%d frames were compressed", packed)
	}
}
