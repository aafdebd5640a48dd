package main

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

const (
	zeros = "0000000000000000000000000000000000000000000000000000000000000000"
	ones  = "1111111111111111111111111111111111111111111111111111111111111111"
)

// env is an environment in which the required settings have values, and these lines (without DAISI_WS_) as well.
func env(lines ...string) []string {
	all := []string{"HOME=/", "DAISI_WS_AUTH_SECRET_TOKEN=general-secret", "DAISI_WS_AUTH_TOKEN_AES_KEY=" + zeros,
		"DAISI_WS_AUTH_ADMIN_SECRET_TOKEN=admin-secret", "DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY=" + ones,
		"DAISI_WS_AUTH_PUBLIC_KEY=public-key", "DAISI_WS_SERVER_POD_ID=pod-1", "DAISI_WS_SERVER_BIND_ADDRESS=127.0.0.1"}
	for _, line := range lines {
		all = append(all, "DAISI_WS_"+line)
	}
	return all
}

// writeFile puts text into a new file of the test and returns its name.
func writeFile(t testing.TB, name, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// wantLines compares what is printed line by line; @ stands for the name of the test's file.
func wantLines(t *testing.T, what string, got []string, file string, want ...string) {
	t.Helper()
	for i := range want {
		want[i] = strings.ReplaceAll(want[i], "@", file)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s:\n got %s\nwant %s", what, strings.Join(got, "\n     "), strings.Join(want, "\n     "))
	}
}

func lines(err error) []string {
	if err == nil {
		return nil
	}
	return strings.Split(err.Error(), "\n")
}

func TestDefaults(t *testing.T) {
	cfg, warnings, err := loadConfig("", env())
	if err != nil || warnings != nil {
		t.Fatalf("defaults: warnings %v, faults %v", warnings, err)
	}
	for _, s := range settingTable {
		want := reflect.New(s.in(cfg).Type()).Elem()
		if err := parseValue(want, s.def); err != nil {
			t.Errorf("%s: default %q: %v", s.name, s.def, err)
		}
		if slices.ContainsFunc(env(), func(e string) bool { return strings.HasPrefix(e, s.name+"=") }) {
			continue
		}
		if !s.in(cfg).Equal(want) {
			t.Errorf("%s is %v, default %v", s.name, s.in(cfg), want)
		}
		if s.tag.Get("help") == "" {
			t.Errorf("%s has no help", s.name)
		}
		if check := s.tag.Get("check"); check != "" && checks[check] == nil {
			t.Errorf("%s names the rule %q, which does not exist", s.name, check)
		}
	}
	host, _ := os.Hostname()
	if cfg, _, _ = loadConfig("", env("SERVER_POD_ID=")); cfg == nil || cfg.ServerPodID != host {
		t.Errorf("pod id without a setting: %+v, host name %q", cfg, host)
	}
}

func TestValuesOfEachType(t *testing.T) {
	cfg, _, err := loadConfig("", env("SERVER_READ_TIMEOUT=1m30s", "WEBSOCKET_MAX_MESSAGE=1MiB", "NATS_PREFETCH_BYTES=123456",
		"WEBSOCKET_RATE_LIMIT=0.5/s", "REDIS_TLS=TRUE", "NATS_MAX_RECONNECTS=3", "LOG_LEVEL=WARN", "SERVER_HTTP_PORT=0",
		"REDIS_ADDRESS= a:1, [::1]:2 ,c:3", "REDIS_MODE=cluster", "NATS_URL=a:1,tls://u:p@b"))
	if err != nil {
		t.Fatal(err)
	}
	got := []any{cfg.ServerReadTimeout, cfg.WebsocketMaxMessage, cfg.NATSPrefetchBytes, cfg.WebsocketRateLimit, cfg.RedisTLS,
		cfg.NATSMaxReconnects, cfg.LogLevel, cfg.ServerHTTPPort, cfg.RedisAddress, cfg.NATSURL}
	want := []any{90 * time.Second, byteSize(1 << 20), byteSize(123456), ratePerSecond(0.5), true, 3, "warn", 0, "a:1,[::1]:2,c:3", "a:1,tls://u:p@b"}
	if !slices.Equal(got, want) {
		t.Errorf("got %v\nwant %v", got, want)
	}
}

func TestFormatIsWhatPeopleWrite(t *testing.T) {
	for _, want := range []any{24 * time.Hour, 90 * time.Minute, 61 * time.Second, 500 * time.Millisecond, byteSize(0), byteSize(1000),
		byteSize(16 << 20), byteSize(3 << 30), ratePerSecond(20), ratePerSecond(0.25), 7, true, "text"} {
		v := reflect.New(reflect.TypeOf(want)).Elem()
		text := formatValue(reflect.ValueOf(want))
		if err := parseValue(v, text); err != nil || v.Interface() != want {
			t.Errorf("%v is written %q and read as %v, %v", want, text, v, err)
		}
		if strings.HasSuffix(text, "m0s") || strings.HasSuffix(text, "h0m") {
			t.Errorf("%v is written %q", want, text)
		}
	}
}

func TestFaultsOfValues(t *testing.T) {
	for _, test := range []struct{ line, want string }{
		{"SERVER_HTTP_PORT=http", `"http" is not a whole number, or is too large`},
		{"SERVER_HTTP_PORT=65536", `65536 is above the most possible, 65535`},
		{"SERVER_HTTP_PORT=-1", `-1 is below the least possible, 0`},
		{"NATS_MAX_ACK_PENDING=9999999999", `"9999999999" is not a whole number, or is too large`},
		{"SERVER_POD_ID=a b", `"a b" is not a pod id (1 to 128 of A-Z a-z 0-9 . _ -)`},
		{"SERVER_ENABLE_REFLECTION=yes", `"yes" is neither true nor false`},
		{"SERVER_BIND_ADDRESS=1.2.3.4:80", `"1.2.3.4:80" is neither an IP address nor a host name`},
		{"SERVER_ADVERTISE_ADDRESS=0.0.0.0:1", `"0.0.0.0:1" is not an address that peers could dial`},
		{"SERVER_ADVERTISE_ADDRESS=:1", `":1" is not an address that peers could dial`},
		{"SERVER_ADVERTISE_ADDRESS=a:b:c", `"a:b:c" is not an address (write it as host or host:port)`},
		{"SERVER_READ_TIMEOUT=30", `"30" is not a duration (write it as 500ms, 30s or 5m), or is too long`},
		{"SERVER_READ_TIMEOUT=0", `0 is below the least possible, 1ms`},
		{"SERVER_READ_TIMEOUT=100000h", `"100000h" is not a duration (write it as 500ms, 30s or 5m), or is too long`},
		{"SERVER_DEBUG_ADDRESS=6060", `"6060" is not an address (write it as host:port)`},
		{"LOG_LEVEL=loud", `"loud" is none of debug, info, warn, error`},
		{"NATS_URL=http://h:1", `not a URL of a NATS server (write it as nats://host:4222, or with tls, ws or wss)`},
		{"NATS_URL=nats://a:1,nats://u:hush@:1", `part 2 of 2: not a URL of a NATS server (write it as nats://host:4222, or with tls, ws or wss)`},
		{"NATS_STREAM_NAME=wa.stream", `"wa.stream" is not a name for JetStream (no blanks, none of . * > / \)`},
		{"NATS_SUBJECT_PREFIX=wa.", `"wa." is not a subject prefix (tokens joined by dots, without blanks, * and >, not beginning with $)`},
		{"NATS_JS_API_PREFIX=$JS.hub.API.", `"$JS.hub.API." is not a prefix of subjects (tokens joined by dots, without blanks, * and >)`},
		{"NATS_JS_DOMAIN=a.b", `"a.b" is not a name for JetStream (no blanks, none of . * > / \)`},
		{"NATS_SUBJECT_PREFIX=$JS", `"$JS" is not a subject prefix (tokens joined by dots, without blanks, * and >, not beginning with $)`},
		{"NATS_PREFETCH_BYTES=16MB", `"16MB" is not a size (write it as 512, 64KiB, 16MiB or 1GiB)`},
		{"NATS_PREFETCH_BYTES=99999999999GiB", `"99999999999GiB" is not a size (write it as 512, 64KiB, 16MiB or 1GiB)`},
		{"NATS_PREFETCH_BYTES=1", `1 is below the least possible, 1KiB`},
		{"REDIS_ADDRESS=localhost", `"localhost" is not an address (write it as host:port)`},
		{"REDIS_ADDRESS=a:1,", `part 2 of 2: is empty`},
		{"REDIS_ADDRESS=a:0", `"a:0" is not an address (write it as host:port)`},
		{"WEBSOCKET_RATE_LIMIT=20", `"20" is not a rate (write it as 20/s)`},
		{"WEBSOCKET_RATE_LIMIT=NaN/s", `"NaN/s" is not a rate (write it as 20/s)`},
		{"WEBSOCKET_RATE_LIMIT=0/s", `0/s is below the least possible, 0.01/s`},
		{"WEBSOCKET_ALLOWED_ORIGINS=*.a.com, https://b.com", `part 2 of 2: "https://b.com" matches no origin (write it as *.example.com, localhost:*, [::1]:8080, null or file://): it has a scheme or a path`},
		{"WEBSOCKET_ALLOWED_ORIGINS=[a", `"[a" matches no origin (write it as *.example.com, localhost:*, [::1]:8080, null or file://): "[a" is no IPv6 address`},
		{"AUTH_TOKEN_AES_KEY=hush", `a key has 64 hex digits; this one has 4 characters`},
		{"AUTH_TOKEN_AES_KEY=" + zeros + "," + zeros[1:] + "x", `part 2 of 2: a key has 64 hex digits; this one has 64 characters`},
		{"AUTH_SECRET_TOKEN=hush hush", `an API key holds visible ASCII characters only`},
		{"AUTH_PUBLIC_KEY_FILE=/nonexistent/key", `open /nonexistent/key: no such file or directory`},
		{"WEBSOCKET_COMPRESSION=on", `"on" is none of disabled, no_context_takeover, context_takeover`},
	} {
		name, value, _ := strings.Cut(test.line, "=")
		// The line takes the place of the one that env has for it, if any.
		environ := slices.DeleteFunc(env(test.line), func(e string) bool {
			return e != "DAISI_WS_"+test.line && strings.HasPrefix(e, "DAISI_WS_"+strings.TrimSuffix(name, "_FILE")+"=")
		})
		_, _, err := loadConfig("", environ)
		wantLines(t, test.line, lines(err), "", "environment: DAISI_WS_"+name+": "+test.want)
		if strings.Contains(value, "hush") && strings.Contains(fmt.Sprint(err), "hush") {
			t.Errorf("%s: a secret is printed: %v", name, err)
		}
	}
}

func TestAnySpelling(t *testing.T) {
	cfg, _, err := loadConfig("", env("NATS_STREAM_MAX_AGE=60m", "WEBSOCKET_COMPRESSION=No_Context_TakeOver"))
	if err != nil || cfg.NATSStreamMaxAge != time.Hour || cfg.WebsocketCompression != "no_context_takeover" {
		t.Errorf("%+v %v", cfg, err)
	}
}

// What a former version had is no fault in a file that has it still, and has no effect.
func TestFormerSettings(t *testing.T) {
	file := writeFile(t, "x.conf", "DAISI_WS_RESUME_OVERLAP=2m\nDAISI_WS_RESUME_MAX_AGE=never\nDAISI_WS_POD_OWNER_CACHE_SIZE=\nDAISI_WS_PEER_TLS_CERT_FILE=/nowhere\n")
	_, warnings, err := loadConfig(file, env("RESUME_OVERLAP=1s"))
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, "warnings", warnings, file,
		"@:1: DAISI_WS_RESUME_OVERLAP: a setting of a former version, ignored",
		"@:2: DAISI_WS_RESUME_MAX_AGE: a setting of a former version, ignored",
		"@:3: DAISI_WS_POD_OWNER_CACHE_SIZE: a setting of a former version, ignored",
		"@:4: DAISI_WS_PEER_TLS_CERT_FILE: a setting of a former version, ignored",
		"environment: DAISI_WS_RESUME_OVERLAP: unknown setting, ignored")
	for _, name := range formerSettings {
		if settingOf(settingPrefix+name) != nil {
			t.Errorf("%s is a setting again", name)
		}
	}
}

