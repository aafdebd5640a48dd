package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const atOnce = 10 * time.Millisecond

// silentPod is a pod that hears no kills, with sessions c:a:0 to c:a:9, and another one for the newcomers.
func silentPod(t *testing.T) (v *lockServer, a, b *testPod, held []*testSocket) {
	v = newLockServer(t)
	a, b = v.pod(t, "a"), v.pod(t, "b")
	for i := range 10 {
		sess, err := a.acquire(t.Context(), fmt.Sprint("c:a:", i), "user", time.Now())
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, bindTo(sess, i < 5)) // the others are slow
	}
	v.setDeaf(a, true)
	return v, a, b, held
}

// wantOpen opens a session and checks how long that took.
func wantOpen(t *testing.T, p *testPod, key string, least, most time.Duration) *testSocket {
	t.Helper()
	start := time.Now()
	k := p.open(t, key)
	wantTook(t, start, least, most)
	return k
}

// Only the first newcomer, and those who come while it waits, wait for a pod that does not answer. The kill is sent all the same.
func TestSessionOfSilentPodIsWaitedForOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, a, b, held := silentPod(t)
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() { wantOpen(t, b, fmt.Sprint("c:a:", i), time.Second, 1100*time.Millisecond) })
			time.Sleep(400 * time.Millisecond)
		}
		wantOpen(t, b, "c:a:3", 0, atOnce)
		wantState(t, held[3], "")
		wg.Wait()
		v.setDeaf(a, false)
		fifth := wantOpen(t, b, "c:a:4", 0, atOnce)
		synctest.Wait()
		wantState(t, held[4], "4402 session-replaced")
		v.wantHolder(t, "c:a:4", fifth.id)
		time.Sleep(oneRound)
		for _, k := range held[:4] {
			wantState(t, k, "4402 session-lost")
		}
	})
}

// Those of a crowd that wait for a dead pod ask four times until the second is over; who waits for another pod asks as ever.
func TestSessionCrowdAsksRarely(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, _, b, _ := silentPod(t)
		v.setLease("c", "e1")
		var asked atomic.Int32
		v.delay = func() time.Duration {
			asked.Add(1)
			return 0
		}
		const crowd = 10 * sessionEager
		var wg sync.WaitGroup
		for i := range crowd {
			key := fmt.Sprint("c:x:", i)
			v.set(key, "c#e1#GONE#7")
			wg.Go(func() { wantOpen(t, b, key, time.Second, time.Second) })
		}
		time.Sleep(500 * time.Millisecond)
		before := asked.Load()
		wg.Go(func() { wantOpen(t, b, "c:a:0", time.Second, time.Second) })
		time.Sleep(200 * time.Millisecond)
		if n := asked.Load() - before - crowd; n < 6 || n > 10 { // 250 ms came in between; claim, kill and lease count, too
			t.Errorf("who waits for another pod asked %d times in 200 ms", n)
		}
		wg.Wait()
		// A claim, a kill, a look at the lease and the claim that succeeds, besides those four.
		if n, most := int(asked.Load()), (4+4)*crowd+8*sessionEager+20; n > most {
			t.Errorf("Redis was asked %d times, want %d at the most", n, most)
		}
	})
}

// A crowd that a pod kept waiting for a moment does not keep those slow who come later.
func TestSessionCrowdEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newLockServer(t)
		a, b := v.pod(t, "a"), v.pod(t, "b")
		const n = 2000
		start := time.Now()
		for i := range n {
			sess, err := a.acquire(t.Context(), fmt.Sprint("c:a:", i), "user", time.Now())
			if err != nil {
				t.Fatal(err)
			}
			sess.bind(func(int, string) {
				took := time.Millisecond
				if since := time.Since(start); since > 100*time.Millisecond && since < 200*time.Millisecond {
					took = 60 * time.Millisecond
				}
				time.AfterFunc(took, sess.release)
			})
		}
		start = time.Now()
		var wg sync.WaitGroup
		for i := range n {
			most := 4*sessionCrowdFirst + sessionCrowdPause // who had come before the crowd
			if i > n/2 {
				most = sessionFirstPause
			}
			wg.Go(func() { wantOpen(t, b, fmt.Sprint("c:a:", i), 0, most) })
			time.Sleep(time.Second / 2000)
		}
		wg.Wait()
	})
}

func TestSessionAnswerEndsSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, b, held := silentPod(t)
		var wg sync.WaitGroup
		wg.Go(func() { wantOpen(t, b, "c:a:0", time.Second, 1100*time.Millisecond) })
		time.Sleep(500 * time.Millisecond)
		wg.Go(func() { wantOpen(t, b, "c:a:1", 700*time.Millisecond, 700*time.Millisecond+sessionLongestPause) })
		time.Sleep(600 * time.Millisecond)
		wantOpen(t, b, "c:a:2", 0, atOnce)
		time.Sleep(100 * time.Millisecond)
		held[1].release() // the one that is waited for
		wg.Wait()
		time.Sleep(atOnce)
		wantOpen(t, b, "c:a:3", time.Second, 1100*time.Millisecond)
		wantOpen(t, b, "c:a:4", 0, atOnce)
	})
}

