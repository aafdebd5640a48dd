package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var allWell = map[string]string{"nats": "connected", "redis": "connected", "grpc": "serving", "consumer": "active"}

// newTestServer has no hub and no sessions: its pod has no lease, so that no upgrade gets that far.
func newTestServer(change func(*Config)) *server {
	cfg, m := authSettings(change), newMetrics()
	_, rdb := newFakeRedis()
	return newServer(cfg, m, newAuth(cfg, rdb, m), nil, newLease(cfg, rdb, m), nil, func() (map[string]string, bool) { return allWell, true })
}

// ask sends one request through the whole handler; headers are "Name: value" lines.
func ask(s *server, method, target, body string, headers ...string) *http.Response {
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	for _, h := range headers {
		name, value, _ := strings.Cut(h, ": ")
		r.Header.Add(name, value)
	}
	w := httptest.NewRecorder()
	s.http.Handler.ServeHTTP(w, r)
	return w.Result()
}

// wantAnswer checks status and exact body of an answer and what every answer has.
func wantAnswer(t *testing.T, r *http.Response, status int, body string) {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	if r.StatusCode != status || string(b) != body {
		t.Errorf("got %d %s\nwant %d %s", r.StatusCode, b, status, body)
	}
	if ct := r.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("Content-Type %q", ct)
	}
	if !saneRequestID(r.Header.Get("X-Request-ID")) {
		t.Errorf("X-Request-ID %q", r.Header.Get("X-Request-ID"))
	}
}

const (
	bodyKey      = `{"code":"InvalidAPIKey","message":"API key is missing or not valid here"}`
	bodyNotFound = `{"code":"NotFound","message":"no such resource"}`
	bodyMethod   = `{"code":"MethodNotAllowed","message":"method is not allowed here"}`
)

func TestRoutes(t *testing.T) {
	s := newTestServer(nil)
	for _, c := range []struct {
		method, target string
		status         int
		body, allow    string
	}{
		{"GET", "/health", 200, `{"status":"OK"}`, ""},
		{"GET", "/health?x=%zz", 200, `{"status":"OK"}`, ""},
		{"GET", "/ready", 200, `{"status":"READY","dependencies":{"nats":"connected","redis":"connected","grpc":"serving","consumer":"active"}}`, ""},
		{"POST", "/health", 405, bodyMethod, "GET, HEAD"},
		{"DELETE", "/metrics", 405, bodyMethod, "GET, HEAD"},
		{"GET", "/generate-token", 405, bodyMethod, "POST"},
		{"HEAD", "/admin/generate-token", 405, bodyMethod, "POST"},
		{"POST", "/ws/admin", 405, bodyMethod, "GET"},
		{"HEAD", "/ws/c/a", 405, bodyMethod, "GET"},
		{"OPTIONS", "/ws/c/a", 405, bodyMethod, "GET"},
		{"GET", "/", 404, bodyNotFound, ""},
		{"HEAD", "/nothing", 404, bodyNotFound, ""},
		{"GET", "/health/", 404, bodyNotFound, ""},
		{"GET", "/health//", 404, bodyNotFound, ""},
		{"GET", "//health", 404, bodyNotFound, ""},
		{"GET", "/x/../health", 404, bodyNotFound, ""},
		{"POST", "/generate-token/x", 404, bodyNotFound, ""},
		{"GET", "/ws", 404, bodyNotFound, ""},
		{"GET", "/ws/", 404, bodyNotFound, ""},
		{"GET", "/ws/c", 404, bodyNotFound, ""},
		{"GET", "/ws//a", 404, bodyNotFound, ""},
		{"GET", "/ws/c/a/", 404, bodyNotFound, ""},
		{"GET", "/ws/c/a/u", 404, bodyNotFound, ""},
		{"GET", "/debug/pprof/", 404, bodyNotFound, ""},
	} {
		r := ask(s, c.method, c.target, "")
		t.Run(c.method+" "+c.target, func(t *testing.T) { wantAnswer(t, r, c.status, c.body) })
		if got := r.Header.Get("Allow"); got != c.allow {
			t.Errorf("%s %s: Allow %q, want %q", c.method, c.target, got, c.allow)
		}
	}
	r := ask(s, "GET", "/metrics", "")
	b, _ := io.ReadAll(r.Body)
	if r.StatusCode != 200 || !bytes.Contains(b, []byte("# TYPE dws_redelivered_total")) || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/plain") {
		t.Errorf("/metrics: %d, %s", r.StatusCode, r.Header)
	}
}

