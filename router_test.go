package main

import (
	"bytes"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// inbox is what another pod got; it settles nothing by itself.
type inbox struct {
	mu  sync.Mutex // guards got
	got []*delivery
}

func (b *inbox) deliver(p *peers) {
	p.deliver = func(d *delivery) {
		d.open.Store(1)
		b.mu.Lock()
		defer b.mu.Unlock()
		b.got = append(b.got, d)
	}
}

// seqs are the events that came, in order.
func (b *inbox) seqs() (all []uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.got {
		all = append(all, d.seq)
	}
	slices.Sort(all)
	return all
}

// settle ends all that came so far, and forgets it.
func (b *inbox) settle(o outcome) {
	b.mu.Lock()
	got := b.got
	b.got = nil
	b.mu.Unlock()
	for _, d := range got {
		d.settle(o)
	}
}

var (
	pod2 = member{"pod-2", "l2"}
	pod3 = member{"pod-3", "l3"}
)

// withPods adds pod-2 and pod-3, which are known then.
func (w *world) withPods() (two, three *inbox) {
	two, three = &inbox{}, &inbox{}
	w.pod(pod2, two.deliver)
	w.pod(pod3, three.deliver)
	w.renew()
	return two, three
}

// TestTwoStages: a socket of this pod has an event before Redis has said who else owns the agent; the event goes to each owner once, and
// is settled when all have, those here too.
func TestTwoStages(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, three := w.withPods()
		c := w.user("ann", "")
		w.write(c, "ready")
		w.own(ann, pod2, pod2)
		w.run()
		w.v.change(func() { w.v.delay = 100 * time.Millisecond })
		m := chatOf("ann", 7, 1)
		w.router.accept(m)
		time.Sleep(50 * time.Millisecond)
		w.write(c, "event 7")
		if got := two.seqs(); len(got) != 0 {
			t.Errorf("sent before the look-up: %v", got)
		}
		time.Sleep(100 * time.Millisecond)
		if got := two.seqs(); !slices.Equal(got, []uint64{7}) || len(three.seqs()) != 0 {
			t.Errorf("pod-2 got %v, pod-3 %v", got, three.seqs())
		}
		wantTold(t, m)
		two.settle(written)
		time.Sleep(50 * time.Millisecond)
		wantTold(t, m, "ack")

		slow := chatOf("ann", 8, 1)
		w.router.accept(slow)
		time.Sleep(150 * time.Millisecond)
		two.settle(written)
		time.Sleep(50 * time.Millisecond)
		wantTold(t, slow) // it waits in the ring here
		w.write(c, "event 8")
		wantTold(t, slow, "ack")
		w.wantLedgers(0)
	})
}

// TestOneLookUpPerBatch: events that wait together are looked up together, each route once.
func TestOneLookUpPerBatch(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.run()
		w.v.change(func() { w.v.delay = 100 * time.Millisecond })
		w.router.accept(chatOf("x", 1, 1))
		time.Sleep(50 * time.Millisecond)
		w.v.executed("")
		for seq := uint64(2); seq < 22; seq++ {
			m := chatOf([]string{"ann", "bob"}[seq%2], seq, 1)
			if seq%10 == 0 {
				m.subject = "wa.acme.ann.agents"
			}
			w.router.accept(m)
		}
		time.Sleep(200 * time.Millisecond)
		got := w.v.executed("smembers route:")
		slices.Sort(got)
		if !slices.Equal(got, []string{"smembers route:acme:ann", "smembers route:acme:bob", "smembers route:acme:x", "smembers route:admins"}) {
			t.Errorf("asked %v", got)
		}
	})
}

// wantUnanswered checks how many events wait for Redis.
func (w *world) wantUnanswered(n int) {
	w.t.Helper()
	if got := w.router.unansweredNow(); got != n || int(w.m.ownerUnanswered.with().Get()) != n {
		w.t.Errorf("%d events wait for Redis, counted %v, want %d", got, w.m.ownerUnanswered.with().Get(), n)
	}
}

