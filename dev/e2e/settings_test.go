package e2e

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// findLine waits for a line of the pod's log that holds all of these words.
func findLine(p *harness.Pod, words ...string) string {
	p.W.T.Helper()
	line, err := p.Log.Find(harness.Within(p.W.T, harness.Patience), func(line string) bool { return holds(line, words...) })
	if err != nil {
		p.W.T.Fatalf("no line with %q: %v", words, err)
	}
	return line
}

func holds(text string, words ...string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}

// ping sends n pings and returns the types of the answers, in order; fewer when the socket is closed.
func ping(c *harness.Client, n int) (answers []string) {
	c.Pod.W.T.Helper()
	for range n {
		if err := c.TrySend(true, []byte(`{"type":"ping"}`)); err != nil {
			return answers
		}
	}
	for range n {
		m, err := c.TryTake(harness.Within(c.Pod.W.T, harness.Patience), func(m harness.Message) bool { return m.Type != "event" })
		if err != nil {
			return answers
		}
		answers = append(answers, m.Type)
	}
	return answers
}

// TestReloadLive: SIGHUP puts the live settings of the file in force at once, on open sockets too, and back.
func TestReloadLive(t *testing.T) {
	t.Parallel()
	conf := filepath.Join(t.TempDir(), "conf")
	first := []string{"DAISI_WS_SERVER_MAX_CONNECTIONS=1", "DAISI_WS_LOG_LEVEL=info"}
	writeFile(t, conf, first...)
	p := harness.New(t).Start("-config=" + conf)
	ann, ben := harness.User("acme", "desk1", "ann"), harness.User("acme", "desk2", "ben").Origin("https://chat.example.com")
	c := p.Connect(ann)
	if got := strings.Join(ping(c, 10), " "); got != strings.TrimSpace(strings.Repeat("pong ", 10)) {
		t.Errorf("10 pings within the rate: %s", got)
	}
	p.WantRefused(ben, 403, "OriginNotAllowed")

	writeFile(t, conf, "DAISI_WS_SERVER_MAX_CONNECTIONS=2", "DAISI_WS_LOG_LEVEL=debug", "DAISI_WS_WEBSOCKET_RATE_LIMIT=0.01/s",
		"DAISI_WS_WEBSOCKET_RATE_BURST=3", "DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS=*.example.com")
	reload(p, "success")
	line := findLine(p, `"msg":"settings reloaded"`)
	if !holds(line, `"changed":["DAISI_WS_SERVER_MAX_CONNECTIONS","DAISI_WS_LOG_LEVEL","DAISI_WS_WEBSOCKET_RATE_LIMIT","DAISI_WS_WEBSOCKET_RATE_BURST","DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS"]`, `"need_restart":null`) {
		t.Errorf("the reload is logged as %s", line)
	}
	p.Connect(ben).WantNothingElse()
	// A bucket that holds three, refilled at 0.01/s; three times the burst refused is too much.
	if got := strings.Join(ping(c, 7), " "); got != "pong pong pong error error error error" {
		t.Errorf("7 pings, 3 allowed: %s", got)
	}
	c.WantNothingElse()
	ping(c, 5)
	c.WantClose(4429, "rate-limit-exceeded")
	if holds(p.Log.Text(), `"msg":"request"`, `"path":"/ws/acme/desk1"`) || !holds(p.Log.Text(), `"msg":"request"`, `"path":"/ws/acme/desk2"`) {
		t.Error("the first socket's request, at level info, is logged, or the second's, at level debug, is not")
	}

	writeFile(t, conf, first...)
	reload(p, "success")
	p.WantRefused(ben, 403, "OriginNotAllowed")
	p.WantRefused(ann, 503, "Unavailable")
}

