package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// errTooFar means that what was asked for cannot be replayed whole: the client must reload.
var errTooFar = errors.New("cannot be replayed")

// replayEnough is how few events a pass may have found for the socket to go live before the next, last pass.
const replayEnough = 16

// replays reads what was published before, for sockets that resume.
type replays struct {
	cfg      *settings
	consumer *consumer     // whose connection it uses, and which knows what stream it is
	slots    chan struct{} // one taken for each request under way, so that a storm of replays leaves the live flow its share

	asking chan struct{} // room for 1: taken while the stream is asked for

	mu    sync.Mutex // guards all below
	next  *finding   // has not been sent yet; nil = nobody waits
	last  uint64     // sequence of the stream, as of the time asked
	asked time.Time
}

// seqMaxAge: `ready` promises a sequence at most 1 s old.
const seqMaxAge = 500 * time.Millisecond

// seq returns a sequence not above the stream's last one and at most 1 s old; with an error, the last one known.
func (r *replays) seq(ctx context.Context) (uint64, error) {
	r.mu.Lock()
	last, age := r.last, time.Since(r.asked)
	r.mu.Unlock()
	if age < seqMaxAge {
		return last, nil
	}
	s, err := r.find(ctx)
	if err != nil {
		return last, err
	}
	return s.CachedInfo().State.LastSeq, nil
}

func newReplays(cfg *settings, c *consumer) *replays {
	return &replays{cfg: cfg, consumer: c, slots: make(chan struct{}, cfg.Load().ResumeConcurrency), asking: make(chan struct{}, 1)}
}

// track is one subject on its way through a replay.
type track struct {
	subject string // may have wildcards
	from    uint64 // next sequence to ask for
	head    *jetstream.RawStreamMsg
}

// limited makes one request of the stream when it is its turn: a client that reads slowly keeps no one's turn, nor does an
// answer that was lost with the connection.
func limited[T any](ctx context.Context, r *replays, request func(context.Context) (T, error)) (T, error) {
	select {
	case r.slots <- struct{}{}:
		defer func() { <-r.slots }()
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		return request(ctx)
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("wait for a turn to read the stream: %w", ctx.Err())
	}
}

// finding is a question about the stream, of all who asked before it was sent.
type finding struct {
	done   chan struct{} // closed when stream and err are set
	stream jetstream.Stream
	err    error
}

// forget has the next one who asks for a sequence get that of another stream.
func (r *replays) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last, r.asked = 0, time.Time{}
}

// find asks the leader for the stream with its state, as of a moment after the call: a replica may be behind. Those who come
// while another question is under way share the next one.
func (r *replays) find(ctx context.Context) (jetstream.Stream, error) {
	r.mu.Lock()
	f, first := r.next, r.next == nil
	if first {
		f = &finding{done: make(chan struct{})}
		r.next = f
	}
	r.mu.Unlock()
	if first {
		go r.answer(f) // ends after two requests at the most
	}
	select {
	case <-f.done:
		return f.stream, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// answer does not end with the client who happened to be the first, and waits for no turn: `ready` and `chat_selected` of other
// clients would wait for every replay of a storm.
func (r *replays) answer(f *finding) {
	defer close(f.done)
	r.asking <- struct{}{}
	defer func() { <-r.asking }()
	asked := time.Now()
	r.mu.Lock()
	r.next = nil
	r.mu.Unlock()
	f.stream, f.err = r.state()
	if f.err == nil {
		r.mu.Lock()
		r.last, r.asked = f.stream.CachedInfo().State.LastSeq, asked
		r.mu.Unlock()
	}
}

// maxRemoved bounds the list of removed messages that is asked for: 100 KB.
const maxRemoved = 10_000

// state asks the leader for the stream, and for the sequences that were removed from within it.
func (r *replays) state() (jetstream.Stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), apiTimeout)
	defer cancel()
	name := r.cfg.Load().NATSStreamName
	s, err := r.consumer.js.Stream(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("find stream %s: %w", name, err)
	}
	if n := s.CachedInfo().State.NumDeleted; 0 < n && n <= maxRemoved {
		if _, err := s.Info(ctx, jetstream.WithDeletedDetails(true)); err != nil {
			return nil, fmt.Errorf("find out what was removed from stream %s: %w", name, err)
		}
	}
	if created := s.CachedInfo().Created; !created.Equal(r.consumer.streamCreated()) {
		return nil, fmt.Errorf("stream %s was made anew at %s", name, created)
	}
	return s, nil
}

// replay reads several subjects in the order of the stream, pass by pass: each pass goes on where the one before ended.
type replay struct {
	replays *replays
	stream  jetstream.Stream // whose library call asks the nearest replica where the stream allows it
	since   uint64           // it began behind
	tracks  []track
	count   int // events so far
}

