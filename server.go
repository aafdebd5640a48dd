package main

import "net/http"

// apiError is an answer of the error table (docs/protocol.md): to HTTP by its status, to a socket by its close code.
type apiError struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Details any    `json:"details,omitempty"`

	status int    // HTTP
	close  int    // WebSocket close code; 0 = never upgraded
	reason string // of the close frame
}

func (e *apiError) Error() string { return e.Code + ": " + e.Message }

type server struct{}

// readiness is asked by /ready; each answer is "" or what is wrong.
type readiness struct {
	nats, redis, grpc, consumer func() string // e.g. "connected", "serving", "active"; ok says whether good
}

func newServer(cfg *settings, m *Metrics, a *auth, s *sessions, o *owners, h *hub, ready func() (map[string]string, bool)) *server {
	return nil
}

func (s *server) handler() http.Handler { return nil }
