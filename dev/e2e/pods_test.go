package e2e

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// calm is for tests that are not about leases: on a machine that stands still for seconds, a pod must not lose its own and
// announce a gap.
const calm = "POD_LEASE=60s"

// startPods starts n pods at once; they know each other when it returns.
func startPods(w *harness.World, n int, settings ...string) []*harness.Pod {
	w.T.Helper()
	var pods []*harness.Pod
	for range n {
		pods = append(pods, w.Launch(settings...))
	}
	for _, p := range pods {
		p.WaitListening()
		p.WaitReady()
	}
	return pods
}

// behindProxy starts a pod that its peers reach through a proxy only.
func behindProxy(w *harness.World, settings ...string) (*harness.Pod, *rig.Proxy) {
	w.T.Helper()
	proxy := w.Proxy("")
	pod := w.Launch(append([]string{"SERVER_ADVERTISE_ADDRESS=" + proxy.Address()}, settings...)...)
	pod.WaitListening()
	proxy.Retarget(pod.GRPC)
	pod.WaitReady()
	return pod, proxy
}

// counts says how often each sequence has come to c.
func counts(c *harness.Client) map[uint64]int {
	got := map[uint64]int{}
	for _, m := range c.Events() {
		got[m.Seq]++
	}
	return got
}

// wantExactly waits for the events seqs and a pong behind them, and fails if one is missing or came twice, or if there is
// anything else in the inbox: another event, or a gap. Everything due to c must be settled before.
func wantExactly(c *harness.Client, seqs []uint64) {
	t := c.Pod.W.T
	t.Helper()
	harness.Eventually(t, harness.Patience, fmt.Sprintf("%d events for %s", len(seqs), c.Dial.User+c.Dial.Admin), func() bool {
		return len(counts(c)) >= len(seqs)
	})
	c.Send(map[string]any{"type": "ping"})
	c.TakeType("pong") // comes behind every event that was written before
	got := counts(c)
	for _, seq := range seqs {
		if got[seq] != 1 {
			t.Errorf("%s on %s got event %d %d times", c.Dial.User+c.Dial.Admin, c.Pod.ID, seq, got[seq])
		}
		delete(got, seq)
	}
	if len(got) > 0 {
		t.Errorf("%s on %s got events that are not its own: %v", c.Dial.User+c.Dial.Admin, c.Pod.ID, got)
	}
	c.Forget()
}

// forwarded is how many events a pod has sent to its peers.
func forwarded(p *harness.Pod) float64 { return p.Metric("dws_grpc_messages_sent_total") }

// pulled is how many deliveries a pod had from JetStream.
func pulled(p *harness.Pod) float64 { return p.Metric("dws_nats_messages_received_total") }

// TestEventsAcrossPods: users of one agent, and an admin, on three pods; whatever pod pulls an event, each of those whom it is
// for gets it once.
func TestEventsAcrossPods(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		const rounds = 80
		w := harness.New(t, harness.Settings(calm))
		pods := startPods(w, 3)
		ann := pods[0].Connect(as(harness.User("acme", "desk1", "ann")))
		bob := pods[1].Connect(as(harness.User("acme", "desk1", "bob")))
		cid := pods[2].Connect(as(harness.User("acme", "desk1", "cid")))
		eve := pods[2].Connect(as(harness.User("acme", "desk1", "eve")))
		dan := pods[1].Connect(as(harness.User("acme", "desk2", "dan")))
		root := pods[2].Connect(as(harness.Admin("root", "acme", "*")))
		other := pods[0].Connect(as(harness.Admin("other", "", "desk1")))
		ann.SelectChat("c1")
		bob.SelectChat("c1")
		cid.SelectChat("c2")
		dan.SelectChat("c1")
		due := map[*harness.Client][]uint64{}
		publish := func(seq uint64, to ...*harness.Client) {
			for _, c := range to {
				due[c] = append(due[c], seq)
			}
		}
		for range rounds {
			publish(w.Chat("acme", "desk1"), ann, bob, cid, eve)
			publish(w.Contact("acme", "desk1"), ann, bob, cid, eve)
			publish(w.Message("acme", "desk1", "c1"), ann, bob)
			publish(w.Message("acme", "desk1", "c2"), cid)
			publish(w.Message("acme", "desk1", "c3"))
			publish(w.Chat("acme", "desk2"), dan)
			publish(w.Message("acme", "desk2", "c1"), dan)
			publish(w.Agent("acme", "desk1"), root, other)
			publish(w.Agent("acme", "desk2"), root)
			publish(w.Agent("rival", "desk1"), other)
		}
		w.Settled()
		for c, seqs := range due {
			wantExactly(c, seqs)
		}
		for _, p := range pods {
			p.WantLedgers()
			if pulled(p) == 0 || forwarded(p) == 0 {
				t.Errorf("%s pulled %v events and forwarded %v: this proves little", p.ID, pulled(p), forwarded(p))
			}
			if n := ended(p, "no_owner") + ended(p, "shed") + ended(p, "expired"); n != 0 {
				t.Errorf("%s gave %v events up", p.ID, n)
			}
		}
	})
}

