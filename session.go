package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/maphash"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

var (
	errConflict    = errors.New("session is fought over by others")
	errUnavailable = errors.New("redis is away")

	errReplaced = errors.New("session was taken by a later newcomer") // acquire's own
)

const (
	sessionFight      = 5 * time.Second // a newcomer gives up after it
	sessionSilence    = time.Second     // a holder that was sent a kill and still has its lock then loses it by force
	sessionFirstPause = 2 * time.Millisecond
	// Most holders let go within 4 ms. Those of a dead pod never do: of 5,000 newcomers each asked twenty times before the
	// second was over, which was a third of what their coming cost.
	sessionLongestPause = 128 * time.Millisecond
	// While more than sessionEager wait for the same pod, each of them asks after sessionCrowdFirst, when a pod that lives has
	// let go, and then every sessionCrowdPause: the 1,500 that came to one pod within the first second asked 17,000 times,
	// and the events of others waited for a processor.
	sessionEager      = 64
	sessionCrowdFirst = 8 * time.Millisecond
	sessionCrowdPause = 250 * time.Millisecond

	// sessionSlots spreads renewals: the sessions of one slot are renewed together, and each slot once per
	// REFRESH_INTERVAL. A session's slot follows from its random id, so the spread stays even however they come
	// (10,000 at once after a restart of the pod next door) and whatever SIGHUP makes of the interval.
	sessionSlots = 64
	sessionBatch = 128 // commands in one pipeline at most

	killPrefix = "session_kill:"
)

// podLease is what sessions need to know of leases.
type podLease interface {
	podID() string
	life() string
	available() bool
	holds(ctx context.Context, pod, life string) (bool, error)
}

// sessions are the exclusive sessions of this pod's sockets. Locks and kill channel live in Redis, so that two tabs
// on one pod follow the same rule as on two. One goroutine, work, sends everything that concerns live sessions' locks.
type sessions struct {
	lockStore
	lease   podLease
	silence silence
	seed    maphash.Seed
	wake    chan struct{} // capacity 1; tells work of drops or sweep; never closed

	away bool // owned by work: its last batch got no answer

	mu    sync.Mutex
	live  [sessionSlots]map[string]*session // by id: pending, held and killed ones, until they are released
	drops []lockDrop                        // in order
	sweep bool                              // all locks are to be renewed now
}

// session is the exclusive right of one socket of this pod to be (company, agent, user), or an admin.
type session struct {
	key string // "<C>:<A>:<U>" or "admin:<ID>"
	id  string // names the socket: newSocketID
	set *sessions

	turn int64 // owned by acquire until the session is held, constant from then on

	// guarded by set.mu
	held     bool // the lock was taken: renew it
	released bool
	kill     func(code int, reason string) // nil before bind
	verdict  *killVerdict                  // the first one; such a session is renewed no more
}

type killVerdict struct {
	code   int
	reason string
}

// killMessage asks the pod of a socket to close it.
type killMessage struct {
	Pod    string `json:"pod,omitempty"` // as the lock names it; if it has no such socket, it releases the lock
	Socket string `json:"socket"`
	Code   int    `json:"code"`
	Reason string `json:"reason"`
}

func newSessions(cfg *settings, rdb redis.UniversalClient, m *Metrics, lease podLease) *sessions {
	s := &sessions{
		lockStore: lockStore{rdb, cfg, m, make(chan struct{}, claimsAtOnce)},
		lease:     lease,
		silence:   silence{pods: map[string]podSilence{}, waiting: map[string]int{}},
		seed:      maphash.MakeSeed(),
		wake:      make(chan struct{}, 1),
	}
	for i := range s.live {
		s.live[i] = map[string]*session{}
	}
	return s
}

// run serves the kill channel and renews the locks until ctx ends; it returns after the releases that were queued
// by then have been sent (for 2 s at the most).
func (s *sessions) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.listen(ctx) })
	s.work(ctx)
	wg.Wait()
}

