package main

import (
	"context"
	"embed"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"strings"
	"time"
)

//go:embed page
var files embed.FS

// minted is what the page needs to open a socket. The general API key stays here, as it would in a real back end: the
// page gets the public one, which opens user sockets and nothing else.
type minted struct {
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
	Key       string    `json:"key"`
	Socket    string    `json:"socket"` // ws://host:port of the service
}

// handler serves the page and stands in for the back end of a real one.
func (d *demo) handler() http.Handler {
	page, _ := fs.Sub(files, "page") // cannot fail: the path is valid
	mux := http.NewServeMux()
	mux.Handle("GET /", http.FileServerFS(page))
	mux.HandleFunc("GET /chats", func(w http.ResponseWriter, r *http.Request) { answer(w, d.book.rows()) })
	mux.HandleFunc("POST /token", d.serveToken)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", "default-src 'self'; img-src data:; connect-src 'self' ws://"+d.pod.HTTP)
		w.Header().Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // an error is the client's: it went away
}

// serveToken mints a token for the user named in the body. A real back end would know who is logged in.
func (d *demo) serveToken(w http.ResponseWriter, r *http.Request) {
	if r.Header.Get("Content-Type") != "application/json" { // keeps other sites' forms out
		http.Error(w, "want application/json", http.StatusUnsupportedMediaType)
		return
	}
	var who struct {
		User string `json:"user"`
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1024)).Decode(&who); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	ask, _ := json.Marshal(map[string]any{"company_id": company, "agent_id": agent, "user_id": who.User, "expires_in_seconds": 3600})
	token, err := d.mint(r.Context(), string(ask))
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	answer(w, token)
}

// mint asks the service for a token.
func (d *demo) mint(ctx context.Context, ask string) (minted, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, "POST", "http://"+d.pod.HTTP+"/generate-token", strings.NewReader(ask))
	if err != nil {
		return minted{}, err
	}
	req.Header.Set("X-API-Key", d.keys.general)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return minted{}, fmt.Errorf("mint a token: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err != nil {
		return minted{}, fmt.Errorf("mint a token: %w", err)
	}
	m := minted{Key: d.keys.public, Socket: "ws://" + d.pod.HTTP}
	if resp.StatusCode != http.StatusOK || json.Unmarshal(body, &m) != nil {
		return minted{}, fmt.Errorf("mint a token: %s %s", resp.Status, body)
	}
	return m, nil
}
