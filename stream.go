package main

import (
	"cmp"
	"context"
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
	older := ""
	if info.Config.Metadata["_nats.ver"] == "" { // the stream's server adds it from 2.11 on; this pod may be connected to another
		older = "than 2.11"
	}
	c.warn(&c.saidVersion, older, "NATS is older than 2.11: it does not find messages by time, so clients that resume may have to reload",
		"stream", cfg.NATSStreamName, "connected_to", c.nc.ConnectedServerVersion())
	retention := ""
	if info.Config.Retention != jetstream.LimitsPolicy {
		retention = info.Config.Retention.String()
	}
	c.warn(&c.saidRetention, retention, "the stream has no limits retention: acked events are gone, clients cannot resume",
		"stream", cfg.NATSStreamName, "retention", retention)
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.created.Equal(info.Created) {
		if !c.created.IsZero() {
			slog.Warn("the stream was made anew: it is read from its beginning", "stream", cfg.NATSStreamName)
			c.anew(c.known.Swap(0))
		}
		c.floor = 0 // of another stream; what Redis noted is compared in startOf
	}
	return s, nil
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

// streamSeq returns a sequence not above the stream's last one and at most 1 s old. The stream's leader is asked, once
// for all who ask within half a second.
func (c *consumer) streamSeq(ctx context.Context) (uint64, error) {
	c.seqMu.Lock()
	defer c.seqMu.Unlock()
	if time.Since(c.seqAt) < seqMaxAge {
		return c.seq, nil
	}
	if !c.up.Load() {
		return c.seq, errors.New("last sequence of the stream: NATS is not connected")
	}
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	asked := time.Now()
	s, err := c.js.Stream(ctx, c.cfg.Load().NATSStreamName)
	if err != nil {
		return c.seq, fmt.Errorf("last sequence of stream %s: %w", c.cfg.Load().NATSStreamName, err)
	}
	c.seq, c.seqAt = s.CachedInfo().State.LastSeq, asked
	c.known.Store(max(c.known.Load(), c.seq))
	return c.seq, nil
}
