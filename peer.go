package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	vm "github.com/VictoriaMetrics/metrics"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	peerpb "daisi-ws-service/proto"
)

const (
	// natsMaxPayload is the largest payload that a NATS server can be set to allow. The one here may allow less by now than when an event
	// was published.
	natsMaxPayload = 64 << 20
	// messageSlack is what a message between pods holds besides payloads.
	messageSlack = 64 << 10

	// streamWindow is what a peer may send ahead: with HTTP/2's 64 KiB, 200 ms of way there and back allow 500 events/s.
	streamWindow = 4 << 20

	// A peer that vanished without a word is noticed after both together, used or not.
	keepaliveTime    = 10 * time.Second
	keepaliveTimeout = 5 * time.Second
)

// peers is this pod's side of the talk among pods: the gRPC server that they dial (this file), and the pool of
// connections to them (pool.go).
type peers struct {
	peerpb.UnimplementedPeerServer

	cfg   *settings
	m     *Metrics
	lease *lease
	share *share
	door  *door

	known atomic.Pointer[identity] // that was derived last

	// deliver takes an event that a peer addressed to this pod's life, pushes it to the sockets here and nowhere else,
	// and settles it. It must not block. Set before serve.
	deliver func(d *delivery)
	// sessions lists this pod's sockets for another pod. Set before serve.
	sessions func(*peerpb.List) *peerpb.Sessions
	// exclusive closes a socket of this pod for another pod. Set before serve.
	exclusive *sessions

	network  func(ctx context.Context, addr string) (net.Conn, error) // dials; tests put their own here
	server   *grpc.Server
	health   *health.Server
	up       atomic.Bool
	refused  sparse
	stopping chan struct{} // closed by stop
	stopOnce sync.Once
	wg       sync.WaitGroup // every goroutine of this file and pool.go

	mu      sync.Mutex // guards all below
	stopped bool
	pool    map[peerKey]*peer
	sources map[string]bool // pods that have a series of received events
}

// newPeers prepares the server, which serve starts, and starts the care for the pool, which stop ends.
func newPeers(cfg *settings, m *Metrics, l *lease, s *share) *peers {
	c := cfg.Load()
	p := &peers{cfg: cfg, m: m, lease: l, share: s, health: health.NewServer(),
		stopping: make(chan struct{}), pool: map[peerKey]*peer{}, sources: map[string]bool{}}
	p.network = func(ctx context.Context, addr string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}
	p.door = &door{TransportCredentials: credentials.NewTLS(p.tlsConfig()), ps: p}
	p.server = grpc.NewServer(
		grpc.Creds(p.door),
		grpc.MaxRecvMsgSize(natsMaxPayload+messageSlack),
		grpc.InitialWindowSize(streamWindow),
		grpc.InitialConnWindowSize(streamWindow),
		grpc.MaxHeaderListSize(16<<10),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: keepaliveTime, Timeout: keepaliveTimeout, MaxConnectionIdle: unusedConnection}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: keepaliveTime / 2, PermitWithoutStream: true}),
		grpc.WaitForHandlers(true), // stop waits for what the handlers start
	)
	peerpb.RegisterPeerServer(p.server, p)
	healthpb.RegisterHealthServer(p.server, p.health)
	if c.ServerEnableReflection {
		reflection.Register(p.server)
	}
	p.wg.Go(p.watch)
	return p
}

// serve answers peers on l, which it owns, until stop; then it returns nil.
func (p *peers) serve(l net.Listener) error {
	p.up.Store(true)
	defer p.up.Store(false)
	if err := p.server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return fmt.Errorf("serve gRPC on %s: %w", l.Addr(), err)
	}
	return nil
}

// serving says whether peers are answered.
func (p *peers) serving() bool { return p.up.Load() }

// stop fails what is in flight to peers, lets what peers sent be settled and answered, but no longer than ctx, and
// returns when every goroutine has ended.
func (p *peers) stop(ctx context.Context) error {
	p.up.Store(false)
	p.health.Shutdown()
	p.stopOnce.Do(func() { close(p.stopping) })
	p.mu.Lock()
	p.stopped = true
	all := slices.Collect(maps.Values(p.pool))
	clear(p.pool)
	p.mu.Unlock()
	for _, q := range all {
		q.drop(endStopped)
	}
	release := context.AfterFunc(ctx, p.server.Stop)
	p.server.GracefulStop()
	release()
	p.wg.Wait()
	return nil
}

// Identify names this pod and its life.
func (p *peers) Identify(_ context.Context, who *peerpb.IdentifyRequest) (*peerpb.IdentifyResponse, error) {
	overlooked := who.GetLife() != "" && p.lease.overlooks(member{who.GetPod(), who.GetLife()})
	return &peerpb.IdentifyResponse{Pod: p.lease.pod, Life: p.lease.life(), Overlooked: overlooked}, nil
}

