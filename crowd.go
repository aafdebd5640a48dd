package main

import (
	"context"
	"net"
	"runtime"
	"sync"
	"time"
)

// A crowd that comes back is let in one after the other, so that the events of those who are there do not wait for a processor.
// When 5,000 clients of a dead pod came to one that shared two processors with NATS, Redis and them, the p99 of the others'
// events was 3 to 8 times what it was before at 2,000 upgrades a second, and 1.8 times at 300. The goroutines of 5,000
// connections accepted at once made single events wait for 40 ms.
const (
	crowdBurst           = 50   // so many go on at once when none have come for a while
	upgradesPerProcessor = 150  // per second: what an UPGRADE_RATE of 0 means
	acceptRate           = 2000 // connections per second

	// Nobody has said yet who he is when his connection is accepted, so whoever opens enough of them makes probes wait as well:
	// for no longer than acceptPauses altogether, which come back at a tenth of the time's pace.
	acceptPauses = 2500 * time.Millisecond
)

// crowd is the queue of authenticated upgrades that have a place, first in, first out.
type crowd struct {
	cfg  *settings
	m    *Metrics
	door chan struct{} // has room for one: whose turn is next. The others wait at it in the order of their coming
	pace pace          // owned by the one in the door

	mu     sync.Mutex
	latest map[string]*newcomer // guarded by mu; by session: who came last of those who wait
}

// newcomer waits for its turn; dismiss ends that.
type newcomer struct{ dismiss context.CancelCauseFunc }

func newCrowd(cfg *settings, m *Metrics) *crowd {
	return &crowd{cfg: cfg, m: m, door: make(chan struct{}, 1), latest: map[string]*newcomer{}}
}

// turn waits until an upgrade may go on: crowdBurst of them at once, and then UPGRADE_RATE per second. It returns early with ctx's
// cause when ctx ends, with sessionReplaced when a later one for the same session comes to wait.
func (c *crowd) turn(ctx context.Context, session string) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer c.enter(session, &newcomer{cancel})()
	select {
	case c.door <- struct{}{}:
		defer func() { <-c.door }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	rate := c.cfg.Load().ServerUpgradeRate
	if rate == 0 {
		rate = upgradesPerProcessor * runtime.GOMAXPROCS(0)
	}
	if !c.pace.next(ctx, rate) {
		return context.Cause(ctx)
	}
	return nil
}

// enter counts n until leave is called, and dismisses the one before it for the same session: of several newcomers the last wins.
func (c *crowd) enter(session string, n *newcomer) (leave func()) {
	waiting := c.m.upgradesWaiting.with()
	waiting.Inc()
	c.mu.Lock()
	defer c.mu.Unlock()
	if before := c.latest[session]; before != nil {
		before.dismiss(sessionReplaced())
	}
	c.latest[session] = n
	return func() {
		waiting.Dec()
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.latest[session] == n {
			delete(c.latest, session)
		}
	}
}

// pace lets crowdBurst go on at once, and then so many per second. Its zero value is ready for use, by one goroutine at a time.
type pace struct {
	due time.Time // of the next one
}

// next waits for the next one's time. It says false when ctx ended first: that time is the following one's.
func (p *pace) next(ctx context.Context, perSecond int) bool {
	now, every := time.Now(), time.Second/time.Duration(perSecond)
	if oldest := now.Add(-(crowdBurst - 1) * every); p.due.Before(oldest) {
		p.due = oldest
	}
	if wait := p.due.Sub(now); wait > 0 && !pause(ctx, wait) {
		return false
	}
	p.due = p.due.Add(every)
	return true
}

// pacedListener accepts acceptRate connections per second, while its pauses last; the others wait in the kernel's queue, first in,
// first out.
type pacedListener struct {
	net.Listener

	// Owned by the one goroutine that calls Accept.
	pace   pace
	paused time.Duration // of acceptPauses
	last   time.Time     // when it returned
}

func (l *pacedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	came := time.Now()
	l.paused = max(0, l.paused-came.Sub(l.last)/10)
	if l.paused < acceptPauses {
		l.pace.next(context.Background(), acceptRate)
		l.paused += time.Since(came)
	}
	l.last = time.Now()
	return c, err
}
