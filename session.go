package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"

	peerpb "daisi-ws-service/proto"
)

var (
	errUnavailable = errors.New("redis is away")
	errDead        = errors.New("the pod that had the session is gone") // ask's own
)

const (
	sessionTimeout = 2 * time.Second // of one command, or one pipeline, about sessions
	sessionSilence = time.Second     // a pod may take so long to close a socket
	sessionGlance  = 50 * time.Millisecond

	// sessionSlots spreads renewals: the sessions of one slot are renewed together, and each slot once per REFRESH_INTERVAL. A
	// session's slot follows from its random id, so 10,000 that come at once are spread too.
	sessionSlots = 64
)

// sessions are the exclusive sessions of this pod's sockets. A session is a Redis key whose value names the socket that has it.
//
// A newcomer puts its own name in by SET … GET and has the socket closed that was named there, on whatever pod. So newcomers form a
// chain in the order in which they reached Redis: each closes the one before it, and the last one lives. Three rules keep the chain
// whole:
//
//  1. A newcomer is registered before its swap: whoever finds its name and asks for it is not told that there is no such socket.
//  2. A swap that was sent runs to its end even if its client leaves: else nobody would close the socket before it.
//  3. Whoever asks for a newcomer that still waits is answered when that one's wait has ended: only then is the socket before it closed.
type sessions struct {
	cfg   *settings
	rdb   redis.UniversalClient
	m     *Metrics
	lease *lease
	peers *peers
	seed  maphash.Seed
	wake  chan struct{} // capacity 1; tells run of drops and urgent; never closed

	away     bool           // owned by run: its last batch got no answer
	disputes sync.WaitGroup // owned by run

	mu     sync.Mutex                        // guards all below, and the sessions' fields that say so
	live   [sessionSlots]map[string]*session // by id, until they are released
	drops  []sessionDrop                     // releases to be sent, in order
	urgent []*session                        // to be renewed at once
	loss   time.Time                         // until then what Redis says may be from before it lost data
	owing  map[member]time.Time              // since when a pod owes an answer
}

// session is the exclusive right of one socket of this pod to be (company, agent, user), or an admin.
type session struct {
	key      string // "<C>:<A>:<U>" or "admin:<ID>"
	id       string // random; names the socket
	userType string
	set      *sessions

	life string // of this pod when the swap was sent

	// guarded by set.mu
	state   sessionState
	old     string          // the value that was swapped out; empty in the end
	verdict *sessionVerdict // the first one; such a session is renewed no more
	kill    func(code int, reason string)
	changed chan struct{} // closed when the state changes; nil while nobody waits for that
	asking  bool          // another's value was found, and that one's pod is being asked
	ghost   string        // a value found that names no living socket
}

type sessionState uint8

const (
	swapping sessionState = iota
	waiting               // the close of the socket before it is under way
	held                  // renewed
	released              // nothing more is written to its socket
	unheard               // released, and whether it had the session is not known
)

type sessionVerdict struct {
	code   int
	reason string
}

func newSessions(cfg *settings, rdb redis.UniversalClient, m *Metrics, l *lease, p *peers) *sessions {
	s := &sessions{cfg: cfg, rdb: rdb, m: m, lease: l, peers: p, seed: maphash.MakeSeed(), wake: make(chan struct{}, 1), owing: map[member]time.Time{}}
	for i := range s.live {
		s.live[i] = map[string]*session{}
	}
	return s
}

// holder is a session's value: which socket has it.
type holder struct {
	member
	socket string
}

func (h holder) String() string { return h.member.String() + "#" + h.socket }

// parseHolder is String's inverse; pod ids and lives have no '#'. What it does not understand names no pod.
func parseHolder(value string) (h holder) {
	if parts := strings.Split(value, "#"); len(parts) == 3 {
		h = holder{member{parts[0], parts[1]}, parts[2]}
	}
	return h
}

// holderOf is what names sess under this pod's present life.
func (s *sessions) holderOf(sess *session) holder {
	return holder{member{s.lease.pod, s.lease.life()}, sess.id}
}

func sessionKey(key string) string { return "session:" + key }

// once is a command that go-redis does not send again. A SET … GET whose answer was lost would then be answered with its own value,
// and nobody would know of the socket that it replaced.
type once struct{ *redis.StringCmd }

