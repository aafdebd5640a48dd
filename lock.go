package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// The lock of a session is the Redis key session:<key>. Its value is "<holder>" or "<holder> <heir>", each a claim
// "<pod>#<life>#<socket>#<turn>". Only the socket decides whose lock it is: its id is unique for ever, while a
// pod may move to a new life under it.
//
// The heir is the newcomer that waits. Turns are given by Redis as newcomers arrive, each above all that the value
// names, so that of several newcomers the last one wins whatever pod they came to, and nobody compares clocks (but
// see sessions.later): a waiter that sees a turn above its own has been replaced. Polling alone made it a matter of luck, and two tabs
// that each sent the other's socket a kill could go on like that for long.
//
// Each script touches one key, as Redis Cluster wants it. All may be sent twice: go-redis does when an answer was lost.

// claimScript takes the lock KEYS[1] for the socket ARGV[2] of ARGV[1] (pod and life) if it is free, its own, or
// held by the claim ARGV[4], which is to be dispossessed; else it makes it the heir, unless a later one is.
// ARGV[3] is the turn, 0 on arrival; ARGV[5] the life in ms. Returns the turn and the value found, ” = taken.
var claimScript = redis.NewScript(`
local value = redis.call('GET', KEYS[1]) or ''
local holder, heir = string.match(value, '^([^ ]*) ?(.*)$')
local function turn(claim) return tonumber(string.match(claim, '#(%d+)$') or 0) end
local newest = math.max(turn(holder), turn(heir))
local mine = tonumber(ARGV[3])
if mine == 0 then mine = newest + 1 end
local claim = ARGV[1] .. '#' .. ARGV[2] .. '#' .. mine
if holder == '' or string.find(holder, '#' .. ARGV[2] .. '#', 1, true) or (holder == ARGV[4] and newest <= mine) then
  redis.call('SET', KEYS[1], claim, 'PX', ARGV[5])
  return {mine, ''}
end
if newest < mine then redis.call('SET', KEYS[1], holder .. ' ' .. claim, 'KEEPTTL') end
return {mine, value}`)

// restoreScript writes the claim ARGV[1] of the socket ARGV[2] where the lock is missing or its own (of an older
// life). Returns ” or the value of whoever holds it now. An heir is left out: if it lives, it comes again.
var restoreScript = redis.NewScript(`
local value = redis.call('GET', KEYS[1]) or ''
local holder = string.match(value, '^[^ ]*')
if holder ~= '' and not string.find(holder, '#' .. ARGV[2] .. '#', 1, true) then return value end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return ''`)

// dropScript gives up whatever the socket ARGV[1] has in the lock: as its holder, the heir gets it (for ARGV[2] ms);
// as the heir, it withdraws.
var dropScript = redis.NewScript(`
local value = redis.call('GET', KEYS[1]) or ''
local holder, heir = string.match(value, '^([^ ]*) ?(.*)$')
local socket = '#' .. ARGV[1] .. '#'
if string.find(holder, socket, 1, true) then
  if heir == '' then redis.call('DEL', KEYS[1]) else redis.call('SET', KEYS[1], heir, 'PX', ARGV[2]) end
elseif string.find(heir, socket, 1, true) then
  redis.call('SET', KEYS[1], holder, 'KEEPTTL')
end
return 1`)

func lockKey(key string) string { return "session:" + key }

// lockClaim is a claim taken apart. One that this service did not write has only its text, and turn 0.
type lockClaim struct {
	text              string
	pod, life, socket string
	turn              int64
}

func (c lockClaim) String() string {
	return c.pod + "#" + c.life + "#" + c.socket + "#" + strconv.FormatInt(c.turn, 10)
}

// newSocketID is unique for ever. It begins with the time when its client came, in ms since 1970.
func newSocketID(came time.Time) string {
	return strconv.FormatInt(came.UnixMilli(), 36) + "-" + rand.Text()
}

// came is when the client of the claim's socket came, by the clock of its pod; zero where the id does not tell.
func (c lockClaim) came() time.Time {
	text, _, _ := strings.Cut(c.socket, "-")
	ms, err := strconv.ParseInt(text, 36, 64)
	if err != nil {
		return time.Time{}
	}
	return time.UnixMilli(ms)
}

