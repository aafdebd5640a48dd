package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// operations is what docs/operations.md says in the match of pattern, which has one group.
func operations(t *testing.T, pattern string) string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs", "operations.md"))
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(pattern).FindSubmatch(page)
	if m == nil {
		t.Fatalf("docs/operations.md has nothing like %s", pattern)
	}
	return string(m[1])
}

// wantEverything does with two pods and each of the agents all that Redis and NATS are needed for: events that the other pod
// pulls, the chat selected, the session taken over by a tab on the other pod and on the same one, a resume, and an
// admin.
func wantEverything(w *harness.World, a, b *harness.Pod, agents ...string) {
	w.T.Helper()
	for _, agent := range agents {
		wantEvents(w, a, b, agent)
		wantTakeOver(w, a, b, agent)
	}
	wantResume(w, a, b, agents[0])
	admin := b.Connect(harness.Admin("root", "acme", ""))
	admin.WaitEvent(w.Agent("acme", agents[0]))
	again := a.Connect(harness.Admin("root", "acme", ""))
	admin.WantClose(4402, "session-replaced")
	again.WaitEvent(w.Agent("acme", agents[0]))
	w.Settled()
	forced := 0
	for _, p := range []*harness.Pod{a, b} {
		p.WantLedgers()
		forced += strings.Count(p.Log.Text(), "session taken over")
	}
	if forced > 1 { // once in a while a busy machine answers nothing for 1 s
		w.T.Errorf("%d sessions were taken over from sockets that were not closed before", forced)
	}
}

// wantEvents has a socket on each pod get what is theirs, until either pod has pulled events of the other's socket.
func wantEvents(w *harness.World, a, b *harness.Pod, agent string) {
	w.T.Helper()
	ann, bob := a.Connect(harness.User("acme", agent, "ann")), b.Connect(harness.User("acme", agent, "bob"))
	ann.SelectChat("c1")
	bob.SelectChat("c2")
	fromA, fromB := a.Metric("dws_grpc_messages_sent_total"), b.Metric("dws_grpc_messages_sent_total")
	for round := 0; a.Metric("dws_grpc_messages_sent_total") == fromA || b.Metric("dws_grpc_messages_sent_total") == fromB; round++ {
		if round == 200 {
			w.T.Fatal("in 200 rounds no event of its socket was pulled by the other pod")
		}
		chat, m1, m2 := w.Chat("acme", agent), w.Message("acme", agent, "c1"), w.Message("acme", agent, "c2")
		ann.WaitEvent(chat)
		ann.WaitEvent(m1)
		bob.WaitEvent(chat)
		bob.WaitEvent(m2)
	}
	ann.SelectChat("c2")
	bob.SelectChat("")
	ann.WaitEvent(w.Message("acme", agent, "c2"))
	w.Message("acme", agent, "c1")
	w.Settled()
	for _, c := range []*harness.Client{ann, bob} {
		if left := c.Events(); len(left) > 0 {
			w.T.Errorf("%s got what it had not selected: %s", c.Dial.User, left[0].Raw)
		}
		c.Close(1000, "")
	}
}

// wantTakeOver opens four tabs of one user on the two pods; each newcomer wins.
func wantTakeOver(w *harness.World, a, b *harness.Pod, agent string) {
	w.T.Helper()
	before := a.Connect(harness.User("acme", agent, "ann"))
	for _, pod := range []*harness.Pod{b, b, a} {
		next := pod.Connect(harness.User("acme", agent, "ann"))
		before.WantClose(4402, "session-replaced")
		next.SelectChat("c1")
		next.WaitEvent(w.Message("acme", agent, "c1"))
		before = next
	}
	before.Close(1000, "")
}

// wantResume has a user leave one pod and ask the other for what came meanwhile.
func wantResume(w *harness.World, a, b *harness.Pod, agent string) {
	w.T.Helper()
	c := a.Connect(harness.User("acme", agent, "ann").Positions())
	c.WaitEvent(w.Chat("acme", agent))
	c.Close(1000, "")
	seqs := []uint64{w.Contact("acme", agent), w.Chat("acme", agent)}
	c = b.Dial(harness.User("acme", agent, "ann").From(c.Place()))
	for _, seq := range seqs {
		if m := c.WaitEvent(seq); !m.Replay {
			w.T.Errorf("event %d is no replay: %s", seq, m.Raw)
		}
	}
	if ready := c.TakeType("ready"); strings.Contains(ready.Raw, `"gap":true`) {
		w.T.Errorf("after the resume: %s", ready.Raw)
	}
	c.Close(1000, "")
}

// openOffice connects a user of each agent, in turn to the pods, each with a chat selected.
func openOffice(pods []*harness.Pod, agents []string) []*harness.Client {
	var all []*harness.Client
	for i, agent := range agents {
		c := pods[i%len(pods)].Connect(harness.User("acme", agent, "ann"))
		c.SelectChat("c1")
		all = append(all, c)
	}
	return all
}

// chatsOf makes chat events for the agents in turn.
func chatsOf(agents []string) func(i int) feed.Event {
	return func(i int) feed.Event {
		return feed.Chat("acme", agents[i%len(agents)], "628111@c.us", feed.Text(), i)
	}
}

// wantFlow ends the flow and waits until each of the clients has got every event of its agent, and nothing else but gaps of
// owners. It returns the longest time in which no client got any.
func wantFlow(f *harness.Flow, clients []*harness.Client) time.Duration {
	w := clients[0].Pod.W
	w.T.Helper()
	seqs := map[string][]uint64{} // by subject
	for _, p := range f.Stop() {
		seqs[p.Subject] = append(seqs[p.Subject], p.Seq)
	}
	// What fails while things are broken, or behind a breaker that opened, comes again within the retry horizon.
	ctx := harness.Within(w.T, 90*time.Second)
	var at []time.Time
	twice := 0
	for _, c := range clients {
		mine := seqs["acme."+c.Dial.Agent+".chats"]
		for _, seq := range mine {
			m, err := c.TryTake(ctx, func(m harness.Message) bool { return m.Type == "event" && m.Seq == seq })
			if err != nil {
				w.T.Fatalf("event %d of %s did not come: %v; beside events it got %v; the pods say\n%s", seq, c.Dial.Agent, err, c.Others(), w.Fate(seq))
			}
			at = append(at, m.At)
		}
		if len(mine) == 0 {
			w.T.Errorf("no event of %s was published", c.Dial.Agent)
		}
		twice += len(c.Events())
		wantOnlyGaps(c)
	}
	slices.SortFunc(at, time.Time.Compare)
	longest := time.Duration(0)
	for i := 1; i < len(at); i++ {
		longest = max(longest, at[i].Sub(at[i-1]))
	}
	w.T.Logf("%d events arrived, %d of them a second time; longest pause %v", len(at), twice, longest)
	return longest
}
