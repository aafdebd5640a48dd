package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
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

// wantReplay expects exactly these events before the confirmation, and a position there that covers them.
func wantReplay(t *testing.T, c *harness.Client, typ string, want ...uint64) harness.Reply {
	t.Helper()
	got, r := replayed(t, c, typ)
	if !slices.Equal(got, want) || r.Resumed != len(want) || r.Gap {
		t.Errorf("%s: replayed %v (resumed %d, gap %t), want %v", typ, got, r.Resumed, r.Gap, want)
	}
	if last := c.Pod.W.LastSeq(); r.Position == nil || *r.Position > last || len(want) > 0 && *r.Position < want[len(want)-1] {
		t.Errorf("%s gives position %v after %v; the stream ends at %d", typ, r.Position, want, last)
	}
	return r
}

// wantTooFar expects an answer that has the client reload: it names the stream, and where positions go on from.
func wantTooFar(t *testing.T, c *harness.Client, typ string) harness.Reply {
	t.Helper()
	_, r := replayed(t, c, typ)
	if last := c.Pod.W.LastSeq(); !r.Gap || r.Stream == "" || r.Position == nil || *r.Position > last {
		t.Errorf("%s says %+v, want a gap, and a position of a stream that ends at %d", typ, r, last)
	}
	return r
}

// at is a position of the stream that a pod reads.
func at(p *harness.Pod, seq uint64) harness.Place {
	p.W.T.Helper()
	c := p.Connect(harness.User("probe", "probe", "probe").Positions())
	c.Close(1000, "")
	return harness.Place{Seq: seq, Stream: c.Ready.Stream}
}

// often are settings with a heartbeat that comes often; a busy client may miss many.
var often = harness.Settings("WEBSOCKET_PING_INTERVAL=200ms", "WEBSOCKET_MAX_MISSED_PONGS=1000")

// TestResume replays what a socket should have had behind its position, on connect and by resume, and nothing else: nothing
// before it, nothing for others, nothing malformed, and of chats only the one that is selected.
func TestResume(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start("NATS_NAK_DELAY=50ms") // some events have no owner
	ann := harness.User("acme", "desk1", "ann")
	first := w.Chat("acme", "desk1")
	a := w.Contact("acme", "desk1")
	w.Chat("acme", "desk2")
	w.Chat("other", "desk1")
	m1 := w.Message("acme", "desk1", "c1")
	w.Message("acme", "desk1", "c2")
	w.PublishRaw(w.Prefix+".acme.desk1.chats", []byte("not json"))
	b := disguised(w, "desk1")
	w.Settled() // what is retried may come live as well

	c := pod.Dial(ann.From(at(pod, first)))
	ready := wantReplay(t, c, "ready", a, b)
	if ready.SessionID == "" || ready.Stream == "" || *ready.Position != w.LastSeq() {
		t.Errorf("ready says %+v, the stream ends at %d", ready, w.LastSeq())
	}
	live := w.Chat("acme", "desk1")
	if m := c.WantEvent(live); m.Replay {
		t.Errorf("a live event is marked as replayed: %s", m.Raw)
	}
	c = pod.Dial(ann.With("chat", "c1").From(at(pod, first)))
	wantReplay(t, c, "ready", a, m1, b, live)
	m2 := w.Message("acme", "desk1", "c1")
	w.Message("acme", "desk1", "c2")
	c.WantEvent(m2)

	// From the last position, which may have come meanwhile.
	c.Send(map[string]any{"type": "resume"})
	got, r := replayed(t, c, "resumed")
	if !(len(got) == 0 || slices.Equal(got, []uint64{m2})) || r.Gap || r.Resumed != len(got) || r.Position == nil || *r.Position < m2 || r.Stream != ready.Stream {
		t.Errorf("resume replayed %v (%+v), want %d or nothing", got, r, m2)
	}
	c.SelectChat("c2")
	c.WantEvent(w.Message("acme", "desk1", "c2"))
	c.WantNothingElse()
	w.Settled()
	pod.WantLedgers()
}

