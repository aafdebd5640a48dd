package main

import (
	"context"
	"net/http"
	"sync"
)

// hub owns every socket of this pod, their shared writers and the ticker that looks after them.
type hub struct {
	cfg    *settings
	m      *Metrics
	owners *owners
	// streamSeq asks for a stream sequence not above the last one and at most 1 s old.
	streamSeq func(context.Context) (uint64, error)
	wg        sync.WaitGroup
}

func newHub(cfg *settings, m *Metrics, o *owners, streamSeq func(context.Context) (uint64, error)) *hub {
	return nil
}

// conn is one socket.
type conn struct {
	id string
}

// checkUpgrade refuses what is no well-formed WebSocket upgrade, before anything is hijacked; it sets
// Sec-WebSocket-Version on w where RFC 6455 section 4.4 asks for it.
func checkUpgrade(w http.ResponseWriter, r *http.Request) *apiError { return nil }

// checkOrigin allows an absent origin, the request's own host and the allowed globs.
func checkOrigin(cfg *Config, r *http.Request) *apiError { return nil }

// reject upgrades r only to close it at once with e's close code and reason (errors=close).
func (h *hub) reject(w http.ResponseWriter, r *http.Request, e *apiError) {}

// reserve takes one of the MAX_CONNECTIONS places, or says that there is none (or that the hub drains).
// Each place taken is given back by free or by the end of the socket that serve made.
func (h *hub) reserve() bool { return true }
func (h *hub) free()         {}

// serve upgrades r and runs the socket on a goroutine of its own; it returns once the connection is hijacked
// (or has failed). It owns sess and the place from reserve from here on and releases both, whatever happens.
func (h *hub) serve(w http.ResponseWriter, r *http.Request, cl *claims, sess *session, requestID string) {
}

// push queues d for this socket and settles it exactly once, now or later. Never blocks; any goroutine may call.
func (c *conn) push(d *delivery) {}

// gap tells the client that events after since may be missing; several calls before the writer's turn become one,
// with the lowest since. reason is buffer, shed, expired or owner.
func (c *conn) gap(since uint64, reason string) {}

// close ends the socket with a close frame; the first call wins. Never blocks; any goroutine may call.
func (c *conn) close(code int, reason string) {}

// info is what GET /admin/sessions shows.
func (h *hub) each(f func(*conn)) {}

// shedOldest makes the fullest ring of a stuck socket give up its oldest event (drop_oldest: dropped, block: shed).
// It says false when no stuck socket has one.
func (h *hub) shedOldest() bool { return false }

// stuck is the number of events that wait in rings of sockets that do not take them now.
func (h *hub) stuck() int { return 0 }

// stopAccepting makes reserve refuse from now on.
func (h *hub) stopAccepting() {}

// drain closes all sockets with 1001, evenly spread over DRAIN_SPREAD, and returns when all are gone or ctx ends.
func (h *hub) drain(ctx context.Context) error { return nil }
