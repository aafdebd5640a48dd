package main

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// polled is what the consumer has found out about its ack floor.
func (w *world) polled(floor uint64) {
	stream := w.consumer.streamID()
	w.consumer.mu.Lock()
	defer w.consumer.mu.Unlock()
	w.consumer.floor, w.consumer.polled, w.consumer.stream = floor, true, stream
}

// beats makes one beat, which must not fail.
func (w *world) beats() {
	w.t.Helper()
	if err := w.beat.once(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
}

// wantPosition checks the pod's newest one; 0 = none.
func (w *world) wantPosition(seq uint64) {
	w.t.Helper()
	p := w.hub.position()
	if p == nil && seq != 0 || p != nil && (p.seq != seq || p.stream != w.hub.stream()) {
		w.t.Errorf("the position is %+v, want %d", p, seq)
	}
}

// worlds runs f with a world in a bubble.
func worlds(t *testing.T, f func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) { f(t, newWorld(t, nil)) })
}

// TestPositionIsOfBeforeTheRenewal: what the consumer finds out while the lease is renewed waits for the next beat: an event up to it may
// have been given up for this pod after its notes were read.
func TestPositionIsOfBeforeTheRenewal(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.beats()
		w.wantPosition(0) // nothing was polled
		w.polled(10)
		w.v.before = func(args []string) {
			if args[0] == "eval" {
				w.polled(20)
			}
		}
		w.beats()
		w.wantPosition(10)
		w.beats()
		w.wantPosition(20)
		w.polled(15) // it may fall back after a server was killed
		w.beats()
		w.wantPosition(20)
		if age := w.m.positionAge.with().Get(); age != 0 {
			t.Errorf("the position is %v s old", age)
		}
		w.consumer.misfits = true
		w.polled(30)
		time.Sleep(2 * time.Second)
		w.beats()
		w.wantPosition(20)
		if age := w.m.positionAge.with().Get(); age != 2 {
			t.Errorf("the position is %v s old, want 2", age)
		}
	})
}

// TestNoPositionWithoutRenewal: none is issued by a beat whose renewal failed, or of a stream that is another one by now.
func TestNoPositionWithoutRenewal(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.polled(10)
		w.beats()
		w.polled(20)
		w.v.change(func() { w.v.lose = 1 })
		if err := w.beat.once(t.Context()); err == nil {
			t.Fatal("the answer was lost")
		}
		w.wantPosition(10)
		w.beats()
		w.wantPosition(20)
		c := w.user("ann", "")
		w.write(c, "ready")
		w.v.before = func(args []string) {
			if args[0] != "eval" {
				return
			}
			w.v.change(func() { w.v.before = nil })
			w.consumer.mu.Lock()
			w.consumer.created = w.consumer.created.Add(time.Hour)
			w.consumer.floor, w.consumer.polled = 0, false
			w.consumer.mu.Unlock()
			w.router.newStream()
		}
		w.beats()
		w.wantPosition(0)
		w.write(c, "gap")
		w.polled(3)
		w.beats()
		w.wantPosition(3)
	})
}

// TestGenerationSetsBack: where another pod has found that the stream lost its end, this one forgets its sequences with the next renewal,
// also if that fails further on, and tells its sockets.
func TestGenerationSetsBack(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.polled(100)
		w.beats()
		c := w.user("ann", "")
		w.write(c, "ready")
		w.v.change(func() { w.v.values[generationKey(w.cfg.Load())] = "next" })
		w.v.before = func(args []string) {
			if args[0] == "get" && args[1] == podKey("pod-1") { // it is answered, the leases of all pods are not
				w.v.change(func() { w.v.lose, w.v.before = 1, nil })
			}
		}
		if err := w.beat.once(t.Context()); err == nil {
			t.Fatal("the leases could not be read, and nobody says so")
		}
		w.wantPosition(0)
		if floor, known := w.consumer.ackFloor(); known || floor.seq != 0 {
			t.Errorf("a floor of before is still known: %v", floor)
		}
		w.write(c, "gap")
		w.polled(7)
		w.beats()
		w.wantPosition(7)
	})
}

