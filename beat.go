package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// beat is the pod's heartbeat among the others, and the only place where positions are issued.
//
// Why a position F is true, for an event e up to F that was due to a socket of this pod:
//
//  1. The consumer noted F as its ack floor before the renewal was sent, so e had been settled by then. If it was written here, it
//     stands before the position on the wire. If it was dropped here, the gap was noted in the ring before e was settled, and a
//     ring that owes a gap takes no position.
//  2. If e was given up for this pod, its note was in Redis before e was settled: the renewal read it, and its gap is noted before
//     F is issued.
//  3. If others overlooked this pod, then its lease had ended, or Redis was another instance: the renewal shows that, and F is
//     not issued.
//  4. If e was settled before a socket was live, that socket's replay has it, or the state that its client loads after `ready`.
type beat struct {
	cfg      *settings
	m        *Metrics
	lease    *lease
	owners   *owners
	sessions *sessions
	hub      *hub
	peers    *peers
	consumer *consumer

	// Owned by run.
	acted   []string       // notes that were acted upon
	owed    bool           // this pod was overlooked, and its sockets are still to be told
	alone   time.Time      // since when peers say that they have Redis and overlook this pod; zero = they do not
	sentOff bool           // the clients were sent away for this outage
	asked   time.Time      // when a peer was last asked whether this pod is overlooked
	away    sync.WaitGroup // sends clients away
}

// run renews the lease every third of its length, and sooner when Redis is in doubt, claims are to be written again or no position has been
// issued yet, until ctx ends. It returns what the pod cannot live with: errDuplicatePod.
func (b *beat) run(ctx context.Context) error {
	defer b.away.Wait()
	for {
		if err := b.once(ctx); errors.Is(err, errDuplicatePod) {
			return err
		}
		wait := b.cfg.Load().PodLease / 3
		if b.owed || b.lease.inDoubt() || b.hub.position() == nil {
			wait = min(wait, 300*time.Millisecond)
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-b.lease.wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// once is one beat. Its order is what makes positions true.
func (b *beat) once(ctx context.Context) error {
	if at := b.hub.issued.Load(); at != 0 {
		b.m.positionAge.with().Set(time.Since(time.Unix(0, at)).Seconds())
	}
	floor, known := b.consumer.ackFloor()
	r, err := b.lease.renew(ctx, b.acted, b.peers)
	// Both are noted before err is looked at: the next renewal finds all as it is now, and would say nothing of them.
	if r.overlooked {
		b.owed, b.acted = true, nil
	}
	if r.generation {
		b.consumer.setBack()
	}
	if err != nil {
		b.withoutRedis(ctx)
		return err
	}
	b.sentOff, b.alone = false, time.Time{}
	if !r.overlooked {
		b.acted = slices.Collect(maps.Keys(r.notes))
	}
	for name, reason := range r.notes {
		b.hub.note(name, reason)
	}
	b.tellPool()
	if r.overlooked || r.back {
		b.sessions.reclaim(r.another)
	}
	switch {
	case b.owed:
		return b.overlooked(ctx)
	case known:
		b.hub.issue(floor)
	}
	return nil
}

// overlooked writes all claims under the new life, and tells the sockets when Redis has them: until then events may pass them by.
func (b *beat) overlooked(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, b.cfg.Load().PodLease/2)
	defer cancel()
	if err := b.owners.claimAll(ctx); err != nil {
		slog.Warn("claims not written again", "err", err)
		return err
	}
	b.owed = false
	b.hub.gapAll("owner")
	return nil
}

// tellPool drops the connections to pods that are gone.
func (b *beat) tellPool() {
	live := map[string]string{}
	for _, o := range b.lease.everyone() {
		live[o.pod] = o.addr
	}
	b.peers.keep(live)
}

// withoutRedis finds out whether Redis is away from this pod alone: then others overlook it, and its clients are better off with
// them. If no peer answers, or none has Redis either, it keeps them. They must say so for a third of a lease: when an outage ends, one
// pod hears from Redis before the others.
func (b *beat) withoutRedis(ctx context.Context) {
	if b.lease.fresh() || b.lease.heldAt.Load() == 0 || b.sentOff || time.Since(b.asked) < time.Second {
		return
	}
	b.asked = time.Now()
	asking, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	var wg sync.WaitGroup
	var alone atomic.Bool
	for _, o := range b.lease.peers() {
		wg.Go(func() {
			answer, err := b.peers.identify(asking, o.addr, b.lease.self.Load().member)
			if err == nil && answer.GetOverlooked() {
				alone.Store(true)
			}
		})
	}
	wg.Wait()
	switch {
	case !alone.Load():
		b.alone = time.Time{}
	case b.alone.IsZero():
		b.alone = b.asked
	case b.asked.Sub(b.alone) >= b.cfg.Load().PodLease/3:
		b.sentOff = true
		slog.Warn("Redis is away from this pod alone: its clients are sent to the others")
		b.away.Go(func() { b.hub.sendAway(ctx) })
	}
}