// CloseSession closes a socket of this pod whose session another pod has.
func (p *peers) CloseSession(ctx context.Context, ask *peerpb.CloseSessionRequest) (*peerpb.CloseSessionResponse, error) {
	found, err := p.exclusive.closeHere(ctx, ask)
	if err != nil {
		return nil, status.Error(codes.DeadlineExceeded, err.Error())
	}
	return &peerpb.CloseSessionResponse{Found: found}, nil
}

// intake is a stream that another pod opened to this one. Its reader (receive) and its handler (Deliver) share it; only the
// handler sends.
type intake struct {
	ps     *peers
	stream peerpb.Peer_DeliverServer
	pod    string // that opened it
	number uint64 // of the last event read; owned by the reader
	warned bool   // about a faulty event; owned by the reader

	wake  chan struct{} // room for 1: there is something to answer; never closed
	ended chan error    // room for 1: the reader's result; never closed

	mu       sync.Mutex // guards all below
	received uint64     // number of the last event read
	told     uint64     // the last one that received was sent for
	open     int        // events not yet settled
	settled  []uint64   // settled, not yet answered
	outcomes []peerpb.Outcome
	list     *peerpb.List // asked for, not yet answered
}

// Deliver takes events from another pod, and answers them.
func (p *peers) Deliver(stream peerpb.Peer_DeliverServer) error {
	pod, err := p.admit(stream)
	if err != nil {
		slog.Warn("peer's stream refused", "err", err)
		return err
	}
	in := &intake{ps: p, stream: stream, pod: pod, wake: make(chan struct{}, 1), ended: make(chan error, 1)}
	p.wg.Go(func() { in.ended <- in.receive() }) // ends with the stream, which ends with this handler
	stopping := p.stopping
	for {
		select {
		case err := <-in.ended:
			return err
		case <-in.wake:
			if err := in.answer(); err != nil {
				return err
			}
		case <-stopping:
			stopping = nil // a nil channel is never ready
		}
		if stopping == nil && in.idle() {
			return nil
		}
	}
}

// receive reads the stream to its end.
func (in *intake) receive() error {
	pod := in.pod
	slog.Info("peer opened a stream", "peer", pod)
	var err error
	for {
		var req *peerpb.Request
		if req, err = in.stream.Recv(); err != nil {
			break
		}
		switch body := req.GetBody().(type) {
		case *peerpb.Request_Batch:
			// Looked up each time: the series goes when the pod's lease lapses for a moment, and the stream stays.
			in.ps.receivedFrom(pod).Add(len(body.Batch.GetEvents()))
			in.take(body.Batch)
			continue
		case *peerpb.Request_List:
			in.mu.Lock()
			in.list = body.List
			in.mu.Unlock()
			in.notify()
			continue
		}
		err = status.Error(codes.InvalidArgument, "a message that is neither events nor a question")
		break
	}
	slog.Info("peer's stream ended", "peer", pod, "err", err)
	if err == io.EOF {
		return nil
	}
	return err
}

// receivedFrom is the counter of events from pod.
func (p *peers) receivedFrom(pod string) *vm.Counter {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sources[pod] = true
	return p.m.grpcMessagesReceivedTotal.with(pod)
}

// take says that the events of b were received, before anything is done with them, and hands them on.
func (in *intake) take(b *peerpb.Batch) {
	arrived := time.Now()
	in.mu.Lock()
	in.received += uint64(len(b.GetEvents()))
	in.open += len(b.GetEvents())
	in.mu.Unlock()
	in.notify()
	here := b.GetLife() == "" || b.GetLife() == in.ps.lease.life()
	for _, e := range b.GetEvents() {
		in.number++
		if !here {
			in.settle(in.number, failed)
			continue
		}
		ev, err := in.ps.eventFromWire(e)
		if err != nil {
			in.refuseEvent(e, err)
			continue
		}
		d := &incoming{in: in, number: in.number}
		d.event, d.count, d.arrived, d.src = ev, e.GetCount(), arrived, d
		in.ps.deliver(&d.delivery)
	}
}

// refuseEvent fails an event that this pod cannot take. It is a fault of one of the two programs, so it is logged once
// per stream; the sender's retries end by its horizon.
func (in *intake) refuseEvent(e *peerpb.Event, err error) {
	if !in.warned {
		in.warned = true
		slog.Error("faulty event from a peer", "peer", in.pod, "seq", e.GetSeq(), "err", err)
	}
	in.settle(in.number, failed)
}

