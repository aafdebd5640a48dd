package harness

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/rig"
)

// Keys of every World: the general and admin API keys and the token keys. They are settings of each pod.
const (
	APIKey      = "general-key-of-the-tests"
	AdminAPIKey = "admin-key-of-the-tests"
	TokenKey    = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	AdminKey    = "f0e0d0c0b0a090807060504030201000f1e1d1c1b1a191817161514131211101"
)

// World is what one test works in: a stream, prefix and consumer of its own on a NATS server (shared, or its own), a
// Redis of its own, and its pods. Its methods fail the test themselves; they are for the test's goroutine.
type World struct {
	T        *testing.T
	NATS     *rig.NATS
	Nodes    []*rig.NATS // with NATSCluster: all of them, NATS too
	Redis    *rig.Redis  // nil with NoRedis
	Stream   string
	Prefix   string
	Consumer string
	NC       *nats.Conn // of the test itself, not of any pod
	JS       jetstream.JetStream

	leaf  *rig.NATS // with LeafNATS: where pods connect
	dir   string
	pods  atomic.Int64 // started so far
	redis []string     // settings that say where Redis is
	extra []string     // settings of every pod
}

// Option changes how New builds a World.
type Option func(*options)

type options struct {
	ownNATS, noStream bool
	leaf              bool
	nodes             int
	natsConf          []string
	natsOptions       []nats.Option
	noRedis           bool
	redisArgs         []string
	settings          []string
	stream            func(*jetstream.StreamConfig)
}

// OwnNATS gives the World a server of its own, which the test may kill; conf are further lines of its configuration.
func OwnNATS(conf ...string) Option {
	return func(o *options) { o.ownNATS, o.natsConf = true, conf }
}

// RedisArgs are further arguments of redis-server.
func RedisArgs(args ...string) Option { return func(o *options) { o.redisArgs = args } }

// NoStream leaves the stream to the test or the service.
func NoStream() Option { return func(o *options) { o.noStream = true } }

// StreamConfig lets a test change the stream before it is made.
func StreamConfig(f func(*jetstream.StreamConfig)) Option { return func(o *options) { o.stream = f } }

// Settings are NAME=VALUE, without DAISI_WS_, for every pod of the World.
func Settings(s ...string) Option { return func(o *options) { o.settings = append(o.settings, s...) } }

var worlds atomic.Int64

// New makes a World; it ends with the test.
func New(t *testing.T, opts ...Option) *World {
	t.Helper()
	o := options{stream: func(*jetstream.StreamConfig) {}}
	for _, f := range opts {
		f(&o)
	}
	id := fmt.Sprintf("w%d", worlds.Add(1))
	w := &World{T: t, NATS: shared.nats, Stream: "stream_" + id, Prefix: "p" + id, Consumer: "fanout_" + id, dir: logDir(t), extra: o.settings}
	switch {
	case o.nodes > 0:
		w.startNATSCluster(o.nodes)
	case o.leaf:
		w.startNATSLeaf()
	case o.ownNATS:
		w.startNATS(o.natsConf)
	}
	if !o.noRedis {
		w.StartRedis(o.redisArgs...)
	}
	var err error
	if w.NC, err = w.NATS.Connect(o.natsOptions...); err != nil {
		t.Fatalf("connect to NATS: %v", err)
	}
	t.Cleanup(w.NC.Close)
	if w.JS, err = jetstream.New(w.NC); err != nil {
		t.Fatal(err)
	}
	if !o.noStream {
		w.MakeStream(o.stream)
	}
	return w
}

func (w *World) startNATS(conf []string) {
	w.T.Helper()
	n, err := rig.StartNATS(shared.bin.NATS, w.subdir("nats"), conf...)
	if err != nil {
		w.T.Fatal(err)
	}
	w.NATS = n
	w.T.Cleanup(func() {
		w.blame(n.Process())
		n.Stop()
	})
}

