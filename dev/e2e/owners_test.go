package e2e

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// shortDelays makes an event without an owner come again after 100, 200, 400 and 800 ms: 1.5 s in all.
const shortDelays = "NATS_NAK_DELAY=100ms"

// noOwnerDelays is how long an event without an owner is kept with shortDelays.
const noOwnerDelays = 15 * 100 * time.Millisecond

func ended(p *harness.Pod, outcome string) float64 {
	return p.Metric("dws_events_total", fmt.Sprintf("outcome=%q", outcome))
}

// waitEnded waits until exactly n deliveries have ended so.
func waitEnded(p *harness.Pod, outcome string, n float64) {
	p.W.T.Helper()
	p.WaitMetric(func(v float64) bool { return v >= n }, "dws_events_total", fmt.Sprintf("outcome=%q", outcome))
	if got := ended(p, outcome); got != n {
		p.W.T.Fatalf("%v deliveries ended as %s, want %v", got, outcome, n)
	}
}

// TestClientArrivesInTime: an event that nobody is there for waits for a client on its way, and reaches it live.
func TestClientArrivesInTime(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start(shortDelays)
	seq := w.Chat("acme", "desk1")
	harness.Eventually(t, harness.Patience, "the event to be refused twice", func() bool { return ended(pod, "nak_no_owner") >= 2 })
	if info := w.ConsumerInfo(); info.NumAckPending != 1 || info.NumRedelivered != 1 || info.AckFloor.Stream >= seq {
		t.Errorf("the event waits, but JetStream says: %d pending, %d redelivered, ack floor %d", info.NumAckPending, info.NumRedelivered, info.AckFloor.Stream)
	}
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	if m := c.WantEvent(seq); m.Replay {
		t.Errorf("delivered as a replay: %s", m.Raw)
	}
	w.Settled()
	c.WantNothingElse()
	pod.WaitMetric(func(v float64) bool { return v == 0 }, "dws_parked_events")
	pod.WantLedgers()
	if n := ended(pod, "no_owner"); n != 0 {
		t.Errorf("%v events ended as no_owner", n)
	}
}

// TestNobodyArrives: an event that nobody comes for ends after its delays and not before, counted; those of other agents
// are delivered meanwhile as ever; a client that comes after that does not get it.
func TestNobodyArrives(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start(shortDelays)
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	begin := time.Now()
	lost := w.Chat("acme", "desk2")
	slowest := time.Duration(0)
	for ended(pod, "no_owner") == 0 {
		if time.Since(begin) > harness.Patience {
			t.Fatal("the event without an owner never ends")
		}
		at := time.Now()
		m := ann.WantEvent(w.Contact("acme", "desk1"))
		slowest = max(slowest, m.At.Sub(at))
	}
	if took := time.Since(begin); took < noOwnerDelays {
		t.Errorf("the event without an owner was given up after %v, its delays are %v", took, noOwnerDelays)
	}
	if slowest > time.Second {
		t.Errorf("an event of another agent took %v meanwhile", slowest)
	}
	w.SettledTo(lost)
	w.Settled()
	bob := pod.Connect(harness.User("acme", "desk2", "bob"))
	bob.WantNothingElse()
	w.Settled()
	if info := w.ConsumerInfo(); info.NumAckPending != 0 || info.NumPending != 0 {
		t.Errorf("JetStream still has %d unacked and %d waiting events", info.NumAckPending, info.NumPending)
	}
	if n := pod.Metric("dws_events_total", `kind="chat"`, `outcome="no_owner"`); n != 1 {
		t.Errorf("%v chat events counted as no_owner, want 1", n)
	}
	pod.WantLedgers()
}

// TestAbsentAgent: many events of one absent agent wait for its client, who gets all of them.
func TestAbsentAgent(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start() // the usual delays: all stay parked long enough
	var seqs []uint64
	for range 40 {
		seqs = append(seqs, w.Chat("acme", "desk1"))
	}
	pod.WaitMetric(func(v float64) bool { return v == 40 }, "dws_parked_events")
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	w.Settled()
	wantExactly(c, seqs)
	waitEnded(pod, "delivered", 40)
	pod.WantLedgers()
}

