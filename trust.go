package main

import (
	"context"
	"crypto/hkdf"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

const (
	// proofTimeout is how long a stream may stay unproven: it bounds what a stranger can hold open.
	proofTimeout = 5 * time.Second
	nonceSize    = 32
	// maxProofs bounds the work that a stranger can ask for; a rotation needs two keys.
	maxProofs = 16

	roleClient = "client"
	roleServer = "server"
)

var errUnproven = errors.New("it does not know our token key")

// introduction is what both ends of a stream prove: that they know a token key, and that they mean this stream of these
// two pods in these lives. Both nonces and the role are in it, so a proof can be neither kept for later nor sent back.
type introduction struct {
	client, clientLife, server, serverLife string
	clientNonce, serverNonce               []byte
}

// proofs returns one proof per key: during a rotation neither side knows which key the other has already.
func (i *introduction) proofs(keys [][]byte, role string) [][]byte {
	out := make([][]byte, len(keys))
	for n, key := range keys {
		out[n] = i.proof(key, role)
	}
	return out
}

// proven says whether one of proofs was made with one of keys.
func (i *introduction) proven(keys [][]byte, role string, proofs [][]byte) bool {
	if len(proofs) > maxProofs {
		return false
	}
	ok := false
	for _, key := range keys {
		want := i.proof(key, role)
		for _, got := range proofs {
			ok = hmac.Equal(want, got) || ok // constant time; no early way out either
		}
	}
	return ok
}

// proof is the HMAC over everything, each field with its length: no two introductions have the same bytes.
func (i *introduction) proof(key []byte, role string) []byte {
	mac := hmac.New(sha256.New, key)
	for _, field := range []string{role, i.client, i.clientLife, i.server, i.serverLife, string(i.clientNonce), string(i.serverNonce)} {
		mac.Write(binary.BigEndian.AppendUint32(nil, uint32(len(field))))
		io.WriteString(mac, field)
	}
	return mac.Sum(nil)
}

// peerKeys derives a key for proofs from each token key of the setting. The token keys themselves seal tokens only: what is
// shown to peers must not help to forge one.
func peerKeys(setting string) ([][]byte, error) {
	keys, err := parseTokenKeys(setting)
	if err != nil {
		return nil, fmt.Errorf("derive the keys for peers: %w", err)
	}
	for i, secret := range keys {
		if keys[i], err = hkdf.Key(sha256.New, secret, nil, "daisi-ws-service peer stream v1", sha256.Size); err != nil {
			return nil, fmt.Errorf("derive the keys for peers: %w", err)
		}
	}
	return keys, nil
}

func newNonce() []byte {
	nonce := make([]byte, nonceSize)
	rand.Read(nonce) // never fails
	return nonce
}

// introduce opens a stream to pod: it makes the other end prove itself before it proves this one, and returns when the
// other end agreed.
func (p *peers) introduce(stream peerpb.Peer_DeliverClient, pod string) error {
	keys, err := peerKeys(p.cfg.Load().AuthTokenAESKey)
	if err != nil {
		return err
	}
	i := introduction{client: p.lease.pod, clientLife: p.lease.life(), clientNonce: newNonce()}
	hello := &peerpb.Hello{Pod: i.client, Life: i.clientLife, Nonce: i.clientNonce}
	answer, err := exchange(stream, &peerpb.Request{Body: &peerpb.Request_Hello{Hello: hello}})
	if err != nil {
		return err
	}
	challenge := answer.GetChallenge()
	i.server, i.serverLife, i.serverNonce = challenge.GetPod(), challenge.GetLife(), challenge.GetNonce()
	if i.server != pod {
		return fmt.Errorf("the pod there is %q", i.server)
	}
	if len(i.serverNonce) != nonceSize || !i.proven(keys, roleServer, challenge.GetProofs()) {
		return errUnproven
	}
	proof := &peerpb.Proof{Proofs: i.proofs(keys, roleClient)}
	answer, err = exchange(stream, &peerpb.Request{Body: &peerpb.Request_Proof{Proof: proof}})
	if err != nil {
		return err
	}
	if answer.GetWelcome() == nil {
		return errors.New("it answered something else than welcome")
	}
	return nil
}

// exchange sends one message and receives one. A failed send says io.EOF only; the reason comes with the receive.
func exchange(stream peerpb.Peer_DeliverClient, req *peerpb.Request) (*peerpb.Response, error) {
	if err := stream.Send(req); err != nil && err != io.EOF {
		return nil, err
	}
	return stream.Recv()
}

// admit is introduce's other end: it returns the pod that has proven itself. It proves this pod first, to anyone: a
// proof is worth nothing but for the stream that it was made for.
func (p *peers) admit(stream peerpb.Peer_DeliverServer) (pod string, err error) {
	keys, err := peerKeys(p.cfg.Load().AuthTokenAESKey)
	if err != nil {
		return "", status.Error(codes.Internal, err.Error())
	}
	req, err := stream.Recv()
	if err != nil {
		return "", err
	}
	hello := req.GetHello()
	if len(hello.GetNonce()) != nonceSize || !validPodID(hello.GetPod()) {
		return "", status.Error(codes.Unauthenticated, "the first message is no hello")
	}
	i := introduction{client: hello.GetPod(), clientLife: hello.GetLife(), clientNonce: hello.GetNonce(),
		server: p.lease.pod, serverLife: p.lease.life(), serverNonce: newNonce()}
	challenge := &peerpb.Challenge{Pod: i.server, Life: i.serverLife, Nonce: i.serverNonce, Proofs: i.proofs(keys, roleServer)}
	if err := stream.Send(&peerpb.Response{Body: &peerpb.Response_Challenge{Challenge: challenge}}); err != nil {
		return "", err
	}
	if req, err = stream.Recv(); err != nil {
		return "", err
	}
	if !i.proven(keys, roleClient, req.GetProof().GetProofs()) {
		return "", status.Error(codes.Unauthenticated, errUnproven.Error())
	}
	return i.client, nil
}

// validPodID says whether s can be the name of a pod: it becomes a metric's label and part of log lines.
func validPodID(s string) bool {
	return len(s) > 0 && len(s) <= 253 && strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}

// certificates are those of mTLS between pods. They are read again when a file has changed, at the next handshake:
// streams that run go on with what they were opened with.
type certificates struct {
	certFile, keyFile, caFile string
	name                      string // that the other pod's certificate must carry; "" = the host that was dialled

	mu    sync.Mutex // guards all below
	stamp string     // of the files as they were when read
	cert  tls.Certificate
	ca    *x509.CertPool
}

// newCertificates returns nil where mTLS is not asked for.
func newCertificates(cfg *Config) *certificates {
	if cfg.PeerTLSCertFile == "" && cfg.PeerTLSKeyFile == "" && cfg.PeerTLSCAFile == "" {
		return nil
	}
	return &certificates{certFile: cfg.PeerTLSCertFile, keyFile: cfg.PeerTLSKeyFile, caFile: cfg.PeerTLSCAFile, name: cfg.PeerTLSServerName}
}

// load reads the files now. After an error the ones read before stay in force.
func (c *certificates) load() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.loadLocked(c.stampNow())
}

