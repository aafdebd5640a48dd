package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

const notYet = "not yet"

// effects names, for each setting, the test that shows its effect on the running service (here or in dev/e2e).
var effects = map[string]string{
	"SERVER_HTTP_PORT":                "planned: TestPortsOfTheListeningLine",
	"SERVER_GRPC_PORT":                "planned: TestPortsOfTheListeningLine",
	"SERVER_POD_ID":                   "planned: TestLeaseNamesThePod",
	"SERVER_ENABLE_REFLECTION":        "planned: TestReflection",
	"SERVER_BIND_ADDRESS":             "planned: TestBindAddress",
	"SERVER_ADVERTISE_ADDRESS":        "planned: TestLeaseNamesThePod",
	"SERVER_READ_TIMEOUT":             "planned: TestHTTPTimeouts",
	"SERVER_WRITE_TIMEOUT":            "planned: TestHTTPTimeouts",
	"SERVER_IDLE_TIMEOUT":             "planned: TestHTTPTimeouts",
	"SERVER_SHUTDOWN_TIMEOUT":         "planned: TestDrain",
	"SERVER_DRAIN_SPREAD":             "planned: TestDrain",
	"SERVER_MAX_CONNECTIONS":          "planned: TestMaxConnections",
	"SERVER_TLS_CERT_FILE":            "planned: TestServerTLS",
	"SERVER_TLS_KEY_FILE":             "planned: TestServerTLS",
	"SERVER_DEBUG_ADDRESS":            "planned: TestDebugAddress",
	"LOG_LEVEL":                       "planned: TestReloadLive",
	"LOG_FORMAT":                      "planned: TestLogFormat",
	"NATS_URL":                        "TestNATSLeastRights",
	"NATS_STREAM_NAME":                "planned: TestCreateStream",
	"NATS_CONSUMER_NAME":              "planned: TestCreateStream",
	"NATS_SUBJECT_PREFIX":             "planned: TestSubjectPrefix",
	"NATS_CREATE_STREAM":              "planned: TestCreateStream",
	"NATS_STREAM_MAX_AGE":             "planned: TestCreateStream",
	"NATS_STREAM_REPLICAS":            "planned: TestCreateStream",
	"NATS_CREDS_FILE":                 "TestNATSCredentials",
	"NATS_TLS_CA_FILE":                "TestNATSTLS",
	"NATS_TLS_CERT_FILE":              "TestNATSTLS",
	"NATS_TLS_KEY_FILE":               "TestNATSTLS",
	"NATS_CONNECT_TIMEOUT":            "planned: TestStartWithoutDependencies",
	"NATS_RECONNECT_WAIT":             "planned: TestDependenciesRestart",
	"NATS_MAX_RECONNECTS":             "planned: TestDependenciesRestart",
	"NATS_PING_INTERVAL":              "planned: TestDependenciesRestart",
	"NATS_ACK_WAIT":                   "planned: TestConsumerSettings",
	"NATS_MAX_ACK_PENDING":            "planned: TestConsumerSettings",
	"NATS_NAK_DELAY":                  "planned: TestNoOwner",
	"NATS_RETRY_HORIZON":              "planned: TestRetryHorizon",
	"NATS_PARKED_BUDGET":              "planned: TestParkedBudget",
	"NATS_DELIVER_POLICY":             "planned: TestConsumerSettings",
	"NATS_PREFETCH":                   "planned: TestConsumerSettings",
	"NATS_PREFETCH_BYTES":             "planned: TestBigEvents",
	"REDIS_ADDRESS":                   "TestRedisCluster",
	"REDIS_MODE":                      "TestRedisCluster",
	"REDIS_SENTINEL_MASTER":           "TestRedisSentinel",
	"REDIS_SENTINEL_PASSWORD":         "TestRedisSentinel",
	"REDIS_USERNAME":                  "TestRedisLeastRights",
	"REDIS_PASSWORD":                  "TestRedisLeastRights",
	"REDIS_DB":                        "TestRedisLeastRights",
	"REDIS_TLS":                       "TestRedisTLS",
	"REDIS_TLS_CA_FILE":               "TestRedisTLS",
	"REDIS_TLS_CERT_FILE":             "TestRedisTLS",
	"REDIS_TLS_KEY_FILE":              "TestRedisTLS",
	"AUTH_SECRET_TOKEN":               "planned: TestKeysAndTokens",
	"AUTH_TOKEN_AES_KEY":              "planned: TestKeyRotation",
	"AUTH_ADMIN_SECRET_TOKEN":         "planned: TestKeysAndTokens",
	"AUTH_ADMIN_TOKEN_AES_KEY":        "planned: TestKeysAndTokens",
	"AUTH_PUBLIC_KEY":                 "planned: TestPublicKey",
	"AUTH_TOKEN_CACHE_TTL":            "planned: TestTokenCache",
	"AUTH_ADMIN_TOKEN_CACHE_TTL":      "planned: TestTokenCache",
	"SESSION_TTL":                     "planned: TestSessionTakeOver",
	"SESSION_REFRESH_INTERVAL":        "planned: TestSessionTakeOver",
	"POD_LEASE":                       "planned: TestLeaseNamesThePod",
	"POD_OWNER_CACHE_SIZE":            "planned: TestOwnerCacheSize",
	"WEBSOCKET_PING_INTERVAL":         "planned: TestHeartbeat",
	"WEBSOCKET_MAX_MISSED_PONGS":      "planned: TestHeartbeat",
	"WEBSOCKET_WRITE_TIMEOUT":         "planned: TestSlowClient",
	"WEBSOCKET_BLOCK_TIMEOUT":         "planned: TestSlowClientBlock",
	"WEBSOCKET_BUFFER_SIZE":           "planned: TestSlowClient",
	"WEBSOCKET_DROP_POLICY":           "planned: TestSlowClientBlock",
	"WEBSOCKET_MAX_MESSAGE":           "planned: TestClientMessages",
	"WEBSOCKET_RATE_LIMIT":            "planned: TestRateLimit",
	"WEBSOCKET_RATE_BURST":            "planned: TestRateLimit",
	"WEBSOCKET_COMPRESSION":           notYet,
	"WEBSOCKET_COMPRESSION_THRESHOLD": notYet,
	"WEBSOCKET_ALLOWED_ORIGINS":       "planned: TestOrigins",
	"WEBSOCKET_INSECURE_SKIP_VERIFY":  "planned: TestOrigins",
	"RESUME_MAX_EVENTS":               "TestResumeTooFar",
	"RESUME_MAX_AGE":                  "TestResumeTooFar",
	"RESUME_OVERLAP":                  "TestRelations",
	"RESUME_CONCURRENCY":              "TestReplaysTakeTurns",
	"PEER_TIMEOUT":                    "TestBreakerByMissingReceived",
	"PEER_IDLE_TIMEOUT":               "TestIdleConnection",
	"PEER_HEALTH_INTERVAL":            "TestUnhealthyPeer",
	"PEER_BREAKER_THRESHOLD":          "TestBreakerByMissingReceived",
	"PEER_BREAKER_OPEN":               "TestBreakerByMissingReceived",
	"PEER_WINDOW":                     "TestPeerWindowFull",
	"PEER_TLS_CERT_FILE":              "TestPeerTLS",
	"PEER_TLS_KEY_FILE":               "TestPeerTLS",
	"PEER_TLS_CA_FILE":                "TestPeerTLS",
	"PEER_TLS_SERVER_NAME":            "TestPeerTLS",
}