// TestResumeOfAChat: a client names the chat that it had selected. Its messages that came meanwhile are replayed, in the order of
// the stream, and further ones come live, on whatever pod; one that had none gets none.
func TestResumeOfAChat(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pods := startPods(w, 2)
		d := as(harness.User("acme", "desk1", "ann"))
		c := pods[0].Connect(d.Positions())
		const chat = "a.b.c@s.whatsapp.net"
		c.SelectChat(chat)
		c.WantEvent(w.Message("acme", "desk1", chat))
		for i := range 6 {
			place := c.Place()
			c.Abort()
			due := []uint64{w.Message("acme", "desk1", chat), w.Chat("acme", "desk1")}
			w.Message("acme", "desk1", "another")
			due = append(due, w.Message("acme", "desk1", chat))
			c = pods[(i+1)%2].Dial(d.With("chat", chat).From(place))
			got, r := replayed(t, c, "ready")
			if got = slices.DeleteFunc(got, func(seq uint64) bool { return seq < due[0] }); !slices.Equal(got, due) || r.Gap {
				t.Errorf("replayed %v (%+v), want %v at the end", got, r, due)
			}
			w.Message("acme", "desk1", "another")
			c.WantEvent(w.Message("acme", "desk1", chat))
		}
		place := c.Place()
		c.Abort()
		w.Message("acme", "desk1", chat)
		last := w.Chat("acme", "desk1")
		c = pods[0].Dial(d.From(place))
		if got, _ := replayed(t, c, "ready"); slices.Contains(got, last-1) || !slices.Contains(got, last) {
			t.Errorf("without a chat %v were replayed; %d is one's message, %d is not", got, last-1, last)
		}
		w.Message("acme", "desk1", chat)
		c.WantNothingElse()
	})
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
		c := pod.Dial(harness.Admin("root", tc.company, tc.agent).From(at(pod, 0)))
		wantReplay(t, c, "ready", tc.want...)
		c.Close(1000, "")
	}
}

// TestResumeTooFar answers with a gap what cannot be replayed whole. Where it can be, it is.
func TestResumeTooFar(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often, harness.Settings("NATS_NAK_DELAY=50ms"), harness.StreamConfig(func(c *jetstream.StreamConfig) { c.MaxMsgs = 30 }))
	few, near := w.Start("RESUME_MAX_EVENTS=10"), w.Start("RESUME_MAX_BEHIND=20")
	ann := harness.User("acme", "desk1", "ann")
	stream := at(few, 0).Stream
	from := func(seq uint64) harness.Dial { return ann.From(harness.Place{Seq: seq, Stream: stream}) }
	wantGap := func(p *harness.Pod, d harness.Dial, gap bool) {
		t.Helper()
		c := p.Dial(d)
		if gap {
			wantTooFar(t, c, "ready")
		} else if _, r := replayed(t, c, "ready"); r.Gap {
			t.Errorf("%v of a stream that ends at %d: a gap", d.Query, w.LastSeq())
		}
		c.Close(1000, "")
	}
	wantGap(few, from(0), false) // nothing was published yet
	wantGap(few, from(1), true)  // beyond the end
	for range 10 {
		w.Chat("acme", "desk1")
	}
	wantGap(few, from(0), false)
	wantGap(few, from(11), true)
	w.Chat("acme", "desk1")
	wantGap(few, from(0), true) // 11
	wantGap(few, from(1), false)
	wantGap(few, ann.From(harness.Place{Seq: 11, Stream: "another"}), true)
	wantGap(few, ann.With("since", "11"), true) // of a stream that it does not name
	for range 40 {
		w.Chat("acme", "desk2")
	}
	last := w.LastSeq()
	wantGap(few, from(3), true) // expired
	wantGap(few, from(last-31), true)
	wantGap(few, from(last-30), false)
	wantGap(few, from(last), false)
	wantGap(near, from(last-21), true)
	wantGap(near, from(last-20), false)

	c := near.Dial(from(3))
	wantTooFar(t, c, "ready")
	live := w.Chat("acme", "desk1")
	c.WantEvent(live)
	c.WaitPlace(live)
	if r := c.ResumeMissed(); r.Gap || c.Place().Stream != stream {
		t.Errorf("after the reload it goes on from %+v; a resume says %+v", c.Place(), r)
	}
}

// TestResumeWithoutLimits: a stream that forgets what was acked has no past.
func TestResumeWithoutLimits(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) { c.Retention = jetstream.InterestPolicy }))
	pod := w.Start()
	wantTooFar(t, pod.Dial(harness.User("acme", "desk1", "ann").From(at(pod, 0))), "ready")
}

