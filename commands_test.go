package main

import (
	"crypto/tls"
	"encoding/json"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// runCommand runs a command line and returns its exit status and what it printed.
func runCommand(environ []string, args ...string) (code int, stdout, stderr string) {
	var out, errs strings.Builder
	code, serve, _ := command(args, environ, strings.NewReader(""), &out, &errs)
	if serve {
		code = -1
	}
	return code, out.String(), errs.String()
}

func TestServeUnlessTold(t *testing.T) {
	for _, args := range [][]string{nil, {"-config", "x.conf"}, {"--config=x.conf"}} {
		var out strings.Builder
		code, serve, file := command(args, nil, nil, &out, &out)
		want := ""
		if args != nil {
			want = "x.conf"
		}
		if code != 0 || !serve || file != want || out.Len() > 0 {
			t.Errorf("%v: %d, serve %v, file %q, printed %q", args, code, serve, file, &out)
		}
	}
}

func TestBadUsage(t *testing.T) {
	for _, test := range []struct{ args, want string }{
		{"serve", `daisi-ws-service: there is no command "serve"`},
		{"-port 1", `daisi-ws-service: flag provided but not defined: -port`},
		{"-config", `daisi-ws-service: flag needs an argument: -config`},
		{"check x", `daisi-ws-service check: unexpected argument "x"`},
		{"keygen -n 2", `daisi-ws-service keygen: flag provided but not defined: -n`},
		{"token -company a.b -agent A -user U", `daisi-ws-service token: company id "a.b" holds '.' (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)`},
		{"token -company C -agent A", `daisi-ws-service token: user id is empty (1 to 256 bytes of printable UTF-8)`},
		{"token -company C -agent A -user U -ttl 0s", `daisi-ws-service token: -ttl must be 1s to 31536000s`},
		{"token -company C -agent A -user U -ttl 8761h", `daisi-ws-service token: -ttl must be 1s to 31536000s`},
		{"token -company C -agent A -user U -ttl 1", `daisi-ws-service token: invalid value "1" for flag -ttl: parse error`},
		{"admin-token", `daisi-ws-service admin-token: admin id is empty (1 to 256 bytes of printable UTF-8)`},
		{"admin-token -admin ID -agent *x", `daisi-ws-service admin-token: subscribed agent id "*x" holds '*' (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)`},
		{"admin-token -admin ID -company C -restrict D", `daisi-ws-service admin-token: -company C contradicts -restrict D: the admin would see nothing`},
	} {
		code, stdout, stderr := runCommand(env(), strings.Fields(test.args)...)
		if want := test.want + " (-help shows the usage)\n"; code != 2 || stdout != "" || stderr != want {
			t.Errorf("%s: %d %q\n got %swant %s", test.args, code, stdout, stderr, want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, args := range []string{"-help", "-h", "check -help", "--help"} {
		code, stdout, stderr := runCommand(nil, strings.Fields(args)...)
		if code != 0 || stderr != "" {
			t.Errorf("%s: %d %q", args, code, stderr)
		}
		for _, s := range settingTable {
			if !strings.Contains(stdout, "  "+s.name) || !strings.Contains(stdout, "      "+s.tag.Get("help")) || !strings.Contains(stdout, s.def) {
				t.Errorf("%s does not show %s", args, s.name)
			}
		}
	}
	if _, stdout, _ := runCommand(nil, "-help"); !strings.Contains(stdout, "\n  DAISI_WS_LOG_LEVEL (info)\n      debug, info, warn or error [SIGHUP changes it]\n") {
		t.Error("the help of LOG_LEVEL is not as expected")
	}
	code, stdout, _ := runCommand(nil, "-version")
	if code != 0 || !strings.HasPrefix(stdout, "daisi-ws-service ") || strings.Count(stdout, "\n") != 1 {
		t.Errorf("-version: %d %q", code, stdout)
	}
}

func TestCheckCommand(t *testing.T) {
	file := writeFile(t, "x.conf", "DAISI_WS_SERVER_IDLE_TIMEOUT=90s\n")
	environ := env("NATS_URL=nats://u:hush@a:1,tls://hush@b,c:4", "REDIS_PASSWORD=hush", "WEBSOCKET_MAX_MESSAGE=1048576", "X=1")
	for _, args := range [][]string{{"check", "-config", file}, {"-config", file, "check"}} {
		code, stdout, stderr := runCommand(environ, args...)
		if code != 0 || stderr != "warning: environment: DAISI_WS_X: unknown setting, ignored\n" {
			t.Errorf("%v: %d %q", args, code, stderr)
		}
		got := strings.Split(strings.TrimSpace(stdout), "\n")
		if len(got) != len(settingTable) {
			t.Errorf("%d lines for %d settings", len(got), len(settingTable))
		}
		for _, want := range []string{"DAISI_WS_SERVER_IDLE_TIMEOUT=1m30s", "DAISI_WS_NATS_URL=nats://********@a:1,tls://********@b,nats://c:4",
			"DAISI_WS_REDIS_PASSWORD=********", "DAISI_WS_REDIS_SENTINEL_PASSWORD=", "DAISI_WS_WEBSOCKET_MAX_MESSAGE=1MiB",
			"DAISI_WS_AUTH_TOKEN_AES_KEY=********", "DAISI_WS_WEBSOCKET_RATE_LIMIT=20/s", "DAISI_WS_AUTH_TOKEN_CACHE_TTL=0"} {
			if !slices.Contains(got, want) {
				t.Errorf("missing %s in\n%s", want, stdout)
			}
		}
		for _, secret := range []string{"hush", zeros, "general-secret", "public-key"} {
			if strings.Contains(stdout, secret) {
				t.Errorf("printed %s", secret)
			}
		}
	}
	code, stdout, stderr := runCommand(env("LOG_LEVEL=x", "LOG_FORMAT=y"), "check")
	want := "environment: DAISI_WS_LOG_LEVEL: \"x\" is none of debug, info, warn, error\nenvironment: DAISI_WS_LOG_FORMAT: \"y\" is none of json, text\n"
	if code != 1 || stdout != "" || stderr != want {
		t.Errorf("faulty settings: %d %q %q", code, stdout, stderr)
	}
}

func TestKeygenMakesWhatCheckAccepts(t *testing.T) {
	_, first, _ := runCommand(nil, "keygen")
	code, second, stderr := runCommand(nil, "keygen")
	if code != 0 || stderr != "" || first == second {
		t.Errorf("keygen: %d %q, twice the same: %v", code, stderr, first == second)
	}
	cfg, warnings, err := loadConfig(writeFile(t, "keys.conf", second), []string{"DAISI_WS_SERVER_BIND_ADDRESS=127.0.0.1"})
	if err != nil || warnings != nil {
		t.Fatalf("what keygen printed: %v, %v", warnings, err)
	}
	keys := []string{cfg.AuthSecretToken, cfg.AuthTokenAESKey, cfg.AuthAdminSecretToken, cfg.AuthAdminTokenAESKey, cfg.AuthPublicKey}
	slices.Sort(keys)
	if len(slices.Compact(keys)) != 5 || keys[0] == "" {
		t.Error("the five keys are not five")
	}
}

// opened opens what a command printed with the key that sealed it.
func opened[T any](t *testing.T, key, stdout string) (token T) {
	t.Helper()
	ring, err := newKeyring(key)
	if err != nil {
		t.Fatal(err)
	}
	plain, _ := ring.open(strings.TrimSuffix(stdout, "\n"))
	if err := json.Unmarshal(plain, &token); err != nil {
		t.Fatalf("%q opens as %q: %v", stdout, plain, err)
	}
	return token
}

func TestTokenCommands(t *testing.T) {
	// Minting needs its key and nothing else, even where another setting is missing or faulty.
	environ := []string{"DAISI_WS_AUTH_TOKEN_AES_KEY=" + zeros + "," + ones, "DAISI_WS_LOG_LEVEL=loud"}
	code, stdout, stderr := runCommand(environ, "token", "-company", "C", "-agent", "A", "-user", "U", "-ttl", "90s")
	if code != 0 || stderr != "" {
		t.Fatalf("token: %d %q", code, stderr)
	}
	user := opened[userToken](t, zeros, stdout)
	if user.CompanyID != "C" || user.AgentID != "A" || user.UserID != "U" || user.ExpiresAt.Sub(user.IssuedAt) != 90*time.Second ||
		time.Since(user.IssuedAt).Abs() > 5*time.Second {
		t.Errorf("token of %+v", user)
	}
	environ = []string{"DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY_FILE=" + writeFile(t, "key", ones+"\n")}
	code, stdout, stderr = runCommand(environ, "admin-token", "-admin", "ID", "-agent", "A", "-restrict", "C")
	if code != 0 || stderr != "" {
		t.Fatalf("admin-token: %d %q", code, stderr)
	}
	admin := opened[adminToken](t, ones, stdout)
	if company, agent, err := admin.scope(); admin.AdminID != "ID" || company != "C" || agent != "A" || err != nil || admin.ExpiresAt.Sub(admin.IssuedAt) != time.Hour {
		t.Errorf("token of %+v", admin)
	}
	code, stdout, stderr = runCommand(environ, "token", "-company", "C", "-agent", "A", "-user", "U")
	if want := "DAISI_WS_AUTH_TOKEN_AES_KEY: required; set it or DAISI_WS_AUTH_TOKEN_AES_KEY_FILE (daisi-ws-service keygen makes keys)\n"; code != 1 || stdout != "" || stderr != want {
		t.Errorf("without a key: %d %q %q", code, stdout, stderr)
	}
}

func TestReadyURL(t *testing.T) {
	for _, test := range []struct{ bind, cert, want string }{
		{"", "", "http://127.0.0.1:8080/ready"},
		{"0.0.0.0", "", "http://127.0.0.1:8080/ready"},
		{"::", "cert.pem", "https://[::1]:8080/ready"},
		{"10.1.2.3", "", "http://10.1.2.3:8080/ready"},
		{"fe80::1", "", "http://[fe80::1]:8080/ready"},
	} {
		if got := readyURL(&Config{ServerHTTPPort: 8080, ServerBindAddress: test.bind, ServerTLSCertFile: test.cert}); got != test.want {
			t.Errorf("bound to %q: %s, want %s", test.bind, got, test.want)
		}
	}
}

func TestHealthcheck(t *testing.T) {
	var status atomic.Int32
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" {
			status.Store(http.StatusNotFound)
		}
		w.WriteHeader(int(status.Load()))
		w.Write([]byte(`{"status":"it is"}`))
	})
	plain := httptest.NewServer(handler)
	defer plain.Close()
	cert, key := writeKeyPair(t)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	secure := httptest.NewUnstartedServer(handler)
	secure.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	secure.StartTLS()
	defer secure.Close()
	port := func(s *httptest.Server) string {
		return "SERVER_HTTP_PORT=" + strconv.Itoa(s.Listener.Addr().(*net.TCPAddr).Port)
	}
	for _, environ := range [][]string{env(port(plain)), env(port(secure), "SERVER_TLS_CERT_FILE="+cert, "SERVER_TLS_KEY_FILE="+key)} {
		status.Store(http.StatusOK)
		if code, stdout, stderr := runCommand(environ, "healthcheck"); code != 0 || stdout+stderr != "" {
			t.Errorf("ready: %d %q %q", code, stdout, stderr)
		}
		status.Store(http.StatusServiceUnavailable)
		code, _, stderr := runCommand(environ, "healthcheck")
		if code != 1 || !strings.HasSuffix(stderr, "/ready answered 503 Service Unavailable: {\"status\":\"it is\"}\n") {
			t.Errorf("not ready: %d %q", code, stderr)
		}
	}
	plain.Close()
	if code, _, stderr := runCommand(env(port(plain)), "healthcheck"); code != 1 || !strings.Contains(stderr, "connection refused") {
		t.Errorf("nobody there: %d %q", code, stderr)
	}
	code, _, stderr := runCommand(env("SERVER_HTTP_PORT=0"), "healthcheck")
	if code != 1 || stderr != "DAISI_WS_SERVER_HTTP_PORT is 0: which port the service has taken cannot be known\n" {
		t.Errorf("port 0: %d %q", code, stderr)
	}
}
