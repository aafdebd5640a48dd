package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// replayed takes the replayed events that stand before the next confirmation of type typ, and the confirmation.
func replayed(t *testing.T, c *harness.Client, typ string) (seqs []uint64, r harness.Reply) {
	t.Helper()
	for {
		m := c.Next()
		switch {
		case m.Type == "event" && m.Replay:
			seqs = append(seqs, m.Seq)
		case m.Type == typ:
			if err := json.Unmarshal(m.Payload, &r); err != nil {
				t.Fatal(err)
			}
			return seqs, r
		default:
			t.Fatalf("want replayed events and then %s, got %s", typ, m.Raw)
		}
	}
}

func wantReplay(t *testing.T, c *harness.Client, typ string, want ...uint64) {
	t.Helper()
	got, r := replayed(t, c, typ)
	if !slices.Equal(got, want) || r.Resumed != len(want) || r.Gap {
		t.Errorf("%s: replayed %v (resumed %d, gap %t), want %v", typ, got, r.Resumed, r.Gap, want)
	}
}

func since(n uint64) string { return fmt.Sprint(n) }

// TestResume replays what a socket should have had, on connect, by select_chat and by resume, and nothing else.
func TestResume(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start("NATS_NAK_DELAY=50ms") // some events have no owner and are waited for
	ann := harness.User("acme", "desk1", "ann")
	first := w.Chat("acme", "desk1")
	w.Message("acme", "desk1", "c1")
	a := w.Contact("acme", "desk1")
	w.Chat("acme", "desk2")
	w.Chat("other", "desk1")
	m1 := w.Message("acme", "desk1", "c1")
	w.Message("acme", "desk1", "c2")
	w.PublishRaw(w.Prefix+".acme.desk1.chats", []byte("not json"))
	b := disguised(w, "desk1")

	// The overlap reaches back before `first`, which is replayed though it is not after since.
	c := pod.Dial(ann.With("since", since(first)))
	wantReplay(t, c, "ready", first, a, b)
	live := w.Chat("acme", "desk1")
	if m := c.WantEvent(live); m.Replay {
		t.Errorf("a live event is marked as replayed: %s", m.Raw)
	}

	c.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c1", "since": first}})
	got, r := replayed(t, c, "chat_selected")
	if len(got) != 2 || got[1] != m1 || r.ChatID != "c1" || r.Gap {
		t.Errorf("select_chat replayed %v, %+v", got, r)
	}
	m2 := w.Message("acme", "desk1", "c1")
	c.WantEvent(m2)

	c.Send(map[string]any{"type": "resume", "payload": map[string]any{"since": first}})
	got, r = replayed(t, c, "resumed")
	if want := []uint64{first, first + 1, a, m1, b, live, m2}; !slices.Equal(got, want) || r.Gap || r.Resumed != len(want) {
		t.Errorf("resume replayed %v (%+v), want %v", got, r, want)
	}
	if r.Seq > w.LastSeq() {
		t.Errorf("resumed says seq %d, the stream ends at %d", r.Seq, w.LastSeq())
	}
	w.Settled()
	pod.WantLedgers()
}

// TestResumeOfAdmins covers scopes with and without wildcards.
func TestResumeOfAdmins(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	one := w.Agent("acme", "desk1")
	w.Chat("acme", "desk1")
	two := w.Agent("acme", "desk2")
	three := w.Agent("other", "desk1")
	for _, tc := range []struct {
		company, agent string
		want           []uint64
	}{{"acme", "desk1", []uint64{one}}, {"acme", "*", []uint64{one, two}}, {"*", "desk1", []uint64{one, three}}, {"*", "*", []uint64{one, two, three}}} {
		c := pod.Dial(harness.Admin("root", tc.company, tc.agent).With("since", "0"))
		wantReplay(t, c, "ready", tc.want...)
		c.Close(1000, "")
	}
}

