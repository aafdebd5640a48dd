package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/redis/go-redis/v9"
)

var (
	ann = route{"acme", "ann"}
	bob = route{"acme", "bob"}
)

// newTestOwners are those of pod-1 in a life of its own; they write nothing before run.
func newTestOwners(t *testing.T, v *redisServer) *owners {
	cfg := testSettings(nil)
	l := testLease(t, v, cfg)
	return newOwners(cfg, l.rdb, newMetrics(), l)
}

// startOwners has them write until the test ends, inside of its bubble.
func startOwners(t *testing.T, o *owners) {
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() {
		o.run(ctx)
		close(ended)
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
}

func TestRouteKeys(t *testing.T) {
	for r, want := range map[route]string{ann: "route:acme:ann", admins: "route:admins", {"admins", "x"}: "route:admins:x"} {
		if got := r.key(); got != want {
			t.Errorf("%v is %s, want %s", r, got, want)
		}
	}
}

// TestClaims: a route is claimed with its first socket and released with its last; a claim that comes again has another name.
func TestClaims(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		startOwners(t, o)
		prefix := "pod-1#" + o.lease.life() + "#"
		want := func(r route, n ...string) {
			t.Helper()
			synctest.Wait()
			var names []string
			for _, n := range n {
				names = append(names, prefix+n)
			}
			if got := v.members(r.key()); !slices.Equal(got, names) {
				t.Fatalf("%s is claimed by %v, want %v", r.key(), got, names)
			}
		}
		for range 2 {
			if err := o.claim(t.Context(), ann); err != nil {
				t.Fatal(err)
			}
			want(ann, "1")
		}
		if err := o.claim(t.Context(), admins); err != nil {
			t.Fatal(err)
		}
		want(admins, "2")
		o.release(ann)
		want(ann, "1")
		o.release(ann)
		want(ann)
		o.claim(t.Context(), ann)
		want(ann, "3")
		if n := o.left(); n != 0 {
			t.Errorf("%d are still to be written", n)
		}
	})
}

// TestClaimIsAnsweredByRedis: nobody is told that a route is claimed before Redis has said so, and who does not wait has no part in it.
func TestClaimIsAnsweredByRedis(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		startOwners(t, o)
		v.lose = 3
		start := time.Now()
		if err := o.claim(t.Context(), ann); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took != 900*time.Millisecond {
			t.Errorf("answered after %v, want after three pauses: three answers were lost", took)
		}
		v.change(func() { v.down = true })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := o.claim(ctx, bob); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("a claim without an answer: %v", err)
		}
		v.change(func() { v.down = false })
		time.Sleep(time.Second)
		if got := v.members(bob.key()); len(got) != 0 || o.claims[bob] != nil || o.left() != 0 {
			t.Errorf("claimed by %v for nobody", got)
		}
	})
}

// TestClaimUnderANewLife: a claim that is under way when the pod takes a new life is answered when the new name is written.
func TestClaimUnderANewLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		startOwners(t, o)
		if err := o.claim(t.Context(), ann); err != nil {
			t.Fatal(err)
		}
		v.delay = 100 * time.Millisecond
		answered := make(chan time.Time, 1)
		start := time.Now()
		go func() {
			o.claim(t.Context(), bob)
			answered <- time.Now()
		}()
		time.Sleep(50 * time.Millisecond) // it is under way
		o.lease.self.Store(&owner{member: member{"pod-1", "next"}})
		if err := o.claimAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		if took := (<-answered).Sub(start); took != 200*time.Millisecond {
			t.Errorf("answered after %v, want when the second name was written", took)
		}
		for _, r := range []route{ann, bob} {
			if !slices.ContainsFunc(v.members(r.key()), func(name string) bool { return strings.HasPrefix(name, "pod-1#next#") }) {
				t.Errorf("%s is claimed by %v, want the new life among them", r.key(), v.members(r.key()))
			}
		}
		v.change(func() { v.down, v.delay = true, 0 })
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := o.claimAll(ctx); err == nil {
			t.Error("all claimed again without Redis")
		}
		// Meanwhile one is released that Redis has under this life: it is not forgotten.
		name := o.claims[bob].name
		v.change(func() { v.down, v.sets[bob.key()][name] = false, true })
		o.release(bob)
		if err := o.claimAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if slices.Contains(v.members(bob.key()), name) {
			t.Errorf("bob is still claimed by %v", v.members(bob.key()))
		}
	})
}

