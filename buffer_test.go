package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// newTestRing is the ring of a fresh socket that was greeted.
func newTestRing(size int, block bool) (*ring, *sendPolicy) {
	p := &sendPolicy{size: size, block: block, blockTimeout: time.Second, gaps: func(string) {}}
	r := &ring{policy: p}
	r.open()
	r.goLive()
	r.greet(newReply("ready", nil), "s", nil, time.Now())
	return r, p
}

// settleAll does what the hub does.
func settleAll(ends []settlement) {
	for _, e := range ends {
		e.d.settle(e.o)
	}
}

// issue makes seq the newest position.
func (p *sendPolicy) issue(seq uint64, stream string) {
	p.latest.Store(&position{place{seq, stream}, newPosition(seq)})
}

// takeFrom is a writer's take: of the batch that is out, if there is one.
func takeFrom(r *ring, buf []byte) ([]byte, *frame) {
	r.mu.Lock()
	b := r.out
	r.mu.Unlock()
	if b == nil {
		b = new(batch)
	}
	raw := r.take(b, cap(buf), time.Now())
	return b.join(buf), raw
}

// refuse is a write of which the kernel takes nothing.
func refuse(r *ring) {
	takeFrom(r, make([]byte, 0, 10))
	r.wrote(0, time.Now(), nil, nil)
	r.goAlone()
}

// TestRingConcurrently is for the race detector: everything at once, and each delivery still ends once.
func TestRingConcurrently(t *testing.T) {
	for _, block := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r, p := newTestRing(16, block)
			r.positions = true
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
						if b, _ := takeFrom(r, buf); len(b) > 0 {
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
							settleAll(r.expire(time.Now(), nil))
						}
					}
				})
			}
			wg.Go(func() { // the read loop
				for seq := range uint64(20) {
					r.beginReplay()
					kick(r.replay(newReply("event", nil), time.Now()))
					r.goLive()
					kick(r.confirm(newReply("resumed", nil), "s", &seq, time.Now()))
					ends, k := r.selected("c", newReply("chat_selected", nil), time.Now(), nil)
					settleAll(ends)
					kick(k)
					time.Sleep(500 * time.Microsecond)
				}
			})
			wg.Go(func() { // the beat
				for seq := range uint64(20) {
					kick(r.gap("owner", time.Now()))
					p.issue(seq, "s")
					r.wantPosition()
					kick(r.control(opPing, nil))
					time.Sleep(500 * time.Microsecond)
				}
			})
			time.Sleep(7 * time.Millisecond)
			ends, k := r.close(closeFrame(1000, ""), time.Now(), nil)
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

// pushTo pushes one event and returns its delivery.
func pushTo(r *ring, l *ledger, k kind, chat string, seq, count uint64) *delivery {
	d := newDelivery(l, k, chat, seq, count, 10)
	ends, _ := r.push(d, time.Now(), nil)
	settleAll(ends)
	return d
}

// pushAll pushes seqs, count 1, and returns their deliveries.
func pushAll(r *ring, l *ledger, seqs ...uint64) []*delivery {
	var all []*delivery
	for _, seq := range seqs {
		all = append(all, pushTo(r, l, kindChat, "", seq, 1))
	}
	return all
}

// writeAll writes what waits.
func writeAll(r *ring) string { return writeBy(r, settleAll) }

func writeBy(r *ring, settle func([]settlement)) string {
	var out bytes.Buffer
	for {
		b, _ := takeFrom(r, make([]byte, 0, 1024))
		out.Write(b)
		if len(b) == 0 {
			r.rest()
			return out.String()
		}
		ends, _ := r.wrote(len(b), time.Now(), nil, func(*frame, *delivery) {})
		settle(ends)
	}
}

