package main

import (
	"cmp"
	"context"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	peerpb "daisi-ws-service/proto"
)

const (
	rosterPage    = 100 // sessions in an answer unless asked otherwise
	rosterLongest = 1000
	rosterWait    = 2 * time.Second // for a peer's answer
)

// roster shows and ends the live sessions of the whole cluster, for operators.
type roster struct {
	pod      string
	hub      *hub
	peers    *peers
	lease    *lease
	sessions *sessions
}

// rosterEntry is one live session as GET /admin/sessions shows it (docs/operations.md).
type rosterEntry struct {
	Key           string    `json:"key"`
	Pod           string    `json:"pod"`
	SessionID     string    `json:"session_id"`
	Since         time.Time `json:"since"`
	RemoteAddress string    `json:"remote_address"`
	SelectedChat  string    `json:"selected_chat,omitempty"`
	QueueLength   uint32    `json:"queue_length"`
}

// here lists this pod's sockets, in the order of their keys.
func (r *roster) here(ask *peerpb.List) *peerpb.Sessions {
	var found []*peerpb.Session
	r.hub.each(func(c *conn) {
		company, agent := c.claims.company, c.claims.agent
		if c.claims.admin != "" {
			company, agent = c.claims.scopeCompany, c.claims.scopeAgent
		}
		key := c.claims.sessionKey()
		if key <= ask.GetAfter() || ask.GetCompany() != "" && company != ask.GetCompany() || ask.GetAgent() != "" && agent != ask.GetAgent() {
			return
		}
		chat, queue := c.ring.look()
		found = append(found, &peerpb.Session{Key: key, Id: c.id, Since: c.since.UnixMilli(),
			RemoteAddress: c.nc.RemoteAddr().String(), SelectedChat: chat, QueueLength: uint32(queue)})
	})
	slices.SortFunc(found, func(a, b *peerpb.Session) int { return cmp.Compare(a.Key, b.Key) })
	return &peerpb.Sessions{Sessions: found[:min(len(found), int(ask.GetLimit()))]}
}

// gather asks every live pod and merges their answers. incomplete names the pods that did not answer in time.
func (r *roster) gather(ctx context.Context, ask *peerpb.List) (all []rosterEntry, incomplete []string) {
	ctx, cancel := context.WithTimeout(ctx, rosterWait)
	defer cancel()
	var mu sync.Mutex // guards all and incomplete
	add := func(pod string, answer *peerpb.Sessions, err error) {
		mu.Lock()
		defer mu.Unlock()
		if err != nil {
			incomplete = append(incomplete, pod)
		}
		for _, s := range answer.GetSessions() {
			all = append(all, rosterEntry{s.GetKey(), pod, s.GetId(), time.UnixMilli(s.GetSince()).UTC(), s.GetRemoteAddress(), s.GetSelectedChat(), s.GetQueueLength()})
		}
	}
	var wg sync.WaitGroup
	if err := r.lease.refresh(ctx); err != nil {
		slog.Debug("live pods not read anew", "err", err)
	}
	for _, o := range r.lease.peers() {
		wg.Go(func() {
			answer, err := r.peers.list(ctx, o.pod, o.addr, ask)
			add(o.pod, answer, err)
		})
	}
	add(r.pod, r.here(ask), nil)
	wg.Wait()
	slices.SortFunc(all, func(a, b rosterEntry) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), strings.Compare(a.Pod, b.Pod))
	})
	slices.Sort(incomplete)
	return all[:min(len(all), int(ask.GetLimit()))], incomplete
}

// listSessions answers GET /admin/sessions: a page in the order of keys; next, if there may be more, is what `after` takes.
func (s *server) listSessions(w http.ResponseWriter, r *http.Request) *apiError {
	if !s.auth.adminKey(apiKey(r)) {
		return s.refuseKey("admin")
	}
	q := r.URL.Query()
	limit := rosterPage
	if q.Has("limit") {
		n, err := strconv.Atoi(q.Get("limit"))
		if err != nil || n < 1 || n > rosterLongest {
			return badRequest("limit", "limit must be from 1 to "+strconv.Itoa(rosterLongest))
		}
		limit = n
	}
	all, incomplete := s.roster.gather(r.Context(), &peerpb.List{Company: q.Get("company"), Agent: q.Get("agent"), After: q.Get("after"), Limit: uint32(limit)})
	body := struct {
		Sessions   []rosterEntry `json:"sessions"`
		Next       string        `json:"next,omitempty"`
		Incomplete []string      `json:"incomplete,omitempty"`
	}{Sessions: all, Incomplete: incomplete}
	if all == nil {
		body.Sessions = []rosterEntry{} // a list, not null
	}
	if len(all) == limit {
		body.Next = all[limit-1].Key
	}
	writeJSON(w, http.StatusOK, body)
	return nil
}

// revokeSession answers DELETE /admin/sessions/{company}/{agent}/{user}.
func (s *server) revokeSession(w http.ResponseWriter, r *http.Request) *apiError {
	if !s.auth.adminKey(apiKey(r)) {
		return s.refuseKey("admin")
	}
	cl := claims{company: r.PathValue("company"), agent: r.PathValue("agent"), user: r.PathValue("user")}
	if err := (userToken{CompanyID: cl.company, AgentID: cl.agent, UserID: cl.user}).badID(); err != nil {
		return badRequestID(err)
	}
	found, err := s.roster.sessions.revoke(r.Context(), cl.sessionKey())
	switch {
	case err != nil:
		return unavailable(err.Error())
	case !found:
		return notFound()
	}
	writeJSON(w, http.StatusOK, struct {
		Revoked string `json:"revoked"`
	}{cl.sessionKey()})
	return nil
}
