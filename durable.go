package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// clusterMark is the key of the consumer's metadata under which the pods that use it have the id of their cluster: pods of two clusters under one
// consumer would give up each other's events. NATS keeps metadata from 2.10 on.
const clusterMark = "daisi_ws_cluster"

// wanted is the durable consumer as these settings have it, for pods of that cluster.
func wanted(cfg *Config, cluster string) jetstream.ConsumerConfig {
	return jetstream.ConsumerConfig{
		Durable: cfg.NATSConsumerName, FilterSubject: cfg.NATSSubjectPrefix + ".>", AckPolicy: jetstream.AckExplicitPolicy,
		AckWait: cfg.NATSAckWait, MaxAckPending: cfg.NATSMaxAckPending, MaxDeliver: -1, Metadata: map[string]string{clusterMark: cluster},
	}
}

// ensureConsumer makes the durable consumer where there is none, and else compares it with what the service needs.
func (c *consumer) ensureConsumer(ctx context.Context, s jetstream.Stream) (jetstream.Consumer, error) {
	cfg := c.cfg.Load()
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	want := wanted(cfg, c.lease.cluster())
	cons, err := s.Consumer(ctx, want.Durable)
	if errors.Is(err, jetstream.ErrConsumerNotFound) {
		if err := c.leave(); err != nil {
			return nil, err
		}
		if err := c.startOf(ctx, s.CachedInfo(), &want); err != nil {
			return nil, err
		}
		cons, err = s.CreateConsumer(ctx, want)
		if errors.Is(err, jetstream.ErrConsumerExists) { // another pod was faster
			cons, err = s.Consumer(ctx, want.Durable)
		} else if err == nil {
			slog.Info("consumer made", "consumer", want.Durable, "deliver_policy", want.DeliverPolicy.String(), "seq", want.OptStartSeq)
		}
	}
	if errors.Is(err, jetstream.ErrNotPullConsumer) {
		return nil, fmt.Errorf("consumer %s of stream %s is a push consumer, want a pull consumer; %s", want.Durable, cfg.NATSStreamName, otherConsumer)
	}
	if err != nil {
		return nil, fmt.Errorf("consumer %s of stream %s: %w", want.Durable, cfg.NATSStreamName, err)
	}
	if cons, err = c.reconcile(ctx, s, cons, want); err != nil {
		return nil, err
	}
	info := cons.CachedInfo()
	c.mu.Lock()
	beyond := !c.made.IsZero() && !c.made.Equal(info.Created) && beginning(info) > c.floor+1
	c.made = info.Created
	c.mu.Unlock()
	if beyond { // by someone who did not know up to where all was settled
		slog.Warn("the consumer was made anew behind events that may not have been delivered", "consumer", want.Durable)
		c.to.madeBeyond()
	}
	return cons, nil
}

// beginning is the first sequence that a consumer gives out; of one that began with what was new, the lowest that it may have been.
func beginning(info *jetstream.ConsumerInfo) uint64 {
	switch info.Config.DeliverPolicy {
	case jetstream.DeliverAllPolicy:
		return 0
	case jetstream.DeliverByStartSequencePolicy:
		return info.Config.OptStartSeq
	default:
		return info.AckFloor.Stream + 1
	}
}

// leave keeps a pod that the last consumer did not fit from making the next one, while others may be about to.
func (c *consumer) leave() error {
	switch {
	case !c.misfit || c.lease.livePods() == 1:
		return nil
	case c.missing.IsZero():
		c.missing = time.Now()
	case time.Since(c.missing) > 2*pollEvery:
		return nil
	}
	return fmt.Errorf("consumer %s does not exist any more: it is left to the pods that it fitted to make it", c.cfg.Load().NATSConsumerName)
}

// otherConsumer is the way out where JetStream lets nobody change what differs.
const otherConsumer = "set NATS_CONSUMER_NAME to another name, or delete that consumer if nothing else uses it"

