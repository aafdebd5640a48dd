package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// cluster is several pods' sessions, leases and peers, with a Redis and a network in memory, in a bubble.
type cluster struct {
	t    *testing.T
	v    *redisServer
	n    *peerPipes
	pods []*sessionPod
}

type sessionPod struct {
	*sessions
	c    *cluster
	kill func() // ends it as kill -9 does: its lease stays until it runs out
}

// clusters runs f in a bubble, with as many pods: a, b, c.
func clusters(t *testing.T, pods int, f func(t *testing.T, c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := &cluster{t: t, v: newRedisServer(t), n: newPeerPipes()}
		for i := range pods {
			c.n.listen(string(rune('a'+i)) + ":1")
		}
		for i := range pods {
			c.pods = append(c.pods, c.pod(string(rune('a'+i))))
		}
		for _, p := range c.pods {
			p.renewLease()
		}
		f(t, c)
	})
}

func (c *cluster) pod(id string) *sessionPod {
	c.t.Helper()
	peering := peerConfig()
	peering.SessionTTL, peering.SessionRefreshInterval = 30*time.Second, 10*time.Second
	cfg := &settings{}
	cfg.Store(peering)
	m, rdb := newMetrics(), c.v.client(c.t)
	l := newLease(cfg, rdb, m)
	l.pod = id
	if err := l.tryStart(c.t.Context(), func(context.Context) (string, error) { return id + ":1", nil }, nil); err != nil {
		c.t.Fatal(err)
	}
	peers := newPeers(cfg, m, l, newShare(cfg, m))
	c.n.on(peers)
	p := &sessionPod{sessions: newSessions(cfg, rdb, m, l, peers), c: c}
	peers.exclusive = p.sessions
	listener := c.n.hosts[id+":1"]
	ctx, cancel := context.WithCancel(c.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { peers.serve(listener) })
	wg.Go(func() { p.run(ctx) })
	wg.Go(func() {
		for pause(ctx, 2*time.Second) {
			p.renewLease()
		}
	})
	p.kill = sync.OnceFunc(func() {
		c.n.mu.Lock()
		delete(c.n.hosts, id+":1")
		c.n.mu.Unlock()
		cancel()
		done, cancel := context.WithCancel(context.Background())
		cancel()
		peers.stop(done)
		wg.Wait()
	})
	c.t.Cleanup(p.kill)
	return p
}

// renewLease is what beat does about sessions.
func (p *sessionPod) renewLease() {
	if r, err := p.lease.renew(p.c.t.Context(), nil, p.peers); err == nil && (r.overlooked || r.back) {
		p.reclaim(r.another)
	}
}

// acquire is what the server does for an upgrade.
func (p *sessionPod) acquire(key string) (*session, error) {
	sess, err := p.swap(key, "user")
	if err == nil {
		sess.await()
	}
	return sess, err
}

// testSocket is what conn is to a session: it releases as soon as it is told to close, if it does at all.
type testSocket struct {
	*session
	mu     sync.Mutex
	closed string
}

func (k *testSocket) state() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.closed
}

func bindTo(sess *session, releases bool) *testSocket {
	k := &testSocket{session: sess}
	sess.bind(func(code int, reason string) {
		k.mu.Lock()
		k.closed = fmt.Sprint(code, " ", reason)
		k.mu.Unlock()
		if releases {
			sess.release()
		}
	})
	return k
}

func (p *sessionPod) open(key string) *testSocket {
	p.c.t.Helper()
	sess, err := p.acquire(key)
	if err != nil {
		p.c.t.Fatalf("acquire %s: %v", key, err)
	}
	return bindTo(sess, true)
}

func wantState(t *testing.T, k *testSocket, want string) {
	t.Helper()
	if got := k.state(); got != want {
		t.Fatalf("socket %s is closed with %q, want %q", k.id, got, want)
	}
}

// value is what Redis has for a session.
func (c *cluster) value(key string) (value string) {
	c.v.change(func() { value = c.v.values[sessionKey(key)] })
	return value
}

func (c *cluster) set(key, value string) {
	c.v.change(func() { c.v.values[sessionKey(key)] = value })
}

