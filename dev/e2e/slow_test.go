package e2e

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

const (
	floodSize = 32 << 10 // of each event
	ringSize  = 32
	// kernelTakes is more than what the kernel's buffers take of a flood whose client does not read, in events.
	kernelTakes = 320
)

// floodEvents makes a flood of 64 MiB. The race detector slows the check of every byte down ten times; 16 MiB are enough there.
var floodEvents = map[bool]int{false: 2048, true: 512}[harness.Race]

// slow are the settings of tests about a client that does not read: small rings, and a pod that takes few bytes in advance, so
// that its memory tells whether it holds what it should not.
var slow = harness.Settings("WEBSOCKET_BUFFER_SIZE=32", "NATS_PREFETCH_BYTES=2MiB", "NATS_NAK_DELAY=300ms",
	"WEBSOCKET_BLOCK_TIMEOUT=500ms", "PEER_TIMEOUT=1s", "SERVER_SHUTDOWN_TIMEOUT=60s", "RESUME_MAX_EVENTS=5000")

// publishMany publishes n events as fast as the stream takes them, and returns their sequences.
func publishMany(t *testing.T, w *harness.World, n int, subject string, payload []byte) []uint64 {
	t.Helper()
	acks := make([]jetstream.PubAckFuture, 0, n)
	seqs := make([]uint64, 0, n)
	collect := func(keep int) {
		for len(acks) > keep {
			select {
			case ack := <-acks[0].Ok():
				seqs = append(seqs, ack.Sequence)
			case err := <-acks[0].Err():
				t.Fatalf("publish: %v", err)
			case <-time.After(harness.Patience):
				t.Fatal("publish: no answer")
			}
			acks = acks[1:]
		}
	}
	for range n {
		ack, err := w.JS.PublishAsync(w.Prefix+"."+subject, payload)
		if err != nil {
			t.Fatalf("publish: %v", err)
		}
		acks = append(acks, ack)
		collect(64)
	}
	collect(0)
	return seqs
}

// flood publishes as many contact events for an agent as floodEvents says.
func flood(t *testing.T, w *harness.World, agent string) []uint64 {
	t.Helper()
	payload := slices.Concat([]byte(`{"event_id":"x","company_id":"acme","row_data":{"pad":"`), bytes.Repeat([]byte("x"), floodSize), []byte(`"}}`))
	return publishMany(t, w, floodEvents, "acme."+agent+".contacts", payload)
}

// neighbour is a user of another agent on the same pod.
type neighbour struct {
	*harness.Client
	t *testing.T
	w *harness.World
}

// latency is the median from publishing to reading of an even flow of events, all of which have come; while runs meanwhile.
// The flow is slow, so that even on a machine that stands still for a second no ring fills up.
func (n neighbour) latency(while func()) time.Duration {
	n.t.Helper()
	flow := n.w.Flow(10, func(int) feed.Event { return feed.Chat(n.Dial.Company, n.Dial.Agent, "628111@c.us", "hi", 1) })
	while()
	flow.WaitSent(15)
	var all []time.Duration
	for _, p := range flow.Stop() {
		all = append(all, n.WaitEvent(p.Seq).At.Sub(p.At))
	}
	slices.Sort(all)
	return all[len(all)/2]
}

// stuck is a pod with one client that does not read and one that does.
type stuck struct {
	w    *harness.World
	pod  *harness.Pod
	ann  *harness.Client // of desk1; reads until it is paused
	bob  neighbour
	rest time.Duration // bob's latency before all
	sys  float64       // bytes that the pod's Go runtime had from the system then
}

// floods lets one flood at a time through the machine.
var floods sync.Mutex

func newStuck(t *testing.T, settings ...string) *stuck {
	t.Helper()
	floods.Lock()
	t.Cleanup(floods.Unlock)
	s := &stuck{w: harness.New(t, slow)}
	s.pod = s.w.Start(settings...)
	d := harness.User("acme", "desk1", "ann")
	d.RcvBuf = 4096
	s.ann = s.pod.Connect(d.Positions())
	s.bob = neighbour{s.pod.Connect(harness.User("acme", "desk2", "bob")), t, s.w}
	s.rest = s.bob.latency(func() {})
	s.sys = s.pod.Metric("go_memstats_sys_bytes")
	return s
}

// wantCalm expects that the pod has not taken much memory and that the neighbour notices nothing of the stuck socket.
func (s *stuck) wantCalm(t *testing.T) {
	t.Helper()
	if grown := s.pod.Metric("go_memstats_sys_bytes") - s.sys; grown > 96<<20 {
		t.Errorf("the pod's memory has grown by %.0f MiB", grown/(1<<20))
	}
	// A machine that is busy with other tests is slow at times; a pod that is held up by the socket is slow every time, by the
	// 500 ms that an event waits for room. With the race detector it may be as slow by itself: 64 events of 32 KiB, which bob's
	// may stand behind, take it 150 ms alone on the machine. There only that bob's come is judged.
	var got time.Duration
	for range 4 {
		if got = s.bob.latency(func() {}); got < 3*s.rest+100*time.Millisecond || harness.Race {
			return
		}
	}
	t.Errorf("the neighbour's events take %v while a socket is stuck, %v before", got, s.rest)
}

