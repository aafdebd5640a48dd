package main

import (
	"context"
	"errors"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// newTestOwners has no Redis behind it: only what lives in memory may be used.
func newTestOwners(t *testing.T) *owners {
	t.Helper()
	cfg := &settings{}
	cfg.Store(&Config{ServerPodID: "pod-1", PodOwnerCacheSize: 64, PodLease: 6 * time.Second, SessionRefreshInterval: time.Second})
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
	t.Cleanup(func() { rdb.Close() })
	o := newOwners(cfg, rdb, newMetrics())
	o.epochNow = "e1"
	return o
}

func TestRouteKeys(t *testing.T) {
	for _, r := range []route{
		{routeGeneral, "c", "a", ""},
		{routeMessages, "c", "a", "chat"},
		{routeMessages, "c", "a", "a.b:c:general"},
		{routeMessages, "c", "a", "general"},
		{routeAgents, "*", "a", ""},
		{routeAgents, "*", "*", ""},
	} {
		if got, ok := parseRoute(r.key()); !ok || got != r {
			t.Errorf("parseRoute(%q) = %v, %v, want %v", r.key(), got, ok, r)
		}
	}
	for _, bad := range []string{"", "route", "route:c:a", "route:c:a:x", "pod:c:a:general", "route:c:a:general:x", "*"} {
		if r, ok := parseRoute(bad); ok {
			t.Errorf("parseRoute(%q) = %v, want refused", bad, r)
		}
	}
}

func TestMarksSurviveTheLog(t *testing.T) {
	for _, m := range []mark{{0, "shed", ""}, {18446744073709551615, "owner", ""}, {7, "expired", "pod-1#e1"}} {
		for _, r := range []route{{}, {routeMessages, "c", "a", "except"}} {
			o, h := newTestOwners(t), &pipelined{}
			o.rdb.AddHook(h)
			marks, all, key := map[route]mark{r: m}, (*mark)(nil), r.key()
			if r == (route{}) {
				marks, all, key = nil, &m, "*"
			}
			if err := o.writeMarks(t.Context(), marks, all); err != nil {
				t.Fatal(err)
			}
			entry := h.entries()[0].Values
			if gotR, got, isMark, ok := parseField(entry, key); !ok || !isMark || gotR != r || got != m {
				t.Errorf("%v reads as %v, %v (%v, %v), want %v, %v", entry, gotR, got, isMark, ok, r, m)
			}
			// A pod of before there were exceptions reads a mark of three words, and writes nothing else.
			if entry[key] != "gap "+strconv.FormatUint(m.since, 10)+" "+m.reason {
				t.Errorf("%v: older pods cannot read the mark", entry)
			}
			delete(entry, exceptField+key)
			if _, got, isMark, _ := parseField(entry, key); !isMark || got != (mark{m.since, m.reason, ""}) {
				t.Errorf("an older pod's mark %v reads as %v, %v", entry, got, isMark)
			}
		}
	}
	for _, bad := range []string{"", "gap", "gap 1", "gap x shed", "lost 1 shed", "gap 1 shed more"} {
		if m, ok := parseMark(bad); ok {
			t.Errorf("parseMark(%q) = %v, want refused", bad, m)
		}
	}
}

func TestMarkKeepsTheLowestAndOverflowsIntoOne(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	for _, seq := range []uint64{9, 5, 7} {
		o.announce(map[route][]*conn{r: nil}, mark{since: seq, reason: "shed"}, 10, func() {})
	}
	if o.marks[r].since != 5 {
		t.Errorf("marked since %d, want the lowest, 5", o.marks[r].since)
	}
	for i := range 100 {
		o.announce(map[route][]*conn{{routeGeneral, "c", randomID(4), ""}: nil}, mark{since: uint64(10 + i), reason: "shed"}, 10, func() {})
	}
	if len(o.marks) != 64 {
		t.Errorf("%d routes marked, want the cache's size, 64", len(o.marks))
	}
	if o.markAll == nil || o.markAll.since != 73 {
		t.Errorf("overflow is marked as %v, want since 73", o.markAll)
	}
}

// TestClaimAndReleaseCross drives the crossings of claim and release of one route: whatever changed while a write was
// under way is written next, and no answer is given for a claim that was not written.
func TestClaimAndReleaseCross(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	a, b := &conn{}, &conn{}
	o.away.Store(true) // attach's fast path and its wait are not meant here
	attach := func(c *conn) chan error {
		o.mu.Lock()
		defer o.mu.Unlock()
		lr := o.routes[r]
		if lr == nil {
			lr = &localRoute{route: r}
			o.routes[r] = lr
		}
		lr.conns = append(lr.conns[:len(lr.conns):len(lr.conns)], c)
		done := make(chan error, 1)
		lr.waiters = append(lr.waiters, done)
		o.queueLocked(lr)
		return done
	}
	take := func() ([]*localRoute, []bool) {
		batch, claim, _ := o.takeBatch()
		return batch, claim
	}

	first := attach(a)
	batch, claim := take()
	if len(batch) != 1 || !claim[0] {
		t.Fatalf("attach queued %d writes, claim %v", len(batch), claim)
	}
	o.detach(a, r) // while the claim is under way
	if o.claimed(batch, claim, "e1", nil) != true {
		t.Fatal("the release that came during the claim is not queued")
	}
	if err := <-first; err != nil {
		t.Fatalf("the claim was written, its waiter got %v", err)
	}
	batch, claim = take()
	if len(batch) != 1 || claim[0] {
		t.Fatalf("want one release, got %d writes, claim %v", len(batch), claim)
	}
	if got := o.routes[r].claimed; got != "" {
		t.Fatalf("while its release is under way the route counts as claimed under %q: a newcomer would not wait", got)
	}
	second := attach(b) // while the release is under way
	o.claimed(batch, claim, "e1", nil)
	select {
	case err := <-second:
		t.Fatalf("the newcomer was answered (%v) by the release of its predecessor", err)
	default:
	}
	batch, claim = take()
	if len(batch) != 1 || !claim[0] {
		t.Fatalf("want the newcomer's claim, got %d writes, claim %v", len(batch), claim)
	}
	o.claimed(batch, claim, "e1", nil)
	if err := <-second; err != nil {
		t.Fatal(err)
	}

	// A new epoch while a claim under the old one is under way: not answered before the new one is claimed.
	third := attach(a)
	batch, claim = take()
	o.mu.Lock()
	o.epochNow = "e2"
	o.claimAgainLocked()
	o.mu.Unlock()
	o.claimed(batch, claim, "e1", nil)
	select {
	case <-third:
		t.Fatal("answered though the claim names an epoch that is gone")
	default:
	}
	batch, claim = take()
	if len(batch) != 1 {
		t.Fatalf("%d writes under the new epoch, want 1", len(batch))
	}
	o.claimed(batch, claim, "e2", nil)
	if err := <-third; err != nil || o.routes[r].claimed != "e2" {
		t.Fatalf("claimed under %q, waiter got %v", o.routes[r].claimed, err)
	}

	o.detach(a, r)
	o.detach(b, r)
	batch, claim = take()
	o.claimed(batch, claim, "e2", nil)
	if len(o.routes) != 0 || len(o.dirty) != 0 {
		t.Errorf("%d routes and %d writes left after the last release", len(o.routes), len(o.dirty))
	}
}

func TestNobodyIsNotBelievedAfterAnOutage(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	now := time.Now()
	if l := o.find(r, now); l.known || l.nobody {
		t.Errorf("an unknown route: known %v, nobody %v", l.known, l.nobody)
	}
	o.cache[r] = &answer{nobodySince: now}
	if l := o.find(r, now); !l.known || !l.nobody {
		t.Errorf("known %v, nobody %v, want both", l.known, l.nobody)
	}
	o.doubtUntil = now.Add(time.Second)
	if o.find(r, now).nobody {
		t.Error("nobody believed while in doubt")
	}
	if !o.find(r, now.Add(2*time.Second)).nobody {
		t.Error("nobody not believed after the doubt has ended")
	}
	o.away.Store(true)
	if o.find(r, now.Add(2*time.Second)).nobody {
		t.Error("nobody believed while Redis is away")
	}
}

func TestAppliedEntriesDropAndMark(t *testing.T) {
	o := newTestOwners(t)
	r1, r2 := route{routeGeneral, "c", "a", ""}, route{routeGeneral, "c", "b", ""}
	o.cache[r1], o.cache[r2] = &answer{}, &answer{}
	o.awaySeq = 8
	o.apply([]redis.XMessage{{ID: "1-1", Values: map[string]any{r1.key(): "", "pod:x": "reads"}}})
	if o.cache[r1] != nil || o.cache[r2] == nil {
		t.Error("want the named route dropped and the other kept")
	}
	if m, ok := o.marks[r1]; !ok || m.since != 7 || len(o.marks) != 1 {
		t.Errorf("marks %v, want the named route since 7: events were acked without knowing of the change", o.marks)
	}
}

// TestANewEpochHeardOfByALookUp: the answers that name the epoch before are dropped with the next renewal, though a
// look-up has put the new lease among the live pods already; and those who watch the pods are told.
func TestANewEpochHeardOfByALookUp(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	o.replacePods(map[string]lease{"pod-1": {"e1", "x"}, "pod-2": {"old", "y"}})
	o.cache[r] = &answer{peers: []member{{"pod-2", "old"}}}
	o.pods["pod-2"] = lease{"new", "z"} // as leasesOf does
	if !o.replacePods(map[string]lease{"pod-1": {"e1", "x"}, "pod-2": {"new", "z"}}) {
		t.Error("watchers are not told of the new lease")
	}
	if o.cache[r] != nil {
		t.Error("an answer that names the epoch of a dead process is kept: its events would fail until they expire")
	}
}

// cannedRedis answers the commands of a client in order, each by name, without a server.
type cannedRedis struct {
	t       *testing.T
	answers []func(redis.Cmder) error
}

func (s *cannedRedis) DialHook(next redis.DialHook) redis.DialHook { return next }

func (s *cannedRedis) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

func (s *cannedRedis) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		if len(s.answers) == 0 {
			s.t.Errorf("unexpected command %v", cmd)
			return errors.New("unexpected")
		}
		answer := s.answers[0]
		s.answers = s.answers[1:]
		err := answer(cmd)
		cmd.SetErr(err)
		return err
	}
}

