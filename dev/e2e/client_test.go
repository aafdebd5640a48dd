package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// news is what the reference client says (testdata/resident.js).
type news struct {
	Got   string `json:"got"`
	Seq   uint64 `json:"seq"`
	What  string `json:"what"`
	Text  string `json:"text"`
	Code  int    `json:"code"`
	Known bool   `json:"known"`

	at time.Time
}

// resident is a program that lives on the reference client, and the back end that gives it its tokens.
type resident struct {
	t     *testing.T
	w     *harness.World
	pod   *harness.Pod // where its next socket goes
	proxy *rig.Proxy   // between them
	a     *harness.Actor
	due   []uint64 // events published for it, besides a flow

	door *httptest.Server

	mu      sync.Mutex // guards all below
	closed  string     // what the back end answers instead of a token
	ttl     time.Duration
	key     string
	token   string // instead of a good one
	applied map[uint64]int
	lost    bool     // the back end answers nothing instead of its state
	loads   []string // of the client that have ended: "all" or "chat"
	news    []news   // all but events
	read    int      // how many of them want has looked at
}

const residentChat = "chat.one" // of desk0's flow

// serve is what a back end answers to a page of its own: where to connect, and a token, or the state, which is of no interest here.
func (r *resident) serve(w http.ResponseWriter, req *http.Request) {
	if req.URL.Path == "/" { // the page, whose scripts the test brings
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if req.URL.Path == "/state" {
		if r.lost {
			http.Error(w, "no state today", http.StatusBadGateway)
			return
		}
		w.Write([]byte("{}"))
		return
	}
	if r.closed != "" {
		http.Error(w, r.closed, http.StatusBadGateway)
		return
	}
	token := r.token
	if token == "" {
		token = harness.UserToken(r.t, "acme", "desk0", "ann", r.ttl)
	}
	json.NewEncoder(w).Encode(map[string]any{
		"url": "ws://" + r.proxy.Address() + "/ws/acme/desk0?x-api-key=" + r.key, "token": token, "expires_at": time.Now().Add(r.ttl),
	})
}

// set changes what the back end does.
func (r *resident) set(change func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	change()
}

// listen takes what the program says until it ends.
func (r *resident) listen() {
	for line := range r.a.Said {
		var n news
		if err := json.Unmarshal(line, &n); err != nil {
			r.t.Errorf("the client says %s", line)
			continue
		}
		n.at = time.Now()
		r.mu.Lock()
		switch n.Got {
		case "event":
			if !n.Known {
				r.applied[n.Seq]++
			}
		case "loaded":
			r.loads = append(r.loads, n.What)
		default:
			r.news = append(r.news, n)
		}
		r.mu.Unlock()
	}
}

// want waits for the next news of that kind; what came before it is not looked at again.
func (r *resident) want(what string, ok func(news) bool) (found news) {
	r.t.Helper()
	defer func() {
		if r.t.Failed() {
			r.mu.Lock()
			r.t.Logf("the client's last news: %+v", r.news[max(0, len(r.news)-8):])
			r.mu.Unlock()
		}
	}()
	harness.Eventually(r.t, 2*harness.Patience, what, func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		for r.read < len(r.news) {
			found = r.news[r.read]
			r.read++
			if ok(found) {
				return true
			}
		}
		return false
	})
	return found
}

// wantState waits for a state whose text contains text.
func (r *resident) wantState(what, text string) news {
	r.t.Helper()
	return r.want(what+" "+text, func(n news) bool { return n.Got == "state" && n.What == what && strings.Contains(n.Text, text) })
}

// wantNews waits until an event that is published now is applied: the client is not only connected.
func (r *resident) wantNews() {
	r.t.Helper()
	seq := r.w.Message("acme", "desk0", residentChat)
	r.due = append(r.due, seq)
	r.wantApplied(seq)
}

func (r *resident) wantApplied(seq uint64) {
	r.t.Helper()
	harness.Eventually(r.t, harness.Patience, "an event to be applied", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.applied[seq] > 0
	})
}

// back waits until it is connected again and up to date.
func (r *resident) back() {
	r.t.Helper()
	r.wantState("on", "")
	r.wantNews()
}

func (r *resident) tell(v map[string]any) {
	r.t.Helper()
	if err := r.a.Tell(v); err != nil {
		r.t.Fatal(err)
	}
}

// move starts a pod for the client's next socket, and returns the one before.
func (r *resident) move() (old *harness.Pod) {
	r.t.Helper()
	old, r.pod = r.pod, r.w.Start()
	r.proxy.Retarget(r.pod.HTTP)
	return old
}

func (r *resident) cut() {
	r.t.Helper()
	r.cutWhile(func() {})
}

