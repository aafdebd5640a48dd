package main

import (
	"slices"
	"strings"
	"testing"
)

// oldKeys are the lines that no environment file of the earlier service is whole without.
const oldKeys = "AUTH_SECRET_TOKEN=general-secret\nAUTH_TOKEN_AES_KEY=" + zeros + "\nAUTH_ADMIN_SECRET_TOKEN=admin-secret\nAUTH_ADMIN_TOKEN_AES_KEY=" + ones + "\n"

// migrated translates lines behind the keys, holds what comes of them to check, and returns it with its notes.
func migrated(t *testing.T, lines string) (conf, notes string, whole bool) {
	t.Helper()
	conf, all, whole := migrate(oldKeys + lines)
	if _, _, err := loadConfig(writeFile(t, "new.conf", conf), nil); whole && err != nil {
		t.Errorf("%q becomes\n%swhich is faulty: %v", lines, conf, err)
	}
	return strings.TrimPrefix(conf, settingPrefix+strings.ReplaceAll(strings.TrimSpace(oldKeys), "\n", "\n"+settingPrefix)+"\n"), strings.Join(all[4:], "\n"), whole
}

func TestMigrateLine(t *testing.T) {
	const none = "this service has no such setting"
	secret := writeFile(t, "password", "hush")
	for _, test := range []struct{ old, want string }{
		{"NATS_URL=nats://u:p@nats:4222", "DAISI_WS_NATS_URL=nats://u:p@nats:4222"},
		{"DAISI_WS_REDIS_ADDRESS=redis:6379", "DAISI_WS_REDIS_ADDRESS=redis:6379"},
		{"SESSION_TTL_SECONDS=60", "DAISI_WS_SESSION_TTL=60s"},
		{"DAISI_WS_WEBSOCKET_PING_INTERVAL_SECONDS=2.5", "DAISI_WS_WEBSOCKET_PING_INTERVAL=2.5s"},
		{"GRPC_POOL_IDLE_TIMEOUT_SECONDS=120", "DAISI_WS_PEER_IDLE_TIMEOUT=120s"},
		{"REDIS_PASSWORD_FILE=" + secret, "DAISI_WS_REDIS_PASSWORD_FILE=" + secret},
		{"# as it was ", "# as it was"},
		{"", ""},
		{"\t export LOG_LEVEL = 'DEBUG'  # loud\r", "# loud\nDAISI_WS_LOG_LEVEL=DEBUG"},
		{`REDIS_PASSWORD="a # b"`, "DAISI_WS_REDIS_PASSWORD=a # b"},
		{"REDIS_PASSWORD=a#b # c", "# c\nDAISI_WS_REDIS_PASSWORD=a#b"},
		{"REDIS_PASSWORD=", "DAISI_WS_REDIS_PASSWORD="},
		{"SESSION_TTL_SECONDS=", "DAISI_WS_SESSION_TTL="},
		{"APP_NAME=gateway # ours", "# ours\n# APP_NAME is left out: " + none},
		{"DAISI_WS_SERVICE_HOST=10.0.0.1", "# DAISI_WS_SERVICE_HOST is left out: " + none},
		{"REDIS_DB_SECONDS=1", `# REDIS_DB_SECONDS is left out: "1s" is not a whole number, or is too large`},
		{"hush-hush", "# the line is left out: it is not of the form NAME=VALUE"},
		{"SESSION_TTL=60", `# SESSION_TTL is left out: "60" is not a duration (write it as 500ms, 30s or 5m), or is too long`},
		{"LOG_LEVEL=trace", `# LOG_LEVEL is left out: "trace" is none of debug, info, warn, error`},
	} {
		conf, notes, whole := migrated(t, test.old+"\n")
		if conf != test.want+"\n" || !whole {
			t.Errorf("%q becomes\n%swhole: %v, want\n%s", test.old, conf, whole, test.want)
		}
		if setsSomething := strings.Contains(test.old, "=") || test.old == "hush-hush"; setsSomething != strings.HasPrefix(notes, "line 5: ") {
			t.Errorf("%q is told as %q", test.old, notes)
		}
		if strings.Contains(notes, "hush") {
			t.Errorf("%q is told as %q", test.old, notes)
		}
	}
}

// TestMigrateOneSettingTwice: the earlier service read the name without prefix.
func TestMigrateOneSettingTwice(t *testing.T) {
	for _, test := range []struct{ old, want string }{
		{"LOG_LEVEL=debug\nDAISI_WS_LOG_LEVEL=warn\n", "DAISI_WS_LOG_LEVEL=debug\n# DAISI_WS_LOG_LEVEL is left out: it is set again as LOG_LEVEL, and that counts\n"},
		{"DAISI_WS_LOG_LEVEL=warn\nLOG_LEVEL=debug\n", "# DAISI_WS_LOG_LEVEL is left out: it is set again as LOG_LEVEL, and that counts\nDAISI_WS_LOG_LEVEL=debug\n"},
		{"LOG_LEVEL=debug\nLOG_LEVEL=warn\n", "# LOG_LEVEL is left out: it is set again as LOG_LEVEL, and that counts\nDAISI_WS_LOG_LEVEL=warn\n"},
		{"LOG_LEVEL=loud\nDAISI_WS_LOG_LEVEL=warn\n", "# LOG_LEVEL is left out: \"loud\" is none of debug, info, warn, error\nDAISI_WS_LOG_LEVEL=warn\n"},
	} {
		if conf, _, whole := migrated(t, test.old); conf != test.want || !whole {
			t.Errorf("%q becomes\n%swhole: %v, want\n%s", test.old, conf, whole, test.want)
		}
	}
}

