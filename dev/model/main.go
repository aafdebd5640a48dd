// Command model checks the delivery protocol, and in sessions.go that of the sessions: it takes the steps of a small cluster in every order, then in random orders, and
// looks for a state that breaks a promise. A rule of the protocol is changed here first, then in the service.
//
// The model has one agent, whose events are due to each of its clients, and a few pods, clients, events and faults. Its promises:
//
//   - A client that is given a position has had everything up to it.
//   - An application gets no event twice, when its client keeps the two rules of docs/protocol.md.
//   - When an event is settled, each live socket has written it, or is going to get a gap or a replay.
//
// How to read it: delivery.go has the state and the promises, router.go an event's way, lease.go the leases and positions,
// socket.go the sockets, replays and clients, faults.go what may fail, mutants.go the rules that it can break to see that the
// search notices. Each step is one call of x.step, under a condition that says when it may be taken. search.go knows nothing
// of the protocol: a model of another one needs a state, a next and a broken of its own.
//
// Not in the model: time, order among events, selected chats, shares, drains, replicas that are behind, an ack that
// arrives after its delivery got late, a claim that is under way while its pod takes a new life, and a consumer that someone
// makes anew beyond the floor. Left out because less could happen with it: the set of what a socket has had written, the NAKs
// of an event that nobody owns, and that a note is read until the renewal after it was acted on.
package main

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// worlds are explored before the walks. The first ones come to their ends within seconds.
var worlds = []world{
	{pods: 2, clients: 1, events: 2, faults: 0},
	{pods: 2, clients: 2, events: 1, faults: 0},
	{pods: 3, clients: 1, events: 1, faults: 0},
	{pods: 1, clients: 1, events: 1, faults: 2},
	{pods: 1, clients: 1, events: 2, faults: 1},
	{pods: 1, clients: 2, events: 1, faults: 1},
	{pods: 2, clients: 1, events: 1, faults: 1},
	{pods: 2, clients: 1, events: 1, faults: 2},
	{pods: 2, clients: 1, events: 2, faults: 1},
	{pods: 2, clients: 2, events: 1, faults: 1},
	{pods: 3, clients: 1, events: 1, faults: 1},
}

func main() {
	seconds := flag.Int("seconds", 60, "how long to search; half of it, at the most, in every order")
	states := flag.Int("states", 3_000_000, "how many states to explore in each world; a million takes 300 MB")
	seed := flag.Uint64("seed", 1, "decides the random walks")
	pods := flag.Uint("pods", maxPods, "pods in the random walks")
	clients := flag.Uint("clients", maxClients, "clients in the random walks")
	events := flag.Uint("events", maxEvents, "events in the random walks")
	faults := flag.Uint("faults", 6, "faults in each random walk, at the most")
	mutant := flag.String("mutant", "", "break this rule, or each in turn (all), and see that the search notices")
	flag.Parse()
	deadline := time.Now().Add(time.Duration(*seconds) * time.Second)
	var err error
	switch {
	case *pods < 1 || *pods > maxPods || *clients < 1 || *clients > maxClients || *events < 1 || *events > maxEvents || *faults > 255:
		err = fmt.Errorf("at most %d pods, %d clients, %d events and 255 faults", maxPods, maxClients, maxEvents)
	case *mutant != "":
		err = checkMutants(os.Stdout, *mutant, *states, deadline)
	default:
		w := world{podID(*pods), clientID(*clients), seq(*events), uint8(*faults), ""}
		_, err = checkDesign(os.Stdout, w, *states, *seed, deadline)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "model:", err)
		os.Exit(1)
	}
}

// checkDesign explores the small worlds, then walks in w until the deadline. It returns what the walks did.
func checkDesign(out io.Writer, w world, states int, seed uint64, deadline time.Time) (result, error) {
	for i, small := range worlds {
		share := time.Until(deadline) / time.Duration(len(worlds)-i+len(worlds)) // an equal one of what is left of the first half
		r := explore(small.model(), states, time.Now().Add(share))
		fmt.Fprintf(out, "explored, %v: %s\n", small, r.extent())
		if r.promise != "" {
			return r, r.violation()
		}
	}
	for _, small := range sessionWorlds {
		r := explore(small.model(), states, time.Now().Add(time.Until(deadline)/12))
		fmt.Fprintf(out, "explored, %v: %s\n", small, r.extent())
		if r.promise != "" {
			return r, r.violation()
		}
	}
	all := sessionWorld{maxSockets, maxSessionPods, 2, ""}
	sessions := walk(all.model(), seed, 100, time.Now().Add(time.Until(deadline)/12))
	fmt.Fprintf(out, "walked, seed %d, %v: %d walks, %d steps\n", seed, all, sessions.walks, sessions.steps)
	if sessions.promise != "" {
		return sessions, sessions.violation()
	}
	r := walk(w.model(), seed, 300, deadline)
	maps.Copy(r.kinds, sessions.kinds)
	fmt.Fprintf(out, "walked, seed %d, %v: %d walks, %d steps:\n", seed, w, r.walks, r.steps)
	readable := strings.NewReplacer("%v", "…", "%d", "…", "%t", "…")
	for _, kind := range slices.SortedFunc(maps.Keys(r.kinds), func(a, b string) int { return cmp.Compare(r.kinds[b], r.kinds[a]) }) {
		fmt.Fprintf(out, "%10d × %s\n", r.kinds[kind], readable.Replace(kind))
	}
	if r.promise != "" {
		return r, r.violation()
	}
	fmt.Fprintf(out, "PASSED: the design, seed %d: no step breaks a promise\n", seed)
	return r, nil
}

// checkMutants fails unless the search finds a violation in the world of the mutant, or of each.
func checkMutants(out io.Writer, name string, states int, deadline time.Time) error {
	type search struct {
		mutant  string
		world   fmt.Stringer
		explore func() result
	}
	var all []search
	for _, w := range mutants {
		all = append(all, search{w.mutant, w, func() result { return explore(w.model(), states, deadline) }})
	}
	for _, w := range sessionMutants {
		all = append(all, search{w.mutant, w, func() result { return explore(w.model(), states, deadline) }})
	}
	var missed, names []string
	for _, s := range all {
		names = append(names, s.mutant)
		if name != "all" && name != s.mutant {
			continue
		}
		r := s.explore()
		if r.promise == "" {
			missed = append(missed, s.mutant)
			continue
		}
		fmt.Fprintln(out, r.violation())
		fmt.Fprintf(out, "PASSED: mutant %s, %v: noticed after %s\n", s.mutant, s.world, r.extent())
	}
	switch {
	case name != "all" && !slices.Contains(names, name):
		return fmt.Errorf("no mutant %q, only all, %s", name, strings.Join(names, ", "))
	case missed != nil:
		return fmt.Errorf("not noticed: %s", strings.Join(missed, ", "))
	}
	return nil
}

// extent says how much a search by explore has covered.
func (r result) extent() string {
	if r.all {
		return fmt.Sprintf("all %d states, the farthest %d steps from the beginning", r.states, r.depth)
	}
	return fmt.Sprintf("%d states, all within %d steps from the beginning", r.states, r.depth)
}

func (r result) violation() error {
	return errors.New("VIOLATION: " + r.promise + "\n" + strings.Join(r.trace, "\n"))
}
