package e2e

import (
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"daisi-ws-service/dev/feed"
	"daisi-ws-service/dev/harness"
	"daisi-ws-service/dev/rig"
)

// deployment is pods that come and go behind one address, while events are published for users who come back as the service
// asks them to, and resume.
type deployment struct {
	w         *harness.World
	address   string
	followers []*harness.Follower
	flow      *harness.Flow

	mu   sync.Mutex // guards pods
	pods []*harness.Pod
}

const deployedSpread = time.Second

func deploy(t *testing.T, pods int) *deployment {
	d := &deployment{w: harness.New(t, harness.Settings("SERVER_DRAIN_SPREAD="+deployedSpread.String(), "RESUME_MAX_EVENTS=100000"))}
	server := httptest.NewServer(rig.NewBalancer(d.ready))
	t.Cleanup(server.Close)
	d.address = strings.TrimPrefix(server.URL, "http://")
	for range pods {
		d.start()
	}
	return d
}

// ready are the addresses of the pods that say so, as a balancer's probes would find out.
func (d *deployment) ready() (addresses []string) {
	d.mu.Lock()
	pods := append([]*harness.Pod(nil), d.pods...)
	d.mu.Unlock()
	for _, p := range pods {
		if p.Ready() {
			addresses = append(addresses, p.HTTP)
		}
	}
	return addresses
}

func (d *deployment) start() {
	p := d.w.Start()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pods = append(d.pods, p)
}

// end drains the oldest n pods at the same time.
func (d *deployment) end(n int) {
	d.mu.Lock()
	old := d.pods[:n]
	d.pods = d.pods[n:]
	d.mu.Unlock()
	for _, p := range old {
		p.Terminate()
	}
	for _, p := range old {
		p.WantExit(0, harness.Patience)
	}
}

// follow adds users up to n.
func (d *deployment) follow(n int) {
	for _, user := range agents(n)[len(d.followers):] {
		d.followers = append(d.followers, d.w.FollowBehind(user.Positions(), d.address, d.pods[0]))
	}
}

// publish begins to publish for the users there are.
func (d *deployment) publish(rate int) {
	n := len(d.followers)
	d.flow = d.w.Flow(rate, func(i int) feed.Event {
		return feed.Chat("acme", agents(n)[i%n].Agent, "628111@c.us", "hi", 1)
	})
	d.flow.WaitSent(rate / 2)
}

// wantSpread expects each pod to end up with half of its share of the sockets at least.
func (d *deployment) wantSpread(t *testing.T) {
	t.Helper()
	harness.Eventually(t, harness.Patience, "every user to be back, and each pod to have its share of them", func() bool {
		all, least := 0, len(d.followers)
		for _, p := range d.pods {
			n := int(p.Metric("dws_active_connections"))
			all, least = all+n, min(least, n)
		}
		return all == len(d.followers) && least >= all/len(d.pods)/2
	})
}

// wantNothingLost ends the flow: every event has come to its user, and both ledgers of all pods balance.
func (d *deployment) wantNothingLost(t *testing.T) {
	t.Helper()
	published := d.flow.Stop()
	wantAll(t, d.w, published, d.followers)
	for i, f := range d.followers {
		if !f.Loaded().IsZero() {
			t.Errorf("user%d could not resume", i)
		}
	}
	for _, p := range d.pods {
		p.WantLedgers()
	}
}

// wantPromptReturn expects each socket to have ended by a drain, n in all at least, and its user to be ready again after the
// time that the drain told, and what the user added. What comes on top is the machine's: it is logged, and bounded by
// less than a session's lock would take to run out.
func (d *deployment) wantPromptReturn(t *testing.T, n int) {
	t.Helper()
	var more []time.Duration
	for i, f := range d.followers {
		for _, e := range f.Ends() {
			told, ok := e.RetryAfter()
			if !ok || told >= deployedSpread {
				t.Errorf("user%d was closed with %d %q", i, e.Code, e.Reason)
			}
			away := e.Back.Sub(e.At)
			if more = append(more, away-told-e.Own); e.Back.IsZero() || away > told+e.Own+harness.Patience {
				t.Errorf("user%d was away for %v, told to wait for %v, and waited for %v by itself", i, away, told, e.Own)
			}
		}
	}
	if len(more) < n {
		t.Fatalf("%d sockets have ended, of the %d that were on the pods", len(more), n)
	}
	slices.Sort(more)
	t.Logf("%d came back, beyond the time that they were told after %v (median), %v (longest)", len(more), more[len(more)/2], more[len(more)-1])
}

// TestRollingRestart replaces three pods under load, one after the other, each successor being ready before its
// predecessor goes.
func TestRollingRestart(t *testing.T) {
	t.Parallel()
	const users = 120
	d := deploy(t, 3)
	d.follow(users)
	d.wantSpread(t)
	d.publish(500)
	for range 3 {
		d.start()
		d.end(1)
	}
	d.wantSpread(t)
	d.wantNothingLost(t)
	d.wantPromptReturn(t, users)
}

// TestScaleOutAndIn: one pod, then three, then one, under load.
func TestScaleOutAndIn(t *testing.T) {
	t.Parallel()
	const users = 90
	d := deploy(t, 1)
	d.follow(users / 3)
	d.publish(300)
	d.start()
	d.start()
	d.follow(users) // those who come now find the new pods
	d.wantSpread(t)
	d.flow.WaitSent(300)
	d.end(2)
	d.wantSpread(t)
	d.flow.WaitSent(300)
	d.wantNothingLost(t)
	d.wantPromptReturn(t, users/2)
}
