package main

// A socket from its connecting to its end, and what its client makes of what it gets.

// use adds what a client may do next.
func (w world) use(x *steps[state], c clientID) {
	s := &x.from
	app := &s.clients[c]
	if k := s.socketOf(c); k != nil {
		if app.loading {
			t := &x.step("%v loads the state, which has everything up to %d", c, s.stored).clients[c]
			t.loading, t.loaded = false, upTo(s.stored)
		}
		if app.resumes && k.ready {
			t := x.step("%v resumes from %d", c, k.last)
			t.clients[c].resumes = false
			t.socketOf(c).replay()
		}
		return
	}
	i := 2 * c
	if s.sockets[i].phase != closed {
		i++
	}
	if s.sockets[i].phase != closed {
		return
	}
	for p := range w.pods {
		if !s.pods[p].up || s.pods[p].position == 0 {
			continue
		}
		t := x.step("%v connects to %v since position %d", c, p, app.position)
		t.sockets[i] = socket{phase: replaying, pod: p, read: app.position, last: app.position}
		if app.position == 0 {
			t.sockets[i].fresh = true
			t.clients[c] = client{}
		}
	}
}

// serve adds what may happen next to socket i, which is of client c.
func (w world) serve(x *steps[state], c clientID, i int) {
	if k := &x.from.sockets[i]; k.phase != closed {
		w.attach(x, c, i)
		w.deliver(x, c, i)
		if k.left {
			x.step("%v notices that %v has left", k.pod, c).closeSocket(i)
		}
	}
}

// attach adds the steps up to ready or resumed: claim, passes of the replay, live, end, last pass, answer.
func (w world) attach(x *steps[state], c clientID, i int) {
	s := &x.from
	k := &s.sockets[i]
	if !k.claimed && (k.ready || w.mutant != claimAfterReady) {
		t := &x.step("%v: the claim of %v is answered", c, k.pod).sockets[i]
		t.claimed, t.claim = true, s.pods[k.pod].life
	}
	if k.ready {
		return
	}
	until := k.end
	if k.phase == replaying && k.end == 0 {
		until = s.stored
	}
	if !k.fresh && k.read < until {
		t := x.step("%v: the replay writes event %d", c, k.read+1)
		t.sockets[i].read++
		t.write(i, k.read+1)
	}
	if k.phase == replaying && (k.claimed || w.mutant == claimAfterReady) {
		t := &x.step("%v: the ring is live; a gap that was owed is paid", c).sockets[i]
		t.phase, t.owes, t.told = live, false, false
	}
	endDue := k.phase == live
	if w.mutant == endBeforeLive {
		endDue = k.phase == replaying
	}
	if endDue && !k.fresh && k.end == 0 {
		x.step("%v: the stream's end is asked for: %d", c, s.stored).sockets[i].end = s.stored
	}
	if k.phase == live && (k.fresh || k.end != 0 && k.read >= k.end) {
		w.answer(x.step("%v: ready or resumed is written; a load is due: %t", c, k.fresh), i)
	}
}

// deliver adds what the ring may take and write. The gap and events are written in any order, a position behind what was
// queued before it.
func (w world) deliver(x *steps[state], c clientID, i int) {
	s := &x.from
	k := &s.sockets[i]
	p := &s.pods[k.pod]
	if k.ready && k.position == 0 && k.last != p.position && (!k.owes || w.mutant == positionWhileOwing) {
		x.step("%v: position %d is queued", c, p.position).sockets[i].position = p.position
	}
	if k.owes && !k.told {
		t := x.step("%v: the gap is written", c)
		t.sockets[i].told = true
		if app := t.reader(i); app != nil {
			app.resumes = true
		}
	}
	for e := seq(2); e <= s.stored; e++ {
		if k.ring.has(e) {
			t := x.step("%v: event %d is written", c, e)
			t.sockets[i].ring &^= only(e)
			t.write(i, e)
		}
	}
	if k.ring == 0 && k.position != 0 {
		t := x.step("%v: position %d is written", c, k.position)
		t.sockets[i].ring, t.sockets[i].position, t.sockets[i].behind = k.behind, 0, 0
		w.give(t, i, k.position)
	}
}

// replay begins a replay from the last position that the socket was given. What waits in the ring is settled as replayed.
func (k *socket) replay() {
	k.phase, k.ready, k.read = replaying, false, k.last
	k.ring, k.position, k.behind = 0, 0, 0
}

// answer writes ready or resumed. The position is the end of the replay or, where the client has to load, the pod's newest.
func (w world) answer(s *state, i int) {
	k := &s.sockets[i]
	position := k.end
	if k.fresh {
		position = s.pods[k.pod].position
		if app := s.reader(i); app != nil {
			*app = client{loading: true, resumes: app.resumes}
		}
	}
	k.ready, k.fresh, k.read, k.end = true, false, 0, 0
	w.give(s, i, position)
}

// push queues an event for the sockets of pod p. A socket that is replaying settles it at once, as replayed.
func (s *state) push(p podID, e seq) {
	for i := range s.sockets {
		k := &s.sockets[i]
		switch {
		case k.phase != live || k.pod != p || (k.ring | k.behind).has(e):
		case k.position != 0:
			k.behind |= only(e)
		default:
			k.ring |= only(e)
		}
	}
}

// gap notes a gap on each live socket of pod p.
func (s *state) gap(p podID) {
	for i := range s.sockets {
		if k := &s.sockets[i]; k.phase == live && k.pod == p {
			k.gap()
		}
	}
}

// gap notes a gap, and discards the position that waits.
func (k *socket) gap() {
	k.owes = true
	k.ring |= k.behind
	k.position, k.behind = 0, 0
}

// reader is the client of socket i, or nil if it has left.
func (s *state) reader(i int) *client {
	if s.sockets[i].left {
		return nil
	}
	return &s.clients[i/2]
}

// write brings an event to the client, which drops it if it is not above its position, or if it has had it since.
func (s *state) write(i int, e seq) {
	app := s.reader(i)
	if app == nil || e <= app.position || app.since.has(e) {
		return
	}
	if app.applied.has(e) {
		app.twice = e
	}
	app.since |= only(e)
	app.applied |= only(e)
}

// give brings a position to the client, which keeps the highest.
func (w world) give(s *state, i int, position seq) {
	s.sockets[i].last = position
	app := s.reader(i)
	if app == nil {
		return
	}
	if !app.loading && upTo(position)&^(app.applied|app.loaded) != 0 {
		app.falsePosition = position
	}
	if position > app.position || w.mutant == lowerPosition {
		app.position = position
	}
	app.since &^= upTo(app.position)
}

// socketOf is the socket that client c uses, or nil.
func (s *state) socketOf(c clientID) *socket {
	for i := 2 * c; i < 2*c+2; i++ {
		if k := &s.sockets[i]; k.phase != closed && !k.left {
			return k
		}
	}
	return nil
}

// leave parts client c from its socket. Before its load has ended, a client keeps nothing.
func (s *state) leave(c clientID) {
	s.socketOf(c).left = true
	s.clients[c].resumes = false
	if s.clients[c].loading {
		s.clients[c] = client{}
	}
}

// closeSocket ends socket i. The events that wait in its ring are settled as gone.
func (s *state) closeSocket(i int) {
	first, second := &s.sockets[i&^1], &s.sockets[i|1]
	if i&1 == 0 {
		*first = *second
	}
	*second = socket{}
}
