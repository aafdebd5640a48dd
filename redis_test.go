package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"
)

// redisServer answers what lease.go and owner.go send, in place of a Redis server, so that synctest's clock rules: hooks of the client
// catch each command before a connection is made. Its scripts are written again in Go; that the Lua does the same is for the
// end-to-end tests to show.
type redisServer struct {
	t *testing.T

	mu     sync.Mutex // guards all below
	down   bool       // each command fails, none is executed
	lose   int        // of so many pipelines from now on the answer is lost: they are executed, and fail
	late   int        // so many pipelines from now on fail, and are executed some time later
	delay  time.Duration
	before func(args []string) // called before each command is executed, if not nil; it may use the server
	runID  string
	values map[string]string
	sets   map[string]map[string]bool
	hashes map[string]map[string]string
	ends   map[string]time.Time // of keys that expire
	log    []string             // what was executed
}

func newRedisServer(t *testing.T) *redisServer {
	return &redisServer{t: t, runID: "run-1", values: map[string]string{}, sets: map[string]map[string]bool{},
		hashes: map[string]map[string]string{}, ends: map[string]time.Time{}}
}

// client is closed with the test.
func (v *redisServer) client(t *testing.T) *redis.Client {
	rdb := redis.NewClient(&redis.Options{Addr: "127.0.0.1:1", MaxRetries: -1})
	rdb.AddHook(v)
	t.Cleanup(func() { rdb.Close() })
	return rdb
}

func (v *redisServer) DialHook(redis.DialHook) redis.DialHook {
	return func(context.Context, string, string) (net.Conn, error) { return nil, errors.New("no server") }
}

func (v *redisServer) ProcessHook(redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		return v.ProcessPipelineHook(nil)(ctx, []redis.Cmder{cmd})
	}
}

func (v *redisServer) ProcessPipelineHook(redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) (first error) {
		v.mu.Lock()
		delay, before := v.delay, v.before
		v.mu.Unlock()
		fail := func(err error) error {
			for _, cmd := range cmds {
				cmd.SetErr(err)
			}
			return err
		}
		if delay > 0 && !pause(ctx, delay) {
			return fail(ctx.Err())
		}
		if before != nil {
			for _, cmd := range cmds {
				before(words(cmd))
			}
		}
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.down {
			return fail(errors.New("connection refused"))
		}
		if v.late > 0 {
			v.late--
			time.AfterFunc(2*time.Second, func() { v.change(func() { v.executeLocked(cmds) }) })
			return fail(errors.New("i/o timeout"))
		}
		first = v.executeLocked(cmds)
		if v.lose > 0 {
			v.lose--
			return fail(errors.New("connection reset"))
		}
		return first
	}
}

func (v *redisServer) executeLocked(cmds []redis.Cmder) (first error) {
	for _, cmd := range cmds {
		v.applyLocked(cmd)
		if first == nil {
			first = cmd.Err()
		}
	}
	return first
}

func words(cmd redis.Cmder) []string {
	args := make([]string, len(cmd.Args()))
	for i, a := range cmd.Args() {
		args[i] = fmt.Sprint(a)
	}
	return args
}

func (v *redisServer) applyLocked(cmd redis.Cmder) {
	for key, end := range v.ends {
		if !time.Now().Before(end) {
			v.deleteLocked(key)
		}
	}
	args := words(cmd)
	if c, ok := cmd.(*redis.Cmd); ok && (!strings.HasPrefix(args[0], "eval") || slices.Contains(args, "pod:?")) {
		c.SetVal("") // of tryRights
		return
	}
	if args[0] != "info" && args[0] != "evalsha" && args[0] != "eval" {
		v.log = append(v.log, strings.Join(args, " "))
	}
	switch args[0] {
	case "get":
		if s, ok := v.values[args[1]]; ok {
			cmd.(*redis.StringCmd).SetVal(s)
		} else {
			cmd.SetErr(redis.Nil)
		}
	case "getex": // … px ms or ex s
		s, ok := v.values[args[1]]
		if !ok {
			cmd.SetErr(redis.Nil)
			return
		}
		life := millis(args[3])
		if args[2] == "ex" {
			life *= 1000
		}
		v.ends[args[1]] = time.Now().Add(life)
		cmd.(*redis.StringCmd).SetVal(s)
	case "set": // … px ms get, … nx, or alone
		if len(args) == 6 {
			s, ok := v.values[args[1]]
			v.values[args[1]], v.ends[args[1]] = args[2], time.Now().Add(millis(args[4]))
			if cmd.(once).SetVal(s); !ok {
				cmd.SetErr(redis.Nil)
			}
			return
		}
		if _, ok := v.values[args[1]]; !ok || args[len(args)-1] != "nx" {
			v.values[args[1]] = args[2]
		}
	case "sadd":
		if v.sets[args[1]] == nil {
			v.sets[args[1]] = map[string]bool{}
		}
		v.sets[args[1]][args[2]] = true
	case "srem":
		delete(v.sets[args[1]], args[2])
	case "smembers":
		cmd.(*redis.StringSliceCmd).SetVal(slices.Sorted(maps.Keys(v.sets[args[1]])))
	case "hset":
		if v.hashes[args[1]] == nil {
			v.hashes[args[1]] = map[string]string{}
		}
		v.hashes[args[1]][args[2]] = args[3]
	case "hdel":
		for _, field := range args[2:] {
			delete(v.hashes[args[1]], field)
		}
	case "hgetall":
		cmd.(*redis.MapStringStringCmd).SetVal(maps.Clone(v.hashes[args[1]]))
	case "pexpire":
		v.ends[args[1]] = time.Now().Add(millis(args[2]))
	case "info":
		cmd.(*redis.StringCmd).SetVal("# Server\r\nrun_id:" + v.runID + "\r\n")
	case "evalsha", "eval":
		v.scriptLocked(cmd.(*redis.Cmd), args)
	default:
		v.t.Errorf("unexpected command %v", args)
	}
}

