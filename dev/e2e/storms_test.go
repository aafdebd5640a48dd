package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// storm is a pod that many clients are about to trouble at once, and one who is not to notice: bob's events flow all the time.
type storm struct {
	t     *testing.T
	w     *harness.World
	redis *rig.Proxy // on the pod's way to Redis
	pod   *harness.Pod
	bob   *harness.Client
	flow  *harness.Flow
	rest  int // resident KiB before
}

func newStorm(t *testing.T, settings ...string) *storm {
	t.Helper()
	s := &storm{t: t, w: harness.New(t)}
	s.redis = s.w.Proxy(s.w.Redis.Address())
	s.pod = s.w.Start(append([]string{"SERVER_DRAIN_SPREAD=500ms", "REDIS_ADDRESS=" + s.redis.Address()}, settings...)...)
	s.bob = s.pod.Connect(harness.User("acme", "bystander", "bob"))
	s.flow = s.w.Flow(50, func(int) feed.Event { return feed.Chat("acme", "bystander", "628111@c.us", "hi", 1) })
	s.rest = s.pod.Resident()
	return s
}

// wantCalm ends the storm: bob has had all his events, none late, the pod's memory never grew beyond 64 MiB, half of them
// room for garbage, and kib KiB per client, and it drains as ever.
func (s *storm) wantCalm(clients, kib int) {
	s.t.Helper()
	s.flow.WaitSent(50)
	var delays []time.Duration
	for _, p := range s.flow.Stop() {
		delays = append(delays, s.bob.WaitEvent(p.Seq).At.Sub(p.At))
	}
	slices.Sort(delays)
	p50, p99, worst := delays[len(delays)/2], delays[len(delays)*99/100], delays[len(delays)-1]
	s.t.Logf("%d events of another client: p50 %v, p99 %v, slowest %v", len(delays), p50, p99, worst)
	patience := time.Second // the clients take more of the machine than the pod does
	if harness.Race {
		patience = 4 * time.Second
	}
	if p50 > patience || worst > 10*patience {
		s.t.Errorf("another client's %d events took %v, the slowest %v", len(delays), p50, worst)
	}
	if more := s.bob.Inbox(); len(more) > 0 {
		complain := s.t.Errorf
		if harness.Race {
			complain = s.t.Logf // slow enough to lose its lease for a moment on a busy machine, which is a gap
		}
		complain("another client got %d messages more, the first is %.300s", len(more), more[0].Raw)
	}
	if end := s.bob.Ended(); end != nil {
		s.t.Errorf("another client's socket has ended: %v", *end)
	}
	grown := s.pod.PeakResident() - s.rest
	s.t.Logf("resident memory: %d KiB before, %d KiB more at most: %.1f per client", s.rest, grown, float64(grown)/float64(clients))
	if limit := 64<<10 + clients*kib; grown > limit && !harness.Race { // the race detector's own memory is several times that
		s.t.Errorf("resident memory grew by %d KiB, want no more than %d", grown, limit)
	}
	s.pod.WantLedgers()
	s.pod.Terminate()
	s.pod.WantExit(0, harness.Patience)
}

// sockets waits until the pod has n sockets.
func (s *storm) sockets(n int) {
	s.t.Helper()
	s.pod.WaitMetric(func(v float64) bool { return int(v) == n }, "dws_active_connections")
}

// everyone runs f n times at once and fails the test with the first error.
func (s *storm) everyone(n int, f func(ctx context.Context, i int) error) {
	s.t.Helper()
	ctx := harness.Within(s.t, 3*harness.Patience)
	errs := make(chan error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs <- f(ctx, i) })
	}
	wg.Wait()
	for range n {
		if err := <-errs; err != nil {
			s.t.Fatal(err)
		}
	}
}

// visitor is the i-th of a crowd: ten users of each agent.
func visitor(i int) harness.Dial {
	d := harness.User("acme", fmt.Sprint("desk", i/10), fmt.Sprint("user", i))
	d.Gorilla = true
	return d
}

