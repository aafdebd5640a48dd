package main

import "slices"

// An event's way: the pod that pulled it queues it for its own sockets, looks its batch up in two round trips, pushes it to
// the other owners, and gives the verdict when every target has settled.

// stage is how far a pod is with an event that it has in hand.
type stage uint8

const (
	away    stage = iota
	pulled        // queued for the sockets here; to be looked up
	found         // Redis has answered: the targets are known
	givenUp       // its notes are in Redis; to be terminated
)

// target is another pod, for one event.
type target uint8

const (
	none target = iota
	sent
	there // settled as soon as no ring there holds the event: it was written, was dropped, or its socket is gone
	failed
)

// route adds what pod p may do next with events.
func (w world) route(x *steps[state], p podID) {
	s := &x.from
	pod := &s.pods[p]
	if batch := s.pulled(p); pod.batch == 0 && batch != 0 {
		t := &x.step("%v looks up its batch: Redis answers with the members", p).pods[p]
		t.batch, t.answer = batch, s.members()
		if w.mutant == leasesBeforeMembers {
			t.answer = s.lease
		}
	} else if pod.batch != 0 {
		t := x.step("%v reads the members' leases: the owners are known", p)
		members, leases := pod.answer, s.lease
		if w.mutant == leasesBeforeMembers {
			members, leases = s.members(), pod.answer
		}
		if w.mutant == lookUpBeforeArrival {
			t.pods[p].batch = batch
		}
		t.address(p, t.owners(p, members, leases), found)
	}
	for e := seq(2); e <= s.stored; e++ {
		ev := &s.events[e]
		if ev.status == waiting && e <= s.delivered+1 {
			t := x.step("%v pulls event %d and queues it for its sockets", p, e)
			t.delivered = max(t.delivered, e)
			t.events[e] = event{status: inHand, pod: p, stage: pulled}
			t.push(p, e)
		}
		if ev.stage != away && ev.pod == p {
			w.settle(x, e)
		}
		if pod.late.has(e) {
			t := x.step("%v gets event %d late", p, e)
			t.pods[p].late &^= only(e)
			t.push(p, e)
		}
	}
}

// settle adds what the pod that has event e in hand may do next with it.
func (w world) settle(x *steps[state], e seq) {
	s := &x.from
	ev := &s.events[e]
	for q := range w.pods {
		switch {
		case ev.target[q] != sent:
		case s.pods[q].up && s.pods[q].life == ev.life[q]:
			t := x.step("%v gets event %d from %v", q, e, ev.pod)
			t.events[e].target[q] = there
			t.push(q, e)
		default:
			x.step("%v cannot push event %d to %v, which is down or has another life", ev.pod, e, q).events[e].target[q] = failed
		}
	}
	verdict := ev.stage == found && !s.open(e)
	failure := slices.Contains(ev.target[:], failed)
	if verdict && !failure {
		x.step("%v settles event %d: acked, or terminated where nobody is left", ev.pod, e).done(e)
	}
	if verdict && failure {
		x.step("%v NAKs event %d", ev.pod, e).release(e)
		t := x.step("%v gives event %d up and leaves its notes", ev.pod, e)
		t.leaveNotes(e)
		t.events[e].stage = givenUp
	}
	if ev.stage == givenUp || verdict && failure && w.mutant == terminatedBeforeNote {
		x.step("%v terminates event %d", ev.pod, e).done(e)
	}
}

// pulled is what pod p has to look up.
func (s *state) pulled(p podID) (batch set) {
	for e := range s.events {
		if s.events[e].stage == pulled && s.events[e].pod == p {
			batch |= only(seq(e))
		}
	}
	return batch
}

// members is the newest life of each pod among the members of the route, or 0.
func (s *state) members() (lives [maxPods]uint8) {
	for i := range s.sockets {
		k := &s.sockets[i]
		lives[k.pod] = max(lives[k.pod], k.claim)
	}
	return lives
}

// owners leaves the members that live, apart from pod p, and removes the others from Redis. A lease that the last renewal
// read lets a member live, and lets none die.
func (s *state) owners(p podID, members, leases [maxPods]uint8) [maxPods]uint8 {
	for q, life := range members {
		if life == leases[q] || life == s.pods[p].known[q] {
			continue
		}
		members[q] = 0
		for i := range s.sockets {
			if k := &s.sockets[i]; k.pod == podID(q) && k.claim == life {
				k.claim = 0
			}
		}
	}
	members[p] = 0
	return members
}

// address ends the look-up of pod p. Its batch goes to owners that have not had it; other pods' failures count no more.
func (s *state) address(p podID, owners [maxPods]uint8, next stage) {
	for e := range s.events {
		ev := &s.events[e]
		if !s.pods[p].batch.has(seq(e)) {
			continue
		}
		ev.stage = next
		for q, life := range owners {
			isNew := ev.target[q] == none || ev.target[q] == failed || ev.life[q] != life
			if life != 0 && isNew {
				ev.target[q], ev.life[q] = sent, life
			} else if ev.target[q] == failed {
				ev.target[q] = none
			}
		}
	}
	s.pods[p].batch, s.pods[p].answer = 0, [maxPods]uint8{}
}

// open says whether a target of the event has not settled.
func (s *state) open(e seq) bool {
	ev := &s.events[e]
	for q, t := range ev.target {
		if t == sent || (t == there || podID(q) == ev.pod) && s.holds(podID(q), e) {
			return true
		}
	}
	return false
}

// holds says whether the event waits for a socket of pod p.
func (s *state) holds(p podID, e seq) bool {
	for i := range s.sockets {
		if k := &s.sockets[i]; k.pod == p && (k.ring | k.behind).has(e) {
			return true
		}
	}
	return false
}

func (s *state) done(e seq) { s.events[e] = event{status: settled} }

// release gives the event back to JetStream. What is on its way to another pod may still arrive.
func (s *state) release(e seq) {
	ev := &s.events[e]
	for q, t := range ev.target {
		if t == sent {
			s.pods[q].late |= only(e)
		}
	}
	s.pods[ev.pod].batch &^= only(e)
	*ev = event{status: waiting}
}

// leaveNotes leaves a note in Redis for each owner that has not settled the event. A pod reads those for its present life.
func (s *state) leaveNotes(e seq) {
	ev := &s.events[e]
	for q, t := range ev.target {
		if t == failed && ev.life[q] == s.pods[q].life {
			s.note[q] = true
		}
	}
}
