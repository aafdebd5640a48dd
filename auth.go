package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// maxToken bounds what is decoded and decrypted for a stranger; the longest honest token is a quarter of it.
	maxToken = 4096
	// tokenCacheWait bounds what a slow Redis may cost a check that takes microseconds without it.
	tokenCacheWait = 50 * time.Millisecond
)

// claims is what a valid token says of its bearer.
type claims struct {
	company, agent, user string // of a user
	admin                string // of an admin; empty for a user
	// scopeCompany and scopeAgent are what an admin sees: the intersection of subscription and restriction, "*" = any.
	scopeCompany, scopeAgent string
	expires                  time.Time
}

// covers says whether an admin with these claims sees the agent.
func (c *claims) covers(company, agent string) bool {
	return (c.scopeCompany == "*" || c.scopeCompany == company) && (c.scopeAgent == "*" || c.scopeAgent == agent)
}

// sessionKey names the session that the bearer needs.
func (c *claims) sessionKey() string {
	if c.admin != "" {
		return "admin:" + escapeID(c.admin)
	}
	return c.company + ":" + c.agent + ":" + escapeID(c.user)
}

// userType is the bounded label of metrics: user or admin.
func (c *claims) userType() string {
	if c.admin != "" {
		return "admin"
	}
	return "user"
}

// userToken is the plaintext of a user's token (docs/tokens.md tells other back ends how to seal it).
type userToken struct {
	CompanyID string    `json:"company_id"`
	AgentID   string    `json:"agent_id"`
	UserID    string    `json:"user_id"`
	ExpiresAt time.Time `json:"expires_at"`
	IssuedAt  time.Time `json:"issued_at,omitzero"`
}

// badID is the first of its ids that can't be one.
func (t userToken) badID() *idError {
	if err := checkPair(t.CompanyID, t.AgentID); err != nil {
		return err
	}
	return nameIDs.check("user_id", t.UserID)
}

// adminToken is the plaintext of an admin's token. The three ids that narrow what it sees may be empty or "*": any.
type adminToken struct {
	AdminID              string    `json:"admin_id"`
	ExpiresAt            time.Time `json:"expires_at"`
	IssuedAt             time.Time `json:"issued_at,omitzero"`
	SubscribedCompanyID  string    `json:"subscribed_company_id,omitempty"`
	SubscribedAgentID    string    `json:"subscribed_agent_id,omitempty"`
	CompanyIDRestriction string    `json:"company_id_restriction,omitempty"`
}

// badID is the first of its ids that can be neither an id nor, where that means any, "*" or empty.
func (t adminToken) badID() *idError {
	if err := nameIDs.check("admin_id", t.AdminID); err != nil {
		return err
	}
	for _, id := range []struct{ field, value string }{
		{"subscribed_company_id", t.SubscribedCompanyID}, {"subscribed_agent_id", t.SubscribedAgentID}, {"company_id_restriction", t.CompanyIDRestriction},
	} {
		if id.value == "" || id.value == "*" {
			continue
		}
		if err := tokenIDs.check(id.field, id.value); err != nil {
			return err
		}
	}
	return nil
}

// scope is what the admin sees, "*" = any: the intersection of subscription and restriction. A contradiction is
// refused and not narrowed to nothing: an admin who sees no events would look for the fault elsewhere.
func (t adminToken) scope() (company, agent string, err *apiError) {
	wide := func(s string) string {
		if s == "" {
			return "*"
		}
		return s
	}
	company, agent = wide(t.SubscribedCompanyID), wide(t.SubscribedAgentID)
	restriction := wide(t.CompanyIDRestriction)
	switch {
	case restriction == "*" || restriction == company:
	case company == "*":
		company = restriction
	default:
		return "", "", invalidToken("scope", "subscribed_company_id contradicts company_id_restriction")
	}
	return company, agent, nil
}

// parseTokenKeys decodes a comma-separated key setting; each key is 32 bytes as 64 hex digits. Errors never quote a key.
func parseTokenKeys(setting string) ([][]byte, error) {
	var keys [][]byte
	for i, s := range strings.Split(setting, ",") {
		k, err := hex.DecodeString(strings.TrimSpace(s))
		if err != nil || len(k) != 32 {
			return nil, fmt.Errorf("token key %d of the list is not 64 hex digits", i+1)
		}
		keys = append(keys, k)
	}
	return keys, nil
}

// tokenKey is one key ready for use.
type tokenKey struct {
	aead cipher.AEAD // the random nonce of 12 bytes in front
	mac  []byte      // authenticates cached plaintexts
}

// keyring is a key setting ready for use: the first key seals, every one opens. Immutable.
type keyring struct {
	setting string
	keys    []tokenKey
}

func newKeyring(setting string) (*keyring, error) {
	raw, err := parseTokenKeys(setting)
	if err != nil {
		return nil, err
	}
	r := &keyring{setting: setting}
	for _, k := range raw {
		block, err := aes.NewCipher(k)
		if err != nil {
			return nil, err
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return nil, err
		}
		mac := hmac.New(sha256.New, k)
		mac.Write([]byte("daisi-ws-service token cache"))
		r.keys = append(r.keys, tokenKey{aead: aead, mac: mac.Sum(nil)})
	}
	return r, nil
}

