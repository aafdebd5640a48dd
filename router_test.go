package main

import (
	"slices"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// returned is a message that counts its NAKs.
type returned struct {
	jetstream.Msg
	seq  uint64
	naks int
}

func (m *returned) Subject() string      { return "wa.acme.ann.chats" }
func (m *returned) Data() []byte         { return []byte("{}") }
func (m *returned) Headers() nats.Header { return nil }

func (m *returned) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: m.seq}, NumDelivered: 1, Timestamp: time.Now()}, nil
}

func (m *returned) Ack() error { return nil }

func (m *returned) NakWithDelay(time.Duration) error {
	m.naks++
	return nil
}

func newTestRouter(t *testing.T) *router {
	cfg := &settings{}
	cfg.Store(&Config{NATSAckWait: 30 * time.Second, NATSRetryHorizon: time.Minute, NATSNakDelay: time.Second, NATSMaxAckPending: 100, NATSPrefetch: 10, NATSPrefetchBytes: 1 << 20,
		NATSSubjectPrefix: "wa", WebsocketBufferSize: 16, WebsocketDropPolicy: "drop_oldest", PodLease: time.Second})
	m := newMetrics()
	o := newTestOwners(t)
	r := newRouter(cfg, m, o, newHub(cfg, m, o, nil), &peers{cfg: cfg})
	r.connected = func() bool { return true }
	return r
}

func decoded(r *router, seq uint64) *pulled {
	p := &pulled{r: r, msg: &returned{seq: seq}}
	p.src, p.arrived = p, time.Now()
	r.decode(p)
	return p
}

// TestWhatComesBehindTheDrain: the library's callback may have waited for room until the router ended. What it has then is
// given back, so that other pods need not wait for ACK_WAIT.
func TestWhatComesBehindTheDrain(t *testing.T) {
	r := newTestRouter(t)
	r.stop()
	r.run(t.Context())
	msg := &returned{}
	r.accept(msg)
	if msg.naks != 1 || r.inHand.Load() != 0 || r.bytes.Load() != 0 || r.unrouted.Load() != 0 {
		t.Errorf("%d NAKs, %d in hand of %d bytes (%d), want it given back", msg.naks, r.inHand.Load(), r.bytes.Load(), r.unrouted.Load())
	}
	late := &returned{}
	r.arrivedAt(time.Now().Add(-29*time.Second), true)
	r.accept(late)
	if late.naks != 0 {
		t.Error("an event that JetStream may have given out again was NAKed")
	}
}

// TestArrivedAt: as many messages as PREFETCH may have arrived during a wait, and count from its beginning; a later wait
// makes none of them younger.
func TestArrivedAt(t *testing.T) {
	r := newTestRouter(t) // PREFETCH is 10
	start := time.Now()
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
}

// TestServedBeforeTheLookup: a socket of this pod has an event queued before Redis has answered, and the event is not settled
// before its owners elsewhere are known. One that comes meanwhile gets it only where nobody here has had it.
func TestServedBeforeTheLookup(t *testing.T) {
	r := newTestRouter(t)
	way := route{routeGeneral, "acme", "ann", ""}
	socket := func() *conn {
		c := r.hub.newConn(goneConn{}, &claims{company: "acme", agent: "ann"}, lock{release: func() {}}, "req")
		c.ring.ready = true
		return c
	}
	early, late := socket(), socket()
	own := func(conns ...*conn) { r.owners.routes[way] = &localRoute{route: way, conns: conns} }
	serve := func(seq uint64) *pulled {
		p := decoded(r, seq)
		r.serveHere(p, time.Time{})
		return p
	}
	want := func(what string, p *pulled, inEarly, inLate, open int) {
		t.Helper()
		if early.ring.n != inEarly || late.ring.n != inLate || int(p.open.Load()) != open {
			t.Errorf("%s: %d and %d events queued, %d targets open, want %d, %d and %d", what, early.ring.n, late.ring.n, p.open.Load(), inEarly, inLate, open)
		}
	}
	r.owners.cache[way] = &answer{}

	own(early)
	p := serve(7)
	want("before the look-up", p, 1, 0, 2)
	own(early, late)
	r.dispatch(p, time.Now())
	want("one came meanwhile", p, 1, 0, 1)

	own(early)
	p = serve(8)
	own()
	r.dispatch(p, time.Now())
	want("one left meanwhile", p, 2, 0, 1)
	if !p.owned[0] {
		t.Error("the route of a socket that left meanwhile counts as nobody's")
	}

	p = serve(9)
	own(late)
	r.dispatch(p, time.Now())
	want("the first came meanwhile", p, 2, 1, 1)
}

