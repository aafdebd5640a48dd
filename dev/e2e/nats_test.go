package e2e

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// natsRights are those of the service's user in docs/operations.md, for the default names.
func natsRights(t *testing.T) (publish, subscribe []string) {
	t.Helper()
	list := &publish
	for line := range strings.Lines(operations(t, "\n```\n(publish: (?s:.*?))```")) {
		line, _, _ = strings.Cut(line, "(") // a remark
		for _, f := range strings.Fields(line) {
			switch f {
			case "publish:":
			case "subscribe:":
				list = &subscribe
			default:
				*list = append(*list, f)
			}
		}
	}
	return publish, subscribe
}

// defaultNames gives the World, made without a stream, the names that the rights are for.
func defaultNames(w *harness.World) {
	w.Stream, w.Prefix, w.Consumer = "wa_stream", "wa", "ws_fanout"
}

const (
	natsPassword = "password-of-the-service"
	publisher    = `{user: publisher, password: "password-of-the-publisher"}`
)

// natsUser is a user of a NATS server's configuration.
func natsUser(name string, publish, subscribe []string) string {
	return fmt.Sprintf("{user: %s, password: %q, permissions: {publish: [%s], subscribe: [%s]}}",
		name, natsPassword, quoted(publish), quoted(subscribe))
}

func quoted(list []string) string {
	var q []string
	for _, s := range list {
		q = append(q, fmt.Sprintf("%q", s))
	}
	return strings.Join(q, ", ")
}

func authorization(users ...string) string {
	return "authorization { users: [" + strings.Join(users, ", ") + "] }"
}

func urlAs(w *harness.World, user, password string) string {
	return "NATS_URL=nats://" + user + ":" + password + "@" + w.NATS.Address()
}

// wantNoViolation wants that nothing was refused to the pods, and that no log knows their password.
func wantNoViolation(w *harness.World, pods ...*harness.Pod) {
	w.T.Helper()
	if log := w.NATS.Process().Log; strings.Contains(log.Text(), "Violation") {
		w.T.Errorf("NATS refused something (log: %s)", log.Path)
	}
	for _, p := range pods {
		if strings.Contains(p.Log.Text(), "NATS reports") || strings.Contains(p.Log.Text(), natsPassword) {
			w.T.Errorf("%s complains of NATS, or its log knows the password (log: %s)", p.ID, p.Log.Path)
		}
	}
}

// TestNATSLeastRights: user and password in the URL, and the rights of docs/operations.md: none is missing.
func TestNATSLeastRights(t *testing.T) {
	t.Parallel()
	publish, subscribe := natsRights(t)
	w := harness.New(t, harness.OwnNATS(authorization(publisher, natsUser("service", publish, subscribe))),
		harness.NATSOptions(nats.UserInfo("publisher", "password-of-the-publisher")), harness.NoStream())
	defaultNames(w)
	a := w.Start(urlAs(w, "service", natsPassword), "NATS_CREATE_STREAM=true")
	b := w.Start(urlAs(w, "service", natsPassword))
	wantEverything(w, a, b, "desk1")
	for _, p := range []*harness.Pod{a, b} {
		p.Terminate()
		p.WantExit(0, 2*harness.Patience)
	}
	wantNoViolation(w, a, b)
}

// TestNATSEachRight: none of the rights in docs/operations.md is there for nothing, and the log says which one is missing.
func TestNATSEachRight(t *testing.T) {
	t.Parallel()
	publish, subscribe := natsRights(t)
	users := []string{publisher, natsUser("deaf", publish, []string{"nothing"})}
	missing := map[string]string{"deaf": subscribe[0]}
	for i, right := range publish {
		name := fmt.Sprintf("without%d", i)
		missing[name] = right
		users = append(users, natsUser(name, slices.Concat(publish[:i], publish[i+1:]), subscribe))
	}
	w := harness.New(t, harness.OwnNATS(authorization(users...)),
		harness.NATSOptions(nats.UserInfo("publisher", "password-of-the-publisher")), harness.NoStream())
	defaultNames(w)
	for name, right := range missing {
		p := w.Launch(urlAs(w, name, natsPassword), "NATS_CREATE_STREAM=true")
		p.WaitListening()
		if strings.HasPrefix(right, "$JS.ACK") || strings.Contains(right, "MSG.GET") || strings.Contains(right, "DIRECT.GET") {
			p.WaitReady()
			c := p.Connect(harness.User("acme", "desk1", "ann"))
			first, second := w.Chat("acme", "desk1"), w.Chat("acme", "desk1")
			c.WaitEvent(second)
			p.Dial(harness.User("acme", "desk1", "bob").From(harness.Place{Seq: first, Stream: c.Ready.Stream}))
		}
		if strings.Contains(right, "CONSUMER.DELETE") {
			p.WaitReady()
			setFilter(w, w.Prefix+".nobody.>")
		}
		subject, _, _ := strings.Cut(right, ">")
		_, err := p.Log.Find(harness.Within(t, harness.Patience), func(line string) bool {
			return strings.Contains(strings.ToLower(line), "permissions violation") && strings.Contains(line, subject)
		})
		if err != nil {
			t.Errorf("without the right %s: %v", right, err)
		}
		p.Kill()
		w.JS.DeleteStream(harness.Within(t, harness.Patience), w.Stream) // which some of them could make
	}
}

