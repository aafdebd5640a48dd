package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// TestBlackHoledPort: packets to and from the port of one pod of three vanish, as behind a wrong rule of a firewall, while half
// of the events are for its sockets. The others keep their latency; the sick half comes later or is announced, and who
// is told of a gap resumes and has everything.
func TestBlackHoledPort(t *testing.T) {
	rate, before, during := 1000, 3*time.Second, sickFor(t, 8*time.Second)
	if harness.Race {
		rate = 200
	}
	n := harness.NewNetwork(t, harness.Settings("NATS_MAX_ACK_PENDING=4096", "NATS_NAK_DELAY=200ms", "PEER_BREAKER_OPEN=5s", "RESUME_MAX_EVENTS=1000000"))
	pods := n.StartPods(3)
	const desks = 20
	var clients []*harness.Client // even: on the first or the third pod; odd: on the second, which gets sick
	for i := range 2 * desks {
		clients = append(clients, pods[[]int{0, 1, 2, 1}[i%4]].Connect(harness.User("acme", fmt.Sprintf("desk%d", i), "ann").Positions()))
	}
	flow := n.Flow(rate, func(i int) feed.Event {
		return feed.Contact("acme", fmt.Sprintf("desk%d", i%(2*desks)), "c@us")
	})
	flow.WaitSent(int(before.Seconds() * float64(rate)))
	began := time.Now()
	n.Shut(pods[1])
	flow.WaitSent(int(during.Seconds() * float64(rate)))
	ended := time.Now()
	n.Mend()
	flow.WaitSent(rate)
	sent := flow.Stop()
	n.Settled()
	for _, c := range clients { // a pong behind everything
		c.Send(map[string]any{"type": "ping"})
		c.TakeType("pong")
	}
	report := weigh(t, clients, sent)
	base, now := report.p99(began.Add(-before*3/4), began), report.p99(began, ended)
	t.Logf("%d events/s, %v sick; p99 of the other half %v before, %v during; of the sick half: %d delivered, %d of them after more than 1 s, %d announced; %d duplicates",
		rate, during, base, now, report.delivered, report.late, report.announced, report.duplicates)
	if now > 10*max(base, 100*time.Millisecond) {
		t.Errorf("p99 of the other half rose from %v to %v", base, now)
	}
	if report.late+report.announced == 0 {
		t.Error("nothing was late: the pod was not sick")
	}
	for i, c := range clients {
		var due []uint64
		for _, p := range sent {
			if p.Index%len(clients) == i {
				due = append(due, p.Seq)
			}
		}
		wantAllAfterResume(c, due)
	}
	for _, p := range pods {
		p.WantLedgers()
	}
}

// wantAllAfterResume does what a client has to do about gaps, until none is unanswered, and fails if one of due has not come then.
func wantAllAfterResume(c *harness.Client, due []uint64) {
	t := c.Pod.W.T
	t.Helper()
	for owed := true; owed; {
		c.Send(map[string]any{"type": "ping"})
		c.TakeType("pong") // a gap that is to come has come
		owed = false
		for _, m := range c.Others() {
			if m.Type == "gap" {
				c.TakeType("gap")
				owed = true
			}
		}
		if owed {
			if r := c.ResumeMissed(); r.Gap {
				t.Errorf("%s on %s can't resume from %d", c.Dial.User, c.Pod.ID, c.Place().Seq)
			}
		}
	}
	got, missing := counts(c), 0
	for _, seq := range due {
		if got[seq] == 0 {
			missing++
		}
	}
	if missing > 0 {
		t.Errorf("%s on %s misses %d of %d events, and no gap says so", c.Dial.User, c.Pod.ID, missing, len(due))
	}
}

// cutOff is three pods, of which the second gets cut off, under a flow of events for the agents of all.
type cutOff struct {
	*harness.Network
	pods               []*harness.Pod
	ann, bob, dan, eve *harness.Follower // ann and bob are of one agent, on the first pod and the sick one; dan is on the sick one; eve on the third
	cid                *harness.Client   // on the sick one, until somebody takes the session
}