// TestReloadFaulty: a file with a fault changes nothing, not even what is good in it, and the log names each fault.
func TestReloadFaulty(t *testing.T) {
	t.Parallel()
	conf, key := filepath.Join(t.TempDir(), "conf"), filepath.Join(t.TempDir(), "key")
	const good = "DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS=*.example.com"
	const secret = "hush-hush-hush"
	writeFile(t, conf, good)
	writeFile(t, key, harness.TokenKey)
	p := harness.New(t).Start("-config="+conf, "AUTH_TOKEN_AES_KEY=", "AUTH_TOKEN_AES_KEY_FILE="+key)
	page := harness.User("acme", "desk1", "ann").Origin("https://chat.example.com")
	c := p.Connect(page)
	const more = "DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS=*.example.org"
	for _, test := range []struct {
		lines, key string
		faults     []string
	}{
		{"DAISI_WS_LOG_LEVEL=loud", harness.TokenKey, []string{conf + `:2: DAISI_WS_LOG_LEVEL: \"loud\" is none of debug, info, warn, error`}},
		{"DAISI_WS_NO_SUCH=1\nDAISI_WS_WEBSOCKET_RATE_LIMIT=20\nnonsense", harness.TokenKey,
			[]string{conf + ":2: DAISI_WS_NO_SUCH: unknown setting", conf + `:3: DAISI_WS_WEBSOCKET_RATE_LIMIT: \"20\" is not a rate`, conf + ":4: not of the form KEY=VALUE"}},
		{"DAISI_WS_SESSION_REFRESH_INTERVAL=20s", harness.TokenKey, []string{"DAISI_WS_SESSION_REFRESH_INTERVAL (20s) must be less than half of DAISI_WS_SESSION_TTL (30s)"}},
		// Good together, but one of them waits for a restart.
		{"DAISI_WS_SERVER_DRAIN_SPREAD=20s\nDAISI_WS_SERVER_SHUTDOWN_TIMEOUT=60s", harness.TokenKey,
			[]string{"with the settings that need a restart", "DAISI_WS_SERVER_DRAIN_SPREAD (20s)", "DAISI_WS_SERVER_SHUTDOWN_TIMEOUT (30s)"}},
		{"", secret, []string{"DAISI_WS_AUTH_TOKEN_AES_KEY_FILE: a key has 64 hex digits; this one has 14 characters"}},
	} {
		writeFile(t, conf, more, test.lines)
		writeFile(t, key, test.key)
		reload(p, "failure")
		findLine(p, append(test.faults, `"level":"ERROR"`, `"msg":"settings not reloaded, those before stay in force"`)...)
		p.WantRefused(page.Origin("https://chat.example.org"), 403, "OriginNotAllowed")
		c.WantNothingElse()
	}
	if err := os.Remove(conf); err != nil {
		t.Fatal(err)
	}
	reload(p, "failure")
	findLine(p, "settings file: open "+conf)
	writeFile(t, key, harness.TokenKey)
	writeFile(t, conf, more)
	reload(p, "success")
	p.Connect(page.Origin("https://chat.example.org")).WantNothingElse()
	if strings.Contains(p.Log.Text(), secret) {
		t.Error("the faulty secret is in the log")
	}
}

// TestReloadNeedsRestart: what cannot change in a running process is named, keeps its value, and takes it at the restart.
func TestReloadNeedsRestart(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	conf := filepath.Join(t.TempDir(), "conf")
	writeFile(t, conf, "DAISI_WS_WEBSOCKET_BUFFER_SIZE=32")
	p := w.Start("-config=" + conf)
	d := harness.User("acme", "desk1", "ann")
	capacity := func(p *harness.Pod, want float64) {
		t.Helper()
		p.WaitMetric(func(v float64) bool { return v == want }, "dws_websocket_buffer_capacity")
	}
	p.Connect(d)
	capacity(p, 32)
	writeFile(t, conf, "DAISI_WS_WEBSOCKET_BUFFER_SIZE=64", "DAISI_WS_SERVER_IDLE_TIMEOUT=5s", "DAISI_WS_LOG_LEVEL=debug")
	reload(p, "success")
	findLine(p, `"msg":"settings reloaded"`, `"changed":["DAISI_WS_LOG_LEVEL"]`, `"need_restart":["DAISI_WS_SERVER_IDLE_TIMEOUT","DAISI_WS_WEBSOCKET_BUFFER_SIZE"]`)
	d.User = "ben"
	p.Connect(d)
	capacity(p, 64) // two of 32
	p.Terminate()
	p.WantExit(0, harness.Patience)
	p = w.Start("-config=" + conf)
	p.Connect(d)
	capacity(p, 64) // one of 64
}

