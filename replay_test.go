package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestReplaysTakeTurns: no more than RESUME_CONCURRENCY requests of the stream are under way, and who waits for a turn
// stops waiting with its context.
func TestReplaysTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReplays(testSettings(func(c *Config) { c.ResumeConcurrency = 2 }), nil)
		var running, most atomic.Int32
		done := make(chan error)
		for range 5 {
			go func() {
				_, err := limited(t.Context(), r, func(context.Context) (int, error) {
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
		if _, err := limited(ctx, r, func(context.Context) (int, error) { t.Error("made out of turn"); return 0, nil }); !errors.Is(err, context.DeadlineExceeded) {
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

// TestLostAnswerKeepsNoTurn: a request whose answer never comes, as when NATS goes away in the midst of it, ends.
func TestLostAnswerKeepsNoTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReplays(testSettings(func(c *Config) { c.ResumeConcurrency = 1 }), nil)
		never := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		for range 2 {
			if _, err := limited(t.Context(), r, never); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a request without an answer ended with %v", err)
			}
		}
	})
}

// countingStream answers questions about the stream one second after they were sent.
type countingStream struct {
	jetstream.JetStream
	asked atomic.Int32
	fail  atomic.Bool
}

type numbered struct {
	jetstream.Stream
	n int32
}

func (s numbered) CachedInfo() *jetstream.StreamInfo {
	return &jetstream.StreamInfo{State: jetstream.StreamState{LastSeq: uint64(s.n)}}
}

func (s *countingStream) Stream(context.Context, string) (jetstream.Stream, error) {
	n := s.asked.Add(1)
	time.Sleep(time.Second)
	if s.fail.Load() {
		return nil, errUnavailable
	}
	return numbered{n: n}, nil
}

// TestQuestionsAreShared: a thousand replays that ask for the stream's end at once share answers, but only to questions that
// were sent after they had asked.
func TestQuestionsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newReplays(testSettings(nil), &consumer{js: &countingStream{}})
		answers := make(chan int32, 1001)
		ask := func() {
			s, err := r.find(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			answers <- s.(numbered).n
		}
		go ask()
		synctest.Wait() // it is under way
		for range 1000 {
			go ask()
		}
		if n := <-answers; n != 1 {
			t.Errorf("the first was answered by question %d", n)
		}
		for range 1000 {
			if n := <-answers; n != 2 {
				t.Fatalf("answered by question %d, which was sent before it was asked, or by one of its own", n)
			}
		}
	})
}

// TestSeq: it is asked for again when it is half a second old; the last one known has to do where there is no answer, but not
// that of another stream.
func TestSeq(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		js := &countingStream{}
		r := newReplays(testSettings(nil), &consumer{js: js})
		want := func(what string, seq uint64, fails bool, took time.Duration) {
			t.Helper()
			start := time.Now()
			got, err := r.seq(t.Context())
			if got != seq || (err != nil) != fails || time.Since(start) != took {
				t.Errorf("%s: %d, %v, after %v; want %d after %v", what, got, err, time.Since(start), seq, took)
			}
		}
		want("the first", 1, false, time.Second)
		want("as of when it was sent", 2, false, time.Second)
		js.fail.Store(true)
		want("without an answer", 2, true, time.Second)
		r.forget()
		want("of another stream", 0, true, time.Second)
	})
}

// TestDisguised: what a publisher has put where the server's headers stand is not taken for the server's.
func TestDisguised(t *testing.T) {
	of := func(name string, values ...string) *jetstream.RawStreamMsg {
		return &jetstream.RawStreamMsg{Header: nats.Header{name: values}}
	}
	for m, want := range map[*jetstream.RawStreamMsg]bool{
		of("Nats-Sequence", "6"): false, of("Nats-Sequence", "999999", "6"): true,
		of("Nats-Subject", "wa.c.a.chats"): false, of("Nats-Subject", "x", "wa.c.a.chats"): true, of("Other", "a", "b"): false,
	} {
		if disguised(m) != want {
			t.Errorf("%v: %v", m.Header, disguised(m))
		}
	}
}

// since is the path of a client that comes back to this stream with a position.
func (th *testHub) since(seq uint64, more string) string {
	return fmt.Sprintf("/?since=%d&stream=%s%s", seq, url.QueryEscape(th.stream()), more)
}

// wantEvents reads events, and the answer that ends them: its type, and what it says.
func (c *testClient) wantEvents(typ string, want ...uint64) map[string]any {
	c.t.Helper()
	var got []uint64
	for {
		m := c.message()
		if m.Type != "event" {
			if m.Type != typ || !slices.Equal(got, want) {
				c.t.Fatalf("got events %v and %+v, want %v and %s", got, m, want, typ)
			}
			return m.Payload
		}
		got = append(got, m.Seq)
	}
}