// TestResumeWithoutPositions: a client of the earlier service, which does not know of positions, is given none; its resume is
// answered, and has it reload.
func TestResumeWithoutPositions(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t, often)
		pod := w.Start()
		for _, d := range []harness.Dial{harness.User("acme", "desk1", "ann"), harness.Admin("root", "", "")} {
			old, with := pod.Connect(as(d)), pod.Connect(harness.User("acme", "desk1", "bob").Positions())
			seq := w.Chat("acme", "desk1")
			with.WaitPlace(seq)
			if old.Ready.Position != nil || old.Ready.Gap || old.Ready.Resumed != 0 {
				t.Errorf("ready: %+v", old.Ready)
			}
			if r := old.ResumeMissed(); !r.Gap || r.Position != nil || r.Resumed != 0 {
				t.Errorf("resumed: %+v", r)
			}
			if p := old.Place(); p.Seq != 0 {
				t.Errorf("it was given position %+v", p)
			}
			old.Close(1000, "")
		}
	})
}

// TestPositions: on a quiet socket the position comes with each heartbeat, and goes on with what is settled for others; on a busy one it
// comes behind events, at most once a second.
func TestPositions(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=50ms"))
	given := func(p *harness.Pod) float64 { return p.Metric("dws_messages_sent_total", `message_type="position"`) }

	quiet := w.Start("WEBSOCKET_PING_INTERVAL=200ms", "WEBSOCKET_MAX_MISSED_PONGS=1000")
	ann := quiet.Connect(harness.User("acme", "desk1", "ann").Positions())
	ann.WaitPlace(w.Chat("acme", "absent"))
	beats := given(quiet)
	harness.Eventually(t, harness.Patience, "the connection to be seen to live", func() bool { return given(quiet) >= beats+5 })
	ann.WantNothingElse()
	ann.Close(1000, "")

	busy := w.Start("WEBSOCKET_PING_INTERVAL=1m")
	ann = busy.Connect(harness.User("acme", "desk1", "ann").Positions())
	began := time.Now()
	flow := w.Flow(100, func(int) feed.Event { return feed.Chat("acme", "desk1", "c1", "hi", 1) })
	flow.WaitSent(1000)
	all := flow.Stop()
	place := ann.Place()
	for _, p := range all {
		m := ann.WaitEvent(p.Seq)
		if m.Place.Seq >= p.Seq {
			t.Errorf("event %d came after position %d", p.Seq, m.Place.Seq)
		}
	}
	n, most := given(busy), time.Since(began).Seconds()+1
	if n < 1 || n > most || place.Seq < all[0].Seq {
		t.Errorf("%v positions were given in %.1f s, the last but for few is %d; events went from %d to %d", n, most-1, place.Seq, all[0].Seq, all[len(all)-1].Seq)
	}
}

// keeper is a user whose client keeps to the rules of docs/protocol.md, over all its sockets: it keeps the highest position that it was
// given, drops an event that is not above it or that came since, answers a gap by resume, and loads the state where it is to.
type keeper struct {
	*harness.Client                 // the socket that is open, or was last
	dial            harness.Dial    // with its chat
	place           harness.Place   // the zero value: none
	had             map[uint64]bool // since place
	got             map[uint64]int  // how often each event was applied
	loaded          uint64          // the state was loaded as of this sequence, or later
	greeted         bool            // by this socket
	owed            int             // gaps of this socket whose resume is not answered yet
	before          harness.Place   // its position then
	twice           int             // live events that it had had
	gaps, loads     int
	answers         int // ready and resumed
}

func newKeeper(d harness.Dial) *keeper {
	return &keeper{dial: d, had: map[uint64]bool{}, got: map[uint64]int{}}
}

// come opens a socket on p. Its ready is taken like everything else.
func (k *keeper) come(p *harness.Pod) {
	p.W.T.Helper()
	d := k.dial.Positions()
	if k.place.Stream != "" {
		d = k.dial.From(k.place)
	}
	k.Client, k.greeted, k.owed = p.Dial(d), false, 0
}

// arrive is come, and waits for the ready.
func (k *keeper) arrive(p *harness.Pod) *keeper {
	p.W.T.Helper()
	k.come(p)
	k.wait("ready", func() bool { return k.greeted })
	return k
}

