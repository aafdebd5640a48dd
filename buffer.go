package main

import (
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	ringKept    = 16   // items whose memory an empty ring keeps
	maxReplies  = 16   // replies that wait before the read loop has to
	maxPongs    = 1024 // bytes of pongs that wait before the read loop has to
	writtenSeqs = 256  // sequences that a socket remembers as written
	ringAtFirst = 8    // items of a ring's first allocation
)

// sendPolicy is what all rings of a hub share.
type sendPolicy struct {
	size         int  // events that a ring holds
	block        bool // WEBSOCKET_DROP_POLICY: block rather than drop_oldest
	blockTimeout time.Duration
	threshold    int                 // bytes of a message from which on it is compressed, for sockets that negotiated it
	gaps         func(reason string) // counts a gap that was noted anew

	latest atomic.Pointer[position] // the pod's newest; nil before the first
}

// position says that a client has had everything up to seq; the frame is shared by all sockets.
type position struct {
	place
	frame *frame
}

// positionEvery is how often a busy socket is given its position at most; a quiet one gets it with the heartbeat.
const positionEvery = time.Second

// phase is what a socket's ring does with live events.
type phase uint8

const (
	replaying phase = iota // they are left to the replay that runs, or is about to
	live                   // they are queued
	closing                // nothing is pushed any more; replies that wait and then the close frame are still written
	closed                 // all was written, or nothing can be
)

// item is one thing that waits to be written: an event, or a reply where d is nil.
type item struct {
	f      *frame
	d      *delivery
	at     time.Time // when it was pushed
	packed bool      // f's compressed form is what is written
	place  *place    // what the client knows once this is written; nil = nothing new
}

// place is a position of a stream.
type place struct {
	seq    uint64
	stream string
}

// settlement is a delivery with its end at this socket. The ring only collects them: its callers settle when they have
// let the lock go, because settling calls the router, which may come back for another ring.
type settlement struct {
	d *delivery
	o outcome
}

// writerState says whose turn it is to write.
type writerState uint8

const (
	idle   writerState = iota // nothing waits, or it may not be written yet
	queued                    // in the list of its shared writer
	alone                     // a goroutine of the socket's own writes
)

// ring is the queue of one socket: a FIFO of events and replies, so that a confirmation stands exactly between the
// events before and after it, and control frames, which go first (RFC 6455 section 5.5). A writer takes a batch out and
// owns it: nothing but the end of the ring touches it then. So each delivery is in one place and is settled exactly
// once. The ring allocates when it is used and lets its memory go when it is empty.
//
// Under block, the events beyond the policy's size are those "behind the ring": no second queue, only a deadline that
// counts for as long as an event is among them.
type ring struct {
	// Constant.
	policy  *sendPolicy
	deflate bool // compression was negotiated

	mu     sync.Mutex // guards all below
	items  []item     // circular; a power of two long
	head   int
	n      int
	events int    // deliveries among the items
	ctrl   []byte // pings and pongs, whole frames
	out    *batch // what the writer has taken and not written yet; nil = nothing

	state  writerState
	opened bool // the handshake is done: bytes may be written
	ready  bool // `ready` is queued: items may be written

	phase   phase
	chat    string // the selected one
	joins   []*delivery
	written seqSet

	positions bool      // the client keeps positions; constant after begin
	place     place     // the last position that was written whole, that an answer has, or that the client came with
	given     uint64    // the last position that was queued: the client has had everything up to it, or is about to
	answered  bool      // no replay runs, and the last one's answer is queued: positions may follow
	owes      bool      // a gap was noted and no replay has paid it yet: no positions
	due       bool      // a position is wanted with the heartbeat
	offered   time.Time // when one was queued last

	room chan struct{} // made by the read loop when it waits for room, closed by who makes it
	done chan struct{} // made by waitDone, closed by who makes the ring ended and idle
}

// seqSet remembers the last writtenSeqs sequences that were added. A look-up scans: only redeliveries ask.
type seqSet struct {
	seqs []uint64
	next int
}

