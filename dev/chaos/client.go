package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/gorilla/websocket"
)

// client is one user, or admin, who does what docs/protocol.md tells clients to do.
type client struct {
	w              *world
	name           string
	admin          bool
	agent, chat    string // of an admin "" is every agent
	token          string
	slow           bool // has a small receive buffer: a pause of its reading is felt by the pod
	stopping       <-chan struct{}
	ready, chosen  chan struct{} // closed at the first ready, the first chat_selected
	backoff        time.Duration // of its own goroutine, like the next seven
	greeted        time.Time     // ready of this socket
	top            uint64        // highest sequence known
	known          bool          // there is one: 0, while the stream is empty, is one too
	owed           *uint64       // lowest since that is not answered yet
	asked          int           // answers under way
	again          bool          // a gap came meanwhile
	selecting      bool          // one of the answers is that of select_chat
	mu             sync.Mutex    // guards all below
	ws             *websocket.Conn
	pod            int
	pauseTill      time.Time
	vanished       bool // leave the socket open, unread, and come back by another
	ghosts         []*ghost
	resting        bool      // its socket is ready, and it has nothing to ask for
	readyAt        time.Time // first ready, first chat_selected
	chosenAt       time.Time
	reloaded       time.Time // of the last reload: what was acknowledged before it counts as had
	got            map[uint64]arrival
	fresh          []time.Time // of each first arrival
	live, repeated int         // deliveries that were no replays; those of them that had come live before
	twice          int         // of these, on the same socket, a short while ago
	replayed       int
	here           map[uint64]int // events that came live by this socket, and as its how-manieth message
	count          int            // events by this socket
	reloads        []time.Time
	journal        []entry
}

// arrival is what is known of an event that came.
type arrival struct {
	at   time.Time
	live bool // once at least not by a replay
}

// ghost is a socket that was left open, and nobody reads: one of a page that hangs, while its user has opened another.
type ghost struct {
	ws     *websocket.Conn
	closed atomic.Bool // by the service; known once haunt runs
}

// entry is a line of a client's journal.
type entry struct {
	at   time.Time
	what string
}

// message is whatever the service sends.
type message struct {
	Type    string `json:"type"`
	Seq     uint64 `json:"seq"`
	Replay  bool   `json:"replay"`
	Payload struct {
		Seq     uint64 `json:"seq"`
		Since   uint64 `json:"since"`
		Resumed int    `json:"resumed"`
		Gap     bool   `json:"gap"`
		Reason  string `json:"reason"`
		Code    string `json:"code"`
	} `json:"payload"`
}

var retryAfter = regexp.MustCompile(`retry-after-ms=(\d+)`)

const (
	firstBackoff = 500 * time.Millisecond
	lastBackoff  = 4 * time.Second // the page's 30 s would outlast a run; what it has as a minute is in proportion
	steady       = 8 * time.Second
	deadAfter    = 15 * time.Second // without any message, pings being sent every third of it
)

// live connects again and again until the run ends.
func (c *client) run() {
	c.backoff = firstBackoff
	for {
		pause := c.once()
		select {
		case <-c.stopping:
			return
		case <-time.After(pause):
		}
	}
}

// once is the life of one socket. It returns how long to wait before the next.
func (c *client) once() time.Duration {
	pod := rand.IntN(pods)
	ws, err := c.dial(pod)
	if err != nil {
		c.note("dial pod-%d: %v", pod, err)
		return c.jitter()
	}
	c.mu.Lock()
	c.ws, c.pod, c.vanished = ws, pod, false
	c.here, c.count = map[uint64]int{}, 0
	c.mu.Unlock()
	c.greeted = time.Time{}
	end := make(chan struct{})
	var pings sync.WaitGroup
	pings.Go(func() { c.ping(ws, end) })
	err = c.read(ws)
	close(end)
	c.mu.Lock()
	c.ws, c.resting = nil, false
	if c.vanished {
		c.ghosts = append(c.ghosts, &ghost{ws: ws})
	} else {
		ws.Close()
	}
	c.mu.Unlock()
	pings.Wait()
	c.note("pod-%d: closed: %v", pod, err)
	if !c.greeted.IsZero() && time.Since(c.greeted) > steady {
		c.backoff = firstBackoff
	}
	return c.afterClose(err)
}

