package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// leases is a world of one Redis and a pod with a lease, on the bubble's clock.
func leases(t *testing.T, f func(t *testing.T, v *redisServer, l *lease)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		f(t, v, testLease(t, v, testSettings(nil)))
	})
}

// renewed renews the lease and says what came of it.
func renewed(t *testing.T, l *lease, acted ...string) renewal {
	t.Helper()
	r, err := l.renew(t.Context(), acted, nil)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func (v *redisServer) leaseOf(pod string) owner {
	v.mu.Lock()
	defer v.mu.Unlock()
	o, _ := parseLease(pod, v.values[podKey(pod)])
	return o
}

// TestRenewal: a lease that holds keeps its life, however late it is renewed within its time. One that is gone, or that another
// instance of Redis holds, makes the pod take a new one; and after an outage, or in another instance, what Redis says of owners is in
// doubt until the others have had the time of a lease to write their claims again.
func TestRenewal(t *testing.T) {
	for _, c := range []struct {
		name  string
		lose  func(t *testing.T, v *redisServer, l *lease)
		want  renewal
		doubt bool
	}{
		{"in time", func(*testing.T, *redisServer, *lease) { time.Sleep(5 * time.Second) }, renewal{}, false},
		{"expired", func(*testing.T, *redisServer, *lease) { time.Sleep(7 * time.Second) }, renewal{overlooked: true}, false},
		{"restarted", func(_ *testing.T, v *redisServer, _ *lease) { v.restart() }, renewal{overlooked: true, another: true, generation: false}, true},
		{"failed over with all data", func(_ *testing.T, v *redisServer, _ *lease) { v.change(func() { v.runID = "run-2" }) }, renewal{overlooked: true, another: true}, true},
		{"failed over with all data, and no new life was to be had", func(t *testing.T, v *redisServer, l *lease) {
			v.change(func() { v.runID = "run-2" })
			v.before = func(args []string) {
				if len(args) > 1 && args[1] == takeLease.Hash() {
					v.change(func() { v.down, v.before = true, nil })
				}
			}
			if r, err := l.renew(t.Context(), nil, nil); err == nil {
				t.Errorf("%+v", r)
			}
			v.change(func() { v.down = false })
		}, renewal{overlooked: true, another: true, back: true}, true},
		{"away for a moment", func(t *testing.T, v *redisServer, l *lease) {
			v.change(func() { v.down = true })
			if _, err := l.renew(t.Context(), nil, nil); err == nil || !l.inDoubt() || l.available() {
				t.Errorf("without Redis: %v, in doubt %v, available %v", err, l.inDoubt(), l.available())
			}
			time.Sleep(time.Second)
			v.change(func() { v.down = false })
		}, renewal{back: true}, true},
		{"away for a lease", func(t *testing.T, v *redisServer, l *lease) {
			v.change(func() { v.down = true })
			l.renew(t.Context(), nil, nil)
			time.Sleep(7 * time.Second)
			v.change(func() { v.down = false })
		}, renewal{back: true, overlooked: true}, true},
		{"the answer was lost", func(t *testing.T, v *redisServer, l *lease) {
			v.change(func() { v.lose = 1 })
			l.renew(t.Context(), nil, nil)
		}, renewal{back: true}, true},
		{"the answer about a new life was lost", func(t *testing.T, v *redisServer, l *lease) {
			time.Sleep(7 * time.Second)
			v.before = func(args []string) { // the renewal is answered, the new lease not
				if len(args) > 1 && args[1] == takeLease.Hash() {
					v.change(func() { v.lose, v.before = 1, nil })
				}
			}
			if r, err := l.renew(t.Context(), nil, nil); err == nil {
				t.Errorf("%+v", r)
			}
		}, renewal{back: true, overlooked: true}, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			leases(t, func(t *testing.T, v *redisServer, l *lease) {
				renewed(t, l)
				before := l.life()
				c.lose(t, v, l)
				r := renewed(t, l)
				notes := r.notes
				if r.notes = nil; !reflect.DeepEqual(r, c.want) || len(notes) > 0 {
					t.Errorf("%+v, want %+v", r, c.want)
				}
				if now := v.leaseOf("pod-1"); (now.life != before) != c.want.overlooked || now.life != l.life() || now.addr != "pod-1:1" {
					t.Errorf("the lease is %v, the life %s, before %s", now, l.life(), before)
				}
				if l.inDoubt() != c.doubt || !l.available() {
					t.Errorf("in doubt: %v, available: %v", l.inDoubt(), l.available())
				}
				time.Sleep(4 * time.Second)
				if r := renewed(t, l); r.overlooked || r.back || r.another {
					t.Errorf("the next renewal says %+v", r)
				}
				time.Sleep(2 * time.Second)
				if l.inDoubt() {
					t.Error("still in doubt one lease later")
				}
				time.Sleep(5 * time.Second)
				if l.available() {
					t.Error("available though the lease was not renewed for as long as it lives")
				}
			})
		})
	}
}

