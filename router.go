package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

const (
	// batchPatience is how long a batch of events waits for this pod's own writers, at the most: they only wait for the processor.
	batchPatience = 500 * time.Millisecond
	// lookupTimeout is how long events wait for Redis before they go to every known pod.
	lookupTimeout = 250 * time.Millisecond
	// Redis is asked for askAtOnce events at a time, and again after askPause when it has not answered.
	askPause = 100 * time.Millisecond
	// idleCallback is how long the library calls nobody when it has nothing: what it had in hand during a wait is gone then. A shorter
	// pause is a busy machine's.
	idleCallback = 25 * time.Millisecond
	askAtOnce    = 512
)

// router leads an event its way, in two stages, so that a far or slow Redis delays no socket of this pod:
//
//	accept   the consumer's callback: queues the message
//	serve    parses it, builds its frame and hands it to the sockets here
//	lookUp   asks Redis who else owns the agents of all events that wait, and hands each event to those pods
//
// An event is settled when its last target has settled and Redis has answered: verdict.go.
type router struct {
	cfg      *settings
	m        *Metrics
	lease    *lease
	owners   *owners
	hub      *hub
	peers    *peers
	share    *share
	consumer *consumer

	newest   atomic.Int64  // newest store time received, ns: the stream's own clock
	waiting  atomic.Int32  // calls of accept that wait for room: for a moment a new flow may call it beside the old one
	room     chan struct{} // room for 1: less may be in hand; never closed
	stopping chan struct{} // closed by stop
	ended    chan struct{} // closed when serve has ended
	arrived  *queue        // accept to serve
	served   *queue        // serve to lookUp

	malformed sparse

	acceptMu sync.Mutex // guards accepted, waits and lastSeen
	accepted int
	returned time.Time // when accept was left last
	waits    []wait    // those that messages to come may have arrived during
	lastSeen uint64    // highest sequence received, also of what peers have sent,
	storedAt time.Time // and when its message was stored
	suspect  bool      // a lower sequence was stored later: these two stay until the consumer has looked into the stream

	// Owned by lookUp: the routes of a batch, and where each stands.
	routes []route
	places map[route]int

	mu         sync.Mutex // guards all below
	unanswered []*pulled  // events that went to every known pod and wait for Redis
	asking     bool       // askAgain runs
	saidFull   bool       // since it began
	asks       sync.WaitGroup
	givenUp    []note // to be left in Redis
}

func newRouter(cfg *settings, m *Metrics, l *lease, c *consumer, o *owners, h *hub, p *peers, s *share) *router {
	r := &router{cfg: cfg, m: m, lease: l, consumer: c, owners: o, hub: h, peers: p, share: s, places: map[route]int{},
		room: make(chan struct{}, 1), stopping: make(chan struct{}), ended: make(chan struct{})}
	r.arrived, r.served = newQueue(r.stopping), newQueue(r.ended)
	return r
}

// queue hands events from any goroutine to one.
type queue struct {
	more chan struct{}   // room for 1; never closed
	stop <-chan struct{} // closed when nothing more will be added

	mu    sync.Mutex // guards all below
	items []*pulled
	ended bool
}

func newQueue(stop <-chan struct{}) *queue { return &queue{more: make(chan struct{}, 1), stop: stop} }

// add says false when nobody looks into the queue any more.
func (q *queue) add(p *pulled) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.ended {
		return false
	}
	if q.items = append(q.items, p); len(q.items) == 1 {
		poke(q.more)
	}
	return true
}

// next waits for events and returns all that there are, in exchange for the memory of buf. Nothing means the end.
func (q *queue) next(buf []*pulled) []*pulled {
	for stopped := false; ; {
		q.mu.Lock()
		items := q.items
		q.items = buf[:0]
		q.ended = stopped && len(items) == 0
		ended := q.ended
		q.mu.Unlock()
		if len(items) > 0 || ended {
			return items
		}
		buf = items
		select {
		case <-q.more:
		case <-q.stop:
			stopped = true
		}
	}
}

