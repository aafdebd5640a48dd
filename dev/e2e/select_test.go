package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// publishLater publishes without waiting, so that nobody knows whether the event or what the test does next is first.
func publishLater(w *harness.World, ev feed.Event) jetstream.PubAckFuture {
	w.T.Helper()
	f, err := w.JS.PublishAsync(w.Prefix+"."+ev.Subject, ev.Payload)
	if err != nil {
		w.T.Fatal(err)
	}
	return f
}

// acked is the sequence that the stream gave the event.
func acked(w *harness.World, f jetstream.PubAckFuture) uint64 {
	w.T.Helper()
	select {
	case ack := <-f.Ok():
		return ack.Sequence
	case err := <-f.Err():
		w.T.Fatalf("publish: %v", err)
	case <-harness.Within(w.T, harness.Patience).Done():
		w.T.Fatal("publish is not acknowledged")
	}
	return 0
}

// switcher is a client that switches between chats. It holds every message against what was confirmed before it.
type switcher struct {
	*harness.Client
	t     *testing.T
	chat  string          // confirmed
	asked string          // asked for, and not yet confirmed
	seen  map[uint64]bool // events that came
}

func (s *switcher) ask(chat string) {
	s.t.Helper()
	s.asked = chat
	s.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": chat}})
}

// next takes the next message, which is a confirmation, or an event of the chat that is selected.
func (s *switcher) next() harness.Message {
	s.t.Helper()
	m := s.Next()
	var p struct {
		Code   string
		ChatID string `json:"chat_id"`
	}
	if err := json.Unmarshal(m.Payload, &p); err != nil {
		s.t.Fatal(err)
	}
	switch {
	case m.Type == "chat_selected" && p.ChatID == s.asked:
		s.chat = s.asked
	case m.Type == "error" && p.Code == "Unavailable": // Redis was away for a moment: the machine is loaded
		s.ask(s.asked)
	case m.Type != "event" || p.ChatID != s.chat || s.seen[m.Seq]:
		s.t.Fatalf("%s is confirmed, %s asked for, came %.200s", s.chat, s.asked, m.Raw)
	default:
		s.seen[m.Seq] = true
	}
	return m
}

// TestSelectIsExact switches between two chats 1,000 times. While a selection is under way, messages of both chats are
// published; before the confirmation only the old chat's may come, after it only the new one's, and the one published
// right behind the confirmation must.
func TestSelectIsExact(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		const rounds = 1000
		w := harness.New(t, harness.Settings("WEBSOCKET_RATE_LIMIT=100000/s", "WEBSOCKET_RATE_BURST=100000"))
		pod := w.Start()
		chats := []string{"c1", "c2.with.dots"}
		c := &switcher{Client: pod.Connect(as(harness.User("acme", "desk1", "ann"))), t: t, seen: map[uint64]bool{}}
		early, crossing := 0, 0
		for i := range rounds {
			now, before := chats[i%2], chats[(i+1)%2]
			old := publishLater(w, feed.Message("acme", "desk1", before, feed.Text(), false))
			c.ask(now)
			fresh := publishLater(w, feed.Message("acme", "desk1", now, feed.Text(), false))
			for c.chat != now {
				c.next()
			}
			w.Message("acme", "desk1", before) // published after the confirmation: never to come
			for seq := w.Message("acme", "desk1", now); !c.seen[seq]; {
				c.next()
			}
			if c.seen[acked(w, old)] {
				early++
			}
			if c.seen[acked(w, fresh)] {
				crossing++
			}
		}
		w.Settled()
		for seq := w.Message("acme", "desk1", c.chat); !c.seen[seq]; {
			c.next()
		}
		if len(c.Events()) != 0 {
			t.Errorf("more came: %.300s", c.Events()[0].Raw)
		}
		if early == 0 || crossing == 0 {
			t.Errorf("of the messages published during %d selections, %d of the old and %d of the new chat came: nothing crossed", rounds, early, crossing)
		}
		wantAtRest(pod, map[string]float64{"dropped": 0, "shed": 0, "no_owner": 0})
		if m := pod.Metrics(); m.Sum("dws_targets_total", `outcome="written"`) != float64(len(c.seen)) {
			t.Errorf("%v events written, %d came", m.Sum("dws_targets_total", `outcome="written"`), len(c.seen))
		}
	})
}

// TestSelectForms: where the chat id may stand, what deselects, and the confirmation's fields.
func TestSelectForms(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		ids := []string{"c1", "a.b.c@s.whatsapp.net", "x:y:z", "1", strings.Repeat("d.e", 85) + "f", `"quoted"\and{braced}`}
		for i, id := range ids {
			text, _ := json.Marshal(map[string]any{"type": "select_chat", "chat_id": id})
			if i%2 == 0 {
				text, _ = json.Marshal(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": id}})
			}
			c.SendRaw(true, text)
			wantSelected(t, c.Next(), id)
			w.Message("acme", "desk1", "not."+id[:min(len(id), 6)])
			c.WantEvent(w.Message("acme", "desk1", id))
		}
		last := ids[len(ids)-1]
		c.SelectChat(last) // again: nothing changes, nothing comes twice
		c.WantEvent(w.Message("acme", "desk1", last))
		for _, text := range []string{`{"type":"select_chat","payload":{"chat_id":""}}`, `{"type":"select_chat","chat_id":""}`} {
			c.SelectChat("c1")
			c.WantEvent(w.Message("acme", "desk1", "c1"))
			c.SendRaw(true, []byte(text))
			wantSelected(t, c.Next(), "")
			w.Message("acme", "desk1", "c1")
			c.WantNothingElse()
		}
		wantAtRest(pod, nil)
		wantUnselected(pod, float64(len(ids)+2))
	})
}

