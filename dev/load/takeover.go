package main

import (
	"context"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"time"

	"daisi-ws-service/dev/rig"
)

// takeOver measures from the dial of a newcomer to its ready, while the session is on the other pod: which lives; which was killed a
// moment ago and has its lease still, for newcomers who come all at once and for those who come later, one by one; and whose lease has
// ended. Nothing answers at the address of the killed pod, so nobody waits for it.
func takeOver(ctx context.Context, b *bench, p plan) error {
	const killed = 50 // newcomers after the kill, three times
	var err error
	if b.other, err = b.startPod(ctx, b.bin, "load-2", b.nats.URL()); err != nil {
		return err
	}
	c, err := connect(ctx, p.taken+3*killed, func(int) *rig.Service { return b.other }, func(int, []byte) {})
	if err != nil {
		return err
	}
	defer c.close()
	oneByOne := func(what string, from, n int) error {
		took := make([]time.Duration, n)
		for i := range took {
			var err error
			if took[i], err = newcomer(ctx, b.pod, agentID(from+i)); err != nil {
				return err
			}
		}
		printTimes(what, took)
		return nil
	}
	if err := oneByOne("from a living pod", 0, p.taken); err != nil {
		return err
	}
	b.other.Kill()
	b.other = nil
	atOnce := make([]time.Duration, killed)
	errs := make([]error, killed)
	var wg sync.WaitGroup
	for i := range killed {
		wg.Go(func() { atOnce[i], errs[i] = newcomer(ctx, b.pod, agentID(p.taken+i)) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	printTimes("from a killed pod before its lease has ended", atOnce)
	if err := oneByOne("from a killed pod before its lease has ended, later", p.taken+killed, killed); err != nil {
		return err
	}
	for n := int64(1); n > 0; time.Sleep(10 * time.Millisecond) {
		if n, err = b.rdb.Exists(ctx, "pod:load-2").Result(); err != nil {
			return fmt.Errorf("ask for the lease of the killed pod: %w", err)
		}
	}
	return oneByOne("from a killed pod after its lease has ended", p.taken+2*killed, killed)
}

// newcomer opens a socket, and closes it when it was ready.
func newcomer(ctx context.Context, pod *rig.Service, agent string) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	began := time.Now()
	c, err := dialAll(ctx, 1, func(int) (string, http.Header) { return socketOf(pod, agent) }, readReady, func(int, []byte) {})
	took := time.Since(began)
	if err == nil {
		c.close()
	}
	return took, err
}

func printTimes(what string, d []time.Duration) {
	slices.Sort(d)
	q := func(q float64) time.Duration { return d[int(q*float64(len(d)-1))].Round(10 * time.Microsecond) }
	fmt.Printf("takeover %s: %d newcomers ready after p50 %s, p99 %s, max %s\n", what, len(d), q(.5), q(.99), q(1))
}
