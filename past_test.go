package main

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestReplaysTakeTurns: no more than RESUME_CONCURRENCY requests of the stream are under way, and who waits for a turn
// stops waiting with its context.
func TestReplaysTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 2})
		p := newPast(cfg, nil, nil)
		var running, most atomic.Int32
		done := make(chan error)
		for range 5 {
			go func() {
				_, err := limited(t.Context(), p, func() (int, error) {
					most.Store(max(most.Load(), running.Add(1)))
					time.Sleep(time.Second) // on the bubble's clock
					running.Add(-1)
					return 0, nil
				})
				done <- err
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := limited(ctx, p, func() (int, error) { t.Error("made out of turn"); return 0, nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait that its context ended: %v", err)
		}
		for range 5 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if most.Load() != 2 {
			t.Errorf("%d requests at once, want 2", most.Load())
		}
	})
}