// incoming is a delivery whose end is told to the peer that sent it.
type incoming struct {
	delivery
	in     *intake
	number uint64
}

// settled implements source.
func (d *incoming) settled(_ *delivery, worst outcome) { d.in.settle(d.number, worst) }

// settle notes the answer; the handler sends it, unless the stream has ended: then the other pod has failed the event.
func (in *intake) settle(number uint64, o outcome) {
	in.mu.Lock()
	in.open--
	in.settled = append(in.settled, number)
	in.outcomes = append(in.outcomes, outcomeToWire[o])
	in.mu.Unlock()
	in.notify()
}

func (in *intake) notify() { poke(in.wake) }

// answer sends what there is to tell, in one message. Only the handler calls it.
func (in *intake) answer() error {
	a := &peerpb.Answers{}
	in.mu.Lock()
	if in.received > in.told {
		in.told, a.Received = in.received, in.received
	}
	a.Settled, a.Outcomes = in.settled, in.outcomes
	in.settled, in.outcomes = nil, nil
	list := in.list
	in.list = nil
	in.mu.Unlock()
	if list != nil {
		if err := in.stream.Send(&peerpb.Response{Body: &peerpb.Response_Sessions{Sessions: in.ps.sessions(list)}}); err != nil {
			return err
		}
	}
	if a.Received == 0 && len(a.Settled) == 0 {
		return nil
	}
	return in.stream.Send(&peerpb.Response{Body: &peerpb.Response_Answers{Answers: a}})
}

// idle says whether everything read has been settled and answered.
func (in *intake) idle() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.open == 0 && len(in.settled) == 0 && in.told == in.received && in.list == nil
}

var (
	kindToWire = [...]peerpb.Kind{kindChat: peerpb.Kind_KIND_CHAT, kindContact: peerpb.Kind_KIND_CONTACT,
		kindMessage: peerpb.Kind_KIND_MESSAGE, kindAgent: peerpb.Kind_KIND_AGENT}
	outcomeToWire = [...]peerpb.Outcome{gone: peerpb.Outcome_OUTCOME_GONE, unselected: peerpb.Outcome_OUTCOME_UNSELECTED,
		duplicate: peerpb.Outcome_OUTCOME_DUPLICATE, written: peerpb.Outcome_OUTCOME_WRITTEN, replayed: peerpb.Outcome_OUTCOME_REPLAYED,
		dropped: peerpb.Outcome_OUTCOME_DROPPED, failed: peerpb.Outcome_OUTCOME_FAILED}
)

// outcomeFromWire reads an outcome; what this version does not know was no success.
func outcomeFromWire(o peerpb.Outcome) outcome {
	if i := slices.Index(outcomeToWire[:], o); i >= 0 {
		return outcome(i)
	}
	return failed
}

// eventToWire fills e, which is used again and again, for ev.
func eventToWire(e *peerpb.Event, d *delivery) {
	e.Seq, e.Kind, e.Count = d.seq, kindToWire[d.kind], d.count
	e.Company, e.Agent, e.Chat = d.company, d.agent, d.chat
	e.Payload, e.Stored = d.payload, d.stored.UnixNano()
	e.RequestId = strings.ToValidUTF8(d.requestID, "?") // else the whole batch could not be encoded
}

// eventFromWire checks an event as strictly as one from JetStream, and encodes its frame.
func (p *peers) eventFromWire(e *peerpb.Event) (*event, error) {
	k := slices.Index(kindToWire[:], e.GetKind())
	switch {
	case k < 0:
		return nil, fmt.Errorf("unknown kind %d", e.GetKind())
	case e.GetSeq() == 0 || e.GetCount() == 0:
		return nil, errors.New("no sequence or delivery count")
	case kind(k) != kindMessage && e.GetChat() != "":
		return nil, errors.New("a chat that is none of a message")
	case len(e.GetRequestId()) > 128:
		return nil, errors.New("request id too long")
	}
	if err := checkPair(e.GetCompany(), e.GetAgent()); err != nil {
		return nil, err
	}
	if kind(k) == kindMessage {
		if err := checkChatID(e.GetChat()); err != nil {
			return nil, err
		}
	}
	if err := checkPayload(e.GetPayload()); err != nil {
		return nil, err
	}
	ev := &event{seq: e.GetSeq(), kind: kind(k), company: e.GetCompany(), agent: e.GetAgent(), chat: e.GetChat(),
		stored: time.Unix(0, e.GetStored()), requestID: e.GetRequestId(), payload: e.GetPayload()}
	ev.toUsers = p.cfg.Load().EventsAgentsToUsers
	ev.frame = newEventFrame(ev, false, p.cfg.Load().EventsTypeInPayload)
	return ev, nil
}
