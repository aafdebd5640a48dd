package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// scripted is a service that does what the test says to the reference client, for what the real one does too seldom.
type scripted struct {
	t     *testing.T
	a     *harness.Actor
	conns chan *scriptedConn
	said  chan news
}

type scriptedConn struct {
	s     *scripted
	ws    *websocket.Conn
	since string
}

// script starts the client, under Node, and the service that it is to connect to.
func script(t *testing.T) *scripted {
	s := &scripted{t: t, conns: make(chan *scriptedConn, 16), said: make(chan news, 1000)}
	up := websocket.Upgrader{Subprotocols: []string{"json.v1"}, CheckOrigin: func(*http.Request) bool { return true }}
	var door *httptest.Server
	door = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/access" {
			fmt.Fprintf(w, `{"url":"ws%s/ws","token":"x","expires_at":%q}`, strings.TrimPrefix(door.URL, "http"), time.Now().Add(time.Hour).Format(time.RFC3339))
			return
		}
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			t.Error(err)
			return
		}
		t.Cleanup(func() { ws.Close() })
		s.conns <- &scriptedConn{s, ws, r.URL.Query().Get("since")}
	}))
	t.Cleanup(door.Close)
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	if s.a, err = harness.NodeScript(t, "resident.js", filepath.Join(root, "dev/cluster/page/client.js"))(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the program
		for line := range s.a.Said {
			var n news
			if json.Unmarshal(line, &n) == nil {
				s.said <- n
			}
		}
	}()
	t.Cleanup(func() { s.a.End() })
	s.tell(map[string]any{"do": "start", "access": door.URL + "/access", "quiet": 60000})
	return s
}

func (s *scripted) tell(v map[string]any) {
	s.t.Helper()
	if err := s.a.Tell(v); err != nil {
		s.t.Fatal(err)
	}
}

// next waits for the next socket, which asks for what came after since.
func (s *scripted) next(since string) *scriptedConn {
	s.t.Helper()
	select {
	case c := <-s.conns:
		if c.since != since {
			s.t.Fatalf("it came with since=%q, want %q", c.since, since)
		}
		return c
	case <-time.After(harness.Patience):
		s.t.Fatal("it did not come")
		return nil
	}
}

// wantSaid waits for the next thing of that kind.
func (s *scripted) wantSaid(got, what string) news {
	s.t.Helper()
	for timeout := time.After(harness.Patience); ; {
		select {
		case n := <-s.said:
			if n.Got == got && (what == "" || n.What == what) {
				return n
			}
		case <-timeout:
			s.t.Fatalf("it did not say %s %s", got, what)
		}
	}
}

// silent expects that it has not said that.
func (s *scripted) silent(got string) {
	s.t.Helper()
	for {
		select {
		case n := <-s.said:
			if n.Got == got {
				s.t.Errorf("it said %+v", n)
			}
		default:
			return
		}
	}
}

func (c *scriptedConn) send(m string) {
	c.s.t.Helper()
	if err := c.ws.WriteMessage(websocket.TextMessage, []byte(m)); err != nil {
		c.s.t.Fatal(err)
	}
}

// want waits for its next message, which is m but for blanks.
func (c *scriptedConn) want(m string) {
	c.s.t.Helper()
	c.ws.SetReadDeadline(time.Now().Add(harness.Patience))
	_, got, err := c.ws.ReadMessage()
	if err != nil || string(got) != m {
		c.s.t.Fatalf("it sent %s, %v, want %s", got, err, m)
	}
}

func (c *scriptedConn) close(code int, reason string) {
	c.ws.WriteControl(websocket.CloseMessage, websocket.FormatCloseMessage(code, reason), time.Now().Add(time.Second))
	c.ws.Close()
}

const readyAt = `{"type":"ready","payload":{"session_id":"s","seq":%d,"resumed":0,"gap":%t}}`

