package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/redis/go-redis/v9"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// aclRules are those of the ACL user in docs/operations.md, with this password.
func aclRules(t *testing.T, password string) []string {
	t.Helper()
	rules := strings.Fields(operations(t, "\nuser daisi on ((?s:.*?))```"))
	rules[slices.Index(rules, ">PASSWORD")] = ">" + password
	return append([]string{"--user", "daisi", "on"}, rules...)
}

// wantNoRefusal asks the servers themselves which errors they have answered with: none but what is part of the protocol
// (and ERR, for what a client library tries with newer servers). A script with keys of two slots is CROSSSLOT, a missing
// right NOPERM.
func wantNoRefusal(t *testing.T, servers ...*redis.Client) {
	t.Helper()
	for _, c := range servers {
		stats, err := c.Info(t.Context(), "errorstats").Result()
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(stats) {
			name, _, isError := strings.Cut(strings.TrimPrefix(line, "errorstat_"), ":")
			if isError && !slices.Contains([]string{"NOSCRIPT", "MOVED", "ASK", "ERR"}, name) {
				t.Errorf("%s refused something: %s", c.Options().Addr, line)
			}
		}
	}
}

// leavesNothing ends the pods and compares what is left in Redis, but for what lives as long as the stream.
func leavesNothing(w *harness.World, rdb redis.UniversalClient, pods ...*harness.Pod) {
	w.T.Helper()
	for _, p := range pods {
		p.Terminate()
		p.WantExit(0, 2*harness.Patience)
	}
	var keys []string
	want := []string{"ack_floor:" + w.Stream + ":" + w.Consumer, "generation:" + w.Stream}
	defer func() {
		if w.T.Failed() {
			w.T.Logf("after the drain of all pods Redis holds %q, want %q", keys, want)
		}
	}()
	harness.Eventually(w.T, harness.Patience, "Redis to be empty", func() bool { // a note that nobody has read expires
		keys, _ = rdb.Keys(w.T.Context(), "*").Result()
		slices.Sort(keys)
		return slices.EqualFunc(keys, want, strings.HasPrefix)
	})
}

// TestRedisLeastRights: with the ACL user of docs/operations.md nothing is missing, and it has no right that is not
// needed; in a database other than 0, where nothing else is touched.
func TestRedisLeastRights(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const password = "password-of-an-acl-user"
	rules := aclRules(t, password)
	w := harness.New(t, harness.RedisArgs(rules...), harness.Settings("REDIS_USERNAME=daisi", "REDIS_PASSWORD="+password, "REDIS_DB=7",
		"AUTH_TOKEN_CACHE_TTL=1m", "AUTH_ADMIN_TOKEN_CACHE_TTL=1m", "SESSION_REFRESH_INTERVAL=500ms", "POD_LEASE=1500ms",
		"NATS_NAK_DELAY=100ms", "NATS_RETRY_HORIZON=250ms"))
	a := w.Start()
	b, proxy := behindProxy(w)
	wantEverything(w, a, b, "desk1", "desk2")
	bob := b.Connect(harness.User("acme", "desk3", "bob"))
	proxy.Cut()
	harness.Eventually(t, harness.Patience, "an event to be given up", func() bool {
		w.Chat("acme", "desk3")
		return ended(a, "expired") > 0
	})
	proxy.Restore()
	bob.WantGap("expired")
	idle := a.Connect(harness.User("acme", "desk3", "ann"))
	a.WaitMetric(func(n float64) bool { return n > 0 }, "dws_session_lock_renewal_success_total")
	idle.Close(1000, "")

	admin := redis.NewClient(&redis.Options{Addr: w.Redis.Address(), DB: 7})
	defer admin.Close()
	harness.Eventually(t, harness.Patience, "what is done only now and then", func() bool {
		stats, err := admin.Info(t.Context(), "commandstats").Result()
		return err == nil && strings.Contains(stats, "cmdstat_pexpire:") && strings.Contains(stats, "cmdstat_hdel:")
	})
	cached, err := admin.Keys(t.Context(), "token_cache:*").Result()
	if err != nil || len(cached) == 0 {
		t.Errorf("tokens cached: %q, %v", cached, err)
	}
	admin.Del(t.Context(), cached...)
	leavesNothing(w, admin, a, b)
	if n, err := w.RedisClient().DBSize(t.Context()).Result(); err != nil || n != 0 {
		t.Errorf("database 0 holds %d keys, %v", n, err)
	}
	wantNoRefusal(t, admin)
	denied, err := admin.ACLLog(t.Context(), 10).Result()
	if err != nil || len(denied) > 0 {
		t.Errorf("denied: %v, %v", denied, err)
	}
	stats, err := admin.Info(t.Context(), "commandstats").Result()
	if err != nil {
		t.Fatal(err)
	}
	for _, rule := range rules {
		if command, ok := strings.CutPrefix(rule, "+"); ok && !strings.Contains(stats, "cmdstat_"+command+":") {
			t.Errorf("docs/operations.md grants %s, which is not used", command)
		}
	}
	for _, p := range []*harness.Pod{a, b} {
		if strings.Contains(p.Log.Text(), password) {
			t.Errorf("the log of %s holds the password", p.ID)
		}
	}
}

