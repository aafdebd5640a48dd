package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// breakerLine is a log line about a change of a breaker's state.
type breakerLine struct {
	Msg, State, Was string
	Time            time.Time
}

// breakerLines are those of a pod's log so far.
func breakerLines(p *harness.Pod) (all []breakerLine) {
	for line := range strings.Lines(p.Log.Text()) {
		var l breakerLine
		if json.Unmarshal([]byte(line), &l) == nil && l.Msg == "circuit breaker of a peer" {
			all = append(all, l)
		}
	}
	return all
}

// TestBreakerOfAPeer: a peer that takes everything and answers nothing, or too late: five missing answers open its breaker; one
// connection is tried each time that it has been open for its time, and no more; when the peer is well again the next
// one closes it. What was due to its sockets comes then, and those of other pods notice nothing.
func TestBreakerOfAPeer(t *testing.T) {
	t.Parallel()
	const timeout, open = 400 * time.Millisecond, 2 * time.Second
	for name, sicken := range map[string]func(*rig.Proxy){
		"never answers":    (*rig.Proxy).BlackHole,
		"answers too late": func(p *rig.Proxy) { p.Latency(time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("PEER_TIMEOUT="+timeout.String(), "PEER_BREAKER_OPEN="+open.String(), "NATS_NAK_DELAY=500ms", calm))
			well := w.Start()
			sick, proxy := behindProxy(w)
			ann := sick.Connect(harness.User("acme", "desk1", "ann"))
			bob := well.Connect(harness.User("acme", "desk1", "bob"))
			flow := w.Flow(20, func(int) feed.Event { return feed.Chat("acme", "desk1", "c@us", "hello", 1) })
			well.WaitMetric(func(v float64) bool { return v > 5 }, "dws_grpc_messages_sent_total")
			if n := well.Metric("dws_grpc_circuitbreaker_tripped_total"); n != 0 {
				t.Fatalf("tripped %v times by a healthy peer", n)
			}
			before := proxy.Taken()
			sickened := time.Now()
			sicken(proxy)
			well.WaitMetric(func(v float64) bool { return v == 1 }, "dws_grpc_circuitbreaker_open")
			if took := time.Since(sickened); took < timeout {
				t.Errorf("the breaker opened after %v, no answer can be missing before %v", took, timeout)
			}
			probes := func() (n int) {
				for _, l := range breakerLines(well) {
					if l.State == "half-open" {
						n++
					}
				}
				return n
			}
			harness.Eventually(t, harness.Patience, "two probes to fail", func() bool {
				lines := breakerLines(well)
				return probes() >= 2 && lines[len(lines)-1].State == "open"
			})
			if conns, n := proxy.Taken()-before, probes(); conns != n {
				t.Errorf("%d connections were tried behind the open breaker, in %d probes", conns, n)
			}
			lines := breakerLines(well)
			for i, l := range lines[1:] {
				if took := l.Time.Sub(lines[i].Time); l.State == "half-open" && took < open {
					t.Errorf("probed after %v, want %v", took, open)
				}
			}
			heard := len(bob.Events())
			harness.Eventually(t, harness.Patience, "the other pod's socket to be served as ever", func() bool { return len(bob.Events()) > heard+5 })
			proxy.Latency(0)
			proxy.Restore()
			well.WaitMetric(func(v float64) bool { return v == 0 }, "dws_grpc_circuitbreaker_open")
			sent := flow.Stop()
			w.Settled()
			if len(sent) > 256 {
				t.Logf("%d events: more than a socket remembers", len(sent))
				return
			}
			var due []uint64
			for _, p := range sent {
				due = append(due, p.Seq)
			}
			wantExactly(ann, due)
			wantExactly(bob, due)
			for _, p := range []*harness.Pod{well, sick} {
				p.WantLedgers()
			}
		})
	}
}

