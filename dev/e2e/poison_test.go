package e2e

import (
	"encoding/json"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/harness"
)

// terminations counts, by JetStream's own advisories, the events of the World's consumer that were terminated.
type terminations struct {
	mu   sync.Mutex
	seqs map[uint64]int
}

func watchTerminations(w *harness.World) *terminations {
	w.T.Helper()
	seen := &terminations{seqs: map[uint64]int{}}
	_, err := w.NC.Subscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED."+w.Stream+"."+w.Consumer, func(m *nats.Msg) {
		var a struct {
			StreamSeq uint64 `json:"stream_seq"`
		}
		if err := json.Unmarshal(m.Data, &a); err != nil {
			w.T.Errorf("advisory %q: %v", m.Data, err)
		}
		seen.mu.Lock()
		defer seen.mu.Unlock()
		seen.seqs[a.StreamSeq]++
	})
	if err == nil {
		err = w.NC.Flush()
	}
	if err != nil {
		w.T.Fatal(err)
	}
	return seen
}

// want waits until exactly these events were terminated, once each.
func (s *terminations) want(t *testing.T, seqs []uint64) {
	t.Helper()
	harness.Eventually(t, harness.Patience, fmt.Sprintf("%d terminations", len(seqs)), func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return len(s.seqs) >= len(seqs)
	})
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, seq := range seqs {
		if s.seqs[seq] != 1 {
			t.Errorf("event %d was terminated %d times", seq, s.seqs[seq])
		}
	}
	if len(s.seqs) != len(seqs) {
		t.Errorf("%d events were terminated, want %d", len(s.seqs), len(seqs))
	}
}

// poison are subjects (behind the prefix) and payloads that fit nothing in docs/publishing.md.
func poison() [][2]string {
	const fine = `{"event_id":"e1"}`
	var all [][2]string
	for _, subject := range []string{
		"acme", "acme.desk1", "acme.desk1.unknown", "acme.desk1.Chats", "acme.desk1.chats.more", "acme.desk1.contacts.more", "acme.desk1.agents.more",
		"acme.desk1.messages", "acme.chats", "chats", "acme.desk1.more.chats", "ac!me.desk1.chats", "acme.désk1.chats", "acme.desk:1.chats", "acme.des/k1.chats",
		strings.Repeat("a", 129) + ".desk1.chats", "acme." + strings.Repeat("a", 129) + ".chats", "acme.desk1.messages." + strings.Repeat("c", 257), "acme.desk1.messages.é", "acme.desk1.messages.a\x7f",
	} {
		all = append(all, [2]string{subject, fine})
	}
	for _, payload := range []string{
		"", " ", "\n\t", "hello", "null", "true", "7", `"text"`, "[]", `[{"event_id":"e1"}]`, "{", "}", `{"a":}`, `{"a":1,}`, `{a:1}`, `{'a':1}`, `{"a":1} x`, `{}{}`, `{"a":01}`, `{"a":NaN}`,
		"{\"a\":\"\xff\"}", "{\"a\":\"\xc3\"}", "{\"a\":\"\xed\xa0\x80\"}", "{\"a\":\"\xc0\xaf\"}", "{\"\xf5\":1}", "{\"a\":\"tab\tinside\"}", "\xef\xbb\xbf{}", "\x00{}", "{}\x00", `{"a":"\x"}`, `{"a":"\u12"}`,
		`{"a":"` + strings.Repeat("x", 1_000_000) + `"`, `{"a":"` + strings.Repeat("\xe9", 1_000_000) + `"}`,
	} {
		all = append(all, [2]string{"acme.desk1.chats", payload})
	}
	return all
}

// TestPoison: what no client could take is terminated, once, counted as malformed and kept from everyone; what is published
// around it arrives, and all sockets stay open.
func TestPoison(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		terminated := watchTerminations(w)
		ann := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		admin := pod.Connect(as(harness.Admin("root", "", "")))
		ann.SelectChat("c1")
		var bad []uint64
		for _, p := range poison() {
			bad = append(bad, w.PublishRaw(w.Prefix+"."+p[0], []byte(p[1])))
			ann.WaitEvent(w.Message("acme", "desk1", "c1"))
		}
		admin.WantEvent(w.Agent("acme", "desk1"))
		terminated.want(t, bad)
		wantAtRest(pod, map[string]float64{"malformed": float64(len(bad)), "delivered": float64(len(bad) + 1)})
		if n := pod.Metric("dws_events_total", `kind="unknown"`, `outcome="malformed"`); n != float64(len(bad)) {
			t.Errorf("%v deliveries of unknown kind, want %d", n, len(bad))
		}
		ann.WantNothingElse()
	})
}

// TestLargestPayload: an event as large as NATS takes at all is an event like any other.
func TestLargestPayload(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		most := int(w.NC.MaxPayload())
		payload := []byte(`{"a":"` + strings.Repeat("x", most-8) + `"}`)
		if len(payload) != most {
			t.Fatalf("payload of %d bytes, want %d", len(payload), most)
		}
		seq := w.PublishRaw(w.Prefix+".acme.desk1.chats", payload)
		if m := c.WantEvent(seq); string(m.Payload) != string(payload) {
			t.Errorf("the payload of %d bytes came as %d bytes", most, len(m.Payload))
		}
		wantAtRest(pod, map[string]float64{"delivered": 1, "malformed": 0})
	})
}

