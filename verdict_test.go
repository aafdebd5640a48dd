package main

import (
	"slices"
	"testing"
	"time"
)

// inHand is a delivery that waits for its targets, as the router has it before the look-up.
func (w *world) inHand(m *message) *pulled {
	p := &pulled{r: w.router, msg: m}
	p.src, p.arrived = p, time.Now()
	w.share.take(len(m.data))
	w.router.decode(p)
	return p
}

// ends settles the targets, the router's own hold among them, and returns what the delivery is counted as.
func (w *world) ends(p *pulled, targets ...outcome) string {
	w.t.Helper()
	p.open.Add(int32(len(targets)))
	for _, o := range targets {
		p.settle(o)
	}
	p.settle(gone)
	sendNaks(w.share.takeNaks())
	return w.countedAs(p.kind)
}

// countedAs returns how the deliveries of that kind ended, and forgets them.
func (w *world) countedAs(k kind) (label string) {
	for _, o := range []string{"delivered", "dropped", "replayed", "unselected", "nak_failed", "nak_no_owner", "malformed", "no_owner", "shed", "expired", "late"} {
		c := w.m.eventsTotal.with(k.String(), o)
		for range c.Get() {
			label += o
		}
		c.Set(0)
	}
	return label
}

// TestVerdicts: what JetStream is told of a delivery follows from the worst outcome of its targets, its age and its count.
func TestVerdicts(t *testing.T) {
	for _, c := range []struct {
		name    string
		subject string // "" = chats
		change  func(w *world, m *message)
		targets []outcome
		counted string
		told    string // "" = nothing
	}{
		{name: "written", targets: []outcome{written}, counted: "delivered", told: "ack"},
		{name: "had before", targets: []outcome{duplicate}, counted: "delivered", told: "ack"},
		{name: "one has left", targets: []outcome{written, gone, unselected}, counted: "delivered", told: "ack"},
		{name: "left to a replay", targets: []outcome{written, replayed, duplicate}, counted: "replayed", told: "ack"},
		{name: "dropped by one", targets: []outcome{written, dropped, replayed}, counted: "dropped", told: "ack"},
		{name: "failed at one", targets: []outcome{written, failed, dropped}, counted: "nak_failed", told: "nak 1s"},
		{name: "failed the sixth time", change: func(_ *world, m *message) { m.count = 6 }, targets: []outcome{failed}, counted: "nak_failed", told: "nak 16s"},

		{name: "of a chat that nobody has selected", targets: []outcome{unselected, gone}, counted: "unselected", told: "ack"},
		{name: "nobody", counted: "nak_no_owner", told: "nak 1s"},
		{name: "all have left", targets: []outcome{gone, gone}, counted: "nak_no_owner", told: "nak 1s"},
		{name: "nobody the fourth time", change: func(_ *world, m *message) { m.count = 4 }, counted: "nak_no_owner", told: "nak 8s"},
		{name: "nobody the fifth time", change: func(_ *world, m *message) { m.count = 5 }, counted: "no_owner", told: "term"},
		{name: "nobody the fifth time, while the pod drains", change: func(w *world, m *message) {
			m.count = 5
			w.router.stop()
		}, counted: "nak_no_owner", told: "nak 16s"},
		{name: "nobody, beyond the budget", change: func(w *world, _ *message) {
			for w.share.park(time.Now(), 1, true) {
			}
		}, counted: "no_owner", told: "term"},

		{name: "no admin", subject: "agents", counted: "unselected", told: "ack"},
		{name: "of no admin's scope", subject: "agents", targets: []outcome{unselected, gone}, counted: "unselected", told: "ack"},
		{name: "of an admin", subject: "agents", targets: []outcome{unselected, written}, counted: "delivered", told: "ack"},
		{name: "of an admin's pod that fails", subject: "agents", targets: []outcome{failed}, counted: "nak_failed", told: "nak 1s"},
		{name: "neither admin nor user", subject: "agents", change: func(w *world, _ *message) { w.cfg.Load().EventsAgentsToUsers = true }, targets: []outcome{unselected}, counted: "nak_no_owner", told: "nak 1s"},

		{name: "old, and often delivered", change: func(_ *world, m *message) { m.count, m.stored = 8, m.stored.Add(-time.Minute) }, targets: []outcome{failed}, counted: "expired", told: "term"},
		{name: "old, and often delivered, while the pod drains", change: func(w *world, m *message) {
			m.count, m.stored = 8, m.stored.Add(-time.Minute)
			w.router.stop()
		}, targets: []outcome{failed}, counted: "nak_failed", told: "nak 16s"},
		{name: "old, a backlog", change: func(_ *world, m *message) { m.count, m.stored = 7, m.stored.Add(-time.Hour) }, targets: []outcome{failed}, counted: "nak_failed", told: "nak 16s"},
		{name: "often delivered, and young", change: func(_ *world, m *message) { m.count, m.stored = 100, m.stored.Add(-59*time.Second) }, targets: []outcome{failed}, counted: "nak_failed", told: "nak 16s"},
		{name: "above the share", change: func(w *world, _ *message) {
			for w.share.park(time.Now(), 1, false) {
			}
		}, targets: []outcome{failed, written}, counted: "shed", told: "term"},

		{name: "NATS is away", change: func(w *world, _ *message) { w.consumer.up.Store(false) }, targets: []outcome{written}, counted: "late"},
	} {
		t.Run(c.name, func(t *testing.T) {
			worlds(t, func(t *testing.T, w *world) {
				now := chatOf("bob", 1000, 1)
				w.ends(w.inHand(now), written) // the stream's clock
				m := chatOf("ann", 7, 1)
				if c.subject != "" {
					m.subject = "wa.acme.ann." + c.subject
				}
				if c.change != nil {
					c.change(w, m)
				}
				p := w.inHand(m)
				got := w.ends(p, c.targets...)
				if got == "" { // it is given up: a note is left first
					stop := w.run()
					time.Sleep(time.Second)
					got = w.countedAs(p.kind)
					stop()
				}
				var told []string
				if c.told != "" {
					told = []string{c.told}
				}
				if wantTold(t, m, told...); got != c.counted {
					t.Errorf("counted as %s, want %s", got, c.counted)
				}
				if n, bytes := w.share.inHand.Load(), w.share.bytes.Load(); n != 0 || bytes != 0 || w.m.eventsInHand.with().Get() != 0 {
					t.Errorf("%d of %d bytes are still in hand", n, bytes)
				}
			})
		})
	}
}