// wait is when accept had to wait. Meanwhile messages may have come off the network behind its back, as many as PREFETCH at
// the most: those up to the number last count as arrived when it began.
type wait struct {
	began time.Time
	last  int
}

// accept is the consumer's callback: the library calls it for one message at a time. It waits only while this pod's share is
// full: when Redis does not answer, or router and writers are behind.
func (r *router) accept(msg jetstream.Msg) {
	at := time.Now()
	waits := r.share.full()
	at = r.arrivedAt(at, waits)
	if waits {
		r.waitRoom()
	}
	r.share.take(len(msg.Data()))
	p := &pulled{r: r, msg: msg}
	p.src, p.arrived = p, at
	if !r.arrived.add(p) && r.decode(p) { // the drain was faster than this callback, which waited for room
		p.end(nak, "nak_failed")
	}
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	r.returned = time.Now()
}

// arrivedAt is when the next message came off the network at the earliest; the library does not tell. waits says that accept
// is about to wait.
func (r *router) arrivedAt(now time.Time, waits bool) time.Time {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	r.accepted++
	if !r.returned.IsZero() && now.Sub(r.returned) > idleCallback {
		r.waits = nil
	}
	if waits {
		r.waits = append(r.waits, wait{now, r.accepted + r.cfg.prefetch()})
	}
	for len(r.waits) > 0 && r.waits[0].last < r.accepted {
		r.waits = r.waits[1:]
	}
	if len(r.waits) == 0 {
		return now
	}
	return r.waits[0].began
}

// waitRoom returns when there is room, or the router stops. Sockets that do not take their events make room first, the most
// stuck one before the others, but only for what they hold: not while the router is behind, or events wait for Redis.
func (r *router) waitRoom() {
	r.waiting.Add(1) // before the look that follows: what ends after it pokes
	defer r.waiting.Add(-1)
	for r.share.full() {
		if r.unansweredNow() > 0 {
			r.sayFull()
		} else if r.share.held() {
			r.hub.closeMostStuck() // one at a time: what it held is in hand until its NAKs are sent
		}
		select {
		case <-r.room:
		case <-r.stopping:
			return
		}
	}
}

// sayFull tells, once while Redis does not answer, that no more is taken until it does.
func (r *router) sayFull() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.saidFull {
		return
	}
	r.saidFull = true
	slog.Warn("this pod's share is full of events that wait for Redis: the rest waits in the stream", "events", len(r.unanswered))
}

func (r *router) wake() {
	if r.waiting.Load() > 0 {
		poke(r.room)
	}
}

// run leads events through both stages until stop was called and the last one is done.
func (r *router) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(r.serve)
	var batch []*pulled
	for {
		if batch = r.served.next(batch); len(batch) == 0 {
			break
		}
		for some := range slices.Chunk(batch, askAtOnce) {
			r.lookUp(ctx, some)
		}
		clear(batch)
	}
	wg.Wait()
}

// serve is the first stage.
func (r *router) serve() {
	defer close(r.ended)
	var batch []*pulled
	for {
		if batch = r.arrived.next(batch); len(batch) == 0 {
			return
		}
		patience := time.Now().Add(batchPatience)
		for _, p := range batch {
			if r.decode(p) {
				r.serveHere(p, patience)
				r.served.add(p)
			}
		}
		clear(batch)
	}
}

// serveHere hands an event to the sockets of this pod, of which the hub's index is exact at any time.
func (r *router) serveHere(p *pulled, patience time.Time) {
	for rt := range p.routes() {
		conns := r.hub.sockets(rt)
		for _, c := range conns {
			r.pace(c, patience)
		}
		p.pushHere(conns)
	}
}