func TestContextTakeoverIsTakenAsNone(t *testing.T) {
	cfg, warnings, err := loadConfig("", env("WEBSOCKET_COMPRESSION=context_takeover"))
	if err != nil || cfg.WebsocketCompression == "disabled" {
		t.Fatal(cfg, err)
	}
	if !strings.Contains(strings.Join(warnings, "\n"), "context_takeover is taken as no_context_takeover") {
		t.Errorf("warnings %q", warnings)
	}
}

func TestAllFaultsAtOnce(t *testing.T) {
	file := writeFile(t, "x.conf", "# settings\n\nDAISI_WS_SERVER_HTTP_PORT=x\nDAISI_WS_NO_SUCH=1\nHOME=/root\nexport A=1\nhush\n"+
		"DAISI_WS_AUTH_SECRET_TOKEN=\"hush\"\nDAISI_WS_REDIS_PASSWORD=hush\\\nDAISI_WS_AUTH_ADMIN_SECRET_TOKEN='hush\n"+
		"DAISI_WS_LOG_FORMAT=\xff\n  DAISI_WS_PEER_TIMEOUT=25s\r\nDAISI_WS_AUTH_PUBLIC_KEY=a\nDAISI_WS_AUTH_PUBLIC_KEY_FILE=b\n=x\n")
	cfg, _, err := loadConfig(file, []string{"DAISI_WS_LOG_LEVEL=loud", "DAISI_WS_AUTH_TOKEN_AES_KEY=" + zeros[1:]})
	wantLines(t, "faults", lines(err), file,
		"@:4: DAISI_WS_NO_SUCH: unknown setting",
		"@:5: HOME: unknown setting",
		"@:6: not of the form KEY=VALUE",
		"@:7: not of the form KEY=VALUE",
		"@:8: DAISI_WS_AUTH_SECRET_TOKEN: the value starts with a quote; write it without quotes (systemd would take them off, docker would not)",
		"@:9: DAISI_WS_REDIS_PASSWORD: the value ends in a backslash (systemd would join the next line to it)",
		"@:10: DAISI_WS_AUTH_ADMIN_SECRET_TOKEN: the value starts with a quote; write it without quotes (systemd would take them off, docker would not)",
		"@:11: DAISI_WS_LOG_FORMAT: the value is not valid UTF-8",
		"@:15: not of the form KEY=VALUE",
		"@:14: DAISI_WS_AUTH_PUBLIC_KEY and DAISI_WS_AUTH_PUBLIC_KEY_FILE are both set; one is enough",
		`@:3: DAISI_WS_SERVER_HTTP_PORT: "x" is not a whole number, or is too large`,
		`environment: DAISI_WS_LOG_LEVEL: "loud" is none of debug, info, warn, error`,
		"environment: DAISI_WS_AUTH_TOKEN_AES_KEY: a key has 64 hex digits; this one has 63 characters",
		"DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY: required; set it or DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY_FILE (daisi-ws-service keygen makes keys)",
		"DAISI_WS_PEER_TIMEOUT (25s) + DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s) + 2s must be less than DAISI_WS_NATS_ACK_WAIT (30s): JetStream would give an event out again while it still waits for its sockets",
	)
	if cfg != nil {
		t.Error("a configuration in spite of faults")
	}
}

