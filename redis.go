package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/redis/go-redis/v9"
)

// newRedis makes the client that all rooms share. It connects when first used; meet is called with each new connection first.
func newRedis(cfg *Config, meet func(context.Context, *redis.Conn) error) (redis.UniversalClient, error) {
	opt := &redis.UniversalOptions{
		OnConnect: meet,
		Addrs:     strings.Split(cfg.RedisAddress, ","), IsClusterMode: cfg.RedisMode == "cluster",
		Username: cfg.RedisUsername, Password: cfg.RedisPassword, DB: cfg.RedisDB,
		DialTimeout: 2 * time.Second, ReadTimeout: 2 * time.Second, WriteTimeout: 2 * time.Second,
		ContextTimeoutEnabled: true, // a batch of events waits for a read at most as long as its context
		MaxRetries:            1,
		DisableIdentity:       true, // an ACL user needs no right to CLIENT SETINFO
	}
	if cfg.RedisMode == "sentinel" {
		opt.MasterName, opt.SentinelPassword = cfg.RedisSentinelMaster, cfg.RedisSentinelPassword
	}
	if cfg.RedisTLS {
		t, err := clientTLS(cfg.RedisTLSCAFile, cfg.RedisTLSCertFile, cfg.RedisTLSKeyFile)
		if err != nil {
			return nil, fmt.Errorf("TLS to Redis: %w", err)
		}
		opt.TLSConfig = t
	}
	redis.SetLogger(redisLog{})
	rdb := redis.NewUniversalClient(opt)
	rdb.AddHook(&refusals{said: map[string]bool{}})
	return rdb, nil
}

// rights are the commands that the service needs, each on a key of the names that it needs it for; no id holds a '?'. What they write is gone
// within a second.
func rights(cfg *Config) [][]any {
	all := [][]any{
		{"set", "pod:?", "", "px", 1000}, {"get", "pod:?"}, {"pexpire", "pod:?", 1000}, {"del", "pod:?"},
		{"eval", "return redis.call('GET', KEYS[1])", 1, "pod:?"}, {"evalsha", takeLease.Hash(), 1, "pod:?", "", "", 1000, ""},
		{"sadd", podsKey, cfg.ServerPodID}, {"smembers", podsKey}, {"srem", podsKey, "?"},
		{"sadd", "route:?", "?"}, {"smembers", "route:?"}, {"srem", "route:?", "?"},
		{"hset", "note:?", "?", ""}, {"pexpire", "note:?", 1000}, {"hgetall", "note:?"}, {"hdel", "note:?", "?"},
		{"set", "session:?", "", "px", 1000, "get"}, {"get", "session:?"}, {"getex", "session:?", "px", 1000}, {"del", "session:?"},
		{"set", "ack_floor:?", "", "px", 1000}, {"get", "ack_floor:?"},
		{"set", "generation:?", "", "px", 1000, "nx"}, {"get", "generation:?"},
	}
	if cfg.AuthTokenCacheTTL > 0 || cfg.AuthAdminTokenCacheTTL > 0 {
		all = append(all, []any{"set", "token_cache:?", "", "px", 1000}, []any{"get", "token_cache:?"})
	}
	return all
}

// tryRights names the commands that Redis refuses this user. A Redis that does not answer refuses none.
func (l *lease) tryRights(ctx context.Context) error {
	all := rights(l.cfg.Load())
	p := l.rdb.Pipeline()
	cmds := make([]*redis.Cmd, len(all))
	for i, args := range all {
		cmds[i] = p.Do(ctx, args...)
	}
	_, _ = p.Exec(ctx) // each command has its own error
	var no []string
	for i, cmd := range cmds {
		if err := cmd.Err(); noRight(err) || redis.HasErrorPrefix(err, "unknown command") || redis.HasErrorPrefix(err, "syntax error") {
			key := "pods"
			for _, a := range all[i] {
				if s, _ := a.(string); strings.HasSuffix(s, ":?") {
					key = strings.TrimSuffix(s, "?") + "*"
				}
			}
			no = append(no, fmt.Sprintf("%s on %s", strings.ToUpper(cmd.Name()), key))
		}
	}
	if len(no) > 0 {
		return fmt.Errorf("redis refuses this user %s: docs/operations.md lists the rights that it needs", strings.Join(no, ", "))
	}
	return nil
}

// noRight says whether the user lacks a right, to a command or to a key, in a script too.
func noRight(err error) bool {
	return err != nil && (strings.HasPrefix(err.Error(), "NOPERM") || strings.Contains(err.Error(), "user executing the script") ||
		strings.Contains(err.Error(), "ACL failure in script"))
}

// refusals warns of each command that Redis refuses this user, once per command and reason.
type refusals struct {
	mu   sync.Mutex // guards said
	said map[string]bool
}

func (r *refusals) note(cmds ...redis.Cmder) {
	for _, cmd := range cmds {
		if err := cmd.Err(); noRight(err) {
			what := cmd.Name() + ": " + err.Error()
			r.mu.Lock()
			said := r.said[what]
			r.said[what] = true
			r.mu.Unlock()
			if !said {
				slog.Warn("Redis refuses this user a command", "command", cmd.Name(), "err", err)
			}
		}
	}
}