// startOf decides where a consumer that does not exist starts: behind the highest ack floor noted for this stream, so
// that nothing published while it was away is lost; at the beginning of a stream made anew, or of one that holds nothing but
// what was not acked; else by DELIVER_POLICY.
func (c *consumer) startOf(ctx context.Context, info *jetstream.StreamInfo, want *jetstream.ConsumerConfig) error {
	created, floor, found, err := c.lastFloor(ctx)
	switch {
	case info.Config.Retention == jetstream.WorkQueuePolicy: // which refuses any other
		want.DeliverPolicy = jetstream.DeliverAllPolicy
	case !found && err != nil:
		return fmt.Errorf("where consumer %s would start is not known: %w", want.Durable, err)
	case found && created.Equal(info.Created):
		want.DeliverPolicy, want.OptStartSeq = jetstream.DeliverByStartSequencePolicy, floor+1
	case found || c.cfg.Load().NATSDeliverPolicy == "all":
		want.DeliverPolicy = jetstream.DeliverAllPolicy
	default:
		want.DeliverPolicy = jetstream.DeliverNewPolicy
	}
	return nil
}

// lastFloor is the highest ack floor known, and the creation of its stream; found is false where there is none, or, with an
// error, maybe.
func (c *consumer) lastFloor(ctx context.Context) (created time.Time, floor uint64, found bool, err error) {
	created, floor, found, err = c.lease.floor(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.polled && (!found || c.created.Equal(created)):
		return c.created, max(c.floor, floor), true, nil
	case !found && !c.before.IsZero(): // this pod saw another stream before this one
		return c.before, 0, true, nil
	}
	return created, floor, found, err
}

// difference is a value of the consumer's that is not the one wanted.
type difference struct{ field, have, want string }

// compare tells how a consumer differs from what is wanted: where JetStream lets nobody change it, in what it delivers, and
// in limits that this pod can live with.
func compare(have, want jetstream.ConsumerConfig) (fixed, delivered, limits []difference) {
	note := func(list *[]difference, field, have, want string) {
		if have != want {
			*list = append(*list, difference{field, have, want})
		}
	}
	note(&fixed, "ack_policy", have.AckPolicy.String(), want.AckPolicy.String())
	switch have.DeliverPolicy {
	case jetstream.DeliverNewPolicy, jetstream.DeliverAllPolicy, jetstream.DeliverByStartSequencePolicy:
	default:
		note(&fixed, "deliver_policy", have.DeliverPolicy.String(), "new, all or by_start_sequence")
	}
	note(&fixed, "replay_policy", have.ReplayPolicy.String(), want.ReplayPolicy.String())

	filters := have.FilterSubjects
	if have.FilterSubject != "" {
		filters = []string{have.FilterSubject}
	}
	note(&delivered, "filter_subject", orEmpty(strings.Join(filters, ", ")), want.FilterSubject)
	note(&delivered, "headers_only", strconv.FormatBool(have.HeadersOnly), "false")
	note(&delivered, "max_deliver", limitText(have.MaxDeliver), limitText(want.MaxDeliver))
	note(&delivered, "backoff", backoffText(have.BackOff), "none")

	note(&limits, "ack_wait", have.AckWait.String(), want.AckWait.String())
	note(&limits, "max_ack_pending", limitText(have.MaxAckPending), limitText(want.MaxAckPending))

	if mark := have.Metadata[clusterMark]; mark != "" {
		note(&delivered, clusterMark, mark, want.Metadata[clusterMark])
	}
	return fixed, delivered, limits
}

func backoffText(delays []time.Duration) string {
	if len(delays) == 0 {
		return "none"
	}
	return fmt.Sprint(delays)
}

func limitText(n int) string {
	if n <= 0 {
		return "unlimited"
	}
	return strconv.Itoa(n)
}

