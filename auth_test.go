package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	// vectorKey is the bytes 0 to 31; the tokens below it were sealed by Python's cryptography package.
	vectorKey   = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
	otherKey    = "ffeeddccbbaa99887766554433221100ffeeddccbbaa99887766554433221100"
	userVector  = "ZGVmZ2hpamtsbW5vMzm9CRSZN_BHPTaM-F9InCGvYyinTpIVwr_YF5LHh3K2iG3xbj65cY6WCmCUJuj1OS7YnwJmY02CgcWkivL663yu4SzkcgI8pl_cbiG4ZdZXQi8AnfW4nP2MR1HReaq9pPPXXvjo9534WQ=="
	userVector2 = "ZGVmZ2hpamtsbW5vMzm9CRSZN_BHPTaM-F9InCGvYyinTpIVwr_YF5LHh3K2iG3xbj65cY6WCmCUJuj1OS7YnwJmY02CgcWkivL663yu4SzkcgI8pl_cbiG4ZdZXQi8AnfW46OraBvVBI35zolP7DRg43Rrsm6rnmC-K2BAfrS_wVIkF5kmji-qEMvcCxbqES1c6X7sodD_SsQH_9Cqe0riBzzk9cVhLd0N8vw=="
	adminVector = "ZGVmZ2hpamtsbW5vMzm_AhSAOMFXBn3S-BcFkjbgKijuFIMb1bTfF5rXh3K223n5dT-rNdDDSmvNcfD_L2Go0npobQqJhM6ljPPM6G3ohG25Jktk5RayKnWoC8ROWjMWxKrgtr6fT5sSdxEj6wLmDAIuzBfclPz_gGzbhUcJ_aMIdWYIHCBDWdOy9rsxfKE="
)

// fakeRedis answers GET and SET from a map without a connection. It never forgets an entry by itself, so that
// a test sees whether expiry is checked beyond Redis' own.
type fakeRedis struct {
	mu      sync.Mutex
	entries map[string]string
	ttl     map[string]time.Duration
	gets    int
	err     error // answers everything
	silent  bool  // answers nothing before the caller gives up
}

func newFakeRedis() (*fakeRedis, redis.UniversalClient) {
	f := &fakeRedis{entries: map[string]string{}, ttl: map[string]time.Duration{}}
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", ContextTimeoutEnabled: true})
	rdb.AddHook(f)
	return f, rdb
}

func (f *fakeRedis) DialHook(next redis.DialHook) redis.DialHook { return next }

func (f *fakeRedis) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (f *fakeRedis) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		if f.silent {
			<-ctx.Done()
			cmd.SetErr(ctx.Err())
			return ctx.Err()
		}
		f.mu.Lock()
		defer f.mu.Unlock()
		err := f.err
		switch args := cmd.Args(); {
		case err != nil:
		case args[0] == "get":
			f.gets++
			v, ok := f.entries[args[1].(string)]
			if !ok {
				err = redis.Nil
			}
			cmd.(*redis.StringCmd).SetVal(v)
		case args[0] == "set" && len(args) == 5:
			unit := map[any]time.Duration{"px": time.Millisecond, "ex": time.Second}[args[3]]
			f.entries[args[1].(string)] = string(args[2].([]byte))
			f.ttl[args[1].(string)] = time.Duration(args[4].(int64)) * unit
		default:
			err = errors.New("unexpected command " + cmd.String())
		}
		cmd.SetErr(err)
		return err
	}
}

func authSettings(change func(*Config)) *settings {
	cfg := &settings{}
	c := &Config{
		AuthSecretToken: "general-1, general-2", AuthAdminSecretToken: "admin-1",
		AuthTokenAESKey: vectorKey, AuthAdminTokenAESKey: vectorKey,
		ServerReadTimeout: 5 * time.Second, ServerWriteTimeout: 5 * time.Second, ServerIdleTimeout: 5 * time.Second,
		ServerMaxConnections: 10, PodLease: 6 * time.Second, ServerPodID: "pod-1",
	}
	if change != nil {
		change(c)
	}
	cfg.Store(c)
	return cfg
}

func newTestAuth(change func(*Config)) *auth {
	return newAuth(authSettings(change), nil, newMetrics())
}

