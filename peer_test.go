package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	vm "github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	peerpb "daisi-ws-service/proto"
)

var (
	peerKeyA = strings.Repeat("a1", 32)
	peerKeyB = strings.Repeat("b2", 32)
)

// peerConfig holds the defaults of all settings that the peers read.
func peerConfig() *Config {
	return &Config{AuthTokenAESKey: peerKeyA, NATSAckWait: 30 * time.Second, NATSMaxAckPending: 65536, PodLease: 6 * time.Second, PeerTimeout: 5 * time.Second, PeerIdleTimeout: 5 * time.Minute,
		PeerHealthInterval: time.Minute, PeerBreakerThreshold: 5, PeerBreakerOpen: 30 * time.Second, PeerWindow: 1024}
}

// startPeers serves a pod on a free loopback port until the test ends and returns it with its address.
func startPeers(t *testing.T, pod, life string, cfg *Config, change ...func(*peers)) (*peers, string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return servePeers(t, pod, life, cfg, l, change...), l.Addr().String()
}

func servePeers(t *testing.T, pod, life string, cfg *Config, l net.Listener, change ...func(*peers)) *peers {
	t.Helper()
	p := newTestPeers(pod, life, cfg)
	for _, f := range change {
		f(p)
	}
	served := make(chan error, 1)
	go func() { served <- p.serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		p.stop(ctx)
		if err := <-served; err != nil {
			t.Errorf("serve of %s: %v", pod, err)
		}
	})
	return p
}

// newTestPeers makes those of a pod that has this life.
func newTestPeers(pod, life string, cfg *Config) *peers {
	s, m := &settings{}, newMetrics()
	s.Store(cfg)
	l := newLease(s, nil, m)
	l.pod = pod
	l.self.Store(&owner{member: member{pod, life}})
	return newPeers(s, m, l, newShare(s, m))
}

// peerPipes is a network in memory, for tests under synctest: its clock runs only when everyone waits.
type peerPipes struct {
	mu     sync.Mutex // guards all below
	hosts  map[string]*bufconn.Listener
	conns  []net.Conn
	dials  int
	refuse int // so many dials from now on fail
	delay  time.Duration

	mute atomic.Bool // everything sent is swallowed, both ways
}

func newPeerPipes() *peerPipes { return &peerPipes{hosts: map[string]*bufconn.Listener{}} }

func (n *peerPipes) listen(addr string) net.Listener {
	l := bufconn.Listen(1 << 20)
	n.hosts[addr] = l
	return l
}

func (n *peerPipes) dial(ctx context.Context, addr string) (net.Conn, error) {
	n.mu.Lock()
	n.dials++
	delay := max(n.delay, time.Millisecond) // the way there, by the bubble's clock
	l := n.hosts[addr]
	if n.refuse > 0 {
		n.refuse--
		l = nil
	}
	n.mu.Unlock()
	select {
	case <-time.After(delay):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if l == nil {
		return nil, errors.New("connection refused")
	}
	c, err := l.DialContext(ctx)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns = append(n.conns, c)
	return &muteConn{c, &n.mute}, nil
}

// muteConn is a connection into a black hole while mute says so.
type muteConn struct {
	net.Conn
	mute *atomic.Bool
}

func (c *muteConn) Read(b []byte) (n int, err error) {
	for n, err = c.Conn.Read(b); err == nil && c.mute.Load(); n, err = c.Conn.Read(b) {
	}
	return n, err
}

func (c *muteConn) Write(b []byte) (int, error) {
	if c.mute.Load() {
		return len(b), nil
	}
	return c.Conn.Write(b)
}

// cut breaks all connections made so far.
func (n *peerPipes) cut() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range n.conns {
		c.Close()
	}
	n.conns = nil
}

func (n *peerPipes) dialled() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.dials
}

// on makes a pod dial through n.
func (n *peerPipes) on(p *peers) { p.network = n.dial }

// peerLedger is the source of a test's deliveries: it counts what became of each.
type peerLedger struct {
	t       *testing.T
	mu      sync.Mutex // guards all below
	settles map[uint64]outcome
	changed chan struct{} // closed and made anew with every settle
}

func newPeerLedger(t *testing.T) *peerLedger {
	return &peerLedger{t: t, settles: map[uint64]outcome{}, changed: make(chan struct{})}
}

