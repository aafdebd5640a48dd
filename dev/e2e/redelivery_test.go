package e2e

import (
	"bytes"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// big is a chat event's payload of n bytes.
func big(n int) []byte { return fmt.Appendf(nil, `{"pad":"%s"}`, strings.Repeat("x", n-10)) }

// wantEachOnce waits until c has got all these events, and expects each once and no others.
func wantEachOnce(c *harness.Client, seqs []uint64) {
	t := c.Pod.W.T
	t.Helper()
	defer func() {
		if t.Failed() {
			m := c.Pod.Metrics()
			t.Logf("%s has %d of %d events; %v gaps, %v dropped, %v failed", c.Dial.User, len(c.Events()), len(seqs), m.Sum("dws_gaps_total"), m.Sum("dws_websocket_messages_dropped_total"), m.Sum("dws_targets_total", `outcome="failed"`))
		}
	}()
	for n := 0; n < len(seqs) && c.Ended() == nil; { // however slow the machine is, as long as something comes
		have := n
		harness.Eventually(t, harness.Patience, fmt.Sprintf("more than %d of %d events", have, len(seqs)), func() bool {
			n = len(c.Events())
			return n > have || c.Ended() != nil
		})
	}
	if end := c.Ended(); end != nil {
		t.Fatalf("%s ended: %+v", c.Dial.User, end)
	}
	got := map[uint64]int{}
	for _, m := range c.Events() {
		got[m.Seq]++
	}
	for _, seq := range seqs {
		if got[seq] != 1 {
			t.Errorf("%s got event %d %d times", c.Dial.User, seq, got[seq])
		}
	}
	if len(got) != len(seqs) {
		t.Errorf("%s got %d events, want %d", c.Dial.User, len(got), len(seqs))
	}
}

// TestStuckNeighbour: with the policy block, events that find no room at one of two users' sockets come again to both. The
// user who had them written does not get them twice; the other gets them when it reads again.
func TestStuckNeighbour(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("WEBSOCKET_DROP_POLICY=block", "WEBSOCKET_BUFFER_SIZE=4", "WEBSOCKET_BLOCK_TIMEOUT=200ms", "WEBSOCKET_WRITE_TIMEOUT=15s", "NATS_NAK_DELAY=300ms"))
		pod := w.Start()
		ann := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		d := as(harness.User("acme", "desk1", "bob"))
		d.RcvBuf = 64 << 10
		bob := pod.Connect(d)
		bob.Pause()
		const events = 60 // more than the ring and the kernel's buffers take
		var seqs []uint64
		for range events {
			seqs = append(seqs, w.PublishRaw(w.Prefix+".acme.desk1.chats", big(96<<10)))
		}
		pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_targets_total", `outcome="duplicate"`)
		if i := w.ConsumerInfo(); i.NumAckPending == 0 || i.AckFloor.Stream >= seqs[events-1] {
			t.Errorf("JetStream has %d ack pending and its ack floor at %d of %d, though bob reads nothing", i.NumAckPending, i.AckFloor.Stream, seqs[events-1])
		}
		bob.Resume()
		wantEachOnce(bob, seqs)
		wantEachOnce(ann, seqs)
		wantAtRest(pod, map[string]float64{"delivered": events, "expired": 0, "shed": 0, "dropped": 0})
		if n := pod.Metric("dws_targets_total", `outcome="written"`); n != 2*events {
			t.Errorf("%v events written, want %d", n, 2*events)
		}
	})
}

// TestDeadNeighbour: a socket dies with events in its ring. The agent's other user has them, so they are acked, and do not come to that
// one again; the dead one's user has them by the resume.
func TestDeadNeighbour(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("NATS_NAK_DELAY=300ms"))
		pod := w.Start()
		ann := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		d := as(harness.User("acme", "desk1", "bob"))
		d.RcvBuf = 64 << 10
		bob := pod.Connect(d.Positions())
		bob.Pause()
		const events = 60 // more than the ring and the kernel's buffers take
		var seqs []uint64
		for range events {
			seqs = append(seqs, w.PublishRaw(w.Prefix+".acme.desk1.chats", big(96<<10)))
		}
		wantEachOnce(ann, seqs)
		waiting := pod.Metric("dws_websocket_buffer_used")
		if waiting < 10 {
			t.Fatalf("%v events wait for bob, too few to prove anything", waiting)
		}
		if i := w.ConsumerInfo(); i.NumAckPending != int(waiting) {
			t.Errorf("JetStream has %d ack pending while %v events wait for bob", i.NumAckPending, waiting)
		}
		bob.Abort()
		wantAtRest(pod, map[string]float64{"delivered": events})
		wantEachOnce(ann, seqs)
		m := pod.Metrics()
		if gone, twice := m.Sum("dws_targets_total", `outcome="gone"`), m.Sum("dws_targets_total", `outcome="duplicate"`); gone != waiting || twice != 0 {
			t.Errorf("%v events were gone with bob's socket and %v came to ann's again, want %v and 0", gone, twice, waiting)
		}
		place := bob.Place()
		bob = pod.Dial(d.From(place))
		wantReplay(t, bob, "ready", slices.DeleteFunc(slices.Clone(seqs), func(seq uint64) bool { return seq <= place.Seq })...)
		if place.Seq >= seqs[events-int(waiting)] {
			t.Errorf("bob's position %d passes %d, which waited for him", place.Seq, seqs[events-int(waiting)])
		}
	})
}

