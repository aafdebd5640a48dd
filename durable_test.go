package main

import (
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func TestCompare(t *testing.T) {
	want := wanted(&Config{NATSConsumerName: "c", NATSSubjectPrefix: "wa", NATSAckWait: 30 * time.Second, NATSMaxAckPending: 65536}, "ours")
	same := want
	same.FilterSubject, same.FilterSubjects, same.MaxDeliver, same.DeliverPolicy = "", []string{"wa.>"}, 0, jetstream.DeliverByStartSequencePolicy
	same.Replicas, same.Description, same.Metadata = 3, "ours", map[string]string{"team": "chat", clusterMark: "ours"}
	foreign := want
	foreign.Metadata = map[string]string{clusterMark: "theirs"}
	other := jetstream.ConsumerConfig{
		AckPolicy: jetstream.AckNonePolicy, DeliverPolicy: jetstream.DeliverLastPolicy, ReplayPolicy: jetstream.ReplayOriginalPolicy,
		FilterSubjects: []string{"a.>", "b.>"}, HeadersOnly: true, MaxDeliver: 3, BackOff: []time.Duration{time.Second, time.Minute},
		AckWait: 90 * time.Second, MaxAckPending: -1,
	}
	for _, c := range []struct {
		have                     jetstream.ConsumerConfig
		fixed, delivered, limits string
	}{
		{want, "", "", ""},
		{same, "", "", ""},
		{foreign, "", "daisi_ws_cluster: theirs -> ours", ""},
		{jetstream.ConsumerConfig{AckWait: want.AckWait, MaxAckPending: 100}, "", "filter_subject: empty -> wa.>", "max_ack_pending: 100 -> 65536"},
		{other, "ack_policy: AckNone -> AckExplicit, deliver_policy: last -> new, all or by_start_sequence, replay_policy: original -> instant",
			"filter_subject: a.>, b.> -> wa.>, headers_only: true -> false, max_deliver: 3 -> unlimited, backoff: [1s 1m0s] -> none",
			"ack_wait: 1m30s -> 30s, max_ack_pending: unlimited -> 65536"},
	} {
		fixed, delivered, limits := compare(c.have, want)
		const format = "%s: %s -> %s"
		if f, d, l := tell(format, fixed), tell(format, delivered), tell(format, limits); f != c.fixed || d != c.delivered || l != c.limits {
			t.Errorf("%+v:\n got %s | %s | %s\nwant %s | %s | %s", c.have, f, d, l, c.fixed, c.delivered, c.limits)
		}
	}
}

// TestOwnLimits: the consumer's own limits hold wherever they are, one that is unlimited leaves the settings', and an ack wait of
// a second leaves time for an answer.
func TestOwnLimits(t *testing.T) {
	cfg := &settings{}
	cfg.Store(&Config{NATSAckWait: 30 * time.Second, NATSMaxAckPending: 65536})
	c := &consumer{cfg: cfg}
	for _, test := range []struct {
		adopt       *jetstream.ConsumerConfig
		late        time.Duration
		maxPending  int
		sharesOfTwo int64
	}{
		{nil, 28 * time.Second, 65536, 16384},
		{&jetstream.ConsumerConfig{AckWait: time.Minute, MaxAckPending: 100}, 58 * time.Second, 100, 25},
		{&jetstream.ConsumerConfig{AckWait: time.Second, MaxAckPending: -1}, 500 * time.Millisecond, 65536, 16384},
		{&jetstream.ConsumerConfig{AckWait: 3 * time.Second, MaxAckPending: 1}, 1500 * time.Millisecond, 1, 2},
	} {
		if test.adopt != nil {
			c.adopt(*test.adopt, nil)
		}
		s := newShare(cfg, newMetrics())
		s.pods.Store(2)
		if late, n := cfg.lateAfter(), cfg.maxAckPending(); late != test.late || n != test.maxPending || s.size() != test.sharesOfTwo {
			t.Errorf("%+v: late after %v, %d unacked, a share of %d", test.adopt, late, n, s.size())
		}
	}
}