func (c *cluster) wantHolder(key, socket string) {
	c.t.Helper()
	synctest.Wait()
	if value := c.value(key); parseHolder(value).socket != socket {
		c.t.Fatalf("session %s is %q, want it held by %q", key, value, socket)
	}
}

func wantTook(t *testing.T, start time.Time, least, most time.Duration) {
	t.Helper()
	if d := time.Since(start); d < least || d > most {
		t.Fatalf("took %v, want %v to %v", d, least, most)
	}
}

const (
	oneRound = 10*time.Second + 10*time.Millisecond // each session was renewed once
	atOnce   = 20 * time.Millisecond                // a call with a dial
)

func TestParseHolder(t *testing.T) {
	h := holder{member{"a", "e1"}, "S"}
	for value, want := range map[string]holder{h.String(): h, "": {}, "by hand": {}, "a#e1#S#7": {}, "a#e1": {}} {
		if got := parseHolder(value); got != want {
			t.Errorf("%q: %+v, want %+v", value, got, want)
		}
	}
}

func TestSessionNewcomerReplaces(t *testing.T) {
	for _, pods := range []int{1, 2} {
		t.Run(fmt.Sprint(pods, " pods"), func(t *testing.T) {
			clusters(t, pods, func(t *testing.T, c *cluster) {
				a, b := c.pods[0], c.pods[pods-1]
				first := a.open("c:a:u")
				c.wantHolder("c:a:u", first.id)
				start := time.Now()
				second := b.open("c:a:u")
				wantTook(t, start, 0, atOnce)
				wantState(t, first, "4402 session-replaced")
				c.wantHolder("c:a:u", second.id)
				second.release()
				second.release()
				c.wantHolder("c:a:u", "")
			})
		})
	}
}

func TestSessionReadyFollowsRelease(t *testing.T) {
	for _, pods := range []int{1, 2} {
		clusters(t, pods, func(t *testing.T, c *cluster) {
			sess, _ := c.pods[0].acquire("c:a:u")
			first := bindTo(sess, false)
			start := time.Now()
			time.AfterFunc(300*time.Millisecond, first.release)
			second := c.pods[pods-1].open("c:a:u")
			wantTook(t, start, 300*time.Millisecond, 300*time.Millisecond+atOnce)
			wantState(t, first, "4402 session-replaced")
			c.wantHolder("c:a:u", second.id)
		})
	}
}

// TestSessionChain: newcomers wait for each other. The one in the middle is told 4402, and the last one goes on only when the first
// socket is closed, although the client of the one in the middle has left.
func TestSessionChain(t *testing.T) {
	clusters(t, 3, func(t *testing.T, c *cluster) {
		sess, _ := c.pods[0].acquire("c:a:u")
		first := bindTo(sess, false)
		middle, err := c.pods[1].swap("c:a:u", "user")
		if err != nil {
			t.Fatal(err)
		}
		var last *testSocket
		start, ready := time.Now(), make(chan struct{})
		go func() {
			last = c.pods[2].open("c:a:u")
			close(ready)
		}()
		time.Sleep(100 * time.Millisecond)
		time.AfterFunc(300*time.Millisecond, first.release)
		middle.await()
		wantTook(t, start, 400*time.Millisecond, 400*time.Millisecond+atOnce)
		<-ready
		wantTook(t, start, 400*time.Millisecond, 400*time.Millisecond+atOnce)
		wantState(t, first, "4402 session-replaced")
		wantState(t, bindTo(middle, true), "4402 session-replaced")
		time.Sleep(oneRound)
		wantState(t, last, "")
		c.wantHolder("c:a:u", last.id)
	})
}