// wantWritten writes what waits and checks what it is: the type of each message, with the sequence of those that have one.
func wantWritten(t *testing.T, r *ring, want ...string) {
	t.Helper()
	var got []string
	for _, msg := range (&ringModel{t: t, r: r, out: []byte(writeAll(r))}).frames() {
		if msg.Seq > 0 {
			msg.Type += fmt.Sprint(" ", msg.Seq)
		}
		got = append(got, msg.Type)
	}
	if !slices.Equal(got, want) {
		t.Fatalf("wrote %q, want %q", got, want)
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
	again := pushTo(r, &l, kindChat, "", 5, 2)
	wantEnd(t, &l, again) // it joined the one that waits
	wantWritten(t, r, "ready", "event 5")
	wantEnd(t, &l, first, written)
	wantEnd(t, &l, again, written)
	wantEnd(t, &l, pushTo(r, &l, kindChat, "", 5, 3), duplicate)
	for seq := range uint64(writtenSeqs) {
		pushAll(r, &l, 100+seq)
		writeAll(r)
	}
	wantEnd(t, &l, pushTo(r, &l, kindChat, "", 5, 4)) // long forgotten: it is written again
}

// What a writer has taken is its own: nothing is dropped, unselected or taken back of it, redeliveries join it, control frames still go
// before what was not begun, and closing the ring settles it.
func TestBatch(t *testing.T) {
	now := time.Now()
	begin := func(t *testing.T, l *ledger) (r *ring, all []*delivery, out []byte) {
		r, _ = newTestRing(2, false)
		writeAll(r)
		r.chat = "a"
		all = []*delivery{pushTo(r, l, kindMessage, "a", 1, 1), pushTo(r, l, kindMessage, "a", 2, 1)}
		b, _ := takeFrom(r, make([]byte, 0, 1024))
		out = append(out, b[:9]...)
		if ends, _ := r.wrote(9, now, nil, nil); len(ends) != 0 {
			t.Fatal("a frame of nine bytes")
		}
		r.goAlone()
		return r, all, out
	}
	want := func(t *testing.T, out []byte, types ...string) {
		t.Helper()
		var got []string
		for _, msg := range (&ringModel{t: t, r: new(ring), out: out}).frames() {
			got = append(got, msg.Type)
		}
		if !slices.Equal(got, types) {
			t.Fatalf("wrote %q, want %q", got, types)
		}
	}
	t.Run("written", func(t *testing.T) {
		var l ledger
		r, all, out := begin(t, &l)
		again := pushTo(r, &l, kindMessage, "a", 2, 2)
		waits := pushAll(r, &l, 3, 4, 5)
		wantEnd(t, &l, waits[0], dropped)
		ends, _ := r.selected("", newReply("chat_selected", nil), now, nil)
		settleAll(ends)
		r.control(opPing, nil)
		if _, events := r.look(); events != 4 {
			t.Errorf("%d events are not written yet, want 4", events)
		}
		want(t, append(out, writeAll(r)...), "event", "ping", "event", "gap", "event", "event", "chat_selected")
		for _, d := range append(all, again, waits[1], waits[2]) {
			wantEnd(t, &l, d, written)
		}
	})
	t.Run("closed between two writes", func(t *testing.T) {
		var l ledger
		r, all, out := begin(t, &l)
		ends, _ := r.close(closeFrame(1000, ""), now, nil)
		settleAll(ends)
		wantEnd(t, &l, all[0], gone)
		wantEnd(t, &l, all[1], gone)
		want(t, append(out, writeAll(r)...), "event", "close")
	})
	t.Run("closed during a write", func(t *testing.T) {
		var l ledger
		r, all, out := begin(t, &l)
		b, _ := takeFrom(r, make([]byte, 0, 1024))
		ends, _ := r.close(closeFrame(1000, ""), now, nil)
		settleAll(ends)
		wantEnd(t, &l, all[0])
		out = append(out, b[:len(b)-1]...)
		ends, _ = r.wrote(len(b)-1, now, nil, func(*frame, *delivery) {})
		settleAll(ends)
		wantEnd(t, &l, all[0], written)
		wantEnd(t, &l, all[1], gone)
		want(t, append(out, writeAll(r)...), "event", "event", "close")
	})
	t.Run("lost", func(t *testing.T) {
		var l ledger
		r, all, _ := begin(t, &l)
		ends, _ := r.close(nil, now, nil)
		settleAll(append(ends, r.fail(nil)...))
		wantEnd(t, &l, all[0], gone)
		wantEnd(t, &l, all[1], gone)
		if !r.rest() || r.phase != closed {
			t.Error("not at its end")
		}
		// A shared writer's batch, and after it a socket whose only event was taken back before the writer came to it.
		var w batch
		r, _ = newTestRing(2, false)
		r.take(&w, 1024, now)
		r.wrote(1, now, nil, nil)
		r.close(nil, now, nil)
		r.fail(nil)
		r, _ = newTestRing(2, false)
		writeAll(r)
		r.take(&w, 1024, now)
		if b := w.join(make([]byte, 0, 1024)); len(b) > 0 {
			t.Errorf("%q of another socket is written", b)
		}
	})
}

// What becomes of an event, by the phase in which it comes.
func TestPhases(t *testing.T) {
	now, p := time.Now(), &sendPolicy{size: 8, gaps: func(string) {}}
	var l ledger
	r := &ring{policy: p, place: place{7, "s"}} // of a client that comes back
	r.open()
	wantEnd(t, &l, pushTo(r, &l, kindChat, "", 1, 1), replayed)
	wantEnd(t, &l, pushTo(r, &l, kindMessage, "other", 2, 1), unselected)
	if from, stream := r.beginReplay(); from != 7 || stream != "s" {
		t.Fatalf("its replay begins behind %d of %q", from, stream)
	}
	r = &ring{policy: p, chat: "mine"}
	r.open()
	r.goLive()
	waits := pushTo(r, &l, kindChat, "", 3, 1)
	wantEnd(t, &l, waits)
	seq := uint64(2)
	r.greet(newReply("ready", nil), "s", &seq, now)
	wantEnd(t, &l, pushTo(r, &l, kindChat, "", 2, 1), duplicate) // in the state that the client loads
	wantWritten(t, r, "ready", "event 3")
	wantEnd(t, &l, waits, written)
	r.beginReplay()
	wantEnd(t, &l, pushTo(r, &l, kindMessage, "mine", 4, 1), replayed)
	r.replay(newEventFrame(newDelivery(&l, kindMessage, "mine", 4, 1, 10).event, true, false), now)
	r.goLive()
	waits = pushTo(r, &l, kindMessage, "mine", 5, 1)
	seq = 5
	r.confirm(newReply("resumed", nil), "s", &seq, now)
	wantEnd(t, &l, pushTo(r, &l, kindMessage, "mine", 4, 2), duplicate)
	wantWritten(t, r, "event 4", "event 5", "resumed")
	wantEnd(t, &l, waits, written)
	waits = pushAll(r, &l, 6)[0]
	ends, _ := r.close(closeFrame(1000, ""), now, nil)
	settleAll(ends)
	wantEnd(t, &l, waits, gone)
	wantEnd(t, &l, pushAll(r, &l, 7)[0], gone)
	wantWritten(t, r, "close")
	wantEnd(t, &l, pushAll(r, &l, 8)[0], gone)
}

// TestPositions: a client that keeps positions is given the newest one behind the events of a write, once a second at most, and with
// the heartbeat if it is quiet; never while a gap is owed or a replay runs.
func TestPositions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, p := newTestRing(8, false)
		r.positions = true
		var l ledger
		resume := func(end uint64) {
			t.Helper()
			r.goLive()
			r.confirm(newReply("resumed", nil), "s", &end, time.Now())
		}
		wantPlace := func(seq uint64) {
			t.Helper()
			if from, stream := r.beginReplay(); from != seq || stream != "s" {
				t.Fatalf("a replay begins behind %d of %q, want %d", from, stream, seq)
			}
			resume(seq)
			wantWritten(t, r, "resumed")
		}
		wantWritten(t, r, "ready")
		p.issue(5, "s")
		pushAll(r, &l, 6, 7)
		wantWritten(t, r, "event 6", "event 7", "position 5")
		wantPlace(5)
		p.issue(7, "s")
		pushAll(r, &l, 8)
		wantWritten(t, r, "event 8") // within a second
		time.Sleep(positionEvery)
		r.reply(newReply("pong", nil), time.Now())
		wantWritten(t, r, "pong") // it is quiet
		r.wantPosition()
		r.control(opPing, nil)
		wantWritten(t, r, "ping", "position 7")
		r.wantPosition()
		r.control(opPing, nil)
		wantWritten(t, r, "ping", "position 7") // it has that one, but the heartbeat is to be seen
		r.control(opPing, nil)
		wantWritten(t, r, "ping")
		p.issue(8, "s")
		r.wantPosition()
		wantEnd(t, &l, pushTo(r, &l, kindChat, "", 7, 2), duplicate)

		// A gap is noted, and so the position that the heartbeat still owes is not given.
		r.gap("shed", time.Now())
		pushAll(r, &l, 9)
		wantWritten(t, r, "gap", "event 9")
		time.Sleep(positionEvery)
		p.issue(9, "s")
		pushAll(r, &l, 10)
		wantWritten(t, r, "event 10")
		if from, _ := r.beginReplay(); from != 7 {
			t.Fatalf("a replay begins behind %d, want the last position that was written", from)
		}
		r.control(opPing, nil)
		wantWritten(t, r, "ping") // no position while the replay runs
		r.goLive()
		r.control(opPing, nil)
		wantWritten(t, r, "ping") // nor before its answer
		resume(10)
		p.issue(11, "s")
		wantWritten(t, r, "resumed", "position 11")
		wantPlace(11)

		// One that waits is taken back when a gap is noted: a drop puts it where the event was.
		time.Sleep(positionEvery)
		p.issue(12, "s")
		pushAll(r, &l, 13)
		r.offerLocked(time.Now())
		pushAll(r, &l, 14, 15, 16, 17, 18, 19, 20, 21)
		wantWritten(t, r, "gap", "event 14", "event 15", "event 16", "event 17", "event 18", "event 19", "event 20", "event 21")
		if from, _ := r.beginReplay(); from != 11 {
			t.Fatalf("a replay begins behind %d, want 11: 12 was never written", from)
		}
		resume(22)
		if from, _ := r.beginReplay(); from != 22 {
			t.Fatalf("a replay begins behind %d, want 22: its answer is written before what is replayed", from)
		}
	})
}

