package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// effects names, for each setting, the test that shows its effect on the running service (here or in dev/e2e).
var effects = map[string]string{
	"SERVER_HTTP_PORT":                "TestAddresses",
	"SERVER_GRPC_PORT":                "TestAddresses",
	"SERVER_POD_ID":                   "TestLeaseNamesThePod",
	"SERVER_ENABLE_REFLECTION":        "TestPeerAnswersQuestions",
	"SERVER_BIND_ADDRESS":             "TestAddresses",
	"SERVER_ADVERTISE_ADDRESS":        "TestLeaseNamesThePod",
	"SERVER_READ_TIMEOUT":             "TestHTTPTimeouts",
	"SERVER_WRITE_TIMEOUT":            "TestHTTPTimeouts",
	"SERVER_IDLE_TIMEOUT":             "TestHTTPTimeouts",
	"SERVER_SHUTDOWN_TIMEOUT":         "TestShutdownTimeout",
	"SERVER_DRAIN_SPREAD":             "TestDrain",
	"SERVER_MAX_CONNECTIONS":          "TestMaxConnections",
	"SERVER_TLS_CERT_FILE":            "TestServerTLS",
	"SERVER_TLS_KEY_FILE":             "TestServerTLS",
	"SERVER_DEBUG_ADDRESS":            "TestAddresses",
	"LOG_LEVEL":                       "TestReloadLive",
	"LOG_FORMAT":                      "TestLogFormat",
	"NATS_URL":                        "TestNATSLeastRights",
	"NATS_STREAM_NAME":                "TestCreateStream",
	"NATS_CONSUMER_NAME":              "TestConsumerSettings",
	"NATS_SUBJECT_PREFIX":             "TestCreateStream",
	"NATS_CREATE_STREAM":              "TestCreateStream",
	"NATS_STREAM_MAX_AGE":             "TestCreateStream",
	"NATS_STREAM_REPLICAS":            "TestCreateStream",
	"NATS_JS_DOMAIN":                  "TestLeafNode",
	"NATS_JS_API_PREFIX":              "TestImportedJetStream",
	"NATS_CREDS_FILE":                 "TestNATSCredentials",
	"NATS_NKEY_FILE":                  "TestNATSNKey",
	"NATS_TLS_CA_FILE":                "TestNATSTLS",
	"NATS_TLS_CERT_FILE":              "TestNATSTLS",
	"NATS_TLS_KEY_FILE":               "TestNATSTLS",
	"NATS_CONNECT_TIMEOUT":            "TestNATSTimes",
	"NATS_RECONNECT_WAIT":             "TestNATSTimes",
	"NATS_MAX_RECONNECTS":             "TestNATSGivenUp",
	"NATS_PING_INTERVAL":              "TestNATSTimes",
	"NATS_ACK_WAIT":                   "TestConsumerSettings",
	"NATS_MAX_ACK_PENDING":            "TestConsumerSettings",
	"NATS_NAK_DELAY":                  "TestNobodyArrives",
	"NATS_RETRY_HORIZON":              "TestRetryHorizon",
	"NATS_PARKED_BUDGET":              "TestParkedBudget",
	"NATS_DELIVER_POLICY":             "TestConsumerSettings",
	"NATS_PREFETCH":                   "TestConsumerSettings",
	"NATS_PREFETCH_BYTES":             "TestConsumerSettings",
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
	"AUTH_SECRET_TOKEN":               "TestKeyRotation",
	"AUTH_TOKEN_AES_KEY":              "TestKeyRotation",
	"AUTH_ADMIN_SECRET_TOKEN":         "TestKeyRotation",
	"AUTH_ADMIN_TOKEN_AES_KEY":        "TestKeyRotation",
	"AUTH_PUBLIC_KEY":                 "TestPublicKey",
	"AUTH_TOKEN_CACHE_TTL":            "TestTokenCache",
	"AUTH_ADMIN_TOKEN_CACHE_TTL":      "TestTokenCache",
	"SESSION_TTL":                     "TestLeaseNamesThePod",
	"SESSION_REFRESH_INTERVAL":        "TestLeaseNamesThePod",
	"POD_LEASE":                       "TestLeaseNamesThePod",
	"WEBSOCKET_PING_INTERVAL":         "TestMissedPongs",
	"WEBSOCKET_MAX_MISSED_PONGS":      "TestMissedPongs",
	"WEBSOCKET_WRITE_TIMEOUT":         "TestSlowClient",
	"WEBSOCKET_BLOCK_TIMEOUT":         "TestSlowClient",
	"WEBSOCKET_BUFFER_SIZE":           "TestSlowClient",
	"WEBSOCKET_DROP_POLICY":           "TestSlowClient",
	"WEBSOCKET_MAX_MESSAGE":           "TestFaultsByLibrary",
	"WEBSOCKET_RATE_LIMIT":            "TestRateLimit",
	"WEBSOCKET_RATE_BURST":            "TestRateLimit",
	"WEBSOCKET_COMPRESSION":           "TestCompression",
	"WEBSOCKET_COMPRESSION_THRESHOLD": "TestCompression",
	"WEBSOCKET_ALLOWED_ORIGINS":       "TestOriginsOfPages",
	"WEBSOCKET_INSECURE_SKIP_VERIFY":  "TestOriginsOfPages",
	"EVENTS_TYPE_IN_PAYLOAD":          "TestEarlierClient",
	"EVENTS_AGENTS_TO_USERS":          "TestEarlierClient",
	"RESUME_MAX_EVENTS":               "TestResumeTooFar",
	"RESUME_MAX_BEHIND":               "TestReplayRefusals",
	"RESUME_CONCURRENCY":              "TestReplaysTakeTurns",
	"PEER_TIMEOUT":                    "TestBreakerByMissingReceived",
	"PEER_IDLE_TIMEOUT":               "TestIdleConnection",
	"PEER_HEALTH_INTERVAL":            "TestUnhealthyPeer",
	"PEER_BREAKER_THRESHOLD":          "TestBreakerByMissingReceived",
	"PEER_BREAKER_OPEN":               "TestBreakerByMissingReceived",
	"PEER_WINDOW":                     "TestPeerWindowFull",
}

// A setting without effect is a lie: a test shows what it does.
func TestEverySettingHasAnEffect(t *testing.T) {
	tests := testsIn(t, "*_test.go", "dev/e2e/*_test.go")
	for _, s := range settingTable {
		name := strings.TrimPrefix(s.name, settingPrefix)
		effect, listed := effects[name]
		switch {
		case !listed:
			t.Errorf("%s: no test is named", name)
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
