package main

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

// TestClaimModel crosses attach, detach, the one write under way, its failure and new epochs at random. Whenever nothing moves,
// a socket whose attach has succeeded has its claim in Redis under this pod's epoch, unless it is owed a gap; and when all
// have gone nothing is left. With many more bubbles in one process the race detector itself breaks now and then (see
// golang/go#78156), so there are few.
func TestClaimModel(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 34))
			o := newTestOwners(t)
			o.heldAt.Store(int64(time.Since(o.base)))
			r := route{routeGeneral, "c", "a", ""}
			inRedis := map[string]bool{} // epochs under which r is claimed
			var batch []*localRoute
			var claim []bool
			var epoch string
			pending, holds := map[*conn]context.CancelFunc{}, map[*conn]bool{}
			gone := func() (c *conn) { // one that holds
				for c = range holds {
					delete(holds, c)
					return c
				}
				return nil
			}
			answer := func(err error, applied bool) {
				if batch == nil {
					return
				}
				if applied {
					for i := range batch {
						if claim[i] {
							inRedis[epoch] = true
						} else {
							delete(inRedis, epoch)
						}
					}
				}
				o.claimed(batch, claim, epoch, err)
				batch = nil
			}
			write := func() {
				if batch == nil {
					if batch, claim, epoch = o.takeBatch(); len(batch) == 0 {
						batch = nil
					}
				}
			}
			results := make(chan *conn, 100)
			steps := []func(){
				func() {
					c := &conn{}
					c.ring.closed = true // takes no gap
					ctx, cancel := context.WithCancel(t.Context())
					pending[c] = cancel
					go func() {
						if o.attach(ctx, c, r) != nil {
							c = nil
						}
						results <- c
					}()
				},
				func() {
					if c := gone(); c != nil {
						o.detach(c, r)
					}
				},
				func() { // a client that does not wait for its claim
					for c, cancel := range pending {
						cancel()
						delete(pending, c)
						return
					}
				},
				write, write,
				func() { answer(nil, true) }, func() { answer(nil, true) },
				func() { answer(errors.New("timeout"), rnd.IntN(2) == 0) },
				func() {
					if rnd.IntN(4) == 0 { // as newEpoch does
						o.mu.Lock()
						o.epochNow += "'"
						o.claimAgainLocked()
						o.regap = true
						o.mu.Unlock()
					}
				},
			}
			look := func() {
				synctest.Wait()
				for len(results) > 0 {
					if c := <-results; c != nil {
						holds[c] = true
						delete(pending, c)
					}
				}
				o.mu.Lock()
				defer o.mu.Unlock()
				if len(holds) > 0 && !o.regap && !inRedis[o.epochNow] {
					t.Fatalf("seed %d: %d sockets are attached, Redis has no claim", seed, len(holds))
				}
			}
			for range 60 {
				steps[rnd.IntN(len(steps))]()
				look()
			}
			for _, cancel := range pending {
				cancel()
			}
			look()
			for c := gone(); c != nil; c = gone() {
				o.detach(c, r)
			}
			for range 4 {
				answer(nil, true)
				write()
			}
			if len(o.routes) > 0 || len(o.dirty) > 0 || inRedis[o.epochNow] {
				t.Fatalf("seed %d: left behind: %d routes, %d writes, claimed %v", seed, len(o.routes), len(o.dirty), inRedis[o.epochNow])
			}
		})
	}
}
