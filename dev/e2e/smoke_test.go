package e2e

import (
	"testing"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// TestUserGetsItsEvent is the service's main job in one line: published, delivered byte for byte, acked.
func TestUserGetsItsEvent(t *testing.T) {
	t.Parallel()
	for _, gorilla := range []bool{false, true} {
		w := harness.New(t)
		pod := w.Start()
		d := harness.User("acme", "desk1", "ann")
		d.Gorilla = gorilla
		d.Token = pod.Mint("/generate-token", harness.APIKey, map[string]any{
			"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_in_seconds": 60,
		})
		c := pod.Connect(d)
		ev := feed.Chat("acme", "desk1", "628111@c.us", "hello", 1)
		seq := w.Publish(ev)
		m := c.WantEvent(seq)
		if m.EventType != "chat" || string(m.Payload) != string(ev.Payload) {
			t.Errorf("published %s, got %s", ev.Payload, m.Raw)
		}
		w.Settled()
		pod.WantLedgers()
	}
}
