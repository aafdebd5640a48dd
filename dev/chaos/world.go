package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/rig"
)

const (
	apiKey   = "chaos-general-key"
	adminAPI = "chaos-admin-key"
	tokenKey = "11111111111111111111111111111111aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"
	adminKey = "22222222222222222222222222222222bbbbbbbbbbbbbbbbbbbbbbbbbbbbbbbb"
	pods     = 3
)

// world is the processes that the faults are made in.
type world struct {
	dir    string
	bin    rig.Binaries
	plan   plan
	nats   *rig.NATS
	redis  *rig.Redis
	ways   [pods]*rig.Proxy // between the pods
	stores [pods]*rig.Proxy // from each pod to Redis
	nc     *nats.Conn
	js     jetstream.JetStream
	began  time.Time

	mu     sync.Mutex // guards pods and faults
	pods   [pods]*rig.Service
	faulty []string // what processes did that they never may
}

// newWorld starts everything; on an error too, what it returns must be closed.
func newWorld(ctx context.Context, p plan) (*world, error) {
	if rig.RedisServer() == "" {
		return nil, errors.New("redis-server is not installed, and another cannot be killed (Debian: apt-get install redis-server)")
	}
	dir, err := os.MkdirTemp("", "dws-chaos-")
	if err != nil {
		return nil, err
	}
	w := &world{dir: dir, plan: p, began: time.Now()}
	if w.bin, err = rig.Build(ctx, dir, os.Getenv("DWS_RACE") == "1"); err != nil {
		return w, err
	}
	for _, sub := range []string{"nats", "redis"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			return w, err
		}
	}
	if w.nats, err = rig.StartNATS(w.bin.NATS, filepath.Join(dir, "nats")); err != nil {
		return w, err
	}
	if w.redis, err = rig.StartRedis(filepath.Join(dir, "redis")); err != nil {
		return w, err
	}
	if w.nc, err = w.nats.Connect(); err != nil {
		return w, err
	}
	if w.js, err = jetstream.New(w.nc); err != nil {
		return w, err
	}
	if _, err = w.js.CreateStream(ctx, jetstream.StreamConfig{Name: "wa_stream", Subjects: []string{"wa.>"}, AllowDirect: true}); err != nil {
		return w, err
	}
	for i := range pods {
		if w.ways[i], err = rig.StartProxy("127.0.0.1:1"); err != nil {
			return w, err
		}
		if w.stores[i], err = rig.StartProxy(w.redis.Address()); err != nil {
			return w, err
		}
		if err := w.startPod(ctx, i); err != nil {
			return w, err
		}
		if err := w.pod(i).WaitReady(ctx); err != nil {
			return w, err
		}
	}
	return w, nil
}

func podID(i int) string { return fmt.Sprintf("pod-%d", i) }

// nakDelay and horizon are the pods' NATS_NAK_DELAY and NATS_RETRY_HORIZON: an event that comes five times to a peer that can't be
// reached is given up, after 3 s. One for an absent agent takes as long, and holds the positions up no longer.
const (
	nakDelay = 200 * time.Millisecond
	horizon  = 3 * time.Second
)

// lease is their POD_LEASE.
const lease = 3 * time.Second

// startPod starts the i-th pod, again under the same id and address. Times are shorter than the defaults so that every
// time-out runs out in a run of half a minute, all in proportion to ACK_WAIT; the past is long enough that no client ever has
// to reload for it.
func (w *world) startPod(ctx context.Context, i int) error {
	s, err := rig.StartService(w.bin.Service, podID(i), filepath.Join(w.dir, podID(i)+".log"), []string{
		"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0", "SERVER_BIND_ADDRESS=127.0.0.1", "SERVER_POD_ID=" + podID(i),
		"SERVER_ADVERTISE_ADDRESS=" + w.ways[i].Address(), "SERVER_DRAIN_SPREAD=2s", "LOG_LEVEL=debug",
		"NATS_URL=" + w.nats.URL(), "NATS_RECONNECT_WAIT=200ms", "NATS_ACK_WAIT=" + w.plan.ackWait.String(), "NATS_NAK_DELAY=" + nakDelay.String(), "REDIS_ADDRESS=" + w.stores[i].Address(),
		"PEER_TIMEOUT=" + (w.plan.ackWait / 5).String(), "PEER_BREAKER_OPEN=3s",
		"WEBSOCKET_WRITE_TIMEOUT=" + (2 * w.plan.ackWait / 5).String(), "WEBSOCKET_BLOCK_TIMEOUT=" + (w.plan.ackWait / 5).String(),
		"WEBSOCKET_BUFFER_SIZE=32", "WEBSOCKET_DROP_POLICY=" + w.plan.policy, "RESUME_MAX_EVENTS=1000000",
		"NATS_RETRY_HORIZON=" + horizon.String(), "POD_LEASE=" + lease.String(),
		"AUTH_SECRET_TOKEN=" + apiKey, "AUTH_TOKEN_AES_KEY=" + tokenKey, "AUTH_ADMIN_SECRET_TOKEN=" + adminAPI, "AUTH_ADMIN_TOKEN_AES_KEY=" + adminKey,
	})
	if err != nil {
		return err
	}
	within, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	if err := s.WaitListening(within); err != nil {
		s.Kill()
		return err
	}
	w.ways[i].Retarget(s.GRPC)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.pods[i] = s
	return nil
}

func (w *world) pod(i int) *rig.Service {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pods[i]
}

// blame notes what a process did that it never may.
func (w *world) blame(p *rig.Process) {
	if fault := p.Fault(); fault != "" {
		w.complain(fault)
	}
}

func (w *world) complain(what string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.faulty = append(w.faulty, what)
}

// at is a time as the report tells it.
func (w *world) at(t time.Time) string { return fmt.Sprintf("%7.3fs", t.Sub(w.began).Seconds()) }

func (w *world) say(format string, args ...any) {
	fmt.Printf("%s  %s\n", w.at(time.Now()), fmt.Sprintf(format, args...))
}

// close ends all processes, and removes their logs and data unless they are to be kept.
func (w *world) close(keep bool) {
	for i := range pods {
		if s := w.pod(i); s != nil {
			s.Kill()
		}
		for _, way := range []*rig.Proxy{w.ways[i], w.stores[i]} {
			if way != nil {
				way.Close()
			}
		}
	}
	if w.nc != nil {
		w.nc.Close()
	}
	if w.nats != nil {
		w.nats.Stop()
	}
	if w.redis != nil {
		w.redis.Stop()
	}
	if !keep {
		os.RemoveAll(w.dir)
	}
}