// A setting without effect is a lie: either a test shows what it does, or it refuses any value but its default.
func TestEverySettingHasAnEffect(t *testing.T) {
	tests := testsIn(t, "*_test.go", "dev/e2e/*_test.go")
	for _, s := range settingTable {
		name := strings.TrimPrefix(s.name, settingPrefix)
		effect, listed := effects[name]
		switch later := s.tag.Get("later") != ""; {
		case !listed:
			t.Errorf("%s: no test is named", name)
		case later != (effect == notYet):
			t.Errorf("%s: later %v, but its effect is shown by %q", name, later, effect)
		case later, strings.HasPrefix(effect, "planned: "):
		case !tests[effect]:
			t.Errorf("%s: there is no %s", name, effect)
		}
	}
	for name := range effects {
		if settingOf(settingPrefix+name) == nil {
			t.Errorf("%s: no such setting", name)
		}
	}
}

// testsIn returns the names of the tests in these files.
func testsIn(t *testing.T, patterns ...string) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for _, pattern := range patterns {
		files, err := filepath.Glob(pattern)
		if err != nil || files == nil {
			t.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range regexp.MustCompile(`(?m)^func (Test\w+)\(`).FindAllSubmatch(text, -1) {
				names[string(m[1])] = true
			}
		}
	}
	return names
}