// TestClaimsAtRandom: sockets come and go while commands are late, answers are lost and the pod takes new lives. At the end of each
// round exactly the routes with sockets are claimed, whatever order Redis saw; no name was ever used twice.
func TestClaimsAtRandom(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			v := newRedisServer(t)
			o := newTestOwners(t, v)
			startOwners(t, o)
			rnd := rand.New(rand.NewPCG(seed, 1))
			sockets := map[route]int{}
			wait := make(chan route, 1000) // claims that were answered
			waiting := 0
			names := map[string]bool{}
			for range 20 {
				for range 50 {
					r := route{"c", fmt.Sprint(rnd.IntN(6))}
					switch rnd.IntN(10) {
					case 0:
						v.change(func() { v.lose = rnd.IntN(2) })
					case 1:
						v.change(func() { v.delay = time.Duration(rnd.IntN(2000)) * time.Millisecond })
					case 2:
						v.change(func() { v.late = rnd.IntN(2) })
					case 3:
						time.Sleep(time.Duration(rnd.IntN(500)) * time.Millisecond)
					case 4:
						if rnd.IntN(5) == 0 {
							o.lease.self.Store(&owner{member: member{"pod-1", randomID(3)}})
							ctx, cancel := context.WithTimeout(t.Context(), time.Duration(rnd.IntN(4000))*time.Millisecond)
							o.claimAll(ctx)
							cancel()
						}
					case 5, 6:
						if sockets[r] > 0 {
							sockets[r]--
							o.release(r)
						}
					default:
						waiting++
						go func() {
							if err := o.claim(t.Context(), r); err != nil {
								t.Error(err)
							}
							wait <- r
						}()
					}
					for len(wait) > 0 {
						waiting--
						sockets[<-wait]++
					}
				}
				v.change(func() { v.lose, v.delay, v.late = 0, 0, 0 })
				for ; waiting > 0; waiting-- {
					sockets[<-wait]++
				}
				if err := o.releaseAll(t.Context()); err != nil { // and claims
					t.Fatal(err)
				}
				time.Sleep(3 * time.Second) // what is late has come
				for i := range 6 {
					r := route{"c", fmt.Sprint(i)}
					if _, err := o.find(t.Context(), []route{r}); err != nil { // takes out what came late
						t.Fatal(err)
					}
					got := v.members(r.key())
					if sockets[r] == 0 && len(got) != 0 || sockets[r] > 0 && (len(got) != 1 || got[0] != o.claims[r].name) {
						t.Fatalf("seed %d: with %d sockets %s is claimed by %v", seed, sockets[r], r.key(), got)
					}
				}
			}
			for _, c := range v.executed("sadd route:") {
				name := c[strings.LastIndexByte(c, ' ')+1:]
				if r := c[:strings.LastIndexByte(c, ' ')]; names[name] && !names[r+" "+name] {
					t.Fatalf("%s names claims of two routes", name)
				} else {
					names[name], names[r+" "+name] = true, true
				}
			}
		})
		if t.Failed() {
			return
		}
	}
}

