package main

import (
	"bufio"
	"bytes"
	"container/list"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	maxHeader      = 32 << 10        // a page's cookies come with every upgrade
	acquireTimeout = 6 * time.Second // of a swap and its await, with a slow Redis and silent pods
	retryAfter     = "2"             // seconds, for Unavailable
)

// server answers HTTP and leads upgrades to the hub.
type server struct {
	cfg       *settings
	m         *Metrics
	auth      *auth
	hub       *hub
	ready     func() (map[string]string, bool)
	available func() bool                                  // that of the lease
	swap      func(key, userType string) (*session, error) // that of sessions
	roster    *roster                                      // set before serve
	http      *http.Server
	tls       bool // decided at the start; the files may change

	cert atomic.Pointer[tls.Certificate]

	refusedOrigins, refusedIDs sparse

	// startDrain makes /ready answer 503 and refuses upgrades from now on; everything else is served on. It ends draining.
	startDrain context.CancelFunc
	draining   context.Context
}

// newServer makes a server that serves nothing yet. ready tells the state of each dependency (nats, redis, grpc,
// consumer; "connected" for a NATS that can be used) and whether all are well; it is asked at each upgrade too.
func newServer(cfg *settings, m *Metrics, a *auth, s *sessions, l *lease, h *hub, ready func() (map[string]string, bool)) *server {
	c := cfg.Load()
	srv := &server{
		cfg: cfg, m: m, auth: a, hub: h, ready: ready, available: l.available, swap: s.swap, tls: c.ServerTLSCertFile != "",
	}
	srv.draining, srv.startDrain = context.WithCancel(context.Background())
	srv.http = &http.Server{
		Handler:           srv.handler(),
		ConnState:         (&lobby{dropped: m.httpConnectionsDropped, at: map[net.Conn]*list.Element{}}).note,
		ReadHeaderTimeout: c.ServerReadTimeout,
		ReadTimeout:       c.ServerReadTimeout,
		WriteTimeout:      c.ServerWriteTimeout,
		IdleTimeout:       c.ServerIdleTimeout,
		MaxHeaderBytes:    maxHeader,
		ErrorLog:          log.New(httpLog{}, "", 0),
		Protocols:         new(http.Protocols),
		TLSConfig:         &tls.Config{GetCertificate: srv.certificate, MinVersion: tls.VersionTLS12},
	}
	// A WebSocket takes a whole HTTP/1.1 connection over (RFC 6455 section 4.1): a browser that had negotiated
	// HTTP/2 for the page would have to open a second connection anyway.
	srv.http.Protocols.SetHTTP1(true)
	return srv
}

// lobbySize bounds the HTTP connections on which no request has come, or none since the last answer: strangers must not take the descriptors
// that sockets, NATS, Redis and peers need.
const (
	lobbySize = 2000
	lobbyTime = time.Second // which nobody is denied
)

// lobby holds these connections. One too many closes another that has been there for lobbyTime, one that was answered before if there is any;
// until there is one, no further is accepted. A crowd of clients whose requests come at once waits but for a moment.
type lobby struct {
	dropped *counters

	mu          sync.Mutex // guards all below
	at          map[net.Conn]*list.Element
	fresh, idle list.List // of guests, the oldest first
}

type guest struct {
	conn  net.Conn
	since time.Time
}

// note is told of each connection's states: of new ones by the goroutine that accepts.
func (l *lobby) note(c net.Conn, state http.ConnState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.removeLocked(c)
	switch state {
	case http.StateNew:
		l.at[c] = l.fresh.PushBack(guest{c, time.Now()})
	case http.StateIdle:
		l.at[c] = l.idle.PushBack(guest{c, time.Now()})
		return
	}
	for len(l.at) > lobbySize && !l.dropLocked(&l.idle) && !l.dropLocked(&l.fresh) {
		l.mu.Unlock()
		time.Sleep(time.Millisecond)
		l.mu.Lock()
	}
}

