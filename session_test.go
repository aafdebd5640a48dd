package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
)

func TestSessionNewcomerReplaces(t *testing.T) {
	for _, pods := range []int{1, 2} {
		t.Run(fmt.Sprint(pods, " pods"), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := newLockServer(t)
				a := v.pod(t, "a")
				b := a
				if pods == 2 {
					b = v.pod(t, "b")
				}
				first := a.open(t, "c:a:u")
				v.wantHolder(t, "c:a:u", first.id)
				start := time.Now()
				second := b.open(t, "c:a:u")
				wantTook(t, start, 0, 10*time.Millisecond)
				wantState(t, first, "4402 session-replaced")
				v.wantHolder(t, "c:a:u", second.id)
				second.release()
				second.release()
				synctest.Wait()
				v.wantHolder(t, "c:a:u", "")
			})
		})
	}
}

func TestSessionReadyFollowsRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a, b := v.pod(t, "a"), v.pod(t, "b")
		sess, _ := a.acquire(t.Context(), "c:a:u", "user", time.Now())
		first := bindTo(sess, false)
		start := time.Now()
		time.AfterFunc(300*time.Millisecond, first.release)
		second := b.open(t, "c:a:u")
		wantTook(t, start, 300*time.Millisecond, 300*time.Millisecond+sessionLongestPause)
		wantState(t, first, "4402 session-replaced")
		v.wantHolder(t, "c:a:u", second.id)
	})
}

func TestSessionSilentHolderIsOusted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a, b := v.pod(t, "a"), v.pod(t, "b")
		a.deaf = true
		first := a.open(t, "c:a:u")
		start := time.Now()
		second := b.open(t, "c:a:u")
		wantTook(t, start, time.Second, 1100*time.Millisecond)
		wantState(t, first, "")
		time.Sleep(oneRound)
		wantState(t, first, "4402 session-lost")
		wantState(t, second, "")
		v.wantHolder(t, "c:a:u", second.id)
	})
}

func TestSessionOfDeadPodIsTakenAtOnce(t *testing.T) {
	for name, lease := range map[string]string{"no lease": "", "restarted": "e2"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := newLockServer(t)
				b := v.pod(t, "b")
				v.setLease("a", lease)
				v.set("c:a:u", "a#e1#GONE#7")
				start := time.Now()
				second := b.open(t, "c:a:u")
				wantTook(t, start, 0, 0)
				v.wantHolder(t, "c:a:u", second.id)
			})
		})
	}
}

// A pod that the lock names but that has no such socket releases it: nobody waits for the silence.
func TestSessionRemnantIsReleased(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		v.pod(t, "a")
		b := v.pod(t, "b")
		v.set("c:a:u", "a#e1#GONE#7")
		start := time.Now()
		second := b.open(t, "c:a:u")
		wantTook(t, start, 0, 10*time.Millisecond)
		v.wantHolder(t, "c:a:u", second.id)
	})
}

func TestSessionFoughtOverForTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		b := v.pod(t, "b")
		for i := range 20 {
			time.AfterFunc(time.Duration(i)*300*time.Millisecond, func() { v.set("c:a:u", fmt.Sprint("stranger-", i)) })
		}
		synctest.Wait()
		start := time.Now()
		_, err := b.acquire(t.Context(), "c:a:u", "user", time.Now())
		if !errors.Is(err, errConflict) {
			t.Fatalf("got %v, want errConflict", err)
		}
		wantTook(t, start, 5*time.Second, 5100*time.Millisecond)
		synctest.Wait()
		if value := v.get("c:a:u"); strings.Contains(value, "#") {
			t.Fatalf("lock is %q, want no trace of the newcomer", value)
		}
	})
}

