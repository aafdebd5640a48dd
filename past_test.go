package main

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// TestReplaysTakeTurns: no more than RESUME_CONCURRENCY requests of the stream are under way, and who waits for a turn
// stops waiting with its context.
func TestReplaysTakeTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 2})
		p := newPast(cfg, nil, nil)
		var running, most atomic.Int32
		done := make(chan error)
		for range 5 {
			go func() {
				_, err := limited(t.Context(), p, func(context.Context) (int, error) {
					most.Store(max(most.Load(), running.Add(1)))
					time.Sleep(time.Second) // on the bubble's clock
					running.Add(-1)
					return 0, nil
				})
				done <- err
			}()
			synctest.Wait()
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if _, err := limited(ctx, p, func(context.Context) (int, error) { t.Error("made out of turn"); return 0, nil }); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a wait that its context ended: %v", err)
		}
		for range 5 {
			if err := <-done; err != nil {
				t.Error(err)
			}
		}
		if most.Load() != 2 {
			t.Errorf("%d requests at once, want 2", most.Load())
		}
	})
}

// TestLostAnswerKeepsNoTurn: a request whose answer never comes, as when NATS goes away in the midst of it, ends.
func TestLostAnswerKeepsNoTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 1})
		p := newPast(cfg, nil, nil)
		never := func(ctx context.Context) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}
		for range 2 {
			if _, err := limited(t.Context(), p, never); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a request without an answer ended with %v", err)
			}
		}
	})
}

// TestReplayLimits: the events missed count by themselves; the overlap has a limit of its own.
func TestReplayLimits(t *testing.T) {
	cfg := &settings{}
	cfg.Store(&Config{ResumeConcurrency: 1, ResumeMaxEvents: 3})
	for _, tc := range []struct {
		before, after int
		refused       bool
	}{{0, 3, false}, {0, 4, true}, {3 * overlapRoom, 3, false}, {3*overlapRoom + 1, 0, true}} {
		r := &replay{past: newPast(cfg, nil, nil), since: 100}
		var err error
		for i := range tc.before + tc.after {
			seq := uint64(i + 1)
			if i >= tc.before {
				seq += r.since
			}
			err = errors.Join(err, r.count(seq))
		}
		if errors.Is(err, errTooFar) != tc.refused {
			t.Errorf("%d of the overlap and %d missed: %v", tc.before, tc.after, err)
		}
	}
}

// countingStream answers questions about the stream one second after they were sent.
type countingStream struct {
	jetstream.JetStream
	asked atomic.Int32
}

type numbered struct {
	jetstream.Stream
	n int32
}

func (s *countingStream) Stream(context.Context, string) (jetstream.Stream, error) {
	n := s.asked.Add(1)
	time.Sleep(time.Second)
	return numbered{n: n}, nil
}

// TestQuestionsAreShared: a thousand replays that ask for the stream's end at once share answers, but only to questions that
// were sent after they had asked.
func TestQuestionsAreShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 2})
		js := &countingStream{}
		p := newPast(cfg, nil, js)
		answers := make(chan int32, 1001)
		ask := func() {
			s, err := p.find(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			answers <- s.(numbered).n
		}
		go ask()
		synctest.Wait() // it is under way
		for range 1000 {
			go ask()
		}
		if n := <-answers; n != 1 {
			t.Errorf("the first was answered by question %d", n)
		}
		for range 1000 {
			if n := <-answers; n != 2 {
				t.Fatalf("answered by question %d, which was sent before it was asked, or by one of its own", n)
			}
		}
		for range indexReplays {
			p.started()
		}
		start := time.Now()
		for n := int32(3); n < 5; n++ { // the one after them waits for more
			if ask(); <-answers != n {
				t.Errorf("not answered by question %d", n)
			}
		}
		if took := time.Since(start); took != 2*time.Second+findEvery {
			t.Errorf("two questions took %v while replays are many, want %v", took, 2*time.Second+findEvery)
		}
	})
}

