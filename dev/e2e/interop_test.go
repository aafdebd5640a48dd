package e2e

import (
	"crypto/rand"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// guest is a client library of other people, and what it offers besides messages.
type guest struct {
	name    string
	library func(t testing.TB) *harness.Library // nil = in this process
	headers bool                                // its user can set them
	pings   bool                                // and send pings
	raw     bool                                // and reach the connection below
	bytes   bool                                // and send text that is not UTF-8
}

var guests = []guest{
	{name: "coder", headers: true, pings: true, bytes: true},
	{name: "gorilla", headers: true, pings: true, raw: true, bytes: true},
	{name: "node", library: harness.Node, headers: true, pings: true, raw: true, bytes: true},
	{name: "python", library: harness.Python, headers: true, pings: true, raw: true, bytes: true},
	{name: "chromium", library: harness.Chromium},
}

// visit is a guest at work on a pod of its own.
type visit struct {
	guest
	t    *testing.T
	w    *harness.World
	pod  *harness.Pod
	dial harness.Dial // of ann
}

// TestGuests: each of the clients in use connects with every way of handing a token over that it has, gets plain and
// compressed events byte for byte, selects a chat, pings, answers pings, and sees every close code that it can meet, with
// its reason.
func TestGuests(t *testing.T) {
	t.Parallel()
	for _, g := range guests {
		t.Run(g.name, func(t *testing.T) {
			t.Parallel()
			v := &visit{guest: g, t: t, dial: harness.User("acme", "desk1", "ann")}
			if g.library != nil {
				v.dial.Via = g.library(t)
			}
			v.dial.Gorilla, v.dial.Compression = g.name == "gorilla", true
			v.dial = v.dial.With("errors", "close") // without it a page does not learn why it was refused
			v.w = harness.New(t, harness.Settings(calm, "WEBSOCKET_COMPRESSION=no_context_takeover", "WEBSOCKET_RATE_LIMIT=1/s", "WEBSOCKET_RATE_BURST=10",
				"WEBSOCKET_WRITE_TIMEOUT=1500ms", "WEBSOCKET_BLOCK_TIMEOUT=1s", "WEBSOCKET_PING_INTERVAL=3s", "WEBSOCKET_BUFFER_SIZE=16", "SERVER_MAX_CONNECTIONS=4", "SERVER_DRAIN_SPREAD=0s"))
			v.pod = v.w.Start()
			expiring := v.dial
			expiring.User, expiring.TTL = "exp", 6*time.Second
			exp := v.pod.Connect(expiring)
			stays := v.dial
			stays.User = "bob"
			bob := v.pod.Connect(stays)
			v.tokens()
			v.events()
			v.refused()
			v.closed()
			exp.WantClose(4403, "token-expired")
			v.w.Settled()
			bob.Forget()
			bob.WantNothingElse() // it has answered some pings
			v.pongless()
			v.pod.WantLedgers()
			v.drained()
			v.pod = v.w.Start("WEBSOCKET_PING_INTERVAL=1m") // does not close for pings what it shall close for what it cannot write
			v.slow()
			v.pod.WantLedgers()
		})
	}
}

// drained is the last close code.
func (v *visit) drained() {
	v.t.Helper()
	c := v.pod.Connect(v.dial)
	v.pod.Terminate()
	c.WantClose(1001, "drain retry-after-ms=0")
	v.pod.WantExit(0, harness.Patience)
}

// tokens connects once per way of handing the token over.
func (v *visit) tokens() {
	v.t.Helper()
	ways := map[string]harness.Dial{"query": v.dial}
	bearer := v.dial
	bearer.Bearer = true
	ways["sub-protocol"] = bearer
	if v.headers {
		header := v.dial
		header.Token, header.Key = harness.None, harness.None
		header.Header = http.Header{"Authorization": {"Bearer " + harness.UserToken(v.t, "acme", "desk1", "ann", time.Hour)}, "X-Api-Key": {harness.APIKey}}
		header.Protocols = []string{"json.v1"}
		ways["Authorization"] = header
	}
	for way, d := range ways {
		c := v.pod.Connect(d)
		if want := map[bool]string{true: "json.v1"}[way != "query"]; c.Protocol() != want {
			v.t.Errorf("token by %s: the sub-protocol is %q, want %q", way, c.Protocol(), want)
		}
		c.Close(1000, "")
		if end := c.Ended(); end.Code != 1000 {
			v.t.Errorf("token by %s: its own close frame is answered by %d %q", way, end.Code, end.Reason)
		}
	}
}

// events are plain and compressed, of a chat and of all; what is compressed is seen on the way.
func (v *visit) events() {
	v.t.Helper()
	count := newCounter(v.t, v.pod.HTTP)
	c := v.pod.DialAt(count.address, v.dial)
	c.WantReady()
	for _, note := range []string{"short", strings.Repeat(`so it goes, 日本語 \u2028 \ud83d\ude00 `, 50), strings.Repeat(`so it goes, 日本語 `, 5000)} {
		payload := `{"row_data":{ "note" : "` + note + `"}}`
		before := count.down.Load()
		seq := v.w.PublishRaw(v.w.Prefix+".acme.desk1.chats", []byte(payload))
		m := c.WantEvent(seq)
		if want := fmt.Sprintf(`{"type":"event","event_type":"chat","seq":%d,"payload":%s}`, seq, payload); m.Raw != want {
			v.t.Errorf("an event came as %.300q, want %.300q", m.Raw, want)
		}
		if wire := int(count.down.Load() - before); (wire < len(payload)/2) != (len(payload) > 1024) {
			v.t.Errorf("an event of %d bytes took %d on the wire", len(payload), wire)
		}
	}
	c.SelectChat("c1")
	c.WantEvent(v.w.Message("acme", "desk1", "c1"))
	v.w.Message("acme", "desk1", "c2")
	c.WantNothingElse()
	c.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c2", "pad": strings.Repeat("x", 5000)}}) // it may compress it
	c.TakeType("chat_selected")
	c.Send(map[string]any{"type": "ping"})
	c.TakeType("pong")
	if did := c.Ping("hello"); did != v.pings {
		v.t.Errorf("it sends pings: %t, want %t", did, v.pings)
	}
	c.WantEvent(v.w.Message("acme", "desk1", "c2"))
	c.Close(1000, "")
}

// refused are the close codes of sockets that are let in only to be told why not.
func (v *visit) refused() {
	v.t.Helper()
	key, token, bad, expired := v.dial, v.dial, v.dial.With("since", "x"), v.dial
	key.Key = "wrong"
	token.Token = harness.UserToken(v.t, "acme", "desk2", "ann", time.Hour)
	expired.TTL = -time.Second
	v.pod.Dial(bad).WantClose(4400, "bad-request")
	v.pod.Dial(key).WantClose(4401, "invalid-api-key")
	v.pod.Dial(token).WantClose(4403, "invalid-token")
	v.pod.Dial(expired).WantClose(4403, "token-expired")
	for i := range 5 { // the pod takes 4, with those that are open already
		d := v.dial
		d.User = fmt.Sprint("more", i)
		c := v.pod.Dial(d)
		if _, err := c.TryTake(harness.Within(v.t, harness.Patience), func(m harness.Message) bool { return m.Type == "ready" }); err != nil {
			c.WantClose(1013, "unavailable")
			return
		}
		defer c.Close(1000, "")
	}
	v.t.Error("more sockets than the pod may have were let in")
}

// closed are the close codes of sockets that were in use.
func (v *visit) closed() {
	v.t.Helper()
	open := func() *harness.Client { return v.pod.Connect(v.dial) }
	c := open()
	other := open()
	c.WantClose(4402, "session-replaced")
	c = other
	if a := v.pod.Do("DELETE", "/admin/sessions/acme/desk1/ann", http.Header{"X-Api-Key": {harness.AdminAPIKey}}, nil); a.StatusCode >= 300 {
		v.t.Errorf("DELETE of the session: %s %s", a.Status, a.Body)
	}
	c.WantClose(4403, "revoked")
	c = open()
	c.SendRaw(false, []byte(pingText))
	c.WantClose(1003, "binary messages are not taken")
	c = open()
	c.SendRaw(true, []byte(strings.Repeat("x", 64<<10+1)))
	c.WantClose(1009, "message too big")
	if v.bytes {
		c = open()
		c.SendRaw(true, []byte("{\"type\":\"\xc3\"}"))
		c.WantClose(1007, "text is not UTF-8")
	}
	c = open()
	if did := c.SendBytes(harness.FrameHeader(harness.FIN|harness.Text, false, 0)); did != v.raw {
		v.t.Errorf("it sends bytes of its user: %t, want %t", did, v.raw)
	} else if did {
		c.WantClose(1002, "frame is not masked")
		c = open()
	}
	for i := 0; i < 1000 && c.Ended() == nil; i++ { // 10 at once, 30 refused
		c.TrySend(true, []byte(pingText)) // the socket may be closed meanwhile
	}
	c.WantClose(4429, "rate-limit-exceeded")
}

// pongless is the close code of a client that stands still until it has missed two pings.
func (v *visit) pongless() {
	v.t.Helper()
	v.still(1011, "ping-timeout", func(i int) {
		if i == 0 {
			v.w.PublishRaw(v.w.Prefix+".acme.desk2.chats", []byte("{}")) // ends the read that is under way, in which some libraries answer pings
		}
	})
}

// slow is the close code of a client that stands still until more was sent than it and the kernel take.
func (v *visit) slow() {
	v.t.Helper()
	noise := make([]byte, 64<<10)
	rand.Read(noise) // else it is compressed to nothing: a page cannot refuse that
	big := fmt.Appendf(nil, `{"pad":"%x"}`, noise)
	v.still(4408, "slow-client", func(int) {
		if v.pod.Metric("dws_websocket_buffer_used") < 8 { // the kernel still takes them
			v.w.PublishRaw(v.w.Prefix+".acme.desk2.chats", big)
			v.w.PublishRaw(v.w.Prefix+".acme.desk2.chats", big)
		}
	})
}

// still has a client stand still, calls meanwhile until the service has given its session up, and then lets it read how
// it was closed. The close frame goes out behind all else, but only within two seconds: a busy machine may take longer, or
// be closed for another reason first.
func (v *visit) still(code int, reason string, meanwhile func(i int)) {
	v.t.Helper()
	rdb := v.w.RedisClient()
	d := v.dial
	d.Agent = "desk2" // those of desk1 are to hear nothing of it
	var end harness.Close
	for range 5 {
		c := v.pod.Connect(d)
		c.Pause()
		i := 0
		harness.Eventually(v.t, 2*harness.Patience, "the end of a session whose client stands still", func() bool {
			meanwhile(i)
			i++
			return rdb.Exists(v.t.Context(), lockOf(d)).Val() == 0
		})
		c.Resume()
		harness.Eventually(v.t, harness.Patience, "the socket's end", func() bool { return c.Ended() != nil })
		if end = *c.Ended(); end.Code == code {
			c.WantClose(code, reason)
			return
		}
	}
	v.t.Errorf("a client that stood still was closed with %d %q (%v), want %d", end.Code, end.Reason, end.Err, code)
}
