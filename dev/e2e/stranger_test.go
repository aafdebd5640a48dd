package e2e

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
	peerpb "daisi-ws-service/proto"
)

// dialGRPC connects to a pod's gRPC port.
func dialGRPC(t *testing.T, addr string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// podTLS is what a pod shows that knows this token key (64 hex digits), as docs/architecture.md describes it ("Peers").
func podTLS(t *testing.T, tokenKey string) *tls.Config {
	t.Helper()
	secret, err := hex.DecodeString(tokenKey)
	if err != nil {
		t.Fatal(err)
	}
	seed, err := hkdf.Key(sha256.New, secret, nil, "daisi-ws-service peer identity v1", ed25519.SeedSize)
	if err != nil {
		t.Fatal(err)
	}
	return selfSigned(t, ed25519.NewKeyFromSeed(seed))
}

// selfSigned is TLS with a certificate of this key, and belief in any server.
func selfSigned(t *testing.T, key ed25519.PrivateKey) *tls.Config {
	t.Helper()
	tmpl := &x509.Certificate{}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
}

// strangerTLS is TLS with a certificate that a stranger has made for itself.
func strangerTLS(t *testing.T) *tls.Config {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return selfSigned(t, key)
}

func batchOf(life string, seq uint64) *peerpb.Request {
	return &peerpb.Request{Body: &peerpb.Request_Batch{Batch: &peerpb.Batch{Life: life, Events: []*peerpb.Event{{
		Seq: seq, Kind: peerpb.Kind_KIND_CHAT, Company: "acme", Agent: "desk1", Payload: []byte(`{"forged":true}`), Count: 1,
		Stored: time.Now().UnixNano(),
	}}}}}
}

var (
	aHello  = &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: "pod-2", Life: "e", Version: 1}}}
	listAll = &peerpb.Request{Body: &peerpb.Request_List{List: &peerpb.List{Limit: 1000}}}
)

// TestStrangerIsRefused: who can connect to the gRPC port, but knows no token key, is let into nothing: it does not even learn which
// pod it is, or whether it is well.
func TestStrangerIsRefused(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	old := podTLS(t, harness.TokenKey)
	old.MaxVersion = tls.VersionTLS12
	strangers := map[string]credentials.TransportCredentials{
		"plain text":               insecure.NewCredentials(),
		"no certificate":           credentials.NewTLS(&tls.Config{InsecureSkipVerify: true}),
		"a certificate of its own": credentials.NewTLS(strangerTLS(t)),
		"another token key":        credentials.NewTLS(podTLS(t, strings.Repeat("ab", 32))),
		"the admins' token key":    credentials.NewTLS(podTLS(t, harness.AdminKey)),
		"TLS 1.2":                  credentials.NewTLS(old),
	}
	t.Run("attempts", func(t *testing.T) { // returns when all of them have ended
		for name, creds := range strangers {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				conn := dialGRPC(t, pod.GRPC, creds)
				client := peerpb.NewPeerClient(conn)
				ctx := harness.Within(t, harness.Patience)
				who, err := client.Identify(ctx, &peerpb.IdentifyRequest{})
				if status.Code(err) != codes.Unavailable {
					t.Errorf("Identify: %v, %v", who, err)
				}
				health, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
				if status.Code(err) != codes.Unavailable {
					t.Errorf("health: %v, %v", health, err)
				}
				stream, err := client.Deliver(ctx)
				if err == nil {
					for _, m := range []*peerpb.Request{aHello, listAll, batchOf("", 1001)} {
						stream.Send(m) // what comes of it, Recv says
					}
					_, err = stream.Recv()
				}
				if status.Code(err) != codes.Unavailable {
					t.Errorf("Deliver: %v", err)
				}
			})
		}
	})
	if ann.Ended() != nil {
		t.Errorf("the socket was closed: %+v", ann.Ended())
	}
	m := pod.Metrics()
	if n := m.Sum("dws_grpc_messages_received_total"); n != 0 {
		t.Errorf("%v events were taken from strangers", n)
	}
	if n := m.Sum("dws_grpc_connections_refused_total", `reason="handshake"`); n < float64(len(strangers)) {
		t.Errorf("%v strangers counted, want %d at least", n, len(strangers))
	}
	pod.WantLine("not let in as a peer")
	ann.WantNothingElse()
}