// dropLocked closes the oldest connection of those, if its time is over.
func (l *lobby) dropLocked(of *list.List) bool {
	e := of.Front()
	if e == nil || time.Since(e.Value.(guest).since) < lobbyTime {
		return false
	}
	c := e.Value.(guest).conn
	l.removeLocked(c)
	l.dropped.with().Inc()
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn() // without TLS' own goodbye, which could block
	}
	c.Close()
	return true
}

func (l *lobby) removeLocked(c net.Conn) {
	if e := l.at[c]; e != nil {
		l.fresh.Remove(e) // one of the two does nothing
		l.idle.Remove(e)
		delete(l.at, c)
	}
}

// endpoint answers one request: it writes the answer and returns nil, or leaves the error to be written.
type endpoint func(http.ResponseWriter, *http.Request) *apiError

// handler holds all routes. Methods are not part of the patterns: the mux would answer 405 in plain text.
func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	handle := func(methods, pattern string, f endpoint) {
		mux.Handle(pattern, endpointHandler(onlyMethod(methods, func(w http.ResponseWriter, r *http.Request) *apiError {
			return s.noted(w, f(w, r))
		})))
	}
	handle("GET", "/ws/admin", s.adminSocket)
	handle("GET", "/ws/{company}/{agent}", s.userSocket)
	handle("POST", "/generate-token", s.generateToken)
	handle("POST", "/admin/generate-token", s.generateAdminToken)
	handle("GET", "/admin/sessions", s.listSessions)
	handle("DELETE", "/admin/sessions/{company}/{agent}/{user}", s.revokeSession)
	handle("GET, HEAD", "/health", s.health)
	handle("GET, HEAD", "/ready", s.readyState)
	handle("GET, HEAD", "/metrics", s.metrics)
	mux.Handle("/", endpointHandler(func(http.ResponseWriter, *http.Request) *apiError { return notFound() }))
	return middleware(mux)
}

// onlyMethod lets the methods of allow pass, which is written as the Allow header is (RFC 9110 section 10.2.1).
func onlyMethod(allow string, f endpoint) endpoint {
	methods := strings.Split(allow, ", ")
	return func(w http.ResponseWriter, r *http.Request) *apiError {
		if !slices.Contains(methods, r.Method) {
			w.Header().Set("Allow", allow)
			return methodNotAllowed()
		}
		return f(w, r)
	}
}

// noted logs what was refused because of an id, and returns err. Whoever minted the token, or built the path, is to be told.
func (s *server) noted(w http.ResponseWriter, err *apiError) *apiError {
	if err != nil && err.badID {
		if suppressed, ok := s.refusedIDs.turn(time.Now()); ok {
			slog.Warn("id refused", "request_id", requestID(w), "err", err.Message, "suppressed", suppressed)
		}
	}
	return err
}

func endpointHandler(f endpoint) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := f(w, r); err != nil {
			writeError(w, err)
		}
	})
}

// middleware gives every response its request id, turns a panic into a 500 and logs the request, without its query
// string, which may hold a key or a token.
func middleware(next *http.ServeMux) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start, id := time.Now(), r.Header.Get("X-Request-ID")
		if !saneRequestID(id) {
			id = rand.Text()
		}
		w.Header().Set("X-Request-ID", id)
		sw := &statusWriter{ResponseWriter: w}
		defer func() {
			if p := recover(); p != nil {
				if p == http.ErrAbortHandler {
					panic(p)
				}
				slog.Error("request panicked", "request_id", id, "path", r.URL.Path, "err", p, "stack", string(debug.Stack()))
				if sw.status == 0 {
					writeError(sw, internalServerError())
				}
			}
			slog.Debug("request", "request_id", id, "method", r.Method, "path", r.URL.Path, "status", sw.status, "took", time.Since(start))
		}()
		// The mux would redirect /ws//agent to another resource; no client of ours means that.
		if p := r.URL.EscapedPath(); !strings.HasPrefix(p, "/") || path.Clean(p) != strings.TrimSuffix(p, "/") && p != "/" {
			writeError(sw, notFound())
			return
		}
		next.ServeHTTP(sw, r)
	})
}

