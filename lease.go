package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// lease is what a pod holds in Redis: the claims that name its epoch live as long as it does.
type lease struct{ epoch, addr string }

func (l lease) String() string { return l.epoch + " " + l.addr }

func parseLease(s string) (lease, bool) {
	epoch, addr, ok := strings.Cut(s, " ")
	return lease{epoch, addr}, ok
}

func podKey(id string) string { return "pod:" + id }

const podsKey = "pods"

// takeLease sets the lease where there is none, or where it is the caller's own of before, or one of its own that it
// tried to take without hearing of the success (ARGV: new, own, ms, tried).
var takeLease = redis.NewScript(`
local cur = redis.call('GET', KEYS[1])
if cur and cur ~= ARGV[2] and cur ~= ARGV[4] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1`)

// renewLease extends the lease only if it still holds the caller's epoch (ARGV: own, ms).
const renewLease = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])`

var dropLease = redis.NewScript(`
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])`)

// errDuplicatePod means that another process lives under this pod's id.
var errDuplicatePod = errors.New("another process serves under this pod id")

// start takes the lease, waiting for Redis and for a predecessor's lease to run out, and saying so. It returns
// errDuplicatePod when the address in the lease answers with the lease's own id and epoch, or ctx's error.
func (o *owners) start(ctx context.Context) error {
	said := ""
	for {
		err := o.tryStart(ctx)
		if err == nil {
			return o.learnMarks(ctx)
		}
		if errors.Is(err, errDuplicatePod) || ctx.Err() != nil {
			return err
		}
		if err.Error() != said {
			said = err.Error()
			slog.Warn("waiting for Redis and the pod's lease", "err", err)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(300 * time.Millisecond):
		}
	}
}

func (o *owners) tryStart(ctx context.Context) error {
	get, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	cur, err := o.rdb.Get(get, podKey(o.pod)).Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		return fmt.Errorf("read lease of pod %s: %w", o.pod, err)
	}
	if o.address == "" {
		if o.address, err = o.advertise(get); err != nil {
			return err
		}
	}
	if l, ok := parseLease(cur); ok {
		ask, cancel := context.WithTimeout(ctx, leaseTimeout)
		defer cancel()
		if o.answers(ask, l) {
			return fmt.Errorf("%w: pod %s epoch %s answers at %s; set SERVER_POD_ID", errDuplicatePod, o.pod, l.epoch, l.addr)
		}
		return fmt.Errorf("pod id %s is still leased to %s, which does not answer for it: waiting until that lease ends", o.pod, l.addr)
	}
	return o.renew(ctx)
}

// answers says whether a process under this pod's id answers for the lease l.
func (o *owners) answers(ctx context.Context, l lease) bool {
	pod, epoch, err := o.identify(ctx, l.addr)
	return err == nil && pod == o.pod && epoch == l.epoch
}

// leaseLoop renews the lease every third of its length, and sooner when Redis is away, until ctx ends.
func (o *owners) leaseLoop(ctx context.Context) {
	for {
		pause := o.cfg.Load().PodLease / 3
		if o.away.Load() {
			pause = min(pause, 300*time.Millisecond)
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-o.wakeLease:
		case <-t.C:
		}
		t.Stop()
		err := o.renew(ctx)
		if err != nil && ctx.Err() == nil {
			slog.Debug("lease not renewed", "err", err)
		}
		if errors.Is(err, errDuplicatePod) {
			o.replaced(err)
		}
	}
}

// renew extends the lease, or takes a new epoch where the lease was lost or Redis may have lost writes; then it reads
// the other pods' leases and the owner log. On failure Redis counts as away until a later renewal succeeds.
func (o *owners) renew(ctx context.Context) error {
	o.leaseMu.Lock()
	defer o.leaseMu.Unlock()
	return o.renewOnce(ctx)
}

// renewOnce is renew for a caller that holds o.leaseMu.
func (o *owners) renewOnce(ctx context.Context) error {
	if o.givenUp {
		return nil
	}
	sent := time.Now()
	if err := o.renewLocked(ctx); err != nil {
		o.noteFailed(sent)
		o.goneAway(err)
		return err
	}
	if o.away.Load() {
		o.cameBack()
	}
	return nil
}

func (o *owners) renewLocked(ctx context.Context) error {
	seq, sent := o.noteSeq(), time.Now()
	suspended := o.suspended()
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	o.mu.Lock()
	own := lease{o.epochNow, o.address}
	o.mu.Unlock()
	p := o.pipe()
	held := p.Eval(ctx, renewLease, []string{podKey(o.pod)}, own.String(), o.leaseMS())
	p.SAdd(ctx, podsKey, o.pod)
	names := p.SMembers(ctx, podsKey)
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("lease").Inc()
		return fmt.Errorf("renew lease of pod %s: %w", o.pod, err)
	}
	lost := o.instancesChanged(ctx)
	if n, _ := held.Int(); n != 1 || lost {
		if err := o.newEpoch(ctx, own, lost); err != nil {
			if lost {
				o.mu.Lock()
				o.instances = map[string]bool{} // they are to be new at the next attempt too
				o.mu.Unlock()
			}
			return err
		}
	}
	if suspended { // others take over after the lease, so the locks are confirmed before anything is written
		for _, f := range o.confirms {
			if err := f(ctx); err != nil {
				return fmt.Errorf("confirm sessions of pod %s: %w", o.pod, err)
			}
		}
	}
	o.heldAt.Store(int64(sent.Sub(o.base)))
	o.mu.Lock()
	o.seqHeld = o.resumeFromLocked(seq, route{})
	o.mu.Unlock()
	if err := o.readPods(ctx, names.Val()); err != nil {
		return err
	}
	o.readMu.Lock()
	defer o.readMu.Unlock()
	read, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	if err := o.readLog(read); err != nil {
		return err
	}
	o.forgetMissed(seq)
	return nil
}

func (o *owners) leaseMS() int64 { return o.cfg.Load().PodLease.Milliseconds() }

// instancesChanged says whether a master's run or replication id is new since the last renewal: after a restart or a
// fail-over Redis may have lost writes. A server that refuses INFO is taken at its word.
func (o *owners) instancesChanged(ctx context.Context) bool {
	var mu sync.Mutex
	ids, silent := map[string]bool{}, false
	ask := func(ctx context.Context, c *redis.Client) error {
		p := c.Pipeline()
		server, repl := p.Info(ctx, "server"), p.Info(ctx, "replication")
		_, err := p.Exec(ctx)
		mu.Lock()
		defer mu.Unlock()
		silent = silent || err != nil
		for line := range strings.Lines(server.Val() + "\n" + repl.Val()) {
			if strings.HasPrefix(line, "run_id:") || strings.HasPrefix(line, "master_replid:") {
				ids[strings.TrimSpace(line)] = true
			}
		}
		return nil
	}
	switch c := o.rdb.(type) {
	case *redis.ClusterClient:
		if err := c.ForEachMaster(ctx, ask); err != nil {
			return false
		}
	case *redis.Client:
		ask(ctx, c)
	}
	if len(ids) == 0 {
		return false
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	old := o.instances
	o.instances = ids
	if silent { // a master that stood still for a moment is no new one when it answers again
		o.instances = maps.Clone(ids)
		maps.Copy(o.instances, old)
	}
	for id := range ids {
		if old != nil && !old[id] {
			slog.Warn("Redis was restarted, failed over, or lost writes")
			return true
		}
	}
	return false
}

// newEpoch takes a lease with a new epoch: readers may be removing the members of the old one at this moment. Locks move
// to it by compare-and-set, every route is claimed again, and then every socket gets a gap.
func (o *owners) newEpoch(ctx context.Context, own lease, lostWrites bool) error {
	next := lease{randomID(6), o.address}
	n, err := takeLease.Run(ctx, o.rdb, []string{podKey(o.pod)}, next.String(), own.String(), o.leaseMS(), o.tried).Int()
	o.tried = next.String()
	if err != nil {
		o.m.redisErrorsTotal.with("lease").Inc()
		return fmt.Errorf("take lease of pod %s: %w", o.pod, err)
	}
	if n != 1 {
		return o.heldByAnother(ctx)
	}
	o.mu.Lock()
	o.epochNow, o.releases = next.epoch, 0
	if own.epoch != "" && len(o.allConnsLocked()) > 0 { // else nobody here can have missed anything
		if !o.regap || o.seqHeld < o.regapSince {
			o.regapSince = o.seqHeld
		}
		o.regap, o.regapAway = true, o.regap && o.regapAway || o.away.Load()
	}
	if lostWrites {
		o.doubtUntil = time.Now().Add(o.cfg.Load().SessionRefreshInterval)
		clear(o.cache)
	}
	o.claimAgainLocked()
	o.mu.Unlock()
	poke(o.wakeClaim)
	slog.Info("lease taken", "epoch", next.epoch, "before", own.epoch, "address", o.address)
	for _, f := range o.epochs {
		f(own.epoch, next.epoch)
	}
	return nil
}

// heldByAnother says who holds the lease: errDuplicatePod if it is a process that answers for it. This one was suspended then,
// or cut off, for longer than the lease, and can never have it again while the other lives.
func (o *owners) heldByAnother(ctx context.Context) error {
	cur, err := o.rdb.Get(ctx, podKey(o.pod)).Result()
	if l, ok := parseLease(cur); ok && err == nil && l.epoch != o.epoch() && o.answers(ctx, l) {
		return fmt.Errorf("%w: pod %s epoch %s answers at %s", errDuplicatePod, o.pod, l.epoch, l.addr)
	}
	return fmt.Errorf("take lease of pod %s: held by another process", o.pod)
}

// refreshPods is readPods between two renewals.
func (o *owners) refreshPods(ctx context.Context) error {
	o.leaseMu.Lock()
	defer o.leaseMu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	names, err := o.rdb.SMembers(ctx, podsKey).Result()
	if err != nil {
		return fmt.Errorf("read the names of all pods: %w", err)
	}
	return o.readPods(ctx, names)
}

// readPods reads the leases of all pods named in the set: those that hold are the live pods. Answers that name a pod
// whose lease has gone or changed are dropped, since an expiry writes no log entry.
func (o *owners) readPods(ctx context.Context, names []string) error {
	p := o.pipe()
	cmds := make([]*redis.StringCmd, len(names))
	for i, id := range names {
		cmds[i] = p.Get(ctx, podKey(id))
	}
	if err := execGets(ctx, p); err != nil {
		o.m.redisErrorsTotal.with("lease").Inc()
		return fmt.Errorf("read %d leases: %w", len(names), err)
	}
	live := make(map[string]lease, len(names))
	for i, id := range names {
		if l, ok := parseLease(cmds[i].Val()); ok {
			live[id] = l
		} else if err := o.rdb.SRem(ctx, podsKey, id).Err(); err != nil {
			slog.Debug("dead pod not removed", "peer", id, "err", err)
		}
	}
	if o.replacePods(live) {
		addrs := make(map[string]string, len(live))
		for id, l := range live {
			addrs[id] = l.addr
		}
		for _, f := range o.watchers {
			f(addrs)
		}
	}
	return nil
}

// replacePods says whether the live pods have changed since the last renewal. A look-up may have heard of a new lease before,
// and have put it into o.pods; answers that name the epoch before it are still to be dropped.
func (o *owners) replacePods(live map[string]lease) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pods = maps.Clone(live) // look-ups write to it, the caller reads live
	if maps.Equal(live, o.renewed) {
		return false
	}
	o.renewed = live
	for r, a := range o.cache {
		for _, m := range a.peers {
			if live[m.pod].epoch != m.epoch {
				delete(o.cache, r)
				break
			}
		}
	}
	return true
}

// goneAway notes that Redis does not answer: events go on to the owners last known, no new sockets are taken.
func (o *owners) goneAway(err error) {
	if o.away.CompareAndSwap(false, true) {
		slog.Warn("Redis is away: events go on to the owners last known, no new sockets", "err", err)
		poke(o.wakeLease)
	}
}

// cameBack claims everything again, whatever Redis may have kept.
func (o *owners) cameBack() {
	o.mu.Lock()
	o.doubtUntil = time.Now().Add(o.cfg.Load().SessionRefreshInterval)
	o.claimAgainLocked()
	o.mu.Unlock()
	o.away.Store(false)
	slog.Info("Redis is back: everything is claimed again")
	for _, f := range o.returns {
		f()
	}
}

// available says whether Redis answers and the lease is known to hold: else no new sockets (503).
func (o *owners) available() bool { return !o.away.Load() && o.fresh() }

// fresh says whether the last successful renewal was sent less than a lease ago, by this process' monotonic clock.
func (o *owners) fresh() bool {
	at := o.heldAt.Load()
	return at != 0 && time.Since(o.base)-time.Duration(at) < o.cfg.Load().PodLease
}

// suspended says whether this process may have stood still: its lease has run out by its own clock, and that is not for
// Redis being away. Not every failure means that:
//  1. A read or a renewal is sent.
//  2. The process is suspended, and others take over when its lease ends.
//  3. Awake again, it finds the time for the answer over, and Redis counts as away.
//
// So only a renewal counts that failed after the lease had run out, a moment ago, and within the time that it was given.
func (o *owners) suspended() bool {
	held, failed := o.heldAt.Load(), time.Duration(o.failedAt.Load())
	if held == 0 || o.fresh() {
		return false
	}
	return failed < time.Duration(held)+o.cfg.Load().PodLease || time.Since(o.base)-failed > stillAway
}

// noteFailed notes a renewal that failed, unless the process stood still meanwhile.
func (o *owners) noteFailed(sent time.Time) {
	if time.Since(sent) < 2*leaseTimeout {
		o.failedAt.Store(int64(time.Since(o.base)))
	}
}

// confirm returns at once while the lease was renewed less than its length ago. Else the process was suspended and
// others may have taken over: lease and session locks are confirmed before it returns, unless Redis does not answer
// within 1 s, or did not a moment ago. Every writer calls it before it writes to sockets.
func (o *owners) confirm() {
	if !o.suspended() {
		return
	}
	o.leaseMu.Lock()
	defer o.leaseMu.Unlock()
	if !o.suspended() {
		return
	}
	if err := o.renewOnce(context.Background()); err == nil {
		slog.Warn("pod was suspended: lease and sessions confirmed before the next write", "pod", o.pod)
	}
}

// close gives up the lease for good, at the end of a drain. A renewal after it would take the lease anew, and the next
// process of this id would wait for it to run out.
func (o *owners) close(ctx context.Context) error {
	o.leaseMu.Lock()
	defer o.leaseMu.Unlock()
	o.givenUp = true
	own := lease{o.epoch(), o.address}
	if own.epoch == "" {
		return nil
	}
	o.flushMarks(ctx) // those of the last second
	n, err := dropLease.Run(ctx, o.rdb, []string{podKey(o.pod)}, own.String()).Int()
	if err != nil {
		return fmt.Errorf("give up lease of pod %s: %w", o.pod, err)
	}
	if n == 1 { // else the name is that of another process
		o.rdb.SRem(ctx, podsKey, o.pod)
	}
	return nil
}
