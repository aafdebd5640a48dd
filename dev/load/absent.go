package main

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

const (
	absentRate  = 5000 // events per second in all
	absentOf    = 10   // of so many events one is for an agent that is there
	absentNames = 5000 // agents without any socket
)

// others is what the nine of ten events are that are not for agents who are there.
type others int

const (
	noOthers others = iota
	forNobody
	rejected  // in a stream whose only consumer terminates whatever comes: what JetStream costs whoever reads them
	elsewhere // in one that nobody reads: what the load on this machine costs by itself
	kinds     // how many there are
)

// prefix is that of the subjects that others are published to, "" for none.
func (o others) prefix() string { return [...]string{"", "wa", "rejected", "elsewhere"}[o] }

func (o others) String() string {
	return [...]string{"no others", "nine times as many for nobody", "nine times as many in a stream whose consumer does nothing but terminate them",
		"nine times as many in another stream"}[o]
}

// stretch is one part of a run: latencies of the events for agents that are there.
type stretch struct {
	others   others
	events   int // for agents that are there
	latency  []time.Duration
	cpu      float64 // of the pod, seconds
	duration time.Duration
}

// absent alternates between stretches of events for agents that are there, alone and with others beside them, and compares
// their latency.
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
	for _, o := range []others{rejected, elsewhere} {
		if _, err := b.js.CreateStream(ctx, jetstream.StreamConfig{Name: o.prefix(), Subjects: []string{o.prefix() + ".>"}}); err != nil {
			return err
		}
	}
	reject, err := startChild(0, "reject", b.nats.URL())
	if err != nil {
		return err
	}
	defer reject.close()
	gone, err := startChild(19, "gone", b.nats.URL(), fmt.Sprint(p.size))
	if err != nil {
		return err
	}
	defer gone.close()
	next := 0
	var all []*stretch
	for range p.rounds {
		for kind := range kinds {
			s := &stretch{others: kind}
			mu.Lock()
			now = s
			mu.Unlock()
			if _, err := fmt.Fprintln(gone, kind.prefix()); err != nil {
				return err
			}
			if err := b.stretch(ctx, p, s, &next); err != nil {
				return err
			}
			if _, err := fmt.Fprintln(gone); err != nil {
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

// stretch publishes for agents that are there, for p.seconds; next numbers the events.
func (b *bench) stretch(ctx context.Context, p plan, s *stretch, next *int) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	cpu, began := cpuSeconds(b.pod.PID()), time.Now()
	for total := absentRate / absentOf * p.seconds; s.events < total; {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		for due := int(time.Since(began).Seconds() * absentRate / absentOf); s.events < min(due, total); s.events++ {
			if err := b.publishTo(agentID(*next%p.agents), *next, p.size); err != nil {
				return err
			}
			*next++
		}
	}
	s.cpu, s.duration = cpuSeconds(b.pod.PID())-cpu, time.Since(began)
	return nil
}

// rejectAll is the child whose consumer terminates all that is in the stream rejected.
func rejectAll(ctx context.Context, url string) error {
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return err
	}
	name := rejected.prefix()
	cons, err := js.CreateConsumer(ctx, name, jetstream.ConsumerConfig{Durable: name, AckPolicy: jetstream.AckExplicitPolicy, MaxDeliver: -1})
	if err != nil {
		return fmt.Errorf("make a consumer of stream %s: %w", name, err)
	}
	flow, err := cons.Consume(func(m jetstream.Msg) { m.Term() })
	if err != nil {
		return fmt.Errorf("consume stream %s: %w", name, err)
	}
	defer flow.Stop()
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// publishGone is the child that publishes for agents without a socket, to subjects of the prefix that it read last; nothing where
// that is empty.
func publishGone(url string, size int) error {
	nc, err := nats.Connect(url)
	if err != nil {
		return err
	}
	defer nc.Close()
	js, err := jetstream.New(nc, jetstream.WithPublishAsyncMaxPending(4096))
	if err != nil {
		return err
	}
	prefixes := make(chan string)
	go func() {
		defer close(prefixes)
		for in := bufio.NewScanner(os.Stdin); in.Scan(); {
			prefixes <- in.Text()
		}
	}()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for prefix, began, sent := "", time.Now(), 0; ; {
		select {
		case next, ok := <-prefixes:
			if !ok {
				return nil
			}
			prefix, began, sent = next, time.Now(), 0
		case <-tick.C:
		}
		if prefix == "" {
			continue
		}
		for due := int(time.Since(began).Seconds() * absentRate * (absentOf - 1) / absentOf); sent < due; sent++ {
			agent := fmt.Sprintf("gone%05d", sent%absentNames)
			if err := publish(js, prefix+".acme."+agent+".chats", payload(agent, 0, size)); err != nil {
				return err
			}
		}
	}
}

func reportAbsent(all []*stretch, seen, published int) error {
	var p99, latency [kinds][]time.Duration // of each stretch; and all latencies
	var cpu, took [kinds]float64
	for _, s := range all {
		slices.Sort(s.latency)
		if len(s.latency) == 0 {
			return fmt.Errorf("nothing arrived in a stretch of %s", s.duration)
		}
		i := s.others
		p99[i] = append(p99[i], quantile(s.latency, .99))
		latency[i] = append(latency[i], s.latency...)
		cpu[i], took[i] = cpu[i]+s.cpu, took[i]+s.duration.Seconds()
		fmt.Printf("absent: %d events in %.0f s, %s: p50 %s, p99 %s, max %s; pod CPU %.2f s\n",
			s.events, s.duration.Seconds(), s.others, quantile(s.latency, .5), quantile(s.latency, .99), quantile(s.latency, 1), s.cpu)
	}
	for _, l := range latency {
		slices.Sort(l)
	}
	base := quantile(latency[noOthers], .99)
	for o := forNobody; o < kinds; o++ {
		ratio := make([]float64, len(p99[o]))
		for round, with := range p99[o] {
			ratio[round] = float64(with) / float64(p99[noOthers][round])
		}
		whole := quantile(latency[o], .99)
		fmt.Printf("absent: p99 of all %d events %s, with %s %s: ratio %.2f; median of %d stretches %s and %s, of the ratios in each round %.2f\n",
			len(latency[o]), base, o, whole, float64(whole)/float64(base), len(ratio), median(p99[noOthers]), median(p99[o]), median(ratio))
	}
	gone := absentRate * took[forNobody] * (absentOf - 1) / absentOf
	fmt.Printf("absent: %.1f us of CPU per absent event; lost %d\n", (cpu[forNobody]-cpu[noOthers]*took[forNobody]/took[noOthers])/gone*1e6, published-seen)
	if seen < published {
		return fmt.Errorf("%d events did not arrive", published-seen)
	}
	return nil
}

// quantile is of a sorted slice.
func quantile(d []time.Duration, q float64) time.Duration {
	return d[int(q*float64(len(d)-1))].Round(10 * time.Microsecond)
}

// median is the upper one of an even number.
func median[T cmp.Ordered](d []T) T {
	return slices.Sorted(slices.Values(d))[len(d)/2]
}