// TestOldKnowledgeIsComparedWithEveryPage: an outage may fill more than one page of the log, and the read of a later one
// may fail.
func TestOldKnowledgeIsComparedWithEveryPage(t *testing.T) {
	o := newTestOwners(t)
	first, last := route{routeGeneral, "c", "a", ""}, route{routeGeneral, "c", "z", ""}
	o.place = redis.XMessage{ID: "1-0", Values: map[string]any{"pod:x": "reads"}}
	full := []redis.XMessage{o.place}
	for i := 1; i < logPage; i++ {
		full = append(full, redis.XMessage{ID: "2-" + strconv.Itoa(i), Values: map[string]any{first.key(): ""}})
	}
	rest := []redis.XMessage{full[logPage-1], {ID: "3-0", Values: map[string]any{last.key(): ""}}}
	page := func(p []redis.XMessage) func(redis.Cmder) error {
		return func(cmd redis.Cmder) error {
			cmd.(*redis.XMessageSliceCmd).SetVal(p)
			return nil
		}
	}
	gone := func(redis.Cmder) error { return errors.New("gone") }
	o.rdb.AddHook(&cannedRedis{t, []func(redis.Cmder) error{page(full), gone, page(rest)}})
	o.noteStale(8)
	if err := o.readLog(t.Context()); err == nil {
		t.Fatal("the read of the second page failed, and nobody says so")
	}
	if err := o.readLog(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, r := range []route{first, last} {
		if m, ok := o.marks[r]; !ok || m.since != 7 {
			t.Errorf("%s is marked %v (%v), want since 7: an event may have been acked without this owner", r.key(), m, ok)
		}
	}
	if o.awaySeq != 0 {
		t.Error("all is read, and the first sequence of the outage is still noted")
	}
}

// TestALostPlaceIsNotForgotten: Redis may fail between the read that finds the place lost and the entry that makes a new one.
func TestALostPlaceIsNotForgotten(t *testing.T) {
	o := newTestOwners(t)
	o.place = redis.XMessage{ID: "1-0", Values: map[string]any{"pod:x": "reads"}}
	entry := redis.XMessage{ID: "5-0", Values: map[string]any{podKey("pod-1"): "reads"}}
	empty := func(redis.Cmder) error { return nil }
	gone := func(redis.Cmder) error { return errors.New("gone") }
	added := func(cmd redis.Cmder) error {
		cmd.(*redis.StringCmd).SetVal(entry.ID)
		return nil
	}
	o.rdb.AddHook(&cannedRedis{t, []func(redis.Cmder) error{empty, gone, added}})
	o.noteStale(8)
	if err := o.readLog(t.Context()); err == nil {
		t.Fatal("no new place was taken, and nobody says so")
	}
	if err := o.readLog(t.Context()); err != nil {
		t.Fatal(err)
	}
	if o.markAll == nil || o.markAll.since != 7 || !time.Now().Before(o.doubtUntil) || o.instances == nil {
		t.Errorf("marked %v, doubt until %v, instances %v: the loss was forgotten", o.markAll, o.doubtUntil, o.instances)
	}
}

// TestNobodySinceTheReleaseOnly: a route whose last socket has just gone has not been without an owner for as long as
// other pods have had none.
func TestNobodySinceTheReleaseOnly(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	now := time.Now()
	o.cache[r] = &answer{nobodySince: now.Add(-time.Hour)}
	o.routes[r] = &localRoute{route: r, queued: true}
	if l := o.find(r, now); !l.nobody || l.since != now {
		t.Errorf("nobody %v since %v ago, want since now: the release is under way", l.nobody, now.Sub(l.since))
	}
}

// TestOwnersLastKnownStay: while Redis is away, neither an absent socket nor a broken stream takes the other owners away.
func TestOwnersLastKnownStay(t *testing.T) {
	o := newTestOwners(t)
	r := route{routeGeneral, "c", "a", ""}
	o.cache[r] = &answer{peers: []member{{"pod-2", "x"}, {"pod-3", "y"}}}
	o.away.Store(true)
	o.forget(r)
	o.forgetPod("pod-2")
	if l := o.find(r, time.Now()); !l.known || len(l.peers) != 2 {
		t.Errorf("known %v, peers %v, want both", l.known, l.peers)
	}
	o.away.Store(false)
	o.forgetPod("pod-2")
	if o.find(r, time.Now()).known {
		t.Error("with Redis there, an answer that names a lost pod is kept")
	}
}

// pipelined takes what is sent to Redis in pipelines.
type pipelined struct {
	redis.Hook
	cmds []redis.Cmder
	err  error
}

func (h *pipelined) DialHook(next redis.DialHook) redis.DialHook          { return next }
func (h *pipelined) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

func (h *pipelined) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		h.cmds = append(h.cmds, cmds...)
		return h.err
	}
}

