package main

import (
	"bufio"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"golang.org/x/net/websocket"
)

const (
	lingerTime  = 2 * time.Second // from a close until the connection is cut
	maxRejects  = 256             // sockets upgraded only to be closed, at once
	subprotocol = "json.v1"
)

// checkUpgrade refuses what is no well-formed WebSocket upgrade, before anything is hijacked; it sets
// Sec-WebSocket-Version on w where RFC 6455 section 4.4 asks for it.
func checkUpgrade(w http.ResponseWriter, r *http.Request) *apiError {
	switch {
	case r.Method != http.MethodGet:
		w.Header().Set("Allow", http.MethodGet)
		return methodNotAllowed()
	case !r.ProtoAtLeast(1, 1):
		return badRequest("", "a WebSocket needs HTTP/1.1")
	case r.ProtoMajor != 1, !hasToken(r.Header, "Connection", "upgrade"), !hasToken(r.Header, "Upgrade", "websocket"):
		return needUpgrade(w, "this is a WebSocket endpoint: Connection: Upgrade, Upgrade: websocket")
	case len(r.Header.Values("Sec-Websocket-Version")) != 1 || r.Header.Get("Sec-Websocket-Version") != "13":
		return needUpgrade(w, "Sec-WebSocket-Version must be 13")
	case r.ContentLength != 0:
		return badRequest("", "a WebSocket upgrade has no body")
	}
	keys := r.Header.Values("Sec-Websocket-Key")
	if len(keys) != 1 {
		return badRequest("", "there must be one Sec-WebSocket-Key")
	}
	if key, err := base64.StdEncoding.DecodeString(keys[0]); err != nil || len(key) != 16 {
		return badRequest("", "Sec-WebSocket-Key must be 16 bytes in base64")
	}
	if offers := headerTokens(r.Header, "Sec-Websocket-Protocol"); len(offers) > 0 && !acceptable(offers) {
		return badRequest("", "the only sub-protocol is "+subprotocol)
	}
	return nil
}

// needUpgrade names what the client should have asked for (RFC 9110 section 15.5.22, RFC 6455 section 4.4).
func needUpgrade(w http.ResponseWriter, message string) *apiError {
	w.Header().Set("Upgrade", "websocket")
	w.Header().Set("Connection", "Upgrade")
	w.Header().Set("Sec-WebSocket-Version", "13")
	return upgradeRequired(message)
}

// acceptable says whether one of the offered sub-protocols is ours. A token in disguise is no offer.
func acceptable(offers []string) bool {
	foreign := false
	for _, o := range offers {
		if o == subprotocol {
			return true
		}
		foreign = foreign || !strings.HasPrefix(o, "bearer.")
	}
	return !foreign
}

// headerTokens splits a header's comma-separated list, which may go over several lines (RFC 9110 section 5.3).
func headerTokens(h http.Header, name string) []string {
	var all []string
	for _, line := range h.Values(name) {
		for t := range strings.SplitSeq(line, ",") {
			if t = strings.Trim(t, " \t"); t != "" {
				all = append(all, t)
			}
		}
	}
	return all
}

func hasToken(h http.Header, name, want string) bool {
	for _, t := range headerTokens(h, name) {
		if strings.EqualFold(t, want) {
			return true
		}
	}
	return false
}

// upgrade is a connection taken over from net/http, with what the handshake still needs of its request. Nothing else of
// the request is kept: inside its handler an idle socket costs twice as much.
type upgrade struct {
	nc    net.Conn
	early []byte // sent right behind the request; net/http had read it already
	key   string
	named bool // the client offered our sub-protocol

	extensions string // the answer to what it offered: compression, or nothing
	requestID  string // told in the answer, as in every other
}

