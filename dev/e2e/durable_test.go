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

// changeConsumer changes the World's consumer behind the pods' backs, as an operator could.
func changeConsumer(w *harness.World, change func(*jetstream.ConsumerConfig)) {
	w.T.Helper()
	cfg := w.ConsumerInfo().Config
	change(&cfg)
	if _, err := w.JS.UpdateConsumer(harness.Within(w.T, harness.Patience), w.Stream, cfg); err != nil {
		w.T.Fatal(err)
	}
}

func setFilter(w *harness.World, filter string) {
	w.T.Helper()
	changeConsumer(w, func(cfg *jetstream.ConsumerConfig) { cfg.FilterSubject, cfg.FilterSubjects = filter, nil })
}

// wantMisfit waits until the pod is not ready for its consumer's sake, and takes no sockets; log and /ready have these words.
func wantMisfit(p *harness.Pod, words ...string) {
	p.W.T.Helper()
	p.WaitListening()
	notReady(p, "consumer")
	findLine(p, append(words, `"level":"WARN"`)...)
	said := func() bool {
		return holds(strings.ReplaceAll(string(p.Do("GET", "/ready", nil, nil).Body), `\u003e`, ">"), words...)
	}
	harness.Eventually(p.W.T, harness.Patience, "/ready to say why", said)
	if a := p.WantRefused(harness.User("acme", "desk9", "new"), 503, "Unavailable"); a.Header.Get("Retry-After") == "" {
		p.W.T.Error("503 without Retry-After")
	}
}

// setStream changes the World's stream, as its owner may.
func setStream(w *harness.World, change func(*jetstream.StreamConfig)) {
	w.T.Helper()
	ctx := harness.Within(w.T, harness.Patience)
	s, err := w.JS.Stream(ctx, w.Stream)
	if err != nil {
		w.T.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	change(&cfg)
	if _, err := w.JS.UpdateStream(ctx, cfg); err != nil {
		w.T.Fatal(err)
	}
}

// waitNoted waits until a poll has noted in Redis that all published so far is settled.
func waitNoted(w *harness.World) {
	w.T.Helper()
	rdb := w.RedisClient()
	harness.Eventually(w.T, harness.Patience, "the floor to be noted", func() bool {
		keys := rdb.Keys(harness.Within(w.T, harness.Patience), "ack_floor:"+w.Stream+":"+w.Consumer+":"+w.Prefix+":*").Val()
		if len(keys) != 1 {
			return false
		}
		words := strings.Fields(rdb.Get(harness.Within(w.T, harness.Patience), keys[0]).Val())
		return len(words) == 2 && words[1] == fmt.Sprint(w.LastSeq())
	})
}

// TestPodWithAnotherPrefix: a pod with another prefix than the others, at the same stream and consumer, changes nothing for
// them. It is not ready and says why, until it is alone.
func TestPodWithAnotherPrefix(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	other := w.Prefix + "-other"
	setStream(w, func(cfg *jetstream.StreamConfig) { cfg.Subjects = append(cfg.Subjects, other+".>") })
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	stray := w.Launch("NATS_SUBJECT_PREFIX=" + other)
	wantMisfit(stray, "filter_subject is "+w.Prefix+".>, want "+other+".>", "NATS_SUBJECT_PREFIX", "others use it")
	for range 3 { // and after polls of both
		ann.WantEvent(w.Chat("acme", "desk1"))
		time.Sleep(2 * time.Second)
	}
	if info := w.ConsumerInfo(); info.Config.FilterSubject != w.Prefix+".>" {
		t.Errorf("the consumer's filter is %q", info.Config.FilterSubject)
	}
	if !pod.Ready() {
		t.Error("the pod that is right is not ready")
	}
	w.Settled()
	// Deleted by somebody, it is made again by the pod that it fitted.
	made := w.ConsumerInfo().Created
	if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
		t.Fatal(err)
	}
	consumerBack(w, made)
	pod.WaitReady()
	ann.WaitEvent(w.Chat("acme", "desk1"))
	w.Settled()
	pod.WantLedgers()
	pod.Terminate()
	pod.WantExit(0, 2*harness.Patience)
	stray.WaitReady()
	ev := feed.Chat("acme", "desk1", "628111@c.us", feed.Text(), 1)
	stray.Connect(harness.User("acme", "desk1", "ann")).WaitEvent(w.PublishRaw(other+"."+ev.Subject, ev.Payload))
}