func TestReadyNamesWhatFails(t *testing.T) {
	s := newTestServer(nil)
	s.ready = func() (map[string]string, bool) {
		return map[string]string{"nats": "connected", "redis": "disconnected", "grpc": "serving", "consumer": "stalled"}, false
	}
	wantAnswer(t, ask(s, "GET", "/ready", ""), 503, `{"status":"NOT_READY","code":"Unavailable","message":"redis is disconnected, consumer is stalled",`+
		`"dependencies":{"nats":"connected","redis":"disconnected","grpc":"serving","consumer":"stalled"}}`)
	s.ready = func() (map[string]string, bool) { return allWell, true }
	s.startDrain()
	r := ask(s, "GET", "/ready", "")
	wantAnswer(t, r, 503, `{"status":"NOT_READY","code":"Unavailable","message":"draining",`+
		`"dependencies":{"nats":"connected","redis":"connected","grpc":"serving","consumer":"active"}}`)
	if r.Header.Get("Retry-After") == "" {
		t.Error("no Retry-After")
	}
	wantAnswer(t, ask(s, "GET", "/health", ""), 200, `{"status":"OK"}`)
}

func badField(field, message string) string {
	return `{"code":"BadRequest","message":"` + message + `","details":{"field":"` + field + `"}}`
}

func TestMintErrors(t *testing.T) {
	s := newTestServer(func(c *Config) { c.AuthPublicKey = "public-1" })
	const tokenIDs, nameIDs, life = " (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)", " (1 to 256 bytes of printable UTF-8)", "expires_in_seconds must be a whole number, 1 to 31536000"
	const notObject = `{"code":"BadRequest","message":"body is not a JSON object"}`
	for _, c := range []struct {
		target, key, body string
		status            int
		want              string
	}{
		{"/generate-token", "", `{}`, 401, bodyKey},
		{"/generate-token", "wrong", `{}`, 401, bodyKey},
		{"/generate-token", "public-1", `{}`, 401, bodyKey},
		{"/generate-token", "admin-1", `{}`, 401, bodyKey},
		{"/admin/generate-token", "general-1", `{}`, 401, bodyKey},
		{"/generate-token", "general-2", ``, 400, notObject},
		{"/generate-token", "general-1", `[]`, 400, notObject},
		{"/generate-token", "general-1", `"x"`, 400, notObject},
		{"/generate-token", "general-1", `{"company_id":"c"`, 400, notObject},
		{"/generate-token", "general-1", `{"company_id":"c"} {}`, 400, notObject},
		{"/generate-token", "general-1", `null`, 400, badField("company_id", "company id is empty"+tokenIDs)},
		{"/generate-token", "general-1", `{}`, 400, badField("company_id", "company id is empty"+tokenIDs)},
		{"/generate-token", "general-1", `{"company_id":7}`, 400, badField("company_id", "company_id must not be a JSON number")},
		{"/generate-token", "general-1", `{"company_id":"c d"}`, 400, badField("company_id", `company id \"c d\" holds ' '`+tokenIDs)},
		{"/generate-token", "general-1", "{\"company_id\":\"c\xff\"}", 400, badField("company_id", `company id \"c�\" holds '�'`+tokenIDs)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"*"}`, 400, badField("agent_id", `agent id \"*\" holds '*'`+tokenIDs)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":null}`, 400, badField("user_id", "user id is empty"+nameIDs)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u"}`, 400, badField("expires_in_seconds", life)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":0}`, 400, badField("expires_in_seconds", life)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":-1}`, 400, badField("expires_in_seconds", life)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":1.5}`, 400, badField("expires_in_seconds", life)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":31536001}`, 400, badField("expires_in_seconds", life)},
		{"/generate-token", "general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":"60"}`, 400, badField("expires_in_seconds", "expires_in_seconds must not be a JSON string")},
		{"/generate-token", "general-1", `{"company_id":"` + strings.Repeat("c", maxBody) + `"}`, 413, `{"code":"PayloadTooLarge","message":"body is larger than 65536 bytes"}`},
		{"/admin/generate-token", "admin-1", `{"expires_in_seconds":60}`, 400, badField("admin_id", "admin id is empty"+nameIDs)},
		{"/admin/generate-token", "admin-1", `{"admin_id":"a\tb","expires_in_seconds":60}`, 400, badField("admin_id", `admin id \"a\\tb\" holds '\\t'`+nameIDs)},
		{"/admin/generate-token", "admin-1", `{"admin_id":"r","subscribed_company_id":"c.*","expires_in_seconds":60}`, 400, badField("subscribed_company_id", `subscribed company id \"c.*\" holds '.'`+tokenIDs)},
		{"/admin/generate-token", "admin-1", `{"admin_id":"r","subscribed_agent_id":[],"expires_in_seconds":60}`, 400, badField("subscribed_agent_id", "subscribed_agent_id must not be a JSON array")},
		{"/admin/generate-token", "admin-1", `{"admin_id":"r","company_id_restriction":"d d","expires_in_seconds":60}`, 400, badField("company_id_restriction", `company id restriction \"d d\" holds ' '`+tokenIDs)},
		{"/admin/generate-token", "admin-1", `{"admin_id":"r","subscribed_company_id":"c","company_id_restriction":"d","expires_in_seconds":60}`, 403,
			`{"code":"InvalidToken","message":"subscribed_company_id contradicts company_id_restriction"}`},
	} {
		r := ask(s, "POST", c.target, c.body, "X-API-Key: "+c.key, "Content-Type: text/plain")
		t.Run(c.target+" "+c.body[:min(len(c.body), 90)], func(t *testing.T) { wantAnswer(t, r, c.status, c.want) })
	}
}

