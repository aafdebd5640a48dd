package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"daisi-ws-service/dev/rig"
)

// payload is a published JSON object of about size bytes that names its number and when it was published.
func payload(agent string, n, size int) []byte {
	b := fmt.Appendf(nil, `{"event_id":"%d","company_id":"acme","agent_id":"%s","row_data":{"n":%d,"at":%d,"text":"`, n, agent, n, time.Now().UnixNano())
	return append(append(b, bytes.Repeat([]byte("x"), max(0, size-len(b)-3))...), `"}}`...)
}

// field reads the number behind name in a message, which payload wrote.
func field(m []byte, name string) int64 {
	_, rest, _ := bytes.Cut(m, []byte(`"`+name+`":`))
	end := bytes.IndexFunc(rest, func(r rune) bool { return r < '0' || r > '9' })
	n, _ := strconv.ParseInt(string(rest[:max(end, 0)]), 10, 64)
	return n
}

// latency publishes at a steady rate and measures from just before the publish until the client has the message.
func latency(ctx context.Context, b *bench, p plan) error {
	var mu sync.Mutex
	var all [2][]time.Duration // of agents with a socket at the pod that pulls, and at the other
	group := func(i int) int {
		if p.wrong {
			return i % 2
		}
		return 0
	}
	at := func(i int) *rig.Service { return []*rig.Service{b.pod, b.other}[group(i)] }
	c, err := connect(ctx, p.agents, at, func(i int, m []byte) {
		d := time.Duration(time.Now().UnixNano() - field(m, "at"))
		mu.Lock()
		all[group(i)] = append(all[group(i)], d)
		mu.Unlock()
	})
	if err != nil {
		return err
	}
	defer c.close()
	b.cut()
	total := p.rate * p.seconds
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	began := time.Now()
	for i := 0; i < total; {
		<-tick.C
		for due := int(time.Since(began).Seconds() * float64(p.rate)); i < min(due, total); i++ {
			if err := b.publishTo(agentID(i%p.agents), i, p.size); err != nil {
				return err
			}
		}
	}
	deadline := time.Now().Add(10 * time.Second)
	for c.received.Load() < int64(total) && time.Now().Before(deadline) {
		time.Sleep(10 * time.Millisecond)
	}
	mu.Lock()
	defer mu.Unlock()
	if n := len(all[0]) + len(all[1]); n < total {
		return fmt.Errorf("%d of %d events arrived", n, total)
	}
	for i, where := range []string{"here", "across pods"} {
		if d := all[i]; len(d) > 0 {
			slices.Sort(d)
			q := func(q float64) time.Duration { return d[int(q*float64(len(d)-1))].Round(10 * time.Microsecond) }
			fmt.Printf("latency, %s: %d events/s in all for %d s, %d agents: p50 %s, p90 %s, p99 %s, p99.9 %s, max %s\n",
				where, p.rate, p.seconds, p.agents, q(.5), q(.9), q(.99), q(.999), q(1))
		}
	}
	return nil
}

// memory measures the pod.
func memory(ctx context.Context, b *bench, p plan) error {
	return idleMemory(ctx, b.pod.Process, p, func() (*crowd, error) {
		c, err := connect(ctx, p.sockets, func(int) *rig.Service { return b.pod }, func(int, []byte) {})
		if err == nil && (c.deflate.Load() > 0) != (p.deflate != "disabled") {
			return c, fmt.Errorf("%d sockets compress", c.deflate.Load())
		}
		return c, err
	})
}

// idleMemory reads a process' resident size before any socket, and again some time after the last connect.
func idleMemory(ctx context.Context, process *rig.Process, p plan, connect func() (*crowd, error)) error {
	before := process.Resident()
	began := time.Now()
	c, err := connect()
	if c != nil {
		defer c.close()
	}
	if err != nil {
		return err
	}
	took := time.Since(began)
	cpu := cpuSeconds(process.PID())
	select {
	case <-time.After(p.settle):
	case <-ctx.Done():
		return ctx.Err()
	}
	after := process.Resident()
	fmt.Printf("%d sockets in %.1f s; resident %d KiB before, %d KiB %s after: %.2f KiB per socket; CPU idle %.2f %% of a core\n",
		p.sockets, took.Seconds(), before, after, p.settle, float64(after-before)/float64(p.sockets),
		100*(cpuSeconds(process.PID())-cpu)/p.settle.Seconds())
	return nil
}

// cpuSeconds is user and system time of a process; a tick is 10 ms on Linux.
func cpuSeconds(pid int) float64 {
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, _ := strings.Cut(string(stat), ") ")
	f := strings.Fields(rest)
	if len(f) < 13 {
		return 0
	}
	user, _ := strconv.Atoi(f[11])
	system, _ := strconv.Atoi(f[12])
	return float64(user+system) / 100
}
