package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"strings"
	"testing"
	"time"
)

// writeKeyPair makes a self-signed certificate for localhost.
func writeKeyPair(t *testing.T) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), DNSNames: []string{"localhost"}, NotAfter: time.Now().Add(time.Hour)}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return writeFile(t, "cert.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert}))),
		writeFile(t, "key.pem", string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})))
}

func TestRelations(t *testing.T) {
	ca, _ := writeKeyPair(t)
	for _, test := range []struct {
		holds, breaks []string
		want          string
	}{
		{[]string{"PEER_TIMEOUT=17999ms"}, []string{"PEER_TIMEOUT=18s"},
			"DAISI_WS_PEER_TIMEOUT (18s) + DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s) + 2s must be less than DAISI_WS_NATS_ACK_WAIT (30s): JetStream would give an event out again while it still waits for its sockets"},
		{[]string{"NATS_MAX_ACK_PENDING=2000"}, []string{"NATS_MAX_ACK_PENDING=1999"},
			"DAISI_WS_NATS_PREFETCH (500) + DAISI_WS_NATS_PARKED_BUDGET (500) must be at most half of DAISI_WS_NATS_MAX_ACK_PENDING (1999): waiting events would stop the flow of all pods"},
		{[]string{"NATS_JS_DOMAIN=hub"}, []string{"NATS_JS_DOMAIN=hub", "NATS_JS_API_PREFIX=$JS.hub.API"},
			"DAISI_WS_NATS_JS_DOMAIN (hub) and DAISI_WS_NATS_JS_API_PREFIX ($JS.hub.API) exclude each other: each says where JetStream's API is"},
		{[]string{"NATS_NKEY_FILE=" + ca}, []string{"NATS_NKEY_FILE=" + ca, "NATS_CREDS_FILE=" + ca},
			"DAISI_WS_NATS_CREDS_FILE (" + ca + ") and DAISI_WS_NATS_NKEY_FILE (" + ca + ") exclude each other: each says who this service is"},
		{[]string{"WEBSOCKET_BLOCK_TIMEOUT=9s"}, []string{"WEBSOCKET_BLOCK_TIMEOUT=10s"},
			"DAISI_WS_WEBSOCKET_BLOCK_TIMEOUT (10s) must be less than DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s): a socket would be closed as slow before its events stop waiting for room"},
		{[]string{"SERVER_SHUTDOWN_TIMEOUT=21s"}, []string{"SERVER_SHUTDOWN_TIMEOUT=20s"},
			"DAISI_WS_SERVER_DRAIN_SPREAD (5s) + DAISI_WS_WEBSOCKET_WRITE_TIMEOUT (10s) + 5s must be less than DAISI_WS_SERVER_SHUTDOWN_TIMEOUT (20s): the drain would be cut off"},
		{[]string{"SESSION_REFRESH_INTERVAL=14s"}, []string{"SESSION_REFRESH_INTERVAL=15s"},
			"DAISI_WS_SESSION_REFRESH_INTERVAL (15s) must be less than half of DAISI_WS_SESSION_TTL (30s): one missed renewal would lose the session"},
		{[]string{"SERVER_HTTP_PORT=0", "SERVER_GRPC_PORT=0"}, []string{"SERVER_HTTP_PORT=50051"},
			"DAISI_WS_SERVER_HTTP_PORT (50051) and DAISI_WS_SERVER_GRPC_PORT (50051) must differ"},
		{[]string{"REDIS_MODE=cluster", "REDIS_ADDRESS=a:1,b:2"}, []string{"REDIS_ADDRESS=a:1,b:2"},
			"DAISI_WS_REDIS_ADDRESS (a:1,b:2) must be one address with DAISI_WS_REDIS_MODE (single)"},
		{[]string{"REDIS_DB=1"}, []string{"REDIS_DB=1", "REDIS_MODE=cluster"},
			"DAISI_WS_REDIS_DB (1) must be 0 with DAISI_WS_REDIS_MODE (cluster): a cluster has no other"},
		{[]string{"REDIS_MODE=sentinel", "REDIS_SENTINEL_MASTER=m"}, []string{"REDIS_MODE=sentinel"},
			"DAISI_WS_REDIS_SENTINEL_MASTER (empty) is required with DAISI_WS_REDIS_MODE (sentinel)"},
		{[]string{"AUTH_SECRET_TOKEN=a,b", "AUTH_PUBLIC_KEY=c,d"}, []string{"AUTH_SECRET_TOKEN=a, b", "AUTH_PUBLIC_KEY=c,b"},
			"DAISI_WS_AUTH_PUBLIC_KEY and DAISI_WS_AUTH_SECRET_TOKEN must have no key in common: every browser could mint tokens"},
		{nil, []string{"AUTH_PUBLIC_KEY=admin-secret"},
			"DAISI_WS_AUTH_PUBLIC_KEY and DAISI_WS_AUTH_ADMIN_SECRET_TOKEN must have no key in common: every browser would be an admin"},
	} {
		if _, _, err := loadConfig("", env(test.holds...)); err != nil {
			t.Errorf("%v: %v", test.holds, err)
		}
		_, _, err := loadConfig("", env(test.breaks...))
		wantLines(t, strings.Join(test.breaks, " "), lines(err), "", test.want)
	}
}

