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

// batch is what a writer has taken out of a ring. The writer owns it until all is written, or the ring's end gives it up; it is changed
// under the ring's lock only.
type batch struct {
	items    []item    // control frames and the close frame too
	begun    int       // bytes of the first item's frame that were written
	writing  bool      // a write is under way
	progress time.Time // when a byte was last written, or the batch was taken
}

// join puts together in buf what is to be written. A frame that is larger goes by itself, uncopied: it is shared, so nothing may be
// appended to it.
func (b *batch) join(buf []byte) []byte {
	buf = buf[:0]
	for i := range b.items {
		p := b.items[i].bytes()
		if i == 0 {
			if p = p[b.begun:]; len(p) > cap(buf) {
				return p
			}
		}
		if len(buf)+len(p) > cap(buf) {
			break
		}
		buf = append(buf, p...)
	}
	return buf
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
	c     *conn
	batch batch
	res   result
	try   func(fd uintptr) bool

	mu    sync.Mutex // guards dirty
	dirty []*conn
}

func newWriter(h *hub) *writer {
	w := &writer{h: h, s: newScratch(), wake: make(chan struct{}, 1)}
	w.try = func(fd uintptr) bool {
		w.res = w.c.attempt(fd, &w.batch, w.s)
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
func (c *conn) attempt(fd uintptr, b *batch, s *scratch) result {
	p := c.take(b, s.buf)
	if len(p) == 0 {
		return nothing
	}
	n, err := syscall.Write(int(fd), p)
	for errors.Is(err, syscall.EINTR) {
		n, err = syscall.Write(int(fd), p)
	}
	c.account(max(n, 0), s)
	switch {
	case err == nil && n == len(p):
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
	b := c.ring.goAlone()
	h.slowMu.Lock()
	h.slow[c]++
	h.slowMu.Unlock()
	h.wg.Go(func() { c.flow(b) }) // c's own goroutine is still counted: it waits until no writer has the turn
}

// flow writes b and then what the ring has, until that is empty or the connection has ended. The slow tick closes sockets that are
// overdue, and their goroutine then closes the connection, which ends the write.
func (c *conn) flow(b *batch) {
	for {
		err := error(nil)
		if c.raw != nil {
			err = c.flowRaw(b)
		} else {
			err = c.flowBlocking(b)
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
func (c *conn) flowRaw(b *batch) error {
	res := nothing
	err := c.raw.Write(func(fd uintptr) bool {
		s := scratches.Get().(*scratch)
		defer scratches.Put(s)
		for {
			switch res = c.attempt(fd, b, s); res {
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
func (c *conn) flowBlocking(b *batch) error {
	s := scratches.Get().(*scratch)
	defer scratches.Put(s)
	for {
		p := c.take(b, s.buf[:0:16<<10])
		if len(p) == 0 {
			return nil
		}
		n, err := c.nc.Write(p)
		c.account(n, s)
		if err != nil {
			return err
		}
	}
}
