package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// ensureStream finds the stream, or creates it when told to. Its publisher owns it otherwise.
func (c *consumer) ensureStream(ctx context.Context) (jetstream.Stream, error) {
	cfg := c.cfg.Load()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	s, err := c.js.Stream(ctx, cfg.NATSStreamName)
	if errors.Is(err, jetstream.ErrStreamNotFound) && cfg.NATSCreateStream {
		s, err = c.js.CreateStream(ctx, jetstream.StreamConfig{
			Name: cfg.NATSStreamName, Subjects: []string{cfg.NATSSubjectPrefix + ".>"}, MaxAge: cfg.NATSStreamMaxAge,
			Replicas: cfg.NATSStreamReplicas, Storage: jetstream.FileStorage, AllowDirect: true,
		})
	}
	if err != nil {
		return nil, fmt.Errorf("stream %s: %w", cfg.NATSStreamName, err)
	}
	info := s.CachedInfo()
	if err := holdsPrefix(info.Config, cfg.NATSSubjectPrefix); err != nil {
		return nil, err
	}
	retention := ""
	if info.Config.Retention != jetstream.LimitsPolicy {
		retention = info.Config.Retention.String()
	}
	removes := ""
	if n := info.Config.MaxMsgsPerSubject; n > 0 || info.Config.AllowMsgTTL || info.State.NumDeleted > maxRemoved {
		removes = fmt.Sprintf("max_msgs_per_subject %d, allow_msg_ttl %t, removed so far %d", n, info.Config.AllowMsgTTL, info.State.NumDeleted)
	}
	c.warn(&c.saidRemoves, removes, "messages are removed from within the stream: where one is missing behind a client's position, it reloads",
		"stream", cfg.NATSStreamName, "why", removes)
	c.warn(&c.saidRetention, retention, "the stream has no limits retention: acked events are gone, clients cannot resume",
		"stream", cfg.NATSStreamName, "retention", retention)
	c.mu.Lock()
	another := !c.created.IsZero() && !c.created.Equal(info.Created)
	if another {
		c.before, c.floor, c.polled = c.created, 0, false // what Redis noted is compared in startOf
	}
	c.created = info.Created
	c.mu.Unlock()
	if another {
		slog.Warn("the stream was made anew: it is read from its beginning", "stream", cfg.NATSStreamName)
		c.to.newStream()
	}
	return s, c.checkEnd(ctx)
}

// checkEnd finds out whether the stream has lost its end, as one does that is restored from a backup: then the message with the highest
// sequence that this pod knows is another one now, or beyond the end. Its sequences name other events from there on, so nothing may be
// taken from it before the pods have given it another generation.
func (c *consumer) checkEnd(ctx context.Context) error {
	seq, stored := c.to.newestSeen()
	if seq == 0 {
		return nil
	}
	m, err := c.ask(ctx, map[string]any{"seq": seq})
	switch {
	case err == nil && m.Time.Equal(stored):
		c.to.endFound()
		return nil
	case errors.Is(err, jetstream.ErrMsgNotFound):
		s, err := c.js.Stream(ctx, c.cfg.Load().NATSStreamName)
		if err != nil {
			return err
		}
		if s.CachedInfo().State.LastSeq >= seq { // it was removed
			c.to.endFound()
			return nil
		}
	case err != nil:
		return err
	}
	slog.Warn("the stream has lost its end: sockets are told to reload", "stream", c.cfg.Load().NATSStreamName, "seq", seq)
	if err := c.lease.endLost(ctx); err != nil {
		return err
	}
	c.setBack()
	return nil
}

// setBack forgets what was known of the stream's sequences.
func (c *consumer) setBack() {
	c.mu.Lock()
	c.floor, c.polled = 0, false
	c.mu.Unlock()
	c.to.newStream()
}

// holdsPrefix returns an error for a stream that can never hold an event under this prefix. Subjects of other publishers beside
// those of events are fine.
func holdsPrefix(cfg jetstream.StreamConfig, prefix string) error {
	stored := storedSubjects(cfg)
	if slices.ContainsFunc(stored, func(s string) bool { return mayHoldEvents(s, prefix) }) {
		return nil
	}
	quoted, likely := make([]string, len(stored)), ""
	for i, s := range stored {
		quoted[i] = strconv.Quote(s)
		head, _, _ := strings.Cut(strings.TrimSuffix(s, ">")+".", ".*.")
		if head = strings.TrimRight(head, "."); likely == "" && checkSubjectPrefix(head) == nil && mayHoldEvents(s, head) {
			likely = "set NATS_SUBJECT_PREFIX=" + head + ", or "
		}
	}
	return fmt.Errorf("stream %s stores only %.200s, which no event under NATS_SUBJECT_PREFIX %q matches: %shave its owner add %q to its subjects",
		cfg.Name, strings.Join(quoted, ", "), prefix, likely, prefix+".>")
}

