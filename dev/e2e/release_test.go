package e2e

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// holder is a proxy to Redis that can hold up the one connection on which the next SREM comes: as a path of the network that
// fails for some seconds does to the flows that go over it.
type holder struct {
	l       net.Listener
	mu      sync.Mutex
	armed   bool
	release chan struct{}
	held    int
}

func (h *holder) serve(target string) {
	for {
		in, err := h.l.Accept()
		if err != nil {
			return
		}
		out, err := net.Dial("tcp", target)
		if err != nil {
			in.Close()
			continue
		}
		go func() { io.Copy(in, out); in.Close() }()
		go func() {
			defer out.Close()
			buf := make([]byte, 64<<10)
			for {
				n, err := in.Read(buf)
				if n > 0 {
					h.mu.Lock()
					hold := h.armed && bytes.Contains(bytes.ToLower(buf[:n]), []byte("srem"))
					if hold {
						h.armed = false
						h.held++
					}
					release := h.release
					h.mu.Unlock()
					if hold {
						<-release
					}
					out.Write(buf[:n])
				}
				if err != nil {
					time.Sleep(100 * time.Millisecond)
					return
				}
			}
		}()
	}
}

// TestReleaseThatComesLate: a release that its connection held up for some seconds must not delete the claim of a newcomer.
func TestReleaseThatComesLate(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	h := &holder{l: l, release: make(chan struct{})}
	go h.serve(w.Redis.Address()) // ends with l
	first, other := w.Start("REDIS_ADDRESS="+l.Addr().String()), w.Start()
	ann := first.Connect(harness.User("acme", "desk1", "ann"))
	other.Connect(harness.User("acme", "desk1", "bob")) // with whom a message of a chat that nobody selected is acked at once
	rdb := w.RedisClient()
	members := func() int64 { return rdb.SCard(t.Context(), "route:acme:desk1:messages:c1").Val() }
	ann.SelectChat("c1")
	h.mu.Lock()
	h.armed = true
	h.mu.Unlock()
	ann.SelectChat("c2")
	harness.Eventually(t, harness.Patience, "the release to be sent again", func() bool { return members() == 0 })
	ann.SelectChat("c1")
	h.mu.Lock()
	if h.held != 1 {
		t.Errorf("%d releases were held up, want 1", h.held)
	}
	h.mu.Unlock()
	close(h.release)
	time.Sleep(500 * time.Millisecond) // it arrives
	if n := members(); n != 1 {
		t.Errorf("%d pods claim the chat, want the one on which it is selected", n)
	}
	var due []uint64
	for range 40 {
		due = append(due, w.Message("acme", "desk1", "c1"))
	}
	w.Settled()
	wantExactly(ann, due)
	ann.SelectChat("")
	harness.Eventually(t, harness.Patience, "all claims of the chat to be released", func() bool { return members() == 0 })
}
