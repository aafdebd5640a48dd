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

// TestWhatComesBehindTheDrain: the library's callback may have waited for room until the router ended. What it has then is
// given back at once, so that other pods need not wait for ACK_WAIT.
func TestWhatComesBehindTheDrain(t *testing.T) {
	cfg := &settings{}
	cfg.Store(&Config{NATSAckWait: 30 * time.Second, NATSMaxAckPending: 100, NATSPrefetch: 10, NATSPrefetchBytes: 1 << 20, PodLease: time.Second})
	m := newMetrics()
	o := newTestOwners(t)
	r := newRouter(cfg, m, o, newHub(cfg, m, o, nil), &peers{cfg: cfg})
	r.connected = func() bool { return true }
	r.stop()
	r.run(t.Context())
	msg := &returned{}
	r.accept(msg)
	if msg.naks != 1 || r.inHand.Load() != 0 || r.bytes.Load() != 0 || r.unrouted.Load() != 0 {
		t.Errorf("%d NAKs, %d in hand of %d bytes (%d), want it given back", msg.naks, r.inHand.Load(), r.bytes.Load(), r.unrouted.Load())
	}
	late := &returned{}
	r.floor, r.floorLeft = time.Now().Add(-29*time.Second), 1
	r.accept(late)
	if late.naks != 0 {
		t.Error("an event that JetStream may have given out again was NAKed")
	}
}
