package main

import (
	"context"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	vm "github.com/VictoriaMetrics/metrics"
)

// hub owns every socket of this pod, their shared writers and the tickers that look after them.
type hub struct {
	cfg      *settings
	m        *Metrics
	owners   *owners
	replays  *replays
	consumer *consumer
	auth     *auth

	policy  sendPolicy
	count   counts
	writers []*writer
	next    atomic.Uint32 // of writers, for the next socket

	turns chan struct{} // one taken by each newcomer that is being set up, first come first served; never closed

	wg sync.WaitGroup // goroutines of sockets: their own, those that write alone, rejected ones

	mu       sync.Mutex // guards all below
	conns    map[*conn]struct{}
	places   int // taken of MAX_CONNECTIONS
	rejects  int
	refusing bool // reserve says no
	draining bool // sockets that still come are closed at once
	drained  bool // no goroutine is added to wg any more, but by sockets that live

	slowMu sync.Mutex // guards slow
	slow   map[*conn]int

	issueMu sync.Mutex   // held while policy.latest is replaced
	issued  atomic.Int64 // when that was, Unix ns; 0 = never
	indexMu sync.RWMutex // guards index
	// index holds the sockets of each route. Its lists are replaced, never changed, so that readers need no copy.
	index map[route][]*conn
}

// counts are the series that each event touches, looked up once.
type counts struct {
	pushed  *vm.Counter
	ended   [len(outcomeNames)]*vm.Counter
	used    *vm.Gauge
	room    *vm.Gauge
	latency *vm.PrometheusHistogram
	sent    func(*frame, *delivery)
}

func newCounts(m *Metrics) counts {
	c := counts{
		pushed:  m.targetsTotal.with("pushed"),
		used:    m.websocketBufferUsed.with(),
		room:    m.websocketBufferCapacity.with(),
		latency: m.eventDeliverySeconds.with(),
	}
	for o := range outcomeNames {
		c.ended[o] = m.targetsTotal.with(outcomeNames[o])
	}
	var events [len(kindNames)]*vm.Counter
	for k, name := range kindNames {
		events[k] = m.messagesSentTotal.with(name)
	}
	c.sent = func(f *frame, d *delivery) {
		if d != nil {
			events[d.kind].Inc()
		} else {
			m.messagesSentTotal.with(f.label).Inc()
		}
	}
	return c
}

func newHub(cfg *settings, m *Metrics, o *owners, c *consumer, a *auth) *hub {
	h := &hub{
		cfg: cfg, m: m, owners: o, replays: newReplays(cfg, c), consumer: c, auth: a,
		count: newCounts(m),
		conns: map[*conn]struct{}{},
		slow:  map[*conn]int{},
		index: map[route][]*conn{},
		turns: make(chan struct{}, setUpsAtOnce),
	}
	h.use(cfg.Load())
	return h
}

// sockets returns those on r; the slice must not be changed.
func (h *hub) sockets(r route) []*conn {
	h.indexMu.RLock()
	defer h.indexMu.RUnlock()
	return h.index[r]
}

// enter makes c a target of its route's events.
func (h *hub) enter(c *conn) {
	h.indexMu.Lock()
	defer h.indexMu.Unlock()
	r := c.route()
	c.entered = time.Now() // later than the arrival of any event that has missed it
	h.index[r] = append(slices.Clip(slices.Clone(h.index[r])), c)
}

// exit undoes enter.
func (h *hub) exit(c *conn) {
	h.indexMu.Lock()
	defer h.indexMu.Unlock()
	r := c.route()
	left := slices.DeleteFunc(slices.Clone(h.index[r]), func(o *conn) bool { return o == c })
	if len(left) == 0 {
		delete(h.index, r)
	} else {
		h.index[r] = left
	}
}

// position is this pod's newest one; nil before the first.
func (h *hub) position() *position { return h.policy.latest.Load() }

// stream names the stream that positions are of.
func (h *hub) stream() string { return h.consumer.streamID() }

// issue makes p the pod's newest position, unless it is of another stream than the present one. Only beat may call it: it knows that
// the position is true.
func (h *hub) issue(p place) {
	h.issueMu.Lock()
	defer h.issueMu.Unlock()
	if p.stream != h.stream() {
		return
	}
	h.issued.Store(time.Now().UnixNano())
	if old := h.position(); old == nil || p.seq > old.seq {
		h.policy.latest.Store(&position{p, newPosition(p.seq)})
	}
}

// note marks a gap on the sockets that a note names (see lease.leaveNotes).
func (h *hub) note(name, reason string) {
	company, agent, toAdmins := parseNote(name)
	ev := event{company: company, agent: agent, toUsers: h.cfg.Load().EventsAgentsToUsers}
	if toAdmins {
		ev.kind = kindAgent
	}
	for r := range ev.routes() {
		for _, c := range h.sockets(r) {
			if c.claims.admin == "" || c.claims.covers(company, agent) {
				c.gap(reason)
			}
		}
	}
}

