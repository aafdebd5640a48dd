package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// kind says what an event is about; it decides which sockets an event is for (docs/publishing.md).
type kind uint8

const (
	kindChat kind = iota
	kindContact
	kindMessage
	kindAgent
	kindUnknown // a subject or payload that fits nothing: counted, never routed
)

var kindNames = [...]string{"chat", "contact", "message", "agent", "unknown"}

func (k kind) String() string { return kindNames[k] }

// event is one JetStream message, decoded as far as routing needs. It is immutable once built and shared
// by all its targets.
type event struct {
	seq            uint64 // stream sequence, its name for ever
	kind           kind
	company, agent string
	chat           string    // of a message; may hold dots
	toUsers        bool      // of an agents event: it is for the agent's users too
	stored         time.Time // when JetStream stored it, by the server's clock
	requestID      string
	payload        []byte // as published; a JSON object
	frame          *frame // the outbound frame, encoded once; nil where no socket of this pod has been given it
}

var (
	errSubject = errors.New("subject fits no row of docs/publishing.md")
	errPayload = errors.New("payload is not a JSON object of valid UTF-8")
)

// parseSubject splits a published subject into what routing needs. prefix comes without its trailing dot.
func parseSubject(prefix, subject string) (event, error) {
	rest, ok := strings.CutPrefix(subject, prefix)
	if !ok || rest == "" || rest[0] != '.' {
		return event{}, errSubject
	}
	company, rest, _ := strings.Cut(rest[1:], ".")
	agent, what, ok := strings.Cut(rest, ".")
	if !ok {
		return event{}, errSubject
	}
	if err := checkPair(company, agent); err != nil {
		return event{}, fmt.Errorf("%w: %w", errSubject, err)
	}
	ev := event{company: company, agent: agent}
	switch what {
	case "chats":
		ev.kind = kindChat
	case "contacts":
		ev.kind = kindContact
	case "agents":
		ev.kind = kindAgent
	default:
		chat, ok := strings.CutPrefix(what, "messages.")
		if !ok {
			return event{}, fmt.Errorf("%w: %.64q follows the agent id %.64q", errSubject, what, agent)
		}
		if err := checkChatID(chat); err != nil {
			return event{}, fmt.Errorf("%w: %w", errSubject, err)
		}
		ev.kind, ev.chat = kindMessage, chat
	}
	return ev, nil
}

// checkPayload refuses what a browser could not take: invalid UTF-8 would close every socket with 1007
// (RFC 6455 section 8.1), and json.Valid lets it pass inside strings.
func checkPayload(p []byte) error {
	for i, b := range p {
		if b == ' ' || b == '\t' || b == '\r' || b == '\n' {
			continue
		}
		if b != '{' || !utf8.Valid(p[i:]) || !json.Valid(p[i:]) {
			return errPayload
		}
		return nil
	}
	return errPayload
}

// routes are those whose owners the event is for.
func (ev *event) routes() iter.Seq[route] {
	return func(yield func(route) bool) {
		if ev.kind == kindAgent && (!yield(admins) || !ev.toUsers) {
			return
		}
		yield(route{ev.company, ev.agent})
	}
}

// outcome is what became of a delivery at one target. The order matters: the highest of all targets decides what JetStream is
// told (see pulled.settled).
type outcome uint8

const (
	gone       outcome = iota // there is no socket of that agent, or it left with the event still queued
	unselected                // a message of a chat that no socket there has selected, or an agent outside of an admin's scope
	duplicate                 // an earlier delivery of the event had been written to this socket
	written                   // the write of the whole frame has returned
	replayed                  // left to the replay that runs for this socket
	dropped                   // given up by drop_oldest; the socket gets a gap
	failed                    // no room in time, or the peer did not take it: NAK
)

var outcomeNames = [...]string{"gone", "unselected", "duplicate", "written", "replayed", "dropped", "failed"}

func (o outcome) String() string { return outcomeNames[o] }

// lateSlack is how long before the ack wait a delivery is too old to be answered: JetStream may have given it out again.
const lateSlack = 2 * time.Second

// source is where a delivery came from and where its end is told: JetStream (router) or a peer.
type source interface {
	// settled is called exactly once per delivery, by whichever goroutine settled its last target.
	// It must not block.
	settled(d *delivery, worst outcome)
}

// delivery is one event in hand: it counts the targets that are still open and remembers the worst outcome.
// Every target that accepted it calls settle exactly once.
type delivery struct {
	*event
	count   uint64    // JetStream's delivery count, or one more: above 1, a target may have had the event before
	arrived time.Time // off the network (monotonic); lateness counts from here
	src     source

	open  atomic.Int32  // targets not yet settled, plus one while the router is still adding targets
	worst atomic.Uint32 // outcome

	mu     sync.Mutex // guards missed
	missed []member   // the pods where a target failed; the zero member is this pod
}

// push queues d for sockets of this pod, each of which is a target more.
func (d *delivery) push(conns []*conn) {
	d.open.Add(int32(len(conns)))
	for _, c := range conns {
		c.push(d)
	}
}

// settle records the outcome of a target on this pod.
func (d *delivery) settle(o outcome) { d.settleAt(member{}, o) }

// settleAt records the outcome of the target at pod. The call that settles the last open target reports to the source.
func (d *delivery) settleAt(pod member, o outcome) {
	if o == failed {
		d.mu.Lock()
		if !slices.Contains(d.missed, pod) {
			d.missed = append(d.missed, pod)
		}
		d.mu.Unlock()
	}
	for {
		w := d.worst.Load()
		if uint32(o) <= w || d.worst.CompareAndSwap(w, uint32(o)) {
			break
		}
	}
	if d.open.Add(-1) == 0 {
		d.src.settled(d, outcome(d.worst.Load()))
	}
}
