package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// sink is where the consumer leads to: the router.
type sink interface {
	accept(msg jetstream.Msg) // called by the library, one message at a time
	// newestSeen is the message with the highest sequence that has come, 0 = none; endFound is told that it still stands in the stream.
	newestSeen() (seq uint64, stored time.Time)
	endFound()
	newStream()  // the stream is another one: its sequences start again
	madeBeyond() // the consumer was made anew behind events that no pod may have had
}

// consumer keeps the connection to NATS and the one durable pull consumer that all pods share alive: it waits for the
// stream, makes the consumer or compares it, and starts anew whenever the flow has ended or stalled.
type consumer struct {
	cfg    *settings
	m      *Metrics
	lease  *lease
	to     sink          // set before run
	doubt  chan struct{} // room for 1: whether the stream has lost its end is to be looked at now; never closed
	nc     *nats.Conn
	js     jetstream.JetStream
	closed chan struct{} // closed by the library when the connection is given up for good

	// up is what the library's callbacks said last. To ask the connection itself would make /ready, upgrades and
	// chat selections wait for an attempt to connect that hangs: up to CONNECT_TIMEOUT, measured.
	up atomic.Bool

	alive    atomic.Int64  // last sign of life of the consumer, Unix ns
	received atomic.Uint64 // messages since the start
	waits    atomic.Int32  // callbacks that have not returned, of an old flow too: they may wait for room
	stop     chan struct{} // closed by drain
	stopped  chan struct{} // closed when run has returned

	// Owned by run.
	saidRetention, saidRemoves, saidLimits string    // what the last warning was about
	skipped                                time.Time // creation of a consumer that did not deliver what it should
	misfit                                 bool      // the last consumer seen does not deliver what it should
	missing                                time.Time // since when there is no consumer, after one that did not fit
	delivered                              uint64    // by the consumer, when it was last looked whether others use it
	asked                                  time.Time // when somebody was last seen to ask the consumer for events
	barren                                 int       // how many flows in a row were given nothing, though events wait in the stream
	had                                    uint64    // received before the present flow

	mu      sync.Mutex // guards all below
	state   string     // "active", or why not
	refusal string     // why the last attempt to connect failed; "" once connected
	created time.Time  // of the stream that is consumed
	before  time.Time  // that of the stream before it
	made    time.Time  // when the consumer was made that is polled
	floor   uint64     // highest ack floor known: all up to it was settled
	polled  bool       // floor is that of a consumer of this stream,
	stream  string     // which had this name then
	misfits bool       // the consumer does not deliver what it should, or did not
}

const (
	heartbeat  = time.Second
	pullExpiry = 10 * time.Second
	pollEvery  = 2 * time.Second        // so old may a position be
	pollAgain  = 500 * time.Millisecond // while it is not active: all pods are unready for as long
	apiTimeout = 3 * time.Second
)

// connectNATS starts to connect and returns at once; the library goes on trying in the background.
func (c *consumer) connectNATS(cfg *Config) (*nats.Conn, error) {
	connected := func(nc *nats.Conn) {
		c.noteRefusal(nil)
		c.up.Store(true)
		slog.Info("NATS connected", "server", nc.ConnectedServerName())
	}
	opts := []nats.Option{
		nats.Name("daisi-ws-service " + cfg.ServerPodID), nats.RetryOnFailedConnect(true),
		nats.MaxReconnects(cfg.NATSMaxReconnects), nats.ReconnectWait(cfg.NATSReconnectWait),
		nats.Timeout(cfg.NATSConnectTimeout), nats.PingInterval(cfg.NATSPingInterval),
		// Else the second refusal by a server would end the connection for good, and the pod: while accounts are
		// being changed or secrets rotated, all pods at once.
		nats.IgnoreAuthErrorAbort(),
		// Nothing is buffered while disconnected: an ack sent after the reconnect may come later than ACK_WAIT
		// and would be taken for the redelivery's.
		nats.ReconnectBufSize(-1),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) {
			c.up.Store(false)
			if err != nil { // nil: closed by ourselves, at the end of a drain
				slog.Warn("NATS disconnected: sockets stay open", "err", err)
			}
		}),
		nats.ConnectHandler(connected), nats.ReconnectHandler(connected),
		nats.ReconnectErrHandler(func(_ *nats.Conn, err error) { c.noteRefusal(err) }),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { slog.Warn("NATS reports", "err", err) }),
		nats.ClosedHandler(func(*nats.Conn) { close(c.closed) }),
	}
	if cfg.NATSCredsFile != "" {
		opts = append(opts, nats.UserCredentials(cfg.NATSCredsFile))
	}
	if cfg.NATSNKeyFile != "" {
		nkey, err := nats.NkeyOptionFromSeed(cfg.NATSNKeyFile)
		if err != nil {
			return nil, fmt.Errorf("read NATS_NKEY_FILE %s: %w", cfg.NATSNKeyFile, err)
		}
		opts = append(opts, nkey)
	}
	if cfg.NATSTLSCAFile != "" || cfg.NATSTLSCertFile != "" {
		t, err := clientTLS(cfg.NATSTLSCAFile, cfg.NATSTLSCertFile, cfg.NATSTLSKeyFile)
		if err != nil {
			return nil, fmt.Errorf("TLS to NATS: %w", err)
		}
		opts = append(opts, nats.Secure(t))
	}
	nc, err := nats.Connect(cfg.NATSURL, opts...)
	if err != nil {
		return nil, fmt.Errorf("connect to NATS: %w", err)
	}
	return nc, nil
}