// open prepares to read what came to subjects after the position since. It returns errTooFar when that is expired, too far back,
// beyond the stream's end, or the stream forgets what was acked.
func (r *replays) open(ctx context.Context, since uint64, subjects []string) (*replay, error) {
	cfg := r.cfg.Load()
	s, err := r.find(ctx)
	if err != nil {
		return nil, err
	}
	p := &replay{replays: r, stream: s, since: since}
	info := s.CachedInfo()
	switch state := info.State; {
	case info.Config.Retention != jetstream.LimitsPolicy:
		return nil, fmt.Errorf("%w: stream %s has no limits retention", errTooFar, cfg.NATSStreamName)
	case since > state.LastSeq:
		return nil, fmt.Errorf("%w: %d is beyond the stream's end at %d", errTooFar, since, state.LastSeq)
	case state.LastSeq-since > uint64(cfg.ResumeMaxBehind):
		return nil, fmt.Errorf("%w: %d is more than RESUME_MAX_BEHIND before the stream's end at %d", errTooFar, since, state.LastSeq)
	}
	if err := p.whole(info.State); err != nil {
		return nil, err
	}
	for _, subject := range subjects {
		p.tracks = append(p.tracks, track{subject: subject, from: since + 1})
	}
	return p, nil
}

// whole returns errTooFar where messages behind the position are gone from the stream: expired, deleted, purged, or removed by a limit per
// subject. Of how many there are too many to name, any may be.
func (p *replay) whole(state jetstream.StreamState) error {
	removed := func(seq uint64) bool { return seq > p.since && seq <= state.LastSeq }
	switch {
	case p.since+1 < state.FirstSeq:
		return fmt.Errorf("%w: %d has expired, the stream begins at %d", errTooFar, p.since, state.FirstSeq)
	case state.NumDeleted > maxRemoved || slices.ContainsFunc(state.Deleted, removed):
		return fmt.Errorf("%w: messages behind %d were removed from within the stream, %d in all", errTooFar, p.since, state.NumDeleted)
	}
	return nil
}

// last asks for the stream's last sequence, and whether all is still there.
func (p *replay) last(ctx context.Context) (uint64, error) {
	s, err := p.replays.find(ctx)
	if err != nil {
		return 0, err
	}
	state := s.CachedInfo().State
	return state.LastSeq, p.whole(state)
}

// pass hands f every event up to the sequence to, in order, and returns how many there were. The last pass finds all that there are; one before
// it may end where a replica's copy of the stream does. It stops with errTooFar when there are too many, and with f's error.
func (p *replay) pass(ctx context.Context, to uint64, last bool, f func(*event) error) (n int, err error) {
	for {
		var next *track
		for i := range p.tracks {
			t := &p.tracks[i]
			if err := p.fill(ctx, t, to, last); err != nil {
				return n, err
			}
			if t.head != nil && t.head.Sequence <= to && (next == nil || t.head.Sequence < next.head.Sequence) {
				next = t
			}
		}
		if next == nil {
			return n, nil
		}
		msg := next.head
		next.head, next.from = nil, msg.Sequence+1
		ev, err := p.replays.decode(msg)
		if err != nil {
			continue // malformed: it was never delivered either
		}
		if p.count++; p.count > p.replays.cfg.Load().ResumeMaxEvents {
			return n, fmt.Errorf("%w: more than RESUME_MAX_EVENTS", errTooFar)
		}
		if err := f(ev); err != nil {
			return n, err
		}
		n++
	}
}

func (r *replays) decode(msg *jetstream.RawStreamMsg) (*event, error) {
	ev, err := parseSubject(r.cfg.Load().NATSSubjectPrefix, msg.Subject)
	if err == nil {
		err = checkPayload(msg.Data)
	}
	if err != nil {
		return nil, err
	}
	ev.seq, ev.stored, ev.payload = msg.Sequence, msg.Time, msg.Data
	ev.frame = newEventFrame(&ev, true, r.cfg.Load().EventsTypeInPayload)
	return &ev, nil
}

// fill finds the next message of t, if t may have one up to the sequence to. "Nothing more" is believed of the leader alone, which is
// asked in the last pass: the passes before it need not be complete.
func (p *replay) fill(ctx context.Context, t *track, to uint64, last bool) (err error) {
	if t.head != nil || t.from > to {
		return nil
	}
	if !last {
		t.head, err = p.get(ctx, t.from, jetstream.WithGetMsgSubject(t.subject))
	}
	if last || err == nil && disguised(t.head) {
		t.head, err = p.replays.ask(ctx, map[string]any{"next_by_subj": t.subject, "seq": t.from})
	}
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	return err
}

// disguised says whether m came with a publisher's own headers of those names, which the library takes for the server's: such as
// a message that was read from a stream and is published again.
func disguised(m *jetstream.RawStreamMsg) bool {
	return len(m.Header.Values(jetstream.SequenceHeader)) > 1 || len(m.Header.Values(jetstream.SubjectHeader)) > 1
}