// wantUnselected expects that n events were acked without being written to anyone.
func wantUnselected(p *harness.Pod, n float64) {
	p.W.T.Helper()
	if got := p.Metric("dws_events_total", `outcome="unselected"`); got != n {
		p.W.T.Errorf("%v events unselected, want %v", got, n)
	}
}

// wantSelected holds a confirmation against what it must be.
func wantSelected(t *testing.T, m harness.Message, chat string) {
	t.Helper()
	var p map[string]any
	err := json.Unmarshal(m.Payload, &p)
	if _, ok := p["seq"].(float64); m.Type != "chat_selected" || err != nil || len(p) != 2 || p["chat_id"] != chat || !ok {
		t.Fatalf("want the confirmation of %q, got %s", chat, m.Raw)
	}
}

// TestSelectRefused: what is no chat id changes nothing, and the answer names the field.
func TestSelectRefused(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_RATE_BURST=1000"))
	pod := w.Start()
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	c.SelectChat("c1")
	for _, id := range []string{`".a"`, `"a."`, `"a..b"`, `"a b"`, `"*"`, `"a.>"`, `"é"`, `"a\u0000"`, `"\n"`, `null`, `7`, `{}`, `["c2"]`, `"` + strings.Repeat("x", 257) + `"`} {
		for _, text := range []string{`{"type":"select_chat","payload":{"chat_id":` + id + `}}`, `{"type":"select_chat","chat_id":` + id + `}`} {
			c.SendRaw(true, []byte(text))
			c.WantError("BadRequest")
			c.WantEvent(w.Message("acme", "desk1", "c1"))
		}
	}
	for _, text := range []string{`{"type":"select_chat"}`, `{"type":"select_chat","payload":{}}`, `{"type":"select_chat","payload":null}`, `{"type":"select_chat","payload":"c2"}`} {
		c.SendRaw(true, []byte(text))
		c.WantError("BadRequest")
		c.WantEvent(w.Message("acme", "desk1", "c1"))
	}
	w.Message("acme", "desk1", "c2")
	c.WantNothingElse()
	wantAtRest(pod, nil)
	wantUnselected(pod, 1)
}

// TestSinceOfAnEmptyStream: what is beyond its end is answered by a gap; who does not ask is told of none. A resume takes no number:
// what stands in one is not looked at.
func TestSinceOfAnEmptyStream(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		stream := at(pod, 0).Stream
		user, admin := as(harness.User("acme", "desk1", "ann")), as(harness.Admin("root", "", ""))
		for _, d := range []harness.Dial{user, admin} {
			for _, d := range []harness.Dial{d, d.Positions()} {
				if c := pod.Connect(d); c.Ready.Gap || c.Ready.Resumed != 0 {
					t.Errorf("ready after %v: %+v", d.Query, c.Ready)
				}
			}
			for since, gap := range map[uint64]bool{0: false, 1: true, 1<<64 - 1: true} {
				c := pod.Connect(d.From(harness.Place{Seq: since, Stream: stream}))
				if c.Ready.Gap != gap || c.Ready.Resumed != 0 || c.Ready.Position == nil || *c.Ready.Position != 0 {
					t.Errorf("ready after since=%d: %+v", since, c.Ready)
				}
			}
			pod.WantRefused(d.With("since", "-1"), 400, "BadRequest")
			pod.WantRefused(d.With("since", "soon"), 400, "BadRequest")
			c := pod.Connect(d.Positions())
			for _, text := range []string{`{"type":"resume"}`, `{"type":"resume","payload":{}}`, `{"type":"resume","payload":{"since":-1}}`, `{"type":"resume","payload":{"since":7}}`} {
				c.SendRaw(true, []byte(text))
				wantReplay(t, c, "resumed")
			}
		}
		c := pod.Connect(user)
		c.SendRaw(true, []byte(`{"type":"select_chat","payload":{"chat_id":"c1"}}`))
		wantSelected(t, c.Next(), "c1")
		c.WantEvent(w.Message("acme", "desk1", "c1"))
		wantAtRest(pod, map[string]float64{"delivered": 1})
	})
}

// TestChatsOfTwoUsers: one agent's users select for themselves alone; what one deselects, or leaves by closing, stays the
// other's. Redis hears of none of it: the pod claims their agent, once, while one of them is there.
func TestChatsOfTwoUsers(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		rdb := w.RedisClient()
		ann, bob := pod.Connect(as(harness.User("acme", "desk1", "ann"))), pod.Connect(harness.User("acme", "desk1", "bob"))
		wantClaim := func(n int64) {
			t.Helper()
			harness.Eventually(t, harness.Patience, fmt.Sprintf("%d claims of the agent in Redis", n), func() bool {
				got, err := rdb.SCard(t.Context(), "route:acme:desk1").Result()
				return err == nil && got == n
			})
		}
		ann.SelectChat("c1")
		bob.SelectChat("c1")
		both := w.Message("acme", "desk1", "c1")
		ann.WantEvent(both)
		bob.WantEvent(both)
		ann.SelectChat("")
		bob.WantEvent(w.Message("acme", "desk1", "c1"))
		ann.SelectChat("c1")
		wantClaim(1)
		ann.Close(1000, "")
		bob.WantEvent(w.Message("acme", "desk1", "c1"))
		wantClaim(1)
		bob.SelectChat("c2")
		w.Message("acme", "desk1", "c1")
		bob.WantNothingElse()
		wantAtRest(pod, nil)
		wantUnselected(pod, 1)
		bob.Close(1000, "")
		wantClaim(0)
	})
}
