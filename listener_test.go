package main

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// kernelQueue is a listener at which connections wait.
type kernelQueue struct {
	net.Listener
	waiting  chan net.Conn
	closed   chan struct{}
	deadline time.Time
}

func (q *kernelQueue) SetDeadline(t time.Time) error {
	q.deadline = t
	return nil
}

func (q *kernelQueue) Accept() (net.Conn, error) {
	select {
	case c := <-q.waiting:
		return c, nil
	default:
	}
	var late <-chan time.Time
	if !q.deadline.IsZero() {
		late = time.After(time.Until(q.deadline))
	}
	select {
	case c := <-q.waiting:
		return c, nil
	case <-late:
		return nil, os.ErrDeadlineExceeded
	case <-q.closed:
		return nil, net.ErrClosed
	}
}

// visitor is a connection that says when it was closed.
type visitor struct {
	net.Conn
	closed bool
}

func (v *visitor) Close() error {
	v.closed = true
	return nil
}

// newKernelQueue has n visitors waiting, who are told in the order of their coming.
func newKernelQueue(n int) (*kernelQueue, []*visitor) {
	q := &kernelQueue{waiting: make(chan net.Conn, n+100), closed: make(chan struct{})}
	var all []*visitor
	for range n {
		all = append(all, q.come())
	}
	return q, all
}

func (q *kernelQueue) come() *visitor {
	v := &visitor{}
	q.waiting <- v
	return v
}

// handedOut takes n connections and says how long that took.
func handedOut(t *testing.T, l *crowdListener, n int) (got []*visitor, took time.Duration) {
	t.Helper()
	start := time.Now()
	for range n {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, c.(*visitor))
	}
	return got, time.Since(start)
}

func noVacancy() int { return 0 }

// TestCrowdIsPaced: a few connections are served at once, and those of a crowd one after the other; after a while a few
// are again.
func TestCrowdIsPaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, _ := newKernelQueue(900)
		l := newCrowdListener(q, 2000, noVacancy, newMetrics())
		acceptEvery := time.Second / 2000
		if _, took := handedOut(t, l, acceptBurst); took != 0 {
			t.Errorf("a few connections took %v, want no time", took)
		}
		if _, took := handedOut(t, l, 600); took != 600*acceptEvery {
			t.Errorf("600 more took %v, want %v", took, 600*acceptEvery)
		}
		time.Sleep(acceptBurst * acceptEvery)
		if _, took := handedOut(t, l, acceptBurst); took != 0 {
			t.Errorf("a few connections after a pause took %v, want no time", took)
		}
	})
}

func TestAcceptRateFollowsTheProcessors(t *testing.T) {
	q, _ := newKernelQueue(0)
	if l := newCrowdListener(q, 0, noVacancy, newMetrics()); l.every <= 0 || l.every > time.Second/acceptPerProcessor {
		t.Errorf("one every %v", l.every)
	}
}

// TestLastComerIsServedFirst: who comes after a crowd is next, and the crowd's turn comes all the same.
func TestLastComerIsServedFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, crowd := newKernelQueue(300)
		m := newMetrics()
		l := newCrowdListener(q, 100, noVacancy, m)
		first, _ := handedOut(t, l, acceptBurst+1)
		if !slices.Equal(first[:acceptBurst], crowd[:acceptBurst]) || first[acceptBurst] != crowd[299] {
			t.Error("while there is no crowd the first comes first, and then the last")
		}
		if n := m.connectionsWaiting.with().Get(); n != 249 {
			t.Errorf("the gauge says that %v wait, want 249", n)
		}
		for range 3 {
			probe := q.come()
			got, took := handedOut(t, l, 1)
			if got[0] != probe || took > time.Second/100 {
				t.Errorf("the probe was not the next after %v", took)
			}
		}
		rest, took := handedOut(t, l, 249)
		slices.Reverse(rest)
		if !slices.Equal(rest, crowd[acceptBurst:299]) || took != 249*time.Second/100 {
			t.Errorf("the crowd was not served in its turn, or took %v", took)
		}
		if n := m.connectionsWaiting.with().Get(); n != 0 {
			t.Errorf("the gauge says that %v wait, want 0", n)
		}
	})
}

// TestCrowdHasABorder: no more are accepted than there is room for, the others stay with the kernel and come in as room
// is made.
func TestCrowdHasABorder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, crowd := newKernelQueue(2000)
		l := newCrowdListener(q, 100, func() int { return 200 }, newMetrics())
		handedOut(t, l, acceptBurst+1)
		if n := len(l.waiting) + 1; n != acceptSpare+200 {
			t.Errorf("%d wait, want %d", n, acceptSpare+200)
		}
		got, _ := handedOut(t, l, 2000-acceptBurst-1)
		slices.SortFunc(got, func(a, b *visitor) int { return slices.Index(crowd, a) - slices.Index(crowd, b) })
		if len(slices.Compact(got)) != 2000-acceptBurst-1 {
			t.Error("someone was handed out twice")
		}
	})
}

// TestCrowdEndsWithTheListener: those who wait are closed, as the kernel closes those in its queue.
func TestCrowdEndsWithTheListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q, crowd := newKernelQueue(100)
		m := newMetrics()
		l := newCrowdListener(q, 1, noVacancy, m)
		handedOut(t, l, acceptBurst+1)
		close(q.closed)
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("error %v", err)
		}
		if n := m.connectionsWaiting.with().Get(); n != 0 {
			t.Errorf("the gauge says that %v still wait", n)
		}
		for i, v := range crowd {
			if v.closed != (i >= acceptBurst && i < 99) {
				t.Errorf("visitor %d: closed %v", i, v.closed)
			}
		}
	})
}

// TestProbeOvertakesCrowd is the same with real connections, of which nobody but the probe and the first few is answered
// within the test's time.
func TestProbeOvertakesCrowd(t *testing.T) {
	s := newTestServer(func(c *Config) { c.ServerAcceptRate = 1 })
	addr := startServer(t, s).String()
	answers := make(chan string, 200)
	for range 200 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		go func() {
			io.WriteString(c, "GET /health HTTP/1.1\r\nHost: crowd\r\nConnection: close\r\n\r\n")
			line, _ := bufio.NewReader(c).ReadString('\n')
			answers <- strings.TrimSpace(line)
		}()
	}
	for range acceptBurst {
		if a := <-answers; a != "HTTP/1.1 200 OK" {
			t.Fatalf("answer %q", a)
		}
	}
	resp, err := http.Get("http://" + addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if n := len(answers); n > 20 {
		t.Errorf("%d of the crowd were answered before the probe", n)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.shutdown(ctx); err != nil {
		t.Error(err)
	}
	closed := 0
	for range 200 - acceptBurst {
		if <-answers == "" {
			closed++
		}
	}
	if closed < 100 {
		t.Errorf("%d of the crowd were closed at the shutdown", closed)
	}
}
