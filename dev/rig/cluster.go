package rig

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// formTime is enough for servers to find each other and elect leaders, also on a busy machine.
const formTime = 60 * time.Second

// RedisCluster is masters that share the slots of a Redis Cluster.
type RedisCluster struct {
	Nodes []*Redis
	buses []int // the nodes' ports for each other
}

// StartRedisCluster runs n masters with their data under dir and returns when each of them knows that every slot is
// served. extra are further arguments of each server; all must let a client in that has no password.
func StartRedisCluster(dir string, n int, extra ...string) (*RedisCluster, error) {
	c := &RedisCluster{}
	for i := range n {
		if err := c.startNode(filepath.Join(dir, fmt.Sprintf("node%d", i)), extra); err != nil {
			c.Stop()
			return nil, err
		}
	}
	if err := c.form(); err != nil {
		c.Stop()
		return nil, fmt.Errorf("form a Redis Cluster: %w", err)
	}
	return c, nil
}

func (c *RedisCluster) startNode(dir string, extra []string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// The bus's port is 10,000 above the client's by default: among those of outgoing connections, perhaps.
	return onFreePort(func(bus int) error {
		args := []string{"--cluster-enabled", "yes", "--cluster-node-timeout", "2000", "--cluster-port", strconv.Itoa(bus)}
		r, err := StartRedis(dir, append(args, extra...)...)
		if err == nil {
			c.Nodes, c.buses = append(c.Nodes, r), append(c.buses, bus)
		}
		return err
	})
}

// form gives each node its share of the slots and introduces it to the first one.
func (c *RedisCluster) form() error {
	ctx, cancel := context.WithTimeout(context.Background(), formTime)
	defer cancel()
	const slots = 16384
	n := len(c.Nodes)
	for i := range n {
		err := c.on(i, func(rdb *redis.Client) error {
			p := rdb.Pipeline()
			p.Do(ctx, "cluster", "set-config-epoch", i+1) // else all begin with the same one and must sort that out
			p.ClusterAddSlotsRange(ctx, i*slots/n, (i+1)*slots/n-1)
			if i > 0 {
				p.Do(ctx, "cluster", "meet", "127.0.0.1", c.Nodes[0].port, c.buses[0])
			}
			_, err := p.Exec(ctx)
			return err
		})
		if err != nil {
			return err
		}
	}
	for i := range n {
		if err := c.on(i, func(rdb *redis.Client) error { return untilServed(ctx, rdb, n) }); err != nil {
			return err
		}
	}
	return nil
}

// untilServed returns when the node knows n others and all slots, or with the reason why not when ctx ends.
func untilServed(ctx context.Context, rdb *redis.Client, n int) error {
	return poll(ctx, func() error {
		info, err := rdb.ClusterInfo(ctx).Result()
		if err == nil && (!strings.Contains(info, "cluster_state:ok") || !strings.Contains(info, fmt.Sprintf("cluster_known_nodes:%d\r", n))) {
			err = fmt.Errorf("%s says %q", rdb.Options().Addr, info)
		}
		return err
	})
}

// on hands a client of node i to f.
func (c *RedisCluster) on(i int, f func(*redis.Client) error) error {
	rdb := redis.NewClient(&redis.Options{Addr: c.Nodes[i].Address()})
	defer rdb.Close()
	return f(rdb)
}

// Addresses are host:port of all nodes, comma-separated.
func (c *RedisCluster) Addresses() string {
	var list []string
	for _, r := range c.Nodes {
		list = append(list, r.Address())
	}
	return strings.Join(list, ",")
}

// Processes are those of all nodes.
func (c *RedisCluster) Processes() (list []*Process) {
	for _, r := range c.Nodes {
		list = append(list, r.Process())
	}
	return list
}

// Stop ends all nodes.
func (c *RedisCluster) Stop() {
	for _, r := range c.Nodes {
		r.Stop()
	}
}

// poll asks every 20 ms until ask has no complaint, and returns its last one when ctx ends.
func poll(ctx context.Context, ask func() error) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ask()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}