// leave ends the socket as a client does that vanishes. What has come until then counts.
func (k *keeper) leave() {
	k.Abort()
	k.wait("the end of its socket", func() bool { return k.Ended() != nil })
	k.take()
	k.keep(k.Place())
}

func (k *keeper) wait(what string, ok func() bool) {
	k.Pod.W.T.Helper()
	harness.Eventually(k.Pod.W.T, harness.Patience, what+" for "+k.dial.User, func() bool {
		k.take()
		return ok()
	})
}

// take handles all that has come.
func (k *keeper) take() {
	k.Pod.W.T.Helper()
	atOnce, cancel := context.WithCancel(context.Background())
	cancel()
	for {
		m, err := k.TryTake(atOnce, func(harness.Message) bool { return true })
		if err != nil {
			return
		}
		k.handle(m)
	}
}

func (k *keeper) handle(m harness.Message) {
	t := k.Pod.W.T
	t.Helper()
	k.keep(m.Place)
	if k.owed > 0 && m.Place != k.before {
		t.Errorf("%s was given position %+v between a gap at %+v and the answer to its resume", k.dial.User, m.Place, k.before)
	}
	switch m.Type {
	case "event":
		if m.Seq > k.place.Seq && !k.had[m.Seq] {
			k.had[m.Seq] = true
			k.got[m.Seq]++
		} else if !m.Replay {
			k.twice++
		}
	case "gap":
		k.gaps++
		k.owed++
		k.before = m.Place
		k.TrySend(true, []byte(`{"type":"resume"}`)) // the socket may end
	case "ready", "resumed":
		var r harness.Reply
		if err := json.Unmarshal(m.Payload, &r); err != nil || r.Position == nil && !r.Gap {
			t.Fatalf("%s without position: %s %v", m.Type, m.Raw, err)
		}
		if r.Gap || k.place.Stream == "" {
			if r.Stream != k.place.Stream { // its sequences name other events
				k.got = map[uint64]int{}
			}
			k.place, k.had = harness.Place{Stream: r.Stream}, map[uint64]bool{}
			k.loaded = k.Pod.W.LastSeq()
			k.loads++
		}
		if r.Position != nil { // else the pod has none of a new stream yet
			k.keep(harness.Place{Seq: *r.Position, Stream: r.Stream})
		}
		if m.Type == "ready" {
			k.greeted = true
		} else if k.owed > 0 {
			k.owed--
		}
		k.answers++
		k.before = k.place
	}
}

func (k *keeper) keep(p harness.Place) {
	if p.Stream == "" || p.Stream != k.place.Stream || p.Seq <= k.place.Seq {
		return
	}
	k.place = p
	for seq := range k.had {
		if seq <= p.Seq {
			delete(k.had, seq)
		}
	}
}

// wantAll waits until it has had all of these events, and expects that it applied each one once, or once more after each load.
func (k *keeper) wantAll(seqs []uint64) {
	t := k.Pod.W.T
	t.Helper()
	var missing []uint64
	defer func() {
		if t.Failed() {
			t.Logf("%s has place %+v, %d gaps, %d loads (to %d); it lacks %v", k.dial.User, k.place, k.gaps, k.loads, k.loaded, missing)
			for _, seq := range missing[:min(3, len(missing))] {
				t.Log(k.Pod.W.Fate(seq))
			}
		}
	}()
	k.wait("all events", func() bool {
		missing = slices.DeleteFunc(slices.Clone(seqs), func(seq uint64) bool { return k.got[seq] > 0 || seq <= k.loaded })
		return len(missing) == 0
	})
	for seq, n := range k.got {
		if n > max(1, k.loads) {
			t.Errorf("%s applied event %d %d times", k.dial.User, seq, n)
		}
	}
}

