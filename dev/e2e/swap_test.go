package e2e

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// tabs opens one on each pod at the same time and returns those that were let in.
func tabs(t *testing.T, d harness.Dial, pods ...*harness.Pod) (open []*harness.Client) {
	t.Helper()
	all := make([]*harness.Client, len(pods))
	var wg sync.WaitGroup
	for i, p := range pods {
		wg.Go(func() { all[i], _, _ = p.TryDial(harness.Within(t, harness.Patience), d) })
	}
	wg.Wait()
	for _, c := range all {
		if c != nil {
			open = append(open, c)
		}
	}
	return open
}

// TestNewcomersOnEveryPod: newcomers come to every pod at once while the pod that has their session is killed, suspended or deaf. One of
// them lives, the others are told 4402, and the socket before them is closed, at the latest when its pod renews it.
func TestNewcomersOnEveryPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, fault := range []string{"killed", "suspended", "deaf"} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings("POD_LEASE=10s", "SESSION_REFRESH_INTERVAL=2s"))
			sick, proxy := behindProxy(w)
			well := startPods(w, 2)
			rdb := w.RedisClient()
			ann := harness.User("acme", "desk1", "ann")
			old := sick.Connect(ann)
			pods := well
			switch fault {
			case "killed":
				sick.Kill()
			case "suspended":
				sick.Signal(syscall.SIGSTOP)
				waitStopped(t, sick.Process)
			case "deaf":
				proxy.BlackHole()
				pods = append(pods, sick)
			}
			came := tabs(t, ann, append(pods, pods...)...)
			harness.Eventually(t, harness.Patience, "a newcomer to be ready", func() bool {
				for _, c := range came {
					if c.Ready.SessionID == "" {
						if _, err := c.TryTake(harness.Within(t, 100*time.Millisecond), func(m harness.Message) bool { return m.Type == "ready" }); err != nil {
							continue
						}
					}
					return true
				}
				return false
			})
			if fault == "suspended" {
				sick.Signal(syscall.SIGCONT)
			}
			if fault != "killed" {
				old.WantClose(4402, "session-*")
			}
			harness.Eventually(t, harness.Patience, "one newcomer to be left", func() bool {
				n := 0
				for _, c := range came {
					if c.Ended() == nil {
						n++
					}
				}
				return n == 1
			})
			for _, c := range came {
				if c.Ended() == nil {
					value, err := rdb.Get(t.Context(), "session:acme:desk1:ann").Result()
					if err != nil || !strings.HasPrefix(value, c.Pod.ID+"#") {
						t.Errorf("the session is %q, %v, want that of the socket on %s", value, err, c.Pod.ID)
					}
				} else if c.Ended().Code != 4402 {
					t.Errorf("a newcomer that was replaced ended with %+v", c.Ended())
				}
			}
		})
	}
}

// TestNewcomerCutOffFromTheHolder: the pod of a newcomer can't reach the pod that has the session, while a third one reaches both. The
// newcomer goes on after 1 s, and the socket before it is closed at its next renewal; then nothing hinders the third.
func TestNewcomerCutOffFromTheHolder(t *testing.T) {
	t.Parallel()
	n := harness.NewNetwork(t, harness.Settings("POD_LEASE=10s", "SESSION_REFRESH_INTERVAL=2s"))
	pods := n.StartPods(3)
	rdb := n.RedisClient()
	ann := harness.User("acme", "desk1", "ann")
	old := pods[0].Connect(ann)
	n.Cut(pods[0], pods[1].GRPC)
	began := time.Now()
	second := pods[1].Connect(ann)
	if took := time.Since(began); took < 900*time.Millisecond || took > 4*time.Second {
		t.Errorf("ready after %v, want a silence of 1 s before", took)
	}
	old.WantClose(4402, "session-lost")
	began = time.Now()
	third := pods[2].Connect(ann)
	if took := time.Since(began); took > 900*time.Millisecond {
		t.Errorf("ready after %v, want no wait for a pod that answers", took)
	}
	second.WantClose(4402, "session-replaced")
	wantHolder(rdb, "acme:desk1:ann", third)
	n.Mend()
	third.WaitEvent(n.Chat("acme", "desk1"))
}