func mustSeal(t testing.TB, keys string, plaintext any) string {
	t.Helper()
	token, err := sealToken(keys, plaintext)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

// wantInvalid checks that an error is the table's row InvalidToken, counted under label.
func wantInvalid(t *testing.T, err *apiError, label string) {
	t.Helper()
	if err == nil {
		t.Fatalf("token accepted, want InvalidToken (%s)", label)
	}
	if err.Code != "InvalidToken" || err.status != 403 || err.close != 4403 || err.label != label {
		t.Fatalf("got %v, status %d, close %d, label %q; want InvalidToken, 403, 4403, %q", err, err.status, err.close, err.label, label)
	}
}

func TestTokenVectors(t *testing.T) {
	a, ctx := newTestAuth(nil), context.Background()
	for _, token := range []string{userVector, strings.TrimRight(userVector, "="), userVector2, strings.TrimRight(userVector2, "=")} {
		cl, err := a.openUser(ctx, token)
		if err != nil {
			t.Fatal(err)
		}
		if cl.company != "acme" || cl.agent != "a-1" || cl.user != "u@x" || cl.admin != "" || cl.expires.Year() != 2999 {
			t.Fatalf("claims %+v", cl)
		}
		if cl.sessionKey() != "acme:a-1:u@x" || cl.userType() != "user" {
			t.Fatalf("session %q of type %q", cl.sessionKey(), cl.userType())
		}
	}
	cl, err := a.openAdmin(ctx, adminVector)
	if err != nil {
		t.Fatal(err)
	}
	if cl.admin != "root" || cl.scopeCompany != "acme" || cl.scopeAgent != "*" || cl.sessionKey() != "admin:root" || cl.userType() != "admin" {
		t.Fatalf("claims %+v", cl)
	}
	_, err = a.openAdmin(ctx, userVector)
	wantInvalid(t, err, "id")
	_, err = a.openUser(ctx, adminVector)
	wantInvalid(t, err, "id")
}

func TestSealedTokenForm(t *testing.T) {
	token := mustSeal(t, otherKey+","+vectorKey, userToken{CompanyID: "c", AgentID: "a", UserID: "u", ExpiresAt: time.Now().Add(time.Hour)})
	b, err := base64.URLEncoding.DecodeString(token)
	if err != nil {
		t.Fatalf("token %q is not base64url with padding: %v", token, err)
	}
	ring, err := newKeyring(otherKey)
	if err != nil {
		t.Fatal(err)
	}
	plain, _ := ring.open(token)
	if plain == nil {
		t.Fatal("the first key did not seal")
	}
	if len(b) != 12+len(plain)+16 {
		t.Fatalf("%d bytes for a plaintext of %d", len(b), len(plain))
	}
	if bytes.Contains(plain, []byte("issued_at")) {
		t.Fatalf("plaintext %s names a time that was not given", plain)
	}
	if again := mustSeal(t, otherKey, userToken{}); again[:16] == token[:16] {
		t.Fatal("two tokens with one nonce")
	}
	padding := map[string]bool{}
	for n := range 3 {
		token := mustSeal(t, otherKey, strings.Repeat("x", n))
		padding[token[len(strings.TrimRight(token, "=")):]] = true
		for _, token := range []string{token, strings.TrimRight(token, "=")} {
			if plain, _ := ring.open(token); len(plain) != n+2 {
				t.Errorf("%q opens to %q", token, plain)
			}
		}
	}
	if len(padding) != 3 {
		t.Errorf("tokens of all lengths are padded with %v", padding)
	}
}

func TestTamperedTokens(t *testing.T) {
	a, ctx := newTestAuth(nil), context.Background()
	token := strings.TrimRight(userVector, "=")
	for i := range token {
		for _, c := range []byte{'A', 'B', '_', '=', '\n', '.', 0xff} {
			if token[i] == c {
				continue
			}
			_, err := a.openUser(ctx, token[:i]+string([]byte{c})+token[i+1:])
			wantInvalid(t, err, "malformed")
		}
		if i > 0 {
			_, err := a.openUser(ctx, token[:i])
			wantInvalid(t, err, "malformed")
		}
	}
	for _, bad := range []string{token + "A", token + "\n", token + "=", token + "===", " " + token, strings.Repeat("A", maxToken), strings.Repeat("A", maxToken+1)} {
		_, err := a.openUser(ctx, bad)
		wantInvalid(t, err, "malformed")
	}
	_, err := a.openUser(ctx, "")
	wantInvalid(t, err, "missing")
}

func TestTokenClaims(t *testing.T) {
	later, sooner := time.Now().Add(time.Hour), time.Now().Add(-time.Second)
	a, ctx := newTestAuth(nil), context.Background()
	for _, c := range []struct {
		plaintext any
		label     string
	}{
		{userToken{"c", "a", "u", later, time.Now()}, ""},
		{userToken{"c", "a", "u", sooner, time.Now()}, "expired"},
		{userToken{CompanyID: "c", AgentID: "a", UserID: "u"}, "expired"},
		{userToken{"c.d", "a", "u", later, sooner}, "id"},
		{userToken{"c", "*", "u", later, sooner}, "id"},
		{userToken{"c", "a", "", later, sooner}, "id"},
		{userToken{"c", "a", strings.Repeat("u", 257), later, sooner}, "id"},
		{map[string]any{"company_id": "c", "agent_id": "a", "user_id": 7, "expires_at": later}, "malformed"},
		{map[string]any{"company_id": "c", "agent_id": "a", "user_id": "u", "expires_at": "tomorrow"}, "malformed"},
		{map[string]any{"company_id": "c", "agent_id": "a", "user_id": "u", "expires_at": 4102444800}, "malformed"},
		{"text", "malformed"},
		{nil, "id"},
	} {
		_, err := a.openUser(ctx, mustSeal(t, vectorKey, c.plaintext))
		if c.label != "" {
			wantInvalid(t, err, c.label)
		} else if err != nil {
			t.Errorf("%+v: %v", c.plaintext, err)
		}
	}
	expired, err := a.openUser(ctx, mustSeal(t, vectorKey, userToken{"c", "a", "u", sooner, sooner}))
	if expired != nil || err.reason != "token-expired" {
		t.Errorf("expired: claims %v, reason %q", expired, err.reason)
	}
}

func TestAdminScope(t *testing.T) {
	a, later := newTestAuth(nil), time.Now().Add(time.Hour)
	for _, c := range []struct{ company, agent, restriction, wantCompany, wantAgent, label string }{
		{"", "", "", "*", "*", ""},
		{"*", "*", "*", "*", "*", ""},
		{"c", "", "", "c", "*", ""},
		{"", "a", "", "*", "a", ""},
		{"c", "a", "*", "c", "a", ""},
		{"c", "a", "c", "c", "a", ""},
		{"*", "a", "c", "c", "a", ""},
		{"", "*", "c", "c", "*", ""},
		{"c", "a", "d", "", "", "scope"},
		{"c", "*", "d", "", "", "scope"},
		{"c.d", "a", "", "", "", "id"},
		{"c", "a>", "", "", "", "id"},
		{"", "", "**", "", "", "id"},
	} {
		tok := adminToken{AdminID: "root", ExpiresAt: later, SubscribedCompanyID: c.company, SubscribedAgentID: c.agent, CompanyIDRestriction: c.restriction}
		company, agent, err := tok.scope()
		cl, openErr := a.openAdmin(context.Background(), mustSeal(t, vectorKey, tok))
		if c.label != "" {
			if c.label != "id" { // that is found before
				wantInvalid(t, err, c.label)
			}
			wantInvalid(t, openErr, c.label)
			continue
		}
		if err != nil || company != c.wantCompany || agent != c.wantAgent {
			t.Errorf("%+v: scope %q, %q, %v", c, company, agent, err)
		}
		if openErr != nil || cl.scopeCompany != c.wantCompany || cl.scopeAgent != c.wantAgent {
			t.Errorf("%+v: claims %+v, %v", c, cl, openErr)
		}
	}
	_, err := a.openAdmin(context.Background(), mustSeal(t, vectorKey, adminToken{AdminID: "a\tb", ExpiresAt: later}))
	wantInvalid(t, err, "id")
}

func TestKeyRotation(t *testing.T) {
	a, ctx := newTestAuth(nil), context.Background()
	old := mustSeal(t, vectorKey, userToken{"c", "a", "u", time.Now().Add(time.Hour), time.Now()})
	set := func(keys string) {
		c := *a.cfg.Load()
		c.AuthTokenAESKey = keys
		a.cfg.Store(&c)
	}
	steps := []struct {
		keys  string
		label string
	}{{vectorKey, ""}, {otherKey + ", " + vectorKey, ""}, {otherKey, "malformed"}, {strings.ToUpper(vectorKey), ""}, {"no key", "malformed"}}
	for _, step := range steps {
		set(step.keys)
		_, err := a.openUser(ctx, old)
		if step.label != "" {
			wantInvalid(t, err, step.label)
		} else if err != nil {
			t.Fatalf("keys %q: %v", step.keys, err)
		}
		if made := a.userKeys.Load(); made != keysOf(&a.userKeys, step.keys) {
			t.Fatalf("keys %q: made twice", step.keys)
		}
	}
	for _, bad := range []string{"", "00", vectorKey + ",", vectorKey + "," + vectorKey[1:], "zz" + vectorKey[2:]} {
		_, err := sealToken(bad, userToken{})
		if err == nil {
			t.Errorf("key setting %q accepted", bad)
		} else if len(bad) > 1 && strings.Contains(err.Error(), bad) {
			t.Errorf("error quotes the keys: %v", err)
		}
	}
}

func TestAPIKeys(t *testing.T) {
	a := newTestAuth(nil)
	public := newTestAuth(func(c *Config) { c.AuthPublicKey = "public-1,public-2," })
	for _, c := range []struct {
		key                     string
		general, admin          bool
		socket, socketOfPublics bool
	}{
		{"general-1", true, false, true, false},
		{"general-2", true, false, true, false},
		{"general-1, general-2", false, false, false, false},
		{"general", false, false, false, false},
		{"general-10", false, false, false, false},
		{"admin-1", false, true, false, false},
		{"public-1", false, false, false, true},
		{"public-2", false, false, false, true},
		{"", false, false, false, false},
		{" ", false, false, false, false},
	} {
		if a.generalKey(c.key) != c.general || public.generalKey(c.key) != c.general {
			t.Errorf("generalKey(%q) is not %v", c.key, c.general)
		}
		if a.adminKey(c.key) != c.admin || public.adminKey(c.key) != c.admin {
			t.Errorf("adminKey(%q) is not %v", c.key, c.admin)
		}
		if a.socketKey(c.key) != c.socket || public.socketKey(c.key) != c.socketOfPublics {
			t.Errorf("socketKey(%q) is not %v, %v", c.key, c.socket, c.socketOfPublics)
		}
	}
	none := newTestAuth(func(c *Config) { c.AuthSecretToken, c.AuthAdminSecretToken = "", " , " })
	for _, key := range []string{"", " ", ","} {
		if none.generalKey(key) || none.adminKey(key) || none.socketKey(key) {
			t.Errorf("key %q passes an empty setting", key)
		}
	}
}

func TestAuthMetrics(t *testing.T) {
	a, ctx, later := newTestAuth(nil), context.Background(), time.Now().Add(time.Hour)
	a.openUser(ctx, userVector)
	a.openUser(ctx, "")
	a.openAdmin(ctx, "x")
	a.openAdmin(ctx, mustSeal(t, vectorKey, adminToken{AdminID: "r", ExpiresAt: later, SubscribedCompanyID: "c", CompanyIDRestriction: "d"}))
	if _, err := a.openUserFor(ctx, userVector, "acme", "a-1"); err != nil {
		t.Fatal(err)
	}
	for _, path := range [][2]string{{"acme", "a-2"}, {"acm", "a-1"}, {"ACME", "a-1"}, {"", ""}} {
		_, err := a.openUserFor(ctx, userVector, path[0], path[1])
		wantInvalid(t, err, "path")
	}
	var out bytes.Buffer
	a.m.write(&out)
	for _, want := range []string{
		`dws_auth_success_total{token_type="user"} 2`,
		`dws_auth_failure_total{token_type="user",reason="missing"} 1`,
		`dws_auth_failure_total{token_type="user",reason="path"} 4`,
		`dws_auth_failure_total{token_type="admin",reason="malformed"} 1`,
		`dws_auth_failure_total{token_type="admin",reason="scope"} 1`,
	} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("metrics lack %s", want)
		}
	}
}