func TestMint(t *testing.T) {
	s := newTestServer(nil)
	for _, c := range []struct {
		target, body string
		life         time.Duration
	}{
		{"/generate-token", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":3600.0,"later":{}}`, time.Hour},
		{"/generate-token?x-api-key=general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":31536000}`, 365 * 24 * time.Hour},
		{"/admin/generate-token", `{"admin_id":"r","subscribed_agent_id":"a","company_id_restriction":"c","expires_in_seconds":1}`, time.Second},
	} {
		key := "general-1"
		if strings.HasPrefix(c.target, "/admin") {
			key = "admin-1"
		} else if strings.Contains(c.target, "?") {
			key = ""
		}
		before := time.Now()
		r := ask(s, "POST", c.target, c.body, "X-API-Key: "+key)
		var got minted
		b, _ := io.ReadAll(r.Body)
		if err := json.Unmarshal(b, &got); r.StatusCode != 200 || err != nil {
			t.Fatalf("%s %s: %d %s", c.target, c.body, r.StatusCode, b)
		}
		if left := got.ExpiresAt.Sub(before); left < c.life-time.Millisecond || left > c.life+10*time.Second {
			t.Errorf("%s: %v left of %v", c.target, left, c.life)
		}
		if r.Header.Get("Cache-Control") != "no-store" || !strings.Contains(string(b), `Z"}`) {
			t.Errorf("%s: %s, %s", c.target, r.Header, b)
		}
		cl, apiErr := s.auth.openUser(context.Background(), got.Token)
		if key == "admin-1" {
			cl, apiErr = s.auth.openAdmin(context.Background(), got.Token)
		}
		if apiErr != nil || !cl.expires.Equal(got.ExpiresAt) {
			t.Errorf("%s: claims %+v, %v", c.target, cl, apiErr)
		}
	}
}

// upgradeHeaders are what a browser sends.
var upgradeHeaders = []string{"Connection: keep-alive, Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AAECAwQFBgcICQoLDA0ODw=="}