// TestSessionLastOfSeveralWins: of several newcomers on several pods the last that reached Redis lives, the others are told 4402, and
// nobody is live while another is.
func TestSessionLastOfSeveralWins(t *testing.T) {
	for seed := range uint64(30) {
		clusters(t, 3, func(t *testing.T, c *cluster) {
			random := rand.New(rand.NewPCG(seed, 0))
			var mu sync.Mutex
			soon := func(most int) time.Duration {
				mu.Lock()
				defer mu.Unlock()
				return time.Duration(random.IntN(most)) * time.Millisecond
			}
			old, _ := c.pods[0].acquire("c:a:u")
			first := bindTo(old, false)
			time.AfterFunc(soon(100), first.release)
			c.v.executed("")
			c.v.change(func() { c.v.before = func([]string) { time.Sleep(soon(5)) } })
			sockets := make([]*testSocket, 10)
			var wg sync.WaitGroup
			for i := range sockets {
				wg.Go(func() {
					time.Sleep(soon(30))
					sockets[i] = c.pods[i%3].open("c:a:u")
					if state, err := first.wait(t.Context(), swapping); state != released || err != nil {
						t.Errorf("a newcomer is live before the first has gone: %d, %v", state, err)
					}
				})
			}
			wg.Wait()
			time.Sleep(time.Second)
			swaps := c.v.executed("set session:")
			last := parseHolder(strings.Fields(swaps[len(swaps)-1])[2]).socket
			for _, k := range sockets {
				if k.id == last {
					wantState(t, k, "")
				} else {
					wantState(t, k, "4402 session-replaced")
				}
			}
			c.wantHolder("c:a:u", last)
		})
	}
}

func TestSessionReplacedBeforeBind(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		sess, err := c.pods[0].acquire("admin:root")
		if err != nil {
			t.Fatal(err)
		}
		second := c.pods[0].open("admin:root") // need not wait for the handshake of the first
		wantState(t, bindTo(sess, true), "4402 session-replaced")
		c.wantHolder("admin:root", second.id)
	})
}

// TestSessionOfASilentPod: the newcomer goes on after 1 s, and the loser learns at its next renewal.
func TestSessionOfASilentPod(t *testing.T) {
	clusters(t, 2, func(t *testing.T, c *cluster) {
		first := c.pods[0].open("c:a:u")
		c.pods[1].open("c:a:other")
		c.n.mute.Store(true)
		start := time.Now()
		second := c.pods[1].open("c:a:u")
		wantTook(t, start, sessionSilence, sessionSilence+atOnce)
		wantState(t, first, "")
		time.Sleep(oneRound + 9*time.Second) // it asks again after a lease
		wantState(t, first, "4402 session-lost")
		wantState(t, second, "")
		c.wantHolder("c:a:u", second.id)
	})
}

// TestSessionsOfASilentPod: thousands wait for the same second, who comes later does not wait, and an answer ends that.
func TestSessionsOfASilentPod(t *testing.T) {
	clusters(t, 2, func(t *testing.T, c *cluster) {
		const crowd = 500
		for i := range crowd + 20 {
			c.pods[0].open(fmt.Sprint("c:a:", i))
		}
		c.n.mute.Store(true)
		start := time.Now()
		var wg sync.WaitGroup
		for i := range crowd {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * 2 * time.Millisecond)
				c.pods[1].open(fmt.Sprint("c:a:", i))
			})
		}
		wg.Wait()
		wantTook(t, start, sessionSilence, sessionSilence+sessionGlance+atOnce)
		start = time.Now()
		c.pods[1].open(fmt.Sprint("c:a:", crowd))
		wantTook(t, start, sessionGlance, sessionGlance+atOnce)
		c.n.mute.Store(false)
		c.n.cut()
		c.pods[1].open(fmt.Sprint("c:a:", crowd+1))
		if n := len(c.pods[1].owing); n != 0 {
			t.Errorf("%d pods owe an answer", n)
		}
	})
}

func TestSessionOfADeadPodIsTakenAtOnce(t *testing.T) {
	for name, prepare := range map[string]func(c *cluster){
		"its lease has ended":  func(c *cluster) { c.pods[0].kill(); time.Sleep(7 * time.Second) },
		"it refuses the dial":  func(c *cluster) { c.pods[0].kill() },
		"it has another life":  func(c *cluster) { c.set("c:a:u", "a#before#GONE") },
		"this pod had it":      func(c *cluster) { c.set("c:a:u", "b#before#GONE") },
		"it has no such name":  func(c *cluster) { c.set("c:a:u", "by hand") },
		"it has let it go":     func(c *cluster) { c.set("c:a:u", "a#"+c.pods[0].lease.life()+"#GONE") },
		"it has, and all have": func(c *cluster) { c.pods[2].kill(); c.set("c:a:u", "a#"+c.pods[0].lease.life()+"#GONE") },
	} {
		t.Run(name, func(t *testing.T) {
			clusters(t, 3, func(t *testing.T, c *cluster) {
				c.pods[0].open("c:a:u")
				prepare(c)
				start := time.Now()
				second := c.pods[1].open("c:a:u")
				wantTook(t, start, 0, 2*atOnce)
				c.wantHolder("c:a:u", second.id)
			})
		})
	}
}

