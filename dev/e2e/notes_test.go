package e2e

import (
	"context"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// givingUp is a pod, here, that can't reach the sockets of another one, there, which pulls nothing itself. Whatever is due to them is
// given up in the end.
type givingUp struct {
	*harness.World
	here, there *harness.Pod
	link        *rig.Proxy // between them
	bob, root   *harness.Client
	rdb         *redis.Client
	notes       string       // their key
	terms       atomic.Int32 // events that JetStream was told are given up
	early       atomic.Int32 // those of them before there was a note
}

const retryHorizon = time.Second

// startGivingUp begins with a link that works; here may get settings of its own.
func startGivingUp(t *testing.T, opts harness.Option, settings ...func(*harness.World) string) *givingUp {
	t.Helper()
	harness.NeedRealRedis(t)
	g := &givingUp{World: harness.New(t, harness.Settings(shortDelays, "NATS_RETRY_HORIZON="+retryHorizon.String(), "NATS_ACK_WAIT=5s", "PEER_TIMEOUT=500ms",
		"WEBSOCKET_WRITE_TIMEOUT=2s", "WEBSOCKET_BLOCK_TIMEOUT=1s"), opts)}
	g.rdb = g.RedisClient()
	idleConsumer(g.World)
	g.there, g.link = behindProxy(g.World, "NATS_CONSUMER_NAME=idle")
	var own []string
	for _, s := range settings {
		own = append(own, s(g.World))
	}
	g.here = g.Start(own...)
	g.bob, g.root = g.there.Connect(harness.User("acme", "desk1", "bob").Positions()), g.there.Connect(harness.Admin("root", "acme", "").Positions())
	g.bob.WaitEvent(g.Chat("acme", "desk1"))
	g.root.WaitEvent(g.Agent("acme", "desk1"))
	g.here.Connect(harness.User("acme", "desk9", "ann"))
	g.notes = "note:" + memberFor(t.Context(), g.rdb, g.bob)
	sub, err := g.NC.Subscribe("$JS.ACK.>", func(m *nats.Msg) {
		if string(m.Data) != "+TERM" || !strings.Contains(m.Subject, "."+g.Consumer+".") {
			return
		}
		g.terms.Add(1)
		if g.rdb.Exists(context.Background(), g.notes).Val() == 0 {
			g.early.Add(1)
		}
	})
	if err == nil {
		err = g.NC.Flush()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sub.Unsubscribe() })
	return g
}

// age publishes for somebody on here until ok: the age of an event is counted in the stream's own time.
func (g *givingUp) age(what string, ok func() bool) {
	g.T.Helper()
	harness.Eventually(g.T, harness.Patience, what, func() bool {
		g.Chat("acme", "desk9")
		return ok()
	})
}

// wantTold expects that a client is told of what was given up within two renewals, and has it by its resume.
func (g *givingUp) wantTold(c *harness.Client, reason string, since time.Time, lost uint64) {
	g.T.Helper()
	gap := c.WantGap(reason)
	if took := time.Since(since); took > 2*leaseOfTests/3+2*time.Second {
		g.T.Errorf("%s was told %v after the event was given up", c.Dial.User+c.Dial.Admin, took)
	}
	wantResumed(c, gap, lost)
}

// leaseOfTests is the default of POD_LEASE, which is renewed every third of it.
const leaseOfTests = 6 * time.Second

