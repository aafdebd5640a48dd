package main

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"
)

// localRoute is a route with sockets on this pod, or with a claim still to be released.
type localRoute struct {
	route
	conns   []*conn      // immutable: replaced by attach and detach, so that readers need no copy
	claimed string       // the epoch under which Redis holds claim and log entry; "" = none
	queued  bool         // stands in owners.dirty
	waiters []chan error // attachments that wait for the claim; each gets one answer, buffered
	names   []string     // the members that Redis may hold for it; owned by claimLoop
}

// attach makes c a target of r's events: into the local index first, then claim and log entry in Redis. It returns
// when both were answered (events published from now on reach c), or with an error, c being detached again.
func (o *owners) attach(ctx context.Context, c *conn, r route) error {
	o.mu.Lock()
	lr := o.routes[r]
	if lr == nil {
		lr = &localRoute{route: r}
		o.routes[r] = lr
	}
	lr.conns = append(slices.Clip(slices.Clone(lr.conns)), c)
	if lr.claimed == o.epochNow && lr.claimed != "" && o.available() {
		o.mu.Unlock()
		return nil
	}
	done := make(chan error, 1)
	lr.waiters = append(lr.waiters, done)
	o.queueLocked(lr)
	o.mu.Unlock()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err == nil && !o.available() {
		err = errUnavailable
	}
	if err != nil {
		o.detach(c, r)
		return fmt.Errorf("claim %s: %w", r.key(), err)
	}
	return nil
}

// detach takes c out of the index and queues the release of r if c was its last socket here. It does not block. Where Redis has been
// away for longer than a lease, others may have found nobody here while c went on getting what this pod pulled: as the gap
// that follows is not for c any more, r is marked, for its next socket. (Not where the pod was suspended: c got nothing then,
// and thousands that have long since resumed elsewhere would be told to resume.)
func (o *owners) detach(c *conn, r route) {
	o.mu.Lock()
	defer o.mu.Unlock()
	lr := o.routes[r]
	if lr == nil {
		return
	}
	switch {
	case o.regap && o.regapAway:
		o.markLocked(r, mark{since: o.regapSince, reason: "owner"})
	case o.away.Load() && o.heldAt.Load() != 0 && !o.fresh():
		o.markLocked(r, mark{since: o.seqHeld, reason: "owner"})
	}
	if i := slices.Index(lr.conns, c); i >= 0 {
		lr.conns = slices.Concat(lr.conns[:i], lr.conns[i+1:])
	}
	if len(lr.conns) == 0 {
		o.queueLocked(lr)
	}
}

// queueLocked puts lr at the end of the one queue through which all claims and releases of this pod go, so that
// those of one route stay in order.
func (o *owners) queueLocked(lr *localRoute) {
	if !lr.queued {
		lr.queued = true
		o.dirty = append(o.dirty, lr)
		poke(o.wakeClaim)
	}
}

// claimLoop writes claims, releases and marks until ctx ends. It is the only writer of this pod's claims.
func (o *owners) claimLoop(ctx context.Context) {
	tick := time.NewTicker(time.Second) // marks: at most one per route and second, unless very many events wait for them
	defer tick.Stop()
	for {
		flush := false
		select {
		case <-ctx.Done():
			return
		case <-o.wakeClaim:
		case <-o.wakeMarks:
			flush = true
		case <-tick.C:
			flush = true
		}
		for o.claimBatch(ctx) {
		}
		if flush {
			o.flushMarks(ctx)
		}
	}
}

// claimBatch writes up to 200 queued routes in two round trips and says whether more are waiting.
func (o *owners) claimBatch(ctx context.Context) (more bool) {
	batch, claim, epoch := o.takeBatch()
	if len(batch) == 0 {
		return false
	}
	var err error
	if epoch == "" {
		err = errUnavailable
	} else {
		ctx, cancel := context.WithTimeout(ctx, claimTimeout)
		err = o.writeClaims(ctx, batch, claim, member{o.pod, epoch})
		cancel()
	}
	return o.claimed(batch, claim, epoch, err)
}

// takeBatch takes the next routes out of the queue: claim says of each whether it is to be claimed or released. A release
// whose count is above zero at its turn becomes a claim, and the reverse.
func (o *owners) takeBatch() (batch []*localRoute, claim []bool, epoch string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := min(len(o.dirty), 200)
	batch = slices.Clone(o.dirty[:n])
	o.dirty = slices.Delete(o.dirty, 0, n)
	claim = make([]bool, n)
	for i, lr := range batch {
		lr.queued = false
		if claim[i] = len(lr.conns) > 0; !claim[i] {
			// 1. The release is sent. 2. A socket attaches and finds the route claimed. 3. The release arrives, and
			// that socket has no claim. So the claim is gone from here on.
			lr.claimed = ""
			continue
		}
		self := member{o.pod, o.epochNow}
		lr.names = slices.DeleteFunc(lr.names, func(name string) bool { m, _ := parseMember(name); return m != self })
		if name := self.name(o.releases); !slices.Contains(lr.names, name) {
			lr.names = append(lr.names, name)
		}
	}
	return batch, claim, o.epochNow
}

