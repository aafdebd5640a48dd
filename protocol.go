package main

import (
	"context"
	"encoding/json"
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
	c.kick(c.ring.control(opPong, p))
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
		c.resume()
	case req.Type == "refresh_token":
		c.refreshToken(&req)
	default:
		c.fault(badRequest("type", "unknown type"))
	}
}

// fault answers an error; the socket stays as it is.
func (c *conn) fault(e *apiError) { c.reply("error", e) }

// selectChat makes a chat the one whose messages this socket gets. That is a matter of the socket alone: its pod owns the agent.
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
	ctx, done := c.untilClosed(routeTimeout)
	defer done()
	seq, _ := c.h.replays.seq(ctx) // an older one, if NATS is away
	f := newReply("chat_selected", struct {
		ChatID string `json:"chat_id"`
		Seq    uint64 `json:"seq"`
	}{*id, seq})
	ends, kick := c.ring.selected(*id, f, time.Now(), nil)
	c.kick(kick)
	c.h.settle(ends)
}

func (c *conn) openToken(ctx context.Context, token string) (*claims, *apiError) {
	if c.claims.admin != "" {
		return c.h.auth.openAdmin(ctx, token)
	}
	return c.h.auth.openUser(ctx, token)
}

// refreshToken lets the socket live as long as a newer token of the same identity.
func (c *conn) refreshToken(req *request) {
	if req.Payload.Token == nil {
		c.fault(badRequest("token", "refresh_token without token"))
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), routeTimeout)
	defer cancel()
	cl, fault := c.openToken(ctx, *req.Payload.Token)
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