// parseLock takes the value of a lock apart; without an heir, heir.text is empty.
func parseLock(value string) (holder, heir lockClaim) {
	first, second, _ := strings.Cut(value, " ")
	return parseLockClaim(first), parseLockClaim(second)
}

// parseLockClaim takes one claim apart; pod ids and lives have no '#'.
func parseLockClaim(text string) lockClaim {
	c := lockClaim{text: text}
	pod, rest, _ := strings.Cut(text, "#")
	life, rest, _ := strings.Cut(rest, "#")
	socket, number, _ := strings.Cut(rest, "#")
	if turn, err := strconv.ParseInt(number, 10, 64); err == nil {
		c.pod, c.life, c.socket, c.turn = pod, life, socket, turn
	}
	return c
}

// lockDrop is a release that is still to be sent.
type lockDrop struct {
	key, socket string
	until       time.Time // by then the lock has expired by itself
}

// lockStore sends the commands about locks. Those of live sessions come from one goroutine only (see sessions.work).
type lockStore struct {
	rdb   redis.UniversalClient
	cfg   *settings
	m     *Metrics
	turns chan struct{} // capacity claimsAtOnce: newcomers' commands under way; never closed
}

const (
	// lockTimeout bounds one command, or one pipeline, about a lock.
	lockTimeout = 2 * time.Second
	// claimsAtOnce leaves room in go-redis's pool, 10 connections for each processor: behind the claims of 5,000 that connect
	// at once, lease and log came so late that Redis was believed away (measured).
	claimsAtOnce = 8
)