// TestRedisMissingRights: where a right of docs/operations.md is missing, a pod waits and names it; it starts when it is granted. One that is
// taken away later is a warning.
func TestRedisMissingRights(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const password = "password-of-an-acl-user"
	for _, right := range []struct{ rule, says string }{
		{"~session:*", "GETEX on session:*"}, {"~ack_floor:*", "SET on ack_floor:*"}, {"~generation:*", "GET on generation:*"}, {"~pods", "SMEMBERS on pods"},
		{"~note:*", "HSET on note:*"}, {"~route:*", "SADD on route:*"}, {"+getex", "GETEX on session:*"}, {"+del", "DEL on pod:*"}, {"+srem", "SREM on route:*"},
		{"+evalsha", "EVALSHA on pod:*"}, {"+hdel", "HDEL on note:*"}, {"+pexpire", "PEXPIRE on note:*"},
	} {
		t.Run(right.rule, func(t *testing.T) {
			t.Parallel()
			rules := slices.DeleteFunc(aclRules(t, password), func(rule string) bool { return rule == right.rule })
			w := harness.New(t, harness.RedisArgs(rules...), harness.Settings("REDIS_USERNAME=daisi", "REDIS_PASSWORD="+password, "POD_LEASE=1500ms"))
			pod := w.Launch()
			pod.WaitListening()
			if line := pod.WantLine("redis refuses this user"); !strings.Contains(line, right.says) {
				t.Errorf("want %q named by %s", right.says, line)
			}
			if pod.Ready() {
				t.Error("ready without a right that it needs")
			}
			admin := w.RedisClient()
			grant := func(rules ...string) {
				if err := admin.ACLSetUser(t.Context(), "daisi", rules...).Err(); err != nil {
					t.Fatal(err)
				}
			}
			grant(right.rule)
			pod.WaitReady()
			pod.Connect(harness.User("acme", "desk1", "ann")).WantEvent(w.Chat("acme", "desk1"))
			grant("-hgetall") // in each renewal
			pod.WantLine("Redis refuses this user a command")
		})
	}
}

// TestRedisTLS: by TLS both ways and with a password of the default user; without a client certificate, or with a CA that
// did not sign the server's, the service waits and says why.
func TestRedisTLS(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.NoRedis())
	ca, stranger := w.CA("redis-ca"), w.CA("strange-ca")
	cert, key := w.Issue(ca, "redis")
	mine, mineKey := w.Issue(ca, "pod")
	r := w.StartRedis("--port", "0", "--tls-port", "$PORT", "--tls-cert-file", cert, "--tls-key-file", key, "--tls-ca-cert-file", ca.File,
		"--tls-auth-clients", "yes", "--requirepass", "password-of-all")
	settings := []string{"REDIS_TLS=true", "REDIS_TLS_CA_FILE=" + ca.File, "REDIS_TLS_CERT_FILE=" + mine, "REDIS_TLS_KEY_FILE=" + mineKey,
		"REDIS_PASSWORD=password-of-all"}
	for name, tc := range map[string]struct {
		settings []string
		says     string
	}{
		"stranger":    {[]string{"REDIS_TLS_CA_FILE=" + stranger.File}, "certificate signed by unknown authority"},
		"anonymous":   {[]string{"REDIS_TLS_CERT_FILE=", "REDIS_TLS_KEY_FILE="}, "certificate required"},
		"no password": {[]string{"REDIS_PASSWORD="}, "NOAUTH"},
		"wrong one":   {[]string{"REDIS_PASSWORD=guessed"}, "WRONGPASS"},
	} {
		p := w.Launch(append(slices.Clone(settings), tc.settings...)...)
		p.WaitListening()
		_, err := p.Log.Find(harness.Within(t, harness.Patience), func(line string) bool {
			return strings.Contains(line, "waiting for Redis") && strings.Contains(line, tc.says)
		})
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		p.WantRefused(harness.User("acme", "desk1", "ann"), 503, "Unavailable")
		p.Kill()
	}
	a, b := w.Start(settings...), w.Start(settings...)
	wantEverything(w, a, b, "desk1", "desk2")
	leavesNothing(w, tlsClient(t, r.Address(), ca, mine, mineKey), a, b)
}

