package e2e

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
	peerpb "daisi-ws-service/proto"
)

// dialGRPC connects to a pod's gRPC port as anyone could.
func dialGRPC(t *testing.T, addr string, creds credentials.TransportCredentials) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+addr, grpc.WithTransportCredentials(creds))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// prover makes proofs as docs/architecture.md describes them ("Peers"), with a token key of its own choice.
type prover struct {
	key                                    string // 64 hex digits
	client, clientLife, server, serverLife string
	clientNonce, serverNonce               []byte
}

func (p prover) proof(t *testing.T, role string) []byte {
	t.Helper()
	secret, err := hex.DecodeString(p.key)
	if err != nil {
		t.Fatal(err)
	}
	key, err := hkdf.Key(sha256.New, secret, nil, "daisi-ws-service peer stream v1", sha256.Size)
	if err != nil {
		t.Fatal(err)
	}
	mac := hmac.New(sha256.New, key)
	for _, f := range []string{role, p.client, p.clientLife, p.server, p.serverLife, string(p.clientNonce), string(p.serverNonce)} {
		mac.Write(binary.BigEndian.AppendUint32(nil, uint32(len(f))))
		io.WriteString(mac, f)
	}
	return mac.Sum(nil)
}

func nonce() []byte {
	b := make([]byte, 32)
	rand.Read(b)
	return b
}

func batchOf(life string, seq uint64) *peerpb.Request {
	return &peerpb.Request{Body: &peerpb.Request_Batch{Batch: &peerpb.Batch{Life: life, Events: []*peerpb.Event{{
		Seq: seq, Kind: peerpb.Kind_KIND_CHAT, Company: "acme", Agent: "desk1", Payload: []byte(`{"forged":true}`), Count: 1,
		Stored: time.Now().UnixNano(),
	}}}}}
}

var listAll = &peerpb.Request{Body: &peerpb.Request_List{List: &peerpb.List{Limit: 1000}}}

