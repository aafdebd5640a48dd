package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/url"
	"runtime/debug"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// routeTimeout bounds claiming a route, reading the stream's sequence and opening a token for a socket.
const routeTimeout = 5 * time.Second

// messageTime bounds how long a client may take for one message: pongs between two bytes of it keep the heartbeat
// content, and what has come of it is held.
const messageTime = time.Minute

var errClosed = errors.New("the socket was closed")

// lock is the session that a socket holds: its id, how to hear of its loss, and how to give it back.
type lock struct {
	id      string
	bind    func(kill func(code int, reason string))
	release func()
}

// conn is one socket. One goroutine at a time (run) reads, and is the last to touch it; whoever has the ring's turn writes;
// the hub's ticker sends pings and looks at the token; anyone may push, note gaps and close.
type conn struct {
	// Constant.
	id, requestID string
	h             *hub
	w             *writer
	nc            net.Conn
	raw           syscall.RawConn // nil where a write can't be tried without blocking (TLS)
	claims        *claims
	lock          lock
	since         time.Time
	entered       time.Time // the hub's index; set before it is found there

	ring ring

	// Owned by the goroutine that runs it.
	rate limiter
	live bool // counted as an open socket
	turn bool // has a turn of being set up

	nextPing time.Time    // owned by the hub's ticker
	missed   atomic.Int32 // pings without a pong
	expires  atomic.Int64 // of the token, in Unix nanoseconds
	begun    atomic.Int64 // see inbound

	mu      sync.Mutex // guards all below
	claimed bool       // the route is claimed
	cancel  context.CancelFunc
	code    int // of the close, 0 = open
	reason  string
	end     time.Time // when the connection is cut, however far the closing handshake is
}

func (h *hub) newConn(nc net.Conn, cl *claims, l lock, requestID string) *conn {
	c := &conn{id: l.id, requestID: requestID, h: h, nc: nc, claims: cl, lock: l, since: time.Now()}
	c.w = h.writers[int(h.next.Add(1))%len(h.writers)]
	if s, ok := nc.(syscall.Conn); ok {
		c.raw, _ = s.SyscallConn()
	}
	c.ring.policy = &h.policy
	c.expires.Store(cl.expires.UnixNano())
	// Spread out, so that a thousand clients that came at once are not pinged at once.
	c.nextPing = c.since.Add(rand.N(max(1, h.cfg.Load().WebsocketPingInterval)))
	return c
}

// push queues d for this socket and settles it exactly once, now or later. Never blocks; any goroutine may call.
func (c *conn) push(d *delivery) {
	var room [4]settlement // on the stack: a push allocates nothing
	c.h.count.pushed.Inc()
	c.h.count.used.Inc()
	if c.claims.admin != "" && !c.claims.covers(d.company, d.agent) {
		c.h.settle(append(room[:0], settlement{d, unselected}))
		return
	}
	ends, kick := c.ring.push(d, time.Now(), room[:0])
	c.kick(kick)
	c.h.settle(ends)
}

// gap tells the client that events after its last position may be missing; several calls before the writer's turn become one.
// reason is buffer, shed, expired, owner or stream.
func (c *conn) gap(reason string) { c.kick(c.ring.gap(reason, time.Now())) }

func (c *conn) reply(typ string, payload any) {
	c.kick(c.ring.reply(newReply(typ, payload), time.Now()))
}

// kick hands the socket to its writer if the ring says so.
func (c *conn) kick(yes bool) {
	if yes {
		c.w.add(c)
	}
}

// close ends the socket with a close frame; the first call wins. Never blocks; any goroutine may call.
func (c *conn) close(code int, reason string) { c.shut(code, reason, closeFrame(code, reason)) }

// shut closes with that frame. The session is released before the closing handshake: from here on nothing but replies
// and the close frame is written, and the newcomer of a replaced session need not wait for a client that does not answer.
func (c *conn) shut(code int, reason string, frame []byte) {
	c.mu.Lock()
	if c.code != 0 {
		c.mu.Unlock()
		return
	}
	now := time.Now()
	end := now.Add(lingerTime)
	c.code, c.reason, c.end = code, reason, end
	claimed, cancel := c.claimed, c.cancel
	c.mu.Unlock()

	if cancel != nil {
		cancel()
	}
	ends, kick := c.ring.close(frame, now, nil)
	if claimed {
		c.h.exit(c)
		c.h.owners.release(c.route())
	}
	c.h.settle(ends)
	c.lock.release()
	// Bounds the closing handshake, and with it the socket's goroutine, even if the client never reads.
	c.nc.SetReadDeadline(end)
	c.kick(kick)
}

// closing says whether the socket is open no longer.
func (c *conn) closing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.code != 0
}

// lost ends a socket whose connection is gone. Only who has the ring's turn may call it.
func (c *conn) lost() {
	c.shut(closeAbnormal, "connection lost", nil)
	c.h.settle(c.ring.fail(nil))
	c.nc.Close()
}