func TestFileAndEnvironment(t *testing.T) {
	secret := writeFile(t, "redis", "from a file\r\n\n")
	file := writeFile(t, "x.conf", "DAISI_WS_LOG_LEVEL=debug\nDAISI_WS_LOG_FORMAT=text\n#DAISI_WS_LOG_FORMAT=json\nDAISI_WS_NATS_PREFETCH=7\n"+
		"DAISI_WS_REDIS_PASSWORD_FILE="+secret+"\nDAISI_WS_REDIS_SENTINEL_PASSWORD=a=b#c\nDAISI_WS_SERVER_DRAIN_SPREAD=1s\nDAISI_WS_REDIS_USERNAME=\n")
	cfg, warnings, err := loadConfig(file, env("LOG_LEVEL=error", "NATS_PREFETCH=", "REDIS_SENTINEL_PASSWORD_FILE="))
	if err != nil || warnings != nil {
		t.Fatal(warnings, err)
	}
	got := []any{cfg.LogLevel, cfg.LogFormat, cfg.NATSPrefetch, cfg.RedisPassword, cfg.RedisSentinelPassword, cfg.ServerDrainSpread}
	want := []any{"error", "text", 500, "from a file", "a=b#c", time.Second}
	if !slices.Equal(got, want) {
		t.Errorf("got %q\nwant %q", got, want)
	}
	// The environment wins, whichever of the two names either place uses.
	cfg, _, err = loadConfig(file, env("REDIS_PASSWORD=direct", "REDIS_SENTINEL_PASSWORD_FILE="+secret))
	if err != nil || cfg.RedisPassword != "direct" || cfg.RedisSentinelPassword != "from a file" {
		t.Errorf("%+v, %v", cfg, err)
	}
}

