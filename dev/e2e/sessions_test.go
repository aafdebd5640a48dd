package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/harness"
)

// lockOf is the Redis key of a Dial's session.
func lockOf(d harness.Dial) string {
	if d.Admin != "" {
		return "session:admin:" + d.Admin
	}
	return "session:" + d.Company + ":" + d.Agent + ":" + d.User
}

// wantLock expects that the session's lock in Redis names the socket of c, and that it will expire by itself.
func wantLock(t *testing.T, rdb *redis.Client, c *harness.Client) {
	t.Helper()
	value, err := rdb.Get(t.Context(), lockOf(c.Dial)).Result()
	if err != nil || !strings.Contains(value, c.Ready.SessionID) || !strings.Contains(value, c.Pod.ID) {
		t.Fatalf("lock %s is %q, %v; want it to name socket %s", lockOf(c.Dial), value, err, c.Ready.SessionID)
	}
	if ttl, err := rdb.PTTL(t.Context(), lockOf(c.Dial)).Result(); err != nil || ttl <= 0 || ttl > 30*time.Second {
		t.Fatalf("lock %s lives %v, %v", lockOf(c.Dial), ttl, err)
	}
}

// wantNoLock waits until the session's lock is gone.
func wantNoLock(t *testing.T, rdb *redis.Client, d harness.Dial) {
	t.Helper()
	harness.Eventually(t, 5*time.Second, lockOf(d)+" to go", func() bool { // well before its TTL
		n, err := rdb.Exists(t.Context(), lockOf(d)).Result()
		return err == nil && n == 0
	})
}

// sessionCases are a user and an admin, with an event that each gets.
func sessionCases() map[string]struct {
	dial    harness.Dial
	publish func(*harness.World) uint64
} {
	return map[string]struct {
		dial    harness.Dial
		publish func(*harness.World) uint64
	}{
		"user":  {harness.User("acme", "desk1", "ann"), func(w *harness.World) uint64 { return w.Chat("acme", "desk1") }},
		"admin": {harness.Admin("root", "acme", ""), func(w *harness.World) uint64 { return w.Agent("acme", "desk1") }},
	}
}

// TestSecondTab: a newcomer closes the socket before it and is ready only when that one has given the session up; what is
// published from then on is the newcomer's alone. 50 times, each tab of the other library than the one before.
func TestSecondTab(t *testing.T) {
	t.Parallel()
	for name, tc := range sessionCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t)
			pod := w.Start()
			rdb := w.RedisClient()
			const rounds = 50
			first := pod.Connect(tc.dial)
			for i := range rounds {
				wantLock(t, rdb, first)
				d := tc.dial
				d.Gorilla = i%2 == 0
				second := pod.Connect(d)
				wantLock(t, rdb, second)
				seq := tc.publish(w)
				first.WantClose(4402, "session-replaced")
				if got := first.Events(); len(got) != 0 {
					t.Fatalf("round %d: the replaced socket got %.200s", i, got[0].Raw)
				}
				second.WantEvent(seq)
				if first.Ready.SessionID == second.Ready.SessionID {
					t.Fatalf("round %d: both sockets are session %s", i, second.Ready.SessionID)
				}
				first = second
			}
			wantAtRest(pod, map[string]float64{"delivered": rounds})
			pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_active_connections")
			pod.WaitMetric(func(v float64) bool { return v == rounds }, "dws_closes_total", `code="4402"`)
			first.Close(1000, "")
			wantNoLock(t, rdb, tc.dial)
		})
	}
}

// TestTabsUnderFlow: while tabs replace each other, events go on. Each reaches one of them: one that died with its socket, or
// came when the old tab had gone and the new one was not there yet, comes again.
func TestTabsUnderFlow(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=100ms"))
	pod := w.Start()
	const rounds, burst = 50, 6
	tabs := []*harness.Client{pod.Connect(harness.User("acme", "desk1", "ann"))}
	var seqs []uint64
	for i := range rounds {
		d := harness.User("acme", "desk1", "ann")
		d.Gorilla = i%2 == 0
		tab := pod.Dial(d)
		for range burst {
			seqs = append(seqs, w.Chat("acme", "desk1"))
		}
		tab.WantReady()
		tabs = append(tabs, tab)
		w.Settled()
	}
	last := tabs[rounds]
	got, served := map[uint64]int{}, 0
	last.WaitEvent(w.Chat("acme", "desk1"))
	for i, tab := range tabs {
		if i < rounds {
			tab.WantClose(4402, "session-replaced")
		}
		events := tab.Events()
		for _, m := range events {
			got[m.Seq]++
		}
		if len(events) > 0 {
			served++
		}
	}
	if served < rounds/2 {
		t.Errorf("only %d of %d tabs got events: they did not replace each other under the flow", served, len(tabs))
	}
	for _, seq := range seqs {
		if got[seq] == 0 {
			t.Errorf("event %d reached no tab", seq)
		}
	}
	wantAtRest(pod, map[string]float64{"delivered": rounds*burst + 1, "no_owner": 0, "expired": 0, "shed": 0})
}

