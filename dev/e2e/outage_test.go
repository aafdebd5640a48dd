package e2e

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// outage is three pods under load, a hundred users, every other of whom keeps positions, and a Redis that stops to answer.
type outage struct {
	*harness.World
	pods  []*harness.Pod
	users []*harness.Follower
	moved func(i int) bool // whose pod does not outlive it
	probe *harness.Client  // of an agent of its own, on the last pod
}

func stopRedis(x *outage)     { x.Redis.Process().Signal(syscall.SIGSTOP) }
func continueRedis(x *outage) { x.Redis.Process().Signal(syscall.SIGCONT) }
func killRedis(x *outage)     { x.Redis.Kill() }

func restartRedis(x *outage) {
	x.T.Helper()
	if err := x.Redis.Restart(); err != nil {
		x.T.Fatal(err)
	}
}

func restartRedisEmpty(x *outage) {
	x.T.Helper()
	if err := x.Redis.LoseData(); err != nil {
		x.T.Fatal(err)
	}
	restartRedis(x)
}

// TestRedisOutage: Redis does not answer for a while. Events reach their users all the time, nobody misses one, and users whose pod
// lives get each exactly once, also those who never resume. An outage shorter than the lease costs no gap, a longer one or
// another instance one gap for each socket. Nothing is settled without Redis; soon after its return all is.
func TestRedisOutage(t *testing.T) {
	harness.NeedRealRedis(t)
	for _, tc := range []struct {
		name       string
		begin, end func(*outage)
		lasts      time.Duration
		gaps       int
		midst      func(*outage) // happens meanwhile
	}{
		{"300 ms", stopRedis, continueRedis, 300 * time.Millisecond, 0, nil},
		{"3 s", stopRedis, continueRedis, 3 * time.Second, 0, nil},
		{"9 s", stopRedis, continueRedis, 9 * time.Second, 1, nil},
		{"killed, data kept", killRedis, restartRedis, time.Second, 1, nil},
		{"killed, data lost", killRedis, restartRedisEmpty, time.Second, 1, nil},
		{"a pod is killed", stopRedis, continueRedis, 3 * time.Second, 0, func(x *outage) { x.pods[0].Kill() }},
		{"a pod drains", stopRedis, continueRedis, 3 * time.Second, 0, func(x *outage) { x.pods[0].Terminate() }},
		{"a pod starts", killRedis, restartRedis, 3 * time.Second, 1, func(x *outage) { x.pods = append(x.pods, x.Launch()) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			rate := 300
			if harness.Race {
				rate = 60 // and one case after the other: four processes in each are all that the machine takes
			} else {
				t.Parallel()
			}
			x := openOutage(t)
			first, last := x.pods[0], x.pods[2]
			flow := x.Flow(rate, func(i int) feed.Event {
				return feed.Chat("acme", fmt.Sprint("desk", i%len(x.users)), "628111@c.us", "hi", 1)
			})
			flow.WaitSent(rate)
			tc.begin(x)
			began := time.Now()
			if tc.lasts >= time.Second {
				notReady(last, "redis")
				x.wantNobodyNew(last)
			}
			unsettled := x.LastSeq() // came while Redis did not answer
			if tc.midst != nil {
				x.moved = func(i int) bool { return i%3 == 0 && tc.gaps == 0 }
				tc.midst(x)
			}
			flow.WaitSent(int(float64(rate) * max(0, tc.lasts-time.Since(began)).Seconds()))
			if info := x.ConsumerInfo(); tc.lasts >= time.Second && info.AckFloor.Stream >= unsettled {
				t.Errorf("event %d was settled without Redis: the ack floor is %d", unsettled, info.AckFloor.Stream)
			}
			before, acked := x.LastSeq(), ended(last, "delivered")
			tc.end(x)
			back := time.Now()
			x.wantNewcomer(last, back)
			harness.Eventually(t, harness.Patience, "events to be settled again", func() bool { return ended(last, "delivered") > acked })
			if took := time.Since(back); took > 10*time.Second && !harness.Race {
				t.Errorf("events were settled again only %v after Redis was back", took)
			}
			x.SettledTo(before)
			settled := time.Now()
			flow.WaitSent(rate)
			sent := flow.Stop()
			if x.moved(0) {
				first.WantExit(map[string]int{"a pod is killed": -1}[tc.name], harness.Patience)
				x.pods = x.pods[1:]
			}
			x.Settled()
			x.wantAll(sent, tc.gaps)
			x.wantPrompt(sent, began.Add(300*time.Millisecond), settled)
			for _, p := range x.pods {
				p.WaitListening()
				p.WaitReady()
				p.WantLedgers()
			}
		})
	}
}

// openOutage starts pods and users. The user of desk i is on pod i modulo 3, and goes to the next one if that ends.
func openOutage(t *testing.T) *outage {
	// What JetStream heard nothing about comes again after 8 s: within the longest outage, too.
	w := harness.New(t, harness.Settings("NATS_ACK_WAIT=8s", "PEER_TIMEOUT=1s", "WEBSOCKET_WRITE_TIMEOUT=4s", "SERVER_DRAIN_SPREAD=500ms", "RESUME_MAX_EVENTS=100000", "LOG_LEVEL=debug"))
	x := &outage{World: w, pods: startPods(w, 3), moved: func(int) bool { return false }}
	for i, d := range agents(100) {
		if i%2 == 0 {
			d = d.Positions()
		}
		x.users = append(x.users, w.Follow(d, x.pods[i%3], x.pods[(i%3+1)%3]))
	}
	x.probe = x.pods[2].Connect(harness.User("acme", "probe", "ann"))
	return x
}