// TestNATSRefusesUser: a service whose password NATS does not know says so and waits until it does: at the start, and when a
// server that is configured anew refuses it for a while.
func TestNATSRefusesUser(t *testing.T) {
	t.Parallel()
	publish, subscribe := []string{">"}, []string{">"}
	known, unknown := authorization(publisher, natsUser("service", publish, subscribe)), authorization(publisher, natsUser("other", publish, subscribe))
	w := harness.New(t, harness.OwnNATS(unknown), harness.NATSOptions(nats.UserInfo("publisher", "password-of-the-publisher")))
	reconfigure := func(conf string) {
		w.NATS.Kill()
		if err := w.NATS.Configure(conf); err != nil {
			t.Fatal(err)
		}
		if err := w.NATS.Restart(); err != nil {
			t.Fatal(err)
		}
	}
	refused := func(n int) {
		harness.Eventually(t, harness.Patience, "NATS to refuse the service", func() bool {
			return strings.Count(w.NATS.Process().Log.Text(), "authentication error - User \"service\"") >= n
		})
	}
	p := w.Launch(urlAs(w, "service", natsPassword))
	p.WaitListening()
	refused(5)
	p.WantLine("Authorization Violation")
	reconfigure(known)
	p.WaitReady()
	c := p.Connect(harness.User("acme", "desk1", "ann"))
	c.WaitEvent(w.Chat("acme", "desk1"))
	reconfigure(unknown)
	refused(5)
	reconfigure(known)
	p.WaitReady()
	c.WaitEvent(w.Chat("acme", "desk1"))
	if strings.Contains(p.Log.Text(), natsPassword) {
		t.Errorf("the log of %s knows the password", p.ID)
	}
}

// TestNATSCredentials: a credentials file of an account in operator mode, with the rights of docs/operations.md in the
// user's token.
func TestNATSCredentials(t *testing.T) {
	t.Parallel()
	operator, err := rig.NewOperator()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	write := func(name string, o *rig.Operator, publish, subscribe []string) string {
		file := filepath.Join(dir, name+".creds")
		if err := o.WriteCredentials(file, publish, subscribe); err != nil {
			t.Fatal(err)
		}
		return file
	}
	publish, subscribe := natsRights(t)
	mine := write("service", operator, publish, subscribe)
	w := harness.New(t, harness.OwnNATS(operator.Conf...), harness.NoStream(),
		harness.NATSOptions(nats.UserCredentials(write("publisher", operator, nil, nil))))
	defaultNames(w)
	w.MakeStream(func(*jetstream.StreamConfig) {})
	a, b := w.Start("NATS_CREDS_FILE="+mine), w.Start("NATS_CREDS_FILE="+mine)
	wantEverything(w, a, b, "desk1")
	wantNoViolation(w, a, b)

	other, err := rig.NewOperator()
	if err != nil {
		t.Fatal(err)
	}
	stranger := w.Launch("NATS_CREDS_FILE=" + write("stranger", other, nil, nil))
	stranger.WaitListening()
	stranger.WantLine("Authorization Violation")
}

// TestNATSNKey: a seed file names the user; one that the server does not know waits and says why.
func TestNATSNKey(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	seed := func(name string) (file, public string) {
		file = filepath.Join(dir, name+".nk")
		public, err := rig.WriteNKey(file)
		if err != nil {
			t.Fatal(err)
		}
		return file, public
	}
	mine, user := seed("service")
	other, _ := seed("stranger")
	publish, subscribe := natsRights(t)
	w := harness.New(t, harness.OwnNATS(authorization(publisher, fmt.Sprintf("{nkey: %s, permissions: {publish: [%s], subscribe: [%s]}}", user, quoted(publish), quoted(subscribe)))),
		harness.NATSOptions(nats.UserInfo("publisher", "password-of-the-publisher")), harness.NoStream())
	defaultNames(w)
	w.MakeStream(func(*jetstream.StreamConfig) {})
	a, b := w.Start("NATS_NKEY_FILE="+mine), w.Start("NATS_NKEY_FILE="+mine)
	wantEverything(w, a, b, "desk1")
	wantNoViolation(w, a, b)
	stranger := w.Launch("NATS_NKEY_FILE=" + other)
	stranger.WaitListening()
	stranger.WantLine("Authorization Violation")
}

