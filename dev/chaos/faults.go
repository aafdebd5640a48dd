package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"time"
)

// kinds are all faults that there are.
var kinds = []string{"kill", "term", "stop", "freeze", "redis", "redisloss", "alone", "lag", "nats", "cut", "far", "hole", "slow", "reset", "vanish", "consumer"}

// fault is one of the schedule; what is below is known when it was made.
type fault struct {
	kind   string
	at     time.Duration
	target int           // a pod, or a client
	lasts  time.Duration // how long it is down, still, cut, slow
	began  time.Time
	healed time.Time
	hurt   []*client // whose events it may hold up
}

func (f *fault) String() string {
	switch f.kind {
	case "kill", "term", "stop", "alone", "lag", "cut", "far", "hole":
		return fmt.Sprintf("%s pod-%d %.1fs", f.kind, f.target, f.lasts.Seconds())
	case "slow":
		return fmt.Sprintf("slow user-%d %.1fs", f.target, f.lasts.Seconds())
	case "reset", "vanish":
		return fmt.Sprintf("%s user-%d", f.kind, f.target)
	case "consumer":
		return f.kind
	}
	return fmt.Sprintf("%s %.1fs", f.kind, f.lasts.Seconds())
}

// schedule draws the faults of a seed. They overlap, but for two of one target. The kinds are drawn as from a deck of cards:
// none comes again before all others have come.
func schedule(p plan) ([]*fault, error) {
	for _, k := range p.kinds {
		if !slices.Contains(kinds, k) {
			return nil, fmt.Errorf("no fault is called %q; there are %v", k, kinds)
		}
	}
	rng := rand.New(rand.NewPCG(p.seed, 0))
	free := map[string]time.Duration{}
	var list []*fault
	var deck []string
	for at := 2 * time.Second; at < p.duration-time.Second && len(p.kinds) > 0; at += time.Duration(300+rng.IntN(1100)) * time.Millisecond {
		if len(deck) == 0 {
			deck = deal(rng, p.kinds, at > p.duration/2)
		}
		for i := range 3 * len(deck) { // the next kind that finds a target, of three, which is left alone
			i %= len(deck)
			f, rest := draw(rng, p, deck[i])
			if f.at = at; free[f.place()] <= at {
				free[f.place()] = at + f.lasts + rest
				list = append(list, f)
				deck = slices.Delete(deck, i, i+1)
				break
			}
		}
	}
	return list, nil
}

// deal shuffles the kinds. NATS dies early: who resumes meanwhile must reload, and what came before that cannot be judged.
func deal(rng *rand.Rand, kinds []string, late bool) []string {
	deck := slices.Clone(kinds)
	rng.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
	if i := slices.Index(deck, "nats"); i >= 0 && len(deck) > 1 {
		deck = slices.Delete(deck, i, i+1)
		if !late {
			deck = slices.Insert(deck, min(i, len(deck)/3), "nats")
		}
	}
	return deck
}

// draw makes a fault of the kind, and says how long its target must be left alone afterwards.
func draw(rng *rand.Rand, p plan, kind string) (f *fault, rest time.Duration) {
	ms := func(from, to int) time.Duration { return time.Duration(from+rng.IntN(to-from)) * time.Millisecond }
	f = &fault{kind: kind, target: rng.IntN(pods), lasts: ms(200, 3000)}
	switch kind {
	case "stop":
		f.lasts = ms(1000, 8000)
	case "alone", "lag", "cut", "far", "hole":
		f.lasts = ms(1000, 6000)
	case "freeze":
		f.target, f.lasts = 0, ms(300, 5000)
	case "slow":
		f.target, f.lasts = rng.IntN(max(p.clients/4, 1))*4, ms(2000, 7000)
	case "reset", "vanish":
		f.target, f.lasts = rng.IntN(p.clients), 0
		return f, 0
	case "redis", "redisloss", "nats":
		f.target = 0
	case "consumer":
		f.target, f.lasts = 0, 0
	}
	return f, 4 * time.Second
}

// place is what only one fault at a time can be made to.
func (f *fault) place() string {
	switch f.kind {
	case "kill", "term", "stop":
		return fmt.Sprint("pod", f.target)
	case "cut", "far", "hole":
		return fmt.Sprint("way", f.target)
	case "slow", "reset", "vanish":
		return fmt.Sprint("client", f.target)
	case "freeze", "redisloss":
		return "redis"
	case "lag":
		return "alone"
	}
	return f.kind
}

