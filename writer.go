package main

import (
	"context"
	"errors"
	"sync"
	"syscall"
	"time"
)

const (
	scratchBytes = 32 << 10 // what one write joins at most
	manyDirty    = 192      // a round with more sockets than this is followed by a rest
	writerRest   = 5 * time.Millisecond
	slowTick     = 100 * time.Millisecond // how often sockets that write alone are looked after
	slowPause    = 500 * time.Millisecond // a socket that takes no byte for longer is stuck
	slowAge      = 3 * time.Second        // so is one that takes some, but has an event waiting for longer
)

// somethingLocked says whether a writer would find something to write.
func (r *ring) somethingLocked() bool {
	if !r.opened || r.phase == closed {
		return false
	}
	return len(r.cut) > 0 || len(r.ctrl) > 0 || r.last != nil || r.ready && r.n > 0
}

// kickLocked takes the turn for the socket's shared writer if nobody has it and there is something to write; the caller
// must then hand the socket over.
func (r *ring) kickLocked(now time.Time) bool {
	if r.state != idle || !r.somethingLocked() {
		return false
	}
	r.state, r.progress = queued, now
	return true
}

// take collects what is to be written next: the rest of a cut frame, control frames, items, and last the close
// frame. It joins them in buf; a frame that is larger goes by itself, uncopied. Whoever has the turn calls it, and wrote
// or fail afterwards unless it returned nothing; or once more, if it returned a frame that must be compressed first.
func (r *ring) take(buf []byte, now time.Time) (_ []byte, raw *frame) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.somethingLocked() {
		return nil, nil
	}
	if r.ready {
		r.offerLocked(now)
		if raw := r.rawLocked(cap(buf)); raw != nil {
			return nil, raw
		}
	}
	r.busy = true
	if len(r.cut) > cap(buf) {
		return r.cut, nil
	}
	out := append(buf[:0], r.cut...)
	r.taken = min(len(r.ctrl), cap(out)-len(out))
	out = append(out, r.ctrl[:r.taken]...)
	if r.ready {
		if big := r.takeItemsLocked(&out); big != nil {
			return big, nil
		}
	}
	if r.flight == r.n && r.taken == len(r.ctrl) && len(out)+len(r.last) <= cap(out) {
		out = append(out, r.last...)
	}
	return out, nil
}

// takeItemsLocked appends what fits to out. A frame that never will is returned instead if it is the first: it is shared,
// so nothing may be appended to it.
func (r *ring) takeItemsLocked(out *[]byte) (big []byte) {
	for ; r.flight < r.n; r.flight++ {
		b := r.at(r.flight).bytes()
		if len(*out)+len(b) <= cap(*out) {
			*out = append(*out, b...)
			continue
		}
		if len(*out) == 0 {
			r.flight++
			return b
		}
		break
	}
	return nil
}

// wrote takes the first n bytes of what take returned out of the ring and adds the deliveries whose whole frame is
// among them to out. What was not written goes back; of a frame that was written in part, the rest is kept as cut.
// sent is called, under the lock, for each message that was written. ended says that nothing will be written any more.
func (r *ring) wrote(n int, now time.Time, out []settlement, sent func(*frame, *delivery)) (_ []settlement, ended bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.busy = false
	if n > 0 {
		r.progress = now
	}
	k := min(n, len(r.cut))
	if r.cut, n = r.cut[k:], n-k; len(r.cut) == 0 {
		r.cut = nil
		if r.pinned {
			r.pinned = false
			out = r.writtenLocked(out, sent)
		}
		out = r.wroteRestLocked(n, out, sent)
	}
	r.taken, r.flight = 0, 0
	if r.pinned {
		r.flight = 1
	}
	out = r.afterWriteLocked(out)
	return out, r.phase == closed
}

