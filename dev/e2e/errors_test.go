package e2e

import (
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// Bodies of the error table, whole: programs decide by the code, people read the message.
const (
	bodyKey      = `{"code":"InvalidAPIKey","message":"API key is missing or not valid here"}`
	bodyOrigin   = `{"code":"OriginNotAllowed","message":"origin is not allowed"}`
	bodyNotFound = `{"code":"NotFound","message":"no such resource"}`
	bodyMethod   = `{"code":"MethodNotAllowed","message":"method is not allowed here"}`
	bodyFull     = `{"code":"Unavailable","message":"no room for further sockets on this pod"}`
	idRule       = "1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -"
	nameRule     = "1 to 256 bytes of printable UTF-8"
)

func bodyToken(message string) string { return `{"code":"InvalidToken","message":"` + message + `"}` }

func bodyBad(message string) string { return `{"code":"BadRequest","message":"` + message + `"}` }

func bodyField(field, message string) string {
	return `{"code":"BadRequest","message":"` + message + `","details":{"field":"` + field + `"}}`
}

// refusal is an upgrade that is refused: with an HTTP answer, and where the page asked for it by a close frame.
type refusal struct {
	name   string
	dial   harness.Dial
	status int
	body   string
	close  int // with errors=close; 0: HTTP all the same
	reason string
}

// wantRefused makes the attempt with both libraries, each with and without errors=close.
func (r refusal) wantRefused(p *harness.Pod) {
	p.W.T.Helper()
	for _, r.dial.Gorilla = range []bool{false, true} {
		r.wantHTTP(p, r.dial)
		asking := r.dial.With("errors", "close")
		if r.close == 0 {
			r.wantHTTP(p, asking)
		} else {
			r.wantClosed(p, asking)
		}
	}
}

func (r refusal) wantHTTP(p *harness.Pod, d harness.Dial) {
	t := p.W.T
	t.Helper()
	d, id := identified(d)
	c, a, err := p.TryDial(harness.Within(t, harness.Patience), d)
	switch {
	case c != nil:
		c.Abort()
		t.Errorf("%s: let in", r.name)
	case a.Response == nil:
		t.Errorf("%s: no answer: %v", r.name, err)
	default:
		wantAnswer(t, r.name, a, r.status, r.body)
		wantRequestID(t, r.name, a, id)
	}
}

func (r refusal) wantClosed(p *harness.Pod, d harness.Dial) {
	t := p.W.T
	t.Helper()
	d, id := identified(d)
	ctx := harness.Within(t, harness.Patience)
	c, a, err := p.TryDial(ctx, d)
	if err != nil {
		t.Errorf("%s, errors=close: not upgraded: %v", r.name, err)
		return
	}
	wantRequestID(t, r.name, a, id)
	if m, err := c.TryTake(ctx, func(harness.Message) bool { return true }); err == nil {
		t.Errorf("%s, errors=close: got %s", r.name, m.Raw)
		return
	}
	if end := c.Ended(); end == nil || end.Code != r.close || end.Reason != r.reason {
		t.Errorf("%s, errors=close: ended with %+v, want %d %q", r.name, end, r.close, r.reason)
	}
}

// identified gives d a request id of its own.
func identified(d harness.Dial) (harness.Dial, string) {
	id := fmt.Sprintf("e2e.%d_x-1", time.Now().UnixNano())
	d.Header = d.Header.Clone()
	if d.Header == nil {
		d.Header = http.Header{}
	}
	d.Header.Set("X-Request-ID", id)
	return d, id
}

// wantRequestID wants the request's id in the answer, or any sane one where id is empty.
func wantRequestID(t *testing.T, name string, a harness.Answer, id string) {
	t.Helper()
	got := a.Header.Values("X-Request-ID")
	if len(got) != 1 || got[0] == "" || id != "" && got[0] != id {
		t.Errorf("%s: X-Request-ID %q, want %q", name, got, id)
	}
}

func wantAnswer(t *testing.T, name string, a harness.Answer, status int, body string) {
	t.Helper()
	if a.StatusCode != status || string(a.Body) != body {
		t.Errorf("%s:\n got %d %s\nwant %d %s", name, a.StatusCode, a.Body, status, body)
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json" {
		t.Errorf("%s: Content-Type %q", name, ct)
	}
	if after := a.Header.Get("Retry-After"); (after != "") != (status == http.StatusServiceUnavailable) {
		t.Errorf("%s: %d with Retry-After %q", name, status, after)
	}
}

// wantSilent looks for keys and tokens in all that a pod with LOG_LEVEL=debug has logged, and in its metrics.
func wantSilent(p *harness.Pod, secrets ...string) {
	p.W.T.Helper()
	metrics := string(p.Do("GET", "/metrics", nil, nil).Body)
	log := p.Log.Text()
	if !strings.Contains(log, `"msg":"request"`) || !strings.Contains(log, `"msg":"socket opened"`) {
		p.W.T.Errorf("the log of %s tells of no request or of no socket: nothing to look for secrets in", p.ID)
	}
	for _, s := range []string{"x-api-key=", "token="} {
		if strings.Contains(log, s) {
			p.W.T.Errorf("logged a query string with %s", s)
		}
	}
	for _, s := range append(secrets, harness.APIKey, harness.AdminAPIKey, harness.TokenKey, harness.AdminKey) {
		if len(s) < 8 {
			p.W.T.Errorf("%q is too short to be looked for", s)
		}
		if at := strings.Index(log, s); at >= 0 {
			p.W.T.Errorf("logged a secret: %s", log[max(0, at-200):min(len(log), at+len(s)+20)])
		}
		if strings.Contains(metrics, s) {
			p.W.T.Errorf("a metric holds %s", s)
		}
	}
}

// tamper changes one bit in the middle of a token, which stays a word of its alphabet.
func tamper(token string) string {
	i := len(token) / 2
	other := byte('A')
	if token[i] == other {
		other = 'B'
	}
	return token[:i] + string(other) + token[i+1:]
}

// badTokens are tokens that open nothing, by what is wrong with them.
func badTokens(t *testing.T) map[string]string {
	later, ids := time.Now().Add(time.Hour), map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann"}
	with := func(m map[string]any, more map[string]any) map[string]any {
		m = maps.Clone(m)
		maps.Copy(m, more)
		return m
	}
	good := harness.UserToken(t, "acme", "desk1", "ann", time.Hour)
	admin := harness.AdminToken(t, "root", "", "", "", time.Hour)
	return map[string]string{
		"good": good, "admin": admin,
		"expired":       harness.UserToken(t, "acme", "desk1", "ann", -time.Second),
		"expired admin": harness.AdminToken(t, "root", "", "", "", -time.Second),
		"other agent":   harness.UserToken(t, "acme", "desk2", "ann", time.Hour),
		"other company": harness.UserToken(t, "rival", "desk1", "ann", time.Hour),
		"wrong key":     harness.Seal(t, strings.Repeat("5a", 32), with(ids, map[string]any{"expires_at": later})),
		"tampered":      tamper(good),
		"cut":           good[:len(good)-4],
		"long":          strings.Repeat(good, 1+4096/len(good)),
		"no expiry":     harness.Seal(t, harness.TokenKey, ids),
		"no json":       harness.SealBytes(t, harness.TokenKey, []byte("acme/desk1/ann")),
		"no user":       harness.Seal(t, harness.TokenKey, with(ids, map[string]any{"expires_at": later, "user_id": ""})),
		"bad user":      harness.Seal(t, harness.TokenKey, with(ids, map[string]any{"expires_at": later, "user_id": "a\nb"})),
		"admin's":       harness.Seal(t, harness.TokenKey, map[string]any{"admin_id": "root", "expires_at": later}),
		"user's":        harness.Seal(t, harness.AdminKey, with(ids, map[string]any{"expires_at": later})),
		"contradiction": harness.AdminToken(t, "root", "acme", "", "rival", time.Hour),
	}
}

// TestErrorTable: every reason to refuse an upgrade that needs no special settings, each answered to the letter, and
// neither key nor token in the log.
func TestErrorTable(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("LOG_LEVEL=debug")
	tokens := badTokens(t)
	refusals := refusedUpgrades(tokens)
	before := p.Metrics()
	byToken := 0.0
	for _, r := range refusals {
		r.wantRefused(p)
		if r.status == 401 || strings.HasPrefix(r.body, bodyToken("")[:20]) {
			byToken += 4
		}
	}
	after := p.Metrics()
	if got := after.Sum("dws_auth_failure_total") - before.Sum("dws_auth_failure_total"); got != byToken {
		t.Errorf("dws_auth_failure_total counted %v refusals, want %v", got, byToken)
	}
	for _, label := range []string{`reason="expired"`, `reason="id"`, `reason="malformed"`, `reason="missing"`, `reason="path"`, `reason="scope"`, `reason="key"`} {
		if after.Sum("dws_auth_failure_total", label) == 0 {
			t.Errorf("no dws_auth_failure_total with %s", label)
		}
	}
	if got := after.Sum("dws_connections_total"); got != 0 {
		t.Errorf("%v sockets were opened", got)
	}
	d := harness.User("acme", "desk1", "ann")
	d.Token = tokens["good"]
	p.Connect(d) // all the same
	wantSilent(p, append(slices.Collect(maps.Values(tokens)), "not-the-general-key")...)
}

// refusedUpgrades are what is wrong with an upgrade, in the order in which it is found.
func refusedUpgrades(tokens map[string]string) []refusal {
	const cannot, noClaims = "token cannot be opened", "token does not hold a user's claims"
	user := func(change func(*harness.Dial)) harness.Dial {
		d := harness.Dial{Company: "acme", Agent: "desk1", Token: tokens["good"]}
		change(&d)
		return d
	}
	admin := func(change func(*harness.Dial)) harness.Dial {
		d := harness.Dial{Admin: "root", Token: tokens["admin"]}
		change(&d)
		return d
	}
	token := func(name string) func(*harness.Dial) { return func(d *harness.Dial) { d.Token = tokens[name] } }
	key := func(k string) func(*harness.Dial) { return func(d *harness.Dial) { d.Key = k } }
	path := func(p string) func(*harness.Dial) { return func(d *harness.Dial) { d.Path = p } }
	noToken := func(d *harness.Dial) { d.Token = harness.None }
	id := func(field, why string) string {
		return bodyField(field, strings.ReplaceAll(field, "_", " ")+why+" ("+idRule+")")
	}
	chat := func(why string) string {
		return bodyField("chat_id", "chat id"+why)
	}
	const chatRule = ` (1 to 256 bytes of printable ASCII without blank, * and >)`
	since := bodyField("since", "since must be a position, or empty")
	foreign := func(d *harness.Dial) { d.Protocols = []string{"chat.v2", "graphql-ws"} }
	return []refusal{
		{"foreign sub-protocols", user(foreign), 400, bodyBad("the only sub-protocol is json.v1"), 0, ""},
		{"foreign origin", user(func(*harness.Dial) {}).Origin("https://evil.example"), 403, bodyOrigin, 0, ""},
		{"foreign origin, no key", user(key(harness.None)).Origin("https://evil.example"), 403, bodyOrigin, 0, ""},
		{"opaque origin", user(func(*harness.Dial) {}).Origin("null"), 403, bodyOrigin, 0, ""},
		{"no key", user(key(harness.None)), 401, bodyKey, 4401, "invalid-api-key"},
		{"wrong key", user(key("not-the-general-key")), 401, bodyKey, 4401, "invalid-api-key"},
		{"admin key for a user", user(key(harness.AdminAPIKey)), 401, bodyKey, 4401, "invalid-api-key"},
		{"no key for an admin", admin(key(harness.None)), 401, bodyKey, 4401, "invalid-api-key"},
		{"general key for an admin", admin(key(harness.APIKey)), 401, bodyKey, 4401, "invalid-api-key"},
		{"company with a dot", user(path("/ws/ac.me/desk1")), 400, id("company_id", ` \"ac.me\" holds '.'`), 4400, "bad-request"},
		{"agent with a wildcard", user(path("/ws/acme/desk*")), 400, id("agent_id", ` \"desk*\" holds '*'`), 4400, "bad-request"},
		{"company of 129 bytes", user(path("/ws/" + strings.Repeat("c", 129) + "/desk1")), 400, id("company_id", ` \"`+strings.Repeat("c", 64)+`\" has 129 bytes`), 4400, "bad-request"},
		{"escaped blank", user(path("/ws/acme/desk%201")), 400, id("agent_id", ` \"desk 1\" holds ' '`), 4400, "bad-request"},
		{"no token", user(noToken), 403, bodyToken("token is missing"), 4403, "invalid-token"},
		{"no admin token", admin(noToken), 403, bodyToken("token is missing"), 4403, "invalid-token"},
		{"token not base64", user(func(d *harness.Dial) { d.Token = "not!a!token!" }), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"token of another key", user(token("wrong key")), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"tampered token", user(token("tampered")), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"token cut off", user(token("cut")), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"token above 4096 bytes", user(token("long")), 403, bodyToken("token is too long"), 4403, "invalid-token"},
		{"admin token for a user", user(token("admin")), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"user token for an admin", admin(token("good")), 403, bodyToken(cannot), 4403, "invalid-token"},
		{"admin's claims for a user", user(token("admin's")), 403, bodyToken("token: company id is empty (" + idRule + ")"), 4403, "invalid-token"},
		{"user's claims for an admin", admin(token("user's")), 403, bodyToken("token: admin id is empty (" + nameRule + ")"), 4403, "invalid-token"},
		{"token without JSON", user(token("no json")), 403, bodyToken(noClaims), 4403, "invalid-token"},
		{"token without user", user(token("no user")), 403, bodyToken("token: user id is empty (" + nameRule + ")"), 4403, "invalid-token"},
		{"token with a bad user", user(token("bad user")), 403, bodyToken(`token: user id \"a\\nb\" holds '\\n' (` + nameRule + ")"), 4403, "invalid-token"},
		{"token without expiry", user(token("no expiry")), 403, bodyToken("token has expired"), 4403, "token-expired"},
		{"expired token", user(token("expired")), 403, bodyToken("token has expired"), 4403, "token-expired"},
		{"expired admin token", admin(token("expired admin")), 403, bodyToken("token has expired"), 4403, "token-expired"},
		{"token of another agent", user(token("other agent")), 403, bodyToken("token is for another company or agent"), 4403, "invalid-token"},
		{"token of another company", user(token("other company")), 403, bodyToken("token is for another company or agent"), 4403, "invalid-token"},
		{"contradictory scope", admin(token("contradiction")), 403, bodyToken("subscribed_company_id contradicts company_id_restriction"), 4403, "invalid-token"},
		{"since not a number", user(func(*harness.Dial) {}).With("since", "yesterday"), 400, since, 4400, "bad-request"},
		{"since negative", user(func(*harness.Dial) {}).With("since", "-1"), 400, since, 4400, "bad-request"},
		{"since beyond 64 bits", admin(func(*harness.Dial) {}).With("since", "18446744073709551616"), 400, since, 4400, "bad-request"},
		{"since with a blank", admin(func(*harness.Dial) {}).With("since", " 5"), 400, since, 4400, "bad-request"},
		{"chat with a wildcard", user(func(*harness.Dial) {}).With("chat", "a.*"), 400, chat(` \"a.*\" holds '*'` + chatRule), 4400, "bad-request"},
		{"chat that ends in a dot", user(func(*harness.Dial) {}).With("since", "").With("chat", "c1."), 400, chat(` \"c1.\" has a dot at its end or two in a row, which no NATS subject can hold`), 4400, "bad-request"},
		{"chat of 257 bytes", user(func(*harness.Dial) {}).With("chat", strings.Repeat("c", 257)), 400, chat(` \"` + strings.Repeat("c", 64) + `\" has 257 bytes` + chatRule), 4400, "bad-request"},
	}
}

// TestRequestErrors: what is no upgrade at all, and the endpoints that mint.
func TestRequestErrors(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("LOG_LEVEL=debug")
	const ttl = "expires_in_seconds must be a whole number, 1 to 31536000"
	no426 := `{"code":"UpgradeRequired","message":"this is a WebSocket endpoint: Connection: Upgrade, Upgrade: websocket"}`
	good := `{"company_id":"acme","agent_id":"desk1","user_id":"ann","expires_in_seconds":60}`
	for _, r := range []struct {
		method, path, key, body string
		status                  int
		want, allow             string
	}{
		{"GET", "/", "", "", 404, bodyNotFound, ""},
		{"GET", "/ws", "", "", 404, bodyNotFound, ""},
		{"GET", "/ws/acme/desk1/ann", "", "", 404, bodyNotFound, ""},
		{"GET", "/admin/sessions/", "", "", 404, bodyNotFound, ""},
		{"POST", "/health", "", "", 405, bodyMethod, "GET, HEAD"},
		{"PUT", "/ws/acme/desk1", "", "", 405, bodyMethod, "GET"},
		{"GET", "/generate-token", "", "", 405, bodyMethod, "POST"},
		{"DELETE", "/admin/generate-token", "", "", 405, bodyMethod, "POST"},
		{"GET", "/ws/acme/desk1?errors=close&x-api-key=" + harness.APIKey, "", "", 426, no426, ""},
		{"GET", "/ws/admin", "", "", 426, no426, ""},
		{"POST", "/generate-token", "", good, 401, bodyKey, ""},
		{"POST", "/generate-token", "not-the-general-key", good, 401, bodyKey, ""},
		{"POST", "/generate-token", harness.AdminAPIKey, good, 401, bodyKey, ""},
		{"POST", "/admin/generate-token", harness.APIKey, good, 401, bodyKey, ""},
		{"POST", "/generate-token", harness.APIKey, "no json", 400, bodyBad("body is not a JSON object"), ""},
		{"POST", "/generate-token", harness.APIKey, `{"company_id":"acme","agent_id":"desk1","expires_in_seconds":60}`, 400, bodyField("user_id", "user id is empty ("+nameRule+")"), ""},
		{"POST", "/generate-token", harness.APIKey, `{"company_id":"a.b"}`, 400, bodyField("company_id", `company id \"a.b\" holds '.' (`+idRule+")"), ""},
		{"POST", "/generate-token", harness.APIKey, strings.Replace(good, "60", "0", 1), 400, bodyField("expires_in_seconds", ttl), ""},
		{"POST", "/generate-token", harness.APIKey, strings.Replace(good, "60", "31536001", 1), 400, bodyField("expires_in_seconds", ttl), ""},
		{"POST", "/generate-token", harness.APIKey, good + strings.Repeat(" ", 64<<10), 413, `{"code":"PayloadTooLarge","message":"body is larger than 65536 bytes"}`, ""},
		{"POST", "/admin/generate-token", harness.AdminAPIKey, `{"admin_id":"root","expires_in_seconds":60,"subscribed_company_id":"acme","company_id_restriction":"rival"}`,
			403, bodyToken("subscribed_company_id contradicts company_id_restriction"), ""},
	} {
		name := r.method + " " + r.path + " " + r.body[:min(len(r.body), 80)]
		header := http.Header{"X-Request-Id": {"mine-1"}}
		if r.key != "" {
			header.Set("X-API-Key", r.key)
		}
		a := p.Do(r.method, r.path, header, []byte(r.body))
		wantAnswer(t, name, a, r.status, r.want)
		wantRequestID(t, name, a, "mine-1")
		if got := a.Header.Get("Allow"); got != r.allow {
			t.Errorf("%s: Allow %q, want %q", name, got, r.allow)
		}
		if r.status == 426 && (a.Header.Get("Upgrade") != "websocket" || a.Header.Get("Sec-WebSocket-Version") != "13") {
			t.Errorf("%s: does not say what to upgrade to: %v", name, a.Header)
		}
	}
	p.Connect(harness.User("acme", "desk1", "ann"))
	wantSilent(p, "not-the-general-key")
}

// TestRequestIDs: an id that is not sane, or none, is replaced by a fresh one, in answers of every kind.
func TestRequestIDs(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start()
	seen := map[string]bool{}
	for _, id := range []string{"", "two words", strings.Repeat("x", 129), "a/b", "\u00fc"} {
		header := http.Header{"X-Request-Id": {id}}
		d := harness.User("acme", "desk1", "ann")
		d.Header = header
		_, opened, err := p.TryDial(harness.Within(t, harness.Patience), d)
		if err != nil {
			t.Fatal(err)
		}
		d.Key = "wrong"
		_, refused, _ := p.TryDial(harness.Within(t, harness.Patience), d)
		for _, a := range []harness.Answer{opened, refused, p.Do("GET", "/health", header, nil), p.Do("GET", "/nothing", header, nil)} {
			wantRequestID(t, fmt.Sprintf("id %q, %s", id, a.Status), a, "")
			got := a.Header.Get("X-Request-ID")
			if got == id || seen[got] {
				t.Errorf("id %q, %s: answered with %q, fresh: %v", id, a.Status, got, !seen[got])
			}
			seen[got] = true
		}
	}
	if len(seen) != 20 {
		t.Errorf("%d ids for 20 answers", len(seen))
	}
}

// TestPublicKey: it opens user sockets and nothing else, and the general key no longer opens any.
func TestPublicKey(t *testing.T) {
	t.Parallel()
	const public = "public-key-of-the-tests"
	w := harness.New(t)
	p := w.Start("AUTH_PUBLIC_KEY="+public+", second-"+public, "LOG_LEVEL=debug")
	d := harness.User("acme", "desk1", "ann")
	refusal{"general key on a socket", d, 401, bodyKey, 4401, "invalid-api-key"}.wantRefused(p)
	a := harness.Admin("root", "", "")
	a.Key = public
	refusal{"public key on an admin's socket", a, 401, bodyKey, 4401, "invalid-api-key"}.wantRefused(p)
	ask := map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": "ann", "admin_id": "root", "expires_in_seconds": 60}
	for _, path := range []string{"/generate-token", "/admin/generate-token"} {
		got := p.Do("POST", path, http.Header{"X-Api-Key": {public}}, ask)
		wantAnswer(t, path, got, 401, bodyKey)
	}
	token := p.Mint("/generate-token", harness.APIKey, ask)
	for _, key := range []string{public, "second-" + public} {
		d.Key, d.Token = key, token
		p.Connect(d).WantNothingElse()
	}
	wantSilent(p, public, token)

	const warning = "DAISI_WS_AUTH_PUBLIC_KEY IS NOT SET"
	without := w.Start()
	if strings.Contains(p.Log.Text(), warning) || !strings.Contains(without.Log.Text(), warning) {
		t.Errorf("the warning about the missing public key: with it %v, without %v", strings.Contains(p.Log.Text(), warning), strings.Contains(without.Log.Text(), warning))
	}
}

// TestOriginsOfPages: which pages may open a socket; no other is ever upgraded.
func TestOriginsOfPages(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	p := w.Start("WEBSOCKET_ALLOWED_ORIGINS=*.example.com, app.test:8443", "LOG_LEVEL=debug")
	lax := w.Start("WEBSOCKET_INSECURE_SKIP_VERIFY=true")
	d := harness.User("acme", "desk1", "ann")
	for _, d.Gorilla = range []bool{false, true} {
		p.Connect(d) // no origin: no browser
		for _, good := range []string{"http://" + p.HTTP, "https://chat.example.com", "https://CHAT.example.com", "https://app.test:8443"} {
			p.Connect(d.Origin(good)).WantNothingElse()
		}
		lax.Connect(d.Origin("https://evil.example")).WantNothingElse()
	}
	page := d.Origin("https://chat.example.com")
	page.Key = "not-the-general-key"
	refusal{"allowed page, wrong key", page, 401, bodyKey, 4401, "invalid-api-key"}.wantRefused(p)
	refused := 0.0
	for _, bad := range []string{"https://example.com", "https://chat.example.com:444", "https://chat.example.com.evil.example", "https://app.test", "http://localhost", "null"} {
		refusal{"origin " + bad, d.Origin(bad), 403, bodyOrigin, 0, ""}.wantRefused(p)
		refused += 4
	}
	if n := p.Metric("dws_origins_refused_total"); n != refused {
		t.Errorf("%v refused origins counted, want %v", n, refused)
	}
	if l := wantLogged(p, "origin refused"); l["origin"] != "https://example.com" || l["host"] != p.HTTP || l["suppressed"] != 0.0 {
		t.Errorf("logged %v", l)
	}
	apps := w.Start("WEBSOCKET_ALLOWED_ORIGINS=[::1]:*,[2001:DB8:0::1]:8443,bücher.example,null,file://")
	for _, good := range []string{"http://[::1]:3000", "https://[2001:db8::1]:8443", "https://xn--bcher-kva.example", "null", "file://"} {
		apps.Connect(d.Origin(good)).WantNothingElse()
	}
	refusal{"another IPv6 address", d.Origin("http://[::2]:3000"), 403, bodyOrigin, 0, ""}.wantRefused(apps)
	if !strings.Contains(apps.Log.Text(), "DAISI_WS_WEBSOCKET_ALLOWED_ORIGINS lists null") {
		t.Error("no word about null, which is the origin of any page that wants it")
	}
	if !strings.Contains(lax.Log.Text(), "DAISI_WS_WEBSOCKET_INSECURE_SKIP_VERIFY IS ON") {
		t.Error("no loud word about the check that is off")
	}
	wantSilent(p)
}

// TestMaxConnections: one socket too many is told to come back, and may when another has gone.
func TestMaxConnections(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start("SERVER_MAX_CONNECTIONS=2")
	p.Connect(harness.Admin("root", "", ""))
	c := p.Connect(harness.User("acme", "desk1", "ann"))
	late := harness.User("acme", "desk1", "ben")
	refusal{"third socket", late, 503, bodyFull, 1013, "unavailable"}.wantRefused(p)
	c.WantNothingElse()
	c.Close(1000, "")
	p.WaitMetric(func(v float64) bool { return v == 1 }, "dws_active_connections")
	var in *harness.Client
	harness.Eventually(t, harness.Patience, "room for one more", func() bool {
		in, _, _ = p.TryDial(harness.Within(t, harness.Patience), late)
		return in != nil
	})
	in.WantReady()
	in.WantNothingElse()
}
