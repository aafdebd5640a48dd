package main

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// returned is a message that counts its NAKs.
type returned struct {
	jetstream.Msg
	naks int
}

func (m *returned) Data() []byte { return []byte("{}") }

func (m *returned) Nak() error {
	m.naks++
	return nil
}

func newTestRouter(t *testing.T) *router {
	cfg := &settings{}
	cfg.Store(&Config{NATSAckWait: 30 * time.Second, NATSMaxAckPending: 100, NATSPrefetch: 10, NATSPrefetchBytes: 1 << 20, PodLease: time.Second})
	m := newMetrics()
	o := newTestOwners(t)
	r := newRouter(cfg, m, o, newHub(cfg, m, o, nil), &peers{cfg: cfg})
	r.connected = func() bool { return true }
	return r
}

// TestWhatComesBehindTheDrain: the library's callback may have waited for room until the router ended. What it has then is
// given back at once, so that other pods need not wait for ACK_WAIT.
func TestWhatComesBehindTheDrain(t *testing.T) {
	r := newTestRouter(t)
	r.stop()
	r.run(t.Context())
	msg := &returned{}
	r.accept(msg)
	if msg.naks != 1 || r.inHand.Load() != 0 || r.bytes.Load() != 0 || r.unrouted.Load() != 0 {
		t.Errorf("%d NAKs, %d in hand of %d bytes (%d), want it given back", msg.naks, r.inHand.Load(), r.bytes.Load(), r.unrouted.Load())
	}
	late := &returned{}
	r.noteWait(time.Now().Add(-29 * time.Second))
	r.accept(late)
	if late.naks != 0 {
		t.Error("an event that JetStream may have given out again was NAKed")
	}
}

// TestArrivedAt: as many messages as PREFETCH may have arrived during a wait, and count from its beginning; a later wait
// makes none of them younger.
func TestArrivedAt(t *testing.T) {
	r := newTestRouter(t) // PREFETCH is 10
	start := time.Now()
	for n := range 30 {
		r.accepted++
		at := start.Add(time.Duration(n) * time.Second)
		if n == 2 || n == 5 {
			r.noteWait(at)
		}
		want := n
		switch {
		case n >= 2 && n <= 12:
			want = 2
		case n > 12 && n <= 15:
			want = 5
		}
		if got := r.arrivedAt(at).Sub(start); got != time.Duration(want)*time.Second {
			t.Errorf("message %d counts as arrived after %v, want %d s", n, got, want)
		}
	}
	if len(r.waits) != 0 {
		t.Errorf("%d waits are kept for ever", len(r.waits))
	}
}
