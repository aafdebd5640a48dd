package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// verdict is what the end of a run looks like.
type verdict struct {
	w       *world
	cr      *crowd
	faults  []*fault
	records []record
	of      map[string][]record // by agent
	missing map[*client][]record
	lost    int      // all of missing
	pending string   // what JetStream waits for still
	unequal []string // ledgers that do not balance
	restive []string // clients that are not connected, or have asked for something
	ghosts  []string // clients whose former socket is open still
	bad     []string // promises that were broken
}

// quiet is how long nothing may change, once everything is at rest, before what is missing counts as lost: more than a
// gap needs to be announced by the owner log, more than a refresh interval, in which a session that was taken over closes.
const quiet = 15 * time.Second

// settle leaves the clients alone until each has all it was due and nothing is under way, or it seems that this will not come.
// Time decides nothing while anything is still under way, but for p.settle, beyond which it is called stuck.
func settle(ctx context.Context, w *world, cr *crowd, pub *publisher, list []*fault) *verdict {
	v := &verdict{w: w, cr: cr, faults: list, records: pub.acked(), of: map[string][]record{}, missing: map[*client][]record{}}
	for _, r := range v.records {
		v.of[r.agent] = append(v.of[r.agent], r)
	}
	for _, c := range cr.list {
		v.missing[c] = v.wanted(c)
		for _, g := range c.ghosts {
			go g.haunt() // ends with the socket: crowd.stop closes it
		}
	}
	deadline, change, last := time.Now().Add(w.plan.settle), time.Now(), -1
	for {
		v.pending = v.askPending(ctx)
		v.unequal = v.ledgers(ctx)
		v.look()
		if v.lost != last || v.pending != "" || len(v.restive) > 0 {
			last, change = v.lost, time.Now()
		}
		well := v.lost == 0 && v.pending == "" && len(v.unequal)+len(v.restive)+len(v.ghosts) == 0
		if well || time.Since(change) > quiet || time.Now().After(deadline) || ctx.Err() != nil {
			w.say("at rest: %d lost", v.lost)
			return v
		}
		wait(ctx, 300*time.Millisecond)
	}
}

// wanted are the events whose subject is the client's.
func (v *verdict) wanted(c *client) (all []record) {
	from := v.of[c.agent]
	if c.admin && c.agent == "" {
		from = v.records
	}
	for _, r := range from {
		if c.wants(r) {
			all = append(all, r)
		}
	}
	return all
}

// wants says whether the event's subject is one of the client's.
func (c *client) wants(r record) bool {
	switch {
	case c.admin:
		return r.what == "agents" && (c.agent == "" || r.agent == c.agent)
	case r.agent != c.agent:
		return false
	}
	return r.what == "chats" || r.what == "contacts" || c.chat != "" && r.what == "messages."+c.chat
}

// dueLocked says whether the client, which wants it, was due an event. What was sent before ready came, but acknowledged
// after, is left out: this program's clock cannot tell on which side it was.
func (c *client) dueLocked(r record) bool {
	from := c.readyAt
	if strings.HasPrefix(r.what, "messages.") {
		from = c.chosenAt
	}
	return !from.IsZero() && r.sent.After(from) && r.acked.After(c.reloaded)
}

// look finds what is missing, and who is not at rest.
func (v *verdict) look() {
	v.lost, v.restive, v.ghosts = 0, nil, nil
	for _, c := range v.cr.list {
		c.mu.Lock()
		left := v.missing[c][:0]
		for _, r := range v.missing[c] {
			if _, ok := c.got[r.seq]; !ok && c.dueLocked(r) {
				left = append(left, r)
			}
		}
		v.missing[c] = left
		v.lost += len(left)
		if !c.resting {
			v.restive = append(v.restive, c.name)
		}
		for _, g := range c.ghosts {
			if !g.closed.Load() {
				v.ghosts = append(v.ghosts, c.name)
			}
		}
		c.mu.Unlock()
	}
}

func (v *verdict) askPending(ctx context.Context) string {
	within, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := v.w.js.Consumer(within, "wa_stream", "ws_fanout")
	if err != nil {
		return err.Error()
	}
	info := c.CachedInfo()
	if info.NumPending > 0 || info.NumAckPending > 0 {
		return fmt.Sprintf("%d pending, %d without ack, ack floor %d", info.NumPending, info.NumAckPending, info.AckFloor.Stream)
	}
	return ""
}

// ledgers names the pods of which one does not balance.
func (v *verdict) ledgers(ctx context.Context) (unequal []string) {
	for i := range pods {
		m, err := scrape(ctx, v.w.pod(i).Base()+"/metrics")
		if err != nil {
			unequal = append(unequal, fmt.Sprintf("%s: %v", podID(i), err))
			continue
		}
		received, ended := m["dws_nats_messages_received_total"], m["dws_events_total"]+m["dws_events_in_hand"]
		pushed, settled := m["pushed"], m["dws_targets_total"]-m["pushed"]+m["dws_websocket_buffer_used"]
		if received != ended || pushed != settled {
			unequal = append(unequal, fmt.Sprintf("%s: received %v, ended or in hand %v; pushed %v, settled or waiting %v", podID(i), received, ended, pushed, settled))
		}
	}
	return unequal
}