// acquire takes the lock of key, by kill and take-over where it is held (docs/protocol.md). It returns errConflict
// when it is still fought over after 5 s, errUnavailable when Redis does not answer, ctx's error when the client is
// gone. came is when the newcomer did. One that was itself replaced while it waited gets a session all the same: bind closes its socket with
// 4402 at once, which tells a browser not to come again, as no HTTP status can.
func (s *sessions) acquire(ctx context.Context, key, userType string, came time.Time) (*session, error) {
	s.m.sessionLockAttemptsTotal.with(userType, "new").Inc()
	if !s.lease.available() {
		s.m.sessionLockFailureTotal.with("unavailable").Inc()
		return nil, fmt.Errorf("open session %s: %w", key, errUnavailable)
	}
	life := s.lease.life()
	sess := s.register(key, came)
	err := s.take(ctx, sess, userType)
	if err == nil && !sess.hold() {
		err = errReplaced
	}
	if err != nil {
		sess.abandon()
		s.m.sessionLockFailureTotal.with(failureReason(err)).Inc()
		if err == errReplaced {
			sess.close(4402, "session-replaced")
			return sess, nil
		}
		return nil, fmt.Errorf("open session %s: %w", key, err)
	}
	s.m.sessionLockSuccessTotal.with().Inc()
	// 1. This claim was sent with the old life. 2. The pod takes a new one, all held locks are moved to it.
	// 3. This one is held only now: it missed the move.
	if s.lease.life() != life {
		s.reclaim()
	}
	return sess, nil
}

// failureReason is the label of the metric.
func failureReason(err error) string {
	switch {
	case errors.Is(err, errConflict):
		return "conflict"
	case errors.Is(err, errReplaced):
		return "replaced"
	case errors.Is(err, errUnavailable):
		return "unavailable"
	default:
		return "canceled"
	}
}

// register makes the pending session known before its first command, so that a kill finds it from the moment on
// that Redis names it.
func (s *sessions) register(key string, came time.Time) *session {
	sess := &session{key: key, id: newSocketID(came), set: s}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.slotLocked(sess.id)[sess.id] = sess
	return sess
}

// slot is where the session of that id lives. The caller holds mu.
func (s *sessions) slotLocked(id string) map[string]*session {
	return s.live[maphash.String(s.seed, id)%sessionSlots]
}

// take gets the lock for sess, whatever that needs, or says why not.
func (s *sessions) take(ctx context.Context, sess *session, userType string) error {
	var (
		start = time.Now()
		rival lockClaim     // the holder that was sent a kill last
		sent  time.Time     // the kill; zero where Redis did not take it
		due   time.Time     // when it has been silent for too long
		oust  string        // the holder to dispossess with the next claim
		next  time.Duration // pause before the lock is asked for again
	)
	for {
		asked := time.Now()
		value, err := s.claim(ctx, sess, oust)
		if err != nil {
			return err
		}
		holder, heir := parseLock(value)
		if s.letGo(rival, holder, oust) {
			s.silence.answered(rival)
		}
		switch {
		case value == "":
			return nil
		case sess.replacedBy(holder, heir):
			return errReplaced
		case time.Since(start) >= sessionFight:
			return errConflict
		case holder.text != rival.text:
			if rival.text == "" {
				s.m.sessionConflictsTotal.with(userType).Inc()
			}
			rival, sent, oust, next = holder, time.Now(), "", sessionFirstPause
			if !s.sendKill(ctx, sess.key, killMessage{holder.pod, holder.socket, 4402, "session-replaced"}) {
				sent = time.Time{}
			}
			due = time.Now().Add(sessionSilence)
			if s.silence.proven(holder) || s.orphaned(ctx, holder) {
				oust = rival.text
			}
		case !time.Now().Before(due):
			oust = rival.text
			if !asked.Before(due) { // else Redis may have stood still, and the release with it
				s.suspect(rival, sent)
			}
		}
		if oust != "" {
			slog.Info("session taken over", "session", sess.key, "peer", holder.pod)
			s.m.sessionLockAttemptsTotal.with(userType, "takeover").Inc()
			continue
		}
		if s.silence.enter(rival) > sessionEager {
			if next <= sessionCrowdFirst {
				next = sessionCrowdFirst
			} else {
				next = sessionCrowdPause
			}
		}
		waited := pause(ctx, min(next, time.Until(due), time.Until(start.Add(sessionFight))))
		s.silence.leave(rival)
		if !waited {
			return ctx.Err()
		}
		next = min(2*next, sessionLongestPause)
	}
}

