package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/harness"
)

// writeFile makes or replaces the file whole, as an operator's tools do: a reload never reads half of it.
func writeFile(t *testing.T, path string, lines ...string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(strings.Join(lines, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// reload sends SIGHUP and waits until the pod has counted one reload of that result, success or failure, and no other.
func reload(p *harness.Pod, result string) {
	p.W.T.Helper()
	name, label := "dws_config_reloads_total", `result="`+result+`"`
	was := p.Metrics()
	if err := p.Signal(syscall.SIGHUP); err != nil {
		p.W.T.Fatal(err)
	}
	p.WaitMetric(func(v float64) bool { return v > was.Sum(name) }, name)
	if now := p.Metrics(); now.Sum(name) != was.Sum(name)+1 || now.Sum(name, label) != was.Sum(name, label)+1 {
		p.W.T.Fatalf("one SIGHUP: reloads counted %v, %s %v, before %v and %v", now.Sum(name), label, now.Sum(name, label), was.Sum(name), was.Sum(name, label))
	}
}

// TestKeysAndTokens: every way on which a key and a token may come, and none of them in the log.
func TestKeysAndTokens(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("LOG_LEVEL=debug")
	user := harness.UserToken(t, "acme", "desk1", "ann", time.Hour)
	admin := harness.AdminToken(t, "root", "", "", "", time.Hour)
	plain := harness.Seal(t, harness.TokenKey, map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_at": time.Now().Add(time.Hour)})
	raw, err := base64.RawURLEncoding.DecodeString(user)
	if err != nil {
		t.Fatal(err)
	}
	padded := base64.URLEncoding.EncodeToString(raw)
	header := func(name, value string) http.Header { return http.Header{name: {value}} }
	for name, d := range map[string]harness.Dial{
		"key by header":            {Token: user, Key: harness.None, Header: header("X-Api-Key", harness.APIKey)},
		"token by Authorization":   {Token: harness.None, Header: header("Authorization", "Bearer "+user)},
		"scheme in lower case":     {Token: harness.None, Header: header("Authorization", "bearer "+user)},
		"token by sub-protocol":    {Token: user, Bearer: true},
		"sub-protocols turned":     {Token: harness.None, Protocols: []string{"bearer." + user, "json.v1"}},
		"sub-protocol bearer only": {Token: harness.None, Protocols: []string{"bearer." + user}},
		"sub-protocol json.v1":     {Token: user, Protocols: []string{"other", "json.v1"}},
		"padded":                   {Token: padded},
		"without issued_at":        {Token: plain},
		"admin":                    {Token: admin, Admin: "root"},
		"admin by sub-protocol":    {Token: admin, Admin: "root", Bearer: true},
		"admin by headers": {Token: harness.None, Key: harness.None, Admin: "root",
			Header: http.Header{"X-Api-Key": {harness.AdminAPIKey}, "Authorization": {"Bearer " + admin}}},
	} {
		if d.Admin == "" {
			d.Company, d.Agent = "acme", "desk1"
		}
		for _, d.Gorilla = range []bool{false, true} {
			c, a, err := p.TryDial(harness.Within(t, harness.Patience), d)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			c.WantReady()
			want := ""
			if d.Bearer || len(d.Protocols) == 2 {
				want = "json.v1"
			}
			if got := a.Header.Values("Sec-WebSocket-Protocol"); c.Protocol() != want || strings.Join(got, ",") != want {
				t.Errorf("%s: chose the sub-protocol %q, %q, want %q", name, c.Protocol(), got, want)
			}
			if d.Admin == "" {
				c.WantNothingElse()
			} else {
				c.WantEvent(p.W.Agent("acme", "desk1"))
			}
		}
	}
	minted := p.Mint("/generate-token?x-api-key="+harness.APIKey, "", map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_in_seconds": 60})
	wantSilent(p, user, admin, plain, minted)
}

// TestTokenExpiry: a socket gets its events up to its token's end and is closed within a second or so of it; then the session is free.
func TestTokenExpiry(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start()
	ends := time.Now().Add(4 * time.Second)
	ann := harness.User("acme", "desk1", "ann")
	ann.TTL = time.Until(ends)
	root := harness.Admin("root", "", "")
	root.TTL = time.Until(ends)
	long := p.Connect(harness.User("acme", "desk1", "ben"))
	clients := []*harness.Client{p.Connect(ann), p.Connect(root)}
	clients[0].WantEvent(p.W.Chat("acme", "desk1"))
	clients[1].WantEvent(p.W.Agent("acme", "desk1"))
	for _, c := range clients {
		c.WantClose(4403, "token-expired")
		// The bound is generous for a busy machine, but far below any other timer that a socket has.
		if late := time.Since(ends); late < 0 || late > 5*time.Second {
			t.Errorf("closed %v after the token's end", late)
		}
	}
	ann.TTL = time.Hour
	p.Connect(ann).WantNothingElse()
	long.WaitEvent(p.W.Chat("acme", "desk1"))
	if got := p.Metric("dws_closes_total", `code="4403"`); got != 2 {
		t.Errorf("dws_closes_total of 4403 is %v", got)
	}
}

// refresh sends refresh_token and returns the answer as it came.
func refresh(c *harness.Client, token string) string {
	c.Pod.W.T.Helper()
	c.Send(map[string]any{"type": "refresh_token", "payload": map[string]any{"token": token}})
	return c.Next().Raw
}

// TestRefreshToken: a newer token of the same identity prolongs a socket's life; no other one does.
func TestRefreshToken(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("LOG_LEVEL=debug")
	tokens := badTokens(t)
	short, long := 5*time.Second, time.Now().Add(time.Hour).UTC().Truncate(time.Second)
	ann, root := harness.User("acme", "desk1", "ann"), harness.Admin("root", "acme", "")
	ann.TTL, root.TTL = short, short
	users, admin := p.Connect(ann), p.Connect(root)
	ann.User = "ben" // whose token ends after those of the others
	ann.TTL = short
	control := p.Connect(ann)

	fault := func(body string) string { return `{"type":"error","payload":` + body + `}` }
	others := bodyToken("the token is another's, or of another scope")
	for _, r := range []struct {
		c           *harness.Client
		token, want string
	}{
		{users, harness.UserToken(t, "acme", "desk1", "eve", time.Hour), others},
		{users, tokens["other agent"], others},
		{users, tokens["other company"], others},
		{users, tokens["expired"], bodyToken("token has expired")},
		{users, tokens["wrong key"], bodyToken("token cannot be opened")},
		{users, tokens["admin"], bodyToken("token cannot be opened")},
		{users, "", bodyToken("token is missing")},
		{admin, harness.AdminToken(t, "root", "", "", "", time.Hour), others},
		{admin, harness.AdminToken(t, "root", "acme", "desk1", "", time.Hour), others},
		{admin, harness.AdminToken(t, "toor", "acme", "", "", time.Hour), others},
		{admin, tokens["contradiction"], bodyToken("subscribed_company_id contradicts company_id_restriction")},
		{control, tokens["good"], others},
	} {
		if got := refresh(r.c, r.token); got != fault(r.want) {
			t.Errorf("got %s, want %s", got, fault(r.want))
		}
	}
	users.SendRaw(true, []byte(`{"type":"refresh_token"}`))
	if got := users.Next().Raw; got != fault(bodyField("token", "refresh_token without token")) {
		t.Errorf("without a token: %s", got)
	}

	userToken := harness.Seal(t, harness.TokenKey, map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "expires_at": long})
	adminToken := harness.Seal(t, harness.AdminKey, map[string]any{"admin_id": "root", "subscribed_company_id": "*", "company_id_restriction": "acme", "expires_at": long})
	want := `{"type":"token_refreshed","payload":{"expires_at":"` + long.Format(time.RFC3339) + `"}}`
	for c, token := range map[*harness.Client]string{users: userToken, admin: adminToken} {
		if got := refresh(c, token); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
	control.WantClose(4403, "token-expired")
	users.WantNothingElse()
	admin.WantEvent(p.W.Agent("acme", "desk1"))
	delete(tokens, "good") // of a client of its own, below
	wantSilent(p, userToken, adminToken, users.Dial.Token, admin.Dial.Token, tokens["other agent"])
}

// tokenCache is the cache of a pod as Redis shows it.
type tokenCache struct {
	p   *harness.Pod
	rdb *redis.Client
	ctx context.Context
}

// cacheName is the key in Redis under which a token's claims are cached.
func cacheName(prefix, token string) string {
	sum := sha256.Sum256([]byte(prefix + token))
	return "token_cache:" + hex.EncodeToString(sum[:])
}

// left is the time that an entry has; negative: there is none, or one without an end.
func (c *tokenCache) left(name string) time.Duration {
	c.p.W.T.Helper()
	d, err := c.rdb.PTTL(c.ctx, name).Result()
	if err != nil {
		c.p.W.T.Fatal(err)
	}
	return d
}

// touch gives an entry an hour, more than the service ever does: one that it writes anew shows.
func (c *tokenCache) touch(name string) {
	c.p.W.T.Helper()
	if ok, err := c.rdb.PExpire(c.ctx, name, time.Hour).Result(); err != nil || !ok {
		c.p.W.T.Fatalf("%s is not there: %v", name, err)
	}
}

// connectUntil connects, again if need be, until the entry has a life as wanted: the service does not wait for a busy Redis.
func (c *tokenCache) connectUntil(d harness.Dial, name, what string, most time.Duration) {
	c.p.W.T.Helper()
	harness.Eventually(c.p.W.T, harness.Patience, what, func() bool {
		c.p.Connect(d)
		left := c.left(name)
		return left > 0 && left <= most
	})
}

// TestTokenCache: off unless set; a hit is used; no entry lets pass what the token itself would not, be it forged, moved,
// expired or of a retired key; and Redis may be away.
func TestTokenCache(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	conf, keys := filepath.Join(t.TempDir(), "conf"), filepath.Join(t.TempDir(), "keys")
	writeFile(t, conf, "# no cache yet")
	writeFile(t, keys, harness.TokenKey)
	p := w.Start("-config="+conf, "AUTH_TOKEN_AES_KEY=", "AUTH_TOKEN_AES_KEY_FILE="+keys)
	c := &tokenCache{p, w.RedisClient(), harness.Within(t, 5*harness.Patience)}
	dial, admin := harness.User("acme", "desk1", "ann"), harness.Admin("root", "", "")
	dial.Token, admin.Token = harness.UserToken(t, "acme", "desk1", "ann", time.Hour), harness.AdminToken(t, "root", "", "", "", time.Hour)
	name := cacheName("", dial.Token)
	p.Connect(dial)
	if d := c.left(name); d != -2 {
		t.Fatalf("cached though the cache is off: PTTL %v", d)
	}

	writeFile(t, conf, "DAISI_WS_AUTH_TOKEN_CACHE_TTL=10m", "DAISI_WS_AUTH_ADMIN_TOKEN_CACHE_TTL=5m")
	reload(p, "success")
	c.wantHits(dial, name, 10*time.Minute)
	c.wantHits(admin, cacheName("admin_", admin.Token), 5*time.Minute)
	c.wantForgedUseless(dial, name)
	c.wantExpiredUseless()

	fresh := strings.Repeat("4b", 32)
	writeFile(t, keys, fresh+","+harness.TokenKey)
	reload(p, "success")
	c.connectUntil(dial, name, "an entry of the old key", time.Hour)
	writeFile(t, keys, fresh)
	reload(p, "success")
	c.touch(name)
	refusal{"retired key, cached", dial, 403, bodyToken("token cannot be opened"), 4403, "invalid-token"}.wantRefused(p)
	c.touch(name) // it was there all the time
	wantTokensWithoutRedis(p, fresh)
}

func (c *tokenCache) wantHits(d harness.Dial, name string, ttl time.Duration) {
	c.p.W.T.Helper()
	c.connectUntil(d, name, "an entry that lives as long as it should", ttl)
	c.touch(name)
	c.p.Connect(d)
	if left := c.left(name); left <= ttl {
		c.p.W.T.Errorf("%s: PTTL %v after another use: it was no hit", name, left)
	}
}

// wantForgedUseless stands in for who can write Redis: bare claims of another agent, and a good entry of another token.
func (c *tokenCache) wantForgedUseless(dial harness.Dial, name string) {
	t := c.p.W.T
	t.Helper()
	other := harness.User("acme", "desk2", "ann")
	other.Token = harness.UserToken(t, "acme", "desk2", "ann", time.Hour)
	c.connectUntil(other, cacheName("", other.Token), "an entry of the other token", 10*time.Minute)
	moved, err := c.rdb.Get(c.ctx, cacheName("", other.Token)).Result()
	if err != nil {
		t.Fatal(err)
	}
	claims, err := json.Marshal(map[string]any{"company_id": "acme", "agent_id": "desk2", "user_id": "ann", "expires_at": time.Now().Add(time.Hour)})
	if err != nil {
		t.Fatal(err)
	}
	stolen := other
	stolen.Token = dial.Token
	for _, forged := range []string{string(claims), strings.Repeat("x", 32) + string(claims), moved, ""} {
		if err := c.rdb.Set(c.ctx, name, forged, time.Hour).Err(); err != nil {
			t.Fatal(err)
		}
		refusal{"forged entry", stolen, 403, bodyToken("token is for another company or agent"), 4403, "invalid-token"}.wantRefused(c.p)
		c.connectUntil(dial, name, "a good entry instead of the forged one", 10*time.Minute)
	}
}

// wantExpiredUseless has an entry outlive its token by the test's own hand.
func (c *tokenCache) wantExpiredUseless() {
	t := c.p.W.T
	t.Helper()
	const life = 6 * time.Second
	brief, control := harness.User("acme", "desk1", "ann"), harness.User("acme", "desk1", "ben")
	brief.Token = harness.UserToken(t, "acme", "desk1", "ann", life)
	control.Token = harness.UserToken(t, "acme", "desk1", "ben", life) // ends with the other or later
	ends := c.p.Connect(control)
	name := cacheName("", brief.Token)
	c.connectUntil(brief, name, "an entry that lives as long as its token", life)
	c.touch(name)
	ends.WantClose(4403, "token-expired")
	refusal{"expired, cached", brief, 403, bodyToken("token has expired"), 4403, "token-expired"}.wantRefused(c.p)
	c.touch(name) // it was there all the time
}

// wantTokensWithoutRedis kills Redis: tokens are validated all the same, on open sockets and before the upgrade, and
// only then is there no session to be had.
func wantTokensWithoutRedis(p *harness.Pod, key string) {
	w, t := p.W, p.W.T
	t.Helper()
	seal := func(agent string) string {
		return harness.Seal(t, key, map[string]any{"company_id": "acme", "agent_id": agent, "user_id": "ann", "expires_at": time.Now().Add(time.Hour)})
	}
	dial := harness.User("acme", "desk1", "ann")
	dial.Token = seal("desk1")
	c := p.Connect(dial)
	w.Redis.Kill()
	if got := refresh(c, seal("desk1")); !strings.HasPrefix(got, `{"type":"token_refreshed"`) {
		t.Errorf("refresh with Redis away: %s", got)
	}
	if got := refresh(c, tamper(dial.Token)); !strings.Contains(got, `"code":"InvalidToken"`) {
		t.Errorf("refresh with a bad token and Redis away: %s", got)
	}
	if p.Metric("dws_redis_errors_total", `op="token_cache"`) == 0 {
		t.Error("Redis was not asked, or its failure not counted")
	}
	bad := dial
	bad.Token = seal("desk2")
	refusal{"another agent's, Redis away", bad, 403, bodyToken("token is for another company or agent"), 4403, "invalid-token"}.wantRefused(p)
	a := p.WantRefused(dial, 503, "Unavailable")
	if a.Header.Get("Retry-After") == "" {
		t.Error("503 without Retry-After")
	}
	p.Dial(dial.With("errors", "close")).WantClose(1013, "unavailable")
	if err := w.Redis.Restart(); err != nil {
		t.Fatal(err)
	}
	p.WaitReady()
	p.Connect(dial).WaitEvent(w.Chat("acme", "desk1")) // a gap may come first: Redis was away
}

// TestKeyRotation: all four secrets come from files that SIGHUP reads again. First old and new are good, then the new
// alone; a socket that is open stays, whatever opened it.
func TestKeyRotation(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	names := []string{"AUTH_SECRET_TOKEN", "AUTH_TOKEN_AES_KEY", "AUTH_ADMIN_SECRET_TOKEN", "AUTH_ADMIN_TOKEN_AES_KEY"}
	was := []string{harness.APIKey, harness.TokenKey, harness.AdminAPIKey, harness.AdminKey}
	next := []string{"next-general-key", strings.Repeat("7c", 32), "next-admin-key", strings.Repeat("8d", 32)}
	var settings []string
	set := func(value func(i int) string) {
		t.Helper()
		for i, name := range names {
			writeFile(t, filepath.Join(dir, name), value(i))
		}
	}
	for _, name := range names {
		settings = append(settings, name+"=", name+"_FILE="+filepath.Join(dir, name))
	}
	set(func(i int) string { return was[i] })
	p := harness.New(t).Start(append(settings, "LOG_LEVEL=debug")...)

	claims := map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "admin_id": "root", "expires_at": time.Now().Add(time.Hour), "expires_in_seconds": 3600}
	user := func(name, apiKey, tokenKey string) harness.Dial {
		claims["user_id"] = name
		return harness.Dial{Company: "acme", Agent: "desk1", User: name, Key: apiKey, Token: harness.Seal(t, tokenKey, claims)}
	}
	admin := func(id, apiKey, tokenKey string) harness.Dial {
		claims["admin_id"] = id
		return harness.Dial{Admin: id, Key: apiKey, Token: harness.Seal(t, tokenKey, claims)}
	}
	oldUser, oldAdmin := user("ann", was[0], was[1]), admin("root", was[2], was[3])
	newUser, newAdmin := user("ben", next[0], next[1]), admin("toor", next[2], next[3])
	mixed := user("cleo", was[0], next[1])
	stays := []*harness.Client{p.Connect(oldUser), p.Connect(oldAdmin)}
	wantStay := func() {
		t.Helper()
		stays[0].WaitEvent(p.W.Chat("acme", "desk1"))
		stays[1].WaitEvent(p.W.Agent("acme", "desk1"))
	}
	p.WantRefused(newUser, 401, "InvalidAPIKey")
	p.WantRefused(mixed, 403, "InvalidToken")
	p.WantRefused(newAdmin, 401, "InvalidAPIKey")

	set(func(i int) string { return next[i] + ", " + was[i] })
	reload(p, "success")
	wantStay()
	again := []harness.Dial{user("dora", was[0], was[1]), newUser, newAdmin, mixed, admin("old", was[2], was[3])}
	for _, d := range again {
		p.Connect(d)
	}
	minted := newUser // the first key seals: this one outlives the old key
	minted.Token = p.Mint("/generate-token", was[0], claims)
	minted.Company, minted.Agent = "acme", "desk1"

	set(func(i int) string { return next[i] })
	reload(p, "success")
	wantStay()
	p.WantRefused(oldUser, 401, "InvalidAPIKey")
	oldUser.Key = next[0]
	p.WantRefused(oldUser, 403, "InvalidToken")
	p.WantRefused(oldAdmin, 401, "InvalidAPIKey")
	oldAdmin.Key = next[2]
	p.WantRefused(oldAdmin, 403, "InvalidToken")
	if got := refresh(stays[0], oldUser.Token); !strings.Contains(got, `"code":"InvalidToken"`) {
		t.Errorf("refresh with a token of the retired key: %s", got)
	}
	wantStay()
	p.Connect(minted)
	p.Connect(newAdmin)
	wantSilent(p, append(next, oldUser.Token, newUser.Token, newAdmin.Token, minted.Token)...)
}