// run is the socket's life, outside net/http, on one goroutine after the other (see doze). The last one returns when nobody
// touches c any more.
func (c *conn) run(u *upgrade, p past) {
	if c.serve(u, p) {
		c.attend(c.inbound(u))
	} else {
		c.leave()
	}
}

// serve does the handshake and sets the socket up; it says whether there is something to read.
func (c *conn) serve(u *upgrade, p past) bool {
	defer c.recovered()
	c.lock.bind(c.close)
	if err := u.shake(c.h.cfg.Load().WebsocketWriteTimeout); err != nil {
		c.lost() // the ring was never opened: no writer has its turn
		return false
	}
	c.begin()
	return c.setUp(p)
}

// recovered is deferred: a panic closes the socket.
func (c *conn) recovered() {
	if p := recover(); p != nil {
		slog.Error("panic in a socket", "request_id", c.requestID, "err", fmt.Sprint(p), "stack", string(debug.Stack()))
		c.close(closeInternal, internalServerError().reason)
	}
}

// inbound reads what the client sends, from what net/http had read already on. Nothing of u is kept.
func (c *conn) inbound(u *upgrade) *inbound {
	in := &inbound{
		nc: c.nc, early: u.early, max: int(c.h.cfg.Load().WebsocketMaxMessage),
		deflate: c.ring.deflate, control: c.control, message: c.message, begun: &c.begun,
	}
	*u = upgrade{}
	return in
}

// attend handles what has come, and then leaves the socket to doze, or ends it.
func (c *conn) attend(in *inbound) {
	if c.read(in) {
		go c.doze(in) // ends when something comes or the connection is cut, which leave sees to
	} else {
		c.leave()
	}
}

// doze waits for the client, on a goroutine that has done nothing else: a stack that has grown never shrinks below 4 KiB, and
// waiting takes half of that. It was a fifth of the memory of an idle socket (measured); a new goroutine costs a microsecond.
func (c *conn) doze(in *inbound) {
	in.wait()
	go c.attend(in)
}

// leave is called when nothing is read any more; it returns when the socket is gone.
func (c *conn) leave() {
	defer c.h.unregister(c)
	c.endTurn()
	c.linger()
	c.finish()
}

// endTurn lets the next newcomer be set up.
func (c *conn) endTurn() {
	if c.turn {
		c.turn = false
		c.h.endTurn()
	}
}

// begin is the moment from which the socket counts as open.
func (c *conn) begin() {
	c.live = true
	typ := c.claims.userType()
	c.h.m.connectionsTotal.with(typ).Inc()
	c.h.m.activeConnections.with(typ).Inc()
	slog.Info("socket opened", c.logAttrs()...)
	c.kick(c.ring.open())
	c.h.mu.Lock()
	draining := c.h.draining
	c.h.mu.Unlock()
	if draining {
		c.goAway(c.h.cfg.Load().ServerDrainSpread)
	}
}

func (c *conn) logAttrs() []any {
	cl := c.claims
	if cl.admin != "" {
		return []any{"request_id", c.requestID, "admin", cl.admin, "company", cl.scopeCompany, "agent", cl.scopeAgent}
	}
	return []any{"request_id", c.requestID, "company", cl.company, "agent", cl.agent, "user", cl.user}
}

// past is what a client says of itself when it connects: `since`, `stream` and `chat` of the URL.
type past struct {
	positions bool   // it keeps positions
	since     uint64 // the last one
	stream    string // of which stream; "" = it has none yet
	chat      string // that was selected
}

// parsePast reads a URL's query.
func parsePast(q url.Values) (past, *apiError) {
	p := past{positions: q.Has("since"), chat: q.Get("chat")}
	if p.chat != "" {
		if err := checkChatID(p.chat); err != nil {
			return p, badRequestID(err)
		}
	}
	if since := q.Get("since"); since != "" {
		n, err := strconv.ParseUint(since, 10, 64)
		if err != nil {
			return p, badRequest("since", "since must be a position, or empty")
		}
		p.since, p.stream = n, cmp.Or(q.Get("stream"), "?") // without a name it is that of another stream
	}
	return p, nil
}

// setUp enters the local index, claims the route, replays what the client asked for, and greets it. In this order: an event that is
// published after the greeting is looked up after the claim, and finds the socket live.
func (c *conn) setUp(p past) bool {
	if c.claims.admin != "" {
		p.chat = ""
	}
	c.ring.begin(p)
	fresh := p.stream == ""
	c.h.enter(c)
	if err := c.claim(); err != nil {
		c.h.exit(c)
		c.unavailable("claim the route", err)
		return false
	}
	c.endTurn()
	ready := struct {
		SessionID string `json:"session_id"`
		resumed
	}{SessionID: c.id}
	if !fresh {
		ready.resumed = c.replay(c.ring.beginReplay())
		c.kick(c.ring.confirm(newReply("ready", ready), ready.Stream, ready.Position, time.Now()))
		return true
	}
	ctx, done := c.untilClosed(routeTimeout)
	defer done()
	var err error
	if ready.Seq, err = c.h.replays.seq(ctx); err != nil {
		c.unavailable("read the stream's sequence", err)
		return false
	}
	ready.Stream = c.h.stream()
	ready.Position = c.startPosition(ready.Stream)
	c.kick(c.ring.greet(newReply("ready", ready), ready.Stream, ready.Position, time.Now()))
	return true
}