func (l *peerLedger) settled(d *delivery, worst outcome) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if o, ok := l.settles[d.seq]; ok {
		l.t.Errorf("event %d settled %s after %s", d.seq, worst, o)
	}
	l.settles[d.seq] = worst
	close(l.changed)
	l.changed = make(chan struct{})
}

// counts says how many were settled with each outcome.
func (l *peerLedger) counts() map[outcome]int {
	l.mu.Lock()
	defer l.mu.Unlock()
	all := map[outcome]int{}
	for _, o := range l.settles {
		all[o]++
	}
	return all
}

// want waits until n deliveries are settled, all of them with o.
func (l *peerLedger) want(n int, o outcome) {
	l.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		total, changed := len(l.settles), l.changed
		l.mu.Unlock()
		if total >= n {
			break
		}
		select {
		case <-changed:
		case <-deadline:
			l.t.Fatalf("settled %v, want %d times %s", l.counts(), n, o)
		}
	}
	if got := l.counts(); got[o] != n || len(got) != 1 {
		l.t.Fatalf("settled %v, want %d times %s", got, n, o)
	}
}

// delivery makes the delivery of event seq, as the router would.
func (l *peerLedger) delivery(seq uint64) *delivery {
	k := kind(seq % 4)
	ev := &event{seq: seq, kind: k, company: "c1", agent: fmt.Sprintf("a%d", seq%7), stored: time.Unix(0, int64(seq)*1001),
		requestID: fmt.Sprintf("r%d", seq), payload: fmt.Appendf(nil, `{"n":%d, "text":"ü"}`, seq)}
	if k == kindMessage {
		ev.chat = "x.y"
	}
	d := &delivery{event: ev, count: seq%3 + 1, arrived: time.Now(), src: l}
	d.open.Store(1)
	return d
}

// takeAll is a pod's sockets: they settle everything with o at once and pass it to seen, if that is not nil.
func takeAll(o outcome, seen chan<- *delivery) func(*peers) {
	return func(p *peers) {
		p.deliver = func(d *delivery) {
			if seen != nil {
				seen <- d
			}
			d.open.Store(1)
			d.settle(o)
		}
	}
}

// wantNoDelivery fails the test when the pod delivers anything.
func wantNoDelivery(t *testing.T) func(*peers) {
	return func(p *peers) {
		p.deliver = func(d *delivery) {
			t.Errorf("event %d was delivered", d.seq)
			d.open.Store(1)
			d.settle(written)
		}
	}
}

// wantPeerMetric compares an unlabelled or labelled counter or gauge.
func wantPeerMetric(t *testing.T, what string, got, want float64) {
	t.Helper()
	if got != want {
		t.Errorf("%s = %v, want %v", what, got, want)
	}
}

func counterValue(c *vm.Counter) float64 { return float64(c.Get()) }

// wantNoPeerGoroutines checks at the test's end, after the pods have stopped, that nothing of them is left running.
func wantNoPeerGoroutines(t *testing.T) {
	t.Helper()
	t.Cleanup(func() {
		deadline := time.Now().Add(10 * time.Second)
		buf := make([]byte, 1<<20)
		for {
			stacks := string(buf[:runtime.Stack(buf, true)])
			leaked := ""
			for g := range strings.SplitSeq(stacks, "\n\n") {
				if (strings.Contains(g, "main.(*link)") || strings.Contains(g, "main.(*intake)") || strings.Contains(g, "main.(*peers)") || strings.Contains(g, "internal/transport")) && !strings.Contains(g, "wantNoPeerGoroutines") {
					leaked = g
				}
			}
			if leaked == "" {
				return
			}
			if time.Now().After(deadline) {
				t.Errorf("left running:\n%s", leaked)
				return
			}
			runtime.Gosched()
		}
	})
}

// TestPeerAnswersQuestions: Identify, health and, where it is enabled, reflection come over the same authenticated connection.
func TestPeerAnswersQuestions(t *testing.T) {
	wantNoPeerGoroutines(t)
	p, addr := startPeers(t, "pod-a", "e1", peerConfig())
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	who, err := p.identify(ctx, addr, member{})
	if err != nil || who.GetPod() != "pod-a" || who.GetLife() != "e1" || who.GetOverlooked() {
		t.Fatalf("identify = %v, %v", who, err)
	}
	conn := dialAsPod(t, p, addr)
	h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health = %v, %v", h, err)
	}
	if !p.serving() {
		t.Error("answers, but does not say that it serves")
	}
	for enabled, want := range map[bool]codes.Code{false: codes.Unimplemented, true: codes.OK} {
		cfg := peerConfig()
		cfg.ServerEnableReflection = enabled
		_, addr := startPeers(t, "pod-b", "e1", cfg)
		s, err := reflectionpb.NewServerReflectionClient(dialAsPod(t, p, addr)).ServerReflectionInfo(ctx)
		if err != nil {
			t.Fatal(err)
		}
		s.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		if _, err := s.Recv(); status.Code(err) != want {
			t.Errorf("reflection enabled %v: %v, want %s", enabled, err, want)
		}
	}
}