// TestSelectOnOnePodPulledByAnother: what is published after chat_selected reaches the socket, whatever pod pulls it, though a
// moment ago nobody wanted that chat. 1,000 rounds that went from pod to pod.
func TestSelectOnOnePodPulledByAnother(t *testing.T) {
	t.Parallel()
	const crossings = 1000
	w := harness.New(t, harness.Settings(calm, "WEBSOCKET_RATE_LIMIT=10000/s", "WEBSOCKET_RATE_BURST=10000"))
	pods := startPods(w, 2)
	type desk struct {
		*harness.Client
		agent string
		due   []uint64
	}
	var desks []*desk
	for i := range 6 {
		agent := fmt.Sprintf("desk%d", i)
		desks = append(desks, &desk{Client: pods[i%2].Connect(harness.User("acme", agent, "ann")), agent: agent})
	}
	crossed := func() float64 { return forwarded(pods[0]) + forwarded(pods[1]) }
	rounds := 0
	for ; crossed() < crossings; rounds++ {
		if rounds == crossings {
			t.Fatalf("after %d rounds only %v events went from pod to pod", rounds, crossed())
		}
		chat := fmt.Sprintf("chat.%d", rounds)
		var unwanted sync.WaitGroup
		for _, d := range desks {
			// Nobody wants it yet.
			unwanted.Go(func() { w.JS.Publish(t.Context(), w.Prefix+".acme."+d.agent+".messages."+chat, []byte("{}")) })
		}
		unwanted.Wait()
		w.Settled()
		for _, d := range desks {
			d.SelectChat(chat)
			seq := w.Message("acme", d.agent, chat)
			d.due = append(d.due, seq)
			d.WaitEvent(seq)
		}
	}
	w.Settled()
	for _, d := range desks {
		wantExactly(d.Client, nil) // each was waited for; there is no other
	}
	for _, p := range pods {
		p.WantLedgers()
		if n := p.Metric("dws_redelivered_total"); n != 0 {
			t.Errorf("%s: %v redeliveries", p.ID, n)
		}
	}
	t.Logf("%d events after a selection, %v of them from pod to pod", rounds*len(desks), crossed())
}

// TestAckWaitsForEveryPod: an event with owners on three pods, one of them stuck under the policy block: the others get
// it once and at once, JetStream keeps it unacked until the stuck one has it too.
func TestAckWaitsForEveryPod(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings(calm, "WEBSOCKET_DROP_POLICY=block", "WEBSOCKET_BUFFER_SIZE=4", "WEBSOCKET_BLOCK_TIMEOUT=300ms",
		"WEBSOCKET_WRITE_TIMEOUT=20s", "SERVER_SHUTDOWN_TIMEOUT=60s", "NATS_NAK_DELAY=200ms"))
	pods := startPods(w, 3)
	ann := pods[0].Connect(harness.User("acme", "desk1", "ann"))
	bob := pods[1].Connect(harness.User("acme", "desk1", "bob"))
	d := harness.User("acme", "desk1", "cid")
	d.RcvBuf = 4 << 10
	cid := pods[2].Connect(d)
	cid.Pause()
	big := []byte(`{"fill":"` + string(slices.Repeat([]byte{'x'}, 200<<10)) + `"}`)
	var due []uint64
	for len(due) < 60 && ended(pods[0], "nak_failed")+ended(pods[1], "nak_failed")+ended(pods[2], "nak_failed") == 0 {
		due = append(due, w.PublishRaw(w.Prefix+".acme.desk1.chats", big))
		for _, c := range []*harness.Client{ann, bob} {
			harness.Eventually(t, harness.Patience, "the sockets that read", func() bool { return len(c.Events()) >= len(due) })
		}
	}
	last := w.Message("acme", "desk1", "nobody.has.it") // acked at once
	due = append(due, w.Chat("acme", "desk1"))
	harness.Eventually(t, harness.Patience, "the events of the stuck socket to be refused again and again", func() bool {
		return ended(pods[0], "nak_failed")+ended(pods[1], "nak_failed")+ended(pods[2], "nak_failed") >= 4
	})
	if info := w.ConsumerInfo(); info.AckFloor.Stream >= last || info.NumAckPending == 0 {
		t.Errorf("a socket has not had its events, but JetStream says: %d pending, ack floor %d of %d", info.NumAckPending, info.AckFloor.Stream, last)
	}
	if cid.Ended() != nil {
		t.Fatalf("the stuck socket was closed: %+v", cid.Ended())
	}
	began := time.Now()
	cid.Resume()
	w.Settled()
	for _, c := range []*harness.Client{ann, bob, cid} {
		wantExactly(c, due)
	}
	t.Logf("%d events, all settled %v after the stuck socket read again", len(due), time.Since(began))
	for _, p := range pods {
		p.WantLedgers()
	}
}
