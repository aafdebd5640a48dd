// Command daisi-ws-service delivers events from a NATS JetStream stream to browsers, over one exclusive WebSocket
// per (company, agent, user), across any number of pods.
//
// The map of the house, in the order of an event's way:
//
//	consumer.go  the connection to NATS and the flow; stream.go the stream; durable.go the one durable pull consumer of all pods
//	event.go     a message's subject and payload, and the delivery that counts its targets
//	router.go    an event's way: sockets here, look-up, peers; verdict.go what JetStream is told; share.go what this pod may hold
//	owner.go     claims and look-ups; lease.go who this pod is, and who the others are; beat.go the heartbeat that issues positions
//	buffer.go    the send ring; writer.go the shared writers; frame.go the outbound frame; deflate.go compressed once
//	conn.go      one socket: its life; protocol.go json.v1; inbound.go messages of clients; replay.go the past of a socket
//	hub.go       the sockets of this pod, by agent
//	session.go   exclusive sessions: a newcomer closes the socket before it; renewal.go their keys in Redis
//	auth.go      keys and tokens; ids.go what may be an id; server.go HTTP; origin.go whose pages may come
//	peer.go      the talk among pods; trust.go who is one; roster.go their sessions, for operators
//	config.go    settings; commands.go the command line; metrics.go every metric
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/redis/go-redis/v9"
)

func main() {
	code, serve, file := command(os.Args[1:], os.Environ(), os.Stdin, os.Stdout, os.Stderr)
	if !serve {
		os.Exit(code)
	}
	if err := run(file, os.Environ(), os.Stderr); err != nil {
		slog.Error("stopped", "err", err)
		os.Exit(1)
	}
}

// service is everything that run wires together, in the order of the data's way.
type service struct {
	cfg      *settings
	m        *Metrics
	rdb      redis.UniversalClient
	lease    *lease
	owners   *owners
	peers    *peers
	sessions *sessions
	consumer *consumer
	hub      *hub
	share    *share
	router   *router
	beat     *beat
	server   *server

	rpc        *net.TCPAddr    // where peers dial this pod
	starting   context.Context // ends the wait for the lease, at the beginning of the drain
	giveUp     context.CancelFunc
	background context.Context // ends the loops below, at the end of the drain
	cancel     context.CancelFunc
	loops      sync.WaitGroup
	endLocks   context.CancelFunc // ends sessions.run, which releases what is queued
	locks      chan struct{}      // closed when it has
	routing    chan struct{}      // closed when the router has routed its last batch
	fatal      chan error         // what the service cannot live without; buffered
}

// garbageRoom counts as in use, so that so much more garbage may gather between two collections: Go lets as much gather as is in
// use. With 1,000 sockets that is 6 MB, which were full every 0.8 s at 5,000 events/s. For 4 to 8 ms both processors then do
// little else: more than one event in 200 met that, a good part of those that the p99 is about.
const garbageRoom = 32 << 20

// run serves until SIGTERM or SIGINT and returns after the drain: nil if nothing was lost. A second signal exits at once.
func run(file string, environ []string, logs io.Writer) error {
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" { // whoever sets one of them decides
		// Before all else: made of memory that was used before, it would be zeroed, and so be resident.
		ballast := make([]byte, garbageRoom)
		defer runtime.KeepAlive(ballast)
	}
	cfg, warnings, err := loadConfig(file, environ)
	if err != nil {
		fmt.Fprintln(logs, err)
		return errors.New("the settings are faulty")
	}
	level := new(slog.LevelVar)
	setLog(cfg, level, logs)
	for _, w := range warnings {
		slog.Warn(w)
	}
	signals := make(chan os.Signal, 4) // before the first wait for a dependency: a SIGTERM then still ends in a drain
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	s, err := newService(cfg)
	if err != nil {
		return err
	}
	if err := s.start(); err != nil {
		return err
	}
	for {
		select {
		case err := <-s.fatal:
			s.drain(signals)
			return err
		case sig := <-signals:
			if sig == syscall.SIGHUP {
				s.reload(file, environ, level)
				continue
			}
			slog.Info("draining", "signal", sig.String())
			return s.drain(signals)
		}
	}
}

func setLog(cfg *Config, level *slog.LevelVar, w io.Writer) {
	level.UnmarshalText([]byte(cfg.LogLevel)) // checked by loadConfig
	opts := &slog.HandlerOptions{Level: level}
	var h slog.Handler = slog.NewJSONHandler(w, opts)
	if cfg.LogFormat == "text" {
		h = slog.NewTextHandler(w, opts)
	}
	slog.SetDefault(slog.New(h).With("pod", cfg.ServerPodID))
}

