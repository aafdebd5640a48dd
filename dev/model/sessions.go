package main

import "fmt"

// The sessions have a model of their own: some sockets of one session, each on one of the pods, and the key in Redis. Its promises:
//
//   - Without a fault, never are two sockets live.
//   - At rest, that is when all renewals are done, one is live at the most, and it is the last one that has swapped, unless that left,
//     or another one if a swap or its answer was lost. A swap without an answer does not count, whenever it is executed.
//
// Not in the model: time, Redis that is away, and new lives of a pod.

const (
	maxSockets     = 4
	maxSessionPods = 3
)

type socketPhase uint8

const (
	absent     socketPhase = iota
	registered             // its swap is not executed
	swapped                // its answer is under way
	asking                 // the call for the socket before it is under way
	awaiting               // that one's pod answers when its own wait has ended
	confirming             // asks one pod after the other for any other socket of the session
	clear_                 // nobody is in its way
	alive
	over
)

type sessionSocket struct {
	phase       socketPhase
	pod, before uint8 // before: whom it has swapped out, 0 = nobody
	replaced    bool
	left        bool // its client has
	unheard     bool // the answer to its swap is lost
	flying      bool // that swap is still to be executed
	releasing   bool
	asked       [maxSessionPods]bool
	waitsFor    uint8 // bits of the sockets that are to end before all pods have answered
}

// sessionState is one moment. Sockets have numbers from 1.
type sessionState struct {
	sockets [maxSockets + 1]sessionSocket
	key     uint8 // 0 = missing
	earlier uint8 // the key before the last swap
	last    uint8 // to swap
	dead    [maxSessionPods]bool
	faults  uint8
	faulty  bool // something happened that two live sockets are excused for, until they are renewed
	lossy   bool // a swap or its answer was lost
}

type sessionWorld struct {
	sockets, pods, faults uint8
	mutant                string
}

func (w sessionWorld) String() string {
	return fmt.Sprintf("sessions, %d sockets on %d pods, %d faults", w.sockets, w.pods, w.faults)
}

// sessionWorlds are explored as worlds are.
var sessionWorlds = []sessionWorld{{3, 2, 0, ""}, {3, 2, 1, ""}, {3, 3, 1, ""}, {3, 2, 2, ""}, {4, 2, 1, ""}}

const (
	registeredLate   = "registered-after-swap"    // a newcomer is known to its pod only when its swap was answered
	answeredEarly    = "answered-while-waiting"   // the call for a newcomer that waits is answered at once
	abandoned        = "abandoned-by-its-client"  // a newcomer whose client leaves ends at once
	notAsked         = "renewal-does-not-ask"     // a renewal that finds another's name closes the socket
	putBack          = "renewal-puts-back"        // … or puts its own name back
	nobodyElse       = "unknown-is-nobody"        // a newcomer that finds the name of no socket asks nobody else
	closesTheLatest  = "confirming-closes-latest" // a pod that is asked for other sockets also closes the one that Redis names
	unheardSwaps     = "confirming-swaps-unheard" // … or does not wait for the swaps that are under way
	onlyTheLive      = "confirming-only-the-live" // … or closes no socket that waits
	goesOnThoughGone = "goes-on-though-replaced"  // a newcomer does not look whether it was replaced
)

var sessionMutants = []sessionWorld{
	{3, 2, 0, registeredLate}, {3, 2, 0, answeredEarly}, {3, 2, 0, abandoned}, {3, 2, 2, notAsked}, {3, 2, 1, putBack},
	{3, 2, 1, nobodyElse}, {3, 2, 1, closesTheLatest}, {4, 2, 1, unheardSwaps}, {3, 2, 1, onlyTheLive}, {3, 2, 0, goesOnThoughGone},
}

func (w sessionWorld) model() model[sessionState] {
	return model[sessionState]{sessionState{faults: w.faults}, func(x *steps[sessionState]) {
		w.progress(x)
		w.others(x)
	}, w.broken}
}

// end closes the socket, or its wait, for another's sake: the key is that one's.
func (s *sessionState) end(i uint8) { s.sockets[i].phase = over }

// leave ends the socket for its own client's sake.
func (s *sessionState) leave(i uint8) { s.sockets[i].phase, s.sockets[i].releasing = over, true }

// excuse notes that a socket was closed that Redis does not name. Once something was lost, it may be the last one: its client comes back.
func (s *sessionState) excuse(i uint8) {
	if s.lossy && s.last == i {
		s.last = 0
	}
}

// lose notes that an answer was lost. One such loss is made good; a second one may meet the first.
func (s *sessionState) lose() { s.lossy, s.faulty = true, s.faulty || s.lossy }