// TestTokenKeyLetsIn is the control of the test above: the same client with the right key is answered, over one connection, and
// what it sends reaches the socket. So it is the key that keeps strangers out.
func TestTokenKeyLetsIn(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	conn := dialGRPC(t, pod.GRPC, credentials.NewTLS(podTLS(t, harness.TokenKey)))
	client, ctx := peerpb.NewPeerClient(conn), harness.Within(t, harness.Patience)
	who, err := client.Identify(ctx, &peerpb.IdentifyRequest{})
	if err != nil || who.GetPod() != pod.ID || who.GetLife() == "" {
		t.Fatalf("Identify: %v, %v", who, err)
	}
	if h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}
	stream, err := client.Deliver(ctx)
	if err != nil {
		t.Fatal(err)
	}
	send := func(m *peerpb.Request) *peerpb.Response {
		t.Helper()
		stream.Send(m)
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	hello := send(aHello).GetHello()
	if hello.GetPod() != pod.ID || hello.GetLife() != who.GetLife() || hello.GetVersion() != 1 {
		t.Errorf("the pod's hello: %v", hello)
	}
	if l := send(listAll).GetSessions().GetSessions(); len(l) != 1 || l[0].GetKey() != "acme:desk1:ann" {
		t.Errorf("listed %v", l)
	}
	stream.Send(batchOf("of another life", 1001))
	stream.Send(batchOf(who.GetLife(), 1002))
	if m := ann.WantEvent(1002); !strings.Contains(m.Raw, "forged") {
		t.Errorf("got %s", m.Raw)
	}
	ann.WantNothingElse()
}

// impostor answers in the place of another pod, without knowing a token key, and counts whom it could talk to.
type impostor struct {
	peerpb.UnimplementedPeerServer
	streams atomic.Int64
}

func (i *impostor) Deliver(peerpb.Peer_DeliverServer) error {
	i.streams.Add(1)
	return nil
}

// TestImpostorLearnsNothing: whoever answers at a pod's address, and does not know a token key, is told nothing. The event waits, and
// comes when the pod itself is there again.
func TestImpostorLearnsNothing(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=100ms", calm))
	well := w.Start()
	there, proxy := behindProxy(w)
	ann := there.Connect(harness.User("acme", "desk1", "ann"))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	evil := &impostor{}
	creds := strangerTLS(t)
	creds.ClientAuth = tls.RequestClientCert
	server := grpc.NewServer(grpc.Creds(credentials.NewTLS(creds)))
	peerpb.RegisterPeerServer(server, evil)
	go server.Serve(l) // ends with Stop
	t.Cleanup(server.Stop)
	before := proxy.Taken()
	proxy.Retarget(l.Addr().String())
	var due []uint64
	for proxy.Taken() < before+3 {
		if len(due) == 200 {
			t.Fatal("nobody dials the impostor")
		}
		due = append(due, w.Chat("acme", "desk1"))
		time.Sleep(10 * time.Millisecond) // dials take their time
	}
	proxy.Retarget(there.GRPC)
	proxy.Cut()
	proxy.Restore()
	w.Settled()
	wantExactly(ann, due)
	if n := evil.streams.Load(); n != 0 {
		t.Errorf("%d streams were opened to the impostor", n)
	}
	for _, p := range []*harness.Pod{well, there} {
		p.WantLedgers()
	}
}

// tappedListener keeps all that passes its connections.
type tappedListener struct {
	net.Listener
	mu   sync.Mutex // guards seen
	seen bytes.Buffer
}

type tapped struct {
	net.Conn
	l *tappedListener
}

func (l *tappedListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return &tapped{c, l}, nil
}

func (l *tappedListener) keep(b []byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.seen.Write(b)
}

func (c *tapped) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.l.keep(b[:n])
	return n, err
}

func (c *tapped) Write(b []byte) (int, error) {
	c.l.keep(b)
	return c.Conn.Write(b)
}