// TestReferenceClientCloseCodes: each code of docs/protocol.md ends its coming back, or does not.
func TestReferenceClientCloseCodes(t *testing.T) {
	t.Parallel()
	s := script(t)
	since := ""
	waits := map[string]int{} // how often it waited for how long
	for _, tc := range []struct {
		code   int
		reason string
		back   bool
	}{
		{1001, "drain retry-after-ms=50", true}, {1002, "", true}, {1003, "", true}, {1007, "", true}, {1008, "message-timeout", true},
		{1009, "", true}, {1011, "ping-timeout", true}, {1013, "unavailable", true}, {4408, "slow-client", true},
		{4429, "rate-limit-exceeded", true}, {4403, "token-expired", true},
		{1000, "", false}, {4400, "bad-request", false}, {4401, "invalid-api-key", false}, {4402, "session-replaced", false},
		{4402, "session-lost", false}, {4402, "session-conflict", false}, {4403, "invalid-token", false}, {4403, "revoked", false},
	} {
		c := s.next(since)
		since = "7"
		c.send(fmt.Sprintf(readyAt, 7, false))
		s.wantSaid("state", "on")
		c.close(tc.code, tc.reason)
		if tc.back {
			n := s.wantSaid("state", "busy")
			if n.Code != tc.code {
				t.Errorf("%d %s: it says %+v", tc.code, tc.reason, n)
			}
			_, wait, _ := strings.Cut(n.Text, "again in ")
			waits[wait]++
			continue
		}
		if n := s.wantSaid("state", "off"); n.Code != tc.code {
			t.Errorf("%d %s: it says %+v", tc.code, tc.reason, n)
		}
		s.tell(map[string]any{"do": "connect"})
	}
	s.next(since)
	if len(waits) < 5 { // of 11, most of them between 0 and 2 s: 0.5 s, doubled, with this client's limit
		t.Errorf("its back-off is not drawn at random: %v", waits)
	}
	if waits["0.1 s"] == 0 {
		t.Errorf("it did not wait as long as the drain had asked: %v", waits)
	}
}

// TestReferenceClientOwes: what is owed is asked for until it is paid, over reconnects too; what can't be replayed is reloaded.
func TestReferenceClientOwes(t *testing.T) {
	t.Parallel()
	s := script(t)
	c := s.next("")
	c.send(fmt.Sprintf(readyAt, 100, false))
	c.send(`{"type":"gap","payload":{"since":90,"reason":"buffer"}}`)
	c.want(`{"type":"resume","payload":{"since":90}}`)
	c.send(`{"type":"event","event_type":"chat","seq":120,"payload":{}}`) // newer, while 90 is owed
	s.wantSaid("event", "")
	c.close(1011, "")

	c = s.next("90")
	c.send(`{"type":"gap","payload":{"since":110,"reason":"buffer"}}`) // after the question: not covered by its answer
	c.send(fmt.Sprintf(readyAt, 121, false))
	c.want(`{"type":"resume","payload":{"since":90}}`)
	c.send(`{"type":"error","payload":{"code":"RateLimitExceeded","message":""}}`)
	c.want(`{"type":"resume","payload":{"since":90}}`)
	c.send(`{"type":"resumed","payload":{"seq":122,"resumed":0,"gap":false}}`)

	s.tell(map[string]any{"do": "select", "text": "c1"})
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1"}}`)
	c.send(`{"type":"error","payload":{"code":"Unavailable","message":""}}`)
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1"}}`)
	c.send(`{"type":"chat_selected","payload":{"chat_id":"c1","seq":123,"resumed":0,"gap":false}}`)
	s.wantSaid("selected", "")
	s.silent("reload")
	c.close(1011, "")

	c = s.next("123")
	c.send(fmt.Sprintf(readyAt, 124, true))
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1","since":123}}`)
	s.wantSaid("state", "on")
	s.silent("reload") // the answer for the chat is still to come
	c.send(`{"type":"event","event_type":"message","seq":130,"replay":true,"payload":{}}`)
	c.close(1011, "") // and did not: both are asked for again

	c = s.next("123")
	c.send(fmt.Sprintf(readyAt, 130, true))
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1","since":123}}`)
	c.send(`{"type":"chat_selected","payload":{"chat_id":"c1","seq":131,"resumed":0,"gap":false}}`)
	if n := s.wantSaid("reload", ""); n.Seq != 131 {
		t.Errorf("reload as of %d, want 131", n.Seq)
	}
	c.close(1011, "")

	c = s.next("131")
	c.send(fmt.Sprintf(readyAt, 2, true)) // the stream was made anew
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1","since":131}}`)
	c.send(`{"type":"chat_selected","payload":{"chat_id":"c1","seq":2,"resumed":0,"gap":true}}`)
	if n := s.wantSaid("reload", ""); n.Seq != 2 {
		t.Errorf("reload as of %d, want 2", n.Seq)
	}
	c.send(`{"type":"event","event_type":"chat","seq":120,"payload":{}}`) // of the new stream
	s.wantSaid("event", "")
	c.close(1011, "")

	c = s.next("120")
	c.send(fmt.Sprintf(readyAt, 121, false))
	c.want(`{"type":"select_chat","payload":{"chat_id":"c1","since":120}}`)
	c.send(`{"type":"chat_selected","payload":{"chat_id":"c1","seq":121,"resumed":0,"gap":false}}`)
	c.send(`{"type":"gap","payload":{"since":90,"reason":"owner"}}`)
	c.want(`{"type":"resume","payload":{"since":90}}`)
	c.send(`{"type":"resumed","payload":{"seq":119,"resumed":0,"gap":true}}`) // another one, that is beyond 90 already
	s.wantSaid("reload", "")
	c.send(`{"type":"event","event_type":"chat","seq":120,"payload":{}}`)
	s.wantSaid("event", "")
	c.close(1011, "")
	s.next("120")
}
