package e2e

import (
	"fmt"
	"maps"
	"slices"
	"testing"

	"daisi-ws-service/dev/harness"
)

// restricted is an admin's Dial with a company_id_restriction.
func restricted(id, company, agent, restriction string) harness.Dial {
	d := harness.Admin(id, company, agent)
	d.Restriction = restriction
	return d
}

// TestAdminScopes: an admin gets the agents events that subscription and restriction both allow, and nothing else; users
// get none of them.
func TestAdminScopes(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		type pair struct{ company, agent string }
		acme1, acme2, other1, other2 := pair{"acme", "desk1"}, pair{"acme", "desk2"}, pair{"other", "desk1"}, pair{"other", "desk2"}
		scopes := map[string]struct {
			dial harness.Dial
			sees []pair
		}{
			"exact":                {harness.Admin("exact", "acme", "desk1"), []pair{acme1}},
			"exact, twice":         {harness.Admin("exact2", "acme", "desk1"), []pair{acme1}},
			"company-wide":         {harness.Admin("company", "acme", "*"), []pair{acme1, acme2}},
			"company-wide, empty":  {harness.Admin("company2", "acme", ""), []pair{acme1, acme2}},
			"agent-wide":           {harness.Admin("agent", "*", "desk1"), []pair{acme1, other1}},
			"agent-wide, empty":    {harness.Admin("agent2", "", "desk1"), []pair{acme1, other1}},
			"all":                  {harness.Admin("all", "*", "*"), []pair{acme1, acme2, other1, other2}},
			"all, empty":           {harness.Admin("all2", "", ""), []pair{acme1, acme2, other1, other2}},
			"restricted":           {restricted("restricted", "", "", "acme"), []pair{acme1, acme2}},
			"restricted agent":     {restricted("restricted2", "*", "desk1", "acme"), []pair{acme1}},
			"restricted to itself": {restricted("restricted3", "acme", "desk1", "acme"), []pair{acme1}},
			"restricted to any":    {restricted("restricted4", "acme", "desk1", "*"), []pair{acme1}},
		}
		admins := map[string]*harness.Client{}
		for name, s := range scopes {
			admins[name] = pod.Connect(as(s.dial))
		}
		ann := pod.Connect(as(harness.User("acme", "desk1", "ann")))
		ann.SelectChat("c1")

		seqs := map[uint64]pair{}
		for range 3 {
			for _, p := range []pair{acme1, acme2, other1, other2} {
				seqs[w.Agent(p.company, p.agent)] = p
			}
		}
		forUsers := []uint64{w.Chat("acme", "desk1"), w.Contact("acme", "desk1"), w.Message("acme", "desk1", "c1")}
		w.Settled()
		marker := w.Agent("acme", "desk1") // in everyone's scope
		written := 0
		for name, c := range admins {
			c.WaitEvent(marker)
			got := map[uint64]bool{}
			for _, m := range c.Events() {
				if m.EventType != "agent" || got[m.Seq] {
					t.Errorf("%s got %.200s", name, m.Raw)
				}
				got[m.Seq] = true
			}
			for seq, p := range seqs {
				if want := slices.Contains(scopes[name].sees, p); got[seq] != want {
					t.Errorf("%s: event %d of %v came: %t, want %t", name, seq, p, got[seq], want)
				}
			}
			written += len(got) + 1
			c.Forget()
		}
		for _, seq := range forUsers {
			ann.WantEvent(seq)
		}
		ann.WantNothingElse()
		wantAtRest(pod, map[string]float64{"delivered": 12 + 3 + 2, "unselected": 0})
		if got := pod.Metric("dws_targets_total", `outcome="written"`); got != float64(written+4) {
			t.Errorf("%v events written, want %d", got, written+4)
		}
	})
}

// TestUncoveredAgentsEvent: an agents event in nobody's scope is for nobody. It is acked at once, with users, with an admin
// of another scope, or with no socket at all, and it is not kept for who comes later.
func TestUncoveredAgentsEvent(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	w.Agent("acme", "desk1")
	wantAtRest(pod, map[string]float64{"unselected": 1})
	ann := pod.Connect(harness.User("acme", "desk1", "ann"))
	w.Agent("acme", "desk1")
	wantAtRest(pod, map[string]float64{"unselected": 2})
	admin := pod.Connect(harness.Admin("root", "acme", "desk2"))
	w.Agent("acme", "desk1")
	wantAtRest(pod, map[string]float64{"unselected": 3})
	admin.WantEvent(w.Agent("acme", "desk2"))
	ann.WantNothingElse()
	admin.Close(1000, "")
	w.Agent("acme", "desk2") // the admin's route was released before its close was answered
	wantAtRest(pod, map[string]float64{"delivered": 2, "unselected": 4, "no_owner": 0})
}

// TestContradictoryScope: a subscription that its restriction forbids is refused by who mints and by who lets in, each way
// of asking with its own answer.
func TestContradictoryScope(t *testing.T) {
	t.Parallel()
	bothClients(t, func(t *testing.T, as func(harness.Dial) harness.Dial) {
		w := harness.New(t)
		pod := w.Start()
		ask := map[string]any{"admin_id": "root", "expires_in_seconds": 60, "subscribed_company_id": "acme", "company_id_restriction": "other"}
		key := map[string][]string{"X-Api-Key": {harness.AdminAPIKey}}
		if a := pod.Do("POST", "/admin/generate-token", key, ask); a.StatusCode != 403 || a.Error(t).Code != "InvalidToken" {
			t.Errorf("minting: %s %s", a.Status, a.Body)
		}
		bad := as(restricted("root", "acme", "desk1", "other"))
		pod.WantRefused(bad, 403, "InvalidToken")
		pod.Dial(bad.With("errors", "close")).WantClose(4403, "invalid-token")
		for i, good := range []map[string]any{{}, {"subscribed_company_id": "*"}, {"subscribed_company_id": "other"}} {
			maps.Copy(good, map[string]any{"admin_id": fmt.Sprintf("root%d", i), "expires_in_seconds": 60, "company_id_restriction": "other"})
			d := as(harness.Admin("", "", ""))
			d.Admin, d.Token = "minted", pod.Mint("/admin/generate-token", harness.AdminAPIKey, good)
			c := pod.Connect(d)
			w.Agent("acme", "desk1")
			c.WantEvent(w.Agent("other", "desk1"))
		}
	})
}

// TestAdminSelectsNothing: chats are the users', and pages that select one all the same are not told off.
func TestAdminSelectsNothing(t *testing.T) {
	t.Parallel()
	w := harness.New(t)
	pod := w.Start()
	admin, ann := pod.Connect(harness.Admin("root", "", "")), pod.Connect(harness.User("acme", "desk1", "ann"))
	admin.Send(map[string]any{"type": "select_chat", "payload": map[string]any{"chat_id": "c1"}})
	admin.Send(map[string]any{"type": "ping"})
	if m := admin.Next(); m.Type != "pong" {
		t.Errorf("an admin's select_chat is answered with %s", m.Raw)
	}
	ann.SelectChat("c1")
	ann.WantEvent(w.Message("acme", "desk1", "c1"))
	w.Settled()
	admin.WantEvent(w.Agent("acme", "desk1"))
}