func (s *seqSet) add(seq uint64) {
	if len(s.seqs) < writtenSeqs {
		s.seqs = append(s.seqs, seq)
		return
	}
	s.seqs[s.next] = seq
	s.next = (s.next + 1) % writtenSeqs
}

func (s *seqSet) has(seq uint64) bool { return slices.Contains(s.seqs, seq) }

// push queues d, or says in out how it ended instead; out may also get what had to make room. kick says that the caller
// must hand the socket to its writer.
func (r *ring) push(d *delivery, now time.Time, out []settlement) (_ []settlement, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case r.phase >= closing:
		return append(out, settlement{d, gone}), false
	case d.kind == kindMessage && d.chat != r.chat:
		return append(out, settlement{d, unselected}), false
	case r.phase == replaying:
		return append(out, settlement{d, replayed}), false
	case d.seq <= r.given || d.count > 1 && r.written.has(d.seq):
		return append(out, settlement{d, duplicate}), false
	case d.count > 1 && r.holdsLocked(d.seq):
		r.joins = append(r.joins, d)
		return out, false
	}
	if r.events >= r.policy.size {
		if !r.policy.block {
			out = r.dropLocked(out)
		} else if out = r.expireLocked(now, out); r.events >= 2*r.policy.size {
			return append(out, settlement{d, failed}), false
		}
	}
	r.insertLocked(r.n, item{f: d.frame, d: d, at: now})
	return out, r.kickLocked()
}

// behind says whether the ring is full only because its shared writer has not come to it yet: the socket takes what it gets.
func (r *ring) behind() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state == queued && r.events >= r.policy.size
}

// holdsLocked says whether the event waits or is being written here.
func (r *ring) holdsLocked(seq uint64) bool {
	for i := range r.n {
		if it := r.at(i); it.d != nil && it.d.seq == seq {
			return true
		}
	}
	return r.out != nil && slices.ContainsFunc(r.out.items, func(it item) bool { return it.d != nil && it.d.seq == seq })
}

// settleLocked adds d's end to out, and that of the redeliveries that joined it.
func (r *ring) settleLocked(d *delivery, o outcome, out []settlement) []settlement {
	out = append(out, settlement{d, o})
	if len(r.joins) == 0 {
		return out
	}
	rest := r.joins[:0]
	for _, j := range r.joins {
		if j.seq == d.seq {
			out = append(out, settlement{j, o})
		} else {
			rest = append(rest, j)
		}
	}
	clear(r.joins[len(rest):])
	r.joins = rest
	return out
}

// at returns the i-th item from the head.
func (r *ring) at(i int) *item { return &r.items[(r.head+i)&(len(r.items)-1)] }

// insertLocked puts it before the i-th item.
func (r *ring) insertLocked(i int, it item) {
	if r.n == len(r.items) {
		grown := make([]item, max(ringAtFirst, 2*r.n))
		for k := range r.n {
			grown[k] = *r.at(k)
		}
		r.items, r.head = grown, 0
	}
	for k := r.n; k > i; k-- {
		*r.at(k) = *r.at(k - 1)
	}
	*r.at(i) = it
	r.n++
	if it.d != nil {
		r.events++
	}
}

// removeLocked takes the i-th item out; those before it move up.
func (r *ring) removeLocked(i int) item {
	it := *r.at(i)
	for k := i; k > 0; k-- {
		*r.at(k) = *r.at(k - 1)
	}
	*r.at(0) = item{}
	r.head = (r.head + 1) & (len(r.items) - 1)
	r.n--
	if it.d != nil {
		r.events--
	}
	r.shrinkLocked()
	return it
}

// dropLocked gives up the oldest event that no writer has taken; a gap takes its place.
func (r *ring) dropLocked(out []settlement) []settlement {
	i := 0
	for i < r.n && r.at(i).d == nil {
		i++
	}
	if i == r.n {
		return out
	}
	it := r.removeLocked(i)
	r.gapLocked("buffer", i, it.at)
	return r.settleLocked(it.d, dropped, out)
}

