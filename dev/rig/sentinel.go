package rig

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/redis/go-redis/v9"
)

// Of the sentinels: the name of the master that they watch, and the passwords of the servers and of themselves.
const (
	SentinelMaster   = "dws"
	ReplicaPassword  = "password-of-the-redis-servers"
	SentinelPassword = "password-of-the-sentinels"
)

// Sentinels are three redis-sentinel that watch two Redis servers, one of which is the master, and fail over a second
// after it is gone.
type Sentinels struct {
	Servers   []*Redis
	ports     []int
	processes []*Process
}

// StartSentinels runs all of them with their data under dir and returns when they could fail over.
func StartSentinels(dir string) (*Sentinels, error) {
	s := &Sentinels{}
	err := s.start(dir)
	if err == nil {
		err = s.Settled()
	}
	if err != nil {
		s.Stop()
		return nil, fmt.Errorf("start sentinels: %w", err)
	}
	return s, nil
}

func (s *Sentinels) start(dir string) error {
	for i := range 2 {
		sub := filepath.Join(dir, fmt.Sprintf("redis%d", i))
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		args := []string{"--requirepass", ReplicaPassword, "--masterauth", ReplicaPassword, "--repl-diskless-sync-delay", "0"}
		if i > 0 {
			args = append(args, "--replicaof", "127.0.0.1", fmt.Sprint(s.Servers[0].port))
		}
		r, err := StartRedis(sub, args...)
		if err != nil {
			return err
		}
		s.Servers = append(s.Servers, r)
	}
	for i := range 3 {
		if err := s.startSentinel(filepath.Join(dir, fmt.Sprintf("sentinel%d", i))); err != nil {
			return err
		}
	}
	return nil
}

// startSentinel runs one more; it keeps its state in its configuration file.
func (s *Sentinels) startSentinel(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	bin, args := "redis-sentinel", []string{}
	if _, err := exec.LookPath(bin); err != nil { // the same program under another name, if the package is not installed
		bin, args = RedisServer(), []string{"--sentinel"}
	}
	return onFreePort(func(port int) error {
		conf := filepath.Join(dir, "sentinel.conf")
		text := fmt.Sprintf("port %d\nbind 127.0.0.1\ndir %s\nrequirepass %s\nsentinel sentinel-pass %[3]s\n"+
			"sentinel monitor %[4]s 127.0.0.1 %[5]d 2\nsentinel auth-pass %[4]s %[6]s\n"+
			"sentinel down-after-milliseconds %[4]s 1000\nsentinel failover-timeout %[4]s 5000\n",
			port, dir, SentinelPassword, SentinelMaster, s.Servers[0].port, ReplicaPassword)
		if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
			return err
		}
		p, err := Start("redis-sentinel", filepath.Join(dir, "sentinel.log"), os.Environ(), bin, append([]string{conf}, args...)...)
		if err != nil {
			return err
		}
		if err := untilPrinted(p, "+monitor master"); err != nil {
			return err
		}
		s.ports, s.processes = append(s.ports, port), append(s.processes, p)
		return nil
	})
}

// Settled returns when each sentinel knows the two others and a replica that may be promoted, as after each fail-over
// once the server that was killed runs again.
func (s *Sentinels) Settled() error {
	ctx, cancel := context.WithTimeout(context.Background(), formTime)
	defer cancel()
	for i := range s.ports {
		err := s.ask(i, func(c *redis.SentinelClient) error {
			return poll(ctx, func() error {
				m, err := c.Master(ctx, SentinelMaster).Result()
				if err == nil && (m["num-other-sentinels"] != "2" || m["num-slaves"] != "1" || m["flags"] != "master") {
					err = fmt.Errorf("a sentinel says %v", m)
				}
				if err != nil {
					return err
				}
				replicas, err := c.Replicas(ctx, SentinelMaster).Result()
				if err == nil && (len(replicas) != 1 || replicas[0]["flags"] != "slave" || replicas[0]["master-link-status"] != "ok") {
					err = fmt.Errorf("a sentinel says of the replica: %v", replicas)
				}
				return err
			})
		})
		if err != nil {
			return err
		}
	}
	return nil
}

func (s *Sentinels) ask(i int, f func(*redis.SentinelClient) error) error {
	c := redis.NewSentinelClient(&redis.Options{Addr: fmt.Sprintf("127.0.0.1:%d", s.ports[i]), Password: SentinelPassword})
	defer c.Close()
	return f(c)
}

// Master is the one that all sentinels agree on.
func (s *Sentinels) Master() (master *Redis, err error) {
	ctx, cancel := context.WithTimeout(context.Background(), formTime)
	defer cancel()
	for i := range s.ports {
		err := s.ask(i, func(c *redis.SentinelClient) error {
			addr, err := c.GetMasterAddrByName(ctx, SentinelMaster).Result()
			if err != nil {
				return err
			}
			for _, r := range s.Servers {
				if strings.Join(addr, ":") == r.Address() && (i == 0 || r == master) {
					master = r
					return nil
				}
			}
			return errors.New("the sentinels do not agree on a master")
		})
		if err != nil {
			return nil, err
		}
	}
	return master, nil
}

// Addresses are host:port of the sentinels, comma-separated.
func (s *Sentinels) Addresses() string {
	var list []string
	for _, port := range s.ports {
		list = append(list, fmt.Sprintf("127.0.0.1:%d", port))
	}
	return strings.Join(list, ",")
}

// Processes are those of servers and sentinels.
func (s *Sentinels) Processes() []*Process {
	list := append([]*Process{}, s.processes...)
	for _, r := range s.Servers {
		list = append(list, r.Process())
	}
	return list
}

// Stop ends them all.
func (s *Sentinels) Stop() {
	for _, p := range s.Processes() {
		p.Kill()
	}
}
