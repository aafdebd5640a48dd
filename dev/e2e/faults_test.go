package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// shortTimeouts lets what JetStream heard nothing about come again after 5 s.
var shortTimeouts = harness.Settings(shortDelays, "NATS_ACK_WAIT=5s", "PEER_TIMEOUT=500ms", "WEBSOCKET_WRITE_TIMEOUT=2s", "WEBSOCKET_BLOCK_TIMEOUT=1s")

// roomy lets a socket take a backlog in one burst. A ring of the usual size would give up its oldest and say so.
var roomy = harness.Settings("WEBSOCKET_BUFFER_SIZE=16384")

// desk0 is a flow of everything that a user who has selected chat.one of agent desk0 gets.
func desk0(i int) feed.Event {
	switch i % 3 {
	case 0:
		return feed.Chat("acme", "desk0", "628111@c.us", "hi", 1)
	case 1:
		return feed.Contact("acme", "desk0", "628222@c.us")
	default:
		return feed.Message("acme", "desk0", "chat.one", "hi", false)
	}
}

// wantEach waits until c has each of published and takes them out of its inbox.
func wantEach(t *testing.T, c *harness.Client, published []harness.Published) {
	t.Helper()
	if len(published) == 0 {
		t.Fatal("nothing was published")
	}
	for _, p := range published {
		c.WaitEvent(p.Seq)
	}
}

// notReady waits until /ready says 503 and that each of these is not as it should be, and no other dependency.
func notReady(p *harness.Pod, names ...string) {
	p.W.T.Helper()
	body := ""
	defer func() {
		if p.W.T.Failed() {
			p.W.T.Logf("/ready was last: %s", body)
		}
	}()
	harness.Eventually(p.W.T, harness.Patience, fmt.Sprintf("/ready to name %v", names), func() bool {
		a := p.Do("GET", "/ready", nil, nil)
		body = string(a.Body)
		if a.StatusCode != http.StatusServiceUnavailable || a.Header.Get("Retry-After") == "" {
			return false
		}
		var ready struct{ Dependencies map[string]string }
		if json.Unmarshal(a.Body, &ready) != nil {
			return false
		}
		for dep, good := range map[string]string{"nats": "connected", "redis": "connected", "grpc": "serving", "consumer": "active"} {
			if (ready.Dependencies[dep] == good) == slices.Contains(names, dep) {
				return false
			}
		}
		return true
	})
}

// wantNobodyNew expects that nobody new gets in, and that those who are there can select chats as ever.
func wantNobodyNew(p *harness.Pod, c *harness.Client) {
	p.W.T.Helper()
	if a := p.WantRefused(harness.User("acme", "desk7", "new"), 503, "Unavailable"); a.Header.Get("Retry-After") == "" {
		p.W.T.Error("503 without Retry-After")
	}
	c.SelectChat("chat.two")
	if end := c.Ended(); end != nil {
		p.W.T.Fatalf("the socket was closed: %+v", *end)
	}
}

// wantMessagesOf expects that c gets the messages of chat and not those of another one.
func wantMessagesOf(c *harness.Client, chat, other string) {
	w := c.Pod.W
	w.T.Helper()
	unwanted := w.Message("acme", c.Dial.Agent, other)
	c.WaitEvent(w.Message("acme", c.Dial.Agent, chat))
	for _, m := range c.Events() {
		if m.Seq == unwanted {
			w.T.Errorf("%s got a message of a chat that is not selected: %s", c.Dial.User, m.Raw)
		}
	}
}