// siftLocked takes the items for which goes says so out of the ring and settles their events as o.
func (r *ring) siftLocked(goes func(*item) bool, o outcome, out []settlement) []settlement {
	kept := 0
	for i := range r.n {
		it := *r.at(i)
		if goes(&it) {
			if it.d != nil {
				r.events--
				out = r.settleLocked(it.d, o, out)
			}
			continue
		}
		*r.at(kept) = it
		kept++
	}
	for i := kept; i < r.n; i++ {
		*r.at(i) = item{}
	}
	r.n = kept
	r.shrinkLocked()
	return out
}

// trim lets the memory of an empty ring go that is kept for the next burst.
func (r *ring) trim() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.n == 0 {
		r.items, r.head = nil, 0
	}
}

// shrinkLocked lets the memory of an empty ring go, but not so much that every burst allocates.
func (r *ring) shrinkLocked() {
	if r.n == 0 && len(r.items) > ringKept {
		r.items, r.head = nil, 0
	}
}

// expireLocked fails the events behind the ring whose time for getting room is over. They are the youngest
// waiting - size; their age falls from the first to the last.
func (r *ring) expireLocked(now time.Time, out []settlement) []settlement {
	if !r.policy.block || r.events <= r.policy.size {
		return out
	}
	before := 0 // events seen that are within the ring
	for i := 0; i < r.n; i++ {
		it := r.at(i)
		if it.d == nil {
			continue
		}
		if before++; before <= r.policy.size {
			continue
		}
		if now.Sub(it.at) < r.policy.blockTimeout {
			break
		}
		out = r.settleLocked(r.removeLocked(i).d, failed, out)
		i, before = i-1, before-1
	}
	return out
}

// expire is called for sockets that do not take their events now; no one else would.
func (r *ring) expire(now time.Time, out []settlement) []settlement {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.expireLocked(now, out)
}

// gap notes that events may be missing, before all that is queued from now on. A socket that leaves them to a replay has it paid when
// it goes live.
func (r *ring) gap(reason string, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return false
	}
	r.gapLocked(reason, r.n, now)
	return r.kickLocked()
}

// gapLocked puts the announcement of a gap before the i-th item, unless one waits already, and takes back positions that wait: the
// client is given none until it has resumed.
func (r *ring) gapLocked(reason string, i int, at time.Time) {
	r.owes = true
	for k := range r.n {
		if r.at(k).f.label == "gap" {
			return
		}
	}
	r.policy.gaps(reason)
	r.insertLocked(i, item{f: newGap(r.place.seq, reason), at: at})
	r.siftLocked(func(it *item) bool { return it.f.label == "position" }, gone, nil)
}

// begin takes what a client says of itself when it connects. One that has no position is live from now on: no replay has what comes, so
// it waits behind the greeting, also for a client that never resumes.
func (r *ring) begin(p past) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.positions, r.place, r.chat = p.positions, place{p.since, p.stream}, p.chat
	if p.stream == "" && r.phase == replaying {
		r.phase = live
	}
}

// beginReplay leaves live events to the replay that follows, and lets what that writes go out before the greeting. It returns the
// position to begin behind; stream is "" where there is none.
func (r *ring) beginReplay() (from uint64, stream string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == live {
		r.phase = replaying
	}
	r.ready, r.answered = true, false
	return r.place.seq, r.place.stream
}

// replay queues an event of the past like a reply.
func (r *ring) replay(f *frame, now time.Time) (kick bool) { return r.reply(f, now) }

// goLive has events queued again from now on. Gaps noted so far are paid: the end of the stream that the last pass of a replay reads up
// to is asked for after this.
func (r *ring) goLive() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase == replaying {
		r.phase, r.owes = live, false
		r.siftLocked(func(it *item) bool { return it.f.label == "gap" }, gone, nil)
	}
}

// confirm queues the answer of a replay, which carries a position of that stream; nil for a socket that has none.
func (r *ring) confirm(f *frame, stream string, position *uint64, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return false
	}
	r.insertLocked(r.n, r.answerLocked(f, stream, position, now))
	return r.kickLocked()
}