func (once) NoRetry() bool { return true }

// swap takes the session of key. The socket that had it is still open until await, which must follow, has returned. Its error is
// errUnavailable. A swap without an answer may yet be executed. Its value then stays: it names a socket that there is none of, and
// whoever finds it asks all pods who had the session before.
func (s *sessions) swap(key, userType string) (*session, error) {
	s.m.sessionLockAttemptsTotal.with(userType, "new").Inc()
	if !s.lease.available() {
		s.m.sessionLockFailureTotal.with("unavailable").Inc()
		return nil, fmt.Errorf("open session %s: %w", key, errUnavailable)
	}
	sess := &session{key: key, id: rand.Text(), userType: userType, set: s, life: s.lease.life()}
	s.mu.Lock()
	s.slotLocked(sess.id)[sess.id] = sess
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), sessionTimeout)
	defer cancel()
	cmd := once{redis.NewStringCmd(ctx, "set", sessionKey(key), s.holderOf(sess).String(), "px", s.ttl().Milliseconds(), "get")}
	s.rdb.Process(ctx, cmd)
	old, err := cmd.Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		s.m.redisErrorsTotal.with("session_swap").Inc()
		s.m.sessionLockFailureTotal.with("unavailable").Inc()
		sess.leave(unheard)
		return nil, fmt.Errorf("open session %s: %w: %w", key, errUnavailable, err)
	}
	if old != "" {
		s.m.sessionConflictsTotal.with(userType).Inc()
	}
	s.mu.Lock()
	sess.old = old
	sess.setLocked(waiting)
	s.mu.Unlock()
	return sess, nil
}

// ttl is the life of a key without renewal; read each time, since SIGHUP may change it.
func (s *sessions) ttl() time.Duration { return s.cfg.Load().SessionTTL }

// contested says whether another socket has, or had, the session: await may take a while then.
func (sess *session) contested() bool { return sess.old != "" }

// await returns when nothing more is written to the socket that had the session, or that socket's pod is dead, can't be reached or
// has been silent for 1 s. A newcomer that was itself replaced meanwhile has its socket closed by bind, with 4402: a browser can't
// read an HTTP status.
func (sess *session) await() {
	s := sess.set
	sure := sess.old == "" || s.closeBefore(sess)
	s.mu.Lock()
	sess.old = ""
	replaced := sess.verdict != nil
	if !replaced {
		sess.setLocked(held)
		if !sure {
			s.urgent = append(s.urgent, sess)
		}
	}
	s.mu.Unlock()
	if replaced {
		s.m.sessionLockFailureTotal.with("replaced").Inc()
		sess.release()
		return
	}
	s.m.sessionLockSuccessTotal.with().Inc()
	poke(s.wake)
	// 1. The swap was sent with the old life. 2. The pod takes a new one, all held sessions are moved to it.
	// 3. This one is held only now: it missed the move.
	if s.lease.life() != sess.life {
		s.reclaim(false)
	}
}

// closeBefore closes the socket whose value sess has swapped out. It says false where there was no such socket: then others were to be
// closed, and the key may hide a later newcomer.
func (s *sessions) closeBefore(sess *session) (sure bool) {
	h := parseHolder(sess.old)
	q := &peerpb.CloseSessionRequest{Key: sess.key, Socket: h.socket, Code: 4402, Reason: "session-replaced"}
	var found bool
	var err error
	if h.socket != sess.id {
		found, err = s.ask(h, q)
	}
	switch {
	case err != nil:
		s.m.sessionLockAttemptsTotal.with(sess.userType, "takeover").Inc()
		slog.Info("session taken over", "session", sess.key, "peer", h.pod, "err", err)
	case !found:
		q.Socket, q.Others = sess.id, true
		s.askEveryone(q)
		return false
	}
	return true
}

// ask sends q to the pod of h, and says whether it has, or had, that socket. The error is errDead where that pod's life has ended.
func (s *sessions) ask(h holder, q *peerpb.CloseSessionRequest) (found bool, err error) {
	o := *s.lease.self.Load()
	if h.pod == s.lease.pod {
		ctx, cancel := context.WithTimeout(context.Background(), sessionSilence)
		defer cancel()
		found, err = s.closeHere(ctx, q)
	} else {
		var lives bool
		if o, lives = s.lease.locate(h.member); !lives {
			return false, errDead
		}
		found, err = s.call(o, q)
	}
	if err == nil && !found && o.life != h.life {
		return false, errDead
	}
	return found, err
}

