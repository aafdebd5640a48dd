package main

import (
	"testing"
	"time"
)

// TestLateIsNoVerdict: a delivery that ends too late for JetStream takes no budget, and leaves no note: it comes again.
func TestLateIsNoVerdict(t *testing.T) {
	worlds(t, func(t *testing.T, w *world) {
		for _, worst := range []outcome{gone, failed, written} {
			msg := chatOf("ann", uint64(worst)+1, 1)
			p := &pulled{r: w.router, msg: msg}
			p.src, p.arrived = p, time.Now()
			if !w.router.decode(p) {
				t.Fatal("malformed")
			}
			w.share.take(len(p.payload))
			w.router.newest.Store(time.Now().Add(time.Hour).UnixNano())
			p.deliveries = 10
			if worst == gone {
				p.deliveries = 1
			}
			time.Sleep(w.cfg.lateAfter() + time.Millisecond)
			p.settle(worst)
			wantTold(t, msg)
			if n, g := w.share.parked.Load(), len(w.router.givenUp); n != 0 || g != 0 {
				t.Errorf("%v: %d parked, %d given up", worst, n, g)
			}
		}
		w.wantLedgers(0)
	})
}