// sealToken makes a token of plaintext under the first key of the setting keys:
// base64url(nonce || AES-256-GCM || tag), padded. Any goroutine may call.
func sealToken(keys string, plaintext any) (string, error) {
	r, err := newKeyring(keys)
	if err != nil {
		return "", fmt.Errorf("seal token: %w", err)
	}
	return r.seal(plaintext)
}

func (r *keyring) seal(plaintext any) (string, error) {
	b, err := json.Marshal(plaintext)
	if err != nil {
		return "", fmt.Errorf("seal token: %w", err)
	}
	if len(r.keys) == 0 {
		return "", errors.New("seal token: no usable key")
	}
	// Padded, because other services that share the key may open nothing else.
	return base64.URLEncoding.EncodeToString(r.keys[0].aead.Seal(nil, nil, b, nil)), nil
}

// open returns the plaintext of token and the key that opened it, or nil. Base64 is taken strictly, so that no two
// spellings but padding are one token: line breaks and stray bits in the last digit are refused.
func (r *keyring) open(token string) ([]byte, *tokenKey) {
	enc := base64.RawURLEncoding
	if strings.HasSuffix(token, "=") {
		enc = base64.URLEncoding
	}
	sealed, err := enc.Strict().DecodeString(token)
	if err != nil || strings.ContainsAny(token, "\r\n") {
		return nil, nil
	}
	for i := range r.keys {
		if plain, err := r.keys[i].aead.Open(nil, nil, sealed, nil); err == nil {
			return plain, &r.keys[i]
		}
	}
	return nil, nil
}

// auth checks API keys and tokens against the settings in force. Any goroutine may call its methods.
type auth struct {
	cfg *settings
	rdb redis.UniversalClient // for the token cache alone
	m   *Metrics

	userKeys, adminKeys atomic.Pointer[keyring]
}

func newAuth(cfg *settings, rdb redis.UniversalClient, m *Metrics) *auth {
	return &auth{cfg: cfg, rdb: rdb, m: m}
}

// keysOf returns the keyring of a setting, made anew only when the setting changed. Two callers that see the change
// at once both make it; either result is right.
func keysOf(p *atomic.Pointer[keyring], setting string) *keyring {
	if r := p.Load(); r != nil && r.setting == setting {
		return r
	}
	r, err := newKeyring(setting)
	if err != nil { // the settings were checked before they came into force
		slog.Error("token keys cannot be used, every token is refused", "err", err)
		r = &keyring{setting: setting}
	}
	p.Store(r)
	return r
}

// tokenKind is what differs between users' and admins' tokens.
type tokenKind struct {
	keys        *keyring
	cachePrefix string // of what is hashed to the cache's key
	cacheTTL    time.Duration
	parse       func(plain []byte) (*claims, *apiError)
}

// openUser and openAdmin open a token and check its expiry. Every error is an *apiError of code InvalidToken.
func (a *auth) openUser(ctx context.Context, token string) (*claims, *apiError) {
	return a.counted("user")(a.userClaims(ctx, token))
}

func (a *auth) openAdmin(ctx context.Context, token string) (*claims, *apiError) {
	cfg := a.cfg.Load()
	return a.counted("admin")(a.open(ctx, token, tokenKind{
		keys: keysOf(&a.adminKeys, cfg.AuthAdminTokenAESKey), cachePrefix: "admin_", cacheTTL: cfg.AuthAdminTokenCacheTTL, parse: parseAdmin,
	}))
}

// openUserFor is openUser for a path, which must name the token's own company and agent.
func (a *auth) openUserFor(ctx context.Context, token, company, agent string) (*claims, *apiError) {
	cl, err := a.userClaims(ctx, token)
	if err == nil && (cl.company != company || cl.agent != agent) {
		cl, err = nil, invalidToken("path", "token is for another company or agent")
	}
	return a.counted("user")(cl, err)
}

func (a *auth) userClaims(ctx context.Context, token string) (*claims, *apiError) {
	cfg := a.cfg.Load()
	return a.open(ctx, token, tokenKind{
		keys: keysOf(&a.userKeys, cfg.AuthTokenAESKey), cacheTTL: cfg.AuthTokenCacheTTL, parse: parseUser,
	})
}

// counted passes an outcome through and counts it.
func (a *auth) counted(tokenType string) func(*claims, *apiError) (*claims, *apiError) {
	return func(cl *claims, err *apiError) (*claims, *apiError) {
		if err != nil {
			a.m.authFailureTotal.with(tokenType, err.label).Inc()
		} else {
			a.m.authSuccessTotal.with(tokenType).Inc()
		}
		return cl, err
	}
}