// progress adds the steps that pods take by themselves until all is at rest.
func (w sessionWorld) progress(x *steps[sessionState]) {
	s := &x.from
	for i := uint8(1); i <= w.sockets; i++ {
		k := &s.sockets[i]
		switch k.phase {
		case registered:
			t := x.step("socket %d swaps", i)
			t.sockets[i].phase, t.sockets[i].before = swapped, t.key
			t.earlier, t.key, t.last = t.key, i, i
		case swapped:
			t := x.step("socket %d hears whom it has swapped out", i)
			if t.sockets[i].phase = asking; k.before == 0 {
				t.sockets[i].phase = clear_
			}
		case asking:
			w.ask(x, i)
		case awaiting:
			if o := &s.sockets[k.before]; o.phase == over {
				t := x.step("socket %d hears that the wait of the one before has ended", i)
				if t.sockets[i].phase = clear_; o.unheard && w.mutant != nobodyElse {
					t.sockets[i].phase = confirming
				}
			}
		case confirming:
			w.confirm(x, i)
		case clear_:
			switch {
			case k.replaced && w.mutant != goesOnThoughGone:
				x.step("socket %d was replaced, and ends", i).end(i)
			case k.left:
				x.step("socket %d has no client any more, and ends", i).leave(i)
			default:
				x.step("socket %d is live", i).sockets[i].phase = alive
			}
		case alive:
			w.renew(x, i)
		case over:
			if k.releasing && !s.dead[k.pod] {
				t := x.step("socket %d is released", i)
				if t.sockets[i].releasing = false; t.key == i && !k.unheard {
					t.key = 0
				}
			}
		}
	}
}

// ask is the call for the socket before i.
func (w sessionWorld) ask(x *steps[sessionState], i uint8) {
	s := &x.from
	o := s.sockets[i].before
	before := &s.sockets[o]
	known := before.phase > absent && before.phase < alive
	if w.mutant == registeredLate && before.phase <= swapped {
		known = false
	}
	switch {
	case s.dead[before.pod]:
		t := x.step("socket %d learns that the pod of the one before is dead", i)
		t.sockets[i].phase, t.faulty = clear_, true
	case before.phase == alive:
		t := x.step("socket %d has the one before closed", i)
		t.end(o)
		t.sockets[i].phase = clear_
	case known:
		t := x.step("socket %d finds the one before waiting", i)
		t.sockets[o].replaced = true
		if t.sockets[i].phase = awaiting; w.mutant == answeredEarly {
			t.sockets[i].phase = clear_
		}
	default:
		t := x.step("socket %d finds the name of no socket", i)
		if t.sockets[i].phase = confirming; w.mutant == nobodyElse || w.mutant == registeredLate {
			t.sockets[i].phase = clear_
		}
	}
}

// confirm asks the pods that have not been asked yet for other sockets. Each waits until it knows of every swap of its sockets whether it
// was executed, and then reads the key: whom Redis does not name came before, or was replaced since. If Redis names nobody, nobody is
// closed. Whoever waits for i is left out.
func (w sessionWorld) confirm(x *steps[sessionState], i uint8) {
	s := &x.from
	k := &s.sockets[i]
	done := true
	for p := range w.pods {
		if k.asked[p] {
			continue
		}
		done = false
		if w.mutant != unheardSwaps && w.swapping(s, p) {
			continue
		}
		t := x.step("pod %d closes what has not the session, for socket %d", p, i)
		t.sockets[i].asked[p] = true
		for j := uint8(1); j <= w.sockets && !s.dead[p] && s.key != 0; j++ {
			o := &s.sockets[j]
			switch {
			case o.pod != p || j == i || j == s.key && w.mutant != closesTheLatest || o.phase == absent || o.phase == over:
			case o.phase == alive:
				t.end(j)
				t.excuse(j)
			case o.before != i && w.mutant != onlyTheLive:
				t.sockets[j].replaced = true
				t.sockets[i].waitsFor |= 1 << j
				t.excuse(j)
			}
		}
	}
	for j := range s.sockets {
		o := &s.sockets[j]
		if k.waitsFor&(1<<j) != 0 && s.faulty && o.phase != over { // they may wait for each other
			t := x.step("socket %d does not wait for socket %d any longer", i, j)
			t.sockets[i].waitsFor &^= 1 << j
		}
		done = done && (k.waitsFor&(1<<j) == 0 || o.phase == over)
	}
	if done {
		t := x.step("all pods have answered socket %d", i)
		t.sockets[i].phase, t.sockets[i].asked, t.sockets[i].waitsFor = clear_, [maxSessionPods]bool{}, 0
	}
}

// swapping says whether a swap of the pod is under way.
func (w sessionWorld) swapping(s *sessionState, p uint8) bool {
	for i := range s.sockets {
		if k := &s.sockets[i]; k.pod == p && (k.phase == registered || k.phase == swapped) {
			return !s.dead[p]
		}
	}
	return false
}