// pace waits while a ring is full only because this pod's own writers are behind, as in the burst after an outage: of 5,000
// events for one agent half were dropped though the client read as fast as it could. No client can hold the flow up by
// this: a socket that does not take its events is written to by a goroutine of its own.
func (r *router) pace(c *conn, patience time.Time) {
	if r.share.inHand.Load() < int64(r.hub.policy.size) {
		return // no ring can be full
	}
	for spin := 0; c.ring.behind() && time.Now().Before(patience); spin++ {
		if spin < 10 {
			runtime.Gosched()
		} else {
			time.Sleep(100 * time.Microsecond)
		}
	}
}

// lookUp is the second stage: every event of the batch has arrived before Redis is asked. While Redis does not answer, or what it
// says is in doubt, events go to every known pod at once and wait for its answer.
func (r *router) lookUp(ctx context.Context, batch []*pulled) {
	if r.unansweredNow() == 0 && !r.lease.inDoubt() {
		ask, cancel := context.WithTimeout(ctx, lookupTimeout)
		found, err := r.find(ask, batch, &r.routes, r.places)
		cancel()
		if err == nil {
			r.dispatch(batch, found, r.places)
			return
		}
		slog.Debug("owners not looked up", "events", len(batch), "err", err)
	}
	everyone := r.lease.everyone()
	for _, p := range batch {
		r.flood(p, everyone)
	}
	r.keepUnanswered(ctx, batch)
}

// find asks who owns the routes of the batch; places tells where the answer for a route stands.
func (r *router) find(ctx context.Context, batch []*pulled, routes *[]route, places map[route]int) ([][]owner, error) {
	clear(places)
	*routes = (*routes)[:0]
	for _, p := range batch {
		for rt := range p.routes() {
			if _, ok := places[rt]; !ok {
				places[rt] = len(*routes)
				*routes = append(*routes, rt)
			}
		}
	}
	found, err := r.owners.find(ctx, *routes)
	if err == nil && r.lease.inDoubt() { // since it was asked
		err = errors.New("what Redis says of owners is in doubt")
	}
	return found, err
}

// dispatch hands each event to the pods that own its agent, and gives up the router's own hold on it.
func (r *router) dispatch(batch []*pulled, found [][]owner, places map[route]int) {
	var sent []member
	for _, p := range batch {
		if p.waited {
			r.serveNewcomers(p)
		}
		sent = sent[:0]
		for rt := range p.routes() {
			for _, o := range found[places[rt]] {
				if !slices.Contains(sent, o.member) {
					sent = append(sent, o.member)
					p.open.Add(1)
					r.peers.push(o.member, o.addr, &p.delivery)
				}
			}
		}
		p.routed = true
		r.share.routed.Add(int64(len(p.payload)))
		p.settle(gone)
	}
}

// unattended is the source of what is sent to pods that may not own the agent: what becomes of it decides nothing.
type unattended struct{}

func (unattended) settled(*delivery, outcome) {}

// flood hands an event to every pod, whatever its life. Those that turn out to own the agent get it once more when Redis has answered,
// and a socket that has had it says so.
func (r *router) flood(p *pulled, everyone []owner) {
	p.waited = true
	d := &delivery{event: p.event, count: p.count, arrived: p.arrived, src: unattended{}}
	d.open.Store(1)
	for _, o := range everyone {
		d.open.Add(1)
		r.peers.push(member{pod: o.pod}, o.addr, d)
	}
	d.settle(gone)
}

// serveNewcomers hands an event that has waited for Redis to the sockets that have come here meanwhile.
func (r *router) serveNewcomers(p *pulled) {
	p.count = max(p.count, 2) // such a socket may have had it from another pod
	for rt := range p.routes() {
		var came []*conn
		for _, c := range r.hub.sockets(rt) {
			if c.entered.After(p.arrived) {
				came = append(came, c)
			}
		}
		p.pushHere(came)
	}
}

