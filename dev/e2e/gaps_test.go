package e2e

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

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
	r := c.ResumeMissed()
	c.WaitEvent(lost)
	if r.Gap || r.Position == nil || *r.Position < lost {
		t.Errorf("not whole: %+v", r)
	}
}

// TestOwnersNeverAskedFor: a pod that is cut off from Redis pulls events whose owners it never asked for. Who is on another pod gets
// them at once all the same, and once; they are acked when Redis has answered.
func TestOwnersNeverAskedFor(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("POD_LEASE=9s", "NATS_NAK_DELAY=200ms"))
	redis := w.Proxy(w.Redis.Address())
	here, there := w.Start("REDIS_ADDRESS="+redis.Address()), idlePod(w)
	bob := there.Connect(harness.User("acme", "desk2", "bob"))
	root := there.Connect(harness.Admin("root", "acme", ""))
	bob.SelectChat("c1")
	there.Connect(harness.User("acme", "desk9", "eve")).WaitEvent(w.Chat("acme", "desk9")) // now the pods know each other
	w.Settled()
	redis.Cut()
	notReady(here, "redis")
	seqs := []uint64{w.Chat("acme", "desk2"), w.Message("acme", "desk2", "c1")}
	agent := w.Agent("acme", "desk2")
	for _, seq := range seqs {
		bob.WaitEvent(seq)
	}
	root.WaitEvent(agent)
	if i := w.ConsumerInfo(); i.NumAckPending != 3 {
		t.Errorf("without Redis' answer %d of 3 events are unacked", i.NumAckPending)
	}
	redis.Restore()
	here.WaitReady()
	w.Settled()
	bob.WantNothingElse()
	root.WantEvent(w.Agent("acme", "desk1"))
	if g := there.Metric("dws_gaps_total"); g != 0 {
		t.Errorf("%v gaps", g)
	}
	if n := ended(here, "expired") + ended(here, "shed") + ended(here, "no_owner"); n != 0 {
		t.Errorf("%v deliveries were given up", n)
	}
	for _, p := range []*harness.Pod{here, there} {
		p.WantLedgers()
	}
}

// lostTo publishes for desk1, one after the other, until here has given one of these events up for the pods that it can't reach, and
// returns all of them.
func lostTo(here *harness.Pod) (seqs []uint64) {
	here.W.T.Helper()
	before := ended(here, "expired")
	harness.Eventually(here.W.T, 2*harness.Patience, "an event to be given up", func() bool {
		seqs = append(seqs, here.W.Chat("acme", "desk1"))
		time.Sleep(50 * time.Millisecond) // a retry takes time, however many events there are
		return ended(here, "expired") > before
	})
	return seqs
}

// TestGapBetweenSockets: one pod gives an event up for another, and the client there, who has had later ones, leaves before its pod has
// read that. The event comes with the resume all the same, on whatever pod.
func TestGapBetweenSockets(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often, harness.Settings("NATS_NAK_DELAY=100ms", "NATS_RETRY_HORIZON=1s", "POD_LEASE=15s"))
	there, proxy := behindProxy(w)
	here := w.Start()
	eve := newKeeper(harness.User("acme", "desk1", "eve")).arrive(here)
	bob := newKeeper(harness.User("acme", "desk1", "bob")).arrive(there)
	first := w.Chat("acme", "desk1")
	bob.wait("a position", func() bool { return bob.Client.Place().Seq >= first })
	proxy.Cut()
	for _, next := range []*harness.Pod{here, there} {
		seqs := lostTo(here) // the notes are read with the next renewal, up to 5 s later
		bob.leave()
		bob.arrive(next)
		bob.wantAll(seqs)
		eve.wantAll(seqs)
		if bob.loads != 1 {
			t.Errorf("bob loaded the state %d times", bob.loads)
		}
		bob.leave()
		bob.arrive(there)
	}
}

