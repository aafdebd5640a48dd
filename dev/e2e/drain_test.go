package e2e

import (
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// agents are n agents of one company, and the user of each.
func agents(n int) (all []harness.Dial) {
	for i := range n {
		all = append(all, harness.User("acme", fmt.Sprintf("desk%d", i), fmt.Sprintf("user%d", i)))
	}
	return all
}

// missing are the sequences of published that did not reach the user of their agent. followers are the users of agents
// desk0, desk1 and so on.
func missing(published []harness.Published, followers []*harness.Follower) (seqs []uint64) {
	got := make([]map[uint64]int, len(followers))
	for i, f := range followers {
		got[i] = f.Got()
	}
	for _, p := range published {
		agent, _ := strconv.Atoi(strings.TrimPrefix(strings.Split(p.Subject, ".")[1], "desk"))
		if got[agent][p.Seq] == 0 {
			seqs = append(seqs, p.Seq)
		}
	}
	return seqs
}

// wantAll waits until JetStream says that everything is settled, and fails unless every event has reached the user of its
// agent.
func wantAll(t *testing.T, w *harness.World, published []harness.Published, followers []*harness.Follower) {
	t.Helper()
	if len(published) == 0 {
		t.Fatal("nothing was published")
	}
	w.Settled()
	var left []uint64
	defer func() {
		if len(left) > 0 {
			t.Logf("%d of %d events have not reached their user: %v", len(left), len(published), left[:min(len(left), 50)])
		}
	}()
	// Acked means handed to the kernel: the client may still be reading.
	harness.Eventually(t, harness.Patience, "every event to reach its user", func() bool {
		left = missing(published, followers)
		return len(left) == 0
	})
}

// givenUp are the deliveries that a pod ended without anyone having got the event.
func givenUp(p *harness.Pod) float64 {
	n := 0.0
	for _, outcome := range []string{"shed", "expired", "no_owner", "dropped", "malformed"} {
		n += ended(p, outcome)
	}
	return n
}

// TestDrainUnderLoad: SIGTERM at 2,000 events per second, with a second pod on the same consumer: every event reaches its
// user, there or here, though none resumes; each socket is asked to come back after a time of its own; exit status 0.
func TestDrainUnderLoad(t *testing.T) {
	t.Parallel()
	const sockets, rate, spread = 250, 2000, time.Second
	w := harness.New(t, harness.Settings("SERVER_DRAIN_SPREAD="+spread.String(), "NATS_MAX_ACK_PENDING=65536", "NATS_PARKED_BUDGET=8000", shortDelays))
	old := w.Start()
	next := w.Launch()
	next.WaitListening() // it has its address; its clients come later
	var followers []*harness.Follower
	for _, d := range agents(sockets) {
		followers = append(followers, w.Follow(d, old, next))
	}
	next.WaitReady()
	flow := w.Flow(rate, func(i int) feed.Event {
		return feed.Chat("acme", fmt.Sprintf("desk%d", i%sockets), "628111@c.us", "hi", 1)
	})
	flow.WaitSent(rate / 2)
	drained := time.Now()
	old.Terminate()
	wantDraining(t, old)
	old.WantExit(0, harness.Patience)
	flow.WaitSent(rate)
	published := flow.Stop()
	if len(published) < 3*rate/2 {
		t.Fatalf("only %d events published", len(published))
	}
	wantAll(t, w, published, followers)
	wantSpread(t, followers, drained, spread)
	if n := givenUp(next); n != 0 {
		t.Errorf("%v deliveries were given up", n)
	}
	next.WantLedgers()
}

// wantDraining expects a pod that was just sent SIGTERM to be not ready at once and to refuse upgrades, while it still answers.
func wantDraining(t *testing.T, p *harness.Pod) {
	t.Helper()
	harness.Eventually(t, time.Second, "/ready to say that the pod drains", func() bool {
		a := p.Do("GET", "/ready", nil, nil)
		return a.StatusCode == 503 && strings.Contains(string(a.Body), "draining") && a.Header.Get("Retry-After") != ""
	})
	if a := p.Do("GET", "/health", nil, nil); a.StatusCode != 200 {
		t.Errorf("/health is %s during the drain", a.Status)
	}
	a := p.WantRefused(harness.User("acme", "late", "late"), 503, "Unavailable")
	if a.Header.Get("Retry-After") == "" {
		t.Error("an upgrade refused for a drain has no Retry-After")
	}
}

// wantSpread expects the first socket of each follower to have ended by the drain, over the whole spread, each with a
// delay of its own within it.
func wantSpread(t *testing.T, followers []*harness.Follower, drained time.Time, spread time.Duration) {
	t.Helper()
	var ends, delays []time.Duration
	for i, f := range followers {
		all := f.Ends() // a machine too slow for its load may send some away again: 1013
		if len(all) == 0 || slices.ContainsFunc(all[1:], func(e harness.Ended) bool { return e.Code != 1013 }) {
			t.Fatalf("the sockets of user%d ended so: %v", i, all)
		}
		delay, ok := all[0].RetryAfter()
		if all[0].Code != 1001 || !ok || delay < 0 || delay >= spread {
			t.Errorf("user%d was closed with %d %q", i, all[0].Code, all[0].Reason)
		}
		ends, delays = append(ends, all[0].At.Sub(drained)), append(delays, delay)
	}
	// Roughly: on a busy machine the first are seen late, and many at once.
	for _, s := range [][]time.Duration{ends, delays} {
		slices.Sort(s)
		first, middle, last := s[0], s[len(s)/2], s[len(s)-1]
		if last-first < spread/2 || middle-first < spread/10 || last-middle < spread/10 {
			t.Errorf("not spread over %v: first %v, middle %v, last %v", spread, first, middle, last)
		}
	}
}

// TestSecondSignal: who cannot wait for the drain sends another one, and the process ends at once.
func TestSecondSignal(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("SERVER_DRAIN_SPREAD=20s", "SERVER_SHUTDOWN_TIMEOUT=60s"))
	pod := w.Start()
	var clients []*harness.Client
	for _, d := range agents(5) {
		clients = append(clients, pod.Connect(d))
	}
	pod.Terminate()
	harness.Eventually(t, harness.Patience, "the first socket to be closed", func() bool {
		return slices.ContainsFunc(clients, func(c *harness.Client) bool { return c.Ended() != nil })
	})
	pod.Terminate()
	pod.WantExit(1, 3*time.Second)
}