// greet is confirm for the `ready` of a fresh socket: it stands before the events that came since the ring went live, and lets all be
// written.
func (r *ring) greet(f *frame, stream string, position *uint64, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return false
	}
	r.insertLocked(0, r.answerLocked(f, stream, position, now))
	r.ready = true
	return r.kickLocked()
}

func (r *ring) answerLocked(f *frame, stream string, position *uint64, now time.Time) item {
	it := item{f: f, at: now}
	r.given = 0 // of another stream, maybe
	if position != nil {
		// Not only once it is written: the client may have it, and resume, before the writer has said so. What is replayed then stands
		// behind it.
		r.place, r.given = place{*position, stream}, *position
	}
	r.answered = true
	return it
}

// offerLocked queues the pod's newest position behind all that waits, if the client is to have it now. With the heartbeat it is to have
// one in any case, which says that the connection lives.
func (r *ring) offerLocked(now time.Time) {
	p := r.policy.latest.Load()
	if p == nil || !r.positions || r.phase != live || !r.answered || r.owes {
		return
	}
	news := p.seq > r.given
	if !r.due && (!news || r.events == 0 || now.Sub(r.offered) < positionEvery) {
		return
	}
	it := item{f: p.frame, at: now}
	if news {
		it.place, r.given = &p.place, p.seq
	}
	r.insertLocked(r.n, it)
	r.offered, r.due = now, false
}

// wantPosition has the next write bring the client's position.
func (r *ring) wantPosition() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.due = true
}

// forget is called when the stream is another one: its sequences start again and name other events.
func (r *ring) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.written, r.given = seqSet{}, 0
}

// reply queues a message that is not an event. It is never dropped and does not count against the policy's size: the
// read loop, the only one that causes replies, waits for room (waitRoom).
func (r *ring) reply(f *frame, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return false
	}
	r.insertLocked(r.n, item{f: f, at: now})
	return r.kickLocked()
}

// control queues a ping or pong.
func (r *ring) control(op byte, p []byte) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return false
	}
	r.ctrl = appendControl(r.ctrl, op, p)
	return r.kickLocked()
}

// waitRoom returns once few enough replies and pongs wait, or the ring is closed. This is what bounds the memory that a
// client costs which sends and does not read.
func (r *ring) waitRoom() {
	for {
		r.mu.Lock()
		if r.phase >= closing || r.roomLocked() {
			r.mu.Unlock()
			return
		}
		if r.room == nil {
			r.room = make(chan struct{})
		}
		room := r.room
		r.mu.Unlock()
		<-room
	}
}

func (r *ring) roomLocked() bool {
	return r.n-r.events < maxReplies && len(r.ctrl) < maxPongs
}

// open allows bytes to be written: the handshake is done.
func (r *ring) open() (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = true
	return r.kickLocked()
}

// look tells an operator the selected chat and how many events are not written yet.
func (r *ring) look() (chat string, events int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chat, r.unwrittenLocked()
}

// selected makes chat the selected one, in one step: messages of the chat before that still wait are not for this socket any more, and
// those of the new one stand behind the confirmation f.
func (r *ring) selected(chat string, f *frame, now time.Time, out []settlement) (_ []settlement, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return out, false
	}
	if r.chat != chat {
		out = r.siftLocked(func(it *item) bool { return it.d != nil && it.d.kind == kindMessage }, unselected, out)
	}
	r.chat = chat
	r.insertLocked(r.n, item{f: f, at: now})
	return out, r.kickLocked()
}

// selection is the chat whose messages this socket gets now, "" for none.
func (r *ring) selection() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chat
}

