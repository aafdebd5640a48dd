package main

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// To find the next event of a subject, a server looks at every message between it and the last one, 40 ns each, for each of
// the subjects of each client that resumes: 5,000 clients of a dead pod kept it busy for 16 s. To hand all messages out once,
// and have this pod note their places, costs it 6 µs for each message: less from some sixty replays on, however far they go.
const (
	indexReplays = 64               // so many that begin
	indexWindow  = 10 * time.Second // within this time are worth an index, which is kept for as long behind the last one
	indexLength  = 500_000          // messages that a replay may go back to be worth it; the index drops what is twice as long
	indexMargin  = 10_000           // messages that the index begins earlier than the first replay, for those that follow
	indexBatch   = 64               // messages of one request: meanwhile the server stores nothing
	indexBytes   = 128 << 10
	indexPause   = time.Millisecond // between two, at the most
	indexKeep    = 64 << 20         // bytes of messages that it keeps, the newest, so that they need not be read a second time
	indexRecord  = 100              // what one of them takes besides subject and payload, about
	indexChunk   = 1 << 20          // they are joined in chunks of so many bytes: little for the garbage collector to look at
)

// index tells the sequences of each subject's messages in a part of the stream, while many replays begin.
type index struct {
	created time.Time // of the stream
	connect uint64    // to the server, by number
	seed    maphash.Seed
	first   uint64 // it knows all messages from this one on

	mu    sync.Mutex          // guards all below
	next  uint64              // it knows none from this one on
	seqs  map[uint64][]uint64 // by the hash of the subject: two subjects may share one
	kept  map[uint64]keptMsg  // by sequence: the newest
	size  int                 // of these, bytes
	tail  uint64              // none before this one is kept
	chunk []byte              // room for more of them
	begin map[int64]uint64    // by s since 1970: first sequence stored then or later, which may be before x.first
}

// keptMsg is a message that the index keeps.
type keptMsg struct {
	text    []byte // subject and payload
	subject int    // length
	stored  int64  // ns since 1970
}

func newIndex(created time.Time, connect, first uint64) *index {
	return &index{
		created: created, connect: connect, seed: maphash.MakeSeed(), first: first, next: first,
		seqs: map[uint64][]uint64{}, kept: map[uint64]keptMsg{}, tail: first, begin: map[int64]uint64{},
	}
}

// indexOf is the index, if it is of the stream that was made then and of this connection.
func (p *past) indexOf(created time.Time) *index {
	x := p.index.Load()
	if x == nil || !x.created.Equal(created) || x.connect != p.connects() {
		return nil
	}
	return x
}

// expect notes that a client will resume when it has its session, until done is called. Those of a pod that was killed wait for a
// second and then begin all at once: the first of them read by subject, until so many had begun that there was an index.
func (p *past) expect() (done func()) {
	p.expected.Add(1)
	return func() { p.expected.Add(-1) }
}

// started notes that a replay's first pass begins. The index goes when they have not been many for indexWindow: a few, as every
// pod has them, would keep it for ever, and it is not read on for them.
func (p *past) started() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starts[p.count%indexReplays] = time.Now()
	p.count++
	if p.manyLocked() {
		p.keepLocked()
	}
}

// keepLocked has an index stay for indexWindow from now.
func (p *past) keepLocked() {
	if p.idle == nil {
		p.idle = time.AfterFunc(indexWindow, func() { p.index.Store(nil) })
	}
	p.idle.Reset(indexWindow)
}

// many says whether replays begin so close together that an index is worth it.
func (p *past) many() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.manyLocked()
}

func (p *past) manyLocked() bool {
	return p.expected.Load() >= indexReplays || time.Since(p.starts[p.count%indexReplays]) < indexWindow
}

// after finds the first message, probably of subject, from the sequence from on, and the message itself if it is kept and of subject; 0 when
// there is none before next. It says false when the index does not know.
func (x *index) after(subject string, from uint64) (seq uint64, kept *jetstream.RawStreamMsg, next uint64, ok bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if from < x.first || from >= x.next {
		return 0, nil, 0, false
	}
	all := x.seqs[maphash.String(x.seed, subject)]
	if i, _ := slices.BinarySearch(all, from); i < len(all) {
		if m, ok := x.kept[all[i]]; ok && string(m.text[:m.subject]) == subject {
			kept = &jetstream.RawStreamMsg{Subject: subject, Sequence: all[i], Data: m.text[m.subject:], Time: time.Unix(0, m.stored)}
		}
		return all[i], kept, x.next, true
	}
	return 0, nil, x.next, true
}

