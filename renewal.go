package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	peerpb "daisi-ws-service/proto"
)

const sessionBatch = 128 // commands in one pipeline at most

// putSession writes ARGV[1] for ARGV[3] ms where the value is still ARGV[2], ” = none. It returns ” or the value found instead. Like
// dropSession, it may be sent twice: go-redis does when an answer was lost.
var putSession = redis.NewScript(`
local value = redis.call('GET', KEYS[1]) or ''
if value ~= ARGV[2] and value ~= ARGV[1] then return value end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return ''`)

// dropSession deletes the key where its value names the socket ARGV[1], under whatever life.
var dropSession = redis.NewScript(`
local value = redis.call('GET', KEYS[1]) or ''
if string.sub(value, -#ARGV[1] - 1) == '#' .. ARGV[1] then redis.call('DEL', KEYS[1]) end
return ''`)

// sessionDrop is a release that is still to be sent.
type sessionDrop struct {
	key, socket string
	until       time.Time // by then the key has expired by itself
}

// queueDrop makes run delete the key if it names the socket.
func (s *sessions) queueDrop(key, socket string) {
	s.mu.Lock()
	s.drops = append(s.drops, sessionDrop{key, socket, time.Now().Add(s.ttl())})
	s.mu.Unlock()
	poke(s.wake)
}

// reclaim has all sessions renewed at once: Redis is back, or the pod has a new life. lost says that Redis may have lost data, so that
// a session whose key names another may be the newer one. It does not block.
func (s *sessions) reclaim(lost bool) {
	s.mu.Lock()
	s.sweep = true
	if lost {
		s.loss = time.Now().Add(s.ttl())
	}
	s.mu.Unlock()
	poke(s.wake)
}