// claim sends sess's claim and notes the turn that it got on its arrival. "" means that the lock is its own now.
func (s *sessions) claim(ctx context.Context, sess *session, oust string) (value string, err error) {
	turn, value, err := s.lockStore.claim(ctx, sess.key, s.claimOf(sess), oust)
	switch {
	case err == nil:
		sess.turn = turn
		return value, nil
	case ctx.Err() != nil:
		return "", ctx.Err()
	default:
		return "", fmt.Errorf("%w: %w", errUnavailable, err)
	}
}

// claimOf is what sess claims under this pod's life of now.
func (s *sessions) claimOf(sess *session) lockClaim {
	return lockClaim{pod: s.lease.podID(), life: s.lease.life(), socket: sess.id, turn: sess.turn}
}

// sendKill asks whatever pod has the socket to close it, and says whether Redis took the message. A lost one is no loss:
// silence is dealt with by the sender.
func (s *sessions) sendKill(ctx context.Context, key string, msg killMessage) bool {
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	text, err := json.Marshal(msg)
	if err == nil {
		err = s.rdb.Publish(ctx, killPrefix+key, text).Err()
	}
	if err != nil {
		s.m.redisErrorsTotal.with("session_kill").Inc()
	}
	return err == nil
}

// later says whether a newcomer to key's session who came after that moment has it, or is about to, wherever he is. Only where the
// clocks of two pods differ by more than they should is that not so, or is missed; none is believed that is ahead of this one.
func (s *sessions) later(ctx context.Context, key string, came time.Time) (bool, error) {
	holder, heir, err := s.read(ctx, key)
	if err != nil {
		return false, err
	}
	now := time.Now()
	for _, c := range []lockClaim{holder, heir} {
		if at := c.came(); at.After(came) && !at.After(now) {
			return true, nil
		}
	}
	return false, nil
}

// revoke has the live session of key closed with 4403, wherever it lives, and returns when its lock is free or another's.
// found is false where there is no such session; the error is errUnavailable where Redis or the holder stays silent.
func (s *sessions) revoke(ctx context.Context, key string) (found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, sessionFight)
	defer cancel()
	var first lockClaim
	var sent time.Time // the kill; again after a while, since its pod may have heard nothing at that moment
	for next := sessionFirstPause; ; next = min(2*next, sessionLongestPause) {
		holder, _, err := s.read(ctx, key)
		if err != nil {
			return found, err
		}
		switch {
		case holder.text == "":
			return found, nil
		case !found:
			found, first = true, holder
		case holder.socket != first.socket:
			return true, nil
		}
		if time.Since(sent) >= sessionSilence {
			sent = time.Now()
			s.sendKill(ctx, key, killMessage{holder.pod, holder.socket, 4403, "revoked"})
		}
		if s.orphaned(ctx, holder) {
			s.drop(ctx, []lockDrop{{key: key, socket: holder.socket}})
		}
		if !pause(ctx, next) {
			return true, fmt.Errorf("%w: pod %s, which has the session %s, does not answer", errUnavailable, first.pod, key)
		}
	}
}

// replacedBy says whether a later newcomer than s holds the lock or waits for it, or s was killed while it waited.
func (s *session) replacedBy(claims ...lockClaim) bool {
	for _, c := range claims {
		if c.socket != s.id && c.turn >= s.turn {
			return true
		}
	}
	s.set.mu.Lock()
	defer s.set.mu.Unlock()
	return s.verdict != nil
}

// hold makes a pending session a held one, which is renewed. It says false when s was killed before.
func (s *session) hold() bool {
	s.set.mu.Lock()
	defer s.set.mu.Unlock()
	s.held = s.verdict == nil
	return s.held
}

// bind tells whom to close when the session is lost or killed; if that happened before, kill is called at once.
// Call it before anything is written to the socket: a session that is killed before bind is released at once.
// kill must not block, and is called once at the most.
func (s *session) bind(kill func(code int, reason string)) {
	s.set.mu.Lock()
	s.kill = kill
	verdict := s.verdict
	s.set.mu.Unlock()
	if verdict != nil {
		kill(verdict.code, verdict.reason)
	}
}

// close passes a verdict on the session; the first one counts. The lock stays until release, since the socket may
// have something to write until then; where there is no socket yet, it is released here.
func (s *session) close(code int, reason string) {
	s.set.mu.Lock()
	if s.verdict != nil {
		s.set.mu.Unlock()
		return
	}
	s.verdict = &killVerdict{code, reason}
	kill := s.kill
	s.set.mu.Unlock()
	if kill == nil {
		s.release()
		return
	}
	kill(code, reason) // not under the lock: it may call release
}

