package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

// routeKind is what a route is about.
type routeKind uint8

const (
	routeGeneral  routeKind = iota // chats and contacts of (company, agent)
	routeMessages                  // messages of one chat of (company, agent)
	routeAgents                    // agents events; company and agent may be "*"
)

// route is what a pod claims: comparable, so that it can be a map's key.
type route struct {
	kind                 routeKind
	company, agent, chat string
}

// key is the Redis key of the set of the route's owners.
func (r route) key() string {
	base := "route:" + r.company + ":" + r.agent
	switch r.kind {
	case routeGeneral:
		return base + ":general"
	case routeMessages:
		return base + ":messages:" + r.chat
	default:
		return base + ":agents"
	}
}

// parseRoute is key's inverse. Only a chat id may hold a colon.
func parseRoute(key string) (route, bool) {
	p := strings.SplitN(key, ":", 5)
	switch {
	case len(p) < 4 || p[0] != "route":
		return route{}, false
	case len(p) == 4 && p[3] == "general":
		return route{kind: routeGeneral, company: p[1], agent: p[2]}, true
	case len(p) == 4 && p[3] == "agents":
		return route{kind: routeAgents, company: p[1], agent: p[2]}, true
	case len(p) == 5 && p[3] == "messages":
		return route{kind: routeMessages, company: p[1], agent: p[2], chat: p[4]}, true
	}
	return route{}, false
}

// member is a pod that claims a route: a claim lives exactly as long as the pod's lease holds this epoch.
type member struct{ pod, epoch string }

// name is how the set of a route's owners names m. n is above 0 once a release of this pod may still be under way: it must not
// take away what is claimed after it.
func (m member) name(n uint64) string {
	if n == 0 {
		return m.pod + "#" + m.epoch
	}
	return m.pod + "#" + m.epoch + "#" + strconv.FormatUint(n, 10)
}

// parseMember is name's inverse, but for the number.
func parseMember(s string) (member, bool) {
	pod, epoch, ok := strings.Cut(s, "#")
	epoch, _, _ = strings.Cut(epoch, "#")
	return member{pod, epoch}, ok
}

// answer is what Redis said about a route, kept exact by the owner log.
type answer struct {
	peers       []member  // other pods
	nobodySince time.Time // when no other pod was first found; zero if one was
}

// owners knows who owns a route: the sockets here, and the claims of other pods. It keeps this pod's lease, writes
// its claims, and reads the log that keeps the cached claims of others exact (docs/architecture.md, "Owners").
type owners struct {
	cfg      *settings
	rdb      redis.UniversalClient
	m        *Metrics
	pod      string
	pipe     func() redis.Pipeliner
	identify func(ctx context.Context, addr string) (pod, epoch string, err error) // asks a peer; set before start
	noteSeq  func() uint64                                                         // newest stream sequence known, of whatever pod; set before start
	epochs   []func(old, new string)
	confirms []func(context.Context) error
	returns  []func()                  // Redis is back: claim everything again
	watchers []func(map[string]string) // told the addresses of the live pods when they changed
	replaced func(error)               // another process has this pod's id and lease; set before start

	advertise func(context.Context) (string, error) // finds address; set before start
	address   string                                // that peers dial; constant once the lease is held
	heldAt    atomic.Int64                          // when the last successful renewal was sent, since base; 0 = no lease
	failedAt  atomic.Int64                          // when a renewal failed last, since base
	base      time.Time
	away      atomic.Bool // Redis: a renewal failed or took over 1 s, or a log read over 500 ms
	wakeClaim chan struct{}
	wakeMarks chan struct{}
	wakeLease chan struct{}

	leaseMu sync.Mutex // serialises renewals; guards givenUp and tried
	tried   string     // the lease that was last to be taken
	givenUp bool

	// readMu serialises reads of the log and the look-ups that follow one. So no look-up is under way while an entry is
	// read, and the trap of the cache cannot spring: (1) a look-up reads the set, (2) claim and log entry are written,
	// (3) another reader consumes the entry and finds nothing to drop, (4) the old answer is stored for ever.
	readMu sync.Mutex
	place  redis.XMessage // the last log entry read; its ID is "" while there is none
	// placeLost: that entry did not come back, and what follows from it has not been done yet.
	placeLost bool

	mu         sync.Mutex // guards all below
	epochNow   string
	routes     map[route]*localRoute
	dirty      []*localRoute
	releases   uint64 // that got no answer; part of the names of later claims
	cache      map[route]*answer
	pods       map[string]lease   // live pods by id, this one too, as far as is known
	renewed    map[string]lease   // those as of the last renewal
	doubtUntil time.Time          // "nobody" is not believed before
	awaySeq    uint64             // first sequence acked on knowledge that may be old; 0 = none
	seqHeld    uint64             // stream sequence noted before the last renewal that held, or an earlier one: see lags
	seqRead    uint64             // the same, noted before the last read of the log
	marks      map[route]mark     // gaps to announce
	markAll    *mark              // one for all routes, when marks overflowed
	missed     map[route][]missed // gaps, oldest first, that were announced a while ago
	told       []func()           // to be called when these are in the log
	toldSize   int                // bytes that this keeps in memory
	instances  map[string]bool    // run and replication ids of the Redis masters; nil before the first answer
	regap      bool               // after a new epoch, sockets get a gap once everything is claimed again
	regapSince uint64
	regapAway  bool // Redis was away before
}