// takeOver hijacks a request that checkUpgrade has found well.
func takeOver(w http.ResponseWriter, r *http.Request) (*upgrade, error) {
	u := &upgrade{key: strings.Clone(r.Header.Get("Sec-Websocket-Key")), requestID: strings.Clone(requestID(w))}
	for _, o := range headerTokens(r.Header, "Sec-Websocket-Protocol") {
		u.named = u.named || o == subprotocol
	}
	nc, rw, err := http.NewResponseController(w).Hijack()
	if err != nil {
		return nil, fmt.Errorf("take the connection over from net/http: %w", err)
	}
	early, err := rw.Reader.Peek(rw.Reader.Buffered())
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("take over what net/http had read: %w", err)
	}
	u.nc, u.early = nc, append([]byte(nil), early...)
	return u, nil
}

// hijacked stands in for the ResponseWriter of a request that was hijacked before.
type hijacked struct {
	http.ResponseWriter // nil: the package calls nothing but Hijack
	nc                  net.Conn
	rw                  *bufio.ReadWriter
}

func (h *hijacked) Hijack() (net.Conn, *bufio.ReadWriter, error) { return keptOpen{h.nc}, h.rw, nil }

// keptOpen withstands the package, which closes what it hijacked when its handler returns, here at once.
type keptOpen struct{ net.Conn }

func (keptOpen) Close() error { return nil }

var handshakeURL = &url.URL{Path: "/"}

// shake has x/net/websocket answer a handshake, on a request made up of what it looks at. The Server is new for each,
// since the package writes into it; header goes into the answer. The Conn that comes back reads frames from br and is used for nothing else.
func shake(nc net.Conn, br *bufio.Reader, key string, named bool, header http.Header) (*websocket.Conn, error) {
	r := &http.Request{Method: http.MethodGet, URL: handshakeURL, Host: "x", Header: http.Header{
		"Upgrade":               {"websocket"},
		"Connection":            {"Upgrade"},
		"Sec-Websocket-Key":     {key},
		"Sec-Websocket-Version": {"13"},
	}}
	if named {
		r.Header["Sec-Websocket-Protocol"] = []string{subprotocol}
	}
	var ws *websocket.Conn
	server := websocket.Server{
		Handshake: func(c *websocket.Config, _ *http.Request) error {
			c.Header = header
			return nil
		},
		Handler: func(c *websocket.Conn) { ws = c },
	}
	rw := bufio.NewReadWriter(br, bufio.NewWriterSize(nc, 512)) // one segment
	server.ServeHTTP(&hijacked{nc: nc, rw: rw}, r)
	if ws == nil {
		return nil, errors.New("write the handshake's answer")
	}
	return ws, nil
}

// shake answers the handshake of u.
func (u *upgrade) shake(timeout time.Duration) error {
	u.nc.SetWriteDeadline(time.Now().Add(timeout))
	defer u.nc.SetWriteDeadline(time.Time{})
	header := http.Header{"X-Request-Id": {u.requestID}}
	if u.extensions != "" {
		header["Sec-WebSocket-Extensions"] = []string{u.extensions} // spelt as RFC 6455 does
	}
	_, err := shake(u.nc, nil, u.key, u.named, header)
	return err
}

// reject upgrades r only to close it at once with e's close code and reason (errors=close). Above a bounded number of
// such sockets, and for errors without a close code, it answers by HTTP.
func (h *hub) reject(w http.ResponseWriter, r *http.Request, e *apiError) {
	if e.close == 0 || !h.startReject() {
		writeError(w, e)
		return
	}
	u, err := takeOver(w, r)
	if err != nil {
		h.endReject()
		return
	}
	go func() { // counted by startReject
		defer h.endReject()
		defer u.nc.Close()
		if err := u.shake(lingerTime); err != nil {
			return
		}
		h.m.closesTotal.with(fmt.Sprint(e.close)).Inc()
		u.nc.SetDeadline(time.Now().Add(lingerTime))
		u.nc.Write(closeFrame(e.close, e.reason))
		if half, ok := u.nc.(interface{ CloseWrite() error }); ok {
			half.CloseWrite()
		}
		io.Copy(io.Discard, struct{ io.Reader }{u.nc})
	}()
}