// TestRedisAwayThreePods: while Redis is away, events go to every pod, nobody new is let in, chats are selected as ever, and nothing
// is settled, not for one lease after it is back either. Then everything is claimed again, whether Redis kept its data or
// not, and each socket gets one gap, since Redis may have lost what others wrote.
func TestRedisAwayThreePods(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const lease = 3 * time.Second
	for name, lose := range map[string]bool{"data kept": false, "data lost": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("POD_LEASE="+lease.String(), "SESSION_REFRESH_INTERVAL=3s", "SESSION_TTL=8s", "NATS_NAK_DELAY=100ms", "LOG_LEVEL=debug"))
			pods := startPods(w, 3)
			ann, bob := pods[0].Connect(harness.User("acme", "desk1", "ann").Positions()), pods[1].Connect(harness.User("acme", "desk1", "bob").Positions())
			cid, root := pods[2].Connect(harness.User("acme", "desk2", "cid").Positions()), pods[1].Connect(harness.Admin("root", "", "").Positions())
			eve := pods[2].Connect(harness.User("acme", "desk1", "eve"))
			ann.SelectChat("c1")
			cid.SelectChat("c2")
			all := []*harness.Client{ann, bob, cid, root}
			due := map[*harness.Client][]uint64{}
			serve := func(rounds int) {
				t.Helper()
				for range rounds {
					for _, e := range []struct {
						seq uint64
						to  []*harness.Client
					}{
						{w.Chat("acme", "desk1"), all[:2]}, {w.Chat("acme", "desk2"), all[2:3]}, {w.Agent("acme", "desk1"), all[3:]},
						{w.Message("acme", "desk1", "c1"), all[:1]}, {w.Message("acme", "desk2", "c2"), all[2:3]},
					} {
						for _, c := range e.to {
							due[c] = append(due[c], e.seq)
						}
					}
				}
				for _, c := range all {
					wantCome(c, due[c])
				}
			}
			serve(25)
			for range 10 {
				w.Message("acme", "desk1", "c9") // nobody has selected this chat
			}
			w.Settled()
			unselected := func() (n float64) {
				for _, p := range pods {
					n += ended(p, "unselected")
				}
				return n
			}
			if n := unselected(); n != 10 {
				t.Fatalf("%v events of a chat that nobody has selected ended so, want 10", n)
			}

			w.Redis.Kill()
			killed := time.Now()
			for _, p := range pods {
				harness.Eventually(t, harness.Patience, p.ID+" to notice", func() bool {
					return strings.Contains(string(p.Do("GET", "/ready", nil, nil).Body), `"redis":"disconnected"`)
				})
			}
			first := w.Chat("acme", "desk1")
			due[ann], due[bob] = append(due[ann], first), append(due[bob], first)
			serve(25)
			eve.Abort() // one owner of desk1 leaves
			serve(25)
			ofNobody := w.Message("acme", "desk1", "c9")
			pods[0].WantRefused(harness.User("acme", "desk3", "eve"), 503, "Unavailable")
			ann.SelectChat("c3")
			due[ann] = append(due[ann], w.Message("acme", "desk1", "c3"))
			wantCome(ann, due[ann])
			ann.SelectChat("c1")
			due[ann] = append(due[ann], w.Message("acme", "desk1", "c1"))
			serve(1)
			<-time.After(time.Until(killed.Add(lease))) // no lease holds any more
			if info := w.ConsumerInfo(); info.AckFloor.Stream >= first || unselected() != 10 {
				t.Errorf("something was settled without Redis: ack floor %d of %d, %v unselected", info.AckFloor.Stream, first, unselected())
			}
			if lose {
				if err := w.Redis.LoseData(); err != nil {
					t.Fatal(err)
				}
			}
			back := time.Now()
			if err := w.Redis.Restart(); err != nil {
				t.Fatal(err)
			}
			for _, p := range pods {
				p.WaitReady()
			}
			for _, c := range all { // it comes when everything is claimed again: until then a pod may miss an owner
				if g := c.WantGap("owner"); g.Since >= first {
					t.Errorf("%s: gap since %d, but Redis went away before %d", c.Dial.User, g.Since, first)
				}
			}
			wantClaims(w, pods, "route:acme:desk1", pods[0], pods[1])
			wantClaims(w, pods, "route:acme:desk2", pods[2])
			wantClaims(w, pods, "route:admins", pods[1])
			serve(10) // the selection is what it was
			harness.Eventually(t, harness.Patience, "the event of nobody to end", func() bool { return unselected() > 10 })
			if took := time.Since(back); took < lease || took > lease+10*time.Second {
				t.Errorf("nobody was believed %v after Redis was back, want %v at least, and soon after that", took, lease)
			}
			w.SettledTo(ofNobody)
			rdb := w.RedisClient()
			wantHolder(rdb, "acme:desk1:ann", ann)
			wantHolder(rdb, "acme:desk2:cid", cid)
			wantHolder(rdb, "admin:root", root)
			w.Settled()
			for c, seqs := range due {
				if others := c.Others(); len(others) > 0 {
					t.Errorf("%s was told more than one gap: %s", c.Dial.User, others[0].Raw)
				}
				wantExactly(c, seqs)
				if r := c.ResumeMissed(); r.Gap || r.Resumed == 0 { // all came, but its position is from before
					t.Errorf("%s resumes: %+v", c.Dial.User, r)
				}
			}
			for _, p := range pods {
				p.WantLedgers()
			}
		})
	}
}