// TestLeftAPodWithoutLease: a pod is cut off from Redis for longer than its lease, and what others pull does not reach its socket. The
// client goes to another pod before the first has its lease again and could send a gap: its position is from before all that.
func TestLeftAPodWithoutLease(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often, harness.Settings("POD_LEASE=3s", "NATS_NAK_DELAY=200ms"))
	redis := w.Proxy(w.Redis.Address())
	there, here := idlePod(w, "REDIS_ADDRESS="+redis.Address()), w.Start()
	bob, eve := newKeeper(harness.User("acme", "desk1", "bob")).arrive(there), newKeeper(harness.User("acme", "desk1", "eve")).arrive(here)
	all := []uint64{w.Chat("acme", "desk1")}
	bob.wantAll(all)
	redis.Cut()
	notReady(there, "redis")
	harness.Eventually(t, 2*harness.Patience, "an event that misses a pod without lease", func() bool {
		all = append(all, w.Chat("acme", "desk1"))
		eve.wantAll(all)
		bob.take()
		return bob.got[all[len(all)-1]] == 0
	})
	bob.leave()
	bob.arrive(here)
	bob.wantAll(all)
	redis.Restore()
	there.WaitReady()
	bob.leave()
	all = append(all, w.Chat("acme", "desk1"))
	bob.arrive(there)
	bob.wantAll(all)
	if bob.loads != 1 {
		t.Errorf("bob loaded the state %d times", bob.loads)
	}
}

// TestLateEvents: a pod was cut off from NATS for a while. What came meanwhile is delivered late, to who stayed and to who comes back
// meanwhile, once each.
func TestLateEvents(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often)
	nats := w.Proxy(w.NATS.Address())
	pod := w.Start("NATS_URL=nats://" + nats.Address())
	ann, bob := newKeeper(harness.User("acme", "desk1", "ann")).arrive(pod), newKeeper(harness.User("acme", "desk1", "bob")).arrive(pod)
	all := []uint64{w.Chat("acme", "desk1")}
	ann.wantAll(all)
	bob.wantAll(all)
	w.Settled()
	nats.Cut()
	notReady(pod, "nats", "consumer")
	bob.leave()
	for range 50 {
		all = append(all, w.Chat("acme", "desk1"))
	}
	nats.Restore()
	pod.WaitReady()
	bob.arrive(pod)
	for range 5 {
		all = append(all, w.Chat("acme", "desk1"))
	}
	for _, k := range []*keeper{ann, bob} {
		k.wantAll(all)
		if k.twice != 0 || k.loads != 1 || k.gaps != 0 {
			t.Errorf("%s: %d events came twice, %d loads, %d gaps", k.dial.User, k.twice, k.loads, k.gaps)
		}
	}
}

// TestKilledAfterGivingUp: a pod that gives an event up is killed at once. The owner, on another pod, is told all the same.
func TestKilledAfterGivingUp(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=200ms", "NATS_RETRY_HORIZON=2s"))
	idleConsumer(w)
	there, proxy := behindProxy(w, "NATS_CONSUMER_NAME=idle")
	here, bob := w.Start(), there.Connect(harness.User("acme", "desk1", "bob").Positions())
	bob.WaitEvent(w.Chat("acme", "desk1"))
	proxy.Cut()
	lost := w.Chat("acme", "desk1")
	settledTo(w, lost)
	here.Kill()
	wantResumed(bob, bob.WantGap("expired"), lost)
}

// settledTo waits until all events up to seq were acked or given up. The age of those is counted by later ones, so it publishes some.
func settledTo(w *harness.World, seq uint64) {
	w.T.Helper()
	harness.Eventually(w.T, 2*harness.Patience, "JetStream to be told", func() bool {
		w.Chat("acme", "absent")
		time.Sleep(50 * time.Millisecond) // their time passes, however many there are
		return w.ConsumerInfo().AckFloor.Stream >= seq
	})
}

// giver gives events up for a pod as another pod does: a note of each stands in Redis before it is terminated.
type giver struct {
	w     *harness.World
	rdb   *redis.Client
	pod   *harness.Pod
	notes int
}

