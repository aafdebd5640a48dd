package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/rig"
)

// demo is what runs: servers, the service, the publisher and the page.
type demo struct {
	dir   string
	keys  keys
	nats  *rig.NATS
	redis *rig.Redis
	pod   *rig.Service
	nc    *nats.Conn // the publisher's
	js    jetstream.JetStream
	book  *book
	page  net.Listener
}

// keys are made for one run and forgotten with it.
type keys struct{ general, admin, public, token, adminToken string }

func newKeys() keys {
	return keys{random(16), random(16), random(16), random(32), random(32)}
}

func random(bytes int) string {
	b := make([]byte, bytes)
	rand.Read(b)
	return hex.EncodeToString(b)
}

const (
	company = "acme"
	agent   = "desk1" // has sockets, if somebody opens the page
	absent  = "desk2" // has none: its events are given up after a while
)

// run starts everything in the order of the data's way, and stops it in reverse when ctx ends.
func run(ctx context.Context, dir, listen string, rate float64) (err error) {
	bin, err := rig.Build(ctx, dir, false, "./cmd/ws")
	if err != nil {
		return unlessInterrupted(ctx, err)
	}
	d := &demo{dir: dir, keys: newKeys(), book: newBook()}
	if d.page, err = net.Listen("tcp", listen); err != nil {
		return err
	}
	defer d.page.Close()
	if err := d.startServers(bin); err != nil {
		return err
	}
	defer d.nats.Stop()
	defer d.redis.Stop()
	if err := d.openStream(ctx); err != nil {
		return unlessInterrupted(ctx, err)
	}
	defer d.nc.Close()
	if d.pod, err = d.startService(ctx, bin.Service); err != nil {
		return unlessInterrupted(ctx, err)
	}
	defer func() { err = errors.Join(err, d.stopService()) }()
	web := &http.Server{Handler: d.handler(), ReadHeaderTimeout: 5 * time.Second}
	go web.Serve(d.page) // ends with Close
	defer web.Close()
	if err := d.announce(); err != nil {
		return unlessInterrupted(ctx, err)
	}
	published := make(chan error, 1)
	go func() { published <- d.publish(ctx, rate) }() // ends with ctx
	select {
	case err = <-published:
	case <-d.pod.Done():
		err = errors.New(d.pod.Fault() + "\n" + d.pod.Log.Text())
	}
	fmt.Println("# ending")
	return unlessInterrupted(ctx, err)
}

// unlessInterrupted drops the errors of an end that was asked for.
func unlessInterrupted(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}

func (d *demo) startServers(bin rig.Binaries) error {
	for _, name := range []string{"nats", "redis"} {
		if err := os.Mkdir(filepath.Join(d.dir, name), 0o755); err != nil {
			return err
		}
	}
	var err error
	if d.nats, err = rig.StartNATS(bin.NATS, filepath.Join(d.dir, "nats")); err != nil {
		return err
	}
	if d.redis, err = rig.StartRedis(filepath.Join(d.dir, "redis")); err != nil {
		d.nats.Stop()
	}
	return err
}

// startService runs one pod. The page has another origin than the service, so its origin must be allowed.
func (d *demo) startService(ctx context.Context, bin string) (*rig.Service, error) {
	_, port, _ := net.SplitHostPort(d.page.Addr().String())
	pod, err := rig.StartService(bin, "daisi-ws-service", filepath.Join(d.dir, "service.log"), []string{
		"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0", "SERVER_BIND_ADDRESS=127.0.0.1", "SERVER_ADVERTISE_ADDRESS=127.0.0.1", "SERVER_POD_ID=dev-1",
		"SERVER_DRAIN_SPREAD=500ms", "NATS_URL=" + d.nats.URL(), "REDIS_ADDRESS=" + d.redis.Address(),
		"AUTH_SECRET_TOKEN=" + d.keys.general, "AUTH_ADMIN_SECRET_TOKEN=" + d.keys.admin, "AUTH_PUBLIC_KEY=" + d.keys.public,
		"AUTH_TOKEN_AES_KEY=" + d.keys.token, "AUTH_ADMIN_TOKEN_AES_KEY=" + d.keys.adminToken,
		"WEBSOCKET_ALLOWED_ORIGINS=127.0.0.1:" + port + ",localhost:" + port,
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err = pod.WaitListening(ctx); err == nil {
		err = pod.WaitReady(ctx)
	}
	if err != nil {
		pod.Kill()
		return nil, err
	}
	return pod, nil
}

// stopService lets the service drain, and says what was wrong with it.
func (d *demo) stopService() error {
	if err := d.pod.Signal(syscall.SIGTERM); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 7*time.Second)
	defer cancel()
	status, err := d.pod.Wait(ctx)
	if err != nil {
		d.pod.Kill()
		return err
	}
	if status != 0 {
		return fmt.Errorf("the service ended with status %d:\n%s", status, d.pod.Log.Text())
	}
	return nil
}

// announce prints what to open and to paste: every line that is not a comment is whole.
func (d *demo) announce() error {
	ask := fmt.Sprintf(`{"company_id":%q,"agent_id":%q,"user_id":"you","expires_in_seconds":3600}`, company, agent)
	token, err := d.mint(context.Background(), strings.Replace(ask, "you", "terminal", 1))
	if err != nil {
		return err
	}
	fmt.Println("# the page; open it in two tabs and see them fight for one session:")
	fmt.Printf("http://%s/\n", d.page.Addr())
	fmt.Println("# mint a token, as a back end does:")
	fmt.Printf("curl -sS -X POST -H 'X-API-Key: %s' -d '%s' http://%s/generate-token\n", d.keys.general, ask, d.pod.HTTP)
	fmt.Println("# a socket in the terminal; it reads commands, such as: select " + d.book.chats[0].ID)
	fmt.Printf("%s 'ws://%s/ws/%s/%s?x-api-key=%s&token=%s'\n", filepath.Join(d.dir, "ws"), d.pod.HTTP, company, agent, d.keys.public, token.Token)
	fmt.Printf("# health, metrics: http://%s/ready http://%s/metrics; log: %s; ^C ends it all\n", d.pod.HTTP, d.pod.HTTP, d.pod.Log.Path)
	return nil
}