// turn waits until a newcomer's command may be sent, after which done is to be called. Its errors are ctx's.
func (l *lockStore) turn(ctx context.Context) (done func(), err error) {
	select {
	case l.turns <- struct{}{}:
		return func() { <-l.turns }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// read returns the lock's claims; those that it does not have are without text. Its errors are errUnavailable.
func (l *lockStore) read(ctx context.Context, key string) (holder, heir lockClaim, err error) {
	done, err := l.turn(ctx)
	if err != nil {
		return holder, heir, fmt.Errorf("%w: read the lock of %s: %w", errUnavailable, key, err)
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	value, err := l.rdb.Get(ctx, lockKey(key)).Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		l.m.redisErrorsTotal.with("session_read").Inc()
		return holder, heir, fmt.Errorf("%w: read the lock of %s: %w", errUnavailable, key, err)
	}
	holder, heir = parseLock(value)
	return holder, heir, nil
}

// claim runs claimScript for one socket. A value of "" means that the lock is its own now.
func (l *lockStore) claim(ctx context.Context, key string, c lockClaim, oust string) (turn int64, value string, err error) {
	done, err := l.turn(ctx)
	if err != nil {
		return 0, "", err
	}
	defer done()
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	reply, err := claimScript.Run(ctx, l.rdb, []string{lockKey(key)},
		c.pod+"#"+c.life, c.socket, c.turn, oust, l.ttl()).Slice()
	if err != nil {
		l.m.redisErrorsTotal.with("session_claim").Inc()
		return 0, "", err
	}
	if len(reply) == 2 {
		turn, _ = reply[0].(int64)
		value, _ = reply[1].(string)
	}
	if turn == 0 {
		return 0, "", fmt.Errorf("unexpected answer %v", reply)
	}
	return turn, value, nil
}

// ttl is the life of a lock in ms; read each time, since SIGHUP may change it.
func (l *lockStore) ttl() int64 { return l.cfg.Load().SessionTTL.Milliseconds() }

// lockReply is the answer to one of a batch.
type lockReply struct {
	value string // of the lock, "" where it is missing (extend) or now the caller's (restore)
	err   error
}

// extend lengthens the lives of locks by one TTL and returns their values. It is one plain command per lock where
// a script that compares first costs Redis three. The price: a holder that lost its lock lengthens the life of
// another's, once, before it learns so from the value; nothing is decided by that life while a pod's lease holds.
func (l *lockStore) extend(ctx context.Context, keys []string) []lockReply {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	ttl := l.cfg.Load().SessionTTL
	pipe := l.rdb.Pipeline()
	cmds := make([]*redis.StringCmd, len(keys))
	for i, key := range keys {
		cmds[i] = pipe.GetEx(ctx, lockKey(key), ttl)
	}
	_, _ = pipe.Exec(ctx) // each command has its own error
	replies := make([]lockReply, len(keys))
	for i, cmd := range cmds {
		replies[i].value, replies[i].err = cmd.Result()
		if replies[i].err == redis.Nil {
			replies[i].err = nil
		}
	}
	return l.counted("session_renew", replies)
}

// restore runs restoreScript for each claim.
func (l *lockStore) restore(ctx context.Context, keys []string, claims []lockClaim) []lockReply {
	ttl := l.ttl()
	return l.counted("session_renew", l.run(ctx, restoreScript, keys, func(i int) []any {
		return []any{claims[i].String(), claims[i].socket, ttl}
	}))
}

// drop runs dropScript for each release.
func (l *lockStore) drop(ctx context.Context, drops []lockDrop) []lockReply {
	ttl := l.ttl()
	keys := make([]string, len(drops))
	for i, d := range drops {
		keys[i] = d.key
	}
	return l.counted("session_release", l.run(ctx, dropScript, keys, func(i int) []any {
		return []any{drops[i].socket, ttl}
	}))
}

// run sends script once per key in one pipeline. A server that does not have the script (it restarted, or is another
// node of a cluster) gets its source in a second one: inside a pipeline nobody else does that.
func (l *lockStore) run(ctx context.Context, script *redis.Script, keys []string, args func(int) []any) []lockReply {
	if len(keys) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	cmds := make([]*redis.Cmd, len(keys))
	pipe := l.rdb.Pipeline()
	for i, key := range keys {
		cmds[i] = script.EvalSha(ctx, pipe, []string{lockKey(key)}, args(i)...)
	}
	_, _ = pipe.Exec(ctx)
	pipe = l.rdb.Pipeline()
	for i, key := range keys {
		if redis.HasErrorPrefix(cmds[i].Err(), "NOSCRIPT") {
			cmds[i] = script.Eval(ctx, pipe, []string{lockKey(key)}, args(i)...)
		}
	}
	if pipe.Len() > 0 {
		_, _ = pipe.Exec(ctx)
	}
	replies := make([]lockReply, len(keys))
	for i, cmd := range cmds {
		replies[i].err = cmd.Err()
		replies[i].value, _ = cmd.Val().(string)
	}
	return replies
}

// counted counts the errors of replies.
func (l *lockStore) counted(op string, replies []lockReply) []lockReply {
	for _, r := range replies {
		if r.err != nil {
			l.m.redisErrorsTotal.with(op).Inc()
		}
	}
	return replies
}

// queueDrop makes work give up whatever the socket has in the lock of key.
func (s *sessions) queueDrop(key, socket string) {
	s.mu.Lock()
	s.drops = append(s.drops, lockDrop{key, socket, time.Now().Add(s.cfg.Load().SessionTTL)})
	s.mu.Unlock()
	s.notify()
}

// notify wakes work; a wake-up that is still pending will do.
func (s *sessions) notify() { poke(s.wake) }

// reclaim has all locks renewed at once: Redis is back, may have lost data, or the life is new. It does not block.
func (s *sessions) reclaim() {
	s.mu.Lock()
	s.sweep = true
	s.mu.Unlock()
	s.notify()
}

// work sends every renewal and every release of this pod, one batch after the other: so no renewal overtakes a
// release, which would set a dead socket's lock again, and releases need not wait for a tick.
func (s *sessions) work(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	slot, next := 0, time.Now()
	for {
		select {
		case <-ctx.Done():
			final, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockTimeout)
			defer cancel()
			s.sendDrops(final)
			return
		case <-s.wake:
		case <-timer.C:
		}
		retry := s.sendDrops(ctx)
		if s.takeSweep() {
			_ = s.renewAll(ctx) // what fails comes again: with its slot, and when Redis is back
		}
		if !time.Now().Before(next) {
			_ = s.renew(ctx, s.inSlot(slot))
			slot = (slot + 1) % sessionSlots
			next = next.Add(s.cfg.Load().SessionRefreshInterval / sessionSlots)
			if now := time.Now(); next.Before(now) { // no burst after work was held up
				next = now
			}
		}
		pause := time.Until(next)
		if retry {
			pause = min(pause, 250*time.Millisecond)
		}
		timer.Reset(max(pause, 0))
	}
}

// takeSweep says whether all locks are to be renewed now, and takes the order.
func (s *sessions) takeSweep() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	sweep := s.sweep
	s.sweep = false
	return sweep
}

