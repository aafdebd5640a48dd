package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// lockServer answers what lock.go and session.go send, in place of a Redis server, so that synctest's clock rules:
// hooks of the client catch each command before a connection is made. Its scripts are written again in Go; that the
// Lua does the same is for the end-to-end tests to show.
type lockServer struct {
	t     *testing.T
	delay func() time.Duration // of each command or pipeline, if not nil

	mu      sync.Mutex
	down    bool
	mute    bool                  // PUBLISH fails
	locks   map[string]storedLock // by the key of the session
	scripts map[string]bool       // what EVALSHA knows
	pods    []*testPod
	leases  map[string]string // pod -> life
	sent    []string          // "<op> <key> <socket>" as they were applied
}

type storedLock struct {
	value   string
	expires time.Time
}

func newLockServer(t *testing.T) *lockServer {
	return &lockServer{t: t, locks: map[string]storedLock{}, scripts: map[string]bool{}, leases: map[string]string{}}
}

func (v *lockServer) DialHook(redis.DialHook) redis.DialHook {
	return func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no server") }
}

func (v *lockServer) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		return v.ProcessPipelineHook(nil)(ctx, []redis.Cmder{cmd})
	}
}

func (v *lockServer) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		if v.delay != nil {
			time.Sleep(v.delay())
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		var first error
		for _, cmd := range cmds {
			if v.down {
				cmd.SetErr(errors.New("connection refused"))
			} else {
				v.applyLocked(cmd)
			}
			if first == nil {
				first = cmd.Err()
			}
		}
		return first
	}
}

func (v *lockServer) applyLocked(cmd redis.Cmder) {
	args := make([]string, len(cmd.Args()))
	for i, a := range cmd.Args() {
		args[i] = fmt.Sprint(a)
	}
	switch args[0] {
	case "evalsha", "eval":
		v.scriptLocked(cmd.(*redis.Cmd), args)
	case "get":
		if value := v.getLocked(strings.TrimPrefix(args[1], "session:")); value != "" {
			cmd.(*redis.StringCmd).SetVal(value)
		} else {
			cmd.SetErr(redis.Nil)
		}
	case "getex":
		key := strings.TrimPrefix(args[1], "session:")
		value := v.getLocked(key)
		n, _ := strconv.Atoi(args[3])
		life := time.Duration(n) * time.Second
		if args[2] == "px" {
			life = time.Duration(n) * time.Millisecond
		}
		v.sent = append(v.sent, "renew "+key)
		if value == "" {
			cmd.SetErr(redis.Nil)
			return
		}
		v.setLocked(key, value, life)
		cmd.(*redis.StringCmd).SetVal(value)
	case "publish":
		if v.mute {
			cmd.SetErr(errors.New("no permission"))
		}
		for _, p := range v.pods {
			if !p.deaf && !v.mute {
				go p.heard(strings.TrimPrefix(args[1], "session_kill:"), string(cmd.Args()[2].([]byte)))
			}
		}
	default:
		v.t.Errorf("unexpected command %v", args)
	}
}

func (v *lockServer) scriptLocked(cmd *redis.Cmd, args []string) {
	var script *redis.Script
	for _, s := range []*redis.Script{claimScript, restoreScript, dropScript} {
		if args[1] == s.Hash() && v.scripts[args[1]] {
			script = s
		}
	}
	if args[0] == "eval" {
		script = redis.NewScript(args[1])
		v.scripts[script.Hash()] = true
	}
	if script == nil {
		cmd.SetErr(redis.ErrNoScript)
		return
	}
	key, arg := strings.TrimPrefix(args[3], "session:"), args[4:]
	value := v.getLocked(key)
	holder, heir := parseLock(value)
	switch script.Hash() {
	case claimScript.Hash():
		turn, _ := strconv.ParseInt(arg[2], 10, 64)
		newest := max(holder.turn, heir.turn)
		if turn == 0 {
			turn = newest + 1
		}
		claim := fmt.Sprintf("%s#%s#%d", arg[0], arg[1], turn)
		if value == "" || holder.socket == arg[1] || holder.text == arg[3] && newest <= turn {
			v.setLocked(key, claim, millis(arg[4]))
			value = ""
		} else if newest < turn {
			v.setLocked(key, holder.text+" "+claim, time.Until(v.locks[key].expires))
		}
		cmd.SetVal([]any{turn, value})
	case restoreScript.Hash():
		v.sent = append(v.sent, "restore "+key)
		if value == "" || holder.socket == arg[1] {
			v.setLocked(key, arg[0], millis(arg[2]))
			value = ""
		}
		cmd.SetVal(value)
	case dropScript.Hash():
		v.sent = append(v.sent, "drop "+key)
		switch {
		case holder.socket == arg[0] && heir.text != "":
			v.setLocked(key, heir.text, millis(arg[1]))
		case holder.socket == arg[0]:
			delete(v.locks, key)
		case heir.socket == arg[0]:
			v.setLocked(key, holder.text, time.Until(v.locks[key].expires))
		}
		cmd.SetVal(int64(1))
	}
}

