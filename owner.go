package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// route is what a pod claims: an agent, or, the zero route, that it has admins.
type route struct{ company, agent string }

var admins route

// key is the Redis key of the set of the route's claims.
func (r route) key() string {
	if r == admins {
		return "route:admins"
	}
	return "route:" + r.company + ":" + r.agent
}

const (
	claimTimeout = 2 * time.Second
	claimBatch   = 200 // in one pipeline
)

// owners writes this pod's claims, and asks Redis who owns an agent.
//
// A claim is a member "<pod>#<life>#<n>" of the route's set. It counts exactly as long as the pod's lease holds that life. n is new
// with each claim, so claims and releases commute: a release that comes late takes nothing of a newcomer away.
type owners struct {
	cfg   *settings
	rdb   redis.UniversalClient
	m     *Metrics
	lease *lease
	wake  chan struct{} // room for 1: there is something to write; never closed

	mu       sync.Mutex // guards all below
	claims   map[route]*claim
	dirty    []*claim  // not written yet
	released []release // not removed yet
	number   uint64    // of the last claim
}

// claim is a route that sockets of this pod stand on. Guarded by owners.mu.
type claim struct {
	route
	sockets int
	name    string        // the member; another one in each life
	queued  bool          // stands in owners.dirty
	written chan struct{} // closed when Redis has answered for name, or nobody wants it any more
}

// release is a member to be removed from a set.
type release struct{ key, name string }

func newOwners(cfg *settings, rdb redis.UniversalClient, m *Metrics, l *lease) *owners {
	return &owners{cfg: cfg, rdb: rdb, m: m, lease: l, wake: make(chan struct{}, 1), claims: map[route]*claim{}}
}

// poke wakes the goroutine that waits on c, a channel of capacity 1, now or at its next wait.
func poke(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// claim makes this pod an owner of r for one more socket. It returns when Redis has answered: whatever is published from now on is
// looked up after the claim. After an error the socket has no part in the claim.
func (o *owners) claim(ctx context.Context, r route) error {
	o.mu.Lock()
	c := o.claims[r]
	if c == nil {
		c = &claim{route: r, written: make(chan struct{})}
		o.claims[r] = c
		o.nameLocked(c)
	}
	c.sockets++
	written := c.written
	o.mu.Unlock()
	select {
	case <-written:
		return nil
	case <-ctx.Done():
		o.release(r)
		return fmt.Errorf("claim %s: %w", r.key(), ctx.Err())
	}
}

// nameLocked gives c a name of this life and has it written.
func (o *owners) nameLocked(c *claim) {
	o.number++
	c.name = o.lease.self.Load().member.String() + "#" + strconv.FormatUint(o.number, 10)
	o.queueLocked(c)
}

func (o *owners) queueLocked(c *claim) {
	if !c.queued {
		c.queued = true
		o.dirty = append(o.dirty, c)
	}
	poke(o.wake)
}

// release takes one socket off r. It does not block.
func (o *owners) release(r route) {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.claims[r]
	if c.sockets--; c.sockets > 0 {
		return
	}
	delete(o.claims, r)
	c.answeredLocked() // claimAll may wait for it
	if c.queued {
		o.dirty = slices.DeleteFunc(o.dirty, func(d *claim) bool { return d == c })
	}
	o.released = append(o.released, release{r.key(), c.name}) // also where it was sent once, and got no answer
	poke(o.wake)
}

func (c *claim) answeredLocked() {
	select {
	case <-c.written:
	default:
		close(c.written)
	}
}

// claimAll writes every claim under this pod's new life, and returns when all are answered, or ctx ends.
func (o *owners) claimAll(ctx context.Context) error {
	o.mu.Lock()
	waits := make([]chan struct{}, 0, len(o.claims))
	for _, c := range o.claims {
		select {
		case <-c.written:
			c.written = make(chan struct{})
		default:
		}
		o.nameLocked(c)
		waits = append(waits, c.written)
	}
	o.mu.Unlock()
	for _, w := range waits {
		select {
		case <-w:
		case <-ctx.Done():
			return fmt.Errorf("claim %d routes again: %w", len(waits), ctx.Err())
		}
	}
	return nil
}

// run writes claims and releases until ctx ends. It is the only writer of this pod's claims.
func (o *owners) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-o.wake:
		}
		for o.left() > 0 {
			if err := o.write(ctx); err != nil && !pause(ctx, 300*time.Millisecond) {
				return
			}
		}
	}
}

// left is how many claims and releases are still to be written.
func (o *owners) left() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return len(o.dirty) + len(o.released)
}