// Look-ups and log reads may hold up a batch of events; claims and leases only their callers.
const (
	readTimeout  = 500 * time.Millisecond
	leaseTimeout = time.Second
	claimTimeout = 2 * time.Second
	stillAway    = 3 * time.Second // while Redis is away, a renewal fails at least this often
)

func newOwners(cfg *settings, rdb redis.UniversalClient, m *Metrics) *owners {
	return &owners{
		cfg: cfg, rdb: rdb, m: m, pod: cfg.Load().ServerPodID, pipe: rdb.Pipeline,
		base: time.Now().Add(-time.Nanosecond), noteSeq: func() uint64 { return 0 }, replaced: func(error) {},
		wakeClaim: make(chan struct{}, 1), wakeMarks: make(chan struct{}, 1), wakeLease: make(chan struct{}, 1),
		routes: map[route]*localRoute{}, cache: map[route]*answer{}, pods: map[string]lease{}, marks: map[route]mark{}, missed: map[route][]missed{},
	}
}

// podID and epoch name this pod's lease; epoch changes when the lease was lost.
func (o *owners) podID() string { return o.pod }

func (o *owners) epoch() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.epochNow
}

// onEpoch registers f to be called with the old and the new epoch when this pod had to take a new one; before start.
func (o *owners) onEpoch(f func(old, new string)) { o.epochs = append(o.epochs, f) }

// onConfirm registers f to be called when a suspended pod confirms what it holds; before start.
func (o *owners) onConfirm(f func(context.Context) error) { o.confirms = append(o.confirms, f) }

// onPods registers f to be called with the addresses of the live pods, by id, whenever they have changed; before start.
func (o *owners) onPods(f func(map[string]string)) { o.watchers = append(o.watchers, f) }

// onReturn registers f to be called when Redis answers again; before start.
func (o *owners) onReturn(f func()) { o.returns = append(o.returns, f) }

// poke wakes the goroutine that waits on c, a channel of capacity 1, now or at its next wait.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// local returns the sockets of this pod on r (the slice must not be changed), and whether other pods own it too or may, as of
// the last batch.
func (o *owners) local(r route) (conns []*conn, others bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	a := o.cache[r]
	if lr := o.routes[r]; lr != nil {
		conns = lr.conns
	}
	return conns, a == nil || len(a.peers) > 0
}

// lookup is who owns a route.
type lookup struct {
	conns  []*conn   // here
	peers  []member  // elsewhere
	known  bool      // peers is Redis' answer, as of this batch or from before Redis went away
	nobody bool      // no owner at all, and that can be believed
	since  time.Time // since when nobody has been known to own it
}

// find answers from memory: begin has brought the cache up to date for this batch.
func (o *owners) find(r route, now time.Time) lookup {
	o.mu.Lock()
	defer o.mu.Unlock()
	var l lookup
	if a := o.cache[r]; a != nil {
		l.known, l.peers, l.since = true, a.peers, a.nobodySince
	}
	if lr := o.routes[r]; lr != nil {
		// With no socket on it, the release is under way: there was one a moment ago, and the cache does not know so
		// before the release's own log entry has been read.
		l.conns, l.since = lr.conns, now
	}
	l.nobody = l.known && len(l.conns) == 0 && len(l.peers) == 0 && !o.away.Load() && now.After(o.doubtUntil)
	return l
}

// begin prepares the look-ups of one batch of events, all of which had arrived before it was called: it reads the
// log's new entries, drops from the cache what they name, and asks Redis, in one pipeline, for the routes that are not
// cached. While Redis is away the answers of before serve, and lowest, the batch's lowest sequence, is noted first: when
// the log can be read again, the routes that its unread entries name get a gap from there. One goroutine at a time
// calls it.
func (o *owners) begin(ctx context.Context, routes []route, lowest uint64) {
	o.readMu.Lock()
	defer o.readMu.Unlock()
	err := errUnavailable
	if !o.away.Load() {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		if err = o.readLog(ctx); err == nil {
			if missing := o.missing(routes); len(missing) > 0 {
				o.makeRoom(len(missing), routes)
				err = o.fetch(ctx, missing)
			}
		}
		if err != nil {
			o.goneAway(err)
		}
	}
	if err != nil {
		o.noteStale(lowest)
	}
}

func (o *owners) missing(routes []route) []route {
	o.mu.Lock()
	defer o.mu.Unlock()
	var missing []route
	seen := map[route]bool{}
	for _, r := range routes {
		if o.cache[r] == nil && !seen[r] {
			seen[r] = true
			missing = append(missing, r)
		}
	}
	o.m.ownerCacheMissesTotal.with().Add(len(missing))
	o.m.ownerCacheHitsTotal.with().Add(len(routes) - len(missing))
	return missing
}