// wantNobodyNew expects that a pod without Redis lets nobody in, and that chats are selected there as ever.
func (x *outage) wantNobodyNew(p *harness.Pod) {
	x.T.Helper()
	if a := p.WantRefused(harness.User("acme", "new", "eve"), http.StatusServiceUnavailable, "Unavailable"); a.Header.Get("Retry-After") == "" {
		x.T.Error("503 without Retry-After")
	}
	x.probe.SelectChat("chat.one")
	x.probe.WaitEvent(x.Message("acme", "probe", "chat.one"))
}

// wantNewcomer expects that somebody new is let in within 3 s of Redis' return.
func (x *outage) wantNewcomer(p *harness.Pod, back time.Time) {
	x.T.Helper()
	p.Connect(harness.User("acme", "new", "eve"))
	if took := time.Since(back); took > 3*time.Second && !harness.Race {
		x.T.Errorf("nobody was let in for %v after Redis was back", took)
	}
}

// due are the sequences for user i.
func (x *outage) due(sent []harness.Published, i int) (seqs []uint64) {
	for _, p := range sent {
		if p.Index%len(x.users) == i {
			seqs = append(seqs, p.Seq)
		}
	}
	return seqs
}

// wantAll expects that everyone has had everything, exactly once if nothing was replayed and the socket stayed, and was told of so many
// gaps.
func (x *outage) wantAll(sent []harness.Published, gaps int) {
	x.T.Helper()
	for i, f := range x.users {
		wantHad(x.T, f, x.due(sent, i))
		wantNoLoad(x.T, f)
		got := f.Gaps()
		if x.moved(i) {
			continue
		}
		for seq, n := range f.Got() {
			if replays := i%2 == 0 && gaps > 0; n != 1 && !replays {
				x.T.Errorf("event %d came %d times to user%d", seq, n, i)
			}
		}
		if len(got) != gaps || slices.ContainsFunc(got, func(r harness.Reply) bool { return r.Reason != "owner" }) {
			x.T.Errorf("user%d was told of gaps %+v, want %d for the reason owner", i, got, gaps)
		}
		if ends := f.Ends(); len(ends) > 0 {
			x.T.Errorf("the socket of user%d has ended: %+v", i, ends)
		}
	}
}

// wantPrompt expects that what was published between two moments, while nothing was settled, came at once.
func (x *outage) wantPrompt(sent []harness.Published, from, to time.Time) {
	x.T.Helper()
	var took []time.Duration
	for i, f := range x.users {
		came := f.Came()
		for _, p := range sent {
			if p.Index%len(x.users) == i && !x.moved(i) && p.At.After(from) && p.At.Before(to) {
				took = append(took, came[p.Seq].Sub(p.At))
			}
		}
	}
	if len(took) == 0 {
		return
	}
	p50, p99, slowest := percentile(took, 50), percentile(took, 99), took[len(took)-1]
	x.T.Logf("%d events without Redis: p50 %v, p99 %v, slowest %v", len(took), p50, p99, slowest)
	// What waits for Redis waits for a lease more, 6 s; what a pod had that was killed, for ACK_WAIT.
	if limit := 4 * time.Second; !harness.Race && (p99 > limit || slowest > limit && !x.moved(0)) {
		x.T.Errorf("events took %v, the slowest %v, want %v at the most", p99, slowest, limit)
	}
}

// TestShareFullWithoutRedis: a pod takes no more than its share while Redis does not answer, and says so. The rest waits in the stream,
// nobody is closed or told of a gap for it, and all comes once Redis answers.
func TestShareFullWithoutRedis(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings("NATS_MAX_ACK_PENDING=100", "NATS_PREFETCH=10", "NATS_PARKED_BUDGET=10"))
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	const share, all = 50, 120
	w.Redis.Process().Signal(syscall.SIGSTOP)
	var seqs []uint64
	for range all {
		seqs = append(seqs, w.Chat("acme", "desk1"))
	}
	pod.WantLine("share is full of events that wait for Redis")
	harness.Eventually(t, harness.Patience, "/ready to say so", func() bool {
		return strings.Contains(string(pod.Do("GET", "/ready", nil, nil).Body), "consumer is waiting for Redis to say who owns agents")
	})
	if n := pod.Metric("dws_owner_unanswered"); n != share {
		t.Errorf("%v events wait for Redis, want %d", n, share)
	}
	if n := len(ann.Events()); n != share {
		t.Errorf("%d events came, want those of the share, %d", n, share)
	}
	w.Redis.Process().Signal(syscall.SIGCONT)
	w.Settled()
	if others := ann.Others(); len(others) > 0 {
		t.Errorf("the client was told %s", others[0].Raw)
	}
	wantExactly(ann, seqs)
	pod.WaitReady()
	if n := pod.Metric("dws_owner_unanswered"); n != 0 {
		t.Errorf("%v events wait for Redis still", n)
	}
	pod.WantLedgers()
}