// A client of the earlier service is given no position, whatever happens.
func TestNoPositionsUnasked(t *testing.T) {
	r, p := newTestRing(8, false)
	var l ledger
	p.issue(5, "s")
	r.wantPosition()
	pushAll(r, &l, 6)
	wantWritten(t, r, "ready", "event 6")
	if _, stream := r.beginReplay(); stream != "" {
		t.Fatal("it has one to resume from")
	}
}

// A gap that is noted before the socket is live is paid by the last pass, which reads up to an end that is asked for later; one that is
// noted from then on is not.
func TestGapDuringAReplay(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		name  string
		steps func(r *ring, gap func())
		owes  bool
		want  []string
	}{
		{"before", func(r *ring, gap func()) { gap(); r.beginReplay(); r.goLive() }, false, []string{"resumed"}},
		{"at its first pass", func(r *ring, gap func()) { r.beginReplay(); gap(); r.goLive() }, false, []string{"resumed"}},
		{"at its last pass", func(r *ring, gap func()) { r.beginReplay(); r.goLive(); gap(); r.goLive() }, true, []string{"gap", "resumed"}},
		{"two of them", func(r *ring, gap func()) { r.beginReplay(); gap(); r.goLive(); gap(); gap() }, true, []string{"gap", "resumed"}},
	} {
		r, p := newTestRing(8, false)
		noted := 0
		p.gaps = func(string) { noted++ }
		writeAll(r)
		c.steps(r, func() { r.gap("shed", now) })
		seq := uint64(9)
		r.confirm(newReply("resumed", nil), "s", &seq, now)
		if r.owes != c.owes || noted == 0 {
			t.Errorf("%s: a gap is owed: %v, want %v", c.name, r.owes, c.owes)
		}
		wantWritten(t, r, c.want...)
	}
}