func (p *replay) get(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	m, err := limited(ctx, p.replays, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return p.stream.GetMsg(ctx, seq, opts...) })
	if err != nil {
		return nil, fmt.Errorf("read stream from %d: %w", seq, err)
	}
	return m, nil
}

// ask is the consumer's, when it is this replay's turn.
func (r *replays) ask(ctx context.Context, request map[string]any) (*jetstream.RawStreamMsg, error) {
	return limited(ctx, r, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return r.consumer.ask(ctx, request) })
}

// resumed is what `ready` and `resumed` say of the past. Position is left out for sockets that have none.
type resumed struct {
	Seq      uint64  `json:"seq"`
	Position *uint64 `json:"position,omitempty"`
	Stream   string  `json:"stream"`
	Resumed  int     `json:"resumed"`
	Gap      bool    `json:"gap"`
}

// resume replays, at the client's wish, what this socket should have had after its last position.
func (c *conn) resume() {
	info := c.replay(c.ring.beginReplay())
	c.kick(c.ring.confirm(newReply("resumed", info), info.Stream, info.Position, time.Now()))
}

// replay writes the past of this socket behind the position from, of that stream ("" = there is none), to the client. The ring is
// replaying, and live afterwards, whatever happens. Joined without a hole, because (1) an event that was settled as replayed
// was pulled, and so was in the stream, before the ring was live; (2) the end that the last pass reads up to is asked for after
// that. What comes in between may come twice. The read loop runs it: a client's messages take effect in their order.
func (c *conn) replay(from uint64, stream string) resumed {
	c.h.m.resumeRequestsTotal.with().Inc()
	ctx, done := c.untilClosed(0)
	defer done()
	info := resumed{Stream: c.h.stream()}
	err := fmt.Errorf("%w: the position is of another stream", errTooFar)
	if stream == info.Stream {
		info.Resumed, info.Seq, err = c.passes(ctx, from)
	}
	c.ring.goLive() // after a failure too
	if now := c.h.stream(); err == nil && now != info.Stream {
		info.Stream, err = now, fmt.Errorf("%w: the stream is another one by now", errTooFar)
	}
	if err == nil {
		end := info.Seq
		info.Position = &end
		return info
	}
	if ctx.Err() == nil {
		c.h.m.resumeGapsTotal.with().Inc()
		level := slog.LevelWarn
		if errors.Is(err, errTooFar) {
			level = slog.LevelInfo
		}
		slog.Log(ctx, level, "replay ended in a gap", append(c.logAttrs(), "since", from, "resumed", info.Resumed, "err", err)...)
	}
	info.Gap, info.Position = true, c.startPosition(info.Stream)
	info.Seq, _ = c.h.replays.seq(ctx) // an older one, if NATS is away
	return info
}

// startPosition is the pod's newest one of that stream, for a client that now loads the state; nil for a socket that has none.
func (c *conn) startPosition(stream string) *uint64 {
	p := c.h.position()
	if !c.ring.positions || p == nil || p.stream != stream {
		return nil
	}
	seq := p.seq
	return &seq
}

// passes returns how many events it has queued, and the end up to which these are all.
func (c *conn) passes(ctx context.Context, since uint64) (n int, end uint64, err error) {
	p, err := c.h.replays.open(ctx, since, c.subjects())
	if err != nil {
		return 0, 0, err
	}
	write := func(ev *event) error {
		c.ring.waitRoom()
		if c.closing() {
			return errClosed
		}
		c.missed.Store(0) // it takes what is written, though its pongs wait to be read
		c.kick(c.ring.replay(ev.frame, time.Now()))
		c.h.m.resumeEventsTotal.with().Inc()
		return nil
	}
	for live := false; ; {
		if end, err = p.last(ctx); err != nil {
			return n, 0, err
		}
		found, err := p.pass(ctx, end, live, write)
		n += found
		switch {
		case err != nil:
			return n, 0, err
		case live: // what has been removed since the end was asked for, before it was read?
			_, err = p.last(ctx)
			return n, end, err
		}
		if found <= replayEnough {
			live = true
			c.ring.goLive()
		}
	}
}

// subjects are those of the events that are for this socket.
func (c *conn) subjects() []string {
	prefix, cl := c.h.cfg.Load().NATSSubjectPrefix, c.claims
	if cl.admin != "" {
		return []string{prefix + "." + cl.scopeCompany + "." + cl.scopeAgent + ".agents"}
	}
	base := prefix + "." + cl.company + "." + cl.agent
	all := []string{base + ".chats", base + ".contacts"} // a wildcard for both costs the server ten times as much (measured)
	if c.h.cfg.Load().EventsAgentsToUsers {
		all = append(all, base+".agents")
	}
	if chat := c.ring.selection(); chat != "" {
		all = append(all, base+".messages."+chat)
	}
	return all
}
