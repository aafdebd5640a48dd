package main

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// verdict is what the end of a run looks like.
type verdict struct {
	w       *world
	cr      *crowd
	records []record
	lost    map[*client][]record
	pending string   // what JetStream waits for still
	unequal []string // ledgers that do not balance
}

// quiet is how long nothing may change, once JetStream waits for nothing, before what is missing counts as lost: more
// than a gap needs to be announced by the owner log, and a client to resume.
const quiet = 12 * time.Second

// settle leaves the clients alone until each has all it was due and JetStream has nothing pending, or it seems that this
// will not come.
func settle(ctx context.Context, w *world, cr *crowd, pub *publisher, p plan) *verdict {
	v := &verdict{w: w, cr: cr, records: pub.acked()}
	deadline, change := time.Now().Add(p.settle), time.Now()
	last := -1
	for {
		n := v.look()
		v.pending = v.askPending(ctx)
		v.unequal = v.ledgers(ctx)
		if n != last || v.pending != "" {
			last, change = n, time.Now()
		}
		if n == 0 && v.pending == "" && len(v.unequal) == 0 || time.Since(change) > quiet || time.Now().After(deadline) || ctx.Err() != nil {
			w.say("quiet: %d lost, JetStream %q, ledgers %v", n, v.pending, v.unequal)
			return v
		}
		wait(ctx, 300*time.Millisecond)
	}
}

// look finds what is missing.
func (v *verdict) look() (n int) {
	v.lost = map[*client][]record{}
	for _, c := range v.cr.list {
		c.mu.Lock()
		for _, r := range v.records {
			if _, ok := c.got[r.seq]; !ok && c.dueLocked(r) {
				v.lost[c] = append(v.lost[c], r)
				n++
			}
		}
		c.mu.Unlock()
	}
	return n
}

// dueLocked says whether the client was due an event. What was sent before ready came, but acknowledged after, is left out:
// this program's clock cannot tell on which side it was.
func (c *client) dueLocked(r record) bool {
	agent, table, _ := strings.Cut(strings.TrimPrefix(r.subject, "acme."), ".")
	from := c.readyAt
	switch chat, isMessage := strings.CutPrefix(table, "messages."); {
	case c.agent == "" && (table != "agents" || strings.HasSuffix(c.name, "-of-agent-0") && agent != "agent-0"):
		return false
	case c.agent == "":
	case agent != c.agent || table == "agents":
		return false
	case isMessage && chat != c.chat:
		return false
	case isMessage:
		from = c.chosenAt
	}
	return !from.IsZero() && r.sent.After(from) && r.acked.After(c.reloaded)
}