// TestResumeJoinsTheFlow reconnects again and again, and resumes in between, while events are published without a pause and NATS answers
// slowly. What came during a replay, between its passes and right behind it reaches the client on that socket.
func TestResumeJoinsTheFlow(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("RESUME_MAX_EVENTS=100000"))
	nats := w.Proxy(w.NATS.Address())
	pods := startPods(w, 2, "NATS_URL=nats://"+nats.Address())
	ann := newKeeper(harness.User("acme", "desk0", "ann").With("chat", "chat.one")).arrive(pods[1])
	nats.Latency(5 * time.Millisecond)
	var all []uint64
	publishUntil := func(ok func() bool) {
		most := len(all) + 100 // a replay must be able to keep up
		harness.Eventually(t, harness.Patience, "an answer", func() bool {
			if len(all) < most {
				all = append(all, w.Publish(desk0(len(all))))
			}
			time.Sleep(20 * time.Millisecond)
			ann.take()
			return ok()
		})
	}
	for i := range 20 {
		ann.leave()
		ann.come(pods[i%2])
		publishUntil(func() bool { return ann.greeted })
		if i%3 == 0 {
			ann.Send(map[string]any{"type": "resume"})
			answers := ann.answers
			publishUntil(func() bool { return ann.answers > answers })
		}
		ann.wantAll(all)
	}
	if ann.loads != 1 || len(all) < 100 {
		t.Errorf("of %d events, the state was loaded %d times", len(all), ann.loads)
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

// TestResumeOfMany: when many resume at once, each gets what it missed and nothing else, in order and joined to the flow;
// also where the stream allows no direct gets.
func TestResumeOfMany(t *testing.T) {
	t.Parallel()
	const clients, rounds = 150, 4
	for _, direct := range []bool{true, false} {
		t.Run(fmt.Sprintf("direct gets %t", direct), func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) { c.AllowDirect = direct }))
			pod := w.Start("RESUME_CONCURRENCY=1", "NATS_NAK_DELAY=100ms")
			agent := func(i int) string { return fmt.Sprint("desk", i) }
			due := make([][]uint64, clients)
			for round := range rounds {
				for i := range clients {
					due[i] = append(due[i], w.Chat("acme", agent(i)), w.Contact("acme", agent(i)))
					w.Message("acme", agent(i), "unselected")
				}
				due[round] = append(due[round], disguised(w, agent(round)))
			}
			places := make([]harness.Place, clients)
			for i := range clients {
				places[i] = at(pod, due[i][0])
			}
			for range 2 {
				var wg sync.WaitGroup
				for i := range clients {
					wg.Go(func() {
						d := harness.User("acme", agent(i), "ann").From(places[i])
						d.Gorilla = true
						c := pod.Dial(d)
						c.TakeType("ready")
						var got []uint64
						for _, m := range c.Events() {
							if m.Replay { // what waits for its user may come live, too
								got = append(got, m.Seq)
							}
						}
						want := slices.DeleteFunc(slices.Clone(due[i]), func(seq uint64) bool { return seq <= places[i].Seq })
						if !slices.Equal(got, want) {
							t.Errorf("%s was replayed %v after %d, want %v", d.Agent, got, places[i].Seq, want)
						}
						live := w.Chat("acme", agent(i))
						c.WaitEvent(live)
						due[i], places[i] = append(due[i], live), c.Place()
						c.Abort()
					})
				}
				wg.Wait()
			}
			w.Settled()
			pod.WantLedgers()
		})
	}
}

