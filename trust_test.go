package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

// TestProofCoversEverything: a proof holds for its role, pods, lives and nonces only, and for no shifted border between
// two of them.
func TestProofCoversEverything(t *testing.T) {
	keys, err := peerKeys(peerKeyA + ", " + peerKeyB)
	if err != nil || len(keys) != 2 || bytes.Equal(keys[0], keys[1]) || bytes.Contains(keys[0], []byte{0xa1, 0xa1, 0xa1}) {
		t.Fatalf("keys %x, %v", keys, err)
	}
	base := introduction{client: "a", clientLife: "1", server: "b", serverLife: "2", clientNonce: newNonce(), serverNonce: newNonce()}
	proofs := base.proofs(keys, roleClient)
	if !base.proven(keys[1:], roleClient, proofs) {
		t.Error("one key in common is not enough")
	}
	if base.proven(keys, roleServer, proofs) {
		t.Error("a proof can be sent back")
	}
	changes := map[string]func(i *introduction){
		"client":       func(i *introduction) { i.client = "c" },
		"client life":  func(i *introduction) { i.clientLife = "2" },
		"server":       func(i *introduction) { i.server = "c" },
		"server life":  func(i *introduction) { i.serverLife = "1" },
		"client nonce": func(i *introduction) { i.clientNonce = newNonce() },
		"server nonce": func(i *introduction) { i.serverNonce = newNonce() },
		"borders":      func(i *introduction) { i.client, i.clientLife = "", "a1" },
	}
	for name, change := range changes {
		i := base
		change(&i)
		if i.proven(keys, roleClient, proofs) {
			t.Errorf("the proof holds with another %s", name)
		}
	}
	many := make([][]byte, maxProofs+1)
	many[0] = proofs[0]
	if base.proven(keys, roleClient, many) || base.proven(keys, roleClient, nil) || base.proven(nil, roleClient, proofs) || base.proven(nil, roleClient, nil) {
		t.Error("too many proofs, none, or none to compare with pass")
	}
	for _, bad := range []string{"", "a1", peerKeyA + ",", peerKeyA + "00", "zz" + peerKeyA[2:]} {
		if _, err := peerKeys(bad); err == nil {
			t.Errorf("token keys %q pass", bad)
		}
	}
}

// TestPeerKeyRotation: pods that know one key in common, wherever each lists it, talk; the keys are read at the time of use.
func TestPeerKeyRotation(t *testing.T) {
	ca, cb := peerConfig(), peerConfig()
	ca.AuthTokenAESKey, cb.AuthTokenAESKey = peerKeyB+","+peerKeyA, peerKeyA
	a, addrA := startPeers(t, "pod-a", "ea", ca, takeAll(written, nil))
	b, addrB := startPeers(t, "pod-b", "eb", cb, takeAll(written, nil))
	l := newPeerLedger(t)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(1))
	b.push(member{"pod-a", "ea"}, addrA, l.delivery(2))
	l.want(2, written)
	foreign := peerConfig()
	foreign.AuthTokenAESKey = peerKeyB
	b.cfg.Store(foreign)
	a.keep(nil)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(3))
	l.want(3, written)
	only := peerConfig()
	a.cfg.Store(only)
	a.keep(nil)
	refused := newPeerLedger(t)
	a.push(member{"pod-b", "eb"}, addrB, refused.delivery(1))
	refused.want(1, failed)
}

// TestPodWithoutKey: neither does a pod send to another one that does not know the key, nor take anything from it, nor
// take one pod for another.
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
}

// impostor is a server that goes through all the motions of a pod without knowing a key.
type impostor struct {
	peerpb.UnimplementedPeerServer
	t *testing.T
}

// Deliver welcomes anyone and reads whatever comes.
func (i impostor) Deliver(stream peerpb.Peer_DeliverServer) error {
	stream.Recv()
	stream.Send(&peerpb.Response{Body: &peerpb.Response_Challenge{Challenge: &peerpb.Challenge{Pod: "pod-b", Life: "eb", Nonce: newNonce(), Proofs: [][]byte{newNonce()}}}})
	stream.Send(&peerpb.Response{Body: &peerpb.Response_Welcome{Welcome: &peerpb.Welcome{}}})
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		i.t.Errorf("the impostor got %v", req)
	}
}

// TestImpostorReadsNothing: who took over a pod's address gets neither an event nor a proof of ours.
func TestImpostorReadsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newPeerPipes()
		server := grpc.NewServer()
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
}