// TestLateIsNotAnswered: JetStream would take an answer for that to the delivery that it has made since.
func TestLateIsNotAnswered(t *testing.T) {
	for _, o := range []outcome{gone, unselected, written, dropped, failed} {
		for _, late := range []bool{false, true} {
			worlds(t, func(t *testing.T, w *world) {
				m := chatOf("ann", 7, 1)
				p := w.inHand(m)
				time.Sleep(28 * time.Second) // ACK_WAIT less 2 s
				if late {
					time.Sleep(time.Nanosecond)
				}
				got := w.ends(p, o)
				m.mu.Lock()
				defer m.mu.Unlock()
				if (got == "late") != late || (len(m.told) == 0) != late || w.share.inHand.Load() != 0 {
					t.Errorf("%s: counted as %s, JetStream was told %q", o, got, m.told)
				}
			})
		}
	}
}

// TestGivenUpIsNoted: JetStream is told that an event is given up when a note stands in Redis for each pod where it failed, and for no
// other. Without Redis' answer it is told nothing. Meanwhile the event makes room.
func TestGivenUpIsNoted(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		old := func(seq uint64) (*message, *pulled) {
			m := chatOf("ann", seq, 50)
			m.stored = m.stored.Add(-time.Hour)
			p := w.inHand(m)
			p.open.Add(3)
			p.settleAt(member{"pod-2", "l2"}, failed)
			p.settleAt(member{"pod-3", "l3"}, written)
			p.settle(failed) // here
			return m, p
		}
		w.ends(w.inHand(chatOf("bob", 1000, 1)), written)
		w.run()
		noted := func() (pods []string) {
			for _, m := range []member{{"pod-2", "l2"}, {"pod-3", "l3"}, w.lease.self.Load().member} {
				for name, reason := range w.v.hash(noteKey(m)) {
					company, agent, _ := parseNote(name)
					pods = append(pods, m.pod+" "+company+" "+agent+" "+reason)
				}
			}
			slices.Sort(pods)
			return pods
		}
		w.v.change(func() { w.v.down = true })
		m, p := old(7)
		p.settle(gone)
		if n := w.share.inHand.Load(); n != 0 {
			t.Errorf("%d in hand while the notes are written", n)
		}
		time.Sleep(5 * time.Second)
		if got := w.countedAs(kindChat); got != "late" {
			t.Errorf("without Redis it counts as %s", got)
		}
		wantTold(t, m)
		w.v.change(func() {
			w.v.down = false
			w.v.before = func(args []string) {
				if args[0] == "hset" {
					wantTold(t, m)
				}
			}
		})
		m, p = old(8)
		if got := noted(); len(got) != 0 {
			t.Errorf("noted before its last target has settled: %v", got)
		}
		p.settle(gone)
		time.Sleep(time.Second)
		wantTold(t, m, "term")
		if got := noted(); !slices.Equal(got, []string{"pod-1 acme ann expired", "pod-2 acme ann expired"}) {
			t.Errorf("noted for %v", got)
		}
	})
}

// TestNoRoomForNaksWhileLeaving: a pod that drains takes nothing more, so it gives nothing up for want of room, and sends its NAKs at once.
func TestNoRoomForNaksWhileLeaving(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		for w.share.park(time.Now(), 1, true) || w.share.park(time.Now(), 1, false) {
		}
		w.router.stop()
		for _, o := range []outcome{gone, failed} {
			m := chatOf("ann", 7, 1)
			p := w.inHand(m)
			p.settle(o)
			wantTold(t, m, "nak 1s")
		}
	})
}