func (r *resident) cutWhile(f func()) {
	r.t.Helper()
	r.proxy.Cut()
	r.wantState("busy", "1006")
	f()
	r.proxy.Restore()
}

// TestReferenceClient: a page, and a program under Node, on dev/cluster/page/client.js, through everything that ends a
// socket or loses events. What was published meanwhile is applied once each, at the latest when the last fault is over.
func TestReferenceClient(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	clientJS, residentJS := filepath.Join(root, "dev/cluster/page/client.js"), filepath.Join(root, "dev/e2e/testdata/resident.js")
	for name, start := range map[string]func(t *testing.T) func(page string) (*harness.Actor, error){
		"node": func(t *testing.T) func(string) (*harness.Actor, error) {
			node := harness.NodeScript(t, "resident.js", clientJS)
			return func(string) (*harness.Actor, error) { return node() }
		},
		"chromium": func(t *testing.T) func(string) (*harness.Actor, error) {
			browser := harness.StartBrowser(t)
			return func(page string) (*harness.Actor, error) {
				return browser.Open(harness.Within(t, harness.Patience), page, clientJS, residentJS)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newResident(t, start(t))
			r.throughTheFirstEvent()
			flow := r.w.Flow(50, desk0)
			r.throughTokens() // before there is much to replay: that takes some of a short token's time
			r.throughFaults()
			r.throughRefusals()
			r.wantEachOnce(flow.Stop())
		})
	}
}

// newResident returns one that is connected and has selected its chat.
func newResident(t *testing.T, start func(page string) (*harness.Actor, error)) *resident {
	t.Helper()
	r := &resident{t: t, ttl: time.Hour, key: harness.APIKey, applied: map[uint64]int{}}
	r.w = harness.New(t, harness.Settings("RESUME_MAX_EVENTS=100000", "SERVER_DRAIN_SPREAD=1s", "WEBSOCKET_BUFFER_SIZE=32", "WEBSOCKET_ALLOWED_ORIGINS=127.0.0.1:*"))
	r.pod = r.w.Start()
	r.proxy = r.w.Proxy(r.pod.HTTP)
	r.door = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.door.Close)
	var err error
	if r.a, err = start(r.door.URL + "/"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(r.listen)
	t.Cleanup(func() { r.a.End(); wg.Wait() })
	r.lost = true
	r.tell(map[string]any{"do": "start", "access": r.door.URL + "/access", "state": r.door.URL + "/state", "quiet": 4000})
	r.wantLoad("all")
	r.cut() // between its ready and the end of its load: it comes back without a position
	r.wantLoad("all")
	r.set(func() { r.lost = false })
	r.wantLoads("all")
	r.tell(map[string]any{"do": "select", "text": residentChat})
	r.wantLoads("all", "chat")
	return r
}

// wantLoad waits until it begins to load.
func (r *resident) wantLoad(what string) {
	r.t.Helper()
	r.wantState("on", "connected")
	r.want("a load", func(n news) bool { return n.Got == "load" && n.What == what })
}