// Of several newcomers on several pods the last to arrive wins, however they poll; the others are told 4402.
func TestSessionLastOfSeveralNewcomersWins(t *testing.T) {
	for seed := range uint64(50) {
		synctest.Test(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 0))
			v := newLockServer(t)
			v.delay = func() time.Duration {
				v.mu.Lock()
				defer v.mu.Unlock()
				return time.Duration(random.IntN(3000)) * time.Microsecond
			}
			pods := []*testPod{v.pod(t, "a"), v.pod(t, "b"), v.pod(t, "c")}
			old, _ := pods[0].acquire(t.Context(), "c:a:u", "user", time.Now())
			first := bindTo(old, false)
			time.AfterFunc(time.Duration(random.IntN(100))*time.Millisecond, first.release)
			sockets := make([]*testSocket, 4)
			var wg sync.WaitGroup
			for i := range sockets {
				wg.Go(func() { sockets[i] = pods[i%3].open(t, "c:a:u") })
				time.Sleep(10 * time.Millisecond) // longer than the delays of one claim: this is their order
			}
			wg.Wait()
			time.Sleep(time.Second)
			for _, k := range sockets[:3] {
				wantState(t, k, "4402 session-replaced")
			}
			wantState(t, sockets[3], "")
			v.wantHolder(t, "c:a:u", sockets[3].id)
		})
	}
}

func TestSessionKilledBeforeBind(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		sess, err := a.acquire(t.Context(), "admin:root", "admin", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		second := a.open(t, "admin:root") // need not wait for the handshake of the first
		v.wantHolder(t, "admin:root", second.id)
		wantState(t, bindTo(sess, true), "4402 session-replaced")
		synctest.Wait()
		v.wantHolder(t, "admin:root", second.id)
	})
}

func TestSessionNewcomerGoesAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a, b := v.pod(t, "a"), v.pod(t, "b")
		sess, _ := a.acquire(t.Context(), "c:a:u", "user", time.Now())
		bindTo(sess, false)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if _, err := b.acquire(ctx, "c:a:u", "user", time.Now()); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("got %v, want the error of the context", err)
		}
		synctest.Wait()
		v.wantHolder(t, "c:a:u", sess.id)
		if n := len(b.slotLocked(sess.id)); n != 0 {
			t.Fatalf("%d sessions left behind", n)
		}
	})
}

func TestSessionLostToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		first := a.open(t, "c:a:u")
		v.set("c:a:u", "b#e1#OTHER#9")
		time.Sleep(oneRound)
		wantState(t, first, "4402 session-lost")
		v.wantHolder(t, "c:a:u", "OTHER")
	})
}

func TestSessionMissingLockIsSetAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		first := a.open(t, "c:a:u")
		v.restart()
		time.Sleep(oneRound)
		wantState(t, first, "")
		v.wantHolder(t, "c:a:u", first.id)
	})
}

func TestSessionRedisAwayAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		var sockets []*testSocket
		for i := range 1000 {
			sockets = append(sockets, a.open(t, fmt.Sprint("c:a:", i)))
		}
		v.setDown(true)
		if _, err := a.acquire(t.Context(), "c:a:new", "user", time.Now()); !errors.Is(err, errUnavailable) {
			t.Fatalf("got %v, want errUnavailable", err)
		}
		sockets[0].release()
		time.Sleep(20 * time.Second)
		v.restart()
		v.set("c:a:0", "a#e1#"+sockets[0].id+"#1")
		start := time.Now()
		a.reclaim()
		synctest.Wait()
		wantTook(t, start, 0, 0)
		v.wantHolder(t, "c:a:0", "")
		for _, k := range sockets[1:] {
			wantState(t, k, "")
			v.wantHolder(t, k.key, k.id)
		}
	})
}

// Without a reclaim, too, all locks come back with the first slot that gets an answer.
func TestSessionReclaimsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		for i := range 1000 {
			a.open(t, fmt.Sprint("c:a:", i))
		}
		v.setDown(true)
		time.Sleep(3 * time.Second)
		v.restart()
		time.Sleep(oneRound / sessionSlots)
		synctest.Wait()
		if n := len(v.locks); n != 1000 {
			t.Fatalf("%d locks, want 1000", n)
		}
	})
}

func TestSessionReleaseIsForgottenAfterTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		first := a.open(t, "c:a:u")
		v.setDown(true)
		first.release()
		time.Sleep(31 * time.Second)
		a.mu.Lock()
		defer a.mu.Unlock()
		if len(a.drops) != 0 {
			t.Fatalf("%d releases remembered, want none: the lock has expired", len(a.drops))
		}
	})
}

func TestSessionMovesToNewLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		first, lost := a.open(t, "c:a:u"), a.open(t, "c:a:v")
		v.set("c:a:v", "b#e1#OTHER#9")
		v.setLease("a", "e2")
		a.reclaim()
		synctest.Wait()
		wantState(t, first, "")
		wantState(t, lost, "4402 session-lost")
		if got, want := v.get("c:a:u"), "a#e2#"+first.id+"#1"; got != want {
			t.Fatalf("lock is %q, want %q", got, want)
		}
		v.wantHolder(t, "c:a:v", "OTHER")
	})
}

// Renewals of sockets that came all at once are spread over the interval, one command each.
func TestSessionRenewalsAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		for i := range 3200 {
			a.open(t, fmt.Sprint("c:a:", i))
		}
		a.reclaim()
		synctest.Wait()
		v.mu.Lock()
		v.sent = nil
		v.mu.Unlock()
		most, last := 0, 0
		for range sessionSlots + 1 {
			time.Sleep(10 * time.Second / sessionSlots)
			v.mu.Lock()
			most, last = max(most, len(v.sent)-last), len(v.sent)
			v.mu.Unlock()
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		renewed := map[string]bool{}
		for _, sent := range v.sent {
			renewed[sent] = true
		}
		if len(renewed) != 3200 || last > 3300 || most > 150 {
			t.Fatalf("%d commands renewed %d sessions, at most %d at once; want 3200 (and one slot), 3200, 150", last, len(renewed), most)
		}
	})
}

// After the release of a session was sent, nothing about its lock is: whatever renewals, sweeps and confirms run.
func TestSessionRenewalNeverFollowsRelease(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		random := rand.New(rand.NewPCG(1, 2))
		v := newLockServer(t)
		v.delay = func() time.Duration {
			v.mu.Lock()
			defer v.mu.Unlock()
			return time.Duration(random.IntN(5)) * time.Millisecond
		}
		a := v.pod(t, "a")
		var sockets []*testSocket
		for i := range 500 {
			sockets = append(sockets, a.open(t, fmt.Sprint("c:a:", i)))
		}
		for i, k := range sockets {
			time.AfterFunc(time.Duration(i)*7*time.Millisecond, k.release)
			if i%20 == 0 {
				time.AfterFunc(time.Duration(i)*7*time.Millisecond, a.reclaim)
			}
		}
		time.Sleep(20 * time.Second)
		v.mu.Lock()
		defer v.mu.Unlock()
		dropped := map[string]bool{}
		for _, sent := range v.sent {
			op, key, _ := strings.Cut(sent, " ")
			if op != "drop" && dropped[key] {
				t.Fatalf("%s of %s was sent after its release", op, key)
			}
			dropped[key] = dropped[key] || op == "drop"
		}
		if len(dropped) != len(sockets) || len(v.locks) != 0 {
			t.Fatalf("%d of %d released, %d locks left", len(dropped), len(sockets), len(v.locks))
		}
	})
}

// The releases that a drain has queued are sent before run ends.
func TestSessionReleasesBeforeTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1})
		defer rdb.Close()
		rdb.AddHook(v)
		cfg := &settings{}
		cfg.Store(&Config{SessionTTL: 30 * time.Second, SessionRefreshInterval: 10 * time.Second})
		v.setLease("a", "e1")
		s := newSessions(cfg, rdb, newMetrics(), heldLease{v, "a"})
		for i := range 500 {
			sess, err := s.acquire(t.Context(), fmt.Sprint("c:a:", i), "user", time.Now())
			if err != nil {
				t.Fatal(err)
			}
			sess.release()
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		s.work(ctx)
		if len(v.locks) != 0 {
			t.Fatalf("%d locks left", len(v.locks))
		}
	})
}

func TestSessionIgnoresForeignKills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		first := a.open(t, "c:a:u")
		for _, text := range []string{
			``, `{}`, `null`, `[1]`, `{"socket":"` + first.id + `"}`,
			`{"socket":"OTHER","code":4403,"reason":"revoked"}`, `{"pod":"a","socket":"OTHER","code":4403}`,
		} {
			a.heard("c:a:u", text)
		}
		a.heard("c:a:other", `{"socket":"`+first.id+`","code":4403,"reason":"revoked"}`)
		synctest.Wait()
		wantState(t, first, "")
		v.wantHolder(t, "c:a:u", first.id)
		a.heard("c:a:u", `{"socket":"`+first.id+`","code":4403,"reason":"revoked"}`)
		synctest.Wait()
		wantState(t, first, "4403 revoked")
		v.wantHolder(t, "c:a:u", "")
	})
}