// keepUnanswered has askAgain look the batch up.
func (r *router) keepUnanswered(ctx context.Context, batch []*pulled) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unanswered = append(r.unanswered, batch...)
	r.m.ownerUnanswered.with().Set(float64(len(r.unanswered)))
	if !r.asking {
		r.asking, r.saidFull = true, false
		slog.Warn("Redis does not say who owns agents: events go to every pod, and are settled when it has answered")
		r.asks.Go(func() { r.askAgain(ctx) })
	}
}

func (r *router) unansweredNow() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.unanswered)
}

// askAgain looks the unanswered events up until Redis has answered for those that there were at that moment; what has come since
// then takes the ordinary way. It ends with ctx: what is left then is left to JetStream.
func (r *router) askAgain(ctx context.Context) {
	began := time.Now()
	var routes []route
	places := map[route]int{}
	for pause(ctx, askPause) {
		r.dropLate()
		if r.lease.inDoubt() {
			continue
		}
		for {
			r.mu.Lock()
			batch := r.unanswered[:min(len(r.unanswered), askAtOnce)]
			r.asking = len(batch) > 0
			r.mu.Unlock()
			if len(batch) == 0 { // all were late, and Redis has not been asked
				return
			}
			ask, cancel := context.WithTimeout(ctx, time.Second)
			found, err := r.find(ask, batch, &routes, places)
			cancel()
			if err != nil {
				break
			}
			r.mu.Lock()
			rest := slices.Clone(r.unanswered[len(batch):])
			done := len(rest) <= askAtOnce
			if r.unanswered, r.asking = rest, !done; done {
				r.unanswered = nil
			}
			r.m.ownerUnanswered.with().Set(float64(len(r.unanswered)))
			r.mu.Unlock()
			r.dispatch(batch, found, places)
			if !done {
				continue
			}
			slog.Info("Redis says again who owns agents", "after", time.Since(began).String())
			for _, p := range rest {
				if !r.served.add(p) {
					p.settle(failed) // a drain: the other pods ask
				}
			}
			return
		}
	}
}

// dropLate lets go of the events that JetStream is about to give out again.
func (r *router) dropLate() {
	limit := r.cfg.lateAfter()
	var late []*pulled
	r.mu.Lock()
	kept := r.unanswered[:0:0]
	for _, p := range r.unanswered {
		if time.Since(p.arrived) > limit {
			late = append(late, p)
		} else {
			kept = append(kept, p)
		}
	}
	r.unanswered = kept
	r.m.ownerUnanswered.with().Set(float64(len(kept)))
	r.mu.Unlock()
	for _, p := range late {
		p.settle(gone) // nobody is told: it is too late for that
	}
}

// tick sends the NAKs that are held, leaves notes, lets NAKed events leave the share, and wakes an accept that waits for sockets to
// be recognised as stuck, until ctx ends.
func (r *router) tick(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	defer r.asks.Wait()
	wg.Go(func() { r.leaveNotes(ctx) })
	t := time.NewTicker(nakEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			sendNaks(r.share.takeNaks())
			r.share.expire(now, r.lease.livePods())
			r.wake()
		}
	}
}

// decode finds out what a message is about; a malformed one is terminated and false returned.
func (r *router) decode(p *pulled) bool {
	msg := p.msg
	p.open.Store(1) // until Redis has answered
	ev, err := parseSubject(r.cfg.Load().NATSSubjectPrefix, msg.Subject())
	md, mdErr := msg.Metadata()
	if err = errors.Join(err, mdErr, checkPayload(msg.Data())); err != nil {
		ev.kind = kindUnknown
	}
	again := false // a consumer that was made again begins to count again, at its ack floor
	if mdErr == nil {
		ev.seq, ev.stored, p.deliveries = md.Sequence.Stream, md.Timestamp, md.NumDelivered
		again = r.seen(md.Sequence.Stream, md.Timestamp)
	}
	p.count = p.deliveries
	if again {
		p.count = max(p.count, 2)
	}
	if p.deliveries > 1 {
		r.m.redeliveredTotal.with().Inc()
	}
	r.m.natsMessagesReceivedTotal.with(ev.kind.String()).Inc()
	r.m.eventsInHand.with().Inc()
	ev.toUsers = r.cfg.Load().EventsAgentsToUsers
	ev.payload, ev.requestID = msg.Data(), requestIDOf(msg, ev.seq)
	p.event = &ev
	switch {
	case msg.Headers().Get(jetstream.MarkerReasonHeader) != "": // of the server's, when it has removed a subject's last message
		p.end(ack, "marker")
		return false
	case err != nil:
		r.refuse(p, err)
		return false
	}
	return true
}