func (g *giver) giveUp(msg jetstream.Msg, route string) {
	g.w.T.Helper()
	ctx := harness.Within(g.w.T, harness.Patience)
	lease, err := g.rdb.Get(ctx, "pod:"+g.pod.ID).Result()
	if err != nil {
		g.w.T.Fatal(err)
	}
	life, _, _ := strings.Cut(lease, " ")
	g.notes++
	if err := g.rdb.HSet(ctx, "note:"+g.pod.ID+"#"+life, fmt.Sprint(route, "#test.", g.notes), "expired").Err(); err != nil {
		g.w.T.Fatal(err)
	}
	if err := msg.Term(); err != nil {
		g.w.T.Fatal(err)
	}
}

// TestGapInEachPhaseOfAReplay: events are given up for a pod all the time while a client resumes there, slowly: before the replay, during
// it, between its last pass and the answer, and behind that. The client has each of them in the end, and so has one who stays.
func TestGapInEachPhaseOfAReplay(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often, harness.Settings("POD_LEASE=3s", "RESUME_MAX_EVENTS=100000"))
	nats := w.Proxy(w.NATS.Address())
	pod := w.Start("NATS_URL=nats://" + nats.Address())
	g := &giver{w: w, rdb: w.RedisClient(), pod: pod}
	eve, bob := newKeeper(harness.User("acme", "desk1", "eve")).arrive(pod), newKeeper(harness.User("acme", "desk1", "bob")).arrive(pod)
	var all []uint64
	chat := func() uint64 { return w.Chat("acme", "desk1") }
	loseOne := func() {
		held, seqs := hold(w, 1, chat)
		for _, msg := range held {
			g.giveUp(msg, "acme:desk1")
		}
		all = append(all, seqs...)
		eve.take()
	}
	for range 4 {
		bob.leave()
		for range 60 {
			all = append(all, chat())
		}
		loseOne()
		nats.Latency(8 * time.Millisecond)
		bob.come(pod)
		most := g.notes + 40 // the replay must be able to keep up
		harness.Eventually(t, 2*harness.Patience, "the replay to end", func() bool {
			if g.notes < most {
				loseOne()
			}
			bob.take()
			return bob.greeted
		})
		for range 3 {
			loseOne()
			bob.take()
		}
		nats.Latency(0)
		bob.wantAll(all)
		eve.wantAll(all)
	}
	t.Logf("%d events given up of %d; bob was told %d times, eve %d times", g.notes, len(all), bob.gaps, eve.gaps)
	if bob.loads != 1 || eve.loads != 1 || eve.gaps == 0 || bob.gaps == 0 {
		t.Errorf("bob loaded the state %d times, eve %d times; they were told of %d and %d gaps", bob.loads, eve.loads, bob.gaps, eve.gaps)
	}
	w.Settled()
	bob.wait("a position beyond all", func() bool { return bob.Client.Place().Seq >= all[len(all)-1] })
}