// newCachedAuth has both token caches on, at one minute.
func newCachedAuth() (*auth, *fakeRedis) {
	f, rdb := newFakeRedis()
	cfg := authSettings(func(c *Config) { c.AuthTokenCacheTTL, c.AuthAdminTokenCacheTTL = time.Minute, time.Minute })
	return newAuth(cfg, rdb, newMetrics()), f
}

func TestTokenCache(t *testing.T) {
	a, f := newCachedAuth()
	ctx := context.Background()
	for range 2 {
		if cl, err := a.openUser(ctx, userVector); err != nil || cl.user != "u@x" {
			t.Fatal(cl, err)
		}
		if cl, err := a.openAdmin(ctx, adminVector); err != nil || cl.scopeCompany != "acme" {
			t.Fatal(cl, err)
		}
	}
	// printf %s TOKEN | sha256sum, and printf %s admin_TOKEN | sha256sum
	userName := "token_cache:c7f3a6595625f7f5e63ff4b581a9c473c6d9f2ae92e4dbd13a30aeecc1de9556"
	adminName := "token_cache:1c131a9c496b45dd8b3c7b8618b6081f13d698f1200c465e3ef374a1f7a125f6"
	if len(f.entries) != 2 || f.entries[userName] == "" || f.entries[adminName] == "" || f.gets != 4 {
		t.Fatalf("cache holds %q after %d reads", f.entries, f.gets)
	}
	if f.ttl[userName] != time.Minute {
		t.Errorf("life of an entry: %v", f.ttl[userName])
	}
	// A hit is used: swapped in under its own authentication, another plaintext shows.
	plain := []byte(`{"company_id":"acme","agent_id":"a-1","user_id":"swapped","expires_at":"2999-01-02T03:04:05Z"}`)
	key := &keysOf(&a.userKeys, vectorKey).keys[0]
	f.entries[userName] = string(append(key.authenticate(userName, plain), plain...))
	if cl, err := a.openUser(ctx, userVector); err != nil || cl.user != "swapped" {
		t.Errorf("cached claims not used: %+v, %v", cl, err)
	}
	// Forged, moved and broken entries do not pass and do no harm.
	for _, entry := range []string{"", "short", strings.Repeat("x", 32) + string(plain), f.entries[adminName], string(plain)} {
		f.entries[userName] = entry
		if cl, err := a.openUser(ctx, userVector); err != nil || cl.user != "u@x" {
			t.Errorf("entry %q: claims %+v, %v", entry, cl, err)
		}
	}
	a.openUser(ctx, "nonsense")
	if len(f.entries) != 2 {
		t.Error("a refused token was cached")
	}
}