// entries are those that were appended to the log.
func (h *pipelined) entries() (all []redis.XMessage) {
	for _, cmd := range h.cmds {
		args := cmd.Args()
		e := redis.XMessage{Values: map[string]any{}}
		for kv := range slices.Chunk(args[slices.Index(args, any("*"))+1:], 2) {
			e.Values[kv[0].(string)] = kv[1]
		}
		all = append(all, e)
	}
	return all
}

func TestTwoMarksOfOneRoute(t *testing.T) {
	for _, tc := range []struct{ a, b, want mark }{
		{mark{5, "shed", "p#1"}, mark{9, "expired", "p#1"}, mark{5, "shed", "p#1"}},
		{mark{5, "shed", "p#1"}, mark{9, "expired", ""}, mark{5, "shed", ""}},
		{mark{5, "shed", "p#1"}, mark{9, "expired", "p#2"}, mark{5, "shed", ""}},
	} {
		o, r := newTestOwners(t), route{routeGeneral, "c", "a", ""}
		for _, two := range [][2]mark{{tc.a, tc.b}, {tc.b, tc.a}} {
			clear(o.marks)
			o.markAll = nil
			for _, m := range two {
				o.markLocked(r, m)
				o.markAllLocked(m)
			}
			if o.marks[r] != tc.want || *o.markAll != tc.want {
				t.Errorf("%v and %v are %v, of all routes %v, want %v", two[0], two[1], o.marks[r], *o.markAll, tc.want)
			}
		}
	}
}