func TestUpgradeRefusals(t *testing.T) {
	s := newTestServer(func(c *Config) { c.AuthPublicKey = "public-1" })
	later := time.Now().Add(time.Hour)
	user := mustSeal(t, vectorKey, userToken{"c", "a", "u", later, later})
	expired := mustSeal(t, vectorKey, userToken{"c", "a", "u", time.Now().Add(-time.Minute), later})
	contrary := mustSeal(t, vectorKey, adminToken{AdminID: "r", ExpiresAt: later, SubscribedCompanyID: "c", CompanyIDRestriction: "d"})
	admin := mustSeal(t, vectorKey, adminToken{AdminID: "r", ExpiresAt: later})
	invalid := func(message string) string { return `{"code":"InvalidToken","message":"` + message + `"}` }
	const tokenIDs, nameIDs = " (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)", " (1 to 256 bytes of printable UTF-8)"
	const away = `{"code":"Unavailable","message":"redis is away"}`
	for _, c := range []struct {
		target  string
		headers []string
		status  int
		body    string
	}{
		{"/ws/c/a", nil, 401, bodyKey},
		{"/ws/c/a?x-api-key=general-1&token=" + user, nil, 401, bodyKey},
		{"/ws/c/a?token=" + user, []string{"X-API-Key: admin-1"}, 401, bodyKey},
		{"/ws/c/a?x-api-key=public-1&token=" + user, []string{"X-API-Key: wrong"}, 401, bodyKey},
		{"/ws/c/a?x-api-key=public-1", nil, 403, invalid("token is missing")},
		{"/ws/c/a?x-api-key=public-1&token=%00", nil, 403, invalid("token cannot be opened")},
		{"/ws/c/a?x-api-key=public-1&token=" + admin, nil, 403, invalid("token: company id is empty" + tokenIDs)},
		{"/ws/c/a?x-api-key=public-1&token=" + expired, nil, 403, invalid("token has expired")},
		{"/ws/c/b?x-api-key=public-1&token=" + user, nil, 403, invalid("token is for another company or agent")},
		{"/ws/d/a?x-api-key=public-1&token=" + user, nil, 403, invalid("token is for another company or agent")},
		{"/ws/c.d/a?x-api-key=public-1&token=" + user, nil, 400, badField("company_id", `company id \"c.d\" holds '.'`+tokenIDs)},
		{"/ws/c/a%2Fb?x-api-key=public-1&token=" + user, nil, 400, badField("agent_id", `agent id \"a/b\" holds '/'`+tokenIDs)},
		{"/ws/c/a?x-api-key=public-1&since=x&token=" + user, nil, 400, badField("since", "since must be a position, or empty")},
		{"/ws/c/a?x-api-key=public-1&since=7&stream=s&chat=a+b&token=" + user, nil, 400, badField("chat_id", `chat id \"a b\" holds ' ' (1 to 256 bytes of printable ASCII without blank, * and >)`)},
		{"/ws/c/a?x-api-key=public-1&since=&token=" + user, nil, 503, away},
		{"/ws/c/a?x-api-key=public-1&since=-1&token=" + user, nil, 400, badField("since", "since must be a position, or empty")},
		{"/ws/c/a?x-api-key=public-1&since=18446744073709551615&token=" + user, nil, 503, away},
		{"/ws/c/a?x-api-key=public-1&token=" + user, nil, 503, away},
		{"/ws/c/a?token=" + user, []string{"X-API-Key: public-1", "Authorization: Bearer nonsense"}, 503, away},
		{"/ws/c/a", []string{"X-API-Key: public-1", "Authorization: bearer " + user, "Sec-WebSocket-Protocol: bearer.nonsense"}, 503, away},
		{"/ws/c/a", []string{"X-API-Key: public-1", "Authorization: Basic eDp5", "Sec-WebSocket-Protocol: json.v1, bearer." + user}, 503, away},
		{"/ws/c/a", []string{"X-API-Key: public-1", "Sec-WebSocket-Protocol: json.v1", "Sec-WebSocket-Protocol: bearer." + user}, 503, away},
		{"/ws/admin?token=" + admin, []string{"X-API-Key: public-1"}, 401, bodyKey},
		{"/ws/admin?token=" + admin, []string{"X-API-Key: general-1"}, 401, bodyKey},
		{"/ws/admin?token=" + user, []string{"X-API-Key: admin-1"}, 403, invalid("token: admin id is empty" + nameIDs)},
		{"/ws/admin?token=" + contrary, []string{"X-API-Key: admin-1"}, 403, invalid("subscribed_company_id contradicts company_id_restriction")},
		{"/ws/admin?x-api-key=admin-1&token=" + admin, nil, 503, away},
	} {
		r := ask(s, "GET", c.target, "", append(c.headers, upgradeHeaders...)...)
		t.Run(c.target[:min(len(c.target), 60)], func(t *testing.T) { wantAnswer(t, r, c.status, c.body) })
		if (c.status == 503) != (r.Header.Get("Retry-After") != "") {
			t.Errorf("%s: Retry-After %q", c.target, r.Header.Get("Retry-After"))
		}
	}
	if n := s.m.authFailureTotal.with("user", "key").Get(); n != 4 {
		t.Errorf("%d refused keys counted, want 4", n)
	}
}