// TestSwapIsSentOnce: go-redis would hide that an answer was lost.
func TestSwapIsSentOnce(t *testing.T) {
	if !(once{}).NoRetry() {
		t.Error("a swap may be sent twice")
	}
}

// TestSwapUnanswered: the answer to a swap is lost. The socket before it lives on, and has its name put back; or the next newcomer closes
// it, which finds the name of a socket that does not exist.
func TestSwapUnanswered(t *testing.T) {
	for name, next := range map[string]bool{"a newcomer": true, "nobody": false} {
		t.Run(name, func(t *testing.T) {
			clusters(t, 3, func(t *testing.T, c *cluster) {
				first := c.pods[0].open("c:a:u")
				c.v.change(func() { c.v.lose = 1 })
				if _, err := c.pods[1].swap("c:a:u", "user"); !errors.Is(err, errUnavailable) {
					t.Fatalf("got %v, want errUnavailable", err)
				}
				if c.value("c:a:u") == holderText(first) {
					t.Fatal("the swap was not executed: the test misses its case")
				}
				if next {
					second := c.pods[2].open("c:a:u")
					wantState(t, first, "4402 session-replaced")
					c.wantHolder("c:a:u", second.id)
					return
				}
				time.Sleep(oneRound)
				wantState(t, first, "")
				c.wantHolder("c:a:u", first.id)
			})
		})
	}
}

// TestSwapUnansweredAndReplaced: the answer to a swap is lost, and a newcomer has asked for its socket before that is known.
func TestSwapUnansweredAndReplaced(t *testing.T) {
	clusters(t, 3, func(t *testing.T, c *cluster) {
		first := c.pods[0].open("c:a:u")
		silent := &session{key: "c:a:u", id: "UNHEARD", userType: "user", set: c.pods[1].sessions} // swap, as far as it has come
		c.pods[1].mu.Lock()
		c.pods[1].slotLocked(silent.id)[silent.id] = silent
		c.pods[1].mu.Unlock()
		c.set("c:a:u", c.pods[1].holderOf(silent).String())
		time.AfterFunc(300*time.Millisecond, func() { silent.leave(unheard) })
		second := c.pods[2].open("c:a:u")
		wantState(t, first, "4402 session-replaced")
		c.wantHolder("c:a:u", second.id)
	})
}

func holderText(k *testSocket) string { return k.set.holderOf(k.session).String() }

// TestGhostBehindANewcomer: while a newcomer waits, its name is swapped out by a ghost, and the socket before it puts its own back. That
// name stays when it is closed, so that the next newcomer asks for the one that has the session.
func TestGhostBehindANewcomer(t *testing.T) {
	clusters(t, 3, func(t *testing.T, c *cluster) {
		first := c.pods[0].open("c:a:u")
		middle, err := c.pods[1].swap("c:a:u", "user")
		if err != nil {
			t.Fatal(err)
		}
		c.set("c:a:u", "c#"+c.pods[2].lease.life()+"#GHOST")
		c.pods[0].reclaim(false)
		time.Sleep(100 * time.Millisecond)
		c.wantHolder("c:a:u", first.id)
		middle.await()
		second := bindTo(middle, true)
		wantState(t, first, "4402 session-replaced")
		c.wantHolder("c:a:u", first.id)
		third := c.pods[2].open("c:a:u")
		wantState(t, second, "4402 session-replaced")
		c.wantHolder("c:a:u", third.id)
	})
}