// The sequences of another stream name other events.
func TestForget(t *testing.T) {
	r, p := newTestRing(8, false)
	r.positions = true
	var l ledger
	p.issue(100, "s")
	pushAll(r, &l, 101)
	wantWritten(t, r, "ready", "event 101", "position 100")
	p.latest.Store(nil)
	r.forget()
	r.gap("stream", time.Now())
	p.issue(3, "other")
	first := pushAll(r, &l, 3)[0]
	again := pushTo(r, &l, kindChat, "", 101, 2)
	r.wantPosition()
	wantWritten(t, r, "gap", "event 3", "event 101")
	wantEnd(t, &l, first, written)
	wantEnd(t, &l, again, written)
	// An answer that was under way may still have set a sequence of before. The one that tells the client to reload holds a position of
	// the new stream, or none.
	r.given = 100
	r.beginReplay()
	r.goLive()
	r.confirm(newReply("resumed", nil), "other", nil, time.Now())
	wantEnd(t, &l, pushAll(r, &l, 4)[0])
	wantWritten(t, r, "resumed", "event 4", "position 3")
}

func TestDropOldest(t *testing.T) {
	r, _ := newTestRing(2, false)
	var l ledger
	r.place = place{7, "s"}
	all := pushAll(r, &l, 11, 12)
	r.reply(newReply("pong", nil), time.Now())
	all = append(all, pushAll(r, &l, 13, 14)...)
	wantEnd(t, &l, all[0], dropped)
	wantEnd(t, &l, all[1], dropped)
	wantEnd(t, &l, all[2])
	out := writeAll(r)
	if !bytes.Contains([]byte(out), []byte(`{"since":7,"reason":"buffer"}`)) {
		t.Fatalf("wrote %q", out)
	}
	r, _ = newTestRing(2, false)
	writeAll(r)
	pushAll(r, &l, 21, 22)
	r.reply(newReply("pong", nil), time.Now())
	pushAll(r, &l, 23)
	wantWritten(t, r, "gap", "event 22", "pong", "event 23") // where the dropped one was
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
		r, _ := newTestRing(8, true)
		var l ledger
		writeAll(r)
		wantStuck := func(n int) {
			t.Helper()
			if got := r.stuckEvents(time.Now()); got != n {
				t.Fatalf("%d events are stuck, want %d", got, n)
			}
		}
		pushAll(r, &l, 1, 2)
		refuse(r)
		wantStuck(0)
		time.Sleep(slowPause)
		wantStuck(2)
		pushAll(r, &l, 3)
		wantStuck(3)
		trickle := func() {
			t.Helper()
			takeFrom(r, make([]byte, 0, 10))
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
		wantStuck(3)
		writeAll(r)
		pushAll(r, &l, 4)
		wantStuck(0)
		refuse(r)
		time.Sleep(slowPause)
		wantStuck(1)
		ends, _ := r.close(closeFrame(closeSlowClient, ""), time.Now(), nil)
		settleAll(ends)
		wantStuck(0) // there is nothing more to win by it
	})
}