func TestErrorTable(t *testing.T) {
	for _, c := range []struct {
		err    *apiError
		code   string
		status int
		close  int
	}{
		{invalidAPIKey(), "InvalidAPIKey", 401, 4401},
		{invalidToken("missing", ""), "InvalidToken", 403, 4403},
		{tokenExpired(), "InvalidToken", 403, 4403},
		{originNotAllowed(), "OriginNotAllowed", 403, 0},
		{rateLimitExceeded(), "RateLimitExceeded", 429, 4429},
		{badRequest("", ""), "BadRequest", 400, 4400},
		{notFound(), "NotFound", 404, 0},
		{methodNotAllowed(), "MethodNotAllowed", 405, 0},
		{payloadTooLarge(), "PayloadTooLarge", 413, 0},
		{upgradeRequired(""), "UpgradeRequired", 426, 0},
		{unavailable(""), "Unavailable", 503, 1013},
		{subscriptionFailure(""), "SubscriptionFailure", 500, 1011},
		{internalServerError(), "InternalServerError", 500, 1011},
	} {
		if c.err.Code != c.code || c.err.status != c.status || c.err.close != c.close {
			t.Errorf("%s: %+v", c.code, c.err)
		}
		if (c.err.close != 0) != (c.err.reason != "") || len(c.err.reason) > 123 { // RFC 6455 section 5.5
			t.Errorf("%s: close %d with reason %q", c.code, c.err.close, c.err.reason)
		}
	}
}

func TestRequestID(t *testing.T) {
	s := newTestServer(nil)
	for _, c := range []struct {
		id   string
		kept bool
	}{
		{"abc-DEF_0.9", true}, {strings.Repeat("x", 128), true}, {strings.Repeat("x", 129), false},
		{"", false}, {"a b", false}, {"a\nb", false}, {"ä", false}, {`a"b`, false},
	} {
		got := ask(s, "GET", "/nothing", "", "X-Request-ID: "+c.id).Header.Get("X-Request-ID")
		if (got == c.id) != c.kept || !saneRequestID(got) {
			t.Errorf("asked with %q, answered with %q", c.id, got)
		}
	}
}

// captureLog collects everything logged, debug included, until the test ends.
func captureLog(t *testing.T) *bytes.Buffer {
	var out bytes.Buffer
	old := slog.Default()
	slog.SetDefault(slog.New(slog.NewJSONHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})))
	t.Cleanup(func() { slog.SetDefault(old) })
	return &out
}

func TestLogsHoldNoSecrets(t *testing.T) {
	out := captureLog(t)
	s := newTestServer(nil)
	ask(s, "GET", "/ws/c/a?x-api-key=general-1&token="+userVector, "", upgradeHeaders...)
	ask(s, "GET", "/ws/c/a", "", append(upgradeHeaders, "X-API-Key: general-1", "Authorization: Bearer "+userVector, "Sec-WebSocket-Protocol: bearer."+userVector)...)
	ask(s, "POST", "/generate-token?x-api-key=wrong-key", "{}")
	r := ask(s, "POST", "/generate-token?x-api-key=general-1", `{"company_id":"c","agent_id":"a","user_id":"u","expires_in_seconds":60}`)
	var got minted
	if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(out.String(), `"msg":"request"`); n != 4 {
		t.Errorf("%d requests logged, want 4", n)
	}
	for _, secret := range []string{"general-1", "wrong-key", userVector[:20], got.Token[:20], "x-api-key", "token="} {
		if strings.Contains(out.String(), secret) {
			t.Errorf("log holds %q:\n%s", secret, out)
		}
	}
}