// TestParkedBudget: all absent agents together have a budget. What is above it ends at once, as everything that nobody comes for:
// as no_owner, never as shed, which is what an owner was denied. An agent that is there notices nothing.
func TestParkedBudget(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_PARKED_BUDGET=20", "NATS_NAK_DELAY=400ms"))
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	for range 10 {
		for _, agent := range []string{"gone1", "gone2", "gone3"} {
			w.Chat("acme", agent)
		}
	}
	waitEnded(pod, "no_owner", 10)
	if info := w.ConsumerInfo(); info.NumAckPending != 20 {
		t.Errorf("JetStream says that %d events are pending, want 20", info.NumAckPending)
	}
	ann.WantNothingElse()
	pod.WaitMetric(func(v float64) bool { return v == 20 }, "dws_parked_events")
	w.Settled()
	waitEnded(pod, "no_owner", 30)
	if n := ended(pod, "shed") + ended(pod, "expired"); n != 0 {
		t.Errorf("%v events of nobody ended as shed or expired", n)
	}
	pod.WantLedgers()
}

// TestUnselectedIsAckedAtOnce: a message of a chat that nobody has selected is for nobody while its agent has an owner,
// an agents event while no admin's scope covers it: no waiting, no redelivery.
func TestUnselectedIsAckedAtOnce(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.SelectChat("chat.one")
	pod.Connect(harness.Admin("root", "other", ""))
	w.Message("acme", "desk1", "chat.two")
	w.Agent("acme", "desk1")
	w.Settled()
	waitEnded(pod, "unselected", 2)
	if n := pod.Metric("dws_redelivered_total"); n != 0 {
		t.Errorf("%v redeliveries", n)
	}
	ann.WantNothingElse()
	pod.WantLedgers()
}

// TestOwnerOnAnUnreachablePod: a pod that is gone, but whose lease still runs, owns its routes: what is due to them is NAKed,
// neither acked nor counted as without an owner, and delivered once the client is here.
func TestOwnerOnAnUnreachablePod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	// What JetStream had given to the dead pod comes again after ACK_WAIT.
	w := harness.New(t, harness.Settings("POD_LEASE=9s", shortDelays, "NATS_ACK_WAIT=8s", "PEER_TIMEOUT=1s", "WEBSOCKET_WRITE_TIMEOUT=4s"))
	gone, pod := w.Start(), w.Start()
	gone.Connect(harness.User("acme", "desk1", "ann"))
	gone.Kill()
	seq := w.Chat("acme", "desk1")
	harness.Eventually(t, harness.Patience, "the event to be refused twice", func() bool { return ended(pod, "nak_failed") >= 2 })
	if info := w.ConsumerInfo(); info.AckFloor.Stream >= seq || info.NumAckPending == 0 {
		t.Errorf("JetStream says: %d pending, ack floor %d, but nobody got event %d", info.NumAckPending, info.AckFloor.Stream, seq)
	}
	c := pod.Connect(harness.User("acme", "desk1", "ann"))
	c.WaitEvent(seq)
	w.Settled()
	for _, outcome := range []string{"no_owner", "nak_no_owner", "unselected", "shed", "expired"} {
		if n := ended(pod, outcome); n != 0 {
			t.Errorf("%v deliveries ended as %s while another pod owned the agent", n, outcome)
		}
	}
	pod.WantLedgers()
}