func millis(s string) time.Duration {
	n, _ := strconv.Atoi(s)
	return time.Duration(n) * time.Millisecond
}

func (v *lockServer) getLocked(key string) string {
	if l, ok := v.locks[key]; ok && time.Now().Before(l.expires) {
		return l.value
	}
	delete(v.locks, key)
	return ""
}

func (v *lockServer) setLocked(key, value string, life time.Duration) {
	v.locks[key] = storedLock{value, time.Now().Add(life)}
}

func (v *lockServer) get(key string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.getLocked(key)
}

func (v *lockServer) set(key, value string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.setLocked(key, value, 30*time.Second)
}

func (v *lockServer) setDown(down bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.down = down
}

func (v *lockServer) setMute(mute bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.mute = mute
}

func (v *lockServer) setDeaf(p *testPod, deaf bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	p.deaf = deaf
}

// restart forgets everything, as a server without persistence does.
func (v *lockServer) restart() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.down = false
	clear(v.locks)
	clear(v.scripts)
}

func (v *lockServer) setLease(pod, life string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.leases[pod] = life
}

func (v *lockServer) lease(pod string) string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.leases[pod]
}

// oneRound is the REFRESH_INTERVAL of the tests and a little: every lock was renewed once.
const oneRound = 10*time.Second + time.Millisecond

// heldLease is that of a pod in the server's own book.
type heldLease struct {
	v   *lockServer
	pod string
}

func (l heldLease) podID() string   { return l.pod }
func (l heldLease) life() string    { return l.v.lease(l.pod) }
func (l heldLease) available() bool { return true }

func (l heldLease) holds(_ context.Context, pod, life string) (bool, error) {
	return l.v.lease(pod) == life, nil
}

type testPod struct {
	*sessions
	deaf bool // its subscription is broken
}

// pod starts one, with the defaults of the settings; it ends with the test, inside of the bubble.
func (v *lockServer) pod(t *testing.T, id string) *testPod {
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1})
	rdb.AddHook(v)
	cfg := &settings{}
	cfg.Store(&Config{SessionTTL: 30 * time.Second, SessionRefreshInterval: 10 * time.Second, PodLease: 6 * time.Second})
	v.setLease(id, "e1")
	p := &testPod{sessions: newSessions(cfg, rdb, newMetrics(), heldLease{v, id})}
	v.mu.Lock()
	v.pods = append(v.pods, p)
	v.mu.Unlock()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		p.work(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
		rdb.Close()
	})
	return p
}

// testSocket is what conn is to a session: it releases as soon as it is told to close.
type testSocket struct {
	*session
	mu     sync.Mutex
	closed string
}

func (k *testSocket) state() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.closed
}

func bindTo(sess *session, releases bool) *testSocket {
	k := &testSocket{session: sess}
	sess.bind(func(code int, reason string) {
		k.mu.Lock()
		k.closed = fmt.Sprint(code, " ", reason)
		k.mu.Unlock()
		if releases {
			sess.release()
		}
	})
	return k
}

func (p *testPod) open(t *testing.T, key string) *testSocket {
	t.Helper()
	sess, err := p.acquire(t.Context(), key, "user", time.Now())
	if err != nil {
		t.Fatalf("acquire %s: %v", key, err)
	}
	return bindTo(sess, true)
}

func wantState(t *testing.T, k *testSocket, want string) {
	t.Helper()
	if got := k.state(); got != want {
		t.Fatalf("socket %s is closed with %q, want %q", k.id, got, want)
	}
}

// wantHolder checks whose the lock is, and that nobody waits for it.
func (v *lockServer) wantHolder(t *testing.T, key, socket string) {
	t.Helper()
	holder, heir := parseLock(v.get(key))
	if holder.socket != socket || heir.text != "" {
		t.Fatalf("lock of %s is %q, want it held by %q and without an heir", key, v.get(key), socket)
	}
}

func wantTook(t *testing.T, start time.Time, least, most time.Duration) {
	t.Helper()
	if d := time.Since(start); d < least || d > most {
		t.Fatalf("took %v, want %v to %v", d, least, most)
	}
}

func TestParseLock(t *testing.T) {
	claim := lockClaim{text: "pod.1_x-y#e1#SOCKET#12", pod: "pod.1_x-y", life: "e1", socket: "SOCKET", turn: 12}
	for value, want := range map[string][2]lockClaim{
		"":                            {},
		claim.text:                    {claim},
		claim.text + " " + claim.text: {claim, claim},
		"stranger":                    {{text: "stranger"}},
		"a#b#c#d":                     {{text: "a#b#c#d"}},
		"a#b#c":                       {{text: "a#b#c"}},
		"stranger " + claim.text:      {{text: "stranger"}, claim},
	} {
		holder, heir := parseLock(value)
		if holder != want[0] || heir != want[1] {
			t.Errorf("parseLock(%q) = %+v, %+v", value, holder, heir)
		}
	}
	if got := claim.String(); got != claim.text {
		t.Errorf("claim is written as %q, want %q", got, claim.text)
	}
}
