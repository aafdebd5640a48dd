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
			wantSelected(t, c.Next(), id, false)
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
			wantSelected(t, c.Next(), "", false)
			w.Message("acme", "desk1", "c1")
			c.WantNothingElse()
		}
		wantAtRest(pod, nil)
		wantUnselected(pod, len(ids)+2)
	})
}

// wantUnselected expects that n events were acked without being written to anyone. Right behind a confirmation such an event may
// still be handed to the socket, which refuses it: the ledger of targets has it as a duplicate then.
func wantUnselected(p *harness.Pod, n int) {
	p.W.T.Helper()
	m := p.Metrics()
	unselected, refused := m.Sum("dws_events_total", `outcome="unselected"`), m.Sum("dws_targets_total", `outcome="duplicate"`)
	if int(unselected+refused) != n {
		p.W.T.Errorf("%v events unselected and %v refused by their socket, want %d in all", unselected, refused, n)
	}
}

// wantSelected holds a confirmation against what it must be.
func wantSelected(t *testing.T, m harness.Message, chat string, gap bool) {
	t.Helper()
	var p struct {
		ChatID  *string `json:"chat_id"`
		Seq     *uint64 `json:"seq"`
		Resumed *int    `json:"resumed"`
		Gap     *bool   `json:"gap"`
	}
	err := json.Unmarshal(m.Payload, &p)
	if m.Type != "chat_selected" || err != nil || p.ChatID == nil || *p.ChatID != chat || p.Seq == nil || p.Resumed == nil || *p.Resumed != 0 || p.Gap == nil || *p.Gap != gap {
		t.Fatalf("want the confirmation of %q with gap %t, got %s", chat, gap, m.Raw)
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
	for _, text := range []string{`{"type":"select_chat"}`, `{"type":"select_chat","payload":{}}`, `{"type":"select_chat","payload":null}`, `{"type":"select_chat","payload":"c2"}`,
		`{"type":"select_chat","payload":{"chat_id":"c2","since":-1}}`, `{"type":"select_chat","payload":{"chat_id":"c2","since":"5"}}`, `{"type":"select_chat","payload":{"chat_id":"c2","since":1.5}}`} {
		c.SendRaw(true, []byte(text))
		c.WantError("BadRequest")
		c.WantEvent(w.Message("acme", "desk1", "c1"))
	}
	w.Message("acme", "desk1", "c2")
	c.WantNothingElse()
	wantAtRest(pod, nil)
	wantUnselected(pod, 1)
}

// TestSinceOfAnEmptyStream: what is beyond its end is answered by a gap; who does not ask is told of none.
func TestSinceOfAnEmptyStream(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		user, admin := as(harness.User("acme", "desk1", "ann")), as(harness.Admin("root", "", ""))
		for _, d := range []harness.Dial{user, admin} {
			c := pod.Connect(d)
			if c.Ready.Gap || c.Ready.Resumed != 0 {
				t.Errorf("ready without since: %+v", c.Ready)
			}
			for since, gap := range map[string]bool{"0": false, "1": true, "18446744073709551615": true} {
				c := pod.Connect(d.With("since", since))
				if c.Ready.Gap != gap || c.Ready.Resumed != 0 {
					t.Errorf("ready after since=%s: %+v", since, c.Ready)
				}
			}
			pod.WantRefused(d.With("since", "-1"), 400, "BadRequest")
			pod.WantRefused(d.With("since", "soon"), 400, "BadRequest")
			c = pod.Connect(d)
			c.SendRaw(true, []byte(`{"type":"resume","payload":{"since":1}}`))
			m := c.Next()
			var r harness.Reply
			if err := json.Unmarshal(m.Payload, &r); err != nil || m.Type != "resumed" || !r.Gap || r.Resumed != 0 {
				t.Errorf("resume is answered by %s", m.Raw)
			}
			for _, text := range []string{`{"type":"resume"}`, `{"type":"resume","payload":{}}`, `{"type":"resume","payload":{"since":-1}}`, `{"type":"resume","payload":{"since":null}}`} {
				c.SendRaw(true, []byte(text))
				c.WantError("BadRequest")
			}
		}
		c := pod.Connect(user)
		c.SendRaw(true, []byte(`{"type":"select_chat","payload":{"chat_id":"c1","since":0}}`))
		wantSelected(t, c.Next(), "c1", false)
		c.WantEvent(w.Message("acme", "desk1", "c1"))
		wantAtRest(pod, map[string]float64{"delivered": 1})
	})
}

// TestChatsOfTwoUsers: one agent's users select for themselves alone; what one deselects, or leaves by closing, stays the
// other's.
func TestChatsOfTwoUsers(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		rdb := w.RedisClient()
		ann, bob := pod.Connect(as(harness.User("acme", "desk1", "ann"))), pod.Connect(harness.User("acme", "desk1", "bob"))
		wantClaim := func(n int64) {
			t.Helper()
			harness.Eventually(t, harness.Patience, fmt.Sprintf("%d claims of the chat in Redis", n), func() bool {
				got, err := rdb.SCard(t.Context(), "route:acme:desk1:messages:c1").Result()
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
		wantClaim(1)
		ann.SelectChat("c1")
		ann.Close(1000, "")
		bob.WantEvent(w.Message("acme", "desk1", "c1"))
		wantClaim(1)
		bob.SelectChat("c2")
		wantClaim(0)
		w.Message("acme", "desk1", "c1")
		bob.WantNothingElse()
		wantAtRest(pod, nil)
		wantUnselected(pod, 1)
	})
}