// gapAll marks a gap on every socket.
func (h *hub) gapAll(reason string) {
	h.each(func(c *conn) { c.gap(reason) })
}

// newStream has every socket forget the sequences of another stream, and tells it so. h.stream names the new one already.
func (h *hub) newStream() {
	h.issueMu.Lock()
	h.policy.latest.Store(nil)
	h.issueMu.Unlock()
	h.replays.forget()
	h.each(func(c *conn) {
		c.ring.forget()
		c.gap("stream")
	})
}

// use takes the settings of the rings, and makes the shared writers.
func (h *hub) use(c *Config) {
	h.policy.size = c.WebsocketBufferSize
	h.policy.block = c.WebsocketDropPolicy == "block"
	h.policy.blockTimeout = c.WebsocketBlockTimeout
	h.policy.threshold = int(c.WebsocketCompressionThreshold)
	h.policy.gaps = func(reason string) { h.m.gapsTotal.with(reason).Inc() }
	for range runtime.GOMAXPROCS(0) {
		h.writers = append(h.writers, newWriter(h))
	}
}

// run writes to the sockets and looks after them until ctx ends, which must be after drain.
func (h *hub) run(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	for _, w := range h.writers {
		wg.Go(func() { w.run(ctx) })
	}
	wg.Go(func() { h.tidy(ctx) })
	tick := time.NewTicker(slowTick)
	defer tick.Stop()
	var scan time.Time
	var all []*conn
	for {
		select {
		case now := <-tick.C:
			h.tendSlow(now)
			if now.Before(scan) {
				continue
			}
			// Once a second is enough for heartbeats and tokens, unless pings are set to come faster.
			scan = now.Add(min(time.Second, h.cfg.Load().WebsocketPingInterval/4))
			all = h.list(all)
			for _, c := range all {
				c.tend(now)
			}
			clear(all)
		case <-ctx.Done():
			return
		}
	}
}

// tidy gives memory back after a storm of connects, once it is over: what 10,000 handshakes leave behind is a third of the
// pod's memory (measured), and an idle service allocates too little to be collected sooner than Go's two minutes.
func (h *hub) tidy(ctx context.Context) {
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	var last, tidied uint32 // sockets opened so far, at the last tick and when memory was given back
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		opened := h.next.Load()
		if opened == last && opened-tidied >= 1000 {
			debug.FreeOSMemory()
			tidied = opened
		}
		last = opened
	}
}

// tendSlow looks after the sockets that do not take what waits for them: events behind their rings expire, and those
// whose time is over are closed.
func (h *hub) tendSlow(now time.Time) {
	timeout := h.cfg.Load().WebsocketWriteTimeout
	for _, c := range h.slowOnes() {
		h.settle(c.ring.expire(now, nil))
		if c.ring.overdue(now, timeout) {
			h.closeSlow(c)
		}
	}
}

func (h *hub) slowOnes() []*conn {
	h.slowMu.Lock()
	defer h.slowMu.Unlock()
	return slices.Collect(maps.Keys(h.slow))
}

func (h *hub) closeSlow(c *conn) {
	h.m.slowClientsDisconnectedTotal.with().Inc()
	c.close(closeSlowClient, "slow-client")
}

// closeMostStuck closes the socket that holds most events and does not take them. It says false when there is none.
func (h *hub) closeMostStuck() bool {
	var worst *conn
	most := 0
	for _, c := range h.slowOnes() {
		if n := c.ring.stuckEvents(time.Now()); n > most {
			worst, most = c, n
		}
	}
	if worst == nil {
		return false
	}
	h.closeSlow(worst)
	return true
}

// settle ends deliveries at their targets.
func (h *hub) settle(ends []settlement) {
	for _, e := range ends {
		h.count.ended[e.o].Inc()
		h.count.used.Dec()
		if e.o == dropped {
			h.m.websocketMessagesDroppedTotal.with("buffer").Inc()
		}
		e.d.settle(e.o)
	}
}

// list returns every socket of this pod, in the memory of buf if it is large enough.
func (h *hub) list(buf []*conn) []*conn {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.AppendSeq(slices.Grow(buf[:0], len(h.conns)), maps.Keys(h.conns))
}

// each calls f for every socket of this pod, outside of the hub's lock.
func (h *hub) each(f func(*conn)) {
	for _, c := range h.list(nil) {
		f(c)
	}
}

// reserve takes one of the MAX_CONNECTIONS places, or says that there is none (or that the hub drains).
// Each place taken is given back by free or by the end of the socket that serve made.
func (h *hub) reserve() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.refusing || h.places >= h.cfg.Load().ServerMaxConnections {
		return false
	}
	h.places++
	return true
}

func (h *hub) free() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.places--
}

// setUpsAtOnce bounds how many newcomers are being set up: session, handshake and claim. In a crowd that comes back those before the others
// are live soon, and what all of them ask of Redis fits its connections.
const setUpsAtOnce = 64

