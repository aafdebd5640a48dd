package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"time"

	"github.com/redis/go-redis/v9"

	peerpb "daisi-ws-service/proto"
)

const sessionBatch = 128 // commands in one pipeline at most

// putSession writes ARGV[1] for ARGV[3] ms where the value is still ARGV[2], empty = none. It returns nothing, or the value found. Like
// dropSession, it may be executed twice: go-redis sends it again when an answer was lost.
const putSession = `
local value = redis.call('GET', KEYS[1]) or ''
if value ~= ARGV[2] and value ~= ARGV[1] then return value end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return ''`

// dropSession deletes the key where its value names the socket ARGV[1], under whatever life.
const dropSession = `
local value = redis.call('GET', KEYS[1]) or ''
if string.sub(value, -#ARGV[1] - 1) == '#' .. ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0`

// sessionDrop is a release that is still to be sent.
type sessionDrop struct {
	key, socket string
	until       time.Time // by then the key has expired by itself
}

// reclaim has all sessions renewed at once: Redis is back, or the pod has a new life. lost says that Redis may have lost data. It does
// not block.
func (s *sessions) reclaim(lost bool) {
	all := s.list(func(*session) bool { return true })
	s.mu.Lock()
	s.urgent = append(s.urgent, all...)
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
			s.sendDrops(context.WithoutCancel(ctx))
			return
		case <-s.wake:
		case <-timer.C:
		}
		retry := s.sendDrops(ctx)
		s.mu.Lock()
		urgent := s.urgent
		s.urgent = nil
		s.mu.Unlock()
		for batch := range slices.Chunk(urgent, sessionBatch) { // what is left comes with its slot, or when Redis is back
			if s.sendDrops(ctx) || !s.renew(ctx, batch) {
				break
			}
		}
		if !time.Now().Before(next) {
			s.mu.Lock()
			due := slices.Collect(maps.Values(s.live[slot]))
			s.mu.Unlock()
			s.renew(ctx, due)
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

// sendDrops sends the queued releases and says whether some have to be tried again. Those whose key has expired are forgotten.
func (s *sessions) sendDrops(ctx context.Context) (retry bool) {
	s.mu.Lock()
	drops := s.drops
	s.drops = nil
	s.mu.Unlock()
	var left []sessionDrop
	for batch := range slices.Chunk(drops, sessionBatch) {
		if len(left) == 0 { // else Redis is away
			batch = s.drop(ctx, batch...)
		}
		left = append(left, batch...)
	}
	if len(left) == 0 {
		return false
	}
	now := time.Now()
	left = slices.DeleteFunc(left, func(d sessionDrop) bool { return d.until.Before(now) })
	s.mu.Lock()
	s.drops = append(left, s.drops...)
	s.mu.Unlock()
	return true
}

// drop sends releases and returns those that Redis has not answered.
func (s *sessions) drop(ctx context.Context, drops ...sessionDrop) (left []sessionDrop) {
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	pipe := s.rdb.Pipeline()
	cmds := make([]*redis.Cmd, len(drops))
	for i, d := range drops {
		cmds[i] = pipe.Eval(ctx, dropSession, []string{sessionKey(d.key)}, d.socket)
	}
	_, _ = pipe.Exec(ctx) // each command has its own error
	for i, cmd := range cmds {
		if cmd.Err() != nil {
			s.m.redisErrorsTotal.with("session_release").Inc()
			left = append(left, drops[i])
		}
	}
	return left
}

// renew lengthens the lives of the sessions of list that are still to be held. A key that is missing, or names the socket under an
// older life, or a ghost, gets its name back; one that names another begins a dispute. A session without an answer stays. answered is
// false where none had one.
//
// It is one plain command per key where a script that compares first costs Redis three. The price: whoever has lost a session lengthens
// the life of another's key, once.
func (s *sessions) renew(ctx context.Context, list []*session) (answered bool) {
	list = s.renewable(list)
	if len(list) == 0 {
		return true
	}
	disputing := ctx // may take longer than the renewal
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	s.m.sessionLockRenewalAttempts.with().Add(len(list))
	pipe := s.rdb.Pipeline()
	gets := make([]*redis.StringCmd, len(list))
	for i, sess := range list {
		gets[i] = pipe.GetEx(ctx, sessionKey(sess.key), s.ttl())
	}
	_, _ = pipe.Exec(ctx)
	pipe = s.rdb.Pipeline()
	puts := map[*session]*redis.Cmd{}
	missed, last := 0, error(nil)
	miss := func(err error) {
		missed, last = missed+1, err
		s.m.redisErrorsTotal.with("session_renew").Inc()
		s.m.sessionLockRenewalFailure.with("redis").Inc()
	}
	for i, sess := range list {
		value, err := gets[i].Result()
		own := s.holderOf(sess)
		switch {
		case err != nil && !errors.Is(err, redis.Nil):
			miss(err)
		case value == own.String():
			s.m.sessionLockRenewalSuccess.with().Inc()
		case value == "" || parseHolder(value).socket == sess.id || s.isGhost(sess, value):
			puts[sess] = pipe.Eval(ctx, putSession, []string{sessionKey(sess.key)}, own.String(), value, s.ttl().Milliseconds())
		default:
			s.dispute(disputing, sess, value)
		}
	}
	if len(puts) > 0 {
		_, _ = pipe.Exec(ctx)
	}
	for sess, put := range puts {
		switch value, err := put.Text(); {
		case err != nil:
			miss(err)
		case value == "":
			s.m.sessionLockRenewalSuccess.with().Inc()
		default:
			s.dispute(disputing, sess, value)
		}
	}
	switch {
	case missed == len(list) && !s.away:
		s.away = true
		slog.Warn("sessions cannot be renewed, their sockets stay", "err", last)
	case missed == 0 && s.away:
		s.away = false
		slog.Info("sessions are renewed again")
		s.reclaim(false)
	}
	return missed < len(list)
}

// renewable leaves out the sessions that are to go, or have gone since list was made: their release may have been sent.
func (s *sessions) renewable(list []*session) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(list, func(sess *session) bool { return sess.state != held || sess.verdict != nil })
}

// isGhost says whether a dispute has shown that the value names no living socket.
func (s *sessions) isGhost(sess *session, value string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return sess.ghost == value
}

// dispute asks the pod that a session's key names whether it has that socket, and once more after a lease if it does not say. If it has, or
// says nothing still, this one's is closed. If there is no such socket, the value is a ghost: of a swap whose answer was lost, of data that
// Redis has lost, or of a pod that died. Then the name is put back, so that somebody lives.
func (s *sessions) dispute(ctx context.Context, sess *session, value string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if sess.asking {
		return
	}
	sess.asking = true
	s.disputes.Go(func() {
		h := parseHolder(value)
		q := &peerpb.CloseSessionRequest{Key: sess.key, Socket: h.socket}
		found, err := s.ask(h, q)
		// A pod that was killed a moment ago still has its lease.
		if err != nil && !errors.Is(err, errDead) && pause(ctx, s.cfg.Load().PodLease) {
			found, err = s.ask(h, q)
		}
		s.mu.Lock()
		sess.asking = false
		ghost := !found && (err == nil || errors.Is(err, errDead))
		if ghost {
			sess.ghost = value
			s.urgent = append(s.urgent, sess)
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
