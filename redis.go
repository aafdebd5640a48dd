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
	return redis.NewUniversalClient(opt), nil
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