// newService makes every room. Nothing runs or listens yet; the connection to NATS is being tried.
func newService(cfg *Config) (*service, error) {
	s := &service{cfg: &settings{}, m: newMetrics(), routing: make(chan struct{}), locks: make(chan struct{}), fatal: make(chan error, 8)}
	s.cfg.Store(cfg)
	s.background, s.cancel = context.WithCancel(context.Background())
	s.starting, s.giveUp = context.WithCancel(s.background)
	var err error
	meet := func(ctx context.Context, conn *redis.Conn) error { return s.lease.meet(ctx, conn) }
	if s.rdb, err = newRedis(cfg, meet); err != nil {
		return nil, err
	}
	s.lease = newLease(s.cfg, s.rdb, s.m)
	s.owners = newOwners(s.cfg, s.rdb, s.m, s.lease)
	s.share = newShare(s.cfg, s.m)
	s.peers = newPeers(s.cfg, s.m, s.lease, s.share)
	s.sessions = newSessions(s.cfg, s.rdb, s.m, s.lease, s.peers)
	s.peers.exclusive = s.sessions
	if s.consumer, err = newConsumer(s.cfg, s.m, s.lease); err != nil {
		return nil, err
	}
	auth := newAuth(s.cfg, s.rdb, s.m)
	s.hub = newHub(s.cfg, s.m, s.owners, s.consumer, auth)
	s.router = newRouter(s.cfg, s.m, s.lease, s.consumer, s.owners, s.hub, s.peers, s.share)
	s.consumer.to = s.router
	s.peers.deliver = s.router.fromPeer
	s.beat = &beat{cfg: s.cfg, m: s.m, lease: s.lease, owners: s.owners, sessions: s.sessions, hub: s.hub, peers: s.peers, consumer: s.consumer}
	s.server = newServer(s.cfg, s.m, auth, s.sessions, s.lease, s.hub, s.ready)
	s.server.roster = &roster{cfg.ServerPodID, s.hub, s.peers, s.lease, s.sessions}
	s.peers.sessions = s.server.roster.here
	return s, nil
}

// ready tells /ready the state of each dependency, and whether all of them are good.
func (s *service) ready() (map[string]string, bool) {
	nats, consumer := s.consumer.status()
	state := map[string]string{"nats": nats, "consumer": consumer, "redis": "connected", "grpc": "serving"}
	switch {
	case !s.lease.available():
		state["redis"] = "disconnected"
	case consumer == "active" && s.hub.position() == nil:
		state["consumer"] = "waiting for its first position"
	}
	if s.router.waiting.Load() > 0 && s.router.unansweredNow() > 0 {
		state["consumer"] = "waiting for Redis to say who owns agents"
	}
	if !s.peers.serving() {
		state["grpc"] = "stopped"
	}
	return state, nats == "connected" && state["consumer"] == "active" && state["redis"] == "connected" && s.peers.serving()
}

// start binds the ports, then takes up the work as its dependencies come: none of them needs to be there yet.
func (s *service) start() error {
	cfg := s.cfg.Load()
	web, err := net.Listen("tcp", net.JoinHostPort(cfg.ServerBindAddress, strconv.Itoa(cfg.ServerHTTPPort)))
	if err != nil {
		return fmt.Errorf("bind the HTTP port: %w", err)
	}
	rpc, err := net.Listen("tcp", net.JoinHostPort(cfg.ServerBindAddress, strconv.Itoa(cfg.ServerGRPCPort)))
	if err != nil {
		return fmt.Errorf("bind the gRPC port: %w", err)
	}
	s.rpc = rpc.Addr().(*net.TCPAddr)
	slog.Info("listening", "http", web.Addr().String(), "grpc", rpc.Addr().String())
	s.loop(func() { s.fail(s.peers.serve(rpc)) })
	s.loop(func() { s.fail(s.server.serve(web)) })
	if cfg.ServerDebugAddress != "" {
		s.loop(func() { s.serveDebug(cfg.ServerDebugAddress) })
	}
	ctx, cancel := context.WithCancel(s.background)
	s.endLocks = cancel
	s.loop(func() {
		defer close(s.locks)
		s.sessions.run(ctx)
	})
	s.loop(s.work)
	s.loop(func() {
		select {
		case <-s.consumer.closed:
			s.fail(errors.New("the connection to NATS was given up (NATS_MAX_RECONNECTS)"))
		case <-s.background.Done():
		}
	})
	return nil
}

// loop runs f on a goroutine that the drain waits for.
func (s *service) loop(f func()) { s.loops.Go(f) }

// fail reports what the service cannot go on without.
func (s *service) fail(err error) {
	if err != nil && s.background.Err() == nil {
		select {
		case s.fatal <- err:
		default:
		}
	}
}

// work waits for the pod's lease and then starts the loops. Nothing is pulled before the lease is there: every event
// would be NAKed.
func (s *service) work() {
	advertise := func(ctx context.Context) (string, error) { return advertised(ctx, s.cfg.Load(), s.rpc) }
	if err := s.lease.start(s.starting, advertise, s.peers); err != nil {
		if s.starting.Err() == nil {
			s.fail(err)
		}
		close(s.routing)
		close(s.consumer.stopped)
		return
	}
	s.loop(func() { s.owners.run(s.background) })
	s.loop(func() { s.fail(s.beat.run(s.background)) })
	s.loop(func() { s.hub.run(s.background) })
	s.loop(func() { s.router.tick(s.background) })
	s.loop(func() { s.consumer.tellAge(s.background) })
	s.loop(func() {
		defer close(s.routing)
		s.router.run(s.background)
	})
	s.consumer.run(s.background)
}