// strangerStream opens a stream as someone who knows the protocol, but no key.
func strangerStream(t *testing.T, n *peerPipes, addr string) peerpb.Peer_DeliverClient {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithContextDialer(n.dial))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	stream, err := peerpb.NewPeerClient(conn).Deliver(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

// TestStrangerInjectsNothing: whatever a stranger sends, in whatever order, the stream is cut and nothing is delivered.
func TestStrangerInjectsNothing(t *testing.T) {
	batch := &peerpb.Request{Body: &peerpb.Request_Batch{Batch: &peerpb.Batch{Life: "eb", Events: []*peerpb.Event{
		{Seq: 1, Kind: peerpb.Kind_KIND_CHAT, Company: "c", Agent: "a", Payload: []byte("{}"), Count: 1}}}}}
	hello := &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: "pod-a", Life: "ea", Nonce: newNonce()}}}
	short := &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: "pod-a", Life: "ea", Nonce: []byte("x")}}}
	nameless := &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: "a\n", Nonce: newNonce()}}}
	noProof := &peerpb.Request{Body: &peerpb.Request_Proof{Proof: &peerpb.Proof{}}}
	guess := &peerpb.Request{Body: &peerpb.Request_Proof{Proof: &peerpb.Proof{Proofs: [][]byte{newNonce()}}}}
	tests := map[string][]*peerpb.Request{
		"events at once":          {batch},
		"an empty message":        {{}},
		"proof without hello":     {guess, batch},
		"short nonce":             {short, batch},
		"no pod id":               {nameless, batch},
		"no proof":                {hello, noProof, batch},
		"wrong proof":             {hello, guess, batch},
		"events instead of proof": {hello, batch, batch},
		"the challenge sent back": {hello, nil, batch},
		"silence":                 nil,
		"silence after hello":     {hello},
	}
	for name, messages := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				n := newPeerPipes()
				servePeers(t, "pod-b", "eb", peerConfig(), n.listen("b"), wantNoDelivery(t))
				stream := strangerStream(t, n, "b")
				start := time.Now()
				for _, m := range messages {
					if m == nil {
						challenge, err := stream.Recv()
						if err != nil {
							t.Fatal(err)
						}
						m = &peerpb.Request{Body: &peerpb.Request_Proof{Proof: &peerpb.Proof{Proofs: challenge.GetChallenge().GetProofs()}}}
					}
					stream.Send(m)
				}
				var err error
				for err == nil {
					var got *peerpb.Response
					if got, err = stream.Recv(); got.GetWelcome() != nil || got.GetAnswers() != nil {
						t.Errorf("the stranger got %v", got)
					}
				}
				if status.Code(err) != codes.Unauthenticated {
					t.Errorf("the stream ended with %v", err)
				}
				if d := time.Since(start); d > proofTimeout+time.Second {
					t.Errorf("the stream was open for %s", d)
				}
			})
		})
	}
}

// testCA signs certificates of pods.
type testCA struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte
}

func newTestCA(t *testing.T) *testCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &testCA{cert, key, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
}

// issue writes certificate, key and CA for name into dir and returns the settings that name them.
func (ca *testCA) issue(t *testing.T, dir, name string, serial int64) *Config {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(serial), DNSNames: []string{name}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cfg := peerConfig()
	cfg.PeerTLSCertFile, cfg.PeerTLSKeyFile, cfg.PeerTLSCAFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), filepath.Join(dir, "ca.pem")
	cfg.PeerTLSServerName = "pods.test"
	for file, data := range map[string][]byte{
		cfg.PeerTLSCertFile: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		cfg.PeerTLSKeyFile:  pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}),
		cfg.PeerTLSCAFile:   ca.pem,
	} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// TestPeerTLS: only who shows a certificate of our CA and with our name can as much as ask for health; the token key is