// trusting is the configuration of a client that trusts this authority alone.
func trusting(t *testing.T, ca *rig.CA) *tls.Config {
	t.Helper()
	text, err := os.ReadFile(ca.File)
	pool := x509.NewCertPool()
	if err != nil || !pool.AppendCertsFromPEM(text) {
		t.Fatalf("read %s: %v", ca.File, err)
	}
	return &tls.Config{RootCAs: pool}
}

// serial is the number of the certificate that the pod shows now.
func serial(p *harness.Pod) string {
	p.W.T.Helper()
	c, err := tls.Dial("tcp", p.HTTP, p.TLS)
	if err != nil {
		p.W.T.Fatal(err)
	}
	defer c.Close()
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

// TestServerTLS: wss with both libraries, a renewed certificate by SIGHUP under an open socket, a faulty one refused.
func TestServerTLS(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	ca := w.CA("ca")
	cert, key := w.Issue(ca, "pod")
	p := w.Launch("SERVER_TLS_CERT_FILE="+cert, "SERVER_TLS_KEY_FILE="+key)
	p.TLS = trusting(t, ca)
	p.WaitListening()
	p.WaitReady()
	d := harness.User("acme", "desk1", "ann")
	for _, d.Gorilla = range []bool{false, true} {
		c := p.Connect(d.Origin("https://" + p.HTTP))
		c.SelectChat("big")
		ev := feed.Message("acme", "desk1", "big", strings.Repeat("0123456789abcdef", 30<<10), false) // 480 KiB, many records
		if m := c.WantEvent(w.Publish(ev)); string(m.Payload) != string(ev.Payload) {
			t.Errorf("%d bytes of %d arrived, or others", len(m.Payload), len(ev.Payload))
		}
	}
	c := p.Connect(harness.User("acme", "desk2", "ben"))
	if resp, err := http.Get("http://" + p.HTTP + "/health"); err == nil {
		if resp.Body.Close(); resp.StatusCode == http.StatusOK {
			t.Error("plain HTTP is served beside TLS")
		}
	}
	first := serial(p)
	w.Issue(ca, "pod")
	if got := serial(p); got != first {
		t.Error("the certificate has changed before the reload")
	}
	reload(p, "success")
	second := serial(p)
	if second == first {
		t.Error("after the reload the certificate is the old one")
	}
	c.WantNothingElse()
	writeFile(t, cert, "no certificate")
	reload(p, "failure")
	findLine(p, `"level":"ERROR"`, "DAISI_WS_SERVER_TLS_CERT_FILE and DAISI_WS_SERVER_TLS_KEY_FILE: ")
	if got := serial(p); got != second {
		t.Error("a faulty file has changed the certificate")
	}
	c.WantNothingElse()
	p.Connect(d).WantNothingElse()
}

// ownAddress is a loopback address that no other test uses, so that any port of it is free.
func ownAddress() string {
	return fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
}

// TestAddresses: the service listens where it is told to, nowhere else, and says so; the debug address has pprof, which the
// public port has not.
func TestAddresses(t *testing.T) {
	t.Parallel()
	ip := ownAddress()
	p := harness.New(t).Start("SERVER_BIND_ADDRESS="+ip, "SERVER_HTTP_PORT=8080", "SERVER_GRPC_PORT=50051", "SERVER_DEBUG_ADDRESS="+ip+":6060")
	if p.HTTP != ip+":8080" || p.GRPC != ip+":50051" {
		t.Errorf("the line listening names %s and %s", p.HTTP, p.GRPC)
	}
	p.Connect(harness.User("acme", "desk1", "ann")).WantNothingElse()
	for address, open := range map[string]bool{p.HTTP: true, p.GRPC: true, ip + ":6060": true, ownAddress() + ":8080": false, ownAddress() + ":50051": false} {
		c, err := net.DialTimeout("tcp", address, harness.Patience)
		if (err == nil) != open {
			t.Errorf("dial %s: %v, want it to be open: %v", address, err, open)
		}
		if c != nil {
			c.Close()
		}
	}
	harness.Eventually(t, harness.Patience, "pprof", func() bool {
		resp, err := http.Get("http://" + ip + ":6060/debug/pprof/goroutine?debug=1")
		if err != nil {
			return false
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		return err == nil && resp.StatusCode == http.StatusOK && holds(string(body), "goroutine profile: total", "main.(*service)")
	})
	wantAnswer(t, "pprof on the public port", p.Do("GET", "/debug/pprof/goroutine", nil, nil), 404, bodyNotFound)
}

// TestLogFormat: the same lines as text.
func TestLogFormat(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Launch("LOG_FORMAT=text")
	line := findLine(p, "level=INFO", "msg=listening", "pod="+p.ID)
	address := regexp.MustCompile(` http=(\S+)`).FindStringSubmatch(line)
	if address == nil {
		t.Fatalf("no address in %s", line)
	}
	p.HTTP = address[1]
	p.WaitReady()
	p.Connect(harness.User("acme", "desk1", "ann"))
	findLine(p, `msg="socket opened"`, "company=acme", "agent=desk1", "user=ann", "request_id=")
	if strings.Contains(p.Log.Text(), "{") {
		t.Errorf("JSON in the text log:\n%s", p.Log.Text())
	}
}

// TestHTTPTimeouts: a client that dawdles over its request, over the next one, or over the answer, is let go.
func TestHTTPTimeouts(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("SERVER_READ_TIMEOUT=1s", "SERVER_WRITE_TIMEOUT=1s", "SERVER_IDLE_TIMEOUT=1s")
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", p.HTTP)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(8 * time.Second)) // below each default
		return c
	}
	begin := time.Now()
	slow := dial()
	fmt.Fprintf(slow, "GET /health HTTP/1.1\r\nHost: x\r\nX-More: ")
	if rest, err := io.ReadAll(slow); err != nil {
		t.Errorf("half a request: %q, %v after %v", rest, err, time.Since(begin))
	}
	idle := dial()
	fmt.Fprintf(idle, "GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
	in := bufio.NewReader(idle)
	resp, err := http.ReadResponse(in, nil)
	if err != nil || resp.StatusCode != http.StatusOK || resp.Close {
		t.Fatalf("GET /health: %v, %v", resp, err)
	}
	io.Copy(io.Discard, resp.Body)
	if rest, err := io.ReadAll(in); err != nil || len(rest) > 0 {
		t.Errorf("idle connection: %q, %v", rest, err)
	}
	// More answers than both kernels hold, none of them read: the service's write does not come to an end.
	deaf := dial()
	deaf.(*net.TCPConn).SetReadBuffer(4096)
	go fmt.Fprint(deaf, strings.Repeat("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 2000)) // ends with the connection
	harness.Eventually(t, 8*time.Second, "the end of a connection that takes no answer", func() bool {
		_, err := deaf.Write([]byte("x"))
		return err != nil
	})
}

// TestGarbageRoom: a small heap is collected rarely, by memory that counts as in use and is not resident; but not where Go's own
// variables are set.
func TestGarbageRoom(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	const room = 32 << 20
	rare := func(v float64) bool { return v > 2*room }
	often := func(v float64) bool { return v > 0 && v < room }
	for _, c := range []struct {
		setting string
		want    func(v float64) bool
	}{{"", rare}, {"GOGC=100", often}, {"GOMEMLIMIT=1GiB", often}} {
		pod := w.Start(strings.Fields(c.setting)...)
		pod.WaitMetric(c.want, "go_memstats_next_gc_bytes")
		if kib := pod.Resident(); (kib == 0 || kib > 48<<10) && !harness.Race {
			t.Errorf("%d KiB are resident at the start with %q", kib, c.setting)
		}
	}
}