// TestWithoutRedis: events go to every known pod at once, and to the sockets here; nothing is acked, NAKed, terminated or given up until
// Redis has answered, one lease after it is back. Then the owners get what they have not had, and the verdict follows.
func TestWithoutRedis(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, three := w.withPods()
		c := w.user("ann", "")
		w.write(c, "ready")
		w.own(ann, pod2)
		w.run()
		w.v.change(func() { w.v.down = true })
		served, nobodys, failing := chatOf("ann", 1, 1), chatOf("bob", 2, 5), chatOf("ann", 3, 50)
		failing.stored = failing.stored.Add(-time.Hour)
		all := []*message{served, nobodys, failing}
		start := time.Now()
		for _, m := range all {
			w.router.accept(m)
		}
		time.Sleep(50 * time.Millisecond)
		w.write(c, "event 1", "event 3")
		for _, b := range []*inbox{two, three} {
			if got := b.seqs(); !slices.Equal(got, []uint64{1, 2, 3}) {
				t.Errorf("a pod got %v after %v", got, time.Since(start))
			}
			b.settle(failed)
		}
		w.wantUnanswered(3)
		if _, err := w.lease.renew(t.Context(), nil, w.peers); err == nil {
			t.Fatal("Redis is there")
		}
		wantNothing := func() {
			t.Helper()
			for _, m := range all {
				wantTold(t, m)
			}
		}
		time.Sleep(3 * time.Second)
		wantNothing()
		w.v.change(func() { w.v.down = false })
		w.renew() // the others may not have claimed again
		time.Sleep(5 * time.Second)
		wantNothing()
		w.wantUnanswered(3)
		w.renew()
		time.Sleep(1500 * time.Millisecond)
		w.wantUnanswered(0)
		if got := two.seqs(); !slices.Equal(got, []uint64{1, 3}) || len(three.seqs()) != 0 {
			t.Errorf("pod-2, which owns ann, gets %v, pod-3 %v", got, three.seqs())
		}
		two.settle(duplicate)
		time.Sleep(50 * time.Millisecond)
		wantTold(t, served, "ack")
		wantTold(t, nobodys, "term")
		wantTold(t, failing, "ack") // it failed at pods that it was not for
		if got := two.seqs(); len(got) != 0 {
			t.Errorf("pod-2 is sent %v once more", got)
		}
		w.wantLedgers(0)
	})
}

// TestInDoubt: while the other pods may not have claimed again, no "nobody" is believed, though Redis answers.
func TestInDoubt(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, _ := w.withPods()
		w.run()
		w.v.restart()
		w.v.addPod(pod2)
		w.renew()
		time.Sleep(time.Second)
		m := chatOf("ann", 1, 5)
		w.router.accept(m)
		time.Sleep(50 * time.Millisecond)
		if got := two.seqs(); !slices.Equal(got, []uint64{1}) {
			t.Errorf("pod-2 got %v", got)
		}
		two.settle(written)
		time.Sleep(3 * time.Second)
		wantTold(t, m)
		w.own(ann, pod2)
		time.Sleep(3 * time.Second)
		two.settle(duplicate)
		time.Sleep(50 * time.Millisecond)
		wantTold(t, m, "ack")
	})
}

// TestLostPods: a Redis that has lost its data does not know the pods until they have come back to it, under other lives. Events go to
// them all the same.
func TestLostPods(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, before := &inbox{}, member{"pod-2", "before"}
		w.pod(pod2, two.deliver)
		w.v.addPod(before)
		w.renew()
		w.run()
		w.v.restart()
		w.renew()
		w.router.accept(chatOf("ann", 1, 1))
		time.Sleep(50 * time.Millisecond)
		if got := two.seqs(); !slices.Equal(got, []uint64{1}) {
			t.Errorf("pod-2 got %v", got)
		}
		two.settle(gone)
		w.wantUnanswered(1)
	})
}

// TestNewcomer: a socket that comes to this pod while events wait for Redis gets them when it has answered: one that it has not had, and
// not again what was written to it.
func TestNewcomer(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.run()
		w.v.restart()
		w.renew()
		missed, had := chatOf("ann", 1, 5), chatOf("ann", 2, 1)
		w.router.accept(missed)
		time.Sleep(50 * time.Millisecond)
		c := w.user("ann", "")
		w.router.accept(had)
		time.Sleep(50 * time.Millisecond)
		w.write(c, "ready", "event 2")
		w.wantUnanswered(2)
		time.Sleep(5 * time.Second)
		w.renew()
		time.Sleep(2 * time.Second)
		w.wantUnanswered(0)
		w.write(c, "event 1")
		wantTold(t, missed, "ack")
		wantTold(t, had, "ack")
		w.wantLedgers(0)
	})
}

