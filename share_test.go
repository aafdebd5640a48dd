package main

import (
	"testing"
	"time"
)

func newTestShare(maxPending, budget, pods int) *share {
	cfg := &settings{}
	cfg.Store(&Config{NATSMaxAckPending: maxPending, NATSParkedBudget: budget, NATSNakDelay: time.Second, NATSPrefetchBytes: 1000})
	s := newShare(cfg, newMetrics())
	s.pods.Store(int64(pods))
	return s
}

func TestNakDelays(t *testing.T) {
	s := newTestShare(100, 10, 1)
	for count, want := range map[uint64]time.Duration{0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 16, 6: 16, 60: 16} {
		if got := s.nakDelay(count); got != want*time.Second {
			t.Errorf("delay after delivery %d is %s, want %s", count, got, want*time.Second)
		}
	}
}

// TestShareShrinksWithPods: what is in hand and what is NAKed fill it together; bytes fill it too.
func TestShareShrinksWithPods(t *testing.T) {
	s := newTestShare(100, 100, 1)
	now := time.Now()
	for pods, want := range map[int]int64{1: 50, 2: 25, 5: 10, 1000: 2} {
		s.expire(now, pods)
		if got := s.size(); got != want {
			t.Errorf("share of one of %d pods is %d, want %d", pods, got, want)
		}
	}
	s.expire(now, 5)
	for range 8 {
		s.take(10)
	}
	for range 2 {
		if s.full() || !s.park(now, 1, false) {
			t.Fatal("full below 10")
		}
	}
	if !s.full() {
		t.Error("8 in hand and 2 NAKed do not fill a share of 10")
	}
	s.give(10, false)
	if s.full() {
		t.Error("full after one has ended")
	}
	if s.expire(now.Add(time.Second), 5); s.parked.Load() != 0 {
		t.Error("a NAKed event still counts when its delay has ended")
	}
	s.take(4000)
	if !s.full() {
		t.Error("four prefetches of bytes do not fill it")
	}
	s.give(4000, false)
	if s.full() {
		t.Error("full after they have ended")
	}
}

// TestHalfOfAShareFlows: no more than half of it is NAKed, and events without an owner have a budget within that, of which each pod has
// its part.
func TestHalfOfAShareFlows(t *testing.T) {
	now := time.Now()
	for _, c := range []struct {
		pods, budget    int
		nobody, failing int
	}{{1, 20, 20, 30}, {2, 20, 10, 15}, {1, 1000, 50, 0}, {1, 0, 0, 50}} {
		s := newTestShare(200, c.budget, c.pods) // half of a share of one pod is 50
		nobody, failing := 0, 0
		for ; s.park(now, 2, true); nobody++ {
		}
		for ; s.park(now, 1, false); failing++ {
		}
		if nobody != c.nobody || failing != c.failing {
			t.Errorf("%d pods with a budget of %d: %d of nobody and %d others are NAKed, want %d and %d", c.pods, c.budget, nobody, failing, c.nobody, c.failing)
		}
		s.expire(now.Add(time.Second), c.pods) // the others' delay was 1 s, nobody's 2 s
		if got := s.parked.Load(); got != int64(c.nobody) {
			t.Errorf("%d are NAKed after 1 s, want %d", got, c.nobody)
		}
		if s.expire(now.Add(2*time.Second), c.pods); s.parked.Load() != 0 || s.nobody != 0 {
			t.Errorf("after all delays %d are NAKed, %d of nobody", s.parked.Load(), s.nobody)
		}
	}
}

// TestNaksGoTogether: they are held until the next tick, or until there are many, or large ones; each is sent once.
func TestNaksGoTogether(t *testing.T) {
	s := newTestShare(100, 10, 1)
	held := func(outcome string, size int) heldNak {
		return heldNak{&pulled{delivery: delivery{event: &event{payload: make([]byte, size)}}}, outcome}
	}
	for i := range naksAtOnce - 1 {
		if due := s.hold(held("nak_failed", 10)); due != nil {
			t.Fatalf("%d NAKs sent with the %d-th", len(due), i+1)
		}
	}
	if due := s.hold(held("nak_failed", 10)); len(due) != naksAtOnce {
		t.Errorf("%d sent when %d were held", len(due), naksAtOnce)
	}
	for n := 1; n <= 2; n++ { // what was sent counts no more
		s.hold(held("nak_failed", nakBytes/2))
		if due := s.hold(held("nak_failed", nakBytes/2)); len(due) != 2 {
			t.Errorf("%d sent when two that are large were held", len(due))
		}
	}
	s.hold(held("nak_no_owner", 10))
	if due := s.takeNaks(); len(due) != 1 || due[0].outcome != "nak_no_owner" {
		t.Errorf("a tick sends %v", due)
	}
	if due := s.takeNaks(); len(due) != 0 {
		t.Errorf("the next tick sends %v again", due)
	}
}