// TestFind: owners are the other pods whose claim is of the life that their lease holds. All other claims are ignored and taken out of
// the set; so are those of this pod that stand for nothing.
func TestFind(t *testing.T) {
	v := newRedisServer(t)
	o := newTestOwners(t, v)
	go o.run(t.Context()) // ends with the test
	for _, m := range []member{{"pod-2", "l2"}, {"pod-3", "l3"}, {"pod-4", "new"}} {
		v.addPod(m)
	}
	if err := o.lease.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.addPod(member{"pod-5", "l5"}) // nobody has told us yet
	if err := o.claim(t.Context(), ann); err != nil {
		t.Fatal(err)
	}
	living := []string{o.claims[ann].name, "pod-2#l2#7", "pod-2#l2#8", "pod-3#l3#1", "pod-4#new#1", "pod-5#l5#1"}
	dead := []string{"pod-1#" + o.lease.life() + "#999", "pod-1#before#1", "pod-4#old#1", "pod-9#l9#1", "pod-2#l2", "pod-2", "", "#", "nonsense"}
	v.change(func() {
		for _, name := range slices.Concat(living, dead) {
			v.sets[ann.key()][name] = true
		}
	})
	found, err := o.find(t.Context(), []route{bob, ann})
	if err != nil {
		t.Fatal(err)
	}
	var pods []string
	for _, peer := range found[1] {
		pods = append(pods, peer.String()+"@"+peer.addr)
	}
	slices.Sort(pods)
	want := []string{"pod-2#l2@pod-2:1", "pod-2#l2@pod-2:1", "pod-3#l3@pod-3:1", "pod-4#new@pod-4:1", "pod-5#l5@pod-5:1"}
	if len(found[0]) != 0 || !slices.Equal(pods, want) {
		t.Errorf("owners are %v and %v, want nobody and %v", found[0], pods, want)
	}
	slices.Sort(living)
	if got := v.members(ann.key()); !slices.Equal(got, living) {
		t.Errorf("left in the set: %v, want %v", got, living)
	}
	if _, known := (*o.lease.known.Load())["pod-5"]; !known {
		t.Error("the pod that the look-up heard of is not known: without Redis it would get nothing")
	}
}

// TestLivesAreReadAfterClaims: a pod may take a new life and claim between two reads. Its lease is read when its claim is known, else a
// living claim would be taken for dead.
func TestLivesAreReadAfterClaims(t *testing.T) {
	v := newRedisServer(t)
	o := newTestOwners(t, v)
	v.addPod(member{"pod-2", "old"})
	if err := o.lease.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	v.before = func(args []string) {
		if args[0] == "smembers" && args[1] == ann.key() { // just before Redis reads the set
			v.addPod(member{"pod-2", "new"})
			v.change(func() { v.sets[ann.key()] = map[string]bool{"pod-2#old#1": true, "pod-2#new#1": true} })
		}
	}
	found, err := o.find(t.Context(), []route{ann})
	if err != nil || len(found[0]) != 1 || found[0][0].life != "new" {
		t.Errorf("owners are %v, %v; want pod-2's new life", found, err)
	}
	if got := v.members(ann.key()); !slices.Equal(got, []string{"pod-2#new#1"}) {
		t.Errorf("left in the set: %v", got)
	}
}

// clusterAnswers is a pipeline's end as of a cluster: the first command's error, whatever the others had.
type clusterAnswers struct {
	redis.Hook
	sets []string
	errs []error
}

func (h clusterAnswers) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(_ context.Context, cmds []redis.Cmder) error {
		for i, cmd := range cmds {
			if set, ok := cmd.(*redis.StringSliceCmd); ok {
				set.SetVal(h.sets)
				continue
			}
			cmd.SetErr(h.errs[i%len(h.errs)])
		}
		return cmds[0].Err()
	}
}

func (h clusterAnswers) DialHook(next redis.DialHook) redis.DialHook { return next }

func (h clusterAnswers) ProcessHook(next redis.ProcessHook) redis.ProcessHook { return next }

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
		cfg := testSettings(nil)
		rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1"})
		defer rdb.Close()
		rdb.AddHook(clusterAnswers{sets: []string{"pod-8#l8#1", "pod-9#l9#1"}, errs: tc.errs})
		o := newOwners(cfg, rdb, newMetrics(), newLease(cfg, rdb, newMetrics()))
		if _, err := o.find(t.Context(), []route{ann}); (err != nil) != tc.fail {
			t.Errorf("%s: look-up: %v", tc.name, err)
		}
		if _, err := o.lease.read(t.Context(), []string{"pod-8", "pod-9"}); (err != nil) != tc.fail {
			t.Errorf("%s: renewal: %v", tc.name, err)
		}
	}
}

