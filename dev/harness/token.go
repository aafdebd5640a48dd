package harness

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"net/http"
	"testing"
	"time"
)

// Seal makes a token of claims as docs/tokens.md tells other back ends to: it is written against that page, not against
// the service's code. keyHex is 64 hex digits.
func Seal(t testing.TB, keyHex string, claims any) string {
	t.Helper()
	plain, err := json.Marshal(claims)
	if err != nil {
		t.Fatal(err)
	}
	return SealBytes(t, keyHex, plain)
}

// SealBytes seals whatever plaintext, also one that is no claims at all.
func SealBytes(t testing.TB, keyHex string, plain []byte) string {
	t.Helper()
	key, err := hex.DecodeString(keyHex)
	if err != nil {
		t.Fatal(err)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := make([]byte, gcm.NonceSize())
	rand.Read(nonce)
	return base64.RawURLEncoding.EncodeToString(gcm.Seal(nonce, nonce, plain, nil))
}

// UserToken seals a token of a user that is valid for ttl, which may be negative.
func UserToken(t testing.TB, company, agent, user string, ttl time.Duration) string {
	t.Helper()
	return Seal(t, TokenKey, map[string]any{"company_id": company, "agent_id": agent, "user_id": user,
		"issued_at": time.Now().UTC(), "expires_at": time.Now().Add(ttl).UTC()})
}

// AdminToken seals a token of an admin; an empty scope or restriction is none.
func AdminToken(t testing.TB, admin, company, agent, restriction string, ttl time.Duration) string {
	t.Helper()
	return Seal(t, AdminKey, map[string]any{"admin_id": admin, "subscribed_company_id": company, "subscribed_agent_id": agent,
		"company_id_restriction": restriction, "issued_at": time.Now().UTC(), "expires_at": time.Now().Add(ttl).UTC()})
}

// Answer is an HTTP response with its body read.
type Answer struct {
	*http.Response
	Body []byte
}

// Error is the body of every HTTP error.
type Error struct {
	Code, Message string
	Details       json.RawMessage
}

// Error reads the body as the error format; one that is not fails the test.
func (a Answer) Error(t testing.TB) Error {
	t.Helper()
	var e Error
	if err := json.Unmarshal(a.Body, &e); err != nil || e.Code == "" {
		t.Fatalf("body of %s is no error: %q", a.Status, a.Body)
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("Content-Type of an error is %q", ct)
	}
	return e
}

// Do sends a request to the pod. body is nil, bytes, or something to encode as JSON.
func (p *Pod) Do(method, path string, header http.Header, body any) Answer {
	p.W.T.Helper()
	raw, ok := body.([]byte)
	if body != nil && !ok {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			p.W.T.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(Within(p.W.T, Patience), method, p.Base()+path, bytes.NewReader(raw))
	if err != nil {
		p.W.T.Fatal(err)
	}
	if header != nil {
		req.Header = header
	}
	resp, err := p.Client().Do(req)
	if err != nil {
		p.W.T.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	got, err := io.ReadAll(resp.Body)
	if err != nil {
		p.W.T.Fatalf("%s %s: read body: %v", method, path, err)
	}
	return Answer{resp, got}
}

// Mint asks the pod for a token: path is /generate-token or /admin/generate-token, key the API key.
func (p *Pod) Mint(path, key string, ask map[string]any) string {
	p.W.T.Helper()
	a := p.Do("POST", path, http.Header{"X-Api-Key": {key}}, ask)
	var got struct {
		Token     string    `json:"token"`
		ExpiresAt time.Time `json:"expires_at"`
	}
	if a.StatusCode != http.StatusOK || json.Unmarshal(a.Body, &got) != nil || got.Token == "" || got.ExpiresAt.IsZero() {
		p.W.T.Fatalf("POST %s: %s %s", path, a.Status, a.Body)
	}
	return got.Token
}
