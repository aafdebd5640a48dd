package e2e

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// percentile returns the p-th percentile of d, which it sorts.
func percentile(d []time.Duration, p float64) time.Duration {
	slices.Sort(d)
	return d[min(len(d)-1, int(float64(len(d))*p/100))]
}

// waitNoKey waits until Redis has no such key.
func waitNoKey(w *harness.World, rdb *redis.Client, key string) {
	w.T.Helper()
	harness.Eventually(w.T, harness.Patience, key+" to expire", func() bool {
		n, err := rdb.Exists(w.T.Context(), key).Result()
		return err == nil && n == 0
	})
}

// wantHolder compares the socket named in the session's key with c's.
func wantHolder(rdb *redis.Client, session string, c *harness.Client) {
	t := c.Pod.W.T
	t.Helper()
	value, err := rdb.Get(t.Context(), "session:"+session).Result()
	if err != nil || !strings.HasPrefix(value, c.Pod.ID+"#") || !strings.HasSuffix(value, "#"+c.Ready.SessionID) {
		t.Errorf("session %s is %q (%v), want the socket %s of %s", session, value, err, c.Ready.SessionID, c.Pod.ID)
	}
}

// TestSecondTabOnAnotherPod: each newcomer closes the socket before it on the other pod with 4402, and is ready only when
// that one has lost its session: what is published from then on comes to the newcomer alone.
func TestSecondTabOnAnotherPod(t *testing.T) {
	t.Parallel()
	const rounds = 50
	w := harness.New(t, harness.Settings(calm))
	pods := startPods(w, 2)
	rdb := w.RedisClient()
	// The pods know each other before the first round: while the first stream between them is dialled, what waits for it may find
	// that its socket has come back meanwhile, as another.
	witnesses := []*harness.Client{pods[0].Connect(harness.User("acme", "desk9", "ann")), pods[1].Connect(harness.User("acme", "desk9", "bob"))}
	for forwarded(pods[0]) == 0 || forwarded(pods[1]) == 0 {
		seq := w.Chat("acme", "desk9")
		for _, c := range witnesses {
			c.WantEvent(seq)
		}
	}
	for who, d := range map[string]harness.Dial{"acme:desk1:ann": harness.User("acme", "desk1", "ann"), "admin:root": harness.Admin("root", "acme", "")} {
		t.Run(who, func(t *testing.T) {
			publish := func() uint64 { return w.Chat("acme", "desk1") }
			if d.Admin != "" {
				publish = func() uint64 { return w.Agent("acme", "desk1") }
			}
			var took []time.Duration
			old := pods[0].Connect(d)
			for i := range rounds {
				d.Gorilla = i%2 == 0
				began := time.Now()
				c := pods[(i+1)%2].Connect(d)
				took = append(took, time.Since(began))
				seq := publish()
				c.WantEvent(seq)
				old.WantClose(4402, "session-replaced")
				if got := counts(old); got[seq] != 0 {
					t.Fatalf("round %d: event %d, published after the newcomer's ready, came to the replaced socket", i, seq)
				}
				wantHolder(rdb, who, c)
				old = c
			}
			w.Settled()
			wantExactly(old, nil)
			t.Logf("newcomer ready after: p50 %v, p99 %v", percentile(took, 50), percentile(took, 99))
		})
	}
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestThreePodsFight: newcomers on three pods at the same time: one stays, and only one; the others are told 4402.
func TestThreePodsFight(t *testing.T) {
	t.Parallel()
	const rounds = 25
	w := harness.New(t, harness.Settings(calm))
	pods := startPods(w, 3)
	rdb := w.RedisClient()
	var stays *harness.Client
	for i := range rounds {
		fighters := make([]*harness.Client, 10)
		var wg sync.WaitGroup
		for n := range fighters {
			wg.Go(func() {
				d := harness.User("acme", "desk1", "ann")
				d.Gorilla = n%2 == 0
				d.Token = harness.UserToken(t, "acme", "desk1", "ann", time.Hour)
				c, _, err := pods[n%3].TryDial(t.Context(), d)
				if err != nil {
					t.Errorf("round %d: %v", i, err)
				}
				fighters[n] = c
			})
		}
		wg.Wait()
		if t.Failed() {
			return
		}
		if stays != nil {
			fighters = append(fighters, stays)
		}
		open := func() (left []*harness.Client) {
			for _, c := range fighters {
				if c.Ended() == nil {
					left = append(left, c)
				}
			}
			return left
		}
		harness.Eventually(t, harness.Patience, "one of the sockets to be left", func() bool { return len(open()) == 1 })
		last := open()[0]
		if last != stays {
			last.WantReady()
		}
		stays = last
		wantHolder(rdb, "acme:desk1:ann", stays)
		stays.WantEvent(w.Chat("acme", "desk1"))
		for _, c := range fighters {
			if c != stays {
				c.WantClose(4402, "session-replaced")
				if n := len(c.Events()); n != 0 && i > 0 {
					t.Errorf("round %d: %d events came to a socket that lost", i, n)
				}
			}
		}
	}
	w.Settled()
	wantExactly(stays, nil)
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestTakeOverFromAKilledPod: the session of a pod that was killed is free at once, since nobody answers at its address, or its lease
// has ended; with the default lease and with a short one.
func TestTakeOverFromAKilledPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, tc := range []struct {
		name     string
		settings []string
		expired  bool
	}{
		{"before the lease has ended", nil, false},
		{"after the lease has ended", nil, true},
		{"after a short lease has ended", []string{"POD_LEASE=1s"}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t)
			pods := startPods(w, 2, tc.settings...)
			rdb := w.RedisClient()
			old := pods[0].Connect(harness.User("acme", "desk1", "ann"))
			wantHolder(rdb, "acme:desk1:ann", old)
			pods[0].Kill()
			if tc.expired {
				waitNoKey(w, rdb, "pod:"+pods[0].ID)
			}
			began := time.Now()
			c := pods[1].Connect(harness.User("acme", "desk1", "ann"))
			took := time.Since(began)
			if took > 900*time.Millisecond {
				t.Errorf("ready after %v, want no wait for an answer", took)
			}
			t.Logf("ready after %v", took)
			wantHolder(rdb, "acme:desk1:ann", c)
			c.WaitEvent(w.Chat("acme", "desk1"))
		})
	}
}