// wroteRestLocked is given the bytes written beyond those of the cut frame.
func (r *ring) wroteRestLocked(n int, out []settlement, sent func(*frame, *delivery)) []settlement {
	k := min(n, r.taken)
	if r.ctrl, n = r.ctrl[k:], n-k; len(r.ctrl) == 0 {
		r.ctrl = nil
	}
	for r.flight > 0 && n > 0 {
		b := r.at(0).bytes()
		if n < len(b) {
			r.cut, r.pinned = b[n:], true
			return out
		}
		n -= len(b)
		out = r.writtenLocked(out, sent)
	}
	if n > 0 { // of the close frame
		if r.cut, r.last = r.last[n:], nil; len(r.cut) == 0 {
			r.cut = nil
		}
	}
	return out
}

// writtenLocked takes the first item out, the whole frame of which was written.
func (r *ring) writtenLocked(out []settlement, sent func(*frame, *delivery)) []settlement {
	r.flight--
	it := r.removeLocked(0)
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

// afterWriteLocked does what close left to the writer: it lets go of the events that came back unwritten, and finds out
// whether all is written.
func (r *ring) afterWriteLocked(out []settlement) []settlement {
	if r.phase >= closing {
		r.unpinLocked()
		out = r.siftLocked(isEvent, gone, out)
		if r.abrupt || len(r.cut) == 0 && len(r.ctrl) == 0 && r.n == 0 && r.last == nil {
			r.endLocked()
		}
	}
	r.wakeReaderLocked()
	return out
}

// fail ends a closed ring whose connection can't be written to any more: what was in flight is gone. Whoever has the
// turn calls it.
func (r *ring) fail(out []settlement) []settlement {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.busy, r.pinned, r.flight = false, false, 0
	out = r.siftLocked(isEvent, gone, out)
	r.endLocked()
	r.wakeReaderLocked()
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
	r.stuck = false
	r.doneLocked()
	return true
}

// doneLocked wakes waitDone once nothing is left to write and no writer has the turn.
func (r *ring) doneLocked() {
	if r.done != nil && r.phase == closed && r.state == idle {
		close(r.done)
		r.done = nil
	}
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

// goAlone passes the turn from the shared writer to a goroutine of the socket's own.
func (r *ring) goAlone() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.state = alone
}

// scratch is what one write needs besides the socket.
type scratch struct {
	buf  []byte
	ends []settlement
}

func newScratch() *scratch { return &scratch{buf: make([]byte, 0, scratchBytes)} }

// scratches serves the sockets that write alone. They hold one only while they write, not while they wait to be able to.
var scratches = sync.Pool{New: func() any { return newScratch() }}

// writer empties the rings of its share of the sockets. It takes what a socket has waiting and writes it with one
// non-blocking call, so that no socket holds up another; a goroutine per socket that is woken per event took twice the CPU.
type writer struct {
	h    *hub
	s    *scratch
	wake chan struct{} // of capacity 1; never closed

	// Owned by run: the write under way. try is made once, since a closure per write would be garbage per write.
	c   *conn
	res result
	try func(fd uintptr) bool

	mu    sync.Mutex // guards dirty
	dirty []*conn
}

func newWriter(h *hub) *writer {
	w := &writer{h: h, s: newScratch(), wake: make(chan struct{}, 1)}
	w.try = func(fd uintptr) bool {
		w.res = w.c.attempt(fd, w.s)
		return true
	}
	return w
}

// add hands over a socket whose turn the caller took by a kick.
func (w *writer) add(c *conn) {
	w.mu.Lock()
	w.dirty = append(w.dirty, c)
	first := len(w.dirty) == 1
	w.mu.Unlock()
	if first {
		poke(w.wake)
	}
}

// run writes until ctx ends.
func (w *writer) run(ctx context.Context) {
	var round []*conn
	for {
		select {
		case <-w.wake:
		case <-ctx.Done():
			return
		}
		w.mu.Lock()
		round, w.dirty = w.dirty, round[:0]
		w.mu.Unlock()
		for _, c := range round {
			w.write(c)
		}
		many := len(round) > manyDirty
		clear(round)
		if many && !pause(ctx, writerRest) {
			return
		}
	}
}

// pause waits for d; it says false when ctx ended first.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// write gives c one write. What is left after it waits for the next round, or for a goroutine of the socket's own.
func (w *writer) write(c *conn) {
	if c.raw == nil {
		w.h.alone(c)
		return
	}
	w.c, w.res = c, broken
	err := c.raw.Write(w.try)
	switch {
	case err != nil || w.res == broken:
		c.lost()
	case w.res == blocked || w.res == partly:
		w.h.alone(c)
		return
	}
	if !c.ring.rest() {
		w.add(c)
	}
}

// result is what came of one write.
type result uint8

const (
	nothing result = iota // there was nothing to write
	flowed                // all that was taken was written
	partly                // only a part of it
	blocked               // none: the kernel's buffer is full
	broken                // the connection is gone
)

// attempt makes one non-blocking write and settles what it wrote.
func (c *conn) attempt(fd uintptr, s *scratch) result {
	b := c.take(s.buf)
	if len(b) == 0 {
		return nothing
	}
	n, err := syscall.Write(int(fd), b)
	for errors.Is(err, syscall.EINTR) {
		n, err = syscall.Write(int(fd), b)
	}
	c.account(max(n, 0), s)
	switch {
	case err == nil && n == len(b):
		return flowed
	case err == nil:
		return partly
	case errors.Is(err, syscall.EAGAIN):
		return blocked
	default:
		return broken
	}
}

// account settles what the first n bytes of a write have ended, and half-closes behind the close frame: the client sees
// the end at once, while what it still sends is discarded, because an RST would eat what it has not read yet.
func (c *conn) account(n int, s *scratch) {
	now := time.Now()
	var ended bool
	s.ends, ended = c.ring.wrote(n, now, s.ends[:0], c.h.count.sent)
	for _, e := range s.ends {
		if e.o == written {
			c.h.count.latency.Update(now.Sub(e.d.stored).Seconds())
		}
	}
	c.h.settle(s.ends)
	clear(s.ends)
	if half, ok := c.nc.(interface{ CloseWrite() error }); ok && ended {
		half.CloseWrite()
	}
}

// alone starts the goroutine that writes to c until its ring is empty: the socket takes no more for now, or is one of
// those (TLS) that can't be written to without blocking. The caller has the turn.
func (h *hub) alone(c *conn) {
	c.ring.goAlone()
	h.slowMu.Lock()
	h.slow[c]++
	h.slowMu.Unlock()
	h.wg.Go(c.flow) // c's own goroutine is still counted: it waits until no writer has the turn
}

// flow writes until the ring is empty or the connection has ended. The slow tick closes sockets that stay blocked, and
// their goroutine then closes the connection, which ends the write.
func (c *conn) flow() {
	for {
		err := error(nil)
		if c.raw != nil {
			err = c.flowRaw()
		} else {
			err = c.flowBlocking()
		}
		if err != nil {
			c.lost()
		}
		if c.ring.rest() {
			break
		}
	}
	c.h.slowMu.Lock()
	defer c.h.slowMu.Unlock()
	// A count: the shared writer may have sent the socket here again since the rest.
	if c.h.slow[c]--; c.h.slow[c] == 0 {
		delete(c.h.slow, c)
	}
}

// flowRaw waits in the network poller until the socket can be written to, again and again until nothing is left. It
// holds no scratch while it waits: 5,000 stuck sockets must not cost 5,000 of them.
func (c *conn) flowRaw() error {
	res := nothing
	err := c.raw.Write(func(fd uintptr) bool {
		s := scratches.Get().(*scratch)
		defer scratches.Put(s)
		for {
			switch res = c.attempt(fd, s); res {
			case nothing, broken:
				return true
			case blocked: // only now, not after a part: the poller tells of what was refused
				return false
			}
		}
	})
	if res == broken {
		return syscall.EPIPE
	}
	return err
}

// flowBlocking is for TLS: each write is a record, so what waits is joined up to a record's size.
func (c *conn) flowBlocking() error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	joined := scratch{buf: s.buf[: 0 : 16<<10], ends: s.ends}
	for {
		b := c.take(joined.buf)
		if len(b) == 0 {
			return nil
		}
		n, err := c.nc.Write(b)
		c.account(n, &joined)
		if err != nil {
			return err
		}
	}
}
