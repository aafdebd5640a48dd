package e2e

import (
	"context"
	"encoding/json"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
)

// wantNotReady wants a pod that listens and says 503, with these words of the reason in one line of its log.
func wantNotReady(p *harness.Pod, words ...string) {
	p.W.T.Helper()
	p.WaitListening()
	findLine(p, words...)
	if a := p.Do("GET", "/ready", nil, nil); a.StatusCode != 503 {
		p.W.T.Errorf("/ready: %s %s", a.Status, a.Body)
	}
}

// TestCreateStream: the stream is its publisher's and is waited for; only when told to the service makes it, as told.
func TestCreateStream(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.NoStream())
	prefix := "websocket." + w.Prefix // tokens joined by a dot
	p := w.Launch("NATS_SUBJECT_PREFIX=" + prefix)
	wantNotReady(p, `"level":"WARN"`, "stream "+w.Stream, "stream not found")
	three := w.Launch("NATS_SUBJECT_PREFIX="+prefix, "NATS_CREATE_STREAM=true", "NATS_STREAM_REPLICAS=3")
	wantNotReady(three, `"level":"WARN"`, "stream "+w.Stream, "replicas > 1 not supported")
	three.Kill()

	maker := w.Start("NATS_SUBJECT_PREFIX="+prefix, "NATS_CREATE_STREAM=true", "NATS_STREAM_MAX_AGE=2h")
	ctx := harness.Within(t, harness.Patience)
	s, err := w.JS.Stream(ctx, w.Stream)
	if err != nil {
		t.Fatal(err)
	}
	defer w.JS.DeleteStream(context.Background(), w.Stream)
	cfg := s.CachedInfo().Config
	if len(cfg.Subjects) != 1 || cfg.Subjects[0] != prefix+".>" || cfg.MaxAge != 2*time.Hour || cfg.Replicas != 1 ||
		cfg.Storage != jetstream.FileStorage || cfg.Retention != jetstream.LimitsPolicy {
		t.Errorf("the service made the stream %+v", cfg)
	}
	p.WaitReady()
	for _, p := range []*harness.Pod{p, maker} {
		c := p.Connect(harness.User("acme", "desk1", p.ID))
		ev := feed.Chat("acme", "desk1", "628111@c.us", "hello", 1)
		c.WaitEvent(w.PublishRaw(prefix+"."+ev.Subject, ev.Payload))
	}
}

// TestConsumerSettings: what JetStream itself says of the consumer that the service made, and of what it asks for.
func TestConsumerSettings(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	early := w.Chat("acme", "desk1") // before there is a consumer
	pulls := make(chan *nats.Msg, 64)
	sub, err := w.NC.ChanSubscribe("$JS.API.CONSUMER.MSG.NEXT."+w.Stream+"."+w.Consumer, pulls)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.NC.Flush(); err != nil {
		t.Fatal(err)
	}
	// The client comes within the delays of an event that nobody owns.
	p := w.Start("NATS_ACK_WAIT=25s", "NATS_MAX_ACK_PENDING=1000", "NATS_PARKED_BUDGET=100", "NATS_DELIVER_POLICY=all", "NATS_PREFETCH=7", "NATS_PREFETCH_BYTES=3MiB")
	p.Connect(harness.User("acme", "desk1", "ann")).WaitEvent(early)
	cfg := w.ConsumerInfo().Config
	if cfg.Durable != w.Consumer || cfg.FilterSubject != w.Prefix+".>" || cfg.AckPolicy != jetstream.AckExplicitPolicy || cfg.AckWait != 25*time.Second ||
		cfg.MaxAckPending != 1000 || cfg.DeliverPolicy != jetstream.DeliverAllPolicy || cfg.MaxDeliver != -1 || len(cfg.BackOff) != 0 {
		t.Errorf("the consumer is %+v", cfg)
	}
	select {
	case m := <-pulls:
		var ask struct {
			Batch    int `json:"batch"`
			MaxBytes int `json:"max_bytes"`
		}
		if err := json.Unmarshal(m.Data, &ask); err != nil || ask.Batch != 7 || ask.MaxBytes != 3<<20 {
			t.Errorf("the service asks for %s, want 7 messages and %d bytes", m.Data, 3<<20)
		}
	case <-time.After(harness.Patience):
		t.Error("no pull was seen")
	}
	sub.Unsubscribe()
}

// TestNATSTimes: how soon an attempt to connect is given up, how soon the next follows, and how soon silence is noticed.
func TestNATSTimes(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	mute, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer mute.Close()
	p := w.Launch("NATS_URL=nats://"+mute.Addr().String(), "NATS_CONNECT_TIMEOUT=300ms", "NATS_RECONNECT_WAIT=200ms")
	p.WaitListening()
	mute.(*net.TCPListener).SetDeadline(time.Now().Add(harness.Patience))
	var first time.Time
	for i := range 4 {
		c, err := mute.Accept()
		if err != nil {
			t.Fatalf("attempt %d: %v", i, err)
		}
		defer c.Close()
		if i == 0 {
			first = time.Now()
		}
	}
	// With the defaults, 5 s and 2 s, three more attempts take 21 s; with these at least 1.5 s.
	if took := time.Since(first); took < time.Second || took > 15*time.Second {
		t.Errorf("four attempts within %v", took)
	}

	proxy := w.Proxy(w.NATS.Address())
	q := w.Start("NATS_URL=nats://"+proxy.Address(), "NATS_PING_INTERVAL=200ms", "NATS_CONNECT_TIMEOUT=2s")
	c := q.Connect(harness.User("acme", "desk1", "ann"))
	proxy.BlackHole()
	findLine(q, `"msg":"NATS disconnected: sockets stay open"`, "stale connection")
	// The attempts to connect are as silent; nothing that has an answer of its own waits for them.
	slowest := time.Duration(0)
	away := time.Now()
	harness.Eventually(t, harness.Patience, "longer than an attempt to connect takes", func() bool {
		begin := time.Now()
		if a := q.Do("GET", "/ready", nil, nil); a.StatusCode != 503 {
			t.Errorf("/ready with NATS away: %s", a.Body)
		}
		slowest = max(slowest, time.Since(begin))
		return time.Since(away) > 3*time.Second
	})
	if slowest > 1500*time.Millisecond {
		t.Errorf("/ready took %v while an attempt to connect hung", slowest)
	}
	proxy.Cut()
	proxy.Restore()
	q.WaitReady()
	c.WaitEvent(w.Chat("acme", "desk1"))
}

