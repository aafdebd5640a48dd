package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// idleConsumer makes a second consumer that gives nothing out: the one event that may be unacked is the test's, and so is a pull
// that waits, so that no pod is alone with the consumer and raises its limit.
func idleConsumer(w *harness.World) {
	w.T.Helper()
	w.PublishRaw(w.Prefix+".nobody", []byte("{}"))
	cons, err := w.JS.CreateConsumer(harness.Within(w.T, harness.Patience), w.Stream, jetstream.ConsumerConfig{
		Durable: "idle", FilterSubject: w.Prefix + ".>", AckPolicy: jetstream.AckExplicitPolicy, AckWait: time.Hour, MaxAckPending: 1,
	})
	if err != nil {
		w.T.Fatal(err)
	}
	batch, err := cons.Fetch(1, jetstream.FetchMaxWait(harness.Patience))
	if err != nil {
		w.T.Fatal(err)
	}
	if msg := <-batch.Messages(); msg == nil {
		w.T.Fatalf("the idle consumer gives no event: %v", batch.Error())
	}
	if _, err := cons.Fetch(1, jetstream.FetchMaxWait(time.Hour)); err != nil {
		w.T.Fatal(err)
	}
}

// idlePod starts a pod that its peers reach as ever, but that pulls nothing: its consumer is another one.
func idlePod(w *harness.World, settings ...string) *harness.Pod {
	w.T.Helper()
	idleConsumer(w)
	return w.Start(append(settings, "NATS_CONSUMER_NAME=idle")...)
}

// wantResumed answers a gap as a client should, and expects that the event lost comes with it.
func wantResumed(c *harness.Client, gap harness.Reply, lost uint64) {
	t := c.Pod.W.T
	t.Helper()
	if gap.Since >= lost {
		t.Errorf("gap since %d, but %d was lost", gap.Since, lost)
	}
	c.Send(map[string]any{"type": "resume", "payload": map[string]any{"since": gap.Since}})
	c.WaitEvent(lost)
	if m := c.TakeType("resumed"); !strings.Contains(string(m.Payload), `"gap":false`) {
		t.Errorf("not whole: %s", m.Raw)
	}
}

// TestGivenUpWithoutKnowingTheOwner: a pod that is cut off from Redis pulls an event whose owners it never asked for. It must give
// the event up in the end; the owner, on another pod, is told when it can be, and has the event by its resume.
func TestGivenUpWithoutKnowingTheOwner(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("POD_LEASE=9s", "NATS_NAK_DELAY=200ms", "NATS_RETRY_HORIZON=3s"))
	redis := w.Proxy(w.Redis.Address())
	here, there := w.Start("REDIS_ADDRESS="+redis.Address()), idlePod(w)
	ann, bob := here.Connect(harness.User("acme", "desk1", "ann")), there.Connect(harness.User("acme", "desk2", "bob"))
	root := there.Connect(harness.Admin("root", "acme", ""))
	bob.SelectChat("c1")
	ann.WantEvent(w.Chat("acme", "desk1"))
	w.Settled() // she has it before her owners elsewhere are looked up
	redis.Cut()
	ann.WantEvent(w.Chat("acme", "desk1")) // an owner that is known; the pod notices
	notReady(here, "redis")
	lost := map[uint64]*harness.Client{w.Chat("acme", "desk2"): bob, w.Message("acme", "desk2", "c1"): bob, w.Agent("acme", "desk2"): root}
	waitEnded(here, "expired", float64(len(lost)))
	w.Settled()
	redis.Restore()
	here.WaitReady()
	gaps := map[*harness.Client]harness.Reply{bob: bob.WantGap("expired"), root: root.WantGap("expired")}
	for seq, c := range lost {
		for gaps[c].Since >= seq { // one gap for each of its routes, in any order
			gaps[c] = c.WantGap("expired")
		}
		wantResumed(c, gaps[c], seq)
	}
	for _, p := range []*harness.Pod{here, there} {
		p.WantLedgers()
	}
}

// shortPast are settings with an overlap of resume, shortOverlap, that a test can outlast: the shortest that they allow.
const shortOverlap = 8 * time.Second

