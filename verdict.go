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
	deliveries uint64 // JetStream's count
	routed     bool   // handed to all targets
	waited     bool   // for Redis to say who owns the agent; of the goroutine that looks it up
}

// pushHere queues the event for sockets of this pod.
func (p *pulled) pushHere(conns []*conn) {
	if p.frame == nil && len(conns) > 0 {
		p.frame = newEventFrame(p.event, false, p.r.cfg.Load().EventsTypeInPayload)
	}
	p.push(conns)
}

// settled ends a delivery from JetStream by the worst of its targets' outcomes. One of the targets is the router itself, until Redis
// has said who owns the agent: without its answer nothing is settled. One that is late has no verdict: it comes again, and would take
// the budgets of others and leave notes for nothing.
func (p *pulled) settled(_ *delivery, worst outcome) {
	if p.late() {
		p.close("late")
		p.letGo()
		return
	}
	if worst == unselected && p.kind == kindAgent {
		worst = gone // no admin's scope covers it
	}
	switch worst {
	case failed:
		p.fail()
	case dropped:
		p.end(ack, "dropped")
	case replayed:
		p.end(ack, "replayed")
	case written, duplicate:
		p.end(ack, "delivered")
	case unselected:
		p.end(ack, "unselected")
	default:
		p.nobody()
	}
}

// fail has the event come again to all its targets, or gives it up when it is too old, or this pod has NAKed too many.
func (p *pulled) fail() {
	switch {
	case !p.r.leaving() && p.r.horizonPassed(p):
		p.giveUp("expired")
	case !p.r.leaving() && !p.r.share.park(time.Now(), p.deliveries, false):
		p.giveUp("shed")
	default:
		p.end(nak, "nak_failed")
	}
}

// nobody keeps an event whose agent has no socket anywhere for a client on its way from one pod to another: for 1, 2, 4 and 8
// times NAK_DELAY, as far as the budget allows. Admins load what they missed.
func (p *pulled) nobody() {
	switch {
	case p.kind == kindAgent && !p.toUsers:
		p.end(ack, "unselected")
	case !p.r.leaving() && p.deliveries >= nakLevels:
		p.end(term, "no_owner")
	case !p.r.leaving() && !p.r.share.park(time.Now(), p.deliveries, true):
		p.end(term, "no_owner")
	default:
		p.end(nak, "nak_no_owner")
	}
}

// horizonPassed says whether a failure ends the event: it is older than the horizon, in the stream's own time, so that no clocks are
// compared, and was delivered so often that its delays add up to it, so that a backlog is not given up at its first failure.
func (r *router) horizonPassed(p *pulled) bool {
	horizon := r.cfg.Load().NATSRetryHorizon
	var waited time.Duration
	for n := uint64(1); n < p.deliveries && waited < horizon; n++ {
		waited += r.share.nakDelay(n)
	}
	age := time.Duration(r.newest.Load() - p.stored.UnixNano())
	return waited >= horizon && age >= horizon
}

// note tells a pod that an event was given up for it.
type note struct {
	p      *pulled
	reason string
}

// giveUp terminates an event once a note of it stands in Redis for each pod where it failed. Meanwhile it counts in no share: to give
// up is to make room.
func (p *pulled) giveUp(reason string) {
	p.letGo()
	p.r.mu.Lock()
	defer p.r.mu.Unlock()
	p.r.givenUp = append(p.r.givenUp, note{p, reason})
}

// leaveNotes writes the notes of events that were given up, and then terminates these, until ctx ends. Without Redis' answer JetStream
// is told nothing, and gives the events out again.
func (r *router) leaveNotes(ctx context.Context) {
	for pause(ctx, nakEvery) {
		r.mu.Lock()
		notes := r.givenUp
		r.givenUp = nil
		r.mu.Unlock()
		if len(notes) == 0 {
			continue
		}
		err := r.lease.leaveNotes(ctx, notes)
		if err != nil {
			slog.Debug("notes not left: the events come again", "events", len(notes), "err", err)
		}
		for _, n := range notes {
			if err == nil {
				n.p.answer(term, n.reason)
			} else {
				n.p.close("late")
			}
		}
	}
}

// answerTo is what JetStream is told of a delivery.
type answerTo uint8

const (
	ack answerTo = iota
	nak          // with delay, by the delivery count
	term
)

var errDisconnected = errors.New("NATS is not connected")

// tell does not try while NATS is away: the library keeps its lock during an attempt to reconnect, and a shared writer
// would wait for it, up to NATS_CONNECT_TIMEOUT.
func (p *pulled) tell(a answerTo) error {
	if !p.r.consumer.up.Load() {
		return errDisconnected
	}
	switch a {
	case ack:
		return p.msg.Ack()
	case nak:
		return p.msg.NakWithDelay(p.r.share.nakDelay(p.deliveries))
	default:
		return p.msg.Term()
	}
}

// end tells JetStream what became of a delivery, at once or, a NAK, with those of the same moment.
func (p *pulled) end(a answerTo, outcome string) {
	if a == nak && !p.r.leaving() {
		sendNaks(p.r.share.hold(heldNak{p, outcome}))
		return
	}
	p.answer(a, outcome)
	p.letGo()
}

func sendNaks(due []heldNak) {
	for _, n := range due {
		n.p.answer(nak, n.outcome)
		n.p.letGo()
	}
}

// letGo takes the delivery out of what this pod has in hand.
func (p *pulled) letGo() {
	p.r.share.give(len(p.payload), p.routed)
	p.r.wake()
}

// answer tells JetStream, unless it is too late for that, and closes the delivery's account.
func (p *pulled) answer(a answerTo, outcome string) {
	if p.late() {
		outcome = "late"
	} else if err := p.tell(a); err != nil {
		slog.Debug("answer to JetStream not sent: the event comes again", "seq", p.seq, "outcome", outcome, "err", err)
		outcome = "late"
	}
	p.close(outcome)
}

// late says whether JetStream may have given the event out again, and would take an answer for that delivery's.
func (p *pulled) late() bool { return time.Since(p.arrived) > p.r.cfg.lateAfter() }

// close closes the delivery's account.
func (p *pulled) close(outcome string) {
	if slog.Default().Enabled(context.Background(), slog.LevelDebug) {
		slog.Debug("event ended", "request_id", p.requestID, "company", p.company, "agent", p.agent, "kind", p.kind.String(),
			"seq", p.seq, "deliveries", p.deliveries, "outcome", outcome, "ms", time.Since(p.arrived).Milliseconds())
	}
	p.r.m.eventsTotal.with(p.kind.String(), outcome).Inc()
	p.r.m.eventsInHand.with().Dec()
}