// TestSlowRedis: a look-up without an answer for 250 ms sends its events on; those that come after it do not wait for that.
func TestSlowRedis(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, _ := w.withPods()
		w.run()
		w.v.change(func() { w.v.delay = 2 * time.Second })
		w.router.accept(chatOf("ann", 1, 1))
		time.Sleep(lookupTimeout - time.Millisecond)
		if got := two.seqs(); len(got) != 0 {
			t.Errorf("sent early: %v", got)
		}
		time.Sleep(10 * time.Millisecond)
		w.router.accept(chatOf("ann", 2, 1))
		time.Sleep(10 * time.Millisecond)
		if got := two.seqs(); !slices.Equal(got, []uint64{1, 2}) {
			t.Errorf("pod-2 got %v", got)
		}
		w.wantUnanswered(2)
		w.v.change(func() { w.v.delay = 10 * time.Millisecond })
		time.Sleep(2 * time.Second)
		w.wantUnanswered(0)
		w.router.accept(chatOf("ann", 3, 1))
		time.Sleep(50 * time.Millisecond)
		if got := two.seqs(); !slices.Equal(got, []uint64{1, 2}) {
			t.Errorf("with Redis there again, pod-2, which owns nothing, got %v", got)
		}
		two.settle(gone)
	})
}

// TestUnansweredGetLate: what JetStream is about to give out again is let go, with nobody told; the rest goes on waiting.
func TestUnansweredGetLate(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.run()
		w.v.change(func() { w.v.down = true })
		first, second := chatOf("ann", 1, 1), chatOf("ann", 2, 1)
		w.router.accept(first)
		time.Sleep(20 * time.Second)
		w.router.accept(second)
		time.Sleep(9 * time.Second)
		w.wantUnanswered(1)
		wantTold(t, first)
		w.wantLedgers(1)
		w.v.change(func() { w.v.down = false })
		time.Sleep(time.Second)
		w.wantUnanswered(0)
		wantTold(t, second, "nak 1s")
		wantTold(t, first)
	})
}

// TestManyUnanswered: they are looked up some hundreds at a time; what came meanwhile takes the ordinary way, and each ends once.
func TestManyUnanswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.NATSMaxAckPending = 20_000 })
		w.run()
		w.v.change(func() { w.v.down = true })
		var all []*message
		send := func(n int) {
			for range n {
				m := chatOf("ann", uint64(len(all)+1), 5)
				all = append(all, m)
				w.router.accept(m)
			}
		}
		send(5 * askAtOnce / 2)
		time.Sleep(time.Second)
		w.v.change(func() { w.v.down, w.v.delay = false, 20*time.Millisecond })
		for range 100 {
			send(10)
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(time.Second)
		w.wantUnanswered(0)
		for _, m := range all {
			wantTold(t, m, "term")
		}
		w.wantLedgers(0)
	})
}

// TestDrainWithoutRedis: what Redis has not answered is left to JetStream, and keeps nobody from ending.
func TestDrainWithoutRedis(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		stop := w.run()
		w.v.change(func() { w.v.down = true })
		m := chatOf("ann", 1, 1)
		w.router.accept(m)
		time.Sleep(time.Second)
		start := time.Now()
		stop()
		if took := time.Since(start); took > time.Second {
			t.Errorf("it took %v to end", took)
		}
		wantTold(t, m)
		w.wantLedgers(1)
	})
}