// From a confirmation on, nothing of the chat before is written, what waited included.
func TestSelectionTakesOutTheChatBefore(t *testing.T) {
	r, _ := newTestRing(8, false)
	var l ledger
	push := func(chat string, seq, count uint64) *delivery { return pushTo(r, &l, kindMessage, chat, seq, count) }
	pick := func(chat string) {
		ends, _ := r.selected(chat, newReply("chat_selected", nil), time.Now(), nil)
		settleAll(ends)
	}
	pick("a")
	wantWritten(t, r, "ready", "chat_selected")
	old, again, early, other := push("a", 1, 1), push("a", 1, 2), push("b", 2, 1), pushAll(r, &l, 3)[0]
	wantEnd(t, &l, early, unselected)
	pick("b")
	late, now := push("a", 4, 1), push("b", 5, 1)
	wantEnd(t, &l, old, unselected)
	wantEnd(t, &l, again, unselected)
	wantEnd(t, &l, late, unselected)
	pick("b") // again: what waits stays
	wantWritten(t, r, "event 3", "chat_selected", "event 5", "chat_selected")
	wantEnd(t, &l, other, written)
	wantEnd(t, &l, now, written)
	pick("")
	wantEnd(t, &l, push("b", 6, 1), unselected)
	if chat, events := r.look(); chat != "" || events != 0 {
		t.Errorf("it looks like %q with %d events", chat, events)
	}
}