// TestManyFromASilentPod: the sessions of a pod that was killed, or suspended, and has its lease still. Of a suspended one the first
// newcomer waits for 1 s; those who come later to the same pod do not. A pod that goes on closes the sockets that were taken over:
// within an interval if its lease holds, at once if that has ended.
func TestManyFromASilentPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const (
		lease    = 10 * time.Second
		interval = 2 * time.Second
		later    = 20
	)
	for _, tc := range []struct {
		name     string
		suspends bool
		expired  bool // before it goes on
	}{
		{"killed", false, false}, {"suspended for less than its lease", true, false}, {"suspended for longer", true, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("POD_LEASE="+lease.String(), "SESSION_REFRESH_INTERVAL="+interval.String()))
			pods := startPods(w, 2)
			silent, well := pods[0], pods[1]
			rdb := w.RedisClient()
			who := func(i int) harness.Dial { return harness.User("acme", fmt.Sprint("desk", i), "ann") }
			var old, taken []*harness.Client
			for i := range later + 1 {
				old = append(old, silent.Connect(who(i)))
			}
			stays := silent.Connect(harness.User("acme", "desk0", "bob"))
			if tc.suspends {
				silent.Signal(syscall.SIGSTOP)
				waitStopped(t, silent.Process)
			} else {
				silent.Kill()
			}
			var ready []time.Time
			began := time.Now()
			for i := range later + 1 {
				taken = append(taken, well.Connect(who(i)))
				ready = append(ready, time.Now())
			}
			first, others := ready[0].Sub(began), ready[later].Sub(ready[0])
			if tc.suspends && first < 900*time.Millisecond || first > 4*time.Second || others > later*time.Second/4 {
				t.Errorf("the first is ready after %v, the other %d after %v more", first, later, others)
			}
			t.Logf("the first is ready after %v, the other %d after %v more", first, later, others)
			if n, err := rdb.Exists(t.Context(), "pod:"+silent.ID).Result(); n != 1 || err != nil {
				t.Fatalf("the lease has ended (%v): the test misses its case", err)
			}
			var due []uint64 // some are pulled by the suspended pod, and come when it goes on
			for i, c := range taken {
				wantHolder(rdb, fmt.Sprintf("acme:desk%d:ann", i), c)
				due = append(due, w.Chat("acme", fmt.Sprint("desk", i)))
			}
			wantEvents := func() {
				t.Helper()
				for i, c := range taken {
					c.WaitEvent(due[i])
					wantHolder(rdb, fmt.Sprintf("acme:desk%d:ann", i), c)
				}
			}
			if !tc.suspends {
				wantEvents()
				return
			}
			if tc.expired {
				waitNoKey(w, rdb, "pod:"+silent.ID)
			}
			silent.Signal(syscall.SIGCONT)
			goesOn := time.Now()
			for _, c := range old {
				c.WantClose(4402, "session-*")
			}
			if took := time.Since(goesOn); took > interval+5*time.Second {
				t.Errorf("the sockets that were taken over are closed %v after their pod went on", took)
			} else {
				t.Logf("the sockets that were taken over are closed %v after their pod went on", took)
			}
			wantEvents()
			stays.WaitEvent(w.Chat("acme", "desk0"))
			w.Settled()
			wantHolder(rdb, "acme:desk0:bob", stays)
			for _, p := range pods {
				p.WantLedgers()
			}
		})
	}
}