// close ends the ring: its events are gone, but for those of a write that is under way, which its writer settles. Replies and then the
// close frame are still written; without one, nothing that waits. Only the first call does anything.
func (r *ring) close(last []byte, now time.Time, out []settlement) (_ []settlement, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.phase >= closing {
		return out, false
	}
	r.phase = closing
	// A gap before `ready` would hold the close frame up.
	out = r.siftLocked(func(it *item) bool { return it.d != nil || !r.ready || last == nil }, gone, out)
	out = r.giveUpLocked(out)
	r.written, r.ready = seqSet{}, true
	if last != nil {
		r.insertLocked(r.n, item{f: &frame{b: last}, at: now})
	} else {
		r.ctrl = nil
	}
	r.noticeLocked()
	return out, r.kickLocked()
}

// giveUpLocked settles the events of the writer's batch as gone, unless a write is under way: the ring is closed. The frame that was begun
// stays, for the framing's sake only: whether it gets through is not waited for.
func (r *ring) giveUpLocked(out []settlement) []settlement {
	b := r.out
	if b == nil || b.writing {
		return out
	}
	kept := b.items[:0]
	for i, it := range b.items {
		if it.d != nil {
			out = r.settleLocked(it.d, gone, out)
			it.d = nil
			if i > 0 || b.begun == 0 {
				continue
			}
		}
		kept = append(kept, it)
	}
	clear(b.items[len(kept):])
	b.items = kept
	return out
}

// noticeLocked is called when something was written, given up or closed, or the turn was given back. It forgets a batch of which nothing
// is left, notices that all was written which a closed ring still writes, and wakes waitRoom and waitDone.
func (r *ring) noticeLocked() {
	if r.out != nil && len(r.out.items) == 0 {
		r.out = nil
	}
	if r.phase == closing && r.out == nil && r.n == 0 && len(r.ctrl) == 0 {
		r.phase = closed
	}
	if r.room != nil && (r.phase >= closing || r.roomLocked()) {
		close(r.room)
		r.room = nil
	}
	if r.done != nil && r.phase == closed && r.state == idle {
		close(r.done)
		r.done = nil
	}
}

// somethingLocked says whether a writer would find something to write.
func (r *ring) somethingLocked() bool {
	return r.out != nil || r.opened && (len(r.ctrl) > 0 || r.ready && r.n > 0)
}

// kickLocked takes the turn for the socket's shared writer if nobody has it and there is something to write; the caller
// must then hand the socket over.
func (r *ring) kickLocked() bool {
	if r.state != idle || !r.somethingLocked() {
		return false
	}
	r.state = queued
	return true
}

// take moves what is to be written next into b: control frames first, behind a frame that was begun, and items up to room bytes, or one
// that is larger. Whoever has the turn calls it with the same b until all of that is written, and wrote or fail after it unless b is
// empty; or take once more, if it returned a frame that must be compressed first.
func (r *ring) take(b *batch, room int, now time.Time) (raw *frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fresh := r.out == nil
	if fresh {
		clear(b.items) // what the failed connection of another socket has left
		*b = batch{items: b.items[:0], progress: now}
	}
	if !r.somethingLocked() {
		return nil
	}
	if fresh {
		if r.ready {
			r.offerLocked(now)
			if raw := r.rawLocked(room); raw != nil {
				return raw
			}
		}
		r.out = b
	}
	b.writing = true
	// One at a time, so that what a client's pings cause stays bounded while it takes little.
	if first := min(b.begun, 1); len(r.ctrl) > 0 && (first == len(b.items) || !b.items[first].f.control()) {
		b.items = slices.Insert(b.items, first, item{f: &frame{b: r.ctrl}, at: now})
		room, r.ctrl = room-len(r.ctrl), nil
	}
	for fresh && r.ready && r.n > 0 {
		if room -= len(r.at(0).bytes()); room < 0 && len(b.items) > 0 {
			break
		}
		b.items = append(b.items, r.removeLocked(0))
	}
	return nil
}

// rawLocked decides which of the items that come next are written compressed. It returns the first whose compressed
// form is still to be made: that takes its time, so it is not done under the lock. room is what one write takes.
func (r *ring) rawLocked(room int) *frame {
	if !r.deflate {
		return nil
	}
	for i := 0; i < r.n && room > 0; i++ {
		it := r.at(i)
		if r.policy.compressible(it.f) {
			if !it.f.packed.Load() {
				return it.f
			}
			it.packed = true
		}
		room -= len(it.bytes())
	}
	return nil
}