func newConsumer(cfg *settings, m *Metrics, l *lease) (*consumer, error) {
	c := &consumer{cfg: cfg, m: m, lease: l, closed: make(chan struct{}), doubt: make(chan struct{}, 1), stop: make(chan struct{}),
		stopped: make(chan struct{}), state: "starting"}
	var err error
	if c.nc, err = c.connectNATS(cfg.Load()); err != nil {
		return nil, err
	}
	if c.js, err = jetstream.NewWithAPIPrefix(c.nc, apiPrefix(cfg.Load()), jetstream.WithDefaultTimeout(apiTimeout)); err != nil {
		return nil, fmt.Errorf("JetStream: %w", err)
	}
	return c, nil
}

// apiPrefix is what the subjects of requests to JetStream begin with.
func apiPrefix(cfg *Config) string {
	switch {
	case cfg.NATSJSAPIPrefix != "":
		return cfg.NATSJSAPIPrefix + "."
	case cfg.NATSJSDomain != "":
		return "$JS." + cfg.NATSJSDomain + ".API."
	default:
		return jetstream.DefaultAPIPrefix
	}
}

// noteRefusal remembers why an attempt to connect failed, without addresses: servers that fail alike are one reason, said
// once. Nil forgets it.
func (c *consumer) noteRefusal(err error) {
	var op *net.OpError
	switch {
	case errors.Is(err, nats.ErrNoServers): // says less than the attempts that follow
		return
	case errors.As(err, &op):
		err = op.Err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.refusal = ""
	if err != nil {
		c.refusal = ": " + err.Error()
	}
}

// errDisconnected says why NATS is not connected, as far as that is known.
func (c *consumer) errDisconnected() error {
	if err := c.nc.LastError(); err != nil { // a refused handshake shows only here
		c.noteRefusal(err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return errors.New("NATS is not connected" + c.refusal)
}

// run consumes until drain is called; it owns everything it starts.
func (c *consumer) run(ctx context.Context) {
	defer close(c.stopped)
	for {
		err := c.consume(ctx)
		select {
		case <-c.stop:
			return
		case <-ctx.Done():
			return
		default:
		}
		c.setState(err.Error())
		select {
		case <-c.stop:
			return
		case <-ctx.Done():
			return
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// setState notes why nothing is consumed, or "active", and says so once.
func (c *consumer) setState(s string) {
	c.mu.Lock()
	changed := c.state != s
	c.state = s
	c.mu.Unlock()
	switch {
	case !changed:
	case s == "active":
		slog.Info("consumer active", "consumer", c.cfg.Load().NATSConsumerName)
	default:
		slog.Warn("consumer waits", "consumer", c.cfg.Load().NATSConsumerName, "err", s)
	}
}

// status is what /ready says of the connection and the consumer.
func (c *consumer) status() (nats, consumer string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.up.Load():
		return "connected", c.state
	case c.state == "active": // at the last poll
		return "disconnected", "NATS is not connected" + c.refusal
	default:
		return "disconnected", c.state
	}
}

// consume runs one life of the flow, from finding the stream to the flow's end, and says why it ended.
func (c *consumer) consume(ctx context.Context) error {
	if !c.nc.IsConnected() {
		return c.errDisconnected()
	}
	stream, err := c.ensureStream(ctx)
	if err != nil {
		return err
	}
	cons, err := c.ensureConsumer(ctx, stream)
	if err != nil {
		return err
	}
	cfg := c.cfg.Load()
	made := cons.CachedInfo().Created // of this answer: each later one replaces it
	missed := make(chan error, 1)
	// The server gives out no event that is larger than what was asked for, and none behind it either.
	bytes := max(int(cfg.NATSPrefetchBytes), int(c.nc.MaxPayload())+messageSlack)
	if c.barren > 0 { // it may be from before that limit
		bytes = max(bytes, natsMaxPayload+messageSlack)
	}
	c.had = c.received.Load()
	flow, err := cons.Consume(c.take,
		// A consumer with a lower limit than the settings': what is asked for in advance is not to fill it.
		jetstream.PullMaxMessagesWithBytesLimit(c.cfg.prefetch(), bytes),
		jetstream.PullExpiry(pullExpiry), jetstream.PullHeartbeat(heartbeat),
		jetstream.ConsumeErrHandler(func(_ jetstream.ConsumeContext, err error) {
			select {
			case missed <- err:
			default:
			}
		}))
	if err != nil {
		return fmt.Errorf("consume %s: %w", cfg.NATSConsumerName, err)
	}
	return c.watch(ctx, flow, &bound{stream: stream, cons: cons, made: made}, missed)
}

// warn logs a warning about something that is so while about is not empty, and again only when about has changed.
func (c *consumer) warn(said *string, about, msg string, args ...any) {
	if *said == about {
		return
	}
	if *said = about; about != "" {
		slog.Warn(msg, args...)
	}
}

// tellAge keeps the age of the last sign of life in the metrics until ctx ends.
func (c *consumer) tellAge(ctx context.Context) {
	c.seen() // counts from the start
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
			c.m.consumerHeartbeatAge.with().Set(time.Since(time.Unix(0, c.alive.Load())).Seconds())
		}
	}
}

func (c *consumer) seen() { c.alive.Store(time.Now().UnixNano()) }

func (c *consumer) take(msg jetstream.Msg) {
	c.seen()
	c.received.Add(1)
	c.waits.Add(1)
	c.to.accept(msg)
	c.waits.Add(-1)
}

// bound is what a flow comes from.
type bound struct {
	stream  jetstream.Stream
	cons    jetstream.Consumer
	made    time.Time // when cons was
	stalled uint64    // one more than was received at the last poll that looked like a stall
}

// watch polls the consumer while it flows: an ended or stalled flow shows nothing by itself when the stream is idle.
// However it returns, the flow has been drained: Stop would leave its prefetch unacked until ACK_WAIT.
func (c *consumer) watch(ctx context.Context, flow jetstream.ConsumeContext, w *bound, missed <-chan error) (err error) {
	ended := flow.Closed()
	defer func() {
		if !c.nc.IsConnected() {
			flow.Stop() // a drain would wait for the server, and what it hands on could not be answered
		}
		flow.Drain()
		select {
		case <-ended:
		case <-time.After(apiTimeout): // the connection broke meanwhile; the server takes the rest back
		}
	}()
	poll := time.NewTicker(pollAgain)
	defer poll.Stop()
	polled := time.Now()
	if err := c.poll(ctx, w); err != nil {
		return err
	}
	for {
		select {
		case <-c.stop:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			return fmt.Errorf("flow of %s ended", c.cfg.Load().NATSConsumerName)
		case err := <-missed:
			if errors.Is(err, jetstream.ErrConsumerDeleted) || errors.Is(err, jetstream.ErrConsumerNotFound) {
				return fmt.Errorf("flow of %s: %w", c.cfg.Load().NATSConsumerName, err)
			}
			c.setState(err.Error())
			if err := c.poll(ctx, w); err != nil {
				return err
			}
		case <-c.doubt:
			if err := c.poll(ctx, w); err != nil {
				return err
			}
		case now := <-poll.C:
			if _, state := c.status(); state == "active" && now.Sub(polled) < pollEvery {
				continue
			}
			if err := c.poll(ctx, w); err != nil {
				return err
			}
			polled = time.Now()
		}
	}
}

// poll asks the server about the consumer, notes its ack floor, and returns an error when the flow must start anew: the
// consumer is gone, delivers something else or has skipped events, or it has work waiting and no pull for it at two polls in a
// row (seen with the library at v1.55: until twice the heartbeat).
func (c *consumer) poll(ctx context.Context, w *bound) error {
	ctx, cancel := context.WithTimeout(ctx, apiTimeout)
	defer cancel()
	id := c.streamID()
	info, err := w.cons.Info(ctx)
	if errors.Is(err, jetstream.ErrConsumerNotFound) || errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("consumer %s: %w", c.cfg.Load().NATSConsumerName, err)
	}
	if err != nil && !c.nc.IsConnected() {
		c.setState(c.errDisconnected().Error())
		return nil
	}
	if err != nil {
		c.setState(fmt.Sprintf("no answer about the consumer: %v", err))
		return nil
	}
	if !info.Created.Equal(w.made) { // maybe with its stream, while this pod was disconnected
		return fmt.Errorf("consumer %s was made anew by someone", c.cfg.Load().NATSConsumerName)
	}
	if err := c.stillFits(ctx, w.stream, info); err != nil {
		return err
	}
	c.seen()
	got := c.received.Load()
	if got != c.had {
		c.barren = 0
	}
	c.m.consumerPaused.with().Set(0)
	switch {
	case info.Paused:
		c.setState(fmt.Sprintf("paused by someone until %v", info.Config.PauseUntil))
		c.m.consumerPaused.with().Set(1)
	case c.barren > 1:
		c.setState("JetStream gives out none of the events that wait in the stream, however often it is asked")
	default:
		c.setState("active")
	}
	c.m.ackPending.with().Set(float64(info.NumAckPending))
	c.m.consumerLag.with().Set(float64(info.NumPending))
	if err := c.checkEnd(ctx); err != nil {
		c.setState(fmt.Sprintf("whether the stream has lost its end is not known: %v", err))
		return nil
	}
	if err := c.raiseFloor(ctx, info, id); err != nil {
		return err
	}
	// While the callback waits for room nothing is asked for, and rightly so: a second flow would call accept beside it.
	if info.NumPending > 0 && info.NumWaiting == 0 && info.NumAckPending < c.cfg.maxAckPending() && c.waits.Load() == 0 {
		if w.stalled == got+1 {
			if got == c.had {
				c.barren++
			}
			return errors.New("events wait in the stream and nothing asks for them: starting anew")
		}
		w.stalled = got + 1
	} else {
		w.stalled = 0
	}
	return nil
}

// ackFloor is the consumer's highest ack floor as of the last poll, and the stream's name then: every event up to it has been settled.
// known is false while none was polled, and where the consumer has skipped events.
func (c *consumer) ackFloor() (floor place, known bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return place{c.floor, c.stream}, c.polled && !c.misfits
}

// streamID names the stream that is consumed; streamCreated is when it was made.
func (c *consumer) streamID() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nameLocked()
}

func (c *consumer) nameLocked() string {
	return strconv.FormatInt(c.created.UnixNano(), 36) + "-" + *c.lease.generation.Load()
}

func (c *consumer) streamCreated() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.created
}