// TestFiveTabsAtOnce: of five that come at the same time exactly one lives in the end, all others are told that they
// were replaced, and the session is the living one's.
func TestFiveTabsAtOnce(t *testing.T) {
	t.Parallel()
	for name, tc := range sessionCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t)
			pod := w.Start()
			rdb := w.RedisClient()
			const rounds, each = 10, 5
			for round := range rounds {
				tabs := make([]*harness.Client, each)
				errs := make([]error, each)
				var wg sync.WaitGroup
				for i := range tabs {
					d := tc.dial
					d.Gorilla = i%2 == 0
					wg.Go(func() {
						var a harness.Answer
						for again := true; again; again = a.Response != nil && a.StatusCode == 503 && t.Context().Err() == nil { // Redis away for a moment
							tabs[i], a, errs[i] = pod.TryDial(t.Context(), d)
						}
					})
				}
				wg.Wait()
				for i, err := range errs {
					if err != nil {
						t.Fatalf("round %d: tab %d is refused: %v", round, i, err)
					}
				}
				var living *harness.Client
				harness.Eventually(t, harness.Patience, "four of five tabs to be closed", func() bool {
					open := 0
					for _, tab := range tabs {
						if tab.Ended() == nil {
							living = tab
							open++
						}
					}
					return open == 1
				})
				for _, tab := range tabs {
					if tab != living {
						tab.WantClose(4402, "session-replaced")
					}
				}
				living.WantReady()
				wantLock(t, rdb, living)
				living.WantEvent(tc.publish(w))
			}
			wantAtRest(pod, map[string]float64{"delivered": rounds})
			pod.WaitMetric(func(v float64) bool { return v == 1 }, "dws_active_connections")
		})
	}
}

// TestLockGoesWithItsSocket: the lock stands while the socket does, is renewed, and is gone after it, however it ended.
func TestLockGoesWithItsSocket(t *testing.T) {
	t.Parallel()
	for name, tc := range sessionCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("SESSION_TTL=3s", "SESSION_REFRESH_INTERVAL=200ms"))
			pod := w.Start()
			rdb := w.RedisClient()
			for _, end := range []func(*harness.Client){
				func(c *harness.Client) { c.Close(1000, "bye") },
				func(c *harness.Client) { c.Close(4000, "") },
				func(c *harness.Client) { c.Abort() },
				func(c *harness.Client) { c.SendRaw(false, []byte("binary")) },
			} {
				wantNoLock(t, rdb, tc.dial)
				c := pod.Connect(tc.dial)
				wantLock(t, rdb, c)
				lowest := 3 * time.Second
				harness.Eventually(t, harness.Patience, "the lock to be renewed", func() bool {
					ttl := rdb.PTTL(t.Context(), lockOf(c.Dial)).Val()
					lowest = min(lowest, ttl)
					return ttl > lowest+50*time.Millisecond
				})
				wantLock(t, rdb, c)
				end(c)
				wantNoLock(t, rdb, tc.dial)
			}
			// It also stays gone: no renewal that was under way sets it again.
			attempts := pod.Metric("dws_session_lock_renewal_attempts_total")
			c := pod.Connect(tc.dial)
			pod.WaitMetric(func(v float64) bool { return v >= attempts+3 }, "dws_session_lock_renewal_attempts_total")
			c.Close(1000, "")
			wantNoLock(t, rdb, tc.dial)
			other := pod.Connect(harness.User("acme", "desk9", "zoe"))
			attempts = pod.Metric("dws_session_lock_renewal_attempts_total")
			pod.WaitMetric(func(v float64) bool { return v >= attempts+3 }, "dws_session_lock_renewal_attempts_total")
			wantNoLock(t, rdb, tc.dial)
			wantLock(t, rdb, other)
		})
	}
}