// dialAsPod connects to addr as p would.
func dialAsPod(t *testing.T, p *peers, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := p.dial(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestPeersExchange sends events both ways at once: each arrives as it was, in order, and its outcome comes back.
func TestPeersExchange(t *testing.T) {
	wantNoPeerGoroutines(t)
	const n = 1000
	seenA, seenB := make(chan *delivery, n), make(chan *delivery, n)
	a, addrA := startPeers(t, "pod-a", "ea", peerConfig(), takeAll(dropped, seenA))
	b, addrB := startPeers(t, "pod-b", "eb", peerConfig(), takeAll(written, seenB))
	toA, toB := newPeerLedger(t), newPeerLedger(t)
	for seq := uint64(1); seq <= n; seq++ {
		a.push(member{"pod-b", "eb"}, addrB, toB.delivery(seq))
		b.push(member{"pod-a", "ea"}, addrA, toA.delivery(seq))
	}
	toB.want(n, written)
	toA.want(n, dropped)
	for seq := uint64(1); seq <= n; seq++ {
		got, want := <-seenB, toB.delivery(seq)
		if got.seq != seq || got.kind != want.kind || got.company != want.company || got.agent != want.agent || got.chat != want.chat ||
			got.count != want.count || got.requestID != want.requestID || string(got.payload) != string(want.payload) || !got.stored.Equal(want.stored) {
			t.Fatalf("event %d arrived as %+v, count %d; want %+v, count %d", seq, got.event, got.count, want.event, want.count)
		}
	}
	wantPeerMetric(t, "sent", counterValue(a.m.grpcMessagesSentTotal.with("pod-b")), n)
	wantPeerMetric(t, "received", counterValue(b.m.grpcMessagesReceivedTotal.with("pod-a")), n)
	wantPeerMetric(t, "pool size", a.m.grpcPoolSize.with().Get(), 1)
	wantPeerMetric(t, "connections created", counterValue(a.m.grpcPoolConnectionsCreated.with()), 1)
}

// TestPeerOutcomes: every outcome survives the way back.
func TestPeerOutcomes(t *testing.T) {
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	for o := gone; o <= failed; o++ {
		_, addr := startPeers(t, "pod-b", "eb", peerConfig(), takeAll(o, nil))
		l := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, addr, l.delivery(1))
		l.want(1, o)
	}
	if got := outcomeFromWire(99); got != failed {
		t.Errorf("an unknown outcome is read as %s", got)
	}
}

// TestPeerNamesWhoMissed: what is addressed to a former life fails, and the delivery remembers where: whoever gives it up leaves a note
// for that life, whose sockets are told by the life after it.
func TestPeerNamesWhoMissed(t *testing.T) {
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	_, addr := startPeers(t, "pod-b", "eb-2", peerConfig(), wantNoDelivery(t))
	_, good := startPeers(t, "pod-c", "ec", peerConfig(), takeAll(written, nil))
	l := newPeerLedger(t)
	d := l.delivery(1)
	d.open.Store(3)
	a.push(member{"pod-b", "eb-1"}, addr, d)
	a.push(member{"pod-c", "ec"}, good, d)
	d.settle(written)
	l.want(1, failed)
	if !slices.Equal(d.missed, []member{{"pod-b", "eb-1"}}) {
		t.Errorf("missed by %v", d.missed)
	}
}

// TestPeerMixedLives: one stream carries events for several lives, each judged by its own.
func TestPeerMixedLives(t *testing.T) {
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	_, addr := startPeers(t, "pod-b", "eb-2", peerConfig(), takeAll(written, nil))
	old, now := newPeerLedger(t), newPeerLedger(t)
	for seq := uint64(1); seq <= 100; seq++ {
		a.push(member{"pod-b", "eb-1"}, addr, old.delivery(seq))
		a.push(member{"pod-b", "eb-2"}, addr, now.delivery(seq))
	}
	old.want(100, failed)
	now.want(100, written)
}

// TestPeerFaultyEvents: an event that would not pass when it came from JetStream does not pass from a peer.
func TestPeerFaultyEvents(t *testing.T) {
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	_, addr := startPeers(t, "pod-b", "eb", peerConfig(), wantNoDelivery(t))
	faults := map[string]func(d *delivery){
		"sequence 0":      func(d *delivery) { d.seq = 0 },
		"count 0":         func(d *delivery) { d.count = 0 },
		"company":         func(d *delivery) { d.company = "a.b" },
		"agent":           func(d *delivery) { d.agent = "" },
		"chat":            func(d *delivery) { d.chat = "a b" },
		"no chat":         func(d *delivery) { d.chat = "" },
		"needless chat":   func(d *delivery) { d.kind = kindChat },
		"kind":            func(d *delivery) { d.kind = kindAgent + 1 },
		"payload":         func(d *delivery) { d.payload = []byte(`[]`) },
		"payload UTF-8":   func(d *delivery) { d.payload = []byte("{\"a\":\"\xff\"}") },
		"request id size": func(d *delivery) { d.requestID = strings.Repeat("x", 129) },
	}
	for name, spoil := range faults {
		t.Run(name, func(t *testing.T) {
			l := newPeerLedger(t)
			d := l.delivery(2)
			spoil(d)
			if d.kind > kindAgent {
				if _, err := a.eventFromWire(&peerpb.Event{Seq: 1, Count: 1, Company: "c", Agent: "a", Payload: []byte("{}")}); err == nil {
					t.Error("an event of no kind passes")
				}
				return
			}
			a.push(member{"pod-b", "eb"}, addr, d)
			l.want(1, failed)
		})
	}
}

// TestPeerWindowFull: never more than the window is in flight. More may wait for a moment; once the peer is slow, a push
// fails at once, whatever the others wait for, and passes again as soon as they are settled.
func TestPeerWindowFull(t *testing.T) {
	cfg := peerConfig()
	cfg.PeerWindow = 8
	held := make(chan *delivery, 16)
	a, _ := startPeers(t, "pod-a", "ea", cfg)
	_, addr := startPeers(t, "pod-b", "eb", cfg, func(p *peers) {
		p.deliver = func(d *delivery) { d.open.Store(1); held <- d }
	})
	waiting, over, next := newPeerLedger(t), newPeerLedger(t), newPeerLedger(t)
	for seq := uint64(1); seq <= 12; seq++ {
		a.push(member{"pod-b", "eb"}, addr, waiting.delivery(seq))
	}
	slow := func() bool {
		q := a.get(peerKey{"pod-b", addr})
		q.mu.Lock()
		defer q.mu.Unlock()
		return q.slow
	}
	wantEventually(t, "the peer is slow", slow)
	if n := len(held); n != 8 {
		t.Errorf("%d events in flight, want the window, 8", n)
	}
	for seq := uint64(1); seq <= 100; seq++ {
		a.push(member{"pod-b", "eb"}, addr, over.delivery(seq))
	}
	over.want(100, failed)
	for range 12 {
		(<-held).settle(written)
	}
	waiting.want(12, written)
	wantEventually(t, "the peer is slow no more", func() bool { return !slow() })
	a.push(member{"pod-b", "eb"}, addr, next.delivery(1))
	(<-held).settle(duplicate)
	next.want(1, duplicate)
}

// TestPeerBigEvents: payloads above gRPC's own default limit pass, among small ones.
func TestPeerBigEvents(t *testing.T) {
	cfg := peerConfig()
	cfg.PeerTimeout, cfg.NATSAckWait = 20*time.Second, time.Minute // it is about size, and the race detector is slow
	a, _ := startPeers(t, "pod-a", "ea", cfg)
	_, addr := startPeers(t, "pod-b", "eb", cfg, takeAll(written, nil))
	l := newPeerLedger(t)
	for seq := uint64(1); seq <= 20; seq++ {
		d := l.delivery(seq)
		if seq%10 == 0 {
			d.payload = fmt.Appendf(nil, `{"a":"%s"}`, strings.Repeat("x", 6<<20))
		}
		a.push(member{"pod-b", "eb"}, addr, d)
	}
	l.want(20, written)
}

// TestPeerStopAnswersWhatItHas: a pod that stops settles what it was sent before its streams end.
func TestPeerStopAnswersWhatItHas(t *testing.T) {
	held := make(chan *delivery, 16)
	a, _ := startPeers(t, "pod-a", "ea", peerConfig())
	b, addr := startPeers(t, "pod-b", "eb", peerConfig(), func(p *peers) {
		p.deliver = func(d *delivery) { d.open.Store(1); held <- d }
	})
	l := newPeerLedger(t)
	for seq := uint64(1); seq <= 10; seq++ {
		a.push(member{"pod-b", "eb"}, addr, l.delivery(seq))
	}
	first := <-held
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		b.stop(ctx)
	}()
	<-b.stopping
	first.settle(written)
	for range 9 {
		(<-held).settle(written)
	}
	l.want(10, written)
	<-stopped
	if b.serving() {
		t.Error("still serves")
	}
}