// StartRedis gives the pods a redis-server with further arguments; New does so unless told not to.
func (w *World) StartRedis(args ...string) *rig.Redis {
	w.T.Helper()
	r, err := rig.StartRedis(w.subdir("redis"), args...)
	if err != nil {
		w.T.Fatal(err)
	}
	w.Redis = r
	w.redis = []string{"REDIS_ADDRESS=" + r.Address()}
	w.T.Cleanup(func() {
		if p := r.Process(); p != nil {
			w.blame(p)
		}
		r.Stop()
	})
	return r
}

func (w *World) subdir(name string) string {
	w.T.Helper()
	dir := filepath.Join(w.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		w.T.Fatal(err)
	}
	return dir
}

// blame fails the test for what a child did wrong.
func (w *World) blame(p *rig.Process) {
	w.T.Helper()
	if fault := p.Fault(); fault != "" {
		w.T.Errorf("%s (log: %s)", fault, p.Log.Path)
	}
}

// MakeStream makes the World's stream as a publisher would: limits retention, on disk; change may differ. A shared server gets
// rid of it after the test.
func (w *World) MakeStream(change func(*jetstream.StreamConfig)) {
	w.T.Helper()
	cfg := jetstream.StreamConfig{Name: w.Stream, Subjects: []string{w.Prefix + ".>"}, Retention: jetstream.LimitsPolicy, MaxAge: 24 * time.Hour, AllowDirect: true}
	change(&cfg)
	if _, err := w.JS.CreateStream(Within(w.T, Patience), cfg); err != nil {
		w.T.Fatalf("make stream: %v", err)
	}
	if w.NATS == shared.nats {
		w.T.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), Patience)
			defer cancel()
			w.JS.DeleteStream(ctx, w.Stream) // else it costs the other tests disk and nothing more
		})
	}
}

// RedisClient is a client of the World's Redis for the test itself.
func (w *World) RedisClient() *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: w.Redis.Address()})
	w.T.Cleanup(func() { c.Close() })
	return c
}

// PodSettings are the settings that a pod called id gets in this World, those of further arguments last.
func (w *World) PodSettings(id string, settings ...string) []string {
	return slices.Concat([]string{
		"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0", "SERVER_BIND_ADDRESS=127.0.0.1", "SERVER_ADVERTISE_ADDRESS=127.0.0.1", "SERVER_POD_ID=" + id,
		"NATS_URL=" + w.natsURL(), "NATS_STREAM_NAME=" + w.Stream, "NATS_CONSUMER_NAME=" + w.Consumer, "NATS_SUBJECT_PREFIX=" + w.Prefix,
		"NATS_RECONNECT_WAIT=100ms",
		"AUTH_SECRET_TOKEN=" + APIKey, "AUTH_ADMIN_SECRET_TOKEN=" + AdminAPIKey, "AUTH_TOKEN_AES_KEY=" + TokenKey, "AUTH_ADMIN_TOKEN_AES_KEY=" + AdminKey,
	}, w.redis, w.extra, settings)
}

// Pod is one running service of a World.
type Pod struct {
	*rig.Service
	W  *World
	ID string
}

// Start runs a pod and waits until it is ready. settings are NAME=VALUE without DAISI_WS_ and win over the World's.
func (w *World) Start(settings ...string) *Pod {
	w.T.Helper()
	p := w.Launch(settings...)
	p.WaitListening()
	p.WaitReady()
	return p
}

// Launch runs a pod and does not wait. Arguments of the command line begin with a dash, as in "-config=FILE".
func (w *World) Launch(settings ...string) *Pod {
	w.T.Helper()
	return w.launch(nil, settings...)
}