func TestTokenCacheForgetsRetiredKeys(t *testing.T) {
	a, _ := newCachedAuth()
	ctx := context.Background()
	if _, err := a.openUser(ctx, userVector); err != nil {
		t.Fatal(err)
	}
	c := *a.cfg.Load()
	c.AuthTokenAESKey = otherKey + "," + vectorKey
	a.cfg.Store(&c)
	if _, err := a.openUser(ctx, userVector); err != nil {
		t.Fatal("key still listed:", err)
	}
	c.AuthTokenAESKey = otherKey
	a.cfg.Store(&c)
	_, err := a.openUser(ctx, userVector)
	wantInvalid(t, err, "malformed")
}

func TestTokenCacheExpiry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, rdb := newFakeRedis()
		defer rdb.Close()
		a := newAuth(authSettings(func(c *Config) { c.AuthTokenCacheTTL = time.Minute }), rdb, newMetrics())
		token := mustSeal(t, vectorKey, userToken{"c", "a", "u", time.Now().Add(2500 * time.Millisecond), time.Now()})
		if _, err := a.openUser(t.Context(), token); err != nil {
			t.Fatal(err)
		}
		for name, ttl := range f.ttl {
			if ttl > 2500*time.Millisecond {
				t.Errorf("entry %s outlives its token: %v", name, ttl)
			}
		}
		time.Sleep(2500 * time.Millisecond)
		_, err := a.openUser(t.Context(), token)
		wantInvalid(t, err, "expired")
		if f.gets != 2 || len(f.entries) != 1 {
			t.Errorf("%d reads, %d entries: the hit was not tested", f.gets, len(f.entries))
		}
	})
}