// TestResumeTooFar answers with a gap what cannot be replayed whole.
func TestResumeTooFar(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) { c.MaxMsgs = 30 }))
	pod := w.Start("RESUME_MAX_EVENTS=10")
	ann := harness.User("acme", "desk1", "ann")
	wantGap := func(n uint64, gap bool) {
		t.Helper()
		c := pod.Dial(ann.With("since", since(n)))
		if _, r := replayed(t, c, "ready"); r.Gap != gap {
			t.Errorf("since %d of a stream that ends at %d: gap %t, want %t", n, w.LastSeq(), r.Gap, gap)
		}
		c.Close(1000, "")
	}
	wantGap(0, false) // nothing was published yet
	wantGap(1, true)  // beyond the end
	for range 10 {
		w.Chat("acme", "desk1")
	}
	wantGap(3, false)
	wantGap(11, true)
	w.Chat("acme", "desk1")
	wantGap(1, false) // 10, and one of the overlap
	wantGap(0, true)  // 11
	for range 40 {
		w.Chat("acme", "desk2")
	}
	wantGap(3, true) // expired
	last := w.LastSeq()
	wantGap(last, false)
	wantGap(last-29, false)
	wantGap(last-32, true)

	old := w.Start("SERVER_POD_ID=old", "RESUME_MAX_AGE=1ms")
	c := old.Dial(ann.With("since", since(last-20)))
	if _, r := replayed(t, c, "ready"); !r.Gap {
		t.Error("older than RESUME_MAX_AGE: want a gap")
	}
}

// TestResumeWithoutLimits: a stream that forgets what was acked has no past.
func TestResumeWithoutLimits(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }))
	c := w.Start().Dial(harness.User("acme", "desk1", "ann").With("since", "0"))
	if got, r := replayed(t, c, "ready"); !r.Gap || len(got) != 0 {
		t.Errorf("replayed %v, gap %t", got, r.Gap)
	}
}

// TestResumeJoinsTheFlow reconnects again and again, and resumes in between, while events are published without a
// pause: every one of them reaches the client.
func TestResumeJoinsTheFlow(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pods := []*harness.Pod{w.Start("SERVER_POD_ID=one", "RESUME_MAX_EVENTS=100000"), w.Start("SERVER_POD_ID=two", "RESUME_MAX_EVENTS=100000")}
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var mu sync.Mutex
	var published []uint64
	var publisher sync.WaitGroup
	publisher.Go(func() {
		tick := time.NewTicker(25 * time.Millisecond) // each reconnect replays all of it, a request each: the overlap is longer than the test
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			ev := feed.Chat("acme", "desk1", "c1", "hello", 1)
			ack, err := w.JS.Publish(ctx, w.Prefix+"."+ev.Subject, ev.Payload)
			if err != nil {
				if ctx.Err() == nil {
					t.Errorf("publish: %v", err)
				}
				return
			}
			mu.Lock()
			published = append(published, ack.Sequence)
			mu.Unlock()
		}
	})
	seen := map[uint64]bool{}
	var at uint64 // all up to it was seen, or replayed
	take := func(c *harness.Client, r harness.Reply) {
		if r.Gap {
			t.Fatalf("gap after since=%d: %+v", at, r)
		}
		for _, m := range c.Events() {
			seen[m.Seq] = true
		}
	}
	confirmed := func(c *harness.Client, typ string) harness.Reply {
		m := c.TakeType(typ)
		var r harness.Reply
		if err := json.Unmarshal(m.Payload, &r); err != nil {
			t.Fatal(err)
		}
		return r
	}
	for i := range 25 {
		harness.Eventually(t, harness.Patience, "the flow to go on", func() bool {
			mu.Lock()
			defer mu.Unlock()
			return len(published) > 3*i
		})
		c := pods[i%2].Dial(harness.User("acme", "desk1", "ann").With("since", since(at)))
		r := confirmed(c, "ready")
		if i%3 == 0 {
			c.Send(map[string]any{"type": "resume", "payload": map[string]any{"since": at}})
			r = confirmed(c, "resumed")
		}
		take(c, r)
		at = r.Seq
		c.Abort()
		take(c, r)
	}
	stop()
	publisher.Wait()
	c := pods[0].Dial(harness.User("acme", "desk1", "ann").With("since", since(at)))
	take(c, confirmed(c, "ready"))
	lost := slices.DeleteFunc(slices.Clone(published), func(seq uint64) bool { return seen[seq] })
	if len(lost) > 0 || len(published) < 60 {
		t.Errorf("%d published, of which %v did not arrive", len(published), lost)
	}
}