// TestPeerBrokenStream: everything in flight on a stream that breaks fails, once, and counts as one failure; the next event
// takes a new stream.
func TestPeerBrokenStream(t *testing.T) {
	wantNoPeerGoroutines(t)
	synctest.Test(t, func(t *testing.T) {
		net := newPeerPipes()
		var hold atomic.Bool
		hold.Store(true)
		late := make(chan *delivery, 1000)
		a := servePeers(t, "pod-a", "ea", peerConfig(), net.listen("a"), net.on)
		servePeers(t, "pod-b", "eb", peerConfig(), net.listen("b"), func(p *peers) {
			p.deliver = func(d *delivery) {
				d.open.Store(1)
				if hold.Load() {
					late <- d
				} else {
					d.settle(written)
				}
			}
		})
		l := newPeerLedger(t)
		for seq := uint64(1); seq <= 500; seq++ {
			a.push(member{"pod-b", "eb"}, "b", l.delivery(seq))
		}
		time.Sleep(100 * time.Millisecond)
		net.cut()
		l.want(500, failed)
		for len(late) > 0 {
			(<-late).settle(written) // after the end of its stream: of no use to anyone, and no harm
		}
		hold.Store(false)
		again := newPeerLedger(t)
		a.push(member{"pod-b", "eb"}, "b", again.delivery(1))
		again.want(1, written)
		if q := a.get(peerKey{"pod-b", "b"}); q.breaker.state != breakerClosed || net.dialled() != 2 {
			t.Errorf("breaker %s after one broken stream, %d dials", q.breaker.state, net.dialled())
		}
		wantPeerMetric(t, "closed", counterValue(a.m.grpcPoolConnectionsClosed.with(string(endBroken))), 1)
	})
}