// TestIndex: it tells of the part of the stream that it has read, and of nothing else.
func TestIndex(t *testing.T) {
	x := newIndex(time.Now(), 0, 10)
	for _, m := range []struct {
		subject string
		seq     uint64
	}{{"a", 12}, {"b", 13}, {"a", 17}} { // the others were removed, or are of other subjects
		x.note(m.subject, m.seq, time.Now(), nil)
	}
	for _, tc := range []struct {
		subject   string
		from, seq uint64
		known     bool
	}{
		{"a", 9, 0, false}, // before it begins
		{"a", 10, 12, true}, {"a", 12, 12, true}, {"a", 13, 17, true}, {"a", 17, 17, true},
		{"b", 10, 13, true}, {"b", 14, 0, true}, {"c", 10, 0, true},
		{"a", 18, 0, false}, {"c", 18, 0, false}, // not read yet
	} {
		if seq, _, end, known := x.after(tc.subject, tc.from); seq != tc.seq || known != tc.known || known && end != 18 {
			t.Errorf("after %d for %s: %d, up to %d, known %v; want %d, 18, %v", tc.from, tc.subject, seq, end, known, tc.seq, tc.known)
		}
	}
	if x.end() != 18 {
		t.Errorf("it ends at %d, want 18", x.end())
	}
}

// TestIndexKeepsTheNewest: it keeps so many bytes of messages as it may, and knows the places of the rest.
func TestIndexKeepsTheNewest(t *testing.T) {
	x := newIndex(time.Now(), 0, 1)
	data := make([]byte, indexKeep/4)
	for seq := range uint64(10) {
		x.note("a", 2*seq+1, time.Unix(int64(seq), 5), data)
	}
	for seq := uint64(1); seq < 20; seq += 2 {
		got, kept, _, _ := x.after("a", seq)
		if got != seq || (kept != nil) != (seq > 13) {
			t.Errorf("after %d: %d, kept %v; want it kept where it is one of the last three", seq, got, kept != nil)
		}
		if kept != nil && (kept.Sequence != seq || kept.Subject != "a" || len(kept.Data) != len(data) || kept.Time != time.Unix(int64(seq/2), 5)) {
			t.Errorf("message %d is kept as %d of %s at %v with %d bytes", seq, kept.Sequence, kept.Subject, kept.Time, len(kept.Data))
		}
	}
	if len(x.kept) != 3 || x.size > indexKeep {
		t.Errorf("%d messages of %d bytes are kept, want 3", len(x.kept), x.size)
	}
}

// fakeStream answers by sequence.
type fakeStream struct {
	jetstream.Stream
	msgs map[uint64]*jetstream.RawStreamMsg
}

func (s fakeStream) GetMsg(_ context.Context, seq uint64, _ ...jetstream.GetMsgOpt) (*jetstream.RawStreamMsg, error) {
	if m := s.msgs[seq]; m != nil {
		return m, nil
	}
	return nil, jetstream.ErrMsgNotFound
}

// TestIndexOfAnotherStream: where a sequence that the index names is by now that of somebody else's event, as when the stream
// was made anew, nobody is shown it, and the index goes.
func TestIndexOfAnotherStream(t *testing.T) {
	nobody, err := net.Listen("tcp", "127.0.0.1:0") // no NATS: the leader can't be asked
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	nc, err := nats.Connect("nats://"+nobody.Addr().String(), nats.RetryOnFailedConnect(true))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	cfg := &settings{}
	cfg.Store(&Config{ResumeConcurrency: 1, ResumeMaxEvents: 10, NATSSubjectPrefix: "wa"})
	p := newPast(cfg, nc, nil)
	x := newIndex(time.Now(), 0, 1)
	x.note("wa.acme.ann.chats", 5, time.Now(), nil)
	delete(x.kept, 5) // too old to be kept itself
	p.index.Store(x)
	r := &replay{past: p, created: x.created, direct: true, tracks: []track{{subject: "wa.acme.ann.chats", from: 1}},
		stream: fakeStream{msgs: map[uint64]*jetstream.RawStreamMsg{5: {Subject: "wa.other.bob.chats", Sequence: 5, Data: []byte("{}")}}}}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.pass(ctx, 5, func(ev *event) error { t.Errorf("acme is shown an event of %s", ev.company); return nil }); err == nil {
		t.Error("the replay counts as whole")
	}
}

// TestHeadersOfTheServer: what a publisher has put there is not taken for the server's.
func TestHeadersOfTheServer(t *testing.T) {
	m := &nats.Msg{Header: nats.Header{"Nats-Sequence": {"999999", "6"}}}
	if got := ofServer(m, "Nats-Sequence"); got != "6" {
		t.Errorf("sequence %s, want 6", got)
	}
	if got := ofServer(m, "Nats-Subject"); got != "" {
		t.Errorf("subject %q, want none", got)
	}
}

