package e2e

import (
	"bytes"
	"io"
	"net"
	"strings"
	"sync"
	"testing"

	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/harness"
)

// holder is a proxy that can hold up the one connection on which certain bytes come next: as a path of the network that fails for
// some seconds does to the flows that go over it.
type holder struct {
	t       *testing.T
	address string
	target  string

	mu      sync.Mutex // guards all below
	bytes   []byte     // in lower case; nil = nothing is to be held up
	held    bool
	release chan struct{} // closed to let it go on
}

// holdUp starts a proxy to target; it ends with the test.
func holdUp(t *testing.T, target string) *holder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &holder{t: t, address: l.Addr().String(), target: target}
	t.Cleanup(func() {
		l.Close()
		h.letGo()
	})
	go func() { // ends with l
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			go h.forward(in)
		}
	}()
	return h
}

// next has the next connection on which what comes held up from there on.
func (h *holder) next(what string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.bytes, h.held, h.release = []byte(strings.ToLower(what)), false, make(chan struct{})
}

// isHeld says whether a connection is held up.
func (h *holder) isHeld() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.held
}

// letGo lets a connection go on that is held up.
func (h *holder) letGo() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.bytes = nil; h.release != nil {
		close(h.release)
		h.release = nil
	}
}

// forward passes bytes both ways. What in has sent before it ended is passed on too.
func (h *holder) forward(in net.Conn) {
	defer in.Close()
	out, err := net.Dial("tcp", h.target)
	if err != nil {
		return
	}
	defer out.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		io.Copy(in, out)
		in.Close()
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := in.Read(buf)
		h.pass(buf[:n])
		out.Write(buf[:n])
		if err != nil {
			break
		}
	}
	out.(*net.TCPConn).CloseWrite()
	<-back
}

// pass returns when b may go on.
func (h *holder) pass(b []byte) {
	h.mu.Lock()
	release := h.release
	hold := h.bytes != nil && bytes.Contains(bytes.ToLower(b), h.bytes)
	if hold {
		h.bytes, h.held = nil, true
	}
	h.mu.Unlock()
	if hold {
		<-release
	}
}

// calls is how often Redis has run a command.
func calls(rdb *redis.Client, t *testing.T, command string) string {
	t.Helper()
	stats, err := rdb.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(stats, "cmdstat_"+command+":calls=")
	n, _, _ := strings.Cut(rest, ",")
	return n
}

// TestReleaseThatComesLate: a release that its connection held up for some seconds must not delete the claim of a newcomer.
func TestReleaseThatComesLate(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t)
	redis := holdUp(t, w.Redis.Address())
	first, other := w.Start("REDIS_ADDRESS="+redis.address), w.Start()
	other.Connect(harness.User("acme", "desk1", "bob")) // with whom an event that misses her is acked at once
	ann := first.Connect(harness.User("acme", "desk1", "ann"))
	rdb := w.RedisClient()
	members := func() int64 { return rdb.SCard(t.Context(), "route:acme:desk1").Val() }
	redis.next("srem")
	ann.Close(1000, "")
	harness.Eventually(t, harness.Patience, "the release to be held up", redis.isHeld)
	ann = first.Connect(harness.User("acme", "desk1", "ann"))
	harness.Eventually(t, harness.Patience, "the release to be sent again", func() bool { return members() == 2 })
	before := calls(rdb, t, "srem")
	redis.letGo()
	harness.Eventually(t, harness.Patience, "it to arrive", func() bool { return calls(rdb, t, "srem") != before })
	if n := members(); n != 2 {
		t.Errorf("%d pods claim the agent, want both", n)
	}
	var due []uint64
	for range 40 {
		due = append(due, w.Chat("acme", "desk1"))
	}
	w.Settled()
	wantExactly(ann, due)
	ann.Close(1000, "")
	harness.Eventually(t, harness.Patience, "all claims of the first pod to be released", func() bool { return members() == 1 })
}