func TestSecretFiles(t *testing.T) {
	file := writeFile(t, "key", "\n")
	for _, test := range []struct{ lines, want []string }{
		{[]string{"REDIS_PASSWORD=hush", "REDIS_PASSWORD_FILE=" + file},
			[]string{"environment: DAISI_WS_REDIS_PASSWORD and DAISI_WS_REDIS_PASSWORD_FILE are both set; one is enough"}},
		{[]string{"REDIS_PASSWORD_FILE=" + file}, []string{"environment: DAISI_WS_REDIS_PASSWORD_FILE: @ is empty"}},
	} {
		_, _, err := loadConfig("", env(test.lines...))
		wantLines(t, "faults", lines(err), file, test.want...)
	}
	// Only a secret has a file.
	_, warnings, err := loadConfig("", env("LOG_LEVEL_FILE=x", "NATS_URL_FILE="+writeFile(t, "url", "nats://u:p@h:1")))
	wantLines(t, "warnings", warnings, "", "environment: DAISI_WS_LOG_LEVEL_FILE: unknown setting, ignored")
	if err != nil {
		t.Error(err)
	}
}

func TestMissingSecrets(t *testing.T) {
	_, _, err := loadConfig("", []string{"DAISI_WS_AUTH_SECRET_TOKEN=x", "DAISI_WS_AUTH_TOKEN_AES_KEY="})
	tail := "_FILE (daisi-ws-service keygen makes keys)"
	wantLines(t, "faults", lines(err), "",
		"DAISI_WS_AUTH_TOKEN_AES_KEY: required; set it or DAISI_WS_AUTH_TOKEN_AES_KEY"+tail,
		"DAISI_WS_AUTH_ADMIN_SECRET_TOKEN: required; set it or DAISI_WS_AUTH_ADMIN_SECRET_TOKEN"+tail,
		"DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY: required; set it or DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY"+tail)
	_, _, err = loadConfig("/nonexistent/x.conf", env())
	wantLines(t, "faults", lines(err), "", "settings file: open /nonexistent/x.conf: no such file or directory")
}

