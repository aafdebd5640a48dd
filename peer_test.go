package main

import (
	"context"
	"net"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// startPeers serves a pod on a free loopback port until the test ends and returns it with its address.
func startPeers(t *testing.T, pod, epoch string, cfg *Config) (*peers, string) {
	t.Helper()
	s := &settings{}
	s.Store(cfg)
	p := newPeers(s, newMetrics(), pod, func() string { return epoch })
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- p.serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		p.stop(ctx)
		if err := <-served; err != nil {
			t.Errorf("serve of %s: %v", pod, err)
		}
	})
	return p, l.Addr().String()
}

// TestPeerIsOpenForHealthAndIdentify: what a starting pod and a health probe ask needs no key.
func TestPeerIsOpenForHealthAndIdentify(t *testing.T) {
	p, addr := startPeers(t, "pod-a", "e1", &Config{})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	pod, epoch, err := p.identify(ctx, addr)
	if err != nil || pod != "pod-a" || epoch != "e1" {
		t.Fatalf("identify = %q %q, %v", pod, epoch, err)
	}
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
	if err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Fatalf("health = %v, %v", h, err)
	}
	if !p.serving() {
		t.Error("answers, but does not say that it serves")
	}
}