// TestGapsOnlyForThoseWhoMissed: a mark of this pod sends no gap to its own sockets that have had the event, but all others get
// theirs: those here that have not, those that came while it was under way, those of other pods and of a successor with
// this pod's id; and whoever resumes from now on gets what was given up.
func TestGapsOnlyForThoseWhoMissed(t *testing.T) {
	r := route{routeGeneral, "acme", "ann", ""}
	for _, tc := range []struct {
		name      string
		had, come int // sockets that have had it, and that have come since
		left      bool
		readAs    member
		merged    bool // with a mark of other origin
		all       bool // beyond OWNER_CACHE_SIZE
		want      int  // gaps
	}{
		{name: "all have had it", had: 2, readAs: member{"pod-1", "e1"}},
		{name: "all have had it, and one has left", had: 2, left: true, readAs: member{"pod-1", "e1"}},
		{name: "nobody is here", readAs: member{"pod-1", "e1"}},
		{name: "one has come since", had: 1, come: 1, readAs: member{"pod-1", "e1"}, want: 2},
		{name: "not known who has had it", come: 2, readAs: member{"pod-1", "e1"}, want: 2},
		{name: "another pod", had: 2, readAs: member{"pod-2", "e1"}, want: 2},
		{name: "a successor", had: 2, readAs: member{"pod-1", "e2"}, want: 2},
		{name: "with another mark", had: 2, readAs: member{"pod-1", "e1"}, merged: true, want: 2},
		{name: "one mark for all routes", had: 2, readAs: member{"pod-1", "e1"}, all: true},
		{name: "one mark for all routes, another pod", had: 2, readAs: member{"pod-2", "e1"}, all: true, want: 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			router, h := newTestRouter(t), &pipelined{}
			o := router.owners
			o.rdb.AddHook(h)
			var conns []*conn
			for range tc.had + tc.come {
				conns = append(conns, router.hub.newConn(goneConn{}, &claims{}, lock{release: func() {}}, "req"))
			}
			had := conns[:tc.had]
			if tc.left {
				conns = conns[1:]
			}
			o.routes[r] = &localRoute{route: r, conns: conns}
			if tc.all {
				o.cfg.Load().PodOwnerCacheSize = 0
			}
			wantFrom := func(when string) {
				t.Helper()
				if got := o.resumeFrom(90, r); got != 6 {
					t.Errorf("%s, a client that has had 90 resumes from %d, want 6: it may come from another pod", when, got)
				}
			}
			o.announce(map[route][]*conn{r: had}, mark{since: 6, reason: "shed"}, 10, func() {})
			wantFrom("announced")
			if tc.merged {
				o.markLocked(r, mark{since: 8, reason: "owner"})
			}
			o.flushMarks(t.Context())
			wantFrom("written")
			o.pod, o.epochNow = tc.readAs.pod, tc.readAs.epoch
			clear(o.missed)
			o.apply(h.entries())
			wantFrom("read")
			gaps := 0
			for _, c := range conns {
				if c.ring.gapNoted {
					gaps++
				}
			}
			if gaps != tc.want {
				t.Errorf("%d gaps, want %d", gaps, tc.want)
			}
		})
	}
}

