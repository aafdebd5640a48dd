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
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/rig"
)

// demo is what runs: servers, three pods of the service, the publisher and the page.
type demo struct {
	dir   string
	keys  keys
	nats  *rig.NATS
	redis *rig.Redis
	pods  *fleet
	nc    *nats.Conn // the publisher's
	js    jetstream.JetStream
	book  *book
	page  net.Listener // the one address of page and pods
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
	d.pods = newFleet(3, func(name string) (*rig.Service, error) { return d.startService(bin.Service, name) })
	ctx, stop := context.WithCancel(ctx)
	go d.pods.run(ctx)
	defer func() {
		stop()
		<-d.pods.done
		err = errors.Join(err, d.pods.err)
	}()
	web := &http.Server{Handler: d.handler(), ReadHeaderTimeout: 5 * time.Second}
	go web.Serve(d.page) // ends with Close
	defer web.Close()
	if !d.pods.waitUp() {
		return nil // the fleet says why
	}
	if err := d.announce(ctx); err != nil {
		return unlessInterrupted(ctx, err)
	}
	published := make(chan error, 1)
	go func() { published <- d.publish(ctx, rate) }() // ends with ctx
	select {
	case err = <-published:
	case <-d.pods.done:
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

// startService starts one pod. At the level debug it logs each event that it pulled, which the page shows.
func (d *demo) startService(bin, name string) (*rig.Service, error) {
	return rig.StartService(bin, name, filepath.Join(d.dir, name+".log"), []string{
		"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0", "SERVER_BIND_ADDRESS=127.0.0.1", "SERVER_ADVERTISE_ADDRESS=127.0.0.1", "SERVER_POD_ID=" + name,
		"SERVER_DRAIN_SPREAD=500ms", "LOG_LEVEL=debug", "NATS_URL=" + d.nats.URL(), "REDIS_ADDRESS=" + d.redis.Address(),
		"AUTH_SECRET_TOKEN=" + d.keys.general, "AUTH_ADMIN_SECRET_TOKEN=" + d.keys.admin, "AUTH_PUBLIC_KEY=" + d.keys.public,
		"AUTH_TOKEN_AES_KEY=" + d.keys.token, "AUTH_ADMIN_TOKEN_AES_KEY=" + d.keys.adminToken,
	})
}

// announce prints what to open and to paste: every line that is not a comment is whole.
func (d *demo) announce(ctx context.Context) error {
	ask := fmt.Sprintf(`{"company_id":%q,"agent_id":%q,"user_id":"you","expires_in_seconds":3600}`, company, agent)
	token, err := d.mint(ctx, strings.Replace(ask, "you", "terminal", 1))
	if err != nil {
		return err
	}
	address := d.page.Addr()
	fmt.Println("# the page; open it in two tabs and see them fight for one session:")
	fmt.Printf("http://%s/\n", address)
	fmt.Println("# mint a token, as a back end does:")
	fmt.Printf("curl -sS -X POST -H 'X-API-Key: %s' -d '%s' http://%s/generate-token\n", d.keys.general, ask, address)
	fmt.Println("# a socket in the terminal; it reads commands, such as: select " + d.book.chats[0].ID)
	fmt.Printf("%s 'ws://%s/ws/%s/%s?x-api-key=%s&token=%s'\n", filepath.Join(d.dir, "ws"), address, company, agent, d.keys.public, token.Token)
	fmt.Println("# publish into the demo (the command: go install github.com/nats-io/natscli/nats@latest); the page shows a chat named You:")
	fmt.Printf(`nats -s %s pub -J wa.%s.%s.chats '{"event_id":"e1","company_id":%q,"chat_id":"you","row_data":`+
		`{"push_name":"You","unread_count":1,"last_message":{"text":"Hello from the terminal"}}}'`+"\n", d.nats.URL(), company, agent, company)
	fmt.Println("# page, curl and ws speak to whatever pod is next; the page shows the pods and ends one; ^C ends it all")
	return nil
}