var shortPast = harness.Settings("NATS_NAK_DELAY=200ms", "NATS_RETRY_HORIZON=2s", "NATS_ACK_WAIT=6s", "PEER_TIMEOUT=1s",
	"WEBSOCKET_WRITE_TIMEOUT=2s", "WEBSOCKET_BLOCK_TIMEOUT=1s", "RESUME_OVERLAP="+shortOverlap.String())

// TestGapBetweenSockets: a pod that is cut off from Redis gives an event up, and can announce it only when the client, who has had
// later ones, is between two sockets, and the event is older than the overlap of a resume. It comes with that resume
// all the same, on whatever pod.
func TestGapBetweenSockets(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortPast)
	redis := w.Proxy(w.Redis.Address())
	here, there := w.Start("REDIS_ADDRESS="+redis.Address()), idlePod(w)
	bob := there.Connect(harness.User("acme", "desk1", "bob"))
	bob.WantEvent(w.Chat("acme", "desk1"))
	redis.Cut()
	bob.WantEvent(w.Chat("acme", "desk1")) // an owner that is known; the pod notices
	notReady(here, "redis")
	bob.SelectChat("c1")
	lost, at := w.Message("acme", "desk1", "c1"), time.Now()
	waitEnded(here, "expired", 1)
	var last uint64
	harness.Eventually(t, harness.Patience, "the event to be older than the overlap", func() bool {
		last = w.Chat("acme", "desk1")
		bob.WantEvent(last)
		time.Sleep(500 * time.Millisecond)
		return time.Since(at) > shortOverlap+2*time.Second
	})
	bob.Abort()
	w.Settled()
	redis.Restore()
	here.WaitReady()
	alarm := there.Connect(harness.User("acme", "desk1", "eve")) // hears of the same marks
	alarm.WantGap("owner")
	time.Sleep(3 * time.Second)                                                     // a renewal: those of the chat are read, too
	for _, pod := range []*harness.Pod{there, w.Start("NATS_CONSUMER_NAME=idle")} { // the second one starts when all has been announced
		bob = pod.Dial(harness.User("acme", "desk1", "bob").With("since", since(last)))
		bob.TakeType("ready")
		bob.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c1", "since": last}})
		bob.TakeType("chat_selected")
		bob.WaitEvent(lost)
	}
}

// TestLeftAPodWithoutLease: a pod is cut off from Redis for longer than the overlap of a resume. What others pull meanwhile does not
// reach its socket. The client goes to another pod, with a number beyond that, before the first has its lease again and
// could send a gap: it is told there.
func TestLeftAPodWithoutLease(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortPast)
	redis := w.Proxy(w.Redis.Address())
	there, here := idlePod(w, "REDIS_ADDRESS="+redis.Address()), w.Start()
	bob, eve := there.Connect(harness.User("acme", "desk1", "bob")), here.Connect(harness.User("acme", "desk1", "eve"))
	first := w.Chat("acme", "desk1")
	bob.WantEvent(first)
	eve.WantEvent(first)
	redis.Cut()
	notReady(there, "redis")
	var lost, newest uint64
	var at time.Time
	harness.Eventually(t, 2*harness.Patience, "an event that misses a pod without lease, and is older than the overlap", func() bool {
		newest = w.Chat("acme", "desk1")
		eve.WaitEvent(newest)
		time.Sleep(500 * time.Millisecond)
		if lost == 0 && counts(bob)[newest] == 0 {
			lost, at = newest, time.Now()
		}
		return lost != 0 && time.Since(at) > shortOverlap+2*time.Second
	})
	if counts(bob)[lost] > 0 {
		t.Fatalf("event %d reached the pod without lease after all", lost)
	}
	bob.Abort()
	there.WaitMetric(func(v float64) bool { return v == 0 }, "dws_active_connections")
	bob = here.Dial(harness.User("acme", "desk1", "bob").With("since", since(newest)))
	bob.TakeType("ready")
	redis.Restore()
	there.WaitReady()
	wantResumed(bob, bob.WantGap("owner"), lost)
}

