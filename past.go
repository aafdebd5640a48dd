package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// errTooFar means that what was asked for cannot be replayed whole: the client must reload.
var errTooFar = errors.New("cannot be replayed")

// past reads what was published before, for sockets that resume.
type past struct {
	cfg   *settings
	nc    *nats.Conn
	js    jetstream.JetStream
	slots chan struct{} // one taken for each request under way, so that a storm of replays leaves the live flow its share

	asking chan struct{} // room for 1: taken while the stream is asked for

	// connects counts the connections to NATS so far; set before the first replay. A server that comes back may have lost the
	// end of the stream, whose sequences then are those of other messages.
	connects func() uint64

	turns    chan struct{}         // one taken for each replay under way, unless it waits for its client
	index    atomic.Pointer[index] // nil while replays are few
	indexing chan struct{}         // room for 1: taken while the index is brought up to date
	noIndex  time.Time             // no new attempt before; guarded by indexing

	expected atomic.Int64 // replays, of clients that wait for their session

	mu     sync.Mutex              // guards all below
	next   *finding                // has not been sent yet; nil = nobody waits
	starts [indexReplays]time.Time // of the latest replays
	count  int                     // of all replays: the start of the next one stands at count%indexReplays
	idle   *time.Timer             // drops the index; nil before replays were many
}

func newPast(cfg *settings, nc *nats.Conn, js jetstream.JetStream) *past {
	return &past{
		cfg: cfg, nc: nc, js: js, connects: func() uint64 { return 0 }, slots: make(chan struct{}, cfg.Load().ResumeConcurrency),
		turns: make(chan struct{}, replaysAtOnce), asking: make(chan struct{}, 1), indexing: make(chan struct{}, 1),
	}
}

// replaysAtOnce is how many replays are read side by side: of 5,000 that all were, all came to their end in the same half second,
// and what that takes of the processor made live events wait for as long.
const replaysAtOnce = 128

// turn waits until the replay may be read on, if it has no turn.
func (r *replay) turn(ctx context.Context) error {
	if r.held {
		return nil
	}
	select {
	case r.past.turns <- struct{}{}:
		r.held = true
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for a turn to replay: %w", ctx.Err())
	}
}

// rest gives the turn back: a client that reads slowly keeps no one's, nor does a replay that has ended.
func (r *replay) rest() {
	if r.held {
		r.held = false
		<-r.past.turns
	}
}

// track is one subject on its way through a replay.
type track struct {
	subject string // may have wildcards
	from    uint64 // next sequence to ask for
	head    *jetstream.RawStreamMsg
	atEnd   bool // the leader had nothing more, as of from
}

// limited makes one request of the stream when it is its turn: a client that reads slowly keeps no one's turn, nor does an
// answer that was lost with the connection.
func limited[T any](ctx context.Context, p *past, request func(context.Context) (T, error)) (T, error) {
	select {
	case p.slots <- struct{}{}:
		defer func() { <-p.slots }()
		ctx, cancel := context.WithTimeout(ctx, apiTimeout)
		defer cancel()
		return request(ctx)
	case <-ctx.Done():
		var none T
		return none, fmt.Errorf("wait for a turn to read the stream: %w", ctx.Err())
	}
}

// findEvery is how long the next question about the stream waits for those who share it, while replays are many.
const findEvery = 5 * time.Millisecond

// finding is a question about the stream, of all who asked before it was sent.
type finding struct {
	done   chan struct{} // closed when stream and err are set
	stream jetstream.Stream
	err    error
}