// disguised publishes an event that comes with headers such as the stream itself adds to what is read from it, as when a publisher
// republishes what it has read from another stream.
func disguised(w *harness.World, agent string) uint64 {
	w.T.Helper()
	ev := feed.Chat("acme", agent, "c1", "read elsewhere", 1)
	ack, err := w.JS.PublishMsg(harness.Within(w.T, harness.Patience), &nats.Msg{Subject: w.Prefix + "." + ev.Subject, Data: ev.Payload, Header: nats.Header{
		"Nats-Sequence": {"999999"}, "Nats-Subject": {"elsewhere.acme.desk9.chats"}, "Nats-Stream": {"elsewhere"}, "Nats-Last-Sequence": {"999998"}}})
	if err != nil {
		w.T.Fatal(err)
	}
	return ack.Sequence
}

// TestResumeOfMany: when many resume at once, what each of them missed is found by an index of the stream, where that allows
// direct gets, and by asking subject by subject where it does not: the same events, in order, without those that were removed,
// and joined to the flow.
func TestResumeOfMany(t *testing.T) {
	t.Parallel()
	const clients, rounds = 150, 4
	for _, tc := range []struct {
		name         string
		direct, kept bool
	}{{"direct gets", true, true}, {"more than the index keeps", true, false}, {"no direct gets", false, false}} {
		direct := tc.direct
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) { c.AllowDirect = direct }))
			pod := w.Start("RESUME_CONCURRENCY=1", "NATS_NAK_DELAY=100ms", "NATS_ACK_WAIT=4s", "NATS_RETRY_HORIZON=2s", "WEBSOCKET_WRITE_TIMEOUT=1s", "WEBSOCKET_BLOCK_TIMEOUT=500ms", "PEER_TIMEOUT=500ms")
			agent := func(i int) string { return fmt.Sprint("desk", i) }
			due := make([][]uint64, clients)
			for round := range rounds {
				for i := range clients {
					due[i] = append(due[i], w.Chat("acme", agent(i)), w.Contact("acme", agent(i)))
					w.Message("acme", agent(i), "unselected")
				}
				stream, err := w.JS.Stream(t.Context(), w.Stream)
				if err != nil {
					t.Fatal(err)
				}
				last := len(due[round]) - 1
				if err := stream.DeleteMsg(t.Context(), due[round][last]); err != nil {
					t.Fatal(err)
				}
				due[round] = due[round][:last]
				due[round] = append(due[round], disguised(w, agent(round)))
			}
			if direct && !tc.kept {
				big := bytes.Repeat([]byte("x"), 1_000_000)
				for range 70 {
					if _, err := w.JS.Publish(t.Context(), w.Prefix+".acme.malformed", big); err != nil {
						t.Fatal(err)
					}
				}
			}
			requests := make(chan *nats.Msg, 100_000)
			for _, subject := range []string{"$JS.API.DIRECT.GET.", "$JS.API.STREAM.MSG.GET."} {
				if _, err := w.NC.ChanSubscribe(subject+w.Stream, requests); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.NC.Flush(); err != nil {
				t.Fatal(err)
			}

			// everyone comes, and is given an event beside the replays of the others; it returns how often NATS was asked.
			everyone := func() (batches, singly, begins int) {
				var wg sync.WaitGroup
				for i := range clients {
					wg.Go(func() {
						d := harness.User("acme", agent(i), "ann").With("since", since(due[i][0]))
						d.Gorilla = true
						c := pod.Dial(d)
						c.TakeType("ready")
						var got []uint64
						for _, m := range c.Events() {
							if m.Replay {
								got = append(got, m.Seq)
							}
						}
						live := w.Chat("acme", agent(i))
						c.WaitEvent(live)
						if !slices.Equal(got, due[i]) {
							t.Errorf("%s was replayed %v, want %v", d.Agent, got, due[i])
						}
						due[i] = append(due[i], live)
					})
				}
				wg.Wait()
				for range len(requests) {
					switch body := (<-requests).Data; {
					case bytes.Contains(body, []byte(`"batch":`)):
						batches++
					case bytes.Contains(body, []byte(`"next_by_subj":"\u003e"`)):
						begins++
					case bytes.HasPrefix(body, []byte(`{"seq":`)) && !bytes.Contains(body, []byte("subj")):
						singly++
					}
				}
				return batches, singly, begins
			}
			batches, singly, begins := everyone()
			if direct != (batches > 0) || direct != tc.kept && singly < clients*rounds || begins == 0 {
				t.Errorf("%d requests of batches for the index, %d for a message by its sequence, %d for where to begin", batches, singly, begins)
			}
			_, _, begins = everyone()
			if few := begins < clients/4; few != (direct && tc.kept) {
				t.Errorf("NATS was asked %d times where the replays of those who come later begin", begins)
			}
			pod.WantLedgers()
		})
	}
}

