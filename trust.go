package main

import (
	"crypto/ed25519"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

const (
	// handshakeTimeout is how long a connection to the gRPC port may take to prove itself.
	handshakeTimeout = 3 * time.Second
	// A handshake under way holds up to 256 KiB of a stranger's certificates. A pod's takes milliseconds, a stranger's may take all its time.
	handshakesPerHost = 16
	handshakesInAll   = 64
	// strangerPace is how many handshakes per second, and at once, are begun for hosts that are no live pod's: each costs
	// 0.25 ms of a processor, whatever the stranger spent on it.
	strangerPace = 100

	// unusedConnection ends a connection without a stream; a peer's has one.
	unusedConnection = time.Minute

	// peerVersion is that of the protocol between pods: the meaning of proto/peer.proto.
	peerVersion = 1
)

// identity is what a pod shows to its peers, and what it takes from them, for one setting of token keys: an Ed25519 key
// is derived from each. Immutable.
type identity struct {
	setting string
	own     tls.Certificate     // of the first key
	keys    []ed25519.PublicKey // of all of them
}

// newIdentity derives the keys. The token keys themselves seal tokens only: what is shown to peers must not help to forge one.
func newIdentity(setting string) (*identity, error) {
	secrets, err := parseTokenKeys(setting)
	if err != nil {
		return nil, fmt.Errorf("derive the identity among pods: %w", err)
	}
	id := &identity{setting: setting}
	for _, secret := range secrets {
		seed, err := hkdf.Key(sha256.New, secret, nil, "daisi-ws-service peer identity v1", ed25519.SeedSize)
		if err != nil {
			return nil, fmt.Errorf("derive the identity among pods: %w", err)
		}
		key := ed25519.NewKeyFromSeed(seed)
		public := key.Public().(ed25519.PublicKey)
		id.keys = append(id.keys, public)
		if len(id.keys) > 1 {
			continue
		}
		// Nobody reads more of it than the public key. The end of its validity is RFC 5280's for "none" (4.1.2.5).
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)}
		der, err := x509.CreateCertificate(nil, tmpl, tmpl, public, key)
		if err != nil {
			return nil, fmt.Errorf("make the certificate for peers: %w", err)
		}
		id.own = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	}
	return id, nil
}

// identity is that of the settings in force.
func (p *peers) identity() (*identity, error) {
	setting := p.cfg.Load().AuthTokenAESKey
	if id := p.known.Load(); id != nil && id.setting == setting {
		return id, nil
	}
	id, err := newIdentity(setting)
	if err == nil {
		p.known.Store(id)
	}
	return id, err
}

// tlsConfig serves both ends of a connection, and reads the settings at each handshake.
func (p *peers) tlsConfig() *tls.Config {
	own := func() (*tls.Certificate, error) {
		id, err := p.identity()
		if err != nil {
			return nil, err
		}
		return &id.own, nil
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return own() },
		GetClientCertificate:   func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return own() },
		ClientAuth:             tls.RequireAnyClientCert,
		InsecureSkipVerify:     true, // of the server's chain, name and dates; VerifyConnection asks for the key instead
		VerifyConnection:       p.verify,
		SessionTicketsDisabled: true, // a resumed session would go on with a key that has been withdrawn
	}
}

// verify takes the other end for a pod if its key is derived from a token key that is listed here. TLS has proven before
// that the other end has the key.
func (p *peers) verify(cs tls.ConnectionState) error {
	id, err := p.identity()
	if err != nil {
		return err
	}
	shown, _ := cs.PeerCertificates[0].PublicKey.(ed25519.PublicKey)
	if !slices.ContainsFunc(id.keys, func(k ed25519.PublicKey) bool { return k.Equal(shown) }) {
		return errors.New("it does not know our token key")
	}
	return nil
}

// door bounds the handshakes under way at the gRPC port. A newcomer that is one too many takes the place of the oldest:
// strangers can keep places for as long as they are let, and a pod needs its own for a moment only.
type door struct {
	credentials.TransportCredentials
	ps *peers

	mu    sync.Mutex      // guards all below
	pods  map[string]bool // hosts of the live pods
	under []caller        // handshakes under way, the oldest first
	pace  limiter
}

type caller struct {
	conn net.Conn
	host string
}

