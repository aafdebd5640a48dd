package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// arrival is a newcomer and what became of it.
type arrival struct {
	who  string
	err  error
	when time.Time
}

// arrivals is a crowd, and what becomes of those who come, in the order in which it does.
type arrivals struct {
	*crowd
	t    *testing.T
	ends chan arrival
}

func newArrivals(t *testing.T, rate int) *arrivals {
	cfg := &settings{}
	cfg.Store(&Config{ServerUpgradeRate: rate})
	return &arrivals{newCrowd(cfg, newMetrics()), t, make(chan arrival, 1000)}
}

// come has one more come, and returns when it waits or has had its turn.
func (a *arrivals) come(ctx context.Context, who string) {
	go func() { // ended by its turn or ctx
		err := a.turn(ctx, who)
		a.ends <- arrival{who, err, time.Now()}
	}()
	synctest.Wait()
}

// want expects the next end to be that one, now or when the next one is due.
func (a *arrivals) want(who string, err error, when time.Time) {
	a.t.Helper()
	got := <-a.ends
	if got.who != who || !errors.Is(got.err, err) || !got.when.Equal(when) {
		a.t.Fatalf("got %+v, want the end of %s with %v at %v", got, who, err, when)
	}
	synctest.Wait()
}

func (a *arrivals) wantWaiting(n int) {
	a.t.Helper()
	synctest.Wait()
	a.mu.Lock()
	defer a.mu.Unlock()
	if got := int(a.m.upgradesWaiting.with().Get()); got != n || len(a.latest) != n {
		a.t.Errorf("the gauge says that %d wait, %d are known, want %d", got, len(a.latest), n)
	}
}

var errLeft = errors.New("has left")

// TestCrowdOfUpgrades: a few go on at once, and those of a crowd one after the other, as they came. The rate may change meanwhile;
// after a pause a few go on at once again, however long it was.
func TestCrowdOfUpgrades(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newArrivals(t, 100)
		now, name := time.Now(), func(i int) string { return fmt.Sprint("user", i) }
		for i := range 200 {
			a.come(t.Context(), name(i))
		}
		for i := range crowdBurst {
			a.want(name(i), nil, now)
		}
		a.wantWaiting(200 - crowdBurst)
		for i := crowdBurst; i < 100; i++ {
			now = now.Add(10 * time.Millisecond)
			a.want(name(i), nil, now)
		}
		a.cfg.Store(&Config{ServerUpgradeRate: 1000})
		for i := 100; i < 200; i++ {
			if now = now.Add(time.Millisecond); i < 102 { // their times were set before
				now = now.Add(9 * time.Millisecond)
			}
			a.want(name(i), nil, now)
		}
		a.wantWaiting(0)
		time.Sleep(time.Minute)
		now = time.Now()
		for i := range crowdBurst + 2 {
			a.come(t.Context(), name(i))
		}
		for i := range crowdBurst {
			a.want(name(i), nil, now)
		}
		a.want(name(crowdBurst), nil, now.Add(time.Millisecond))
		a.want(name(crowdBurst+1), nil, now.Add(2*time.Millisecond))
	})
}

// TestUpgradesPerProcessor: what a rate of 0 means.
func TestUpgradesPerProcessor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newArrivals(t, 0)
		begin, every := time.Now(), time.Second/time.Duration(150*runtime.GOMAXPROCS(0))
		for range crowdBurst + 10 {
			if err := a.turn(t.Context(), "user"); err != nil {
				t.Error(err)
			}
		}
		if took := time.Since(begin); took != 10*every {
			t.Errorf("10 turns took %v, want %v", took, 10*every)
		}
	})
}

// TestLeavingTheCrowd: who leaves, in the door or behind, is gone at once and takes no turn. Of those who come for one session
// only the last waits.
func TestLeavingTheCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newArrivals(t, 1)
		start := time.Now()
		for i := range crowdBurst {
			a.come(t.Context(), fmt.Sprint("user", i))
			a.want(fmt.Sprint("user", i), nil, start)
		}
		leave := map[string]func(){}
		for _, who := range []string{"ann", "bob", "cid", "dan", "eve"} {
			ctx, cancel := context.WithCancelCause(t.Context())
			leave[who] = func() { cancel(errLeft) }
			a.come(ctx, who)
		}
		a.wantWaiting(5)
		time.Sleep(time.Second / 4)
		leave["cid"]()
		a.want("cid", errLeft, start.Add(time.Second/4))
		leave["ann"]() // who is in the door
		a.want("ann", errLeft, start.Add(time.Second/4))
		a.wantWaiting(3)
		a.come(t.Context(), "dan") // once more
		got := <-a.ends
		var replaced *apiError
		if got.who != "dan" || !errors.As(got.err, &replaced) || replaced.reason != "session-replaced" || !got.when.Equal(start.Add(time.Second/4)) {
			t.Errorf("the first of two for one session: %+v", got)
		}
		a.wantWaiting(3)
		a.want("bob", nil, start.Add(1*time.Second))
		a.want("eve", nil, start.Add(2*time.Second))
		a.want("dan", nil, start.Add(3*time.Second))
		a.wantWaiting(0)
		leave["bob"]()
		leave["dan"]()
		leave["eve"]()
	})
}

// TestServerPacesConnections: whatever they ask for.
func TestServerPacesConnections(t *testing.T) {
	const n = 450
	addr := startServer(t, newTestServer(nil)).String()
	begin, errs := time.Now(), make(chan error, n)
	for range n {
		go func() { // ended by the answer
			c := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
			r, err := c.Get("http://" + addr + "/health")
			if err == nil {
				err = r.Body.Close()
			}
			errs <- err
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	if took, atLeast := time.Since(begin), (n-crowdBurst-1)*time.Second/acceptRate; took < atLeast {
		t.Errorf("%d connections were served in %v, want %v at the least", n, took, atLeast)
	}
}

// crowded is a listener at which connections always wait.
type crowded struct{ net.Listener }

func (crowded) Accept() (net.Conn, error) { return nil, nil }

// TestCrowdOfConnections: a few are accepted at once, and those of a crowd one after the other; after a while a few are again.
// A crowd that does not end is no longer waited for.
func TestCrowdOfConnections(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &pacedListener{Listener: crowded{}}
		want := func(n int, every time.Duration) {
			t.Helper()
			start := time.Now()
			for range n {
				l.Accept()
			}
			if took := time.Since(start); took != time.Duration(n)*every {
				t.Errorf("%d connections took %v, want %v", n, took, time.Duration(n)*every)
			}
		}
		const every = time.Second / acceptRate
		want(crowdBurst, 0)
		want(1000, every)
		time.Sleep(time.Minute)
		want(crowdBurst, 0)
		want(int(acceptPauses/every), every)
		start := time.Now()
		for range 100_000 {
			l.Accept()
			time.Sleep(every / 10) // what it takes
		}
		if took := time.Since(start); took > 100_000*every/10*12/10 {
			t.Errorf("a crowd that comes faster than the rate for ever is kept waiting: %v", took)
		}
		time.Sleep(time.Minute)
		want(crowdBurst, 0)
		want(1000, every)
	})
}