// raiseFloor notes up to where all was settled. It fails where another pod has seen the consumer skip events behind the floor
// noted then. The floor of a stream that was set back while it was asked for is that of sequences which name other events now.
func (c *consumer) raiseFloor(ctx context.Context, info *jetstream.ConsumerInfo, stream string) error {
	c.mu.Lock()
	created, floor, same := c.created, max(c.floor, info.AckFloor.Stream), c.nameLocked() == stream
	c.mu.Unlock()
	if !same {
		return nil
	}
	noted, skipped, err := c.lease.noteFloor(ctx, created, floor, info.Created)
	if skipped {
		floor, c.skipped = noted, info.Created
	}
	c.mu.Lock()
	if c.nameLocked() != stream {
		c.mu.Unlock()
		return nil
	}
	first := !c.polled
	c.floor, c.polled, c.misfits, c.stream = floor, true, skipped, stream
	c.mu.Unlock()
	if first {
		poke(c.lease.wake) // the pod takes sockets once it has a position
	}
	switch {
	case skipped:
		return fmt.Errorf("consumer %s has skipped events behind %d", info.Name, floor)
	case err != nil:
		slog.Debug("ack floor not noted", "seq", floor, "err", err)
	}
	return nil
}

// drain stops pulling and returns when the last message pulled has been accepted, or ctx ends.
func (c *consumer) drain(ctx context.Context) error {
	close(c.stop)
	select {
	case <-c.stopped:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("drain consumer %s: %w", c.cfg.Load().NATSConsumerName, ctx.Err())
	}
}

// close sends what is still buffered, acks above all, and ends the connection.
func (c *consumer) close(ctx context.Context) error {
	if !c.nc.IsConnected() {
		c.nc.Close()
		return nil
	}
	err := c.nc.FlushWithContext(ctx)
	c.nc.Close()
	if err != nil {
		return fmt.Errorf("flush acks to NATS: %w", err)
	}
	return nil
}