func tlsClient(t *testing.T, address string, ca *rig.CA, cert, key string) *redis.Client {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	pem, err := os.ReadFile(ca.File)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	c := redis.NewClient(&redis.Options{Addr: address, Password: "password-of-all", TLSConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}})
	t.Cleanup(func() { c.Close() })
	return c
}

// clusterClient is closed at the end of the test.
func clusterClient(t *testing.T, cluster *rig.RedisCluster) *redis.ClusterClient {
	rdb := redis.NewClusterClient(&redis.ClusterOptions{Addrs: strings.Split(cluster.Addresses(), ",")})
	t.Cleanup(func() { rdb.Close() })
	return rdb
}

// TestRedisCluster: three masters. Sessions of every master are opened and taken over, so that a script with keys of two
// slots would have failed.
func TestRedisCluster(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	const password = "password-of-an-acl-user"
	more := strings.Fields(operations(t, "a cluster also needs `(.*?)`\\)"))
	w := harness.New(t, harness.NoRedis(), harness.Settings("REDIS_USERNAME=daisi", "REDIS_PASSWORD="+password))
	cluster := w.RedisCluster(3, append(aclRules(t, password), more...)...)
	rdb := clusterClient(t, cluster)
	a, b := w.Start(), w.Start()
	wantEverything(w, a, b, agentsOfAllMasters(t, rdb)...)

	unused := slices.Clone(more)
	for i, node := range cluster.Nodes {
		c := redis.NewClient(&redis.Options{Addr: node.Address()})
		defer c.Close()
		wantNoRefusal(t, c)
		stats, err := c.Info(t.Context(), "commandstats").Result()
		if err != nil {
			t.Fatal(err)
		}
		if denied, err := c.ACLLog(t.Context(), 10).Result(); err != nil || len(denied) > 0 {
			t.Errorf("denied by node %d: %v, %v", i, denied, err)
		}
		unused = slices.DeleteFunc(unused, func(rule string) bool { return strings.Contains(stats, "cmdstat_"+strings.TrimPrefix(rule, "+")+":") })
	}
	if len(unused) > 0 {
		t.Errorf("docs/operations.md grants %v for a cluster, which is not used", unused)
	}
	for _, p := range []*harness.Pod{a, b} {
		p.Terminate()
		p.WantExit(0, 2*harness.Patience)
	}
}

// agentsOfAllMasters names agents whose users ann have their sessions on different masters, two on each.
func agentsOfAllMasters(t *testing.T, rdb *redis.ClusterClient) []string {
	t.Helper()
	var agents []string
	on := map[string]int{}
	for i := 0; len(agents) < 6; i++ {
		agent := fmt.Sprintf("desk%d", i)
		master, err := rdb.MasterForKey(t.Context(), "session:acme:"+agent+":ann")
		if err != nil {
			t.Fatal(err)
		}
		if addr := master.Options().Addr; on[addr] < 2 {
			on[addr]++
			agents = append(agents, agent)
		}
	}
	return agents
}

// wantClaimed waits until Redis holds everything that the clients' pods have to claim, under the lives of their leases.
func wantClaimed(w *harness.World, rdb redis.UniversalClient, clients []*harness.Client) {
	w.T.Helper()
	why := ""
	defer func() {
		if w.T.Failed() {
			w.T.Log(why)
		}
	}()
	harness.Eventually(w.T, 2*harness.Patience, "everything to be claimed again", func() bool {
		for _, c := range clients {
			if why = unclaimed(w.T.Context(), rdb, c); why != "" {
				return false
			}
		}
		return true
	})
}