// TestNoteBeforeTheEnd: an event is given up, since it is older than the horizon or there is no room for more, only when a note of it
// stands in Redis. The pod that owns the agent reads it with its next renewal, and tells its clients.
func TestNoteBeforeTheEnd(t *testing.T) {
	t.Parallel()
	for reason, opts := range map[string]harness.Option{
		"expired": harness.Settings(),
		"shed":    harness.Settings("NATS_MAX_ACK_PENDING=40", "NATS_PREFETCH=10", "NATS_PARKED_BUDGET=10", "NATS_RETRY_HORIZON=60s"),
	} {
		t.Run(reason, func(t *testing.T) {
			t.Parallel()
			g := startGivingUp(t, opts)
			g.link.Cut()
			chat, agent := g.Chat("acme", "desk1"), g.Agent("acme", "desk1")
			if reason == "shed" {
				for range 30 { // the later ones are given up at once
					chat = g.Chat("acme", "desk1")
				}
				agent = g.Agent("acme", "desk1")
			}
			g.age("both to be given up", func() bool {
				return g.here.Metric("dws_events_total", `kind="chat"`, fmt.Sprintf("outcome=%q", reason)) > 0 &&
					g.here.Metric("dws_events_total", `kind="agent"`, fmt.Sprintf("outcome=%q", reason)) > 0
			})
			since := time.Now()
			g.wantTold(g.bob, reason, since, chat)
			g.wantTold(g.root, reason, since, agent)
			if terms, early := g.terms.Load(), g.early.Load(); terms == 0 || early > 0 {
				t.Errorf("of %d events that were given up %d had no note yet", terms, early)
			}
			harness.Eventually(t, harness.Patience, "the notes to be deleted", func() bool { return g.rdb.Exists(t.Context(), g.notes).Val() == 0 })
		})
	}
}

// TestKilledBeforeTheEnd: a pod leaves a note, and is killed before JetStream hears that the event is given up. Its owner is told, though
// the event comes again.
func TestKilledBeforeTheEnd(t *testing.T) {
	t.Parallel()
	var hold *holder
	g := startGivingUp(t, harness.Settings(), func(w *harness.World) string {
		hold = holdUp(t, w.NATS.Address())
		return "NATS_URL=nats://" + hold.address
	})
	g.link.Cut()
	lost := g.Chat("acme", "desk1")
	hold.next("+TERM")
	g.age("JetStream to be told", hold.isHeld)
	since := time.Now()
	if n := g.rdb.HLen(t.Context(), g.notes).Val(); n != 1 {
		t.Errorf("there are %d notes, want 1", n)
	}
	g.here.Kill()
	g.wantTold(g.bob, "expired", since, lost)
	if i := g.ConsumerInfo(); i.AckFloor.Stream >= lost || g.terms.Load() > 0 {
		t.Errorf("the event was given up: the ack floor is %d, its sequence %d", i.AckFloor.Stream, lost)
	}
	g.link.Restore()
	next := g.Start()
	g.Settled()
	if n := len(g.bob.Others()); n > 0 {
		t.Errorf("then %d messages more: %s", n, g.bob.Others()[0].Raw)
	}
	next.WantLedgers()
}

// TestKilledBeforeTheNote: a note that Redis has not answered settles nothing, and a pod that is killed before has given nothing up:
// the event comes again, and to its client, who is told of no gap.
func TestKilledBeforeTheNote(t *testing.T) {
	t.Parallel()
	var hold *holder
	g := startGivingUp(t, harness.Settings(), func(w *harness.World) string {
		hold = holdUp(t, w.Redis.Address())
		return "REDIS_ADDRESS=" + hold.address
	})
	g.link.Cut()
	lost := g.Chat("acme", "desk1")
	hold.next("hset")
	g.age("a note to be left", hold.isHeld)
	g.age("the event to be left to JetStream", func() bool { return ended(g.here, "late") > 0 || ended(g.here, "expired") > 0 })
	g.here.Kill()
	if i := g.ConsumerInfo(); i.AckFloor.Stream >= lost || g.terms.Load() > 0 {
		t.Errorf("the event was given up without a note: the ack floor is %d, its sequence %d", i.AckFloor.Stream, lost)
	}
	g.link.Restore()
	next := g.Start()
	g.bob.WaitEvent(lost)
	g.Settled()
	if others := g.bob.Others(); len(others) > 0 {
		t.Errorf("the client who has everything was told %s", others[0].Raw)
	}
	next.WantLedgers()
}
