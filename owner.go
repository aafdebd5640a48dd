package main

import (
	"context"

	"github.com/redis/go-redis/v9"
)

// routeKind is what a route is about.
type routeKind uint8

const (
	routeGeneral  routeKind = iota // chats and contacts of (company, agent)
	routeMessages                  // messages of one chat of (company, agent)
	routeAgents                    // agents events; company and agent may be "*"
)

// route is what a pod claims: comparable, so that it can be a map's key.
type route struct {
	kind                 routeKind
	company, agent, chat string
}

// key is the Redis key of the set of the route's owners.
func (r route) key() string {
	base := "route:" + r.company + ":" + r.agent
	switch r.kind {
	case routeGeneral:
		return base + ":general"
	case routeMessages:
		return base + ":messages:" + r.chat
	default:
		return base + ":agents"
	}
}

type owners struct {
}

func newRedis(cfg *Config) (redis.UniversalClient, error) { return nil, nil }

func newOwners(cfg *settings, rdb redis.UniversalClient, m *Metrics) *owners { return nil }

// available says whether Redis answers and the lease is known to hold: else no new sockets (503).
func (o *owners) available() bool { return true }

// podID and epoch name this pod's lease; epoch changes when the lease was lost.
func (o *owners) podID() string { return "" }
func (o *owners) epoch() string { return "" }

// holds says whether the lease of pod, read at most one renewal ago (read anew when unknown), has this epoch.
func (o *owners) holds(ctx context.Context, pod, epoch string) (bool, error) { return false, nil }

// onEpoch registers f to be called, with the old and new epoch, after this pod had to take a new epoch; before main starts.
func (o *owners) onEpoch(f func(old, new string)) {}

// attach makes c a target of r's events: into the local index first, then claim and log entry in Redis. It returns
// when both were answered (events published from now on reach c), or with an error, c being detached again.
func (o *owners) attach(ctx context.Context, c *conn, r route) error { return nil }

// detach takes c out of the index and queues the release of r if c was its last socket here. It does not block.
func (o *owners) detach(c *conn, r route) {}

// confirm returns at once while the lease was renewed less than its length ago. Else (the process was suspended)
// it renews lease and, through onConfirm, the session locks before it returns; it gives up after 1 s without an answer.
func (o *owners) confirm() {}