// ServerHandshake returns when conn has proven to be a pod's, or with an error, after which gRPC closes it.
func (d *door) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if !d.enter(conn) {
		return nil, nil, d.ps.refuse(conn.RemoteAddr(), "pace", errors.New("too many strangers"))
	}
	secure, info, err := d.TransportCredentials.ServerHandshake(conn)
	switch stayed := d.leave(conn); {
	case err == nil:
	case !stayed:
		d.ps.refuse(conn.RemoteAddr(), "crowd", errors.New("others came while it took its time"))
	default:
		d.ps.refuse(conn.RemoteAddr(), "handshake", err)
	}
	return secure, info, err
}

// enter notes a handshake that begins, or says that it may not.
func (d *door) enter(conn net.Conn) bool {
	host := hostOf(conn.RemoteAddr().String())
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.pods[host] {
		if ok, _ := d.pace.allow(time.Now(), strangerPace, strangerPace); !ok {
			return false
		}
	}
	same := 0
	for _, c := range d.under {
		if c.host == host {
			same++
		}
	}
	oldest := -1
	if same >= handshakesPerHost {
		oldest = slices.IndexFunc(d.under, func(c caller) bool { return c.host == host })
	} else if len(d.under) >= handshakesInAll {
		oldest = slices.IndexFunc(d.under, func(c caller) bool { return !d.pods[c.host] })
	}
	if oldest >= 0 {
		d.under[oldest].conn.Close()
		d.under = slices.Delete(d.under, oldest, oldest+1)
	}
	d.under = append(d.under, caller{conn, host})
	return true
}

// leave notes a handshake that has ended, and says whether it kept its place until then.
func (d *door) leave(conn net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	i := slices.IndexFunc(d.under, func(c caller) bool { return c.conn == conn })
	if i >= 0 {
		d.under = slices.Delete(d.under, i, i+1)
	}
	return i >= 0
}

// expect notes the addresses of the live pods. A pod that is known by a name is taken for a stranger until it has proven itself.
func (d *door) expect(live map[string]string) {
	pods := map[string]bool{}
	for _, addr := range live {
		pods[hostOf(addr)] = true
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pods = pods
}

// hostOf is the host of an address; an IP address in one form, however it is written.
func hostOf(addr string) string {
	host, _, _ := net.SplitHostPort(addr)
	if ip, err := netip.ParseAddr(host); err == nil {
		return ip.Unmap().WithZone("").String()
	}
	return host
}

// refuse counts someone who was not let in, logs it, once per second at most, and returns err.
func (p *peers) refuse(remote net.Addr, reason string, err error) error {
	p.m.grpcConnectionsRefused.with(reason).Inc()
	if err == io.EOF {
		return err // a probe of the port
	}
	if suppressed, ok := p.refused.turn(time.Now()); ok {
		poke(p.lease.wake) // it may be a pod that this one has not heard of yet
		slog.Warn("not let in as a peer", "remote", remote.String(), "reason", reason, "err", err, "suppressed", suppressed)
	}
	return err
}

func (p *peers) hello() *peerpb.Hello {
	return &peerpb.Hello{Pod: p.lease.pod, Life: p.lease.life(), Version: peerVersion}
}

// introduce opens a stream to pod, and returns when the pod there has said that it is this one.
func (p *peers) introduce(stream peerpb.Peer_DeliverClient, pod string) error {
	answer, err := exchange(stream, &peerpb.Request{Body: &peerpb.Request_Hello{Hello: p.hello()}})
	if err != nil {
		return err
	}
	if got := answer.GetHello().GetPod(); got != pod {
		return fmt.Errorf("the pod there is %q", got)
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

// admit is introduce's other end: it returns the pod that opened the stream.
func (p *peers) admit(stream peerpb.Peer_DeliverServer) (pod string, err error) {
	req, err := stream.Recv()
	if err != nil {
		return "", err
	}
	hello := req.GetHello()
	switch {
	case !validPodID(hello.GetPod()):
		return "", status.Error(codes.InvalidArgument, "the first message is no hello")
	case hello.GetVersion() != peerVersion:
		return "", status.Errorf(codes.FailedPrecondition, "pod %s speaks version %d of the protocol, pod %s version %d",
			hello.GetPod(), hello.GetVersion(), p.lease.pod, peerVersion)
	}
	return hello.GetPod(), stream.Send(&peerpb.Response{Body: &peerpb.Response_Hello{Hello: p.hello()}})
}

// validPodID says whether s can be the name of a pod: it becomes a metric's label and part of log lines.
func validPodID(s string) bool {
	return len(s) > 0 && len(s) <= 253 && strings.IndexFunc(s, func(r rune) bool { return r <= ' ' || r > '~' }) < 0
}