// afterClose does what the table of close codes says.
func (c *client) afterClose(err error) time.Duration {
	var code *websocket.CloseError
	if errors.As(err, &code) {
		if m := retryAfter.FindStringSubmatch(code.Text); m != nil {
			ms, _ := strconv.Atoi(m[1])
			return time.Duration(ms) * time.Millisecond
		}
		if code.Code == 4402 { // "connect again when they ask for it": this one soon does
			return time.Second + time.Duration(rand.Int64N(int64(2*time.Second)))
		}
		if code.Code >= 4400 && code.Code <= 4403 || code.Code == 1002 || code.Code == 1007 {
			c.w.complain(fmt.Sprintf("%s was closed with %v, which it gave no reason for", c.name, err))
		}
	}
	return c.jitter()
}

func (c *client) jitter() time.Duration {
	d := time.Duration(rand.Int64N(int64(c.backoff)))
	c.backoff = min(2*c.backoff, lastBackoff)
	return d
}

// dial opens the next socket, asking for what may have been missed.
func (c *client) dial(pod int) (*websocket.Conn, error) {
	c.asked, c.again, c.selecting = 0, false, false
	if c.owed == nil && c.known {
		c.owe(c.top)
	}
	url := fmt.Sprintf("ws://%s/ws/acme/%s?", c.w.pod(pod).HTTP, c.agent)
	key := apiKey
	if c.admin {
		url, key = fmt.Sprintf("ws://%s/ws/admin?", c.w.pod(pod).HTTP), adminAPI
	}
	if c.owed != nil {
		url += fmt.Sprintf("since=%d", *c.owed)
		c.asked = 1
		c.note("pod-%d: connect since %d", pod, *c.owed)
	}
	d := websocket.Dialer{HandshakeTimeout: 5 * time.Second, NetDialContext: c.netDial}
	ws, resp, err := d.Dial(url, http.Header{"X-API-Key": {key}, "Authorization": {"Bearer " + c.token}})
	if err != nil && resp != nil {
		err = fmt.Errorf("%w: %s", err, resp.Status)
	}
	return ws, err
}

func (c *client) netDial(ctx context.Context, network, addr string) (net.Conn, error) {
	d := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		if !c.slow {
			return nil
		}
		return raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, 16<<10)
			// The pod's kernel buffers a number of segments, which are of 64 KiB on the loopback interface.
			syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, syscall.TCP_MAXSEG, 1000)
		})
	}}
	return d.DialContext(ctx, network, addr)
}

// ping notices connections that are dead. It shares the writing with the reader, which asks.
func (c *client) ping(ws *websocket.Conn, end <-chan struct{}) {
	tick := time.NewTicker(deadAfter / 3)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			c.send(ws, map[string]any{"type": "ping"})
		case <-end:
			return
		}
	}
}

func (c *client) send(ws *websocket.Conn, m any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	ws.SetWriteDeadline(time.Now().Add(5 * time.Second))
	ws.WriteJSON(m) // an error ends the reading, too
}

var errVanished = errors.New("vanished, the socket left open")

func (c *client) read(ws *websocket.Conn) error {
	for {
		c.mu.Lock()
		pause, vanished := time.Until(c.pauseTill), c.vanished
		c.mu.Unlock()
		if vanished {
			return errVanished
		}
		if pause > 0 {
			select {
			case <-time.After(pause):
			case <-c.stopping:
			}
		}
		ws.SetReadDeadline(time.Now().Add(deadAfter))
		_, data, err := ws.ReadMessage()
		if err != nil {
			return err
		}
		var m message
		if err := json.Unmarshal(data, &m); err != nil {
			return fmt.Errorf("not JSON: %q", data)
		}
		c.message(ws, m)
	}
}