// find asks the leader for the stream with its state, as of a moment after the call: a replica may be behind. Those who come
// while another question is under way share the next one: each replay asks three times.
func (p *past) find(ctx context.Context) (jetstream.Stream, error) {
	p.mu.Lock()
	f, first := p.next, p.next == nil
	if first {
		f = &finding{done: make(chan struct{})}
		p.next = f
	}
	p.mu.Unlock()
	if first {
		p.answer(f)
	}
	select {
	case <-f.done:
		return f.stream, f.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// answer does not end with the client who happened to be the first.
func (p *past) answer(f *finding) {
	defer close(f.done)
	p.asking <- struct{}{}
	defer func() {
		if p.many() {
			time.AfterFunc(findEvery, func() { <-p.asking })
		} else {
			<-p.asking
		}
	}()
	f.stream, f.err = limited(context.Background(), p, func(ctx context.Context) (jetstream.Stream, error) {
		p.mu.Lock()
		p.next = nil
		p.mu.Unlock()
		name := p.cfg.Load().NATSStreamName
		s, err := p.js.Stream(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("find stream %s: %w", name, err)
		}
		return s, nil
	})
}

// replay reads several subjects in the order of the stream, pass by pass: each pass goes on where the one before ended.
type replay struct {
	past    *past
	stream  jetstream.Stream // whose library call asks the nearest replica where the stream allows it
	tracks  []track
	since   uint64
	direct  bool      // the stream allows direct gets
	created time.Time // of the stream
	late    bool      // the first pass is over
	held    bool      // it has a turn
	before  int       // events of the overlap so far
	after   int       // events after since so far
}

// overlapRoom is how many events of the overlap may be replayed for each that may be of those missed: the client has had
// almost all of them, and a socket with ten events a second would be refused for these alone.
const overlapRoom = 10

// open prepares to read what came to subjects after since, and what came within RESUME_OVERLAP and up to a second before: redelivery
// reorders, so an older event may have been lost after a newer one had arrived. It returns errTooFar when since is
// expired, too old, beyond the stream's end, or the stream forgets what was acked.
func (p *past) open(ctx context.Context, since uint64, subjects []string) (*replay, error) {
	cfg := p.cfg.Load()
	s, err := p.find(ctx)
	if err != nil {
		return nil, err
	}
	info := s.CachedInfo()
	state := info.State
	switch {
	case info.Config.Retention != jetstream.LimitsPolicy:
		return nil, fmt.Errorf("%w: stream %s has no limits retention", errTooFar, cfg.NATSStreamName)
	case since > state.LastSeq:
		return nil, fmt.Errorf("%w: %d is beyond the stream's end at %d", errTooFar, since, state.LastSeq)
	case since+1 < state.FirstSeq:
		return nil, fmt.Errorf("%w: %d has expired, the stream begins at %d", errTooFar, since, state.FirstSeq)
	}
	r := &replay{past: p, stream: s, since: since, direct: info.Config.AllowDirect, created: info.Created}
	from, x := max(state.FirstSeq, 1), p.indexOf(info.Created)
	at, err := p.storedAt(ctx, x, since, from)
	if err != nil {
		return nil, err
	}
	oldest := state.FirstTime
	if !at.IsZero() {
		oldest = at
	}
	if state.Msgs > 0 && oldest.Before(state.LastTime.Add(-cfg.ResumeMaxAge)) {
		return nil, fmt.Errorf("%w: %d is older than %s", errTooFar, since, cfg.ResumeMaxAge)
	}
	if !at.IsZero() {
		from, err = p.firstSince(ctx, x, at.Add(-cfg.ResumeOverlap))
		if errors.Is(err, jetstream.ErrMsgNotFound) { // all was removed meanwhile
			from, err = state.LastSeq+1, nil
		}
		if err != nil {
			return nil, err
		}
	}
	for _, subject := range subjects {
		r.tracks = append(r.tracks, track{subject: subject, from: from})
	}
	return r, nil
}

// storedAt is the time of the message seq or, where it was removed from within the stream, of one before it: the overlap is
// counted from there. It is zero when there is none from first on.
func (p *past) storedAt(ctx context.Context, x *index, seq, first uint64) (at time.Time, err error) {
	if at := x.storedAt(seq); seq >= first && !at.IsZero() {
		return at, nil
	}
	for back := uint64(0); seq >= first+back; back = max(1, 2*back) {
		m, err := p.ask(ctx, map[string]any{"seq": seq - back, "next_by_subj": ">"})
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && m.Sequence > seq {
			continue
		}
		if err != nil {
			return at, err
		}
		return m.Time, nil
	}
	return at, nil
}

// firstSince is the first sequence that was stored in the second of at or later. Whole seconds, because the clients of a dead pod
// ask for much the same.
func (p *past) firstSince(ctx context.Context, x *index, at time.Time) (uint64, error) {
	at = at.Truncate(time.Second)
	if seq := x.firstSince(at); seq > 0 {
		return seq, nil
	}
	m, err := p.ask(ctx, map[string]any{"next_by_subj": ">", "start_time": at})
	if err != nil {
		return 0, err
	}
	x.noteFirst(at, m.Sequence)
	return m.Sequence, nil
}

// last asks for the stream's last sequence.
func (r *replay) last(ctx context.Context) (uint64, error) {
	s, err := r.past.find(ctx)
	if err != nil {
		return 0, err
	}
	return s.CachedInfo().State.LastSeq, nil
}

// pass hands f every event up to the sequence to, in order, and returns how many there were. It stops with errTooFar
// when there are too many, and with f's error.
func (r *replay) pass(ctx context.Context, to uint64, f func(*event) error) (n int, err error) {
	if !r.late {
		r.past.started() // not before: of thousands that are opened at once the last have their turn much later
	}
	if err := r.cover(ctx, to); err != nil {
		slog.Debug("index of the stream not brought up to date", "err", err)
	}
	r.late = true
	for {
		var next *track
		for i := range r.tracks {
			t := &r.tracks[i]
			if err := r.fill(ctx, t, to); err != nil {
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
		ev, err := r.past.decode(msg)
		if err != nil {
			continue // malformed: it was never delivered either
		}
		if err := r.count(ev.seq); err != nil {
			return n, err
		}
		if err := f(ev); err != nil {
			return n, err
		}
		n++
	}
}

// count returns errTooFar when the event seq is one too many.
func (r *replay) count(seq uint64) error {
	limit := r.past.cfg.Load().ResumeMaxEvents
	if seq > r.since {
		r.after++
	} else {
		r.before++
	}
	switch {
	case r.after > limit:
		return fmt.Errorf("%w: more than RESUME_MAX_EVENTS", errTooFar)
	case r.before > overlapRoom*limit:
		return fmt.Errorf("%w: more than %d times RESUME_MAX_EVENTS in the overlap", errTooFar, overlapRoom)
	}
	return nil
}

func (p *past) decode(msg *jetstream.RawStreamMsg) (*event, error) {
	ev, err := parseSubject(p.cfg.Load().NATSSubjectPrefix, msg.Subject)
	if err == nil {
		err = checkPayload(msg.Data)
	}
	if err != nil {
		return nil, err
	}
	ev.seq, ev.stored, ev.payload = msg.Sequence, msg.Time, msg.Data
	ev.frame = newEventFrame(&ev, true, p.cfg.Load().EventsTypeInPayload)
	return &ev, nil
}

// fill finds the next message of t, if t may have one up to the sequence to. "Nothing more" is believed of the leader
// alone; who was told so a moment ago asks it again at once.
func (r *replay) fill(ctx context.Context, t *track, to uint64) (err error) {
	if t.head != nil || t.from > to {
		return nil
	}
	if found, err := r.fillByIndex(ctx, t); found || err != nil {
		return err
	}
	if t.from > to {
		return nil
	}
	if !t.atEnd {
		t.head, err = r.get(ctx, t.from, jetstream.WithGetMsgSubject(t.subject))
		if !errors.Is(err, jetstream.ErrMsgNotFound) && (err != nil || !disguised(t.head)) {
			return err
		}
	}
	t.head, err = r.past.ask(ctx, map[string]any{"next_by_subj": t.subject, "seq": t.from})
	if t.atEnd = errors.Is(err, jetstream.ErrMsgNotFound); t.atEnd {
		t.from = to + 1 // asked after the stream's end was known: there is none up to it
		return nil
	}
	return err
}

// fillByIndex goes on as far as the index reaches, if it knows t's place.
func (r *replay) fillByIndex(ctx context.Context, t *track) (found bool, err error) {
	x := r.past.indexOf(r.created)
	if x == nil || strings.Contains(t.subject, "*") {
		return false, nil
	}
	start := t.from
	for t.head == nil {
		seq, kept, next, ok := x.after(t.subject, t.from)
		switch {
		case !ok:
			return false, nil
		case seq == 0:
			t.from = next
			return false, nil
		}
		t.from, t.atEnd = seq, false
		if kept != nil {
			t.head = kept
			return true, nil
		}
		t.head, err = r.get(ctx, seq)
		if errors.Is(err, jetstream.ErrMsgNotFound) || err == nil && !t.isHead(seq) { // removed meanwhile, disguised, or a replica is behind
			t.head, err = r.past.ask(ctx, map[string]any{"seq": seq})
		}
		switch {
		case err == nil && !t.isHead(seq): // the stream was made anew, or lost its end, and this is somebody else's
			t.head, t.from = nil, start
			r.past.index.CompareAndSwap(x, nil)
			return false, nil
		case errors.Is(err, jetstream.ErrMsgNotFound):
			t.from++
		case err != nil:
			return false, err
		}
	}
	return true, nil
}

func (t *track) isHead(seq uint64) bool { return t.head.Sequence == seq && t.head.Subject == t.subject }

// disguised says whether m came with a publisher's own headers of those names, which the library takes for the server's: such as
// a message that was read from a stream and is published again.
func disguised(m *jetstream.RawStreamMsg) bool {
	return len(m.Header.Values(jetstream.SequenceHeader)) > 1 || len(m.Header.Values(jetstream.SubjectHeader)) > 1
}

func (r *replay) get(ctx context.Context, seq uint64, opts ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	m, err := limited(ctx, r.past, func(ctx context.Context) (*jetstream.RawStreamMsg, error) { return r.stream.GetMsg(ctx, seq, opts...) })
	if err != nil {
		return nil, fmt.Errorf("read stream from %d: %w", seq, err)
	}
	return m, nil
}

// ask has the stream's leader find a message (the request is that of JSApiMsgGetRequest; start_time needs a server of
// 2.11 or newer).
func (p *past) ask(ctx context.Context, request map[string]any) (*jetstream.RawStreamMsg, error) {
	name := p.cfg.Load().NATSStreamName
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	answer, err := limited(ctx, p, func(ctx context.Context) (*nats.Msg, error) {
		return p.nc.RequestWithContext(ctx, apiPrefix(p.cfg.Load())+"STREAM.MSG.GET."+name, body)
	})
	if err != nil {
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, err)
	}
	var found struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject string    `json:"subject"`
			Seq     uint64    `json:"seq"`
			Data    []byte    `json:"data"`
			Time    time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(answer.Data, &found); err != nil {
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, err)
	}
	switch {
	case found.Error != nil && found.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, jetstream.ErrMsgNotFound
	case found.Error != nil:
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, found.Error)
	case found.Message == nil:
		return nil, fmt.Errorf("ask for a message of stream %s: empty answer", name)
	}
	m := found.Message
	return &jetstream.RawStreamMsg{Subject: m.Subject, Sequence: m.Seq, Data: m.Data, Time: m.Time}, nil
}