func (v *verdict) askPending(ctx context.Context) string {
	within, cancel := context.WithTimeout(ctx, 2*time.Second)
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
	within, cancel := context.WithTimeout(ctx, 3*time.Second)
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

// report prints everything, and says whether it was bad.
func (v *verdict) report(list []*fault) (bad bool) {
	fmt.Println("\nfaults, and the longest time without delivery for a client concerned")
	for _, f := range list {
		cost, who := f.cost()
		fmt.Printf("  %s  %-24s healed %s  %5.1fs  %s\n", v.w.at(f.began), f, v.w.at(f.healed), cost.Seconds(), who)
	}
	var live, repeated, replayed, n, due, excused int
	for _, c := range v.cr.list {
		live, repeated, replayed, n = live+c.live, repeated+c.repeated, replayed+c.replayed, n+len(v.lost[c])
		for _, r := range v.records {
			if c.dueLocked(r) {
				due++
			}
		}
		for _, at := range c.reloads {
			if v.natsAway(list, at) {
				excused++
				continue
			}
			bad = true
			fmt.Printf("BAD: %s  %s was told to reload\n", v.w.at(at), c.name)
		}
	}
	share := float64(repeated) / float64(max(live, 1))
	fmt.Printf("%d due, %d lost; %d live deliveries, %d of them (%.2f %%) a second time; %d replayed\n", due, n, live, repeated, 100*share, replayed)
	if excused > 0 {
		fmt.Printf("%d reloads asked for while NATS was away: what was acknowledged before one was not due\n", excused)
	}
	for i := range pods {
		v.w.blame(v.w.pod(i).Process)
	}
	v.w.blame(v.w.nats.Process())
	v.w.blame(v.w.redis.Process())
	for _, what := range append(slices.Clone(v.w.faulty), v.unequal...) {
		fmt.Println("BAD:", what)
		bad = true
	}
	if share >= 0.05 {
		fmt.Println("BAD: too many duplicates")
		bad = true
	}
	if v.pending != "" {
		fmt.Println("BAD: JetStream waits:", v.pending)
		bad = true
	}
	v.explain(list)
	v.worstPause()
	if bad = bad || n > 0; bad {
		fmt.Println("FAILED; logs in", v.w.dir)
	} else {
		fmt.Println("PASSED")
	}
	return bad
}

// natsAway says whether a replay could not be read then: the protocol has the client reload.
func (v *verdict) natsAway(list []*fault, at time.Time) bool {
	return slices.ContainsFunc(list, func(f *fault) bool {
		return f.kind == "nats" && at.After(f.began) && at.Before(f.healed.Add(3*time.Second))
	})
}

// cost is the longest pause of a client between two first arrivals that touches the fault.
func (f *fault) cost() (longest time.Duration, who string) {
	for _, c := range f.hurt {
		for i := 1; i < len(c.fresh); i++ {
			from, to := c.fresh[i-1], c.fresh[i]
			if d := to.Sub(from); d > longest && to.After(f.began) && from.Before(f.healed.Add(2*time.Second)) {
				longest, who = d, c.name
			}
		}
	}
	return longest, who
}

// worstPause prints the journal of the client that waited longest, if that was longer than any fault explains.
func (v *verdict) worstPause() {
	var worst *client
	var from time.Time
	longest := 20 * time.Second
	for _, c := range v.cr.list {
		for i := 1; i < len(c.fresh); i++ {
			if d := c.fresh[i].Sub(c.fresh[i-1]); d > longest {
				worst, from, longest = c, c.fresh[i-1], d
			}
		}
	}
	if worst == nil {
		return
	}
	fmt.Printf("\n%s had nothing new for %.1f s from %s:\n", worst.name, longest.Seconds(), v.w.at(from))
	for _, e := range worst.journal {
		if e.at.After(from.Add(-10*time.Second)) && e.at.Before(from.Add(longest+time.Second)) {
			fmt.Printf("  %s  %s\n", v.w.at(e.at), e.what)
		}
	}
}

// explain prints all that is known of the first lost events.
func (v *verdict) explain(list []*fault) {
	shown := 0
	for c, records := range v.lost {
		for _, r := range records {
			if shown++; shown > 8 {
				return
			}
			fmt.Printf("\nLOST %s: seq %d, %s, sent %s, acknowledged %s; client ready %s, chat selected %s\n", c.name, r.seq, r.subject,
				v.w.at(r.sent), v.w.at(r.acked), v.w.at(c.readyAt), v.w.at(c.chosenAt))
			for _, f := range list {
				if r.acked.After(f.began.Add(-5*time.Second)) && r.acked.Before(f.healed.Add(15*time.Second)) {
					fmt.Printf("  fault %s to %s: %s\n", v.w.at(f.began), v.w.at(f.healed), f)
				}
			}
			for _, other := range v.cr.list {
				if a, ok := other.got[r.seq]; ok {
					fmt.Printf("  %s has it, %s, live %v\n", other.name, v.w.at(a.at), a.live)
				}
			}
			for _, e := range c.journal {
				if e.at.After(r.acked.Add(-20*time.Second)) && e.at.Before(r.acked.Add(60*time.Second)) {
					fmt.Printf("  %s  %s\n", v.w.at(e.at), e.what)
				}
			}
			v.podLines(r.seq)
		}
	}
}

func (v *verdict) podLines(seq uint64) {
	for i := range pods {
		text, err := os.ReadFile(filepath.Join(v.w.dir, podID(i)+".log"))
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(text)) {
			if strings.Contains(line, fmt.Sprintf(`"seq":%d,`, seq)) || strings.Contains(line, fmt.Sprintf(`"seq":%d}`, seq)) {
				fmt.Printf("  %s: %s\n", podID(i), strings.TrimSpace(line))
			}
		}
	}
}