// write sends up to claimBatch claims and as many releases in one pipeline.
func (o *owners) write(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	o.mu.Lock()
	claims := slices.Clone(o.dirty[:min(len(o.dirty), claimBatch)])
	o.dirty = slices.Delete(o.dirty, 0, len(claims))
	releases := slices.Clone(o.released[:min(len(o.released), claimBatch)])
	o.released = slices.Delete(o.released, 0, len(releases))
	p := o.rdb.Pipeline()
	for _, c := range claims {
		c.queued = false
		p.SAdd(ctx, c.key(), c.name)
	}
	for _, r := range releases {
		p.SRem(ctx, r.key, r.name)
	}
	o.mu.Unlock()
	_, err := p.Exec(ctx)

	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.m.redisErrorsTotal.with("claim").Inc()
		for _, c := range claims {
			if o.claims[c.route] == c {
				o.queueLocked(c)
			}
		}
		o.released = append(o.released, releases...)
		return fmt.Errorf("write %d claims and %d releases: %w", len(claims), len(releases), err)
	}
	for _, c := range claims {
		if !c.queued { // else it has got another name meanwhile
			c.answeredLocked()
		}
	}
	return nil
}

// releaseAll waits until every release queued so far was written, or ctx ends.
func (o *owners) releaseAll(ctx context.Context) error {
	for {
		left := o.left()
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("write %d claims and releases: %w", left, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// find asks Redis who else owns each of the routes, in the order of these. Leases of lives that are not known are read after the
// members were answered: read before, or at the same time from another node, the pod may have taken a new life and claimed in
// between, and its living claim would be removed for dead.
func (o *owners) find(ctx context.Context, routes []route) ([][]owner, error) {
	began := time.Now()
	p := o.rdb.Pipeline()
	sets := make([]*redis.StringSliceCmd, len(routes))
	for i, r := range routes {
		sets[i] = p.SMembers(ctx, r.key())
	}
	o.m.ownerLookupsTotal.with().Add(len(routes))
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("lookup").Inc()
		poke(o.lease.wake)
		return nil, fmt.Errorf("read claims of %d routes: %w", len(routes), err)
	}
	live, err := o.leasesOf(ctx, sets)
	if err != nil {
		o.m.redisErrorsTotal.with("lookup").Inc()
		poke(o.lease.wake)
		return nil, err
	}
	o.m.ownerLookupSeconds.with().Update(time.Since(began).Seconds())
	found := make([][]owner, len(routes))
	var dead []release
	for i, set := range sets {
		for _, name := range set.Val() {
			m, n := parseClaim(name)
			switch peer := live[m.pod]; {
			case m.pod == o.lease.pod:
				if !o.stands(routes[i], name) {
					dead = append(dead, release{routes[i].key(), name})
				}
			case n == "" || peer.life != m.life:
				dead = append(dead, release{routes[i].key(), name})
			default:
				found[i] = append(found[i], peer)
			}
		}
	}
	o.remove(ctx, dead)
	return found, nil
}

// parseClaim takes a member of a route's set apart.
func parseClaim(name string) (m member, n string) {
	pod, rest, _ := strings.Cut(name, "#")
	life, n, _ := strings.Cut(rest, "#")
	return member{pod, life}, n
}

// stands says whether name is this pod's claim of r, written or not.
func (o *owners) stands(r route, name string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	c := o.claims[r]
	return c != nil && c.name == name
}

// leasesOf returns the live pods, having read the leases of those that the sets name with a life that is not known.
func (o *owners) leasesOf(ctx context.Context, sets []*redis.StringSliceCmd) (map[string]owner, error) {
	known := *o.lease.known.Load()
	var ask []string
	for _, set := range sets {
		for _, name := range set.Val() {
			m, _ := parseClaim(name)
			if m.pod != o.lease.pod && known[m.pod].life != m.life && !slices.Contains(ask, m.pod) {
				ask = append(ask, m.pod)
			}
		}
	}
	if len(ask) == 0 {
		return known, nil
	}
	read, err := o.lease.read(ctx, ask)
	if err != nil {
		return nil, err
	}
	o.lease.learn(read)
	live := maps.Clone(known)
	for _, id := range ask {
		live[id] = read[id] // the zero owner where there is no lease
	}
	return live, nil
}

// remove takes dead claims out of their sets. They are ignored wherever they are found, so a failure is none.
func (o *owners) remove(ctx context.Context, dead []release) {
	if len(dead) == 0 {
		return
	}
	p := o.rdb.Pipeline()
	for _, d := range dead {
		p.SRem(ctx, d.key, d.name)
	}
	if _, err := p.Exec(ctx); err != nil {
		slog.Debug("dead claims not removed", "err", err)
	}
}