// saneRequestID says whether an id of the client's may go into logs, headers and events.
func saneRequestID(id string) bool {
	if len(id) == 0 || len(id) > 128 {
		return false
	}
	for _, c := range []byte(id) {
		switch {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9', c == '.', c == '_', c == '-':
		default:
			return false
		}
	}
	return true
}

// statusWriter remembers the status for the log, and whether an answer was begun.
type statusWriter struct {
	http.ResponseWriter
	status int
}

func (w *statusWriter) WriteHeader(status int) {
	if w.status == 0 {
		w.status = status
	}
	w.ResponseWriter.WriteHeader(status)
}

func (w *statusWriter) Write(b []byte) (int, error) {
	if w.status == 0 {
		w.status = http.StatusOK
	}
	return w.ResponseWriter.Write(b)
}

func (w *statusWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

// Hijack hands the connection over; whatever the status line will be is written by the new owner.
func (w *statusWriter) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	c, rw, err := http.NewResponseController(w.ResponseWriter).Hijack()
	if err == nil {
		w.status = http.StatusSwitchingProtocols
	}
	return c, rw, err
}

func writeError(w http.ResponseWriter, e *apiError) {
	if e.status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", retryAfter)
	}
	writeJSON(w, e.status, e)
}

// writeJSON writes v, which must be encodable. A client that is gone is no fault of ours.
func writeJSON(w http.ResponseWriter, status int, v any) {
	var text bytes.Buffer
	e := json.NewEncoder(&text)
	e.SetEscapeHTML(false) // people read these in a terminal
	if err := e.Encode(v); err != nil {
		panic(err)
	}
	b := bytes.TrimSuffix(text.Bytes(), []byte("\n"))
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	w.Write(b)
}

func (s *server) health(w http.ResponseWriter, r *http.Request) *apiError {
	writeJSON(w, http.StatusOK, struct {
		Status string `json:"status"`
	}{"OK"})
	return nil
}

// dependencies has the order of docs/protocol.md.
type dependencies struct {
	NATS     string `json:"nats"`
	Redis    string `json:"redis"`
	GRPC     string `json:"grpc"`
	Consumer string `json:"consumer"`
}

// readyState answers /ready. It is a probe's business, so an answer of 503 keeps the form of the good one.
func (s *server) readyState(w http.ResponseWriter, r *http.Request) *apiError {
	deps, ok := s.ready()
	body := struct {
		Status       string       `json:"status"`
		Code         string       `json:"code,omitempty"`
		Message      string       `json:"message,omitempty"`
		Dependencies dependencies `json:"dependencies"`
	}{Status: "READY", Dependencies: dependencies{deps["nats"], deps["redis"], deps["grpc"], deps["consumer"]}}
	if ok && s.draining.Err() == nil {
		writeJSON(w, http.StatusOK, body)
		return nil
	}
	body.Status, body.Code, body.Message = "NOT_READY", "Unavailable", s.whyNotReady(body.Dependencies)
	w.Header().Set("Retry-After", retryAfter)
	writeJSON(w, http.StatusServiceUnavailable, body)
	return nil
}

// whyNotReady names what fails.
func (s *server) whyNotReady(d dependencies) string {
	var bad []string
	for _, dep := range []struct{ name, state, good string }{
		{"nats", d.NATS, "connected"}, {"redis", d.Redis, "connected"}, {"grpc", d.GRPC, "serving"}, {"consumer", d.Consumer, "active"},
	} {
		switch {
		case dep.state == dep.good:
		case slices.Contains([]string{"consumer", "stream", "NATS"}, strings.SplitN(dep.state, " ", 2)[0]): // a sentence of its own
			bad = append(bad, dep.state)
		default:
			bad = append(bad, dep.name+" is "+dep.state)
		}
	}
	if s.draining.Err() != nil || len(bad) == 0 {
		bad = append([]string{"draining"}, bad...)
	}
	return strings.Join(bad, ", ")
}