// scrape sums the series of each metric; "pushed" is the outcome of that name alone.
func scrape(ctx context.Context, url string) (map[string]float64, error) {
	within, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(within, "GET", url, nil)
	if err != nil {
		return nil, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	m := map[string]float64{}
	for in := bufio.NewScanner(resp.Body); in.Scan(); {
		series, value, ok := strings.Cut(in.Text(), " ")
		if f, err := strconv.ParseFloat(value, 64); ok && err == nil {
			name, labels, _ := strings.Cut(series, "{")
			m[name] += f
			if name == "dws_targets_total" && strings.Contains(labels, `"pushed"`) {
				m["pushed"] += f
			}
		}
	}
	return m, nil
}

// tally is what the deliveries to all clients add up to.
type tally struct {
	due, excused                           int // of all events that were published
	deliveries                             int // first ones, and those that were no replays
	live, repeated, twice, replayed, wrong int
	strays, reloads                        int
}

func (v *verdict) count() (t tally) {
	known := map[uint64]record{}
	for _, r := range v.records {
		known[r.seq] = r
	}
	for _, c := range v.cr.list {
		t.live, t.repeated, t.twice, t.replayed, t.wrong = t.live+c.live, t.repeated+c.repeated, t.twice+c.twice, t.replayed+c.replayed, t.wrong+c.wrong
		t.reloads += len(c.reloads)
		t.deliveries += len(c.got) + c.repeated
		for seq := range c.got {
			if r, ok := known[seq]; ok && !c.wants(r) {
				t.strays++
			}
		}
		for _, r := range v.wanted(c) {
			if c.dueLocked(r) {
				t.due++
			} else if r.acked.Before(c.reloaded) {
				t.excused++
			}
		}
	}
	return t
}

// judge notes every promise that was broken. Only what has an allowance is measured: the rest may not happen once.
func (v *verdict) judge(t tally) {
	is := func(bad bool, format string, args ...any) {
		if bad {
			v.bad = append(v.bad, fmt.Sprintf(format, args...))
		}
	}
	is(v.lost > 0, "lost: %d of %d events did not come to a client that they were due to", v.lost, t.due)
	is(t.due == 0 || 3*t.due < t.excused, "excused: %d events were due, %d more would have been but for a reload", t.due, t.excused)
	is(t.strays > 0, "strays: %d events came to a client whose they were not", t.strays)
	is(20*t.repeated >= t.deliveries, "duplicates: %d of %d deliveries, 5 %% or more", t.repeated, t.deliveries)
	is(t.wrong > 0, "twice: %d events were let through twice by the client's rule", t.wrong)
	is(200*t.twice >= t.deliveries, "twice: %d of %d deliveries had come by the same socket before, 0.5 %% or more", t.twice, t.deliveries)
	is(v.pending != "", "pending: JetStream waits, %s", v.pending)
	is(len(v.unequal) > 0, "ledgers: %s", strings.Join(v.unequal, "; "))
	is(len(v.restive) > 0, "unanswered: %d clients are not connected, or wait for an answer: %.10v", len(v.restive), v.restive)
	is(len(v.ghosts) > 0, "sessions: %d sockets are open though their users have later ones: %.10v", len(v.ghosts), v.ghosts)
	tooFar, late := v.told()
	is(tooFar > 0, "reload: %d clients were told to reload what could be replayed", tooFar)
	is(late > 0, "late: %d deliveries were answered when JetStream may have given them out again", late)
	for i := range pods {
		v.w.blame(v.w.pod(i).Process)
	}
	v.w.blame(v.w.nats.Process())
	v.w.blame(v.w.redis.Process())
	for _, what := range v.w.faulty {
		is(true, "process: %s", what)
	}
}

// told counts what only the pods' logs tell: replays that were refused as too far back, which none is, and answers to
// JetStream less than 1 s before ACK_WAIT, or after it.
func (v *verdict) told() (tooFar, late int) {
	v.podLines(func(_, text string) {
		if !strings.Contains(text, `"replay ended in a gap"`) && !strings.Contains(text, `"event ended"`) {
			return
		}
		var line struct {
			Msg, Err, Outcome string
			MS                int
		}
		switch err := json.Unmarshal([]byte(text), &line); {
		case err != nil:
		case line.Msg == "replay ended in a gap" && strings.HasPrefix(line.Err, "cannot be replayed"):
			tooFar++
		case line.Msg == "event ended" && line.Outcome != "late" && time.Duration(line.MS)*time.Millisecond > v.w.plan.ackWait-time.Second:
			late++
		}
	})
	return tooFar, late
}

// podLines hands all lines of the pods' logs to f.
func (v *verdict) podLines(f func(pod, line string)) {
	for i := range pods {
		text, err := os.ReadFile(filepath.Join(v.w.dir, podID(i)+".log"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			f(podID(i), strings.TrimSpace(line))
		}
	}
}
