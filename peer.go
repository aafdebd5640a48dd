package main

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/reflection"

	peerpb "daisi-ws-service/proto"
)

// peers is this pod's side of the talk among pods: the gRPC server that they dial, and the connections to them.
type peers struct {
	peerpb.UnimplementedPeerServer

	cfg   *settings
	m     *Metrics
	pod   string
	epoch func() string // of this pod's lease now; any goroutine calls it

	server *grpc.Server
	health *health.Server
	up     atomic.Bool
}

// newPeers prepares the server; serve starts it. epoch must tell the epoch of this pod's lease at any time.
func newPeers(cfg *settings, m *Metrics, podID string, epoch func() string) *peers {
	p := &peers{cfg: cfg, m: m, pod: podID, epoch: epoch, health: health.NewServer()}
	p.server = grpc.NewServer()
	peerpb.RegisterPeerServer(p.server, p)
	healthpb.RegisterHealthServer(p.server, p.health)
	if cfg.Load().ServerEnableReflection {
		reflection.Register(p.server)
	}
	return p
}

// serve answers peers on l, which it owns, until stop; then it returns nil.
func (p *peers) serve(l net.Listener) error {
	p.up.Store(true)
	defer p.up.Store(false)
	if err := p.server.Serve(l); err != nil && err != grpc.ErrServerStopped {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}

// serving says whether peers are answered.
func (p *peers) serving() bool { return p.up.Load() }

// stop lets the calls in hand end, but no longer than ctx.
func (p *peers) stop(ctx context.Context) {
	p.up.Store(false)
	p.health.Shutdown()
	defer context.AfterFunc(ctx, p.server.Stop)()
	p.server.GracefulStop()
}

// Identify names this pod and its epoch to anyone who asks.
func (p *peers) Identify(context.Context, *peerpb.IdentifyRequest) (*peerpb.IdentifyResponse, error) {
	return &peerpb.IdentifyResponse{Pod: p.pod, Epoch: p.epoch()}, nil
}

// identify asks which pod lives at addr.
func (p *peers) identify(ctx context.Context, addr string) (pod, epoch string, err error) {
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return "", "", fmt.Errorf("identify the pod at %s: %w", addr, err)
	}
	defer conn.Close()
	who, err := peerpb.NewPeerClient(conn).Identify(ctx, &peerpb.IdentifyRequest{})
	if err != nil {
		return "", "", fmt.Errorf("identify the pod at %s: %w", addr, err)
	}
	return who.GetPod(), who.GetEpoch(), nil
}

// push sends d to the sockets of pod, which has epoch and is dialled at addr, and settles it exactly once, now or
// later. Never blocks; any goroutine may call.
func (p *peers) push(pod, epoch, addr string, d *delivery) { d.settle(failed) }
