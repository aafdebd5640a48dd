package main

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"math/big"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

// TestIdentity: the same key gives the same identity on every pod and in every version, no two keys give the same, and what is
// shown holds nothing of the key.
func TestIdentity(t *testing.T) {
	id, err := newIdentity(peerKeyA + ", " + peerKeyB)
	if err != nil || len(id.keys) != 2 {
		t.Fatalf("%+v, %v", id, err)
	}
	if got, want := hex.EncodeToString(id.keys[0]), "8fabd5866b2a3b84b1078f2d1614cb661edae81b6de0db6ac1487c2d696bdf15"; got != want {
		t.Errorf("the public key of %s is %s, want %s: pods of two versions could not talk", peerKeyA, got, want)
	}
	again, err := newIdentity(peerKeyB + "," + peerKeyA)
	if err != nil || !again.keys[1].Equal(id.keys[0]) || again.keys[0].Equal(id.keys[0]) {
		t.Errorf("in another order: %x, %v", again.keys, err)
	}
	alone, err := newIdentity(peerKeyA)
	if err != nil || !bytes.Equal(alone.own.Certificate[0], id.own.Certificate[0]) || bytes.Equal(again.own.Certificate[0], id.own.Certificate[0]) {
		t.Errorf("the certificate is not that of the first key: %v", err)
	}
	for _, secret := range [][]byte{bytes.Repeat([]byte{0xa1}, 8), id.own.PrivateKey.(ed25519.PrivateKey).Seed()} {
		if bytes.Contains(id.own.Certificate[0], secret) {
			t.Errorf("the certificate holds %x", secret)
		}
	}
	for _, bad := range []string{"", "a1", peerKeyA + ",", peerKeyA + "00", "zz" + peerKeyA[2:]} {
		if _, err := newIdentity(bad); err == nil {
			t.Errorf("token keys %q pass", bad)
		}
	}
}

// TestPeerKeyRotation: pods that are one step of a rotation apart talk in both directions, the keys are read at the next
// handshake, and connections that stand go on.
func TestPeerKeyRotation(t *testing.T) {
	const a, b = 0, 1
	settings := func(s string) *Config {
		c := peerConfig()
		c.AuthTokenAESKey = s
		return c
	}
	var pods [2]*peers
	var addrs [2]string
	for i, name := range []string{"pod-a", "pod-b"} {
		pods[i], addrs[i] = startPeers(t, name, "e", peerConfig(), takeAll(written, nil))
	}
	seq := uint64(0)
	push := func(l *peerLedger) {
		seq += 2
		pods[a].push(member{"pod-b", "e"}, addrs[b], l.delivery(seq))
		pods[b].push(member{"pod-a", "e"}, addrs[a], l.delivery(seq+1))
	}
	both := func() {
		t.Helper()
		l := newPeerLedger(t)
		push(l)
		l.want(2, written)
	}
	steps := []string{peerKeyA, peerKeyA + "," + peerKeyB, peerKeyB + "," + peerKeyA, peerKeyB}
	for i, step := range steps {
		pods[a].cfg.Store(settings(step))
		both() // on the connections that stand
		for _, p := range pods {
			p.keep(nil)
		}
		both()
		if i == len(steps)-1 {
			break
		}
		pods[b].cfg.Store(settings(step))
	}
	pods[b].cfg.Store(settings(peerKeyA)) // two steps behind
	for _, p := range pods {
		p.keep(nil)
	}
	refused := newPeerLedger(t)
	push(refused)
	refused.want(2, failed)
}

// TestPodWithoutKey: neither does a pod send to another one that does not know the key, nor take anything from it, nor ask it
// anything, nor take one pod for another.
func TestPodWithoutKey(t *testing.T) {
	stranger := peerConfig()
	stranger.AuthTokenAESKey = peerKeyB
	a, addrA := startPeers(t, "pod-a", "ea", peerConfig(), wantNoDelivery(t))
	s, addrS := startPeers(t, "pod-s", "es", stranger, wantNoDelivery(t))
	_, addrB := startPeers(t, "pod-b", "eb", peerConfig(), wantNoDelivery(t))
	l := newPeerLedger(t)
	s.push(member{"pod-a", "ea"}, addrA, l.delivery(1))
	a.push(member{"pod-s", "es"}, addrS, l.delivery(2))
	a.push(member{"pod-x", "eb"}, addrB, l.delivery(3))
	l.want(3, failed)
	wantPeerMetric(t, "connections", counterValue(a.m.grpcPoolConnectionsCreated.with()), 0)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if who, err := a.identify(ctx, addrS, member{}); err == nil {
		t.Errorf("a stranger was believed to be %v", who)
	}
	if who, err := s.identify(ctx, addrA, member{}); err == nil {
		t.Errorf("a stranger was told %v", who)
	}
}