// open takes the plaintext from the cache or from the token itself; both are checked by the same parse, so that
// a cached claim cannot outlive its expiry.
func (a *auth) open(ctx context.Context, token string, k tokenKind) (*claims, *apiError) {
	if token == "" {
		return nil, invalidToken("missing", "token is missing")
	}
	if len(token) > maxToken {
		return nil, invalidToken("malformed", "token is too long")
	}
	name, useCache := "", k.cacheTTL > 0
	if useCache {
		hash := sha256.Sum256([]byte(k.cachePrefix + token))
		name = "token_cache:" + hex.EncodeToString(hash[:])
		plain, err := a.cached(ctx, k.keys, name)
		if plain != nil {
			return k.parse(plain)
		}
		useCache = err == nil // a Redis that did not answer is not asked again for this token
	}
	plain, key := k.keys.open(token)
	if plain == nil {
		return nil, invalidToken("malformed", "token cannot be opened")
	}
	cl, apiErr := k.parse(plain)
	if apiErr == nil && useCache {
		a.remember(ctx, key, name, plain, min(k.cacheTTL, time.Until(cl.expires)))
	}
	return cl, apiErr
}

func parseUser(plain []byte) (*claims, *apiError) {
	var t userToken
	if json.Unmarshal(plain, &t) != nil {
		return nil, invalidToken("malformed", "token does not hold a user's claims")
	}
	if err := t.badID(); err != nil {
		return nil, tokenBadID(err)
	}
	if !time.Now().Before(t.ExpiresAt) {
		return nil, tokenExpired()
	}
	return &claims{company: t.CompanyID, agent: t.AgentID, user: t.UserID, expires: t.ExpiresAt}, nil
}

func parseAdmin(plain []byte) (*claims, *apiError) {
	var t adminToken
	if json.Unmarshal(plain, &t) != nil {
		return nil, invalidToken("malformed", "token does not hold an admin's claims")
	}
	if err := t.badID(); err != nil {
		return nil, tokenBadID(err)
	}
	if !time.Now().Before(t.ExpiresAt) {
		return nil, tokenExpired()
	}
	company, agent, err := t.scope()
	if err != nil {
		return nil, err
	}
	return &claims{admin: t.AdminID, scopeCompany: company, scopeAgent: agent, expires: t.ExpiresAt}, nil
}

// A cache entry is the plaintext behind its authentication under the key that opened the token. It passes only while
// that key is listed, and who can write Redis but does not know a key can forge no claim and move none to another token.
func (k *tokenKey) authenticate(name string, plain []byte) []byte {
	h := hmac.New(sha256.New, k.mac)
	h.Write([]byte(name))
	h.Write(plain)
	return h.Sum(nil)
}

// cached returns the plaintext stored under name, nil if there is none to trust. An error means that Redis did not
// answer in time.
func (a *auth) cached(ctx context.Context, r *keyring, name string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, tokenCacheWait)
	defer cancel()
	entry, err := a.rdb.Get(ctx, name).Bytes()
	if errors.Is(err, redis.Nil) {
		return nil, nil
	}
	if err != nil {
		a.m.redisErrorsTotal.with("token_cache").Inc()
		return nil, err
	}
	if len(entry) < sha256.Size {
		return nil, nil
	}
	mac, plain := entry[:sha256.Size], entry[sha256.Size:]
	for i := range r.keys {
		if hmac.Equal(mac, r.keys[i].authenticate(name, plain)) {
			return plain, nil
		}
	}
	return nil, nil
}

// remember stores a plaintext that has just passed. A failure costs the next check its short cut, nothing else.
func (a *auth) remember(ctx context.Context, k *tokenKey, name string, plain []byte, ttl time.Duration) {
	if ttl < time.Millisecond { // finer than Redis counts
		return
	}
	ctx, cancel := context.WithTimeout(ctx, tokenCacheWait)
	defer cancel()
	if err := a.rdb.Set(ctx, name, append(k.authenticate(name, plain), plain...), ttl).Err(); err != nil {
		a.m.redisErrorsTotal.with("token_cache").Inc()
	}
}

// generalKey says whether key may mint user tokens.
func (a *auth) generalKey(key string) bool { return keyListed(a.cfg.Load().AuthSecretToken, key) }

// adminKey says whether key may mint admin tokens and open admin sockets.
func (a *auth) adminKey(key string) bool { return keyListed(a.cfg.Load().AuthAdminSecretToken, key) }

// socketKey says whether key may open user sockets. A browser shows it to its user, so AUTH_PUBLIC_KEY, when set, is
// good for that alone, and the key that mints is refused here.
func (a *auth) socketKey(key string) bool {
	cfg := a.cfg.Load()
	if cfg.AuthPublicKey != "" {
		return keyListed(cfg.AuthPublicKey, key)
	}
	return keyListed(cfg.AuthSecretToken, key)
}

// keyListed compares key with every key of a comma-separated list: hashed, so that lengths do not show, and without an
// early exit, so that the place in the list does not.
func keyListed(list, key string) bool {
	if key == "" {
		return false
	}
	given, match := sha256.Sum256([]byte(key)), 0
	for k := range strings.SplitSeq(list, ",") {
		if k = strings.TrimSpace(k); k == "" {
			continue // a stray comma lists no key
		}
		want := sha256.Sum256([]byte(k))
		match |= subtle.ConstantTimeCompare(given[:], want[:])
	}
	return match == 1
}