// TestLogEntriesAreSmall: the last entry of the log is read again with every batch of events, so thousands of marks do not
// go into one; none is left out.
func TestLogEntriesAreSmall(t *testing.T) {
	o := newTestOwners(t)
	o.cfg.Load().PodOwnerCacheSize = 4096
	h := &pipelined{}
	o.rdb.AddHook(h)
	const marks = 1000
	told := 0
	for i := range marks {
		o.announce(map[route][]*conn{{routeGeneral, "c", strconv.Itoa(i), ""}: nil}, mark{since: 7, reason: "shed"}, 10, func() { told++ })
	}
	h.err = errUnavailable
	o.flushMarks(t.Context())
	h.cmds, h.err = nil, nil
	if told > 0 {
		t.Errorf("%d events given up before their marks were in the log", told)
	}
	o.flushMarks(t.Context())
	if told != marks {
		t.Errorf("%d events given up when their marks were in the log, want %d", told, marks)
	}
	named := map[string]bool{}
	for _, cmd := range h.cmds {
		n := 0
		for i, arg := range cmd.Args() {
			if s, ok := arg.(string); ok && strings.HasPrefix(s, "route:") {
				n++
				named[s] = cmd.Args()[i+1] == "gap 7 shed"
			}
		}
		if n == 0 || n > logFields {
			t.Errorf("an entry of %d routes, want 1 to %d: %v", n, logFields, cmd)
		}
	}
	for i := range marks {
		if key := (route{routeGeneral, "c", strconv.Itoa(i), ""}).key(); !named[key] {
			t.Fatalf("the mark of %s is in no entry", key)
		}
	}
}

