package main

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// wait is when accept had to wait. Meanwhile messages may have come off the network behind its back, as many as PREFETCH at
// the most: those up to the number last count as arrived when it began.
type wait struct {
	began time.Time
	last  int
}

// accept is the consumer's callback: the library calls it for one message at a time. While little is in hand it gives an
// event to the sockets of this pod itself, which only queue it, and never waits for Redis; else it leaves that to run, which
// does it for many at once. It waits when half of this pod's share is in hand without being stuck in a slow socket's ring or
// at a sick peer, which is when router and writers are behind.
func (r *router) accept(msg jetstream.Msg) {
	at := time.Now()
	waits := r.full()
	at = r.arrivedAt(at, waits)
	if waits {
		r.waitRoom()
	}
	r.inHand.Add(1)
	r.bytes.Add(int64(len(msg.Data())))
	p := &pulled{r: r, msg: msg}
	p.src, p.arrived = p, at
	if r.unserved.Load() == 0 && r.pending() < int64(r.hub.policy.size) {
		if !r.decode(p) {
			return
		}
		if !r.behind(p) {
			r.serveHere(p, time.Time{})
		}
	}
	r.unrouted.Add(int64(len(msg.Data())))
	if !r.enqueue(p) { // the drain was faster than this callback, which waited for room
		r.unrouted.Add(-int64(len(msg.Data())))
		if p.event != nil || r.decode(p) {
			for i := range p.ways() {
				p.owned[i] = true // nobody has looked: what is given up is announced
			}
			p.settle(failed)
		}
	}
}

// behind says whether a socket here that p is for has its ring full only because the writers are behind: run waits for them,
// accept must not. Little may be pending meanwhile: what waits in a stuck socket's ring may wait in this one as well.
func (r *router) behind(p *pulled) bool {
	if r.inHand.Load() < int64(r.hub.policy.size) {
		return false // no ring can be full
	}
	for i := range p.ways() {
		conns, _ := r.owners.local(p.wanted(i))
		if slices.ContainsFunc(conns, func(c *conn) bool { return c.ring.behind() }) {
			return true
		}
	}
	return false
}

// pending is what is in hand without being stuck in a slow socket's ring or at a sick peer, or about to be NAKed.
func (r *router) pending() int64 {
	return r.inHand.Load() - int64(r.hub.stuck()+r.peers.stuck()) - r.parked.kept.Load()
}

// arrivedAt is when the next message came off the network at the earliest; the library does not tell. waits says that accept
// is about to wait.
func (r *router) arrivedAt(now time.Time, waits bool) time.Time {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	r.accepted++
	if waits {
		r.waits = append(r.waits, wait{now, r.accepted + r.cfg.Load().NATSPrefetch})
	}
	for len(r.waits) > 0 && r.waits[0].last < r.accepted {
		r.waits = r.waits[1:]
	}
	if len(r.waits) == 0 {
		return now
	}
	return r.waits[0].began
}

// enqueue says false when run has ended: p would never have its turn.
func (r *router) enqueue(p *pulled) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return false
	}
	if !p.served {
		r.unserved.Add(1)
	}
	r.queue = append(r.queue, p)
	switch {
	case !p.served || p.others || p.frame != nil:
		poke(r.more)
	case len(r.queue) == 1:
		poke(r.some)
	}
	return true
}

// waitRoom returns when there is room, or the router stops.
func (r *router) waitRoom() {
	r.waiting.Add(1) // before the look that follows: what ends after it pokes
	defer r.waiting.Add(-1)
	for r.full() {
		select {
		case <-r.room:
		case <-r.stopping:
			return
		}
	}
}

// full says whether accept must wait. Memory counts too: above four prefetches of bytes, stuck sockets give up their
// oldest events, but only if it is the rings that hold so much. A burst of redeliveries that is not even dispatched passes
// by itself, and cost one stuck socket all that waited for it.
func (r *router) full() bool {
	if r.pending() >= r.parked.share()/2 {
		return true
	}
	for limit := 4 * int64(r.cfg.Load().NATSPrefetchBytes); r.bytes.Load() > limit; {
		if r.unrouted.Load() > limit/2 || !r.hub.shedOldest() {
			return true
		}
	}
	return false
}

// decode finds out what a message is about; a malformed one is terminated and false returned.
func (r *router) decode(p *pulled) bool {
	msg := p.msg
	p.open.Store(1) // for dispatch
	ev, err := parseSubject(r.cfg.Load().NATSSubjectPrefix, msg.Subject())
	md, mdErr := msg.Metadata()
	if err = errors.Join(err, mdErr, checkPayload(msg.Data())); err != nil {
		ev.kind = kindUnknown
	}
	again := false // a consumer that was made again begins to count again, at its ack floor
	if mdErr == nil {
		ev.seq, ev.stored, p.deliveries = md.Sequence.Stream, md.Timestamp, md.NumDelivered
		again = r.seen(md)
	}
	p.count = p.deliveries
	if again {
		p.count = max(p.count, 2)
	}
	if p.deliveries > 1 {
		r.m.redeliveredTotal.with().Inc()
	}
	r.m.natsMessagesReceivedTotal.with(ev.kind.String()).Inc()
	r.m.eventsInHand.with().Inc()
	ev.payload, ev.requestID = msg.Data(), requestIDOf(msg, ev.seq)
	p.event = &ev
	if err != nil {
		r.refuse(p, err)
		return false
	}
	return true
}

// seen notes how far the stream has come, and says whether that was known.
func (r *router) seen(md *jetstream.MsgMetadata) bool {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	last := r.lastSeen.Load()
	r.lastSeen.Store(max(last, md.Sequence.Stream))
	r.newest.Store(max(r.newest.Load(), md.Timestamp.UnixNano()))
	return md.Sequence.Stream <= last
}

// requestIDOf is the publisher's X-Request-ID, or one made of the sequence, which any pod makes alike.
func requestIDOf(msg jetstream.Msg, seq uint64) string {
	if id := msg.Headers().Get("X-Request-ID"); saneRequestID(id) {
		return id
	}
	return "seq-" + strconv.FormatUint(seq, 10)
}

// refuse terminates a malformed event, which no redelivery would mend.
func (r *router) refuse(p *pulled, err error) {
	if suppressed, ok := r.malformed.turn(time.Now()); ok {
		slog.Warn("malformed event terminated", "subject", fmt.Sprintf("%.200q", p.msg.Subject()), "seq", p.seq, "err", err, "suppressed", suppressed)
	}
	p.end(term, "malformed")
}