// storedAt is the time of the message seq, zero unless it is kept. x may be nil here and in what follows.
func (x *index) storedAt(seq uint64) time.Time {
	if x == nil {
		return time.Time{}
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	if m, ok := x.kept[seq]; ok {
		return time.Unix(0, m.stored)
	}
	return time.Time{}
}

// firstSince is the sequence noted for at, 0 for none.
func (x *index) firstSince(at time.Time) uint64 {
	if x == nil {
		return 0
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.begin[at.Unix()]
}

// noteFirst remembers firstSince.
func (x *index) noteFirst(at time.Time, seq uint64) {
	if x == nil {
		return
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	x.begin[at.Unix()] = seq
}

// note adds the next message.
func (x *index) note(subject string, seq uint64, stored time.Time, data []byte) {
	x.mu.Lock()
	defer x.mu.Unlock()
	hash := maphash.String(x.seed, subject)
	x.seqs[hash] = append(x.seqs[hash], seq)
	x.next = seq + 1
	begin, size := len(x.chunk), len(subject)+len(data)
	if begin+size > cap(x.chunk) {
		begin, x.chunk = 0, make([]byte, 0, max(indexChunk, size))
	}
	x.chunk = append(append(x.chunk, subject...), data...)
	x.kept[seq] = keptMsg{x.chunk[begin:len(x.chunk):len(x.chunk)], len(subject), stored.UnixNano()}
	for x.size += size + indexRecord; x.size > indexKeep; x.tail++ {
		if old, ok := x.kept[x.tail]; ok {
			x.size -= len(old.text) + indexRecord
			delete(x.kept, x.tail)
		}
	}
}

func (x *index) end() (next uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.next
}

// cover brings the index up to the sequence to, if an index is worth it; one caller at a time, so that the others find it
// done. Where it does not reach, messages are asked for by subject.
func (r *replay) cover(ctx context.Context, to uint64) error {
	p, from := r.past, to
	for _, t := range r.tracks {
		from = min(from, t.from)
	}
	if !r.direct || !p.many() || from == 0 || to-from > indexLength { // 0: the stream is empty
		return nil
	}
	select {
	case p.indexing <- struct{}{}:
		defer func() { <-p.indexing }()
	case <-ctx.Done():
		return ctx.Err()
	}
	connect := p.connects()
	x, first := p.indexOf(r.created), from-min(from-1, indexMargin)
	old := x == nil || x.end() < first || to > x.first+2*indexLength // left behind by fewer replays
	if old && r.late || time.Now().Before(p.noIndex) {
		return nil // a late pass begins where the first ones of others do not
	}
	if old {
		x = newIndex(r.created, connect, first)
		p.index.Store(x)
		p.mu.Lock()
		p.keepLocked() // it may have become worth it since this replay was started
		p.mu.Unlock()
	}
	err := p.extend(ctx, x, to)
	if err != nil && ctx.Err() == nil {
		p.noIndex = time.Now().Add(time.Second) // thousands wait behind this
	}
	return err
}

// extend reads on up to the sequence to.
func (p *past) extend(ctx context.Context, x *index, to uint64) error {
	if x.end() > to {
		return nil
	}
	// A response inbox is subscribed to already: each answer would come twice. And SubscribeSync makes room for 65,536 messages,
	// half a megabyte of garbage each time.
	answers := make(chan *nats.Msg, indexBatch+1)
	sub, err := p.nc.ChanSubscribe(p.nc.NewInbox(), answers)
	if err != nil {
		return fmt.Errorf("subscribe to answers of the stream: %w", err)
	}
	defer sub.Unsubscribe()
	for next := x.end(); next <= to; next = x.end() {
		began := time.Now()
		more, err := limited(ctx, p, func(ctx context.Context) (bool, error) { return p.readBatch(ctx, x, sub.Subject, answers, next) })
		if err != nil {
			return fmt.Errorf("read stream %s from %d for the index: %w", p.cfg.Load().NATSStreamName, next, err)
		}
		// Events of those who are there come in between.
		if !more || !pause(ctx, min(time.Since(began), indexPause)) {
			break
		}
	}
	return nil
}

// readBatch notes the messages from the sequence from on, as many as one request yields (a direct get with a batch, NATS
// 2.11). It says false when a replica has no more; another may.
func (p *past) readBatch(ctx context.Context, x *index, inbox string, answers <-chan *nats.Msg, from uint64) (more bool, err error) {
	request, err := json.Marshal(map[string]any{"seq": from, "batch": indexBatch, "max_bytes": indexBytes})
	if err != nil {
		return false, err
	}
	if err := p.nc.PublishRequest(apiPrefix(p.cfg.Load())+"DIRECT.GET."+p.cfg.Load().NATSStreamName, inbox, request); err != nil {
		return false, err
	}
	for last := "0"; ; {
		var m *nats.Msg
		select {
		case m = <-answers:
		case <-ctx.Done():
			return false, ctx.Err()
		}
		number, behind := ofServer(m, "Nats-Sequence"), ofServer(m, "Nats-Last-Sequence")
		switch status := m.Header.Get("Status"); {
		case number != "" && ofServer(m, "Nats-Stream") != p.cfg.Load().NATSStreamName: // it may have a filter
			return false, fmt.Errorf("a mirror answered: %s", ofServer(m, "Nats-Stream"))
		case number != "": // a message of the stream, whatever its publisher's headers say
		case status == "204": // the batch's end
			if behind != last {
				return false, fmt.Errorf("the batch ended behind %q, not %s", behind, last)
			}
			return last != "0", nil
		case status == "404":
			return false, nil
		default:
			return false, fmt.Errorf("status %s %s", status, m.Header.Get("Description"))
		}
		seq, err := strconv.ParseUint(number, 10, 64)
		if err != nil || behind != last {
			return false, fmt.Errorf("got sequence %q behind %q, not %s", number, behind, last)
		}
		at, err := time.Parse(time.RFC3339Nano, ofServer(m, "Nats-Time-Stamp"))
		if err != nil {
			return false, fmt.Errorf("time of message %s: %w", number, err)
		}
		x.note(ofServer(m, "Nats-Subject"), seq, at, m.Data)
		last = number
	}
}

// ofServer is a header that the server has added, behind those of the publisher: a message may have come with the same ones,
// such as one that was read from a stream and is published again.
func ofServer(m *nats.Msg, key string) string {
	values := m.Header.Values(key)
	if len(values) == 0 {
		return ""
	}
	return values[len(values)-1]
}
