package main

import "fmt"

const (
	maxPods    = 3
	maxClients = 2
	maxEvents  = 4
)

// seq is the sequence of an event, or a position: everything up to it. 0 is none. Event 1 is history: when the model begins,
// it is settled and no client lacks it. So position 1 is true.
type seq uint8

// set is a set of sequences.
type set uint8

func only(e seq) set         { return 1 << e }
func upTo(e seq) set         { return 1<<(e+1) - 2 }
func (s set) has(e seq) bool { return s&only(e) != 0 }

// podID is the index of a pod, clientID that of a client.
type (
	podID    uint8
	clientID uint8
)

func (p podID) String() string    { return fmt.Sprintf("P%d", p+1) }
func (c clientID) String() string { return fmt.Sprintf("C%d", c+1) }

// state is one moment of the whole system.
type state struct {
	begun  bool
	faults uint8 // how many may still happen

	// JetStream.
	events    [maxEvents + 2]event // by sequence
	stored    seq                  // the stream's end
	delivered seq                  // the highest event that the consumer has given out

	// Redis. The members of the route stand with their sockets.
	instance uint8
	lease    [maxPods]uint8 // the life that holds the pod's lease, or 0
	note     [maxPods]bool  // for the pod's present life; no renewal has read it

	pods    [maxPods]pod
	sockets [2 * maxClients]socket // two for each client: a pod may not have noticed that one was left
	clients [maxClients]client
}

// event is an event as JetStream has it and, while it is in hand, as that pod has it.
type event struct {
	status status
	pod    podID
	stage  stage
	target [maxPods]target
	life   [maxPods]uint8 // the life that the target is addressed to
}

type status uint8

const (
	unstored status = iota
	waiting         // JetStream gives it out
	inHand          // a pod has it
	settled         // acked or terminated: JetStream gives it out no more
)

// pod is one process of the service.
type pod struct {
	up   bool
	life uint8
	late set // events on their way to it that their sender has counted as failed

	// The look-up that is under way.
	batch  set            // 0: there is none
	answer [maxPods]uint8 // of its first round trip: the members

	// What the last renewal has read.
	instance uint8
	known    [maxPods]uint8 // leases of the other pods
	noted    bool           // a note, which the pod has not acted on

	renewal    renewal
	floor      seq // polled before the renewal
	position   seq
	claiming   bool // its claims under a new life are not answered
	overlooked bool // it has yet to mark a gap on its sockets
}

// socket is one WebSocket connection with its ring, as its pod sees it.
type socket struct {
	phase phase
	pod   podID
	left  bool  // its client is gone, and the pod has not noticed
	claim uint8 // the life under which its member stands in Redis, or 0

	claimed bool // its claim was answered
	fresh   bool // its client loads the state after ready: it has no position, or its replay failed
	read    seq  // the replay has written everything up to it
	end     seq  // of the stream; 0 until the replay has asked for it
	ready   bool // ready or resumed is written
	last    seq  // the last position that was written

	owes bool // a gap is noted, and no replay has paid it
	told bool // the gap is written

	ring     set // events that wait to be written
	position seq // the position that waits behind them
	behind   set // events that wait behind the position
}

type phase uint8

const (
	closed phase = iota
	replaying
	live
)

// client keeps two things: its position, and the set of what it has had since.
type client struct {
	position seq
	since    set

	loading bool // it has yet to load the state, and keeps no position before
	resumes bool // it was told of a gap, and asks for a replay when the socket is ready

	applied, loaded set // what its application has had as events, and with the state
	falsePosition   seq // a position that it was given without having had everything up to it
	twice           seq // an event that its application has got twice
}

// world is the size of a model, and the rule that it breaks, if any.
type world struct {
	pods    podID
	clients clientID
	events  seq
	faults  uint8
	mutant  string
}

func (w world) String() string {
	return fmt.Sprintf("pods %d, clients %d, events %d, faults %d", w.pods, w.clients, w.events, w.faults)
}

func (w world) model() model[state] { return model[state]{state{}, w.next, w.broken} }

// next adds every step that may be taken.
func (w world) next(x *steps[state]) {
	s := &x.from
	if !s.begun {
		w.begin(x.step("all pods are up, each client is live"), w.pods)
		w.begin(x.step("the last pod is down, no client has connected"), w.pods-1)
		return
	}
	if s.stored <= w.events {
		t := x.step("the stream stores event %d", s.stored+1)
		t.stored++
		t.events[t.stored].status = waiting
	}
	for p := range w.pods {
		switch {
		case s.pods[p].up:
			w.route(x, p)
			w.renew(x, p)
		case s.lease[p] != 0:
			x.step("the lease of %v, which is down, ends", p).lease[p] = 0
		default:
			x.step("%v starts", p).start(p)
		}
	}
	for c := range w.clients {
		w.use(x, c)
		w.serve(x, c, 2*int(c))
		w.serve(x, c, 2*int(c)+1)
	}
	w.fail(x)
}

// begin makes the first state. Where all pods are up, client 1 is live on the last pod, client 2 on the one before.
func (w world) begin(s *state, up podID) {
	*s = state{begun: true, faults: w.faults, stored: 1, delivered: 1}
	s.events[1].status = settled
	for p := range up {
		s.start(p)
		s.pods[p].position = 1
	}
	for p := range up {
		s.pods[p].known = s.others(p)
	}
	if up < w.pods {
		return
	}
	for c := range w.clients {
		s.sockets[2*c] = socket{phase: live, pod: up - 1 - podID(c)%up, claim: 1, claimed: true, ready: true, last: 1}
		s.clients[c] = client{position: 1, loaded: upTo(1)}
	}
}

// broken names the promise that s breaks.
func (w world) broken(s *state) string {
	for c := range w.clients {
		app := &s.clients[c]
		if app.falsePosition != 0 {
			return fmt.Sprintf("%v is given position %d without having had everything up to it", c, app.falsePosition)
		}
		if app.twice != 0 {
			return fmt.Sprintf("the application of %v gets event %d twice", c, app.twice)
		}
		k := s.socketOf(c)
		if k == nil || !k.ready || app.loading || k.owes {
			continue // what it misses comes with a replay, or with the state
		}
		if p := &s.pods[k.pod]; p.overlooked || p.noted || s.note[k.pod] || !s.leaseHeld(k.pod) {
			continue // its pod is going to mark a gap
		}
		for e := seq(1); e <= s.stored; e++ {
			if s.events[e].status == settled && !(app.applied | app.loaded | k.ring | k.behind).has(e) {
				return fmt.Sprintf("event %d is settled, %v has not had it, and nothing is going to tell it", e, c)
			}
		}
	}
	return ""
}
