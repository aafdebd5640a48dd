// Command load measures one pod on embedded servers: real NATS, Redis and service processes, and its own clients. It
// prints what it measured, and fails when an event was lost.
//
//	go -C dev run ./load throughput   events per second until nothing is pending
//	go -C dev run ./load latency      from publish to client, p50 and p99, at a steady rate
//	go -C dev run ./load memory       resident memory per idle socket
//	go -C dev run ./load compare      memory, compression off and on, and beside it plain servers of three libraries
//	go -C dev run ./load redis        Redis commands per idle socket and second
//	go -C dev run ./load takeover     until a newcomer is ready whose session is on another pod, living or killed
//	go -C dev run ./load absent       from publish to client, alone and with nine times as many events for agents without a socket
//	go -C dev run ./load resume       the same, while the clients of a pod that died come over and resume
//
// throughput prints Redis commands per event too. Both figures are the server's own count: they need a real redis-server.
// With -wrong there are two pods, and one pulls every event: NATS is out of reach for the other, which has the sockets
// (throughput: all of them; latency: those of every second agent, measured beside the rest in the same run).
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/rig"
)

// plan is what the flags ask for.
type plan struct {
	agents  int
	events  int
	rate    int
	size    int
	seconds int
	sockets int
	settle  time.Duration
	procs   int
	rounds  int
	taken   int
	clients int
	backlog int
	wrong   bool
	deflate string
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		os.Exit(1)
	}
}

func run() error {
	var p plan
	flag.IntVar(&p.agents, "agents", 1000, "throughput, latency: agents, one socket each")
	flag.IntVar(&p.events, "events", 200_000, "throughput: events published")
	flag.IntVar(&p.rate, "rate", 2000, "latency: events per second")
	flag.IntVar(&p.size, "size", 600, "bytes of a payload")
	flag.IntVar(&p.seconds, "seconds", 20, "latency, redis: how long; absent: each stretch; resume: before the pod dies")
	flag.IntVar(&p.rounds, "rounds", 3, "absent: stretches of each kind")
	flag.IntVar(&p.taken, "taken", 200, "takeover: sessions taken over from a living pod")
	flag.IntVar(&p.clients, "clients", 5000, "resume: sockets of the pod that dies")
	flag.IntVar(&p.backlog, "backlog", 10, "resume: events that each of them has had")
	flag.IntVar(&p.sockets, "sockets", 10_000, "memory, compare, redis: sockets, each of an agent of its own")
	flag.DurationVar(&p.settle, "settle", 60*time.Second, "memory, compare: pause between the last connect and the reading")
	flag.IntVar(&p.procs, "procs", 2, "GOMAXPROCS of the pod")
	flag.BoolVar(&p.wrong, "wrong", false, "throughput, latency: every event is pulled by the pod that has not the socket")
	flag.StringVar(&p.deflate, "compression", "disabled", "throughput, latency, memory: of the pods; the clients always offer it")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	switch flag.Arg(0) {
	case "compare":
		return compare(ctx, p)
	case "plain":
		return servePlain(flag.Arg(1))
	case "back":
		n, err := strconv.Atoi(flag.Arg(1))
		if err != nil {
			return err
		}
		return come(ctx, n)
	case "reject":
		return rejectAll(ctx, flag.Arg(1))
	case "gone":
		size, err := strconv.Atoi(flag.Arg(2))
		if err != nil {
			return err
		}
		return publishGone(flag.Arg(1), size)
	}
	measure, ok := map[string]func(context.Context, *bench, plan) error{
		"throughput": throughput, "latency": latency, "memory": memory, "absent": absent, "resume": resume, "redis": redisIdle, "takeover": takeOver,
	}[flag.Arg(0)]
	if !ok {
		return fmt.Errorf("usage: load [flags] throughput|latency|memory|compare|absent|resume|redis|takeover, got %q", flag.Arg(0))
	}
	return withBench(ctx, p, measure)
}

func withBench(ctx context.Context, p plan, measure func(context.Context, *bench, plan) error) error {
	b, err := newBench(ctx, p)
	if b != nil {
		defer b.close()
	}
	if err != nil {
		return err
	}
	return measure(ctx, b, p)
}

// bench is the processes under measurement.
type bench struct {
	dir     string
	deflate string
	bin     rig.Binaries
	nats    *rig.NATS
	redis   *rig.Redis
	rdb     *redis.Client
	pod     *rig.Service // pulls
	other   *rig.Service // the second of two
	way     *rig.Proxy   // from other to NATS
	nc      *nats.Conn
	js      jetstream.JetStream
	stream  jetstream.Stream
}

const (
	apiKey   = "load-general-key"
	tokenKey = "11111111111111111111111111111111aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	adminKey = "22222222222222222222222222222222bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
)