func TestWarnings(t *testing.T) {
	file := writeFile(t, "x.conf", "DAISI_WS_LOG_LEVEL=info \nDAISI_WS_LOG_LEVEL=warn\nDAISI_WS_REDIS_PASSWORD=a\\b\n")
	_, warnings, err := loadConfig(file, append(env("AUTH_PUBLIC_KEY=", "WEBSOCKET_INSECURE_SKIP_VERIFY=true", "SERVER_ENABLE_REFLECTION=1",
		"AUTH_ADMIN_SECRET_TOKEN=general-secret,b", "SERVER_BIND_ADDRESS=::", "NO_SUCH=1", "SERVICE_HOST=10.0.0.1", "SERVICE_PORT=80", "SERVICE_SERVICE_HOST=x",
		"PORT=tcp://10.0.0.1:80", "PORT_80_TCP_ADDR=10.0.0.1"), "DAISI_OTHER=1"))
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, "warnings", warnings, file,
		"@:1: DAISI_WS_LOG_LEVEL: blanks around the value are left out (docker's --env-file keeps them)",
		"@:2: DAISI_WS_LOG_LEVEL is set in line 1 already; this line counts",
		"@:3: DAISI_WS_REDIS_PASSWORD: the value holds a backslash (systemd's EnvironmentFile leaves it out)",
		"environment: DAISI_WS_NO_SUCH: unknown setting, ignored",
		"DAISI_WS_AUTH_PUBLIC_KEY IS NOT SET: user sockets need the general API key, so every browser gets to see it and can mint tokens for anyone",
		"DAISI_WS_WEBSOCKET_INSECURE_SKIP_VERIFY IS ON: any web page may open sockets; for development only",
		"DAISI_WS_SERVER_ENABLE_REFLECTION is on: the gRPC port describes itself to whoever knows a token key; for development only",
		"DAISI_WS_AUTH_SECRET_TOKEN and DAISI_WS_AUTH_ADMIN_SECRET_TOKEN have a key in common: who mints user tokens is an admin too")
}