// TestAnsweredWhileDraining: what Redis answers for when the router has routed its last batch is settled, or given back for the other pods
// to look up.
func TestAnsweredWhileDraining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.NATSMaxAckPending = 20_000 })
		w.run()
		w.v.change(func() { w.v.down = true })
		var all []*message
		for seq := range uint64(3 * askAtOnce / 2) {
			m := chatOf("ann", seq+1, 1)
			m.subject = "wa.acme.ann.agents" // nobody's: acked at once
			all = append(all, m)
			w.router.accept(m)
		}
		time.Sleep(time.Second)
		w.router.stop()
		<-w.router.ended
		w.v.change(func() { w.v.down = false })
		if err := w.router.settleAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		count := map[string]int{}
		for _, m := range all {
			count[strings.Join(m.told, " and ")]++
		}
		if count["ack"] < askAtOnce || count["ack"]+count["nak 1s"] != len(all) {
			t.Errorf("JetStream was told %v", count)
		}
		w.wantLedgers(0)
	})
}

// TestFromPeer: what a peer sent goes to the sockets here, each of which looks whether it has had it, and to nobody else.
func TestFromPeer(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		two, _ := w.withPods()
		w.own(ann, pod2)
		w.run()
		chat, other := w.user("ann", "c1"), w.user("ann", "")
		w.write(chat, "ready")
		w.write(other, "ready")
		var l ledger
		send := func(k kind, chatID string, seq uint64) *delivery {
			d := newDelivery(&l, k, chatID, seq, 1, 10)
			d.company, d.agent = "acme", "ann"
			d.open.Store(0)
			w.router.fromPeer(d)
			return d
		}
		d := send(kindMessage, "c1", 7)
		w.write(other)
		w.write(chat, "event 7")
		wantEnd(t, &l, d, written)
		wantEnd(t, &l, send(kindMessage, "c2", 8), unselected)
		again := send(kindMessage, "c1", 7) // JetStream's first delivery, held up on its way
		wantEnd(t, &l, again, duplicate)
		d = send(kindAgent, "", 9)
		wantEnd(t, &l, d, gone) // there is no admin
		time.Sleep(time.Second)
		if got := two.seqs(); len(got) != 0 || len(w.v.executed("smembers route:")) != 0 {
			t.Errorf("forwarded: %v", got)
		}
	})
}

// TestAgentsToUsers: with the setting for older clients an agents event has two routes, and goes to no pod or socket twice.
func TestAgentsToUsers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.EventsAgentsToUsers = true })
		two, three := w.withPods()
		w.own(ann, pod2, pod3)
		w.own(admins, pod2)
		user, all, other := w.user("ann", ""), w.admin("acme", "*"), w.admin("other", "*")
		for _, c := range []*conn{user, all, other} {
			w.write(c, "ready")
		}
		w.run()
		m := chatOf("ann", 7, 1)
		m.subject = "wa.acme.ann.agents"
		w.router.accept(m)
		time.Sleep(100 * time.Millisecond)
		w.write(user, "event 7")
		w.write(all, "event 7")
		w.write(other)
		for _, b := range []*inbox{two, three} {
			if got := b.seqs(); !slices.Equal(got, []uint64{7}) {
				t.Errorf("a pod got %v", got)
			}
			b.settle(written)
		}
		time.Sleep(100 * time.Millisecond)
		wantTold(t, m, "ack")
	})
}

// TestMalformed: what no redelivery would mend is terminated, without a look-up; the log has one line a second of it.
func TestMalformed(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		var logged bytes.Buffer
		old := slog.Default()
		slog.SetDefault(slog.New(slog.NewTextHandler(&logged, nil)))
		defer slog.SetDefault(old)
		w.run()
		w.v.executed("")
		for i, m := range []*message{
			{subject: "wa.acme.ann", data: "{}"}, {subject: "wa.acme.ann.presence", data: "{}"}, {subject: "wa.a c.ann.chats", data: "{}"},
			{subject: "wa.acme.ann.messages.x..y", data: "{}"}, {subject: "wa.acme.ann.chats", data: "[]"}, {subject: "wa.acme.ann.chats", data: "{\"a\":\"\xff\"}"},
			{subject: "wa.acme.ann.chats", data: ""},
		} {
			m.seq = uint64(i + 1)
			w.router.accept(m)
			time.Sleep(10 * time.Millisecond)
			wantTold(t, m, "term")
		}
		if n := strings.Count(logged.String(), "malformed event terminated"); n != 1 || len(w.v.executed("smembers")) != 0 {
			t.Errorf("%d lines in the log, want 1", n)
		}
		if n := w.m.eventsTotal.with("unknown", "malformed").Get(); n != 7 {
			t.Errorf("%d counted", n)
		}
		w.wantLedgers(0)
	})
}