// wantCome waits until each of due has come to c.
func wantCome(c *harness.Client, due []uint64) {
	t := c.Pod.W.T
	t.Helper()
	var left []uint64
	defer func() {
		if t.Failed() && len(left) > 0 {
			t.Logf("%s misses %v; the pods say\n%s", c.Dial.User+c.Dial.Admin, left, c.Pod.W.Fate(left[0]))
		}
	}()
	harness.Eventually(t, harness.Patience, "every event to come", func() bool {
		got := counts(c)
		left = slices.DeleteFunc(slices.Clone(due), func(seq uint64) bool { return got[seq] > 0 })
		return len(left) == 0
	})
}

// wantClaims waits until the live claims on a route are those of owners, by the leases that stand in Redis.
func wantClaims(w *harness.World, pods []*harness.Pod, route string, owners ...*harness.Pod) {
	w.T.Helper()
	rdb := w.RedisClient()
	var got, want []string
	defer func() {
		if w.T.Failed() {
			w.T.Logf("%s holds %v, want %v", route, got, want)
		}
	}()
	harness.Eventually(w.T, harness.Patience, "the claims on "+route, func() bool {
		got, want = nil, nil
		got, _ = rdb.SMembers(w.T.Context(), route).Result()
		for _, p := range owners {
			lease, _ := rdb.Get(w.T.Context(), "pod:"+p.ID).Result()
			life, _, _ := strings.Cut(lease, " ")
			want = append(want, p.ID+"#"+life)
		}
		for i, name := range got {
			got[i] = memberOf(name)
		}
		// A member of a life that is gone stands until a reader removes it.
		got = slices.DeleteFunc(got, func(m string) bool {
			pod, life, _ := strings.Cut(m, "#")
			lease, _ := rdb.Get(w.T.Context(), "pod:"+pod).Result()
			return !strings.HasPrefix(lease, life+" ")
		})
		slices.Sort(got)
		slices.Sort(want)
		return slices.Equal(got, want)
	})
}

// memberOf is the pod and its life that a member of a route's set names before its number.
func memberOf(name string) string {
	pod, rest, _ := strings.Cut(name, "#")
	life, _, _ := strings.Cut(rest, "#")
	return pod + "#" + life
}

// mute accepts connections and answers nothing.
func mute(t *testing.T) string {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var held []net.Conn // closed with the test, not by the garbage collector
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			held = append(held, c)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for _, c := range held {
			c.Close()
		}
	})
	return l.Addr().String()
}