func (r *refusals) DialHook(next redis.DialHook) redis.DialHook { return next }

func (r *refusals) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		r.note(cmd)
		return err
	}
}

func (r *refusals) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return func(ctx context.Context, cmds []redis.Cmder) error {
		err := next(ctx, cmds)
		r.note(cmds...)
		return err
	}
}

// redisLog takes the library's own complaints, of which there is one per attempt to connect, in a form of its own, on stderr.
type redisLog struct{}

func (redisLog) Printf(_ context.Context, format string, args ...any) {
	slog.Debug("Redis client complains", "err", fmt.Sprintf(format, args...))
}

// clientTLS reads what a TLS client needs; each file may be absent.
func clientTLS(ca, cert, key string) (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if ca != "" {
		pem, err := os.ReadFile(ca)
		if err != nil {
			return nil, fmt.Errorf("read CA: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		if !t.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s holds no PEM certificate", ca)
		}
	}
	if cert != "" {
		pair, err := tls.LoadX509KeyPair(cert, key)
		if err != nil {
			return nil, fmt.Errorf("read client certificate: %w", err)
		}
		t.Certificates = []tls.Certificate{pair}
	}
	return t, nil
}

// floorKey holds the consumer's ack floor, for making it again: the stream's creation in nanoseconds of 19 digits, which compare
// as text, and the floor. A third word is the creation of a consumer that has skipped events behind it. The prefix is part of
// the key, so that a pod with another prefix marks nothing for the others.
func (l *lease) floorKey() string {
	cfg := l.cfg.Load()
	return "ack_floor:" + cfg.NATSStreamName + ":" + cfg.NATSConsumerName + ":" + cfg.NATSSubjectPrefix + ":" + *l.generation.Load()
}

// raiseFloor keeps the highest floor of the newest stream of the name (ARGV: its creation; floor; the consumer's creation). It
// answers with the floor noted, and raises nothing, where this consumer has skipped events.
var raiseFloor = redis.NewScript(`
local cur = redis.call('GET', KEYS[1])
if cur then
  local created, floor, skipped = cur:match('^(%S+) (%d+) ?(%S*)$')
  if created == ARGV[1] and skipped == ARGV[3] then return floor end
  if created > ARGV[1] or created == ARGV[1] and tonumber(floor) >= tonumber(ARGV[2]) then return false end
end
redis.call('SET', KEYS[1], ARGV[1] .. ' ' .. ARGV[2])
return false`)

// markSkipped adds the third word (ARGV: the consumer's creation), if there is a floor.
var markSkipped = redis.NewScript(`
local cur = redis.call('GET', KEYS[1])
if cur then redis.call('SET', KEYS[1], cur:match('^%S+ %d+') .. ' ' .. ARGV[1]) end`)

// noteFloor notes in Redis up to where every event of the stream has been settled. It says skipped, and which floor stands
// there, where somebody found that the consumer made at this time has skipped events.
func (l *lease) noteFloor(ctx context.Context, created time.Time, floor uint64, made time.Time) (noted uint64, skipped bool, err error) {
	noted, err = raiseFloor.Run(ctx, l.rdb, []string{l.floorKey()}, nanos(created), floor, nanos(made)).Uint64()
	if errors.Is(err, redis.Nil) {
		return 0, false, nil
	}
	return noted, err == nil, err
}

// noteSkipped tells all pods, those to come too, that the consumer made at this time has skipped events behind the floor noted.
func (l *lease) noteSkipped(ctx context.Context, made time.Time) error {
	err := markSkipped.Run(ctx, l.rdb, []string{l.floorKey()}, nanos(made)).Err()
	if errors.Is(err, redis.Nil) {
		return nil
	}
	return err
}

func nanos(t time.Time) string { return strconv.FormatInt(t.UnixNano(), 10) }

// floor reads what noteFloor noted; found is false where nothing was.
func (l *lease) floor(ctx context.Context) (created time.Time, floor uint64, found bool, err error) {
	key := l.floorKey()
	s, err := l.rdb.Get(ctx, key).Result()
	if errors.Is(err, redis.Nil) {
		return time.Time{}, 0, false, nil
	}
	var ns int64
	if err == nil {
		_, err = fmt.Sscanf(s, "%d %d", &ns, &floor)
	}
	if err != nil {
		return time.Time{}, 0, false, fmt.Errorf("read %s: %w", key, err)
	}
	return time.Unix(0, ns), floor, true, nil
}

// randomID returns 2n hex digits that no other call of any process returns.
func randomID(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// execGets runs p, in which keys may be missing, and fails if any of its commands did. Of a cluster's p Exec says what the first
// had: that a key is missing, though a node that holds others gave no answer.
func execGets(ctx context.Context, p redis.Pipeliner) error {
	cmds, err := p.Exec(ctx)
	for _, cmd := range cmds {
		if err := cmd.Err(); err != nil && !errors.Is(err, redis.Nil) {
			return err
		}
	}
	if errors.Is(err, redis.Nil) {
		return nil
	}
	return err
}
