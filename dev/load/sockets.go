package main

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gorilla/websocket"

	"daisi-ws-service/dev/rig"
)

// agentID names the i-th agent.
func agentID(i int) string { return fmt.Sprintf("agent%05d", i) }

// mint makes a user's token offline, as another back end would.
func mint(agent string) string {
	key, _ := hex.DecodeString(tokenKey)
	block, _ := aes.NewCipher(key)
	aead, _ := cipher.NewGCMWithRandomNonce(block)
	plain, _ := json.Marshal(map[string]any{"company_id": "acme", "agent_id": agent, "user_id": "u", "expires_at": time.Now().Add(time.Hour)})
	return base64.RawURLEncoding.EncodeToString(aead.Seal(nil, nil, plain, nil))
}

// crowd is one socket per agent.
type crowd struct {
	conns    []*websocket.Conn
	received atomic.Int64
	gaps     []atomic.Bool // whether the i-th was told that it misses events
	deflate  atomic.Int64  // sockets that compress
	readers  sync.WaitGroup
}

// connect opens n sockets of agents, the i-th at the pod that at names, each read by a goroutine that hands every event to got.
func connect(ctx context.Context, n int, at func(i int) *rig.Service, got func(agent int, message []byte)) (*crowd, error) {
	return dialAll(ctx, n, func(i int) (string, http.Header) { return socketOf(at(i), agentID(i)) }, readReady, got)
}

// socketOf is where and how to dial for an agent's socket on pod. Its client keeps positions.
func socketOf(pod *rig.Service, agent string) (url string, header http.Header) {
	return fmt.Sprintf("ws://%s/ws/acme/%s?since=", pod.HTTP, agent), http.Header{"X-API-Key": {apiKey}, "Authorization": {"Bearer " + mint(agent)}}
}

func readReady(ws *websocket.Conn) error {
	if _, m, err := ws.ReadMessage(); err != nil || !bytes.Contains(m, []byte(`"ready"`)) {
		return fmt.Errorf("want ready, got %q, %v", m, err)
	}
	return nil
}

// dialAll opens n sockets, 64 at a time, where to says, each greeted and then read.
func dialAll(ctx context.Context, n int, to func(i int) (url string, header http.Header), greet func(*websocket.Conn) error, got func(i int, message []byte)) (*crowd, error) {
	c := &crowd{conns: make([]*websocket.Conn, n), gaps: make([]atomic.Bool, n)}
	var wg sync.WaitGroup
	errs := make(chan error, n)
	slots := make(chan struct{}, 64)
	dialer := websocket.Dialer{ReadBufferSize: 1024, WriteBufferSize: 256, EnableCompression: true, NetDialContext: (&net.Dialer{}).DialContext}
	for i := range n {
		slots <- struct{}{}
		wg.Go(func() {
			defer func() { <-slots }()
			url, header := to(i)
			ws, resp, err := dialer.DialContext(ctx, url, header)
			if err == nil {
				err = greet(ws)
			}
			if err != nil {
				errs <- fmt.Errorf("socket %d: %w", i, err)
				return
			}
			if resp.Header.Get("Sec-WebSocket-Extensions") != "" {
				c.deflate.Add(1)
			}
			c.conns[i] = ws
			c.readers.Go(func() { c.read(i, ws, got) })
		})
	}
	wg.Wait()
	select {
	case err := <-errs:
		c.close()
		return nil, err
	default:
		return c, nil
	}
}

func (c *crowd) read(i int, ws *websocket.Conn, got func(int, []byte)) {
	for {
		_, m, err := ws.ReadMessage()
		if err != nil {
			return
		}
		switch head := m[:min(len(m), 40)]; {
		case bytes.Contains(head, []byte(`"event"`)):
			c.received.Add(1)
			got(i, m)
		case bytes.Contains(head, []byte(`"gap"`)):
			c.gaps[i].Store(true)
		}
	}
}

func (c *crowd) close() {
	for _, ws := range c.conns {
		if ws != nil {
			ws.Close()
		}
	}
	c.readers.Wait()
}