// TestDeafPod: the calls of other pods do not reach the one that has the session. The newcomer goes on after 1 s, and the socket
// before it is closed at its next renewal.
func TestDeafPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const interval = time.Second
	w := harness.New(t, harness.Settings("SESSION_REFRESH_INTERVAL="+interval.String(), "SESSION_TTL=4s"))
	deaf, proxy := behindProxy(w)
	well := w.Start()
	rdb := w.RedisClient()
	old := deaf.Connect(harness.User("acme", "desk1", "ann"))
	proxy.BlackHole()
	began := time.Now()
	c := well.Connect(harness.User("acme", "desk1", "ann"))
	if took := time.Since(began); took < 900*time.Millisecond || took > 4*time.Second {
		t.Errorf("ready after %v, want a silence of 1 s before", took)
	}
	wantHolder(rdb, "acme:desk1:ann", c)
	old.WantClose(4402, "session-lost")
	if took := time.Since(began); took > 4*time.Second+interval {
		t.Errorf("the socket that lost its session was closed %v after the newcomer came", took)
	}
	proxy.Restore()
	w.Settled()
	c.WaitEvent(w.Chat("acme", "desk1"))
	wantHolder(rdb, "acme:desk1:ann", c)
	for _, p := range []*harness.Pod{deaf, well} {
		p.WantLedgers()
	}
}

// TestRevokeOnADeafPod: a session can't be revoked while its pod does not answer, and can when it does.
func TestRevokeOnADeafPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t)
	deaf, proxy := behindProxy(w)
	well := w.Start()
	ann := deaf.Connect(harness.User("acme", "desk1", "ann"))
	revoke := func() int {
		return well.Do("DELETE", "/admin/sessions/acme/desk1/ann", adminHeader, nil).StatusCode
	}
	proxy.BlackHole()
	if status := revoke(); status != 503 {
		t.Errorf("revoked on a deaf pod: %d, want 503", status)
	}
	proxy.Restore()
	if status := revoke(); status != 200 {
		t.Errorf("revoked: %d, want 200", status)
	}
	ann.WantClose(4403, "revoked")
	if status := revoke(); status != 404 {
		t.Errorf("revoked again: %d, want 404", status)
	}
}