// sickFor is how long a test keeps a pod sick: DWS_SICK, or else d.
func sickFor(t *testing.T, d time.Duration) time.Duration {
	t.Helper()
	if s := os.Getenv("DWS_SICK"); s != "" {
		var err error
		if d, err = time.ParseDuration(s); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// TestSickPeer: half of the events are for the sockets of a pod that is cut off in one way or another. The other half keeps
// its latency, measured in the same run before and during. The sick half comes later or is announced as a gap, and both
// ledgers balance on both pods. DWS_SICK is for how long it is sick.
func TestSickPeer(t *testing.T) {
	before, during := 4*time.Second, sickFor(t, 10*time.Second)
	for _, tc := range []struct {
		name    string
		late    bool // what is due to the sick half comes late or is announced
		rate    int
		during  time.Duration
		pending int // MAX_ACK_PENDING
		sicken  func(t *testing.T, peer, redis *rig.Proxy)
	}{
		// A share as small as eight pods have it by default.
		{"black hole", true, 2000, during, 4096, func(_ *testing.T, peer, _ *rig.Proxy) { peer.BlackHole() }},
		{"200 ms away", false, 2000, during, 4096, func(_ *testing.T, peer, _ *rig.Proxy) { peer.Latency(200 * time.Millisecond) }},
		{"accepts and never answers", true, 2000, during, 4096, func(t *testing.T, peer, _ *rig.Proxy) {
			peer.Retarget(mute(t))
			peer.Cut()
			peer.Restore()
		}},
		// For less than its lease: then it would send its clients away. Its share holds what waits for Redis until one lease later.
		{"cut off from Redis only", false, 1000, 3 * time.Second, 65536, func(_ *testing.T, _, redis *rig.Proxy) { redis.BlackHole() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			harness.NeedRealRedis(t)
			rate := tc.rate
			if harness.Race {
				rate = 300
			}
			w := harness.New(t, harness.Settings(fmt.Sprint("NATS_MAX_ACK_PENDING=", tc.pending), "NATS_NAK_DELAY=500ms", "PEER_BREAKER_OPEN=10s", "POD_LEASE=9s"))
			redis := w.Proxy(w.Redis.Address())
			well := w.Start()
			sick, peer := behindProxy(w, "REDIS_ADDRESS="+redis.Address())
			const desks = 20
			var clients []*harness.Client // even: on the well pod; odd: on the sick one
			for i := range 2 * desks {
				clients = append(clients, []*harness.Pod{well, sick}[i%2].Connect(harness.User("acme", fmt.Sprintf("desk%d", i), "ann").Positions()))
			}
			flow := w.Flow(rate, func(i int) feed.Event {
				return feed.Contact("acme", fmt.Sprintf("desk%d", i%(2*desks)), "c@us")
			})
			flow.WaitSent(int(before.Seconds() * float64(rate)))
			began := time.Now()
			tc.sicken(t, peer, redis)
			flow.WaitSent(int(tc.during.Seconds() * float64(rate)))
			ended := time.Now()
			peer.Latency(0)
			peer.Retarget(sick.GRPC)
			peer.Cut()
			peer.Restore()
			redis.Restore()
			flow.WaitSent(rate)
			sent := flow.Stop()
			w.Settled()
			for _, c := range clients { // a pong behind everything
				c.Send(map[string]any{"type": "ping"})
				c.TakeType("pong")
			}
			report := weigh(t, clients, sent)
			base, now := report.p99(began.Add(-before*3/4), began), report.p99(began, ended)
			t.Logf("%d events/s, %v sick; p99 of the other half %v before, %v during; of the sick half: %d delivered, %d of them after more than 1 s, %d announced; %d duplicates",
				rate, ended.Sub(began), base, now, report.delivered, report.late, report.announced, report.duplicates)
			var each []time.Duration
			for at := began; at.Before(ended); at = at.Add(time.Second) {
				each = append(each, report.p99(at, at.Add(time.Second)))
			}
			// A busy machine shows as tenths of a second; who waits for a sick peer waits for PEER_TIMEOUT, 5 s.
			if now > 10*max(base, 100*time.Millisecond) || slices.Max(each) > 2500*time.Millisecond {
				t.Errorf("p99 of the other half rose from %v to %v; second by second: %v", base, now, each)
			}
			if tc.late && report.late+report.announced == 0 {
				t.Error("nothing was late: the peer was not sick")
			}
			for _, p := range []*harness.Pod{well, sick} {
				p.WantLedgers()
			}
		})
	}
}

// weighed is what became of a flow's events.
type weighed struct {
	latency                                []time.Duration // of the well half, by at
	at                                     []time.Time     // when they were published
	delivered, late, announced, duplicates int             // of the sick half
}

func (r weighed) p99(from, to time.Time) time.Duration {
	var d []time.Duration
	for i, at := range r.at {
		if at.After(from) && at.Before(to) {
			d = append(d, r.latency[i])
		}
	}
	if len(d) == 0 {
		return -1
	}
	return percentile(d, 99)
}

// weigh holds what was sent against what came. Nothing may be missing that no gap announces; of the well half nothing at all.
func weigh(t *testing.T, clients []*harness.Client, sent []harness.Published) (r weighed) {
	t.Helper()
	came := make([]map[uint64]time.Time, len(clients))
	hole := make([]uint64, len(clients)) // the lowest since of a client's gaps
	for i, c := range clients {
		came[i] = map[uint64]time.Time{}
		hole[i] = ^uint64(0)
		for _, m := range c.Inbox() {
			switch m.Type {
			case "event":
				if _, again := came[i][m.Seq]; again {
					r.duplicates++
				} else {
					came[i][m.Seq] = m.At
				}
			case "gap":
				var g harness.Reply
				if json.Unmarshal(m.Payload, &g) == nil {
					hole[i] = min(hole[i], g.Since)
				}
			}
		}
		if c.Ended() != nil {
			t.Errorf("%s was closed: %+v", c.Dial.Agent, c.Ended())
		}
	}
	missing := 0
	for _, p := range sent {
		i := p.Index % len(clients)
		at, ok := came[i][p.Seq]
		took := at.Sub(p.At)
		switch {
		case ok && i%2 == 0:
			r.at, r.latency = append(r.at, p.At), append(r.latency, took)
		case ok:
			r.delivered++
			if took > time.Second {
				r.late++
			}
		case p.Seq > hole[i] && i%2 == 1:
			r.announced++
		default:
			if missing++; missing < 5 {
				t.Errorf("event %d for %s on %s is missing, and no gap says so", p.Seq, clients[i].Dial.Agent, clients[i].Pod.ID)
			}
		}
	}
	if missing > 0 {
		t.Errorf("%d of %d events are missing", missing, len(sent))
	}
	return r
}
