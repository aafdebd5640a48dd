package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	vm "github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

// peerPause is how long a peer may take and settle nothing before it is slow.
const peerPause = 250 * time.Millisecond

// peerKey names a peer: a pod that comes back at another address is another peer, with a breaker that knows nothing.
type peerKey struct{ pod, addr string }

// peer is another pod, as a target of events: to the router it is what a socket is, something to push into.
type peer struct {
	ps   *peers
	key  peerKey
	sent *vm.Counter

	mu      sync.Mutex // guards all below, and the link's fields that say so
	gone    bool       // takes nothing any more
	life    string     // of the last push
	slow    bool       // at the last look, events waited for longer than a moment
	breaker breaker
	link    *link // nil while nothing was sent for long; made by the next push
}

// push sends d to the sockets of a pod, which is dialled at addr, and settles it exactly once, now or later. Never blocks; any
// goroutine may call. A full window, an open breaker and a peer that is gone settle it as failed: the event comes again. A full
// window counts only once the peer is slow: while it settles what it gets at once, more than a window waits for it but for a moment,
// and the share bounds how much.
func (p *peers) push(to member, addr string, d *delivery) {
	if q := p.get(peerKey{to.pod, addr}); q == nil || !q.take(to, d) {
		d.settleAt(to, failed)
	}
}

// get returns the peer, made on first use; nil when stopped.
func (p *peers) get(key peerKey) *peer {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.stopped {
		return nil
	}
	q := p.pool[key]
	if q == nil {
		c := p.cfg.Load()
		q = &peer{ps: p, key: key, sent: p.m.grpcMessagesSentTotal.with(key.pod),
			breaker: breaker{threshold: c.PeerBreakerThreshold, openFor: c.PeerBreakerOpen}}
		p.pool[key] = q
	}
	return q
}

// keep drops every peer that is not in live, which maps the ids of the live pods to their addresses: its connection,
// its breaker and, unless the pod lives on at another address, its metric series.
func (p *peers) keep(live map[string]string) {
	p.door.expect(live)
	var drop []*peer
	p.mu.Lock()
	for key, q := range p.pool {
		if live[key.pod] != key.addr {
			drop = append(drop, q)
			delete(p.pool, key)
			if live[key.pod] == "" {
				p.m.grpcMessagesSentTotal.forget(key.pod)
			}
		}
	}
	for pod := range p.sources {
		if live[pod] == "" {
			delete(p.sources, pod)
			p.m.grpcMessagesReceivedTotal.forget(pod)
		}
	}
	p.mu.Unlock()
	for _, q := range drop {
		q.drop(endGone)
	}
}

// drop ends the peer for good.
func (q *peer) drop(why ending) {
	q.mu.Lock()
	q.gone = true
	if q.breaker.state != breakerClosed {
		q.breaker.reset()
		q.ps.m.grpcCircuitbreakerOpen.with().Dec()
	}
	var lost []flight
	if q.link != nil {
		lost = q.link.endLocked(why, nil)
	}
	q.mu.Unlock()
	failAll(lost)
}

// failAll settles what the caller has taken out of a link; not under a lock, since the end of a delivery goes far.
func failAll(flights []flight) {
	for _, f := range flights {
		f.d.settleAt(f.to, failed)
	}
}

// take queues d and says true, or says that it cannot be sent now.
func (q *peer) take(to member, d *delivery) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if l := q.link; q.gone || q.slow && l != nil && len(l.queue)+len(l.flights) >= q.ps.window() {
		return false
	}
	q.lookAtLifeLocked(to.life)
	before := q.breaker.state
	generation, ok := q.breaker.allow()
	q.noteLocked(before)
	if !ok {
		return false
	}
	if q.link == nil {
		q.connectLocked()
	}
	l, now := q.link, time.Now()
	l.queue = append(l.queue, flight{d, to, now, generation})
	l.generation, l.used = generation, now
	poke(l.wake)
	return true
}

// lookAtLifeLocked closes the breaker when the pod has a new life: it has renewed its lease since the failures, mostly
// as a new process at the old address, and what its former life did is no ground to refuse it.
func (q *peer) lookAtLifeLocked(life string) {
	if life == "" || life == q.life {
		return
	}
	before := q.breaker.state
	if before != breakerClosed {
		q.breaker.reset()
		q.noteLocked(before)
	}
	q.life = life
}

