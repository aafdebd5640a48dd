package rig

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

// NATS is a NATS server with JetStream whose port and data outlive its process.
type NATS struct {
	bin, dir string
	domain   string // of its JetStream; "" = none
	port     int

	mu   sync.Mutex // guards proc
	proc *Process
}

// StartNATS runs a server with its data under dir. Each of extra is a line of its configuration file.
func StartNATS(bin, dir string, extra ...string) (*NATS, error) {
	n := &NATS{bin: bin, dir: dir}
	return n, n.start(extra)
}

func (n *NATS) start(extra []string) error {
	err := onFreePort(func(port int) error {
		n.port = port
		if err := n.Configure(extra...); err != nil {
			return err
		}
		return n.Restart()
	})
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	return nil
}

// Configure writes the configuration file anew, with other further lines than before; the next Restart reads it.
func (n *NATS) Configure(extra ...string) error {
	lines := append([]string{
		fmt.Sprintf("listen: 127.0.0.1:%d", n.port),
		"server_name: " + n.Name(),
		fmt.Sprintf("jetstream { store_dir: %q, max_memory_store: 256MB, max_file_store: 8GB, domain: %q }", n.Store(), n.domain),
	}, extra...)
	return os.WriteFile(filepath.Join(n.dir, "nats.conf"), []byte(strings.Join(lines, "\n")+"\n"), 0o600)
}

// Store is the folder of the server's data; nobody but the server may touch it while that runs.
func (n *NATS) Store() string { return filepath.Join(n.dir, "jetstream") }

// Address is host:port of the server, also while it is down.
func (n *NATS) Address() string { return fmt.Sprintf("127.0.0.1:%d", n.port) }

// URL is where clients connect, also while it is down.
func (n *NATS) URL() string { return "nats://" + n.Address() }

// Process is the one that runs now, or ran last.
func (n *NATS) Process() *Process {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.proc
}

// Kill ends the server by SIGKILL; its data stays.
func (n *NATS) Kill() { n.Process().Kill() }

// Stop ends the server.
func (n *NATS) Stop() { n.Process().Kill() } // its data is thrown away: nothing to finish

// Restart starts the killed server again, on the same port and data, and returns when JetStream answers.
func (n *NATS) Restart() error {
	p, err := Start("nats-server", filepath.Join(n.dir, "nats.log"), os.Environ(), n.bin, "-c", filepath.Join(n.dir, "nats.conf"))
	if err != nil {
		return err
	}
	n.mu.Lock()
	n.proc = p
	n.mu.Unlock()
	return untilPrinted(p, "Server is ready")
}

// Connect opens a client's connection that lives through restarts of the server.
func (n *NATS) Connect(opts ...nats.Option) (*nats.Conn, error) {
	opts = append([]nats.Option{
		nats.MaxReconnects(-1), nats.ReconnectWait(50 * time.Millisecond), nats.RetryOnFailedConnect(true),
		nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}),
	}, opts...)
	return nats.Connect(n.URL(), opts...)
}

// untilPrinted returns when p has printed what it prints when it is up. A server that does not get there within 20 s,
// or ends (somebody took its port), is an error, and gone.
func untilPrinted(p *Process, text string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	_, err := p.Log.Find(ctx, func(line string) bool { return strings.Contains(line, text) })
	if err != nil {
		p.Kill()
	}
	return err
}

// Name is what the server calls itself: in JetStream's answers about leaders and replicas.
func (n *NATS) Name() string { return fmt.Sprintf("dws-%d", n.port) }

// onFreePort calls start with a port that was free a moment ago, with others when somebody else was faster.
func onFreePort(start func(port int) error) error {
	var err error
	for range 5 {
		port, perr := freePort()
		if perr != nil {
			return perr
		}
		if err = start(port); err == nil {
			return nil
		}
	}
	return fmt.Errorf("tried 5 ports: %w", err)
}

// freePort finds a port below Linux' ephemeral range, so that no outgoing connection takes it while its server is down.
func freePort() (int, error) {
	for range 100 {
		port := 18000 + rand.IntN(14000)
		if l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
			return port, l.Close()
		}
	}
	return 0, errors.New("no free port between 18000 and 32000")
}