// TestDropsAroundAPosition: positions come with a heartbeat that is faster than the client reads, so that they wait in the ring among the
// events, and events are dropped before and behind them. The client has each event in the end, and drops none for a position.
func TestDropsAroundAPosition(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_PING_INTERVAL=50ms", "WEBSOCKET_MAX_MISSED_PONGS=100000", "WEBSOCKET_BUFFER_SIZE=4", "WEBSOCKET_WRITE_TIMEOUT=20s", "SERVER_SHUTDOWN_TIMEOUT=60s", "POD_LEASE=3s"))
	pod := w.Start()
	d := harness.User("acme", "desk1", "ann")
	d.RcvBuf = 4096
	ann := newKeeper(d).arrive(pod)
	eve := pod.Connect(harness.User("acme", "desk2", "eve").Positions())
	dropped := func() float64 { return pod.Metric("dws_targets_total", `outcome="dropped"`) }
	var all []uint64
	publish := func() { all = append(all, w.PublishRaw(w.Prefix+".acme.desk1.chats", big(128<<10))) }
	for round := range 12 {
		ann.Pause()
		before := dropped()
		harness.Eventually(t, harness.Patience, "an event to be dropped", func() bool {
			publish()
			return dropped() > before
		})
		for range round % 6 {
			publish()
		}
		if round%4 == 0 { // the pod's position passes the first that was dropped
			eve.WaitPlace(w.ConsumerInfo().AckFloor.Stream)
		}
		ann.Client.Resume()
		if round%3 == 0 {
			ann.leave()
			ann.arrive(pod)
		}
		ann.wantAll(all)
		ann.wait("the answer to its resume", func() bool { return ann.owed == 0 }) // a socket that replays drops nothing
	}
	t.Logf("of %d events %v were dropped; %d gaps, position %d", len(all), dropped(), ann.gaps, ann.place.Seq)
	if ann.loads != 1 || ann.gaps == 0 {
		t.Errorf("%d loads, %d gaps", ann.loads, ann.gaps)
	}
	w.Settled()
	ann.wait("a position beyond all", func() bool { return ann.Client.Place().Seq >= all[len(all)-1] })
	pod.WantLedgers()
}

// TestStreamMadeAnewForAll: somebody deletes the stream and makes it again. Every socket is told, on whatever pod, as is who comes back
// with a position of the old stream, also when the new one has come that far; each goes on with the new one's positions.
func TestStreamMadeAnewForAll(t *testing.T) {
	t.Parallel()
	w := harness.New(t, often)
	pods := startPods(w, 2)
	ann, bob := newKeeper(harness.User("acme", "desk1", "ann")).arrive(pods[0]), newKeeper(harness.User("acme", "desk1", "bob")).arrive(pods[1])
	eve, old := newKeeper(harness.User("acme", "desk1", "eve")).arrive(pods[0]), pods[1].Connect(harness.User("acme", "desk1", "old"))
	var all []uint64
	for range 30 {
		all = append(all, w.Chat("acme", "desk1"))
	}
	for _, k := range []*keeper{ann, bob, eve} {
		k.wantAll(all)
		k.wait("a position beyond all", func() bool { return k.Client.Place().Seq >= all[len(all)-1] })
	}
	eve.leave()
	w.Settled()
	if err := w.JS.DeleteStream(harness.Within(t, harness.Patience), w.Stream); err != nil {
		t.Fatal(err)
	}
	w.MakeStream(func(*jetstream.StreamConfig) {})
	for _, k := range []*keeper{ann, bob} {
		before := k.place.Stream
		k.wait("the other stream", func() bool { return k.loads == 2 })
		if k.place.Stream == before || k.gaps != 1 {
			t.Errorf("%s has a position of stream %s, as before, after %d gaps", k.dial.User, k.place.Stream, k.gaps)
		}
	}
	old.WantGap("stream")
	all = nil
	for range 40 {
		all = append(all, w.Chat("acme", "desk1"))
	}
	for _, k := range []*keeper{ann, bob} {
		k.wantAll(all)
		k.wait("a position beyond all", func() bool { return k.Client.Place().Seq >= all[len(all)-1] })
	}
	for _, seq := range all {
		old.WaitEvent(seq)
	}
	eve.arrive(pods[1])
	if eve.loads != 2 || eve.place.Stream != ann.place.Stream {
		t.Errorf("eve came back with a position of the old stream: %d loads, and now position %+v", eve.loads, eve.place)
	}
	all = append(all, w.Chat("acme", "desk1"))
	eve.wantAll(all)
}