// memberFor names the pod of c with the life that its lease has now.
func memberFor(ctx context.Context, rdb redis.UniversalClient, c *harness.Client) string {
	life, _, _ := strings.Cut(rdb.Get(ctx, "pod:"+c.Pod.ID).Val(), " ")
	return c.Pod.ID + "#" + life
}

// unclaimed says what Redis does not hold of what it should for c: the claim of its agent, and its session.
func unclaimed(ctx context.Context, rdb redis.UniversalClient, c *harness.Client) string {
	if why := noOwner(ctx, rdb, c); why != "" {
		return why
	}
	member, key := memberFor(ctx, rdb, c), lockOf(c.Dial)
	if lock, err := rdb.Get(ctx, key).Result(); err != nil || !strings.HasPrefix(lock, member+"#") {
		return fmt.Sprintf("%s is %q (%v), want that of %s", key, lock, err, member)
	}
	return ""
}

// noOwner says what is wrong where Redis does not hold the claim of c's pod on its agent.
func noOwner(ctx context.Context, rdb redis.UniversalClient, c *harness.Client) string {
	member, key := memberFor(ctx, rdb, c), "route:"+c.Dial.Company+":"+c.Dial.Agent
	names, err := rdb.SMembers(ctx, key).Result()
	if !slices.ContainsFunc(names, func(name string) bool { return memberOf(name) == member }) {
		return fmt.Sprintf("%s is no member of %s: %v (%v)", member, key, names, err)
	}
	return ""
}

// wantNewcomers waits until both pods let sockets in again, and each gets its events.
func wantNewcomers(w *harness.World, pods []*harness.Pod, agent string) {
	w.T.Helper()
	for _, pod := range pods {
		var c *harness.Client
		harness.Eventually(w.T, 2*harness.Patience, "a new socket on "+pod.ID, func() bool {
			c, _, _ = pod.TryDial(harness.Within(w.T, harness.Patience), harness.User("acme", agent, pod.ID))
			return c != nil
		})
		c.WantReady()
		c.SelectChat("c9")
		c.WaitEvent(w.Chat("acme", agent))
		c.WaitEvent(w.Message("acme", agent, "c9"))
		c.Close(1000, "")
	}
}

// wantOnlyGaps looks at what a socket got beside its events: gaps, if any, for reason owner, and no close.
func wantOnlyGaps(c *harness.Client) {
	t := c.Pod.W.T
	t.Helper()
	if end := c.Ended(); end != nil {
		t.Errorf("the socket of %s was closed: %+v", c.Dial.Agent, *end)
	}
	for _, m := range c.Others() {
		if m.Type != "gap" || !strings.Contains(string(m.Payload), `"reason":"owner"`) {
			t.Errorf("the socket of %s got %s", c.Dial.Agent, m.Raw)
		}
	}
}

// waitRenewed waits until the pod of that id has renewed its lease once more.
func waitRenewed(t *testing.T, rdb redis.UniversalClient, id string) {
	t.Helper()
	lowest := time.Hour
	harness.Eventually(t, harness.Patience, "a renewal of "+id, func() bool {
		left, err := rdb.PTTL(t.Context(), "pod:"+id).Result()
		if err == nil {
			lowest = min(lowest, left)
		}
		return left > lowest
	})
}

// TestRedisClusterNode: the master that every renewal needs is killed and comes back with its data. Events flow all the time.
func TestRedisClusterNode(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.NoRedis())
	cluster := w.RedisCluster(3)
	rdb := clusterClient(t, cluster)
	pods := []*harness.Pod{w.Start(), w.Start()}
	agents := agentsOfAllMasters(t, rdb)
	clients := openOffice(pods, agents)
	f := w.Flow(100, chatsOf(agents))
	master, err := rdb.MasterForKey(t.Context(), "pods")
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(cluster.Nodes, func(r *rig.Redis) bool { return r.Address() == master.Options().Addr })
	cluster.Nodes[i].Kill()
	for _, p := range pods {
		p.WantLine("Redis is away")
		p.WantRefused(harness.User("acme", "desk99", "ann"), 503, "Unavailable")
	}
	if err := cluster.Nodes[i].Restart(); err != nil {
		t.Fatal(err)
	}
	wantNewcomers(w, pods, "desk99")
	wantClaimed(w, rdb, clients)
	wantFlow(f, clients)
	for _, p := range pods {
		p.WantLedgers()
	}
}

