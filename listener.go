package main

import (
	"errors"
	"net"
	"os"
	"runtime"
	"time"
)

const (
	acceptBurst = 50
	// acceptPerProcessor is what a SERVER_ACCEPT_RATE of 0 means. When 5,000 clients of a dead pod come back to one that shares two
	// processors with NATS, Redis and them, the p99 of the others' events is 4 to 6 times what it was at 2,000 a second, and
	// within twice what it was at 330.
	acceptPerProcessor = 150
	acceptSpare        = 1000 // connections that may wait besides those that there is a place for a socket for
)

// crowdListener accepts all that comes, and hands it out one after the other: acceptBurst at once, then one every so
// often, the last that came first. So whoever crowds delays the events of those who are there less, and a probe does not wait
// behind a crowd that is there, as it would in the kernel's queue; who comes behind the probe overtakes it.
type crowdListener struct {
	deadlineListener
	every  time.Duration
	vacant func() int // places for sockets

	// Owned by the one goroutine that calls Accept.
	waiting []net.Conn // in the order of their coming
	due     time.Time  // of the next one to be handed out
	note    func(waiting int)
}

// deadlineListener is what crowdListener needs of a net.TCPListener.
type deadlineListener interface {
	net.Listener
	SetDeadline(time.Time) error
}

func newCrowdListener(l deadlineListener, perSecond int, vacant func() int, m *Metrics) *crowdListener {
	if perSecond == 0 {
		perSecond = acceptPerProcessor * runtime.GOMAXPROCS(0)
	}
	count := m.connectionsWaiting.with()
	return &crowdListener{
		deadlineListener: l, every: time.Second / time.Duration(perSecond), vacant: vacant,
		note: func(waiting int) { count.Set(float64(waiting)) },
	}
}

// Accept returns the next connection to be served. After Close it closes those that wait.
func (l *crowdListener) Accept() (net.Conn, error) {
	for {
		n := len(l.waiting)
		if now := time.Now(); n > 0 && !now.Before(l.due) {
			return l.handOut(now), nil
		}
		if n >= acceptSpare && n >= acceptSpare+l.vacant() {
			time.Sleep(time.Until(l.due)) // further ones wait in the kernel's queue
			continue
		}
		var until time.Time
		if n > 0 {
			until = l.due
		}
		l.SetDeadline(until)
		c, err := l.deadlineListener.Accept()
		switch {
		case err == nil:
			l.waiting = append(l.waiting, c)
			l.note(n + 1)
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, net.ErrClosed):
			for _, c := range l.waiting {
				c.Close()
			}
			l.waiting = nil
			l.note(0)
			return nil, err
		default:
			return nil, err // net/http goes on after a pause where it may, as with too many open files
		}
	}
}

func (l *crowdListener) handOut(now time.Time) net.Conn {
	if oldest := now.Add(-(acceptBurst - 1) * l.every); l.due.Before(oldest) {
		l.due = oldest
	}
	l.due = l.due.Add(l.every)
	last := len(l.waiting) - 1
	c := l.waiting[last]
	l.waiting[last] = nil
	l.waiting = l.waiting[:last]
	l.note(last)
	return c
}