func (c *certificates) loadLocked(stamp string) error {
	cert, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return fmt.Errorf("load the certificate for peers: %w", err)
	}
	pem, err := os.ReadFile(c.caFile)
	if err != nil {
		return fmt.Errorf("load the CA of peers: %w", err)
	}
	ca := x509.NewCertPool()
	if !ca.AppendCertsFromPEM(pem) {
		return fmt.Errorf("load the CA of peers: no certificate in %s", c.caFile)
	}
	c.stamp, c.cert, c.ca = stamp, cert, ca
	return nil
}

// stampNow tells one state of the files from another. A file replaced while it is read is read once more at the next
// handshake, since the stamp was taken before.
func (c *certificates) stampNow() string {
	var b strings.Builder
	for _, name := range []string{c.certFile, c.keyFile, c.caFile} {
		if info, err := os.Stat(name); err == nil {
			fmt.Fprintf(&b, "%d %d\n", info.ModTime().UnixNano(), info.Size())
		}
	}
	return b.String()
}

// config is for one handshake; both ends use it. Certificate and key may be renewed one after the other: a pair that
// does not fit is left for later, the old one serves.
func (c *certificates) config() *tls.Config {
	c.mu.Lock()
	defer c.mu.Unlock()
	if stamp := c.stampNow(); stamp != c.stamp {
		if err := c.loadLocked(stamp); err != nil {
			slog.Warn("renewed certificates for peers not used", "err", err)
		} else {
			slog.Info("certificates for peers read again")
		}
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"h2"},
		Certificates:           []tls.Certificate{c.cert},
		RootCAs:                c.ca,
		ServerName:             c.name,
		ClientCAs:              c.ca,
		ClientAuth:             tls.RequireAndVerifyClientCert,
		SessionTicketsDisabled: true, // a resumed session would go on with a certificate that has been renewed
		VerifyConnection:       c.checkName,
	}
}

// checkName holds clients to the name too, not only servers: a CA may have signed for others than pods.
func (c *certificates) checkName(cs tls.ConnectionState) error {
	if c.name == "" {
		return nil
	}
	return cs.PeerCertificates[0].VerifyHostname(c.name)
}

func (c *certificates) serverCredentials() credentials.TransportCredentials {
	if c == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13,
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return c.config(), nil }})
}

func (c *certificates) clientCredentials() credentials.TransportCredentials {
	if c == nil {
		return insecure.NewCredentials()
	}
	return credentials.NewTLS(c.config())
}

// strangerBytes is what a connection may send until one of its streams is proven: far more than a handshake with a client's
// chain, introduction and proof take, and than hours of health checks. A message may be as long as the largest event, so
// 16 strangers' introductions of 8 MiB took 350 MiB of memory (measured).
const strangerBytes = 64 << 10

// strangerIdle ends connections without a stream; a peer's has one.
const strangerIdle = time.Minute

var errTalkative = errors.New("it sends too much without a proof")

// watched is a connection to the gRPC port.
type watched struct {
	net.Conn
	left atomic.Int64 // bytes that it may still send; once trusted it may go on for ever
}

func (w *watched) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if w.left.Add(-int64(n)) < 0 {
		w.Conn.Close()
		return 0, errTalkative
	}
	return n, err
}

// watching hands every connection on as a watched one, which its streams find in their AuthInfo.
type watching struct {
	credentials.TransportCredentials
}

type watchedInfo struct {
	credentials.AuthInfo
	conn *watched
}

func (c watching) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	w := &watched{Conn: raw}
	w.left.Store(strangerBytes)
	conn, info, err := c.TransportCredentials.ServerHandshake(w)
	return conn, watchedInfo{info, w}, err
}

func (c watching) Clone() credentials.TransportCredentials {
	return watching{c.TransportCredentials.Clone()}
}

// trust lets the connection of a proven stream send as much as it likes.
func trust(ctx context.Context) {
	if p, ok := grpcpeer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(watchedInfo); ok {
			info.conn.left.Store(math.MaxInt64)
		}
	}
}

// probes is the standard health service without Watch: a stranger who watches would hold up the end of a drain.
type probes struct{ *health.Server }

func (probes) Watch(*healthpb.HealthCheckRequest, healthpb.Health_WatchServer) error {
	return status.Error(codes.Unimplemented, "ask by Check")
}