// TestLaterOneHidden: a newcomer that has asked everyone finds out at once that a later one lives.
func TestLaterOneHidden(t *testing.T) {
	clusters(t, 2, func(t *testing.T, c *cluster) {
		sess, err := c.pods[0].swap("c:a:u", "user")
		if err != nil {
			t.Fatal(err)
		}
		c.v.expire("session:c:a:u")
		second := c.pods[1].open("c:a:u")
		c.pods[0].mu.Lock()
		sess.old = "b#" + c.pods[1].lease.life() + "#GHOST"
		c.pods[0].mu.Unlock()
		sess.await()
		first := bindTo(sess, true)
		time.Sleep(100 * time.Millisecond)
		wantState(t, first, "4402 session-lost")
		wantState(t, second, "")
	})
}

// TestOwnValueSwapped: a swap that was sent twice after all finds its own value, and asks all pods for the socket before it.
func TestOwnValueSwapped(t *testing.T) {
	clusters(t, 3, func(t *testing.T, c *cluster) {
		first := c.pods[0].open("c:a:u")
		sess, err := c.pods[1].swap("c:a:u", "user")
		if err != nil {
			t.Fatal(err)
		}
		sess.old = c.value("c:a:u")
		sess.await()
		wantState(t, first, "4402 session-replaced")
		wantState(t, bindTo(sess, true), "")
	})
}

// TestCloseOthersLeavesTheLatest: who asks everyone late closes nobody that came after it.
func TestCloseOthersLeavesTheLatest(t *testing.T) {
	clusters(t, 2, func(t *testing.T, c *cluster) {
		a := c.pods[0]
		last := c.pods[1].open("c:a:u")
		if sure := a.closeBefore(&session{key: "c:a:u", id: "LATE", old: "a#" + a.lease.life() + "#GHOST", set: a.sessions}); sure {
			t.Error("there was a socket of that name")
		}
		wantState(t, last, "")
		c.wantHolder("c:a:u", last.id)
	})
}

func TestSessionUnavailable(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		c.v.change(func() { c.v.down = true })
		if _, err := c.pods[0].swap("c:a:u", "user"); !errors.Is(err, errUnavailable) {
			t.Fatalf("got %v, want errUnavailable", err)
		}
		time.Sleep(10 * time.Second)
		if _, err := c.pods[0].swap("c:a:u", "user"); !errors.Is(err, errUnavailable) {
			t.Fatalf("without a lease: %v, want errUnavailable", err)
		}
		if n := len(c.pods[0].list(func(*session) bool { return true })); n != 0 {
			t.Errorf("%d sessions left behind", n)
		}
	})
}

// TestSessionRevoked: whoever has the session, and wherever it was asked for.
func TestSessionRevoked(t *testing.T) {
	clusters(t, 3, func(t *testing.T, c *cluster) {
		revoke := func(p *sessionPod, key string, want bool) {
			t.Helper()
			if found, err := p.revoke(t.Context(), key); found != want || err != nil {
				t.Errorf("%s: found %t, %v", key, found, err)
			}
		}
		for _, p := range c.pods[:2] {
			first := c.pods[0].open("c:a:u")
			revoke(p, "c:a:u", true)
			wantState(t, first, "4403 revoked")
			c.wantHolder("c:a:u", "")
			revoke(p, "c:a:u", false)
		}
		first := c.pods[0].open("c:a:u")
		c.set("c:a:u", "a#"+c.pods[0].lease.life()+"#GONE")
		revoke(c.pods[1], "c:a:u", true) // behind a ghost
		wantState(t, first, "4403 revoked")
		c.set("c:a:u", "a#"+c.pods[0].lease.life()+"#GONE")
		revoke(c.pods[1], "c:a:u", false)
		c.set("c:a:v", "nopod#e1#GONE")
		revoke(c.pods[1], "c:a:v", true)
		c.wantHolder("c:a:v", "")
		c.pods[2].open("c:a:w")
		c.n.mute.Store(true)
		if found, err := c.pods[1].revoke(t.Context(), "c:a:w"); !found || !errors.Is(err, errUnavailable) {
			t.Errorf("of a silent pod: %t, %v", found, err)
		}
		c.v.change(func() { c.v.down = true })
		if _, err := c.pods[1].revoke(t.Context(), "c:a:w"); !errors.Is(err, errUnavailable) {
			t.Errorf("without Redis: %v", err)
		}
	})
}