// TestPodCutOff: one of three pods is cut off from something, without a sign but silence, and back again. Clients that keep positions
// miss nothing, whether they stay or are sent to another pod.
func TestPodCutOff(t *testing.T) {
	const interval = 2 * time.Second
	peers := func(x *cutOff) []string { return []string{x.pods[0].GRPC, x.pods[2].GRPC} }
	for _, tc := range []struct {
		name  string
		from  func(x *cutOff) []string
		while func(x *cutOff)
		takes time.Duration // a newcomer elsewhere at the most, to take a session of the pod's
		end   string        // of the socket that loses it; those of a pod without Redis may be sent away instead, once a peer can be asked
	}{
		{"from its peers", peers, (*cutOff).withoutPeers, 1500 * time.Millisecond, "session-lost"},
		{"from Redis", func(x *cutOff) []string { return []string{x.Redis} }, (*cutOff).withoutRedisAlone, 1500 * time.Millisecond, "session-lost"},
		{"from Redis and its peers", func(x *cutOff) []string { return append(peers(x), x.Redis) }, (*cutOff).withoutRedis, 1500 * time.Millisecond, "session-lost"},
		{"from NATS", func(x *cutOff) []string { return []string{x.NATS} }, (*cutOff).withoutNATS, 900 * time.Millisecond, "session-replaced"},
		{"from everything", func(x *cutOff) []string { return append(peers(x), x.Redis, x.NATS) }, (*cutOff).withoutRedis, 1500 * time.Millisecond, "session-lost"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			x := &cutOff{Network: harness.NewNetwork(t, harness.Settings("POD_LEASE=3s", "SESSION_TTL=8s", "SESSION_REFRESH_INTERVAL="+interval.String(), shortDelays,
				"NATS_ACK_WAIT=8s", "PEER_TIMEOUT=1s", "PEER_BREAKER_OPEN=2s", "WEBSOCKET_WRITE_TIMEOUT=4s", "NATS_PREFETCH=50", "RESUME_MAX_EVENTS=1000000", "SERVER_DRAIN_SPREAD=1s"))}
			x.pods = x.StartPods(3)
			well, sick := x.pods[0], x.pods[1]
			x.ann, x.eve = x.Follow(harness.User("acme", "desk1", "ann").Positions(), well), x.Follow(harness.User("acme", "desk3", "eve").Positions(), x.pods[2])
			x.bob = x.Follow(harness.User("acme", "desk1", "bob").Positions(), sick, well)
			x.dan = x.Follow(harness.User("acme", "desk2", "dan").Positions(), sick, well)
			x.cid = sick.Connect(harness.User("acme", "desk4", "cid"))
			flow := x.Flow(100, func(i int) feed.Event { return feed.Contact("acme", fmt.Sprintf("desk%d", 1+i%4), "c@us") })
			flow.WaitSent(100)
			x.Cut(sick, tc.from(x)...)
			tc.while(x)
			began := time.Now()
			cid := x.Follow(harness.User("acme", "desk4", "cid").Positions(), well)
			taken := time.Now()
			if took := taken.Sub(began); took > tc.takes {
				t.Errorf("the session of the pod that is cut off was taken over after %v, want %v at the most", took, tc.takes)
			}
			flow.WaitSent(int(100 * sickFor(t, 2*time.Second).Seconds()))
			if stays := tc.name != "from Redis"; stays && len(x.bob.Ends())+len(x.dan.Ends()) > 0 {
				t.Errorf("sockets of the pod that was cut off have ended: %+v, %+v", x.bob.Ends(), x.dan.Ends())
			}
			x.Mend()
			mended := time.Now()
			harness.Eventually(t, harness.Patience, "the socket that had lost its session to be closed", func() bool { return x.cid.Ended() != nil })
			if end := x.cid.Ended(); (end.Code != 4402 || end.Reason != tc.end) && (end.Code != 1001 || tc.end != "session-lost") {
				t.Errorf("the socket that had lost its session ended with %d %q", end.Code, end.Reason)
			}
			if took := time.Since(mended); took > interval+5*time.Second { // the next renewal, once TCP has tried again
				t.Errorf("the socket that had lost its session was closed %v after the cut was mended", took)
			}
			for _, p := range x.pods {
				p.WaitReady()
			}
			t.Logf("all well %v after the cut was mended", time.Since(mended))
			flow.WaitSent(100)
			sent := flow.Stop()
			x.Settled()
			for desk, followers := range map[string][]*harness.Follower{"desk1": {x.ann, x.bob}, "desk2": {x.dan}, "desk3": {x.eve}, "desk4": {cid}} {
				for _, f := range followers {
					var due []uint64
					for _, p := range sent {
						if strings.Contains(p.Subject, desk) && (desk != "desk4" || p.At.After(taken)) && p.At.After(f.Loaded()) {
							due = append(due, p.Seq)
						}
					}
					wantHad(t, f, due)
					if tc.name != "from everything" { // Redis may be back before NATS, without which nobody can resume
						wantNoLoad(t, f)
					}
				}
			}
			for _, f := range []*harness.Follower{x.bob, x.dan, cid} {
				harness.Eventually(t, harness.Patience, "everyone to have a socket", func() bool { return f.Client() != nil })
			}
			wantHolder(x.RedisClient(), "acme:desk4:cid", cid.Client())
			wantHolder(x.RedisClient(), "acme:desk2:dan", x.dan.Client())
			owners := []*harness.Pod{well}
			if x.bob.Client().Pod == sick {
				owners = append(owners, sick)
			}
			wantClaims(x.World, x.pods, "route:acme:desk1", owners...)
			wantClaims(x.World, x.pods, "route:acme:desk2", x.dan.Client().Pod)
			wantClaims(x.World, x.pods, "route:acme:desk4", well)
			for _, p := range x.pods {
				p.WantLedgers()
			}
		})
	}
}