func wantResumed(t *testing.T, p map[string]any, resumed int, position any, gap bool) {
	t.Helper()
	if p["resumed"] != float64(resumed) || p["gap"] != gap || p["position"] != position {
		t.Errorf("the answer is %v, want %d resumed, position %v, gap %v", p, resumed, position, gap)
	}
}

// TestResumeOnConnect: a client that comes back gets all that was for it behind its position, in order, and the end of the stream as
// position. From there on it is live.
func TestResumeOnConnect(t *testing.T) {
	th := newTestHub(t, nil)
	for _, subject := range []string{
		"wa.c.a.chats", "wa.c.a.messages.x", "wa.c.a.messages.y", "wa.c.b.chats", "wa.c.a.contacts", "wa.c.a.agents", "wa.d.a.chats", "wa.c.a.messages.x", "wa.c.a.chats", "wa.c.b.agents",
	} { // 42 to 51
		th.past.publish(subject)
	}
	c := th.dial(th.since(42, "&chat=x"), "")
	p := c.wantEvents("ready", 43, 46, 49, 50)
	wantResumed(t, p, 4, 51.0, false)
	if p["seq"] != 51.0 || p["stream"] != th.stream() {
		t.Errorf("ready: %v", p)
	}
	var l ledger
	wantEnd(t, &l, th.publish(&l, kindChat, "", 50, 10), duplicate)
	th.publish(&l, kindMessage, "x", 52, 10)
	if m := c.want("event"); m.Seq != 52 {
		t.Fatal(m)
	}
	wantResumed(t, th.dial(th.since(42, ""), "").wantEvents("ready", 46, 50), 2, 51.0, false)
	wantResumed(t, th.dial(th.since(51, ""), "").wantEvents("ready"), 0, 51.0, false)
	admin := th.dial(strings.Replace(th.since(42, ""), "/", "/admin", 1), "")
	wantResumed(t, admin.wantEvents("ready", 47, 51), 2, 51.0, false)
}

// TestResumeAfterGap: a client that was told of a gap resumes from its last position, and has positions again then; one of the earlier
// service, which has none, is told to reload.
func TestResumeAfterGap(t *testing.T) {
	th := newTestHub(t, nil)
	th.issue(place{41, th.stream()})
	c := th.dial("/?since=", "")
	wantResumed(t, c.wantEvents("ready"), 0, 41.0, false)
	r := &th.sockets(general)[0].ring
	wantEventually(t, "the position counts as written", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.place.seq == 41
	})
	th.past.publish("wa.c.a.chats")
	th.past.publish("wa.c.a.chats")
	for given := uint64(0); given != 41; { // the client may have it before the write has returned
		th.each(func(c *conn) {
			c.ring.mu.Lock()
			defer c.ring.mu.Unlock()
			given = c.ring.place.seq
		})
	}
	th.gapAll("shed")
	th.issue(place{42, th.stream()})
	if m := c.want("gap"); m.Payload["since"] != 41.0 || m.Payload["reason"] != "shed" {
		t.Fatal(m)
	}
	var l ledger
	th.publish(&l, kindChat, "", 43, 10)
	c.want("event") // and no position behind it
	c.send(textFrame(`{"type":"resume"}`))
	wantResumed(t, c.wantEvents("resumed", 42, 43), 2, 43.0, false)
	th.issue(place{44, th.stream()})
	th.each(func(c *conn) { c.tend(time.Now().Add(time.Minute)) })
	if m := c.want("position"); m.Seq != 44 {
		t.Fatal(m)
	}
	old := th.open("/")
	old.send(textFrame(`{"type":"resume"}`))
	wantResumed(t, old.wantEvents("resumed"), 0, nil, true)
}

// TestNoHoleBetweenReplayAndLife: events are published and delivered in each moment of a replay, before and after the stream is asked for
// its end. Each of them reaches the client, and none is settled as left to the replay that this did not have.
func TestNoHoleBetweenReplayAndLife(t *testing.T) {
	th := newTestHub(t, nil)
	for range 3 * replayEnough {
		th.past.publish("wa.c.a.chats")
	}
	var l ledger
	requests, asked := 0, 0
	th.past.before = func(what string) {
		if what == "INFO" {
			asked++
		}
		if requests++; what == "INFO" || requests%5 == 0 {
			d := newDelivery(&l, kindChat, "", th.past.publish("wa.c.a.chats"), 1, 10)
			d.push(th.sockets(general))
			d.settle(gone)
		}
	}
	c := th.dial(th.since(41, ""), "")
	had, end := map[uint64]bool{}, 0.0
	for end == 0 || len(had) < int(th.past.last)-41 {
		switch m := c.message(); m.Type {
		case "event":
			had[m.Seq] = true
		case "ready":
			end = m.Payload["position"].(float64)
			for seq := uint64(42); seq <= uint64(end); seq++ {
				if !had[seq] {
					t.Fatalf("position %v without %d", end, seq)
				}
			}
			if m.Payload["gap"] != false {
				t.Fatal(m)
			}
		default:
			t.Fatal(m)
		}
	}
	if asked < 4 || l.counted(replayed) == 0 {
		t.Errorf("asked for the end %d times; %d were left to the replay", asked, l.counted(replayed))
	}
	wantEventually(t, "some came live", func() bool { return l.counted(written) > 0 })
}