// makeFaults makes each when it is time, and returns when all are healed.
func makeFaults(ctx context.Context, w *world, cr *crowd, pub *publisher, list []*fault) {
	var wg sync.WaitGroup
	defer wg.Wait()
	places := map[string]*sync.Mutex{} // a restart may take longer than was foreseen
	for _, f := range list {
		wait(ctx, time.Until(w.began.Add(f.at)))
		if ctx.Err() != nil {
			return
		}
		if places[f.place()] == nil {
			places[f.place()] = &sync.Mutex{}
		}
		place := places[f.place()]
		wg.Go(func() {
			place.Lock()
			defer place.Unlock()
			f.began, f.hurt = time.Now(), cr.list
			w.say("%s", f)
			if err := f.make(ctx, w, cr, pub); err != nil {
				w.complain(fmt.Sprintf("%s: %v", f, err))
			}
			f.healed = time.Now()
		})
	}
}

// make makes the fault and heals it.
func (f *fault) make(ctx context.Context, w *world, cr *crowd, pub *publisher) error {
	switch f.kind {
	case "kill", "term", "stop":
		return f.pod(ctx, w)
	case "alone", "lag", "cut", "far", "hole":
		f.hurt = cr.on(f.target)
		f.way(ctx, w)
	case "freeze":
		if err := w.redis.Process().Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		wait(ctx, f.lasts)
		return w.redis.Process().Signal(syscall.SIGCONT)
	case "slow", "reset", "vanish":
		c := cr.list[f.target]
		f.hurt = []*client{c}
		if f.kind == "slow" {
			c.pause(f.lasts)
			pub.burst(ctx, c.agent)
			wait(ctx, time.Until(f.began.Add(f.lasts)))
		} else {
			c.vanish(f.kind == "reset")
		}
	case "redis", "redisloss":
		w.blame(w.redis.Process())
		w.redis.Kill()
		wait(ctx, f.lasts)
		if f.kind == "redisloss" {
			if err := w.redis.LoseData(); err != nil {
				return err
			}
		}
		return w.redis.Restart()
	case "nats":
		w.blame(w.nats.Process())
		w.nats.Kill()
		wait(ctx, f.lasts)
		return w.nats.Restart()
	case "consumer":
		within, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		return f.deleteConsumer(within, w)
	}
	return nil
}

func (f *fault) pod(ctx context.Context, w *world) error {
	s := w.pod(f.target)
	w.blame(s.Process)
	switch f.kind {
	case "stop":
		if err := s.Signal(syscall.SIGSTOP); err != nil {
			return err
		}
		wait(ctx, f.lasts)
		return s.Signal(syscall.SIGCONT)
	case "kill":
		s.Kill()
	case "term":
		s.Signal(syscall.SIGTERM)
		within, cancel := context.WithTimeout(ctx, 2*time.Minute)
		code, err := s.Wait(within)
		cancel()
		if err != nil || code != 0 {
			w.complain(fmt.Sprintf("%s: drained pod ended with status %d, %v", f, code, err))
			s.Kill()
		}
	}
	wait(ctx, f.lasts)
	return w.startPod(ctx, f.target)
}

// way breaks what the other pods send to the pod, or what it sends to Redis.
func (f *fault) way(ctx context.Context, w *world) {
	way := w.ways[f.target]
	if f.kind == "alone" || f.kind == "lag" {
		way = w.stores[f.target]
	}
	switch f.kind {
	case "alone", "cut":
		way.Cut()
	case "far":
		way.Latency(f.lasts / 4)
	case "lag": // from what look-ups take to what is too long for them, but not for a renewal
		way.Latency(f.lasts / 40)
	case "hole":
		way.BlackHole()
	}
	wait(ctx, f.lasts)
	way.Latency(0)
	way.Restore()
}

// deleteConsumer tries until NATS answers: it may be away itself.
func (f *fault) deleteConsumer(ctx context.Context, w *world) error {
	for {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		err := w.js.DeleteConsumer(try, "wa_stream", "ws_fanout")
		cancel()
		if err == nil || ctx.Err() != nil {
			return nil // deleted, or the server was away all the time
		}
		wait(ctx, 200*time.Millisecond)
	}
}