// running is a settings in force as after a start with this environment.
func running(t *testing.T, file string, environ []string) *settings {
	t.Helper()
	cfg, _, err := loadConfig(file, environ)
	if err != nil {
		t.Fatal(err)
	}
	s := new(settings)
	s.Store(cfg)
	return s
}

func TestReload(t *testing.T) {
	secret := writeFile(t, "key", "first")
	s := running(t, "", env("AUTH_PUBLIC_KEY=", "AUTH_PUBLIC_KEY_FILE="+secret))
	before := s.Load()
	if err := os.WriteFile(secret, []byte("second,first\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	changed, restart, err := s.reload("", env("AUTH_PUBLIC_KEY=", "AUTH_PUBLIC_KEY_FILE="+secret, "LOG_LEVEL=debug", "LOG_FORMAT=text",
		"SERVER_HTTP_PORT=1", "REDIS_PASSWORD=hush", "SESSION_TTL=40s"))
	if err != nil {
		t.Fatal(err)
	}
	wantLines(t, "changed", changed, "", "DAISI_WS_LOG_LEVEL", "DAISI_WS_AUTH_PUBLIC_KEY", "DAISI_WS_SESSION_TTL")
	wantLines(t, "restart", restart, "", "DAISI_WS_SERVER_HTTP_PORT", "DAISI_WS_LOG_FORMAT", "DAISI_WS_REDIS_PASSWORD")
	now := *s.Load()
	want := *before
	want.LogLevel, want.AuthPublicKey, want.SessionTTL = "debug", "second,first", 40*time.Second
	if now != want {
		t.Errorf("now %+v\nwant %+v", now, want)
	}
	if before.LogLevel != "info" {
		t.Error("the configuration that others hold was changed")
	}
}

func TestFaultyReloadChangesNothing(t *testing.T) {
	s := running(t, "", env())
	before := s.Load()
	for _, test := range []struct {
		environ []string
		want    string
	}{
		{env("LOG_LEVEL=debug", "SESSION_TTL=x"), `environment: DAISI_WS_SESSION_TTL: "x" is not a duration (write it as 500ms, 30s or 5m), or is too long`},
		{env("SERVER_DRAIN_SPREAD=20s", "SERVER_SHUTDOWN_TIMEOUT=60s"), "with the settings that need a restart: DAISI_WS_SERVER_DRAIN_SPREAD (20s) + " +
			"DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s) + 5s must be less than DAISI_WS_SERVER_SHUTDOWN_TIMEOUT (30s): the drain would be cut off"},
	} {
		changed, restart, err := s.reload("", test.environ)
		wantLines(t, "fault", lines(err), "", test.want)
		if s.Load() != before || changed != nil || restart != nil {
			t.Errorf("changed %v, restart %v", changed, restart)
		}
	}
}

