package main

import (
	"context"
	"time"

	"github.com/redis/go-redis/v9"
)

// claims is what a valid token says of its bearer.
type claims struct {
	company, agent, user string // of a user
	admin                string // of an admin; empty for a user
	// scopeCompany and scopeAgent are what an admin sees: the intersection of subscription and restriction, "*" = any.
	scopeCompany, scopeAgent string
	expires                  time.Time
}

// sessionKey names the session that the bearer needs.
func (c *claims) sessionKey() string {
	if c.admin != "" {
		return "admin:" + c.admin
	}
	return c.company + ":" + c.agent + ":" + c.user
}

// userType is the bounded label of metrics: user or admin.
func (c *claims) userType() string {
	if c.admin != "" {
		return "admin"
	}
	return "user"
}

type auth struct{}

func newAuth(cfg *settings, rdb redis.UniversalClient, m *Metrics) *auth { return nil }

// openUser and openAdmin open a token and check its expiry. Every error is an *apiError of code InvalidToken.
func (a *auth) openUser(ctx context.Context, token string) (*claims, *apiError)  { return nil, nil }
func (a *auth) openAdmin(ctx context.Context, token string) (*claims, *apiError) { return nil, nil }
