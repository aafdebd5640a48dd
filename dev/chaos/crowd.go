package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"sync"
	"time"
)

// crowd is all clients of a run.
type crowd struct {
	list     []*client
	agents   int // agent-0 to agent-(n-1) have users
	stopping chan struct{}
	once     sync.Once
	wg       sync.WaitGroup
}

// newCrowd makes clients: three users for every two agents, so that events have one or two owners on one or two pods; every
// second has a chat selected; every fourth can be made slow; two admins, one of whom sees a single agent.
func newCrowd(w *world, p plan) *crowd {
	cr := &crowd{agents: max(p.clients*2/3, 1), stopping: make(chan struct{})}
	for i := range p.clients {
		agent := fmt.Sprintf("agent-%d", i%cr.agents)
		c := &client{name: fmt.Sprintf("user-%d", i), agent: agent, slow: i%4 == 0}
		if i%2 == 0 {
			c.chat = fmt.Sprintf("chat-%d", i%chats)
		}
		c.token = seal(tokenKey, map[string]any{"company_id": "acme", "agent_id": agent, "user_id": c.name, "expires_at": time.Now().Add(time.Hour)})
		cr.add(w, c)
	}
	for i, scope := range []string{"", "agent-0"} {
		c := &client{name: fmt.Sprintf("admin-%d", i), admin: true, agent: scope}
		c.token = seal(adminKey, map[string]any{"admin_id": c.name, "subscribed_company_id": "acme", "subscribed_agent_id": scope,
			"expires_at": time.Now().Add(time.Hour)})
		cr.add(w, c)
	}
	return cr
}

// chats is how many chats an agent has.
const chats = 4

func (cr *crowd) add(w *world, c *client) {
	c.w, c.stopping = w, cr.stopping
	c.ready, c.chosen, c.got = make(chan struct{}), make(chan struct{}), map[uint64]arrival{}
	c.had, c.applied = map[uint64]bool{}, map[uint64]bool{}
	cr.list = append(cr.list, c)
	cr.wg.Go(c.run)
}

// allReady waits until each client is ready and has its chat.
func (cr *crowd) allReady(ctx context.Context, within time.Duration) error {
	late := time.After(within)
	for _, c := range cr.list {
		steps := []chan struct{}{c.ready}
		if c.chat != "" {
			steps = append(steps, c.chosen)
		}
		for _, step := range steps {
			select {
			case <-step:
			case <-late:
				return fmt.Errorf("%s was not ready within %s: %v", c.name, within, c.journal)
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}
	return nil
}

// on are the clients whose socket is at that pod.
func (cr *crowd) on(pod int) (list []*client) {
	for _, c := range cr.list {
		c.mu.Lock()
		if c.ws != nil && c.pod == pod {
			list = append(list, c)
		}
		c.mu.Unlock()
	}
	return list
}

// stop ends all clients and waits for them.
func (cr *crowd) stop() {
	cr.once.Do(func() { close(cr.stopping) })
	done := make(chan struct{})
	go func() {
		cr.wg.Wait()
		close(done)
	}()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		for _, c := range cr.list {
			c.end() // again and again: one may just have connected
		}
		select {
		case <-done:
			return
		case <-tick.C:
		}
	}
}

// seal makes a token as docs/tokens.md tells other back ends to.
func seal(keyHex string, claims map[string]any) string {
	key, _ := hex.DecodeString(keyHex)
	block, _ := aes.NewCipher(key)
	aead, _ := cipher.NewGCMWithRandomNonce(block)
	plain, _ := json.Marshal(claims)
	return base64.RawURLEncoding.EncodeToString(aead.Seal(nil, nil, plain, nil))
}