// TestReplicaBehind: that there is nothing more is believed of the leader alone.
func TestReplicaBehind(t *testing.T) {
	th := newTestHub(t, nil)
	for range 5 {
		th.past.publish("wa.c.a.chats")
	}
	th.past.behind = 43
	wantResumed(t, th.dial(th.since(41, ""), "").wantEvents("ready", 42, 43, 44, 45, 46), 5, 46.0, false)
}

// TestRepublishedMessage: one that carries the headers of another stream is read under its own sequence, from the leader.
func TestRepublishedMessage(t *testing.T) {
	th := newTestHub(t, nil)
	for range 3 {
		th.past.publish("wa.c.a.chats")
	}
	th.past.headers[43] = "Nats-Subject: wa.other.bob.chats\r\nNats-Sequence: 7\r\n"
	wantResumed(t, th.dial(th.since(41, ""), "").wantEvents("ready", 42, 43, 44), 3, 44.0, false)
}

// TestReplayRefusals: what cannot be replayed whole is answered with a gap and the pod's newest position, and the socket is live.
func TestReplayRefusals(t *testing.T) {
	for _, c := range []struct {
		name    string
		since   uint64
		change  func(th *testHub)
		resumed int
		events  []uint64
	}{
		{"beyond the end", 52, nil, 0, nil},
		{"expired", 41, func(th *testHub) { th.past.first = 43 }, 0, nil},
		{"one behind it was removed", 41, func(th *testHub) { th.past.removed = []uint64{40, 45} }, 0, nil},
		{"one was removed in the midst of it", 48, func(th *testHub) {
			asked := 0
			th.past.before = func(what string) {
				if what == "INFO" {
					asked++
				}
				if asked == 4 { // the last pass has ended
					th.past.change(func() { th.past.before, th.past.removed = nil, []uint64{50} })
				}
			}
		}, 3, []uint64{49, 50, 51}},
		{"too far back", 46, func(th *testHub) { th.cfg.Load().ResumeMaxBehind = 4 }, 0, nil},
		{"too many", 41, func(th *testHub) { th.cfg.Load().ResumeMaxEvents = 2 }, 2, []uint64{42, 43}},
		{"no limits retention", 41, func(th *testHub) { th.past.config.Retention = jetstream.WorkQueuePolicy }, 0, nil},
		{"NATS fails in the midst of it", 41, func(th *testHub) {
			th.past.fails = func(what string, seq uint64) bool { return what == "DIRECT.GET" && seq == 45 }
		}, 3, []uint64{42, 43, 44}},
		{"the stream was made anew", 41, func(th *testHub) { th.past.created = th.past.created.Add(time.Hour) }, 0, nil},
		{"made anew in the midst of it", 41, func(th *testHub) {
			asked := 0
			th.past.before = func(what string) {
				if what == "INFO" {
					asked++
				}
				if asked == 3 { // the first pass has ended
					th.past.change(func() { th.past.before, th.past.created = nil, th.past.created.Add(time.Hour) })
				}
			}
		}, 10, []uint64{42, 43, 44, 45, 46, 47, 48, 49, 50, 51}},
	} {
		t.Run(c.name, func(t *testing.T) {
			th := newTestHub(t, nil)
			for range 10 {
				th.past.publish("wa.c.a.chats")
			}
			th.issue(place{50, th.stream()})
			if c.change != nil {
				c.change(th)
			}
			cl := th.dial(th.since(c.since, ""), "")
			wantResumed(t, cl.wantEvents("ready", c.events...), c.resumed, 50.0, true)
			var l ledger
			th.publish(&l, kindChat, "", 52, 10)
			if m := cl.want("event"); m.Seq != 52 {
				t.Fatal(m)
			}
		})
	}
}