// TestNobodyReadsAlong: who sees all bytes between pods sees no payload, no id and no key.
func TestNobodyReadsAlong(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings(calm))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	tap := &tappedListener{Listener: l}
	proxy := rig.NewProxy(tap, "")
	t.Cleanup(proxy.Close)
	well := w.Start()
	there := w.Launch("SERVER_ADVERTISE_ADDRESS=" + proxy.Address())
	there.WaitListening()
	proxy.Retarget(there.GRPC)
	there.WaitReady()
	ann := there.Connect(harness.User("acme", "desk-of-ann", "ann"))
	const text = "nobody else is to read this"
	for n := 0; forwarded(well) < 3; n++ {
		if n == 200 {
			t.Fatal("no events went from pod to pod")
		}
		if m := ann.WaitEvent(w.Publish(feed.Chat("acme", "desk-of-ann", "c@us", text, 1))); !strings.Contains(m.Raw, text) {
			t.Fatalf("got %s", m.Raw)
		}
	}
	tap.mu.Lock()
	defer tap.mu.Unlock()
	seen := tap.seen.Bytes()
	if len(seen) < 3*len(text) || seen[0] != 22 { // a TLS record that holds a handshake
		t.Fatalf("saw %d bytes", len(seen))
	}
	key, err := hex.DecodeString(harness.TokenKey)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{text, "desk-of-ann", well.ID, "PRI * HTTP/2", harness.TokenKey, string(key[:8]), string(podTLS(t, harness.TokenKey).Certificates[0].PrivateKey.(ed25519.PrivateKey).Seed())} {
		if bytes.Contains(seen, []byte(secret)) {
			t.Errorf("saw %q", secret)
		}
	}
}

// TestPeerKeyRotation: the token key of three pods is changed in two steps and dropped in a third, by SIGHUP, pod after pod, while
// events flow and every connection among them is made anew at each step. No event is lost.
func TestPeerKeyRotation(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings("NATS_NAK_DELAY=100ms", "PEER_BREAKER_THRESHOLD=100000", "WEBSOCKET_BUFFER_SIZE=4096", calm))
	dir, old, next := t.TempDir(), harness.TokenKey, strings.Repeat("7c", 32)
	steps := []string{old + "," + next, next + "," + old, next}
	var pods []*harness.Pod
	var proxies []*rig.Proxy
	file := func(i int) string { return filepath.Join(dir, fmt.Sprint("key-", i)) }
	for i := range 3 {
		writeFile(t, file(i), old)
		pod, proxy := behindProxy(w, "AUTH_TOKEN_AES_KEY=", "AUTH_TOKEN_AES_KEY_FILE="+file(i))
		pods, proxies = append(pods, pod), append(proxies, proxy)
	}
	var clients []*harness.Client
	for i, p := range pods {
		clients = append(clients, p.Connect(harness.User("acme", "desk1", fmt.Sprint("user-", i))))
	}
	flow := w.Flow(50, func(int) feed.Event { return feed.Chat("acme", "desk1", "c@us", "hello", 1) })
	anew := func() { // waits until all connections have been made again, and carry events
		t.Helper()
		made := func() (n float64) {
			for _, p := range pods {
				n += p.Metric("dws_grpc_pool_connections_created_total")
			}
			return n
		}
		before := made()
		for _, proxy := range proxies {
			proxy.Cut()
			proxy.Restore()
		}
		harness.Eventually(t, harness.Patience, "six connections made anew", func() bool { return made() >= before+6 })
		for _, p := range pods {
			was := forwarded(p)
			p.WaitMetric(func(v float64) bool { return v > was }, "dws_grpc_messages_sent_total")
		}
	}
	for _, p := range pods {
		p.WaitMetric(func(v float64) bool { return v == 2 }, "dws_grpc_pool_size")
	}
	for _, step := range steps {
		for i, p := range pods {
			writeFile(t, file(i), step)
			reload(p, "success")
			anew()
		}
	}
	for _, p := range pods {
		if n := p.Metric("dws_grpc_connections_refused_total"); n != 0 {
			t.Errorf("%s refused %v connections", p.ID, n)
		}
	}
	var due []uint64
	for _, p := range flow.Stop() {
		due = append(due, p.Seq)
	}
	w.Settled()
	if len(due) > 256 {
		due = due[len(due)-256:]
	}
	for _, c := range clients {
		got := counts(c)
		for _, seq := range due {
			if got[seq] == 0 {
				t.Errorf("%s misses event %d", c.Dial.User, seq)
			}
		}
	}
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestReflection: the port describes itself only when it was told to.
func TestReflection(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	for _, on := range []bool{false, true} {
		pod := w.Start("SERVER_ENABLE_REFLECTION=" + map[bool]string{true: "true", false: "false"}[on])
		stream, err := reflectionpb.NewServerReflectionClient(dialGRPC(t, pod.GRPC, credentials.NewTLS(podTLS(t, harness.TokenKey)))).
			ServerReflectionInfo(harness.Within(t, harness.Patience))
		if err != nil {
			t.Fatal(err)
		}
		stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}})
		answer, err := stream.Recv()
		if !on && status.Code(err) != codes.Unimplemented {
			t.Errorf("reflection off: %v, %v", answer, err)
		}
		if on && (err != nil || !strings.Contains(answer.String(), "daisi.ws.peer.v1.Peer")) {
			t.Errorf("reflection on: %v, %v", answer, err)
		}
	}
}

