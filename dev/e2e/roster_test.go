package e2e

import (
	"encoding/json"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
)

// roster is the answer of GET /admin/sessions.
type roster struct {
	Sessions []struct {
		Key           string    `json:"key"`
		Pod           string    `json:"pod"`
		SessionID     string    `json:"session_id"`
		Since         time.Time `json:"since"`
		RemoteAddress string    `json:"remote_address"`
		SelectedChat  string    `json:"selected_chat"`
		QueueLength   int       `json:"queue_length"`
	} `json:"sessions"`
	Next       string   `json:"next"`
	Incomplete []string `json:"incomplete"`
}

func (r roster) keys() []string {
	var keys []string
	for _, s := range r.Sessions {
		keys = append(keys, s.Key)
	}
	return keys
}

var adminHeader = http.Header{"X-Api-Key": {harness.AdminAPIKey}}

func listSessions(t *testing.T, p *harness.Pod, query string) roster {
	t.Helper()
	a := p.Do("GET", "/admin/sessions"+query, adminHeader, nil)
	var r roster
	if err := json.Unmarshal(a.Body, &r); a.StatusCode != 200 || err != nil {
		t.Fatalf("GET /admin/sessions%s: %d %s", query, a.StatusCode, a.Body)
	}
	return r
}

// TestSessionsOfTheCluster lists the sessions of two pods from either, page by page, and closes one from the pod that
// does not have it.
func TestSessionsOfTheCluster(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	one, two := w.Start("SERVER_POD_ID=one", "POD_LEASE=2s"), w.Start("SERVER_POD_ID=two", "POD_LEASE=2s")
	ann := one.Connect(harness.User("acme", "desk1", "ann"))
	ann.SelectChat("chat.7")
	bob := two.Connect(harness.User("acme", "desk1", "bob"))
	two.Connect(harness.User("acme", "desk2", "cid"))
	one.Connect(harness.Admin("root", "acme", "*"))

	want := []string{"acme:desk1:ann", "acme:desk1:bob", "acme:desk2:cid", "admin:root"}
	for _, p := range []*harness.Pod{one, two} {
		if r := listSessions(t, p, ""); !slices.Equal(r.keys(), want) || r.Incomplete != nil {
			t.Errorf("listed: %v, incomplete %v, want %v", r.keys(), r.Incomplete, want)
		}
	}
	all := listSessions(t, two, "")
	if s := all.Sessions[0]; s.Pod != "one" || s.SelectedChat != "chat.7" || s.SessionID == "" || !strings.HasPrefix(s.RemoteAddress, "127.0.0.1:") ||
		time.Since(s.Since) > time.Minute || s.QueueLength != 0 {
		t.Errorf("ann's session is shown as %+v", s)
	}
	if got := listSessions(t, one, "?company=acme&agent=desk1").keys(); !slices.Equal(got, want[:2]) {
		t.Errorf("sessions of desk1: %v, want %v", got, want[:2])
	}
	first := listSessions(t, one, "?limit=3")
	rest := listSessions(t, one, "?limit=3&after="+first.Next)
	if got := append(first.keys(), rest.keys()...); !slices.Equal(got, want) || rest.Next != "" {
		t.Errorf("page by page: %v and then %v (next %q), want %v", first.keys(), rest.keys(), rest.Next, want)
	}

	a := one.Do("DELETE", "/admin/sessions/acme/desk1/bob", adminHeader, nil)
	if a.StatusCode != 200 {
		t.Fatalf("DELETE of bob's session: %d %s", a.StatusCode, a.Body)
	}
	bob.WantClose(4403, "revoked")
	for path, status := range map[string]int{"/admin/sessions/acme/desk1/bob": 404, "/admin/sessions/acme/desk*/bob": 400, "/admin/sessions/acme/desk1/no*body": 404} {
		if a := two.Do("DELETE", path, adminHeader, nil); a.StatusCode != status {
			t.Errorf("DELETE %s: %d %s, want %d", path, a.StatusCode, a.Body, status)
		}
	}
	for _, h := range []http.Header{{}, {"X-Api-Key": {harness.APIKey}}} {
		if a := one.Do("GET", "/admin/sessions", h, nil); a.StatusCode != 401 {
			t.Errorf("listed with %v: %d", h, a.StatusCode)
		}
		if a := one.Do("DELETE", "/admin/sessions/acme/desk1/ann", h, nil); a.StatusCode != 401 {
			t.Errorf("revoked with %v: %d", h, a.StatusCode)
		}
	}
	if ann.Ended() != nil {
		t.Error("ann's socket was closed though nobody revoked it")
	}

	two.Kill()
	if r := listSessions(t, one, ""); !slices.Equal(r.Incomplete, []string{"two"}) {
		t.Errorf("with a dead pod whose lease still holds: incomplete %v, want two", r.Incomplete)
	}
}
