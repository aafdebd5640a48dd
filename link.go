package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

// batchEvents and batchBytes bound what is put into one message: larger ones gain nothing, and make the first event in
// it wait for the encoding of the last.
const (
	batchEvents = 128
	batchBytes  = 64 << 10
)

// ending is why a connection was closed; also the metric's label.
type ending string

const (
	endUnopened  ending = "unopened"  // never came up: dial, TLS or hello failed
	endBroken    ending = "broken"    // the stream broke
	endTripped   ending = "tripped"   // the breaker opened: too many events were not received in time
	endUnhealthy ending = "unhealthy" // the health check failed
	endIdle      ending = "idle"
	endGone      ending = "gone" // the pod has no lease any more, or another address
	endStopped   ending = "stopped"
)

// flight is an event on its way to a peer. Whoever takes it out of the link's queue or flights, under mu, settles it.
type flight struct {
	d          *delivery
	to         member    // that it is addressed to
	since      time.Time // when it was pushed, then when it was put into a batch
	generation uint64    // of the breaker
}

// link is one connection to a peer with its one stream. It ends as a whole, and a new one is made: gRPC's own
// reconnecting would go on dialling behind an open breaker.
type link struct {
	peer   *peer
	ctx    context.Context // of the stream; its cause says why it ended
	cancel context.CancelCauseFunc
	wake   chan struct{}   // room for 1: the queue is not empty; never closed
	up     chan struct{}   // closed when conn is there
	slab   []*peerpb.Event // owned by the writer, used again for every batch
	probe  bool            // made by a half-open breaker: dials once only

	// Guarded by peer.mu. Events have numbers from 1, given when they are taken into a batch.
	conn       *grpc.ClientConn  // nil until the stream is open; constant from then on
	calls      int               // closeSession's, under way
	queue      []flight          // not yet in a batch
	flights    map[uint64]flight // in a batch, not settled
	number     uint64            // of the last event in a batch
	received   uint64            // the peer has told this of all up to here
	progress   time.Time         // when it told so last, or when the link came up
	missed     uint64            // those up to here that were not received in time have been failed
	generation uint64            // of the event pushed last
	used       time.Time         // when something was in flight last
	checked    time.Time         // when the health check was made last
}

// run is the link's life: open it, then write until it ends. It returns when the reader has ended too.
func (l *link) run() {
	conn, stream, err := l.open()
	if err != nil {
		l.end(endUnopened, err)
		return
	}
	defer conn.Close()
	if !l.established(conn) {
		return
	}
	var reader sync.WaitGroup
	reader.Go(func() { l.end(endBroken, l.read(stream)) })
	l.write(stream)
	reader.Wait()
}

// open dials and says hello, all within PEER_TIMEOUT; where nothing listens, once more.
func (l *link) open() (*grpc.ClientConn, peerpb.Peer_DeliverClient, error) {
	timeout := l.peer.ps.cfg.Load().PeerTimeout
	timer := time.AfterFunc(timeout, func() { l.cancel(fmt.Errorf("no stream within %s", timeout)) })
	defer timer.Stop()
	conn, stream, err := l.dial()
	if m := l.peer.ps.m; status.Code(err) == codes.Unavailable && !l.probe && l.ctx.Err() == nil {
		m.grpcForwardRetryAttempts.with().Inc()
		if conn, stream, err = l.dial(); err == nil {
			m.grpcForwardRetrySuccess.with().Inc()
		} else {
			m.grpcForwardRetryFailure.with().Inc()
		}
	}
	if err != nil && l.ctx.Err() != nil {
		err = context.Cause(l.ctx)
	}
	return conn, stream, err
}