// TestTwoClusters: pods with another Redis come to the same consumer, as staging beside production. They say whose it is, and take nothing from
// it, while those that were there use it; afterwards it is theirs. A Redis that loses its data makes no other cluster of its pods.
func TestTwoClusters(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortTimeouts)
	a, b := w.Start(), w.Start()
	mark := func() string { return w.ConsumerInfo().Config.Metadata["daisi_ws_cluster"] }
	ours := mark()
	if ours == "" {
		t.Fatal("the consumer has no mark")
	}
	clients := []*harness.Client{a.Connect(harness.User("acme", "desk1", "ann")), b.Connect(harness.User("acme", "desk1", "bob"))}
	strays := []*harness.Pod{w.Launch("REDIS_DB=1")} // alone in its cluster: it sees the others by what they do with the consumer
	for _, stray := range strays {
		wantMisfit(stray, "daisi_ws_cluster is "+ours, "another cluster", "NATS_CONSUMER_NAME or REDIS_ADDRESS")
	}
	flow := w.Flow(50, func(int) feed.Event { return feed.Chat("acme", "desk1", "628111@c.us", "hi", 1) })
	flow.WaitSent(100)
	w.Redis.Kill()
	if err := w.Redis.LoseData(); err != nil {
		t.Fatal(err)
	}
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	flow.WaitSent(250)
	for _, p := range flow.Stop() {
		for _, c := range clients {
			c.WaitEvent(p.Seq)
		}
	}
	w.Settled()
	a.WaitReady()
	b.WaitReady()
	if got := mark(); got != ours {
		t.Errorf("the mark is %q, was %q", got, ours)
	}
	for _, pod := range []*harness.Pod{a, b} {
		pod.Terminate()
		pod.WantExit(0, 2*harness.Patience)
	}
	for _, stray := range strays {
		stray.WaitReady()
	}
	if got := mark(); got == ours || got == "" {
		t.Errorf("the mark is %q under the other cluster, was %q", got, ours)
	}
	cid := strays[0].Connect(harness.User("acme", "desk1", "cid"))
	cid.WaitEvent(w.Chat("acme", "desk1"))
	wantMisfit(w.Launch(), "daisi_ws_cluster is "+mark(), "another cluster")
}

// TestUnmarkedConsumer: one that a version of before has made, or somebody by hand, gets its mark from the next pod that starts.
func TestUnmarkedConsumer(t *testing.T) {
	t.Parallel()
	w := harness.New(t, shortTimeouts)
	pod := w.Start()
	changeConsumer(w, func(cfg *jetstream.ConsumerConfig) { delete(cfg.Metadata, "daisi_ws_cluster") })
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.WantEvent(w.Chat("acme", "desk1"))
	w.Start().WaitReady()
	if w.ConsumerInfo().Config.Metadata["daisi_ws_cluster"] == "" {
		t.Error("the consumer has no mark")
	}
	ann.WantEvent(w.Chat("acme", "desk1"))
}

