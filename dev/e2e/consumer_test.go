package e2e

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/harness"
)

// consumerBack waits until the service has made the consumer again; made is when the one before was.
func consumerBack(w *harness.World, made time.Time) {
	w.T.Helper()
	harness.Eventually(w.T, harness.Patience, "the consumer to be made again", func() bool {
		c, err := w.JS.Consumer(harness.Within(w.T, harness.Patience), w.Stream, w.Consumer)
		return err == nil && c.CachedInfo().Created.After(made)
	})
}

// TestConsumerDeleted: somebody deletes the consumer under load, twice; it is made again, and nothing that was published
// in between is lost.
func TestConsumerDeleted(t *testing.T) {
	t.Parallel()
	const rate = 500
	w := harness.New(t, roomy)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0])
	ann.SelectChat("chat.one")
	flow := w.Flow(rate, desk0)
	for range 2 {
		flow.WaitSent(rate / 2)
		made := w.ConsumerInfo().Created
		if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
			t.Fatal(err)
		}
		consumerBack(w, made)
	}
	flow.WaitSent(rate / 2)
	wantEach(t, ann, flow.Stop())
	w.Settled()
	pod.WaitReady()
	if n := givenUp(pod); n != 0 {
		t.Errorf("%v deliveries were given up", n)
	}
	pod.WantLedgers()
}

// TestConsumerDeletedWhileNobodyRuns: the floor of what was settled is known even when no pod lives that saw it.
func TestConsumerDeletedWhileNobodyRuns(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0])
	ann.WantNothingElse()
	w.Settled()
	pod.Terminate()
	pod.WantExit(0, harness.Patience)
	if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
		t.Fatal(err)
	}
	var seqs []uint64
	for range 5 {
		seqs = append(seqs, w.Chat("acme", "desk0"))
	}
	next := w.Start()
	ann = next.Connect(agents(1)[0])
	for _, seq := range seqs {
		ann.WaitEvent(seq)
	}
	w.Settled()
	next.WantLedgers()
}

// TestStreamMadeAnew: somebody deletes the stream and makes it again: it is read from its beginning. Its sequences start again
// at 1: that a socket has had an event of the old stream says nothing about the one of this number in the new one.
func TestStreamMadeAnew(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0].Positions())
	for range 50 {
		ann.WantNothingElse()
	}
	w.Settled()
	if err := w.JS.DeleteStream(harness.Within(t, harness.Patience), w.Stream); err != nil {
		t.Fatal(err)
	}
	w.MakeStream(func(*jetstream.StreamConfig) {})
	ann.WantGap("stream") // her numbers are the old stream's, which would make her drop new events
	if r := ann.ResumeMissed(); !r.Gap || r.Stream == "" || r.Stream == ann.Ready.Stream {
		t.Errorf("a resume from stream %s is answered with %+v, want a gap and another stream", ann.Ready.Stream, r)
	}
	for i := range 5 {
		if seq := w.Chat("acme", "desk0"); seq != uint64(i+1) {
			t.Fatalf("event %d of the new stream has sequence %d", i+1, seq)
		}
		ann.WantEvent(uint64(i + 1))
	}
	w.Settled()
	pod.WaitReady()
	// Another pod pulled one of the next ten and gave it back: the first delivery here is JetStream's second.
	given := giveOneBack(t, w)
	ann.WaitEvent(given)
	w.Settled()
	if n := givenUp(pod); n != 0 {
		t.Errorf("%v deliveries were given up", n)
	}
	pod.WantLedgers()
}

// giveOneBack publishes events of desk0 until one of them was given to the test instead of the pod, refuses that one, and returns
// its sequence.
func giveOneBack(t *testing.T, w *harness.World) uint64 {
	t.Helper()
	cons, err := w.JS.Consumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer)
	if err != nil {
		t.Fatal(err)
	}
	batch, err := cons.Fetch(1, jetstream.FetchMaxWait(harness.Patience))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		w.Chat("acme", "desk0")
		select {
		case msg := <-batch.Messages():
			md, err := msg.Metadata()
			if err != nil {
				t.Fatal(err)
			}
			if err := msg.Nak(); err != nil {
				t.Fatal(err)
			}
			return md.Sequence.Stream
		case <-time.After(100 * time.Millisecond):
		}
	}
	t.Fatal("JetStream gives none of 20 events to a second puller")
	return 0
}

// TestConsumerThatDoesNotFit: a durable that can't be changed into what is needed: the service says what is wrong with it
// and is not ready, until somebody deletes it.
func TestConsumerThatDoesNotFit(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	_, err := w.JS.CreateConsumer(harness.Within(t, harness.Patience), w.Stream, jetstream.ConsumerConfig{
		Durable: w.Consumer, FilterSubject: w.Prefix + ".>", AckPolicy: jetstream.AckAllPolicy,
	})
	if err != nil {
		t.Fatal(err)
	}
	pod := w.Launch()
	pod.WaitListening()
	notReady(pod, "consumer")
	harness.Eventually(t, harness.Patience, "/ready to name the field", func() bool {
		return strings.Contains(string(pod.Do("GET", "/ready", nil, nil).Body), "ack_policy")
	})
	if _, err := pod.Log.Find(harness.Within(t, harness.Patience), func(line string) bool { return strings.Contains(line, "ack_policy") }); err != nil {
		t.Errorf("the log does not name the field: %v", err)
	}
	if info := w.ConsumerInfo(); info.NumWaiting != 0 {
		t.Errorf("%d pulls wait at a consumer that does not fit", info.NumWaiting)
	}
	if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
		t.Fatal(err)
	}
	pod.WaitReady()
	pod.Connect(agents(1)[0]).WantNothingElse()
	w.Settled()
	pod.WantLedgers()
}

// TestConsumerIsChanged: what JetStream lets one change on a durable is made what the settings say, without loss.
func TestConsumerIsChanged(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	_, err := w.JS.CreateConsumer(harness.Within(t, harness.Patience), w.Stream, jetstream.ConsumerConfig{
		Durable: w.Consumer, FilterSubject: w.Prefix + ".>", AckPolicy: jetstream.AckExplicitPolicy, AckWait: 11 * time.Second,
		MaxAckPending: 100, MaxDeliver: 3, BackOff: []time.Duration{time.Second, 2 * time.Second},
	})
	if err != nil {
		t.Fatal(err)
	}
	seq := w.Chat("acme", "desk0") // before the service runs
	pod := w.Start()
	c := w.ConsumerInfo().Config
	if c.AckWait != 30*time.Second || c.MaxAckPending != 65536 || c.MaxDeliver != -1 || len(c.BackOff) != 0 {
		t.Errorf("the consumer was left as it was: %+v", c)
	}
	findLine(pod, "consumer changed to these settings",
		"max_deliver from 3 to unlimited, backoff from [1s 2s] to none, ack_wait from 1s to 30s, max_ack_pending from 100 to 65536")
	pod.Connect(agents(1)[0]).WaitEvent(seq)
	w.Settled()
	pod.WantLedgers()
}
