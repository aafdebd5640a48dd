package main

import (
	"context"
	"encoding/json"
	"log/slog"
	"time"
)

// control handles pings and pongs. Pings count as messages: over the rate they are answered, but not for long.
func (c *conn) control(op byte, p []byte) error {
	if op == opPong {
		c.missed.Store(0)
		return nil
	}
	if !c.allow() && c.closing() {
		return errClosed
	}
	c.kick(c.ring.control(opPong, p, time.Now()))
	c.ring.waitRoom()
	return nil
}

// allow says whether one more message is within the rate. One that is not may be the last: it closes the socket.
func (c *conn) allow() bool {
	cfg := c.h.cfg.Load()
	ok, abuse := c.rate.allow(time.Now(), float64(cfg.WebsocketRateLimit), cfg.WebsocketRateBurst)
	if abuse {
		c.close(closeRateLimit, rateLimitExceeded().reason)
	}
	return ok
}

// limiter is a token bucket that also counts what it refused.
type limiter struct {
	tokens  float64
	last    time.Time
	refused int       // since
	since   time.Time // at most 10 s ago
}

// allow takes a token. abuse says that 3 x burst were refused within 10 s.
func (l *limiter) allow(now time.Time, rate float64, burst int) (ok, abuse bool) {
	if l.last.IsZero() {
		l.tokens = float64(burst)
	} else {
		l.tokens = min(float64(burst), l.tokens+rate*now.Sub(l.last).Seconds())
	}
	l.last = now
	if l.tokens >= 1 {
		l.tokens--
		return true, false
	}
	if now.Sub(l.since) > 10*time.Second {
		l.since, l.refused = now, 0
	}
	l.refused++
	return false, l.refused >= 3*burst
}

// request is a message from a client (docs/protocol.md).
type request struct {
	Type    string  `json:"type"`
	ChatID  *string `json:"chat_id"`
	Payload struct {
		ChatID *string `json:"chat_id"`
		Since  *uint64 `json:"since"`
		Token  *string `json:"token"`
	} `json:"payload"`
}

// message handles one text message; binary ones do not get here.
func (c *conn) message(_ byte, p []byte) {
	var req request
	err := json.Unmarshal(p, &req)
	label := "invalid"
	switch req.Type {
	case "ping", "select_chat", "resume", "refresh_token", "ready":
		label = req.Type
	}
	c.h.m.messagesReceivedTotal.with(label).Inc()
	switch {
	case !c.allow():
		c.fault(rateLimitExceeded())
	case err != nil:
		c.fault(badRequest("", "not a message of json.v1"))
	case req.Type == "ready", req.Type == "select_chat" && c.claims.admin != "":
		// Clients of the earlier service say that they are ready too, and admins' pages select chats like any other.
	case req.Type == "ping":
		c.reply("pong", nil)
	case req.Type == "select_chat":
		c.selectChat(&req)
	case req.Type == "resume":
		c.resume(&req)
	case req.Type == "refresh_token":
		c.refreshToken(&req)
	default:
		c.fault(badRequest("type", "unknown type"))
	}
}

// fault answers an error; the socket stays as it is.
func (c *conn) fault(e *apiError) { c.reply("error", e) }

// selectChat makes the socket a target of a chat's messages, and no longer of those of the chat before. The read loop
// waits for the claim, so messages of a client take effect in their order.
func (c *conn) selectChat(req *request) {
	id := req.Payload.ChatID
	if id == nil {
		id = req.ChatID
	}
	if id == nil {
		c.fault(badRequest("chat_id", "select_chat without chat_id"))
		return
	}
	if *id != "" {
		if err := checkChatID(*id); err != nil {
			c.fault(badRequestID(err))
			return
		}
	}
	chat, now := *id, c.ring.selection()
	fresh := chat != "" && chat != now
	since := req.Payload.Since
	replays := since != nil && chat != ""
	if replays { // before the claim: what comes between the two would be held, and replayed as well
		c.ring.replaying(chat, *since, time.Now())
	}
	if fresh {
		c.ring.selecting(chat)
		if err := c.claim(c.chatRoute(chat)); err != nil {
			c.ring.goLive()
			c.notSelected("claim the chat", err)
			return
		}
	}
	var info replayInfo
	var err error
	if replays {
		info = c.replay(c.h.resumeFrom(*since, c.chatRoute(chat)), []string{c.chatSubject(chat)})
	}
	if info.Seq, err = c.streamSeq(); err != nil {
		if fresh {
			c.h.detach(c, c.chatRoute(chat))
		}
		c.notSelected("read the stream's sequence", err)
		if info.Gap { // of a chat that was selected before too, live events were left to the replay
			c.gap(*since, "owner")
		}
		return
	}
	c.confirmChat(chat, fresh, newReply("chat_selected", struct {
		ChatID string `json:"chat_id"`
		replayInfo
	}{chat, info}), info.to)
}