// TestWhoMissedAnEventHere: what is given up for want of a peer's answer is excepted for the sockets of this pod if each of
// them has had it, or has been told; not if one has not, for whatever reason.
func TestWhoMissedAnEventHere(t *testing.T) {
	way := route{routeGeneral, "acme", "ann", ""}
	for _, tc := range []struct {
		name   string
		end    func(r *router, c *conn, p *pulled)
		missed bool
	}{
		{"written", func(r *router, c *conn, p *pulled) { r.hub.settle([]settlement{{&p.delivery, written}}, "") }, false},
		{"dropped", func(r *router, c *conn, p *pulled) { r.hub.settle([]settlement{{&p.delivery, dropped}}, "buffer") }, false},
		{"shed", func(r *router, c *conn, p *pulled) { r.hub.settle([]settlement{{&p.delivery, shed}}, "shed") }, true},
		{"the socket died", func(r *router, c *conn, p *pulled) {
			c.push(&p.delivery)
			ends, _, _ := c.ring.close(nil, time.Now(), nil)
			r.hub.settle(ends, "")
		}, true},
		{"left to a replay", func(r *router, c *conn, p *pulled) {
			c.ring.replaying(leaveAll, p.seq-1, time.Now())
			c.push(&p.delivery)
		}, false},
		{"left to a replay that may begin behind it", func(r *router, c *conn, p *pulled) {
			c.ring.replaying(leaveAll, p.seq, time.Now())
			c.push(&p.delivery)
		}, true},
	} {
		r := newTestRouter(t)
		p := decoded(r, 7)
		p.deliveries = 50 // what fails now is given up
		c := r.hub.newConn(goneConn{}, &claims{company: "acme", agent: "ann"}, lock{release: func() {}}, "req")
		p.open.Store(2) // this socket, and a peer
		p.owned[0], p.here[0] = true, []*conn{c}
		r.owners.routes[way] = &localRoute{route: way, conns: p.here[0]}
		tc.end(r, c, p)
		p.settle(failed) // the peer
		m, ok := r.owners.marks[way]
		if !ok || (m.except == "") != tc.missed {
			t.Errorf("%s: marked %v (%v), missed here: want %v", tc.name, m, ok, tc.missed)
		}
	}
}

// TestOrderBetweenAcceptAndRun: what accept serves itself never overtakes what it has left to run.
func TestOrderBetweenAcceptAndRun(t *testing.T) {
	r := newTestRouter(t)
	way := route{routeGeneral, "acme", "ann", ""}
	c := r.hub.newConn(goneConn{}, &claims{company: "acme", agent: "ann"}, lock{release: func() {}}, "req")
	c.ring.ready = true
	r.owners.routes[way] = &localRoute{route: way, conns: []*conn{c}}
	r.owners.away.Store(true) // what is known serves
	r.owners.cache[way] = &answer{}
	queued := func() (seqs []uint64) {
		for i := range c.ring.n {
			seqs = append(seqs, c.ring.at(i).d.seq)
		}
		return seqs
	}
	busy := int64(r.hub.policy.size) // so much in hand that accept leaves events to run
	for seq := uint64(1); seq <= 5; seq++ {
		if seq == 2 {
			r.inHand.Add(busy)
		}
		r.accept(&returned{seq: seq})
		if seq == 3 {
			r.inHand.Add(-busy)
		}
	}
	if got := queued(); !slices.Equal(got, []uint64{1}) {
		t.Errorf("queued before run: %v, want 1 alone", got)
	}
	r.route(t.Context(), r.queue)
	r.queue = nil
	r.accept(&returned{seq: 6})
	if got := queued(); !slices.Equal(got, []uint64{1, 2, 3, 4, 5, 6}) {
		t.Errorf("queued: %v, want 1 to 6", got)
	}
}