// TestMigrateContradictions: numbers that break a relation here go back to their defaults; those that keep it together stay.
func TestMigrateContradictions(t *testing.T) {
	const together = "SESSION_TTL_SECONDS=15\nSESSION_REFRESH_INTERVAL_SECONDS=5\n"
	if conf, _, _ := migrated(t, together); conf != "DAISI_WS_SESSION_TTL=15s\nDAISI_WS_SESSION_REFRESH_INTERVAL=5s\n" {
		t.Errorf("%q becomes\n%s", together, conf)
	}
	conf, notes, whole := migrated(t, "SESSION_TTL_SECONDS=15\nNATS_ACK_WAIT_SECONDS=5\nSERVER_IDLE_TIMEOUT_SECONDS=90\n")
	lines := strings.Split(conf, "\n")
	if !whole || len(lines) != 4 || !strings.HasPrefix(lines[0], "# SESSION_TTL_SECONDS is left out: DAISI_WS_SESSION_REFRESH_INTERVAL (10s) must be") ||
		!strings.HasPrefix(lines[1], "# NATS_ACK_WAIT_SECONDS is left out: ") || lines[2] != "DAISI_WS_SERVER_IDLE_TIMEOUT=90s" {
		t.Errorf("whole: %v, %s%s", whole, conf, notes)
	}
}

// TestMigrateEssentials: without its keys, an address or a name nothing can be used, and the note says which setting is to be made by hand.
func TestMigrateEssentials(t *testing.T) {
	for _, test := range []struct{ old, note string }{
		{"REDIS_ADDRESS=redis://redis:6379", `line 5: REDIS_ADDRESS is left out: "redis://redis:6379" is not an address (write it as host:port); set DAISI_WS_REDIS_ADDRESS by hand`},
		{"REDIS_ADDRESS=a:1,b:2", "line 5: REDIS_ADDRESS is left out: DAISI_WS_REDIS_ADDRESS (a:1,b:2) must be one address with DAISI_WS_REDIS_MODE (single); set DAISI_WS_REDIS_ADDRESS by hand"},
		{"NATS_URL=http://hush@h:1", "line 5: NATS_URL is left out: not a URL of a NATS server (write it as nats://host:4222, or with tls, ws or wss); set DAISI_WS_NATS_URL by hand"},
		{"REDIS_PASSWORD='hush", "line 5: REDIS_PASSWORD is left out: DAISI_WS_REDIS_PASSWORD: the value starts with a quote; write it without quotes (systemd would take them off, docker would not); set DAISI_WS_REDIS_PASSWORD by hand"},
	} {
		if _, notes, whole := migrated(t, test.old); whole || notes != test.note {
			t.Errorf("%q: whole %v,\n got %s\nwant %s", test.old, whole, notes, test.note)
		}
	}
	_, notes, whole := migrate("AUTH_SECRET_TOKEN=hush\nAUTH_TOKEN_AES_KEY=hush\nAUTH_ADMIN_SECRET_TOKEN=\nAUTH_ADMIN_TOKEN_AES_KEY_FILE=/run/key\n")
	want := []string{
		"line 1: AUTH_SECRET_TOKEN is now DAISI_WS_AUTH_SECRET_TOKEN",
		"line 2: AUTH_TOKEN_AES_KEY is left out: a key has 64 hex digits; this one has 4 characters; set DAISI_WS_AUTH_TOKEN_AES_KEY by hand",
		"line 3: AUTH_ADMIN_SECRET_TOKEN is now DAISI_WS_AUTH_ADMIN_SECRET_TOKEN",
		"line 4: AUTH_ADMIN_TOKEN_AES_KEY_FILE is now DAISI_WS_AUTH_ADMIN_TOKEN_AES_KEY_FILE",
		"no line sets DAISI_WS_AUTH_TOKEN_AES_KEY, which is required",
		"no line sets DAISI_WS_AUTH_ADMIN_SECRET_TOKEN, which is required",
	}
	if whole || !slices.Equal(notes, want) {
		t.Errorf("whole: %v, %s", whole, strings.Join(notes, "\n"))
	}
}

// TestMigrateKeepsSettings: a settings file of today comes back as it was, in the order that it had.
func TestMigrateKeepsSettings(t *testing.T) {
	all := "# all of them\n\n"
	for _, s := range settingTable {
		value := s.def
		switch {
		case s.tag.Get("check") == "aesKey":
			value = zeros
		case s.tag.Get("required") != "":
			value = "secret"
		}
		all += s.name + "=" + value + "\n"
	}
	if conf, _, whole := migrate(all); conf != all || !whole {
		t.Errorf("whole: %v, became\n%s", whole, conf)
	}
}
