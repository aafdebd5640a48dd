package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// bothClients runs a test once with each client library; as makes a Dial one of that library.
func bothClients(t *testing.T, test func(t *testing.T, as func(harness.Dial) harness.Dial)) {
	for name, gorilla := range map[string]bool{"coder": false, "gorilla": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, func(d harness.Dial) harness.Dial { d.Gorilla = gorilla; return d })
		})
	}
}

// wantAtRest waits until JetStream has an answer for everything and the pod's ledgers balance, and holds its figures
// against those expected, by outcome of deliveries.
func wantAtRest(p *harness.Pod, outcomes map[string]float64) {
	p.W.T.Helper()
	p.W.Settled()
	p.WantLedgers()
	m := p.Metrics()
	for outcome, n := range outcomes {
		if got := m.Sum("dws_events_total", `outcome="`+outcome+`"`); got != n {
			p.W.T.Errorf("%v deliveries ended as %s, want %v", got, outcome, n)
		}
	}
	if got := m.Sum("dws_events_in_hand"); got != 0 {
		p.W.T.Errorf("%v deliveries in hand at rest", got)
	}
	if i := p.W.ConsumerInfo(); i.NumAckPending != 0 || i.NumPending != 0 || i.AckFloor.Stream != p.W.LastSeq() {
		p.W.T.Errorf("JetStream at rest: %d ack pending, %d pending, ack floor %d of %d", i.NumAckPending, i.NumPending, i.AckFloor.Stream, p.W.LastSeq())
	}
}

// TestEventsReachTheirOwners: every socket gets what is its own, in order, and nothing of another chat, agent or company.
func TestEventsReachTheirOwners(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		connect := func(company, agent, user string) *harness.Client {
			return pod.Connect(as(harness.User(company, agent, user)))
		}
		ann, bob, cid := connect("acme", "desk1", "ann"), connect("acme", "desk1", "bob"), connect("acme", "desk1", "cid")
		dan, eve, fay := connect("acme", "desk2", "dan"), connect("other", "desk1", "eve"), connect("acme", "desk1x", "ann")
		ann.SelectChat("c1")
		bob.SelectChat("c2")
		dan.SelectChat("c1")
		eve.SelectChat("c1")
		fay.SelectChat("c1")

		chat, contact := w.Chat("acme", "desk1"), w.Contact("acme", "desk1")
		m1, m2 := w.Message("acme", "desk1", "c1"), w.Message("acme", "desk1", "c2")
		w.Message("acme", "desk1", "c3")   // nobody has selected it
		w.Message("acme", "desk1", "c1.x") // nor a chat whose name begins like another's
		w.Agent("acme", "desk1")           // no admin is there
		other, others := w.Chat("acme", "desk2"), w.Message("other", "desk1", "c1")

		want := map[*harness.Client][]uint64{
			ann: {chat, contact, m1}, bob: {chat, contact, m2}, cid: {chat, contact}, dan: {other}, eve: {others}, fay: nil,
		}
		wantAtRest(pod, map[string]float64{"delivered": 6, "unselected": 3})
		if got := pod.Metric("dws_targets_total", `outcome="written"`); got != 10 {
			t.Errorf("%v events written, want 10", got)
		}
		kinds := map[uint64]string{chat: "chat", contact: "contact", m1: "message", m2: "message", other: "chat", others: "message"}
		for c, seqs := range want {
			for _, seq := range seqs {
				if m := c.WantEvent(seq); m.EventType != kinds[seq] || m.Replay {
					t.Errorf("event %d came as %.100s, want %s", seq, m.Raw, kinds[seq])
				}
			}
		}
		for c := range want {
			if slices.Contains([]*harness.Client{ann, bob, cid}, c) {
				continue // three sockets of one agent: one marker for all, below
			}
			c.WantNothingElse()
		}
		marker := w.Contact("acme", "desk1")
		for _, c := range []*harness.Client{ann, bob, cid} {
			c.WantEvent(marker)
		}
	})
}

