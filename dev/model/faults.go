package main

// fail adds each fault that may happen, while there are any left. A pod that is paused, cut off or slow needs no fault of its
// own: it takes no step for a while, and its lease, its deliveries and what was pushed to it come to their ends.
func (w world) fail(x *steps[state]) {
	if x.from.faults > 0 {
		w.failPods(x)
		w.failEvents(x)
		w.failRedis(x)
		w.failSockets(x)
	}
}

// fault adds a step that uses one of the faults up.
func fault(x *steps[state], kind string, args ...any) *state {
	t := x.rare(kind, args...)
	t.faults--
	return t
}

func (w world) failPods(x *steps[state]) {
	s := &x.from
	for p := range w.pods {
		pod := &s.pods[p]
		if !pod.up {
			continue
		}
		fault(x, "FAULT: %v dies", p).crash(p)
		if s.lease[p] != 0 {
			fault(x, "FAULT: the lease of %v ends", p).lease[p] = 0
		}
		if pod.batch != 0 {
			next := pulled // to be looked up again
			if w.mutant == settleWithoutRedis {
				next = found
			}
			fault(x, "FAULT: the look-up of %v is not answered: it pushes to every known pod", p).address(p, pod.known, next)
		}
	}
}

func (w world) failEvents(x *steps[state]) {
	s := &x.from
	for e := seq(2); e <= s.stored; e++ {
		ev := &s.events[e]
		if ev.status == inHand {
			fault(x, "FAULT: the delivery of event %d to %v gets late: JetStream gives it out again", e, ev.pod).release(e)
		}
		if ev.status == settled {
			fault(x, "FAULT: JetStream loses the ack of event %d", e).events[e].status = waiting
		}
		for q, target := range ev.target {
			switch target {
			case sent:
				t := fault(x, "FAULT: event %d to %v counts as failed, and may arrive late", e, podID(q))
				t.events[e].target[q] = failed
				t.pods[q].late |= only(e)
			case there:
				fault(x, "FAULT: event %d has arrived at %v, and counts as failed", e, podID(q)).events[e].target[q] = failed
			}
		}
	}
	for f := seq(1); f <= s.floor() && f < s.delivered; f++ {
		t := fault(x, "FAULT: the consumer is made again, from %d", f)
		t.delivered = f
		for e := f + 1; e <= s.stored; e++ {
			t.release(e)
		}
	}
}

func (w world) failRedis(x *steps[state]) {
	for lost := range 4 {
		all := lost == 0
		members, notes, leases := all || lost == 1, all || lost == 2, all || lost == 3
		t := fault(x, "FAULT: another instance of Redis answers; lost are members %t, notes %t, leases %t", members, notes, leases)
		t.instance++
		for i := range t.sockets {
			if members {
				t.sockets[i].claim = 0
			}
		}
		if notes {
			t.note = [maxPods]bool{}
		}
		if leases {
			t.lease = [maxPods]uint8{}
		}
	}
}

func (w world) failSockets(x *steps[state]) {
	s := &x.from
	for c := range w.clients {
		k := s.socketOf(c)
		if k == nil {
			continue
		}
		fault(x, "FAULT: %v leaves", c).leave(c)
		if k.ready {
			fault(x, "FAULT: %v resumes unasked from %d", c, k.last).socketOf(c).replay()
		}
		if k.phase == replaying && !k.fresh {
			fault(x, "FAULT: the replay of %v fails", c).socketOf(c).fresh = true
		}
	}
	for i := range s.sockets {
		k := &s.sockets[i]
		for e := seq(2); e <= s.stored; e++ {
			if (k.ring | k.behind).has(e) {
				t := &fault(x, "FAULT: the ring of %v drops event %d and notes a gap", clientID(i/2), e).sockets[i]
				t.gap()
				t.ring &^= only(e)
			}
		}
	}
}

// crash ends a pod. Its lease is left.
func (s *state) crash(p podID) {
	for e := range s.events {
		ev := &s.events[e]
		if ev.target[p] == there && s.holds(p, seq(e)) {
			ev.target[p] = failed
		}
		if ev.pod == p && ev.status == inHand {
			s.release(seq(e))
		}
	}
	for i := len(s.sockets) - 1; i >= 0; i-- {
		k := &s.sockets[i]
		if k.phase == closed || k.pod != p {
			continue
		}
		if !k.left {
			s.leave(clientID(i / 2))
		}
		s.closeSocket(i)
	}
	s.pods[p] = pod{life: s.pods[p].life}
}