// TestRestartUnderTheSameID: after SIGKILL the next process of this id waits for the lease of the last one to run out,
// saying so, then serves, and the sessions of its last life are free.
func TestRestartUnderTheSameID(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, lease := range []time.Duration{1500 * time.Millisecond, 6 * time.Second} {
		t.Run(lease.String(), func(t *testing.T) {
			t.Parallel()
			settings := []string{"SERVER_POD_ID=blue"}
			if lease != 6*time.Second { // the default
				settings = append(settings, "POD_LEASE="+lease.String())
			}
			w := harness.New(t)
			first := w.Start(settings...)
			first.Connect(harness.User("acme", "desk1", "ann"))
			first.Kill()
			killed := time.Now()
			second := w.Launch(settings...)
			second.WaitListening()
			if a := second.Do("GET", "/ready", nil, nil); a.StatusCode != 503 {
				t.Errorf("/ready is %s while the lease of the last life runs", a.Status)
			}
			if _, err := second.Log.Find(harness.Within(t, harness.Patience), func(line string) bool {
				return strings.Contains(line, "still leased")
			}); err != nil {
				t.Error(err)
			}
			seq := w.Chat("acme", "desk1")
			second.WaitReady()
			// The last renewal was at most a third of the lease before the kill.
			if took := time.Since(killed); took < lease/2 || took > lease+4*time.Second {
				t.Errorf("ready %v after the kill, with a lease of %v", took, lease)
			}
			second.Connect(harness.User("acme", "desk1", "ann")).WaitEvent(seq)
			w.Settled()
			second.WantLedgers()
		})
	}
}

// TestTwoProcessesOneID: while the first lives, the second refuses to start and says why; the first serves on.
func TestTwoProcessesOneID(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	first := w.Start("SERVER_POD_ID=blue")
	c := first.Connect(harness.User("acme", "desk1", "ann"))
	second := w.Launch("SERVER_POD_ID=blue")
	second.WantExit(1, harness.Patience)
	if log := second.Log.Text(); !strings.Contains(log, "another process serves under this pod id") || !strings.Contains(log, first.GRPC) {
		t.Errorf("the log does not say why: %s", log)
	}
	c.WantEvent(w.Chat("acme", "desk1"))
	first.WaitReady()
	// The refused one has not given the lease up: a third is refused too.
	third := w.Launch("SERVER_POD_ID=blue")
	third.WantExit(1, harness.Patience)
	c.WantNothingElse()
	w.Settled()
	first.WantLedgers()
	first.Signal(syscall.SIGTERM)
	first.WantExit(0, harness.Patience)
}

// TestIDTakenWhileSuspended: a pod stands still past its lease, another process takes its id. Awake again, the first ends: nobody
// would find its sockets any more, since claims of its life are dead.
func TestIDTakenWhileSuspended(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings("POD_LEASE=2s"))
	first := w.Start("SERVER_POD_ID=blue")
	ann := first.Connect(harness.User("acme", "desk1", "ann"))
	first.Signal(syscall.SIGSTOP)
	waitStopped(t, first.Process)
	second := w.Launch("SERVER_POD_ID=blue")
	second.WaitListening()
	second.WaitReady()
	first.Signal(syscall.SIGCONT)
	first.WantExit(1, harness.Patience)
	ann.WantClose(1001, "drain retry-after-ms=*")
	if log := first.Log.Text(); !strings.Contains(log, "another process serves under this pod id") || !strings.Contains(log, second.GRPC) {
		t.Errorf("the log does not say why: %s", log)
	}
	if ok, err := w.RedisClient().SIsMember(t.Context(), "pods", "blue").Result(); err != nil || !ok {
		t.Errorf("the end of the first has removed the name of the second (%v, %v)", ok, err)
	}
	c := second.Connect(harness.User("acme", "desk1", "ann"))
	c.WantEvent(w.Chat("acme", "desk1"))
	w.Settled()
	second.WantLedgers()
}

// TestTwoProcessesAtOnce: of two processes that start at the same moment under one id, exactly one serves.
func TestTwoProcessesAtOnce(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pods := []*harness.Pod{w.Launch("SERVER_POD_ID=blue"), w.Launch("SERVER_POD_ID=blue")}
	var lives *harness.Pod
	select {
	case <-pods[0].Done():
		pods[0].WantExit(1, harness.Patience)
		lives = pods[1]
	case <-pods[1].Done():
		pods[1].WantExit(1, harness.Patience)
		lives = pods[0]
	case <-time.After(harness.Patience):
		t.Fatal("both processes live under one id")
	}
	lives.WaitListening()
	lives.WaitReady()
	lives.Connect(harness.User("acme", "desk1", "ann")).WantNothingElse()
	w.Settled()
	lives.WantLedgers()
}
