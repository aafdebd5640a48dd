package main

import (
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"

	peerpb "daisi-ws-service/proto"
)

// scriptedPeer is a pod that introduces itself and then does only what the test tells it.
type scriptedPeer struct {
	*peers
	gate chan struct{} // if set: nothing is read before it is closed

	mu      sync.Mutex // guards all below
	streams []peerpb.Peer_DeliverServer
	seqs    []uint64 // of all events, in order of arrival
	answers bool     // received and written, at once
}

// Deliver counts what comes in.
func (s *scriptedPeer) Deliver(stream peerpb.Peer_DeliverServer) error {
	if _, err := s.admit(stream); err != nil {
		return err
	}
	s.mu.Lock()
	s.streams = append(s.streams, stream)
	s.mu.Unlock()
	if s.gate != nil {
		<-s.gate
	}
	n := uint64(0)
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		s.mu.Lock()
		a := &peerpb.Answers{}
		for _, e := range req.GetBatch().GetEvents() {
			n++
			s.seqs = append(s.seqs, e.GetSeq())
			a.Received, a.Settled, a.Outcomes = n, append(a.Settled, n), append(a.Outcomes, peerpb.Outcome_OUTCOME_WRITTEN)
		}
		if s.answers {
			stream.Send(&peerpb.Response{Body: &peerpb.Response_Answers{Answers: a}})
		}
		s.mu.Unlock()
	}
}

// answer sends a on the i-th stream.
func (s *scriptedPeer) answer(i int, a *peerpb.Answers) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.streams[i].Send(&peerpb.Response{Body: &peerpb.Response_Answers{Answers: a}})
}

// got says how many events and streams have come.
func (s *scriptedPeer) got() (events, streams int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.seqs), len(s.streams)
}

// scripted serves pod-b, scripted, at "b" of n.
func scripted(t *testing.T, n *peerPipes) *scriptedPeer {
	t.Helper()
	s := &scriptedPeer{peers: newTestPeers("pod-b", "eb", peerConfig())}
	server := grpc.NewServer(grpc.Creds(s.door), grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: time.Second, PermitWithoutStream: true}))
	peerpb.RegisterPeerServer(server, s)
	healthpb.RegisterHealthServer(server, s.health)
	l := n.listen("b")
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
		s.stop(t.Context())
	})
	return s
}

// peerBubble runs f under synctest with pod-a, which dials, and pod-b, which is scripted.
func peerBubble(t *testing.T, cfg *Config, f func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		b := scripted(t, n)
		a := servePeers(t, "pod-a", "ea", cfg, n.listen("a"), n.on)
		f(t, n, a, b)
	})
}

// wantBreaker checks the state of the breaker of pod-b, and what the metrics say of it.
func wantBreaker(t *testing.T, a *peers, want breakerState, tripped int) {
	t.Helper()
	q := a.get(peerKey{"pod-b", "b"})
	q.mu.Lock()
	got := q.breaker.state
	q.mu.Unlock()
	if got != want {
		t.Errorf("breaker %s, want %s", got, want)
	}
	notClosed := 0.0
	if want != breakerClosed {
		notClosed = 1
	}
	wantPeerMetric(t, "breakers open", a.m.grpcCircuitbreakerOpen.with().Get(), notClosed)
	wantPeerMetric(t, "breakers tripped", counterValue(a.m.grpcCircuitbreakerTripped.with()), float64(tripped))
}