// wantRedelivered waits until JetStream says that it gives events of the flood out again.
func (s *stuck) wantRedelivered(t *testing.T) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "events to be given out again", func() bool { return s.w.ConsumerInfo().NumRedelivered > 0 })
}

// seqsOf counts the events of a client by sequence.
func seqsOf(clients ...*harness.Client) map[uint64]int {
	got := map[uint64]int{}
	for _, c := range clients {
		for _, m := range c.Events() {
			got[m.Seq]++
		}
	}
	return got
}

// contacts is how many deliveries of the flood ended so.
func (s *stuck) contacts(outcome string) int {
	return int(s.pod.Metric("dws_events_total", `kind="contact"`, `outcome="`+outcome+`"`))
}

// TestStuckClientDropsOldest: under drop_oldest a client that does not read loses the oldest events that wait for it, each
// counted and acked, is told so when it reads again, and has them all by its resume.
func TestStuckClientDropsOldest(t *testing.T) {
	t.Parallel()
	s := newStuck(t, "WEBSOCKET_WRITE_TIMEOUT=22s")
	s.ann.Pause()
	var seqs []uint64
	s.bob.latency(func() { seqs = flood(t, s.w, "desk1") }) // all of bob's come
	harness.Eventually(t, harness.Patience, "all but a ring of the flood to be acked", func() bool {
		info := s.w.ConsumerInfo()
		return info.NumPending == 0 && info.NumAckPending <= ringSize+4
	})
	if info := s.w.ConsumerInfo(); info.NumAckPending < ringSize || info.NumRedelivered != 0 {
		t.Errorf("a ring waits, but JetStream says: %d pending, %d redelivered", info.NumAckPending, info.NumRedelivered)
	}
	s.wantCalm(t)
	s.ann.Resume()
	s.ann.Take("the last event", func(m harness.Message) bool { return m.Seq == seqs[len(seqs)-1] })
	s.w.Settled()

	got := seqsOf(s.ann)
	got[seqs[len(seqs)-1]]++ // taken above
	lost := map[uint64]bool{}
	for _, seq := range seqs {
		if got[seq] > 1 {
			t.Errorf("event %d came %d times", seq, got[seq])
		}
		if got[seq] == 0 {
			lost[seq] = true
		}
	}
	if len(lost) < floodEvents/4 || len(lost) != s.contacts("dropped") || float64(len(lost)) != s.pod.Metric("dws_websocket_messages_dropped_total", `reason="buffer"`) {
		t.Errorf("%d events lost, %d counted as dropped", len(lost), s.contacts("dropped"))
	}
	if got := s.contacts("delivered"); got != floodEvents-len(lost) {
		t.Errorf("%d events acked as delivered, the client has %d", got, floodEvents-len(lost))
	}
	s.wantGaps(t, lost)
	s.wantResumed(t, lost)
	s.ann.WantNothingElse()
	s.w.Settled()
	s.pod.WantLedgers()
}

// wantGaps takes all gaps out of ann's inbox: each says from which position on something may be lost. What else is in the inbox is
// forgotten.
func (s *stuck) wantGaps(t *testing.T, lost map[uint64]bool) {
	t.Helper()
	first := slices.Min(slices.Collect(maps.Keys(lost)))
	n := int(s.pod.Metric("dws_gaps_total", `reason="buffer"`))
	if n == 0 {
		t.Fatal("no gap was announced")
	}
	for i := range n {
		if gap := s.ann.WantGap("buffer"); gap.Since >= first || gap.Since > s.ann.Place().Seq {
			t.Errorf("gap %d of %d is since %d, the position is %d; the first lost event is %d", i+1, n, gap.Since, s.ann.Place().Seq, first)
		}
	}
	s.ann.Forget()
}

// wantResumed has ann ask for what she lost.
func (s *stuck) wantResumed(t *testing.T, lost map[uint64]bool) {
	t.Helper()
	if r := s.ann.ResumeMissed(); r.Gap {
		t.Errorf("resumed: %+v", r)
	}
	got := seqsOf(s.ann)
	for seq := range lost {
		if got[seq] != 1 {
			t.Errorf("of the resume event %d came %d times", seq, got[seq])
		}
	}
	s.ann.Forget()
}