// TestConsumerSkipsEvents: somebody changes the filter while pods run: they say so, and take no sockets. When it is put right, what was
// skipped meanwhile comes to those who stayed.
func TestConsumerSkipsEvents(t *testing.T) {
	t.Parallel()
	w := harness.New(t, roomy)
	pods := startPods(w, 2)
	ann, bob := pods[0].Connect(harness.User("acme", "desk1", "ann")), pods[1].Connect(harness.User("acme", "desk2", "bob"))
	before := w.Chat("acme", "desk1")
	ann.WaitEvent(before)
	w.Settled()
	waitNoted(w)
	made := w.ConsumerInfo().Created
	setFilter(w, w.Prefix+".nobody.>")
	skipped := []uint64{w.Chat("acme", "desk1")}
	for _, p := range pods {
		wantMisfit(p, "filter_subject is "+w.Prefix+".nobody.>, want "+w.Prefix+".>")
	}
	w.PublishRaw(w.Prefix+".nobody.else", []byte("{}")) // moves the consumer on
	skipped = append(skipped, w.Chat("acme", "desk1"))
	other := w.Chat("acme", "desk2")
	setFilter(w, w.Prefix+".>")
	for _, p := range pods {
		p.WaitReady()
	}
	for _, seq := range skipped {
		ann.WaitEvent(seq)
	}
	bob.WaitEvent(other)
	ann.WaitEvent(w.Chat("acme", "desk1"))
	w.Settled()
	if n := counts(ann)[before]; n != 0 {
		t.Error("what was settled before came once more")
	}
	if !w.ConsumerInfo().Created.After(made) {
		t.Error("the consumer was not made anew")
	}
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestLonePodPutsTheFilterRight: a pod that is alone with the consumer changes it back by itself.
func TestLonePodPutsTheFilterRight(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	ann.WantEvent(w.Chat("acme", "desk1"))
	w.Settled()
	setFilter(w, w.Prefix+".nobody.>")
	skipped := w.Chat("acme", "desk1")
	ann.WaitEvent(skipped)
	findLine(pod, "filter_subject is "+w.Prefix+".nobody.>, want "+w.Prefix+".>")
	pod.WaitReady()
	w.Settled()
	pod.WantLedgers()
}

// TestSkippedEventsOutliveThePods: the pods that saw another filter are killed before it is put right; those that come later read
// again what was skipped.
func TestSkippedEventsOutliveThePods(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pods := startPods(w, 2)
	ann := pods[0].Connect(harness.User("acme", "desk1", "ann"))
	ann.WaitEvent(w.Chat("acme", "desk1"))
	w.Settled()
	waitNoted(w)
	setFilter(w, w.Prefix+".nobody.>")
	for _, p := range pods {
		wantMisfit(p, "filter_subject")
	}
	for _, p := range pods {
		p.Kill()
	}
	skipped := []uint64{w.Chat("acme", "desk1"), w.Chat("acme", "desk1")}
	w.PublishRaw(w.Prefix+".nobody.else", []byte("{}"))
	setFilter(w, w.Prefix+".>")
	next := w.Start()
	ann = next.Connect(harness.User("acme", "desk1", "ann"))
	for _, seq := range skipped {
		ann.WaitEvent(seq)
	}
	w.Settled()
	next.WantLedgers()
}

// TestPodsLeftByTheWrongOne: the pod that was wrong made the consumer, and is gone. Those that are right do not take each other for its
// users for ever: nobody asks it for events.
func TestPodsLeftByTheWrongOne(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_ACK_WAIT=6s", "PEER_TIMEOUT=1s", "WEBSOCKET_WRITE_TIMEOUT=2s", "WEBSOCKET_BLOCK_TIMEOUT=1s"))
	other := w.Prefix + "-other"
	setStream(w, func(cfg *jetstream.StreamConfig) { cfg.Subjects = append(cfg.Subjects, other+".>") })
	wrong := w.Start("NATS_SUBJECT_PREFIX=" + other)
	right := []*harness.Pod{w.Launch(), w.Launch()}
	for _, p := range right {
		wantMisfit(p, "filter_subject is "+other+".>, want "+w.Prefix+".>", "others use it")
	}
	wrong.Kill()
	for _, p := range right {
		harness.Eventually(t, 3*harness.Patience, p.ID+" to be ready", p.Ready)
		p.Connect(harness.User("acme", "desk1", p.ID)).WaitEvent(w.Chat("acme", "desk1"))
	}
	w.Settled()
}

// TestPodWithOtherLimits: a pod whose ack wait and limit of unacked events are not the consumer's changes nothing while others
// live. It goes by the consumer's: it neither fills it with what waits, nor answers for what JetStream has given out again.
func TestPodWithOtherLimits(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	limits := []string{"NATS_MAX_ACK_PENDING=40", "NATS_PREFETCH=10", "NATS_PARKED_BUDGET=10", "NATS_ACK_WAIT=6s",
		"PEER_TIMEOUT=1s", "WEBSOCKET_WRITE_TIMEOUT=2s", "WEBSOCKET_BLOCK_TIMEOUT=1s"}
	first := w.Start(limits...)
	pod := w.Start("NATS_NAK_DELAY=20s", "NATS_RETRY_HORIZON=90s", "LOG_LEVEL=debug")
	findLine(pod, `"level":"WARN"`, "ack_wait is 6s, want 30s, max_ack_pending is 40, want 65536", "DAISI_WS_PEER_TIMEOUT (5s)")
	first.Terminate()
	first.WantExit(0, 2*harness.Patience)
	if c := w.ConsumerInfo().Config; c.AckWait != 6*time.Second || c.MaxAckPending != 40 {
		t.Errorf("the consumer was changed: ack wait %v, %d unacked", c.AckWait, c.MaxAckPending)
	}
	// For agents who are absent, more than the consumer may have unacked: each waits for 20 s.
	for i := range 60 {
		w.Chat("acme", fmt.Sprintf("absent%d", i))
	}
	d := harness.User("acme", "desk1", "ann")
	d.RcvBuf = 4096
	ann := pod.Connect(d)
	ann.WaitEvent(w.Chat("acme", "desk1"))
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_events_total", `outcome="no_owner"`)

	ann.Pause()
	for range 12 {
		w.PublishRaw(w.Prefix+".acme.desk1.contacts", big(900_000))
	}
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_redelivered_total")
	ann.Resume()
	pod.WaitMetric(func(v float64) bool { return v > 0 }, "dws_events_total", `outcome="late"`)
}

// TestUpgradeToAnotherDefault: pods of a version, or with settings, that have another limit replace the others one by one: the consumer
// keeps its own as long as one lives, and the first that starts alone changes it.
func TestUpgradeToAnotherDefault(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	old := w.Start("NATS_MAX_ACK_PENDING=16384")
	next := w.Start()
	findLine(next, `"level":"WARN"`, "the consumer's own limits are in force", "max_ack_pending is 16384, want 65536")
	old.Terminate()
	old.WantExit(0, 2*harness.Patience)
	next.Connect(agents(1)[0]).WantNothingElse()
	if n := w.ConsumerInfo().Config.MaxAckPending; n != 16384 {
		t.Errorf("the limit was changed to %d", n)
	}
	next.Terminate()
	next.WantExit(0, 2*harness.Patience)
	last := w.Start()
	findLine(last, "consumer changed to these settings", "max_ack_pending from 16384 to 65536")
	if n := w.ConsumerInfo().Config.MaxAckPending; n != 65536 {
		t.Errorf("the limit is %d", n)
	}
	last.Connect(agents(1)[0]).WantNothingElse()
	// Changed by hand: the pod goes by it from its next poll on, and says so once.
	changeConsumer(w, func(cfg *jetstream.ConsumerConfig) { cfg.AckWait = 40 * time.Second })
	findLine(last, "the consumer's own limits are in force", "ack_wait is 40s, want 30s")
	last.Connect(agents(1)[0]).WantNothingElse()
	if n := strings.Count(last.Log.Text(), "ack_wait is 40s"); n != 1 {
		t.Errorf("said %d times", n)
	}
}

// TestLimitThatTheServerRefuses: the stream allows its consumers less than the settings want. A consumer that exists stays as it
// is, and the pod runs.
func TestLimitThatTheServerRefuses(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(cfg *jetstream.StreamConfig) { cfg.ConsumerLimits.MaxAckPending = 2000 }))
	first := w.Start("NATS_MAX_ACK_PENDING=2000")
	first.Terminate()
	first.WantExit(0, 2*harness.Patience)
	pod := w.Start()
	findLine(pod, `"level":"WARN"`, "consumer left as it is", "limit of 2000")
	pod.Connect(agents(1)[0]).WantNothingElse()
}