// wrote takes the first n bytes out of the batch that take gave and adds the deliveries whose whole frame is among them to out.
// sent is called, under the lock, for each message that was written. ended says that nothing will be written any more.
func (r *ring) wrote(n int, now time.Time, out []settlement, sent func(*frame, *delivery)) (_ []settlement, ended bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.out
	b.writing = false
	if n > 0 {
		b.progress = now
	}
	b.begun += n
	whole := 0
	for ; whole < len(b.items) && b.begun >= len(b.items[whole].bytes()); whole++ {
		b.begun -= len(b.items[whole].bytes())
		out = r.writtenLocked(&b.items[whole], out, sent)
	}
	b.items = slices.Delete(b.items, 0, whole)
	if r.phase == closing {
		out = r.giveUpLocked(out)
	}
	r.noticeLocked()
	return out, r.phase == closed
}

// writtenLocked is called for each item the whole frame of which was written.
func (r *ring) writtenLocked(it *item, out []settlement, sent func(*frame, *delivery)) []settlement {
	if it.f.control() {
		return out
	}
	sent(it.f, it.d)
	if it.place != nil {
		r.place = *it.place
	}
	if it.d == nil {
		return out
	}
	if r.phase < closing {
		r.written.add(it.d.seq)
	}
	return r.settleLocked(it.d, written, out)
}

// fail ends a closed ring, which holds no events, because its connection can't be written to any more: what its writer had is gone. Whoever
// has the turn calls it.
func (r *ring) fail(out []settlement) []settlement {
	r.mu.Lock()
	defer r.mu.Unlock()
	out = r.giveUpLocked(out)
	r.out, r.ctrl, r.items, r.head, r.n = nil, nil, nil, 0, 0
	r.noticeLocked()
	return out
}

// rest gives the turn back unless something waits to be written.
func (r *ring) rest() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.somethingLocked() {
		return false
	}
	r.state = idle
	r.noticeLocked()
	return true
}

// waitDone waits until no writer touches the socket any more, or until timeout; then it returns false.
func (r *ring) waitDone(timeout <-chan time.Time) bool {
	r.mu.Lock()
	if r.phase == closed && r.state == idle {
		r.mu.Unlock()
		return true
	}
	if r.done == nil {
		r.done = make(chan struct{})
	}
	done := r.done
	r.mu.Unlock()
	select {
	case <-done:
		return true
	case <-timeout:
		return false
	}
}

// goAlone passes the turn from the shared writer to a goroutine of the socket's own, and what is left of the writer's batch with it:
// the shared writer needs its memory.
func (r *ring) goAlone() *batch {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = alone
	own := &batch{}
	if b := r.out; b != nil {
		*own = *b
		own.items = slices.Clone(b.items)
		clear(b.items)
		b.items = b.items[:0]
		r.out = own
	}
	return own
}

// unwrittenLocked counts the events that wait or are with the writer.
func (r *ring) unwrittenLocked() int {
	n := r.events
	if r.out != nil {
		for _, it := range r.out.items {
			if it.d != nil {
				n++
			}
		}
	}
	return n
}

// overdue says whether something that the writer has taken waits for longer than timeout.
func (r *ring) overdue(now time.Time, timeout time.Duration) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.phase < closing && r.out != nil && now.Sub(r.out.items[0].at) >= timeout
}

// stuckEvents counts the unwritten events of a socket that writes alone and does not take them. One that the kernel refuses for a
// moment does: the publisher of a bulk is faster than any reader, and to give up events at once lost a third of 200 of 900 KiB
// (measured), while the router can as well leave them in the stream for that time.
func (r *ring) stuckEvents(now time.Time) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	b := r.out
	if r.state != alone || r.phase >= closing || b == nil || now.Sub(b.progress) < slowPause && now.Sub(b.items[0].at) < slowAge {
		return 0
	}
	return r.unwrittenLocked()
}