// seen notes how far the stream has come, and says whether that was known. A stream that has lost its end shows by a lower sequence that
// was stored later than a higher one.
func (r *router) seen(seq uint64, stored time.Time) bool {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	last := r.lastSeen
	switch {
	case r.suspect:
	case seq > last:
		r.lastSeen, r.storedAt = seq, stored
	case stored.After(r.storedAt):
		r.suspect = true
		poke(r.consumer.doubt)
	}
	r.newest.Store(max(r.newest.Load(), stored.UnixNano()))
	return seq <= last
}

// newestSeen is the message with the highest sequence that was received.
func (r *router) newestSeen() (seq uint64, stored time.Time) {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	return r.lastSeen, r.storedAt
}

// endFound is called when that message still stands in the stream.
func (r *router) endFound() {
	r.acceptMu.Lock()
	defer r.acceptMu.Unlock()
	r.suspect = false
}

// requestIDOf is the publisher's X-Request-ID, or one made of the sequence, which any pod makes alike.
func requestIDOf(msg jetstream.Msg, seq uint64) string {
	if id := msg.Headers().Get("X-Request-ID"); saneRequestID(id) {
		return id
	}
	return "seq-" + strconv.FormatUint(seq, 10)
}

// refuse terminates a malformed event, which no redelivery would mend.
func (r *router) refuse(p *pulled, err error) {
	if suppressed, ok := r.malformed.turn(time.Now()); ok {
		slog.Warn("malformed event terminated", "subject", fmt.Sprintf("%.200q", p.msg.Subject()), "seq", p.seq, "err", err, "suppressed", suppressed)
	}
	p.end(term, "malformed")
}

// fromPeer hands an event that a peer pulled to the sockets here, and to nobody else: what a peer sent is never
// forwarded again.
func (r *router) fromPeer(d *delivery) {
	// A socket looks whether it has had the event, though it is JetStream's first delivery: 1. a peer sends it, and the
	// network holds it up; 2. the peer gives it up, and the redelivery is written; 3. the network lets it through.
	d.count = max(d.count, 2)
	d.open.Store(1)
	r.seen(d.seq, d.stored)
	for rt := range d.routes() {
		d.push(r.hub.sockets(rt))
	}
	d.settle(gone)
}

// stop makes run end once everything accepted has been routed; accept must not be called any more.
func (r *router) stop() { close(r.stopping) }

// leaving says whether the pod drains. It takes nothing more then, so nothing is given up: a client whose socket was closed a
// moment ago gets what comes too late for it on another pod.
func (r *router) leaving() bool {
	select {
	case <-r.stopping:
		return true
	default:
		return false
	}
}

// newStream lets the sequences start again.
func (r *router) newStream() {
	r.acceptMu.Lock()
	r.lastSeen, r.suspect = 0, false
	r.acceptMu.Unlock()
	r.hub.newStream()
}

func (r *router) madeBeyond() { r.hub.gapAll("stream") }

// settleAll waits until nothing is in hand, or ctx ends.
func (r *router) settleAll(ctx context.Context) error {
	for r.share.inHand.Load() > 0 {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d events still in hand: %w", r.share.inHand.Load(), ctx.Err())
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}