func (c *client) message(ws *websocket.Conn, m message) {
	p := m.Payload
	if m.Type != "event" && m.Type != "pong" {
		c.note("%s %+v", m.Type, p)
	}
	switch m.Type {
	case "event":
		c.event(m)
	case "gap":
		c.owe(p.Since)
		if c.asked > 0 {
			c.again = true
		} else {
			c.resume(ws)
		}
	case "ready":
		c.becameReady()
		if c.chat != "" {
			c.choose(ws)
		}
		if c.owed != nil && (c.chat == "" || c.asked > 1) {
			c.answered(ws, p.Seq, p.Gap)
		} else {
			c.top = max(c.top, p.Seq)
		}
	case "chat_selected":
		c.selecting = false
		c.mu.Lock()
		if c.chosenAt.IsZero() {
			c.chosenAt = time.Now()
			close(c.chosen)
		}
		c.mu.Unlock()
		c.answered(ws, p.Seq, p.Gap)
	case "resumed":
		c.answered(ws, p.Seq, p.Gap)
	case "error":
		if p.Code == "Unavailable" && c.selecting { // not answered: what is owed stays owed
			time.Sleep(300 * time.Millisecond)
			c.asked--
			c.choose(ws)
		}
	}
	c.mu.Lock()
	c.resting = !c.greeted.IsZero() && c.asked == 0 && c.owed == nil
	c.mu.Unlock()
}

func (c *client) becameReady() {
	c.greeted, c.known = time.Now(), true
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readyAt.IsZero() {
		c.readyAt = time.Now()
		close(c.ready)
	}
}

// owe lowers what is to be asked for.
func (c *client) owe(since uint64) {
	if c.owed == nil || since < *c.owed {
		c.owed = &since
	}
}

func (c *client) choose(ws *websocket.Conn) {
	c.selecting = true
	c.asked++
	payload := map[string]any{"chat_id": c.chat}
	if c.owed != nil {
		payload["since"] = *c.owed
	}
	c.send(ws, map[string]any{"type": "select_chat", "payload": payload})
}

func (c *client) resume(ws *websocket.Conn) {
	c.asked++
	c.send(ws, map[string]any{"type": "resume", "payload": map[string]any{"since": *c.owed}})
}

// answered: only when nothing is under way any more has everything after owed come.
func (c *client) answered(ws *websocket.Conn, seq uint64, gap bool) {
	c.asked--
	c.top = max(c.top, seq)
	if gap { // a reload fetches all that was published until now
		c.mu.Lock()
		c.reloaded = time.Now()
		c.reloads = append(c.reloads, c.reloaded)
		c.mu.Unlock()
	}
	switch {
	case c.asked > 0:
	case c.again:
		c.again = false
		c.resume(ws)
	default:
		c.owed = nil
	}
}

// remembered is how many events ago the service certainly knows that it has written one to a socket.
const remembered = 200

func (c *client) event(m message) {
	c.top = max(c.top, m.Seq)
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	before, had := c.got[m.Seq]
	if m.Replay {
		c.replayed++
	} else {
		c.live++
		if before.live {
			c.repeated++
		}
		if at, again := c.here[m.Seq]; again && c.count-at < remembered {
			c.twice++
		}
		c.here[m.Seq] = c.count
	}
	c.count++
	if !had {
		before.at = now
		c.fresh = append(c.fresh, now)
	}
	before.live = before.live || !m.Replay
	c.got[m.Seq] = before
}

func (c *client) note(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.journal = append(c.journal, entry{time.Now(), fmt.Sprintf(format, args...)})
}

// vanish ends the socket without a word: by a reset, or not at all, with its TCP connection left open and unread.
func (c *client) vanish(reset bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ws == nil {
		return
	}
	if !reset {
		c.vanished = true
		c.ws.SetReadDeadline(time.Now())
		return
	}
	if tcp, ok := c.ws.NetConn().(*net.TCPConn); ok {
		tcp.SetLinger(0)
	}
	c.ws.NetConn().Close()
}

// pause stops its reading for a while.
func (c *client) pause(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.pauseTill = time.Now().Add(d)
}

// end breaks the socket for good, and those that were left open.
func (c *client) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ws != nil {
		c.ws.NetConn().Close()
	}
	for _, g := range c.ghosts {
		g.ws.Close()
	}
}

// haunt reads what comes to the socket, bare bytes, until the service closes it.
func (g *ghost) haunt() {
	g.ws.SetReadDeadline(time.Time{})
	io.Copy(io.Discard, g.ws.NetConn())
	g.closed.Store(true)
}
