package main

// Leases and positions: a pod polls the floor, renews its lease, acts on its notes, and only then has a new position.

// renewal is how far a pod is with that.
type renewal uint8

const (
	idle renewal = iota
	polled
	renewed
)

// renew adds what pod p may do next about its lease and its position.
func (w world) renew(x *steps[state], p podID) {
	s := &x.from
	pod := &s.pods[p]
	switch {
	case pod.renewal == idle && s.floor() == pod.position && !s.note[p] && s.leaseHeld(p) && pod.known == s.others(p):
		// It would find nothing new.
	case pod.renewal == idle:
		t := &x.step("%v polls the floor: %d", p, s.floor()).pods[p]
		t.renewal, t.floor = polled, s.floor()
		if w.mutant == positionWithoutRenewal {
			t.position = t.floor
		}
	case pod.renewal == polled && s.leaseHeld(p):
		t := x.step("%v renews its lease; it reads a note: %t", p, s.note[p])
		t.pods[p].renewal, t.pods[p].known = renewed, s.others(p)
		t.pods[p].noted, t.note[p] = s.note[p], false
		if w.mutant == positionBeforeNotes && !pod.overlooked {
			t.pods[p].position = pod.floor
		}
	case pod.renewal == polled:
		t := x.step("%v was overlooked: it takes a new life", p)
		t.takeLife(p)
		t.pods[p].renewal, t.pods[p].floor = idle, 0
		t.pods[p].claiming, t.pods[p].overlooked = true, true
	default:
		t := x.step("%v acts on notes: %t; then %d is its position, unless a gap is to come: %t", p, pod.noted, pod.floor, pod.overlooked)
		if pod.noted {
			t.gap(p)
		}
		if !pod.overlooked {
			t.pods[p].position = pod.floor
		}
		t.pods[p].renewal, t.pods[p].floor, t.pods[p].noted = idle, 0, false
	}
	if pod.claiming {
		t := x.step("%v has its claims under the new life answered", p)
		t.pods[p].claiming = false
		for i := range t.sockets {
			if k := &t.sockets[i]; k.pod == p && k.claimed {
				k.claim = pod.life
			}
		}
	}
	if pod.overlooked && (!pod.claiming || w.mutant == gapBeforeClaims) {
		t := x.step("%v marks a gap on its sockets, since it was overlooked", p)
		t.gap(p)
		t.pods[p].overlooked = false
	}
}

// floor is the consumer's ack floor: everything up to it is settled.
func (s *state) floor() (f seq) {
	for f < s.delivered && s.events[f+1].status == settled {
		f++
	}
	return f
}

// leaseHeld says what a renewal would find: the pod's lease, in the same instance of Redis.
func (s *state) leaseHeld(p podID) bool {
	return s.lease[p] == s.pods[p].life && s.instance == s.pods[p].instance
}

// others is the leases of the other pods.
func (s *state) others(p podID) [maxPods]uint8 {
	leases := s.lease
	leases[p] = 0
	return leases
}

func (s *state) start(p podID) {
	s.pods[p] = pod{up: true, life: s.pods[p].life}
	s.takeLife(p)
}

func (s *state) takeLife(p podID) {
	pod := &s.pods[p]
	pod.life++
	pod.instance, pod.known = s.instance, s.others(p)
	s.lease[p], s.note[p] = pod.life, false
}
