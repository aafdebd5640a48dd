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
	s    *scripted
	ws   *websocket.Conn
	past string // what the client said of itself: since, stream and chat, as it wrote them
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
		q := r.URL.Query()
		if !q.Has("since") {
			t.Errorf("it came without since: %s", r.URL.RawQuery)
		}
		s.conns <- &scriptedConn{s, ws, strings.TrimRight(q.Get("since")+" "+q.Get("stream")+" "+q.Get("chat"), " ")}
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

// next waits for the next socket, of a client with that position, stream and chat.
func (s *scripted) next(past string) *scriptedConn {
	s.t.Helper()
	select {
	case c := <-s.conns:
		if c.past != past {
			s.t.Fatalf("it came with %q, want %q", c.past, past)
		}
		return c
	case <-time.After(harness.Patience):
		s.t.Fatal("it did not come")
		return nil
	}
}

// do has the program do something, and returns when it has.
func (s *scripted) do(what string, more ...any) {
	s.t.Helper()
	v := map[string]any{"do": what}
	for i := 0; i < len(more); i += 2 {
		v[more[i].(string)] = more[i+1]
	}
	s.tell(v)
	s.wantSaid(news{Got: "did", What: what})
}

// wantSaid waits for the next thing that it says of that kind, and expects it to be as in n, where that is not zero. Each load must be
// waited for.
func (s *scripted) wantSaid(n news) news {
	s.t.Helper()
	for timeout := time.After(harness.Patience); ; {
		select {
		case got := <-s.said:
			if got.Got == "load" && n.Got != "load" {
				s.t.Fatalf("it loads without a reason: %+v", got)
			}
			if got.Got != n.Got || n.Got == "state" && got.What != n.What {
				continue
			}
			if n.What != "" && got.What != n.What || n.Seq != 0 && got.Seq != n.Seq || n.Text != "" && got.Text != n.Text || got.Known != n.Known {
				s.t.Fatalf("it said %+v, want %+v", got, n)
			}
			return got
		case <-timeout:
			s.t.Fatalf("it did not say %+v", n)
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

// event sends an event and expects that the client takes it for new, or for known.
func (c *scriptedConn) event(seq uint64, known bool) {
	c.s.t.Helper()
	c.send(fmt.Sprintf(`{"type":"event","event_type":"chat","seq":%d,"payload":{}}`, seq))
	c.s.wantSaid(news{Got: "event", Seq: seq, Known: known})
}

func (c *scriptedConn) position(seq uint64) { c.send(fmt.Sprintf(`{"type":"position","seq":%d}`, seq)) }

// ready and resumed give a position of the stream; gap says that the client has to reload.
func (c *scriptedConn) ready(position uint64, stream string, gap bool) {
	c.send(fmt.Sprintf(`{"type":"ready","payload":{"session_id":"s","seq":%d,"position":%d,"stream":%q,"resumed":0,"gap":%t}}`, position+1, position, stream, gap))
}

func (c *scriptedConn) resumed(position uint64, stream string, gap bool) {
	c.send(fmt.Sprintf(`{"type":"resumed","payload":{"seq":%d,"position":%d,"stream":%q,"resumed":0,"gap":%t}}`, position+1, position, stream, gap))
}

func (c *scriptedConn) gap() { c.send(`{"type":"gap","payload":{"since":1,"reason":"buffer"}}`) }

func (c *scriptedConn) selected(chat string, seq uint64) {
	c.send(fmt.Sprintf(`{"type":"chat_selected","payload":{"chat_id":%q,"seq":%d}}`, chat, seq))
}

func (c *scriptedConn) refuse(code string) {
	c.send(fmt.Sprintf(`{"type":"error","payload":{"code":%q,"message":""}}`, code))
}

// wantSelect and wantResume wait for the client's next message.
func (c *scriptedConn) wantSelect(chat string) {
	c.s.t.Helper()
	c.want(fmt.Sprintf(`{"type":"select_chat","payload":{"chat_id":%q}}`, chat))
}

func (c *scriptedConn) wantResume() {
	c.s.t.Helper()
	c.want(`{"type":"resume"}`)
}

// wantLoad waits for a load to begin.
func (s *scripted) wantLoad(what, chat string, seq uint64) {
	s.t.Helper()
	s.wantSaid(news{Got: "load", What: what, Text: chat, Seq: seq})
}

// begun returns a client that has loaded the state and keeps position 100 of stream S, and its socket.
func begun(t *testing.T) (*scripted, *scriptedConn) {
	t.Helper()
	s := script(t)
	c := s.next("")
	c.ready(100, "S", false)
	s.wantLoad("all", "", 101)
	s.do("loaded", "n", 0)
	return s, c
}

// TestReferenceClientCloseCodes: each code of docs/protocol.md ends its coming back, or does not.
func TestReferenceClientCloseCodes(t *testing.T) {
	t.Parallel()
	s, first := begun(t)
	first.close(1011, "internal-error")
	s.wantSaid(news{Got: "state", What: "busy"})
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
		{4402, "session-lost", false}, {1013, "session-lost", true}, {4403, "invalid-token", false}, {4403, "revoked", false},
	} {
		c := s.next("100 S")
		c.ready(100, "S", false)
		s.wantSaid(news{Got: "state", What: "on"})
		c.close(tc.code, tc.reason)
		if tc.back {
			n := s.wantSaid(news{Got: "state", What: "busy"})
			if n.Code != tc.code {
				t.Errorf("%d %s: it says %+v", tc.code, tc.reason, n)
			}
			_, wait, _ := strings.Cut(n.Text, "again in ")
			waits[wait]++
			continue
		}
		if n := s.wantSaid(news{Got: "state", What: "off"}); n.Code != tc.code {
			t.Errorf("%d %s: it says %+v", tc.code, tc.reason, n)
		}
		s.do("connect")
	}
	s.next("100 S")
	if len(waits) < 5 { // of 11, most of them between 0 and 2 s: 0.5 s, doubled, with this client's limit
		t.Errorf("its back-off is not drawn at random: %v", waits)
	}
	if waits["0.1 s"] == 0 {
		t.Errorf("it did not wait as long as the drain had asked: %v", waits)
	}
}

// TestReferenceClientPositions: it keeps the highest position of one stream, from the first load on, and drops what is not above it or
// has come since.
func TestReferenceClientPositions(t *testing.T) {
	t.Parallel()
	s := script(t)
	c := s.next("")
	c.ready(100, "S", false)
	s.wantLoad("all", "", 101)
	c.event(101, false)
	c.event(101, true)
	c.position(102)
	c.close(1011, "") // between its ready and the end of its load

	c = s.next("")
	c.event(99, false) // no position says that it was had
	c.ready(103, "S", false)
	s.wantLoad("all", "", 104)
	s.do("loaded", "n", 0) // for the socket before: too late
	c.close(1011, "")

	c = s.next("")
	c.ready(103, "S", false)
	s.wantLoad("all", "", 104)
	c.position(105)
	c.event(106, false)
	s.do("loaded", "n", 2)
	c.event(105, true)
	c.event(106, true)
	c.event(108, false)
	c.event(107, false) // in any order
	c.position(108)
	c.event(107, true)
	c.position(50) // another pod's, which is behind
	c.event(108, true)
	c.event(109, false)
	c.close(1011, "")

	c = s.next("108 S")
	c.event(109, true) // the replay
	c.event(110, false)
	c.ready(120, "S", false)
	c.event(115, true)
	c.position(119)
	c.event(121, false)
	c.close(1011, "")
	s.next("120 S")
}

// TestReferenceClientGaps: each gap is answered by a resume, the answer's position is kept; what can't be replayed is loaded, and positions
// go on from the answer's, also where that is lower or there is none.
func TestReferenceClientGaps(t *testing.T) {
	t.Parallel()
	s, c := begun(t)
	c.gap()
	c.wantResume()
	c.event(120, false)
	c.gap() // after the question: not covered by its answer
	c.wantResume()
	c.resumed(110, "S", false)
	c.refuse("RateLimitExceeded")
	c.wantResume()
	c.event(105, true)
	c.event(120, true)
	c.close(1011, "")

	c = s.next("110 S")
	c.gap() // between the last pass of the replay and its answer
	c.wantResume()
	c.ready(130, "S", false)
	c.resumed(131, "S", false)
	c.event(132, false)
	c.gap()
	c.wantResume()
	c.resumed(90, "S", true) // of a pod that is behind
	s.wantLoad("all", "", 91)
	c.event(131, false)
	c.event(132, false) // what was had is forgotten
	c.position(92)
	c.close(1011, "") // before it was loaded

	c = s.next("")
	c.ready(93, "S", false)
	s.wantLoad("all", "", 94)
	s.do("loaded", "n", 2)
	c.event(93, true)
	c.gap()
	c.wantResume()
	c.send(`{"type":"resumed","payload":{"seq":3,"stream":"T","resumed":0,"gap":true}}`) // a stream made anew, of which there is no position yet
	s.wantLoad("all", "", 3)
	s.do("loaded", "n", 3)
	c.event(3, false)
	c.event(3, true)
	c.close(1011, "")

	c = s.next("")
	c.ready(4, "T", false)
	s.wantLoad("all", "", 5)
	s.do("loaded", "n", 4)
	c.gap()
	c.wantResume()
	c.resumed(6, "T", true)
	s.wantLoad("all", "", 7)
	c.gap()
	c.wantResume()
	c.resumed(8, "U", true)
	s.wantLoad("all", "", 9)
	s.do("loaded", "n", 5) // a later load has taken its place
	c.event(7, false)
	s.do("loaded", "n", 6)
	c.event(7, true)
	c.event(8, true)
	c.close(1011, "")

	c = s.next("8 U")
	c.ready(50, "V", true) // made anew while it was away
	s.wantLoad("all", "", 51)
	s.do("unloaded", "n", 7)
	s.wantLoad("all", "", 51)
	c.position(52)
	s.do("loaded", "n", 8)
	c.event(52, true)
	c.close(1011, "")
	s.next("52 V")
}

// TestReferenceClientChats: the chat is named on each new socket. From its selection on until its messages were loaded, after the
// confirmation, no position is kept.
func TestReferenceClientChats(t *testing.T) {
	t.Parallel()
	s, c := begun(t)
	s.do("select", "text", "c1")
	c.wantSelect("c1")
	c.position(101)
	c.selected("c1", 105)
	s.wantLoad("chat", "c1", 105)
	c.position(102)
	c.event(103, false)
	s.do("unloaded", "n", 1)
	s.wantLoad("chat", "c1", 105)
	c.event(101, false) // of that chat, maybe: nothing says that it was had
	c.close(1011, "")

	c = s.next("100 S c1")
	c.ready(110, "S", false)
	s.wantLoad("chat", "c1", 111) // the socket before ended in the midst of it
	c.position(112)
	s.do("loaded", "n", 3)
	c.event(112, true)
	c.close(1011, "")

	c = s.next("112 S c1")
	c.ready(113, "S", false)
	s.do("select", "text", "c2")
	c.wantSelect("c2")
	c.selected("c2", 115)
	s.wantLoad("chat", "c2", 115)
	s.do("select", "text", "c3")
	c.wantSelect("c3")
	c.position(116)
	s.do("loaded", "n", 4) // of c2: those of c3 are lacking
	c.event(116, false)
	c.close(1011, "")

	c = s.next("113 S c3")
	s.do("select", "text", "c4") // before the ready
	c.ready(120, "S", false)
	c.wantSelect("c4") // and loads nothing yet: it is c3 that is selected
	c.close(1001, "drain retry-after-ms=1500")
	s.wantSaid(news{Got: "state", What: "busy"})
	s.do("select", "text", "c5") // between two sockets

	c = s.next("113 S c5")
	c.ready(121, "S", false)
	s.wantLoad("chat", "c5", 122)
	s.do("loaded", "n", 5)
	for _, chat := range []string{"c6", "c7", "c6"} {
		s.do("select", "text", chat)
		c.wantSelect(chat)
	}
	c.selected("c6", 123)
	c.selected("c7", 124)
	c.position(125) // while c7 is selected: messages of c6 up to there did not come
	c.event(125, false)
	c.close(1011, "")

	c = s.next("121 S c6")
	c.ready(126, "S", false)
	s.wantLoad("chat", "c6", 127)
	s.do("loaded", "n", 6)
	s.do("select", "text", "")
	c.wantSelect("")
	c.refuse("Unavailable")
	c.wantSelect("")
	c.selected("", 128)
	c.position(129)
	c.event(129, true) // nothing was to be loaded
	s.do("select", "text", "c8")
	c.wantSelect("c8")
	c.refuse("RateLimitExceeded")
	c.gap()
	c.wantResume()
	c.resumed(140, "S", true)
	s.wantLoad("all", "c8", 141)
	s.do("loaded", "n", 7)
	c.event(140, false) // the confirmation of c8 is still to come
	c.wantSelect("c8")
	c.selected("c8", 145)
	s.wantLoad("chat", "c8", 145)
	s.do("loaded", "n", 8)
	c.event(140, true)
	c.close(1011, "")
	s.next("140 S c8")
}
