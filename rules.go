package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"math"
	"net"
	"net/netip"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"
)

// byteSize is a size in bytes, written as 512, 64KiB, 16MiB or 1GiB.
type byteSize int64

// ratePerSecond is a rate, written as 20/s.
type ratePerSecond float64

// byteUnits from the largest down, so that a size is printed in the largest unit that divides it.
var byteUnits = []struct {
	name string
	size int64
}{{"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}, {"B", 1}}

// parseByteSize takes whole numbers only: 1.5GiB is not worth the doubt about rounding.
func parseByteSize(s string) (byteSize, error) {
	digits, unit := s, int64(1)
	for _, u := range byteUnits {
		if d, ok := strings.CutSuffix(s, u.name); ok {
			digits, unit = d, u.size
			break
		}
	}
	n, err := strconv.ParseUint(digits, 10, 63)
	if err != nil || int64(n) > math.MaxInt64/unit {
		return 0, fmt.Errorf("%q is not a size (write it as 512, 64KiB, 16MiB or 1GiB)", s)
	}
	return byteSize(int64(n) * unit), nil
}

func (b byteSize) String() string {
	for _, u := range byteUnits[:len(byteUnits)-1] {
		if b != 0 && int64(b)%u.size == 0 {
			return strconv.FormatInt(int64(b)/u.size, 10) + u.name
		}
	}
	return strconv.FormatInt(int64(b), 10)
}

// parseRate takes fractions: 0.5/s is one message every two seconds.
func parseRate(s string) (ratePerSecond, error) {
	digits, ok := strings.CutSuffix(s, "/s")
	// ParseFloat reads more than anyone would write here: NaN, infinities, hexadecimal.
	f, err := strconv.ParseFloat(digits, 64)
	if !ok || err != nil || strings.Trim(digits, "0123456789.") != "" {
		return 0, fmt.Errorf("%q is not a rate (write it as 20/s)", s)
	}
	return ratePerSecond(f), nil
}

func (r ratePerSecond) String() string {
	return strconv.FormatFloat(float64(r), 'f', -1, 64) + "/s"
}

// longest bounds every duration, so that no sum of them overflows.
const longest = 10 * 365 * 24 * time.Hour

// parseValue reads s as the type of v, a field of Config, and stores it there.
func parseValue(v reflect.Value, s string) (err error) {
	switch p := v.Addr().Interface().(type) {
	case *string:
		*p = s
	case *bool:
		if *p, err = strconv.ParseBool(s); err != nil {
			err = fmt.Errorf("%q is neither true nor false", s)
		}
	case *int:
		// 32 bits on every platform, so that no sum of settings overflows.
		n, parseErr := strconv.ParseInt(s, 10, 32)
		if *p = int(n); parseErr != nil {
			err = fmt.Errorf("%q is not a whole number, or is too large", s)
		}
	case *time.Duration:
		if *p, err = time.ParseDuration(s); err != nil || p.Abs() > longest {
			err = fmt.Errorf("%q is not a duration (write it as 500ms, 30s or 5m), or is too long", s)
		}
	case *byteSize:
		*p, err = parseByteSize(s)
	case *ratePerSecond:
		*p, err = parseRate(s)
	default:
		err = fmt.Errorf("no way to read a %s", v.Type())
	}
	return err
}

// formatValue writes a setting's value as parseValue reads it, and as people write it: 24h, not 24h0m0s.
func formatValue(v reflect.Value) string {
	s := fmt.Sprint(v.Interface())
	if d, ok := v.Interface().(time.Duration); ok {
		if d == 0 {
			return "0"
		}
		if t, ok := strings.CutSuffix(s, "m0s"); ok {
			s = t + "m"
		}
		if t, ok := strings.CutSuffix(s, "h0m"); ok {
			s = t + "h"
		}
	}
	return s
}

// set stores text in v, the field of s, if it is a value that s may have.
func (s *setting) set(v reflect.Value, text string) error {
	if allowed := s.tag.Get("oneof"); allowed != "" {
		text = strings.ToLower(text)
	}
	if err := parseValue(v, text); err != nil {
		return err
	}
	bound := func(tag string) reflect.Value {
		b := reflect.New(v.Type()).Elem()
		parseValue(b, s.tag.Get(tag))
		return b
	}
	switch {
	case s.tag.Get("min") != "" && lessValue(v, bound("min")):
		return fmt.Errorf("%s is below the least possible, %s", text, s.tag.Get("min"))
	case s.tag.Get("max") != "" && lessValue(bound("max"), v):
		return fmt.Errorf("%s is above the most possible, %s", text, s.tag.Get("max"))
	}
	if allowed := s.tag.Get("oneof"); allowed != "" && !slices.Contains(strings.Split(allowed, ","), text) {
		return fmt.Errorf("%q is none of %s", text, strings.ReplaceAll(allowed, ",", ", "))
	}
	check := checks[s.tag.Get("check")]
	switch {
	case check == nil:
		return nil
	case s.tag.Get("list") == "":
		return check(text)
	}
	return s.setList(v, text, check)
}

// setList checks the parts of a comma-separated list and stores it without the blanks around them, so that
// nobody who splits it has to trim.
func (s *setting) setList(v reflect.Value, text string, check func(string) error) error {
	parts := strings.Split(text, ",")
	for i, part := range parts {
		parts[i] = strings.TrimSpace(part)
		err := check(parts[i])
		if parts[i] == "" {
			err = errors.New("is empty")
		}
		if err != nil && len(parts) > 1 {
			err = fmt.Errorf("part %d of %d: %w", i+1, len(parts), err)
		}
		if err != nil {
			return err
		}
	}
	v.SetString(strings.Join(parts, ","))
	return nil
}

// lessValue compares two values of one numeric type.
func lessValue(a, b reflect.Value) bool {
	if a.CanInt() {
		return a.Int() < b.Int()
	}
	return a.Float() < b.Float()
}

// splitList splits a setting that is a list; an empty one has no parts.
func splitList(s string) []string {
	if s == "" {
		return nil
	}
	return strings.Split(s, ",")
}

// checks are the rules that the tag check names, for one value or one part of a list. What checks a secret must not print it.
var checks = map[string]func(string) error{
	"podID":     checkPodID,
	"host":      checkHost,
	"hostPort":  checkHostPort,
	"dialable":  checkDialable,
	"natsURL":   checkNATSURL,
	"natsName":  checkNATSName,
	"subject":   checkSubjectPrefix,
	"apiPrefix": checkAPIPrefix,
	"apiKey":    checkAPIKey,
	"aesKey":    checkAESKey,
	"origin":    checkOriginGlob,
}

// alphanumeric is, with a few signs, what names of hosts and pods are made of.
const alphanumeric = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"

// checkPodID: a pod id is part of Redis keys and a value of metric labels.
func checkPodID(s string) error {
	if len(s) > 128 || !madeOf(s, alphanumeric+"._-") {
		return fmt.Errorf("%q is not a pod id (1 to 128 of A-Z a-z 0-9 . _ -)", s)
	}
	return nil
}

// checkHost accepts an IP address or a host name, without a port.
func checkHost(s string) error {
	if _, err := netip.ParseAddr(s); err == nil {
		return nil
	}
	if !madeOf(s, alphanumeric+".-_") || len(s) > 253 {
		return fmt.Errorf("%q is neither an IP address nor a host name", s)
	}
	return nil
}

// madeOf says whether s is not empty and made of these bytes alone.
func madeOf(s, bytes string) bool {
	for i := range len(s) {
		if strings.IndexByte(bytes, s[i]) < 0 {
			return false
		}
	}
	return s != ""
}

// checkHostPort accepts host:port with a port to dial, never 0; the host may be left out.
func checkHostPort(s string) error {
	host, port, err := net.SplitHostPort(s)
	if n, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil || n == 0 || host != "" && checkHost(host) != nil {
		return fmt.Errorf("%q is not an address (write it as host:port)", withoutUser(s))
	}
	return nil
}

// checkDialable accepts host or host:port that others can dial: "all interfaces" is no such address.
func checkDialable(s string) error {
	host := s
	if checkHost(s) != nil {
		if err := checkHostPort(s); err != nil {
			return fmt.Errorf("%q is not an address (write it as host or host:port)", withoutUser(s))
		}
		host, _, _ = net.SplitHostPort(s)
	}
	if ip, err := netip.ParseAddr(host); host == "" || err == nil && ip.IsUnspecified() {
		return fmt.Errorf("%q is not an address that peers could dial", s)
	}
	return nil
}

// checkNATSURL accepts what nats.Connect does. The URL may hold a password: neither it nor the parser's error is printed.
func checkNATSURL(s string) error {
	if !strings.Contains(s, "://") {
		s = "nats://" + s
	}
	u, err := url.Parse(s)
	if err != nil || u.Hostname() == "" || !slices.Contains([]string{"nats", "tls", "ws", "wss"}, u.Scheme) {
		return errors.New("not a URL of a NATS server (write it as nats://host:4222, or with tls, ws or wss)")
	}
	return nil
}

// checkNATSName: what a subject of JetStream's API could not hold in one token, or a file name.
func checkNATSName(s string) error {
	if strings.ContainsAny(s, `.*>/\`) || !visibleASCII(s) || len(s) > 255 {
		return fmt.Errorf(`%q is not a name for JetStream (no blanks, none of . * > / \)`, s)
	}
	return nil
}

// visibleASCII says whether s is made of visible ASCII alone: no blank, no control character.
func visibleASCII(s string) bool {
	for i := range len(s) {
		if s[i] <= ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}

// checkSubjectPrefix: with .> behind it, it is the filter of the consumer; $JS and the like are the server's own.
func checkSubjectPrefix(s string) error {
	if checkAPIPrefix(s) != nil || s[0] == '$' {
		return fmt.Errorf("%q is not a subject prefix (tokens joined by dots, without blanks, * and >, not beginning with $)", s)
	}
	return nil
}

// checkAPIPrefix: names of JetStream's requests follow behind a dot.
func checkAPIPrefix(s string) error {
	if strings.ContainsAny(s, "*>") || !visibleASCII(s) || slices.Contains(strings.Split(s, "."), "") {
		return fmt.Errorf("%q is not a prefix of subjects (tokens joined by dots, without blanks, * and >)", s)
	}
	return nil
}

// checkAPIKey: a key travels in a header (RFC 9110 section 5.5), where blanks at the ends would be lost.
func checkAPIKey(s string) error {
	if !visibleASCII(s) {
		return errors.New("an API key holds visible ASCII characters only")
	}
	return nil
}

// checkAESKey: AES-256, as hex so that no shell or template changes it.
func checkAESKey(s string) error {
	if len(s) != 64 || !madeOf(s, "0123456789abcdefABCDEF") {
		return fmt.Errorf("a key has 64 hex digits; this one has %d characters", len(s))
	}
	return nil
}

// checkOriginGlob refuses what would silently match nothing.
func checkOriginGlob(s string) error {
	if _, err := originPattern(s); err != nil {
		return fmt.Errorf("%q matches no origin (write it as *.example.com, localhost:*, [::1]:8080, null or file://): %w", s, err)
	}
	return nil
}

// withoutUser leaves out what stands before an @: somebody may have written an address as a URL, with its password.
func withoutUser(s string) string { return s[strings.LastIndexByte(s, '@')+1:] }

// drainSteps is what a drain needs beside the closing of sockets: stopping the pull, lease, gRPC, HTTP, NATS, Redis.
const drainSteps = 5 * time.Second

// relations are the inequalities between settings; $NAME stands for a setting and its value.
var relations = []struct {
	holds func(*Config) bool
	text  string
}{
	{func(c *Config) bool { return c.PeerTimeout+c.WebsocketWriteTimeout+lateSlack < c.NATSAckWait },
		"$PEER_TIMEOUT + $WEBSOCKET_WRITE_TIMEOUT + " + lateSlack.String() + " must be less than $NATS_ACK_WAIT: JetStream would give an event out again while it still waits for its sockets"},
	{func(c *Config) bool { return c.NATSPrefetch+c.NATSParkedBudget <= c.NATSMaxAckPending/2 },
		"$NATS_PREFETCH + $NATS_PARKED_BUDGET must be at most half of $NATS_MAX_ACK_PENDING: waiting events would stop the flow of all pods"},
	{func(c *Config) bool { return c.NATSJSDomain == "" || c.NATSJSAPIPrefix == "" },
		"$NATS_JS_DOMAIN and $NATS_JS_API_PREFIX exclude each other: each says where JetStream's API is"},
	{func(c *Config) bool { return c.NATSCredsFile == "" || c.NATSNKeyFile == "" },
		"$NATS_CREDS_FILE and $NATS_NKEY_FILE exclude each other: each says who this service is"},
	{func(c *Config) bool { return c.WebsocketBlockTimeout < c.WebsocketWriteTimeout },
		"$WEBSOCKET_BLOCK_TIMEOUT must be less than $WEBSOCKET_WRITE_TIMEOUT: a socket would be closed as slow before its events stop waiting for room"},
	{func(c *Config) bool {
		return c.ServerDrainSpread+c.WebsocketWriteTimeout+drainSteps < c.ServerShutdownTimeout
	}, "$SERVER_DRAIN_SPREAD + $WEBSOCKET_WRITE_TIMEOUT + " + drainSteps.String() + " must be less than $SERVER_SHUTDOWN_TIMEOUT: the drain would be cut off"},
	{func(c *Config) bool { return c.SessionRefreshInterval < c.SessionTTL/2 },
		"$SESSION_REFRESH_INTERVAL must be less than half of $SESSION_TTL: one missed renewal would lose the session"},
	{func(c *Config) bool { return c.ServerHTTPPort == 0 || c.ServerHTTPPort != c.ServerGRPCPort },
		"$SERVER_HTTP_PORT and $SERVER_GRPC_PORT must differ"},
	{func(c *Config) bool { return c.RedisMode != "single" || len(splitList(c.RedisAddress)) == 1 },
		"$REDIS_ADDRESS must be one address with $REDIS_MODE"},
	{func(c *Config) bool { return c.RedisMode != "cluster" || c.RedisDB == 0 },
		"$REDIS_DB must be 0 with $REDIS_MODE: a cluster has no other"},
	{func(c *Config) bool { return c.RedisMode != "sentinel" || c.RedisSentinelMaster != "" },
		"$REDIS_SENTINEL_MASTER is required with $REDIS_MODE"},
	{func(c *Config) bool { return disjoint(c.AuthPublicKey, c.AuthSecretToken) },
		"$AUTH_PUBLIC_KEY and $AUTH_SECRET_TOKEN must have no key in common: every browser could mint tokens"},
	{func(c *Config) bool { return disjoint(c.AuthPublicKey, c.AuthAdminSecretToken) },
		"$AUTH_PUBLIC_KEY and $AUTH_ADMIN_SECRET_TOKEN must have no key in common: every browser would be an admin"},
}

// disjoint says whether two lists have no part in common.
func disjoint(a, b string) bool {
	other := splitList(b)
	return !slices.ContainsFunc(splitList(a), func(s string) bool { return slices.Contains(other, s) })
}

// findSetting returns the setting of this name (without DAISI_WS_), which must exist.
func findSetting(name string) *setting {
	i := slices.IndexFunc(settingTable, func(s setting) bool { return s.name == settingPrefix+name })
	return &settingTable[i]
}

// checkRelations reports every relation that c breaks, except where one of its settings has a fault already.
func (l *loader) checkRelations(c *Config) {
	for _, r := range relations {
		if r.holds(c) {
			continue
		}
		var first *setting
		known := true
		text := os.Expand(r.text, func(name string) string {
			s := findSetting(name)
			if first == nil {
				first = s
			}
			known = known && !l.faulty(s)
			return s.name + s.shown(c)
		})
		if known {
			l.fault(first, "%s", text)
		}
	}
}

// shown is a setting's value for a fault's line, in brackets; nothing for a secret.
func (s *setting) shown(c *Config) string {
	if s.secret() {
		return ""
	}
	return " (" + orEmpty(formatValue(s.in(c))) + ")"
}

func orEmpty(s string) string {
	if s == "" {
		return "empty"
	}
	return s
}

// checkFiles reads the certificates, keys and credentials that c names, so that the start (or a reload) stops here and
// not at the first connection.
func (l *loader) checkFiles(c *Config) {
	for _, section := range []string{"SERVER", "NATS", "REDIS"} {
		l.checkKeyPair(findSetting(section+"_TLS_CERT_FILE"), findSetting(section+"_TLS_KEY_FILE"))
		if section != "SERVER" {
			l.checkCA(findSetting(section + "_TLS_CA_FILE"))
		}
	}
	for _, name := range []string{"NATS_CREDS_FILE", "NATS_NKEY_FILE"} {
		s := findSetting(name)
		if file := s.in(c).String(); file != "" {
			if _, err := os.ReadFile(file); err != nil {
				l.fault(s, "%s: %v", s.name, err)
			}
		}
	}
}

// checkKeyPair wants both files or none, and that they belong together.
func (l *loader) checkKeyPair(cert, key *setting) {
	certFile, keyFile := cert.in(l.cfg).String(), key.in(l.cfg).String()
	switch {
	case l.faulty(cert) || l.faulty(key) || certFile == "" && keyFile == "":
	case keyFile == "":
		l.fault(key, "%s: required, since %s is set", key.name, cert.name)
	case certFile == "":
		l.fault(cert, "%s: required, since %s is set", cert.name, key.name)
	default:
		if _, err := tls.LoadX509KeyPair(certFile, keyFile); err != nil {
			l.fault(cert, "%s and %s: %v", cert.name, key.name, err)
		}
	}
}

// checkCA wants a certificate in the file: an empty pool would trust nobody, seen only as failing connections.
func (l *loader) checkCA(s *setting) {
	file := s.in(l.cfg).String()
	if file == "" || l.faulty(s) {
		return
	}
	pem, err := os.ReadFile(file)
	if err == nil && !x509.NewCertPool().AppendCertsFromPEM(pem) {
		err = fmt.Errorf("%s holds no certificate (PEM)", file)
	}
	if err != nil {
		l.fault(s, "%s: %v", s.name, err)
	}
}

// warn tells of what works but may not be what is wanted, or is meant for development.
func (l *loader) warn(c *Config) {
	if c.AuthPublicKey == "" {
		l.warning("DAISI_WS_AUTH_PUBLIC_KEY IS NOT SET: user sockets need the general API key, so every browser gets to see it and can mint tokens for anyone")
	}
	if c.WebsocketInsecureSkipVerify {
		l.warning("DAISI_WS_WEBSOCKET_INSECURE_SKIP_VERIFY IS ON: any web page may open sockets; for development only")
	}
	if slices.Contains(splitList(strings.ToLower(c.WebsocketAllowedOrigins)), "null") {
		l.warning("DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS lists null: any web page can have that origin, in a sandboxed frame")
	}
	if c.WebsocketCompression == "context_takeover" {
		l.warning("DAISI_WS_WEBSOCKET_COMPRESSION: context_takeover is taken as no_context_takeover: a window of its own costs 1.2 MB per socket")
	}
	if c.ServerEnableReflection {
		l.warning("DAISI_WS_SERVER_ENABLE_REFLECTION is on: the gRPC port describes itself to whoever knows a token key; for development only")
	}
	if !disjoint(c.AuthSecretToken, c.AuthAdminSecretToken) {
		l.warning("DAISI_WS_AUTH_SECRET_TOKEN and DAISI_WS_AUTH_ADMIN_SECRET_TOKEN have a key in common: who mints user tokens is an admin too")
	}
	if !c.RedisTLS && c.RedisTLSCAFile+c.RedisTLSCertFile+c.RedisTLSKeyFile != "" {
		l.warning("DAISI_WS_REDIS_TLS is off: the files named by DAISI_WS_REDIS_TLS_* are not used")
	}
}