// TestShareIsFull: accept waits, and the most stuck socket makes room; one that reads is left alone, and so is any while events wait for
// Redis, which is to blame for that.
func TestShareIsFull(t *testing.T) {
	for _, away := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.NATSMaxAckPending = 40 })
			w.run()
			stuck, good := w.user("ann", ""), w.user("bob", "")
			w.write(stuck, "ready")
			w.write(good, "ready")
			if away {
				w.v.change(func() { w.v.down = true })
			}
			for seq := range uint64(20) {
				w.router.accept(chatOf("ann", seq+1, 1))
			}
			synctest.Wait()
			refuse(&stuck.ring)
			w.hub.slow[stuck] = 1
			time.Sleep(slowPause)
			var done atomic.Bool
			go func() {
				w.router.accept(chatOf("bob", 100, 1))
				done.Store(true)
			}()
			time.Sleep(100 * time.Millisecond)
			if stuck.closing() == away || good.closing() || done.Load() == away {
				t.Errorf("Redis away: %v; the stuck socket is closed: %v, the other: %v, accept goes on: %v", away, stuck.closing(), good.closing(), done.Load())
			}
			if away {
				w.v.change(func() { w.v.down = false })
				time.Sleep(time.Second)
				if stuck.closing() != done.Load() || !done.Load() {
					t.Errorf("Redis is back; the stuck socket is closed: %v, accept goes on: %v", stuck.closing(), done.Load())
				}
			}
			w.write(good, "event 100")
		})
	}
}

// TestWhatComesBehindTheDrain: the library's callback may have waited for room until the router ended. What it has then is
// given back, so that other pods need not wait for ACK_WAIT.
func TestWhatComesBehindTheDrain(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.router.stop()
		w.router.run(t.Context())
		m := chatOf("ann", 1, 1)
		w.router.accept(m)
		wantTold(t, m, "nak 1s")
		late := chatOf("ann", 2, 1)
		w.router.arrivedAt(time.Now().Add(-29*time.Second), true)
		w.router.accept(late)
		wantTold(t, late) // JetStream may have given it out again
		if w.share.inHand.Load() != 0 || w.share.bytes.Load() != 0 {
			t.Error("still in hand")
		}
		w.wantLedgers(0)
	})
}

// TestArrivedAt: as many messages as PREFETCH may have arrived during a wait, and count from its beginning; a later wait
// makes none of them younger.
func TestArrivedAt(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) { // PREFETCH is 10
		r, start := w.router, time.Now()
		for n := range 30 {
			at := start.Add(time.Duration(n) * time.Second)
			want := n
			switch {
			case n >= 2 && n <= 12:
				want = 2
			case n > 12 && n <= 15:
				want = 5
			}
			if got := r.arrivedAt(at, n == 2 || n == 5).Sub(start); got != time.Duration(want)*time.Second {
				t.Errorf("message %d counts as arrived after %v, want %d s", n, got, want)
			}
		}
		if len(r.waits) != 0 {
			t.Errorf("%d waits are kept for ever", len(r.waits))
		}
	})
}

// TestTwoWaitForRoom: the callback of a flow that has ended waits for room, and beside it that of the next. Neither takes the
// other's turn for good.
func TestTwoWaitForRoom(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.share.inHand.Store(10_000)
		var done atomic.Int32
		for range 2 {
			go func() {
				w.router.waitRoom()
				done.Add(1)
			}()
		}
		synctest.Wait()
		w.share.inHand.Store(0)
		for want := range int32(2) {
			w.router.wake() // as by each tick
			synctest.Wait()
			if got := done.Load(); got <= want {
				t.Fatalf("%d of 2 go on after %d wakes", got, want+1)
			}
		}
	})
}

