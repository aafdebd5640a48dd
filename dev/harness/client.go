package harness

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"
)

// Message is one message of json.v1 as it came.
type Message struct {
	Type      string          `json:"type"`
	EventType string          `json:"event_type"`
	Seq       uint64          `json:"seq"`
	Replay    bool            `json:"replay"`
	Payload   json.RawMessage `json:"payload"`

	Raw   string    `json:"-"`
	At    time.Time `json:"-"` // when it was read
	Place Place     `json:"-"` // the socket's position before it
}

// Reply is the payload of ready, chat_selected, resumed and gap.
type Reply struct {
	SessionID string    `json:"session_id"`
	ChatID    string    `json:"chat_id"`
	Seq       uint64    `json:"seq"`
	Position  *uint64   `json:"position"` // nil: the socket has none
	Stream    string    `json:"stream"`
	Since     uint64    `json:"since"`
	Resumed   int       `json:"resumed"`
	Gap       bool      `json:"gap"`
	Reason    string    `json:"reason"`
	ExpiresAt time.Time `json:"expires_at"`
}

// Place is a client's position: everything up to Seq of the stream was given to it.
type Place struct {
	Seq    uint64
	Stream string
}

// Close is how a socket ended; Code 0 = without a close frame.
type Close struct {
	Code   int
	Reason string
	Err    error
}

// Client is a client's socket. A goroutine reads from it all the time, unless paused, and keeps what has come until
// the test asks for it. Methods without Try are for the test's goroutine: they fail the test themselves.
type Client struct {
	Pod   *Pod
	Dial  Dial  // with key and token filled in
	Ready Reply // set by WantReady

	wire wire

	mu      sync.Mutex
	inbox   []Message
	place   Place
	changed chan struct{} // closed and replaced with every change
	closed  *Close
	paused  chan struct{} // closed by Resume; nil = reading
}

func newClient(p *Pod, d Dial, w wire) *Client {
	c := &Client{Pod: p, Dial: d, wire: w, changed: make(chan struct{})}
	go c.readAll() // ends with the connection
	return c
}

func (c *Client) readAll() {
	for {
		c.waitWhilePaused()
		text, data, err := c.wire.read()
		m := Message{Raw: string(data), At: time.Now()}
		if err == nil && !text {
			err = fmt.Errorf("binary message %q from the service", data)
		}
		if err == nil {
			if err = json.Unmarshal(data, &m); err != nil {
				err = fmt.Errorf("message %q from the service: %w", data, err)
			}
		}
		c.mu.Lock()
		if err != nil {
			code, reason := closeFrame(err)
			c.closed = &Close{code, reason, err}
		} else if m.Place = c.place; !c.noteLocked(m) {
			c.inbox = append(c.inbox, m)
		}
		close(c.changed)
		c.changed = make(chan struct{})
		c.mu.Unlock()
		if err != nil {
			c.wire.abort()
			return
		}
	}
}

// noteLocked takes the position out of a message; positions that come alone do not go into the inbox.
func (c *Client) noteLocked(m Message) (only bool) {
	switch m.Type {
	case "position":
		c.place.Seq = max(c.place.Seq, m.Seq)
		return true
	case "ready", "resumed":
		if r, err := m.reply(); err == nil && r.Position != nil {
			if r.Stream != c.place.Stream || r.Gap {
				c.place = Place{Stream: r.Stream}
			}
			c.place.Seq = max(c.place.Seq, *r.Position)
		}
	}
	return false
}

// Place is the highest position that this socket was given, of a Dial with Positions or From.
func (c *Client) Place() Place {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.place
}

// WaitPlace returns once the position is seq or higher.
func (c *Client) WaitPlace(seq uint64) {
	c.t().Helper()
	Eventually(c.Pod.W.T, Patience, fmt.Sprintf("a position of %d or more", seq), func() bool { return c.Place().Seq >= seq })
}

// ResumeMissed asks for what was missed, as after a gap, and returns the answer; replayed events stay in the inbox.
func (c *Client) ResumeMissed() Reply {
	c.t().Helper()
	c.Send(map[string]any{"type": "resume"})
	return c.TakeReply("resumed")
}

func (c *Client) waitWhilePaused() {
	c.mu.Lock()
	paused := c.paused
	c.mu.Unlock()
	if paused != nil {
		<-paused
	}
}

// Pause stops reading; the one read that is under way still takes its message. Pings go unanswered too.
func (c *Client) Pause() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.paused == nil {
		c.paused = make(chan struct{})
		c.wire.pause(true)
	}
}

// Resume reads on.
func (c *Client) Resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.paused != nil {
		close(c.paused)
		c.paused = nil
		c.wire.pause(false)
	}
}