// TestLeafNode: the pods are at a leaf node that has a JetStream of its own, the stream is in the hub's domain.
func TestLeafNode(t *testing.T) {
	t.Parallel()
	for _, setting := range []string{"NATS_JS_DOMAIN=hub", "NATS_JS_API_PREFIX=$JS.hub.API"} {
		t.Run(setting, func(t *testing.T) {
			t.Parallel()
			w := harness.New(t, harness.LeafNATS())
			a, b := w.Start(setting), w.Start(setting)
			wantEverything(w, a, b, "desk1")
			made := w.ConsumerInfo().Created
			if err := w.JS.DeleteConsumer(harness.Within(t, harness.Patience), w.Stream, w.Consumer); err != nil {
				t.Fatal(err)
			}
			consumerBack(w, made)
			a.WaitReady()
			a.Connect(harness.User("acme", "desk1", "ann")).WaitEvent(w.Chat("acme", "desk1"))
			w.Settled()
		})
	}
}

// TestImportedJetStream: the stream belongs to another account, whose API is imported under another prefix.
func TestImportedJetStream(t *testing.T) {
	t.Parallel()
	w := harness.New(t, harness.OwnNATS(`accounts {
		OWNER: {
			jetstream: enabled
			users: [`+publisher+`]
			exports: [
				{service: "$JS.API.>", response_type: stream}
				{service: "$JS.ACK.>"}
			]
		}
		GUEST: {
			users: [{user: service, password: "`+natsPassword+`"}]
			imports: [
				{service: {account: OWNER, subject: "$JS.API.>"}, to: "owner.API.>"}
				{service: {account: OWNER, subject: "$JS.ACK.>"}}
			]
		}
	}`), harness.NATSOptions(nats.UserInfo("publisher", "password-of-the-publisher")))
	a := w.Start(urlAs(w, "service", natsPassword), "NATS_JS_API_PREFIX=owner.API")
	b := w.Start(urlAs(w, "service", natsPassword), "NATS_JS_API_PREFIX=owner.API")
	wantEverything(w, a, b, "desk1")
	wantNoViolation(w, a, b)
}

// TestNATSTLS: certificates both ways; a pod that cannot prove itself, or meets a server that it does not trust, waits and
// says why.
func TestNATSTLS(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	ca, err := rig.NewCA(dir, "nats-ca")
	if err != nil {
		t.Fatal(err)
	}
	stranger, err := rig.NewCA(dir, "strange-ca")
	if err != nil {
		t.Fatal(err)
	}
	issue := func(name string) (cert, key string) {
		cert, key, err := ca.Issue(name)
		if err != nil {
			t.Fatal(err)
		}
		return cert, key
	}
	cert, key := issue("server")
	mine, mineKey := issue("pod")
	w := harness.New(t, harness.OwnNATS(fmt.Sprintf("tls { cert_file: %q, key_file: %q, ca_file: %q, verify: true }", cert, key, ca.File)),
		harness.NATSOptions(nats.RootCAs(ca.File), nats.ClientCert(mine, mineKey)))
	settings := []string{"NATS_TLS_CA_FILE=" + ca.File, "NATS_TLS_CERT_FILE=" + mine, "NATS_TLS_KEY_FILE=" + mineKey}
	for says, other := range map[string][]string{
		"certificate signed by unknown authority": {"NATS_TLS_CA_FILE=" + stranger.File},
		"certificate required":                    {"NATS_TLS_CERT_FILE=", "NATS_TLS_KEY_FILE="},
	} {
		p := w.Launch(slices.Concat(settings, other)...)
		p.WaitListening()
		p.WantLine(says)
		p.Kill()
	}
	a, b := w.Start(settings...), w.Start(settings...)
	wantEverything(w, a, b, "desk1")
	wantNoViolation(w, a, b)
}