// tell lists differences, each by a format for field, what it is and what is wanted.
func tell(format string, differ []difference) string {
	var all []string
	for _, d := range differ {
		all = append(all, fmt.Sprintf(format, d.field, d.have, d.want))
	}
	return strings.Join(all, ", ")
}

// misfitError is why this pod does without the consumer.
func misfitError(consumer string, differ []difference, advice string) error {
	return fmt.Errorf("consumer %s does not fit: %s; %s", consumer, tell("%s is %s, want %s", differ), advice)
}

// reconcile compares a durable with what is wanted. What JetStream lets one change is changed, but only while nobody else uses
// the consumer: one pod with other settings must not change what all of them get. Until then this pod goes by the consumer's own
// limits, and does without a consumer that delivers something else.
func (c *consumer) reconcile(ctx context.Context, s jetstream.Stream, cons jetstream.Consumer, want jetstream.ConsumerConfig) (jetstream.Consumer, error) {
	info := cons.CachedInfo()
	if info.Config.Metadata[clusterMark] == "" { // made by hand, or by a version of before: the mark changes nothing that others get
		have := info.Config
		have.Metadata = marked(have.Metadata, want)
		if changed, err := s.UpdateConsumer(ctx, have); err == nil {
			cons, info = changed, changed.CachedInfo()
		} else {
			slog.Warn("consumer not marked: another cluster that uses it would not be noticed", "consumer", want.Durable, "err", err)
		}
	}
	fixed, delivered, limits := compare(info.Config, want)
	if len(fixed) > 0 {
		return nil, misfitError(want.Durable, fixed, otherConsumer)
	}
	if len(delivered) > 0 {
		c.noteSkipping(ctx, s, info.Created)
	}
	c.misfit, c.missing = len(delivered) > 0, time.Time{}
	foreign := slices.ContainsFunc(delivered, func(d difference) bool { return d.field == clusterMark })
	used := c.inUse(info, foreign)
	if used && len(delivered) > 0 {
		advice := "set this pod's NATS_SUBJECT_PREFIX or NATS_CONSUMER_NAME, or change the consumer, or stop all pods and start one"
		if foreign {
			advice = "they are of another cluster, with another Redis: set this pod's NATS_CONSUMER_NAME or REDIS_ADDRESS"
		}
		return nil, misfitError(want.Durable, delivered, "it is left as it is while others use it: "+advice)
	}
	if err := c.readAgain(ctx, s, info, want.Durable); err != nil {
		return nil, err
	}
	if differ := append(delivered, limits...); !used && len(differ) > 0 {
		changed, err := change(ctx, s, info.Config, want)
		switch {
		case err == nil:
			slog.Warn("consumer changed to these settings", "consumer", want.Durable, "changed", tell("%s from %s to %s", differ))
			cons, limits = changed, nil
		case len(delivered) > 0:
			return nil, err
		default:
			slog.Warn("consumer left as it is", "consumer", want.Durable, "err", err)
		}
	}
	c.adopt(cons.CachedInfo().Config, limits)
	return cons, nil
}

// inUse says whether other pods use the consumer. One that lives may be as misfitted as this one, and each would take the other for a user
// for ever: whoever uses the consumer asks it for events, or holds some of them back no longer than its ack wait. Pods of a foreign cluster
// show by that alone.
func (c *consumer) inUse(info *jetstream.ConsumerInfo, foreign bool) bool {
	if info.NumWaiting > 0 || info.Delivered.Consumer != c.delivered || c.asked.IsZero() {
		c.asked, c.delivered = time.Now(), info.Delivered.Consumer
	}
	return info.NumWaiting > 0 || (foreign || c.lease.livePods() > 1) && time.Since(c.asked) < info.Config.AckWait+pullExpiry
}

// marked is a consumer's metadata with the mark of the wanted one.
func marked(metadata map[string]string, want jetstream.ConsumerConfig) map[string]string {
	metadata = maps.Clone(metadata)
	if metadata == nil {
		metadata = map[string]string{}
	}
	maps.Copy(metadata, want.Metadata)
	return metadata
}

