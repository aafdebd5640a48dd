package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"daisi-ws-service/dev/rig"
)

// redisCommands is how many commands the server has processed so far, those inside scripts included.
func (b *bench) redisCommands(ctx context.Context) (int, error) {
	info, err := b.rdb.Info(ctx, "stats").Result()
	if err != nil {
		return 0, err
	}
	_, rest, _ := strings.Cut(info, "total_commands_processed:")
	digits, _, _ := strings.Cut(rest, "\r\n")
	return strconv.Atoi(digits)
}

// redisIdle counts what the server processes while nothing happens but renewals: of leases, and of every socket's session.
func redisIdle(ctx context.Context, b *bench, p plan) error {
	c, err := connect(ctx, p.sockets, func(int) *rig.Service { return b.pod }, func(int, []byte) {})
	if err != nil {
		return err
	}
	defer c.close()
	span := time.Duration(p.seconds) * time.Second
	var counts []int
	for _, pause := range []time.Duration{5 * time.Second, span} { // the first: what the connects left behind ends
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		n, err := b.redisCommands(ctx)
		if err != nil {
			return fmt.Errorf("ask Redis for its count: %w", err)
		}
		counts = append(counts, n)
	}
	n := counts[1] - counts[0]
	fmt.Printf("redis: %d commands in %s with %d idle sockets: %.4f per socket and second\n", n, span, p.sockets, float64(n)/float64(p.sockets)/span.Seconds())
	return nil
}
