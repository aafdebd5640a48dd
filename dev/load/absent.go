package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

const (
	absentRate  = 5000 // events per second in all
	absentOf    = 10   // of so many events one is for an agent that is there
	absentNames = 5000 // agents without any socket
)

// stretch is one part of a run: latencies of the events for agents that are there.
type stretch struct {
	absent   bool
	events   int // for agents that are there
	latency  []time.Duration
	cpu      float64 // of the pod, seconds
	duration time.Duration
}

// absent alternates between stretches in which all events are for agents that are there and stretches in which nine of ten
// are for agents without any socket, and compares the latency of the former.
func absent(ctx context.Context, b *bench, p plan) error {
	var mu sync.Mutex
	var now *stretch
	seen := map[int64]int{}
	c, err := connect(ctx, p.agents, b.here, func(_ int, m []byte) {
		d := time.Duration(time.Now().UnixNano() - field(m, "at"))
		mu.Lock()
		defer mu.Unlock()
		now.latency = append(now.latency, d)
		seen[field(m, "n")]++
	})
	if err != nil {
		return err
	}
	defer c.close()
	next := 0
	var all []*stretch
	for range p.rounds {
		for _, with := range []bool{false, true} {
			s := &stretch{absent: with}
			mu.Lock()
			now = s
			mu.Unlock()
			if err := b.stretch(ctx, p, s, &next); err != nil {
				return err
			}
			for wait := time.Now().Add(10 * time.Second); c.received.Load() < int64(next) && time.Now().Before(wait); {
				time.Sleep(10 * time.Millisecond)
			}
			all = append(all, s)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	return reportAbsent(all, len(seen), next)
}

// stretch publishes for p.seconds; next numbers the events for agents that are there.
func (b *bench) stretch(ctx context.Context, p plan, s *stretch, next *int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	cpu, began := cpuSeconds(b.pod.PID()), time.Now()
	for i, total := 0, absentRate*p.seconds; i < total; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		for due := int(time.Since(began).Seconds() * absentRate); i < min(due, total); i++ {
			agent, n := fmt.Sprintf("gone%05d", i%absentNames), 0
			if i%absentOf == 0 {
				agent, n = agentID(*next%p.agents), *next
				*next++
				s.events++
			} else if !s.absent {
				continue
			}
			if err := b.publishTo(agent, n, p.size); err != nil {
				return err
			}
		}
	}
	s.cpu, s.duration = cpuSeconds(b.pod.PID())-cpu, time.Since(began)
	return nil
}

func reportAbsent(all []*stretch, seen, published int) error {
	var p99 [2][]time.Duration
	var cpu, took [2]float64
	for _, s := range all {
		slices.Sort(s.latency)
		if len(s.latency) == 0 {
			return fmt.Errorf("nothing arrived in a stretch of %s", s.duration)
		}
		i := map[bool]int{true: 1}[s.absent]
		p99[i] = append(p99[i], quantile(s.latency, .99))
		cpu[i], took[i] = cpu[i]+s.cpu, took[i]+s.duration.Seconds()
		fmt.Printf("absent: 9 of 10 events for nobody %t: %d events in %.0f s: p50 %s, p99 %s, max %s; pod CPU %.2f s\n", s.absent,
			s.events, s.duration.Seconds(), quantile(s.latency, .5), quantile(s.latency, .99), quantile(s.latency, 1), s.cpu)
	}
	without, with := median(p99[0]), median(p99[1])
	gone := absentRate * took[1] * (absentOf - 1) / absentOf
	fmt.Printf("absent: median of p99 %s without, %s with %d %% of %d events/s for absent agents: ratio %.2f; %.1f us of CPU per absent event; lost %d\n",
		without, with, 100-100/absentOf, absentRate, float64(with)/float64(without), (cpu[1]-cpu[0]*took[1]/took[0])/gone*1e6, published-seen)
	if seen < published {
		return fmt.Errorf("%d events did not arrive", published-seen)
	}
	return nil
}

// quantile is of a sorted slice.
func quantile(d []time.Duration, q float64) time.Duration {
	return d[int(q*float64(len(d)-1))].Round(10 * time.Microsecond)
}

func median(d []time.Duration) time.Duration {
	slices.Sort(d)
	return d[len(d)/2]
}