func (v *redisServer) scriptLocked(cmd *redis.Cmd, args []string) {
	switch script := args[1]; {
	case script == putSession || script == dropSession:
	case args[0] == "eval":
		args[1] = redis.NewScript(script).Hash()
	}
	key, arg := args[3], args[4:]
	cur, held := v.values[key]
	ok := int64(1)
	switch args[1] {
	case takeLease.Hash():
		if held && cur != arg[1] && cur != arg[3] {
			ok = 0
			break
		}
		v.values[key], v.ends[key] = arg[0], time.Now().Add(millis(arg[2]))
	case redis.NewScript(renewLease).Hash():
		if !held || cur != arg[0] {
			ok = 0
			break
		}
		v.ends[key] = time.Now().Add(millis(arg[1]))
	case nextGeneration.Hash():
		if !held || cur == arg[0] {
			v.values[key] = arg[1]
		}
		cmd.SetVal(v.values[key])
		return
	case dropLease.Hash():
		if !held || cur != arg[0] {
			ok = 0
			break
		}
		v.deleteLocked(key)
	case putSession:
		v.log = append(v.log, "put "+key)
		if cur != arg[0] && cur != arg[1] {
			cmd.SetVal(cur)
			return
		}
		v.values[key], v.ends[key] = arg[0], time.Now().Add(millis(arg[2]))
		cmd.SetVal("")
		return
	case dropSession:
		v.log = append(v.log, "drop "+key)
		if strings.HasSuffix(cur, "#"+arg[0]) {
			v.deleteLocked(key)
		}
	default:
		v.t.Errorf("unexpected script %v", args)
	}
	cmd.SetVal(ok)
}

func millis(s string) time.Duration {
	n, _ := strconv.Atoi(s)
	return time.Duration(n) * time.Millisecond
}

func (v *redisServer) deleteLocked(key string) {
	delete(v.values, key)
	delete(v.hashes, key)
	delete(v.ends, key)
}

// change does something to the server.
func (v *redisServer) change(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
}

// restart is a server that lost everything.
func (v *redisServer) restart() {
	v.change(func() {
		n, _ := strconv.Atoi(strings.TrimPrefix(v.runID, "run-"))
		v.runID = "run-" + strconv.Itoa(n+1)
		clear(v.values)
		clear(v.sets)
		clear(v.hashes)
		clear(v.ends)
	})
}

// expire ends a key, as time would.
func (v *redisServer) expire(key string) { v.change(func() { v.deleteLocked(key) }) }

// members are those of the set.
func (v *redisServer) members(key string) []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.sets[key]))
}

// keys are those of all strings.
func (v *redisServer) keys() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Sorted(maps.Keys(v.values))
}

// note is what stands in the hash.
func (v *redisServer) hash(key string) map[string]string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return maps.Clone(v.hashes[key])
}

// executed returns the commands since the last call that begin so.
func (v *redisServer) executed(prefix string) (cmds []string) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, c := range v.log {
		if strings.HasPrefix(c, prefix) {
			cmds = append(cmds, c)
		}
	}
	v.log = nil
	return cmds
}

// testLease is the lease of a pod that has a life, in a world of its own.
func testLease(t *testing.T, v *redisServer, cfg *settings) *lease {
	l := newLease(cfg, v.client(t), newMetrics())
	if err := l.tryStart(t.Context(), func(context.Context) (string, error) { return l.pod + ":1", nil }, nil); err != nil {
		t.Fatal(err)
	}
	return l
}

// addPod has another pod live for as long as the server does.
func (v *redisServer) addPod(m member) {
	v.change(func() {
		v.values[podKey(m.pod)] = owner{m, m.pod + ":1"}.value()
		if v.sets[podsKey] == nil {
			v.sets[podsKey] = map[string]bool{}
		}
		v.sets[podsKey][m.pod] = true
	})
}