// TestReplayAtTheLimits: as many events, from as far back, as the settings allow.
func TestReplayAtTheLimits(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.ResumeMaxEvents, c.ResumeMaxBehind = 3, 3 })
	for range 3 {
		th.past.publish("wa.c.a.chats")
	}
	th.past.first, th.past.removed = 42, []uint64{41, 45}
	wantResumed(t, th.dial(th.since(41, ""), "").wantEvents("ready", 42, 43, 44), 3, 44.0, false)
}

// TestResumeOfAnotherStream: a position of another stream, or of none, is worth nothing.
func TestResumeOfAnotherStream(t *testing.T) {
	th := newTestHub(t, nil)
	th.issue(place{41, th.stream()})
	for _, path := range []string{"/?since=40", "/?since=40&stream=other"} {
		p := th.dial(path, "").wantEvents("ready")
		wantResumed(t, p, 0, 41.0, true)
		if p["stream"] != th.stream() {
			t.Errorf("stream %v", p["stream"])
		}
	}
	th.policy.latest.Store(&position{place{99, "before"}, newPosition(99)}) // about to be taken back
	wantResumed(t, th.dial("/?since=", "").wantEvents("ready"), 0, nil, false)
}

// TestNewStreamDuringAReplay: what was read of the one and of the other stream is no whole, though neither request failed.
func TestNewStreamDuringAReplay(t *testing.T) {
	th := newTestHub(t, nil)
	for range 20 {
		th.past.publish("wa.c.a.chats")
	}
	before, created := th.stream(), th.past.created.Add(time.Hour)
	asked := 0
	th.past.before = func(what string) {
		if what == "INFO" {
			asked++
		}
		if asked < 3 { // the first pass has not ended
			return
		}
		th.past.change(func() { th.past.before, th.past.created, th.past.last, th.past.msgs = nil, created, 0, nil })
		th.consumer.mu.Lock()
		th.consumer.created = created
		th.consumer.mu.Unlock()
		th.newStream()
		for range 60 {
			th.past.publish("wa.c.a.chats")
		}
	}
	c := th.dial(th.since(41, ""), "")
	m := c.message()
	for ; m.Type == "event" || m.Type == "gap"; m = c.message() { // of both
	}
	if m.Type != "ready" || m.Payload["gap"] != true || m.Payload["stream"] != th.stream() || th.stream() == before || m.Payload["position"] != nil {
		t.Errorf("%+v", m)
	}
}

// TestNewStream: sockets are told when the stream becomes another one; what they resume from then is of that, and its sequences are
// those of other events.
func TestNewStream(t *testing.T) {
	th := newTestHub(t, nil)
	th.issue(place{41, th.stream()})
	c := th.dial("/?since=", "")
	c.want("ready")
	var l ledger
	th.publish(&l, kindChat, "", 42, 10)
	c.want("event")
	created := th.past.created.Add(time.Hour)
	th.past.change(func() { th.past.created, th.past.last, th.past.msgs = created, 0, nil })
	th.consumer.mu.Lock()
	th.consumer.created = created
	th.consumer.mu.Unlock()
	th.newStream()
	if m := c.want("gap"); m.Payload["reason"] != "stream" {
		t.Fatal(m)
	}
	th.publish(&l, kindChat, "", 42, 10)
	if m := c.want("event"); m.Seq != 42 {
		t.Fatal(m)
	}
	th.issue(place{43, "another"})
	c.send(textFrame(`{"type":"resume"}`))
	p := c.wantEvents("resumed")
	wantResumed(t, p, 0, nil, true)
	if p["stream"] != th.stream() || p["seq"] != 0.0 {
		t.Errorf("resumed: %v", p)
	}
}

// TestMalformedPast: what was never delivered is not replayed either.
func TestMalformedPast(t *testing.T) {
	th := newTestHub(t, nil)
	th.past.publish("wa.c.a.chats")
	th.past.publish("wa.c.a.chats")
	th.past.msgs[0].Data = []byte("[]")
	wantResumed(t, th.dial(th.since(41, ""), "").wantEvents("ready", 43), 1, 43.0, false)
}

// TestSlowReplay: a client that does not read holds its own replay up, and no other; when it closes, its replay ends.
func TestSlowReplay(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.ResumeConcurrency = 1 })
	for range 200 {
		th.past.publish("wa.c.a.chats")
	}
	for i := range th.past.msgs {
		th.past.msgs[i].Data = fmt.Appendf(nil, `{"x":"%s"}`, strings.Repeat("y", 200_000))
	}
	slow := th.dial(th.since(41, ""), "")
	wantEventually(t, "its replay waits for it", func() bool { return len(th.slowOnes()) == 1 })
	th.dial(th.since(240, ""), "").wantEvents("ready", 241)
	slow.nc.Close()
	wantEventually(t, "it is gone", func() bool { return th.m.closesTotal.with("1006").Get() == 1 })
}
