package main

import (
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"time"
)

// model is what a search has to know of a protocol. S is one moment of the whole system. It should consist of bytes and
// booleans only, because it is copied and hashed millions of times.
type model[S comparable] struct {
	begin  S
	next   func(*steps[S])   // adds each step that may be taken in from
	broken func(s *S) string // the promise that s breaks, or ""
}

// steps collects the steps that may be taken in one state.
type steps[S comparable] struct {
	from  S
	list  []step[S]
	named bool // only a trace needs names
}

type step[S comparable] struct {
	to   S
	kind string // the name without its arguments
	name string
	rare bool
}

// step adds a step and returns the state that it leads to: a copy of from, which the caller changes before it adds another.
func (x *steps[S]) step(kind string, args ...any) *S {
	x.list = append(x.list, step[S]{to: x.from, kind: kind})
	last := &x.list[len(x.list)-1]
	if x.named {
		last.name = fmt.Sprintf(kind, args...)
	}
	return &last.to
}

// rare adds a step that a random walk seldom takes.
func (x *steps[S]) rare(kind string, args ...any) *S {
	to := x.step(kind, args...)
	x.list[len(x.list)-1].rare = true
	return to
}

// in lists the steps that may be taken in s. The list is valid until the next call.
func (x *steps[S]) in(m model[S], s S) []step[S] {
	x.from, x.list = s, x.list[:0]
	m.next(x)
	return x.list
}

// result is what a search did, and what it found.
type result struct {
	states, depth int            // of explore: every state within depth steps from the beginning was seen
	all           bool           // of explore: there is no other state
	walks, steps  int            // of walk
	kinds         map[string]int // of walk: how often each kind of step was taken
	promise       string         // that is broken, or ""
	trace         []string       // the steps that break it
}

// hashes stand for states. That two of 10 million states share one is as likely as 1 to 300,000.
var hashes = maphash.MakeSeed()

// explore takes all steps from all states, the nearest states first: what it finds has a shortest trace. It ends when it
// has seen limit states, or at the deadline.
func explore[S comparable](m model[S], limit int, deadline time.Time) result {
	var x steps[S]
	begin := maphash.Comparable(hashes, m.begin)
	parents := map[uint64]uint64{begin: begin}
	level, next := []S{m.begin}, []S(nil)
	for depth := 0; ; depth++ {
		for i, s := range level {
			if len(parents) >= limit || i%1024 == 0 && time.Now().After(deadline) {
				return result{states: len(parents), depth: depth}
			}
			parent := maphash.Comparable(hashes, s)
			for _, t := range x.in(m, s) {
				h := maphash.Comparable(hashes, t.to)
				if _, seen := parents[h]; seen {
					continue
				}
				parents[h] = parent
				next = append(next, t.to)
				if promise := m.broken(&t.to); promise != "" {
					path := []uint64{h}
					for ; parent != begin; parent = parents[parent] {
						path = append(path, parent)
					}
					slices.Reverse(path)
					return result{states: len(parents), depth: depth, promise: promise, trace: trace(m, path)}
				}
			}
		}
		if len(next) == 0 {
			return result{states: len(parents), depth: depth, all: true}
		}
		level, next = next, level[:0]
	}
}

// walk goes from the beginning at random, at most length steps each time, until the deadline. The seed decides every walk.
func walk[S comparable](m model[S], seed uint64, length int, deadline time.Time) result {
	var x steps[S]
	r := result{kinds: map[string]int{}}
	for ; time.Now().Before(deadline); r.walks++ {
		random := rand.New(rand.NewPCG(seed, uint64(r.walks)))
		s := m.begin
		var path []uint64
		for range length {
			list := x.in(m, s)
			if len(list) == 0 {
				break
			}
			t := &list[random.IntN(len(list))]
			for t.rare && random.IntN(10) > 0 {
				t = &list[random.IntN(len(list))]
			}
			s = t.to
			r.steps++
			r.kinds[t.kind]++
			path = append(path, maphash.Comparable(hashes, s))
			if r.promise = m.broken(&s); r.promise != "" {
				r.trace = trace(m, path)
				return r
			}
		}
	}
	return r
}

// trace names the steps of a path, which is the hash of the state behind each of them.
func trace[S comparable](m model[S], path []uint64) (names []string) {
	x := steps[S]{named: true}
	s := m.begin
	for i, h := range path {
		list := x.in(m, s)
		at := slices.IndexFunc(list, func(t step[S]) bool { return maphash.Comparable(hashes, t.to) == h })
		names = append(names, fmt.Sprintf("%4d. %s", i+1, list[at].name))
		s = list[at].to
	}
	return names
}