// TestRoomIsNotMadeAtTheBatchsExpense: however small the cache, what one batch needs is in it when the batch is dispatched.
func TestRoomIsNotMadeAtTheBatchsExpense(t *testing.T) {
	o := newTestOwners(t) // room for 64
	named := func(name string, n int) (routes []route) {
		for i := range n {
			routes = append(routes, route{routeMessages, "c", "a", name + strconv.Itoa(i)})
		}
		return routes
	}
	load := func(batch []route) {
		missing := o.missing(batch)
		o.makeRoom(len(missing), batch)
		for _, r := range missing {
			o.cache[r] = &answer{}
		}
		for _, r := range batch {
			if !o.find(r, time.Now()).known {
				t.Fatalf("%s is not known after its own batch's look-up", r.key())
			}
		}
	}
	load(named("a", 40))
	load(append(named("a", 10), named("b", 40)...))
	if len(o.cache) > 64 {
		t.Errorf("%d answers are cached, there is room for 64", len(o.cache))
	}
	load(named("c", 200)) // more than there is room for
	load(named("d", 2))
	if len(o.cache) > 64 {
		t.Errorf("%d answers are still cached", len(o.cache))
	}
}

// TestMarksThatRecur: who comes after the latest mark is not sent back to before the first, and nobody is sent less far back than
// what they may have missed, however many there are; after RESUME_MAX_AGE they are forgotten.
func TestMarksThatRecur(t *testing.T) {
	o, r := newTestOwners(t), route{routeGeneral, "acme", "ann", ""}
	cfg := o.cfg.Load()
	cfg.ResumeMaxAge = time.Hour
	age := func(by time.Duration, seq uint64) {
		for _, all := range o.missed {
			for i := range all {
				all[i].read = all[i].read.Add(-by)
			}
		}
		o.forgetMissed(seq)
	}
	want := func(since, from uint64) {
		t.Helper()
		if got := o.resumeFrom(since, r); got != from {
			t.Errorf("who has had %d resumes from %d, want %d", since, got, from)
		}
	}
	o.lags(110)
	o.lags(100)
	o.lags(120)
	want(5000, 100)
	age(cfg.PodLease+1, 300)
	want(300, 100)
	want(301, 301)
	want(90, 90)
	for i := range uint64(2 * missedKept) { // one mark each thousand, heard of by all 300 later
		base := 1000 * (i + 1)
		o.missedLocked(r, mark{since: base}, time.Now())
		want(base+5000, base)
		age(cfg.PodLease+1, base+300)
		want(base+300, base)
		want(base+301, base+301)
		want(base-1, base-1)
		want(250, 100)
		want(1200, 1000)
		if n := len(o.missed[r]); n > missedKept {
			t.Fatalf("%d marks are kept", n)
		}
	}
	age(cfg.ResumeMaxAge+cfg.PodLease, 1)
	want(250, 250)
	if len(o.missed) > 0 {
		t.Errorf("%d routes are kept", len(o.missed))
	}
}

// TestLeavingWithoutLease: while Redis is away for longer than a lease, other pods may have found nobody on this one's routes, and the
// gap that follows is not for who has left by then: their routes are marked. Else nothing is: thousands would be told to resume
// that have done so elsewhere while this pod was suspended.
func TestLeavingWithoutLease(t *testing.T) {
	const none = 1 << 40
	for _, tc := range []struct {
		name      string
		held      time.Duration // ago; none = never
		away      bool
		regap     bool
		regapAway bool
		want      uint64 // since of the mark; none = no mark
	}{
		{name: "lease held", held: time.Second, want: none},
		{name: "away for a moment", held: time.Second, away: true, want: none},
		{name: "never held", held: none, away: true, want: none},
		{name: "away for longer", held: time.Minute, away: true, want: 70},
		{name: "suspended", held: time.Minute, want: none},
		{name: "away before the gap to come", held: time.Second, regap: true, regapAway: true, want: 60},
		{name: "suspended before the gap to come", held: time.Second, regap: true, want: none},
	} {
		t.Run(tc.name, func(t *testing.T) {
			router := newTestRouter(t)
			o, user, chat := router.owners, route{routeGeneral, "acme", "ann", ""}, route{routeMessages, "acme", "ann", "c1"}
			o.base = time.Now().Add(-time.Hour)
			o.away.Store(tc.away)
			o.seqHeld, o.regap, o.regapAway, o.regapSince = 70, tc.regap, tc.regapAway, 60
			if tc.held != none {
				o.heldAt.Store(int64(time.Hour - tc.held))
			}
			c := router.hub.newConn(goneConn{}, &claims{}, lock{release: func() {}}, "req")
			for _, r := range []route{user, chat} {
				o.routes[r] = &localRoute{route: r, conns: []*conn{c}}
				o.detach(c, r)
				switch m, marked := o.marks[r]; {
				case marked != (tc.want != none):
					t.Errorf("%s is marked: %t", r.key(), marked)
				case marked && m != mark{tc.want, "owner", ""}:
					t.Errorf("%s is marked by %v, want since %d", r.key(), m, tc.want)
				}
			}
		})
	}
}

