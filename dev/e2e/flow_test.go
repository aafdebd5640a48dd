package e2e

import (
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// flow publishes chat events at a steady rate, for the agents in turn, while a test breaks things.
type flow struct {
	w    *harness.World
	halt func() // ends the goroutine and waits for it; may be called again

	// owned by the publishing goroutine until it is done
	sent   map[string][]jetstream.PubAckFuture // by agent
	failed int                                 // could not even be sent
}

// startFlow begins to publish rate events a second.
func startFlow(w *harness.World, rate int, agents []string) *flow {
	w.T.Helper()
	js, err := jetstream.New(w.NC, jetstream.WithPublishAsyncTimeout(harness.Patience), jetstream.WithPublishAsyncMaxPending(100_000))
	if err != nil {
		w.T.Fatal(err)
	}
	f := &flow{w: w, sent: map[string][]jetstream.PubAckFuture{}}
	end := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() { f.publish(js, rate, agents, end) })
	f.halt = sync.OnceFunc(func() { close(end); done.Wait() })
	w.T.Cleanup(f.halt)
	return f
}

func (f *flow) publish(js jetstream.JetStream, rate int, agents []string, end <-chan struct{}) {
	const step = 10 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	begin := time.Now()
	for n := 0; ; {
		select {
		case <-end:
			return
		case <-tick.C:
		}
		for due := int(time.Since(begin).Seconds() * float64(rate)); n < due; n++ {
			agent := agents[n%len(agents)]
			ev := feed.Chat("acme", agent, "628111@c.us", feed.Text(), n)
			ack, err := js.PublishAsync(f.w.Prefix+"."+ev.Subject, ev.Payload,
				jetstream.WithRetryAttempts(1000), jetstream.WithRetryWait(100*time.Millisecond)) // while there is no leader
			if err != nil {
				f.failed++
				continue
			}
			f.sent[agent] = append(f.sent[agent], ack)
		}
	}
}

// stop ends the flow and returns the sequences that JetStream has acknowledged, by agent.
func (f *flow) stop() map[string][]uint64 {
	f.halt()
	seqs := map[string][]uint64{}
	n, lost := 0, f.failed
	for agent, acks := range f.sent {
		for _, ack := range acks {
			select {
			case a := <-ack.Ok():
				seqs[agent] = append(seqs[agent], a.Sequence)
				n++
			case <-ack.Err():
				lost++ // perhaps stored, perhaps not: nobody counts on it
			}
		}
	}
	f.w.T.Logf("%d events published, %d more not acknowledged by JetStream", n, lost)
	return seqs
}

// wantAll ends the flow and waits until each of the clients has got every event of its agent that JetStream acknowledged.
// It returns the longest time in which no client got any.
func (f *flow) wantAll(clients []*harness.Client) time.Duration {
	f.w.T.Helper()
	seqs := f.stop()
	// What fails while things are broken, or behind a breaker that opened, comes again within the retry horizon.
	ctx := harness.Within(f.w.T, 90*time.Second)
	var at []time.Time
	twice := 0
	for _, c := range clients {
		for _, seq := range seqs[c.Dial.Agent] {
			m, err := c.TryTake(ctx, func(m harness.Message) bool { return m.Type == "event" && m.Seq == seq })
			if err != nil {
				f.w.T.Fatalf("event %d of %s did not come: %v", seq, c.Dial.Agent, err)
			}
			at = append(at, m.At)
		}
		if len(seqs[c.Dial.Agent]) == 0 {
			f.w.T.Errorf("no event of %s was published", c.Dial.Agent)
		}
		twice += len(c.Events())
		wantOnlyGaps(c)
	}
	slices.SortFunc(at, time.Time.Compare)
	longest := time.Duration(0)
	for i := 1; i < len(at); i++ {
		longest = max(longest, at[i].Sub(at[i-1]))
	}
	f.w.T.Logf("%d events arrived, %d of them also a second time or unacknowledged; longest pause %v", len(at), twice, longest)
	return longest
}