// TestResumeFromARemovedEvent: the client's N was removed from within the stream. The overlap is counted from a time that is
// not later than N's, so what was lost shortly before N comes, though the next event that is left is much younger.
func TestResumeFromARemovedEvent(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortPast)
	pod := w.Start()
	w.Contact("acme", "desk0")
	lost := w.Chat("acme", "desk1")
	last, at := w.Contact("acme", "desk1"), time.Now()
	harness.Eventually(t, harness.Patience, "the overlap to be over", func() bool { return time.Since(at) > shortOverlap+time.Second })
	next := w.Contact("acme", "desk1")
	s, err := w.JS.Stream(harness.Within(t, harness.Patience), w.Stream)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteMsg(harness.Within(t, harness.Patience), last); err != nil {
		t.Fatal(err)
	}
	c := pod.Dial(harness.User("acme", "desk1", "ann").With("since", since(last)))
	c.WantEvent(lost)
	c.WantEvent(next)
	c.TakeType("ready")
}

// TestOverlapOfMany: when many resume at once, from two places each, what was stored within the overlap before their N comes, to
// the message, and what is older by more than a second does not; also of those who come when the index knows where to begin. When
// all is removed meanwhile, nothing comes, and nothing is missing.
func TestOverlapOfMany(t *testing.T) {
	t.Parallel()
	const clients = 100
	w := harness.New(t, shortPast)
	pod := w.Start()
	agent := func(i int) string { return fmt.Sprint("desk", i) }
	w.Chat("zeta", "desk0") // stays
	began := time.Now()
	var events [clients][]uint64
	for _, at := range []time.Duration{0, 300 * time.Millisecond, 8 * time.Second, 9500 * time.Millisecond, 11 * time.Second} {
		for n := range clients { // spread over a second: so is where they begin
			time.Sleep(time.Until(began.Add(at + time.Duration(n)*10*time.Millisecond)))
			events[n] = append(events[n], w.Chat("acme", agent(n)))
		}
	}
	stream, err := w.JS.Stream(harness.Within(t, harness.Patience), w.Stream)
	if err != nil {
		t.Fatal(err)
	}
	stored := map[uint64]time.Time{}
	for _, seq := range slices.Concat(events[:]...) {
		m, err := stream.GetMsg(harness.Within(t, harness.Patience), seq)
		if err != nil {
			t.Fatal(err)
		}
		stored[seq] = m.Time
	}
	everyone := func(from [2]int, want func(seq, n uint64) (must, may bool)) {
		var wg sync.WaitGroup
		for i := range 2 * clients {
			wg.Go(func() {
				all := events[i/2]
				n := all[from[i%2]]
				d := harness.User("acme", agent(i/2), fmt.Sprint("user", i%2)).With("since", since(n))
				c := pod.Dial(d)
				if ready := c.TakeType("ready"); !strings.Contains(ready.Raw, `"gap":false`) {
					t.Errorf("%s from %d: %s", d.Agent, n, ready.Raw)
				}
				got := map[uint64]bool{}
				for _, m := range c.Events() {
					got[m.Seq] = true
				}
				for _, seq := range all {
					if must, may := want(seq, n); must && !got[seq] || !may && got[seq] {
						t.Errorf("%s from %d: %d, stored %v before it, came: %v", d.Agent, n, seq, stored[n].Sub(stored[seq]), got[seq])
					}
				}
				c.Abort()
			})
		}
		wg.Wait()
	}
	overlap := func(seq, n uint64) (must, may bool) {
		before := stored[n].Sub(stored[seq])
		return before <= shortOverlap, before <= shortOverlap+time.Second
	}
	everyone([2]int{2, 4}, overlap)
	everyone([2]int{2, 4}, overlap)
	if err := stream.Purge(harness.Within(t, harness.Patience), jetstream.WithPurgeSubject(w.Prefix+".acme.>")); err != nil {
		t.Fatal(err)
	}
	everyone([2]int{3, 3}, func(uint64, uint64) (must, may bool) { return false, true })
}