// ownCertificate is one that a stranger made for itself.
func ownCertificate(t *testing.T) tls.Certificate {
	t.Helper()
	public, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, public, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// impostor is a server that goes through all the motions of a pod without knowing a key.
type impostor struct {
	peerpb.UnimplementedPeerServer
	t *testing.T
}

func (i impostor) Deliver(peerpb.Peer_DeliverServer) error {
	i.t.Error("a stream was opened to the impostor")
	return nil
}

// TestImpostorReadsNothing: an impostor at a pod's address gets no stream, with TLS of its own or without.
func TestImpostorReadsNothing(t *testing.T) {
	own := grpc.Creds(credentials.NewTLS(&tls.Config{Certificates: []tls.Certificate{ownCertificate(t)}, ClientAuth: tls.RequestClientCert}))
	for name, opts := range map[string][]grpc.ServerOption{"plain": nil, "own certificate": {own}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPeerPipes()
				server := grpc.NewServer(opts...)
				peerpb.RegisterPeerServer(server, impostor{t: t})
				l := n.listen("b")
				served := make(chan error, 1)
				go func() { served <- server.Serve(l) }()
				a := servePeers(t, "pod-a", "ea", peerConfig(), n.listen("a"), n.on)
				ledger := newPeerLedger(t)
				a.push(member{"pod-b", "eb"}, "b", ledger.delivery(1))
				ledger.want(1, failed)
				server.Stop()
				<-served
			})
		})
	}
}

// http2Preface is what a gRPC client says first.
const http2Preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"

// TestStrangerGetsNothing: without a key of ours not one byte of HTTP/2 comes back.
func TestStrangerGetsNothing(t *testing.T) {
	p, addr := startPeers(t, "pod-a", "ea", peerConfig(), wantNoDelivery(t))
	ours, err := p.identity()
	if err != nil {
		t.Fatal(err)
	}
	borrowed := ownCertificate(t) // a pod's certificate, with another's key
	borrowed.Certificate = ours.own.Certificate
	strangers := map[string]*tls.Config{
		"plain text":           nil,
		"no certificate":       {},
		"TLS 1.2":              {MaxVersion: tls.VersionTLS12, Certificates: []tls.Certificate{ours.own}},
		"own certificate":      {Certificates: []tls.Certificate{ownCertificate(t)}},
		"a pod's certificate":  {Certificates: []tls.Certificate{borrowed}},
		"two, ours behind":     {Certificates: []tls.Certificate{{Certificate: [][]byte{ownCertificate(t).Certificate[0], ours.own.Certificate[0]}, PrivateKey: ours.own.PrivateKey}}},
		"control: a pod's key": {Certificates: []tls.Certificate{ours.own}},
	}
	for name, cfg := range strangers {
		t.Run(name, func(t *testing.T) {
			before := counterValue(p.m.grpcConnectionsRefused.with("handshake"))
			raw, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			raw.SetDeadline(time.Now().Add(10 * time.Second))
			conn := raw
			if cfg != nil {
				cfg.InsecureSkipVerify, cfg.NextProtos = true, []string{"h2"}
				conn = tls.Client(raw, cfg)
			}
			io.WriteString(conn, http2Preface) // what comes of it, Read says
			got := make([]byte, 100)
			n, err := conn.Read(got)
			if cfg == nil {
				n = max(0, n-7) // the alert that it is no TLS
			}
			if name == "control: a pod's key" {
				if err != nil {
					t.Errorf("refused: %v", err)
				}
				return
			}
			if n > 0 {
				t.Errorf("got %q", got[:n])
			}
			wantEventually(t, "the refusal is counted", func() bool {
				return counterValue(p.m.grpcConnectionsRefused.with("handshake")) == before+1
			})
		})
	}
}

// TestNoResumption: a client that would resume is given nothing to resume with, so a withdrawn key is asked for each time.
func TestNoResumption(t *testing.T) {
	p, addr := startPeers(t, "pod-a", "ea", peerConfig())
	cfg := p.tlsConfig()
	cfg.NextProtos, cfg.ClientSessionCache = []string{"h2"}, tls.NewLRUClientSessionCache(10)
	for range 2 {
		conn, err := tls.Dial("tcp", addr, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 9)); err != nil { // a ticket would come before the server's settings
			t.Fatal(err)
		}
		if conn.ConnectionState().DidResume {
			t.Error("resumed")
		}
	}
}

// TestSilentStranger: a connection that says nothing is closed when the time for its handshake is over.
func TestSilentStranger(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		servePeers(t, "pod-b", "eb", peerConfig(), n.listen("b"))
		conn, err := n.dial(t.Context(), "b")
		if err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		io.Copy(io.Discard, conn)
		if d := time.Since(begun); d < handshakeTimeout-time.Second || d > handshakeTimeout {
			t.Errorf("a silent connection stood %s", d)
		}
	})
}