// TestPeerRestartsUnderLoad breaks the connections again and again while several goroutines push: whatever happens,
// each event is settled once, and none is lost on the way.
func TestPeerRestartsUnderLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		net := newPeerPipes()
		a := servePeers(t, "pod-a", "ea", peerConfig(), net.listen("a"), net.on)
		b := servePeers(t, "pod-b", "eb", peerConfig(), net.listen("b"), net.on)
		later := make(chan *delivery, 100000)
		echo := func(d *delivery) {
			d.open.Store(1)
			if d.seq%3 == 0 {
				later <- d
			} else {
				d.settle(written)
			}
		}
		a.deliver, b.deliver = echo, echo
		l := newPeerLedger(t)
		var pushers sync.WaitGroup
		const each = 2000
		for g := range uint64(4) {
			pushers.Go(func() {
				from, pod, life, addr := a, "pod-b", "eb", "b"
				if g%2 == 1 {
					from, pod, life, addr = b, "pod-a", "ea", "a"
				}
				for i := range uint64(each) {
					from.push(member{pod, life}, addr, l.delivery(g*each+i+1))
					if i%50 == 0 {
						time.Sleep(20 * time.Millisecond)
					}
				}
			})
		}
		settler := make(chan struct{})
		go func() {
			for d := <-later; d != nil; d = <-later {
				d.settle(written)
			}
			close(settler)
		}()
		for range 20 {
			time.Sleep(35 * time.Millisecond)
			net.cut()
		}
		pushers.Wait()
		time.Sleep(40 * time.Second) // past every time-out
		later <- nil
		<-settler
		got := l.counts()
		if got[written]+got[failed] != 4*each || got[written] < each || got[failed] == 0 {
			t.Errorf("settled %v of %d", got, 4*each)
		}
	})
}