// TestReadyNeedsAConsumer: as long as the consumer can't be made, nobody is promised anything.
func TestReadyNeedsAConsumer(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.StreamConfig(func(cfg *jetstream.StreamConfig) { cfg.ConsumerLimits.MaxAckPending = 2000 }))
	pod := w.Launch()
	wantMisfit(pod, "limit of 2000")
	w.Chat("acme", "desk0") // of which nobody was told that it would come
	setStream(w, func(cfg *jetstream.StreamConfig) { cfg.ConsumerLimits.MaxAckPending = 0 })
	pod.WaitReady()
	pod.Connect(agents(1)[0]).WantNothingElse()
	w.Settled()
	pod.WantLedgers()
}

// TestPushConsumer: a consumer of the name that pushes, as an earlier service may have had, is left alone, with advice.
func TestPushConsumer(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	if _, err := w.JS.CreatePushConsumer(harness.Within(t, harness.Patience), w.Stream, jetstream.ConsumerConfig{
		Durable: w.Consumer, FilterSubject: w.Prefix + ".>", AckPolicy: jetstream.AckExplicitPolicy, DeliverSubject: "deliver." + w.Prefix,
	}); err != nil {
		t.Fatal(err)
	}
	wantMisfit(w.Launch(), "is a push consumer, want a pull consumer", "set NATS_CONSUMER_NAME to another name, or delete that consumer")
	other := w.Start("NATS_CONSUMER_NAME=" + w.Consumer + "_pull")
	other.Connect(agents(1)[0]).WantNothingElse()
}