// TestLateEvents: a pod was cut off from NATS for longer than the overlap of a resume. What came meanwhile is delivered late, while
// a client on its way from one socket to another may know newer sequences already: its resume reaches back to where the
// pod was before. Once all is as ever, so is the overlap.
func TestLateEvents(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortPast)
	nats := w.Proxy(w.NATS.Address())
	pod := w.Start("NATS_URL=nats://" + nats.Address())
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.WantEvent(w.Chat("acme", "desk1"))
	w.Settled()
	nats.Cut()
	notReady(pod, "nats", "consumer")
	late, at := w.Chat("acme", "desk1"), time.Now()
	var newest uint64
	harness.Eventually(t, 2*harness.Patience, "the event to be older than the overlap by more than a poll", func() bool {
		newest = w.Chat("acme", "desk1")
		time.Sleep(500 * time.Millisecond)
		return time.Since(at) > shortOverlap+7*time.Second
	})
	nats.Restore()
	pod.WaitReady()
	ann.WaitEvent(late)
	w.Settled()
	resumes := func(seq uint64) (reached bool) {
		bob := pod.Dial(harness.User("acme", "desk1", "bob").With("since", since(seq)))
		bob.TakeType("ready")
		return counts(bob)[late] > 0
	}
	if !resumes(newest) {
		t.Errorf("the replay for who has had %d does not reach back to %d", newest, late)
	}
	harness.Eventually(t, 2*harness.Patience, "replays to reach back no further than the overlap", func() bool {
		time.Sleep(500 * time.Millisecond)
		return !resumes(w.Chat("acme", "desk1"))
	})
	if !resumes(newest) {
		t.Errorf("later, the replay for who has had %d does not reach back to %d", newest, late)
	}
}

// TestKilledAfterGivingUp: a pod that gives an event up is killed at once. The owner, on another pod, is told all the same.
func TestKilledAfterGivingUp(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=200ms", "NATS_RETRY_HORIZON=2s"))
	idleConsumer(w)
	there, proxy := behindProxy(w, "NATS_CONSUMER_NAME=idle")
	here, bob := w.Start(), there.Connect(harness.User("acme", "desk1", "bob"))
	bob.WaitEvent(w.Chat("acme", "desk1"))
	proxy.Cut()
	lost := w.Chat("acme", "desk1")
	harness.Eventually(t, harness.Patience, "JetStream to be told", func() bool { return w.ConsumerInfo().AckFloor.Stream >= lost })
	here.Kill()
	wantResumed(bob, bob.WantGap("expired"), lost)
}

// fewInHand are settings with which a pod gives up what more than a few events fail to reach.
var fewInHand = harness.Settings("NATS_MAX_ACK_PENDING=40", "NATS_PREFETCH=10", "NATS_PARKED_BUDGET=10", "NATS_NAK_DELAY=200ms", "POD_LEASE=9s")

// publishBeyondShare publishes events for desk1, fewer than a socket remembers, until pod has given some of them up.
func publishBeyondShare(pod *harness.Pod) (seqs []uint64) {
	pod.W.T.Helper()
	for range 60 {
		seqs = append(seqs, pod.W.Chat("acme", "desk1"))
	}
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_events_total", `outcome="shed"`)
	return append(seqs, pod.W.Chat("acme", "desk1")) // with it the marks of those are read
}

// wantNoGap waits for the events seqs, of which none may be missing, come twice, or be followed or preceded by a gap.
func wantNoGap(c *harness.Client, seqs []uint64) {
	t := c.Pod.W.T
	t.Helper()
	c.Pod.W.Settled()
	c.WaitEvent(c.Pod.W.Chat("acme", "desk1"))
	for _, m := range c.Others() {
		t.Errorf("%s has had every event, and is told: %s", c.Dial.User, m.Raw)
	}
	wantExactly(c, seqs)
}

