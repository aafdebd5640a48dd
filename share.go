package main

import (
	"sync"
	"sync/atomic"
	"time"
)

const (
	nakLevels = 5 // delays of 1, 2, 4, 8 and 16 times NAK_DELAY: each has a queue, in the order of expiry
	nakEvery  = 25 * time.Millisecond
	// NAKs are sent sooner when so many are held, or so large ones: until they are sent they count twice in the share.
	naksAtOnce = 128
	nakBytes   = 256 << 10
)

// share counts what this pod holds of the consumer's MAX_ACK_PENDING: events in hand, and NAKed events until their delay ends.
// JetStream counts both as pending for all pods (a consumer with 60 events NAKed and a limit of 50 delivers nothing, measured),
// so each pod may hold MAX_ACK_PENDING / (2 x live pods), and NAK no further event once NAKed ones fill half of that: the other half
// always flows. Events without an owner have a budget within it, so absent agents never stall those who are there.
type share struct {
	cfg    *settings
	m      *Metrics
	pods   atomic.Int64 // live pods
	inHand atomic.Int64 // deliveries accepted and not yet ended
	bytes  atomic.Int64 // their payloads
	routed atomic.Int64 // of these bytes, those that the router has handed to all targets
	parked atomic.Int64 // NAKed events whose delay has not ended

	mu      sync.Mutex // guards all below
	naks    []heldNak
	nakSize int // bytes of their payloads
	queues  [nakLevels][]parkedEvent
	nobody  int // parked events without an owner
}

type parkedEvent struct {
	until  time.Time
	nobody bool
}

// heldNak is a NAK that is sent together with others. A server looks for delays that have ended 10 ms after the last NAK
// (nats-server 2.15, processNak): with one every few milliseconds it did not look for seconds, and then gave out thousands
// of events at once. Those for agents who are there came up to 70 ms late.
type heldNak struct {
	p       *pulled
	outcome string
}

func newShare(cfg *settings, m *Metrics) *share {
	s := &share{cfg: cfg, m: m}
	s.pods.Store(1)
	return s
}

// size is how many events this pod may hold.
func (s *share) size() int64 { return max(2, int64(s.cfg.maxAckPending())/(2*s.pods.Load())) }

// take counts an event that has arrived, give one that has ended.
func (s *share) take(bytes int) {
	s.inHand.Add(1)
	s.bytes.Add(int64(bytes))
}

func (s *share) give(bytes int, routed bool) {
	if routed {
		s.routed.Add(-int64(bytes))
	}
	s.bytes.Add(-int64(bytes))
	s.inHand.Add(-1)
}

// held says whether a full share is full of what its targets hold: not of NAKed events, and not of a burst that is not even routed.
// These pass by themselves.
func (s *share) held() bool {
	return s.parked.Load() < s.size()/2 && 2*s.routed.Load() >= s.bytes.Load()
}

// full says whether nothing more may be taken.
func (s *share) full() bool {
	return s.inHand.Load()+s.parked.Load() >= s.size() || s.bytes.Load() > 4*int64(s.cfg.Load().NATSPrefetchBytes)
}

// nakLevel is the queue of a delivery count.
func nakLevel(count uint64) int { return int(min(max(count, 1), nakLevels) - 1) }

// nakDelay is how long JetStream is told to wait after the delivery of this count.
func (s *share) nakDelay(count uint64) time.Duration {
	return s.cfg.Load().NATSNakDelay << nakLevel(count)
}

// park counts an event as waiting for its redelivery after the delivery of this count. It says false when the pod may NAK no more,
// or no more of nobody's.
func (s *share) park(now time.Time, count uint64, nobody bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.parked.Load() >= s.size()/2 || nobody && s.nobody >= s.cfg.Load().NATSParkedBudget/int(s.pods.Load()) {
		return false
	}
	if nobody {
		s.nobody++
	}
	level := nakLevel(count)
	s.queues[level] = append(s.queues[level], parkedEvent{now.Add(s.nakDelay(count)), nobody})
	s.m.parkedEvents.with().Set(float64(s.parked.Add(1)))
	return true
}

// hold keeps a NAK until the next takeNaks, and returns those that are to be sent now.
func (s *share) hold(n heldNak) []heldNak {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.naks, s.nakSize = append(s.naks, n), s.nakSize+len(n.p.payload)
	if len(s.naks) < naksAtOnce && s.nakSize < nakBytes {
		return nil
	}
	return s.takeNaksLocked()
}

func (s *share) takeNaks() []heldNak {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.takeNaksLocked()
}

func (s *share) takeNaksLocked() (due []heldNak) {
	due, s.naks, s.nakSize = s.naks, nil, 0
	return due
}

// expire lets go of the events whose delay has ended, and notes how many pods share the consumer.
func (s *share) expire(now time.Time, livePods int) {
	s.pods.Store(int64(max(1, livePods)))
	s.mu.Lock()
	defer s.mu.Unlock()
	for level, q := range s.queues {
		n := 0
		for n < len(q) && !q[n].until.After(now) {
			if q[n].nobody {
				s.nobody--
			}
			n++
		}
		s.queues[level] = append(q[:0], q[n:]...)
		s.parked.Add(-int64(n))
	}
	s.m.parkedEvents.with().Set(float64(s.parked.Load()))
}