// TestSuspendedPod: a pod is suspended under load for longer than its lease and the life of its sessions. A newcomer takes
// its session over elsewhere after 1 s. Awake again, the pod takes a new life: it claims its routes again, closes the socket
// that was taken over, and tells the one that nobody took over of a gap, whose resume brings what went past it.
func TestSuspendedPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, tc := range []struct {
		name    string
		latency time.Duration // of Redis: when it is far away, a read is always under way
		late    bool          // what Redis has sent arrives after the pod is awake
	}{
		{"Redis near", 0, false}, {"Redis far and late", 25 * time.Millisecond, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			const interval = time.Second
			w := harness.New(t, harness.Settings("POD_LEASE=2s", "SESSION_TTL=4s", "SESSION_REFRESH_INTERVAL="+interval.String(), "RESUME_MAX_EVENTS=100000"))
			redisProxy := w.Proxy(w.Redis.Address())
			redisProxy.Latency(tc.latency)
			pods := []*harness.Pod{w.Start("REDIS_ADDRESS=" + redisProxy.Address()), w.Start()}
			rdb := w.RedisClient()
			ann := pods[0].Connect(harness.User("acme", "desk1", "ann"))
			dan := pods[0].Connect(harness.User("acme", "desk2", "dan").Positions())
			flow := w.Flow(150, func(i int) feed.Event {
				return feed.Contact("acme", fmt.Sprintf("desk%d", 1+i%2), "c@us")
			})
			harness.Eventually(t, harness.Patience, "events to flow", func() bool { return len(ann.Events()) > 50 && len(dan.Events()) > 50 })
			pods[0].Signal(syscall.SIGSTOP)
			waitStopped(t, pods[0].Process)
			if tc.late {
				redisProxy.BlackHole()
			}
			began := time.Now()
			ann2 := pods[1].Connect(harness.User("acme", "desk1", "ann").Positions())
			if took := time.Since(began); took < 900*time.Millisecond || took > 4*time.Second {
				t.Errorf("the newcomer is ready after %v", took)
			}
			wantHolder(rdb, "acme:desk1:ann", ann2)
			taken := time.Now()
			waitNoKey(w, rdb, "pod:"+pods[0].ID)
			waitNoKey(w, rdb, "session:acme:desk2:dan")
			flow.WaitSent(100)
			pods[0].Signal(syscall.SIGCONT)
			if tc.late {
				time.AfterFunc(100*time.Millisecond, redisProxy.Restore)
			}
			goesOn := time.Now()
			dan.WantGap("owner")
			if why := noOwner(t.Context(), rdb, dan); why != "" {
				t.Errorf("the gap came before everything was claimed again: %s", why)
			}
			ann.WantClose(4402, "session-*")
			if took := time.Since(goesOn); took > interval+5*time.Second {
				t.Errorf("the socket that was taken over was closed %v after its pod went on", took)
			}
			if r := dan.ResumeMissed(); r.Gap {
				t.Errorf("the socket that missed events can't resume: %+v", r)
			}
			wantHolder(rdb, "acme:desk1:ann", ann2)
			flow.WaitSent(100)
			sent := flow.Stop()
			w.Settled()
			var anns, dans []uint64
			for _, p := range sent {
				switch {
				case p.Subject == "acme.desk2.contacts":
					dans = append(dans, p.Seq)
				case p.At.After(taken):
					anns = append(anns, p.Seq)
				}
			}
			wantAllAfterResume(ann2, anns)
			wantAllAfterResume(dan, dans)
			if dan.Ended() != nil {
				t.Errorf("a socket whose session nobody took was closed: %+v", dan.Ended())
			}
			wantHolder(rdb, "acme:desk2:dan", dan)
			for _, p := range pods {
				p.WantLedgers()
			}
		})
	}
}

// waitStopped waits until the kernel says that the process stands still.
func waitStopped(t *testing.T, p *rig.Process) {
	t.Helper()
	harness.Eventually(t, harness.Patience, p.Name+" to stand still", p.Stopped)
}

