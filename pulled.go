package main

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// pulled is a delivery that came from JetStream.
type pulled struct {
	delivery
	r          *router
	msg        jetstream.Msg
	deliveries uint64     // JetStream's count
	here       [5][]*conn // sockets of this pod on that route that have been given the event
	owned      [5]bool    // that route has a live owner, or may have one
	served     bool       // the sockets of this pod have been given it
	others     bool       // other pods have owners of it, or may have, as far as was known then
	second     bool       // its owners are looked up a second time, since a peer had no socket for it
}

// wants is how many routes have owners that decide where the event goes.
func (p *pulled) wants() int {
	switch p.kind {
	case kindMessage:
		return 2
	case kindAgent:
		if p.r.cfg.Load().EventsAgentsToUsers {
			return 5
		}
		return 4
	default:
		return 1
	}
}

// wanted is one of these routes. None is kept: events for nobody are most of what is garbage, at times.
func (p *pulled) wanted(i int) route {
	r := route{routeGeneral, p.company, p.agent, ""}
	switch {
	case p.kind == kindMessage && i == 0:
		r.kind, r.chat = routeMessages, p.chat
	case p.kind == kindAgent && i < 4: // the fifth is that of the agent's users
		r.kind = routeAgents
		if i&1 != 0 {
			r.agent = "*"
		}
		if i&2 != 0 {
			r.company = "*"
		}
	}
	return r
}

// ways is how many of the routes lead to targets; a message's second one only tells whether its agent has an owner.
func (p *pulled) ways() int {
	if p.kind == kindAgent {
		return p.wants()
	}
	return 1
}

// give queues the event for sockets of this pod.
func (p *pulled) give(conns []*conn) {
	if len(conns) > 0 && p.frame == nil {
		p.frame = newEventFrame(p.event, false, p.r.cfg.Load().EventsTypeInPayload)
	}
	p.push(conns)
}

// settled ends a delivery from JetStream by the worst of its targets' outcomes.
func (p *pulled) settled(_ *delivery, worst outcome) {
	switch worst {
	case written, duplicate:
		p.end(ack, "delivered")
	case replayed:
		p.end(ack, "replayed")
	case dropped:
		p.end(ack, "dropped")
	case shed:
		p.giveUp("shed")
	case absent:
		if p.second {
			p.fail()
			return
		}
		p.lookAgain()
	default:
		p.fail()
	}
}

// lookAgain drops what was believed of the event's owners and has them looked up once more, in Redis itself. Targets
// that have been served know the event by its count above 1.
func (p *pulled) lookAgain() {
	for i := range p.wants() {
		p.r.owners.forget(p.wanted(i))
	}
	p.second, p.served = true, false
	p.count++
	p.worst.Store(uint32(written))
	p.open.Store(1)
	if !p.r.enqueue(p) {
		p.fail() // a drain: the other pods look again
	}
}

// fail has the event come again to all its targets, or gives it up when it is too old, or this pod holds too many.
func (p *pulled) fail() {
	switch {
	case p.r.horizonPassed(p):
		p.giveUp("expired")
	case !p.r.leaving() && !p.r.parked.park(time.Now(), p.deliveries, route{}, p.r.inHand.Load()):
		p.giveUp("shed")
	default:
		p.end(nak, "nak_failed")
	}
}

// giveUp terminates an event once the gap is in the owner log, so that its owners hear of it whatever becomes of this pod.
// Meanwhile it counts in no share: to give up is to make room.
func (p *pulled) giveUp(reason string) {
	had := map[route][]*conn{}
	for i, owned := range p.owned {
		switch {
		case owned && p.missedHere.Load():
			had[p.wanted(i)] = nil
		case owned:
			had[p.wanted(i)] = p.here[i]
		}
	}
	p.letGo()
	p.r.owners.announce(had, mark{since: p.seq - 1, reason: reason}, len(p.payload), func() { p.answer(term, reason) })
}

// horizonPassed says whether a failure ends the event. Its age is counted in the stream's own time, so that no clocks
// are compared; at the latest it ends with the delivery whose delays add up to the horizon.
func (r *router) horizonPassed(p *pulled) bool {
	cfg := r.cfg.Load()
	var waited time.Duration
	for n := uint64(1); n < p.deliveries && waited <= cfg.NATSRetryHorizon; n++ {
		waited += r.parked.nakDelay(n)
	}
	age := time.Duration(r.newest.Load() - p.stored.UnixNano())
	return age > cfg.NATSRetryHorizon || waited >= cfg.NATSRetryHorizon
}

// verdict is what JetStream is told of a delivery.
type verdict uint8

const (
	ack verdict = iota
	nak         // with delay, by the delivery count
	term
)

var errDisconnected = errors.New("NATS is not connected")

// tell does not try while NATS is away: the library keeps its lock during an attempt to reconnect, and a shared writer
// would wait for it, up to NATS_CONNECT_TIMEOUT.
func (p *pulled) tell(v verdict) error {
	if !p.r.connected() {
		return errDisconnected
	}
	switch v {
	case ack:
		return p.msg.Ack()
	case nak:
		return p.msg.NakWithDelay(p.r.parked.nakDelay(p.deliveries))
	default:
		return p.msg.Term()
	}
}

// end tells JetStream what became of a delivery, at once or, a NAK, with those of the same moment.
func (p *pulled) end(v verdict, outcome string) {
	if v == nak && !p.r.leaving() {
		sendNaks(p.r.parked.hold(heldNak{p, outcome}))
		return
	}
	p.answer(v, outcome)
	p.letGo()
}

func sendNaks(due []heldNak) {
	for _, n := range due {
		n.p.answer(nak, n.outcome)
		n.p.letGo()
	}
}

// letGo takes the delivery out of this pod's share.
func (p *pulled) letGo() {
	p.r.bytes.Add(-int64(len(p.payload)))
	p.r.inHand.Add(-1)
	p.r.wake()
}

// answer tells JetStream, unless it is too late for that, and closes the delivery's account.
func (p *pulled) answer(v verdict, outcome string) {
	r := p.r
	age := time.Since(p.arrived)
	if age > r.cfg.lateAfter() {
		outcome = "late"
	} else if err := p.tell(v); err != nil {
		slog.Debug("answer to JetStream not sent: the event comes again", "seq", p.seq, "outcome", outcome, "err", err)
		outcome = "late"
	}
	if slog.Default().Enabled(context.Background(), slog.LevelDebug) {
		slog.Debug("event ended", "request_id", p.requestID, "company", p.company, "agent", p.agent, "kind", p.kind.String(),
			"seq", p.seq, "deliveries", p.deliveries, "outcome", outcome, "ms", age.Milliseconds())
	}
	r.m.eventsTotal.with(p.kind.String(), outcome).Inc()
	r.m.eventsInHand.with().Dec()
}
