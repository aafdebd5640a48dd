package e2e

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"daisi-ws-service/dev/harness"
)

// counter passes connections on and counts their bytes, which is how a test sees from outside what was compressed.
type counter struct {
	address  string
	up, down atomic.Int64
}

func newCounter(t *testing.T, target string) *counter {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &counter{address: l.Addr().String()}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { c.pass(in, target) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait() // the clients' connections end before: they are younger
	})
	return c
}

func (c *counter) pass(in net.Conn, target string) {
	defer in.Close()
	out, err := net.Dial("tcp", target)
	if err != nil {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer out.Close()
		io.Copy(out, io.TeeReader(in, (*adder)(&c.up)))
	})
	io.Copy(in, io.TeeReader(out, (*adder)(&c.down)))
	in.Close()
	wg.Wait()
}

type adder atomic.Int64

func (a *adder) Write(p []byte) (int, error) {
	(*atomic.Int64)(a).Add(int64(len(p)))
	return len(p), nil
}

// chatOf publishes a chat event of about n bytes that compress well.
func chatOf(w *harness.World, agent string, n int) uint64 {
	w.T.Helper()
	payload := fmt.Sprintf(`{"id":"628111@c.us","note":"%s"}`, strings.Repeat("so it goes ", n/11+1)[:n])
	return w.PublishRaw(w.Prefix+".acme."+agent+".chats", []byte(payload))
}

// TestCompression: two clients of others, with and without compression, below the threshold and above, in both directions.
func TestCompression(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_COMPRESSION=no_context_takeover", "WEBSOCKET_COMPRESSION_THRESHOLD=2KiB"))
	pod := w.Start()
	for _, tc := range []struct {
		name                 string
		gorilla, compression bool
	}{{"coder", false, true}, {"gorilla", true, true}, {"coder, no offer", false, false}, {"gorilla, no offer", true, false}} {
		t.Run(tc.name, func(t *testing.T) {
			count := newCounter(t, pod.HTTP)
			agent := strings.NewReplacer(", ", "-", " ", "-").Replace(tc.name)
			d := harness.User("acme", agent, "ann")
			d.Gorilla, d.Compression = tc.gorilla, tc.compression
			c := pod.DialAt(count.address, d)
			c.WantReady()
			for _, size := range []int{10, 1900, 3000, 100_000, 900_000} {
				before := count.down.Load()
				m := c.WantEvent(chatOf(w, agent, size))
				if !json.Valid([]byte(m.Raw)) || len(m.Raw) < size {
					t.Fatalf("event of %d bytes comes as %d: %.200s", size, len(m.Raw), m.Raw)
				}
				wire := int(count.down.Load() - before)
				packed := tc.compression && size > 2000
				if packed && wire > size/5 || !packed && wire < size {
					t.Errorf("event of %d bytes took %d on the wire", size, wire)
				}
			}
			before := count.up.Load()
			c.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c1", "pad": strings.Repeat("x", 5000)}})
			c.TakeType("chat_selected")
			if wire := count.up.Load() - before; tc.compression != (wire < 1000) {
				t.Errorf("select_chat of 5000 bytes took %d on the wire", wire)
			}
			c.WantEvent(w.Message("acme", agent, "c1"))
			c.Close(1000, "")
		})
	}
	pod.WantLedgers()
}

// TestCompressionBomb: a small message that would inflate beyond the limit closes its own socket and harms no other.
func TestCompressionBomb(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("WEBSOCKET_COMPRESSION=context_takeover", "WEBSOCKET_MAX_MESSAGE=64KiB"))
	pod := w.Start()
	pod.WantLine("context_takeover is taken as no_context_takeover")
	other := harness.User("acme", "desk1", "bob")
	other.Compression = true
	b := pod.Connect(other)
	for _, gorilla := range []bool{false, true} {
		d := harness.User("acme", "desk1", "ann")
		d.Gorilla, d.Compression = gorilla, true
		a := pod.Connect(d)
		a.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c1", "pad": strings.Repeat("x", 50_000)}})
		a.TakeType("chat_selected")
		a.TrySend(true, []byte(strings.Repeat(" ", 10<<20))) // the close may come while it is being sent
		a.WantClose(1009, "message too big")
	}
	b.WantEvent(chatOf(w, "desk1", 5000))
}