// wantLoads waits until it has loaded as often as that, and no more often.
func (r *resident) wantLoads(all ...string) {
	r.t.Helper()
	harness.Eventually(r.t, harness.Patience, fmt.Sprint("loads of ", all), func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		return len(r.loads) >= len(all)
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	if !slices.Equal(r.loads, all) {
		r.t.Errorf("it has loaded %v, want %v", r.loads, all)
	}
}

var drainAsks = regexp.MustCompile(`1001 drain retry-after-ms=(\d+)`)

// throughFaults breaks what lies between the client and its events.
func (r *resident) throughFaults() {
	r.t.Helper()
	r.cut()
	r.back()

	old := r.move()
	old.Terminate()
	drained := r.wantState("busy", "1001 drain")
	asked, _ := strconv.Atoi(drainAsks.FindStringSubmatch(drained.Text)[1])
	again := r.wantState("busy", "connecting")
	// The two lines are stamped here, each some time after it was said.
	if waited := again.at.Sub(drained.at); waited < time.Duration(asked)*time.Millisecond-100*time.Millisecond {
		r.t.Errorf("asked to come back after %d ms, it came after %v", asked, waited)
	}
	r.back()
	old.WantExit(0, harness.Patience)

	r.move().Kill()
	r.wantState("busy", "1006")
	r.back()

	r.proxy.BlackHole()
	r.wantState("busy", "no answer")
	r.proxy.Restore()
	r.back()

	r.loseEvents()

	r.w.Redis.Kill()
	r.cut()
	r.wantState("busy", "1013 unavailable")
	r.wantState("busy", "1013 unavailable")
	if err := r.w.Redis.Restart(); err != nil {
		r.t.Fatal(err)
	}
	r.back()
}

// loseEvents has the client stand still until the pod has dropped events for it.
func (r *resident) loseEvents() {
	r.t.Helper()
	big := []byte(`{"pad":"` + strings.Repeat("x", 256<<10) + `"}`)
	r.a.Freeze(true)
	harness.Eventually(r.t, harness.Patience, "events to be dropped", func() bool {
		if r.pod.Metric("dws_websocket_buffer_used") < 8 { // the kernel still takes them; then the flow fills the ring
			r.due = append(r.due, r.w.PublishRaw(r.w.Prefix+".acme.desk0.chats", big))
		}
		return r.pod.Metric("dws_targets_total", `outcome="dropped"`) > 0
	})
	r.a.Freeze(false)
	r.want("a gap", func(n news) bool { return n.Got == "gap" })
	r.wantNews()
}

// throughTheFirstEvent has the stream's very first event come, and be acked for another user, while the client is away.
func (r *resident) throughTheFirstEvent() {
	r.t.Helper()
	other := r.pod.Connect(harness.User("acme", "desk0", "bob"))
	var seq uint64
	r.cutWhile(func() {
		seq = r.w.Chat("acme", "desk0")
		other.WantEvent(seq)
	})
	r.due = append(r.due, seq)
	r.back()
	r.wantApplied(seq) // now: any later resume would bring it, too
}

// throughTokens lets tokens end: renewed in time, and not.
func (r *resident) throughTokens() {
	r.t.Helper()
	r.set(func() { r.ttl = 6 * time.Second })
	r.cut()
	r.back()
	r.mu.Lock()
	before := len(r.news)
	r.mu.Unlock()
	r.pod.WaitMetric(func(n float64) bool { return n >= 4 }, "dws_messages_received_total", `message_type="refresh_token"`)
	r.wantNews() // longer than its first token lasted
	r.mu.Lock()
	if len(r.news) != before {
		r.t.Errorf("while its tokens were renewed: %+v", r.news[before:])
	}
	r.closed = "no tokens today"
	r.mu.Unlock()
	r.wantState("busy", "4403 token-expired")
	r.wantState("busy", "no tokens today")
	r.set(func() { r.closed, r.ttl = "", time.Hour })
	r.back()
}

// throughRefusals closes its sockets with codes after which it must not come again by itself.
func (r *resident) throughRefusals() {
	r.t.Helper()
	other := r.pod.Connect(harness.User("acme", "desk0", "ann"))
	r.wantOff("4402 session-replaced")
	r.tell(map[string]any{"do": "connect"})
	r.back()
	other.WantClose(4402, "session-replaced")
	r.pod.Do("DELETE", "/admin/sessions/acme/desk0/ann", http.Header{"X-Api-Key": {harness.AdminAPIKey}}, nil)
	r.wantOff("4403 revoked")
	r.set(func() { r.key = "wrong" })
	r.tell(map[string]any{"do": "connect"})
	r.wantOff("4401 invalid-api-key")
	r.set(func() { r.key, r.token = harness.APIKey, "nonsense" })
	r.tell(map[string]any{"do": "connect"})
	r.wantOff("4403 invalid-token")
	r.set(func() { r.token = "" })
	r.tell(map[string]any{"do": "connect"})
	r.back()
}

// wantOff waits until the client has given up for that reason, and longer than its first back-off could be.
func (r *resident) wantOff(reason string) {
	r.t.Helper()
	off := r.wantState("off", reason)
	taken := r.proxy.Taken()
	harness.Eventually(r.t, harness.Patience, "time to pass", func() bool { return time.Since(off.at) > 700*time.Millisecond })
	if now := r.proxy.Taken(); now != taken {
		r.t.Errorf("after %s it connected again by itself", reason)
	}
}

// wantEachOnce waits until all that was published was applied; nothing may have been applied twice, and nothing loaded again.
func (r *resident) wantEachOnce(published []harness.Published) {
	r.t.Helper()
	for _, p := range published {
		r.due = append(r.due, p.Seq)
	}
	var missing []uint64
	defer func() {
		if len(missing) > 0 {
			r.t.Logf("%d of %d events were not applied: %v", len(missing), len(r.due), missing[:min(20, len(missing))])
		}
	}()
	defer r.wantLoads("all", "chat")
	harness.Eventually(r.t, harness.Patience, "every event to be applied", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		missing = nil
		for _, seq := range r.due {
			if r.applied[seq] == 0 {
				missing = append(missing, seq)
			}
		}
		return len(missing) == 0
	})
	r.mu.Lock()
	defer r.mu.Unlock()
	for seq, n := range r.applied {
		if n != 1 {
			r.t.Errorf("event %d was applied %d times", seq, n)
		}
	}
	if len(r.applied) != len(r.due) {
		r.t.Errorf("%d events applied of %d", len(r.applied), len(r.due))
	}
}
