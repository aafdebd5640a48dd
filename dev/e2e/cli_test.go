package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// program runs the service's program to its end and returns its exit status and what it printed. settings are NAME=VALUE
// without DAISI_WS_.
func program(t *testing.T, settings []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	return programReads(t, "", settings, args...)
}

// programReads is program with a standard input.
func programReads(t *testing.T, stdin string, settings []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, harness.Binaries().Service, args...)
	var out, errs bytes.Buffer
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = rig.ServiceEnv(settings), strings.NewReader(stdin), &out, &errs
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", args, err)
	}
	if ctx.Err() != nil {
		t.Fatalf("%v does not end; it printed %s%s", args, &out, &errs)
	}
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// keySettings are the four that have no default, and an address that needs no warning.
func keySettings(more ...string) []string {
	return append([]string{"AUTH_SECRET_TOKEN=" + harness.APIKey, "AUTH_TOKEN_AES_KEY=" + harness.TokenKey, "AUTH_ADMIN_SECRET_TOKEN=" + harness.AdminAPIKey,
		"AUTH_ADMIN_TOKEN_AES_KEY=" + harness.AdminKey, "AUTH_PUBLIC_KEY=public-key-of-the-tests", "SERVER_BIND_ADDRESS=127.0.0.1"}, more...)
}

// settingNames are all settings, as the example file lists them.
func settingNames(t *testing.T) []string {
	t.Helper()
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(filepath.Join(root, "deploy", "daisi-ws-service.conf"))
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^#(DAISI_WS_[A-Z0-9_]+)=`).FindAllStringSubmatch(string(text), -1) {
		names = append(names, m[1])
	}
	if len(names) < 80 {
		t.Fatalf("the example file lists %d settings", len(names))
	}
	return names
}

// TestCheck: good settings are printed whole, secrets masked; faulty ones are told all at once.
func TestCheck(t *testing.T) {
	t.Parallel()
	conf, secret := filepath.Join(t.TempDir(), "conf"), filepath.Join(t.TempDir(), "secret")
	writeFile(t, conf, "# a comment", "", "DAISI_WS_SERVER_IDLE_TIMEOUT=90s", "DAISI_WS_LOG_LEVEL=warn", "DAISI_WS_REDIS_PASSWORD_FILE="+secret)
	writeFile(t, secret, "hush-hush")
	code, stdout, stderr := program(t, keySettings("LOG_LEVEL=debug", "SERVICE_PORT=tcp://10.0.0.1:80", "NATS_URL=nats://me:hush-hush@a:1"), "check", "-config", conf)
	if code != 0 || stderr != "" {
		t.Fatalf("good settings: status %d, %s", code, stderr)
	}
	for _, name := range settingNames(t) {
		if !strings.Contains("\n"+stdout, "\n"+name+"=") {
			t.Errorf("check does not print %s", name)
		}
	}
	for _, want := range []string{"SERVER_IDLE_TIMEOUT=1m30s", "LOG_LEVEL=debug", "REDIS_PASSWORD=********", "NATS_URL=nats://********@a:1", "AUTH_TOKEN_AES_KEY=********"} {
		if !strings.Contains(stdout, "\nDAISI_WS_"+want+"\n") {
			t.Errorf("check does not print %s", want)
		}
	}
	for _, s := range []string{"hush-hush", harness.APIKey, harness.TokenKey, "public-key-of-the-tests"} {
		if strings.Contains(stdout, s) {
			t.Errorf("check prints the secret %s", s)
		}
	}

	writeFile(t, conf, "DAISI_WS_SERVER_HTTP_PROT=80", "DAISI_WS_LOG_FORMAT=\"json\"", "DAISI_WS_SESSION_TTL=5s", "port 80")
	code, stdout, stderr = program(t, []string{"AUTH_SECRET_TOKEN=" + harness.APIKey, "AUTH_TOKEN_AES_KEY=hush-hush", "WEBSOCKET_MAX_MESSAGE=64K", "NO_SUCH=1", "SERVER_BIND_ADDRESS=127.0.0.1"}, "check", "-config", conf)
	want := []string{
		"warning: environment: DAISI_WS_NO_SUCH: unknown setting, ignored",
		"warning: DAISI_WS_AUTH_PUBLIC_KEY IS NOT SET: user sockets need the general API key, so every browser gets to see it and can mint tokens for anyone",
		conf + ":1: DAISI_WS_SERVER_HTTP_PROT: unknown setting",
		conf + ":2: DAISI_WS_LOG_FORMAT: the value starts with a quote; write it without quotes (systemd would take them off, docker would not)",
		conf + ":4: not of the form KEY=VALUE",
		"environment: DAISI_WS_AUTH_TOKEN_AES_KEY: a key has 64 hex digits; this one has 9 characters",
		"DAISI_WS_AUTH_ADMIN_SECRET_TOKEN: required; set it or DAISI_WS_AUTH_ADMIN_SECRET_TOKEN_FILE (daisi-ws-service keygen makes keys)",
		"DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY: required; set it or DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY_FILE (daisi-ws-service keygen makes keys)",
		`environment: DAISI_WS_WEBSOCKET_MAX_MESSAGE: "64K" is not a size (write it as 512, 64KiB, 16MiB or 1GiB)`,
		"DAISI_WS_SESSION_REFRESH_INTERVAL (10s) must be less than half of DAISI_WS_SESSION_TTL (5s): one missed renewal would lose the session",
	}
	wantFaults(t, code, stdout, stderr, want)
}

