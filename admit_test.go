package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// newAdmittingServer has a hub whose sockets are never served: swap never gives a session away.
func newAdmittingServer(swap func(key, userType string) (*session, error), change func(*Config)) *server {
	s := newTestServer(change)
	s.hub = newHub(s.cfg, s.m, nil, nil, s.auth)
	s.available = func() bool { return true }
	s.swap = swap
	return s
}

// crowded takes all turns, and gives them back after d.
func crowded(t *testing.T, s *server, d time.Duration) {
	for range setUpsAtOnce {
		s.hub.turn(t.Context())
	}
	time.AfterFunc(d, func() { // harmless if the test has ended
		for range setUpsAtOnce {
			s.hub.endTurn()
		}
	})
}

func refused(string, string) (*session, error) { return nil, errUnavailable }

const notAcquired = `{"code":"Unavailable","message":"session could not be acquired"}`

// dialUpgrade sends an upgrade over a connection of its own and returns the answer, what follows it, and the end of both.
func dialUpgrade(t *testing.T, addr net.Addr, target string, headers ...string) (*http.Response, *bufio.Reader) {
	t.Helper()
	return readUpgrade(t, sendUpgrade(t, addr, target, headers...))
}

// sendUpgrade is the first half of dialUpgrade.
func sendUpgrade(t *testing.T, addr net.Addr, target string, headers ...string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	lines := append([]string{"Host: " + addr.String()}, append(headers, upgradeHeaders...)...)
	fmt.Fprintf(conn, "GET %s HTTP/1.1\r\n%s\r\n\r\n", target, strings.Join(lines, "\r\n"))
	return conn
}

// readUpgrade is the second.
func readUpgrade(t *testing.T, conn net.Conn) (*http.Response, *bufio.Reader) {
	t.Helper()
	br := bufio.NewReader(conn)
	r, err := http.ReadResponse(br, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r, br
}

func TestAdmission(t *testing.T) {
	const target = "/ws/acme/a-1?x-api-key=general-1&token=" + userVector
	acquired := 0
	failing := func(err error) func(key, userType string) (*session, error) {
		return func(key, userType string) (*session, error) {
			acquired++
			if key != "acme:a-1:u@x" || userType != "user" {
				t.Errorf("asked for session %q of type %q", key, userType)
			}
			return nil, err
		}
	}
	for _, c := range []struct {
		name    string
		acquire error
		prepare func(*server)
		status  int
		body    string
		close   int
		asked   int // times that the session was asked for, over two attempts
	}{
		{"redis silent", errUnavailable, nil, 503, notAcquired, 1013, 2},
		{"redis away", nil, func(s *server) { s.available = func() bool { return false } }, 503, `{"code":"Unavailable","message":"redis is away"}`, 1013, 0},
		{"nats away", nil, func(s *server) {
			s.ready = func() (map[string]string, bool) { return map[string]string{"nats": "disconnected"}, false }
		}, 503, `{"code":"Unavailable","message":"nats is away"}`, 1013, 0},
		{"unready", nil, func(s *server) {
			s.ready = func() (map[string]string, bool) { return allWell, false }
		}, 503, `{"code":"Unavailable","message":"this pod cannot deliver events now"}`, 1013, 0},
		{"draining", nil, func(s *server) { s.startDrain() }, 503, `{"code":"Unavailable","message":"this pod is draining"}`, 1013, 0},
		{"hub refuses", nil, func(s *server) { s.hub.stopAccepting() }, 503, `{"code":"Unavailable","message":"no room for further sockets on this pod"}`, 1013, 0},
		{"full", nil, func(s *server) { s.hub.reserve() }, 503, `{"code":"Unavailable","message":"no room for further sockets on this pod"}`, 1013, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			// One place alone: the second attempt shows that the first has given it back.
			s := newAdmittingServer(failing(c.acquire), func(c *Config) { c.ServerMaxConnections = 1 })
			if c.prepare != nil {
				c.prepare(s)
			}
			addr := startServer(t, s)
			acquired = 0
			r, _ := dialUpgrade(t, addr, target)
			wantAnswer(t, r, c.status, c.body)
			if (c.status == 503) != (r.Header.Get("Retry-After") != "") {
				t.Errorf("Retry-After %q", r.Header.Get("Retry-After"))
			}
			r, br := dialUpgrade(t, addr, target+"&errors=close")
			wantClosed(t, r, br, c.close)
			if acquired != c.asked {
				t.Errorf("session asked for %d times, want %d", acquired, c.asked)
			}
		})
	}
}

