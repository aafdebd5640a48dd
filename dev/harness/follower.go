package harness

import (
	"context"
	"maps"
	"regexp"
	"strconv"
	"sync"
	"time"
)

// Follower is a user who stays: whenever the socket ends it opens another, on the pod that is named next, after the
// delay that the service asked for. It keeps every sequence that it got, over all its sockets. One that keeps positions
// (Dial.Positions) comes back with its last one, and resumes when it is told of a gap.
type Follower struct {
	dial   Dial
	pods   []*Pod // the first for the first socket; the last for all further ones
	behind string // address of a balancer instead of theirs
	place  Place  // of its last socket; owned by run

	mu     sync.Mutex // guards all below
	got    map[uint64]int
	came   map[uint64]time.Time // when each came first
	gaps   []Reply
	loaded time.Time
	ends   []Ended
	client *Client // open and ready, or nil
}

// Ended is how one socket of a Follower ended, and when the next was ready.
type Ended struct {
	Close
	At   time.Time
	Own  time.Duration // what it waited by itself until then, beyond what the service asked for
	Back time.Time     // zero while it has no next one
}

var retryAfter = regexp.MustCompile(`^drain retry-after-ms=(\d+)$`)

// RetryAfter is the delay that a close for a drain asks for; false where the reason is another.
func (c Close) RetryAfter() (time.Duration, bool) {
	m := retryAfter.FindStringSubmatch(c.Reason)
	if m == nil {
		return 0, false
	}
	ms, err := strconv.Atoi(m[1])
	return time.Duration(ms) * time.Millisecond, err == nil
}

// Follow connects, waits for ready, and then follows until the test ends.
func (w *World) Follow(d Dial, pods ...*Pod) *Follower {
	w.T.Helper()
	return w.follow(&Follower{dial: d, pods: pods})
}

// FollowBehind is Follow through a balancer at that address.
func (w *World) FollowBehind(d Dial, address string, pod *Pod) *Follower {
	w.T.Helper()
	return w.follow(&Follower{dial: d, pods: []*Pod{pod}, behind: address})
}

func (w *World) follow(f *Follower) *Follower {
	w.T.Helper()
	f.dial, f.got, f.came = f.dial.complete(w), map[uint64]int{}, map[uint64]time.Time{}
	ctx, cancel := context.WithCancel(w.T.Context())
	done := make(chan struct{})
	go func() { f.run(ctx); close(done) }()
	w.T.Cleanup(func() { cancel(); <-done })
	Eventually(w.T, Patience, f.dial.User+" to be ready", func() bool { return f.Client() != nil })
	return f
}

// Client is the socket that is open and ready now, or nil.
func (f *Follower) Client() *Client {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.client
}

// Got says how often each sequence has come, as of now.
func (f *Follower) Got() map[uint64]int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.got)
}

// Name is its user's.
func (f *Follower) Name() string { return f.dial.User }

// Fate is World.Fate.
func (f *Follower) Fate(seq uint64) string { return f.pods[0].W.Fate(seq) }

// Came says when each sequence has come first, as of now.
func (f *Follower) Came() map[uint64]time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return maps.Clone(f.came)
}

// Loaded is when it was told last that it can't resume from its position, and loads everything; zero = never.
func (f *Follower) Loaded() time.Time {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.loaded
}

// Gaps are all gaps that were announced so far.
func (f *Follower) Gaps() []Reply {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Reply(nil), f.gaps...)
}

// Ends are all ends of its sockets so far.
func (f *Follower) Ends() []Ended {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]Ended(nil), f.ends...)
}

func (f *Follower) run(ctx context.Context) {
	for n := 0; ctx.Err() == nil; n++ {
		pod := f.pods[min(n, len(f.pods)-1)]
		wait, own := f.attend(ctx, pod)
		f.mu.Lock()
		if n := len(f.ends); n > 0 && own {
			f.ends[n-1].Own += wait
		}
		f.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// attend is the life of one socket; it returns how long to wait before the next, and whether that is its own idea.
func (f *Follower) attend(ctx context.Context, pod *Pod) (wait time.Duration, own bool) {
	const again = 50 * time.Millisecond
	dctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	d, address := f.dial, pod.HTTP
	if f.behind != "" {
		address = f.behind
	}
	if f.place.Stream != "" {
		d = d.From(f.place)
	}
	c, _, err := pod.tryDial(dctx, d, address)
	if err != nil {
		return again, true
	}
	defer c.Abort()
	for {
		m, err := c.TryTake(ctx, func(Message) bool { return true })
		if err != nil {
			break
		}
		f.note(c, m)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.client = nil
	if p := c.Place(); p.Stream != "" {
		f.place = p
	}
	end := c.Ended()
	if end == nil { // the test is over
		return 0, true
	}
	wait, told := end.RetryAfter()
	if !told {
		wait = again
	}
	if n := len(f.ends); n > 0 && f.ends[n-1].Back.IsZero() { // it never was ready: an attempt that failed
		return wait, true
	}
	f.ends = append(f.ends, Ended{Close: *end, At: time.Now()})
	return wait, !told
}

func (f *Follower) note(c *Client, m Message) {
	f.mu.Lock()
	defer f.mu.Unlock()
	switch m.Type {
	case "ready":
		c.Ready, _ = m.reply()
		f.client = c
		if n := len(f.ends); n > 0 && f.ends[n-1].Back.IsZero() {
			f.ends[n-1].Back = m.At
		}
	case "event":
		if f.got[m.Seq]++; f.got[m.Seq] == 1 {
			f.came[m.Seq] = m.At
		}
	case "gap":
		if r, err := m.reply(); err == nil {
			f.gaps = append(f.gaps, r)
		}
		if f.dial.Query.Has("since") {
			c.TrySend(true, []byte(`{"type":"resume"}`)) // an error: the socket has ended, and the next one resumes
		}
	}
	if m.Type == "ready" || m.Type == "resumed" {
		if r, err := m.reply(); err == nil && r.Gap {
			f.loaded = m.At
		}
	}
}