// change makes the consumer what is wanted, as far as JetStream lets one.
func change(ctx context.Context, s jetstream.Stream, have, want jetstream.ConsumerConfig) (jetstream.Consumer, error) {
	have.FilterSubject, have.FilterSubjects, have.AckWait, have.MaxAckPending = want.FilterSubject, nil, want.AckWait, want.MaxAckPending
	have.MaxDeliver, have.BackOff, have.HeadersOnly = want.MaxDeliver, nil, false
	have.Metadata = marked(have.Metadata, want)
	cons, err := s.UpdateConsumer(ctx, have)
	if err != nil {
		return nil, fmt.Errorf("change consumer %s: %w", want.Durable, err)
	}
	return cons, nil
}

// adopt takes the consumer's own limits for this pod's, and says where they differ from the settings.
func (c *consumer) adopt(have jetstream.ConsumerConfig, differ []difference) {
	effective := *c.cfg.Load()
	effective.NATSAckWait = have.AckWait
	if have.MaxAckPending > 0 {
		effective.NATSMaxAckPending = have.MaxAckPending
	}
	c.cfg.own.Store(&ownLimits{effective.NATSAckWait, effective.NATSMaxAckPending})
	rules := &loader{cfg: &effective}
	rules.checkRelations(&effective)
	differs := tell("%s is %s, want %s", differ)
	c.warn(&c.saidLimits, differs, "the consumer's own limits are in force, until a pod starts while no other lives",
		"consumer", have.Durable, "differ", differs, "err", rules.err())
}

// stillFits is nil while a consumer that is in use delivers what it should. Its limits may have changed: they are adopted.
func (c *consumer) stillFits(ctx context.Context, s jetstream.Stream, info *jetstream.ConsumerInfo) error {
	_, delivered, limits := compare(info.Config, wanted(c.cfg.Load(), c.lease.cluster()))
	if len(delivered) > 0 {
		c.noteSkipping(ctx, s, info.Created)
		return misfitError(info.Name, delivered, "somebody has changed it")
	}
	c.adopt(info.Config, limits)
	return nil
}

// noteSkipping remembers, for all pods, that the consumer made at this time does not deliver what it should: once it does, all
// behind the last good ack floor is to be read again. Not from a stream with interest retention: what no consumer was for is
// gone from it, and to delete the consumer would lose what waits for it.
func (c *consumer) noteSkipping(ctx context.Context, s jetstream.Stream, made time.Time) {
	if s.CachedInfo().Config.Retention == jetstream.InterestPolicy {
		return
	}
	c.skipped = made
	c.mu.Lock()
	c.misfits = true
	c.mu.Unlock()
	if err := c.lease.noteSkipped(ctx, made); err != nil {
		slog.Debug("not noted that the consumer skips events", "err", err)
	}
}

// readAgain deletes a consumer that has skipped events, and says so by an error: the next attempt makes it anew behind the last
// ack floor that was polled while it delivered what it should, since JetStream lets no consumer go back.
func (c *consumer) readAgain(ctx context.Context, s jetstream.Stream, info *jetstream.ConsumerInfo, name string) error {
	if !c.skipped.Equal(info.Created) {
		return nil
	}
	created, floor, found, err := c.lastFloor(ctx)
	switch {
	case !found && err != nil:
		return fmt.Errorf("from where consumer %s has skipped events is not known: %w", name, err)
	case !found || !created.Equal(s.CachedInfo().Created): // it was never ours
		c.skipped = time.Time{}
		return nil
	}
	if err := s.DeleteConsumer(ctx, name); err != nil && !errors.Is(err, jetstream.ErrConsumerNotFound) {
		return fmt.Errorf("consumer %s has skipped events behind %d and must be made anew: delete it: %w", name, floor, err)
	}
	return fmt.Errorf("consumer %s has skipped events behind %d and is made anew", name, floor)
}