// What follows from a faulty value would only hide it.
func TestNoRelationOfAFaultyValue(t *testing.T) {
	_, _, err := loadConfig("", env("PEER_TIMEOUT=25s", "NATS_ACK_WAIT=1m x"))
	wantLines(t, "faults", lines(err), "",
		`environment: DAISI_WS_NATS_ACK_WAIT: "1m x" is not a duration (write it as 500ms, 30s or 5m), or is too long`)
}

func TestFilesThatSettingsName(t *testing.T) {
	cert, key := writeKeyPair(t)
	_, otherKey := writeKeyPair(t)
	for _, test := range []struct {
		lines []string
		want  []string
	}{
		{[]string{"SERVER_TLS_CERT_FILE=" + cert, "SERVER_TLS_KEY_FILE=" + key, "NATS_TLS_CA_FILE=" + cert, "NATS_CREDS_FILE=" + key}, nil},
		{[]string{"SERVER_TLS_CERT_FILE=" + cert}, []string{"DAISI_WS_SERVER_TLS_KEY_FILE: required, since DAISI_WS_SERVER_TLS_CERT_FILE is set"}},
		{[]string{"REDIS_TLS=true", "REDIS_TLS_KEY_FILE=" + key}, []string{"DAISI_WS_REDIS_TLS_CERT_FILE: required, since DAISI_WS_REDIS_TLS_KEY_FILE is set"}},
		{[]string{"NATS_TLS_CERT_FILE=" + cert, "NATS_TLS_KEY_FILE=" + otherKey},
			[]string{"DAISI_WS_NATS_TLS_CERT_FILE and DAISI_WS_NATS_TLS_KEY_FILE: tls: private key does not match public key"}},
		{[]string{"NATS_TLS_CA_FILE=" + key}, []string{"DAISI_WS_NATS_TLS_CA_FILE: @ holds no certificate (PEM)"}},
		{[]string{"NATS_NKEY_FILE=/nonexistent/seed"}, []string{"DAISI_WS_NATS_NKEY_FILE: open /nonexistent/seed: no such file or directory"}},
		{[]string{"NATS_CREDS_FILE=/nonexistent/creds"}, []string{"DAISI_WS_NATS_CREDS_FILE: open /nonexistent/creds: no such file or directory"}},
	} {
		_, _, err := loadConfig("", env(test.lines...))
		wantLines(t, strings.Join(test.lines, " "), lines(err), key, test.want...)
	}
	_, warnings, err := loadConfig("", env("REDIS_TLS_CA_FILE="+cert))
	wantLines(t, "warnings", append(warnings, lines(err)...), "", "DAISI_WS_REDIS_TLS is off: the files named by DAISI_WS_REDIS_TLS_* are not used")
}