// TestBreakerByMissingReceived: five events that nobody says to have received open the breaker; while it is open nothing is
// dialled; after its time one event out of many goes, and its end decides.
func TestBreakerByMissingReceived(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		four := newPeerLedger(t)
		for seq := uint64(1); seq <= 4; seq++ {
			a.push(member{"pod-b", "eb"}, "b", four.delivery(seq))
		}
		time.Sleep(6 * time.Second)
		four.want(4, failed)
		wantBreaker(t, a, breakerClosed, 0)

		more := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", more.delivery(5))
		time.Sleep(2 * time.Second)
		a.push(member{"pod-b", "eb"}, "b", more.delivery(6)) // in flight when the fifth is overdue: the stream is given up with it
		time.Sleep(4 * time.Second)
		more.want(2, failed)
		wantBreaker(t, a, breakerOpen, 1)

		refused := newPeerLedger(t)
		for seq := uint64(1); seq <= 100; seq++ {
			a.push(member{"pod-b", "eb"}, "b", refused.delivery(seq))
		}
		refused.want(100, failed)
		if events, streams := b.got(); events != 6 || streams != 1 || n.dialled() != 1 {
			t.Errorf("%d events on %d streams, %d dials while open", events, streams, n.dialled())
		}

		for round := 1; round <= 2; round++ { // a probe that is not answered opens it again
			time.Sleep(30 * time.Second)
			probes := newPeerLedger(t)
			var all sync.WaitGroup
			for g := range uint64(50) {
				all.Go(func() { a.push(member{"pod-b", "eb"}, "b", probes.delivery(g+1)) })
			}
			all.Wait()
			time.Sleep(100 * time.Millisecond)
			wantBreaker(t, a, breakerHalfOpen, round)
			if events, streams := b.got(); events != 6+round || streams != 1+round || n.dialled() != 1+round {
				t.Errorf("%d events on %d streams, %d dials after probe %d", events, streams, n.dialled(), round)
			}
			time.Sleep(6 * time.Second)
			probes.want(50, failed)
			wantBreaker(t, a, breakerOpen, round+1)
		}

		b.mu.Lock()
		b.answers = true
		b.mu.Unlock()
		time.Sleep(30 * time.Second)
		last := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", last.delivery(1))
		last.want(1, written)
		wantBreaker(t, a, breakerClosed, 3)
	})
}

// TestLateAnswersAreIgnored: what is said after its event was given up changes nothing, neither the event nor the breaker.
func TestLateAnswersAreIgnored(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 4; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
		}
		time.Sleep(6 * time.Second)
		l.want(4, failed)
		b.answer(0, &peerpb.Answers{Received: 4, Settled: []uint64{1, 2, 3, 4}, Outcomes: make([]peerpb.Outcome, 4)})
		b.answer(0, &peerpb.Answers{Received: 99, Settled: []uint64{0, 5, 99}, Outcomes: make([]peerpb.Outcome, 3)}) // never sent
		time.Sleep(100 * time.Millisecond)
		l.want(4, failed)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(5))
		time.Sleep(6 * time.Second)
		l.want(5, failed)
		wantBreaker(t, a, breakerOpen, 1) // the late ones did not count as successes in between
		b.answer(0, &peerpb.Answers{Received: 5, Settled: []uint64{5}, Outcomes: make([]peerpb.Outcome, 1)})
		time.Sleep(100 * time.Millisecond)
		wantBreaker(t, a, breakerOpen, 1)
	})
}

// TestReceivedStartsAnew: a peer that receives now and then is slow, not dead.
func TestReceivedStartsAnew(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		lost, good := newPeerLedger(t), newPeerLedger(t)
		for round := uint64(1); round <= 5; round++ {
			for i := range uint64(4) {
				a.push(member{"pod-b", "eb"}, "b", lost.delivery(round*10+i))
			}
			time.Sleep(6 * time.Second)
			a.push(member{"pod-b", "eb"}, "b", good.delivery(round))
			time.Sleep(100 * time.Millisecond)
			b.answer(0, &peerpb.Answers{Received: round * 5, Settled: []uint64{round * 5}, Outcomes: []peerpb.Outcome{peerpb.Outcome_OUTCOME_DROPPED}})
			time.Sleep(100 * time.Millisecond)
		}
		lost.want(20, failed)
		good.want(5, dropped)
		wantBreaker(t, a, breakerClosed, 0)
	})
}

// TestLateDelivery: an event that was received but not settled when it gets late is failed, which frees its place in the
// window and says nothing about the peer.
func TestLateDelivery(t *testing.T) {
	cfg := peerConfig()
	cfg.PeerWindow = 10
	peerBubble(t, cfg, func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		for round := 1; round <= 3; round++ {
			l := newPeerLedger(t)
			start := time.Now()
			for seq := uint64(1); seq <= 10; seq++ {
				a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
			}
			time.Sleep(100 * time.Millisecond)
			b.answer(0, &peerpb.Answers{Received: uint64(10 * round)})
			time.Sleep(27 * time.Second)
			if got := l.counts(); len(got) != 0 {
				t.Fatalf("settled %v after %s", got, time.Since(start))
			}
			time.Sleep(2 * time.Second)
			l.want(10, failed)
		}
		wantBreaker(t, a, breakerClosed, 0)
	})
}