// TestUnusedConnection: a connection that has proven itself and has no stream is ended in the end.
func TestUnusedConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		p := servePeers(t, "pod-b", "eb", peerConfig(), n.listen("b"), n.on)
		conn, err := p.dial("b")
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := peerpb.NewPeerClient(conn).Identify(t.Context(), &peerpb.IdentifyRequest{}); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		conn.WaitForStateChange(t.Context(), connectivity.Ready)
		if d := time.Since(begun); d < unusedConnection-time.Second || d > unusedConnection+time.Second {
			t.Errorf("an unused connection stood %s, want %s", d, unusedConnection)
		}
	})
}

// doorConn is a connection from a host of the test's choice that notes its end.
type doorConn struct {
	net.Conn
	host   string
	closed bool
}

func (c *doorConn) RemoteAddr() net.Addr {
	return &net.TCPAddr{IP: net.ParseIP(c.host), Port: 1000}
}

func (c *doorConn) Close() error {
	c.closed = true
	return nil
}

// TestDoor: a host that has all its places, and a crowd of hosts, push out the oldest handshake, never that of a live pod's
// host for another's; and so many strangers a second are let in.
func TestDoor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &door{}
		d.expect(map[string]string{"pod-a": "10.0.0.1:50051", "pod-b": "[fd00::1]:50051", "pod-c": "pod-c:50051"})
		var all []*doorConn
		enter := func(host string) bool {
			c := &doorConn{host: host}
			if !d.enter(c) {
				return false
			}
			all = append(all, c)
			return true
		}
		closed := func() (hosts []string) {
			for _, c := range all {
				if c.closed {
					hosts = append(hosts, c.host)
				}
			}
			return hosts
		}
		enter("10.0.0.1")
		enter("fd00::1")
		for range handshakesPerHost + 3 {
			enter("192.0.2.1")
		}
		if got := closed(); len(got) != 3 || !all[2].closed || !all[3].closed || !all[4].closed {
			t.Fatalf("one host too many: closed %v", got)
		}
		for i := len(d.under); i < handshakesInAll; i++ {
			enter(fmt.Sprint("192.0.3.", i))
		}
		if got := closed(); len(got) != 3 {
			t.Fatalf("with room: closed %v", got)
		}
		for i := range 5 {
			enter(fmt.Sprint("192.0.4.", i))
		}
		if got := closed(); len(got) != 8 || all[0].closed || all[1].closed || len(d.under) != handshakesInAll {
			t.Fatalf("a crowd: closed %v, %d under way", got, len(d.under))
		}
		if d.leave(all[2]) || !d.leave(all[0]) || len(d.under) != handshakesInAll-1 {
			t.Errorf("who was pushed out has left, who was not has not")
		}
		for enter("192.0.5.1") {
			if len(all) > 10*strangerPace {
				t.Fatal("strangers are let in at any pace")
			}
		}
		if !enter("10.0.0.1") {
			t.Error("a pod waits behind strangers")
		}
		time.Sleep(time.Second / strangerPace)
		if !enter("192.0.5.1") || enter("192.0.5.1") {
			t.Errorf("not %d strangers a second", strangerPace)
		}
	})
}

// TestHello: a stream begins with the pod's name and the version that this pod speaks, or ends.
func TestHello(t *testing.T) {
	n := newPeerPipes()
	p := servePeers(t, "pod-b", "eb", peerConfig(), n.listen("b"), n.on, wantNoDelivery(t))
	conn, err := p.dial("b")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	batch := &peerpb.Request{Body: &peerpb.Request_Batch{Batch: &peerpb.Batch{Life: "eb", Events: []*peerpb.Event{
		{Seq: 1, Kind: peerpb.Kind_KIND_CHAT, Company: "c", Agent: "a", Payload: []byte("{}"), Count: 1}}}}}
	hello := func(pod string, version uint32) *peerpb.Request {
		return &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: pod, Life: "e", Version: version}}}
	}
	tests := map[string]struct {
		first *peerpb.Request
		want  codes.Code
	}{
		"events at once":   {batch, codes.InvalidArgument},
		"an empty message": {&peerpb.Request{}, codes.InvalidArgument},
		"no pod id":        {hello("a\n", peerVersion), codes.InvalidArgument},
		"no version":       {hello("pod-a", 0), codes.FailedPrecondition},
		"another version":  {hello("pod-a", peerVersion+1), codes.FailedPrecondition},
		"a hello":          {hello("pod-a", peerVersion), codes.OK},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			stream, err := peerpb.NewPeerClient(conn).Deliver(ctx)
			if err != nil {
				t.Fatal(err)
			}
			answer, err := exchange(stream, test.first)
			if status.Code(err) != test.want || err == nil && (answer.GetHello().GetPod() != "pod-b" || answer.GetHello().GetLife() != "eb") {
				t.Errorf("answered %v, %v; want %s", answer, err, test.want)
			}
		})
	}
}