// askEveryone sends q to all live pods, this one too, and says whether one of them had such a socket.
func (s *sessions) askEveryone(q *peerpb.CloseSessionRequest) bool {
	if err := s.lease.refresh(context.Background()); err != nil {
		slog.Debug("live pods not read anew", "err", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), sessionSilence)
	defer cancel()
	var wg sync.WaitGroup
	var any atomic.Bool
	note := func(found bool, err error) {
		if found {
			any.Store(true)
		}
		if err != nil {
			slog.Warn("a pod does not say whether it has a socket of a session", "session", q.GetKey(), "err", err)
		}
	}
	for _, o := range s.lease.peers() {
		wg.Go(func() { note(s.call(o, q)) })
	}
	note(s.closeHere(ctx, q))
	wg.Wait()
	return any.Load()
}

// call sends q to another pod. Of a silent pod thousands wait for the same second, not each for its own: whoever comes while it owes an
// answer waits until the first has waited for 1 s, and later ones for a moment only.
func (s *sessions) call(o owner, q *peerpb.CloseSessionRequest) (found bool, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), max(sessionGlance, time.Until(s.patience(o.member))))
	defer cancel()
	answer, err := s.peers.closeSession(ctx, o, q)
	if err == nil || ctx.Err() == nil { // a refusal is no silence
		s.mu.Lock()
		delete(s.owing, o.member)
		s.mu.Unlock()
	}
	if err != nil {
		return false, fmt.Errorf("ask pod %s at %s for the socket %s: %w", o.pod, o.addr, q.GetSocket(), err)
	}
	return answer.GetFound(), nil
}

// patience is until when an answer of m is waited for. A silence that is older than a lease is forgotten.
func (s *sessions) patience(m member) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, longest := time.Now(), sessionSilence+s.cfg.Load().PodLease
	maps.DeleteFunc(s.owing, func(_ member, since time.Time) bool { return now.Sub(since) > longest })
	if _, ok := s.owing[m]; !ok {
		s.owing[m] = now
	}
	return s.owing[m].Add(sessionSilence)
}

// closeHere closes the socket that q names, or only looks for it where q has no code. It returns when nothing more is written to
// that socket; of a newcomer that waits, when its wait has ended. found says that the socket was here and that its swap, and so all
// before it, came to an end.
func (s *sessions) closeHere(ctx context.Context, q *peerpb.CloseSessionRequest) (found bool, err error) {
	if q.GetOthers() {
		return s.closeOthers(ctx, q)
	}
	s.mu.Lock()
	sess := s.slotLocked(q.GetSocket())[q.GetSocket()]
	s.mu.Unlock()
	if sess == nil || sess.key != q.GetKey() {
		return false, nil
	}
	if q.GetCode() == 0 {
		state, err := sess.wait(ctx, held)
		return state == held, err
	}
	sess.close(int(q.GetCode()), q.GetReason())
	state, err := sess.wait(ctx, released)
	return state == released, err
}

// closeOthers closes the sockets of q's key but for three: q's own, the one that Redis names, and the one that waits for q's. It reads
// the key when it is known of all swaps under way whether they were executed: so whom Redis does not name came before q's, or was
// replaced since.
func (s *sessions) closeOthers(ctx context.Context, q *peerpb.CloseSessionRequest) (found bool, err error) {
	others := s.list(func(sess *session) bool { return sess.key == q.GetKey() && sess.id != q.GetSocket() })
	if len(others) == 0 {
		return false, nil
	}
	for _, sess := range others {
		if _, err := sess.wait(ctx, waiting); err != nil {
			return false, err
		}
	}
	value, err := s.read(ctx, q.GetKey())
	if err != nil || value == "" {
		return false, err
	}
	others = slices.DeleteFunc(others, func(sess *session) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return sess.id == parseHolder(value).socket || parseHolder(sess.old).socket == q.GetSocket()
	})
	for _, sess := range others {
		sess.close(int(q.GetCode()), q.GetReason())
	}
	for _, sess := range others {
		state, err := sess.wait(ctx, released)
		if err != nil {
			return found, err
		}
		found = found || state == released
	}
	return found, nil
}

