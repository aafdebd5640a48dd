package harness

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
)

// Published is an event that the stream has acknowledged.
type Published struct {
	Index   int // of the call that made it
	Seq     uint64
	Subject string    // without the prefix
	At      time.Time // when it was first handed to the client library
}

// Flow publishes events at an even rate until it is stopped. What the server does not acknowledge, because it is down, is
// published again under the same Nats-Msg-Id until it does: each event is in the stream exactly once.
type Flow struct {
	w    *World
	rate int
	make func(i int) feed.Event
	sent atomic.Int64

	cancel context.CancelFunc
	done   chan struct{} // closed when all that was published is acknowledged
	all    []Published   // read it after done
	err    error
}

// Flow starts to publish rate events per second; next makes them, on one goroutine.
func (w *World) Flow(rate int, next func(i int) feed.Event) *Flow {
	ctx, cancel := context.WithCancel(w.T.Context())
	f := &Flow{w: w, rate: rate, make: next, cancel: cancel, done: make(chan struct{})}
	go f.run(ctx)
	w.T.Cleanup(func() { f.cancel(); <-f.done })
	return f
}

// Sent is how many events have been handed to the client library so far.
func (f *Flow) Sent() int { return int(f.sent.Load()) }

// WaitSent waits until n more events have been published than now.
func (f *Flow) WaitSent(n int) {
	f.w.T.Helper()
	n += f.Sent()
	Eventually(f.w.T, Patience+time.Duration(n)*time.Second/time.Duration(f.rate), fmt.Sprintf("%d events to be published", n), func() bool {
		return f.Sent() >= n
	})
}

// Stop ends the flow and returns everything that was published, each acknowledged by the stream.
func (f *Flow) Stop() []Published {
	f.w.T.Helper()
	f.cancel()
	select {
	case <-f.done:
	case <-time.After(2 * Patience):
		f.w.T.Fatalf("the stream does not acknowledge what was published")
	}
	if f.err != nil {
		f.w.T.Fatal(f.err)
	}
	return f.all
}

type pending struct {
	Published
	msg *nats.Msg
	ack jetstream.PubAckFuture // nil where the library refused the message
}

func (f *Flow) run(ctx context.Context) {
	defer close(f.done)
	waiting := make(chan pending, 1<<16) // closed below; what the server owes an answer
	var wg sync.WaitGroup
	var mu sync.Mutex // guards f.all and f.err
	for range 16 {    // after an election thousands are published again
		wg.Go(func() {
			for p := range waiting {
				err := f.await(&p)
				mu.Lock()
				if err != nil {
					f.err = err
				} else {
					f.all = append(f.all, p.Published)
				}
				mu.Unlock()
			}
		})
	}
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	begin := time.Now()
	for i := 0; ctx.Err() == nil; {
		for ; i < int(time.Since(begin).Seconds()*float64(f.rate)); i++ {
			waiting <- f.publish(i)
			f.sent.Add(1)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
	close(waiting)
	wg.Wait()
	slices.SortFunc(f.all, func(a, b Published) int { return cmp.Compare(a.Index, b.Index) })
}

func (f *Flow) publish(i int) pending {
	ev := f.make(i)
	p := pending{Published: Published{Index: i, Subject: ev.Subject, At: time.Now()}, msg: &nats.Msg{Subject: f.w.Prefix + "." + ev.Subject, Data: ev.Payload}}
	p.msg.Header = nats.Header{"Nats-Msg-Id": {fmt.Sprintf("%s-%p-%d", f.w.Stream, f, i)}}
	p.ack, _ = f.w.JS.PublishMsgAsync(p.msg)
	return p
}

// await returns when the stream has p, publishing it again where it has not.
func (f *Flow) await(p *pending) error {
	if p.ack != nil {
		select {
		case ack := <-p.ack.Ok():
			p.Seq = ack.Sequence
			return nil
		case <-p.ack.Err():
		case <-time.After(max(10*time.Millisecond, time.Until(p.At.Add(2*time.Second)))): // the answer was lost with the connection
		}
	}
	for give := time.Now().Add(2 * Patience); ; {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		ack, err := f.w.JS.PublishMsg(ctx, p.msg)
		cancel()
		if err == nil {
			p.Seq = ack.Sequence
			return nil
		}
		if time.Now().After(give) || errors.Is(err, nats.ErrConnectionClosed) {
			return fmt.Errorf("publish event %d: %w", p.Index, err)
		}
	}
}