// TestRenewalFindsAnother: a renewal that finds another's name asks that one's pod. The name of a socket that exists closes this one's;
// any other is replaced by its own. A pod that does not answer is asked again when its lease has ended, if it was killed.
func TestRenewalFindsAnother(t *testing.T) {
	life := func(c *cluster, i int) string { return c.pods[i].lease.life() }
	for name, tc := range map[string]struct {
		value func(c *cluster) string
		want  string
	}{
		"a living socket of another user":     {func(c *cluster) string { return holderText(c.pods[1].open("c:a:v")) }, ""},
		"no such socket":                      {func(c *cluster) string { return "b#" + life(c, 1) + "#GONE" }, ""},
		"no such socket here":                 {func(c *cluster) string { return "a#" + life(c, 0) + "#GONE" }, ""},
		"a dead pod":                          {func(c *cluster) string { return "z#e1#GONE" }, ""},
		"a former life":                       {func(c *cluster) string { return "b#before#GONE" }, ""},
		"not of this service":                 {func(c *cluster) string { return "by hand" }, ""},
		"nothing":                             {func(c *cluster) string { c.v.expire("session:c:a:u"); return "" }, ""},
		"a pod that was killed and is leased": {func(c *cluster) string { c.pods[1].kill(); return "b#" + life(c, 1) + "#GONE" }, ""},
		"a pod that says nothing":             {func(c *cluster) string { c.n.mute.Store(true); return "b#" + life(c, 1) + "#GONE" }, "4402 session-lost"},
	} {
		t.Run(name, func(t *testing.T) {
			clusters(t, 2, func(t *testing.T, c *cluster) {
				first := c.pods[0].open("c:a:u")
				c.set("c:a:u", tc.value(c))
				if strings.HasPrefix(name, "a pod") {
					c.pods[0].reclaim(false)
				}
				time.Sleep(2 * oneRound)
				wantState(t, first, tc.want)
				if tc.want == "" {
					c.wantHolder("c:a:u", first.id)
				}
			})
		})
	}
}

// TestTwoAfterLoss: Redis has lost a swap, so two sockets of one session live. One is closed, so that its client may come back: it may be
// the newer one.
func TestTwoAfterLoss(t *testing.T) {
	for code, lost := range map[string]bool{"1013 session-lost": true, "4402 session-lost": false} {
		clusters(t, 2, func(t *testing.T, c *cluster) {
			first := c.pods[0].open("c:a:u")
			c.v.expire("session:c:a:u")
			second := c.pods[1].open("c:a:u")
			if lost {
				c.v.change(func() { c.v.runID = "run-2" })
				c.pods[0].renewLease()
			}
			time.Sleep(oneRound)
			wantState(t, first, code)
			wantState(t, second, "")
			c.wantHolder("c:a:u", second.id)
		})
	}
}

func TestSessionsRedisAwayAndBack(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		a := c.pods[0]
		var sockets []*testSocket
		for i := range 300 {
			sockets = append(sockets, a.open(fmt.Sprint("c:a:", i)))
		}
		c.v.change(func() { c.v.down = true })
		sockets[0].release()
		time.Sleep(20 * time.Second)
		c.v.restart()
		c.v.change(func() { c.v.down = false })
		c.set("c:a:0", holderText(sockets[0]))
		time.Sleep(2*time.Second + 10*time.Millisecond)
		c.wantHolder("c:a:0", "")
		for _, k := range sockets[1:] {
			wantState(t, k, "")
			c.wantHolder(k.key, k.id)
		}
	})
}

// Without a reclaim, too, all sessions come back with the first slot that gets an answer.
func TestSessionsReclaimThemselves(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		for i := range 1000 {
			c.pods[0].open(fmt.Sprint("c:a:", i))
		}
		time.Sleep(2100 * time.Millisecond) // between two renewals of the lease
		c.v.change(func() { c.v.down = true })
		time.Sleep(time.Second)
		c.v.restart()
		c.v.change(func() { c.v.down = false })
		time.Sleep(oneRound / sessionSlots)
		synctest.Wait()
		n := 0
		c.v.change(func() { n = len(c.v.values) })
		if n < 1000 {
			t.Fatalf("%d sessions, want 1000", n)
		}
	})
}