func (s *service) serveDebug(addr string) {
	srv := &http.Server{Addr: addr, Handler: debugHandler(), ReadHeaderTimeout: 5 * time.Second}
	defer context.AfterFunc(s.background, func() { srv.Close() })()
	if err := srv.ListenAndServe(); err != nil && !errors.Is(err, http.ErrServerClosed) {
		s.fail(fmt.Errorf("serve SERVER_DEBUG_ADDRESS: %w", err))
	}
}

// advertised is what peers dial: ADVERTISE_ADDRESS, else the address bound, else this machine's on its way to Redis.
// An error is no reason to end: where containers come up together, Redis may have no name yet.
func advertised(ctx context.Context, cfg *Config, bound *net.TCPAddr) (string, error) {
	port := strconv.Itoa(bound.Port)
	if a := cfg.ServerAdvertiseAddress; a != "" {
		if _, _, err := net.SplitHostPort(a); err == nil {
			return a, nil
		}
		return net.JoinHostPort(strings.Trim(a, "[]"), port), nil
	}
	if !bound.IP.IsUnspecified() {
		return bound.String(), nil
	}
	first, _, _ := strings.Cut(cfg.RedisAddress, ",")
	c, err := new(net.Dialer).DialContext(ctx, "udp", first) // sends nothing: the kernel only picks the route
	if err != nil {
		return "", fmt.Errorf("find the address that peers dial, on the way to Redis at %s: %w", first, err)
	}
	defer c.Close()
	return net.JoinHostPort(c.LocalAddr().(*net.UDPAddr).IP.String(), port), nil
}

// reload reads the settings again on SIGHUP: live ones are in force at once, a faulty file changes nothing.
func (s *service) reload(file string, environ []string, level *slog.LevelVar) {
	changed, restart, err := s.cfg.reload(file, environ)
	if err == nil {
		err = s.server.reloadTLS() // of files that were found good a moment ago
	}
	if err != nil {
		s.m.configReloadsTotal.with("failure").Inc()
		slog.Error("settings not reloaded, those before stay in force", "err", err)
		return
	}
	level.UnmarshalText([]byte(s.cfg.Load().LogLevel))
	s.m.configReloadsTotal.with("success").Inc()
	slog.Info("settings reloaded", "changed", changed, "need_restart", restart)
}

// drain stops in the order in which nothing is lost: not ready, no more pulling, no more sockets, what is in hand, the
// sockets spread over time, the lease, and then the servers and connections. Each step has its own bound.
func (s *service) drain(signals <-chan os.Signal) error {
	go func() {
		for sig := range signals {
			if sig != syscall.SIGHUP {
				slog.Error("second signal: exit at once", "signal", sig.String())
				os.Exit(1)
			}
		}
	}()
	cfg := s.cfg.Load()
	began := time.Now()
	step := func(name string, limit time.Duration, f func(context.Context) error) {
		left := cfg.ServerShutdownTimeout - time.Since(began)
		ctx, cancel := context.WithTimeout(context.Background(), max(min(limit, left), 100*time.Millisecond))
		defer cancel()
		if err := f(ctx); err != nil { // with a dependency away; whatever is not acked comes again elsewhere
			slog.Warn("drain goes on without", "step", name, "err", err)
		}
	}
	s.server.startDrain()
	s.giveUp()
	step("stop pulling", 5*time.Second, s.consumer.drain)
	s.router.stop()
	step("route the last batch", 2*time.Second, until(s.routing))
	s.hub.stopAccepting()
	step("settle what is in hand", 3*time.Second, s.router.settleAll) // the rest is NAKed as its sockets close
	step("close sockets", cfg.ServerDrainSpread+6*time.Second, s.hub.drain)
	step("settle the rest", 2*time.Second, s.router.settleAll)
	s.endLocks()
	step("release sessions", 3*time.Second, until(s.locks))
	step("release routes", 2*time.Second, s.owners.releaseAll)
	step("give up the lease", time.Second, s.lease.close)
	step("stop gRPC", 2*time.Second, s.peers.stop)
	step("stop HTTP", 2*time.Second, s.server.shutdown)
	step("leave NATS", 2*time.Second, s.consumer.close)
	s.cancel()
	ended := make(chan struct{})
	go func() { // ends with the loops, or with the process
		s.loops.Wait()
		close(ended)
	}()
	step("end the loops", time.Second, until(ended)) // one may wait for a Redis that is silent
	slog.Info("drained", "seconds", time.Since(began).Seconds(), "in_hand", s.share.inHand.Load())
	return s.rdb.Close()
}

// until waits for done to be closed.
func until(done <-chan struct{}) func(context.Context) error {
	return func(ctx context.Context) error {
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