// TestStrangerIsRefused: who can connect to the gRPC port, but knows no token key, learns which pod it is and whether it is
// well, and nothing else: it can neither inject events, nor list sessions, nor end any.
func TestStrangerIsRefused(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	conn := dialGRPC(t, pod.GRPC, insecure.NewCredentials())
	ctx := harness.Within(t, harness.Patience)
	client := peerpb.NewPeerClient(conn)
	who, err := client.Identify(ctx, &peerpb.IdentifyRequest{})
	if err != nil || who.GetPod() != pod.ID || who.GetLife() == "" {
		t.Fatalf("Identify: %v, %v", who, err)
	}
	if h, err := healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{}); err != nil || h.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v, %v", h, err)
	}

	wrongKey := strings.Repeat("ab", 32)
	hello := func(p *prover) *peerpb.Request {
		return &peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: p.client, Life: p.clientLife, Nonce: p.clientNonce}}}
	}
	proof := func(proofs ...[]byte) *peerpb.Request {
		return &peerpb.Request{Body: &peerpb.Request_Proof{Proof: &peerpb.Proof{Proofs: proofs}}}
	}
	// Each of these goes as far as it gets: says is given the challenge (nil before the hello) and tells what to send.
	attempts := map[string]func(p *prover, c *peerpb.Challenge) []*peerpb.Request{
		"events at once": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			return []*peerpb.Request{batchOf(who.GetLife(), 1001)}
		},
		"a list at once": func(p *prover, c *peerpb.Challenge) []*peerpb.Request { return []*peerpb.Request{listAll} },
		"events after the hello": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{batchOf(who.GetLife(), 1002)}
		},
		"a list after the hello": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{listAll}
		},
		"a proof by another key": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{proof(p.proof(t, "client")), listAll, batchOf(who.GetLife(), 1003)}
		},
		"the pod's own proof sent back": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{proof(c.GetProofs()...), listAll, batchOf(who.GetLife(), 1004)}
		},
		"no proof at all": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{proof(), proof(nil), proof([]byte{}), listAll, batchOf(who.GetLife(), 1005)}
		},
		"a thousand proofs": func(p *prover, c *peerpb.Challenge) []*peerpb.Request {
			if c == nil {
				return []*peerpb.Request{hello(p)}
			}
			return []*peerpb.Request{proof(slices.Repeat([][]byte{p.proof(t, "client")}, 1000)...), listAll}
		},
		"a hello without end": func(p *prover, c *peerpb.Challenge) []*peerpb.Request { return []*peerpb.Request{hello(p)} },
		"silence":             func(p *prover, c *peerpb.Challenge) []*peerpb.Request { return nil },
	}
	t.Run("attempts", func(t *testing.T) { // returns when all of them have ended
		for name, says := range attempts {
			t.Run(name, func(t *testing.T) {
				t.Parallel()
				p := &prover{key: wrongKey, client: "pod-2", clientLife: "e", clientNonce: nonce()}
				stream, err := client.Deliver(harness.Within(t, harness.Patience))
				if err != nil {
					t.Fatal(err)
				}
				for _, m := range says(p, nil) {
					stream.Send(m) // what comes of it, Recv says
				}
				for {
					answer, err := stream.Recv()
					if err != nil {
						if c := status.Code(err); c != codes.Unauthenticated {
							t.Errorf("ended with %v, want Unauthenticated", err)
						}
						return
					}
					c := answer.GetChallenge()
					if c == nil || p.serverNonce != nil {
						t.Fatalf("a stranger was answered %v", answer)
					}
					p.server, p.serverLife, p.serverNonce = c.GetPod(), c.GetLife(), c.GetNonce()
					for _, m := range says(p, c) {
						stream.Send(m)
					}
				}
			})
		}
	})
	if ann.Ended() != nil {
		t.Errorf("the socket was closed: %+v", ann.Ended())
	}
	if n := pod.Metric("dws_grpc_messages_received_total"); n != 0 {
		t.Errorf("%v events were taken from strangers", n)
	}
	ann.WantNothingElse()
}

// TestProofOpensTheStream is the control of the test above: the same client with the right key is let in, and what it sends
// reaches the socket. So it is the key that keeps strangers out.
func TestProofOpensTheStream(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	client := peerpb.NewPeerClient(dialGRPC(t, pod.GRPC, insecure.NewCredentials()))
	stream, err := client.Deliver(harness.Within(t, harness.Patience))
	if err != nil {
		t.Fatal(err)
	}
	p := prover{key: harness.TokenKey, client: "pod-2", clientLife: "e", clientNonce: nonce()}
	send := func(m *peerpb.Request) *peerpb.Response {
		t.Helper()
		stream.Send(m)
		answer, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return answer
	}
	c := send(&peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: p.client, Life: p.clientLife, Nonce: p.clientNonce}}}).GetChallenge()
	p.server, p.serverLife, p.serverNonce = c.GetPod(), c.GetLife(), c.GetNonce()
	if !slices.ContainsFunc(c.GetProofs(), func(b []byte) bool { return hmac.Equal(b, p.proof(t, "server")) }) {
		t.Fatal("the pod does not prove itself")
	}
	if send(&peerpb.Request{Body: &peerpb.Request_Proof{Proof: &peerpb.Proof{Proofs: [][]byte{p.proof(t, "client")}}}}).GetWelcome() == nil {
		t.Fatal("no welcome")
	}
	if l := send(listAll).GetSessions().GetSessions(); len(l) != 1 || l[0].GetKey() != "acme:desk1:ann" {
		t.Errorf("listed %v", l)
	}
	stream.Send(batchOf("of another life", 1001))
	stream.Send(batchOf(c.GetLife(), 1002))
	if m := ann.WantEvent(1002); !strings.Contains(m.Raw, "forged") {
		t.Errorf("got %s", m.Raw)
	}
	ann.WantNothingElse()
}