// fetch reads the claims of routes, and the leases of pods it has not heard of, and stores the answers.
// Dead members are removed on the way.
func (o *owners) fetch(ctx context.Context, routes []route) error {
	p := o.pipe()
	sets := make([]*redis.StringSliceCmd, len(routes))
	for i, r := range routes {
		sets[i] = p.SMembers(ctx, r.key())
	}
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("lookup").Inc()
		return fmt.Errorf("read claims of %d routes: %w", len(routes), err)
	}
	live, err := o.leasesOf(ctx, sets)
	if err != nil {
		return err
	}
	now := time.Now()
	p = o.pipe()
	o.mu.Lock()
	for i, r := range routes {
		a := &answer{}
		for _, s := range sets[i].Val() {
			m, ok := parseMember(s)
			switch {
			case ok && m.pod == o.pod && m.epoch == o.epochNow: // the local index knows better
			case ok && m.pod != o.pod && live[m.pod].epoch == m.epoch:
				if !slices.Contains(a.peers, m) {
					a.peers = append(a.peers, m)
				}
			default:
				p.SRem(ctx, r.key(), s)
			}
		}
		if len(a.peers) == 0 {
			a.nobodySince = now
		}
		o.cache[r] = a
	}
	o.mu.Unlock()
	if p.Len() > 0 {
		if _, err := p.Exec(ctx); err != nil {
			slog.Debug("dead claims not removed", "err", err)
		}
	}
	return nil
}

// makeRoom drops answers so that n more fit into the cache, but none about the routes of this batch: its events would fail
// for want of them, again and again. Of a batch of 8,000 events behind a full cache every fifth did. A batch larger than
// the cache goes beyond its size until the next one.
func (o *owners) makeRoom(n int, batch []route) {
	o.mu.Lock()
	defer o.mu.Unlock()
	size := o.cfg.Load().PodOwnerCacheSize
	if len(o.cache)+n <= size {
		return
	}
	needed := make(map[route]bool, len(batch))
	for _, r := range batch {
		needed[r] = true
	}
	for old := range o.cache { // any: the map's order is random
		if len(o.cache)+n <= size-size/64 {
			return
		}
		if !needed[old] {
			delete(o.cache, old)
		}
	}
}

// leasesOf returns the live pods, having read anew the leases of members with an unknown pod or epoch.
func (o *owners) leasesOf(ctx context.Context, sets []*redis.StringSliceCmd) (map[string]lease, error) {
	o.mu.Lock()
	live := maps.Clone(o.pods)
	o.mu.Unlock()
	ask := map[string]*redis.StringCmd{}
	p := o.pipe()
	for _, set := range sets {
		for _, s := range set.Val() {
			m, ok := parseMember(s)
			if ok && m.pod != o.pod && live[m.pod].epoch != m.epoch && ask[m.pod] == nil {
				ask[m.pod] = p.Get(ctx, podKey(m.pod))
			}
		}
	}
	if len(ask) == 0 {
		return live, nil
	}
	if err := execGets(ctx, p); err != nil {
		o.m.redisErrorsTotal.with("lookup").Inc()
		return nil, fmt.Errorf("read %d leases: %w", len(ask), err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for id, cmd := range ask {
		if l, ok := parseLease(cmd.Val()); ok {
			live[id] = l
			o.pods[id] = l
		} else {
			delete(live, id)
		}
	}
	return live, nil
}

// peer tells where a member listens; false when its lease has gone or changed.
func (o *owners) peer(m member) (addr string, ok bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	l := o.pods[m.pod]
	return l.addr, l.epoch == m.epoch
}

// otherPods returns the addresses of the other live pods, by id. It asks Redis first: a pod that has just started is not
// known before the next renewal.
func (o *owners) otherPods(ctx context.Context) map[string]string {
	if err := o.refreshPods(ctx); err != nil {
		slog.Debug("live pods not read anew", "err", err)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	addrs := map[string]string{}
	for id, l := range o.pods {
		if id != o.pod {
			addrs[id] = l.addr
		}
	}
	return addrs
}

// livePods is the number of pods with a lease, at least 1.
func (o *owners) livePods() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return max(1, len(o.pods))
}

// holds says whether the lease of pod has this epoch. It asks Redis, since a take-over hangs on it.
func (o *owners) holds(ctx context.Context, pod, epoch string) (bool, error) {
	s, err := o.rdb.Get(ctx, podKey(pod)).Result()
	if errors.Is(err, redis.Nil) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read lease of pod %s: %w", pod, err)
	}
	l, ok := parseLease(s)
	return ok && l.epoch == epoch, nil
}

// forget drops what is believed of r, after a peer said that it does not own it. While Redis is away it does nothing, as
// does forgetPod: there would be no new answer, and the other owners that were last known would get nothing either.
func (o *owners) forget(r route) {
	if o.away.Load() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.cache, r)
}

// forgetPod drops every answer that names pod, after a dial to it failed or a stream from it broke.
func (o *owners) forgetPod(pod string) {
	if o.away.Load() {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	for r, a := range o.cache {
		if slices.ContainsFunc(a.peers, func(m member) bool { return m.pod == pod }) {
			delete(o.cache, r)
		}
	}
}