// noteLocked tells of a change of the breaker's state: metrics and log.
func (q *peer) noteLocked(before breakerState) {
	now := q.breaker.state
	if now == before {
		return
	}
	m := q.ps.m
	if now == breakerOpen {
		m.grpcCircuitbreakerTripped.with().Inc()
	}
	if before == breakerClosed {
		m.grpcCircuitbreakerOpen.with().Inc()
	} else if now == breakerClosed {
		m.grpcCircuitbreakerOpen.with().Dec()
	}
	slog.Warn("circuit breaker of a peer", "peer", q.key.pod, "state", now.String(), "was", before.String())
}

// reportLocked gives the breaker a result.
func (q *peer) reportLocked(generation uint64, ok bool) {
	before := q.breaker.state
	q.breaker.report(generation, ok)
	q.noteLocked(before)
}

// connectLocked makes a new link and starts it. The peer is not gone, so stop has yet to come here, and to wait after.
func (q *peer) connectLocked() {
	ctx, cancel := context.WithCancelCause(context.Background())
	l := &link{peer: q, ctx: ctx, cancel: cancel, wake: make(chan struct{}, 1), up: make(chan struct{}), flights: map[uint64]flight{},
		probe: q.breaker.state == breakerHalfOpen}
	q.link = l
	q.ps.wg.Go(l.run)
}

// watch looks after all peers until stop: what is overdue, idle or unhealthy.
func (p *peers) watch() {
	c := p.cfg.Load()
	shortest := min(c.PeerTimeout, c.PeerIdleTimeout, c.PeerHealthInterval)
	tick := time.NewTicker(max(min(shortest/8, slowTick), 5*time.Millisecond))
	defer tick.Stop()
	for {
		select {
		case <-p.stopping:
			return
		case now := <-tick.C:
			p.mu.Lock()
			all := slices.Collect(maps.Values(p.pool))
			p.mu.Unlock()
			for _, q := range all {
				q.look(now)
				q.noteSlow(now)
			}
		}
	}
}

// window is how many events may be in flight to one peer: a quarter of this pod's share of the consumer at the most, so
// that a sick one leaves room for those that wait for anything else.
func (p *peers) window() int {
	return min(p.cfg.Load().PeerWindow, max(1, int(p.share.size()/4)))
}

// noteSlow finds out whether events wait for the peer for longer than a moment.
func (q *peer) noteSlow(now time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.slow = false
	if q.link == nil {
		return
	}
	// A peer short of CPU time stands still for 100 ms, and half of a share takes 160 ms at the 13,000 events/s of a busy core.
	// Called slow for either, it cost thousands of events in a burst: NAKs fill the share at once, the rest is given up (measured).
	limit := peerPause
	if now.Sub(q.link.progress) < peerPause { // it takes what it gets
		limit *= 2
	}
	for _, f := range q.link.flights {
		q.slow = q.slow || now.Sub(f.since) >= limit
	}
	for _, f := range q.link.queue {
		q.slow = q.slow || now.Sub(f.since) >= limit
	}
}

// look fails what is overdue, and ends or checks the link when it is time to.
func (q *peer) look(now time.Time) {
	c := q.ps.cfg.Load()
	q.mu.Lock()
	l := q.link
	if l == nil {
		q.mu.Unlock()
		return
	}
	lost := l.missedLocked(now.Add(-c.PeerTimeout))
	lost = append(lost, l.lateLocked(now.Add(-q.ps.cfg.lateAfter()))...)
	if len(l.queue) > 0 {
		poke(l.wake) // there may be room: by what was just lost, or since the window has grown with this pod's share
	}
	switch {
	case q.breaker.state == breakerOpen:
		lost = append(lost, l.endLocked(endTripped, nil)...)
	case l.conn == nil:
	case len(l.flights)+len(l.queue) > 0:
		l.used = now
	case now.Sub(l.used) >= c.PeerIdleTimeout:
		l.endLocked(endIdle, nil)
	}
	check := q.link == l && l.conn != nil && now.Sub(l.checked) >= c.PeerHealthInterval
	if check {
		l.checked = now
		q.ps.wg.Go(func() { l.checkHealth(l.conn, c.PeerTimeout) })
	}
	q.mu.Unlock()
	failAll(lost)
}