// impostor answers in the place of another pod, without knowing a token key, and keeps what it is told.
type impostor struct {
	peerpb.UnimplementedPeerServer
	pod string

	mu   sync.Mutex
	told []*peerpb.Request
}

func (i *impostor) Deliver(stream peerpb.Peer_DeliverServer) error {
	for {
		req, err := stream.Recv()
		if err != nil {
			return err
		}
		i.mu.Lock()
		i.told = append(i.told, req)
		i.mu.Unlock()
		stream.Send(&peerpb.Response{Body: &peerpb.Response_Challenge{Challenge: &peerpb.Challenge{
			Pod: i.pod, Life: "e", Nonce: nonce(), Proofs: [][]byte{make([]byte, 32), req.GetHello().GetNonce()}}}})
		stream.Send(&peerpb.Response{Body: &peerpb.Response_Welcome{Welcome: &peerpb.Welcome{}}})
	}
}

// TestImpostorLearnsNothing: whoever answers at a pod's address, and cannot prove to know a token key, is told a hello, never an
// event nor a proof. The event waits, and comes when the pod itself is there again.
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
	evil := &impostor{pod: there.ID}
	server := grpc.NewServer()
	peerpb.RegisterPeerServer(server, evil)
	go server.Serve(l) // ends with Stop
	t.Cleanup(server.Stop)
	proxy.Retarget(l.Addr().String())
	told := func() []*peerpb.Request {
		evil.mu.Lock()
		defer evil.mu.Unlock()
		return slices.Clone(evil.told)
	}
	var due []uint64
	for len(told()) < 3 {
		if len(due) == 200 {
			t.Fatal("nobody dials the impostor")
		}
		due = append(due, w.Chat("acme", "desk1"))
		time.Sleep(10 * time.Millisecond) // dials take their time
	}
	for _, m := range told() {
		if m.GetHello() == nil {
			t.Errorf("the impostor was told %v", m)
		}
	}
	proxy.Retarget(there.GRPC)
	proxy.Cut()
	proxy.Restore()
	w.Settled()
	wantExactly(ann, due)
	for _, p := range []*harness.Pod{well, there} {
		p.WantLedgers()
	}
}

// TestReflection: the port describes itself only when it was told to.
func TestReflection(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	for _, on := range []bool{false, true} {
		pod := w.Start("SERVER_ENABLE_REFLECTION=" + map[bool]string{true: "true", false: "false"}[on])
		stream, err := reflectionpb.NewServerReflectionClient(dialGRPC(t, pod.GRPC, insecure.NewCredentials())).
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

// shownSerial is that of the certificate that a pod shows to a client with these certificates; an error where it lets nobody in.
func shownSerial(addr string, cfg *tls.Config) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), harness.Patience)
	defer cancel()
	cfg = cfg.Clone()
	cfg.NextProtos = []string{"h2"}
	c, err := (&tls.Dialer{Config: cfg}).DialContext(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	// With TLS 1.3 a server that refuses the client says so only now; one that takes it sends its HTTP/2 settings.
	c.SetReadDeadline(time.Now().Add(harness.Patience))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return "", err
	}
	return c.(*tls.Conn).ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
}