// writeClaims writes the sets first and the log entry only after they were answered: a reader that reads the
// set again because of the entry finds the claim.
func (o *owners) writeClaims(ctx context.Context, batch []*localRoute, claim []bool, self member) error {
	if err := o.findNames(ctx, batch, claim, self); err != nil {
		return err
	}
	p := o.pipe()
	fields := make([]any, 0, 2*len(batch))
	for i, lr := range batch {
		key := lr.key()
		switch {
		case claim[i]:
			p.SAdd(ctx, key, lr.names[len(lr.names)-1])
		case len(lr.names) > 0:
			p.SRem(ctx, key, lr.names)
		}
		fields = append(fields, key, "")
	}
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("claim").Inc()
		return fmt.Errorf("write %d claims: %w", len(batch), err)
	}
	return o.appendLog(ctx, fields)
}

// findNames asks Redis under which names this pod still claims the routes to be released of which it knows none: a peer has
// found such a remnant (see again).
func (o *owners) findNames(ctx context.Context, batch []*localRoute, claim []bool, self member) error {
	p := o.pipe()
	sets := map[*localRoute]*redis.StringSliceCmd{}
	for i, lr := range batch {
		if !claim[i] && len(lr.names) == 0 {
			sets[lr] = p.SMembers(ctx, lr.key())
		}
	}
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("claim").Inc()
		return fmt.Errorf("read %d claims to be released: %w", len(sets), err)
	}
	for lr, set := range sets {
		for _, name := range set.Val() {
			if m, _ := parseMember(name); m == self {
				lr.names = append(lr.names, name)
			}
		}
	}
	return nil
}

// claimed records what writeClaims did and answers those who wait. Routes that changed meanwhile, or failed, are
// queued again; failed ones wait for the next tick or for Redis to come back.
func (o *owners) claimed(batch []*localRoute, claim []bool, epoch string, err error) (more bool) {
	var due []*conn // sockets that a new epoch owes a gap
	var since uint64
	o.mu.Lock()
	defer func() {
		o.mu.Unlock()
		for _, c := range due {
			c.gap(since, "owner")
		}
	}()
	if err != nil && slices.Contains(claim, false) {
		// 1. A release gets no answer in time. 2. It is sent again, over another connection. 3. A newcomer claims the route.
		// 4. The first one arrives. So what is claimed from now on has another name.
		o.releases++
	}
	for i, lr := range batch {
		for _, w := range lr.waiters {
			if err != nil || claim[i] && epoch == o.epochNow {
				w <- err
			}
		}
		if err != nil || claim[i] && epoch == o.epochNow {
			lr.waiters = nil
		}
		if err == nil {
			lr.claimed = ""
			if claim[i] {
				lr.claimed = epoch
			} else {
				lr.names = nil
			}
		}
		switch want := len(lr.conns) > 0; {
		case !want && lr.claimed == "" && err == nil:
			if !lr.queued {
				delete(o.routes, lr.route)
			}
		case err != nil || want != (lr.claimed != "") || want && lr.claimed != o.epochNow:
			if !lr.queued {
				lr.queued = true
				o.dirty = append(o.dirty, lr)
			}
		}
	}
	if err == nil && len(o.dirty) == 0 && o.regap { // until now others may have found nobody on routes of this pod
		o.regap, due, since = false, o.allConnsLocked(), o.regapSince
	}
	return err == nil && len(o.dirty) > 0
}

func (o *owners) allConnsLocked() []*conn {
	var conns []*conn
	for _, lr := range o.routes {
		if lr.kind != routeMessages { // a socket with a chat stands in its general route too
			conns = append(conns, lr.conns...)
		}
	}
	return conns
}

// claimAgainLocked queues every route: after a new epoch, and after Redis was away.
func (o *owners) claimAgainLocked() {
	for _, lr := range o.routes {
		lr.claimed = ""
		o.queueLocked(lr)
	}
}

// again queues the release of a route that a peer believes to be ours, though we have no socket on it.
func (o *owners) again(r route) {
	o.mu.Lock()
	defer o.mu.Unlock()
	lr := o.routes[r]
	if lr == nil {
		lr = &localRoute{route: r}
		o.routes[r] = lr
	}
	o.queueLocked(lr)
}

// releaseAll waits until every release queued so far was written, or ctx ends.
func (o *owners) releaseAll(ctx context.Context) error {
	for {
		o.mu.Lock()
		left := len(o.dirty)
		o.mu.Unlock()
		if left == 0 {
			return nil
		}
		poke(o.wakeClaim)
		select {
		case <-ctx.Done():
			return fmt.Errorf("release %d routes: %w", left, ctx.Err())
		case <-time.After(10 * time.Millisecond):
		}
	}
}
