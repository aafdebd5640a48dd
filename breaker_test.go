package main

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestBreakerTransitions walks through every transition, each step saying what it does and what state it must lead to.
func TestBreakerTransitions(t *testing.T) {
	type step struct {
		do    string // ok, fail: with the generation of the allow before; late ok, late fail: with the first one's; wait, withdraw, reset
		state breakerState
		allow bool // what allow says after it
	}
	fail := func(n int, s breakerState) (all []step) {
		for range n {
			all = append(all, step{"fail", breakerClosed, true})
		}
		all[n-1].state, all[n-1].allow = s, s == breakerClosed
		return all
	}
	tests := map[string][]step{
		"four failures do not open it":    fail(4, breakerClosed),
		"five do":                         fail(5, breakerOpen),
		"a success between starts anew":   append(append(fail(4, breakerClosed), step{"ok", breakerClosed, true}), fail(5, breakerOpen)...),
		"probe works":                     append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"ok", breakerClosed, true}),
		"probe fails":                     append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"fail", breakerOpen, false}),
		"second probe after a whole time": append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"fail", breakerOpen, false}, step{"wait", breakerHalfOpen, true}, step{"ok", breakerClosed, true}),
		"probe withdrawn, next at once":   append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"withdraw", breakerHalfOpen, true}, step{"ok", breakerClosed, true}),
		"late success while open":         append(fail(5, breakerOpen), step{"late ok", breakerOpen, false}),
		"late success while half-open":    append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"late ok", breakerHalfOpen, false}),
		"late failure while half-open":    append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"late fail", breakerHalfOpen, false}, step{"ok", breakerClosed, true}),
		"late failures after it closed":   append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"ok", breakerClosed, true}, step{"late fail", breakerClosed, true}, step{"late fail", breakerClosed, true}, step{"late fail", breakerClosed, true}, step{"late fail", breakerClosed, true}, step{"late fail", breakerClosed, true}),
		"reset while open":                append(fail(5, breakerOpen), step{"reset", breakerClosed, true}),
		"reset outruns the probe":         append(fail(5, breakerOpen), step{"wait", breakerHalfOpen, true}, step{"reset", breakerClosed, true}),
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := &breaker{threshold: 5, openFor: 30 * time.Second}
				first, _ := b.allow()
				g := first
				for i, s := range steps {
					switch s.do {
					case "ok", "fail":
						b.report(g, s.do == "ok")
					case "late ok", "late fail":
						b.report(first, s.do == "late ok")
					case "wait":
						time.Sleep(30*time.Second - 1)
						if _, ok := b.allow(); ok {
							t.Fatalf("step %d: allowed before its time", i)
						}
						time.Sleep(time.Nanosecond)
					case "withdraw":
						b.withdraw(g)
					case "reset":
						b.reset()
					}
					next, ok := b.allow()
					if ok {
						g = next
					}
					if ok != s.allow || b.state != s.state {
						t.Fatalf("step %d (%s): state %s, allowed %v; want %s, %v", i, s.do, b.state, ok, s.state, s.allow)
					}
				}
			})
		})
	}
}

// attempt is one that the model has out.
type attempt struct {
	generation uint64
	epoch      int // of the model: counts changes of state
}

// TestBreakerModel runs random attempts, many out at once, against a model that keeps the plain rule: results count only if
// the state has not changed since the attempt began. Rates of failure make it a healthy, a failing and a dead peer.
func TestBreakerModel(t *testing.T) {
	for seed, failing := range []float64{0.02, 0.3, 0.5, 0.8, 1} {
		for _, load := range []int{1, 10, 1000} {
			t.Run(fmt.Sprintf("failing %v load %d", failing, load), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					runBreakerModel(t, rand.New(rand.NewPCG(uint64(seed), uint64(load))), failing, load)
				})
			})
		}
	}
}

func runBreakerModel(t *testing.T, rnd *rand.Rand, failing float64, load int) {
	b := &breaker{threshold: 5, openFor: 30 * time.Second}
	var out []attempt
	state, epoch, row := breakerClosed, 0, 0
	var opened time.Time
	change := func(s breakerState) {
		state, row = s, 0
		epoch++
		if s == breakerOpen {
			opened = time.Now()
		}
	}
	for i := range 20000 {
		time.Sleep(time.Duration(rnd.IntN(100)) * time.Millisecond)
		if len(out) < load && rnd.IntN(2) == 0 {
			want := state == breakerClosed
			if state == breakerOpen && time.Since(opened) >= b.openFor {
				change(breakerHalfOpen)
				want = true
			}
			g, ok := b.allow()
			if ok != want {
				t.Fatalf("turn %d: allowed %v, want %v in state %s", i, ok, want, state)
			}
			if ok {
				out = append(out, attempt{g, epoch})
			}
		} else if len(out) > 0 {
			n := rnd.IntN(len(out))
			a := out[n]
			out[n] = out[len(out)-1]
			out = out[:len(out)-1]
			ok := rnd.Float64() >= failing
			b.report(a.generation, ok)
			switch {
			case a.epoch != epoch:
			case ok && state == breakerHalfOpen:
				change(breakerClosed)
			case ok:
				row = 0
			case state == breakerHalfOpen:
				change(breakerOpen)
			default:
				if row++; row == b.threshold {
					change(breakerOpen)
				}
			}
		}
		if b.state != state {
			t.Fatalf("turn %d: %s, the model is %s", i, b.state, state)
		}
	}
}