// TestUpgradeOutwaitsTimeouts: an upgrade may wait for longer than a request may take to be read or answered. It holds its place
// meanwhile, and gives it back when it leaves or the pod drains.
func TestUpgradeOutwaitsTimeouts(t *testing.T) {
	const limit = 200 * time.Millisecond
	const target = "/ws/acme/a-1?x-api-key=general-1&token=" + userVector
	s := newAdmittingServer(refused, func(c *Config) {
		c.ServerReadTimeout, c.ServerWriteTimeout, c.ServerMaxConnections = limit, limit, 1
	})
	addr := startServer(t, s)
	waits := func(n int) {
		t.Helper()
		var waiting, places int
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
			s.hub.mu.Lock()
			places = s.hub.places
			s.hub.mu.Unlock()
			if waiting = int(s.m.upgradesWaiting.with().Get()); waiting == n && places == n {
				return
			}
		}
		t.Fatalf("%d wait, %d have a place, want %d", waiting, places, n)
	}
	begin := time.Now()
	crowded(t, s, 7*limit/2)
	r, _ := dialUpgrade(t, addr, target)
	wantAnswer(t, r, 503, notAcquired)
	if took := time.Since(begin); took < 3*limit {
		t.Fatalf("it waited for %v, no longer than the time-outs", took)
	}
	waits(0)

	crowded(t, s, time.Hour)
	leaver := sendUpgrade(t, addr, target)
	waits(1)
	leaver.Close()
	waits(0)

	drained := time.AfterFunc(3*limit, s.startDrain)
	defer drained.Stop()
	r, _ = dialUpgrade(t, addr, target)
	wantAnswer(t, r, 503, `{"code":"Unavailable","message":"this pod is draining"}`)
	waits(0)
}

// TestLookedAtAgain: what was good when an upgrade came is looked at once more after a long wait, before it takes a session from
// anybody.
func TestLookedAtAgain(t *testing.T) {
	const wait = 3 * time.Second // for a turn
	unavailable := func(why string) string { return `{"code":"Unavailable","message":"` + why + `"}` }
	for _, c := range []struct {
		name    string
		prepare func(s *server, gone func() bool) // gone: half of the wait is over
		status  int
		body    string
	}{
		{"nothing", nil, 503, notAcquired},
		{"the token expires", nil, 403, `{"code":"InvalidToken","message":"token has expired"}`},
		{"NATS goes", func(s *server, gone func() bool) {
			s.ready = func() (map[string]string, bool) {
				return map[string]string{"nats": map[bool]string{false: "connected", true: "disconnected"}[gone()]}, !gone()
			}
		}, 503, unavailable("nats is away")},
		{"Redis goes", func(s *server, gone func() bool) { s.available = func() bool { return !gone() } }, 503, unavailable("redis is away")},
		{"the pod drains", func(s *server, _ func() bool) { time.AfterFunc(wait/2, s.startDrain) }, 503, unavailable("this pod is draining")},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			asked := make(chan string, 10)
			begin, token := time.Now(), userVector
			s := newAdmittingServer(func(key, _ string) (*session, error) {
				asked <- key
				return nil, errUnavailable
			}, nil)
			if c.name == "the token expires" {
				var minted struct{ Token string }
				r := ask(s, "POST", "/generate-token", `{"company_id":"acme","agent_id":"a-1","user_id":"u@x","expires_in_seconds":1}`, "X-API-Key: general-1")
				if err := json.NewDecoder(r.Body).Decode(&minted); err != nil {
					t.Fatal(err)
				}
				token = minted.Token
			}
			crowded(t, s, wait)
			if c.prepare != nil {
				c.prepare(s, func() bool { return time.Since(begin) > wait/2 })
			}
			r, _ := dialUpgrade(t, startServer(t, s), "/ws/acme/a-1?x-api-key=general-1&token="+token)
			wantAnswer(t, r, c.status, c.body)
			if got, want := len(asked), map[bool]int{true: 1}[c.body == notAcquired]; got != want {
				t.Errorf("the session was asked for %d times, want %d", got, want)
			}
		})
	}
}