func (l *link) dial() (*grpc.ClientConn, peerpb.Peer_DeliverClient, error) {
	key := l.peer.key
	conn, err := l.peer.ps.dial(key.addr)
	if err != nil {
		return nil, nil, err
	}
	stream, err := peerpb.NewPeerClient(conn).Deliver(l.ctx)
	if err == nil {
		err = l.peer.ps.introduce(stream, key.pod)
	}
	if err != nil {
		conn.Close()
		return nil, nil, fmt.Errorf("open a stream to pod %s at %s: %w", key.pod, key.addr, err)
	}
	return conn, stream, nil
}

// established puts an open link to use. It says false when the link was ended meanwhile.
func (l *link) established(conn *grpc.ClientConn) bool {
	q := l.peer
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.link != l {
		return false
	}
	now := time.Now()
	l.conn, l.progress, l.used, l.checked = conn, now, now, now
	close(l.up)
	q.ps.m.grpcPoolSize.with().Inc()
	q.ps.m.grpcPoolConnectionsCreated.with().Inc()
	slog.Info("connected to a peer", "peer", q.key.pod, "address", q.key.addr)
	return true
}

// write sends batches until the stream fails or the link ends. The reader learns the reason.
func (l *link) write(stream peerpb.Peer_DeliverClient) {
	for {
		b := l.next()
		if b == nil {
			select {
			case <-l.wake:
				continue
			case <-l.ctx.Done():
				return
			}
		}
		if stream.Send(&peerpb.Request{Body: &peerpb.Request_Batch{Batch: b}}) != nil {
			return
		}
	}
}

// next moves what waits, as far as it fits into one message, into flight; nil when nothing waits. The batch is valid
// until the next call.
func (l *link) next() *peerpb.Batch {
	q := l.peer
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.link != l || len(l.queue) == 0 {
		return nil
	}
	b := &peerpb.Batch{Life: l.queue[0].to.life}
	size, now := 0, time.Now()
	most := min(batchEvents, len(l.queue), q.ps.window()-len(l.flights))
	if most <= 0 {
		return nil // an answer makes room, and wakes the writer
	}
	for len(b.Events) < most && size < batchBytes {
		f := l.queue[len(b.Events)]
		if size += len(f.d.payload); f.to.life != b.Life || len(b.Events) > 0 && size > batchBytes {
			break
		}
		l.number++
		f.since = now
		l.flights[l.number] = f
		b.Events = append(b.Events, l.eventFor(len(b.Events), f.d))
	}
	clear(l.queue[:len(b.Events)])
	l.queue = l.queue[len(b.Events):]
	q.sent.Add(len(b.Events))
	return b
}

// eventFor fills the i-th event of the slab. Sending encodes it before it returns, so the slab is free again then.
func (l *link) eventFor(i int, d *delivery) *peerpb.Event {
	if i == len(l.slab) {
		l.slab = append(l.slab, &peerpb.Event{})
	}
	eventToWire(l.slab[i], d)
	return l.slab[i]
}

// read takes answers until the stream fails and returns why.
func (l *link) read(stream peerpb.Peer_DeliverClient) error {
	var done []flight // used again for every message
	for {
		resp, err := stream.Recv()
		if err != nil {
			return err
		}
		a := resp.GetAnswers()
		if a == nil || len(a.GetSettled()) != len(a.GetOutcomes()) {
			return errors.New("answers that make no sense")
		}
		done = l.answered(a, done[:0])
		for i, f := range done {
			if f.d != nil {
				f.d.settleAt(f.to, outcomeFromWire(a.GetOutcomes()[i]))
			}
		}
		clear(done)
	}
}

// answered notes what a says and appends to done the flight of each settled event: an empty one where it was given up
// before, or never was.
func (l *link) answered(a *peerpb.Answers, done []flight) []flight {
	q := l.peer
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	for ; l.received < min(a.GetReceived(), l.number); l.received++ {
		l.progress = now
		if f, ok := l.flights[l.received+1]; ok {
			q.ps.m.grpcForwardSeconds.with().UpdateDuration(f.since)
			q.reportLocked(f.generation, true)
		}
	}
	for _, n := range a.GetSettled() {
		done = append(done, l.flights[n])
		delete(l.flights, n)
	}
	if len(l.queue) > 0 {
		poke(l.wake)
	}
	return done
}