// TestShareWithinABatch: a stuck socket gives up no more than what brings the pod back to its share, though all of it came in
// one batch.
func TestShareWithinABatch(t *testing.T) {
	r := newTestRouter(t)
	r.hub.policy.size = 128
	way := route{routeGeneral, "acme", "ann", ""}
	c := r.hub.newConn(goneConn{}, &claims{company: "acme", agent: "ann"}, lock{release: func() {}}, "req")
	c.ring.ready, c.ring.state, c.ring.stuck = true, alone, true
	r.hub.slow[c] = 1
	r.owners.routes[way] = &localRoute{route: way, conns: []*conn{c}}
	r.owners.cache[way] = &answer{}
	r.owners.away.Store(true) // what is known serves
	var batch []*pulled
	for seq := range uint64(r.parked.share()) + 1 {
		r.inHand.Add(1)
		batch = append(batch, decoded(r, seq+1))
	}
	r.route(t.Context(), batch)
	if int64(c.ring.n) != r.parked.share() || r.inHand.Load() != r.parked.share() {
		t.Errorf("%d events wait, %d in hand; want %d, one having been given up", c.ring.n, r.inHand.Load(), r.parked.share())
	}
}

// TestStuckOnesMakeNoRoomForOthers: what waits in the ring of a stuck socket may wait in that of one that reads as well, whose
// writer has not come to it: accept leaves the next event to run, which waits for the writer, and drops nothing.
func TestStuckOnesMakeNoRoomForOthers(t *testing.T) {
	r := newTestRouter(t)
	size := r.hub.policy.size
	socket := func(state writerState, stuck bool) *conn {
		c := r.hub.newConn(goneConn{}, &claims{company: "acme", agent: "ann"}, lock{release: func() {}}, "req")
		c.ring.ready, c.ring.state, c.ring.stuck = true, state, stuck
		return c
	}
	reads, stuck := socket(queued, false), socket(alone, true)
	way := route{routeGeneral, "acme", "ann", ""}
	r.owners.routes[way] = &localRoute{route: way, conns: []*conn{reads, stuck}}
	r.owners.cache[way] = &answer{}
	for seq := range uint64(size) + 5 {
		r.accept(&returned{seq: seq + 1})
	}
	if reads.ring.gapNoted || reads.ring.at(0).d.seq != 1 || r.unserved.Load() != 5 {
		t.Errorf("gap %v, first %d, %d left to run; want none lost and 5 left", reads.ring.gapNoted, reads.ring.at(0).d.seq, r.unserved.Load())
	}
}

// older is a message that has been delivered many times, or for long.
type older struct {
	returned
	terms int
}

func (m *older) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: m.seq}, NumDelivered: 50, Timestamp: time.Now()}, nil
}

func (m *older) Term() error {
	m.terms++
	return nil
}

// TestNothingEndsUnannouncedBehindTheDrain: what comes when run has ended and is too old to come again is announced like any other.
func TestNothingEndsUnannouncedBehindTheDrain(t *testing.T) {
	r := newTestRouter(t)
	r.stop()
	r.run(t.Context())
	msg := &older{returned: returned{seq: 7}}
	r.accept(msg)
	if m, ok := r.owners.marks[route{routeGeneral, "acme", "ann", ""}]; msg.naks == 0 && (!ok || m.since != 6) {
		t.Errorf("%d NAKs, terminated %d times, announced %v", msg.naks, msg.terms, ok)
	}
	if r.inHand.Load() != 0 {
		t.Error("it is still in hand")
	}
}

// TestTwoWaitForRoom: the callback of a flow that has ended waits for room, and beside it that of the next. Neither takes the
// other's turn for good.
func TestTwoWaitForRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newTestRouter(t)
		r.inHand.Store(1000)
		var done atomic.Int32
		for range 2 {
			go func() {
				r.waitRoom()
				done.Add(1)
			}()
		}
		synctest.Wait()
		r.inHand.Store(0)
		for want := range int32(2) {
			r.wake() // as by each tick
			synctest.Wait()
			if got := done.Load(); got <= want {
				t.Fatalf("%d of 2 go on after %d wakes", got, want+1)
			}
		}
	})
}
