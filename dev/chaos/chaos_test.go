package main

import (
	"testing"
	"time"

	"daisi-ws-service/dev/rig"
)

// short is a run that make test can afford.
var short = plan{seed: 3, duration: 20 * time.Second, clients: 60, rate: 200, policy: "drop_oldest", kinds: kinds, ackWait: 9 * time.Second, settle: 5 * time.Minute}

// TestChaos is the short form: every kind of fault once at least. More seeds: make chaos.
func TestChaos(t *testing.T) {
	if rig.RedisServer() == "" {
		t.Skip("SKIPPED: this test proves nothing without a real redis-server; install it (Debian: apt-get install redis-server)")
	}
	bad, err := run(t.Context(), short)
	if err != nil || bad {
		t.Errorf("a promise was broken (above), or could not be checked: %v", err)
	}
}

// TestSchedule: the same seed makes the same faults, all of the kinds, and no two of one target at a time.
func TestSchedule(t *testing.T) {
	plans := []plan{short}
	for seed := range uint64(20) {
		plans = append(plans, plan{seed: seed, duration: 30 * time.Second, clients: 60, kinds: kinds})
	}
	for _, p := range plans {
		seed := p.seed
		list, err := schedule(p)
		if err != nil {
			t.Fatal(err)
		}
		again, _ := schedule(p)
		made, busy := map[string]bool{}, map[string]time.Duration{}
		for i, f := range list {
			if f.String() != again[i].String() || f.at != again[i].at {
				t.Errorf("seed %d: fault %d is %v and %v", seed, i, f, again[i])
			}
			if f.at < busy[f.place()] {
				t.Errorf("seed %d: %v at %v, while one is there until %v", seed, f, f.at, busy[f.place()])
			}
			if f.kind == "nats" && f.at > p.duration*2/3 {
				t.Errorf("seed %d: %v at %v: too late for a verdict", seed, f, f.at)
			}
			made[f.kind], busy[f.place()] = true, f.at+f.lasts
		}
		if len(made) < len(kinds) {
			t.Errorf("seed %d makes only %d of %d kinds: %v", seed, len(made), len(kinds), list)
		}
	}
}