// TestRedisRestarts: Redis is killed under load, for longer than the pod's lease, and comes back with its data or without. Who
// was connected gets everything meanwhile, nobody new is let in, nothing is settled, and afterwards all is as before.
func TestRedisRestarts(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("data lost %t", lost), func(t *testing.T) {
			t.Parallel()
			const rate = 200
			w := harness.New(t, shortTimeouts, roomy, harness.Settings("POD_LEASE=1s", "SESSION_TTL=5s", "SESSION_REFRESH_INTERVAL=1s", "RESUME_MAX_EVENTS=100000"))
			pod := w.Start()
			ann, bob := pod.Connect(agents(2)[0].Positions()), pod.Connect(agents(2)[1].Positions())
			ann.SelectChat("chat.one")
			flow := w.Flow(rate, desk0)
			flow.WaitSent(rate / 2)
			w.Redis.Kill()
			before := w.LastSeq() // Redis may have answered for an event that came until now
			notReady(pod, "redis")
			wantNobodyNew(pod, bob)
			wantMessagesOf(bob, "chat.two", "chat.one")
			first := w.Chat("acme", "desk1")
			bob.WaitEvent(first)
			absent := w.Chat("acme", "desk8")
			flow.WaitSent(2 * rate) // past the lease
			ann.WaitEvent(w.Chat("acme", "desk0"))
			if info := w.ConsumerInfo(); info.AckFloor.Stream >= first {
				t.Errorf("ack floor %d: event %d was acked though its owners were not known", info.AckFloor.Stream, first)
			}
			if lost {
				if err := w.Redis.LoseData(); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Redis.Restart(); err != nil {
				t.Fatal(err)
			}
			pod.WaitReady()
			carl := pod.Connect(harness.User("acme", "desk8", "carl"))
			carl.WaitEvent(absent)
			flow.WaitSent(rate)
			wantEach(t, ann, flow.Stop())
			w.Settled()
			for _, c := range []*harness.Client{ann, bob} {
				if gap := c.WantGap("owner"); gap.Since > before {
					t.Errorf("gap since %d, but Redis went away after %d", gap.Since, before)
				}
				if r := c.ResumeMissed(); r.Gap {
					t.Errorf("%s can't resume: %+v", c.Dial.User, r)
				}
			}
			wantMessagesOf(bob, "chat.two", "chat.one")
			wantMessagesOf(ann, "chat.one", "chat.two")
			pod.Connect(ann.Dial) // the locks are there again: a second tab replaces the first
			ann.WantClose(4402, "session-replaced")
			if n := givenUp(pod); n != 0 {
				t.Errorf("%v deliveries were given up", n)
			}
			w.Settled()
			pod.WantLedgers()
			for line := range strings.Lines(pod.Log.Text()) {
				if !json.Valid([]byte(line)) {
					t.Fatalf("a line of the log is no JSON: %s", line)
				}
			}
		})
	}
}

// TestNATSRestarts: NATS is killed twice under load and comes back with its data. Sockets stay open, nothing is lost.
func TestNATSRestarts(t *testing.T) {
	t.Parallel()
	const rate = 500
	w := harness.New(t, harness.OwnNATS(), shortTimeouts, roomy)
	pod := w.Start()
	ann, bob := pod.Connect(agents(1)[0]), pod.Connect(harness.User("acme", "desk1", "bob"))
	ann.SelectChat("chat.one")
	flow := w.Flow(rate, desk0)
	for range 2 {
		flow.WaitSent(rate / 2)
		w.NATS.Kill()
		notReady(pod, "nats", "consumer")
		wantNobodyNew(pod, bob)
		if err := w.NATS.Restart(); err != nil {
			t.Fatal(err)
		}
		pod.WaitReady()
	}
	flow.WaitSent(rate / 2)
	wantEach(t, ann, flow.Stop())
	w.Settled()
	wantMessagesOf(ann, "chat.one", "chat.two")
	wantMessagesOf(bob, "chat.two", "chat.one")
	bob.WantNothingElse()
	if n := givenUp(pod); n != 0 {
		t.Errorf("%v deliveries were given up", n)
	}
	w.Settled()
	pod.WantLedgers()
}

// TestRedisRestartsInAnInstant: Redis is there again, without its data, before a pod has noticed. Clients that resume nothing miss nothing: what
// it says of owners is not believed until the pods have claimed everything again.
func TestRedisRestartsInAnInstant(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortTimeouts, roomy)
	pods := startPods(w, 2)
	clients := []*harness.Client{pods[0].Connect(harness.User("acme", "desk1", "ann")), pods[1].Connect(harness.User("acme", "desk1", "bob"))}
	flow := w.Flow(200, func(int) feed.Event { return feed.Chat("acme", "desk1", "628111@c.us", "hi", 1) })
	for n := range 3 {
		flow.WaitSent(200 * (n + 1))
		w.Redis.Kill()
		if err := w.Redis.LoseData(); err != nil {
			t.Fatal(err)
		}
		if err := w.Redis.Restart(); err != nil {
			t.Fatal(err)
		}
		flow.WaitSent(200*(n+1) + 150)
		for _, c := range clients {
			c.WantGap("owner")
		}
		for _, p := range pods {
			p.WaitReady()
		}
	}
	for _, p := range flow.Stop() {
		for _, c := range clients {
			c.WaitEvent(p.Seq)
		}
	}
	w.Settled()
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestRedisHangs: Redis keeps its connections and answers nothing. Who is connected gets everything, nobody new is let in.
func TestRedisHangs(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, shortTimeouts)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0])
	ann.SelectChat("chat.one")
	ann.WantNothingElse()
	flow := w.Flow(50, func(i int) feed.Event { return feed.Chat("acme", "desk0", "628111@c.us", "hi", 1) })
	w.Redis.Process().Signal(syscall.SIGSTOP)
	notReady(pod, "redis")
	wantNobodyNew(pod, ann)
	wantMessagesOf(ann, "chat.two", "chat.one")
	seq, at := w.Chat("acme", "desk0"), time.Now()
	if took := ann.WaitEvent(seq).At.Sub(at); took > 2*time.Second {
		t.Errorf("an event took %v while Redis hangs", took)
	}
	w.Redis.Process().Signal(syscall.SIGCONT)
	pod.WaitReady()
	wantEach(t, ann, flow.Stop())
	wantMessagesOf(ann, "chat.two", "chat.one")
	pod.Connect(agents(2)[1]).WantNothingElse()
	w.Settled()
	if n := givenUp(pod); n != 0 || ann.Ended() != nil {
		t.Errorf("%v deliveries were given up; the socket's end: %v", n, ann.Ended())
	}
	pod.WantLedgers()
}