func TestReloadCannotSwitchTLS(t *testing.T) {
	cert, key := writeKeyPair(t)
	s := running(t, "", env())
	tls := []string{"SERVER_TLS_CERT_FILE=" + cert, "SERVER_TLS_KEY_FILE=" + key}
	names := []string{"DAISI_WS_SERVER_TLS_CERT_FILE", "DAISI_WS_SERVER_TLS_KEY_FILE"}
	changed, restart, err := s.reload("", env(tls...))
	if err != nil || changed != nil || !slices.Equal(restart, names) || s.Load().ServerTLSCertFile != "" {
		t.Errorf("on: changed %v, restart %v, %v", changed, restart, err)
	}
	s = running(t, "", env(tls...))
	cert2, key2 := writeKeyPair(t)
	changed, restart, err = s.reload("", env("SERVER_TLS_CERT_FILE="+cert2, "SERVER_TLS_KEY_FILE="+key2))
	if err != nil || !slices.Equal(changed, names) || restart != nil || s.Load().ServerTLSKeyFile != key2 {
		t.Errorf("other files: changed %v, restart %v, %v", changed, restart, err)
	}
}

// The example file names every setting in the order of Config, with its default and its meaning, and loads as it
// is and with every line switched on.
func TestExampleFile(t *testing.T) {
	const file = "deploy/daisi-ws-service.conf"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var got, want []string
	meaning := ""
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		if strings.HasPrefix(line, "#"+settingPrefix) {
			got = append(got, meaning+"\n"+line)
		}
		meaning = line
	}
	for _, s := range settingTable {
		text := "# " + s.tag.Get("help")
		if s.live() {
			text += " [live]"
		}
		want = append(want, text+"\n#"+s.name+"="+s.def)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%s says\n%s\n\nwant\n%s", file, strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	on := writeFile(t, "on.conf", strings.ReplaceAll(string(data), "\n#"+settingPrefix, "\n"+settingPrefix))
	for _, f := range []string{file, on} {
		if _, warnings, err := loadConfig(f, env()); err != nil || warnings != nil {
			t.Errorf("%s: warnings %v, faults %v", f, warnings, err)
		}
	}
}

// FuzzConfigFile: whatever a file holds, loading it ends, and no secret of it is printed.
func FuzzConfigFile(f *testing.F) {
	f.Add("DAISI_WS_LOG_LEVEL=debug\n# comment\n\nDAISI_WS_SERVER_HTTP_PORT=0\r\n")
	f.Add("DAISI_WS_AUTH_SECRET_TOKEN=\"x\nDAISI_WS_REDIS_PASSWORD=x\\\n=\n\x00")
	f.Add("DAISI_WS_NATS_URL=nats://u:x@[::1\nDAISI_WS_WEBSOCKET_RATE_LIMIT=1e9/s\nDAISI_WS_NATS_PREFETCH_BYTES=9223372036854775807GiB")
	f.Add("DAISI_WS_PEER_TIMEOUT=87600h\nDAISI_WS_WEBSOCKET_WRITE_TIMEOUT=87600h\nDAISI_WS_NATS_ACK_WAIT=-1s")
	file := filepath.Join(f.TempDir(), "x.conf")
	f.Fuzz(func(t *testing.T, text string) {
		// A file that names files would have the fuzzer read them.
		text = strings.ReplaceAll(text, "_FILE", "")
		const hush = "hush-hush-hush"
		text += "\nDAISI_WS_REDIS_PASSWORD=" + hush + "\nDAISI_WS_AUTH_TOKEN_AES_KEY=" + hush + "\nDAISI_WS_NATS_URL=http://u:" + hush + "@h\n"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg, warnings, err := loadConfig(file, nil)
		if cfg != nil || err == nil {
			t.Fatal("accepted a wrong key")
		}
		if out := err.Error() + strings.Join(warnings, "\n"); strings.Contains(out, hush) {
			t.Fatalf("a secret is printed:\n%s", out)
		}
		l := load(file, nil)
		for i := range settingTable {
			s := &settingTable[i]
			v := s.in(l.cfg)
			again := reflect.New(v.Type()).Elem()
			if text := formatValue(v); parseValue(again, text) != nil || !again.Equal(v) {
				t.Errorf("%s is printed as %q, which is not the same value", s.name, text)
			}
		}
	})
}