// TestOlderAfterNewer: an event that found nobody comes when its user is there, after newer ones, and only once.
func TestOlderAfterNewer(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, harness.Settings("NATS_NAK_DELAY=3s"))
		pod := w.Start()
		older := w.Chat("acme", "desk1")
		pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_events_total", `outcome="nak_no_owner"`)
		ann := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		newer := []uint64{w.Chat("acme", "desk1"), w.Contact("acme", "desk1")}
		for _, seq := range append(newer, older) {
			ann.WantEvent(seq)
		}
		wantAtRest(pod, map[string]float64{"delivered": 3, "nak_no_owner": 1, "no_owner": 0})
		ann.WantNothingElse()
	})
}

// peakMemory is the most resident memory that the pod has had, in bytes.
func peakMemory(t *testing.T, pod *harness.Pod) (bytesPeak int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pod.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := bytes.Cut(status, []byte("\nVmHWM:"))
	if _, err := fmt.Sscanf(string(rest), "%d kB", &bytesPeak); !ok || err != nil {
		t.Fatalf("no VmHWM in %s", status)
	}
	return bytesPeak << 10
}

// TestBigEventsInBulk: 200 events of 900 KiB, published as fast as JetStream takes them, all arrive; the pod holds only so many of
// them at once, and NATS finds nothing to complain of. It runs alone: a client that other tests keep from reading is a slow one,
// and loses events with a gap, as it should.
func TestBigEventsInBulk(t *testing.T) {
	for name, gorilla := range map[string]bool{"coder": false, "gorilla": true} {
		t.Run(name, func(t *testing.T) {
			w := harness.New(t)
			pod := w.Start()
			d := harness.User("acme", "desk1", "ann")
			d.Gorilla = gorilla
			c := pod.Connect(d)
			const size = 900 << 10
			events := 200
			if harness.Race { // which makes checking a payload twenty times as slow
				events = 50
			}
			payload := big(size)
			var acks []jetstream.PubAckFuture
			for range events {
				acks = append(acks, publishLater(w, feed.Event{Subject: "acme.desk1.chats", Payload: payload}))
			}
			var seqs []uint64
			for _, f := range acks {
				seqs = append(seqs, acked(w, f))
			}
			wantEachOnce(c, seqs)
			for _, m := range c.Events() {
				if len(m.Payload) != size {
					t.Fatalf("event %d has %d bytes, want %d", m.Seq, len(m.Payload), size)
				}
			}
			wantAtRest(pod, map[string]float64{"delivered": float64(events), "dropped": 0, "shed": 0})
			if text := pod.Log.Text(); strings.Contains(text, "NATS disconnected") || strings.Contains(text, "NATS reports") || strings.Count(text, "NATS connected") != 1 {
				t.Errorf("the connection to NATS was not left alone; log: %s", pod.Log.Path)
			}
			peak := peakMemory(t, pod)
			t.Logf("peak of %d MiB", peak>>20)
			if limit := 384 << 20; !harness.Race && peak > limit {
				t.Errorf("peak of %d MiB, want less than %d", peak>>20, limit>>20)
			}
		})
	}
}

// TestRedeliveriesKeepTheirTime: while events for absent agents come every few milliseconds, those that wait come again when
// their delay has ended, and not only at the next pause.
func TestRedeliveriesKeepTheirTime(t *testing.T) {
	t.Parallel()
	const budget = 1200
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=300ms", fmt.Sprint("NATS_PARKED_BUDGET=", budget)))
	pod := w.Start()
	flow := w.Flow(400, func(i int) feed.Event { return feed.Chat("acme", fmt.Sprintf("gone%d", i), "628111@c.us", "hi", 1) })
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_redelivered_total")
	if n := flow.Sent(); n >= budget {
		t.Errorf("nothing came again before %d events were parked and the flow of NAKs paused", n)
	}
	flow.Stop()
}