// wantHad waits until f has had each of due, on whatever sockets.
func wantHad(t *testing.T, f *harness.Follower, due []uint64) {
	t.Helper()
	var left []uint64
	defer func() {
		if t.Failed() && len(left) > 0 {
			t.Logf("%s misses %d of %d events: %v; it was told of gaps %+v; its sockets ended so: %+v; the pods say\n%s",
				f.Name(), len(left), len(due), left[:min(len(left), 20)], f.Gaps(), f.Ends(), f.Fate(left[0]))
		}
	}()
	harness.Eventually(t, harness.Patience, "every event to come", func() bool {
		got := f.Got()
		left = slices.DeleteFunc(slices.Clone(due), func(seq uint64) bool { return got[seq] > 0 })
		return len(left) == 0
	})
}

// wantNoLoad fails if f could not resume.
func wantNoLoad(t *testing.T, f *harness.Follower) {
	t.Helper()
	if !f.Loaded().IsZero() {
		t.Errorf("%s could not resume", f.Name())
	}
}

// waitMore waits until f has had some more events than now.
func (x *cutOff) waitMore(f *harness.Follower) {
	x.T.Helper()
	heard := len(f.Got())
	harness.Eventually(x.T, harness.Patience, "more events", func() bool { return len(f.Got()) > heard+5 })
}

// withoutPeers returns when both peers have opened their breakers. What the sick pod pulls itself still comes to its sockets.
func (x *cutOff) withoutPeers() {
	for _, p := range []*harness.Pod{x.pods[0], x.pods[2]} {
		p.WaitMetric(func(v float64) bool { return v >= 1 }, "dws_grpc_circuitbreaker_tripped_total")
	}
	for _, f := range []*harness.Follower{x.ann, x.bob, x.dan, x.eve} {
		x.waitMore(f)
	}
}

// withoutRedis returns when the sick pod's lease is gone.
func (x *cutOff) withoutRedis() {
	sick := x.pods[1]
	harness.Eventually(x.T, harness.Patience, "the pod to notice", func() bool {
		return strings.Contains(string(sick.Do("GET", "/ready", nil, nil).Body), `"redis":"disconnected"`)
	})
	sick.WantRefused(harness.User("acme", "desk5", "fay"), 503, "Unavailable")
	waitNoKey(x.World, x.RedisClient(), "pod:"+sick.ID)
	x.waitMore(x.ann)
	x.waitMore(x.eve)
}

// withoutRedisAlone returns when the sick pod has sent its clients to the others, who overlook it.
func (x *cutOff) withoutRedisAlone() {
	sick := x.pods[1]
	waitNoKey(x.World, x.RedisClient(), "pod:"+sick.ID)
	gone := time.Now()
	x.cid.WantClose(1001, "drain retry-after-ms=*")
	for _, f := range []*harness.Follower{x.bob, x.dan} {
		harness.Eventually(x.T, harness.Patience, "the clients to be on another pod", func() bool {
			c := f.Client()
			return c != nil && c.Pod != sick
		})
		if end := f.Ends()[0]; end.Code != 1001 || end.At.Sub(gone) > 10*time.Second {
			x.T.Errorf("a client of the pod without Redis was sent away with %d %q, %v after its lease had ended", end.Code, end.Reason, end.At.Sub(gone))
		}
		x.waitMore(f)
	}
	sick.WantRefused(harness.User("acme", "desk5", "fay"), 503, "Unavailable")
}

// withoutNATS returns when everything that was published, what the sick pod had pulled or was given in vain too, has been
// delivered by the others.
func (x *cutOff) withoutNATS() {
	sick := x.pods[1]
	harness.Eventually(x.T, harness.Patience, "the pod to notice", func() bool { return sick.Do("GET", "/ready", nil, nil).StatusCode == 503 })
	last := x.Contact("acme", "desk2")
	x.SettledTo(last)
	wantHad(x.T, x.dan, []uint64{last})
	x.waitMore(x.bob)
}
