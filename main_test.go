package main

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"testing"
)

// gcPercent is what GOGC is now.
func gcPercent() uint64 {
	now := []metrics.Sample{{Name: "/gc/gogc:percent"}}
	metrics.Read(now)
	return now[0].Value.Uint64()
}

func TestPaceGC(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	collected := func(what string, percent func(uint64) bool) {
		t.Helper()
		wantEventually(t, what, func() bool {
			runtime.GC()
			return percent(gcPercent())
		})
	}
	paceGC(ctx)
	collected("room beyond what is in use", func(p uint64) bool { return p > 100 && p <= 800 })
	big := make([]byte, 2*garbageRoom)
	collected("Go's default for a large heap", func(p uint64) bool { return p == 100 })
	runtime.KeepAlive(big)
	collected("room again", func(p uint64) bool { return p > 100 && p <= 800 })
	cancel()
	debug.SetGCPercent(77)
	paceGC(ctx)
	if p := gcPercent(); p != 77 {
		t.Errorf("GOGC is %d behind the end", p)
	}
}
