package e2e

import (
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// earlierNews is what a page on a client of the earlier service says (testdata/earlier_page.js).
type earlierNews struct {
	Got  string          `json:"got"`
	Chat string          `json:"chat"`
	Row  json.RawMessage `json:"row"`
	Text string          `json:"text"`
}

// wantSaid waits for the next thing that the page says.
func wantSaid(t *testing.T, a *harness.Actor, want earlierNews) {
	t.Helper()
	ctx := harness.Within(t, harness.Patience)
	select {
	case line := <-a.Said:
		var got earlierNews
		if err := json.Unmarshal(line, &got); err != nil || got.Got != want.Got || got.Chat != want.Chat || string(got.Row) != string(want.Row) {
			t.Fatalf("the page says %s, %v, want %s of chat %q with the row %s", line, err, want.Got, want.Chat, want.Row)
		}
	case <-ctx.Done():
		t.Fatalf("the page does not say %q", want.Got)
	}
}

// TestEarlierClient replays what a deployment of the earlier service does: its publisher's prefix, subjects and payloads, its users'
// ids, a token that its back end can open, and its pages' client in a browser, as it is.
func TestEarlierClient(t *testing.T) {
	t.Parallel()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	browser := harness.StartBrowser(t)
	w := harness.New(t, harness.OwnNATS(), harness.NoStream(),
		harness.Settings("EVENTS_TYPE_IN_PAYLOAD=true", "EVENTS_AGENTS_TO_USERS=true", "WEBSOCKET_ALLOWED_ORIGINS=127.0.0.1:*"))
	w.Prefix = "websocket"
	w.MakeStream(func(*jetstream.StreamConfig) {})
	one, two := w.Start(), w.Start()

	token := one.Mint("/generate-token", harness.APIKey, map[string]any{
		"company_id": "acme", "agent_id": "7", "user_id": "john.doe@example.com", "expires_in_seconds": 3600})
	if _, err := base64.URLEncoding.DecodeString(token); err != nil {
		t.Errorf("the token %q is not what the earlier service opens: %v", token, err)
	}
	page := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	defer page.Close()
	data := filepath.Join(root, "dev/e2e/testdata")
	a, err := browser.Open(harness.Within(t, harness.Patience), page.URL, filepath.Join(data, "earlier.js"), filepath.Join(data, "earlier_page.js"))
	if err != nil {
		t.Fatal(err)
	}
	defer a.End()
	tell := func(v map[string]any) {
		t.Helper()
		if err := a.Tell(v); err != nil {
			t.Fatal(err)
		}
	}
	tell(map[string]any{"do": "open", "baseUrl": "ws://" + one.HTTP, "companyId": "acme", "agentId": "7", "token": token, "apiKey": harness.APIKey})
	wantSaid(t, a, earlierNews{Got: "ready"})
	other := two.Connect(harness.User("acme", "7", "user:1"))
	admin := two.Connect(harness.Admin("Jane Doe", "acme", ""))

	// Whichever pod pulls an event: with so many, each has its part of them.
	const chat, message = `{"chat_id":"628111@c.us","unread":3}`, `{"text":"hello"}`
	publish := func(subject, payload string) uint64 {
		t.Helper()
		return w.PublishRaw("websocket.acme.7."+subject, []byte(payload))
	}
	var last uint64
	for range 8 {
		seq := publish("chats", `{"event_id":"e-91","company_id":"acme","agent_id":"7","row_data":`+chat+`}`)
		wantSaid(t, a, earlierNews{Got: "chat", Row: []byte(chat)})
		if m := other.WantEvent(seq); string(m.Payload) != `{"event_type":"chat","event_id":"e-91","company_id":"acme","agent_id":"7","row_data":`+chat+`}` {
			t.Fatalf("the payload is %s", m.Payload)
		}
		seq = publish("contacts", `{"event_id":"e-92","company_id":"acme","row_data":{}}`)
		wantSaid(t, a, earlierNews{Got: "contact", Row: []byte(`{}`)})
		other.WantEvent(seq)
		last = publish("agents", ` { "event_id":"e-93","company_id":"acme","row_data":{"status":"connected"} } `)
		wantSaid(t, a, earlierNews{Got: "agent", Row: []byte(`{"status":"connected"}`)})
		if m := admin.WantEvent(last); string(m.Payload) != `{"event_type":"agent", "event_id":"e-93","company_id":"acme","row_data":{"status":"connected"} }` {
			t.Fatalf("the payload is %s", m.Payload)
		}
		other.WantEvent(last)
	}

	publish("messages.628111@c.us", `{"row_data":{"text":"of a chat that is not selected"}}`)
	tell(map[string]any{"do": "select", "chat": "628111@c.us"})
	admin.Send(map[string]any{"type": "select_chat", "chat_id": "628111@c.us"})
	one.WaitMetric(func(v float64) bool { return v == 1 }, "dws_messages_sent_total", `message_type="chat_selected"`)
	publish("messages.628111@c.us", `{"event_id":"e-94","company_id":"acme","agent_id":"7","chat_id":"628111@c.us","message_id":"m1","row_data":`+message+`}`)
	wantSaid(t, a, earlierNews{Got: "message", Chat: "628111@c.us", Row: []byte(message)})

	// A payload that says its type stays as it is.
	own := `{"row_data":{},"event_type" : "chat"}`
	if m := other.WantEvent(publish("chats", own)); string(m.Payload) != own {
		t.Errorf("the payload is %s, want %s", m.Payload, own)
	}
	wantSaid(t, a, earlierNews{Got: "chat", Row: []byte(`{}`)})

	// Who resumes gets agents events too, and each with its type.
	again := two.Dial(harness.User("acme", "7", "back").From(harness.Place{Stream: other.Ready.Stream}))
	m := again.WaitEvent(last)
	if !m.Replay || m.EventType != "agent" || string(m.Payload) != `{"event_type":"agent", "event_id":"e-93","company_id":"acme","row_data":{"status":"connected"} }` {
		t.Errorf("replayed: %s", m.Raw)
	}
	// An agents event that nobody gets now is kept for who comes a little later.
	seq := w.PublishRaw("websocket.acme.8.agents", []byte(`{"row_data":{}}`))
	admin.WantEvent(seq)
	seq = w.PublishRaw("websocket.other.8.agents", []byte(`{"row_data":{}}`))
	one.Connect(harness.User("other", "8", "ann")).WantEvent(seq)

	tell(map[string]any{"do": "close"})
	wantSaid(t, a, earlierNews{Got: "close"})
	for _, p := range []*harness.Pod{one, two} {
		if n := p.Metric("dws_messages_sent_total", `message_type="error"`); n != 0 {
			t.Errorf("%s sent %v errors", p.ID, n)
		}
	}
	if n := one.Metric("dws_messages_received_total", `message_type="ready"`); n != 1 {
		t.Errorf("%v times ready from clients, want 1", n)
	}
}