// TestResumeOverRemovedEvents: an event behind the client's position is gone from the stream: deleted, purged by its subject, or removed by
// the stream's own limit. The client is told to reload; one whose position is behind it resumes.
func TestResumeOverRemovedEvents(t *testing.T) {
	t.Parallel()
	for name, remove := range map[string]func(t *testing.T, w *harness.World, s jetstream.Stream, seq uint64){
		"deleted": func(t *testing.T, _ *harness.World, s jetstream.Stream, seq uint64) {
			if err := s.DeleteMsg(harness.Within(t, harness.Patience), seq); err != nil {
				t.Fatal(err)
			}
		},
		"securely": func(t *testing.T, _ *harness.World, s jetstream.Stream, seq uint64) {
			if err := s.SecureDeleteMsg(harness.Within(t, harness.Patience), seq); err != nil {
				t.Fatal(err)
			}
		},
		"purged": func(t *testing.T, w *harness.World, s jetstream.Stream, seq uint64) {
			if err := s.Purge(harness.Within(t, harness.Patience), jetstream.WithPurgeSubject(w.Prefix+".acme.desk1.contacts")); err != nil {
				t.Fatal(err)
			}
		},
		"limited": func(t *testing.T, w *harness.World, s jetstream.Stream, seq uint64) {
			config := s.CachedInfo().Config
			config.MaxMsgsPerSubject = 1
			if _, err := w.JS.UpdateStream(harness.Within(t, harness.Patience), config); err != nil {
				t.Fatal(err)
			}
			w.Contact("acme", "desk1")
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("NATS_NAK_DELAY=50ms"))
			pod := w.Start()
			before := w.Chat("acme", "desk1")
			gone := w.Contact("acme", "desk1")
			next := w.Chat("acme", "desk2")
			s, err := w.JS.Stream(harness.Within(t, harness.Patience), w.Stream)
			if err != nil {
				t.Fatal(err)
			}
			remove(t, w, s, gone)
			w.Settled() // what is retried may come live as well
			late := pod.Dial(harness.User("acme", "desk1", "ann").From(at(pod, before)))
			if r := late.TakeReply("ready"); !r.Gap || r.Resumed != 0 {
				t.Errorf("from before what was removed: %+v, want a gap", r)
			}
			pod.WantLine("removed from within the stream")
			if r := pod.Dial(harness.User("acme", "desk1", "bob").From(at(pod, next))).TakeReply("ready"); r.Gap {
				t.Errorf("from behind what was removed: %+v, want no gap", r)
			}
			if name == "limited" {
				w.Start().WantLine("messages are removed from within the stream")
			}
		})
	}
}

// TestAckedWhileTheOtherIsAway: of two users of one agent, on two pods, one is between two sockets while an event is acked since the
// other has it. It comes with the resume, on either pod, though the pod's own position is far beyond it by then.
func TestAckedWhileTheOtherIsAway(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often, harness.Settings("POD_LEASE=3s"))
	pods := startPods(w, 2)
	users := []*keeper{newKeeper(harness.User("acme", "desk0", "ann").With("chat", "chat.one")), newKeeper(harness.User("acme", "desk0", "bob").With("chat", "chat.one"))}
	for i, k := range users {
		k.arrive(pods[i])
	}
	var all []uint64
	for round := range 6 {
		away, there := users[round%2], users[(round+1)%2]
		away.leave()
		for i := range 6 {
			all = append(all, w.Publish(desk0(i)))
		}
		last := all[len(all)-1]
		there.wantAll(all)
		w.Settled()
		there.wait("a position beyond all", func() bool { return there.Client.Place().Seq >= last })
		if away.place.Seq >= all[len(all)-6] {
			t.Fatalf("%s was away, and has position %+v beyond %d", away.dial.User, away.place, all[len(all)-6])
		}
		away.arrive(pods[round/2%2])
		away.wantAll(all)
	}
	for _, k := range users {
		if k.loads != 1 || k.gaps != 0 {
			t.Errorf("%s: %d loads, %d gaps", k.dial.User, k.loads, k.gaps)
		}
	}
}

// hold takes n events out of the World's consumer, in place of the pods, and leaves them unanswered; publish makes the events of which the
// pods get the others. It returns what it holds, by sequence, and all that was published.
func hold(w *harness.World, n int, publish func() uint64) (held map[uint64]jetstream.Msg, all []uint64) {
	w.T.Helper()
	cons, err := w.JS.Consumer(harness.Within(w.T, harness.Patience), w.Stream, w.Consumer)
	if err != nil {
		w.T.Fatal(err)
	}
	held = map[uint64]jetstream.Msg{}
	for len(held) < n {
		batch, err := cons.Fetch(1, jetstream.FetchMaxWait(harness.Patience))
		if err != nil {
			w.T.Fatal(err)
		}
		harness.Eventually(w.T, harness.Patience, "the consumer to give the test an event", func() bool {
			all = append(all, publish())
			select {
			case msg := <-batch.Messages():
				md, err := msg.Metadata()
				if err != nil {
					w.T.Fatal(err)
				}
				held[md.Sequence.Stream] = msg
				return true
			case <-time.After(50 * time.Millisecond):
				return false
			}
		})
	}
	return held, all
}