// TestIndexOfAnEmptyStream: there is nothing to read, and no index that would never be of use.
func TestIndexOfAnEmptyStream(t *testing.T) {
	cfg := &settings{}
	cfg.Store(&Config{ResumeConcurrency: 1})
	p := newPast(cfg, nil, nil)
	for range indexReplays {
		p.started()
	}
	r := &replay{past: p, direct: true, tracks: []track{{subject: "wa.acme.ann.chats", from: 1}}}
	if err := r.cover(t.Context(), 0); err != nil || p.index.Load() != nil {
		t.Errorf("%v, index %v", err, p.index.Load())
	}
}

// TestReplaysAtOnce: so many replays are read side by side; the next one waits until one has ended or waits for its client.
func TestReplaysAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 1})
		p := newPast(cfg, nil, nil)
		replays := make([]*replay, replaysAtOnce)
		for i := range replays {
			replays[i] = &replay{past: p}
			for range 2 { // the second time it has one
				if err := replays[i].turn(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		}
		next, got := &replay{past: p}, make(chan error, 1)
		short, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := next.turn(short); !errors.Is(err, context.DeadlineExceeded) {
			t.Fatalf("one too many: %v", err)
		}
		go func() { got <- next.turn(t.Context()) }()
		synctest.Wait()
		replays[0].rest()
		replays[0].rest() // it has none any more
		if err := <-got; err != nil || len(p.turns) != replaysAtOnce {
			t.Errorf("after one rests: %v, %d turns taken", err, len(p.turns))
		}
	})
}

// TestIndexGoesWithTheCrowd: a few replays now and then, as every pod has them, keep no index; those of a crowd that have waited
// for their turn do.
func TestIndexGoesWithTheCrowd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 1})
		p := newPast(cfg, nil, nil)
		for range indexReplays {
			p.started()
		}
		x := newIndex(time.Now(), 0, 1)
		p.index.Store(x)
		time.Sleep(indexWindow / 2)
		p.started()
		synctest.Wait()
		if p.index.Load() == nil {
			t.Error("it goes while the crowd comes")
		}
		for range 10 {
			time.Sleep(indexWindow * 9 / 10)
			p.started()
		}
		synctest.Wait()
		if p.index.Load() != nil {
			t.Error("kept for 95 s with one replay in 9 s")
		}
		r := &replay{past: p} // of an empty stream
		for range 2 {
			r.pass(t.Context(), 0, nil)
		}
		if p.count != indexReplays+12 {
			t.Errorf("%d replays count as begun, want one more with its first pass", p.count)
		}
	})
}

// TestIndexForTheExpected: the first replay of a crowd that waits for its sessions has the index made already, and it goes
// like any other.
func TestIndexForTheExpected(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := &settings{}
		cfg.Store(&Config{ResumeConcurrency: 1})
		p := newPast(cfg, nil, nil)
		var done []func()
		for range indexReplays - 1 {
			done = append(done, p.expect())
		}
		p.started()
		if p.many() || p.idle != nil {
			t.Error("one too few are many")
		}
		done = append(done, p.expect())
		p.started()
		if !p.many() {
			t.Error("a crowd that waits is not many")
		}
		p.index.Store(newIndex(time.Now(), 0, 1))
		for _, f := range done {
			f()
		}
		if p.many() {
			t.Error("still many when none waits any more")
		}
		time.Sleep(indexWindow)
		synctest.Wait()
		if p.index.Load() != nil {
			t.Error("the index is kept for a crowd that never came")
		}
	})
}

// TestIndexOfAnotherConnection: a server that comes back may have lost the stream's end. What the index knows of it is of no use.
func TestIndexOfAnotherConnection(t *testing.T) {
	cfg := &settings{}
	cfg.Store(&Config{ResumeConcurrency: 1})
	p := newPast(cfg, nil, nil)
	connects := uint64(1)
	p.connects = func() uint64 { return connects }
	x := newIndex(time.Now(), 1, 1)
	p.index.Store(x)
	if p.indexOf(x.created) != x || p.indexOf(x.created.Add(1)) != nil {
		t.Error("it is not told by the stream's creation")
	}
	if connects++; p.indexOf(x.created) != nil {
		t.Error("it outlives the connection")
	}
}