// TestNewcomerLeaves: a newcomer's client leaves before the socket before it is closed. The next newcomer, on a third pod, is ready only
// when that one is closed all the same.
func TestNewcomerLeaves(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings(calm))
	far, proxy := behindProxy(w)
	well := startPods(w, 2)
	rdb := w.RedisClient()
	d := harness.User("acme", "desk1", "ann")
	// All know each other: while the first stream between them is dialled, the calls would wait for that too.
	old := far.Connect(d)
	for _, p := range well {
		p.Connect(d)
		old = far.Connect(d)
	}
	proxy.Latency(200 * time.Millisecond)
	ctx, leave := context.WithCancel(t.Context())
	left := make(chan struct{})
	go func() {
		defer close(left)
		well[0].TryDial(ctx, d)
	}()
	harness.Eventually(t, harness.Patience, "the swap", func() bool {
		return strings.HasPrefix(rdb.Get(t.Context(), "session:acme:desk1:ann").Val(), well[0].ID+"#")
	})
	leave()
	<-left
	c := well[1].Connect(d)
	seq := w.Chat("acme", "desk1")
	c.WaitEvent(seq)
	old.WantClose(4402, "session-replaced")
	if counts(old)[seq] != 0 {
		t.Error("an event that was published after the newcomer's ready came to the socket that was replaced")
	}
	wantHolder(rdb, "acme:desk1:ann", c)
	for _, p := range append(well, far) {
		if strings.Contains(p.Log.Text(), "session taken over") {
			t.Errorf("%s did not wait for the socket before: the test misses its case", p.ID)
		}
	}
}

// answerLoser is a proxy that passes a command on and breaks its connection at the answer.
type answerLoser struct {
	address, target string

	mu   sync.Mutex // guards all below
	what []byte     // that is next to be lost; nil = nothing
	lost int
}

func loseAnswers(t *testing.T, target string) *answerLoser {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	p := &answerLoser{address: l.Addr().String(), target: target}
	go func() { // ends with l
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go p.forward(in)
		}
	}()
	return p
}

// next has the answer to the next command that holds what lost.
func (p *answerLoser) next(what string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.what = []byte(what)
}

func (p *answerLoser) count() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.lost
}

func (p *answerLoser) forward(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", p.target)
	if err != nil {
		return
	}
	defer out.Close()
	var mu sync.Mutex // guards broken
	broken := false
	go func() { // ends with out
		defer in.Close()
		buf := make([]byte, 64<<10)
		for {
			n, err := out.Read(buf)
			mu.Lock()
			stop := broken
			mu.Unlock()
			if err != nil || stop {
				return
			}
			in.Write(buf[:n])
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := in.Read(buf)
		p.mu.Lock()
		if p.what != nil && bytes.Contains(buf[:n], p.what) {
			p.what = nil
			p.lost++
			mu.Lock()
			broken = true
			mu.Unlock()
		}
		p.mu.Unlock()
		out.Write(buf[:n])
		if err != nil {
			return
		}
	}
}

// TestSwapAnswerLost: the answer to a newcomer's SET … GET is lost. It is told to come again, and nobody sends the command a second time.
// The socket before it lives on, or is closed by the next newcomer, which finds the name of a socket that does not exist.
func TestSwapAnswerLost(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for name, next := range map[string]bool{"somebody comes": true, "nobody comes": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.Settings(calm, "SESSION_REFRESH_INTERVAL=5s"))
			lossy := loseAnswers(t, w.Redis.Address())
			unheard := w.Start("REDIS_ADDRESS=" + lossy.address)
			well := startPods(w, 2)
			rdb := w.RedisClient()
			d := harness.User("acme", "desk1", "ann")
			old := well[0].Connect(d)
			lossy.next("$3\r\nset\r\n$22\r\nsession:acme:desk1:ann\r\n")
			unheard.WantRefused(d, 503, "Unavailable")
			if lossy.count() != 1 {
				t.Fatal("no answer was lost: the test misses its case")
			}
			if next {
				if value := rdb.Get(t.Context(), "session:acme:desk1:ann").Val(); !strings.HasPrefix(value, unheard.ID+"#") {
					t.Logf("the session is %q again already", value)
				}
				c := well[1].Connect(d)
				old.WantClose(4402, "session-replaced")
				wantHolder(rdb, "acme:desk1:ann", c)
				c.WaitEvent(w.Chat("acme", "desk1"))
				return
			}
			harness.Eventually(t, harness.Patience, "the name to be put back", func() bool {
				return strings.HasPrefix(rdb.Get(t.Context(), "session:acme:desk1:ann").Val(), well[0].ID+"#")
			})
			wantHolder(rdb, "acme:desk1:ann", old)
			old.WaitEvent(w.Chat("acme", "desk1"))
		})
	}
}

