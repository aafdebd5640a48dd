package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/rig"
)

// NATSCluster gives the World n servers of its own that are one JetStream cluster.
func NATSCluster(n int) Option { return func(o *options) { o.nodes = n } }

// LeafNATS gives the World two servers of its own: the stream is on a hub, where the test is, and the pods connect to a leaf node
// of it, which has another JetStream. The hub's domain is called "hub".
func LeafNATS() Option { return func(o *options) { o.leaf = true } }

// NATSOptions are those of the test's own connection, where not everyone may connect.
func NATSOptions(opts ...nats.Option) Option { return func(o *options) { o.natsOptions = opts } }

// NoRedis leaves Redis to the test: World.Redis is nil until one of the methods below, or none, gives the pods another.
func NoRedis() Option { return func(o *options) { o.noRedis = true } }

func (w *World) startNATSCluster(n int) {
	w.T.Helper()
	nodes, err := rig.StartNATSCluster(shared.bin.NATS, w.subdir("nats"), n)
	if err != nil {
		w.T.Fatal(err)
	}
	w.Nodes, w.NATS = nodes, nodes[0]
	w.T.Cleanup(func() {
		for _, node := range nodes {
			w.blame(node.Process())
			node.Stop()
		}
	})
}

func (w *World) startNATSLeaf() {
	w.T.Helper()
	hub, leaf, err := rig.StartNATSLeaf(shared.bin.NATS, w.subdir("nats"))
	if err != nil {
		w.T.Fatal(err)
	}
	w.NATS, w.leaf = hub, leaf
	w.T.Cleanup(func() {
		for _, n := range []*rig.NATS{leaf, hub} {
			w.blame(n.Process())
			n.Stop()
		}
	})
}

// natsURL is where pods connect.
func (w *World) natsURL() string {
	if w.leaf != nil {
		return w.leaf.URL()
	}
	if w.Nodes == nil {
		return w.NATS.URL()
	}
	var urls []string
	for _, node := range w.Nodes {
		urls = append(urls, node.URL())
	}
	return strings.Join(urls, ",")
}

// RedisCluster gives the pods n masters that share the slots. args are further arguments of each.
func (w *World) RedisCluster(n int, args ...string) *rig.RedisCluster {
	w.T.Helper()
	NeedRealRedis(w.T)
	c, err := rig.StartRedisCluster(w.subdir("redis"), n, args...)
	if err != nil {
		w.T.Fatal(err)
	}
	w.redis = []string{"REDIS_MODE=cluster", "REDIS_ADDRESS=" + c.Addresses()}
	w.T.Cleanup(func() {
		for _, p := range c.Processes() {
			w.blame(p)
		}
		c.Stop()
	})
	return c
}

// Sentinels gives the pods a master and a replica that three sentinels watch, all with passwords.
func (w *World) Sentinels() *rig.Sentinels {
	w.T.Helper()
	NeedRealRedis(w.T)
	s, err := rig.StartSentinels(w.subdir("redis"))
	if err != nil {
		w.T.Fatal(err)
	}
	w.redis = []string{"REDIS_MODE=sentinel", "REDIS_ADDRESS=" + s.Addresses(), "REDIS_SENTINEL_MASTER=" + rig.SentinelMaster,
		"REDIS_PASSWORD=" + rig.ReplicaPassword, "REDIS_SENTINEL_PASSWORD=" + rig.SentinelPassword}
	w.T.Cleanup(func() {
		for _, p := range s.Processes() {
			w.blame(p)
		}
		s.Stop()
	})
	return s
}

// CA makes an authority whose files lie in the World's folder.
func (w *World) CA(name string) *rig.CA {
	w.T.Helper()
	ca, err := rig.NewCA(w.subdir("certs"), name)
	if err != nil {
		w.T.Fatal(err)
	}
	return ca
}

// Issue is CA.Issue for tests.
func (w *World) Issue(ca *rig.CA, name string) (cert, key string) {
	w.T.Helper()
	cert, key, err := ca.Issue(name)
	if err != nil {
		w.T.Fatal(err)
	}
	return cert, key
}

// WantReplicated waits until stream and consumer have a leader and all their replicas are up to date: one server fewer
// would not stop them.
func (w *World) WantReplicated() {
	w.T.Helper()
	why := ""
	defer func() {
		if w.T.Failed() {
			w.T.Log(why)
		}
	}()
	Eventually(w.T, 3*Patience, "all replicas to be current", func() bool {
		ctx := Within(w.T, Patience)
		s, err := w.JS.Stream(ctx, w.Stream)
		if err != nil {
			why = err.Error()
			return false
		}
		c, err := s.Consumer(ctx, w.Consumer)
		if err != nil {
			why = err.Error()
			return false
		}
		for _, cluster := range []*jetstream.ClusterInfo{s.CachedInfo().Cluster, c.CachedInfo().Cluster} {
			if why = notCurrent(cluster, len(w.Nodes)); why != "" {
				return false
			}
		}
		return true
	})
}

func notCurrent(c *jetstream.ClusterInfo, nodes int) string {
	if c == nil || c.Leader == "" || len(c.Replicas) != nodes-1 {
		return fmt.Sprintf("cluster is %+v", c)
	}
	for _, r := range c.Replicas {
		if !r.Current || r.Offline {
			return fmt.Sprintf("replica is %+v", *r)
		}
	}
	return ""
}

// Fate is what the pods have logged about the event seq: with LOG_LEVEL=debug, how each of its deliveries ended.
func (w *World) Fate(seq uint64) string {
	var b strings.Builder
	files, _ := filepath.Glob(filepath.Join(w.dir, "pod-*.log"))
	for _, file := range files {
		text, _ := os.ReadFile(file)
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, fmt.Sprintf(`"seq":%d,`, seq)) {
				fmt.Fprintf(&b, "%s: %s", filepath.Base(file), line)
			}
		}
	}
	return b.String()
}
