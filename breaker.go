package main

import "time"

type breakerState uint8

const (
	breakerClosed   breakerState = iota // everything passes
	breakerOpen                         // nothing passes
	breakerHalfOpen                     // one probe is out, nothing else passes
)

var breakerNames = [...]string{"closed", "open", "half-open"}

func (s breakerState) String() string { return breakerNames[s] }

// breaker decides whether a peer is worth an attempt. It has no lock of its own: whoever holds it guards it.
//
// Every change of state begins a new generation. allow hands out the generation with the permission, and report takes it
// back with the result: a result of an older generation says nothing about the present one, since whoever is slow to
// fail would open a breaker that has just been closed, and a late answer would close one without a probe.
type breaker struct {
	threshold int           // failures in a row that open it
	openFor   time.Duration // from opening until the probe

	state      breakerState
	generation uint64
	failures   int       // in a row; counted while closed
	opened     time.Time // when it opened last
}

// allow says whether an attempt may be made. Every permission must be answered by report or withdraw with the
// generation that it came with; a half-open breaker waits for just that.
func (b *breaker) allow() (generation uint64, ok bool) {
	switch {
	case b.state == breakerClosed:
		return b.generation, true
	case b.state == breakerOpen && time.Since(b.opened) >= b.openFor:
		b.enter(breakerHalfOpen)
		return b.generation, true
	default:
		return 0, false
	}
}

// report takes the result of an attempt that was allowed with generation.
func (b *breaker) report(generation uint64, ok bool) {
	switch {
	case generation != b.generation || b.state == breakerOpen:
	case ok && b.state == breakerHalfOpen:
		b.enter(breakerClosed)
	case ok:
		b.failures = 0
	case b.state == breakerHalfOpen:
		b.trip()
	default:
		if b.failures++; b.failures >= b.threshold {
			b.trip()
		}
	}
}

// withdraw takes back an attempt that ended without telling anything of the peer. If it was the probe, the next
// attempt is one: the time that the breaker has been open is not counted anew.
func (b *breaker) withdraw(generation uint64) {
	if b.state == breakerHalfOpen && generation == b.generation {
		b.enter(breakerOpen)
	}
}

// reset closes the breaker: what it knew was about something that is no more.
func (b *breaker) reset() { b.enter(breakerClosed) }

func (b *breaker) trip() {
	b.enter(breakerOpen)
	b.opened = time.Now()
}

func (b *breaker) enter(s breakerState) {
	b.state, b.failures = s, 0
	b.generation++
}