// TestRedisClusterStandsStill: one master of the cluster answers nothing for seconds and then goes on, with all that it had. Its
// sockets have missed nothing and are told of no gap.
func TestRedisClusterStandsStill(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	w := harness.New(t, harness.NoRedis())
	cluster := w.RedisCluster(3)
	rdb := clusterClient(t, cluster)
	at := func(key string) string {
		master, err := rdb.MasterForKey(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		return master.Options().Addr
	}
	id := "blue" // the lease shall be renewed all the time
	for at("pod:"+id) != at("pods") {
		id += "e"
	}
	p := w.Start("SERVER_POD_ID=" + id)
	c := p.Connect(harness.User("acme", "desk1", "ann"))
	i := slices.IndexFunc(cluster.Nodes, func(r *rig.Redis) bool { return r.Address() != at("pods") })
	node := cluster.Nodes[i].Process()
	waitRenewed(t, rdb, id) // and it has seen all masters
	node.Signal(syscall.SIGSTOP)
	p.WantLine("Redis is away")
	node.Signal(syscall.SIGCONT)
	p.WantLine("Redis is back")
	waitRenewed(t, rdb, id)
	c.WaitEvent(w.Chat("acme", "desk1"))
	if others := c.Others(); len(others) > 0 {
		t.Errorf("the socket got %s", others[0].Raw)
	}
	if strings.Contains(p.Log.Text(), "lost writes") {
		t.Error("the pod believes that Redis lost writes")
	}
}

// TestRedisSentinel: the master is lost and the replica takes over: the pods follow, claim everything again, and keep their
// sockets, which miss nothing; new ones come. A master that is killed closes its connections at once, and comes back as
// the replica that takes over the second time; one that hangs leaves them open, and believes to be master for a moment
// when it wakes up.
func TestRedisSentinel(t *testing.T) {
	t.Parallel()
	harness.NeedRealRedis(t)
	for name, fault := range map[string]struct {
		times int
		lose  func(*rig.Redis)
		back  func(*rig.Redis) error
	}{
		"killed": {2, (*rig.Redis).Kill, (*rig.Redis).Restart},
		"hangs": {
			1,
			func(r *rig.Redis) { r.Process().Signal(syscall.SIGSTOP) },
			func(r *rig.Redis) error { return r.Process().Signal(syscall.SIGCONT) },
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.NoRedis())
			s := w.Sentinels()
			pods := []*harness.Pod{w.Start(), w.Start()}
			wantEverything(w, pods[0], pods[1], "desk1")
			agents := []string{"desk1", "desk2", "desk3", "desk4", "desk5"}
			clients := openOffice(pods, agents)
			f := w.Flow(100, chatsOf(agents))
			for turn := range fault.times {
				if err := s.Settled(); err != nil {
					t.Fatal(err)
				}
				old := masterOf(t, s)
				begin := time.Now()
				fault.lose(old)
				harness.Eventually(t, 2*harness.Patience, "a fail-over", func() bool {
					now, err := s.Master()
					return err == nil && now != old
				})
				promoted := time.Since(begin)
				for _, p := range pods {
					harness.Eventually(t, harness.Patience, p.ID+" to follow", func() bool {
						return strings.Count(p.Log.Text(), "Redis was restarted, failed over") > turn
					})
				}
				rdb := redis.NewClient(&redis.Options{Addr: masterOf(t, s).Address(), Password: rig.ReplicaPassword})
				defer rdb.Close()
				wantNewcomers(w, pods, "desk9")
				wantClaimed(w, rdb, clients)
				t.Logf("fail-over after %v, everything claimed again after %v", promoted, time.Since(begin))
				if err := fault.back(old); err != nil {
					t.Fatal(err)
				}
			}
			wantNewcomers(w, pods, "desk8")
			wantFlow(f, clients)
			for _, p := range pods {
				p.WantLedgers()
			}
		})
	}
}

func masterOf(t *testing.T, s *rig.Sentinels) *rig.Redis {
	t.Helper()
	r, err := s.Master()
	if err != nil {
		t.Fatal(err)
	}
	return r
}