func wantFaults(t *testing.T, code int, stdout, stderr string, want []string) {
	t.Helper()
	if code != 1 || stdout != "" || stderr != strings.Join(want, "\n")+"\n" {
		t.Errorf("status %d, printed %q\n got %s\nwant %s", code, stdout, stderr, strings.Join(want, "\n"))
	}
}

// TestFaultyStart: with faulty settings the service does not start: status 1, and one line for each fault.
func TestFaultyStart(t *testing.T) {
	t.Parallel()
	conf := filepath.Join(t.TempDir(), "conf")
	writeFile(t, conf, "DAISI_WS_NO_SUCH=1", "DAISI_WS_SERVER_DRAIN_SPREAD=1m")
	code, stdout, stderr := program(t, keySettings("LOG_LEVEL=loud", "WEBSOCKET_BLOCK_TIMEOUT=1m"), "-config", conf)
	lines := strings.Split(strings.TrimSpace(stderr), "\n")
	last := lines[len(lines)-1]
	if !strings.HasSuffix(last, `ERROR stopped err="the settings are faulty"`) {
		t.Errorf("the last line is %s", last)
	}
	wantFaults(t, code, stdout, strings.Join(lines[:len(lines)-1], "\n")+"\n", []string{
		conf + ":1: DAISI_WS_NO_SUCH: unknown setting",
		`environment: DAISI_WS_LOG_LEVEL: "loud" is none of debug, info, warn, error`,
		"DAISI_WS_WEBSOCKET_BLOCK_TIMEOUT (1m) must be less than DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s): a socket would be closed as slow before its events stop waiting for room",
		"DAISI_WS_SERVER_DRAIN_SPREAD (1m) + DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s) + 5s must be less than DAISI_WS_SERVER_SHUTDOWN_TIMEOUT (30s): the drain would be cut off",
	})
	code, _, stderr = program(t, keySettings(), "-config", conf+".absent")
	if code != 1 || !strings.HasPrefix(stderr, "settings file: open "+conf+".absent: no such file or directory\n") {
		t.Errorf("without the file: status %d, %s", code, stderr)
	}
}

// TestConfigFile: the file's settings count, the environment wins over them, and a name that is unknown there is told and ignored.
func TestConfigFile(t *testing.T) {
	t.Parallel()
	conf := filepath.Join(t.TempDir(), "conf")
	writeFile(t, conf, "DAISI_WS_WEBSOCKET_BUFFER_SIZE=32", "DAISI_WS_SERVER_MAX_CONNECTIONS=1")
	p := harness.New(t).Start("-config="+conf, "WEBSOCKET_BUFFER_SIZE=64", "NO_SUCH=1", "SERVICE_HOST=10.0.0.1")
	d := harness.User("acme", "desk1", "ann")
	p.Connect(d)
	p.WaitMetric(func(v float64) bool { return v == 64 }, "dws_websocket_buffer_capacity")
	d.User = "ben"
	p.WantRefused(d, 503, "Unavailable")
	findLine(p, `"level":"WARN"`, "environment: DAISI_WS_NO_SUCH: unknown setting, ignored")
	if strings.Contains(p.Log.Text(), "DAISI_WS_SERVICE_HOST") {
		t.Error("a name of Kubernetes' own is complained of")
	}
}

