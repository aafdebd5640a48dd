// Command chaos proves that nothing is lost: three pods, NATS and Redis, clients that do what docs/protocol.md tells them
// to, a publisher that remembers what was acknowledged, and faults drawn from a seed. It ends with status 1 when a client
// missed an event that it was due, or another promise of docs/guarantees.md was broken: each line "BAD" names one.
//
//	make chaos SEED=7 DURATION=60s POLICY=block
//
// The same seed makes the same faults at the same times; what the machine makes of them differs from run to run. No verdict
// depends on how fast it is. DWS_RACE=1 builds the service with the race detector.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"
)

// plan is what the flags ask for.
type plan struct {
	seed     uint64
	duration time.Duration
	clients  int
	rate     int
	policy   string
	kinds    []string
	ackWait  time.Duration
	settle   time.Duration
	keep     bool
}

func main() {
	var p plan
	flag.Uint64Var(&p.seed, "seed", 1, "what the faults are drawn from")
	flag.DurationVar(&p.duration, "duration", 60*time.Second, "how long there are events and faults")
	flag.IntVar(&p.clients, "clients", 500, "sockets of users; two admins come on top")
	flag.IntVar(&p.rate, "rate", 200, "events per second")
	flag.StringVar(&p.policy, "policy", "drop_oldest", "drop_oldest or block")
	faults := flag.String("faults", strings.Join(kinds, ","), "kinds of faults to draw from")
	flag.DurationVar(&p.ackWait, "ack-wait", 9*time.Second, "ACK_WAIT of the pods")
	flag.DurationVar(&p.settle, "settle", 5*time.Minute, "how long, at most, the clients are left until all is at rest")
	flag.BoolVar(&p.keep, "keep", false, "keep the logs of a run that passed, too")
	flag.Parse()
	if *faults != "" {
		p.kinds = strings.Split(*faults, ",")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	lost, err := run(ctx, p)
	if err != nil {
		fmt.Fprintln(os.Stderr, "chaos:", err)
	}
	if err != nil || lost {
		os.Exit(1)
	}
}

// run is one whole run. It reports whether the verdict was bad; err is for what kept it from one.
func run(ctx context.Context, p plan) (bad bool, err error) {
	list, err := schedule(p)
	if err != nil {
		return false, err
	}
	w, err := newWorld(ctx, p)
	if w != nil {
		defer func() { w.close(bad || err != nil || p.keep) }()
	}
	if err != nil {
		return false, err
	}
	fmt.Printf("seed %d, %s, %d clients, %d events/s, %s; logs in %s\n", p.seed, p.duration, p.clients, p.rate, p.policy, w.dir)
	crowd := newCrowd(w, p)
	defer crowd.stop()
	if err := crowd.allReady(ctx, 2*time.Minute); err != nil {
		return false, err
	}
	pub := newPublisher(w, crowd, p)
	w.began = time.Now()
	pub.start(ctx)
	makeFaults(ctx, w, crowd, pub, list)
	wait(ctx, time.Until(w.began.Add(p.duration)))
	pub.stop()
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	w.say("healed; %d publishes acknowledged, %d in doubt", len(pub.acked()), pub.doubtful())
	v := settle(ctx, w, crowd, pub, list)
	crowd.stop()
	return v.report(), ctx.Err()
}

// wait returns after d, or when ctx ends.
func wait(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(max(d, 0)):
	case <-ctx.Done():
	}
}
