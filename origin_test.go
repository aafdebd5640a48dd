package main

import (
	"strings"
	"testing"
)

func TestOrigins(t *testing.T) {
	const entries = "*.example.com,app.test:8443,localhost:*,[::1]:*,[2001:DB8:0:0::1]:8443,bücher.example,*.Пример.рф:443,10.0.0.*,secure.test:443,."
	for origin, ok := range map[string]bool{
		"http://me.test":                  true,
		"https://ME.test:443":             true,
		"http://me.test:8080":             false,
		"https://a.example.com":           true,
		"https://A.EXAMPLE.com":           true,
		"https://a.example.com:443":       true,
		"https://example.com":             false,
		"https://a.example.com.evil":      false,
		"https://a.example.com:9":         false,
		"https://app.test:8443":           true,
		"https://app.test":                false,
		"http://localhost:3000":           true,
		"http://localhost":                true,
		"https://secure.test":             true,
		"http://secure.test":              false,
		"http://[::1]:3000":               true,
		"http://[::1]":                    true,
		"http://[::2]:3000":               false,
		"http://::1:3000":                 false,
		"https://[2001:db8::1]:8443":      true,
		"https://[2001:db8::1]:8444":      false,
		"https://2:8443":                  false, // would be of the class [2001:DB8]
		"https://xn--bcher-kva.example":   true,
		"https://bucher.example":          false,
		"https://a.xn--e1afmkfd.xn--p1ai": true,
		"http://a.xn--e1afmkfd.xn--p1ai":  false,
		"http://10.0.0.7":                 true,
		"http://10.0.1.7":                 false,
		"app://.":                         true,
		"null":                            false,
		"file://":                         false,
		"":                                false,
		"https://evil/?.example.com":      false,
		"://":                             false,
		"https://u@a.example.com/x/y":     true,
	} {
		if got := originAllowed(origin, "me.test", entries); got != ok {
			t.Errorf("origin %q: %v", origin, got)
		}
	}
	for _, c := range []struct {
		origin, entries string
		ok              bool
	}{
		{"null", "null", true}, {"null", "NULL", true}, {"null", "*", false}, {"null", "*,file://", false},
		{"file://", "file://", true}, {"file://", "*,null", false}, {"http://null:80/", "file://", false},
	} {
		if got := originAllowed(c.origin, "me.test", c.entries); got != c.ok {
			t.Errorf("origin %q with %q: %v", c.origin, c.entries, got)
		}
	}
}

// What can never match is refused when the settings are read.
func TestOriginEntries(t *testing.T) {
	for _, good := range []string{"*", "*:*", "*.example.com", "a?.example.com:80*", "localhost:*", "xn--*.example", "a_b.c", "example.com.", "127.0.0.1:*", "192.168.*",
		"[::1]", "[::1]:*", "[fe80::1]:8443", "bücher.example", "*.bücher.example", "☕.example:8080", "null", "file://", "."} {
		if err := checkOriginGlob(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for bad, why := range map[string]string{
		"https://app.example.com": "scheme", "example.com/chat": "scheme", "file:///": "scheme", "null://": "scheme",
		"a:": "no port", "a:0": "no port", "a:080": "no port", "a:65536": "no port", "a:http": "no port", "a:*x": "no port",
		"::1": "brackets", "2001:db8::1": "brackets", "[::1": "no IPv6", "[::1]x": "no IPv6", "[127.0.0.1]": "no IPv6", "[fe80::1%eth0]": "no IPv6", "[::ffff:1.2.3.4]": "no IPv6",
		"[2001:db8::*]": "no IPv6", "app[0-9].example": "no host", `a\.b`: "no host", "a b": "no host", "u@a": "no host", ".example.com": "no host", "a..b": "no host", ":8080": "no host",
		"b*ücher.example": "wildcard", "bü\u202echer.example": "disallowed", "1.2.3": "no IPv4", "1.2.3.400": "no IPv4", "010.0.0.1": "no IPv4", "a.7": "no IPv4",
	} {
		if err := checkOriginGlob(bad); err == nil || !strings.Contains(err.Error(), why) {
			t.Errorf("%q: %v, want something about %q", bad, err, why)
		}
	}
}

// FuzzOriginEntry: whatever entry is accepted, some origin matches it.
func FuzzOriginEntry(f *testing.F) {
	for _, s := range []string{"*.example.com", "localhost:*", "[2001:DB8::1]:84?3", "*.bücher.example:443", "null", "FILE://", "10.0.?.*", "例。jp", "a:b:c", "[[::1]]"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, entry string) {
		pattern, err := originPattern(entry)
		if err != nil {
			return
		}
		origin := strings.NewReplacer(`\`, "", "*", "1", "?", "1").Replace(pattern)
		if origin != "null" && origin != "file://" {
			origin = "https://" + origin
		}
		if !originAllowed(origin, "me.test", entry) {
			t.Errorf("%q does not match %q, as which %q is read", origin, pattern, entry)
		}
	})
}

// A refused origin is counted each time, and logged once a second; the next line says how many were not.
func TestRefusedOriginIsCountedAndLogged(t *testing.T) {
	log := captureLog(t)
	s := newTestServer(nil)
	for range 3 {
		wantAnswer(t, ask(s, "GET", "/ws/c/a", "", append(upgradeHeaders, "Origin: https://evil.example", "Origin: "+strings.Repeat("x", 1000))...), 403,
			`{"code":"OriginNotAllowed","message":"origin is not allowed"}`)
	}
	s.refusedOrigins.last = s.refusedOrigins.last.Add(-1e9)
	ask(s, "GET", "/ws/c/a", "", append(upgradeHeaders, "Origin: null")...)
	if n := s.m.originsRefusedTotal.with().Get(); n != 4 {
		t.Errorf("%d refusals counted, want 4", n)
	}
	var lines []string
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, `"msg":"origin refused`) {
			lines = append(lines, line)
		}
	}
	if len(lines) != 2 || !strings.Contains(lines[0], `"origin":"https://evil.example, xxx`) || len(lines[0]) > 600 || !strings.Contains(lines[0], `"suppressed":0`) ||
		!strings.Contains(lines[1], `"origin":"null"`) || !strings.Contains(lines[1], `"suppressed":2`) {
		t.Errorf("logged %q", lines)
	}
	s.cfg.Store(&Config{WebsocketInsecureSkipVerify: true})
	if r := ask(s, "GET", "/ws/c/a", "", append(upgradeHeaders, "Origin: https://evil.example")...); r.StatusCode != 401 {
		t.Errorf("with the check switched off: %d", r.StatusCode)
	}
}