// TestNATSCluster: a stream with three replicas on three servers, 500 events a second, while leaders of consumer and stream
// step down and are killed. Every event arrives, and no pause is longer than two elections (up to 9 s each, by the servers'
// own time-outs).
func TestNATSCluster(t *testing.T) {
	t.Parallel()
	const rate = 500
	w := harness.New(t, harness.NATSCluster(3), harness.NoStream(),
		// An ack that no leader heard is made good by a redelivery: sooner than after the 30 s of the default. What waited
		// for an election comes in one burst, which a ring of the default size may have to drop the beginning of.
		harness.Settings("NATS_ACK_WAIT=12s", "WEBSOCKET_WRITE_TIMEOUT=4s", "WEBSOCKET_BLOCK_TIMEOUT=1s", "WEBSOCKET_BUFFER_SIZE=8192", "LOG_LEVEL=debug"))
	makeReplicated(w)
	pods := []*harness.Pod{w.Start(), w.Start()}
	var agents []string
	for i := range 10 {
		agents = append(agents, fmt.Sprintf("desk%d", i))
	}
	clients := openOffice(pods, agents)
	w.WantReplicated()
	f := w.Flow(rate, chatsOf(agents))
	seen := clients[0]
	for _, step := range []struct {
		what string
		do   func() (back func())
	}{
		{"the consumer's leader steps down", func() func() { return stepDown(w, "CONSUMER", w.Stream+"."+w.Consumer) }},
		{"the stream's leader steps down", func() func() { return stepDown(w, "STREAM", w.Stream) }},
		{"the consumer's leader is killed", func() func() { return killNode(w, w.ConsumerInfo().Cluster.Leader) }},
		{"the stream's leader is killed", func() func() { return killNode(w, streamLeader(w)) }},
	} {
		begin := time.Now()
		back := step.do()
		seen.WaitEvent(publishAnyhow(w, seen.Dial.Agent)) // it has passed the new leader
		t.Logf("%s: events flow again after %v", step.what, time.Since(begin))
		back()
		w.WantReplicated()
	}
	if longest := wantFlow(f, clients); longest > 20*time.Second {
		t.Errorf("nobody got any event for %v", longest)
	}
	w.Settled()
	for _, p := range pods {
		p.WantLedgers()
	}
}

// makeReplicated makes the World's stream with three replicas, as soon as the servers have elected a leader.
func makeReplicated(w *harness.World) {
	w.T.Helper()
	cfg := jetstream.StreamConfig{Name: w.Stream, Subjects: []string{w.Prefix + ".>"}, MaxAge: 24 * time.Hour, Replicas: 3, AllowDirect: true}
	var err error
	defer func() {
		if w.T.Failed() {
			w.T.Log(err)
		}
	}()
	harness.Eventually(w.T, 3*harness.Patience, "the cluster to make a stream", func() bool {
		_, err = w.JS.CreateStream(harness.Within(w.T, 2*time.Second), cfg) // nobody answers before there is a leader
		return err == nil
	})
}

// publishAnyhow publishes an event until the stream has acknowledged it: what was on its way through a server that was killed
// is never answered.
func publishAnyhow(w *harness.World, agent string) (seq uint64) {
	w.T.Helper()
	ev := feed.Contact("acme", agent, "628222@c.us")
	harness.Eventually(w.T, 2*harness.Patience, "the stream to take an event", func() bool {
		ack, err := w.JS.Publish(harness.Within(w.T, time.Second), w.Prefix+"."+ev.Subject, ev.Payload)
		if err == nil {
			seq = ack.Sequence
		}
		return err == nil
	})
	return seq
}

func stepDown(w *harness.World, kind, name string) func() {
	w.T.Helper()
	reply, err := w.NC.Request("$JS.API."+kind+".LEADER.STEPDOWN."+name, nil, harness.Patience)
	if err != nil || !strings.Contains(string(reply.Data), `"success":true`) {
		w.T.Fatalf("step-down of %s: %v %v", name, reply, err)
	}
	return func() {}
}

// killNode kills the server of that name; back starts it again.
func killNode(w *harness.World, name string) (back func()) {
	w.T.Helper()
	i := slices.IndexFunc(w.Nodes, func(n *rig.NATS) bool { return n.Name() == name })
	if i < 0 {
		w.T.Fatalf("no server is called %q", name)
	}
	w.Nodes[i].Kill()
	return func() {
		w.T.Helper()
		if err := w.Nodes[i].Restart(); err != nil {
			w.T.Fatal(err)
		}
	}
}

func streamLeader(w *harness.World) string {
	w.T.Helper()
	ctx := harness.Within(w.T, harness.Patience)
	s, err := w.JS.Stream(ctx, w.Stream)
	if err != nil {
		w.T.Fatal(err)
	}
	return s.CachedInfo().Cluster.Leader
}
