package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"daisi-ws-service/dev/rig"
)

// tally counts how often each event came.
type tally struct {
	mu         sync.Mutex // guards both
	seen       []uint8
	duplicates int
}

func (t *tally) note(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n == int64(len(t.seen)) {
		return // of the warm-up
	}
	if t.seen[n]++; t.seen[n] > 1 {
		t.duplicates++
	}
}

// missing counts the events that did not come: of clients that were told so by a gap, and of the others.
func (t *tally) missing(c *crowd) (announced, lost int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i, n := range t.seen {
		switch {
		case n > 0:
		case c.gaps[i%len(c.gaps)].Load():
			announced++
		default:
			lost++
		}
	}
	return announced, lost
}

// throughput pauses the consumer, publishes, and measures from its resumption until nothing is pending.
func throughput(ctx context.Context, b *bench, p plan) error {
	t := &tally{seen: make([]uint8, p.events)}
	c, err := connect(ctx, p.agents, func(int) *rig.Service { return cmp.Or(b.other, b.pod) }, func(_ int, m []byte) { t.note(field(m, "n")) })
	if err != nil {
		return err
	}
	defer c.close()
	b.cut()
	if err := b.fill(ctx, c, p); err != nil {
		return err
	}
	commands, _ := b.redisCommands(ctx) // an in-process Redis does not count
	cpu := cpuSeconds(b.pod.PID())
	took, err := b.drain(ctx)
	if err != nil {
		return err
	}
	cpu = cpuSeconds(b.pod.PID()) - cpu
	commandsAfter, _ := b.redisCommands(ctx)
	// What is acked was written, but the clients here may not have read it yet.
	for wait := time.Now().Add(5 * time.Second); c.received.Load() < int64(p.agents+p.events) && time.Now().Before(wait); {
		time.Sleep(10 * time.Millisecond)
	}
	announced, lost := t.missing(c)
	fmt.Printf("throughput%s: %d events of %d bytes to %d agents in %.2f s: %.0f events/s, pulling pod CPU %.2f s (%.1f us/event), "+
		"%.4f Redis commands/event, lost %d, announced as a gap %d, duplicates %d\n",
		across(p), p.events, p.size, p.agents, took.Seconds(), float64(p.events)/took.Seconds(), cpu, cpu/float64(p.events)*1e6,
		float64(commandsAfter-commands)/float64(p.events), lost, announced, t.duplicates)
	if lost+announced > 0 {
		for _, pod := range []*rig.Service{b.pod, b.other} {
			if pod != nil {
				fmt.Print(outcomes(ctx, pod))
			}
		}
	}
	if lost > 0 {
		return fmt.Errorf("%d events did not arrive, and no gap says so", lost)
	}
	return nil
}

// fill pauses the consumer and publishes everything. One event for each agent is delivered before: the pods' connections are
// open then, as those of pods that run for long are. What the server gave to the pod whose way was cut, just before it noticed,
// comes again after ACK_WAIT.
func (b *bench) fill(ctx context.Context, c *crowd, p plan) error {
	for i := range p.agents {
		if err := b.publishTo(agentID(i), p.events, p.size); err != nil {
			return err
		}
	}
	for wait := time.Now().Add(time.Minute); c.received.Load() < int64(p.agents); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(wait) {
			return fmt.Errorf("%d of %d events of the warm-up arrived", c.received.Load(), p.agents)
		}
	}
	if _, err := b.stream.PauseConsumer(ctx, "ws_fanout", time.Now().Add(10*time.Minute)); err != nil {
		return fmt.Errorf("pause the consumer: %w", err)
	}
	for i := range p.events {
		if err := b.publishTo(agentID(i%p.agents), i, p.size); err != nil {
			return err
		}
	}
	select {
	case <-b.js.PublishAsyncComplete():
		return nil
	case <-time.After(2 * time.Minute):
		return errors.New("the stream did not take the events within 2 minutes")
	}
}

// drain resumes the consumer and says how long it took until nothing was pending.
func (b *bench) drain(ctx context.Context) (time.Duration, error) {
	began := time.Now()
	if _, err := b.stream.ResumeConsumer(ctx, "ws_fanout"); err != nil {
		return 0, fmt.Errorf("resume the consumer: %w", err)
	}
	for {
		left, err := b.pending(ctx)
		if err != nil || left == 0 {
			return time.Since(began), err
		}
		if time.Since(began) > 3*time.Minute {
			return 0, fmt.Errorf("%d events still pending after 3 minutes", left)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func across(p plan) string {
	if p.wrong {
		return " across pods"
	}
	return ""
}

// outcomes are the lines of a pod's /metrics that say what became of events, for who wants to know why some are missing.
func outcomes(ctx context.Context, pod *rig.Service) string {
	req, err := http.NewRequestWithContext(ctx, "GET", pod.Base()+"/metrics", nil)
	if err != nil {
		return err.Error() + "\n"
	}
	resp, err := pod.Client().Do(req)
	if err != nil {
		return err.Error() + "\n"
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error() + "\n"
	}
	told := []string{"dws_events_total", "dws_targets_total", "dws_gaps_total", "dws_resume_gaps_total", "dws_websocket_messages_dropped_total"}
	all := ""
	for line := range strings.Lines(string(body)) {
		name, _, _ := strings.Cut(line, "{")
		name, _, _ = strings.Cut(name, " ")
		if slices.Contains(told, name) && !strings.HasSuffix(line, " 0\n") {
			all += "  " + pod.Name + " " + line
		}
	}
	return all
}