func (c *conn) unavailable(what string, err error) {
	if !c.closing() {
		slog.Warn("socket not set up: "+what, append(c.logAttrs(), "err", err)...)
	}
	c.close(closeTryLater, unavailable("").reason)
}

// route is whose events are for this socket.
func (c *conn) route() route {
	if c.claims.admin != "" {
		return admins
	}
	return route{c.claims.company, c.claims.agent}
}

// claim claims c's route; close interrupts it, and releases it once it has succeeded.
func (c *conn) claim() error {
	ctx, done := c.untilClosed(routeTimeout)
	defer done()
	if err := c.h.owners.claim(ctx, c.route()); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.code != 0 { // close came while the claim was under way, and could not know that it would succeed
		c.h.owners.release(c.route())
		return errClosed
	}
	c.claimed = true
	return nil
}

// untilClosed is a context that ends with the socket, or after limit, if there is one. The read loop has one at a time, until done.
func (c *conn) untilClosed(limit time.Duration) (ctx context.Context, done func()) {
	ctx, cancel := context.WithCancel(context.Background())
	if limit > 0 {
		ctx, cancel = context.WithTimeout(context.Background(), limit)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel = cancel; c.code != 0 {
		cancel()
	}
	return ctx, func() {
		c.mu.Lock()
		c.cancel = nil
		c.mu.Unlock()
		cancel()
	}
}

// read has messages handled until no further one has come: it says true. False = the connection has ended or the socket is
// closed, by whomever; what comes after a close is not looked at.
func (c *conn) read(in *inbound) (open bool) {
	defer c.recovered()
	defer in.idle()
	for {
		op, buf, err := in.next()
		switch {
		case c.closing():
			recycle(buf)
			return false
		case err == errNothingYet:
			return true
		case err != nil:
			recycle(buf)
			c.close(closeOf(err))
			return false
		case op == opClose:
			c.closedByClient(*buf)
			return false
		}
		in.message(op, *buf)
		recycle(buf)
		c.ring.waitRoom()
	}
}

// closedByClient answers a close frame with its own code (RFC 6455 section 5.5.1).
func (c *conn) closedByClient(p []byte) {
	code, err := parseClose(p)
	if err != nil {
		c.close(closeOf(err))
		return
	}
	c.shut(code, "by the client", closeFrame(code, ""))
}

// tend is called about every second by the hub's ticker.
func (c *conn) tend(now time.Time) {
	if now.UnixNano() >= c.expires.Load() {
		c.close(closeForbidden, "token-expired")
		return
	}
	if begun := c.begun.Load(); begun != 0 && now.UnixNano()-begun > int64(messageTime) {
		c.close(closePolicy, "message-timeout")
		return
	}
	if now.Before(c.nextPing) {
		return
	}
	c.ring.trim()
	cfg := c.h.cfg.Load()
	c.nextPing = now.Add(cfg.WebsocketPingInterval)
	if int(c.missed.Load()) >= cfg.WebsocketMaxMissedPongs {
		c.close(closeInternal, "ping-timeout")
		return
	}
	c.missed.Add(1)
	c.ring.wantPosition()
	c.kick(c.ring.control(opPing, nil))
}

// linger waits, 2 s at the most, until the close frame is written and the client has closed its side, discarding what
// it still sends; then it cuts the connection and waits for whoever may be writing to notice.
func (c *conn) linger() {
	c.mu.Lock()
	end := c.end
	c.mu.Unlock()
	t := time.NewTimer(time.Until(end))
	defer t.Stop()
	io.Copy(io.Discard, struct{ io.Reader }{c.nc}) // until the read deadline that shut has set
	c.ring.waitDone(t.C)
	c.nc.Close()
	t.Reset(lingerTime)
	if !c.ring.waitDone(t.C) {
		slog.Error("a socket's writer does not end", "request_id", c.requestID)
	}
}

// finish counts and logs the end.
func (c *conn) finish() {
	c.mu.Lock()
	code, reason := c.code, c.reason
	c.mu.Unlock()
	if !c.live {
		return
	}
	life := time.Since(c.since)
	c.h.m.activeConnections.with(c.claims.userType()).Dec()
	c.h.m.closesTotal.with(codeLabel(code)).Inc()
	c.h.m.connectionDurationSeconds.with().Update(life.Seconds())
	slog.Info("socket closed", append(c.logAttrs(), "code", code, "reason", reason, "duration", life.String())...)
}

// codeLabel keeps the metric's label bounded: a client may close with thousands of codes.
func codeLabel(code int) string {
	known := code >= 1000 && code < 1015
	switch code {
	case 4400, 4401, 4402, closeForbidden, closeSlowClient, closeRateLimit:
		known = true
	}
	if !known {
		return "other"
	}
	return strconv.Itoa(code)
}
