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

	stuck atomic.Int64 // events in the rings of sockets that do not take them now
}

// item is one thing that waits to be written: an event, or a reply where d is nil.
type item struct {
	f      *frame
	d      *delivery
	at     time.Time // when it was pushed
	packed bool      // f's compressed form is what is written
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
// events before and after it, and control frames, which go first (RFC 6455 section 5.5). What a writer has taken stays
// until it says how much was written: whatever else happens to the ring meanwhile, each delivery is in one place and
// is settled exactly once. It allocates when it is used and lets its memory go when it is empty.
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
	flight int // of the items at the head, those that a writer has taken
	events int // deliveries among the items
	stuck  bool

	ctrl  []byte // pings and pongs, whole frames
	taken int    // of ctrl, what a writer has taken
	cut   []byte // rest of a frame of which a part was written; goes before all else
	// pinned: the cut frame is that of the first item, which is therefore in flight even between two writes.
	pinned bool
	busy   bool // a writer is between take and wrote

	state    writerState
	opened   bool      // the handshake is done: bytes may be written
	ready    bool      // `ready` is queued: items may be written
	progress time.Time // when a byte was last written, or the ring began to fill

	gapNoted  bool
	gapSince  uint64
	gapReason string

	chat    string // the selected one
	pending string // the one that is being selected
	held    []item // messages of pending, until its confirmation is queued; all events while holding
	leave   string // what is left to the replay that runs: "" nothing, leaveAll, or the messages of one chat
	since   uint64 // what that replay was asked for
	holding bool   // the replay is at its last pass: events wait for the confirmation
	joins   []*delivery
	written seqSet
	first   uint64 // lowest sequence that the replay under way has queued; 0 = none
	had     span   // of the general events, what a whole replay has queued,
	hadChat span   // and of the selected chat's messages

	closed bool   // nothing is pushed any more; replies that wait and then last are still written
	last   []byte // the close frame
	abrupt bool   // closed without a close frame: nothing is written any more
	ended  bool   // all was written, or nothing can be

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
	case r.closed:
		return append(out, settlement{d, failed}), false
	case d.kind == kindMessage && d.chat != r.chat && d.chat != r.pending:
		// The chat was deselected while the event was on its way: it is not for this socket any more.
		return append(out, settlement{d, duplicate}), false
	case r.leave == leaveAll || r.leave != "" && d.kind == kindMessage && d.chat == r.leave:
		if d.seq <= r.since {
			d.missedHere.Store(true) // it may be older than the overlap, which is all that the replay reaches back
		}
		return append(out, settlement{d, replayed}), false
	case r.hadLocked(d) || d.count > 1 && r.written.has(d.seq):
		return append(out, settlement{d, duplicate}), false
	case d.count > 1 && r.holdsLocked(d.seq):
		r.joins = append(r.joins, d)
		return out, false
	case r.holding || d.kind == kindMessage && d.chat != r.chat:
		return r.holdLocked(item{f: d.frame, d: d, at: now}, out), false
	}
	out = r.acceptLocked(item{f: d.frame, d: d, at: now}, now, out)
	return out, r.kickLocked(now)
}

// behind says whether the ring is full only because its shared writer has not come to it yet: the socket takes what it gets.
func (r *ring) behind() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.state == queued && r.waitingLocked() >= r.policy.size
}

// acceptLocked appends an event, making room as the policy says.
func (r *ring) acceptLocked(it item, now time.Time, out []settlement) []settlement {
	if r.waitingLocked() >= r.policy.size {
		if !r.policy.block {
			out = r.dropLocked(dropped, "buffer", out)
		} else if out = r.expireLocked(now, out); r.waitingLocked() >= 2*r.policy.size {
			return r.settleLocked(it.d, failed, out)
		}
	}
	r.insertLocked(r.n, it)
	return out
}

// waitingLocked counts the events that no writer has taken.
func (r *ring) waitingLocked() int {
	w := r.events
	for i := range r.flight {
		if r.at(i).d != nil {
			w--
		}
	}
	return w
}

// holdsLocked says whether the event waits or is being written here.
func (r *ring) holdsLocked(seq uint64) bool {
	for i := range r.n {
		if it := r.at(i); it.d != nil && it.d.seq == seq {
			return true
		}
	}
	return slices.ContainsFunc(r.held, func(it item) bool { return it.d.seq == seq })
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
		r.countLocked(1)
	}
}

// removeLocked takes the i-th item out; those before it move up, so that what is in flight stays at the head.
func (r *ring) removeLocked(i int) item {
	it := *r.at(i)
	for k := i; k > 0; k-- {
		*r.at(k) = *r.at(k - 1)
	}
	*r.at(0) = item{}
	r.head = (r.head + 1) & (len(r.items) - 1)
	r.n--
	if it.d != nil {
		r.countLocked(-1)
	}
	r.shrinkLocked()
	return it
}

func (r *ring) countLocked(n int) {
	r.events += n
	if r.stuck {
		r.policy.stuck.Add(int64(n))
	}
}