// tryConnect opens a socket and waits for its ready; it comes again, with a jittered back-off, when the service says so.
func (s *storm) tryConnect(ctx context.Context, d harness.Dial) (*harness.Client, error) {
	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		c, a, err := s.pod.TryDial(ctx, d)
		if c != nil {
			_, err = c.TryTake(ctx, func(m harness.Message) bool { return m.Type == "ready" })
			if end := c.Ended(); err == nil || end == nil || end.Code != 1013 {
				return c, err
			}
		} else if a.Response == nil || a.StatusCode != http.StatusServiceUnavailable {
			return nil, err
		}
		if !sleep(ctx, pause/2+rand.N(pause)) {
			return nil, err
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-ctx.Done():
		return false
	}
}

// TestStormOfConnects: thousands connect at once, as when the pod next door ended; all are served, and all go at once. It takes
// the whole machine, so it runs alone.
func TestStormOfConnects(t *testing.T) {
	n := 5000
	if harness.Race {
		n = 1000 // the race detector makes the pod ten times slower
	}
	var files syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &files); err != nil || files.Max < uint64(n+1000) {
		t.Skipf("SKIPPED: %d sockets need more open files than %d: ulimit -Hn", n, files.Max)
	}
	s := newStorm(t)
	clients := make([]*harness.Client, n)
	began := time.Now()
	s.everyone(n, func(ctx context.Context, i int) (err error) {
		clients[i], err = s.tryConnect(ctx, visitor(i))
		return err
	})
	t.Logf("%d sockets ready in %v", n, time.Since(began))
	s.sockets(n + 1)
	for i := 0; i < n; i += 10 {
		seq := s.w.Chat("acme", fmt.Sprint("desk", i/10))
		for _, c := range clients[i:min(i+10, n)] {
			c.WaitEvent(seq)
		}
	}
	for _, c := range clients {
		c.Abort()
	}
	s.sockets(1)
	s.wantCalm(n, 64)
}

