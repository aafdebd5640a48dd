package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/net/idna"
)

// checkOrigin allows an absent origin, the request's own host, and what an entry of ALLOWED_ORIGINS matches. A refusal is counted
// and logged: it is what a page that was forgotten in the setting looks like, or a proxy that changes the Host header.
func (s *server) checkOrigin(w http.ResponseWriter, r *http.Request) *apiError {
	origins, cfg := r.Header.Values("Origin"), s.cfg.Load()
	if len(origins) == 0 || cfg.WebsocketInsecureSkipVerify || len(origins) == 1 && originAllowed(origins[0], r.Host, cfg.WebsocketAllowedOrigins) {
		return nil
	}
	s.m.originsRefusedTotal.with().Inc()
	if suppressed, ok := s.refusedOrigins.turn(time.Now()); ok {
		slog.Warn("origin refused: it is neither the request's host nor in WEBSOCKET_ALLOWED_ORIGINS", "request_id", requestID(w),
			"origin", fmt.Sprintf("%.200s", strings.Join(origins, ", ")), "host", fmt.Sprintf("%.200s", r.Host), "suppressed", suppressed)
	}
	return originNotAllowed()
}

// originAllowed compares an origin with the request's Host header and with the entries of ALLOWED_ORIGINS. Browsers leave the
// scheme's own port out; an entry may name it.
func originAllowed(origin, host, entries string) bool {
	origin = strings.ToLower(origin)
	u, err := url.Parse(origin)
	if err != nil {
		return false
	}
	port := ":80"
	if u.Scheme == "https" {
		port = ":443"
	}
	short, long := u.Host, u.Host
	if u.Port() == "" {
		long += port
	} else {
		short = strings.TrimSuffix(short, port)
	}
	if u.Host != "" && strings.EqualFold(short, strings.TrimSuffix(host, port)) {
		return true
	}
	for _, entry := range splitList(entries) {
		pattern, err := originPattern(entry)
		if err != nil {
			continue // the settings were checked before they came into force
		}
		for _, text := range []string{short, long} {
			if ok, _ := path.Match(pattern, text); ok && u.Host != "" || origin == pattern {
				return true
			}
		}
	}
	return false
}

// asBrowsersDo makes ASCII of an internationalised name ("domain to ASCII" of the URL Standard).
var asBrowsersDo = idna.New(idna.MapForLookup(), idna.BidiRule(), idna.CheckHyphens(false), idna.StrictDomainName(false))

// originPattern turns an entry of ALLOWED_ORIGINS into a pattern for path.Match that origins are held against as browsers write
// them ("host serializing" of the URL Standard): names in lower case and in punycode, IPv6 addresses at their shortest. null and
// file:// are the two origins without a host and stay as they are. An entry that no origin can match is an error.
func originPattern(entry string) (string, error) {
	if entry = strings.ToLower(entry); entry == "null" || entry == "file://" {
		return entry, nil
	}
	if strings.Contains(entry, "/") {
		return "", errors.New("it has a scheme or a path")
	}
	host, port, found := entry, "", false
	if i := strings.LastIndexByte(entry, ':'); i > strings.LastIndexByte(entry, ']') {
		host, port, found = entry[:i], entry[i+1:], true
	}
	host, err := hostPattern(host)
	if err != nil || !found {
		return host, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	fixed := err == nil && n > 0 && strconv.FormatUint(n, 10) == port
	if !fixed && !(strings.ContainsAny(port, "*?") && madeOf(port, "0123456789*?")) {
		return "", fmt.Errorf("%q is no port", port)
	}
	return host + ":" + port, nil
}

// hostPattern is originPattern for the host alone.
func hostPattern(host string) (string, error) {
	if inner, ok := strings.CutPrefix(host, "["); ok {
		inner, ok = strings.CutSuffix(inner, "]")
		// Of an IPv4 address in IPv6's clothes browsers write the last part in hex, netip with dots.
		ip, err := netip.ParseAddr(inner)
		if !ok || err != nil || !ip.Is6() || ip.Is4In6() || ip.Zone() != "" {
			return "", fmt.Errorf("%q is no IPv6 address", host)
		}
		return `\[` + ip.String() + "]", nil
	}
	if strings.Contains(host, ":") {
		return "", errors.New("an IPv6 address stands in brackets, as in [2001:db8::1]:8443")
	}
	labels := strings.Split(host, ".")
	for i, label := range labels {
		if visibleASCII(label) {
			continue
		}
		if strings.ContainsAny(label, "*?") {
			return "", fmt.Errorf("%q: beside letters that browsers write in punycode a wildcard matches nothing", label)
		}
		ascii, err := asBrowsersDo.ToASCII(label)
		if err != nil {
			return "", err
		}
		labels[i] = ascii
	}
	host = strings.Join(labels, ".")
	if !madeOf(host, alphanumeric+"-._*?") || host[0] == '.' && len(host) > 1 || strings.Contains(host, "..") {
		return "", fmt.Errorf("%q is no host", host)
	}
	// Browsers take a host for an IPv4 address if its last part is a number, and write it with four parts.
	last := labels[len(labels)-1]
	if _, err := netip.ParseAddr(host); err != nil && madeOf(last, "0123456789") && !strings.ContainsAny(host, "*?") {
		return "", fmt.Errorf("%q is no IPv4 address", host)
	}
	return host, nil
}
