package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
	"github.com/nats-io/nats.go/jetstream"
)

// returner is a client of the pod that dies. It comes to the other one, resumes, and keeps what it has had, as
// docs/protocol.md tells clients to do.
type returner struct {
	agent string
	crowd *returners

	mu   sync.Mutex // guards all below
	seen map[int64]bool
	top  uint64
}

// returners are all of them.
type returners struct {
	all      []*returner
	address  atomic.Pointer[string] // of the pod to connect to
	ready    atomic.Int64           // sockets that came to their ready
	over     atomic.Int64           // of these, those of the second pod; a client whose socket breaks there is counted again
	received atomic.Int64           // events, each once per client
	replayed atomic.Int64
	gaps     atomic.Int64
	turned   atomic.Int64 // refusals and broken connections on the way back
	why      sync.Map     // of these: how many by status or error
	wg       sync.WaitGroup
}

// gather starts n clients at address; they run until ctx ends.
func gather(ctx context.Context, n int, address string) *returners {
	r := &returners{}
	r.address.Store(&address)
	for i := range n {
		c := &returner{agent: fmt.Sprintf("back%05d", i), crowd: r, seen: map[int64]bool{}}
		r.all = append(r.all, c)
		r.wg.Go(func() { c.run(ctx) })
	}
	return r
}

// run connects again and again: each time after a random part of a doubling time.
func (c *returner) run(ctx context.Context) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		wait := time.Duration(rand.Int64N(int64(min(500*time.Millisecond<<min(attempt, 6), 30*time.Second))))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if c.attend(ctx) {
			attempt = -1
		} else {
			c.crowd.turned.Add(1)
		}
	}
}

// attend is the life of one socket; it says whether it came to its ready.
func (c *returner) attend(ctx context.Context) (greeted bool) {
	dialer := websocket.Dialer{ReadBufferSize: 1024, WriteBufferSize: 256, NetDialContext: (&net.Dialer{}).DialContext}
	url := fmt.Sprintf("ws://%s/ws/acme/%s", *c.crowd.address.Load(), c.agent)
	c.mu.Lock()
	resumes := c.top > 0
	if resumes {
		url += fmt.Sprintf("?since=%d", c.top)
	}
	c.mu.Unlock()
	ws, resp, err := dialer.DialContext(ctx, url, http.Header{"X-API-Key": {apiKey}, "Authorization": {"Bearer " + mint(c.agent)}})
	if err != nil {
		key := "no connection"
		if resp != nil {
			b, _ := io.ReadAll(resp.Body)
			key = resp.Status + string(b)
		}
		n, _ := c.crowd.why.LoadOrStore(key, new(atomic.Int64))
		n.(*atomic.Int64).Add(1)
		return false
	}
	defer ws.Close()
	defer context.AfterFunc(ctx, func() { ws.Close() })()
	top := uint64(0) // counts from ready on: a replay that is cut short must begin again
	for {
		_, m, err := ws.ReadMessage()
		if err != nil {
			return greeted
		}
		top = max(top, uint64(field(m, "seq")))
		switch head := m[:min(len(m), 60)]; {
		case bytes.Contains(head, []byte(`"ready"`)):
			if bytes.Contains(m, []byte(`"gap":true`)) {
				c.crowd.gaps.Add(1)
			}
			greeted = true
			c.crowd.ready.Add(1)
			if resumes {
				c.crowd.over.Add(1)
			}
		case bytes.Contains(head, []byte(`"gap"`)):
			c.crowd.gaps.Add(1)
		case bytes.Contains(head, []byte(`"event"`)):
			if bytes.HasSuffix(m, []byte(`"replay":true}`)) {
				c.crowd.replayed.Add(1)
			}
			c.have(field(m, "n"))
		}
		if greeted {
			c.mu.Lock()
			c.top = max(c.top, top)
			c.mu.Unlock()
		}
	}
}

func (c *returner) have(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.seen[n] {
		c.seen[n] = true
		c.crowd.received.Add(1)
	}
}

// wait waits until what is counted reaches n.
func wait(ctx context.Context, what string, counted *atomic.Int64, n int64) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for counted.Load() < n {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d %s after two minutes", counted.Load(), n, what)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

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
	clients, stop := context.WithCancel(ctx)
	back := gather(clients, p.clients, b.other.HTTP)
	defer back.wg.Wait()
	defer stop()
	if err := wait(ctx, "clients are ready", &back.ready, int64(p.clients)); err != nil {
		return err
	}
	sent := 0 // to those who come back
	for sent < p.clients*p.backlog {
		if err := b.publishTo(back.all[sent%p.clients].agent, sent, p.size); err != nil {
			return err
		}
		if sent++; sent%20000 == 0 {
			if err := wait(ctx, "events of the backlog arrived", &back.received, int64(sent)); err != nil {
				return err
			}
		}
	}
	if err := wait(ctx, "events of the backlog arrived", &back.received, int64(sent)); err != nil {
		return err
	}
	flow := b.alternate(p, back, &sent)
	began := time.Now()
	if err := flow(func() bool { return time.Since(began) >= time.Duration(p.seconds)*time.Second }); err != nil {
		return err
	}
	back.address.Store(&b.pod.HTTP)
	cpu, natsCPU := cpuSeconds(b.pod.PID()), cpuSeconds(b.nats.Process().PID())
	died := time.Now()
	b.other.Kill()
	b.other = nil
	if err := flow(func() bool { return back.over.Load() == int64(p.clients) || time.Since(died) > 2*time.Minute }); err != nil {
		return err
	}
	over := time.Now()
	took := over.Sub(died)
	cpu, natsCPU = cpuSeconds(b.pod.PID())-cpu, cpuSeconds(b.nats.Process().PID())-natsCPU
	if err := flow(func() bool { return time.Since(over) >= 5*time.Second }); err != nil {
		return err
	}
	lostErr := wait(ctx, "events arrived at those who came back", &back.received, int64(sent))
	back.why.Range(func(why, n any) bool {
		fmt.Printf("resume: refused %d times: %s\n", n.(*atomic.Int64).Load(), why)
		return true
	})
	mu.Lock()
	defer mu.Unlock()
	before, during := p99Of(samples, began, died), p99Of(samples, died, over)
	fmt.Printf("resume: %d clients of a dead pod back and resumed after %.1f s (%d refusals); %d events replayed, %.0f events/s; %d gaps; CPU %.1f s of the pod, %.1f s of NATS\n",
		p.clients, took.Seconds(), back.turned.Load(), back.replayed.Load(), float64(back.replayed.Load())/took.Seconds(), back.gaps.Load(), cpu, natsCPU)
	fmt.Printf("resume: p99 of the %d others at %d events/s in all: %s before, %s during: ratio %.2f; %s after\n",
		p.agents, p.rate, before, during, float64(during)/float64(before), p99Of(samples, over, time.Now()))
	if back.gaps.Load() > 0 {
		fmt.Print(outcomes(ctx, b.pod))
	}
	return lostErr
}

// alternate returns a function that publishes at p.rate, every second event for a client that stays, until it is told to end.
func (b *bench) alternate(p plan, back *returners, sent *int) func(end func() bool) error {
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
					agent, n = back.all[*sent%p.clients].agent, *sent
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
	if _, err := b.js.PublishAsync("wa.acme."+agent+".chats", payload(agent, n, size), jetstream.WithStallWait(time.Minute)); err != nil {
		return fmt.Errorf("publish event %d: %w", n, err)
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