// asked for beyond that.
func TestPeerTLS(t *testing.T) {
	wantNoPeerGoroutines(t)
	ca, other := newTestCA(t), newTestCA(t)
	a, addrA := startPeers(t, "pod-a", "ea", ca.issue(t, t.TempDir(), "pods.test", 2), takeAll(written, nil))
	_, addrB := startPeers(t, "pod-b", "eb", ca.issue(t, t.TempDir(), "pods.test", 3), takeAll(written, nil))
	l := newPeerLedger(t)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(1))
	l.want(1, written)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if who, err := a.identify(ctx, addrB, member{}); err != nil || who.GetPod() != "pod-b" {
		t.Errorf("identify = %v, %v", who, err)
	}
	foreign := ca.issue(t, t.TempDir(), "pods.test", 4)
	foreign.AuthTokenAESKey = peerKeyB
	strangers := map[string]*Config{
		"no TLS":      peerConfig(),
		"another CA":  other.issue(t, t.TempDir(), "pods.test", 5),
		"other name":  ca.issue(t, t.TempDir(), "browsers.test", 6),
		"another key": foreign,
	}
	for name, cfg := range strangers {
		t.Run(name, func(t *testing.T) {
			s, addrS := startPeers(t, "pod-s", "es", cfg, wantNoDelivery(t))
			l := newPeerLedger(t)
			s.push(member{"pod-a", "ea"}, addrA, l.delivery(1))
			a.push(member{"pod-s", "es"}, addrS, l.delivery(2))
			l.want(2, failed)
			if _, err := s.identify(ctx, addrA, member{}); (err == nil) != (name == "another key") {
				t.Errorf("identify: %v", err)
			}
		})
	}
	t.Run("no certificate", func(t *testing.T) {
		conn, err := grpc.NewClient("passthrough:///"+addrA, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{InsecureSkipVerify: true})))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := peerpb.NewPeerClient(conn).Identify(ctx, &peerpb.IdentifyRequest{}); err == nil {
			t.Error("answered")
		}
	})
}

// TestPeerTLSReload: renewed files are used for new connections, streams that run go on, and a pair that does not fit yet
// is left alone until it does.
func TestPeerTLSReload(t *testing.T) {
	ca := newTestCA(t)
	dirA, dirB := t.TempDir(), t.TempDir()
	a, _ := startPeers(t, "pod-a", "ea", ca.issue(t, dirA, "pods.test", 2))
	cfgB := ca.issue(t, dirB, "pods.test", 3)
	b, addrB := startPeers(t, "pod-b", "eb", cfgB, takeAll(written, nil))
	l := newPeerLedger(t)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(1))
	l.want(1, written)

	good, err := os.ReadFile(cfgB.PeerTLSKeyFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cfgB.PeerTLSKeyFile, []byte("half of a k"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.reloadTLS(); err == nil {
		t.Error("a faulty key was read without a word")
	}
	wantSerial(t, a, addrB, 3)
	if err := os.WriteFile(cfgB.PeerTLSKeyFile, good, 0o600); err != nil {
		t.Fatal(err)
	}
	next := newTestCA(t) // all is new, the CA too
	next.issue(t, dirA, "pods.test", 12)
	next.issue(t, dirB, "pods.test", 13)
	wantSerial(t, a, addrB, 13)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(2))
	l.want(2, written)
	wantPeerMetric(t, "connections", counterValue(a.m.grpcPoolConnectionsCreated.with()), 1)
	a.keep(nil)
	a.push(member{"pod-b", "eb"}, addrB, l.delivery(3))
	l.want(3, written)
}

// wantSerial dials addr with a's certificate, as a would, and checks which one the pod there shows.
func wantSerial(t *testing.T, a *peers, addr string, want int64) {
	t.Helper()
	conn, err := tls.Dial("tcp", addr, a.certs.config())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if got := conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64(); got != want {
		t.Errorf("certificate %d, want %d", got, want)
	}
}

// TestPeerTLSFaults: files that cannot be used end the start, not a handshake at night.
func TestPeerTLSFaults(t *testing.T) {
	cfg := newTestCA(t).issue(t, t.TempDir(), "pods.test", 2)
	spoilt := map[string]func(*Config){
		"no key":        func(c *Config) { c.PeerTLSKeyFile = "" },
		"missing CA":    func(c *Config) { c.PeerTLSCAFile += ".not" },
		"CA is no cert": func(c *Config) { c.PeerTLSCAFile = c.PeerTLSKeyFile },
	}
	for name, spoil := range spoilt {
		t.Run(name, func(t *testing.T) {
			c := *cfg
			spoil(&c)
			p := newTestPeers("pod-a", "ea", &c)
			defer p.stop(t.Context())
			n := newPeerPipes()
			if err := p.serve(n.listen("a")); err == nil {
				t.Error("serves")
			}
		})
	}
}