// TestLivePods: each renewal knows the pods whose leases hold, and takes the names of the others out of the set.
func TestLivePods(t *testing.T) {
	leases(t, func(t *testing.T, v *redisServer, l *lease) {
		want := func(pods ...string) {
			t.Helper()
			var got []string
			for _, o := range l.peers() {
				got = append(got, o.String()+"@"+o.addr)
			}
			if slices.Sort(got); !slices.Equal(got, pods) || l.livePods() != len(pods)+1 {
				t.Errorf("peers are %v, want %v; %d live", got, pods, l.livePods())
			}
		}
		renewed(t, l)
		want()
		v.addPod(member{"pod-2", "l2"})
		v.addPod(member{"pod-3", "l3"})
		if err := l.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		want("pod-2#l2@pod-2:1", "pod-3#l3@pod-3:1")
		v.expire(podKey("pod-2"))
		if err := l.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		want("pod-2#l2@pod-2:1", "pod-3#l3@pod-3:1") // between two renewals none is taken away
		renewed(t, l)
		want("pod-3#l3@pod-3:1")
		if got := v.members(podsKey); !slices.Equal(got, []string{"pod-1", "pod-3"}) {
			t.Errorf("the set of pods holds %v", got)
		}
		for m, want := range map[member]bool{{"pod-3", "l3"}: false, {"pod-3", "before"}: true, {"pod-2", "l2"}: true} {
			if got := l.overlooks(m); got != want {
				t.Errorf("overlooks %v: %v", m, got)
			}
		}
		wantAt := func(m member, life string) {
			t.Helper()
			if o, lives := l.locate(m); lives != (life != "") || o.life != life {
				t.Errorf("%v is located as %v, lives: %v", m, o, lives)
			}
		}
		wantAt(member{"pod-3", "l3"}, "l3")
		wantAt(member{"pod-2", "l2"}, "")
		v.addPod(member{"pod-2", "new"})
		wantAt(member{"pod-2", "l2"}, "new")
		v.change(func() { v.down = true })
		l.renew(t.Context(), nil, nil)
		want("pod-3#l3@pod-3:1")
		if l.overlooks(member{"pod-2", "l2"}) {
			t.Error("a pod without Redis says that it overlooks another")
		}
		wantAt(member{"pod-3", "l3"}, "l3")
		wantAt(member{"pod-3", "before"}, "l3")
		wantAt(member{"pod-2", "new"}, "")
	})
}

// TestEveryone: the pods of before an outage are not forgotten until they have had a lease's time to come back, whatever Redis has lost.
func TestEveryone(t *testing.T) {
	leases(t, func(t *testing.T, v *redisServer, l *lease) {
		want := func(pods ...string) {
			t.Helper()
			var got []string
			for _, o := range l.everyone() {
				got = append(got, o.String())
			}
			if slices.Sort(got); !slices.Equal(got, pods) {
				t.Errorf("everyone is %v, want %v", got, pods)
			}
		}
		want()
		v.addPod(member{"pod-2", "l2"})
		v.addPod(member{"pod-3", "l3"})
		renewed(t, l)
		want("pod-2#l2", "pod-3#l3")
		v.restart()
		renewed(t, l)
		want("pod-2#l2", "pod-3#l3")
		v.addPod(member{"pod-3", "next"})
		v.addPod(member{"pod-4", "l4"})
		renewed(t, l)
		want("pod-2#l2", "pod-3#next", "pod-4#l4")
		time.Sleep(5 * time.Second)
		renewed(t, l)
		want("pod-2#l2", "pod-3#next", "pod-4#l4")
		time.Sleep(2 * time.Second)
		renewed(t, l)
		want("pod-3#next", "pod-4#l4")
	})
}