// TestFindWithoutRedis: a look-up that is not answered says so, takes nothing out, and has the lease renewed at once, which finds out
// whether Redis is away.
func TestFindWithoutRedis(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		v.change(func() { v.sets[ann.key()] = map[string]bool{"pod-9#dead#1": true} })
		for _, trouble := range []func(){
			func() { v.down = true },
			func() { v.down, v.delay = false, time.Second },
		} {
			v.change(trouble)
			ctx, cancel := context.WithTimeout(t.Context(), lookupTimeout)
			start := time.Now()
			found, err := o.find(ctx, []route{ann})
			cancel()
			if err == nil || found != nil || time.Since(start) > lookupTimeout {
				t.Errorf("found %v, %v after %v", found, err, time.Since(start))
			}
			select {
			case <-o.lease.wake:
			default:
				t.Error("the lease is not renewed for it")
			}
		}
		v.change(func() { v.down, v.delay = false, 0 })
		if got := v.members(ann.key()); len(got) != 1 {
			t.Errorf("left in the set: %v", got)
		}
	})
}

// TestClaimsGivenUp: a crowd whose claims Redis does not answer goes away. Nothing of it is written later, in whatever order.
func TestClaimsGivenUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		startOwners(t, o)
		v.change(func() { v.down = true })
		ctx, cancel := context.WithCancel(t.Context())
		for i := range 3 * claimBatch {
			go o.claim(ctx, route{"c", fmt.Sprint(i)})
		}
		time.Sleep(time.Second)
		cancel()
		synctest.Wait()
		v.change(func() { v.down = false })
		if err := o.releaseAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		for i := range 3 * claimBatch {
			if got := v.members(route{"c", fmt.Sprint(i)}.key()); len(got) != 0 {
				t.Fatalf("agent %d is claimed by %v", i, got)
			}
		}
	})
}

// TestReleaseAll: the end of a drain waits until Redis has every release, but not for ever.
func TestReleaseAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		startOwners(t, o)
		routes := make([]route, 500) // of more than two pipelines
		for i := range routes {
			routes[i] = route{"c", fmt.Sprint(i)}
			go o.claim(t.Context(), routes[i])
		}
		synctest.Wait()
		if n := len(slices.Collect(maps.Keys(v.sets))); n != 501 { // and the pods
			t.Fatalf("%d sets", n)
		}
		v.change(func() { v.down = true })
		for _, r := range routes {
			o.release(r)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if err := o.releaseAll(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("without Redis: %v", err)
		}
		v.change(func() { v.down = false })
		if err := o.releaseAll(t.Context()); err != nil {
			t.Fatal(err)
		}
		for _, r := range routes {
			if got := v.members(r.key()); len(got) != 0 {
				t.Fatalf("%s is still claimed by %v", r.key(), got)
			}
		}
	})
}

// TestClaimGivenUpDuringClaimAll: a route whose last socket leaves while all claims are written anew holds nobody up.
func TestClaimGivenUpDuringClaimAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := newRedisServer(t)
		o := newTestOwners(t, v)
		run, stop := context.WithCancel(t.Context())
		go o.run(run)
		for _, r := range []route{ann, bob} {
			if err := o.claim(t.Context(), r); err != nil {
				t.Fatal(err)
			}
		}
		stop()
		synctest.Wait()
		began, done := time.Now(), make(chan error)
		go func() {
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			done <- o.claimAll(ctx)
		}()
		synctest.Wait()
		o.release(bob)
		startOwners(t, o)
		if err := <-done; err != nil || time.Since(began) > 0 {
			t.Errorf("after %v: %v", time.Since(began), err)
		}
		if got := len(v.members(ann.key())); got != 2 {
			t.Errorf("%d claims of ann, want that of before and the one of now", got)
		}
	})
}