// TestStuckClientBlocks: under block nothing is dropped for a client that does not read: what finds no room comes again, and
// it has everything, once, when it reads again in time.
func TestStuckClientBlocks(t *testing.T) {
	t.Parallel()
	s := newStuck(t, "WEBSOCKET_DROP_POLICY=block", "WEBSOCKET_WRITE_TIMEOUT=22s")
	s.ann.Pause()
	seqs := flood(t, s.w, "desk1")
	s.wantRedelivered(t)
	if info := s.w.ConsumerInfo(); info.NumAckPending+int(info.NumPending) < floodEvents-kernelTakes {
		t.Errorf("nobody reads, but JetStream says: %d pending, %d waiting", info.NumAckPending, info.NumPending)
	}
	s.wantCalm(t)
	s.ann.Resume()
	s.w.Settled()
	harness.Eventually(t, harness.Patience, "the client to have everything", func() bool { return len(seqsOf(s.ann)) >= floodEvents })
	got := seqsOf(s.ann)
	for _, seq := range seqs {
		if got[seq] != 1 {
			t.Errorf("event %d came %d times", seq, got[seq])
		}
	}
	if n := givenUp(s.pod); n != 0 || s.pod.Metric("dws_gaps_total") != 0 || s.ann.Ended() != nil {
		t.Errorf("%v events given up, %v gaps, closed: %v", n, s.pod.Metric("dws_gaps_total"), s.ann.Ended())
	}
	s.pod.WantLedgers()
}

// TestStuckClientIsClosed: under block a client that does not read at all is closed after the write time-out. What it has
// not got comes to its next socket, by the resume or again.
func TestStuckClientIsClosed(t *testing.T) {
	t.Parallel()
	s := newStuck(t, "WEBSOCKET_DROP_POLICY=block", "WEBSOCKET_WRITE_TIMEOUT=5s")
	s.ann.Pause()
	begin := time.Now()
	seqs := flood(t, s.w, "desk1")
	s.wantRedelivered(t)
	s.pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_slow_clients_disconnected_total")
	if took := time.Since(begin); took < 5*time.Second {
		t.Errorf("closed after %v", took)
	}
	s.ann.Resume()
	harness.Eventually(t, harness.Patience, "the first socket to be closed", func() bool { return s.ann.Ended() != nil })
	if end := *s.ann.Ended(); end.Code != 0 && (end.Code != 4408 || end.Reason != "slow-client") {
		t.Errorf("closed with %d %q", end.Code, end.Reason)
	}
	place := s.ann.Place()
	again := s.pod.Dial(harness.User("acme", "desk1", "ann").From(place))
	if r := again.TakeReply("ready"); r.Gap {
		t.Errorf("ready: %+v", r)
	}
	s.w.Settled()
	harness.Eventually(t, harness.Patience, "both sockets to have everything", func() bool { return len(seqsOf(s.ann, again)) >= floodEvents })
	got, late := seqsOf(s.ann, again), seqsOf(again)
	for _, seq := range seqs {
		if got[seq] == 0 || seq > place.Seq && late[seq] != 1 {
			t.Errorf("event %d came %d times in all, and %d times behind position %d", seq, got[seq], late[seq], place.Seq)
		}
	}
	s.pod.WantLedgers()
}

// TestBurstReachesItsReader: far more events than a ring holds come at once, as after an outage. A client that reads them gets
// them all: what the rings give up is for clients that do not keep up, not for a router that is faster than the writers.
func TestBurstReachesItsReader(t *testing.T) {
	t.Parallel()
	const events = 5000
	w := harness.New(t)
	pod := w.Start()
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	publishMany(t, w, events, "acme.desk1.chats", []byte(`{"event_id":"x","company_id":"acme","row_data":{}}`))
	w.Settled()
	harness.Eventually(t, harness.Patience, "the last event", func() bool { return seqsOf(c)[events] > 0 })
	if got := len(seqsOf(c)); got != events {
		t.Errorf("%d of %d events came; dropped: %v", got, events, ended(pod, "dropped"))
	}
	pod.WantLedgers()
}

// TestBurstReachesItsReaderBesideStuckOnes: what sockets that do not read hold makes no room in the ring of one that does.
func TestBurstReachesItsReaderBesideStuckOnes(t *testing.T) {
	const events = 5000
	w := harness.New(t)
	pod := w.Start("WEBSOCKET_WRITE_TIMEOUT=20s", "SERVER_SHUTDOWN_TIMEOUT=60s")
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	for i := range 3 {
		d := harness.User("acme", "desk1", fmt.Sprintf("stuck%d", i))
		d.RcvBuf = 4096
		pod.Connect(d).Pause()
	}
	payload := slices.Concat([]byte(`{"event_id":"x","company_id":"acme","row_data":{"pad":"`), bytes.Repeat([]byte("x"), 32<<10), []byte(`"}}`))
	big := publishMany(t, w, 500, "acme.desk1.contacts", payload)
	harness.Eventually(t, harness.Patience, "the last large event", func() bool { return seqsOf(c)[big[len(big)-1]] > 0 })
	time.Sleep(1500 * time.Millisecond) // those that do not read count as stuck
	seqs := publishMany(t, w, events, "acme.desk1.chats", []byte(`{"event_id":"x","company_id":"acme","row_data":{}}`))
	harness.Eventually(t, harness.Patience, "the last event", func() bool { return seqsOf(c)[seqs[events-1]] > 0 })
	have := seqsOf(c)
	got := 0
	for _, seq := range seqs {
		if have[seq] > 0 {
			got++
		}
	}
	if got != events {
		t.Errorf("%d of %d events came", got, events)
	}
}