func TestSessionReleaseIsForgottenAfterTTL(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		first := c.pods[0].open("c:a:u")
		c.v.change(func() { c.v.down = true })
		first.release()
		time.Sleep(31 * time.Second)
		c.pods[0].mu.Lock()
		defer c.pods[0].mu.Unlock()
		if n := len(c.pods[0].drops); n != 0 {
			t.Fatalf("%d releases remembered, want none: the key has expired", n)
		}
	})
}

// TestSessionMovesToNewLife: also one whose swap was under way while the pod took the new life.
func TestSessionMovesToNewLife(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		a := c.pods[0]
		first := a.open("c:a:u")
		late, err := a.swap("c:a:v", "user")
		if err != nil {
			t.Fatal(err)
		}
		before := a.lease.life()
		c.v.expire(podKey("a"))
		a.renewLease()
		if a.lease.life() == before {
			t.Fatal("no new life: the test misses its case")
		}
		synctest.Wait()
		if got, want := c.value("c:a:u"), holderText(first); got != want {
			t.Fatalf("session is %q, want %q", got, want)
		}
		late.await()
		synctest.Wait()
		if got, want := c.value("c:a:v"), a.holderOf(late).String(); got != want {
			t.Fatalf("session is %q, want %q", got, want)
		}
	})
}

// Renewals of sockets that came all at once are spread over the interval, one command each.
func TestSessionRenewalsAreSpread(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		const n = 1600
		for i := range n {
			c.pods[0].open(fmt.Sprint("c:a:", i))
		}
		c.pods[0].reclaim(false)
		synctest.Wait()
		c.v.executed("")
		most, all, renewed := 0, 0, map[string]bool{}
		for range sessionSlots + 1 {
			time.Sleep(10 * time.Second / sessionSlots)
			cmds := c.v.executed("getex")
			most, all = max(most, len(cmds)), all+len(cmds)
			for _, cmd := range cmds {
				renewed[cmd] = true
			}
		}
		if len(renewed) != n || all > n+60 || most > 75 {
			t.Fatalf("%d commands renewed %d sessions, at most %d at once; want %d (and one slot), %d, 75", all, len(renewed), most, n, n)
		}
	})
}

// After the release of a session was sent, nothing about its key is: whatever renewals and sweeps run.
func TestSessionRenewalNeverFollowsRelease(t *testing.T) {
	clusters(t, 1, func(t *testing.T, c *cluster) {
		random := rand.New(rand.NewPCG(1, 2))
		var mu sync.Mutex
		var sockets []*testSocket
		for i := range 300 {
			sockets = append(sockets, c.pods[0].open(fmt.Sprint("c:a:", i)))
		}
		c.v.executed("")
		c.v.change(func() {
			c.v.before = func([]string) {
				mu.Lock()
				d := time.Duration(random.IntN(5)) * time.Millisecond / 8
				mu.Unlock()
				time.Sleep(d)
			}
		})
		for i, k := range sockets {
			time.AfterFunc(time.Duration(i)*7*time.Millisecond, k.release)
			if i%20 == 0 {
				time.AfterFunc(time.Duration(i)*7*time.Millisecond, func() { c.pods[0].reclaim(false) })
			}
		}
		time.Sleep(20 * time.Second)
		dropped := map[string]bool{}
		for _, cmd := range c.v.executed("") {
			words := strings.Fields(cmd)
			if !strings.HasPrefix(words[1], "session:") {
				continue
			}
			if words[0] != "drop" && dropped[words[1]] {
				t.Fatalf("%q was sent after the release", cmd)
			}
			dropped[words[1]] = dropped[words[1]] || words[0] == "drop"
		}
		if len(dropped) != len(sockets) {
			t.Fatalf("%d of %d released", len(dropped), len(sockets))
		}
	})
}

// The releases that a drain has queued are sent before run ends.
func TestSessionReleasesBeforeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, nil)
		s := w.beat.sessions
		for i := range 300 {
			sess, err := s.swap(fmt.Sprint("c:a:", i), "user")
			if err != nil {
				t.Fatal(err)
			}
			sess.await()
			sess.release()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s.run(ctx)
		if slices.ContainsFunc(w.v.keys(), func(k string) bool { return strings.HasPrefix(k, "session:") }) {
			t.Fatalf("sessions left: %v", w.v.keys())
		}
	})
}
