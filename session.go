package main

import (
	"context"
	"errors"

	"github.com/redis/go-redis/v9"
)

var (
	errConflict    = errors.New("session is fought over by others")
	errUnavailable = errors.New("redis is away")
)

type sessions struct{}

// session is the exclusive right of one socket of this pod to be (company, agent, user), or an admin.
type session struct {
	key string // "<C>:<A>:<U>" or "admin:<ID>"
	id  string // names the socket; unique for ever
}

func newSessions(cfg *settings, rdb redis.UniversalClient, m *Metrics, o *owners) *sessions {
	return nil
}

// run serves the kill channel and renews the locks until ctx ends.
func (s *sessions) run(ctx context.Context) {}

// acquire takes the lock of key, by kill and take-over where it is held (docs/protocol.md). It returns errConflict
// when it is still fought over after 5 s and errUnavailable when Redis does not answer.
func (s *sessions) acquire(ctx context.Context, key, userType string) (*session, error) {
	return nil, nil
}

// bind tells whom to close when the session is lost or killed; if that happened before, kill is called at once.
// kill must not block.
func (s *session) bind(kill func(code int, reason string)) {}

// release queues the release of the lock, behind any renewal under way. It does not block; the first call counts.
func (s *session) release() {}