// Abort closes the TCP connection without a close frame, as a client does that vanishes.
func (c *Client) Abort() {
	c.wire.abort()
	c.Resume() // let the reader see it
}

// Close sends a close frame and waits until the service has answered it.
func (c *Client) Close(code int, reason string) {
	c.t().Helper()
	c.Resume()
	c.wire.close(code, reason)
	c.waitClosed()
}

// Ping sends a WebSocket ping and waits for its pong; false where the library can't.
func (c *Client) Ping(payload string) bool {
	c.t().Helper()
	ctx, cancel := context.WithTimeout(c.t().Context(), Patience)
	defer cancel()
	err := c.wire.ping(ctx, payload)
	if err != nil && !errors.Is(err, errCannot) {
		c.t().Fatalf("%s pings: %v", c.who(), err)
	}
	return err == nil
}

// SendBytes sends bytes as they are past the library; false where it has no way past it.
func (c *Client) SendBytes(b []byte) bool {
	c.t().Helper()
	err := c.wire.raw(b)
	if err != nil && !errors.Is(err, errCannot) {
		c.t().Fatalf("%s sends bytes: %v", c.who(), err)
	}
	return err == nil
}

// Protocol is the sub-protocol that the service chose.
func (c *Client) Protocol() string { return c.wire.protocol() }

func (c *Client) t() interface {
	Helper()
	Fatalf(string, ...any)
	Context() context.Context
} {
	return c.Pod.W.T
}

// errClosed is what a wait ends with when the socket is closed and the inbox does not hold what is wanted.
var errClosed = errors.New("socket is closed")

// TryTake waits for the first message in the inbox that is wanted and takes it out; those before it stay.
func (c *Client) TryTake(ctx context.Context, want func(Message) bool) (Message, error) {
	for {
		c.mu.Lock()
		if i := slices.IndexFunc(c.inbox, want); i >= 0 {
			m := c.inbox[i]
			c.inbox = slices.Delete(c.inbox, i, i+1)
			c.mu.Unlock()
			return m, nil
		}
		changed, closed := c.changed, c.closed
		c.mu.Unlock()
		if closed != nil {
			return Message{}, fmt.Errorf("%w: %d %q (%v)", errClosed, closed.Code, closed.Reason, closed.Err)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return Message{}, ctx.Err()
		}
	}
}

// Take is TryTake with Patience; what names the message in a failure.
func (c *Client) Take(what string, want func(Message) bool) Message {
	c.t().Helper()
	ctx, cancel := context.WithTimeout(c.t().Context(), Patience)
	defer cancel()
	m, err := c.TryTake(ctx, want)
	if err != nil {
		c.t().Fatalf("%s on %s waits for %s: %v; in its inbox: %s", c.who(), c.Pod.ID, what, err, c.summary())
	}
	return m
}

func (c *Client) who() string {
	return c.Dial.Company + c.Dial.Admin + "/" + c.Dial.Agent + "/" + c.Dial.User
}

func (c *Client) summary() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var b strings.Builder
	for i, m := range c.inbox {
		if i == 5 {
			fmt.Fprintf(&b, " and %d more", len(c.inbox)-i)
			break
		}
		fmt.Fprintf(&b, " %.120s", m.Raw)
	}
	return b.String()
}

// Next takes the next message, whatever it is.
func (c *Client) Next() Message {
	c.t().Helper()
	return c.Take("any message", func(Message) bool { return true })
}

// TakeType takes the first message of a type out of the inbox; those before it stay.
func (c *Client) TakeType(typ string) Message {
	c.t().Helper()
	return c.Take(typ, func(m Message) bool { return m.Type == typ })
}

// WantReady expects ready as the next message.
func (c *Client) WantReady() Reply {
	c.t().Helper()
	return c.greeted(c.Next())
}

func (c *Client) greeted(m Message) Reply {
	c.t().Helper()
	if m.Type != "ready" {
		c.t().Fatalf("%s: want ready first, got %s", c.who(), m.Raw)
	}
	c.Ready = c.reply(m)
	if c.Ready.SessionID == "" {
		c.t().Fatalf("%s: ready without session_id: %s", c.who(), m.Raw)
	}
	return c.Ready
}

func (c *Client) reply(m Message) Reply {
	c.t().Helper()
	r, err := m.reply()
	if err != nil {
		c.t().Fatalf("%s: payload of %s: %v", c.who(), m.Raw, err)
	}
	return r
}

func (m Message) reply() (r Reply, err error) {
	err = json.Unmarshal(m.Payload, &r)
	return r, err
}