// renew is the renewal of a live socket.
func (w sessionWorld) renew(x *steps[sessionState], i uint8) {
	s := &x.from
	o := &s.sockets[s.key]
	switch {
	case s.key == i:
	case s.key == 0, w.mutant == putBack:
		x.step("socket %d sets its name again", i).key = i
	case w.mutant == notAsked || !s.dead[o.pod] && o.phase == alive:
		t := x.step("socket %d finds another's name", i)
		t.end(i)
		if o.phase == alive {
			t.excuse(i)
		}
	case s.dead[o.pod] || o.phase == over:
		t := x.step("socket %d replaces the name of no socket", i)
		t.key, t.faulty = i, true // another one may have swapped out this one's, and wait
	} // else the other one waits, and the answer with it
}

// others adds what clients do, and what may fail.
func (w sessionWorld) others(x *steps[sessionState]) {
	s := &x.from
	for i := uint8(1); i <= w.sockets; i++ {
		k := &s.sockets[i]
		if k.phase == absent && (i == 1 || s.sockets[i-1].phase != absent) {
			for p := range w.pods {
				if !s.dead[p] {
					t := x.step("socket %d comes to pod %d", i, p)
					t.sockets[i].phase, t.sockets[i].pod = registered, p
				}
			}
		}
		if k.phase >= registered && k.phase <= alive && !k.left {
			t := x.rare("the client of socket %d leaves", i)
			if t.sockets[i].left = true; k.phase == alive || w.mutant == abandoned && k.phase > registered {
				t.leave(i)
			}
		}
		if k.flying {
			t := x.step("the swap of socket %d is executed after all", i)
			t.sockets[i].flying, t.earlier, t.key, t.faulty = false, t.key, i, true
		}
	}
	if s.faults > 0 {
		w.fail(x)
	}
}

func (w sessionWorld) fail(x *steps[sessionState]) {
	s := &x.from
	fault := func(kind string, args ...any) *sessionState {
		t := x.rare(kind, args...)
		t.faults--
		return t
	}
	for i := uint8(1); i <= w.sockets; i++ {
		switch k := &s.sockets[i]; k.phase {
		case registered:
			t := fault("FAULT: the swap of socket %d is executed, its answer is lost", i)
			t.sockets[i].phase, t.sockets[i].unheard, t.sockets[i].left = over, true, true
			t.earlier, t.key = t.key, i
			t.lose()
			t = fault("FAULT: the swap of socket %d gets no answer, and may be executed late", i)
			t.sockets[i].phase, t.sockets[i].unheard, t.sockets[i].left, t.sockets[i].flying = over, true, true, true
			t.lose()
		case swapped:
			t := fault("FAULT: socket %d, which others know, loses the answer to its swap", i)
			t.sockets[i].phase, t.sockets[i].unheard, t.sockets[i].left = over, true, true
			t.lose()
		case asking, awaiting, confirming:
			t := fault("FAULT: a pod that socket %d asks is silent: it goes on", i)
			t.sockets[i].phase, t.faulty = clear_, true
		}
	}
	for p := range w.pods {
		if s.dead[p] {
			continue
		}
		t := fault("FAULT: pod %d dies", p)
		t.dead[p], t.faulty = true, true
		for i := range t.sockets {
			if k := &t.sockets[i]; k.phase != absent && k.pod == p {
				k.phase, k.left, k.releasing = over, true, false
			}
		}
	}
	if s.key != 0 {
		t := fault("FAULT: Redis loses the key")
		t.key, t.faulty, t.lossy = 0, true, true
	}
	if s.earlier != s.key {
		t := fault("FAULT: Redis loses the last swap")
		t.key, t.faulty, t.lossy = s.earlier, true, true
	}
}

// broken says which promise s breaks.
func (w sessionWorld) broken(s *sessionState) string {
	live := 0
	for i := range s.sockets {
		if s.sockets[i].phase == alive {
			live++
		}
	}
	if live > 1 && !s.faulty {
		return "two sockets are live, and nothing has failed"
	}
	x := steps[sessionState]{from: *s}
	if w.progress(&x); len(x.list) > 0 {
		return ""
	}
	for i := range s.sockets {
		if p := s.sockets[i].phase; p != absent && p != alive && p != over {
			return fmt.Sprintf("socket %d waits for ever", i)
		}
	}
	switch last := &s.sockets[s.last]; {
	case live > 1:
		return "two sockets are live, and all renewals are done"
	case s.last != 0 && !last.left && last.phase != alive:
		return fmt.Sprintf("socket %d was the last to swap, and is not live", s.last)
	}
	return ""
}
