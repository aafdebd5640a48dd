package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"daisi-ws-service/dev/feed"
)

// record is a publish that JetStream has acknowledged.
type record struct {
	seq         uint64
	agent, what string // of the subject: what is chats, contacts, agents or messages.<chat>
	sent        time.Time
	acked       time.Time
}

// publisher publishes at a rate and remembers what was acknowledged.
type publisher struct {
	w      *world
	agents int
	rate   int
	until  time.Time // events of absent agents until then: the end does not wait for their time to run out
	end    chan struct{}
	work   chan feed.Event // closed by its only sender
	wg     sync.WaitGroup

	mu      sync.Mutex // guards the rest
	records []record
	doubt   int
}

func newPublisher(w *world, cr *crowd, p plan) *publisher {
	return &publisher{w: w, agents: cr.agents, rate: p.rate, until: time.Now().Add(max(p.duration/4, p.duration-10*time.Second)), end: make(chan struct{}), work: make(chan feed.Event)}
}

// start publishes until stop. While NATS is away its workers wait, and what was due is not published at all.
func (p *publisher) start(ctx context.Context) {
	for range 8 {
		p.wg.Go(func() {
			for ev := range p.work {
				p.publish(ctx, ev)
			}
		})
	}
	p.wg.Go(func() {
		defer close(p.work)
		tick := time.NewTicker(time.Second / time.Duration(p.rate))
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				p.work <- p.draw()
			case <-p.end:
				return
			case <-ctx.Done():
				return
			}
		}
	})
}

// draw is the next event: mostly for agents with users, some for agents that have none.
func (p *publisher) draw() feed.Event {
	agent, chat := fmt.Sprintf("agent-%d", rand.IntN(p.agents)), fmt.Sprintf("chat-%d", rand.IntN(chats))
	if time.Now().Before(p.until) && rand.IntN(30) == 0 {
		agent = fmt.Sprintf("absent-%d", rand.IntN(5))
	}
	switch n := rand.IntN(10); {
	case n < 4:
		return feed.Chat("acme", agent, chat, feed.Text(), n)
	case n < 5:
		return feed.Contact("acme", agent, "c@us")
	case n < 9:
		return feed.Message("acme", agent, chat, feed.Text(), false)
	default:
		return feed.Agent("acme", agent, "open")
	}
}

func (p *publisher) publish(ctx context.Context, ev feed.Event) {
	within, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	sent := time.Now()
	ack, err := p.w.js.Publish(within, "wa."+ev.Subject, ev.Payload)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.doubt++
		return
	}
	agent, what, _ := strings.Cut(strings.TrimPrefix(ev.Subject, "acme."), ".")
	p.records = append(p.records, record{ack.Sequence, agent, what, sent, time.Now()})
}

// burst is more than the kernel holds for a socket that does not read: some of it waits in the socket's ring, which may be
// too small for it.
func (p *publisher) burst(ctx context.Context, agent string) {
	text := strings.Repeat("a long message ", 200)
	for range 30 + rand.IntN(70) {
		p.publish(ctx, feed.Chat("acme", agent, "chat-0", text, 1))
	}
}

func (p *publisher) stop() {
	close(p.end)
	p.wg.Wait()
}

func (p *publisher) acked() []record {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.records
}

func (p *publisher) doubtful() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.doubt
}