// A pod that lets other sessions go meanwhile is not silent for the sake of a slow socket.
func TestSessionSlowSocketIsNoSilentPod(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, a, b, _ := silentPod(t)
		v.setDeaf(a, false)
		for i := range 2 {
			var wg sync.WaitGroup
			wg.Go(func() { wantOpen(t, b, fmt.Sprint("c:a:", 5+i), time.Second, 1100*time.Millisecond) })
			time.Sleep(500 * time.Millisecond)
			wantOpen(t, b, fmt.Sprint("c:a:", i), 0, atOnce)
			wg.Wait()
		}
		time.Sleep(time.Second)
		wantOpen(t, b, "c:a:7", time.Second, 1100*time.Millisecond) // the last answer came before its kill
		wantOpen(t, b, "c:a:8", 0, atOnce)
	})
}

func TestSessionSilenceIsProvenAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, b, _ := silentPod(t)
		wantOpen(t, b, "c:a:0", time.Second, 1100*time.Millisecond)
		time.Sleep(b.cfg.Load().PodLease - atOnce)
		wantOpen(t, b, "c:a:1", 0, atOnce)
		time.Sleep(atOnce)
		wantOpen(t, b, "c:a:2", time.Second, 1100*time.Millisecond)
		wantOpen(t, b, "c:a:3", 0, atOnce)
	})
}

// Another life of the pod, another pod, and a stranger's lock are not silent for its sake; nor is another for a stranger's.
func TestSessionSilenceIsOfOneLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, _, b, _ := silentPod(t)
		v.setLease("c", "e1")
		wantOpen(t, b, "c:a:0", time.Second, 1100*time.Millisecond)
		v.setLease("a", "e2")
		for _, value := range []string{"a#e2#GONE#7", "c#e1#GONE#7", "stranger-1", "stranger-2"} {
			v.set("c:a:x", value)
			wantOpen(t, b, "c:a:x", time.Second, 1100*time.Millisecond)
		}
	})
}

// A pod lives if it can ask whether it does: its own sockets are slow, or its subscription is broken for a moment.
func TestSessionOwnPodIsNeverSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, a, _, _ := silentPod(t)
		for i := range 3 {
			wantOpen(t, a, fmt.Sprint("c:a:", i), time.Second, 1100*time.Millisecond)
		}
	})
}

// A kill that Redis did not take proves nothing.
func TestSessionUnsentKillProvesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, a, b, _ := silentPod(t)
		v.setDeaf(a, false)
		v.setMute(true)
		wantOpen(t, b, "c:a:0", time.Second, 1100*time.Millisecond)
		wantOpen(t, b, "c:a:1", time.Second, 1100*time.Millisecond)
	})
}

// Nor does a time in which Redis stood still: releases and the answers to those who wait come late, in any order.
func TestSessionSilenceOfRedisProvesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v, _, b, held := silentPod(t)
		start := time.Now()
		v.delay = func() time.Duration {
			switch now := time.Since(start); {
			case now == 0 || now > 1500*time.Millisecond: // the kill has been sent
				return 0
			case now < 1400*time.Millisecond:
				return 1500*time.Millisecond - now
			default:
				return 1600*time.Millisecond - now
			}
		}
		time.AfterFunc(1450*time.Millisecond, held[5].release) // it arrives only later
		wantOpen(t, b, "c:a:5", 1500*time.Millisecond, 1600*time.Millisecond)
		wantOpen(t, b, "c:a:6", time.Second, 1100*time.Millisecond)
	})
}

// One who waits and is replaced by a later newcomer here, which has ousted the holder, has seen no answer.
func TestSessionOustedByAnotherIsNoAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, _, b, _ := silentPod(t)
		var wg sync.WaitGroup
		wg.Go(func() { b.open(t, "c:a:0") })
		time.Sleep(500 * time.Millisecond)
		wg.Go(func() { wantState(t, b.open(t, "c:a:1"), "4402 session-replaced") })
		time.Sleep(600 * time.Millisecond)
		wantOpen(t, b, "c:a:1", 0, atOnce)
		wg.Wait()
		wantOpen(t, b, "c:a:2", 0, atOnce)
	})
}

func TestSilenceForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := silence{pods: map[string]podSilence{}, waiting: map[string]int{}}
		for i := range 1000 {
			q.waited(lockClaim{pod: "a", life: fmt.Sprint(i)}, time.Now(), time.Second)
			q.answered(lockClaim{pod: "b", life: fmt.Sprint(i)})
			time.Sleep(100 * time.Millisecond)
		}
		q.enter(lockClaim{pod: "a"})
		if n := q.enter(lockClaim{pod: "a"}); n != 2 {
			t.Errorf("%d wait for a pod, want 2", n)
		}
		q.leave(lockClaim{pod: "a"})
		q.leave(lockClaim{pod: "a"})
		if len(q.waiting) > 0 {
			t.Errorf("%v wait still", q.waiting)
		}
		if n, most := len(q.pods), 10+int(sessionFight/(100*time.Millisecond))+2; n > most {
			t.Errorf("%d pods remembered, want %d at the most", n, most)
		}
	})
}