// dial prepares a connection to addr; gRPC makes it with the first call.
func (p *peers) dial(addr string) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///"+addr,
		grpc.WithTransportCredentials(credentials.NewTLS(p.tlsConfig())),
		grpc.WithContextDialer(p.network), // also keeps HTTPS_PROXY out of it: pods are near
		grpc.WithDisableRetry(),
		grpc.WithDisableServiceConfig(),
		grpc.WithIdleTimeout(0),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, PermitWithoutStream: true}),
	)
}

// identify asks which pod lives at addr, and whether Redis has told it that who asks has no lease.
func (p *peers) identify(ctx context.Context, addr string, who member) (*peerpb.IdentifyResponse, error) {
	conn, err := p.dial(addr)
	if err != nil {
		return nil, fmt.Errorf("identify the pod at %s: %w", addr, err)
	}
	defer conn.Close()
	answer, err := peerpb.NewPeerClient(conn).Identify(ctx, &peerpb.IdentifyRequest{Pod: who.pod, Life: who.life})
	if err != nil {
		return nil, fmt.Errorf("identify the pod at %s: %w", addr, err)
	}
	return answer, nil
}

// list asks pod for its sockets, over a connection of its own: an operator asks rarely, and events wait for nothing.
func (p *peers) list(ctx context.Context, pod, addr string, ask *peerpb.List) (*peerpb.Sessions, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := p.dial(addr)
	if err != nil {
		return nil, fmt.Errorf("list the sessions of pod %s: %w", pod, err)
	}
	defer conn.Close()
	stream, err := peerpb.NewPeerClient(conn).Deliver(ctx)
	if err == nil {
		err = p.introduce(stream, pod)
	}
	var answer *peerpb.Response
	if err == nil {
		answer, err = exchange(stream, &peerpb.Request{Body: &peerpb.Request_List{List: ask}})
	}
	if err == nil && answer.GetSessions() == nil {
		err = errors.New("it answered something else")
	}
	if err != nil {
		return nil, fmt.Errorf("list the sessions of pod %s at %s: %w", pod, addr, err)
	}
	return answer.GetSessions(), nil
}

var errUnreachable = errors.New("it can't be reached")

// closeSession asks the pod at o to close a socket, over its link. A breaker that is open and a dial that fails are errUnreachable at
// once; a link that breaks is made anew, once.
func (p *peers) closeSession(ctx context.Context, o owner, ask *peerpb.CloseSessionRequest) (*peerpb.CloseSessionResponse, error) {
	q := p.get(peerKey{o.pod, o.addr})
	if q == nil {
		return nil, errUnreachable
	}
	var answer *peerpb.CloseSessionResponse
	err := errUnreachable
	for range 2 {
		l, generation := q.borrow(o.life)
		if l == nil {
			return nil, errUnreachable
		}
		select {
		case <-l.up:
			answer, err = peerpb.NewPeerClient(l.conn).CloseSession(ctx, ask)
		case <-l.ctx.Done():
			err = errUnreachable
		case <-ctx.Done():
			err = ctx.Err()
		}
		q.giveBack(l, generation, err == nil)
		if status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
			break
		}
		select { // the link is about to end: it is not to be borrowed again
		case <-l.ctx.Done():
		case <-ctx.Done():
		}
	}
	return answer, err
}

// borrow returns the link, made if need be, for one call; nil where the peer is gone or its breaker open. giveBack must follow.
func (q *peer) borrow(life string) (l *link, generation uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.gone {
		return nil, 0
	}
	q.lookAtLifeLocked(life)
	before := q.breaker.state
	generation, ok := q.breaker.allow()
	q.noteLocked(before)
	if !ok {
		return nil, 0
	}
	if q.link == nil {
		q.connectLocked()
	}
	l = q.link
	l.calls++
	l.generation, l.used = generation, time.Now()
	return l, generation
}

// giveBack ends a call. One that was not answered says nothing of the peer: a link that broke has said it.
func (q *peer) giveBack(l *link, generation uint64, answered bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	l.calls--
	if answered {
		q.reportLocked(generation, true)
		return
	}
	before := q.breaker.state
	q.breaker.withdraw(generation)
	q.noteLocked(before)
}
