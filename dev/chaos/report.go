package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// report prints everything, and says whether a promise was broken.
func (v *verdict) report() (bad bool) {
	fmt.Println("\nfaults, and the longest time that an event was on its way to a client concerned")
	worst := map[string]time.Duration{}
	for _, f := range v.faults {
		cost, who := v.cost(f)
		fmt.Printf("  %s  %-24s healed %s  %5.1fs  %s\n", v.w.at(f.began), f, v.w.at(f.healed), cost.Seconds(), who)
		worst[f.kind] = max(worst[f.kind], cost)
	}
	for _, kind := range kinds {
		if cost, ok := worst[kind]; ok {
			fmt.Printf("  %s %.1fs", kind, cost.Seconds())
		}
	}
	t := v.count()
	v.judge(t)
	fmt.Printf("\n%d due, %d lost; %d deliveries, %d of them (%.2f %%) a second time though no replay (%d by the same socket); %d live, %d replayed\n",
		t.due, v.lost, t.deliveries, t.repeated, 100*float64(t.repeated)/float64(max(t.deliveries, 1)), t.twice, t.live, t.replayed)
	if t.reloads > 0 {
		fmt.Printf("%d reloads asked for, when the stream could not be read: %d events count as fetched by them\n", t.reloads, t.excused)
	}
	v.explain()
	v.slowest()
	for _, what := range v.bad {
		fmt.Println("BAD:", what)
	}
	if len(v.bad) > 0 {
		fmt.Printf("FAILED: seed %d; logs in %s\n", v.w.plan.seed, v.w.dir)
		return true
	}
	fmt.Printf("PASSED: seed %d, %d clients, %s\n", v.w.plan.seed, len(v.cr.list), v.w.plan.policy)
	return false
}

// cost is the longest time from a publish to the client that touches the fault.
func (v *verdict) cost(f *fault) (longest time.Duration, who string) {
	for _, c := range f.hurt {
		for _, r := range v.wanted(c) {
			a, ok := c.got[r.seq]
			if !ok || !c.dueLocked(r) || a.at.Before(f.began) || r.acked.After(f.healed.Add(2*time.Second)) {
				continue
			}
			if d := a.at.Sub(r.acked); d > longest {
				longest, who = d, c.name
			}
		}
	}
	return longest, who
}

// slowest tells the story of the event that took longest, where it took longer than a single fault explains.
func (v *verdict) slowest() {
	var who *client
	var which record
	longest := 20 * time.Second
	for _, c := range v.cr.list {
		for _, r := range v.wanted(c) {
			if a, ok := c.got[r.seq]; ok && c.dueLocked(r) && a.at.Sub(r.acked) > longest {
				who, which, longest = c, r, a.at.Sub(r.acked)
			}
		}
	}
	if who != nil {
		fmt.Printf("\nthe slowest event took %.1fs\n", longest.Seconds())
		v.story(who, which)
	}
}

// explain prints all that is known of the first lost events.
func (v *verdict) explain() {
	shown := 0
	for c, records := range v.missing {
		for _, r := range records {
			if shown++; shown > 5 {
				return
			}
			fmt.Print("\nLOST")
			v.story(c, r)
		}
	}
}

func (v *verdict) story(c *client, r record) {
	fmt.Printf("\n%s: seq %d, %s of %s, sent %s, acknowledged %s; client ready %s, chat selected %s\n", c.name, r.seq, r.what, r.agent,
		v.w.at(r.sent), v.w.at(r.acked), v.w.at(c.readyAt), v.w.at(c.chosenAt))
	around := func(from, to, at time.Time, before, after time.Duration) bool {
		return at.After(from.Add(-before)) && at.Before(to.Add(after))
	}
	for _, f := range v.faults {
		if around(f.began, f.healed, r.acked, 5*time.Second, 15*time.Second) {
			fmt.Printf("  fault %s to %s: %s\n", v.w.at(f.began), v.w.at(f.healed), f)
		}
	}
	for _, other := range v.cr.list {
		if a, ok := other.got[r.seq]; ok {
			fmt.Printf("  %s has it, %s, live %v\n", other.name, v.w.at(a.at), a.live)
		}
	}
	for _, e := range c.journal {
		if around(r.acked, r.acked, e.at, 20*time.Second, time.Minute) {
			fmt.Printf("  %s  %s\n", v.w.at(e.at), e.what)
		}
	}
	ends := []string{fmt.Sprintf(`"seq":%d,`, r.seq), fmt.Sprintf(`"seq":%d}`, r.seq)}
	v.podLines(func(pod, line string) {
		if slices.ContainsFunc(ends, func(s string) bool { return strings.Contains(line, s) }) {
			fmt.Printf("  %s: %s\n", pod, line)
		}
	})
}
