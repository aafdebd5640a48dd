package main

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// sample is when an event for a client that stays was published, and how long it took.
type sample struct {
	at   time.Time
	took time.Duration
}

// resume measures the live flow of one pod while the clients of another, which dies, come over and resume.
func resume(ctx context.Context, b *bench, p plan) (err error) {
	if b.other, err = b.startPod(ctx, b.bin, "load-2", b.nats.URL()); err != nil {
		return err
	}
	var mu sync.Mutex
	var samples []sample
	stay, err := connect(ctx, p.agents, b.here, func(_ int, m []byte) {
		at := time.Unix(0, field(m, "at"))
		took := time.Since(at)
		mu.Lock()
		samples = append(samples, sample{at, took})
		mu.Unlock()
	})
	if err != nil {
		return err
	}
	defer stay.close()
	back, err := gather(p.clients, b.other.HTTP)
	if err != nil {
		return err
	}
	defer back.close()
	sent, err := b.fillBack(ctx, p, back)
	if err != nil {
		return err
	}
	flow := b.alternate(p, &sent)
	began := time.Now()
	if err := flow(func() bool { return time.Since(began) >= time.Duration(p.seconds)*time.Second }); err != nil {
		return err
	}
	if err := back.moveTo(b.pod.HTTP); err != nil {
		return err
	}
	cpu, natsCPU := cpuSeconds(b.pod.PID()), cpuSeconds(b.nats.Process().PID())
	died := time.Now()
	b.other.Kill()
	b.other = nil
	if err := flow(func() bool { return back.tally.Load().Over >= int64(p.clients) || time.Since(died) > 2*time.Minute }); err != nil {
		return err
	}
	over := time.Now()
	took := over.Sub(died)
	cpu, natsCPU = cpuSeconds(b.pod.PID())-cpu, cpuSeconds(b.nats.Process().PID())-natsCPU
	if err := flow(func() bool { return time.Since(over) >= 5*time.Second }); err != nil {
		return err
	}
	lostErr := back.wait(ctx, "events arrived at those who came back", received, sent)
	t := back.tally.Load()
	for why, n := range t.Why {
		fmt.Printf("resume: refused %d times: %s\n", n, why)
	}
	mu.Lock()
	defer mu.Unlock()
	before, during := p99Of(samples, began, died), p99Of(samples, died, over)
	fmt.Printf("resume: %d clients of a dead pod back and resumed after %.1f s (%d refusals); %d events replayed, %.0f events/s; %d gaps; CPU %.1f s of the pod, %.1f s of NATS\n",
		p.clients, took.Seconds(), t.Turned, t.Replayed, float64(t.Replayed)/took.Seconds(), t.Gaps, cpu, natsCPU)
	fmt.Printf("resume: p99 of the %d others at %d events/s in all: %s before, %s during: ratio %.2f; %s after\n",
		p.agents, p.rate, before, during, float64(during)/float64(before), p99Of(samples, over, time.Now()))
	if t.Gaps > 0 {
		fmt.Print(outcomes(ctx, b.pod))
	}
	return lostErr
}

func received(t *backTally) int64 { return t.Received }

// fillBack gives each of those who will come back p.backlog events, and returns how many it sent.
func (b *bench) fillBack(ctx context.Context, p plan, back *returners) (sent int, err error) {
	if err := back.wait(ctx, "clients are ready", func(t *backTally) int64 { return t.Ready }, p.clients); err != nil {
		return 0, err
	}
	for sent < p.clients*p.backlog {
		if err := b.publishTo(backID(sent%p.clients), sent, p.size); err != nil {
			return 0, err
		}
		if sent++; sent%20000 == 0 {
			if err := back.wait(ctx, "events of the backlog arrived", received, sent); err != nil {
				return 0, err
			}
		}
	}
	return sent, back.wait(ctx, "events of the backlog arrived", received, sent)
}

// alternate returns a function that publishes at p.rate, every second event for a client that stays, until it is told to end.
func (b *bench) alternate(p plan, sent *int) func(end func() bool) error {
	total := 0
	return func(end func() bool) error {
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		began, base := time.Now(), total
		for !end() {
			<-tick.C
			for ; total-base < int(time.Since(began).Seconds()*float64(p.rate)); total++ {
				agent, n := agentID(total/2%p.agents), total
				if total%2 == 1 {
					agent, n = backID(*sent%p.clients), *sent
					*sent++
				}
				if err := b.publishTo(agent, n, p.size); err != nil {
					return err
				}
			}
		}
		return nil
	}
}

func (b *bench) publishTo(agent string, n, size int) error {
	return publish(b.js, "wa.acme."+agent+".chats", payload(agent, n, size))
}

func publish(js jetstream.JetStream, subject string, body []byte) error {
	if _, err := js.PublishAsync(subject, body, jetstream.WithStallWait(time.Minute)); err != nil {
		return fmt.Errorf("publish to %s: %w", subject, err)
	}
	return nil
}

// p99Of is that of what was published between two moments; 0 where nothing was.
func p99Of(samples []sample, from, to time.Time) time.Duration {
	var d []time.Duration
	for _, s := range samples {
		if s.at.After(from) && s.at.Before(to) {
			d = append(d, s.took)
		}
	}
	if len(d) == 0 {
		return 0
	}
	slices.Sort(d)
	return quantile(d, .99)
}