// launch runs a pod on a host of a network, or here.
func (w *World) launch(host *rig.Host, settings ...string) *Pod {
	w.T.Helper()
	var args, env []string
	for _, s := range settings {
		if s[0] == '-' {
			args = append(args, s)
		} else {
			env = append(env, s)
		}
	}
	id := fmt.Sprintf("pod-%d", w.pods.Add(1))
	bin := shared.bin.Service
	if host != nil {
		bin, args = host.Command(bin, args...)
	}
	s, err := rig.StartService(bin, id, filepath.Join(w.dir, id+".log"), w.PodSettings(id, env...), args...)
	if err != nil {
		w.T.Fatal(err)
	}
	s.Host = host
	w.T.Cleanup(func() {
		w.blame(s.Process)
		s.Kill()
	})
	return &Pod{Service: s, W: w, ID: id}
}

// WaitListening waits until the pod has said where it listens.
func (p *Pod) WaitListening() {
	p.W.T.Helper()
	if err := p.Service.WaitListening(Within(p.W.T, Patience)); err != nil {
		p.W.T.Fatal(err)
	}
}

// WaitReady waits until /ready says 200.
func (p *Pod) WaitReady() {
	p.W.T.Helper()
	if err := p.Service.WaitReady(Within(p.W.T, Patience)); err != nil {
		p.W.T.Fatal(err)
	}
}

// Ready says whether /ready says 200 now. Any goroutine may call it.
func (p *Pod) Ready() bool {
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	return p.Service.Ready(ctx) == nil
}

// WantExit waits for the pod's end and compares its status.
func (p *Pod) WantExit(status int, within time.Duration) {
	p.W.T.Helper()
	got, err := p.Wait(Within(p.W.T, within))
	if err != nil {
		p.Signal(syscall.SIGQUIT) // its log then tells where it hangs
		<-p.Done()
		p.W.T.Fatalf("%v (stacks of its goroutines: %s)", err, p.Log.Path)
	}
	if got != status {
		p.W.T.Fatalf("%s ended with status %d, want %d (log: %s)", p.Name, got, status, p.Log.Path)
	}
}

// Terminate sends SIGTERM, as an orchestrator does; WantExit sees the end.
func (p *Pod) Terminate() {
	p.W.T.Helper()
	if err := p.Signal(syscall.SIGTERM); err != nil {
		p.W.T.Fatal(err)
	}
}

// Proxy stands between the test's programs and target until the test ends.
func (w *World) Proxy(target string) *rig.Proxy {
	w.T.Helper()
	p, err := rig.StartProxy(target)
	if err != nil {
		w.T.Fatal(err)
	}
	w.T.Cleanup(p.Close)
	return p
}

// Publish publishes ev and returns its sequence, which the stream has acknowledged.
func (w *World) Publish(ev feed.Event, opts ...jetstream.PublishOpt) uint64 {
	w.T.Helper()
	return w.PublishRaw(w.Prefix+"."+ev.Subject, ev.Payload, opts...)
}

// PublishRaw is Publish for a whole subject and whatever payload.
func (w *World) PublishRaw(subject string, payload []byte, opts ...jetstream.PublishOpt) uint64 {
	w.T.Helper()
	ack, err := w.JS.Publish(Within(w.T, Patience), subject, payload, opts...)
	if err != nil {
		w.T.Fatalf("publish to %s: %v", subject, err)
	}
	return ack.Sequence
}

// Chat, Message, Contact and Agent publish one realistic event each and return its sequence.
func (w *World) Chat(company, agent string) uint64 {
	w.T.Helper()
	return w.Publish(feed.Chat(company, agent, "628111@c.us", feed.Text(), 1))
}

func (w *World) Message(company, agent, chat string) uint64 {
	w.T.Helper()
	return w.Publish(feed.Message(company, agent, chat, feed.Text(), false))
}

func (w *World) Contact(company, agent string) uint64 {
	w.T.Helper()
	return w.Publish(feed.Contact(company, agent, "628222@c.us"))
}

func (w *World) Agent(company, agent string) uint64 {
	w.T.Helper()
	return w.Publish(feed.Agent(company, agent, "connected"))
}