// TestNATSGivenUp: a service that may not try for ever ends when its attempts are used up, and says why.
func TestNATSGivenUp(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.OwnNATS())
	p := w.Start("NATS_MAX_RECONNECTS=3")
	w.NATS.Kill()
	p.WantExit(1, harness.Patience)
	if !strings.Contains(p.Log.Text(), "NATS_MAX_RECONNECTS") {
		t.Error("it does not say why")
	}
}

// wantInRedis wants a key in the World's Redis and returns its value and the time that it has left.
func wantInRedis(w *harness.World, key string) (string, time.Duration) {
	w.T.Helper()
	rdb, ctx := w.RedisClient(), harness.Within(w.T, harness.Patience)
	value, err := rdb.Get(ctx, key).Result()
	if err != nil {
		w.T.Fatalf("%s: %v", key, err)
	}
	left, err := rdb.PTTL(ctx, key).Result()
	if err != nil {
		w.T.Fatalf("%s: %v", key, err)
	}
	return value, left
}

// TestLeaseNamesThePod: id, address for peers and lease as set, in Redis; a session's lock lives as long as told and is renewed.
func TestLeaseNamesThePod(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	p := w.Start("SERVER_POD_ID=pod-of-mine", "SERVER_ADVERTISE_ADDRESS=peers.test:1234", "POD_LEASE=3s", "SESSION_TTL=6s", "SESSION_REFRESH_INTERVAL=1s")
	value, left := wantInRedis(w, "pod:pod-of-mine")
	if !strings.HasSuffix(value, " peers.test:1234") || left <= 0 || left > 3*time.Second {
		t.Errorf("the lease is %q for %v", value, left)
	}
	findLine(p, `"msg":"lease taken"`, `"pod":"pod-of-mine"`, `"address":"peers.test:1234"`)
	c := p.Connect(harness.User("acme", "desk1", "ann"))
	value, left = wantInRedis(w, "session:acme:desk1:ann")
	if !strings.Contains(value, "pod-of-mine") || left <= 0 || left > 6*time.Second {
		t.Errorf("the lock is %q for %v", value, left)
	}
	rdb, ctx := w.RedisClient(), harness.Within(t, harness.Patience)
	lowest := left
	harness.Eventually(t, 4*time.Second, "the lock's renewal", func() bool { // once a second; the default is 10 s
		now := rdb.PTTL(ctx, "session:acme:desk1:ann").Val()
		lowest = min(lowest, now)
		return now > lowest
	})
	c.WantNothingElse()
}

// TestRetryHorizon: an event whose owner fails is tried again until the horizon, in the stream's own time, then given up and counted
// as expired.
func TestRetryHorizon(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.Settings("POD_LEASE=1m", shortDelays, "NATS_RETRY_HORIZON=2s"))
	gone, pod := w.Start(), w.Start()
	gone.Connect(harness.User("acme", "desk1", "ann"))
	gone.Kill() // and owns its route for another minute
	pod.Connect(harness.User("acme", "desk2", "bob"))
	begin := time.Now()
	for range 20 { // one at least is not given to the dead pod, whose pull may still wait
		w.Chat("acme", "desk1")
	}
	harness.Eventually(t, harness.Patience, "an event to be given up", func() bool {
		w.Chat("acme", "desk2") // the stream goes on
		return ended(pod, "expired") > 0
	})
	if took := time.Since(begin); took < 2*time.Second {
		t.Errorf("given up after %v", took)
	}
	if n := ended(pod, "nak_failed"); n < 5 {
		t.Errorf("tried again only %v times", n)
	}
}

// TestShutdownTimeout: a drain whose dependencies are silent takes no longer than it may, and still closes its sockets as it should.
func TestShutdownTimeout(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	nats, redis := w.Proxy(w.NATS.Address()), w.Proxy(w.Redis.Address())
	p := w.Start("NATS_URL=nats://"+nats.Address(), "REDIS_ADDRESS="+redis.Address(), "SERVER_SHUTDOWN_TIMEOUT=5200ms", "SERVER_DRAIN_SPREAD=0s",
		"WEBSOCKET_WRITE_TIMEOUT=100ms", "WEBSOCKET_BLOCK_TIMEOUT=50ms")
	c := p.Connect(harness.User("acme", "desk1", "ann"))
	nats.BlackHole()
	redis.BlackHole()
	begin := time.Now()
	p.Terminate()
	c.WantClose(1001, "drain retry-after-ms=0")
	p.WantExit(0, harness.Patience)
	// Each step that is left over when the time is up has a tenth of a second more. Without the limit they take 9 s.
	if took := time.Since(begin); took > 8*time.Second {
		t.Errorf("the drain took %v", took)
	}
}
