package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
)

// chat is a row of the demo's book of chats.
type chat struct {
	ID     string    `json:"chat_id"`
	Name   string    `json:"name"`
	Text   string    `json:"text"`
	Unread int       `json:"unread"`
	Seq    uint64    `json:"seq"` // of the event that made the row what it is
	At     time.Time `json:"at"`
}

// said is a message of a chat.
type said struct {
	Seq  uint64 `json:"seq"`
	Text string `json:"text"`
	Out  bool   `json:"out"`
}

// book is what a real back end would have in its data base: the page loads from it, then it lives on events. It is locked while a change
// is published, so whoever reads it has all that was published before.
type book struct {
	mu       sync.Mutex // guards all below
	chats    []chat
	messages map[string][]said // the last ones, by chat
}

// messagesKept is how many messages of a chat the book has.
const messagesKept = 100

func newBook() *book {
	b := &book{messages: map[string][]said{}}
	for i := range 10 {
		id := fmt.Sprintf("62811550%02d@c.us", i)
		b.chats = append(b.chats, chat{ID: id, Name: feed.Name(id), At: time.Now()})
	}
	return b
}

// rows is a copy of all chats.
func (b *book) rows() []chat {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]chat(nil), b.chats...)
}

// last is a copy of the last messages of a chat.
func (b *book) last(chat string) []said {
	b.mu.Lock()
	defer b.mu.Unlock()
	return append([]said{}, b.messages[chat]...)
}

// turnLocked lets something be said in some chat and returns the chat as it is to be published.
func (b *book) turnLocked(text string, fromMe bool) (index int, c chat) {
	// A square favours the first chats: some people write much more than others.
	f := rand.Float64()
	index = int(f * f * float64(len(b.chats)))
	c = b.chats[index]
	c.Text, c.Unread, c.At = text, c.Unread+1, time.Now()
	if fromMe {
		c.Unread = 0
	}
	return index, c
}

func (b *book) sayLocked(chat string, m said) {
	all := append(b.messages[chat], m)
	b.messages[chat] = all[max(0, len(all)-messagesKept):]
}

// openStream makes the stream: it belongs to its publisher, not to the service.
func (d *demo) openStream(ctx context.Context) (err error) {
	if d.nc, err = d.nats.Connect(); err != nil {
		return err
	}
	if d.js, err = jetstream.New(d.nc); err == nil {
		_, err = d.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: "wa_stream", Subjects: []string{"wa.>"}, Retention: jetstream.LimitsPolicy, MaxAge: time.Hour, MaxBytes: 256 << 20, AllowDirect: true,
		})
	}
	if err != nil {
		d.nc.Close()
	}
	return err
}

// publish lets people write to each other until ctx ends.
func (d *demo) publish(ctx context.Context, rate float64) error {
	tick := time.NewTicker(time.Duration(2 * float64(time.Second) / max(rate, 0.1)))
	defer tick.Stop()
	for n := 0; ; n++ {
		if err := d.publishTurn(ctx, n); err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// publishTurn lets one message be written: that is two changes, its own row and its chat's; now and then others.
func (d *demo) publishTurn(ctx context.Context, n int) error {
	c, err := d.publishMessage(ctx, feed.Text(), rand.IntN(3) == 0)
	if err != nil {
		return err
	}
	if n%5 == 0 {
		_, err = d.send(ctx, feed.Contact(company, agent, c.ID))
	}
	if err == nil && n%15 == 0 {
		_, err = d.send(ctx, feed.Agent(company, agent, "connected"))
	}
	if err == nil && n%20 == 0 {
		_, err = d.send(ctx, feed.Chat(company, absent, c.ID, c.Text, 1))
	}
	return err
}

func (d *demo) publishMessage(ctx context.Context, text string, fromMe bool) (c chat, err error) {
	d.book.mu.Lock()
	defer d.book.mu.Unlock()
	i, c := d.book.turnLocked(text, fromMe)
	seq, err := d.send(ctx, feed.Message(company, agent, c.ID, text, fromMe))
	if err != nil {
		return c, err
	}
	d.book.sayLocked(c.ID, said{seq, text, fromMe})
	if c.Seq, err = d.send(ctx, feed.Chat(company, agent, c.ID, text, c.Unread)); err == nil {
		d.book.chats[i] = c
	}
	return c, err
}

func (d *demo) send(ctx context.Context, ev feed.Event) (uint64, error) {
	ack, err := d.js.Publish(ctx, "wa."+ev.Subject, ev.Payload)
	if err != nil {
		return 0, fmt.Errorf("publish to wa.%s: %w", ev.Subject, err)
	}
	return ack.Sequence, nil
}