// endLocked takes l out of use and returns what was in flight, which the caller settles as failed when it has unlocked. The
// first call counts. An end that costs events or calls is one failure to the breaker, if the peer is to blame.
func (l *link) endLocked(why ending, err error) []flight {
	q := l.peer
	if q.link != l {
		return nil
	}
	q.link = nil
	lost := append(slices.Collect(maps.Values(l.flights)), l.queue...)
	l.flights, l.queue = nil, nil
	m := q.ps.m
	if l.conn != nil {
		m.grpcPoolSize.with().Dec()
		m.grpcPoolConnectionsClosed.with(string(why)).Inc()
	}
	level := slog.LevelWarn
	if why == endIdle || why == endGone || why == endStopped {
		level = slog.LevelInfo
	}
	slog.Log(l.ctx, level, "connection to a peer ended", "peer", q.key.pod, "reason", string(why), "in_flight", len(lost), "err", err)
	switch {
	case len(lost) == 0 && l.calls == 0:
	case why == endUnopened || why == endBroken:
		q.reportLocked(l.generation, false)
	case why == endUnhealthy: // if the probe was among them, there must be another
		was := q.breaker.state
		q.breaker.withdraw(l.generation)
		q.noteLocked(was)
	}
	l.cancel(fmt.Errorf("connection ended: %s", why))
	return lost
}

// end ends l from outside of the lock.
func (l *link) end(why ending, err error) {
	q := l.peer
	q.mu.Lock()
	lost := l.endLocked(why, err)
	q.mu.Unlock()
	failAll(lost)
}

// missedLocked takes out what was sent before and not received: each is a failure to the breaker. What waits behind a
// writer that cannot send counts too, unless the peer has received something since: one that reads nothing is no better
// than one that answers nothing, but a long queue of large events is nobody's fault.
func (l *link) missedLocked(before time.Time) (lost []flight) {
	if l.conn == nil {
		return nil // still dialling, which has its own limit
	}
	for l.missed = max(l.missed, l.received); l.missed < l.number; l.missed++ {
		f, ok := l.flights[l.missed+1]
		if ok && f.since.After(before) {
			return lost
		}
		if ok {
			delete(l.flights, l.missed+1)
			lost = append(lost, f)
			l.peer.reportLocked(f.generation, false)
		}
	}
	for len(l.queue) > 0 && !l.queue[0].since.After(before) && !l.progress.After(before) {
		lost = append(lost, l.queue[0])
		l.peer.reportLocked(l.queue[0].generation, false)
		l.queue = l.queue[1:]
	}
	return lost
}

// lateLocked takes out what arrived from JetStream before: an answer is of no use any more. That says nothing of the
// peer, which may have been given it a moment ago.
func (l *link) lateLocked(before time.Time) (lost []flight) {
	giveUp := func(f flight) {
		lost = append(lost, f)
		q := l.peer
		was := q.breaker.state
		q.breaker.withdraw(f.generation)
		q.noteLocked(was)
	}
	for n, f := range l.flights {
		if !f.d.arrived.After(before) {
			delete(l.flights, n)
			giveUp(f)
		}
	}
	l.queue = slices.DeleteFunc(l.queue, func(f flight) bool {
		late := !f.d.arrived.After(before)
		if late {
			giveUp(f)
		}
		return late
	})
	return lost
}

// checkHealth asks the peer's standard health service and ends the link when it is not well.
func (l *link) checkHealth(conn *grpc.ClientConn, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	defer cancel()
	answer, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err == nil && answer.GetStatus() == healthpb.HealthCheckResponse_SERVING {
		return
	}
	if err == nil {
		err = errors.New(strings.ToLower(answer.GetStatus().String()))
	}
	if l.ctx.Err() == nil {
		l.end(endUnhealthy, err)
	}
}
