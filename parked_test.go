package main

import (
	"testing"
	"time"
)

func newTestParked(maxPending, budget, pods int) *parked {
	cfg := &settings{}
	cfg.Store(&Config{NATSMaxAckPending: maxPending, NATSParkedBudget: budget, NATSNakDelay: time.Second})
	p := newParked(cfg, newMetrics())
	p.pods.Store(int64(pods))
	return p
}

func TestNakDelays(t *testing.T) {
	p := newTestParked(100, 10, 1)
	for count, want := range map[uint64]time.Duration{0: 1, 1: 1, 2: 2, 3: 4, 4: 8, 5: 16, 6: 16, 60: 16} {
		if got := p.nakDelay(count); got != want*time.Second {
			t.Errorf("delay after delivery %d is %s, want %s", count, got, want*time.Second)
		}
	}
}

func TestParkedShareShrinksWithPods(t *testing.T) {
	p := newTestParked(100, 100, 1)
	now := time.Now()
	for pods, want := range map[int]int64{1: 50, 2: 25, 5: 10, 50: 2} { // half of a share may be in hand: never none
		p.expire(now, pods)
		if got := p.share(); got != want {
			t.Errorf("share of one of %d pods is %d, want %d", pods, got, want)
		}
	}
	p.expire(now, 5)
	if !p.park(now, 1, route{}, 10) {
		t.Error("an event within the share was refused")
	}
	if p.park(now, 1, route{}, 10) {
		t.Error("10 in hand and 1 parked with a share of 10: parked, want refused")
	}
	p.expire(now.Add(time.Second), 5)
	if !p.park(now, 1, route{}, 10) {
		t.Error("refused though the parked event's delay has ended")
	}
}

func TestParkedBudgetAndAgents(t *testing.T) {
	p := newTestParked(10_000, 20, 1)
	now := time.Now()
	agent := func(id string) route { return route{routeGeneral, "c", id, ""} }
	for i := range parkedPerAgent {
		if !p.park(now, 1, agent("a"), 1) {
			t.Fatalf("event %d of one agent was refused", i)
		}
	}
	if p.park(now, 1, agent("a"), 1) {
		t.Errorf("event %d of one agent was parked", parkedPerAgent+1)
	}
	for range 20 - parkedPerAgent {
		if !p.park(now, 2, agent("b"), 1) {
			t.Fatal("an event of another agent was refused within the budget")
		}
	}
	if p.park(now, 1, agent("c"), 1) {
		t.Error("an event above the budget was parked")
	}
	if !p.park(now, 1, route{}, 1) {
		t.Error("a failed event, which the budget does not concern, was refused")
	}
	p.expire(now.Add(time.Second), 1) // a's and the failed one's end, b's last 2 s
	if got := p.held.Load(); got != 4 {
		t.Errorf("%d events parked after 1 s, want 4", got)
	}
	if p.expire(now.Add(2*time.Second), 1); p.held.Load() != 0 || p.noOwner != 0 || len(p.byAgent) != 0 {
		t.Errorf("after all delays: %d parked, %d without owner, %d agents", p.held.Load(), p.noOwner, len(p.byAgent))
	}
}

// TestNaksGoTogether: they are held until the next tick, or until there are many, or large ones; each is sent once.
func TestNaksGoTogether(t *testing.T) {
	p := newTestParked(100, 10, 1)
	held := func(outcome string, size int) heldNak {
		return heldNak{&pulled{delivery: delivery{event: &event{payload: make([]byte, size)}}}, outcome}
	}
	for i := range naksAtOnce - 1 {
		if due := p.hold(held("nak_failed", 10)); due != nil {
			t.Fatalf("%d NAKs sent with the %d-th", len(due), i+1)
		}
	}
	if due := p.hold(held("nak_failed", 10)); len(due) != naksAtOnce {
		t.Errorf("%d sent when %d were held", len(due), naksAtOnce)
	}
	for n := 1; n <= 2; n++ { // what was sent counts no more
		p.hold(held("nak_failed", nakBytes/2))
		if due := p.hold(held("nak_failed", nakBytes/2)); len(due) != 2 {
			t.Errorf("%d sent when two that are large were held", len(due))
		}
	}
	p.hold(held("nak_no_owner", 10))
	if due := p.takeNaks(); len(due) != 1 || due[0].outcome != "nak_no_owner" {
		t.Errorf("a tick sends %v", due)
	}
	if due := p.takeNaks(); len(due) != 0 {
		t.Errorf("the next tick sends %v again", due)
	}
}