// TestLateProbe: a probe that gets late before its time to be received is over leaves the breaker open, not half-open for
// ever, and the next event is the probe.
func TestLateProbe(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 5; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
		}
		time.Sleep(36 * time.Second)
		old := l.delivery(6)
		old.arrived = old.arrived.Add(-27 * time.Second)
		a.push(member{"pod-b", "eb"}, "b", old)
		time.Sleep(2 * time.Second)
		l.want(6, failed)
		wantBreaker(t, a, breakerOpen, 2)
		b.mu.Lock()
		b.answers = true
		b.mu.Unlock()
		again := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", again.delivery(1))
		again.want(1, written)
		wantBreaker(t, a, breakerClosed, 2)
	})
}

// TestBreakerByDialFailures: five openings that fail open it, whatever number of events each took with it; each but the
// probe dials twice.
func TestBreakerByDialFailures(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		n.refuse = 1000
		l := newPeerLedger(t)
		for round := range uint64(5) {
			wantBreaker(t, a, breakerClosed, 0)
			for i := range uint64(20) {
				a.push(member{"pod-b", "eb"}, "b", l.delivery(round*20+i+1))
			}
			time.Sleep(100 * time.Millisecond)
		}
		l.want(100, failed)
		wantBreaker(t, a, breakerOpen, 1)
		time.Sleep(30 * time.Second)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(101))
		l.want(101, failed)
		wantBreaker(t, a, breakerOpen, 2)
		if n.dialled() != 11 {
			t.Errorf("%d dials, want 5 pairs and one probe", n.dialled())
		}
	})
}

// TestBreakerForgetsAFormerLife: a pod that has a new life has renewed its lease since; it is tried at once.
func TestBreakerForgetsAFormerLife(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.answers = true
		n.refuse = 10
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 5; seq++ {
			a.push(member{"pod-b", "eb-former"}, "b", l.delivery(seq))
			time.Sleep(100 * time.Millisecond)
		}
		l.want(5, failed)
		wantBreaker(t, a, breakerOpen, 1)
		again := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", again.delivery(1))
		again.want(1, written)
		wantBreaker(t, a, breakerClosed, 1)
	})
}

// TestRetryOnUnavailable: a first dial that fails costs nothing.
func TestRetryOnUnavailable(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.answers = true
		n.refuse = 1
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		l.want(1, written)
		wantPeerMetric(t, "retries", counterValue(a.m.grpcForwardRetryAttempts.with()), 1)
		wantPeerMetric(t, "retries that worked", counterValue(a.m.grpcForwardRetrySuccess.with()), 1)
		wantPeerMetric(t, "retries that failed", counterValue(a.m.grpcForwardRetryFailure.with()), 0)
	})
}

// TestSilentAddress: what listens and never speaks costs one PEER_TIMEOUT per attempt.
func TestSilentAddress(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		l := n.listen("mute")
		defer l.Close()
		accepted := make(chan net.Conn, 10)
		go func() {
			for c, err := l.Accept(); err == nil; c, err = l.Accept() {
				accepted <- c
			}
		}()
		ledger := newPeerLedger(t)
		for seq := uint64(1); seq <= 10; seq++ {
			a.push(member{"pod-m", "em"}, "mute", ledger.delivery(seq))
		}
		time.Sleep(5*time.Second - 1)
		if got := ledger.counts(); len(got) != 0 {
			t.Errorf("settled %v before the time-out", got)
		}
		time.Sleep(time.Nanosecond)
		time.Sleep(100 * time.Millisecond)
		ledger.want(10, failed)
		if len(accepted) != 1 {
			t.Errorf("dialled %d times", len(accepted))
		}
		(<-accepted).Close()
	})
}

// TestSlowDial: the time to answer begins when there is someone to answer.
func TestSlowDial(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		n.delay = 3 * time.Second
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		time.Sleep(7 * time.Second)
		b.answer(0, &peerpb.Answers{Received: 1, Settled: []uint64{1}, Outcomes: []peerpb.Outcome{peerpb.Outcome_OUTCOME_WRITTEN}})
		l.want(1, written)
	})
}

