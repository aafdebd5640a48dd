package main

import (
	"cmp"
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

// Redis keys: pod:<id> holds a lease, pods the ids of all pods, note:<id>#<life> what was given up for a pod.
const podsKey = "pods"

func podKey(id string) string { return "pod:" + id }

func noteKey(m member) string { return "note:" + m.String() }

const leaseTimeout = time.Second

// generationKey holds the stream's generation: the random id of this cluster of pods, and behind a point another one that the pods replace
// when the stream has lost its end, as one that was restored from a backup has. With its creation time it names the stream.
func generationKey(cfg *Config) string { return "generation:" + cfg.NATSStreamName }

// nextGeneration replaces the generation ARGV[1] by ARGV[2], unless another pod was faster, and answers with what it is now.
var nextGeneration = redis.NewScript(`
local cur = redis.call('GET', KEYS[1])
if cur and cur ~= ARGV[1] then return cur end
redis.call('SET', KEYS[1], ARGV[2])
return ARGV[2]`)

// member names a pod during one life: the random id that it gave its lease. A pod that lost its lease takes another life.
type member struct{ pod, life string }

func (m member) String() string { return m.pod + "#" + m.life }

// owner is a live pod and where it listens.
type owner struct {
	member
	addr string
}

// parseLease is the inverse of what a lease's value is: its life and address.
func parseLease(pod, s string) (owner, bool) {
	life, addr, ok := strings.Cut(s, " ")
	return owner{member{pod, life}, addr}, ok
}

func (o owner) value() string { return o.life + " " + o.addr }

// takeLease sets the lease where there is none, or where it is the caller's own of before, or one of its own that it
// tried to take without hearing of the success (ARGV: new, own, ms, tried). It may be executed twice: the library sends it again when an
// answer was lost.
var takeLease = redis.NewScript(`
local cur = redis.call('GET', KEYS[1])
if cur and cur ~= ARGV[1] and cur ~= ARGV[2] and cur ~= ARGV[4] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return 1`)

// renewLease extends the lease only if it still holds the caller's life (ARGV: own, ms).
const renewLease = `
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('PEXPIRE', KEYS[1], ARGV[2])`

var dropLease = redis.NewScript(`
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[1])`)

// errDuplicatePod means that another process lives under this pod's id.
var errDuplicatePod = errors.New("another process serves under this pod id")

// lease is who this pod is to the others, and who they are: its lease in Redis, the live pods, and the notes among them.
type lease struct {
	cfg  *settings
	rdb  redis.UniversalClient
	m    *Metrics
	pod  string
	base time.Time

	self       atomic.Pointer[owner] // this pod, once it has a life
	heldAt     atomic.Int64          // when the last successful renewal was sent, since base; 0 = none
	away       atomic.Bool           // the last renewal failed
	doubtUntil atomic.Int64          // others may not have written their claims again before, since base
	notes      atomic.Uint64         // left so far: part of their names
	// known are the live pods as of the last renewal, by id, and those heard of since. The map is replaced, never changed.
	known atomic.Pointer[map[string]owner]
	// reach are those of before a doubt, and those known since: their claims may not be in Redis yet. Replaced like known.
	reach atomic.Pointer[map[string]owner]
	wake  chan struct{} // room for 1: a renewal is due at once; never closed
	// generation is the stream's, as of the last renewal.
	generation atomic.Pointer[string]

	// instances are the run and replication ids of the Redis masters, replaced, never changed; nil before the first answer.
	instances atomic.Pointer[map[string]bool]

	mu      sync.Mutex // serialises renewals and the end of the lease; guards all below
	tried   string     // the lease that was last to be taken
	givenUp bool
}

func newLease(cfg *settings, rdb redis.UniversalClient, m *Metrics) *lease {
	l := &lease{cfg: cfg, rdb: rdb, m: m, pod: cfg.Load().ServerPodID, base: time.Now().Add(-time.Nanosecond), wake: make(chan struct{}, 1)}
	l.self.Store(&owner{member: member{pod: l.pod}})
	l.known.Store(&map[string]owner{})
	l.reach.Store(&map[string]owner{})
	none := ""
	l.generation.Store(&none)
	return l
}

// life is this pod's present one, "" before the first.
func (l *lease) life() string { return l.self.Load().life }

// since is a moment as the atomics hold it.
func (l *lease) since(t time.Time) int64 { return int64(t.Sub(l.base)) }

// fresh says whether the last successful renewal was sent less than a lease ago, by this process' monotonic clock.
func (l *lease) fresh() bool {
	at := l.heldAt.Load()
	return at != 0 && l.since(time.Now())-at < int64(l.cfg.Load().PodLease)
}

// available says whether Redis answers and the lease is known to hold: else no new sockets (503).
func (l *lease) available() bool { return !l.away.Load() && l.fresh() }

// inDoubt says whether what Redis says of owners may be wrong: it is away, or has been back for less than a lease, so that others may not
// have written their claims again.
func (l *lease) inDoubt() bool { return l.away.Load() || l.since(time.Now()) < l.doubtUntil.Load() }

// peers are the other live pods.
func (l *lease) peers() []owner { return l.others(*l.known.Load()) }

// everyone are the other pods that may have sockets, as long as Redis does not say who has which. Their lives may be others by now.
func (l *lease) everyone() []owner {
	all := maps.Clone(*l.reach.Load())
	maps.Copy(all, *l.known.Load())
	return l.others(all)
}

func (l *lease) others(pods map[string]owner) []owner {
	others := make([]owner, 0, len(pods))
	for id, o := range pods {
		if id != l.pod {
			others = append(others, o)
		}
	}
	return others
}

// livePods is the number of pods with a lease, at least 1.
func (l *lease) livePods() int { return max(1, len(*l.known.Load())) }

// overlooks says whether Redis has just told this pod that m has no lease.
func (l *lease) overlooks(m member) bool {
	return l.available() && (*l.known.Load())[m.pod].life != m.life
}

// locate says where the pod of m lives, under m's life or a later one. It asks Redis about lives that the last renewal has not seen.
func (l *lease) locate(m member) (o owner, lives bool) {
	if o, known := (*l.known.Load())[m.pod]; known && o.life == m.life {
		return o, true
	}
	ctx, cancel := context.WithTimeout(context.Background(), leaseTimeout)
	defer cancel()
	live, err := l.read(ctx, []string{m.pod})
	if err != nil {
		live = *l.known.Load()
	}
	o, lives = live[m.pod]
	return o, lives
}

// start takes the lease, waiting for Redis and for a predecessor's lease to run out, and saying so. It returns
// errDuplicatePod when the address in the lease answers with the lease's own id and life, or ctx's error.
func (l *lease) start(ctx context.Context, advertise func(context.Context) (string, error), p *peers) error {
	said := ""
	for {
		err := l.tryStart(ctx, advertise, p)
		if err == nil || errors.Is(err, errDuplicatePod) || ctx.Err() != nil {
			return err
		}
		if err.Error() != said {
			said = err.Error()
			slog.Warn("waiting for Redis and the pod's lease", "err", err)
		}
		if !pause(ctx, 300*time.Millisecond) {
			return ctx.Err()
		}
	}
}

func (l *lease) tryStart(ctx context.Context, advertise func(context.Context) (string, error), p *peers) error {
	ctx, cancel := context.WithTimeout(ctx, 2*leaseTimeout)
	defer cancel()
	addr, err := advertise(ctx)
	if err != nil {
		return err
	}
	if err := l.tryRights(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.takeLife(ctx, addr, p); err != nil {
		return err
	}
	pipe := l.rdb.Pipeline()
	generation := l.askGeneration(ctx, pipe)
	if err := execGets(ctx, pipe); err != nil {
		return fmt.Errorf("read the stream's generation: %w", err)
	}
	l.setGeneration(generation.Val())
	_, err = l.instancesChanged(ctx)
	return err
}

// askGeneration reads the stream's generation, and names it where Redis has none: it is new, or has lost it.
func (l *lease) askGeneration(ctx context.Context, p redis.Pipeliner) *redis.StringCmd {
	key := generationKey(l.cfg.Load())
	p.SetNX(ctx, key, cmp.Or(*l.generation.Load(), randomID(4)), 0)
	return p.Get(ctx, key)
}

// setGeneration says whether the generation is another one than this pod knew.
func (l *lease) setGeneration(generation string) (another bool) {
	old := l.generation.Swap(&generation)
	return *old != "" && *old != generation
}

// cluster is the random id of the pods that have this Redis in common; "" before the lease was taken.
func (l *lease) cluster() string { return clusterOf(*l.generation.Load()) }

func clusterOf(generation string) string {
	id, _, _ := strings.Cut(generation, ".")
	return id
}

// endLost gives the stream another generation, if no other pod has.
func (l *lease) endLost(ctx context.Context) error {
	next, err := nextGeneration.Run(ctx, l.rdb, []string{generationKey(l.cfg.Load())}, *l.generation.Load(), l.cluster()+"."+randomID(4)).Text()
	if err != nil {
		l.m.redisErrorsTotal.with("generation").Inc()
		return fmt.Errorf("name the stream's next generation: %w", err)
	}
	l.setGeneration(next)
	return nil
}

// takeLife takes the lease under a new life. p tells whether another process that holds it lives. l.mu must be held.
func (l *lease) takeLife(ctx context.Context, addr string, p *peers) error {
	own := *l.self.Load()
	next := owner{member{l.pod, randomID(6)}, addr}
	n, err := takeLease.Run(ctx, l.rdb, []string{podKey(l.pod)}, next.value(), own.value(), l.leaseMS(), l.tried).Int()
	if err == nil && n != 1 {
		return l.heldByAnother(ctx, p)
	}
	l.tried = next.value()
	if err == nil {
		err = l.rdb.SAdd(ctx, podsKey, l.pod).Err()
	}
	if err != nil {
		l.m.redisErrorsTotal.with("lease").Inc()
		return fmt.Errorf("take lease of pod %s: %w", l.pod, err)
	}
	l.self.Store(&next)
	slog.Info("lease taken", "life", next.life, "before", own.life, "address", addr)
	return nil
}

// heldByAnother says who holds the lease: errDuplicatePod if it is a process that answers for it.
func (l *lease) heldByAnother(ctx context.Context, p *peers) error {
	s, err := l.rdb.Get(ctx, podKey(l.pod)).Result()
	if err != nil {
		return fmt.Errorf("read lease of pod %s: %w", l.pod, err)
	}
	o, _ := parseLease(l.pod, s)
	if who, err := p.identify(ctx, o.addr, member{}); err == nil && who.GetPod() == l.pod && who.GetLife() == o.life && o.life != l.life() {
		return fmt.Errorf("%w: pod %s life %s answers at %s; set SERVER_POD_ID", errDuplicatePod, l.pod, o.life, o.addr)
	}
	return fmt.Errorf("pod id %s is still leased to %s, which does not answer for it: waiting until that lease ends", l.pod, o.addr)
}

func (l *lease) leaseMS() int64 { return l.cfg.Load().PodLease.Milliseconds() }

// renewal is what Redis said when the lease was renewed.
type renewal struct {
	overlooked bool              // the lease was gone, or Redis is another instance: this pod has a new life
	another    bool              // it is another instance
	back       bool              // the renewal before had failed
	generation bool              // the stream has another generation
	notes      map[string]string // left for this pod: reasons by name
}

// renew extends the lease, and deletes the notes that were acted upon. It reads, in the same pipeline, the notes for this pod and the
// names of all pods, and then their leases. Where the lease was gone, or Redis is another instance, the pod takes a new life. After an
// error Redis counts as away.
func (l *lease) renew(ctx context.Context, acted []string, p *peers) (renewal, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.givenUp {
		return renewal{}, errors.New("the lease was given up")
	}
	sent := time.Now()
	r, err := l.renewLocked(ctx, acted, p)
	if err != nil {
		l.m.redisErrorsTotal.with("lease").Inc()
		if l.away.CompareAndSwap(false, true) {
			slog.Warn("Redis is away: events go to every known pod, nothing is settled, no new sockets", "err", err)
		}
		return r, err
	}
	l.heldAt.Store(l.since(sent))
	r.back = l.away.Load()
	if r.back || r.another {
		l.doubtUntil.Store(l.since(time.Now().Add(l.cfg.Load().PodLease)))
	}
	l.away.Store(false)
	if r.back {
		slog.Info("Redis is back")
	}
	reach := *l.known.Load()
	if l.inDoubt() { // a Redis that has lost its data does not know all pods yet
		reach = maps.Clone(*l.reach.Load())
		maps.Copy(reach, *l.known.Load())
	}
	l.reach.Store(&reach)
	return r, nil
}

func (l *lease) renewLocked(ctx context.Context, acted []string, peers *peers) (r renewal, err error) {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	own := *l.self.Load()
	p := l.rdb.Pipeline()
	held := p.Eval(ctx, renewLease, []string{podKey(l.pod)}, own.value(), l.leaseMS())
	if len(acted) > 0 {
		p.HDel(ctx, noteKey(own.member), acted...)
	}
	notes := p.HGetAll(ctx, noteKey(own.member))
	p.SAdd(ctx, podsKey, l.pod)
	names := p.SMembers(ctx, podsKey)
	generation := l.askGeneration(ctx, p)
	if err := execGets(ctx, p); err != nil {
		return r, fmt.Errorf("renew lease of pod %s: %w", l.pod, err)
	}
	if r.another, err = l.instancesChanged(ctx); err != nil {
		return r, err
	}
	if n, _ := held.Int(); n != 1 || r.another {
		// A pod that started before the others heard from a Redis without data has made another cluster of them: every client would reload.
		if known := *l.generation.Load(); n != 1 && clusterOf(generation.Val()) != clusterOf(known) {
			err = l.rdb.Set(ctx, generationKey(l.cfg.Load()), known, 0).Err()
			generation.SetVal(known)
		}
		if err == nil {
			err = l.takeLife(ctx, own.addr, peers)
		}
		if err != nil {
			if r.another {
				l.instances.Store(&map[string]bool{}) // so that it is another one at the next attempt too
			}
			return r, err
		}
		r.overlooked = true
	}
	r.notes, r.generation = notes.Val(), l.setGeneration(generation.Val())
	return r, l.readPods(ctx, names.Val())
}

// readPods reads the leases of all pods named in the set: those that hold are the live pods.
func (l *lease) readPods(ctx context.Context, names []string) error {
	live, err := l.read(ctx, names)
	if err != nil {
		return err
	}
	for _, id := range names {
		if _, ok := live[id]; !ok {
			l.rdb.SRem(ctx, podsKey, id)
		}
	}
	l.known.Store(&live)
	return nil
}

// read reads leases; a pod without one is not in the answer.
func (l *lease) read(ctx context.Context, ids []string) (map[string]owner, error) {
	p := l.rdb.Pipeline()
	cmds := make([]*redis.StringCmd, len(ids))
	for i, id := range ids {
		cmds[i] = p.Get(ctx, podKey(id))
	}
	if err := execGets(ctx, p); err != nil {
		return nil, fmt.Errorf("read %d leases: %w", len(ids), err)
	}
	live := make(map[string]owner, len(ids))
	for i, id := range ids {
		if o, ok := parseLease(id, cmds[i].Val()); ok {
			live[id] = o
		}
	}
	return live, nil
}

// learn adds pods that a look-up has heard of to the known ones.
func (l *lease) learn(live map[string]owner) {
	for {
		old := l.known.Load()
		next := maps.Clone(*old)
		maps.Copy(next, live)
		if l.known.CompareAndSwap(old, &next) {
			return
		}
	}
}

// refresh reads the live pods between two renewals: one that has just started is not known before the next.
func (l *lease) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	names, err := l.rdb.SMembers(ctx, podsKey).Result()
	if err != nil {
		return fmt.Errorf("read the names of all pods: %w", err)
	}
	live, err := l.read(ctx, names)
	if err == nil {
		l.learn(live)
	}
	return err
}

// instancesChanged says whether a master's run or replication id is new since the last renewal: after a restart or a
// fail-over Redis may have lost writes. A server that refuses INFO is taken at its word. l.mu must be held.
func (l *lease) instancesChanged(ctx context.Context) (bool, error) {
	var mu sync.Mutex
	ids, silent := map[string]bool{}, false
	ask := func(ctx context.Context, c *redis.Client) error {
		p := c.Pipeline()
		server, repl := p.Info(ctx, "server"), p.Info(ctx, "replication")
		_, err := p.Exec(ctx)
		mu.Lock()
		defer mu.Unlock()
		silent = silent || err != nil
		for _, id := range instanceIDs(server.Val() + "\n" + repl.Val()) {
			ids[id] = true
		}
		return nil
	}
	switch c := l.rdb.(type) {
	case *redis.ClusterClient:
		if err := c.ForEachMaster(ctx, ask); err != nil {
			return false, fmt.Errorf("ask the masters of Redis for their ids: %w", err)
		}
	case *redis.Client:
		ask(ctx, c)
	}
	if err := ctx.Err(); err != nil {
		return false, fmt.Errorf("ask Redis for its id: %w", err)
	}
	old, now := l.instances.Load(), ids
	if silent && old != nil { // a master that stood still for a moment is no new one when it answers again
		now = maps.Clone(ids)
		maps.Copy(now, *old)
	}
	l.instances.Store(&now)
	for id := range ids {
		if old != nil && !(*old)[id] {
			slog.Warn("Redis was restarted, failed over, or lost writes")
			return true, nil
		}
	}
	return false, nil
}

// instanceIDs finds the run and replication ids in what INFO says.
func instanceIDs(info string) (ids []string) {
	for line := range strings.Lines(info) {
		if strings.HasPrefix(line, "run_id:") || strings.HasPrefix(line, "master_replid:") {
			ids = append(ids, strings.TrimSpace(line))
		}
	}
	return ids
}

// meet looks who answers on a new connection to Redis, before anything else is asked on it: one that is restarted within a moment, without its
// data, would say of every route that nobody has it, until the next renewal notices.
func (l *lease) meet(ctx context.Context, conn *redis.Conn) error {
	known := l.instances.Load()
	if known == nil { // nothing was asked yet
		return nil
	}
	info, err := conn.Info(ctx).Result()
	if err != nil || strings.Contains(info, "redis_mode:sentinel") || strings.Contains(info, "role:slave") {
		return nil
	}
	if slices.ContainsFunc(instanceIDs(info), func(id string) bool { return !(*known)[id] }) {
		l.doubtUntil.Store(l.since(time.Now().Add(l.cfg.Load().PodLease)))
		poke(l.wake)
	}
	return nil
}

// leaveNotes tells each pod where one of the events failed that it was given up, and returns when Redis has all notes. A note is named
// by the route and a number that is never used again, so its reader deletes exactly what it has acted upon. It outlives the lease
// of the life that it is for; the next life of that pod was overlooked, and marks a gap everywhere.
func (l *lease) leaveNotes(ctx context.Context, notes []note) error {
	ctx, cancel := context.WithTimeout(ctx, leaseTimeout)
	defer cancel()
	type target struct {
		member
		route  string
		reason string
	}
	p, done := l.rdb.Pipeline(), map[target]bool{}
	own := l.self.Load().member
	for _, n := range notes {
		for _, m := range n.p.missed {
			if m == (member{}) {
				m = own
			}
			t := target{m, noteRoute(n.p.event), n.reason}
			if done[t] {
				continue
			}
			done[t] = true
			name := t.route + "#" + own.life + "." + strconv.FormatUint(l.notes.Add(1), 10)
			p.HSet(ctx, noteKey(m), name, n.reason)
			p.PExpire(ctx, noteKey(m), 4*l.cfg.Load().PodLease)
		}
	}
	if _, err := p.Exec(ctx); err != nil {
		l.m.redisErrorsTotal.with("note").Inc()
		return fmt.Errorf("leave %d notes: %w", len(done), err)
	}
	return nil
}

// noteRoute is what a note says of whom the event was for: an agent's sockets, or the admins whose scope covers it.
func noteRoute(ev *event) string {
	who := ev.company + ":" + ev.agent
	if ev.kind == kindAgent {
		return "admins:" + who
	}
	return who
}

// parseNote is noteRoute's inverse, for the name of a note.
func parseNote(name string) (company, agent string, toAdmins bool) {
	who, _, _ := strings.Cut(name, "#")
	who, toAdmins = strings.CutPrefix(who, "admins:")
	company, agent, _ = strings.Cut(who, ":")
	return company, agent, toAdmins
}

// close gives up the lease for good, at the end of a drain. A renewal after it would take the lease anew, and the next
// process of this id would wait for it to run out.
func (l *lease) close(ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.givenUp = true
	own := *l.self.Load()
	if own.life == "" {
		return nil
	}
	n, err := dropLease.Run(ctx, l.rdb, []string{podKey(l.pod)}, own.value()).Int()
	if err != nil {
		return fmt.Errorf("give up lease of pod %s: %w", l.pod, err)
	}
	if n == 1 { // else the name is that of another process
		l.rdb.SRem(ctx, podsKey, l.pod)
	}
	return nil
}