// handBack refuses what is held, so that it is given out again.
func handBack(t *testing.T, held map[uint64]jetstream.Msg) {
	t.Helper()
	for _, msg := range held {
		if err := msg.Nak(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOlderRedelivered: events are given out again long after newer ones. Until then no position passes them; who was between two
// sockets has them by the resume and not once more, who stayed gets them late.
func TestOlderRedelivered(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often)
	pods := startPods(w, 2)
	ann, bob := newKeeper(harness.User("acme", "desk1", "ann")).arrive(pods[0]), newKeeper(harness.User("acme", "desk1", "bob")).arrive(pods[1])
	chat := func() uint64 { return w.Chat("acme", "desk1") }
	held, all := hold(w, 3, chat)
	for range 20 {
		all = append(all, chat())
	}
	first := slices.Min(slices.Collect(maps.Keys(held)))
	newer := slices.DeleteFunc(slices.Clone(all), func(seq uint64) bool { return held[seq] != nil })
	ann.wantAll(newer)
	ann.wait("a position just before what is held", func() bool { return ann.Client.Place().Seq >= first-1 })
	bob.leave()
	for _, k := range []*keeper{ann, bob} {
		if k.Client.Place().Seq >= first || k.got[first] > 0 {
			t.Fatalf("%s has position %+v, beyond %d which nobody has got", k.dial.User, k.place, first)
		}
	}
	bob.arrive(pods[0])
	bob.wantAll(all)
	handBack(t, held)
	ann.wantAll(all)
	w.Settled()
	ann.wait("a position beyond all", func() bool { return ann.Client.Place().Seq >= all[len(all)-1] })
	all = append(all, chat()) // behind whatever came too often
	for _, k := range []*keeper{ann, bob} {
		k.wantAll(all)
		if k.twice != 0 || k.loads != 1 || k.gaps != 0 {
			t.Errorf("%s: %d events came twice, %d loads, %d gaps", k.dial.User, k.twice, k.loads, k.gaps)
		}
	}
}

// TestResumeWhileAllLag: the pods get nothing any more, and the stream grows, as when they have to work off the events of several minutes.
// Clients come, go and come back meanwhile, to pods that were there before and to one that starts in the midst; what lags reaches
// each of them, once.
func TestResumeWhileAllLag(t *testing.T) {
	t.Parallel()
	const pending = 20
	w := harness.New(t, often, harness.Settings(fmt.Sprint("NATS_MAX_ACK_PENDING=", pending), "NATS_PREFETCH=5", "NATS_PARKED_BUDGET=5", "NATS_NAK_DELAY=200ms"))
	pods := startPods(w, 2)
	var users []*keeper
	for i, user := range []string{"ann", "bob", "eve", "fay"} {
		users = append(users, newKeeper(harness.User("acme", "desk0", user).With("chat", "chat.one")).arrive(pods[i%2]))
	}
	ann, bob, eve, fay := users[0], users[1], users[2], users[3]
	n := 0
	publish := func() uint64 {
		n++
		return w.Publish(desk0(n))
	}
	eve.leave() // before the lag
	held, all := hold(w, pending, publish)
	bob.leave() // in the midst of it
	for range 60 {
		all = append(all, publish())
	}
	if i := w.ConsumerInfo(); i.NumAckPending != pending || i.NumPending < 50 {
		t.Fatalf("no lag: JetStream has %d events unacked and %d that wait", i.NumAckPending, i.NumPending)
	}
	bob.arrive(pods[0])
	eve.arrive(w.Start())
	gil := newKeeper(harness.User("acme", "desk0", "gil").With("chat", "chat.one")).arrive(pods[1]) // comes now, and loads
	for range 20 {
		all = append(all, publish())
	}
	bob.leave()
	gil.leave()
	fay.leave()
	for range 20 {
		all = append(all, publish())
	}
	bob.arrive(pods[1])
	gil.arrive(pods[0])
	ann.take()
	if first := slices.Min(slices.Collect(maps.Keys(held))); ann.Client.Place().Seq >= first {
		t.Errorf("position %+v is beyond %d, which nobody has got", ann.Client.Place(), first)
	}
	handBack(t, held)
	fay.arrive(pods[1]) // while the lag is worked off
	for range 20 {
		all = append(all, publish())
	}
	for _, k := range append(users, gil) {
		k.wantAll(all)
		if k.loads != 1 {
			t.Errorf("%s loaded the state %d times", k.dial.User, k.loads)
		}
	}
	w.Settled()
	ann.wait("a position beyond all", func() bool { return ann.Client.Place().Seq >= all[len(all)-1] })
}
