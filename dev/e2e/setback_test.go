package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/harness"
)

// TestStreamSetBack: a backup of the stream is restored, which has the same name and creation time and lacks the newest events. New
// events get the sequences of those that are gone; none of them may be taken for one that a socket has had.
func TestStreamSetBack(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.OwnNATS(), often, shortTimeouts) // the server forgets acks when it is killed
	a, b := w.Start(), w.Start()
	ann := a.Connect(harness.User("acme", "desk1", "ann").Positions())
	bob := b.Connect(harness.User("acme", "desk1", "bob").Positions())
	old := b.Connect(harness.User("acme", "desk1", "old")) // keeps no positions
	all := []*harness.Client{ann, bob, old}
	publish := func(n int) (last uint64) {
		t.Helper()
		for range n {
			last = w.Chat("acme", "desk1")
			for _, c := range all {
				c.WaitEvent(last)
			}
		}
		return last
	}
	backedUp := publish(10)
	w.Settled()
	store, backup := w.NATS.Store(), filepath.Join(t.TempDir(), "backup")
	w.NATS.Kill()
	if err := os.CopyFS(backup, os.DirFS(store)); err != nil {
		t.Fatal(err)
	}
	if err := w.NATS.Restart(); err != nil {
		t.Fatal(err)
	}
	gone := publish(10)
	w.Settled()
	ann.WaitPlace(gone)

	w.NATS.Kill()
	if err := os.RemoveAll(store); err != nil {
		t.Fatal(err)
	}
	if err := os.CopyFS(store, os.DirFS(backup)); err != nil {
		t.Fatal(err)
	}
	if err := w.NATS.Restart(); err != nil {
		t.Fatal(err)
	}
	// More than were lost come before anybody looks, maybe: whoever had event 20 must not take the new one for it.
	first := w.Chat("acme", "desk1")
	if first != backedUp+1 {
		t.Fatalf("the first event of the restored stream has sequence %d, want %d", first, backedUp+1)
	}
	for range 15 {
		w.Chat("acme", "desk1")
	}
	for _, c := range all {
		c.WantGap("stream")
	}
	if r := ann.ResumeMissed(); !r.Gap || r.Stream == ann.Ready.Stream {
		t.Errorf("resumed in the restored stream: %+v, want another stream and a gap", r)
	}
	// A client that left before comes back with the old stream's position.
	back := a.Dial(harness.User("acme", "desk1", "cid").From(harness.Place{Seq: gone, Stream: ann.Ready.Stream}))
	if r := back.TakeReply("ready"); !r.Gap || r.Stream == ann.Ready.Stream {
		t.Errorf("back in the restored stream: %+v, want another stream and a gap", r)
	}
	publish(5)
	w.Settled()
	a.WantLedgers()
	b.WantLedgers()
}

// TestMemoryStreamLosesItsEvents: the node of a cluster that has a stream in its memory alone restarts. The stream is there again, and
// begins at 1.
func TestMemoryStreamLosesItsEvents(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.NATSCluster(3), harness.NoStream(), shortTimeouts) // what a restarting server has given out may come again only then
	harness.Eventually(t, 4*harness.Patience, "the servers to elect a leader", func() bool {
		_, err := w.JS.CreateStream(harness.Within(t, harness.Patience), jetstream.StreamConfig{
			Name: w.Stream, Subjects: []string{w.Prefix + ".>"}, Storage: jetstream.MemoryStorage, AllowDirect: true})
		return err == nil
	})
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann").Positions())
	for range 10 {
		ann.WaitEvent(w.Chat("acme", "desk1"))
	}
	w.Settled()
	s, err := w.JS.Stream(harness.Within(t, harness.Patience), w.Stream)
	if err != nil {
		t.Fatal(err)
	}
	for _, node := range w.Nodes {
		if node.Name() == s.CachedInfo().Cluster.Leader {
			node.Kill()
			if err := node.Restart(); err != nil {
				t.Fatal(err)
			}
		}
	}
	var first uint64
	harness.Eventually(t, harness.Patience, "the stream to take events again", func() bool {
		ack, err := w.JS.Publish(harness.Within(t, harness.Patience), w.Prefix+".acme.desk1.chats", []byte("{}"))
		if err == nil {
			first = ack.Sequence
		}
		return err == nil
	})
	if first > 10 {
		t.Fatalf("the stream kept its events: the next is %d", first)
	}
	ann.WantGap("stream")
	if r := ann.ResumeMissed(); !r.Gap {
		t.Errorf("resumed: %+v, want a gap", r)
	}
	ann.WaitEvent(w.Chat("acme", "desk1"))
	w.Settled()
	pod.WantLedgers()
}