// TestLaterNewcomer: who waited is told of those who came after him, whether they have the session or wait for it, and of nobody
// whose clock is wrong.
func TestLaterNewcomer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		came := time.Now()
		time.Sleep(10 * time.Second)
		claim := func(after time.Duration) string {
			return lockClaim{pod: "b", life: "e1", socket: newSocketID(came.Add(after)), turn: 7}.String()
		}
		const unnamed = "b#e1#ZZZZZZZZZZZZZZZZZZZZZZZZZZ#7" // of a pod that does not tell
		for _, c := range []struct {
			lock string
			want bool
		}{
			{"", false}, {claim(-time.Hour), false}, {claim(0), false}, {claim(time.Second), true}, {claim(10 * time.Second), true},
			{claim(10*time.Second + time.Millisecond), false}, {unnamed, false}, {"by hand", false},
			{claim(-time.Hour) + " " + claim(time.Second), true}, {unnamed + " " + claim(time.Second), true},
			{claim(-time.Hour) + " " + claim(-time.Second), false}, {claim(time.Second) + " " + unnamed, true},
		} {
			if v.set("c:a:u", c.lock); c.lock == "" {
				v.restart()
			}
			if got, err := a.later(t.Context(), "c:a:u", came); got != c.want || err != nil {
				t.Errorf("%q: %t, %v", c.lock, got, err)
			}
		}
		sess := a.open(t, "c:a:mine")
		if got, err := a.later(t.Context(), "c:a:mine", came); !got || err != nil {
			t.Errorf("a real lock of %s: %t, %v", sess.id, got, err)
		}
		v.setDown(true)
		if _, err := a.later(t.Context(), "c:a:u", came); !errors.Is(err, errUnavailable) {
			t.Errorf("Redis is away: %v", err)
		}
		for range claimsAtOnce { // which Redis leaves without an answer
			a.turns <- struct{}{}
		}
		if found, err := a.revoke(t.Context(), "c:a:u"); found || !errors.Is(err, errUnavailable) {
			t.Errorf("a session is revoked while Redis is silent: %t, %v", found, err)
		}
	})
}

func TestSessionUnavailableLease(t *testing.T) {
	cfg := authSettings(nil)
	s := newSessions(cfg, nil, newMetrics(), newLease(cfg, nil, newMetrics())) // it was never taken
	if _, err := s.acquire(t.Context(), "c:a:u", "user", time.Now()); !errors.Is(err, errUnavailable) {
		t.Fatalf("got %v, want errUnavailable", err)
	}
}

// A claim that was under way while the pod took a new life, and so missed the move, is moved as soon as it is held.
func TestSessionAcquiredOverNewLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a := v.pod(t, "a")
		v.delay = func() time.Duration { return 10 * time.Millisecond }
		time.AfterFunc(15*time.Millisecond, func() { // EVALSHA is answered, EVAL under way
			v.setLease("a", "e2")
			a.reclaim()
		})
		first := a.open(t, "c:a:u")
		if got, want := v.get("c:a:u"), "a#e1#"+first.id+"#1"; got != want {
			t.Fatalf("lock is %q, want %q: the test misses its case", got, want)
		}
		time.Sleep(40 * time.Millisecond)
		if got, want := v.get("c:a:u"), "a#e2#"+first.id+"#1"; got != want {
			t.Fatalf("lock is %q, want %q", got, want)
		}
	})
}

// Of many that connect at once only some claim at a time: the pod's other commands are never far behind in the pool.
func TestClaimsTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		var delay atomic.Int64
		v.delay = func() time.Duration { return time.Duration(delay.Load()) }
		p := v.pod(t, "pod-1")
		p.open(t, "acme:desk1:first") // and loads the script
		delay.Store(int64(100 * time.Millisecond))
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 10 * claimsAtOnce {
			wg.Go(func() {
				if _, err := p.acquire(t.Context(), fmt.Sprint("acme:desk1:", i), "user", time.Now()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took != time.Second {
			t.Errorf("10 rounds of 100 ms took %v", took)
		}
	})
}