// TestStart: a pod waits for the lease of one that had its id to run out, but not for a process that answers for it.
func TestStart(t *testing.T) {
	for _, c := range []struct {
		name string
		pod  string // who answers at the lease's address; "" = nobody
		life string
		err  error
	}{
		{"nobody answers", "", "", nil},
		{"another pod answers", "pod-2", "l2", nil},
		{"a later process answers", "pod-1", "later", nil},
		{"it lives", "pod-1", "former", errDuplicatePod},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v, n := newRedisServer(t), newPeerPipes()
				if c.pod != "" {
					servePeers(t, c.pod, c.life, peerConfig(), n.listen("there"), n.on)
				}
				p := servePeers(t, "pod-1", "", peerConfig(), n.listen("here"), n.on)
				v.change(func() {
					v.values[podKey("pod-1")], v.ends[podKey("pod-1")] = "former there", time.Now().Add(6*time.Second)
				})
				l := newLease(testSettings(nil), v.client(t), newMetrics())
				start := time.Now()
				err := l.start(t.Context(), func(context.Context) (string, error) { return "here", nil }, p)
				if !errors.Is(err, c.err) {
					t.Fatal(err)
				}
				if got := v.leaseOf("pod-1"); c.err == nil && (got.addr != "here" || got.life != l.life()) || c.err != nil && got.life != "former" {
					t.Errorf("the lease is %v", got)
				}
				if took := time.Since(start); (took >= 5*time.Second) != (c.err == nil) || took > 7*time.Second {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

// TestStartWaits: neither Redis nor a name for this machine need be there yet; the wait ends with the start.
func TestStartWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		v.down = true
		l := newLease(testSettings(nil), v.client(t), newMetrics())
		time.AfterFunc(3*time.Second, func() { v.change(func() { v.down = false }) })
		named := time.Now().Add(5 * time.Second)
		advertise := func(context.Context) (string, error) {
			if time.Now().Before(named) {
				return "", errors.New("no name yet")
			}
			return "here", nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := l.start(ctx, advertise, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("given up: %v", err)
		}
		if err := l.start(t.Context(), advertise, nil); err != nil || l.life() == "" {
			t.Errorf("%v, life %q", err, l.life())
		}
	})
}

// TestStarterNamesTheStream: a pod that starts with a Redis that has lost its data gives the stream a generation. A pod that knows the former
// one puts it back, so its clients need not reload.
func TestStarterNamesTheStream(t *testing.T) {
	leases(t, func(t *testing.T, v *redisServer, l *lease) {
		renewed(t, l)
		former := *l.generation.Load()
		v.restart()
		v.change(func() { clear(v.values) })
		cfg := testSettings(func(c *Config) { c.ServerPodID = "pod-2" })
		starter := newLease(cfg, v.client(t), newMetrics())
		if err := starter.start(t.Context(), func(context.Context) (string, error) { return "there", nil }, nil); err != nil {
			t.Fatal(err)
		}
		if *starter.generation.Load() == former {
			t.Fatal("the starter knows what Redis has lost")
		}
		if r := renewed(t, l); r.generation || !r.overlooked || *l.generation.Load() != former {
			t.Errorf("generation %q, want %q: %+v", *l.generation.Load(), former, r)
		}
		if r := renewed(t, starter); !r.generation || *starter.generation.Load() != former {
			t.Errorf("the starter's generation is %q, want %q: %+v", *starter.generation.Load(), former, r)
		}
	})
}

// TestNotes: a note reaches the life that it is for with its next renewal, and again until exactly it is deleted by a later one.
func TestNotes(t *testing.T) {
	leases(t, func(t *testing.T, v *redisServer, l *lease) {
		renewed(t, l)
		own := l.self.Load().member
		given := func(kind kind, agent string, missed ...member) *pulled {
			p := &pulled{}
			p.event, p.missed = &event{kind: kind, company: "acme", agent: agent}, missed
			return p
		}
		other := member{"pod-2", "l2"}
		err := l.leaveNotes(t.Context(), []note{
			{given(kindChat, "ann", own, other), "expired"},
			{given(kindChat, "ann", member{}), "expired"}, // the same again: the zero member is this pod
			{given(kindMessage, "ann", other), "shed"},
			{given(kindAgent, "ann", own), "expired"},
			{given(kindChat, "bob"), "expired"}, // it failed nowhere
		})
		if err != nil {
			t.Fatal(err)
		}
		read := func(notes map[string]string) (all []string) {
			for name, reason := range notes {
				company, agent, toAdmins := parseNote(name)
				all = append(all, fmt.Sprint(company, " ", agent, " ", toAdmins, " ", reason))
			}
			slices.Sort(all)
			return all
		}
		mine := renewed(t, l).notes
		if got := read(mine); !slices.Equal(got, []string{"acme ann false expired", "acme ann true expired"}) {
			t.Errorf("this pod reads %v", got)
		}
		if got := read(v.hash(noteKey(other))); !slices.Equal(got, []string{"acme ann false expired", "acme ann false shed"}) {
			t.Errorf("pod-2's notes are %v", got)
		}
		// One that comes before the next renewal has another name, and stays.
		if err := l.leaveNotes(t.Context(), []note{{given(kindChat, "ann", own), "shed"}}); err != nil {
			t.Fatal(err)
		}
		v.change(func() { v.lose = 1 })
		acted := slices.Collect(maps.Keys(mine))
		if _, err := l.renew(t.Context(), acted, nil); err == nil {
			t.Fatal("the answer was lost")
		}
		if got := read(renewed(t, l, acted...).notes); !slices.Equal(got, []string{"acme ann false shed"}) {
			t.Errorf("the next renewal reads %v", got)
		}
		if got := read(renewed(t, l).notes); !slices.Equal(got, []string{"acme ann false shed"}) {
			t.Errorf("a renewal that has acted upon nothing leaves %v", got)
		}
		time.Sleep(25 * time.Second) // nobody reads pod-2's: its life is gone
		renewed(t, l)
		if got := v.hash(noteKey(other)); len(got) != 0 {
			t.Errorf("notes for a life that is gone are kept: %v", got)
		}
		v.change(func() { v.down = true })
		if err := l.leaveNotes(t.Context(), []note{{given(kindChat, "ann", own), "shed"}}); err == nil {
			t.Error("notes left without Redis")
		}
	})
}

// TestGeneration: pods agree on the stream's generation; a pod hears of another one with its renewal, and a Redis that lost it is told.
func TestGeneration(t *testing.T) {
	leases(t, func(t *testing.T, v *redisServer, l *lease) {
		cfg := testSettings(func(c *Config) { c.ServerPodID = "pod-2" })
		other := testLease(t, v, cfg)
		first := *l.generation.Load()
		if r := renewed(t, l); first == "" || r.generation || *other.generation.Load() != first {
			t.Fatalf("generation %q, the other pod's %q, %+v", first, *other.generation.Load(), r)
		}
		if err := other.endLost(t.Context()); err != nil {
			t.Fatal(err)
		}
		second := *other.generation.Load()
		if r := renewed(t, l); !r.generation || *l.generation.Load() != second || second == first {
			t.Errorf("generation %q after %q, %+v", *l.generation.Load(), second, r)
		}
		if r := renewed(t, l); r.generation {
			t.Error("told twice")
		}
		v.restart()
		if r := renewed(t, l); r.generation || v.values[generationKey(cfg.Load())] != second {
			t.Errorf("a new Redis has generation %q, want %q", v.values[generationKey(cfg.Load())], second)
		}
	})
}

// TestLeaseEnd: a lease that was given up is not taken again by a renewal that comes late; that of another process is left alone.
func TestLeaseEnd(t *testing.T) {
	for _, taken := range []bool{false, true} {
		leases(t, func(t *testing.T, v *redisServer, l *lease) {
			renewed(t, l)
			if taken {
				v.addPod(member{"pod-1", "other"})
			}
			if err := l.close(t.Context()); err != nil {
				t.Fatal(err)
			}
			if _, err := l.renew(t.Context(), nil, nil); err == nil {
				t.Error("renewed after its end")
			}
			if got := v.leaseOf("pod-1"); taken != (got.life == "other") || !taken && got.life != "" {
				t.Errorf("the lease is %v", got)
			}
			if got := v.members(podsKey); slices.Contains(got, "pod-1") != taken {
				t.Errorf("the set of pods holds %v", got)
			}
		})
	}
}
