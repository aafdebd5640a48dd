package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	if info.Config.Retention != jetstream.LimitsPolicy {
		slog.Warn("the stream has no limits retention: acked events are gone, clients cannot resume", "stream", cfg.NATSStreamName)
	}
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

// ensureConsumer makes the durable consumer where there is none, and else compares it with what the service needs.
func (c *consumer) ensureConsumer(ctx context.Context, s jetstream.Stream) (jetstream.Consumer, error) {
	cfg := c.cfg.Load()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	want := jetstream.ConsumerConfig{
		Durable: cfg.NATSConsumerName, FilterSubject: cfg.NATSSubjectPrefix + ".>", AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: cfg.NATSAckWait, MaxAckPending: cfg.NATSMaxAckPending, MaxDeliver: -1,
	}
	cons, err := s.Consumer(ctx, cfg.NATSConsumerName)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if err := c.startOf(ctx, s.CachedInfo(), &want); err != nil {
			return nil, err
		}
		cons, err = s.CreateConsumer(ctx, want)
		if errors.Is(err, jetstream.ErrConsumerExists) { // another pod was faster
			cons, err = s.Consumer(ctx, cfg.NATSConsumerName)
		} else if err == nil {
			slog.Info("consumer made", "consumer", want.Durable, "deliver_policy", want.DeliverPolicy.String(), "seq", want.OptStartSeq)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("consumer %s of stream %s: %w", cfg.NATSConsumerName, cfg.NATSStreamName, err)
	}
	c.mu.Lock()
	c.created = s.CachedInfo().Created
	if c.floor == 0 { // the first poll compares with what was so before this pod took any
		c.floor = cons.CachedInfo().AckFloor.Stream
	}
	c.mu.Unlock()
	return c.reconcile(ctx, s, cons, want)
}

// startOf decides where a consumer that does not exist starts: behind the highest ack floor noted for this stream, so
// that nothing published while it was away is lost; at the beginning of a stream made anew; else by DELIVER_POLICY.
func (c *consumer) startOf(ctx context.Context, info *jetstream.StreamInfo, want *jetstream.ConsumerConfig) error {
	cfg := c.cfg.Load()
	created, floor, found, err := c.owners.floor(ctx, cfg.NATSStreamName, cfg.NATSConsumerName)
	c.mu.Lock()
	if !c.created.IsZero() && (!found || c.created.Equal(created)) {
		created, floor, found = c.created, max(c.floor, floor), true
	}
	c.mu.Unlock()
	switch {
	case !found && err != nil:
		return fmt.Errorf("where consumer %s would start is not known: %w", cfg.NATSConsumerName, err)
	case found && created.Equal(info.Created):
		want.DeliverPolicy, want.OptStartSeq = jetstream.DeliverByStartSequencePolicy, floor+1
	case found || cfg.NATSDeliverPolicy == "all":
		want.DeliverPolicy = jetstream.DeliverAllPolicy
	default:
		want.DeliverPolicy = jetstream.DeliverNewPolicy
	}
	return nil
}

// reconcile compares a durable with what is needed. What JetStream lets one change is changed; a conflict in what it
// does not is named field by field, and nothing is consumed until someone deletes that consumer or changes the settings.
func (c *consumer) reconcile(ctx context.Context, s jetstream.Stream, cons jetstream.Consumer, want jetstream.ConsumerConfig) (jetstream.Consumer, error) {
	have := cons.CachedInfo().Config
	var bad []string
	differ := func(field string, have, want any) {
		bad = append(bad, fmt.Sprintf("%s is %v, want %v", field, have, want))
	}
	if have.AckPolicy != want.AckPolicy {
		differ("ack_policy", have.AckPolicy, want.AckPolicy)
	}
	switch have.DeliverPolicy {
	case jetstream.DeliverNewPolicy, jetstream.DeliverAllPolicy, jetstream.DeliverByStartSequencePolicy:
	default:
		differ("deliver_policy", have.DeliverPolicy, "new, all or by_start_sequence")
	}
	if have.ReplayPolicy != jetstream.ReplayInstantPolicy {
		differ("replay_policy", have.ReplayPolicy, jetstream.ReplayInstantPolicy)
	}
	if bad != nil {
		return nil, fmt.Errorf("consumer %s does not fit: %s; delete it or set NATS_CONSUMER_NAME", want.Durable, strings.Join(bad, "; "))
	}
	if have.FilterSubject == want.FilterSubject && len(have.FilterSubjects) == 0 && have.AckWait == want.AckWait &&
		have.MaxAckPending == want.MaxAckPending && have.MaxDeliver == want.MaxDeliver && len(have.BackOff) == 0 && !have.HeadersOnly {
		return cons, nil
	}
	slog.Warn("consumer changed to these settings", "consumer", want.Durable, "ack_wait", want.AckWait, "max_ack_pending", want.MaxAckPending)
	changed := have
	changed.FilterSubject, changed.FilterSubjects, changed.AckWait, changed.MaxAckPending = want.FilterSubject, nil, want.AckWait, want.MaxAckPending
	changed.MaxDeliver, changed.BackOff, changed.HeadersOnly = want.MaxDeliver, nil, false
	cons, err := s.UpdateConsumer(ctx, changed)
	if err != nil {
		return nil, fmt.Errorf("change consumer %s: %w", want.Durable, err)
	}
	return cons, nil
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