// TestNoGapForADeadPodsSake: until the lease of a killed pod ends, events for its clients are given up though they have come to
// another pod and get every one of them. They hear nothing of it.
func TestNoGapForADeadPodsSake(t *testing.T) {
	t.Parallel()
	w := harness.New(t, fewInHand)
	dead, alive := idlePod(w), w.Start()
	ann := dead.Connect(harness.User("acme", "desk1", "ann"))
	first := w.Chat("acme", "desk1")
	ann.WantEvent(first)
	dead.Kill()
	ann = alive.Dial(harness.User("acme", "desk1", "ann").With("since", since(first)))
	wantReplay(t, ann, "ready", first)
	wantNoGap(ann, publishBeyondShare(alive))
	if n := alive.Metric("dws_gaps_total"); n != 0 {
		t.Errorf("%v gaps", n)
	}
	alive.WantLedgers()
}

// TestGapForThoseWhoMissed: of two clients of one agent, on two pods, one can't be reached by the pod that pulls. What is given
// up for that is announced to her alone, though both pods read so in the log.
func TestGapForThoseWhoMissed(t *testing.T) {
	t.Parallel()
	w := harness.New(t, fewInHand, harness.Settings("NATS_RETRY_HORIZON=2s"))
	idleConsumer(w)
	there, proxy := behindProxy(w, "NATS_CONSUMER_NAME=idle")
	here := w.Start()
	ann, eve := here.Connect(harness.User("acme", "desk1", "ann")), there.Connect(harness.User("acme", "desk1", "eve"))
	first := w.Chat("acme", "desk1")
	ann.WantEvent(first)
	eve.WantEvent(first)
	proxy.Cut()
	due := publishBeyondShare(here)
	wantResumed(eve, eve.WantGap("shed"), due[len(due)-1])
	wantNoGap(ann, due)
}

// TestAbsentAgents: a client that arrives while its event waits for it gets it live. Where far more events come for agents
// without a socket than may wait, who is there notices nothing, and who arrives then has his by the resume.
func TestAbsentAgents(t *testing.T) {
	const desks, absent, seconds = 20, 1000, 5
	rate := 5000
	if harness.Race {
		rate = 500
	}
	w := harness.New(t)
	pod := w.Start()
	for i := range 3 {
		agent := fmt.Sprintf("soon%d", i)
		seq := w.Chat("acme", agent)
		pod.WaitMetric(func(v float64) bool { return v >= float64(i+1) }, "dws_events_total", `outcome="nak_no_owner"`)
		if m := pod.Connect(harness.User("acme", agent, "ann")).WantEvent(seq); m.Replay {
			t.Errorf("the event that waited came as a replay: %s", m.Raw)
		}
	}
	var clients []*harness.Client
	for _, d := range agents(desks) {
		clients = append(clients, pod.Connect(d))
	}
	flow := w.Flow(rate, func(i int) feed.Event {
		agent := fmt.Sprintf("gone%d", i%absent)
		if i%10 == 0 {
			agent = fmt.Sprintf("desk%d", i/10%desks)
		}
		return feed.Contact("acme", agent, "c@us")
	})
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_events_total", `outcome="shed"`) // the budget is used up
	for i := range 3 {
		agent := fmt.Sprintf("late%d", i)
		seq := w.Chat("acme", agent)
		pod.Dial(harness.User("acme", agent, "ann").With("since", since(seq-1))).WaitEvent(seq)
	}
	flow.WaitSent(seconds * rate)
	slowest, n := time.Duration(0), 0
	for _, p := range flow.Stop() {
		if p.Index%10 == 0 {
			m := clients[p.Index/10%desks].WaitEvent(p.Seq)
			slowest = max(slowest, m.At.Sub(p.At))
			n++
		}
	}
	t.Logf("%d of %d events for agents that are there, the slowest took %v", n, n*10, slowest)
	if slowest > 2500*time.Millisecond { // a busy machine shows as tenths of a second
		t.Errorf("an event took %v", slowest)
	}
	for _, c := range clients {
		if len(c.Events()) > 0 || len(c.Others()) > 0 {
			t.Errorf("%s got more than that: %v, %v", c.Dial.Agent, c.Events(), c.Others())
		}
	}
}
