package main

import (
	"sync"
	"sync/atomic"
	"time"
)

// parked counts what this pod has NAKed until it may come again. JetStream counts it as pending for all pods (a consumer
// with 60 events NAKed and a limit of 50 delivers nothing, measured), so each pod may hold only its share, and
// events without an owner only a budget within that: absent agents never stall those who are there.
type parked struct {
	cfg  *settings
	m    *Metrics
	pods atomic.Int64 // live pods, as of the last expire
	held atomic.Int64 // entries in queues
	kept atomic.Int64 // of naks

	mu      sync.Mutex // guards all below
	naks    []heldNak
	nakSize int // bytes of their payloads
	queues  [nakLevels][]parkedEvent
	noOwner int
	byAgent map[route]int
}

// parkedEvent is one NAK under way; agent is the zero route unless the event has no owner.
type parkedEvent struct {
	until time.Time
	agent route
}

// heldNak is a NAK that is sent together with others. A server looks for delays that have ended 10 ms after the last NAK
// (nats-server 2.15, processNak): with one every few milliseconds it did not look for seconds, and then gave out thousands
// of events at once. Those for agents who are there came up to 70 ms late.
type heldNak struct {
	p       *pulled
	outcome string
}

const (
	nakLevels      = 5 // delays of 1, 2, 4, 8 and 16 times NAK_DELAY: each has a queue, in the order of expiry
	parkedPerAgent = 16
	nakEvery       = 25 * time.Millisecond
	// Or sooner, when so many are held, or so large: until they are sent they count twice in the share, and in memory.
	naksAtOnce = 128
	nakBytes   = 256 << 10
)

func newParked(cfg *settings, m *Metrics) *parked {
	p := &parked{cfg: cfg, m: m, byAgent: map[route]int{}}
	p.pods.Store(1)
	return p
}

// nakLevel is the queue of a delivery count.
func nakLevel(count uint64) int { return int(min(max(count, 1), nakLevels) - 1) }

// nakDelay is how long JetStream is told to wait after the delivery of this count.
func (p *parked) nakDelay(count uint64) time.Duration {
	return p.cfg.Load().NATSNakDelay << nakLevel(count)
}

// share is how many events this pod may hold, in hand and parked. Half of it may be in hand, so it is never less than two.
func (p *parked) share() int64 { return max(2, int64(p.cfg.maxAckPending())/(2*p.pods.Load())) }

// park counts an event as waiting for its redelivery after the delivery of this count; false when the pod holds too
// many (the caller sheds it then). inHand counts the event itself. agent is the zero route unless it has no owner.
func (p *parked) park(now time.Time, count uint64, agent route, inHand int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if inHand+p.held.Load() > p.share() {
		return false
	}
	if agent != (route{}) {
		if p.noOwner >= p.cfg.Load().NATSParkedBudget/int(p.pods.Load()) || p.byAgent[agent] >= parkedPerAgent {
			return false
		}
		p.noOwner++
		p.byAgent[agent]++
	}
	level := nakLevel(count)
	p.queues[level] = append(p.queues[level], parkedEvent{now.Add(p.nakDelay(count)), agent})
	p.m.parkedEvents.with().Set(float64(p.held.Add(1)))
	return true
}

// hold keeps a NAK until the next takeNaks, and returns those that are to be sent now.
func (p *parked) hold(n heldNak) []heldNak {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.naks, p.nakSize = append(p.naks, n), p.nakSize+len(n.p.payload)
	p.kept.Add(1)
	if len(p.naks) < naksAtOnce && p.nakSize < nakBytes {
		return nil
	}
	return p.takeNaksLocked()
}

func (p *parked) takeNaks() []heldNak {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.takeNaksLocked()
}

func (p *parked) takeNaksLocked() (due []heldNak) {
	due, p.naks, p.nakSize = p.naks, nil, 0
	p.kept.Store(0)
	return due
}

// expire lets go of the events whose delay has ended, and notes how many pods share the consumer.
func (p *parked) expire(now time.Time, livePods int) {
	p.pods.Store(int64(max(1, livePods)))
	p.mu.Lock()
	defer p.mu.Unlock()
	for level, q := range p.queues {
		n := 0
		for n < len(q) && !q[n].until.After(now) {
			if a := q[n].agent; a != (route{}) {
				p.noOwner--
				if p.byAgent[a]--; p.byAgent[a] == 0 {
					delete(p.byAgent, a)
				}
			}
			n++
		}
		p.queues[level] = append(q[:0], q[n:]...)
		p.held.Add(-int64(n))
	}
	p.m.parkedEvents.with().Set(float64(p.held.Load()))
}