// TestClaimsOfADeadPod: what a killed pod had claimed is nobody's within its lease and 2 s, and readers remove it from Redis.
func TestClaimsOfADeadPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const lease = 3 * time.Second
	w := harness.New(t, harness.Settings("POD_LEASE="+lease.String(), shortDelays))
	pods := startPods(w, 3)
	rdb := w.RedisClient()
	dead, alive := pods[0], pods[1:]
	ann, bob := dead.Connect(harness.User("acme", "desk1", "ann")), alive[0].Connect(harness.User("acme", "desk1", "bob"))
	ann.SelectChat("c1")
	dead.Connect(harness.User("acme", "desk2", "cid"))
	dead.Connect(harness.Admin("root", "acme", ""))
	var first []uint64
	for range 30 { // the others learn of the owner
		w.Message("acme", "desk1", "c1")
		w.Chat("acme", "desk2")
		w.Agent("acme", "desk1")
		first = append(first, w.Chat("acme", "desk1"))
	}
	w.Settled()
	dead.Kill()
	killed := time.Now()
	outcome := func(kind, outcome string) (n float64) {
		for _, p := range alive {
			n += p.Metric("dws_events_total", `kind="`+kind+`"`, `outcome="`+outcome+`"`)
		}
		return n
	}
	var due []uint64
	last, slowest := killed, time.Duration(0) // of the looks below
	harness.Eventually(t, harness.Patience, "the claims of a dead pod not to be believed", func() bool {
		slowest, last = max(slowest, time.Since(last)), time.Now()
		w.Message("acme", "desk1", "c1")
		w.Chat("acme", "desk2")
		w.Agent("acme", "desk1")
		if len(due) < 100 { // they fail for the dead owner's sake, and come again to the other: it remembers 256
			due = append(due, w.Chat("acme", "desk1"))
		}
		return outcome("message", "unselected") > 0 && outcome("agent", "unselected") > 0 && outcome("chat", "nak_no_owner") > 0
	})
	if took := time.Since(killed); took > lease+2*time.Second+2*slowest { // the machine may stand still for a while
		t.Errorf("the claims of the dead pod were ignored only %v after its end, its lease was %v", took, lease)
	}
	// Of what it had claimed nothing is left, but for what nobody has read since.
	wantMembers := func(key string, want ...string) {
		t.Helper()
		var got []string
		defer func() {
			if t.Failed() {
				t.Logf("%s holds %v, want those of %v", key, got, want)
			}
		}()
		harness.Eventually(t, harness.Patience, "the members of "+key, func() bool {
			got, _ = rdb.SMembers(t.Context(), key).Result()
			slices.Sort(got)
			return slices.EqualFunc(got, want, func(member, pod string) bool { return member == pod || strings.HasPrefix(member, pod+"#") })
		})
	}
	wantMembers("route:acme:desk1", bob.Pod.ID)
	wantMembers("route:acme:desk2")
	wantMembers("route:admins")
	wantMembers("pods", alive[0].ID, alive[1].ID)
	w.SettledTo(due[len(due)-1])
	w.Settled()
	wantExactly(bob, append(first, due...))
	for _, p := range alive {
		p.WantLedgers()
	}
}

// TestNextLifeOfAPod: a pod is killed and comes back under its id. Of the users who were on it one comes back: the other's agent
// has no claim of its former life any more, and the colleague on another pod gets each event without a delay.
func TestNextLifeOfAPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings("POD_LEASE=3s"))
	other, first := w.Start(), w.Start("SERVER_POD_ID=blue")
	bob := other.Connect(harness.User("acme", "desk1", "bob"))
	first.Connect(harness.User("acme", "desk1", "ann"))
	first.Connect(harness.User("acme", "desk2", "eve"))
	var due []uint64
	for range 10 {
		due = append(due, w.Chat("acme", "desk1"))
		w.Chat("acme", "desk2")
	}
	w.Settled()
	first.Kill()
	second := w.Start("SERVER_POD_ID=blue")
	eve := second.Connect(harness.User("acme", "desk2", "eve"))
	var hers []uint64
	for range 20 { // the other pod looks desk2 up, and so hears of the new lease, before its own next renewal
		hers = append(hers, w.Chat("acme", "desk2"))
	}
	harness.Eventually(t, harness.Patience, "the first events for the new life", func() bool { return len(counts(eve)) == len(hers) })
	// One renewal later no event may fail for the sake of the old life.
	failures := func() float64 { return ended(other, "nak_failed") + ended(second, "nak_failed") }
	harness.Eventually(t, harness.Patience, "events that do not fail", func() bool {
		before := failures()
		for range 10 {
			due = append(due, w.Chat("acme", "desk1"))
		}
		for _, seq := range due[len(due)-10:] {
			harness.Eventually(t, harness.Patience, "bob's events", func() bool { return counts(bob)[seq] > 0 })
		}
		return failures() == before
	})
	w.Settled()
	wantExactly(bob, due)
	wantExactly(eve, hers)
	for _, p := range []*harness.Pod{other, second} {
		p.WantLedgers()
		if n := ended(p, "expired") + ended(p, "shed"); n != 0 {
			t.Errorf("%s gave %v events up", p.ID, n)
		}
	}
}