// A ring that is closed before its greeting writes its close frame, whatever waits: a writer that found nothing to write there would
// spin.
func TestCloseBeforeReady(t *testing.T) {
	now := time.Now()
	r := &ring{policy: &sendPolicy{size: 2, gaps: func(string) {}}}
	var l ledger
	r.open()
	r.gap("owner", now)
	r.goLive()
	all := pushAll(r, &l, 1, 2, 3)
	ends, kick := r.close(closeFrame(1013, ""), now, nil)
	settleAll(ends)
	if !kick {
		t.Fatal("nobody writes the close frame")
	}
	wantEnd(t, &l, all[2], gone)
	wantWritten(t, r, "close")
	if r.phase != closed {
		t.Fatal("not at its end")
	}
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
		takeFrom(r, make([]byte, 0, 1024))
		for seq := range uint64(5) { // each drop makes the oldest that waits younger: what the writer has still counts
			if r.overdue(time.Now(), 1300*time.Millisecond) {
				t.Fatal("overdue too early")
			}
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
	var w batch
	n := testing.AllocsPerRun(2000, func() {
		var room [4]settlement
		out, _ := r.push(d, now, room[:0])
		for _, e := range out {
			e.d.settle(e.o)
		}
		r.take(&w, cap(buf), now)
		ends, _ = r.wrote(len(w.join(buf)), now, ends[:0], sent)
		r.rest()
	})
	if n != 0 {
		t.Fatalf("%v allocations per push and pop", n)
	}
}

// newFanOut returns a function that hands one event to n sockets, up to its settlement there.
func newFanOut(n int) func() {
	h := newHub(testSettings(nil), newMetrics(), nil, nil, nil)
	d := newDelivery(nil, kindChat, "", 1, 1, 600)
	d.src = noLedger{}
	buf, ends := make([]byte, 0, scratchBytes), make([]settlement, 0, 64)
	conns := make([]*conn, n)
	for i := range conns {
		c := &conn{h: h, w: h.writers[0], claims: &claims{company: "c", agent: "a"}}
		c.ring.policy = &h.policy
		c.ring.open()
		c.ring.goLive()
		c.ring.greet(newReply("ready", nil), "s", nil, time.Now())
		conns[i] = c
	}
	now := time.Now()
	var w batch
	return func() {
		for _, c := range conns {
			d.open.Store(1)
			c.push(d)
			c.ring.take(&w, cap(buf), now)
			ends, _ = c.ring.wrote(len(w.join(buf)), now, ends[:0], h.count.sent)
			h.settle(ends)
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
	var w batch
	b.ReportAllocs()
	for b.Loop() {
		r.push(d, time.Now(), nil)
		r.take(&w, cap(buf), time.Now())
		ends, _ = r.wrote(len(w.join(buf)), time.Now(), ends[:0], sent)
		r.rest()
	}
}