// wait returns the session's state once that is at least want.
func (sess *session) wait(ctx context.Context, want sessionState) (sessionState, error) {
	for {
		sess.set.mu.Lock()
		state := sess.state
		if sess.changed == nil && state < want {
			sess.changed = make(chan struct{})
		}
		changed := sess.changed
		sess.set.mu.Unlock()
		if state >= want {
			return state, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return state, ctx.Err()
		}
	}
}

// revoke has the live session of key closed with 4403, wherever it lives. found is false where there is no such session; the error is
// errUnavailable where Redis or the holder stays silent.
func (s *sessions) revoke(ctx context.Context, key string) (found bool, err error) {
	value, err := s.read(ctx, key)
	if err != nil || value == "" {
		return false, err
	}
	h := parseHolder(value)
	q := &peerpb.CloseSessionRequest{Key: key, Socket: h.socket, Code: 4403, Reason: "revoked"}
	found, err = s.ask(h, q)
	switch {
	case errors.Is(err, errDead):
		s.drop(ctx, sessionDrop{key: key, socket: h.socket})
		return true, nil
	case err != nil:
		return true, fmt.Errorf("%w: pod %s, which has the session %s, does not answer: %w", errUnavailable, h.pod, key, err)
	case !found:
		q.Others = true
		found = s.askEveryone(q)
	}
	return found, nil
}

// read returns a session's value, "" where there is none. Its errors are errUnavailable.
func (s *sessions) read(ctx context.Context, key string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	value, err := s.rdb.Get(ctx, sessionKey(key)).Result()
	if err != nil && !errors.Is(err, redis.Nil) {
		s.m.redisErrorsTotal.with("session_read").Inc()
		return "", fmt.Errorf("read session %s: %w: %w", key, errUnavailable, err)
	}
	return value, nil
}

// bind tells whom to close when the session is lost; if that happened before, kill is called at once. Call it before anything is
// written to the socket: a session that is lost before bind is released at once. kill must not block, and is called once at the most.
func (sess *session) bind(kill func(code int, reason string)) {
	sess.set.mu.Lock()
	sess.kill = kill
	verdict := sess.verdict
	sess.set.mu.Unlock()
	if verdict != nil {
		kill(verdict.code, verdict.reason)
	}
}

// close passes a verdict on the session; the first one counts. A session that waits does so until await has ended, a held one lasts
// until its socket has called release.
func (sess *session) close(code int, reason string) {
	sess.set.mu.Lock()
	first := sess.verdict == nil && sess.state <= held
	if first {
		sess.verdict = &sessionVerdict{code, reason}
	}
	state, kill := sess.state, sess.kill
	sess.set.mu.Unlock()
	switch { // not under the lock: kill may call release
	case !first || state < held:
	case kill == nil:
		sess.release()
	default:
		kill(code, reason)
	}
}

// release queues the release of the key, behind any renewal under way, unless another socket has taken it. It does not block; the first
// call counts.
func (sess *session) release() {
	s := sess.set
	if !sess.leave(released) {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// A name that was put back meanwhile stays: whoever swaps it out asks for the one that has taken the session.
	if sess.verdict == nil || sess.verdict.code == closeForbidden {
		s.drops = append(s.drops, sessionDrop{sess.key, sess.id, time.Now().Add(s.ttl())})
		poke(s.wake)
	}
}

// leave ends the session, unless it has ended.
func (sess *session) leave(end sessionState) bool {
	s := sess.set
	s.mu.Lock()
	defer s.mu.Unlock()
	if sess.state >= released {
		return false
	}
	delete(s.slotLocked(sess.id), sess.id)
	sess.setLocked(end)
	return true
}

func (sess *session) setLocked(state sessionState) {
	sess.state = state
	if sess.changed != nil {
		close(sess.changed)
		sess.changed = nil
	}
}

// slotLocked is where the session of that id lives.
func (s *sessions) slotLocked(id string) map[string]*session {
	return s.live[maphash.String(s.seed, id)%sessionSlots]
}

// list lists the sessions for which want says so, slot by slot.
func (s *sessions) list(want func(*session) bool) (list []*session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, slot := range s.live {
		for _, sess := range slot {
			if want(sess) {
				list = append(list, sess)
			}
		}
	}
	return list
}
