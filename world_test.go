package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// world is pod-1 from the router to the rings, with a Redis and peers in memory, in a bubble. Nothing of it runs by itself but claims
// and the connections to peers.
type world struct {
	t        *testing.T
	v        *redisServer
	n        *peerPipes
	cfg      *settings
	m        *Metrics
	lease    *lease
	owners   *owners
	consumer *consumer
	share    *share
	peers    *peers
	hub      *hub
	router   *router
	beat     *beat
}

func newWorld(t *testing.T, change func(*Config)) *world {
	t.Helper()
	peering := peerConfig()
	w := &world{t: t, v: newRedisServer(t), n: newPeerPipes(), m: newMetrics(), cfg: testSettings(func(c *Config) {
		c.NATSAckWait, c.NATSMaxAckPending, c.NATSPrefetch, c.NATSPrefetchBytes = 30*time.Second, 1000, 10, 1<<20
		c.NATSRetryHorizon, c.NATSNakDelay, c.NATSParkedBudget = time.Minute, time.Second, 100
		c.PeerTimeout, c.PeerIdleTimeout, c.PeerHealthInterval = peering.PeerTimeout, peering.PeerIdleTimeout, peering.PeerHealthInterval
		c.PeerBreakerThreshold, c.PeerBreakerOpen, c.PeerWindow, c.AuthTokenAESKey = peering.PeerBreakerThreshold, peering.PeerBreakerOpen, peering.PeerWindow, peerKeyA
		c.SessionTTL, c.SessionRefreshInterval = 30*time.Second, 10*time.Second
		c.ServerDrainSpread = 0
		if change != nil {
			change(c)
		}
	})}
	w.lease = testLease(t, w.v, w.cfg)
	w.owners = newOwners(w.cfg, w.lease.rdb, w.m, w.lease)
	startOwners(t, w.owners)
	w.consumer = &consumer{cfg: w.cfg, m: w.m, lease: w.lease, doubt: make(chan struct{}, 1), created: time.Unix(1700000000, 0)}
	w.consumer.up.Store(true)
	w.share = newShare(w.cfg, w.m)
	w.peers = newPeers(w.cfg, w.m, w.lease, w.share)
	w.peers.network = w.n.dial
	t.Cleanup(func() { w.peers.stop(context.Background()) })
	w.hub = newHub(w.cfg, w.m, w.owners, w.consumer, nil)
	w.router = newRouter(w.cfg, w.m, w.lease, w.consumer, w.owners, w.hub, w.peers, w.share)
	w.consumer.to = w.router
	w.beat = &beat{cfg: w.cfg, m: w.m, lease: w.lease, owners: w.owners, hub: w.hub, peers: w.peers, consumer: w.consumer,
		sessions: newSessions(w.cfg, w.lease.rdb, w.m, w.lease, w.peers)}
	w.renew()
	return w
}

// renew renews the lease, and knows the live pods then.
func (w *world) renew() {
	w.t.Helper()
	if _, err := w.lease.renew(w.t.Context(), nil, w.peers); err != nil {
		w.t.Fatal(err)
	}
}

// run lets the router run until the test's end, or until stop is called.
func (w *world) run() (stop func()) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { w.router.run(ctx) })
	wg.Go(func() { w.router.tick(ctx) })
	stop = sync.OnceFunc(func() {
		if !w.router.leaving() {
			w.router.stop()
		}
		cancel()
		wg.Wait()
	})
	w.t.Cleanup(stop)
	return stop
}

// pod starts another pod, which does this with what it gets.
func (w *world) pod(m member, deliver func(*peers)) *peers {
	w.t.Helper()
	p := servePeers(w.t, m.pod, m.life, peerConfig(), w.n.listen(m.pod+":1"), w.n.on, deliver)
	w.v.addPod(m)
	return p
}

// own has pods own a route in Redis.
func (w *world) own(r route, pods ...member) {
	w.v.change(func() {
		if w.v.sets[r.key()] == nil {
			w.v.sets[r.key()] = map[string]bool{}
		}
		for i, m := range pods {
			w.v.sets[r.key()][fmt.Sprint(m, "#", i)] = true
		}
	})
}

// socket opens one that keeps positions, has been greeted, and is written to by the test alone.
func (w *world) socket(cl claims, chat string) *conn {
	w.t.Helper()
	c := w.hub.newConn(goneConn{}, &cl, lock{release: func() {}}, "req")
	if !w.hub.register(c) {
		w.t.Fatal("no room")
	}
	c.ring.begin(past{positions: true, chat: chat})
	w.hub.enter(c)
	if err := c.claim(); err != nil {
		w.t.Fatal(err)
	}
	c.ring.greet(newReply("ready", nil), w.hub.stream(), c.startPosition(w.hub.stream()), time.Now())
	c.ring.open()
	return c
}

func (w *world) user(agent, chat string) *conn {
	w.t.Helper()
	return w.socket(claims{company: "acme", agent: agent, user: "u"}, chat)
}

func (w *world) admin(company, agent string) *conn {
	w.t.Helper()
	return w.socket(claims{admin: "root", scopeCompany: company, scopeAgent: agent}, "")
}

// write writes what waits in the socket's ring, and settles it.
func (w *world) write(c *conn, want ...string) {
	w.t.Helper()
	wantWritten(w.t, &c.ring, want...)
}

// message is a message from JetStream that remembers what it was told.
type message struct {
	jetstream.Msg
	subject string
	data    string
	headers nats.Header
	seq     uint64
	count   uint64    // deliveries
	stored  time.Time // zero = now

	mu   sync.Mutex // guards told
	told []string
}

func (m *message) Subject() string      { return m.subject }
func (m *message) Headers() nats.Header { return m.headers }
func (m *message) Data() []byte         { return []byte(m.data) }
func (m *message) Ack() error           { return m.tell("ack") }
func (m *message) Term() error          { return m.tell("term") }

func (m *message) NakWithDelay(d time.Duration) error { return m.tell("nak " + d.String()) }

func (m *message) tell(s string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.told = append(m.told, s)
	return nil
}

func (m *message) Metadata() (*jetstream.MsgMetadata, error) {
	return &jetstream.MsgMetadata{Sequence: jetstream.SequencePair{Stream: m.seq}, NumDelivered: max(m.count, 1), Timestamp: m.stored}, nil
}

// chatOf is a chat event of acme's agent.
func chatOf(agent string, seq, count uint64) *message {
	return &message{subject: "wa.acme." + agent + ".chats", data: "{}", seq: seq, count: count, stored: time.Now()}
}

// wantTold checks what JetStream was told of a message: nothing, or one thing.
func wantTold(t *testing.T, m *message, want ...string) {
	t.Helper()
	m.mu.Lock()
	defer m.mu.Unlock()
	if !slices.Equal(m.told, want) {
		t.Errorf("JetStream was told %q of %d, want %q", m.told, m.seq, want)
	}
}

// wantLedgers holds both ledgers against themselves: what was received has ended or is in hand.
func (w *world) wantLedgers(inHand int) {
	w.t.Helper()
	received, ended := 0, 0
	for _, k := range kindNames {
		received += int(w.m.natsMessagesReceivedTotal.with(k).Get())
		for _, o := range []string{"delivered", "dropped", "replayed", "unselected", "nak_failed", "nak_no_owner", "malformed", "no_owner", "shed", "expired", "late"} {
			ended += int(w.m.eventsTotal.with(k, o).Get())
		}
	}
	if now := int(w.m.eventsInHand.with().Get()); received != ended+now || now != inHand {
		w.t.Errorf("received %d, ended %d, in hand %d; want %d in hand", received, ended, now, inHand)
	}
}