// TestNotesBeforePosition: the sockets that a note names are told of a gap before a position is issued, and get none; the note is deleted
// with the next renewal.
func TestNotesBeforePosition(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.polled(10)
		w.beats()
		ann, bob := w.user("ann", ""), w.user("bob", "")
		all, other, of := w.admin("*", "*"), w.admin("other", "*"), w.admin("acme", "ann")
		conns := []*conn{ann, bob, all, other, of}
		for _, c := range conns {
			w.write(c, "ready")
		}
		own := w.lease.self.Load().member
		given := func(k kind) note {
			p := &pulled{}
			p.event, p.missed = &event{kind: k, company: "acme", agent: "ann"}, []member{own}
			return note{p, "expired"}
		}
		next := func(floor uint64, want map[*conn][]string) {
			t.Helper()
			w.polled(floor)
			w.beats()
			for _, c := range conns {
				c.ring.wantPosition()
				c.kick(c.ring.control(opPing, nil))
				w.write(c, append([]string{"ping"}, want[c]...)...)
			}
		}
		with := func(position string, gaps ...*conn) map[*conn][]string {
			want := map[*conn][]string{}
			for _, c := range conns {
				want[c] = []string{position}
			}
			for _, c := range gaps {
				want[c] = []string{"gap"}
			}
			return want
		}
		w.lease.leaveNotes(t.Context(), []note{given(kindMessage)})
		next(11, with("position 11", ann))
		if len(w.v.hash(noteKey(own))) != 1 {
			t.Error("the note is deleted before its gap is sure to be noted")
		}
		want := with("position 12")
		want[ann] = nil // it owes a gap until it has resumed
		next(12, want)
		if got := w.v.hash(noteKey(own)); len(got) != 0 {
			t.Errorf("left: %v", got)
		}
		w.lease.leaveNotes(t.Context(), []note{given(kindAgent)})
		want = with("position 13", all, of)
		want[ann] = nil
		next(13, want)
	})
}

// TestOverlooked: a pod whose lease was gone gives no position. It claims its routes under its new life, and its sockets are told of a gap
// when Redis has answered: until then events may pass them by. Its sessions are confirmed.
func TestOverlooked(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.polled(10)
		w.beats()
		c := w.user("ann", "")
		w.write(c, "ready")
		sess, err := w.beat.sessions.swap("acme:ann:u", "user")
		if err != nil {
			t.Fatal(err)
		}
		sess.await()
		before := w.lease.life()
		time.Sleep(7 * time.Second)
		w.polled(20)
		claimed := false
		w.v.before = func(args []string) {
			if args[0] == "sadd" && args[1] == ann.key() {
				claimed = true
				c.ring.mu.Lock()
				defer c.ring.mu.Unlock()
				if c.ring.owes {
					t.Error("the gap was noted before the claim was written")
				}
			}
		}
		w.beats()
		w.wantPosition(10)
		w.write(c, "gap")
		if life := w.lease.life(); life == before || !claimed || !strings.HasPrefix(w.owners.claims[ann].name, "pod-1#"+life+"#") || !slices.Contains(w.v.members(ann.key()), w.owners.claims[ann].name) {
			t.Errorf("life %s after %s, the claim is %s of %v", life, before, w.owners.claims[ann].name, w.v.members(ann.key()))
		}
		if len(w.beat.sessions.urgent) != 1 {
			t.Error("its sessions are not confirmed")
		}
		w.beats()
		w.wantPosition(20)
		w.write(c) // it owes a gap
	})
}