// TestPausedConsumer: /ready and a metric say that somebody has paused the consumer; sockets stay, and get all when it goes on.
func TestPausedConsumer(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(agents(1)[0])
	pause := func(until time.Time) {
		if _, err := w.JS.PauseConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer, until); err != nil {
			t.Fatal(err)
		}
	}
	until := time.Now().Add(time.Hour)
	pause(until)
	wantMisfit(pod, "paused by someone until "+until.UTC().Format("2006-01-02 15:"))
	pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_consumer_paused")
	seq := w.Chat("acme", "desk0")
	if _, err := w.JS.ResumeConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
		t.Fatal(err)
	}
	ann.WantEvent(seq)
	pod.WaitReady()
	if v := pod.Metric("dws_consumer_paused"); v != 0 {
		t.Errorf("dws_consumer_paused is %v", v)
	}
	if n := strings.Count(pod.Log.Text(), "paused by someone"); n != 1 {
		t.Errorf("the log says %d times that the consumer is paused", n)
	}
}

// TestRetentions: live delivery works whatever the stream's retention is, also after somebody has deleted the consumer or changed
// its filter. A retention with which clients can't resume is warned of once.
func TestRetentions(t *testing.T) {
	t.Parallel()
	for _, retention := range []jetstream.RetentionPolicy{jetstream.LimitsPolicy, jetstream.InterestPolicy, jetstream.WorkQueuePolicy} {
		t.Run(retention.String(), func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.StreamConfig(func(cfg *jetstream.StreamConfig) { cfg.Retention = retention }))
			pod := w.Start()
			ann := pod.Connect(agents(1)[0])
			ann.WantNothingElse()
			w.Settled()
			made := w.ConsumerInfo().Created
			if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
				t.Fatal(err)
			}
			consumerBack(w, made)
			pod.WaitReady()
			ann.WaitEvent(w.Chat("acme", "desk0"))
			w.Settled()
			setFilter(w, w.Prefix+".nobody.>")
			skipped := w.Chat("acme", "desk0")
			findLine(pod, "filter_subject is "+w.Prefix+".nobody.>")
			pod.WaitReady()
			if retention != jetstream.InterestPolicy { // which did not keep it
				ann.WaitEvent(skipped)
			}
			ann.WaitEvent(w.Chat("acme", "desk0"))
			w.Settled()
			pod.WantLedgers()
			want := 1
			if retention == jetstream.LimitsPolicy {
				want = 0
			}
			if n := strings.Count(pod.Log.Text(), "no limits retention"); n != want {
				t.Errorf("warned of the retention %d times, want %d", n, want)
			}
		})
	}
}

// TestPrefixThatTheStreamLacks: a stream in which no event of the prefix can ever be is named, with what it stores and the likely
// setting; the pod is not ready until its owner adds the prefix. Other subjects are no fault.
func TestPrefixThatTheStreamLacks(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.NoStream())
	other := "websocket." + w.Prefix
	w.MakeStream(func(cfg *jetstream.StreamConfig) { cfg.Subjects = []string{other + ".>"} })
	pod := w.Launch()
	wantMisfit(pod, `stores only \"`+other+`.>\"`, `NATS_SUBJECT_PREFIX \"`+w.Prefix+`\"`, "set NATS_SUBJECT_PREFIX="+other+", or", `add \"`+w.Prefix+`.>\"`)
	w.Start("NATS_SUBJECT_PREFIX="+other, "NATS_CONSUMER_NAME="+w.Consumer+"_other")
	setStream(w, func(cfg *jetstream.StreamConfig) { cfg.Subjects = append(cfg.Subjects, w.Prefix+".>") })
	pod.WaitReady()
	pod.Connect(agents(1)[0]).WantNothingElse()
}

// TestTransformedSubjects: what counts is the subject under which the stream stores.
func TestTransformedSubjects(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.NoStream())
	raw := "raw-" + w.Prefix
	w.MakeStream(func(cfg *jetstream.StreamConfig) {
		cfg.Subjects = []string{raw + ".>"}
		cfg.SubjectTransform = &jetstream.SubjectTransformConfig{Source: raw + ".>", Destination: w.Prefix + ".>"}
	})
	ann := w.Start().Connect(agents(1)[0])
	ev := feed.Chat("acme", "desk0", "628111@c.us", feed.Text(), 1)
	ann.WantEvent(w.PublishRaw(raw+"."+ev.Subject, ev.Payload))
	wantMisfit(w.Launch("NATS_SUBJECT_PREFIX="+raw, "NATS_CONSUMER_NAME="+w.Consumer+"_raw"), `stores only \"`+w.Prefix+`.>\"`, "set NATS_SUBJECT_PREFIX="+w.Prefix)
}