// handshakeTimeout is how long a pod lets a stranger be.
const handshakeTimeout = 3 * time.Second

// TestHalfOpenConnections: a thousand strangers' connections that begin a handshake and go no further, dialled again as the pod ends
// them, cost it neither memory nor the others' time, and a pod that comes meanwhile is let in.
func TestHalfOpenConnections(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.Settings(calm))
	pods := startPods(w, 2)
	ann := pods[0].Connect(harness.User("acme", "desk1", "ann"))
	bob := pods[1].Connect(harness.User("acme", "desk1", "bob"))
	latencies := func(n int, clients ...*harness.Client) []time.Duration {
		var all []time.Duration
		for range n {
			begun := time.Now()
			seq := w.Chat("acme", "desk1")
			for _, c := range clients {
				c.WaitEvent(seq)
			}
			all = append(all, time.Since(begun))
		}
		slices.Sort(all)
		return all
	}
	latencies(50, ann, bob) // makes the connections
	before := latencies(100, ann, bob)
	memory := pods[0].Metric("process_resident_memory_peak_bytes")

	hello := clientHello(t)
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	var opened atomic.Int64
	for i := range 1000 {
		from := &net.Dialer{Timeout: time.Second, LocalAddr: &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+i%50))}}
		wg.Go(func() {
			for {
				if c, err := from.Dial("tcp", pods[0].GRPC); err == nil {
					opened.Add(1)
					stop := context.AfterFunc(ctx, func() { c.Close() })
					c.Write(hello[:len(hello)*(i%3)/2]) // nothing, half of it, all of it
					io.Copy(io.Discard, c)
					c.Close()
					stop()
				}
				select {
				case <-ctx.Done():
					return
				case <-time.After(500 * time.Millisecond):
				}
			}
		})
	}
	harness.Eventually(t, harness.Patience, "a thousand half-open connections", func() bool { return opened.Load() >= 1000 })
	begun := time.Now()
	third := w.Start()
	cid := third.Connect(harness.User("acme", "desk1", "cid"))
	var during []time.Duration
	for time.Since(begun) < 2*handshakeTimeout || len(during) < 200 {
		during = append(during, latencies(50, ann, bob, cid)...)
	}
	slices.Sort(during)
	for n := 0; third.Metric("dws_grpc_pool_size") < 2; n++ { // it is let in at the pod that strangers besiege
		if n == 200 {
			t.Fatal("the third pod reaches not both others")
		}
		latencies(1, ann, bob, cid)
	}
	refused := pods[0].Metrics()
	cancel()
	wg.Wait()
	if p50, was := during[len(during)/2], before[len(before)/2]; p50 > was+50*time.Millisecond && !harness.Race {
		t.Errorf("an event took %v at the median, %v before", p50, was)
	}
	if more := pods[0].Metric("process_resident_memory_peak_bytes") - memory; more > 64<<20 && !harness.Race { // 32 of them are room for garbage
		t.Errorf("a thousand half-open connections took %.0f MiB of memory", more/(1<<20))
	}
	for _, reason := range []string{"crowd", "pace"} {
		if refused.Sum("dws_grpc_connections_refused_total", `reason="`+reason+`"`) == 0 {
			t.Errorf("nobody was refused for reason %s", reason)
		}
	}
	t.Logf("%d connections, %.0f MiB; events before %v, during %v at the median, %v at most", opened.Load(), (pods[0].Metric("process_resident_memory_peak_bytes")-memory)/(1<<20), before[len(before)/2], during[len(during)/2], during[len(during)-1])
}

// clientHello is the first message of a handshake, as anyone can record it.
func clientHello(t *testing.T) []byte {
	t.Helper()
	here, there := net.Pipe()
	defer here.Close()
	go tls.Client(there, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}}).Handshake() // ends with the pipe
	b := make([]byte, 16<<10)
	n, err := here.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	return b[:n]
}