// TestStreamsThatBreakUnused hurt nobody: the breaker does not count them.
func TestStreamsThatBreakUnused(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.answers = true
		for round := range uint64(6) {
			l := newPeerLedger(t)
			a.push(member{"pod-b", "eb"}, "b", l.delivery(round+1))
			l.want(1, written)
			n.cut()
			time.Sleep(100 * time.Millisecond)
		}
		// Each round began with a success, so count what came after the last one.
		q := a.get(peerKey{"pod-b", "b"})
		q.mu.Lock()
		failures := q.breaker.failures
		q.mu.Unlock()
		if failures != 0 || n.dialled() != 6 {
			t.Errorf("%d failures counted, %d dials", failures, n.dialled())
		}
	})
}

// TestPeerThatReadsNothing: its breaker opens, though most of what waits for it could not even be sent.
func TestPeerThatReadsNothing(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.gate = make(chan struct{})
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 20; seq++ {
			d := l.delivery(seq)
			d.payload = fmt.Appendf(nil, `{"a":"%s"}`, strings.Repeat("x", 1<<20))
			a.push(member{"pod-b", "eb"}, "b", d)
		}
		time.Sleep(11 * time.Second)
		l.want(20, failed)
		wantBreaker(t, a, breakerOpen, 1)
		close(b.gate)
	})
}

// TestIdleConnection: unused for its time it is closed, and used it is not; the next event makes a new one.
func TestIdleConnection(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.answers = true
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 3; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
			time.Sleep(4 * time.Minute)
		}
		if n.dialled() != 1 {
			t.Errorf("%d dials while in use", n.dialled())
		}
		time.Sleep(62 * time.Second)
		wantPeerMetric(t, "pool size", a.m.grpcPoolSize.with().Get(), 0)
		wantPeerMetric(t, "closed", counterValue(a.m.grpcPoolConnectionsClosed.with(string(endIdle))), 1)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(4))
		l.want(4, written)
		wantPeerMetric(t, "pool size", a.m.grpcPoolSize.with().Get(), 1)
		wantBreaker(t, a, breakerClosed, 0)
	})
}

// TestBlackHole: a peer that vanished without a word is noticed, by both sides, also when nothing is sent; what is sent
// meanwhile fails within its time.
func TestBlackHole(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		a := servePeers(t, "pod-a", "ea", peerConfig(), n.listen("a"), n.on)
		b := servePeers(t, "pod-b", "eb", peerConfig(), n.listen("b"), takeAll(written, nil))
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		l.want(1, written)
		n.mute.Store(true)
		lost := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", lost.delivery(1))
		time.Sleep(6 * time.Second)
		lost.want(1, failed)
		time.Sleep(keepaliveTime + keepaliveTimeout)
		wantPeerMetric(t, "pool size", a.m.grpcPoolSize.with().Get(), 0)
		time.Sleep(keepaliveTime + keepaliveTimeout)
		done := make(chan struct{})
		go func() { b.server.GracefulStop(); close(done) }() // waits for the handlers: there is none left
		select {
		case <-done:
		case <-time.After(time.Second):
			t.Error("the other side still has the stream")
		}
	})
}

// TestUnhealthyPeer: a health check that fails ends the connection, which alone is no failure to the breaker.
func TestUnhealthyPeer(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		b.answers = true
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		time.Sleep(90 * time.Second)
		wantPeerMetric(t, "pool size of a healthy peer", a.m.grpcPoolSize.with().Get(), 1)
		b.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		time.Sleep(time.Minute)
		wantPeerMetric(t, "pool size", a.m.grpcPoolSize.with().Get(), 0)
		wantPeerMetric(t, "closed", counterValue(a.m.grpcPoolConnectionsClosed.with(string(endUnhealthy))), 1)
		l.want(1, written)
		wantBreaker(t, a, breakerClosed, 0)
	})
}