// sendDrops sends the queued releases and says whether some have to be tried again. Those whose lock has expired
// meanwhile are forgotten.
func (s *sessions) sendDrops(ctx context.Context) (retry bool) {
	for {
		s.mu.Lock()
		now := time.Now()
		s.drops = slices.DeleteFunc(s.drops, func(d lockDrop) bool { return d.until.Before(now) })
		n := min(len(s.drops), sessionBatch)
		batch := slices.Clone(s.drops[:n])
		s.drops = slices.Delete(s.drops, 0, n)
		s.mu.Unlock()
		if len(batch) == 0 {
			return false
		}
		var failed []lockDrop
		for i, r := range s.drop(ctx, batch) {
			if r.err != nil {
				failed = append(failed, batch[i])
			}
		}
		if len(failed) > 0 {
			s.mu.Lock()
			s.drops = append(failed, s.drops...)
			s.mu.Unlock()
			return true
		}
	}
}

// renewAll renews every lock, with releases in between, up to the first batch that gets no answer at all.
func (s *sessions) renewAll(ctx context.Context) error {
	var all error
	for batch := range slices.Chunk(s.all(), sessionBatch) {
		s.sendDrops(ctx)
		err := s.renew(ctx, batch)
		all = errors.Join(all, err)
		if errors.Is(err, errUnavailable) {
			break
		}
	}
	return all
}

// renew lengthens the locks of those of list that are still to be held, restores those that are missing or bear an
// older life, and closes the sockets whose lock another holds. A socket whose lock gets no answer stays.
func (s *sessions) renew(ctx context.Context, list []*session) error {
	list = s.renewable(list)
	if len(list) == 0 {
		return nil
	}
	s.m.sessionLockRenewalAttempts.with().Add(len(list))
	keys, claims := make([]string, len(list)), make([]lockClaim, len(list))
	for i, sess := range list {
		keys[i], claims[i] = sess.key, s.claimOf(sess)
	}
	replies := s.extend(ctx, keys)
	var stale []int
	for i, r := range replies {
		holder, _ := parseLock(r.value)
		if r.err == nil && (r.value == "" || holder.socket == list[i].id && holder.life != claims[i].life) {
			stale = append(stale, i)
		}
	}
	for n, r := range s.restore(ctx, pick(keys, stale), pick(claims, stale)) {
		if r.value == "" {
			r.value = claims[stale[n]].String()
		}
		replies[stale[n]] = r
	}
	return s.renewed(list, replies)
}

// pick returns the elements of list at the indices.
func pick[T any](list []T, indices []int) []T {
	some := make([]T, len(indices))
	for n, i := range indices {
		some[n] = list[i]
	}
	return some
}

// renewable leaves out the sessions that were killed, which are to go, and those released, perhaps since list was
// made: their release may have been sent.
func (s *sessions) renewable(list []*session) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(list, func(sess *session) bool { return sess.released || sess.verdict != nil })
}

// renewed acts on the values that the locks of list have now, and returns the error of one that is not known.
func (s *sessions) renewed(list []*session, replies []lockReply) error {
	failed, err := 0, error(nil)
	for i, r := range replies {
		holder, _ := parseLock(r.value)
		switch {
		case r.err != nil:
			failed, err = failed+1, r.err
			s.m.sessionLockRenewalFailure.with("redis").Inc()
		case holder.socket != list[i].id:
			s.m.sessionLockRenewalFailure.with("lost").Inc()
			list[i].close(4402, "session-lost")
		default:
			s.m.sessionLockRenewalSuccess.with().Inc()
		}
	}
	if failed == len(list) {
		err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
	switch {
	case failed == len(list) && !s.away:
		s.away = true
		slog.Warn("session locks cannot be renewed, their sockets stay", "err", err)
	case failed == 0 && s.away:
		s.away = false
		slog.Info("session locks are renewed again")
		s.reclaim()
	}
	if err != nil {
		return fmt.Errorf("renew %d of %d session locks: %w", failed, len(list), err)
	}
	return nil
}