func (c *conn) confirmChat(chat string, fresh bool, f *frame, to uint64) {
	ends, old, ok, kick := c.ring.selected(chat, f, to, time.Now(), nil)
	c.kick(kick)
	c.h.settle(ends, "buffer")
	if !ok && fresh {
		// close came while the claim was under way: it did not know of this route.
		c.h.detach(c, c.chatRoute(chat))
	}
	if old != "" && old != chat {
		c.h.detach(c, c.chatRoute(old))
	}
}

func (c *conn) notSelected(what string, err error) {
	ends, _, open, _ := c.ring.selected("", nil, 0, time.Now(), nil)
	c.h.settle(ends, "")
	if open {
		slog.Warn("chat not selected: "+what, append(c.logAttrs(), "err", err)...)
		c.fault(unavailable("the chat can't be selected now; the selection is unchanged"))
	}
}

// holdLocked keeps a message of a chat whose confirmation is not queued yet. Attaching takes milliseconds, so a full
// hold means trouble: the event fails and comes again when the selection is through.
func (r *ring) holdLocked(it item, out []settlement) []settlement {
	if len(r.held) >= r.policy.size {
		return append(out, settlement{it.d, failed})
	}
	r.held = append(r.held, it)
	return out
}

// selecting begins the selection of a chat: its messages are held until it is confirmed.
func (r *ring) selecting(chat string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.pending = chat
}

// selected ends a selection in one step: messages of the chat before that still wait are not for this socket any more,
// then comes the confirmation, then what was held. f is nil if the selection failed: all stays as it was. ok is false
// if the ring was closed meanwhile; nothing is selected then. to is that of resumed, for the chat.
func (r *ring) selected(chat string, f *frame, to uint64, now time.Time, out []settlement) (_ []settlement, old string, ok, kick bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	held := r.held
	r.held, r.pending, r.leave = nil, "", ""
	if r.closed || f == nil {
		for _, it := range held {
			out = r.settleLocked(it.d, duplicate, out)
		}
		return out, "", !r.closed, false
	}
	old, r.chat = r.chat, chat
	if old != chat {
		r.hadChat = span{}
	}
	if to > 0 && r.first > 0 {
		r.hadChat = span{r.first, to}
	}
	if old != "" && old != chat {
		out = r.siftLocked(func(d *delivery) bool { return d.kind == kindMessage && d.chat == old }, duplicate, out)
	}
	out = r.confirmLocked(f, held, now, out)
	return out, old, true, r.kickLocked(now)
}

// confirmLocked queues a confirmation and, behind it, the events that were held for it.
func (r *ring) confirmLocked(f *frame, held []item, now time.Time, out []settlement) []settlement {
	r.insertLocked(r.n, item{f: f, at: now})
	for _, it := range held {
		if r.hadLocked(it.d) {
			out = r.settleLocked(it.d, duplicate, out)
		} else {
			out = r.acceptLocked(it, now, out)
		}
	}
	return out
}

// selection is the chat whose messages this socket gets now, "" for none.
func (r *ring) selection() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.chat
}

// refreshToken lets the socket live as long as a newer token of the same identity.
func (c *conn) refreshToken(req *request) {
	if req.Payload.Token == nil {
		c.fault(badRequest("token", "refresh_token without token"))
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), routeTimeout)
	defer cancel()
	cl, fault := c.h.openToken(ctx, *req.Payload.Token, c.claims.admin != "")
	if fault != nil {
		c.fault(fault)
		return
	}
	same := *cl
	same.expires = c.claims.expires
	if same != *c.claims {
		c.fault(invalidToken("foreign", "the token is another's, or of another scope"))
		return
	}
	c.expires.Store(cl.expires.UnixNano())
	c.reply("token_refreshed", struct {
		ExpiresAt time.Time `json:"expires_at"`
	}{cl.expires.UTC()})
}