// mayHoldEvents says whether events under this prefix may have subjects that the pattern matches.
func mayHoldEvents(pattern, prefix string) bool {
	for _, kind := range []string{"chats", "contacts", "agents", "messages.>"} {
		if overlap(pattern, prefix+".*.*."+kind) {
			return true
		}
	}
	return false
}

// storedSubjects lists patterns of what the stream stores: its own subjects and those of its sources, as its transforms leave them.
func storedSubjects(cfg jetstream.StreamConfig) (stored []string) {
	taken := slices.Clone(cfg.Subjects)
	sources := cfg.Sources
	if cfg.Mirror != nil {
		sources = append(slices.Clone(sources), cfg.Mirror)
	}
	for _, source := range sources {
		for _, t := range source.SubjectTransforms { // each is a filter, too
			taken = append(taken, transformed(t))
		}
		if len(source.SubjectTransforms) == 0 {
			taken = append(taken, cmp.Or(source.FilterSubject, ">"))
		}
	}
	for _, s := range taken {
		t := cfg.SubjectTransform
		if t == nil || !covers(cmp.Or(t.Source, ">"), s) {
			stored = append(stored, s)
		}
		if t != nil && overlap(cmp.Or(t.Source, ">"), s) {
			stored = append(stored, transformed(*t))
		}
	}
	return stored
}

// transformed is a pattern of what a transform makes. It is exact up to the first token that is filled in.
func transformed(t jetstream.SubjectTransformConfig) string {
	if t.Destination == "" {
		return cmp.Or(t.Source, ">")
	}
	tokens := strings.Split(t.Destination, ".")
	for i, token := range tokens {
		if strings.HasPrefix(token, "$") || strings.Contains(token, "{{") {
			return strings.Join(append(tokens[:i], ">"), ".")
		}
	}
	return t.Destination
}

// overlap says whether some subject matches both patterns.
func overlap(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		switch {
		case as[i] == ">" || bs[i] == ">":
			return true
		case as[i] != "*" && bs[i] != "*" && as[i] != bs[i]:
			return false
		}
	}
	return len(as) == len(bs)
}

// covers says whether a matches every subject that b does.
func covers(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range min(len(as), len(bs)) {
		switch {
		case as[i] == ">":
			return true
		case bs[i] == ">" || as[i] != "*" && as[i] != bs[i]:
			return false
		}
	}
	return len(as) == len(bs)
}

// ask has the stream's leader find a message (the request is that of JSApiMsgGetRequest).
func (c *consumer) ask(ctx context.Context, request map[string]any) (*jetstream.RawStreamMsg, error) {
	name := c.cfg.Load().NATSStreamName
	body, err := json.Marshal(request)
	if err != nil {
		return nil, err
	}
	answer, err := c.nc.RequestWithContext(ctx, apiPrefix(c.cfg.Load())+"STREAM.MSG.GET."+name, body)
	if err != nil {
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, err)
	}
	var found struct {
		Error   *jetstream.APIError `json:"error"`
		Message *struct {
			Subject string    `json:"subject"`
			Seq     uint64    `json:"seq"`
			Data    []byte    `json:"data"`
			Time    time.Time `json:"time"`
		} `json:"message"`
	}
	if err := json.Unmarshal(answer.Data, &found); err != nil {
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, err)
	}
	switch {
	case found.Error != nil && found.Error.ErrorCode == jetstream.JSErrCodeMessageNotFound:
		return nil, jetstream.ErrMsgNotFound
	case found.Error != nil:
		return nil, fmt.Errorf("ask for a message of stream %s: %w", name, found.Error)
	case found.Message == nil:
		return nil, fmt.Errorf("ask for a message of stream %s: empty answer", name)
	}
	m := found.Message
	return &jetstream.RawStreamMsg{Subject: m.Subject, Sequence: m.Seq, Data: m.Data, Time: m.Time}, nil
}