// clusterAnswers is a pipeline's end as of a cluster: the first command's error, whatever the others had.
type clusterAnswers struct {
	redis.Hook
	errs []error
}

func (h clusterAnswers) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		for i, cmd := range cmds {
			cmd.SetErr(h.errs[i%len(h.errs)])
		}
		return h.errs[0]
	}
}

func (h clusterAnswers) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h clusterAnswers) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(context.Context, redis.Cmder) error { return nil }
}

// TestLeaseThatCouldNotBeRead: a pod whose lease gave no answer is not taken for dead because that of another was missing.
func TestLeaseThatCouldNotBeRead(t *testing.T) {
	for _, tc := range []struct {
		name string
		errs []error
		fail bool
	}{
		{"both missing", []error{redis.Nil, redis.Nil}, false},
		{"one missing, one not read", []error{redis.Nil, errUnavailable}, true},
		{"one not read, one missing", []error{errUnavailable, redis.Nil}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := newTestOwners(t)
			o.rdb.AddHook(clusterAnswers{errs: tc.errs})
			set := redis.NewStringSliceCmd(t.Context())
			set.SetVal([]string{"pod-8#e8", "pod-9#e9"})
			if _, err := o.leasesOf(t.Context(), []*redis.StringSliceCmd{set}); (err != nil) != tc.fail {
				t.Errorf("look-up: %v", err)
			}
			if err := o.readPods(t.Context(), []string{"pod-8", "pod-9"}); (err != nil) != tc.fail {
				t.Errorf("renewal: %v", err)
			}
		})
	}
}

// heldLease answers as Redis does to a pod whose lease holds, and whose place in the owner log is place.
type heldLease struct {
	redis.Hook
	place redis.XMessage
}

func (h heldLease) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h heldLease) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		for _, cmd := range cmds {
			if c, ok := cmd.(*redis.Cmd); ok {
				c.SetVal(int64(1))
			}
		}
		return nil
	}
}

func (h heldLease) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(_ context.Context, cmd redis.Cmder) error {
		if c, ok := cmd.(*redis.XMessageSliceCmd); ok {
			c.SetVal([]redis.XMessage{h.place})
		}
		return nil
	}
}

// TestGapsReachBackToLateEvents: while pods catch up, the newest sequence that is known is above what others may yet end
// without the sockets here. What a gap would be sent with is below that, from the poll that finds it out until the end of it.
func TestGapsReachBackToLateEvents(t *testing.T) {
	o := newTestOwners(t)
	o.cfg.Load().ResumeMaxAge = time.Hour
	o.place = redis.XMessage{ID: "1-0", Values: map[string]any{podKey("pod-1"): "reads"}}
	o.rdb.AddHook(heldLease{place: o.place})
	want := func(when string, seq uint64) {
		t.Helper()
		if o.seqHeld != seq || o.seqRead != seq {
			t.Errorf("%s, gaps would be since %d for a lost lease, and since %d for a lost place, want %d", when, o.seqHeld, o.seqRead, seq)
		}
	}
	renew := func(known uint64) {
		t.Helper()
		o.noteSeq = func() uint64 { return known }
		if err := o.renew(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	renew(60000)
	want("with nothing late", 60000)
	o.lags(100)
	want("as the poll finds late events", 100)
	o.lags(20000)
	renew(60100)
	want("while they are caught up with", 100)
	o.missed[route{}][0].read = time.Now().Add(-o.cfg.Load().PodLease - 1)
	renew(60200)
	renew(60201)
	want("a lease after the last of them", 60201)
}