// TestDeleteMarkers: what a stream stores when a subject's last message has gone is no event, and no fault either.
func TestDeleteMarkers(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(c *jetstream.StreamConfig) {
		c.MaxAge, c.AllowMsgTTL, c.SubjectDeleteMarkerTTL = 2*time.Second, true, time.Minute
	}))
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.WantEvent(w.Chat("acme", "desk1"))
	pod.WaitMetric(func(n float64) bool { return n == 1 }, "dws_events_total", `outcome="marker"`)
	ann.WantNothingElse()
	w.Settled()
	wantAtRest(pod, map[string]float64{"delivered": 2, "malformed": 0})
}

// TestLargeEvents: an event may be larger than NATS_PREFETCH_BYTES, or than what the server takes by now: it comes, on whatever pod, and so
// does what stands behind it.
func TestLargeEvents(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name          string
		before, after string // of the event's publishing
		settings      string
		size          int
	}{
		{"just below the limit", "", "", "NATS_PREFETCH_BYTES=1MiB", 1<<20 - 16},
		{"beyond the default", "max_payload: 33554432", "", "", 17 << 20},
		{"beyond the server's limit of today", "max_payload: 33554432", "max_payload: 1048576", "NATS_PREFETCH_BYTES=1MiB", 17 << 20},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.OwnNATS(c.before, "max_pending: 134217728"), harness.Settings(strings.Fields(c.settings)...),
				harness.Settings("NATS_ACK_WAIT=9s", "PEER_TIMEOUT=3s", "WEBSOCKET_WRITE_TIMEOUT=3s", "WEBSOCKET_BLOCK_TIMEOUT=1s")) // a killed server has given some out
			a, b := w.Start(), w.Start()
			clients := []*harness.Client{a.Connect(harness.User("acme", "desk1", "ann")), b.Connect(harness.User("acme", "desk1", "bob"))}
			payload := []byte(`{"a":"` + strings.Repeat("x", c.size-8) + `"}`)
			var seqs []uint64
			if c.after != "" {
				a.Process.Signal(syscall.SIGSTOP)
				b.Process.Signal(syscall.SIGSTOP)
			}
			seqs = append(seqs, w.PublishRaw(w.Prefix+".acme.desk1.chats", payload))
			for range 5 {
				seqs = append(seqs, w.Chat("acme", "desk1"))
			}
			if c.after != "" {
				if err := w.NATS.Configure(c.after); err != nil {
					t.Fatal(err)
				}
				w.NATS.Kill()
				if err := w.NATS.Restart(); err != nil {
					t.Fatal(err)
				}
				a.Process.Signal(syscall.SIGCONT)
				b.Process.Signal(syscall.SIGCONT)
			}
			for _, cl := range clients {
				for i, seq := range seqs {
					if m := cl.WaitEvent(seq); i == 0 && len(m.Payload) != c.size {
						t.Errorf("the payload of %d bytes came as %d", c.size, len(m.Payload))
					}
				}
			}
			w.Settled()
			for _, p := range []*harness.Pod{a, b} {
				p.WaitReady()
			}
		})
	}
}

// TestPoisonIsLoggedSparingly: a flood of malformed events, longer than a second, makes at most one line a second, and
// the line helps: it names the subject and the sequence.
func TestPoisonIsLoggedSparingly(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	n := 0
	for begin := time.Now(); time.Since(begin) < 2500*time.Millisecond; n++ {
		w.PublishRaw(w.Prefix+".acme.desk1.chats", []byte("secret-in-a-payload"))
	}
	c.WantEvent(w.Chat("acme", "desk1"))
	wantAtRest(pod, map[string]float64{"malformed": float64(n)})
	var times []time.Time
	counted, last := 0, 0 // by the lines and by what they say of those before them; the sequence of the last one
	for line := range strings.Lines(pod.Log.Text()) {
		var l struct {
			Time         time.Time
			Msg, Subject string
			Seq          uint64
			Suppressed   int
		}
		if json.Unmarshal([]byte(line), &l) == nil && strings.Contains(l.Msg, "malformed") {
			times = append(times, l.Time)
			counted, last = counted+1+l.Suppressed, int(l.Seq)
			if l.Seq == 0 || !strings.Contains(l.Subject, w.Prefix+".acme.desk1.chats") {
				t.Errorf("line %s does not name the event", line)
			}
		}
	}
	if len(times) < 2 || n < 10 {
		t.Errorf("%d malformed events in 2.5 s made %d lines", n, len(times))
	}
	if counted != last { // the stream holds nothing else until then
		t.Errorf("the lines tell of %d malformed events up to the sequence %d", counted, last)
	}
	for i := 1; i < len(times); i++ {
		if d := times[i].Sub(times[i-1]); d < 900*time.Millisecond { // the log's clock is read after the decision, on a busy machine a while
			t.Errorf("two lines within %v", d)
		}
	}
	if strings.Contains(pod.Log.Text(), "secret-in-a-payload") {
		t.Error("the log quotes a payload")
	}
}