// TestPayloadIsUntouched: the payload is what was published, byte for byte, however it is written.
func TestPayloadIsUntouched(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		c.SelectChat("c.1")
		payloads := []string{
			`{}`,
			"{ \"a\" :\t1.0e+02,\r\n\"a\":2 }",
			`{"z":1,"a":123456789012345678901234567890.10,"m":-0}`,
			`{"html":"<b>&amp;</b>\u003c\/","esc":"\u00e9\ud83d\ude00\ud800","raw":"é😀` + "\u2028\u2029\x7f" + `"}`,
			`{"nested":{"type":"ready","payload":{}},"list":[[],{},null,true,"}"]}`,
			" \n" + `{"blanks":"around"}` + "\t\r\n ",
			string(feed.Message("acme", "desk1", "c.1", "hello 📦", true).Payload),
			`{"long":"` + strings.Repeat("0123456789abcdef", 8<<10) + `"}`,
		}
		for _, n := range []int{125, 126, 65535, 65536} { // around where a frame's header grows, whatever stands around the payload
			for d := -70; d <= 10; d++ {
				payloads = append(payloads, `{"n":"`+strings.Repeat("x", max(0, n+d))+`"}`)
			}
		}
		for i, p := range payloads {
			subject := []string{"chats", "contacts", "messages.c.1"}[i%3]
			seq := w.PublishRaw(w.Prefix+".acme.desk1."+subject, []byte(p))
			if m := c.WaitEvent(seq); !strings.HasSuffix(m.Raw, `"payload":`+p+"}") {
				t.Errorf("published %.200q, got %.300q", p, m.Raw)
			}
		}
		wantAtRest(pod, map[string]float64{"delivered": float64(len(payloads))})
	})
}

// TestReadyIsExact: an event whose publish was acknowledged after the client had read ready reaches it. Each round
// begins with an event of that agent that finds nobody, so that "nobody" is what the pod remembers as the client comes;
// that event comes as well, after newer ones, because it is redelivered.
func TestReadyIsExact(t *testing.T) {
	t.Parallel()
	const rounds = 300
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=400ms", "NATS_PARKED_BUDGET=500"))
	pod := w.Start()
	type published struct {
		seq uint64
		at  time.Time
	}
	var log []published
	publish := func(agent string) uint64 {
		seq := w.Chat("acme", agent)
		log = append(log, published{seq, time.Now()})
		return seq
	}
	early := map[*harness.Client]uint64{}
	for i := range rounds {
		agent := fmt.Sprintf("desk%d", i)
		before := publish(agent)
		d := harness.User("acme", agent, "ann")
		d.Gorilla = i%2 == 1
		dialed := time.Now()
		c := pod.Connect(d)
		last := log[len(log)-1].seq
		seq := publish(agent)
		c.WaitEvent(seq)
		early[c] = before
		if c.Ready.Seq > last {
			t.Errorf("round %d: ready says %d, the stream's last was %d", i, c.Ready.Seq, last)
		}
		for _, p := range log {
			if dialed.Sub(p.at) > time.Second && c.Ready.Seq < p.seq {
				t.Fatalf("round %d: ready says %d, more than 1 s after %d was published", i, c.Ready.Seq, p.seq)
			}
		}
	}
	for c, seq := range early {
		c.WaitEvent(seq)
	}
	wantAtRest(pod, map[string]float64{"delivered": 2 * rounds, "no_owner": 0, "expired": 0, "shed": 0})
	if n := pod.Metric("dws_events_total", `outcome="nak_no_owner"`); n == 0 {
		t.Error("no event found nobody: the rounds proved nothing about that")
	}
}

// TestReconnectIsExact: the same user leaves and comes back again and again, by every way to leave, and each time gets what is
// published once ready has come; the claim in Redis stands each time, whatever release was still under way.
func TestReconnectIsExact(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		const rounds = 150
		w := harness.New(t)
		pod := w.Start()
		rdb := w.RedisClient()
		for i := range rounds {
			c := pod.Connect(as(harness.User("acme", "desk1", "ann")))
			c.SelectChat("c1")
			// The release of the socket before may still be on its way; its claim has another name.
			harness.Eventually(t, harness.Patience, "one claim of the pod", func() bool {
				members, err := rdb.SMembers(t.Context(), "route:acme:desk1").Result()
				return err == nil && len(members) == 1 && strings.HasPrefix(members[0], pod.ID+"#")
			})
			c.WaitEvent(w.Message("acme", "desk1", "c1"))
			switch i % 3 {
			case 0:
				c.Close(1000, "")
			case 1:
				c.Abort()
			} // else the next tab replaces it
		}
		wantAtRest(pod, map[string]float64{"delivered": rounds})
	})
}
