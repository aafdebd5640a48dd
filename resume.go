package main

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"time"
)

// replayEnough is how few events a pass may have found for the socket to go live before the next, last pass.
const replayEnough = 16

// resume replays, at the client's wish, what this socket should have had after a sequence.
func (c *conn) resume(req *request) {
	if req.Payload.Since == nil {
		c.fault(badRequest("since", "resume without since"))
		return
	}
	c.ring.replaying(leaveAll, *req.Payload.Since, time.Now())
	subjects, from := c.subjects(), c.h.resumeFrom(*req.Payload.Since, c.firstRoute())
	if chat := c.ring.selection(); chat != "" {
		subjects = append(subjects, c.chatSubject(chat))
		from = c.h.resumeFrom(from, c.chatRoute(chat))
	}
	info := c.replay(from, subjects)
	var err error
	if info.Seq, err = c.streamSeq(); err != nil {
		// What is known may be older than what the client has: it would take this for the answer of a stream made anew.
		info.Seq, info.Gap = max(info.Seq, *req.Payload.Since), true
	}
	c.endReplay(newReply("resumed", info), info.to)
}

// endReplay is given the end up to which everything was replayed, 0 if something may be missing.
func (c *conn) endReplay(confirmation *frame, to uint64) {
	ends, kick := c.ring.resumed(confirmation, to, time.Now(), nil)
	c.kick(kick)
	c.h.settle(ends, "buffer")
}

// subjects are those whose events this socket gets as long as it lives.
func (c *conn) subjects() []string {
	prefix, r := c.h.cfg.Load().NATSSubjectPrefix, c.firstRoute()
	base := prefix + "." + r.company + "." + r.agent
	if r.kind == routeAgents {
		return []string{base + ".agents"}
	}
	subjects := []string{base + ".chats", base + ".contacts"}
	if c.h.cfg.Load().EventsAgentsToUsers {
		subjects = append(subjects, base+".agents")
	}
	return subjects
}

func (c *conn) chatSubject(chat string) string {
	return c.h.cfg.Load().NATSSubjectPrefix + "." + c.claims.company + "." + c.claims.agent + ".messages." + chat
}

// replay writes the past of subjects after since to the client. ring.replaying came before, so that live events are left
// to the passes. Joined without a hole, because (1) an event that was settled as replayed was pulled, and so was in the
// stream, before goLive; (2) the end that the last pass reads up to is asked for after goLive; (3) what comes after
// goLive waits for the confirmation. The read loop runs it: a client's messages take effect in their order.
func (c *conn) replay(since uint64, subjects []string) replayInfo {
	c.h.m.resumeRequestsTotal.with().Inc()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	c.mu.Lock()
	c.cancel = cancel // close ends it
	gone := c.code != 0
	c.mu.Unlock()
	if gone {
		cancel()
	}
	n, to, err := c.passes(ctx, since, subjects)
	c.ring.goLive() // after a failure too
	c.mu.Lock()
	c.cancel = nil
	c.mu.Unlock()
	if err != nil && ctx.Err() == nil {
		c.h.m.resumeGapsTotal.with().Inc()
		level := slog.LevelWarn
		if errors.Is(err, errTooFar) {
			level = slog.LevelInfo
		}
		slog.Log(ctx, level, "replay ended in a gap", append(c.logAttrs(), "since", since, "resumed", n, "err", err)...)
	}
	return replayInfo{Resumed: n, Gap: err != nil, to: to}
}

// passes returns how many events it has queued, and the end up to which these are all, 0 with an error.
func (c *conn) passes(ctx context.Context, since uint64, subjects []string) (n int, to uint64, err error) {
	r, err := c.h.openPast(ctx, since, subjects)
	if err != nil {
		return 0, 0, err
	}
	defer r.rest()
	write := func(ev *event) error {
		if !c.ring.hasRoom() {
			r.rest()
			c.ring.waitRoom()
		}
		if c.closing() {
			return errClosed
		}
		if err := r.turn(ctx); err != nil {
			return err
		}
		c.missed.Store(0) // it takes what is written, though its pongs wait to be read
		c.kick(c.ring.replay(ev, time.Now()))
		c.h.m.resumeEventsTotal.with().Inc()
		return nil
	}
	if err := r.turn(ctx); err != nil {
		return 0, 0, err
	}
	for live := false; ; {
		end, err := r.last(ctx)
		if err != nil {
			return n, 0, err
		}
		found, err := r.pass(ctx, end, write)
		n += found
		if err != nil {
			return n, 0, err
		}
		if live {
			return n, end, nil
		}
		if found <= replayEnough {
			live = true
			c.ring.goLive()
		}
	}
}

// leaveAll as what a replay takes over; no chat's id.
const leaveAll = "*"

// replaying begins a replay: from now on what it covers is left to its passes. Replayed events may be written before
// the greeting, which is queued at the replay's end.
func (r *ring) replaying(what string, since uint64, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.leave, r.since, r.ready, r.first = what, since, true, 0
	return r.kickLocked(now)
}

// replay queues an event of the past like a reply. If JetStream gives it out later (again, mostly: it had no owner, or the
// consumer was made anew), it is a duplicate once the replay has ended well: all from the first event up to the end were
// queued, and are written or asked for by the next resume.
func (r *ring) replay(ev *event, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.insertLocked(r.n, item{f: ev.frame, at: now})
	if r.first == 0 {
		r.first = ev.seq
	}
	return r.kickLocked(now)
}

// goLive ends the passes but for the last one, which reads up to an end of the stream that is asked for after this:
// events wait for the confirmation again. The first call counts.
func (r *ring) goLive() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.leave != "" {
		r.holding, r.leave = r.leave == leaveAll, ""
	}
}

// resumed ends a replay of everything, which was whole up to the sequence to unless that is 0: the confirmation f, then what
// was held.
func (r *ring) resumed(f *frame, to uint64, now time.Time, out []settlement) (_ []settlement, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	held := r.held
	r.held, r.leave, r.holding = nil, "", false
	if r.closed {
		return out, false // close has settled them
	}
	if to > 0 && r.first > 0 {
		r.had, r.hadChat = span{r.first, to}, span{r.first, to}
	}
	out = r.confirmLocked(f, held, now, out)
	return out, r.kickLocked(now)
}

// span is all sequences from one to another; the zero span holds none.
type span struct{ from, to uint64 }

func (s span) has(seq uint64) bool { return s.to > 0 && s.from <= seq && seq <= s.to }

// hadLocked says whether a replay has queued d.
func (r *ring) hadLocked(d *delivery) bool {
	if d.kind == kindMessage {
		return d.chat == r.chat && r.hadChat.has(d.seq)
	}
	return r.had.has(d.seq)
}

// forgetWritten is called when the stream was made anew: its sequences start again and name other events.
func (r *ring) forgetWritten() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written, r.had, r.hadChat = seqSet{}, span{}, span{}
	r.since = math.MaxUint64 // a replay under way reads the new stream
}