// release queues the release of the lock, behind any renewal under way. It does not block; the first call counts.
func (s *session) release() {
	s.set.mu.Lock()
	released := s.released
	s.set.mu.Unlock()
	if !released {
		s.abandon()
	}
}

// abandon queues a release even if there was one: after a claim whose outcome is not known, or that was sent while
// a kill released the session.
func (s *session) abandon() {
	s.set.mu.Lock()
	s.released = true
	delete(s.set.slotLocked(s.id), s.id)
	s.set.mu.Unlock()
	s.set.queueDrop(s.key, s.id)
}

// all lists the held sessions, slot by slot.
func (s *sessions) all() []*session {
	var list []*session
	for i := range sessionSlots {
		list = append(list, s.inSlot(i)...)
	}
	return list
}

// inSlot lists the held sessions of one slot. A pending one is not: its turn is not known yet.
func (s *sessions) inSlot(i int) []*session {
	s.mu.Lock()
	defer s.mu.Unlock()
	list := make([]*session, 0, len(s.live[i]))
	for _, sess := range s.live[i] {
		if sess.held {
			list = append(list, sess)
		}
	}
	return list
}

// listen keeps the subscription to the kill channel until ctx ends. While it is broken, kills for this pod's sockets
// go unheard, and the newcomers take over by force after 1 s.
func (s *sessions) listen(ctx context.Context) {
	broken := false
	for ctx.Err() == nil {
		err := s.hearKills(ctx, func() {
			if broken {
				slog.Info("session kill channel is heard again")
			}
			broken = false
		})
		if ctx.Err() != nil {
			return
		}
		s.m.redisErrorsTotal.with("session_subscribe").Inc()
		if !broken {
			slog.Warn("session kill channel is broken", "err", err)
		}
		broken = true
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// hearKills subscribes and serves kills until the subscription breaks; subscribed is called when it stands.
//
// One pattern for all sessions: every pod hears every kill, but a kill is rare (a few hundred a second if all clients
// reconnect at once) and one that is for another pod costs a JSON message. A channel per session would cost a round trip
// before each lock, and 15,000 subscriptions to make again whenever the connection breaks. In a cluster, classic
// PUBLISH reaches the subscribers of every node.
//
// Receive by hand: the library's channel goes on silently over a broken connection, so kills sent meanwhile would
// be lost without anyone knowing.
func (s *sessions) hearKills(ctx context.Context, subscribed func()) error {
	ps := s.rdb.PSubscribe(ctx, killPrefix+"*")
	defer ps.Close()
	defer context.AfterFunc(ctx, func() { ps.Close() })()
	stands, asked := false, false
	for {
		msg, err := ps.ReceiveTimeout(ctx, time.Second)
		var timeout net.Error
		switch {
		case err == nil:
			asked = false
		case errors.As(err, &timeout) && timeout.Timeout() && stands && !asked:
			asked = true
			if err := ps.Ping(ctx); err != nil {
				return fmt.Errorf("ping: %w", err)
			}
			continue
		default:
			return fmt.Errorf("receive: %w", err)
		}
		switch msg := msg.(type) {
		case *redis.Message:
			s.heard(strings.TrimPrefix(msg.Channel, killPrefix), msg.Payload)
		case *redis.Subscription:
			if stands {
				return errors.New("the library has reconnected by itself")
			}
			stands = true
			subscribed()
		}
	}
}

// heard closes the socket that a kill is meant for. Where the lock names this pod and there is no such socket, the
// lock is a remnant (of a claim that arrived after its release, or of this pod's last life): it is released.
func (s *sessions) heard(key, text string) {
	var msg killMessage
	if err := json.Unmarshal([]byte(text), &msg); err != nil || msg.Socket == "" || msg.Code == 0 {
		slog.Debug("session kill is not understood", "session", key, "err", err)
		return
	}
	s.mu.Lock()
	sess := s.slotLocked(msg.Socket)[msg.Socket]
	s.mu.Unlock()
	switch {
	case sess != nil && sess.key == key:
		sess.close(msg.Code, msg.Reason)
	case sess == nil && msg.Pod == s.lease.podID():
		s.queueDrop(key, msg.Socket)
	}
}
