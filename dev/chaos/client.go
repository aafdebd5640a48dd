package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
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
	ready, chosen  chan struct{}   // closed at the first ready, the first chat_selected
	backoff        time.Duration   // of its own goroutine, like the next five
	greeted        time.Time       // ready of this socket
	stream         string          // what the position is of; "" = there is none
	position       uint64          // everything up to it was had
	had            map[uint64]bool // what came since
	asked          int             // answers under way
	mu             sync.Mutex      // guards all below
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
	fresh          []time.Time     // of each first arrival
	live, repeated int             // deliveries that were no replays; those of them that had come live before
	twice          int             // of these, on the same socket, a short while ago
	applied        map[uint64]bool // what the client's rule let through since the last reload
	wrong          int             // of these, what came again, and should have been dropped
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
		Seq      uint64 `json:"seq"`
		Position uint64 `json:"position"`
		Stream   string `json:"stream"`
		Since    uint64 `json:"since"`
		Resumed  int    `json:"resumed"`
		Gap      bool   `json:"gap"`
		Reason   string `json:"reason"`
		Code     string `json:"code"`
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
	c.asked = 1
	url := fmt.Sprintf("ws://%s/ws/acme/%s?", c.w.pod(pod).HTTP, c.agent)
	key := apiKey
	if c.admin {
		url, key = fmt.Sprintf("ws://%s/ws/admin?", c.w.pod(pod).HTTP), adminAPI
	}
	if c.stream != "" {
		url += fmt.Sprintf("since=%d&stream=%s", c.position, c.stream)
		if c.chat != "" {
			url += "&chat=" + c.chat
		}
		c.note("pod-%d: connect since %d", pod, c.position)
	} else {
		url += "since="
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
		c.note("%s %d %+v", m.Type, m.Seq, p)
	}
	switch m.Type {
	case "event":
		c.event(m)
	case "position":
		c.know(m.Seq)
	case "gap":
		c.asked++
		time.AfterFunc(hesitation(), func() { c.send(ws, map[string]any{"type": "resume"}) })
	case "ready":
		c.becameReady()
		c.answered(p.Stream, p.Position, p.Gap)
		if c.chat != "" && c.chosenAt.IsZero() { // later sockets name it as they connect
			c.asked++
			c.send(ws, map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": c.chat}})
		}
	case "chat_selected":
		c.asked--
		c.mu.Lock()
		if c.chosenAt.IsZero() {
			c.chosenAt = time.Now()
			close(c.chosen)
		}
		c.mu.Unlock()
	case "resumed":
		c.answered(p.Stream, p.Position, p.Gap)
	}
	c.mu.Lock()
	c.resting = !c.greeted.IsZero() && c.asked == 0
	c.mu.Unlock()
}

// hesitation is how long a client takes to resume: half of them are busy. They are given no position meanwhile.
func hesitation() time.Duration {
	return time.Duration(rand.IntN(2)) * rand.N(4*time.Second)
}

func (c *client) becameReady() {
	c.greeted = time.Now()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.readyAt.IsZero() {
		c.readyAt = time.Now()
		close(c.ready)
	}
}

// know keeps the highest position.
func (c *client) know(position uint64) {
	c.position = max(c.position, position)
	maps.DeleteFunc(c.had, func(seq uint64, _ bool) bool { return seq <= c.position })
}

// answered: what came since the position was replayed, or all is loaded anew: what was published until now counts as had.
func (c *client) answered(stream string, position uint64, gap bool) {
	c.asked--
	if gap || stream != c.stream {
		if c.stream != "" {
			c.mu.Lock()
			c.reloaded = time.Now()
			c.reloads = append(c.reloads, c.reloaded)
			c.applied = map[uint64]bool{}
			c.mu.Unlock()
		}
		c.stream, c.position, c.had = stream, 0, map[uint64]bool{}
	}
	c.know(position)
}

// remembered is how many events ago the service certainly knows that it has written one to a socket.
const remembered = 200

func (c *client) event(m message) {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	if m.Seq > c.position && !c.had[m.Seq] {
		if c.had[m.Seq] = true; c.applied[m.Seq] {
			c.wrong++
		}
		c.applied[m.Seq] = true
	}
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