// run sends every renewal and every release of this pod, one batch after the other, until ctx ends: so no renewal overtakes a release,
// which would set a dead socket's key again, and releases need not wait for a tick. Then it sends the releases that are queued.
func (s *sessions) run(ctx context.Context) {
	defer s.disputes.Wait()
	timer := time.NewTimer(0)
	defer timer.Stop()
	slot, next := 0, time.Now()
	for {
		select {
		case <-ctx.Done():
			final, cancel := context.WithTimeout(context.WithoutCancel(ctx), sessionTimeout)
			defer cancel()
			s.sendDrops(final)
			return
		case <-s.wake:
		case <-timer.C:
		}
		retry := s.sendDrops(ctx)
		s.renewAll(ctx, s.takeUrgent())
		if !time.Now().Before(next) {
			_ = s.renew(ctx, s.inSlot(slot))
			slot = (slot + 1) % sessionSlots
			next = next.Add(s.cfg.Load().SessionRefreshInterval / sessionSlots)
			if now := time.Now(); next.Before(now) { // no burst after run was held up
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

// takeUrgent returns the sessions that are to be renewed at once.
func (s *sessions) takeUrgent() []*session {
	s.mu.Lock()
	sweep, urgent := s.sweep, s.again
	s.sweep, s.again = false, nil
	s.mu.Unlock()
	if sweep {
		return s.all()
	}
	return urgent
}

// sendDrops sends the queued releases and says whether some have to be tried again. Those whose key has expired are forgotten.
func (s *sessions) sendDrops(ctx context.Context) (retry bool) {
	for {
		s.mu.Lock()
		now := time.Now()
		s.drops = slices.DeleteFunc(s.drops, func(d sessionDrop) bool { return d.until.Before(now) })
		n := min(len(s.drops), sessionBatch)
		batch := slices.Clone(s.drops[:n])
		s.drops = slices.Delete(s.drops, 0, n)
		s.mu.Unlock()
		if len(batch) == 0 {
			return false
		}
		var failed []sessionDrop
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

// renewAll renews a list of any length, with releases in between, up to the first batch that gets no answer at all. What fails comes
// again: with its slot, and when Redis is back.
func (s *sessions) renewAll(ctx context.Context, list []*session) {
	for batch := range slices.Chunk(list, sessionBatch) {
		s.sendDrops(ctx)
		if errors.Is(s.renew(ctx, batch), errUnavailable) {
			return
		}
	}
}

// renew lengthens the lives of the sessions of list that are still to be held. A key that is missing, or names the socket under an
// older life or a ghost, gets its name back; one that names another begins a dispute. A session that gets no answer stays.
func (s *sessions) renew(ctx context.Context, list []*session) error {
	list, ghosts := s.renewable(list)
	if len(list) == 0 {
		return nil
	}
	s.m.sessionLockRenewalAttempts.with().Add(len(list))
	replies := s.extend(ctx, list)
	var puts []sessionPut
	for i, r := range replies {
		own, found := s.holderOf(list[i]), parseHolder(r.value)
		if r.err == nil && r.value != own.String() && (r.value == "" || found.socket == own.socket || r.value == ghosts[i]) {
			puts = append(puts, sessionPut{i, list[i].key, own.String(), r.value})
		}
	}
	for n, r := range s.put(ctx, puts) {
		if r.err == nil && r.value == "" {
			r.value = puts[n].own
		}
		replies[puts[n].i] = r
	}
	return s.renewed(list, replies)
}

// renewable leaves out the sessions that are to go, or have gone since list was made: their release may have been sent. ghosts are
// the values that are known to name no living socket.
func (s *sessions) renewable(list []*session) (left []*session, ghosts []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sess := range list {
		if sess.state == held && sess.verdict == nil {
			left, ghosts = append(left, sess), append(ghosts, sess.ghost)
		}
	}
	return left, ghosts
}

// renewed acts on the values that the keys of list have now, and returns the error of one that is not known.
func (s *sessions) renewed(list []*session, replies []sessionReply) error {
	missed, err := 0, error(nil)
	for i, r := range replies {
		switch {
		case r.err != nil:
			missed, err = missed+1, r.err
			s.m.sessionLockRenewalFailure.with("redis").Inc()
		case parseHolder(r.value).socket != list[i].id:
			s.dispute(list[i], r.value)
		default:
			s.m.sessionLockRenewalSuccess.with().Inc()
		}
	}
	if missed == len(list) {
		err = fmt.Errorf("%w: %w", errUnavailable, err)
	}
	switch {
	case missed == len(list) && !s.away:
		s.away = true
		slog.Warn("sessions cannot be renewed, their sockets stay", "err", err)
	case missed == 0 && s.away:
		s.away = false
		slog.Info("sessions are renewed again")
		s.reclaim(false)
	}
	if err != nil {
		return fmt.Errorf("renew %d of %d sessions: %w", missed, len(list), err)
	}
	return nil
}

// dispute asks the pod that a session's key names whether it has that socket. If it has, or does not say, this one's is closed. If
// there is no such socket, the value is a ghost: of a swap whose answer was lost, of data that Redis has lost, or of a pod that died.
// Then the name is put back, so that somebody lives.
func (s *sessions) dispute(sess *session, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sess.asking {
		return
	}
	sess.asking = true
	s.disputes.Go(func() {
		h := parseHolder(value)
		found, err := s.ask(h, &peerpb.CloseSessionRequest{Key: sess.key, Socket: h.socket})
		s.mu.Lock()
		sess.asking = false
		ghost := !found && (err == nil || errors.Is(err, errDead))
		if ghost {
			sess.ghost = value
			s.again = append(s.again, sess)
		}
		code := 4402
		if time.Now().Before(s.loss) {
			code = closeTryLater // the other one may be older
		}
		s.mu.Unlock()
		if ghost {
			poke(s.wake)
			return
		}
		s.m.sessionLockRenewalFailure.with("lost").Inc()
		sess.close(code, "session-lost")
	})
}

// sessionReply is the answer to one of a batch.
type sessionReply struct {
	value string // of the key, "" where it is missing (extend) or now the caller's (put)
	err   error
}

// extend lengthens the lives of keys by one TTL and returns their values. It is one plain command per key where a script that
// compares first costs Redis three. The price: whoever has lost a session lengthens the life of another's key, once.
func (s *sessions) extend(ctx context.Context, list []*session) []sessionReply {
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	pipe := s.rdb.Pipeline()
	cmds := make([]*redis.StringCmd, len(list))
	for i, sess := range list {
		cmds[i] = pipe.GetEx(ctx, sessionKey(sess.key), s.ttl())
	}
	_, _ = pipe.Exec(ctx) // each command has its own error
	replies := make([]sessionReply, len(list))
	for i, cmd := range cmds {
		replies[i].value, replies[i].err = cmd.Result()
		if errors.Is(replies[i].err, redis.Nil) {
			replies[i].err = nil
		}
	}
	return s.counted("session_renew", replies)
}

// sessionPut is a name to be put where the key has the value found.
type sessionPut struct {
	i               int // in the list that is renewed
	key, own, found string
}

func (s *sessions) put(ctx context.Context, puts []sessionPut) []sessionReply {
	return s.counted("session_renew", s.batch(ctx, putSession, len(puts), func(i int) (key string, args []any) {
		return puts[i].key, []any{puts[i].own, puts[i].found, s.ttl().Milliseconds()}
	}))
}

func (s *sessions) drop(ctx context.Context, drops []sessionDrop) []sessionReply {
	return s.counted("session_release", s.batch(ctx, dropSession, len(drops), func(i int) (key string, args []any) {
		return drops[i].key, []any{drops[i].socket}
	}))
}

// batch sends script n times in one pipeline. A server that does not have the script (it restarted, or is another node of a cluster)
// gets its source in a second one: inside a pipeline nobody else does that.
func (s *sessions) batch(ctx context.Context, script *redis.Script, n int, at func(i int) (key string, args []any)) []sessionReply {
	if n == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	cmds := make([]*redis.Cmd, n)
	pipe := s.rdb.Pipeline()
	for i := range cmds {
		key, args := at(i)
		cmds[i] = script.EvalSha(ctx, pipe, []string{sessionKey(key)}, args...)
	}
	_, _ = pipe.Exec(ctx)
	pipe = s.rdb.Pipeline()
	for i := range cmds {
		if redis.HasErrorPrefix(cmds[i].Err(), "NOSCRIPT") {
			key, args := at(i)
			cmds[i] = script.Eval(ctx, pipe, []string{sessionKey(key)}, args...)
		}
	}
	if pipe.Len() > 0 {
		_, _ = pipe.Exec(ctx)
	}
	replies := make([]sessionReply, n)
	for i, cmd := range cmds {
		replies[i].err = cmd.Err()
		replies[i].value, _ = cmd.Val().(string)
	}
	return replies
}

// counted counts the errors of replies.
func (s *sessions) counted(op string, replies []sessionReply) []sessionReply {
	for _, r := range replies {
		if r.err != nil {
			s.m.redisErrorsTotal.with(op).Inc()
		}
	}
	return replies
}