func TestPanicIsAnswered(t *testing.T) {
	out := captureLog(t)
	s := newTestServer(nil)
	s.ready = func() (map[string]string, bool) { panic("boom") }
	wantAnswer(t, ask(s, "GET", "/ready?token=hidden", ""), 500, `{"code":"InternalServerError","message":"internal error"}`)
	if !strings.Contains(out.String(), "boom") || strings.Contains(out.String(), "hidden") {
		t.Errorf("log: %s", out)
	}
}

// startServer serves s on a loopback port until the test ends.
func startServer(t *testing.T, s *server) net.Addr {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := s.shutdown(ctx); err != nil {
			t.Error(err)
		}
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr()
}

// writeCertificate puts a fresh self-signed certificate for 127.0.0.1 into dir and returns it.
func writeCertificate(t *testing.T, dir string) *x509.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "test"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for name, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: der}, "key.pem": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func TestTLS(t *testing.T) {
	dir := t.TempDir()
	first := writeCertificate(t, dir)
	out := captureLog(t)
	s := newTestServer(func(c *Config) {
		c.ServerTLSCertFile, c.ServerTLSKeyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	})
	addr := startServer(t, s).String()
	wantCertificate := func(want *x509.Certificate) {
		t.Helper()
		roots := x509.NewCertPool()
		roots.AddCert(want)
		conn, err := tls.Dial("tcp", addr, &tls.Config{RootCAs: roots, NextProtos: []string{"h2", "http/1.1"}})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if p := conn.ConnectionState().NegotiatedProtocol; p != "http/1.1" {
			t.Errorf("negotiated %q", p)
		}
	}
	wantCertificate(first)
	second := writeCertificate(t, dir)
	wantCertificate(first)
	if err := s.reloadTLS(); err != nil {
		t.Fatal(err)
	}
	wantCertificate(second)
	if err := os.WriteFile(filepath.Join(dir, "cert.pem"), []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.reloadTLS() == nil {
		t.Error("a broken certificate was loaded")
	}
	wantCertificate(second)
	c := *s.cfg.Load()
	c.ServerTLSCertFile = ""
	s.cfg.Store(&c)
	if s.reloadTLS() == nil {
		t.Error("TLS was switched off at run time")
	}
	if strings.Contains(out.String(), `"level":"WARN"`) {
		t.Errorf("a stranger's failed handshake is no warning: %s", out)
	}
}

func TestPlainServer(t *testing.T) {
	s := newTestServer(nil)
	addr := startServer(t, s).String()
	if err := s.reloadTLS(); err != nil {
		t.Errorf("reload without TLS: %v", err)
	}
	r, err := http.Get("http://" + addr + "/health")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	wantAnswer(t, r, 200, `{"status":"OK"}`)
	http.DefaultClient.CloseIdleConnections()
}

func TestServeNamesABadCertificate(t *testing.T) {
	s := newTestServer(func(c *Config) {
		c.ServerTLSCertFile, c.ServerTLSKeyFile = "/nonexistent/cert.pem", "/nonexistent/key.pem"
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := s.serve(l); err == nil || !strings.Contains(err.Error(), "/nonexistent/cert.pem") {
		t.Errorf("error %v", err)
	}
}

func TestHTTPLog(t *testing.T) {
	out := captureLog(t)
	s := newTestServer(nil)
	s.http.ErrorLog.Printf("http: TLS handshake error from %s: EOF", "192.0.2.1:1")
	s.http.ErrorLog.Printf("http: Accept error: %v", "too many open files")
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], `"level":"DEBUG"`) || !strings.Contains(lines[1], `"level":"WARN"`) {
		t.Errorf("log: %s", out)
	}
}

func TestDebugHandler(t *testing.T) {
	w := httptest.NewRecorder()
	debugHandler().ServeHTTP(w, httptest.NewRequest("GET", "/debug/pprof/goroutine?debug=1", nil))
	if w.Code != 200 || !strings.Contains(w.Body.String(), "goroutine profile") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}