// TestTerminatedWhileWaiting: a pod that still waits for what it depends on ends as promptly as any.
func TestTerminatedWhileWaiting(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, tc := range []struct {
		name        string
		nats, redis bool // away
	}{{"for NATS", true, false}, {"for Redis", false, true}, {"for both", true, true}} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.OwnNATS())
			if tc.nats {
				w.NATS.Kill()
			}
			if tc.redis {
				w.Redis.Kill()
			}
			pod := w.Launch()
			pod.WaitListening()
			if _, err := pod.Log.Find(harness.Within(t, harness.Patience), func(line string) bool {
				return strings.Contains(line, "waiting for Redis") || strings.Contains(line, "consumer waits")
			}); err != nil {
				t.Fatalf("the pod does not say what it waits for: %v", err)
			}
			pod.Terminate()
			pod.WantExit(0, 5*time.Second)
		})
	}
}

// TestDrainWithoutDependencies: NATS or Redis is away, or hangs, when a pod that has served is told to go. Its sockets are closed
// as ever and it ends in time with status 0: nothing is lost by that, what was not acked comes again.
func TestDrainWithoutDependencies(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for name, fault := range map[string]func(w *harness.World){
		"NATS away":   func(w *harness.World) { w.NATS.Kill() },
		"NATS hangs":  func(w *harness.World) { w.NATS.Process().Signal(syscall.SIGSTOP) },
		"Redis away":  func(w *harness.World) { w.Redis.Kill() },
		"Redis hangs": func(w *harness.World) { w.Redis.Process().Signal(syscall.SIGSTOP) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.OwnNATS(), harness.Settings("SERVER_DRAIN_SPREAD=100ms"))
			pod := w.Start()
			c := pod.Connect(harness.User("acme", "desk1", "ann"))
			c.WantEvent(w.Chat("acme", "desk1"))
			fault(w)
			harness.Eventually(t, harness.Patience, "/ready to say 503", func() bool { return pod.Do("GET", "/ready", nil, nil).StatusCode == 503 })
			pod.Signal(syscall.SIGINT) // as good as SIGTERM
			c.WantClose(1001, "drain retry-after-ms=*")
			pod.WantExit(0, harness.Patience)
		})
	}
}

// TestDrainWithStuckSocket: a client that does not read holds the drain up for a bounded time only, and what it has not got
// is not acked.
func TestDrainWithStuckSocket(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"drop_oldest", "block"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			s := newStuck(t, "WEBSOCKET_DROP_POLICY="+policy, "SERVER_DRAIN_SPREAD=100ms")
			s.ann.Pause()
			flood(t, s.w, "desk1")
			harness.Eventually(t, harness.Patience, "the flood to be given out", func() bool { return s.w.ConsumerInfo().NumPending == 0 })
			s.pod.Terminate()
			s.bob.WantClose(1001, "drain retry-after-ms=*")
			s.pod.WantExit(0, harness.Patience)
			least := ringSize // under drop_oldest, all before these were dropped
			if policy == "block" {
				least = floodEvents - kernelTakes
			}
			if info := s.w.ConsumerInfo(); info.NumAckPending+int(info.NumPending) < least {
				t.Errorf("JetStream says that only %d events are pending, want at least %d", info.NumAckPending, least)
			}
			next := s.w.Start("WEBSOCKET_DROP_POLICY=" + policy)
			again := next.Connect(harness.User("acme", "desk1", "ann"))
			const budget = 500 // NATS_PARKED_BUDGET: what comes to the next pod before its client does ends beyond that
			harness.Eventually(t, harness.Patience, "what was pending to come to the next socket", func() bool { return len(seqsOf(again)) >= min(least, budget) })
		})
	}
}

// TestLeaseStaysGivenUp: once a pod has drained, the next process of its id need not wait, even if the last request takes
// its time.
func TestLeaseStaysGivenUp(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("POD_LEASE=1s", "SERVER_DRAIN_SPREAD=10ms"))
	rdb := w.RedisClient()
	pod := w.Start("SERVER_POD_ID=blue")
	slow, err := net.Dial("tcp", pod.HTTP)
	if err != nil {
		t.Fatal(err)
	}
	defer slow.Close()
	fmt.Fprintf(slow, "POST /generate-token HTTP/1.1\r\nHost: x\r\nX-API-Key: %s\r\nContent-Length: 100\r\n\r\n{", harness.APIKey)
	pod.Terminate()
	held := func() int64 {
		n, err := rdb.Exists(harness.Within(t, harness.Patience), "pod:blue").Result()
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	harness.Eventually(t, harness.Patience, "the lease to be given up", func() bool { return held() == 0 })
	pod.WantExit(0, harness.Patience)
	if held() != 0 {
		t.Error("the lease was taken again after it was given up")
	}
	next := w.Start("SERVER_POD_ID=blue")
	if log := next.Log.Text(); strings.Contains(log, "still leased") {
		t.Errorf("the next process had to wait: %s", log)
	}
}
