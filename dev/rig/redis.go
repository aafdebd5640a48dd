package rig

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/alicebob/miniredis/v2"
)

// Redis is a redis-server whose port and data outlive its process, or, where none is installed, an in-process one.
type Redis struct {
	dir  string
	port int
	args []string

	mini    *miniredis.Miniredis // nil with a real one
	miniEnd chan struct{}        // closed by Stop: ends the ticker

	mu   sync.Mutex // guards proc
	proc *Process
}

// RedisServer is the path of the installed redis-server, or "". DWS_MINIREDIS=1 hides it.
var RedisServer = sync.OnceValue(func() string {
	if os.Getenv("DWS_MINIREDIS") == "1" {
		return ""
	}
	path, err := exec.LookPath("redis-server")
	if err != nil {
		return ""
	}
	return path
})

// StartRedis runs a Redis with its data under dir. extra are further arguments of redis-server, in which $PORT stands
// for its port; with any, there must be a real one.
func StartRedis(dir string, extra ...string) (*Redis, error) {
	if RedisServer() == "" {
		if len(extra) > 0 {
			return nil, fmt.Errorf("start Redis with %q: redis-server is not installed", extra)
		}
		return startMini()
	}
	r := &Redis{dir: dir, args: extra}
	err := onFreePort(func(port int) error {
		r.port = port
		return r.Restart()
	})
	if err != nil {
		return nil, fmt.Errorf("start Redis: %w", err)
	}
	return r, nil
}

// startMini runs miniredis, whose keys expire only when told that time has passed.
func startMini() (*Redis, error) {
	mini := miniredis.NewMiniRedis()
	if err := mini.Start(); err != nil {
		return nil, fmt.Errorf("start miniredis: %w", err)
	}
	port, err := strconv.Atoi(mini.Port())
	if err != nil {
		return nil, err
	}
	r := &Redis{port: port, mini: mini, miniEnd: make(chan struct{})}
	go func() {
		const step = 100 * time.Millisecond
		tick := time.NewTicker(step)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				mini.FastForward(step)
			case <-r.miniEnd:
				return
			}
		}
	}()
	return r, nil
}

// Address is host:port of the server, also while it is down.
func (r *Redis) Address() string { return fmt.Sprintf("127.0.0.1:%d", r.port) }

// Process is the one that runs now, or ran last; nil with an in-process Redis.
func (r *Redis) Process() *Process {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.proc
}

// Kill ends the server by SIGKILL; what it had answered is on disk.
func (r *Redis) Kill() {
	if r.mini != nil {
		r.mini.Close()
		return
	}
	r.Process().Kill()
}

// Stop ends the server for good.
func (r *Redis) Stop() {
	r.Kill()
	if r.mini != nil {
		close(r.miniEnd)
	}
}

// LoseData removes what a killed server had written: the next Restart finds an empty Redis.
func (r *Redis) LoseData() error {
	if r.mini != nil {
		r.mini.FlushAll()
		return nil
	}
	return os.RemoveAll(filepath.Join(r.dir, "appendonlydir"))
}

// Restart starts the killed server again, on the same port and data, and returns when it answers.
func (r *Redis) Restart() error {
	if r.mini != nil {
		return r.mini.Restart()
	}
	// appendfsync no: every write reaches the kernel before it is answered, which outlives SIGKILL; fsync is for power cuts.
	args := append([]string{"--port", strconv.Itoa(r.port), "--bind", "127.0.0.1", "--dir", r.dir, "--save", "",
		"--appendonly", "yes", "--appendfsync", "no", "--daemonize", "no"}, r.args...)
	for i, arg := range args {
		args[i] = strings.ReplaceAll(arg, "$PORT", strconv.Itoa(r.port))
	}
	p, err := Start("redis-server", filepath.Join(r.dir, "redis.log"), os.Environ(), RedisServer(), args...)
	if err != nil {
		return err
	}
	r.mu.Lock()
	r.proc = p
	r.mu.Unlock()
	return untilPrinted(p, "Ready to accept connections") // its data is read by then
}