// newBench starts everything; on an error too, what it returns must be closed.
func newBench(ctx context.Context, p plan) (*bench, error) {
	dir, err := os.MkdirTemp("", "dws-load-")
	if err != nil {
		return nil, err
	}
	b := &bench{dir: dir, deflate: p.deflate}
	bin, err := rig.Build(ctx, dir, false)
	if err != nil {
		return b, err
	}
	b.bin = bin
	for _, sub := range []string{"nats", "redis"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return b, err
		}
	}
	if b.nats, err = rig.StartNATS(bin.NATS, filepath.Join(dir, "nats")); err != nil {
		return b, err
	}
	if rig.RedisServer() == "" {
		fmt.Fprintln(os.Stderr, "load: no redis-server is installed: the in-process one shares this program's processor time, and latencies are many times as long")
	}
	if b.redis, err = rig.StartRedis(filepath.Join(dir, "redis")); err != nil {
		return b, err
	}
	b.rdb = redis.NewClient(&redis.Options{Addr: b.redis.Address()})
	if b.nc, err = b.nats.Connect(); err != nil {
		return b, err
	}
	if b.js, err = jetstream.New(b.nc, jetstream.WithPublishAsyncMaxPending(4096)); err != nil {
		return b, err
	}
	if b.stream, err = b.js.CreateStream(ctx, jetstream.StreamConfig{Name: "wa_stream", Subjects: []string{"wa.>"}, AllowDirect: true}); err != nil {
		return b, err
	}
	os.Setenv("GOMAXPROCS", fmt.Sprint(p.procs)) // of the pods: this process has read its own
	b.pod, err = b.startPod(ctx, bin, "load-1", b.nats.URL())
	os.Unsetenv("LOAD_DEBUG_ADDRESS") // the first pod's
	if err != nil || !p.wrong {
		return b, err
	}
	if b.way, err = rig.StartProxy(b.nats.Address()); err != nil {
		return b, err
	}
	b.other, err = b.startPod(ctx, bin, "load-2", "nats://"+b.way.Address())
	return b, err
}

// startPod starts a pod and waits until it is ready; on an error too, it must be ended.
func (b *bench) startPod(ctx context.Context, bin rig.Binaries, id, natsURL string) (*rig.Service, error) {
	pod, err := rig.StartService(bin.Service, id, filepath.Join(b.dir, id+".log"), []string{
		"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0", "SERVER_BIND_ADDRESS=127.0.0.1", "SERVER_POD_ID=" + id,
		"NATS_URL=" + natsURL, "REDIS_ADDRESS=" + b.redis.Address(), "SERVER_DEBUG_ADDRESS=" + os.Getenv("LOAD_DEBUG_ADDRESS"),
		"WEBSOCKET_COMPRESSION=" + b.deflate, "WEBSOCKET_COMPRESSION_THRESHOLD=0",
		"AUTH_SECRET_TOKEN=" + apiKey, "AUTH_TOKEN_AES_KEY=" + tokenKey, "AUTH_ADMIN_SECRET_TOKEN=load-admin-key", "AUTH_ADMIN_TOKEN_AES_KEY=" + adminKey,
	})
	if err != nil {
		return pod, err
	}
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err = pod.WaitListening(wait); err == nil {
		err = pod.WaitReady(wait)
	}
	return pod, err
}

// cut takes NATS from the pod that has the sockets, which stay open.
func (b *bench) cut() {
	if b.way != nil {
		b.way.Cut()
	}
}

// here is where sockets are that belong to the first pod.
func (b *bench) here(int) *rig.Service { return b.pod }

func (b *bench) close() {
	for _, pod := range []*rig.Service{b.pod, b.other} {
		if pod == nil {
			continue
		}
		pod.Signal(syscall.SIGTERM)
		ctx, cancel := context.WithTimeout(context.Background(), 40*time.Second)
		if code, err := pod.Wait(ctx); err != nil || code != 0 {
			fmt.Fprintf(os.Stderr, "load: pod ended with status %d, %v\n", code, err)
		}
		cancel()
		pod.Kill()
	}
	if b.way != nil {
		b.way.Close()
	}
	if b.nc != nil {
		b.nc.Close()
	}
	if b.rdb != nil {
		b.rdb.Close()
	}
	if b.nats != nil {
		b.nats.Stop()
	}
	if b.redis != nil {
		b.redis.Stop()
	}
	os.RemoveAll(b.dir)
}

// pending is what the consumer has not been given or not been told of.
func (b *bench) pending(ctx context.Context) (int, error) {
	c, err := b.stream.Consumer(ctx, "ws_fanout")
	if err != nil {
		return 0, err
	}
	return int(c.CachedInfo().NumPending) + c.CachedInfo().NumAckPending, nil
}