// TestLockDeletedByHand: the next renewal sets it again and the socket stays.
func TestLockDeletedByHand(t *testing.T) {
	t.Parallel()
	for name, tc := range sessionCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("SESSION_TTL=3s", "SESSION_REFRESH_INTERVAL=200ms"))
			pod := w.Start()
			rdb := w.RedisClient()
			c := pod.Connect(tc.dial)
			for range 5 {
				if n, err := rdb.Del(t.Context(), lockOf(tc.dial)).Result(); err != nil || n != 1 {
					t.Fatalf("deleted %d locks, %v", n, err)
				}
				harness.Eventually(t, harness.Patience, "the lock to be set again", func() bool {
					n, err := rdb.Exists(t.Context(), lockOf(tc.dial)).Result()
					return err == nil && n == 1
				})
				wantLock(t, rdb, c)
				c.WantEvent(tc.publish(w))
			}
			if c.Ended() != nil {
				t.Errorf("the socket ended: %+v", c.Ended())
			}
		})
	}
}

// TestLockOverwrittenByHand: a lock that names a socket that does not exist gets its own name back at the next renewal, and its socket
// stays. A newcomer takes such a lock over, and closes the socket that had it before.
func TestLockOverwrittenByHand(t *testing.T) {
	t.Parallel()
	for name, tc := range sessionCases() {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
				w := harness.New(t, harness.Settings("SESSION_TTL=3s", "SESSION_REFRESH_INTERVAL=200ms"))
				pod := w.Start()
				rdb := w.RedisClient()
				c := pod.Connect(as(tc.dial))
				own, err := rdb.Get(t.Context(), lockOf(tc.dial)).Result()
				if err != nil {
					t.Fatal(err)
				}
				overwrite := func(value string) {
					if err := rdb.Set(t.Context(), lockOf(tc.dial), value, time.Hour).Err(); err != nil {
						t.Fatal(err)
					}
				}
				for _, value := range []string{"pod-9#e9#SOCKET9", pod.ID + "#e9#SOCKET9", strings.Replace(own, c.Ready.SessionID, "SOCKET9", 1), "not of this service"} {
					overwrite(value)
					harness.Eventually(t, harness.Patience, "the lock to be its own again", func() bool {
						got, err := rdb.Get(t.Context(), lockOf(tc.dial)).Result()
						return err == nil && got == own
					})
					wantLock(t, rdb, c)
					c.WantEvent(tc.publish(w))
				}
				if n := pod.Metric("dws_session_lock_renewal_failure_total", `reason="lost"`); n != 0 {
					t.Errorf("%v renewals failed as lost, want none", n)
				}
				overwrite(strings.Replace(own, c.Ready.SessionID, "SOCKET9", 1))
				second := pod.Connect(as(tc.dial))
				c.WantClose(4402, "session-replaced")
				wantLock(t, rdb, second)
				second.WantEvent(tc.publish(w))
				wantAtRest(pod, map[string]float64{"delivered": 5})
			})
		})
	}
}

// TestSessionsAreApart: ids that look alike are different sessions, and a user called like an admin is not it.
func TestSessionsAreApart(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	dials := []harness.Dial{
		harness.User("acme", "desk1", "ann"), harness.User("acme", "desk1", "ann2"), harness.User("acme", "desk1", "Ann"), harness.User("acme", "desk", "1ann"),
		harness.User("acme2", "desk1", "ann"), harness.User("acme", "desk2", "ann"), harness.Admin("ann", "", ""), harness.Admin("acme", "", ""),
		harness.User("admin", "acme", "ann"),
	}
	var clients []*harness.Client
	for _, d := range dials {
		clients = append(clients, pod.Connect(d))
	}
	for i, c := range clients {
		c.Send(map[string]any{"type": "ping"})
		c.TakeType("pong")
		if c.Ended() != nil {
			t.Errorf("%+v is closed: %+v", dials[i], c.Ended())
		}
	}
	if n := pod.Metric("dws_active_connections"); n != float64(len(dials)) {
		t.Errorf("%v sockets are open, want %d", n, len(dials))
	}
	if n := len(w.RedisClient().Keys(t.Context(), "session:*").Val()); n != len(dials) {
		t.Errorf("%d locks, want %s", n, fmt.Sprint(len(dials)))
	}
}
