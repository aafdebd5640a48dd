package e2e

import (
	"cmp"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// matrix is what becomes of an event: for each fate of one of its targets, under each policy, what JetStream sees and what the
// two ledgers say. One pod, "here", pulls every event; the other, "there", only has sockets.
//
// where says who the event is for: "local" a socket here, "remote" one there, "several" one here that reads and one there
// that the fate befalls, "nobody".
//
// First H events are put into the ring of that socket where the fate needs one that does not read. Then the deed is done. jet
// is what JetStream's consumer says then, and goes on to say until something is mended: how many events are pending
// and how many of those were given out again; 0 pending means that the ack floor has reached the last event, else it stays
// below the first of them. events is the first ledger here at that time. At last it is mended, after which everything
// must be acked; finally is the first ledger then, here and there the second one of both pods. "x=2" is exactly 2,
// "x>0" depends on how often JetStream gave the event out meanwhile (a redelivery that finds the event still in the ring
// shares its outcome, so that one write may count as several); an outcome that is not named is 0. In the end each user has
// each event, some by the resume that a gap asks for, and none twice.
var matrix = []ackRow{
	{fate: "written", where: "local", jet: "0 0", deed: publish, finally: "delivered=1", here: "written=1"},
	{fate: "written", where: "remote", jet: "0 0", deed: publish, finally: "delivered=1", there: "written=1"},
	{fate: "written", where: "several", jet: "0 0", deed: publish, finally: "delivered=1", here: "written=1", there: "written=1"},

	// A full ring gives up its oldest: that one is acked, those in the ring wait.
	{fate: "dropped", where: "local", policy: "drop_oldest", full: true, deed: publish, jet: "H 0", events: "dropped=1", mend: read, finally: "dropped=1 delivered=H", here: "dropped=1 written=H"},
	{fate: "dropped", where: "remote", policy: "drop_oldest", full: true, deed: publish, jet: "H 0", events: "dropped=1", mend: read, finally: "dropped=1 delivered=H", there: "dropped=1 written=H"},
	{fate: "dropped", where: "several", policy: "drop_oldest", full: true, deed: publish, jet: "H 0", events: "dropped=1", mend: read, finally: "dropped=1 delivered=H", here: "written=1", there: "dropped=1 written=H"},
	{fate: "dropped", policy: "block", never: "block drops nothing"},

	// Behind a full ring an event waits for BLOCK_TIMEOUT; those in the ring are waited for longer.
	{fate: "waited for room", where: "local", policy: "block", full: true, deed: publish, jet: "H+1 1", events: "nak_failed>0", mend: read, finally: "nak_failed>0 delivered=H+1", here: "failed>0 written=H+1"},
	{fate: "waited for room", where: "remote", policy: "block", full: true, deed: publish, jet: "H+1 1", events: "nak_failed>0", mend: read, finally: "nak_failed>0 delivered=H+1", there: "failed>0 written=H+1"},
	{fate: "waited for room", where: "several", policy: "block", full: true, deed: publish, jet: "H+1 1", events: "nak_failed>0", mend: read, finally: "nak_failed>0 delivered=H+1", here: "written=1 duplicate>0", there: "failed>0 written=H+1"},
	{fate: "waited for room", policy: "drop_oldest", never: "nothing waits behind a ring: the oldest makes room"},

	// A message of a chat that is not selected is for nobody, or for one of two.
	{fate: "unselected", where: "local", deed: write, jet: "0 0", finally: "unselected=1", here: "unselected=1"},
	{fate: "unselected", where: "remote", deed: write, jet: "0 0", finally: "unselected=1", there: "unselected=1"},
	{fate: "unselected", where: "several", deed: write, jet: "0 0", finally: "unselected=1", here: "unselected=1", there: "unselected=1"},
	{fate: "selected by the other", where: "several", before: selectHere, deed: write, jet: "0 0", finally: "delivered=1", here: "written=1", there: "unselected=1"},

	// After WRITE_TIMEOUT the socket is closed as slow, and what waited for it is gone with it. Then its agent has no socket, or the
	// other one, which has had it all: that is acked, and fetched by the resume of who comes back.
	{fate: "waited out", where: "local", world: "hasty", stuck: true, deed: waitSlow, jet: "H H", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=H", here: "gone=H written=H"},
	{fate: "waited out", where: "remote", world: "hasty", stuck: true, deed: waitSlow, jet: "H H", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=H", here: "written=H", there: "gone=H"},
	{fate: "waited out", where: "several", world: "hasty", stuck: true, deed: waitSlow, jet: "0 0", events: "delivered=H", mend: resumeHere, finally: "delivered=H", there: "gone=H"},

	{fate: "socket died", where: "local", stuck: true, deed: die, jet: "H H", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=H", here: "gone=H written=H"},
	{fate: "socket died", where: "remote", stuck: true, deed: die, jet: "H H", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=H", here: "written=H", there: "gone=H"},
	{fate: "socket died", where: "several", stuck: true, deed: die, jet: "0 0", events: "delivered=H", mend: resumeHere, finally: "delivered=H", there: "gone=H"},

	// The stream to the peer breaks and no other can be made. What its socket holds meanwhile is joined by the redelivery.
	{fate: "peer failed", where: "remote", deed: cutAndPublish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", there: "written>0 duplicate>=0"},
	{fate: "peer failed", where: "several", deed: cutAndPublish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", here: "written=1 duplicate>0", there: "written>0 duplicate>=0"},
	{fate: "peer failed later", where: "remote", stuck: true, deed: cut, jet: "H H", events: "nak_failed>0", mend: restoreAndRead, finally: "nak_failed>0 delivered=H", there: "written>0 duplicate>=0"},
	{fate: "peer failed later", where: "several", stuck: true, deed: cut, jet: "H H", events: "nak_failed>0", mend: restoreAndRead, finally: "nak_failed>0 delivered=H", here: "duplicate>0", there: "written>0 duplicate>=0"},
	{fate: "peer failed", where: "local", never: "no peer has a part in it"},

	// The peer takes everything and answers nothing. Afterwards it may still find what was sent meanwhile.
	{fate: "no received", where: "remote", deed: holeAndPublish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", there: "written>0 duplicate>=0"},
	{fate: "no received", where: "several", deed: holeAndPublish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", here: "written=1 duplicate>0", there: "written>0 duplicate>=0"},
	{fate: "no received", where: "local", never: "no peer has a part in it"},

	// Nothing is sent to the peer but a probe now and then; the one that is answered closes the breaker.
	{fate: "breaker open", where: "remote", world: "breaker", before: openBreaker, deed: publish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", there: "written>0 duplicate>=0"},
	{fate: "breaker open", where: "several", world: "breaker", before: openBreaker, deed: publish, jet: "1 1", events: "nak_failed>0", mend: restore, finally: "nak_failed>0 delivered=1", here: "written=1 duplicate>0", there: "written>0 duplicate>=0"},
	{fate: "breaker open", where: "local", never: "no peer has a part in it"},

	// A claim of the peer that no socket stands behind: it says so. Then there is nobody, or the other one.
	{fate: "absent", where: "remote", before: claimInVain, deed: publish, jet: "1 1", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=1", here: "written=1"},
	{fate: "absent", where: "several", before: claimInVain, deed: publish, jet: "0 0", events: "delivered=1", finally: "delivered=1", here: "written=1"},
	{fate: "absent", where: "local", never: "a pod knows its own sockets"},
	{fate: "no owner", where: "nobody", deed: publish, jet: "1 1", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=1", here: "written=1"},

	// Without Redis' answer the event goes to every pod, and JetStream is told nothing. When Redis has answered, the owners get it,
	// those that had it say so, and it is settled.
	{fate: "Redis away", where: "local", world: "redis", before: away, deed: publish, jet: "1 0", mend: redisBack, finally: "delivered=1", here: "written=1"},
	{fate: "Redis away", where: "remote", world: "redis", before: away, deed: publish, jet: "1 0", mend: redisBack, finally: "delivered=1", there: "written=1 duplicate=1"},
	{fate: "Redis away", where: "several", world: "redis", before: away, deed: publish, jet: "1 0", mend: redisBack, finally: "delivered=1", here: "written=1", there: "written=1 duplicate=1"},
	{fate: "Redis away", where: "nobody", world: "redis", before: away, deed: publish, jet: "1 0", mend: redisBackAndCome, finally: "nak_no_owner>=0 delivered=1", here: "written=1"},

	// A drain waits for what is in hand, but not for ever. The ledgers of a pod that has ended can't be read: "here" is then
	// its successor, whom the events are given out to again.
	{fate: "drain here", where: "local", world: "drain", stuck: true, deed: drainHere, jet: "H 0", mend: succeed, finally: "delivered=H nak_no_owner>=0", here: "written=H"},
	{fate: "drain here", where: "remote", world: "drain", stuck: true, deed: drainHere, jet: "H 0", mend: succeedAndRead, finally: "delivered=H nak_failed>=0", there: "written>0 duplicate>=0"},
	{fate: "drain here", where: "several", world: "drain", stuck: true, deed: drainHere, jet: "H 0", mend: succeedAndRead, finally: "delivered=H nak_failed>=0", there: "written>0 duplicate>=0"},
	{fate: "drain there", where: "remote", world: "drain", stuck: true, deed: drainThere, jet: "H H", events: "nak_no_owner>0", mend: comeBack, finally: "nak_no_owner>0 delivered=H", here: "written=H"},
	{fate: "drain there", where: "several", world: "drain", stuck: true, deed: drainThere, jet: "0 0", events: "delivered=H", mend: resumeHere, finally: "delivered=H"},
	{fate: "drain there", where: "local", never: "that pod has no part in it"},
}

// ackRow is a row of the matrix.
type ackRow struct {
	fate, where string
	policy      string // the only one; "" = both
	never       string // why there is nothing to test
	world       string // with settings of its own; "" = patient
	stuck, full bool   // the socket does not read: its ring holds some events, or all that it can hold

	before  func(*act) // made ready, before the events that are counted
	deed    func(*act)
	jet     string
	events  string
	mend    func(*act)
	finally string
	here    string
	there   string
}

// ackWorlds are the settings of the worlds that rows share: those of "drain" have one each, since a pod of theirs ends.
var ackWorlds = map[string][]string{
	"patient": {calm, steady, "WEBSOCKET_WRITE_TIMEOUT=20s"},
	"hasty":   {calm, steady, "WEBSOCKET_WRITE_TIMEOUT=5s"},
	"breaker": {calm, "WEBSOCKET_WRITE_TIMEOUT=20s", "PEER_BREAKER_THRESHOLD=1", "PEER_BREAKER_OPEN=2s"},
	"redis":   {steady, "POD_LEASE=3s", "WEBSOCKET_WRITE_TIMEOUT=20s", "SESSION_REFRESH_INTERVAL=1s", "SESSION_TTL=5s"},
	"drain":   {calm, steady, "WEBSOCKET_WRITE_TIMEOUT=20s", "SERVER_DRAIN_SPREAD=100ms"},
}

const (
	ackRing = 4
	steady  = "PEER_BREAKER_THRESHOLD=100000"
)

// TestAckMatrix plays every row of the matrix.
func TestAckMatrix(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"drop_oldest", "block"} {
		for world := range ackWorlds {
			var rows []ackRow
			for _, r := range matrix {
				if r.never == "" && cmp.Or(r.policy, policy) == policy && cmp.Or(r.world, "patient") == world {
					rows = append(rows, r)
				}
			}
			if world != "drain" {
				t.Run(policy+"/"+world, func(t *testing.T) { playRows(t, policy, world, rows) })
				continue
			}
			for _, r := range rows {
				t.Run(policy+"/"+r.fate+", "+r.where, func(t *testing.T) { playRows(t, policy, world, []ackRow{r}) })
			}
		}
	}
}

// playRows plays rows one after the other in one world; each has an agent of its own.
func playRows(t *testing.T, policy, world string, rows []ackRow) {
	t.Parallel()
	if world == "redis" {
		harness.NeedRealRedis(t)
	}
	w := harness.New(t, harness.Settings(ackWorlds[world]...), harness.Settings("WEBSOCKET_DROP_POLICY="+policy, "WEBSOCKET_BUFFER_SIZE="+strconv.Itoa(ackRing), "WEBSOCKET_BLOCK_TIMEOUT=300ms",
		"NATS_NAK_DELAY=300ms", "PEER_TIMEOUT=500ms", "SERVER_SHUTDOWN_TIMEOUT=60s"))
	here := w.Start()
	idleConsumer(w)
	there, proxy := behindProxy(w, "NATS_CONSUMER_NAME=idle") // another consumer, which gives nothing out
	for i, r := range rows {
		ok := t.Run(r.fate+", "+r.where, func(t *testing.T) {
			w.T = t // what this row starts ends with it
			play(&act{w: w, here: here, there: there, proxy: proxy, agent: fmt.Sprintf("desk%d", i)}, r)
		})
		w.T = t
		if !ok {
			return
		}
	}
}

// act is a row being played.
type act struct {
	w           *harness.World
	here, there *harness.Pod
	proxy       *rig.Proxy // through which here reaches there
	agent       string
	sick        *harness.Client // whom the fate befalls; nil = nobody
	held        int             // H
	first       uint64          // sequence of the first event that counts; 0 = none yet
	seqs        []uint64        // of the events that count
	users       map[string][]*harness.Client
	was         map[*harness.Pod]harness.Series
}

func play(a *act, r ackRow) {
	if r.where == "several" {
		a.connect(a.here, "ann")
	}
	switch {
	case r.fate == "absent" || r.where == "nobody":
	case r.where == "local":
		a.sick = a.connect(a.here, "ann")
	default:
		a.sick = a.connect(a.there, "bob")
	}
	if r.stuck || r.full {
		a.stick(map[bool]int{false: 2, true: ackRing + 1}[r.full])
	}
	if r.before != nil {
		r.before(a)
	}
	a.note()
	r.deed(a)
	a.wantJet(r.jet, r.events)
	if r.mend != nil {
		r.mend(a)
	}
	a.wantJet("0 0", r.finally)
	a.wantTargets(a.here, r.here)
	for user := range a.users {
		a.wantAll(user)
	}
	if r.fate != "drain there" {
		a.wantTargets(a.there, r.there)
		a.wantLedger(a.there, "dws_events_total", "")
		a.there.WantLedgers()
	}
	a.here.WantLedgers()
}

func (a *act) connect(p *harness.Pod, user string) *harness.Client {
	d := harness.User("acme", a.agent, user).Positions()
	d.RcvBuf = 4096
	return a.meet(p.Dial(d))
}

// meet waits for a user's ready, which replayed events may precede.
func (a *act) meet(c *harness.Client) *harness.Client {
	a.w.T.Helper()
	c.TakeType("ready")
	user := c.Dial.User
	if a.users == nil {
		a.users = map[string][]*harness.Client{}
	}
	a.users[user] = append(a.users[user], c)
	return c
}

// wantAll waits until a user has had all events that count, over all its sockets, and none of them twice but by a replay: it
// answers a gap with resume, as a client should.
func (a *act) wantAll(user string) {
	a.w.T.Helper()
	sockets := a.users[user]
	last := sockets[len(sockets)-1]
	asked := false
	harness.Eventually(a.w.T, harness.Patience, fmt.Sprintf("%s to have all %d events, or a gap", user, len(a.seqs)), func() bool {
		got := seqsOf(sockets...)
		if !slices.ContainsFunc(a.seqs, func(seq uint64) bool { return got[seq] == 0 }) {
			return true
		}
		if !asked && slices.ContainsFunc(last.Others(), func(m harness.Message) bool { return m.Type == "gap" }) {
			asked = true
			last.Send(map[string]any{"type": "resume"})
		}
		return false
	})
	live := map[uint64]int{}
	for _, c := range sockets {
		for _, m := range c.Events() {
			if !m.Replay {
				live[m.Seq]++
			}
		}
	}
	for _, seq := range a.seqs {
		if live[seq] > 1 {
			a.w.T.Errorf("%s got event %d %d times", user, seq, live[seq])
		}
	}
}

// chat publishes an event so big that a socket which does not read takes few of them.
func (a *act) chat() uint64 {
	a.w.T.Helper()
	seq := a.w.PublishRaw(a.w.Prefix+".acme."+a.agent+".chats", big(256<<10))
	if a.first == 0 {
		a.first = seq
	}
	a.seqs = append(a.seqs, seq)
	return seq
}

// forget makes the next event the first that counts.
func (a *act) forget() { a.first, a.seqs = 0, nil }

// stick makes the sick client stop reading and publishes until n events are held in its ring.
func (a *act) stick(n int) {
	a.w.T.Helper()
	a.sick.Pause()
	used := func() int { return int(a.sick.Pod.Metric("dws_websocket_buffer_used")) }
	full := false
	for a.held < n {
		if a.held == 0 {
			a.forget()
		}
		seq := a.chat()
		// What the kernel takes it takes at once; what is still there after a while stays.
		harness.Eventually(a.w.T, harness.Patience, "the event to be pulled", func() bool {
			return a.w.ConsumerInfo().Delivered.Stream >= seq
		})
		if full {
			a.held++
			harness.Eventually(a.w.T, harness.Patience, "the event to be held", func() bool { return used() == a.held })
			continue
		}
		for since := time.Now(); a.w.ConsumerInfo().NumAckPending > 0; {
			if full = time.Since(since) > time.Second && used() == 1; full {
				a.held = 1
				break
			}
		}
	}
	harness.Eventually(a.w.T, harness.Patience, "all but what is held to be settled", func() bool {
		return a.here.Metric("dws_events_in_hand") == float64(a.held) && a.w.ConsumerInfo().NumAckPending == a.held
	})
}

// note remembers what both pods have counted so far.
func (a *act) note() {
	a.was = map[*harness.Pod]harness.Series{a.here: a.here.Metrics(), a.there: a.there.Metrics()}
}

// expect compares counts with what a row says; "" when they agree.
func (a *act) expect(want string, got func(outcome string) float64, sum float64) string {
	named := 0.0
	for _, term := range strings.Fields(want) {
		i := strings.IndexAny(term, "=>")
		name, op, n := term[:i], strings.TrimRight(term[i:], "0123456789H+"), strings.TrimLeft(term[i:], "=>")
		v := got(name)
		named += v
		if limit := a.number(n); op == "=" && v != limit || op == ">" && v <= limit || op == ">=" && v < limit {
			return fmt.Sprintf("%s is %v, want %q", name, v, want)
		}
	}
	if sum != named {
		return fmt.Sprintf("%v have another outcome than those of %q", sum-named, want)
	}
	return ""
}

// number reads a number of a row: H is how many events were held.
func (a *act) number(s string) float64 {
	switch s {
	case "H":
		return float64(a.held)
	case "H+1":
		return float64(a.held + 1)
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		a.w.T.Fatalf("number of a row: %v", err)
	}
	return float64(n)
}

// ledger compares what a pod has counted since note; pushed is no outcome.
func (a *act) ledger(p *harness.Pod, metric, want string) string {
	m, was := p.Metrics(), a.was[p]
	got := func(outcome string) float64 {
		label := fmt.Sprintf("outcome=%q", outcome)
		return m.Sum(metric, label) - was.Sum(metric, label)
	}
	return a.expect(want, got, m.Sum(metric)-was.Sum(metric)-got("pushed"))
}

func (a *act) wantLedger(p *harness.Pod, metric, want string) {
	a.w.T.Helper()
	why := ""
	defer func() {
		if a.w.T.Failed() && why != "" {
			a.w.T.Logf("%s of %s: %s", metric, p.ID, why)
		}
	}()
	harness.Eventually(a.w.T, harness.Patience, metric+" to say "+want, func() bool {
		why = a.ledger(p, metric, want)
		return why == ""
	})
}

func (a *act) wantTargets(p *harness.Pod, want string) {
	a.w.T.Helper()
	a.wantLedger(p, "dws_targets_total", want)
}

// jetSays compares the consumer's own state with what a row says: "pending redelivered".
func (a *act) jetSays(want string) string {
	pending, again, _ := strings.Cut(want, " ")
	i := a.w.ConsumerInfo()
	n, r := a.number(pending), a.number(again)
	floor := i.AckFloor.Stream < a.first
	if n == 0 {
		floor = i.AckFloor.Stream >= a.w.LastSeq()
	}
	if float64(i.NumAckPending) == n && float64(i.NumRedelivered) == r && i.NumPending == 0 && floor {
		return ""
	}
	return fmt.Sprintf("JetStream says: %d pending, %d of them redelivered, %d not given out, ack floor %d of %d (first %d), want %q",
		i.NumAckPending, i.NumRedelivered, i.NumPending, i.AckFloor.Stream, a.w.LastSeq(), a.first, want)
}

// wantJet waits until JetStream and the first ledger say what the row says, at the same time.
func (a *act) wantJet(jet, events string) {
	a.w.T.Helper()
	why := ""
	defer func() {
		if a.w.T.Failed() {
			a.w.T.Logf("%s; H is %d; %s", why, a.held, a.w.Fate(a.first))
		}
	}()
	harness.Eventually(a.w.T, harness.Patience, fmt.Sprintf("JetStream to say %q and the ledger %q", jet, events), func() bool {
		why = a.jetSays(jet)
		if why == "" && events != "" {
			why = a.ledger(a.here, "dws_events_total", events)
		}
		return why == ""
	})
}

// What rows do.

func publish(a *act) { a.chat() }

// write publishes a message of a chat, which is due to nobody but who has selected it.
func write(a *act)      { a.w.Message("acme", a.agent, "c1") }
func selectHere(a *act) { a.users["ann"][0].SelectChat("c1") }

func read(a *act) { a.sick.Resume() }
func die(a *act)  { a.sick.Abort() }

// comeBack has the user whom the fate befell come to the pod that pulls.
func comeBack(a *act) {
	user := "eve"
	if a.sick != nil {
		user = a.sick.Dial.User
		a.sick.Abort()
	}
	a.sick = a.connect(a.here, user)
}

// resumeHere has that user fetch what was acked without it.
func resumeHere(a *act) {
	a.sick.Abort()
	a.sick = a.meet(a.here.Dial(harness.User("acme", a.agent, a.sick.Dial.User).From(a.sick.Place())))
}

// waitSlow waits until the socket is closed because it takes nothing.
func waitSlow(a *act) {
	before := a.was[a.sick.Pod].Sum("dws_slow_clients_disconnected_total")
	a.sick.Pod.WaitMetric(func(v float64) bool { return v > before }, "dws_slow_clients_disconnected_total")
}

func cut(a *act)            { a.proxy.Cut() }
func cutAndPublish(a *act)  { a.proxy.Cut(); publish(a) }
func holeAndPublish(a *act) { a.proxy.BlackHole(); publish(a) }
func restore(a *act)        { a.proxy.Restore() }
func restoreAndRead(a *act) { a.proxy.Restore(); read(a) }

// openBreaker has one event of another agent go unanswered; one failure is enough in this world.
func openBreaker(a *act) {
	a.proxy.BlackHole()
	lure := a.there.Connect(harness.User("acme", "lure", "eve"))
	a.w.Chat("acme", "lure")
	a.here.WaitMetric(func(v float64) bool { return v == 1 }, "dws_grpc_circuitbreaker_open")
	a.here.Connect(lure.Dial)
	a.w.Settled()
}

// claimInVain writes a claim as there would, though it has no such socket.
func claimInVain(a *act) {
	rdb := a.w.RedisClient()
	lease, err := rdb.Get(a.w.T.Context(), "pod:"+a.there.ID).Result()
	if err != nil {
		a.w.T.Fatal(err)
	}
	life, _, _ := strings.Cut(lease, " ")
	if err := rdb.SAdd(a.w.T.Context(), "route:acme:"+a.agent, a.there.ID+"#"+life+"#0").Err(); err != nil {
		a.w.T.Fatal(err)
	}
}

func away(a *act) {
	a.w.Redis.Kill()
	notReady(a.here, "redis")
	notReady(a.there, "redis")
}

func redisBack(a *act) {
	if err := a.w.Redis.Restart(); err != nil {
		a.w.T.Fatal(err)
	}
	a.here.WaitReady()
	a.there.WaitReady()
}

func redisBackAndCome(a *act) {
	redisBack(a)
	comeBack(a)
}

func drainHere(a *act) {
	a.here.Terminate()
	a.here.WantExit(0, 2*harness.Patience)
}

func drainThere(a *act) {
	a.there.Terminate()
	a.there.WantExit(0, 2*harness.Patience)
}

// succeed starts another pod that pulls, and has the user come to it.
func succeed(a *act) {
	a.here = a.w.Start()
	comeBack(a)
}

func succeedAndRead(a *act) {
	a.here = a.w.Start()
	read(a)
}