// TestCrowdAndProbe: who asks how the pod is, or for a token, does not wait behind a crowd that is let in slowly, since Redis is far, all
// of whom are.
func TestCrowdAndProbe(t *testing.T) {
	const n = 400
	s := newStorm(t)
	ctx, errs := harness.Within(t, 3*harness.Patience), make(chan error, n)
	s.redis.Latency(100 * time.Millisecond)
	for i := range n {
		go func() { // ended by ctx
			_, err := s.tryConnect(ctx, visitor(i))
			errs <- err
		}()
	}
	s.pod.WaitMetric(func(v float64) bool { return v > n/2 }, "dws_upgrades_waiting")
	for range 20 {
		for _, path := range []string{"/health", "/ready", "/metrics"} {
			if a := s.pod.Do("GET", path, http.Header{"Connection": {"close"}}, nil); a.StatusCode != http.StatusOK {
				t.Fatalf("GET %s: %d %s", path, a.StatusCode, a.Body)
			}
		}
		s.pod.Mint("/generate-token", harness.APIKey, map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_in_seconds": 60})
	}
	if s.pod.Metric("dws_upgrades_waiting") == 0 {
		t.Error("the crowd was gone before the probes")
	}
	for range n {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	s.sockets(n + 1)
	s.wantCalm(n, 64)
}

// TestDrainSendsTheCrowdAway: those who still wait to be let in when the pod begins to drain are told so.
func TestDrainSendsTheCrowdAway(t *testing.T) {
	t.Parallel()
	const n = 1000
	s := newStorm(t)
	s.redis.Latency(200 * time.Millisecond)
	ctx, told := harness.Within(t, harness.Patience), make(chan bool, n)
	for i := range n {
		go func() { // ended by the drain, or by ctx
			_, a, _ := s.pod.TryDial(ctx, visitor(i))
			told <- a.Response != nil && a.StatusCode == http.StatusServiceUnavailable && strings.Contains(string(a.Body), "this pod is draining")
		}()
	}
	s.pod.WaitMetric(func(v float64) bool { return v > n/2 }, "dws_upgrades_waiting")
	s.pod.Terminate()
	s.pod.WantExit(0, harness.Patience)
	away := 0
	for range n {
		if <-told {
			away++
		}
	}
	if away < n/4 {
		t.Errorf("%d of %d were told that the pod drains", away, n)
	}
	s.flow.Stop()
}

// TestStormAtTheLimit: of those who connect at once as many are served as MAX_CONNECTIONS allows. The others are told to come
// again, and are let in when somebody has left.
func TestStormAtTheLimit(t *testing.T) {
	const limit, n = 200, 500
	s := newStorm(t, fmt.Sprint("SERVER_MAX_CONNECTIONS=", limit+1)) // and bob
	var mu sync.Mutex
	var in []*harness.Client
	s.everyone(n, func(ctx context.Context, i int) error {
		c, a, err := s.pod.TryDial(ctx, visitor(i))
		switch {
		case c != nil:
			mu.Lock()
			in = append(in, c)
			mu.Unlock()
			return nil
		case a.Response == nil || a.StatusCode != http.StatusServiceUnavailable || !strings.Contains(string(a.Body), "Unavailable"):
			return fmt.Errorf("want 503 Unavailable: %w", err)
		}
		if after, err := strconv.Atoi(a.Header.Get("Retry-After")); err != nil || after < 1 {
			return fmt.Errorf("503 with Retry-After %q", a.Header.Get("Retry-After"))
		}
		return nil
	})
	in = slices.DeleteFunc(in, func(c *harness.Client) bool { // a pod that is out of breath tells some to come again
		_, err := c.TryTake(harness.Within(t, harness.Patience), func(m harness.Message) bool { return m.Type == "ready" })
		return err != nil && c.Ended() != nil && c.Ended().Code == 1013
	})
	if len(in) > limit || len(in) < limit/2 {
		t.Errorf("%d of %d were let in, the limit is %d", len(in), n, limit)
	}
	for i := len(in); i < limit; i++ {
		s.pod.Connect(visitor(n + i))
	}
	s.sockets(limit + 1)
	late := s.pod.Dial(harness.User("acme", "desk0", "late").With("errors", "close"))
	late.WantClose(1013, "unavailable")
	in[0].Close(1000, "")
	s.pod.Connect(harness.User("acme", "desk0", "late"))
	s.wantCalm(n, 64)
}

// TestStormOfIdlers: strangers hold connections on which they have asked for something, or nothing. They take no more descriptors than they
// may; sockets, probes and newcomers notice nothing.
func TestStormOfIdlers(t *testing.T) {
	const n = 3000
	s := newStorm(t)
	var mu sync.Mutex
	var held []net.Conn
	defer func() {
		for _, nc := range held {
			nc.Close()
		}
	}()
	s.everyone(n, func(ctx context.Context, i int) error {
		nc, err := new(net.Dialer).DialContext(ctx, "tcp", s.pod.HTTP)
		if err != nil {
			return err
		}
		mu.Lock()
		held = append(held, nc)
		mu.Unlock()
		if i%2 == 0 {
			fmt.Fprint(nc, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
		}
		return nil
	})
	s.pod.WaitMetric(func(v float64) bool { return v >= n-2100 }, "dws_http_connections_dropped_total")
	if fds := s.pod.Metric("process_open_fds"); fds > 2200 {
		t.Errorf("the pod has %v open files", fds)
	}
	if !s.pod.Ready() {
		t.Error("not ready")
	}
	s.pod.Connect(visitor(0))
	s.sockets(2)
	s.wantCalm(n, 64)
}

// TestStormOfTricklers: clients that send nothing, a byte now and then of their request, or a byte now and then of a frame.
// None holds its connection longer than the time-outs say.
func TestStormOfTricklers(t *testing.T) {
	t.Parallel()
	const each = 100
	s := newStorm(t, "SERVER_READ_TIMEOUT=2s", "WEBSOCKET_PING_INTERVAL=1500ms")
	d := visitor(0)
	request := "GET /ws/acme/desk0 HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nCookie: " + strings.Repeat("x", 4096)
	begun := append(harness.FrameHeader(harness.FIN|harness.Text, true, 60_000), 1, 2, 3, 4)
	var frames []*harness.Raw
	for i := range each {
		d.User = fmt.Sprint("frame", i)
		frames = append(frames, s.pod.DialRaw(d, begun))
		frames[i].WantMessage("ready")
	}
	s.everyone(3*each, func(ctx context.Context, i int) error {
		if i < each {
			return trickleFrame(ctx, frames[i])
		}
		return trickleRequest(ctx, s.pod.HTTP, request[:len(request)*(i%2)])
	})
	s.sockets(1)
	if got := s.pod.Metric("dws_closes_total", `code="1011"`); int(got) != each {
		t.Errorf("%v sockets closed with 1011, want %d", got, each)
	}
	s.wantCalm(3*each, 64)
}

// trickleFrame goes on with a frame that was begun, until the service closes the socket: no pong can be sent within one.
func trickleFrame(ctx context.Context, r *harness.Raw) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the socket
		for sleep(ctx, 100*time.Millisecond) && r.TryWrite([]byte("x")) == nil {
		}
	}()
	return r.ReadClose(1011, "ping-timeout")
}

// trickleRequest sends the bytes of a request slowly, until the service has had enough.
func trickleRequest(ctx context.Context, address, request string) error {
	began := time.Now()
	nc, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with the connection
		for i := 0; i < len(request) && sleep(ctx, 100*time.Millisecond); i++ {
			if _, err := nc.Write([]byte{request[i]}); err != nil {
				return
			}
		}
	}()
	nc.SetReadDeadline(began.Add(harness.Patience))
	answer, err := io.ReadAll(nc)
	if took := time.Since(began); errors.Is(err, os.ErrDeadlineExceeded) || took < time.Second {
		return fmt.Errorf("a connection without a request ended after %v: %q, %v", took, answer, err)
	}
	return nil
}