// TestOverlookedAndNotAnswered: the gap stays owed until the claims are written, whatever fails meanwhile, and so long there is no position.
func TestOverlookedAndNotAnswered(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		w.polled(10)
		w.beats()
		c := w.user("ann", "")
		w.write(c, "ready")
		w.v.restart()
		trouble := []string{"get", "sadd route:"} // the leases of all pods, and the claims
		w.v.before = func(args []string) {
			if cmd := strings.Join(args, " "); len(trouble) > 0 && strings.HasPrefix(cmd, trouble[0]) && args[1] != generationKey(w.cfg.Load()) {
				trouble = trouble[1:]
				w.v.change(func() { w.v.down = true })
			}
		}
		for range 2 {
			w.polled(20)
			if err := w.beat.once(t.Context()); err == nil {
				t.Fatal("a beat without Redis")
			}
			w.wantPosition(10)
			w.write(c)
			w.v.change(func() { w.v.down = false })
		}
		w.beats()
		w.wantPosition(10)
		w.write(c, "gap")
		w.beats()
		w.wantPosition(20)
	})
}

// TestBeatsInTime: a third of the lease, sooner while there is no position or no Redis, and at once when asked to.
func TestBeatsInTime(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- w.beat.run(ctx) }()
		want := func(what string, within time.Duration, n int) {
			t.Helper()
			w.v.executed("")
			time.Sleep(within)
			synctest.Wait()
			if got := len(w.v.executed("hgetall ")); got != n {
				t.Errorf("%s: %d beats in %v, want %d", what, got, within, n)
			}
		}
		synctest.Wait()
		want("without a position", 3*time.Second, 10)
		w.polled(1)
		want("with the first position", 300*time.Millisecond, 1)
		want("in peace", 12*time.Second, 6)
		poke(w.lease.wake)
		want("when asked to", time.Second, 1)
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// TestDuplicatePod: a process that finds another alive under its id ends.
func TestDuplicatePod(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		servePeers(t, "pod-1", "other", peerConfig(), w.n.listen("there"), w.n.on)
		w.v.change(func() { w.v.values[podKey("pod-1")] = "other there" })
		if err := w.beat.run(t.Context()); !errors.Is(err, errDuplicatePod) {
			t.Errorf("ended with %v", err)
		}
	})
}

// TestAwayFromThisPodAlone: a pod that Redis is away from sends its clients to the others if one of these overlooks it; they are better off
// here where nobody has Redis.
func TestAwayFromThisPodAlone(t *testing.T) {
	for _, alone := range []bool{true, false} {
		worlds(t, func(t *testing.T, w *world) {
			other := w.pod(member{"pod-2", "l2"}, takeAll(gone, nil))
			w.polled(1)
			w.beats()
			c := w.user("ann", "")
			w.write(c, "ready")
			w.v.change(func() { w.v.down = true })
			for range 3 {
				w.beat.once(t.Context())
				time.Sleep(time.Second)
			}
			if c.closing() {
				t.Error("sent away before the lease has run out")
			}
			time.Sleep(4 * time.Second)
			if alone { // pod-2 has renewed its lease, and found none of pod-1
				other.lease.heldAt.Store(other.lease.since(time.Now()))
			}
			w.beat.once(t.Context())
			if w.beat.away.Wait(); c.closing() {
				t.Error("sent away though others may have heard from Redis a moment earlier")
			}
			time.Sleep(2 * time.Second)
			w.beat.once(t.Context())
			w.beat.away.Wait()
			if c.closing() != alone {
				t.Errorf("others have Redis: %v, sent away: %v", alone, c.closing())
			}
			if alone {
				w.write(c, "close")
			}
		})
	}
}

// TestNoteOfAnAgentsEventForUsers: what was given up for an agent's users is a gap for them, and not only for admins.
func TestNoteOfAnAgentsEventForUsers(t *testing.T) {
	for _, toUsers := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, func(c *Config) { c.EventsAgentsToUsers = toUsers })
			user, admin, other := w.user("ann", ""), w.admin("acme", "*"), w.admin("beta", "*")
			w.write(user, "ready")
			w.write(admin, "ready")
			w.write(other, "ready")
			w.hub.note(noteRoute(&event{kind: kindAgent, company: "acme", agent: "ann"})+"#x.1", "expired")
			w.write(admin, "gap")
			w.write(other)
			if toUsers {
				w.write(user, "gap")
			} else {
				w.write(user)
			}
		})
	}
}