// TestUnhealthyProbe: a probe whose connection ends for the peer's health tells nothing, and the next event is one: else the
// breaker would wait for ever for the answer.
func TestUnhealthyProbe(t *testing.T) {
	cfg := peerConfig()
	cfg.PeerHealthInterval = time.Second
	peerBubble(t, cfg, func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		n.refuse = 10
		for seq := uint64(1); seq <= 5; seq++ {
			l := newPeerLedger(t)
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
			l.want(1, failed)
		}
		wantBreaker(t, a, breakerOpen, 1)
		b.health.SetServingStatus("", healthpb.HealthCheckResponse_NOT_SERVING)
		time.Sleep(30 * time.Second)
		probe := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", probe.delivery(6))
		time.Sleep(3 * time.Second)
		probe.want(1, failed)
		wantBreaker(t, a, breakerOpen, 2)
		b.health.SetServingStatus("", healthpb.HealthCheckResponse_SERVING)
		a.push(member{"pod-b", "eb"}, "b", newPeerLedger(t).delivery(7))
		wantBreaker(t, a, breakerHalfOpen, 2)
	})
}

// TestWindowGrows: when this pod's share grows, since another pod has gone, what waits for room is sent without an answer.
func TestWindowGrows(t *testing.T) {
	cfg := peerConfig()
	cfg.NATSMaxAckPending = 64
	peerBubble(t, cfg, func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		a.share.pods.Store(4)
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 8; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
		}
		time.Sleep(time.Second)
		if events, _ := b.got(); events != 2 {
			t.Errorf("%d events in flight, want 2", events)
		}
		a.share.pods.Store(1)
		time.Sleep(2 * time.Second)
		if events, _ := b.got(); events != 8 {
			t.Errorf("%d events in flight with a larger share, want 8", events)
		}
	})
}

// TestPeerGone: a pod without a lease, or at another address, loses its connection, its breaker and its series; what was in
// flight to it fails.
func TestPeerGone(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		time.Sleep(100 * time.Millisecond)
		a.keep(map[string]string{"pod-a": "a", "pod-b": "b"})
		if got := l.counts(); len(got) != 0 {
			t.Errorf("a peer that lives lost %v", got)
		}
		a.keep(map[string]string{"pod-a": "a", "pod-b": "elsewhere"})
		l.want(1, failed)
		wantPeerSeries(t, a, `dws_grpc_messages_sent_total{target_pod_id="pod-b"}`, true)
		n.refuse = 1000
		for seq := uint64(2); seq <= 6; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
			time.Sleep(100 * time.Millisecond)
		}
		wantBreaker(t, a, breakerOpen, 1)
		a.receivedFrom("pod-b").Inc()
		wantPeerSeries(t, a, `dws_grpc_messages_received_total{source_pod_id="pod-b"}`, true)
		a.keep(nil)
		wantPeerMetric(t, "breakers open", a.m.grpcCircuitbreakerOpen.with().Get(), 0)
		wantPeerSeries(t, a, `dws_grpc_messages_sent_total{target_pod_id="pod-b"}`, false)
		wantPeerSeries(t, a, `dws_grpc_messages_received_total{source_pod_id="pod-b"}`, false)
		l.want(6, failed)
	})
}

func wantPeerSeries(t *testing.T, p *peers, series string, want bool) {
	t.Helper()
	got := false
	for _, name := range p.m.set.ListMetricNames() {
		got = got || name == series
	}
	if got != want {
		t.Errorf("series %s there: %v, want %v", series, got, want)
	}
}

// TestStopFailsWhatIsInFlight: also what is pushed afterwards.
func TestStopFailsWhatIsInFlight(t *testing.T) {
	peerBubble(t, peerConfig(), func(t *testing.T, n *peerPipes, a *peers, b *scriptedPeer) {
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", l.delivery(1))
		time.Sleep(100 * time.Millisecond)
		a.push(member{"pod-c", "ec"}, "nowhere", l.delivery(2))
		a.stop(t.Context())
		a.push(member{"pod-b", "eb"}, "b", l.delivery(3))
		l.want(3, failed)
	})
}

// benchTokens is a source that gives the place of a settled delivery back.
type benchTokens chan struct{}

func (b benchTokens) settled(*delivery, outcome) { b <- struct{}{} }