// turn waits for one of the turns to be set up. It says false when ctx ended first. Each turn is given back by endTurn, or by the socket that
// serve made, when its route is claimed or it has ended.
func (h *hub) turn(ctx context.Context) bool {
	waiting := h.m.upgradesWaiting.with()
	waiting.Inc()
	defer waiting.Dec()
	select {
	case h.turns <- struct{}{}:
		return true
	case <-ctx.Done():
		return false
	}
}

func (h *hub) endTurn() { <-h.turns }

func (h *hub) startReject() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.drained || h.rejects >= maxRejects {
		return false
	}
	h.rejects++
	h.wg.Add(1)
	return true
}

func (h *hub) endReject() {
	h.mu.Lock()
	h.rejects--
	h.mu.Unlock()
	h.wg.Done()
}

// serve upgrades r and runs the socket on a goroutine of its own; it returns once the connection is hijacked
// (or has failed). It owns sess, the place from reserve and the turn from here on and gives all back, whatever happens.
func (h *hub) serve(w http.ResponseWriter, r *http.Request, cl *claims, sess *session, requestID string) {
	h.start(w, r, cl, lock{sess.id, sess.bind, sess.release}, requestID)
}

// start is serve for whatever locks a session.
func (h *hub) start(w http.ResponseWriter, r *http.Request, cl *claims, l lock, requestID string) {
	past, _ := parsePast(r.URL.Query()) // checked by the server
	h.launch(w, r, cl, l, requestID, func(c *conn, u *upgrade) { c.run(u, past) })
}

// launch takes the connection over and lets a new socket live its life, which begins on a goroutine of its own and finds its
// end in conn.leave.
func (h *hub) launch(w http.ResponseWriter, r *http.Request, cl *claims, l lock, requestID string, life func(*conn, *upgrade)) {
	u, err := takeOver(w, r)
	if err != nil {
		slog.Warn("socket not opened", "request_id", requestID, "err", err)
		l.release()
		h.endTurn()
		h.free()
		writeError(w, internalServerError())
		return
	}
	if h.cfg.Load().WebsocketCompression != "disabled" {
		u.extensions = deflateAnswer(r.Header)
	}
	c := h.newConn(u.nc, cl, l, requestID)
	c.ring.deflate, c.turn = u.extensions != "", true
	if !h.register(c) {
		u.nc.Close()
		l.release()
		h.endTurn()
		h.free()
		return
	}
	go life(c, u) // counted by register
}

// register makes c one of the hub's sockets. It says false after the end of a drain.
func (h *hub) register(c *conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.drained {
		return false
	}
	h.conns[c] = struct{}{}
	h.count.room.Add(float64(h.policy.size))
	h.wg.Add(1)
	return true
}

func (h *hub) unregister(c *conn) {
	h.mu.Lock()
	delete(h.conns, c)
	h.places--
	h.mu.Unlock()
	h.count.room.Add(-float64(h.policy.size))
	h.wg.Done()
}

// stopAccepting makes reserve refuse from now on.
func (h *hub) stopAccepting() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.refusing = true
}

// drain closes all sockets as sendAway does, and returns when all are gone or ctx ends.
func (h *hub) drain(ctx context.Context) error {
	h.stopAccepting()
	h.sendAway(ctx)
	h.mu.Lock()
	h.draining = true // those that were on their way when all was listed
	h.mu.Unlock()
	spread := h.cfg.Load().ServerDrainSpread
	h.each(func(c *conn) { c.goAway(spread) })
	return h.waitGone(ctx)
}

// sendAway closes the sockets that there are with 1001, evenly spread over DRAIN_SPREAD. Each client is told a delay of its own after
// which to reconnect, so that they do not all come at once.
func (h *hub) sendAway(ctx context.Context) {
	spread := h.cfg.Load().ServerDrainSpread
	start := time.Now()
	all := h.list(nil)
	for i, c := range all {
		due := start.Add(spread * time.Duration(i) / time.Duration(len(all)))
		if wait := time.Until(due); wait > 0 && !pause(ctx, wait) {
			return
		}
		c.goAway(spread)
	}
}

// waitGone waits until no goroutine of a socket is left; when ctx ends before, it cuts the connections that are.
func (h *hub) waitGone(ctx context.Context) error {
	h.mu.Lock()
	h.drained = true
	h.mu.Unlock()
	gone := make(chan struct{})
	go func() { // ends with the last socket, whose end is bounded
		h.wg.Wait()
		close(gone)
	}()
	select {
	case <-gone:
		return nil
	case <-ctx.Done():
		h.each(func(c *conn) { c.nc.Close() })
		return ctx.Err()
	}
}

// goAway closes a socket because the pod stops.
func (c *conn) goAway(spread time.Duration) {
	after := time.Duration(0)
	if spread > 0 {
		after = rand.N(spread)
	}
	c.close(closeGoingAway, "drain retry-after-ms="+strconv.FormatInt(after.Milliseconds(), 10))
}