// TestRedisRestartsAmongNewcomers: Redis is killed while users open tab after tab on three pods, and comes back with its data or without.
// When all has settled each user has one socket: nobody has none, unless he was told to come again and did not.
func TestRedisRestartsAmongNewcomers(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for _, lost := range []bool{false, true} {
		t.Run(fmt.Sprintf("data lost %t", lost), func(t *testing.T) {
			t.Parallel()
			const users = 10
			w := harness.New(t, harness.Settings("POD_LEASE=2s", "SESSION_TTL=6s", "SESSION_REFRESH_INTERVAL=1s"))
			pods := startPods(w, 3)
			rdb := w.RedisClient()
			ctx, stop := context.WithCancel(t.Context())
			var wg sync.WaitGroup
			all := make([][]*harness.Client, users)
			dial := func(user int) harness.Dial { return harness.User("acme", "desk1", fmt.Sprint("user", user)) }
			for u := range users {
				all[u] = []*harness.Client{pods[u%3].Connect(dial(u))}
				wg.Go(func() {
					for i := u; ctx.Err() == nil; i++ {
						if c, _, _ := pods[i%3].TryDial(harness.Within(t, harness.Patience), dial(u)); c != nil {
							all[u] = append(all[u], c)
						}
					}
				})
			}
			opened := func(n float64) {
				pods[0].WaitMetric(func(v float64) bool { return v >= n }, "dws_connections_total")
			}
			opened(pods[0].Metric("dws_connections_total") + 20)
			w.Redis.Kill()
			for _, p := range pods {
				notReady(p, "redis")
			}
			if lost {
				if err := w.Redis.LoseData(); err != nil {
					t.Fatal(err)
				}
			}
			if err := w.Redis.Restart(); err != nil {
				t.Fatal(err)
			}
			for _, p := range pods {
				p.WaitReady()
			}
			opened(pods[0].Metric("dws_connections_total") + 20)
			stop()
			wg.Wait()
			for u := range users {
				open := func() (n int, last *harness.Client) {
					for _, c := range all[u] {
						if c.Ended() == nil {
							n, last = n+1, c
						}
					}
					return n, last
				}
				harness.Eventually(t, harness.Patience, "one socket for each user", func() bool {
					n, _ := open()
					if n > 0 {
						return n == 1
					}
					for _, c := range all[u] {
						if c.Ended().Code == 1013 { // whoever may come back does
							all[u] = append(all[u], pods[0].Connect(dial(u)))
							return false
						}
					}
					t.Fatalf("user %d has no socket, and none of the %d that he had may come back", u, len(all[u]))
					return false
				})
				_, last := open()
				value, err := rdb.Get(t.Context(), fmt.Sprint("session:acme:desk1:user", u)).Result()
				if err != nil || !strings.HasPrefix(value, last.Pod.ID+"#") {
					t.Errorf("the session of user %d is %q, %v, want that of the socket on %s", u, value, err, last.Pod.ID)
				}
			}
		})
	}
}

// TestCrowdOfASilentPod: the clients of a pod that has vanished without a word all come to another at once. They wait for its silence
// together.
func TestCrowdOfASilentPod(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const crowd = 600
	w := harness.New(t, harness.Settings("POD_LEASE=20s"))
	gone, proxy := behindProxy(w)
	well := w.Start()
	d := func(i int) harness.Dial { return harness.User("acme", fmt.Sprint("desk", i), "ann") }
	var wg sync.WaitGroup
	for i := range crowd {
		gone.Connect(d(i))
	}
	proxy.BlackHole()
	gone.Kill()
	took := make([]time.Duration, crowd)
	began := time.Now()
	for i := range crowd {
		wg.Go(func() {
			began := time.Now()
			c, _, err := well.TryDial(harness.Within(t, harness.Patience), d(i))
			if err == nil {
				_, err = c.TryTake(harness.Within(t, harness.Patience), func(m harness.Message) bool { return m.Type == "ready" })
			}
			if err != nil {
				t.Errorf("client %d: %v", i, err)
			}
			took[i] = time.Since(began)
		})
	}
	wg.Wait()
	all := time.Since(began)
	t.Logf("ready after: p50 %v, p99 %v, max %v; all after %v", percentile(took, 50), percentile(took, 99), percentile(took, 100), all)
	limit := 1500 * time.Millisecond
	if harness.Race {
		limit *= 3
	}
	if worst := percentile(took, 100); worst > limit {
		t.Errorf("one of %d waited for %v", crowd, worst)
	}
}