// BenchmarkPeerForward is one event's way to another pod over loopback and back, with a full window: both pods share the
// processors of this process.
func BenchmarkPeerForward(b *testing.B) {
	var pods [2]*peers
	var addrs [2]string
	for i, name := range []string{"pod-a", "pod-b"} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			b.Fatal(err)
		}
		p := newTestPeers(name, "e", peerConfig())
		takeAll(written, nil)(p)
		go p.serve(l)
		defer p.stop(b.Context())
		pods[i], addrs[i] = p, l.Addr().String()
	}
	places := make(benchTokens, 1024)
	for range cap(places) {
		places <- struct{}{}
	}
	ev := &event{seq: 1, kind: kindChat, company: "company", agent: "agent-17", stored: time.Now(), requestID: "0123456789abcdef",
		payload: fmt.Appendf(nil, `{"event_id":"%s"}`, strings.Repeat("x", 580))}
	b.ReportAllocs()
	for b.Loop() {
		<-places
		d := &delivery{event: ev, count: 1, arrived: time.Now(), src: places}
		d.open.Store(1)
		pods[0].push(member{"pod-b", "e"}, addrs[1], d)
	}
	for range cap(places) {
		<-places
	}
}

// TestSeriesOfAPodThatComesBack: a pod that had no lease for a moment keeps its stream to this one, and what it sends is
// counted again.
func TestSeriesOfAPodThatComesBack(t *testing.T) {
	b, addr := startPeers(t, "pod-b", "eb", peerConfig(), takeAll(gone, nil))
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	ledger := newPeerLedger(t)
	a.push(member{"pod-b", "eb"}, addr, ledger.delivery(1))
	ledger.want(1, gone)
	b.keep(map[string]string{"pod-b": addr})
	b.keep(map[string]string{"pod-b": addr, "pod-a": "elsewhere"})
	a.push(member{"pod-b", "eb"}, addr, ledger.delivery(2))
	ledger.want(2, gone)
	if n := b.m.grpcMessagesReceivedTotal.with("pod-a").Get(); n != 1 {
		t.Errorf("%d events counted since the pod is back, want 1", n)
	}
}

// TestCloseSession: a call goes over the link to the pod, which is made for it. A refused dial is an answer at once, and one failure for
// all that wait for it; behind an open breaker nothing is tried. A link that breaks meanwhile is made again.
func TestCloseSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		b := servePeers(t, "b", "b1", peerConfig(), n.listen("b:1"), n.on)
		b.exclusive = newSessions(b.cfg, nil, b.m, b.lease, b)
		a := newTestPeers("a", "a1", peerConfig())
		n.on(a)
		t.Cleanup(func() { a.stop(t.Context()) })
		sess := &session{key: "c:a:u", id: "S", set: b.exclusive, state: held}
		b.exclusive.slotLocked("S")["S"] = sess
		ask := &peerpb.CloseSessionRequest{Key: "c:a:u", Socket: "S", Code: 4402, Reason: "session-replaced"}
		call := func(socket string, want bool) {
			t.Helper()
			ask.Socket = socket
			answer, err := a.closeSession(t.Context(), owner{member{"b", "b1"}, "b:1"}, ask)
			if err != nil || answer.GetFound() != want {
				t.Errorf("%s: %v, %v", socket, answer, err)
			}
		}
		call("GONE", false)
		sess.bind(func(int, string) { // it lasts for a while, and the link breaks meanwhile
			time.AfterFunc(time.Second, n.cut)
			time.AfterFunc(2*time.Second, sess.release)
		})
		begin := time.Now()
		ask.Socket = "S"
		if answer, err := a.closeSession(t.Context(), owner{member{"b", "b1"}, "b:1"}, ask); err != nil {
			t.Errorf("%v, %v", answer, err)
		}
		if took := time.Since(begin); took < time.Second || n.dialled() != 2 {
			t.Errorf("answered after %v and %d dials", took, n.dialled())
		}
		dials, begin := n.dialled(), time.Now()
		for range 2 * peerConfig().PeerBreakerThreshold {
			var wg sync.WaitGroup
			for range 10 {
				wg.Go(func() {
					if _, err := a.closeSession(t.Context(), owner{member{"c", "c1"}, "c:1"}, ask); err == nil {
						t.Error("answered by nobody")
					}
				})
			}
			wg.Wait()
		}
		// Each dial is tried twice.
		if took, dialled := time.Since(begin), n.dialled()-dials; took > time.Second || dialled != 2*peerConfig().PeerBreakerThreshold {
			t.Errorf("%d dials in %v before the breaker opened", dialled, took)
		}
	})
}