// TestPeerTLS: with certificates set, pods talk over mTLS and nobody without a certificate is let in; renewed files are taken
// for the next handshake, while the streams that run go on.
func TestPeerTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca, err := rig.NewCA(dir, "ca")
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("pod")
	if err != nil {
		t.Fatal(err)
	}
	w := harness.New(t, harness.Settings("PEER_TLS_CERT_FILE="+cert, "PEER_TLS_KEY_FILE="+key, "PEER_TLS_CA_FILE="+ca.File, "NATS_NAK_DELAY=100ms", calm))
	pods := startPods(w, 2)
	ann, bob := pods[0].Connect(harness.User("acme", "desk1", "ann")), pods[1].Connect(harness.User("acme", "desk1", "bob"))
	var due []uint64
	serve := func() {
		t.Helper()
		before := forwarded(pods[0])
		back := forwarded(pods[1])
		for n := 0; forwarded(pods[0]) < before+3 || forwarded(pods[1]) < back+3; n++ {
			if n == 200 {
				t.Fatal("no events went from pod to pod")
			}
			due = append(due, w.Chat("acme", "desk1"))
		}
		w.Settled()
	}
	serve()

	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	member := &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}
	first, err := shownSerial(pods[0].GRPC, member)
	if err != nil {
		t.Fatalf("with a certificate: %v", err)
	}
	if _, err := shownSerial(pods[0].GRPC, &tls.Config{RootCAs: roots}); err == nil {
		t.Error("let in without a certificate")
	}
	conn := dialGRPC(t, pods[0].GRPC, insecure.NewCredentials())
	if who, err := peerpb.NewPeerClient(conn).Identify(harness.Within(t, harness.Patience), &peerpb.IdentifyRequest{}); err == nil {
		t.Errorf("answered %v without TLS", who)
	}

	if _, _, err := ca.Issue("pod"); err != nil { // the same files, renewed
		t.Fatal(err)
	}
	second, err := shownSerial(pods[0].GRPC, member)
	if err != nil || second == first {
		t.Errorf("after the renewal the pod shows %s (%v), before it %s", second, err, first)
	}
	serve()
	for _, p := range pods {
		m := p.Metrics()
		if made, closed := m.Sum("dws_grpc_pool_connections_created_total"), m.Sum("dws_grpc_pool_connections_closed_total"); made != 1 || closed != 0 {
			t.Errorf("%s made %v connections and closed %v: the renewal dropped a healthy stream", p.ID, made, closed)
		}
	}
	third := w.Start() // dials and is dialled with the renewed ones
	cid := third.Connect(harness.User("acme", "desk1", "cid"))
	skip := len(due)
	serve()
	wantExactly(ann, due)
	wantExactly(bob, due)
	wantExactly(cid, due[skip:])
	for _, p := range append(pods, third) {
		p.WantLedgers()
	}
}

// TestTalkativeStranger: strangers who introduce themselves at length are cut off before their words fill a pod's memory, those
// who watch its health are sent away, and peers are served as ever.
func TestTalkativeStranger(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pods := startPods(w, 2)
	conn := dialGRPC(t, pods[0].GRPC, insecure.NewCredentials())
	watch, err := healthpb.NewHealthClient(conn).Watch(harness.Within(t, harness.Patience), &healthpb.HealthCheckRequest{})
	if err == nil {
		_, err = watch.Recv()
	}
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("a watch of the health: %v, want it refused", err)
	}
	before := pods[0].Metric("process_resident_memory_peak_bytes")
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			conn := dialGRPC(t, pods[0].GRPC, insecure.NewCredentials())
			s, err := peerpb.NewPeerClient(conn).Deliver(harness.Within(t, harness.Patience))
			if err == nil {
				if err = s.Send(&peerpb.Request{Body: &peerpb.Request_Hello{Hello: &peerpb.Hello{Pod: "x", Nonce: make([]byte, 8<<20)}}}); err == nil || err == io.EOF {
					_, err = s.Recv()
				}
			}
			if status.Code(err) != codes.Unavailable {
				t.Errorf("an introduction of 8 MiB ended with %v, want a broken connection", err)
			}
		})
	}
	wg.Wait()
	if more := pods[0].Metric("process_resident_memory_peak_bytes") - before; more > 32<<20 {
		t.Errorf("128 MiB of introductions took %.0f MiB of memory", more/(1<<20))
	}
	ann := pods[0].Connect(harness.User("acme", "desk1", "ann"))
	for range 20 { // some are pulled by the other pod
		ann.WaitEvent(w.Chat("acme", "desk1"))
	}
}