func (s *server) metrics(w http.ResponseWriter, r *http.Request) *apiError {
	w.Header().Set("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
	s.m.write(w)
	return nil
}

// requestID is the one that the middleware chose.
func requestID(w http.ResponseWriter) string { return w.Header().Get("X-Request-ID") }

// apiKey is the header's, or else the query's.
func apiKey(r *http.Request) string {
	if k := r.Header.Get("X-API-Key"); k != "" {
		return k
	}
	return r.URL.Query().Get("x-api-key")
}

// bearerToken takes the first of query, Authorization and sub-protocol: a browser can set no header but the last.
func bearerToken(r *http.Request) string {
	if t := r.URL.Query().Get("token"); t != "" {
		return t
	}
	scheme, t, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if t = strings.TrimSpace(t); t != "" && strings.EqualFold(scheme, "Bearer") {
		return t
	}
	for _, line := range r.Header.Values("Sec-WebSocket-Protocol") {
		for p := range strings.SplitSeq(line, ",") {
			if t, ok := strings.CutPrefix(strings.TrimSpace(p), "bearer."); ok && t != "" {
				return t
			}
		}
	}
	return ""
}

func (s *server) refuseKey(tokenType string) *apiError {
	s.m.authFailureTotal.with(tokenType, "key").Inc()
	return invalidAPIKey()
}

func (s *server) userSocket(w http.ResponseWriter, r *http.Request) *apiError {
	return s.socket(w, r, func() (*claims, *apiError) {
		if !s.auth.socketKey(apiKey(r)) {
			return nil, s.refuseKey("user")
		}
		company, agent := r.PathValue("company"), r.PathValue("agent")
		if err := checkPair(company, agent); err != nil {
			return nil, badRequestID(err)
		}
		return s.auth.openUserFor(r.Context(), bearerToken(r), company, agent)
	})
}

func (s *server) adminSocket(w http.ResponseWriter, r *http.Request) *apiError {
	return s.socket(w, r, func() (*claims, *apiError) {
		if !s.auth.adminKey(apiKey(r)) {
			return nil, s.refuseKey("admin")
		}
		return s.auth.openAdmin(r.Context(), bearerToken(r))
	})
}

// socket checks everything that can be checked before the upgrade and hands the request to the hub. What is no upgrade,
// or comes from a foreign origin, is answered as HTTP; any later error reaches a page that asked for errors=close as the
// close code of a socket, since a page cannot read the status of a refused upgrade.
func (s *server) socket(w http.ResponseWriter, r *http.Request, authenticate func() (*claims, *apiError)) *apiError {
	if err := checkUpgrade(w, r); err != nil {
		return err
	}
	if err := s.checkOrigin(w, r); err != nil {
		return err
	}
	err := s.admit(w, r, authenticate)
	if err != nil && err.close != 0 && r.URL.Query().Get("errors") == "close" {
		s.hub.reject(w, r, s.noted(w, err))
		return nil
	}
	return err
}

// admit gives an authenticated upgrade its place and its session, and both to the hub.
func (s *server) admit(w http.ResponseWriter, r *http.Request, authenticate func() (*claims, *apiError)) *apiError {
	cl, apiErr := authenticate()
	if apiErr != nil {
		return apiErr
	}
	if _, err := parsePast(r.URL.Query()); err != nil {
		return err
	}
	if err := s.refusal(); err != nil {
		return err
	}
	if !s.hub.reserve() {
		return unavailable("no room for further sockets on this pod")
	}
	served, turned := false, false
	defer func() {
		if served {
			return
		}
		if turned {
			s.hub.endTurn()
		}
		s.hub.free()
	}()
	apiErr = s.turn(r.Context(), cl)
	// Both this and the old socket's end may take longer than an answer is usually given.
	http.NewResponseController(w).SetWriteDeadline(time.Now().Add(acquireTimeout + s.cfg.Load().ServerWriteTimeout))
	if apiErr != nil {
		return apiErr
	}
	turned = true
	sess, err := s.swap(cl.sessionKey(), cl.userType())
	if err != nil {
		return unavailable("session could not be acquired")
	}
	if sess.contested() { // the old socket's end may take a second: others are set up meanwhile
		s.hub.endTurn()
		turned = false
		sess.await()
		turned = s.hub.turn(context.Background())
	} else {
		sess.await()
	}
	served = true // from here on serve answers for place, turn and session, whatever happens
	s.hub.serve(w, r, cl, sess, requestID(w))
	return nil
}

// turn waits for the newcomer's turn to be set up, which is given back by hub.endTurn, and looks again at what may have changed
// meanwhile.
func (s *server) turn(ctx context.Context, cl *claims) *apiError {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.draining, cancel)()
	turned := s.hub.turn(ctx)
	err := s.refusal()
	switch {
	case err != nil:
	case !turned:
		err = unavailable("the wait for a turn was ended")
	case !time.Now().Before(cl.expires):
		s.m.authFailureTotal.with(cl.userType(), "expired").Inc()
		err = tokenExpired()
	}
	if turned && err != nil {
		s.hub.endTurn()
	}
	return err
}