// TestKeygen: fresh keys each time, which check accepts and a service runs with.
func TestKeygen(t *testing.T) {
	t.Parallel()
	code, keys, stderr := program(t, nil, "keygen")
	if _, again, _ := program(t, nil, "keygen"); code != 0 || stderr != "" || again == keys {
		t.Fatalf("keygen: status %d, %s, the same twice: %v", code, stderr, again == keys)
	}
	conf := filepath.Join(t.TempDir(), "keys.conf")
	writeFile(t, conf, strings.TrimSpace(keys))
	if code, _, stderr := program(t, []string{"SERVER_BIND_ADDRESS=127.0.0.1"}, "check", "-config", conf); code != 0 || stderr != "" {
		t.Fatalf("check of what keygen printed: status %d, %s", code, stderr)
	}
	var settings []string
	value := map[string]string{}
	for line := range strings.Lines(keys) {
		s := strings.TrimPrefix(strings.TrimSpace(line), "DAISI_WS_")
		name, v, _ := strings.Cut(s, "=")
		settings, value[name] = append(settings, s), v
	}
	p := harness.New(t).Start(settings...)
	_, token, _ := program(t, nil, "token", "-config", conf, "-company", "acme", "-agent", "desk1", "-user", "ann")
	d := harness.User("acme", "desk1", "ann")
	d.Key, d.Token = value["AUTH_PUBLIC_KEY"], strings.TrimSpace(token)
	p.Connect(d).WantNothingElse()
	d.Token = p.Mint("/generate-token", value["AUTH_SECRET_TOKEN"], map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_in_seconds": 60})
	p.Connect(d).WantNothingElse()
}

// TestMigrate: an environment file of the earlier service becomes settings that check accepts and a service runs with; what is
// essential and missing is status 1.
func TestMigrate(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	old := strings.Join([]string{
		"# The gateway, production.", "",
		`AUTH_SECRET_TOKEN="general-of-old"  # rotated in May`,
		"DAISI_WS_AUTH_TOKEN_AES_KEY=" + harness.TokenKey,
		"export AUTH_ADMIN_SECRET_TOKEN='admin-of-old'",
		"DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY=" + harness.AdminKey,
		"REDIS_ADDRESS=" + w.Redis.Address(),
		"DAISI_WS_WEBSOCKET_PING_INTERVAL_SECONDS=10",
		"SESSION_TTL_SECONDS=15", "APP_NAME=gateway",
	}, "\n")
	code, stdout, stderr := programReads(t, old, nil, "migrate")
	if code != 0 {
		t.Fatalf("migrate: status %d, %s", code, stderr)
	}
	for i, name := range []string{3: "AUTH_SECRET_TOKEN", 7: "REDIS_ADDRESS", 8: "DAISI_WS_WEBSOCKET_PING_INTERVAL_SECONDS", 9: "SESSION_TTL_SECONDS", 10: "APP_NAME"} {
		if name != "" && !strings.Contains(stderr, fmt.Sprintf("line %d: %s is ", i, name)) {
			t.Errorf("migrate does not tell what became of %s in line %d: %s", name, i, stderr)
		}
	}
	if strings.Contains(stderr, "of-old") || strings.Contains(stderr, harness.TokenKey) {
		t.Errorf("migrate tells a secret: %s", stderr)
	}
	lines := strings.Split(stdout, "\n")
	for i, want := range []string{"# The gateway, production.", "", "# rotated in May", "DAISI_WS_AUTH_SECRET_TOKEN=general-of-old"} {
		if lines[i] != want {
			t.Errorf("line %d is %q, want %q", i+1, lines[i], want)
		}
	}
	conf := filepath.Join(t.TempDir(), "new.conf")
	writeFile(t, conf, lines...)
	code, checked, stderr := program(t, nil, "check", "-config", conf)
	if code != 0 || !holds(checked, "DAISI_WS_WEBSOCKET_PING_INTERVAL=10s\n", "DAISI_WS_SESSION_TTL=30s\n", "DAISI_WS_REDIS_ADDRESS="+w.Redis.Address()+"\n") {
		t.Errorf("check of what migrate printed: status %d, %s%s", code, checked, stderr)
	}
	var settings []string
	for _, line := range lines {
		if s, ok := strings.CutPrefix(line, "DAISI_WS_"); ok {
			settings = append(settings, s)
		}
	}
	d := harness.User("acme", "desk1", "ann")
	d.Key = "general-of-old"
	c := w.Start(settings...).Connect(d)
	c.WantEvent(w.Chat("acme", "desk1"))

	code, _, stderr = programReads(t, "AUTH_SECRET_TOKEN=x\nREDIS_ADDRESS=redis://redis\n", nil, "migrate")
	if code != 1 || !holds(stderr, "set DAISI_WS_REDIS_ADDRESS by hand", "no line sets DAISI_WS_AUTH_TOKEN_AES_KEY, which is required") {
		t.Errorf("migrate without keys: status %d, %s", code, stderr)
	}
}

// TestOfflineTokens: a running service accepts what token and admin-token print, for what they say and as long as they say.
func TestOfflineTokens(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	p := w.Start()
	mint := func(args ...string) string {
		t.Helper()
		code, token, stderr := program(t, keySettings(), args...)
		if code != 0 || stderr != "" || strings.Count(token, "\n") != 1 {
			t.Fatalf("%v: status %d, %q %s", args, code, token, stderr)
		}
		return strings.TrimSpace(token)
	}
	user := harness.User("acme", "desk1", "ann")
	user.Token = mint("token", "-company", "acme", "-agent", "desk1", "-user", "ann")
	p.Connect(user).WantNothingElse()
	user.Path = "/ws/acme/desk2"
	p.WantRefused(user, 403, "InvalidToken")
	user.Path, user.Token = "", mint("token", "-company=acme", "-agent=desk1", "-user=ann", "-ttl=5s")
	p.Connect(user).WantClose(4403, "token-expired")
	for _, scope := range [][]string{{"-company", "acme"}, {"-restrict", "acme"}, {"-company", "acme", "-restrict", "acme", "-agent", "desk1", "-ttl", "10m"}} {
		admin := harness.Admin("root", "", "")
		admin.Token = mint(append([]string{"admin-token", "-admin", "root"}, scope...)...)
		c := p.Connect(admin)
		w.Agent("rival", "desk1")
		w.Settled()
		c.WantEvent(w.Agent("acme", "desk1"))
	}
	code, stdout, stderr := program(t, keySettings(), "admin-token", "-admin", "root", "-company", "acme", "-restrict", "rival")
	if code != 2 || stdout != "" || !strings.Contains(stderr, "-company acme contradicts -restrict rival") {
		t.Errorf("a contradiction: status %d, %s%s", code, stdout, stderr)
	}
}

// TestHealthcheckOfAPod: 0 while the pod is ready, 1 while it is not, and when it is gone.
func TestHealthcheckOfAPod(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	ip := ownAddress()
	settings := []string{"SERVER_BIND_ADDRESS=" + ip, "SERVER_HTTP_PORT=8080"}
	want := func(code int, words ...string) {
		t.Helper()
		got, stdout, stderr := program(t, settings, "healthcheck")
		if got != code || stdout != "" || !holds(stderr, words...) || code == 0 && stderr != "" {
			t.Errorf("healthcheck: status %d, %s%s, want %d and %q", got, stdout, stderr, code, words)
		}
	}
	want(1, "http://"+ip+":8080/ready", "connection refused")
	p := w.Start(settings...)
	want(0)
	w.Redis.Kill()
	harness.Eventually(t, harness.Patience, "503 of /ready", func() bool { return p.Do("GET", "/ready", nil, nil).StatusCode == 503 })
	want(1, "503 Service Unavailable", `"redis":"disconnected"`)
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	p.WaitReady()
	want(0)
	p.Terminate()
	p.WantExit(0, harness.Patience)
	want(1, "connection refused")
}

// TestUsage: -help names every setting, -version says what it is; both succeed, and what cannot be understood is status 2.
func TestUsage(t *testing.T) {
	t.Parallel()
	code, help, stderr := program(t, nil, "-help")
	if code != 0 || stderr != "" {
		t.Errorf("-help: status %d, %s", code, stderr)
	}
	for _, name := range settingNames(t) {
		if !strings.Contains(help, "\n  "+name) {
			t.Errorf("-help does not name %s", name)
		}
	}
	for _, command := range []string{"check", "keygen", "token", "admin-token", "healthcheck", "migrate", "-config FILE", "-version"} {
		if !strings.Contains(help, "daisi-ws-service "+command) && !strings.Contains(help, "["+command+"]") {
			t.Errorf("-help does not name %s", command)
		}
	}
	if code, version, stderr := program(t, nil, "-version"); code != 0 || stderr != "" || !regexp.MustCompile(`^daisi-ws-service \S+ \(go\S+, \w+/\w+\)\n$`).MatchString(version) {
		t.Errorf("-version: status %d, %q %s", code, version, stderr)
	}
	for _, args := range []string{"serve", "-port 80", "check more", "keygen -x", "migrate old.env", "token", "token -company a.b -agent A -user U", "admin-token -admin ID -ttl 0s"} {
		code, stdout, stderr := program(t, keySettings(), strings.Fields(args)...)
		if code != 2 || stdout != "" || strings.Count(stderr, "\n") != 1 || !strings.HasPrefix(stderr, "daisi-ws-service") {
			t.Errorf("%s: status %d, %q %q", args, code, stdout, stderr)
		}
	}
}