// TestStormOfThoseWhoNeverRead: clients that read nothing of a flood are closed as slow once the write time-out is over.
func TestStormOfThoseWhoNeverRead(t *testing.T) {
	t.Parallel()
	floods.Lock()
	defer floods.Unlock()
	const n = 20
	// A ring of 64 holds what bob gets in more than a second: so long the race detector may take for a flood of such events.
	s := newStorm(t, "WEBSOCKET_WRITE_TIMEOUT=3s", "WEBSOCKET_BLOCK_TIMEOUT=1s", "WEBSOCKET_BUFFER_SIZE=64")
	clients := make([]*harness.Client, n)
	for i := range clients {
		d := harness.User("acme", "desk1", fmt.Sprint("user", i))
		d.RcvBuf = 4096
		clients[i] = s.pod.Connect(d)
		clients[i].Pause()
	}
	payload := `{"event_id":"x","company_id":"acme","row_data":{"pad":"` + strings.Repeat("x", floodSize) + `"}}`
	publishMany(t, s.w, kernelTakes+100, "acme.desk1.contacts", []byte(payload))
	s.pod.WaitMetric(func(v float64) bool { return int(v) == n }, "dws_slow_clients_disconnected_total")
	s.sockets(1)
	if got := s.pod.Metric("dws_closes_total", `code="4408"`); int(got) != n {
		t.Errorf("%v sockets closed with 4408, want %d", got, n)
	}
	s.wantCalm(n, 2048)
}

// TestStormOfThoseWhoVanish: the network swallows clients without a FIN. They are gone after the missed pongs, their goroutines
// and sessions too: whoever comes back need not wait for anybody.
func TestStormOfThoseWhoVanish(t *testing.T) {
	t.Parallel()
	const n = 200
	s := newStorm(t, "WEBSOCKET_PING_INTERVAL=1500ms")
	goroutines := s.pod.Metric("go_goroutines")
	proxy := s.w.Proxy(s.pod.HTTP)
	for i := range n {
		s.pod.ConnectAt(proxy.Address(), visitor(i))
	}
	proxy.BlackHole()
	s.sockets(1)
	if got := s.pod.Metric("dws_closes_total", `code="1011"`); int(got) != n {
		t.Errorf("%v sockets closed with 1011, want %d", got, n)
	}
	s.pod.WaitMetric(func(v float64) bool { return v < goroutines+n/4 }, "go_goroutines")
	for i := range n / 10 {
		s.pod.Connect(visitor(i))
	}
	if got := s.pod.Metric("dws_session_conflicts_total"); got != 0 {
		t.Errorf("%v of those who came back found their session taken", got)
	}
	s.wantCalm(n, 64)
}