// refusal is why this pod takes no sockets now: the conditions of /ready.
func (s *server) refusal() *apiError {
	if !s.available() {
		return unavailable("redis is away")
	}
	deps, ready := s.ready()
	switch {
	case deps["nats"] != "connected":
		return unavailable("nats is away")
	case s.draining.Err() != nil:
		return unavailable("this pod is draining")
	case !ready: // /ready says why: an operator's business
		return unavailable("this pod cannot deliver events now")
	}
	return nil
}

// httpLog takes net/http's own complaints. Handshakes that fail are a stranger's doing, and as many as strangers like.
type httpLog struct{}

func (httpLog) Write(b []byte) (int, error) {
	level, line := slog.LevelWarn, strings.TrimSpace(string(b))
	if strings.HasPrefix(line, "http: TLS handshake error") {
		level = slog.LevelDebug
	}
	slog.Log(context.Background(), level, "http server complains", "err", line)
	return len(b), nil
}

// serve answers on l until shutdown, which makes it return nil.
func (s *server) serve(l net.Listener) error {
	var err error
	if s.tls {
		if err = s.reloadTLS(); err != nil {
			return err
		}
		err = s.http.ServeTLS(l, "", "")
	} else {
		err = s.http.Serve(l)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve HTTP on %s: %w", l.Addr(), err)
}

// shutdown closes the listener and waits for the requests under way; what is left when ctx ends is cut off.
// Sockets are not its business: a hijacked connection is no request any more.
func (s *server) shutdown(ctx context.Context) error {
	if err := s.http.Shutdown(ctx); err != nil {
		s.http.Close()
		return fmt.Errorf("shut HTTP down: %w", err)
	}
	return nil
}

// reloadTLS reads the certificate and its key again; new handshakes use it. After an error the old one stays.
func (s *server) reloadTLS() error {
	c := s.cfg.Load()
	if on := c.ServerTLSCertFile != ""; on != s.tls {
		return errors.New("switching SERVER_TLS_CERT_FILE on or off needs a restart")
	}
	if !s.tls {
		return nil
	}
	cert, err := tls.LoadX509KeyPair(c.ServerTLSCertFile, c.ServerTLSKeyFile)
	if err != nil {
		return fmt.Errorf("load certificate %s: %w", c.ServerTLSCertFile, err)
	}
	s.cert.Store(&cert)
	return nil
}

func (s *server) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.cert.Load(), nil
}

// debugHandler serves net/http/pprof, for SERVER_DEBUG_ADDRESS alone.
func debugHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