// WantEvent expects the event seq as the very next message: had any other event come before it, the test fails. So it
// also proves that the events published before seq, and handled before it, did not reach this socket.
func (c *Client) WantEvent(seq uint64) Message {
	c.t().Helper()
	m := c.Next()
	if m.Type != "event" || m.Seq != seq {
		c.t().Fatalf("%s: want event %d next, got %.300s", c.who(), seq, m.Raw)
	}
	return m
}

// WaitEvent takes the event seq out of the inbox when it is there; other messages stay.
func (c *Client) WaitEvent(seq uint64) Message {
	c.t().Helper()
	return c.Take(fmt.Sprintf("event %d", seq), func(m Message) bool { return m.Type == "event" && m.Seq == seq })
}

// WantNothingElse publishes a chat event for this user as a marker and expects it as the very next message. Events of
// one agent keep their order on the pod that pulled them; for those of other agents call World.Settled first, or the
// marker may overtake them.
func (c *Client) WantNothingElse() {
	c.t().Helper()
	c.WantEvent(c.Pod.W.Chat(c.Dial.Company, c.Dial.Agent))
}

// SelectChat selects a chat ("" = none) and returns its confirmation.
func (c *Client) SelectChat(chat string) Reply {
	c.t().Helper()
	c.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": chat}})
	r := c.TakeReply("chat_selected")
	if r.ChatID != chat {
		c.t().Fatalf("%s: selected %q, confirmed %q", c.who(), chat, r.ChatID)
	}
	return r
}

// TakeReply is TakeType with the payload read, for the types that have that of Reply.
func (c *Client) TakeReply(typ string) Reply {
	c.t().Helper()
	return c.reply(c.TakeType(typ))
}

// WantGap takes a gap with this reason out of the inbox.
func (c *Client) WantGap(reason string) Reply {
	c.t().Helper()
	r := c.TakeReply("gap")
	if r.Reason != reason {
		c.t().Fatalf("%s: gap since %d for %q, want %q", c.who(), r.Since, r.Reason, reason)
	}
	return r
}

// WantError takes an error message with this code out of the inbox; the socket stays open.
func (c *Client) WantError(code string) Error {
	c.t().Helper()
	m := c.TakeType("error")
	var e Error
	if err := json.Unmarshal(m.Payload, &e); err != nil || e.Code != code {
		c.t().Fatalf("%s: want error %s, got %s", c.who(), code, m.Raw)
	}
	return e
}

// Events are the events in the inbox, in the order in which they came; they stay there.
func (c *Client) Events() []Message {
	return c.which(func(m Message) bool { return m.Type == "event" })
}

// Others are the messages in the inbox that are no events; they stay there.
func (c *Client) Others() []Message {
	return c.which(func(m Message) bool { return m.Type != "event" })
}

func (c *Client) which(wanted func(Message) bool) []Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []Message
	for _, m := range c.inbox {
		if wanted(m) {
			all = append(all, m)
		}
	}
	return all
}

// Inbox is everything that has come and was not taken, in order; it stays there.
func (c *Client) Inbox() []Message {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.inbox)
}

// Forget empties the inbox.
func (c *Client) Forget() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.inbox = nil
}

// Ended is how the socket ended, or nil while it is open.
func (c *Client) Ended() *Close {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *Client) waitClosed() Close {
	c.t().Helper()
	deadline := time.NewTimer(Patience)
	defer deadline.Stop()
	for {
		c.mu.Lock()
		changed, closed := c.changed, c.closed
		c.mu.Unlock()
		if closed != nil {
			return *closed
		}
		select {
		case <-changed:
		case <-deadline.C:
			c.t().Fatalf("%s is not closed after %v", c.who(), Patience)
		}
	}
}

// WantClose waits for the socket's end and compares the close frame; a reason that ends in * is a prefix.
func (c *Client) WantClose(code int, reason string) Close {
	c.t().Helper()
	got := c.waitClosed()
	prefix, isPrefix := strings.CutSuffix(reason, "*")
	if got.Code != code || (got.Reason != reason && !(isPrefix && strings.HasPrefix(got.Reason, prefix))) {
		c.t().Fatalf("%s closed with %d %q (%v), want %d %q", c.who(), got.Code, got.Reason, got.Err, code, reason)
	}
	return got
}

// Send sends v as a JSON text message.
func (c *Client) Send(v any) {
	c.t().Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		c.t().Fatalf("%v", err)
	}
	c.SendRaw(true, raw)
}

// SendRaw sends whatever bytes, as text or as binary message.
func (c *Client) SendRaw(text bool, data []byte) {
	c.t().Helper()
	if err := c.TrySend(text, data); err != nil {
		c.t().Fatalf("%s sends %.100q: %v", c.who(), data, err)
	}
}

// TrySend is SendRaw for other goroutines.
func (c *Client) TrySend(text bool, data []byte) error {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return c.wire.write(ctx, text, data)
}