// wantClosed reads a finished handshake and the close frame that is all that follows it.
func wantClosed(t *testing.T, r *http.Response, br *bufio.Reader, code int) {
	t.Helper()
	if r.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status %d, want 101", r.StatusCode)
	}
	if !saneRequestID(r.Header.Get("X-Request-ID")) {
		t.Errorf("X-Request-ID %q", r.Header.Get("X-Request-ID"))
	}
	head := make([]byte, 4)
	if _, err := io.ReadFull(br, head); err != nil {
		t.Fatal(err)
	}
	if got := int(binary.BigEndian.Uint16(head[2:])); head[0] != 0x88 || got != code {
		t.Fatalf("frame % x closes with %d, want %d", head, got, code)
	}
	rest, err := io.ReadAll(br)
	if err != nil || len(rest) != int(head[1])-2 {
		t.Fatalf("close frame of %d bytes ends in %q, %v", head[1], rest, err)
	}
}

func TestErrorsClose(t *testing.T) {
	s := newAdmittingServer(refused, nil)
	addr := startServer(t, s)
	for _, c := range []struct {
		target  string
		headers []string
		code    int // 0: answered by HTTP with status
		status  int
	}{
		{"/ws/acme/a-1?errors=close", nil, 4401, 0},
		{"/ws/acme/a-1?errors=close&x-api-key=general-1", nil, 4403, 0},
		{"/ws/acme/a-2?errors=close&x-api-key=general-1&token=" + userVector, nil, 4403, 0},
		{"/ws/acme/a.1?errors=close&x-api-key=general-1&token=" + userVector, nil, 4400, 0},
		{"/ws/acme/a-1?errors=close&since=x&x-api-key=general-1&token=" + userVector, nil, 4400, 0},
		{"/ws/acme/a-1?errors=close", []string{"Origin: http://" + addr.String()}, 4401, 0},
		{"/ws/acme/a-1?errors=close", []string{"Origin: https://elsewhere.example"}, 0, 403},
		{"/ws/acme/a-1?errors=close", []string{"Sec-WebSocket-Protocol: other.v1"}, 0, 400},
		{"/ws/acme/a-1?errors=http", nil, 0, 401},
		{"/ws/acme?errors=close", nil, 0, 404},
	} {
		r, br := dialUpgrade(t, addr, c.target, c.headers...)
		if c.code != 0 {
			wantClosed(t, r, br, c.code)
		} else if r.StatusCode != c.status || r.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d, want %d", c.target, r.StatusCode, c.status)
		}
	}
	plain := ask(s, "GET", "/ws/acme/a-1?errors=close", "")
	if plain.StatusCode != 426 || plain.Header.Get("Sec-WebSocket-Version") != "13" {
		t.Errorf("no upgrade: %d, %s", plain.StatusCode, plain.Header)
	}
}

func TestPanicGivesThePlaceBack(t *testing.T) {
	captureLog(t)
	s := newAdmittingServer(func(string, string) (*session, error) { panic("boom") }, func(c *Config) { c.ServerMaxConnections = 1 })
	addr := startServer(t, s)
	for range 2 {
		r, _ := dialUpgrade(t, addr, "/ws/acme/a-1?x-api-key=general-1&token="+userVector)
		wantAnswer(t, r, 500, `{"code":"InternalServerError","message":"internal error"}`)
	}
}