// dropLocked gives up the oldest event that no writer has taken; dropped is announced by a gap.
func (r *ring) dropLocked(o outcome, reason string, out []settlement) []settlement {
	for i := r.flight; i < r.n; i++ {
		if r.at(i).d == nil {
			continue
		}
		d := r.removeLocked(i).d
		if o == dropped {
			r.gapLocked(d.seq-1, reason)
		}
		return r.settleLocked(d, o, out)
	}
	return out
}

// siftLocked takes the events for which gone says so, in flight ones apart, out of the ring and settles them o.
func (r *ring) siftLocked(gone func(*delivery) bool, o outcome, out []settlement) []settlement {
	kept := r.flight
	for i := r.flight; i < r.n; i++ {
		it := *r.at(i)
		if it.d != nil && gone(it.d) {
			r.countLocked(-1)
			out = r.settleLocked(it.d, o, out)
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
	if !r.policy.block || r.waitingLocked() <= r.policy.size {
		return out
	}
	before := 0 // events seen that are within the ring
	for i := r.flight; i < r.n; i++ {
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

// shed gives up the oldest event to make room in the pod's share: dropped under drop_oldest, shed under block, where
// the router announces it.
func (r *ring) shed(out []settlement) []settlement {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.policy.block {
		return r.dropLocked(shed, "", out)
	}
	return r.dropLocked(dropped, "shed", out)
}

// gap notes that events after since may be missing. A replay of all that came after an earlier sequence says so itself if it
// fails, and fetches them otherwise: they had been pulled, so they are before the end that its last pass reads up to.
func (r *ring) gap(since uint64, reason string, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.leave == leaveAll && since >= r.since {
		return false
	}
	r.gapLocked(since, reason)
	return r.kickLocked(now)
}

func (r *ring) gapLocked(since uint64, reason string) {
	if !r.gapNoted {
		r.gapNoted, r.gapSince, r.gapReason = true, since, reason
		r.policy.gaps(reason)
	} else if since < r.gapSince {
		r.gapSince, r.gapReason = since, reason
	}
}

// reply queues a message that is not an event. It is never dropped and does not count against the policy's size: the
// read loop, the only one that causes replies, waits for room (waitRoom).
func (r *ring) reply(f *frame, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.insertLocked(r.n, item{f: f, at: now})
	return r.kickLocked(now)
}

// control queues a ping or pong.
func (r *ring) control(op byte, p []byte, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.ctrl = appendControl(r.ctrl, op, p)
	return r.kickLocked(now)
}

// hasRoom says that waitRoom would return at once.
func (r *ring) hasRoom() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.closed || r.roomLocked()
}

// waitRoom returns once few enough replies and pongs wait, or the ring is closed. This is what bounds the memory that a
// client costs which sends and does not read.
func (r *ring) waitRoom() {
	for {
		r.mu.Lock()
		if r.closed || r.roomLocked() {
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

func (r *ring) wakeReaderLocked() {
	if r.room != nil && (r.closed || r.roomLocked()) {
		close(r.room)
		r.room = nil
	}
}

// open allows bytes to be written: the handshake is done.
func (r *ring) open(now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.opened = true
	return r.kickLocked(now)
}

// greet puts f, the `ready` message, before the events that came while the socket was being set up, and lets all be written.
func (r *ring) greet(f *frame, now time.Time) (kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false
	}
	r.insertLocked(0, item{f: f, at: now})
	r.ready = true
	return r.kickLocked(now)
}

// look tells an operator the selected chat and how many events wait.
func (r *ring) look() (chat string, events int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chat, r.events
}

// close ends the ring: what waits is failed, what is in flight is settled by its writer, replies and then the close
// frame are still written. Only the first call does anything; it returns the chat that was selected.
func (r *ring) close(frame []byte, now time.Time, out []settlement) (_ []settlement, chat string, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return out, "", false
	}
	r.closed, r.last, r.abrupt = true, frame, frame == nil
	if !r.busy {
		r.unpinLocked()
	}
	out = r.siftLocked(everything, failed, out)
	for _, it := range r.held {
		out = r.settleLocked(it.d, failed, out)
	}
	chat, r.held, r.gapNoted, r.written = r.chat, nil, false, seqSet{}
	r.wakeReaderLocked()
	if r.abrupt && !r.busy {
		r.endLocked()
	}
	return out, chat, r.kickLocked(now)
}

func everything(*delivery) bool { return true }

// unpinLocked makes the first item, whose frame is cut, an ordinary one again: once the ring is closed, the rest of its
// frame is written for the framing's sake only, and whether it gets through is not waited for.
func (r *ring) unpinLocked() {
	if !r.pinned {
		return
	}
	r.pinned, r.flight = false, 0
	if r.at(0).d == nil {
		r.removeLocked(0)
	}
}

// endLocked lets go of everything that was still to be written. No event is among it: the ring was closed.
func (r *ring) endLocked() {
	clear(r.items)
	r.items, r.head, r.n, r.flight = nil, 0, 0, 0
	r.ctrl, r.taken, r.cut, r.last, r.pinned = nil, 0, nil, nil, false
	r.ended = true
	r.doneLocked()
}