// TestNATSHangs: NATS keeps its connections and answers nothing, too shortly for the connection to be given up. The pod
// notices by the heartbeats that are missing, and goes on where it was.
func TestNATSHangs(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.OwnNATS(), shortTimeouts)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0])
	ann.SelectChat("chat.one")
	ann.WantEvent(w.Message("acme", "desk0", "chat.one"))
	w.NATS.Process().Signal(syscall.SIGSTOP)
	notReady(pod, "consumer")
	ann.SelectChat("chat.two")
	w.NATS.Process().Signal(syscall.SIGCONT)
	pod.WaitReady()
	wantMessagesOf(ann, "chat.two", "chat.one")
	w.Settled()
	pod.WantLedgers()
}

// TestStreamComesLate: the publisher owns the stream. The service waits for it, says so, and then reads it.
func TestStreamComesLate(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.NoStream())
	pod := w.Launch()
	pod.WaitListening()
	notReady(pod, "consumer")
	harness.Eventually(t, harness.Patience, "/ready to name the stream", func() bool {
		return strings.Contains(string(pod.Do("GET", "/ready", nil, nil).Body), w.Stream)
	})
	w.MakeStream(func(*jetstream.StreamConfig) {})
	pod.WaitReady()
	pod.Connect(agents(1)[0]).WantNothingElse()
	w.Settled()
	pod.WantLedgers()
}

// TestStartBeforeDependencies: the service starts with neither NATS nor Redis there, lives, says what it waits for, and
// serves when both have come, in whatever order.
func TestStartBeforeDependencies(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, first := range []string{"NATS", "Redis"} {
		t.Run(first+" first", func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.OwnNATS())
			w.NATS.Kill()
			w.Redis.Kill()
			pod := w.Launch()
			pod.WaitListening()
			notReady(pod, "nats", "redis", "consumer")
			if a := pod.Do("GET", "/health", nil, nil); a.StatusCode != 200 || strings.TrimSpace(string(a.Body)) != `{"status":"OK"}` {
				t.Errorf("/health: %s %s", a.Status, a.Body)
			}
			pod.WantRefused(harness.User("acme", "desk0", "ann"), 503, "Unavailable")
			start := map[string]func() error{"NATS": w.NATS.Restart, "Redis": w.Redis.Restart}
			if err := start[first](); err != nil {
				t.Fatal(err)
			}
			if first == "NATS" {
				notReady(pod, "redis", "consumer")
				delete(start, "NATS")
			} else {
				notReady(pod, "nats", "consumer")
				delete(start, "Redis")
			}
			pod.WantRefused(harness.User("acme", "desk0", "ann"), 503, "Unavailable")
			for _, f := range start {
				if err := f(); err != nil {
					t.Fatal(err)
				}
			}
			pod.WaitReady()
			c := pod.Connect(harness.User("acme", "desk0", "ann"))
			c.WantNothingElse()
			w.Settled()
			pod.WantLedgers()
		})
	}
}

// TestNamesThatDoNotResolveYet: where containers come up together, the service may be there before the names of its
// dependencies are. (It listens on all interfaces, so what peers dial follows from its way to Redis.)
func TestNamesThatDoNotResolveYet(t *testing.T) {
	t.Parallel()
	pod := harness.New(t).Launch("SERVER_BIND_ADDRESS=0.0.0.0", "REDIS_ADDRESS=redis.invalid:6379", "NATS_URL=nats://nats.invalid:4222")
	pod.WaitListening()
	notReady(pod, "nats", "redis", "consumer")
	findLine(pod, `"msg":"waiting for Redis and the pod's lease"`, "redis.invalid")
}

// TestNoGapFromBeforeItsTime: a pod without sockets takes a new life since Redis lost its data. A client that comes long after has
// missed nothing, and is not told of a gap.
func TestNoGapFromBeforeItsTime(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings("POD_LEASE=2s", "SESSION_REFRESH_INTERVAL=1s"))
	pod := w.Start()
	bob := pod.Connect(harness.User("acme", "desk2", "bob"))
	bob.WantEvent(w.Chat("acme", "desk2"))
	bob.Close(1000, "")
	pod.WaitMetric(func(v float64) bool { return v == 0 }, "dws_active_connections")
	w.Redis.Kill()
	if err := w.Redis.LoseData(); err != nil {
		t.Fatal(err)
	}
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, harness.Patience, "a new life", func() bool { return strings.Count(pod.Log.Text(), "lease taken") >= 2 })
	pod.WaitReady()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.WantEvent(w.Chat("acme", "desk1"))
	ann.WantNothingElse()
}
