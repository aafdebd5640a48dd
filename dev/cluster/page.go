package main

import (
	"context"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"daisi-ws-service/dev/rig"
)

//go:embed page
var files embed.FS

// minted is what the page needs to open a socket. The general API key stays here, as it would in a real back end: the
// page gets the public one, which opens user sockets and nothing else.
type minted struct {
	Token     string    `json:"token"`
	ExpiresAt time.Time `json:"expires_at"`
	Key       string    `json:"key"`
}

// handler is all behind the one address: the pods' own paths, the page, and what stands in for the back end of a real one.
func (d *demo) handler() http.Handler {
	page, _ := fs.Sub(files, "page") // cannot fail: the path is valid
	mux := http.NewServeMux()
	balancer := rig.NewBalancer(d.pods.ready)
	for _, path := range []string{"/ws/", "/generate-token", "/admin/", "/health", "/ready", "/metrics"} {
		mux.Handle(path, balancer)
	}
	mux.Handle("/", http.FileServerFS(page))
	mux.HandleFunc("/chats", func(w http.ResponseWriter, r *http.Request) { answer(w, d.book.rows()) })
	mux.HandleFunc("/messages", func(w http.ResponseWriter, r *http.Request) { answer(w, d.book.last(r.FormValue("chat"))) })
	mux.HandleFunc("/token", d.serveToken)
	mux.HandleFunc("/pods", d.pods.serve)
	mux.HandleFunc("/serving", d.serveServing)
	mux.HandleFunc("/end", d.serveEnd)
	_, port, _ := net.SplitHostPort(d.page.Addr().String())
	policy := fmt.Sprintf("default-src 'self'; img-src data:; connect-src 'self' ws://127.0.0.1:%s ws://localhost:%s", port, port)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Cache-Control", "no-store")
		mux.ServeHTTP(w, r)
	})
}

func answer(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // an error is the client's: it went away
}

// posted decodes the JSON that a page of ours has posted into v, or refuses the request. The content type keeps other
// sites' forms out. A user name that is far too long still gets to the service, which refuses it.
func posted(w http.ResponseWriter, r *http.Request, v any) bool {
	if r.Method != http.MethodPost || r.Header.Get("Content-Type") != "application/json" {
		http.Error(w, "want a POST of application/json", http.StatusUnsupportedMediaType)
		return false
	}
	if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, 32<<10)).Decode(v); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return false
	}
	return true
}

// serveToken mints a token for the user named in the body. A real back end would know who is logged in.
func (d *demo) serveToken(w http.ResponseWriter, r *http.Request) {
	var who struct {
		User string `json:"user"`
	}
	if !posted(w, r, &who) {
		return
	}
	ask, _ := json.Marshal(map[string]any{"company_id": company, "agent_id": agent, "user_id": who.User, "expires_in_seconds": 3600})
	token, err := d.mint(r.Context(), string(ask))
	if errors.Is(err, errBadRequest) { // with another status the browser would print an error of its own
		answer(w, map[string]string{"refused": "Choose another user name: this one is empty, too long or has unusual characters"})
		return
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	answer(w, token)
}

// serveEnd ends a pod: drained, or as a crash does. The fleet starts it again.
func (d *demo) serveEnd(w http.ResponseWriter, r *http.Request) {
	var what struct {
		Pod  string `json:"pod"`
		Kill bool   `json:"kill"`
	}
	if !posted(w, r, &what) {
		return
	}
	sig := syscall.SIGTERM
	if what.Kill {
		sig = syscall.SIGKILL
	}
	if err := d.pods.end(what.Pod, sig); err != nil {
		http.Error(w, err.Error(), http.StatusConflict)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// serveServing answers which pod has the socket of a session. It asks as an operator would, with the admin key, which
// no page may have.
func (d *demo) serveServing(w http.ResponseWriter, r *http.Request) {
	var list struct {
		Sessions []struct {
			Pod       string `json:"pod"`
			SessionID string `json:"session_id"`
		} `json:"sessions"`
	}
	path := fmt.Sprintf("/admin/sessions?company=%s&agent=%s&limit=1000", company, agent)
	if err := d.ask(r.Context(), "GET", path, d.keys.admin, "", &list); err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	found := ""
	for _, s := range list.Sessions {
		if s.SessionID == r.FormValue("session") {
			found = s.Pod
		}
	}
	answer(w, map[string]string{"pod": found})
}

// mint asks the service for a token.
func (d *demo) mint(ctx context.Context, ask string) (minted, error) {
	m := minted{Key: d.keys.public}
	return m, d.ask(ctx, "POST", "/generate-token", d.keys.general, ask, &m)
}

var errBadRequest = errors.New("400 Bad Request")

// ask sends a request to some pod and decodes its answer into v.
func (d *demo) ask(ctx context.Context, method, path, key, body string, v any) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, method, "http://"+d.page.Addr().String()+path, strings.NewReader(body))
	if err != nil {
		return err
	}
	req.Header.Set("X-API-Key", key)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err // names method and address
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if resp.StatusCode == http.StatusBadRequest {
		return fmt.Errorf("%s %s: %w %s", method, path, errBadRequest, text)
	}
	if err == nil && (resp.StatusCode != http.StatusOK || json.Unmarshal(text, v) != nil) {
		err = fmt.Errorf("%s %s: %s %s", method, path, resp.Status, text)
	}
	return err
}