func TestTokenCacheWithoutRedis(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, rdb := newFakeRedis()
		defer rdb.Close()
		a := newAuth(authSettings(func(c *Config) { c.AuthTokenCacheTTL = time.Minute }), rdb, newMetrics())
		f.err = errors.New("away")
		if _, err := a.openUser(t.Context(), userVector); err != nil {
			t.Fatal(err)
		}
		f.silent = true
		start := time.Now()
		if _, err := a.openUser(t.Context(), userVector); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > tokenCacheWait {
			t.Errorf("a silent Redis cost %v", took)
		}
		if n := a.m.redisErrorsTotal.with("token_cache").Get(); n != 2 {
			t.Errorf("%d errors counted, want 2", n)
		}
	})
}

func FuzzOpenToken(f *testing.F) {
	for _, seed := range []string{"", "=", "AAAA", userVector, strings.TrimRight(userVector2, "="), adminVector, userVector + "=", "\n" + userVector} {
		f.Add(seed)
	}
	a := newTestAuth(nil)
	f.Fuzz(func(t *testing.T, token string) {
		cl, err := a.openUser(context.Background(), token)
		if (cl == nil) == (err == nil) {
			t.Fatalf("claims %v and error %v", cl, err)
		}
		bare := strings.TrimRight(token, "=")
		if cl != nil && bare != strings.TrimRight(userVector, "=") && bare != strings.TrimRight(userVector2, "=") {
			t.Fatalf("a token that nobody sealed passes: %q", token)
		}
		if _, err := a.openAdmin(context.Background(), token); err != nil && err.Code != "InvalidToken" {
			t.Fatal(err)
		}
	})
}

func BenchmarkOpenUser(b *testing.B) {
	a, ctx := newTestAuth(nil), context.Background()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.openUser(ctx, userVector); err != nil {
			b.Fatal(err)
		}
	}
}