// TestConsumerMadeBeyond: somebody deletes the consumer. Made again by a pod, it skips nothing. Made again by somebody who does not know up
// to where all was settled, it skips events that no pod has got: every socket is told, and has them by its resume, as has a client that was
// away.
func TestConsumerMadeBeyond(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortTimeouts, often)
	nats := w.Proxy(w.NATS.Address())
	pods := startPods(w, 2, "NATS_URL=nats://"+nats.Address())
	ann, bob := newKeeper(harness.User("acme", "desk1", "ann")).arrive(pods[0]), newKeeper(harness.User("acme", "desk1", "bob")).arrive(pods[1])
	eve := newKeeper(harness.User("acme", "desk1", "eve")).arrive(pods[0])
	var all []uint64
	publish := func() {
		for range 10 {
			all = append(all, w.Chat("acme", "desk1"))
		}
	}
	delete := func() {
		t.Helper()
		if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
			t.Fatal(err)
		}
	}
	publish()
	made := w.ConsumerInfo().Created
	delete()
	publish()
	consumerBack(w, made)
	publish()
	for _, k := range []*keeper{ann, bob, eve} {
		k.wantAll(all)
		k.wait("a position beyond all", func() bool { return k.Client.Place().Seq >= all[len(all)-1] })
		k.gaps = 0 // a pod that comes to the new consumer late may see it beyond the floor that it knew
	}
	w.Settled()

	nats.Cut()
	for _, p := range pods {
		notReady(p, "nats", "consumer")
	}
	eve.leave()
	delete()
	publish()
	if _, err := w.JS.CreateConsumer(harness.Within(t, harness.Patience), w.Stream, jetstream.ConsumerConfig{
		Durable: w.Consumer, FilterSubject: w.Prefix + ".>", AckPolicy: jetstream.AckExplicitPolicy, DeliverPolicy: jetstream.DeliverNewPolicy, AckWait: 5 * time.Second, MaxAckPending: 65536,
	}); err != nil {
		t.Fatal(err)
	}
	publish()
	nats.Restore()
	for _, p := range pods {
		p.WaitReady()
	}
	eve.arrive(pods[1])
	for _, k := range []*keeper{ann, bob, eve} {
		k.wantAll(all)
		k.wait("a position beyond all", func() bool { return k.Client.Place().Seq >= all[len(all)-1] })
		if k.loads != 1 || k.gaps == 0 && k != eve {
			t.Errorf("%s: %d loads, %d gaps", k.dial.User, k.loads, k.gaps)
		}
	}
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
	return append(seqs, pod.W.Chat("acme", "desk1"))
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
	ann := dead.Connect(harness.User("acme", "desk1", "ann").Positions())
	first := w.Chat("acme", "desk1")
	ann.WantEvent(first)
	place := ann.Place()
	dead.Kill()
	ann = alive.Dial(harness.User("acme", "desk1", "ann").From(place))
	wantReplay(t, ann, "ready", first)
	wantNoGap(ann, publishBeyondShare(alive))
	if n := alive.Metric("dws_gaps_total"); n != 0 {
		t.Errorf("%v gaps", n)
	}
	alive.WantLedgers()
}

// TestGapForThoseWhoMissed: of two clients of one agent, on two pods, one can't be reached by the pod that pulls. What is given
// up for that is announced to her alone.
func TestGapForThoseWhoMissed(t *testing.T) {
	t.Parallel()
	w := harness.New(t, fewInHand, harness.Settings("NATS_RETRY_HORIZON=2s"))
	idleConsumer(w)
	there, proxy := behindProxy(w, "NATS_CONSUMER_NAME=idle")
	here := w.Start()
	ann, eve := here.Connect(harness.User("acme", "desk1", "ann").Positions()), there.Connect(harness.User("acme", "desk1", "eve").Positions())
	first := w.Chat("acme", "desk1")
	ann.WantEvent(first)
	eve.WantEvent(first)
	proxy.Cut()
	due := publishBeyondShare(here)
	wantResumed(eve, eve.WantGap("shed"), due[len(due)-1])
	settledTo(w, due[len(due)-1])
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
	stream := at(pod, 0).Stream
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
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_events_total", `outcome="no_owner"`) // the budget is used up
	for i := range 3 {
		agent := fmt.Sprintf("late%d", i)
		seq := w.Chat("acme", agent)
		pod.Dial(harness.User("acme", agent, "ann").From(harness.Place{Seq: seq - 1, Stream: stream})).WaitEvent(seq)
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