// TestBulkOfEvents: a burst is not dropped because this pod's own writers have not come to it yet; a socket that does not take its
// events holds the others up for nothing.
func TestBulkOfEvents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config) { c.NATSMaxAckPending, c.WebsocketBufferSize = 10_000, 16 })
		w.run()
		good, stuck := w.user("ann", ""), w.user("ann", "")
		w.write(good, "ready")
		w.write(stuck, "ready")
		stuck.ring.state = alone
		go func() { // its writer, which has much else to do
			for range 1000 {
				time.Sleep(time.Millisecond)
				writeBy(&good.ring, w.hub.settle)
			}
		}()
		for seq := range uint64(1000) {
			w.router.accept(chatOf("ann", seq+1, 1))
		}
		time.Sleep(2 * time.Second)
		if n := w.m.targetsTotal.with("written").Get(); n != 1000 {
			t.Errorf("%d of 1000 were written to the socket that reads, %d dropped in all", n, w.m.targetsTotal.with("dropped").Get())
		}
		if n := w.m.targetsTotal.with("dropped").Get(); n != 1000-16 {
			t.Errorf("%d were dropped by the socket that does not", n)
		}
	})
}

// TestQueue: what is added comes out once, in order, until the end, from which on nothing is taken any more.
func TestQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		stop := make(chan struct{})
		q := newQueue(stop)
		var got []*pulled
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			var buf []*pulled
			for {
				if buf = q.next(buf); len(buf) == 0 {
					return
				}
				got = append(got, buf...)
				clear(buf)
			}
		}()
		var all []*pulled
		for i := range 100 {
			p := &pulled{}
			all = append(all, p)
			if !q.add(p) {
				t.Fatal("refused")
			}
			if i%7 == 0 {
				synctest.Wait()
			}
			if i == 99 {
				close(stop)
			}
		}
		<-ended
		if !slices.Equal(got, all) || q.add(&pulled{}) {
			t.Errorf("%d of %d came out, or one was taken behind the end", len(got), len(all))
		}
	})
}

// TestSeen: what was seen before, or a sequence below it, counts as a redelivery; a lower sequence that was stored later makes the stream
// suspect of having lost its end, and nothing is taken from it for granted until that is known.
func TestSeen(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		r, now := w.router, time.Now()
		for i, c := range []struct {
			seq    uint64
			stored time.Duration
			again  bool
			newest uint64
		}{{5, 0, false, 5}, {7, 2, false, 7}, {6, 1, true, 7}, {7, 2, true, 7}, {6, 3, true, 7}, {9, 4, false, 7}} {
			if again := r.seen(c.seq, now.Add(c.stored*time.Second)); again != c.again {
				t.Errorf("%d: seen again: %v", i, again)
			}
			if newest, _ := r.newestSeen(); newest != c.newest {
				t.Errorf("%d: the newest is %d", i, newest)
			}
		}
		if len(w.consumer.doubt) != 1 {
			t.Error("nobody looks into the stream")
		}
		r.endFound()
		if r.seen(10, now); r.lastSeen != 10 {
			t.Error("still suspect")
		}
		r.newStream()
		if r.seen(3, now) {
			t.Error("another stream's sequences begin again")
		}
	})
}

// TestRequestIDOfAnEvent: a publisher's is carried on if it is sane.
func TestRequestIDOfAnEvent(t *testing.T) {
	for id, want := range map[string]string{"": "seq-7", "abc-1": "abc-1", "a b": "seq-7", strings.Repeat("x", 1000): "seq-7"} {
		m := chatOf("ann", 7, 1)
		m.headers = map[string][]string{"X-Request-Id": {id}, "X-Request-ID": {id}}
		if got := requestIDOf(m, 7); got != want {
			t.Errorf("%.20q becomes %q", id, got)
		}
	}
}

// TestIdleCallback: what comes after the library had nothing to hand over did not arrive during a wait long before.
func TestIdleCallback(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		r, start := w.router, time.Now()
		r.arrivedAt(start, true)
		r.returned = start.Add(time.Minute)
		if got := r.arrivedAt(start.Add(time.Minute+idleCallback), false); !got.Equal(start) {
			t.Error("a message right behind a wait did not arrive during it")
		}
		at := start.Add(time.Minute + 2*idleCallback)
		if got := r.arrivedAt(at, false); !got.Equal(at) {
			t.Error("a message that came after a pause arrived during the wait before it")
		}
	})
}
