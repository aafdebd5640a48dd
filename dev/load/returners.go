package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"
)

// backTally is what has become of the clients that come back.
type backTally struct {
	Ready    int64 // sockets that came to their ready
	Over     int64 // of these, those that resumed; a client whose socket breaks then is counted again
	Received int64 // events, each once per client
	Replayed int64
	Gaps     int64
	Turned   int64            // refusals and broken connections on the way back
	Why      map[string]int64 // of these: how many by status or error
}

// returners are the clients of the pod that dies, in a process of their own: in the one that measures, thousands that
// dial at once would delay what it measures.
type returners struct {
	*child
	done  chan struct{} // closed when the process says no more
	tally atomic.Pointer[backTally]
}

// backID names the i-th agent of those who come back.
func backID(i int) string { return fmt.Sprintf("back%05d", i) }

// child is a process of this program, for what would count as the service's work in the one that measures. It ends with its input.
type child struct {
	io.WriteCloser // its input
	said           io.Reader
	cmd            *exec.Cmd
}

// startChild starts one. Where what it does would have processors of its own, a niceness of 19 gives it what those under
// measurement leave.
func startChild(niceness int, args ...string) (*child, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	cmd := exec.Command("nice", append([]string{"-n", fmt.Sprint(niceness), self}, args...)...)
	cmd.Stderr = os.Stderr
	tell, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	said, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", cmd, err)
	}
	return &child{tell, said, cmd}, nil
}

func (c *child) close() {
	c.Close()
	c.cmd.Wait()
}

// gather starts the process of n clients at address.
func gather(n int, address string) (*returners, error) {
	c, err := startChild(19, "back", fmt.Sprint(n))
	if err != nil {
		return nil, err
	}
	r := &returners{child: c, done: make(chan struct{})}
	r.tally.Store(&backTally{})
	go func() {
		defer close(r.done)
		for d := json.NewDecoder(c.said); ; {
			var t backTally
			if d.Decode(&t) != nil {
				return
			}
			r.tally.Store(&t)
		}
	}()
	return r, r.moveTo(address)
}

// moveTo has clients connect to address from now on.
func (r *returners) moveTo(address string) error {
	_, err := fmt.Fprintln(r, address)
	return err
}

func (r *returners) close() {
	r.Close()
	<-r.done
	r.cmd.Wait()
}

// wait waits until what is counted reaches n.
func (r *returners) wait(ctx context.Context, what string, counted func(*backTally) int64, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	for counted(r.tally.Load()) < int64(n) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d of %d %s after two minutes", counted(r.tally.Load()), n, what)
		case <-r.done:
			return fmt.Errorf("%d of %d %s: the clients' process ended", counted(r.tally.Load()), n, what)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// returner is a client that keeps its position and resumes from it, as docs/protocol.md tells clients to do. What it has had
// stands in seen, for the tally's sake.
type returner struct {
	agent    string
	crowd    *comers
	seen     map[int64]bool
	stream   string // what the position is of; "" = there is none
	position uint64
}

// told is what a returner is told beside events.
type told struct {
	Type    string
	Seq     uint64
	Payload struct {
		Stream   string
		Position uint64
		Gap      bool
	}
}

// comers are the clients within their process.
type comers struct {
	address atomic.Pointer[string] // of the pod to connect to
	mu      sync.Mutex             // guards tally
	tally   backTally
}

// come is the clients' process: it reads addresses, each to be connected to from then on, until its input ends, and
// writes the tally a hundred times a second.
func come(ctx context.Context, n int) error {
	ctx, cancel := context.WithCancel(ctx)
	in := bufio.NewScanner(os.Stdin)
	if !in.Scan() {
		cancel()
		return in.Err()
	}
	first := in.Text()
	all := &comers{tally: backTally{Why: map[string]int64{}}}
	all.address.Store(&first)
	var wg sync.WaitGroup
	for i := range n {
		c := &returner{agent: backID(i), crowd: all, seen: map[int64]bool{}}
		wg.Go(func() { c.run(ctx) })
	}
	go func() {
		defer cancel()
		for in.Scan() {
			next := in.Text()
			all.address.Store(&next)
		}
	}()
	for out := json.NewEncoder(os.Stdout); ctx.Err() == nil; time.Sleep(10 * time.Millisecond) {
		all.mu.Lock()
		now := all.tally
		now.Why = maps.Clone(now.Why)
		all.mu.Unlock()
		if out.Encode(now) != nil {
			cancel()
		}
	}
	wg.Wait()
	return nil
}

func (c *comers) count(f func(*backTally)) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f(&c.tally)
}

// run connects again and again: each time after a random part of a doubling time.
func (c *returner) run(ctx context.Context) {
	for attempt := 0; ctx.Err() == nil; attempt++ {
		wait := time.Duration(rand.Int64N(int64(min(500*time.Millisecond<<min(attempt, 6), 30*time.Second))))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		if c.attend(ctx) {
			attempt = -1
		} else {
			c.crowd.count(func(t *backTally) { t.Turned++ })
		}
	}
}

// attend is the life of one socket; it says whether it came to its ready.
func (c *returner) attend(ctx context.Context) (greeted bool) {
	dialer := websocket.Dialer{ReadBufferSize: 1024, WriteBufferSize: 256, NetDialContext: (&net.Dialer{}).DialContext}
	url := fmt.Sprintf("ws://%s/ws/acme/%s?since=", *c.crowd.address.Load(), c.agent)
	resumes := c.stream != ""
	if resumes {
		url += fmt.Sprintf("%d&stream=%s", c.position, c.stream)
	}
	ws, resp, err := dialer.DialContext(ctx, url, http.Header{"X-API-Key": {apiKey}, "Authorization": {"Bearer " + mint(c.agent)}})
	if err != nil {
		key := "no connection"
		if resp != nil {
			b, _ := io.ReadAll(resp.Body)
			key = resp.Status + string(b)
		}
		c.crowd.count(func(t *backTally) { t.Why[key]++ })
		return false
	}
	defer ws.Close()
	defer context.AfterFunc(ctx, func() { ws.Close() })()
	for {
		_, m, err := ws.ReadMessage()
		if err != nil {
			return greeted
		}
		if bytes.Contains(m[:min(len(m), 60)], []byte(`"event"`)) {
			if bytes.HasSuffix(m, []byte(`"replay":true}`)) {
				c.crowd.count(func(t *backTally) { t.Replayed++ })
			}
			c.have(field(m, "n"))
			continue
		}
		var is told
		if json.Unmarshal(m, &is) != nil {
			return greeted
		}
		switch is.Type {
		case "position":
			c.position = max(c.position, is.Seq)
		case "gap":
			c.crowd.count(func(t *backTally) { t.Gaps++ })
			ws.WriteJSON(map[string]string{"type": "resume"}) // an error ends the reading, too
		case "ready", "resumed":
			c.answered(is)
			if is.Type == "ready" {
				greeted = true
				c.crowd.count(func(t *backTally) {
					t.Ready++
					if resumes {
						t.Over++
					}
				})
			}
		}
	}
}

// answered takes the position behind a replay, or, where a gap is left, that of a client that loads all anew.
func (c *returner) answered(is told) {
	p := is.Payload
	if p.Gap {
		c.crowd.count(func(t *backTally) { t.Gaps++ })
	}
	if p.Gap || p.Stream != c.stream {
		c.stream, c.position = p.Stream, 0
	}
	c.position = max(c.position, p.Position)
}

func (c *returner) have(n int64) {
	if !c.seen[n] {
		c.seen[n] = true
		c.crowd.count(func(t *backTally) { t.Received++ })
	}
}
