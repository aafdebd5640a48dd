package e2e

import (
	"encoding/json"
	"net/url"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// wantLogged returns the log line that holds text, decoded.
func wantLogged(p *harness.Pod, text string) map[string]any {
	p.W.T.Helper()
	line := p.WantLine(text)
	var l map[string]any
	if err := json.Unmarshal([]byte(line), &l); err != nil {
		p.W.T.Fatalf("%s: %v", line, err)
	}
	return l
}

// TestIDsOfOtherSystems: whatever names a user elsewhere names one here, with a session of its own over all pods, which operators
// see and can end.
func TestIDsOfOtherSystems(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	one, two := w.Start(), w.Start()
	rdb := w.RedisClient()
	ids := []string{"john.doe@example.com", "auth0|5f7c8ec7c33c6c004bbafe82", "user:1", "user%3A1", "Jane Doe", "山田太郎 💩", "a/b//../c", "..", "{x}*?#&+\"'\\", strings.Repeat("é", 128)}
	clients := map[string]*harness.Client{}
	for _, id := range ids {
		d := harness.User("acme", "desk1", id)
		d.Token = one.Mint("/generate-token", harness.APIKey, map[string]any{"company_id": "acme", "agent_id": "desk1", "user_id": id, "expires_in_seconds": 600})
		old := one.Connect(d)
		clients[id] = two.Connect(d)
		old.WantClose(4402, "session-replaced")
	}
	ops := one.Connect(harness.Admin("ops: Jane & John", "", ""))
	seq := w.Chat("acme", "desk1")
	for _, c := range clients {
		c.WantEvent(seq) // nobody was thrown out by another one's id
	}
	ops.WantEvent(w.Agent("acme", "desk1"))
	if l := wantLogged(one, `"user":"user:1"`); l["msg"] != "socket opened" {
		t.Errorf("logged %v", l)
	}

	var keys []string
	for after := ""; ; {
		r := listSessions(t, one, "?limit=4&after="+url.QueryEscape(after))
		keys = append(keys, r.keys()...)
		if after = r.Next; after == "" {
			break
		}
	}
	if len(keys) != len(ids)+1 || !slices.Contains(keys, "admin:ops%3A%20Jane%20%26%20John") {
		t.Errorf("listed %q", keys)
	}
	for _, key := range keys {
		if n, err := rdb.Exists(harness.Within(t, harness.Patience), "session:"+key).Result(); err != nil || n != 1 {
			t.Errorf("session:%s is not in Redis: %v", key, err)
		}
		part, found := strings.CutPrefix(key, "acme:desk1:")
		if !found {
			continue
		}
		id, err := url.PathUnescape(part)
		if err != nil || clients[id] == nil {
			t.Errorf("%s is the key of nobody: %q, %v", key, id, err)
			continue
		}
		if a := one.Do("DELETE", "/admin/sessions/acme/desk1/"+part, adminHeader, nil); a.StatusCode != 200 {
			t.Errorf("DELETE of %q: %d %s", id, a.StatusCode, a.Body)
		}
		clients[id].WantClose(4403, "revoked")
	}
}

// TestRefusedIDsAreNamed: which id, and which character of it, is said in the answer and in the log, at most once a second, with the
// number of lines that were suppressed.
func TestRefusedIDsAreNamed(t *testing.T) {
	t.Parallel()
	p := harness.New(t).Start()
	token := func(company, agent, user string) harness.Dial {
		d := harness.User("acme", "desk1", "")
		d.Token = harness.UserToken(t, company, agent, user, time.Hour)
		return d
	}
	const colon = `agent id \"agent:1\" holds ':' (` + idRule + `)`
	refusal{"agent", token("acme", "agent:1", "ann"), 403, bodyToken("token: " + colon), 4403, "invalid-token"}.wantRefused(p)
	if l := wantLogged(p, `"msg":"id refused"`); l["err"] != `token: agent id "agent:1" holds ':' (`+idRule+`)` || l["suppressed"] != 0.0 || l["request_id"] == "" {
		t.Errorf("logged %v", l)
	}
	refused := 4.0
	harness.Eventually(t, harness.Patience, "another line", func() bool {
		a := p.Do("POST", "/generate-token", map[string][]string{"X-Api-Key": {harness.APIKey}}, map[string]any{"company_id": "acme", "agent_id": "7", "user_id": "a\u202eb"})
		wantAnswer(t, "minting", a, 400, bodyField("user_id", `user id \"a\\u202eb\" holds '\\u202e' (`+nameRule+")"))
		refused++
		return strings.Contains(p.Log.Text(), `"err":"user id`)
	})
	if l := wantLogged(p, `"err":"user id`); l["msg"] != "id refused" || l["suppressed"].(float64) < 3 || l["suppressed"].(float64) > refused-2 {
		t.Errorf("logged %v after %v refusals", l, refused)
	}
	if n := p.Metric("dws_auth_failure_total", `reason="id"`); n != 4 {
		t.Errorf("%v tokens refused for an id, want 4", n)
	}

	p.W.PublishRaw(p.W.Prefix+".acme.agent:1.chats", []byte(`{}`))
	if l := wantLogged(p, "malformed event terminated"); l["err"] != `subject fits no row of docs/publishing.md: agent id "agent:1" holds ':' (`+idRule+`)` || l["suppressed"] != 0.0 {
		t.Errorf("logged %v", l)
	}
}
