package main

import (
	"context"
	"maps"
	"sync"
	"time"
)

// silence is what the newcomers of this pod know of the pods that hold sessions. One that was killed keeps its lease for
// seconds, and of 5,000 clients that come back each would wait a second for it and ask Redis eleven times, a third of what
// their coming costs. So the first to wait in vain spare the wait to those who come later. They themselves are not set
// free all at once: a burst of thousands did harm (measured).
type silence struct {
	mu      sync.Mutex
	pods    map[string]podSilence // by pod and life; those that tell nothing any more go when one is added
	waiting map[string]int        // newcomers that wait for a pod at the moment, by pod and life
}

type podSilence struct {
	answered time.Time // when it last let go of a session that somebody here waited for
	until    time.Time // it is taken for silent; after that it has to prove silent anew, if it has its lease still
}

func silenceKey(holder lockClaim) string { return holder.pod + "#" + holder.life }

// enter notes that a newcomer waits for holder's pod, until leave, and says how many do.
func (q *silence) enter(holder lockClaim) int {
	q.mu.Lock()
	defer q.mu.Unlock()
	key := silenceKey(holder)
	q.waiting[key]++
	return q.waiting[key]
}

func (q *silence) leave(holder lockClaim) {
	q.mu.Lock()
	defer q.mu.Unlock()
	key := silenceKey(holder)
	if q.waiting[key]--; q.waiting[key] == 0 {
		delete(q.waiting, key)
	}
}

// proven says whether holder's pod is taken for silent.
func (q *silence) proven(holder lockClaim) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return time.Now().Before(q.pods[silenceKey(holder)].until)
}

// answered notes that holder's pod has let go of a session: it is not silent.
func (q *silence) answered(holder lockClaim) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.setLocked(silenceKey(holder), podSilence{answered: time.Now()})
}

// waited notes that holder's pod has not answered a kill of that time. It is taken for silent for life, unless it has
// answered another since: then one of its sockets is slow, not the pod. A kill of no time was not sent, and proves nothing.
func (q *silence) waited(holder lockClaim, sent time.Time, life time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	p := q.pods[silenceKey(holder)]
	if p.answered.Before(sent) {
		p.until = time.Now().Add(life)
		q.setLocked(silenceKey(holder), p)
	}
}

// setLocked forgets, before it adds a pod, what is out of date: an answer counts for those who were waiting at that time,
// and nobody waits for longer than sessionFight.
func (q *silence) setLocked(key string, p podSilence) {
	if _, known := q.pods[key]; !known {
		now := time.Now()
		maps.DeleteFunc(q.pods, func(_ string, p podSilence) bool {
			return now.After(p.until) && now.Sub(p.answered) > sessionFight
		})
	}
	q.pods[key] = p
}

// letGo says whether rival, which a newcomer waited for, has given the lock up: holder has it now, nobody (or the newcomer)
// where that is empty. One that was to be ousted has not, as far as anyone can tell. A holder on this pod says nothing:
// it may have ousted the rival itself, and if it did not, it has noted the answer.
func (s *sessions) letGo(rival, holder lockClaim, oust string) bool {
	switch {
	case rival.pod == "" || holder.text == rival.text:
		return false
	case holder.text == "":
		return oust == ""
	default:
		return holder.pod != s.lease.podID()
	}
}

// suspect takes rival's pod for silent, after a kill of that time was answered by nothing for sessionSilence. Not this pod:
// it lives, so its silence means a slow socket or a subscription that comes back in a moment, and an early take-over
// would have two sockets of one session written to for no gain. Nor a stranger's, which has no name.
func (s *sessions) suspect(rival lockClaim, sent time.Time) {
	if rival.pod != "" && rival.pod != s.lease.podID() {
		s.silence.waited(rival, sent, s.cfg.Load().PodLease)
	}
}

// orphaned says whether holder's pod has lost its lease, or has another life by now. In doubt it has not:
// the silence of 1 s tells as well.
func (s *sessions) orphaned(ctx context.Context, holder lockClaim) bool {
	if holder.pod == "" || holder.pod == s.lease.podID() && holder.life == s.lease.life() {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	alive, err := s.lease.holds(ctx, holder.pod, holder.life)
	return err == nil && !alive
}
