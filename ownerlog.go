package main

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

const (
	logKey    = "owner_log"
	logLength = 100_000 // entries that Redis keeps, more or less
	logFields = 16
	logPage   = 1000

	// Marks are written every second, and sooner when so many events wait for it, or such large ones: JetStream counts them
	// as pending, and this pod keeps them in memory.
	toldAtOnce = 1024
	toldBytes  = 1 << 20
)

// mark announces that events of a route after since may be missing.
type mark struct {
	since  uint64
	reason string
	// except is the member whose own sockets have had them all, "" = none. When a pod is killed, its clients come to others long
	// before its lease ends: until then what is written to them is given up too, for want of the dead pod's answer. It names
	// the epoch: a successor of the same id has other sockets.
	except string
}

// and is one mark for two.
func (m mark) and(n mark) mark {
	if n.since < m.since {
		m, n = n, m
	}
	if n.except != m.except {
		m.except = ""
	}
	return m
}

// exceptField precedes the key of a mark in the name of the field that holds its exception. Pods of before these know nothing
// of it and send the gap; a fourth word in the mark itself would have been no mark to them.
const exceptField = "except "

// appendLog writes fields, pairs of a route's key and what is said of it, in entries of logFields at the most: the last
// entry is read again with every batch of events, and one of 5,000 marks cost each of them 1.5 ms.
func (o *owners) appendLog(ctx context.Context, fields []any) error {
	p := o.pipe()
	for entry := range slices.Chunk(fields, 2*logFields) {
		p.XAdd(ctx, &redis.XAddArgs{Stream: logKey, MaxLen: logLength, Approx: true, Values: entry})
	}
	if _, err := p.Exec(ctx); err != nil {
		o.m.redisErrorsTotal.with("log").Inc()
		return fmt.Errorf("append to %s: %w", logKey, err)
	}
	return nil
}

// readLog reads the log's entries since the last read and does what they say. o.readMu must be held. The last entry
// seen is read again: if it does not come back as it was, the log was trimmed past it or lost, and all that was
// believed goes.
func (o *owners) readLog(ctx context.Context) error {
	seq := o.noteSeq()
	switch {
	case o.placeLost:
		return o.losePlace(ctx)
	case o.place.ID == "":
		if err := o.takePlace(ctx); err != nil {
			return err
		}
	}
	for {
		page, err := o.readPage(ctx, o.place.ID, "+")
		if err != nil {
			return err
		}
		if len(page) == 0 || page[0].ID != o.place.ID || !maps.Equal(page[0].Values, o.place.Values) {
			return o.losePlace(ctx)
		}
		o.apply(page[1:])
		o.place = page[len(page)-1]
		if len(page) < logPage {
			break
		}
	}
	o.mu.Lock()
	o.seqRead = o.resumeFromLocked(seq, route{})
	o.awaySeq = 0 // not before the last page: the routes that any of them names are marked from there
	o.mu.Unlock()
	return nil
}

// takePlace appends an entry of this pod, so that there is one to read from.
func (o *owners) takePlace(ctx context.Context) error {
	id, err := o.rdb.XAdd(ctx, &redis.XAddArgs{Stream: logKey, MaxLen: logLength, Approx: true, Values: []any{podKey(o.pod), "reads"}}).Result()
	if err != nil {
		o.m.redisErrorsTotal.with("log").Inc()
		return fmt.Errorf("append to %s: %w", logKey, err)
	}
	o.mu.Lock()
	clear(o.cache)
	o.mu.Unlock()
	o.place = redis.XMessage{ID: id, Values: map[string]any{podKey(o.pod): "reads"}}
	return nil
}

// losePlace starts anew after entries were missed: nothing that was believed holds, sockets here may have been
// overlooked by others (gap), and the next renewal takes a new epoch, since Redis may have lost this pod's claims too. If
// Redis fails in the midst of it, the next read begins here again.
func (o *owners) losePlace(ctx context.Context) error {
	slog.Warn("place in the owner log lost: every socket gets a gap", "place", o.place.ID)
	o.placeLost = true
	if err := o.takePlace(ctx); err != nil {
		return err
	}
	o.placeLost = false
	o.mu.Lock()
	o.instances = map[string]bool{} // whatever Redis says its ids are next time, they are new
	o.doubtUntil = time.Now().Add(o.cfg.Load().SessionRefreshInterval)
	since := o.seqRead
	conns := o.allConnsLocked()
	if o.awaySeq != 0 {
		o.markAllLocked(mark{since: o.awaySeq - 1, reason: "owner"})
		o.awaySeq = 0
	}
	o.mu.Unlock()
	poke(o.wakeLease)
	for _, c := range conns {
		c.gap(since, "owner")
	}
	return nil
}

// apply drops from the cache what log entries name, and announces the gaps that they carry.
func (o *owners) apply(entries []redis.XMessage) {
	type notice struct {
		conns []*conn
		mark
	}
	var notices []notice
	now := time.Now()
	o.mu.Lock()
	for _, e := range entries {
		for key := range e.Values {
			r, m, isMark, ok := parseField(e.Values, key)
			switch {
			case !ok:
			case isMark:
				o.missedLocked(r, m, now)
				switch lr := o.routes[r]; {
				case m.except == o.selfLocked(): // and who has come since then began to resume where resumeFrom said
				case r == route{}:
					notices = append(notices, notice{o.allConnsLocked(), m})
				case lr != nil:
					notices = append(notices, notice{lr.conns, m})
				}
			default:
				delete(o.cache, r)
				if o.awaySeq != 0 { // events were acked without knowing of this change
					o.markLocked(r, mark{since: o.awaySeq - 1, reason: "owner"})
				}
			}
		}
	}
	o.mu.Unlock()
	for _, n := range notices {
		for _, c := range n.conns {
			c.gap(n.since, n.reason)
		}
	}
}

// learnMarks reads the marks that were written before this pod began to read the log: a client may come here who was
// between two sockets then. It waits for Redis until ctx ends.
func (o *owners) learnMarks(ctx context.Context) error {
	o.readMu.Lock()
	end := o.place.ID
	o.readMu.Unlock()
	ms, _, _ := strings.Cut(end, "-") // of Redis' clock, as in every entry's id
	now, err := strconv.ParseInt(ms, 10, 64)
	if err != nil {
		return fmt.Errorf("time of entry %s of %s: %w", end, logKey, err)
	}
	from := strconv.FormatInt(max(0, now-o.cfg.Load().ResumeMaxAge.Milliseconds()), 10)
	for {
		read, cancel := context.WithTimeout(ctx, claimTimeout)
		page, err := o.readPage(read, from, end)
		cancel()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			slog.Warn("waiting for Redis to tell which gaps were announced", "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(300 * time.Millisecond):
			}
			continue
		}
		o.noteMarks(page)
		if len(page) < logPage {
			return nil
		}
		from = page[len(page)-1].ID // once more
	}
}

func (o *owners) readPage(ctx context.Context, from, to string) ([]redis.XMessage, error) {
	page, err := o.rdb.XRangeN(ctx, logKey, from, to, logPage).Result()
	if err != nil {
		o.m.redisErrorsTotal.with("log").Inc()
		return nil, fmt.Errorf("read %s from %s: %w", logKey, from, err)
	}
	return page, nil
}

func (o *owners) noteMarks(entries []redis.XMessage) {
	now := time.Now()
	o.mu.Lock()
	defer o.mu.Unlock()
	for _, e := range entries {
		for key := range e.Values {
			if r, m, isMark, ok := parseField(e.Values, key); ok && isMark {
				o.missedLocked(r, m, now)
			}
		}
	}
}

// missed is a mark that was read, or written by this pod, kept for clients who were between two sockets then: what it names
// may be older than what their resume begins with.
type missed struct {
	since uint64
	read  time.Time
	last  uint64 // sequence up to which clients may not have heard of it; 0 = not known yet
}

// missedKept is how many of a route are kept apart: when marks recur, who comes after the latest is not sent back to before the first.
const missedKept = 8

// missedLocked notes a mark of r, the zero route for all. Of several while last is not known one is made: the lowest, as of
// now; so it is of the two oldest when there are too many.
func (o *owners) missedLocked(r route, m mark, now time.Time) {
	if _, ok := o.missed[r]; !ok && len(o.missed) >= o.cfg.Load().PodOwnerCacheSize {
		r = route{}
	}
	all := o.missed[r]
	if n := len(all); n > 0 && all[n-1].last == 0 {
		all[n-1].since, all[n-1].read = min(m.since, all[n-1].since), now
		return
	}
	if len(all) == missedKept {
		all[1].since = min(all[0].since, all[1].since)
		all = slices.Delete(all, 0, 1)
	}
	o.missed[r] = append(all, missed{since: m.since, read: now})
}

// lags is called while events behind the sequence since, of whatever route, are settled later than the overlap of a resume allows for:
// until a lease after the last call, who comes resumes from there. What is noted for gaps goes back as far: who is sent one may come
// to a pod that has not seen the lag begin.
func (o *owners) lags(since uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.seqHeld, o.seqRead = min(o.seqHeld, since), min(o.seqRead, since)
	o.missedLocked(route{}, mark{since: since}, time.Now())
}

// forgetMissed is called with each renewal, behind its read of the log. A lease after this pod has read a mark all have: who
// has a later sequence than the stream had then was told, or had it by such a resume. Who has an older one than
// RESUME_MAX_AGE reloads.
func (o *owners) forgetMissed(seq uint64) {
	cfg := o.cfg.Load()
	o.mu.Lock()
	defer o.mu.Unlock()
	for r, all := range o.missed {
		all = slices.DeleteFunc(all, func(m missed) bool { return time.Since(m.read) > cfg.ResumeMaxAge+cfg.PodLease })
		if len(all) == 0 {
			delete(o.missed, r)
			continue
		}
		if m := &all[len(all)-1]; m.last == 0 && time.Since(m.read) > cfg.PodLease {
			m.last = max(seq, 1)
		}
		o.missed[r] = all
	}
}

// resumeFrom is since, or an earlier sequence where a client that asks for what came after since may have missed a gap on r.
// Called when its socket is attached, it leaves none out: a mark that excepts this pod is among marks from the moment on in
// which the sockets here were compared, then, until flushMarks has written it and after it, among missed.
func (o *owners) resumeFrom(since uint64, r route) uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.resumeFromLocked(since, r)
}

func (o *owners) resumeFromLocked(since uint64, r route) uint64 {
	from := since
	for _, r := range [...]route{r, {}} {
		for _, m := range o.missed[r] {
			if m.last == 0 || since <= m.last {
				from = min(from, m.since)
			}
		}
	}
	if m, ok := o.marks[r]; ok {
		from = min(from, m.since)
	}
	if o.markAll != nil {
		from = min(from, o.markAll.since)
	}
	return from
}

func (m mark) String() string { return "gap " + strconv.FormatUint(m.since, 10) + " " + m.reason }

func parseMark(s string) (mark, bool) {
	f := strings.Fields(s)
	if len(f) != 3 || f[0] != "gap" {
		return mark{}, false
	}
	since, err := strconv.ParseUint(f[1], 10, 64)
	return mark{since: since, reason: f[2]}, err == nil
}

// parseField tells what a field of a log entry says: that the claims on r have changed, or the mark m of r, the zero route for
// all. Other fields give ok false.
func parseField(entry map[string]any, key string) (r route, m mark, isMark, ok bool) {
	value, _ := entry[key].(string)
	m, isMark = parseMark(value)
	m.except, _ = entry[exceptField+key].(string)
	r, ok = parseRoute(key)
	return r, m, isMark, ok || isMark && key == "*"
}

// announce marks the routes that had names, with the sockets here that have had what is given up on each, and calls then, which
// keeps size bytes in memory, when the marks are in the log; at once if Redis can't be told now: they are kept.
func (o *owners) announce(had map[route][]*conn, m mark, size int, then func()) {
	o.mu.Lock()
	for r, conns := range had {
		m.except = ""
		if lr := o.routes[r]; lr == nil || among(lr.conns, conns) {
			m.except = o.selfLocked()
		}
		o.markLocked(r, m)
	}
	wait := len(had) > 0 && !o.away.Load()
	if wait {
		o.told, o.toldSize = append(o.told, then), o.toldSize+size
		if len(o.told) >= toldAtOnce || o.toldSize >= toldBytes {
			poke(o.wakeMarks)
		}
	}
	o.mu.Unlock()
	if !wait {
		then()
	}
}

// among says whether all of conns are in earlier, a list of the same route: those that come are appended, so their order stays.
func among(conns, earlier []*conn) bool {
	for _, c := range earlier {
		if len(conns) > 0 && conns[0] == c {
			conns = conns[1:]
		}
	}
	return len(conns) == 0
}

func (o *owners) selfLocked() string { return member{o.pod, o.epochNow}.name(0) }

func (o *owners) markLocked(r route, m mark) {
	old, ok := o.marks[r]
	switch {
	case ok:
		o.marks[r] = old.and(m)
	case len(o.marks) >= o.cfg.Load().PodOwnerCacheSize:
		o.markAllLocked(m)
	default:
		o.marks[r] = m
	}
}

func (o *owners) markAllLocked(m mark) {
	if o.markAll != nil {
		m = o.markAll.and(m)
	}
	o.markAll = &m
}

// flushMarks writes the marks noted since the last call; what cannot be written is kept.
func (o *owners) flushMarks(ctx context.Context) {
	o.mu.Lock()
	var marks map[route]mark
	var all *mark
	if !o.away.Load() {
		marks, all, o.marks, o.markAll = o.marks, o.markAll, map[route]mark{}, nil
		now := time.Now()
		for r, m := range marks {
			o.missedLocked(r, m, now)
		}
		if all != nil {
			o.missedLocked(route{}, *all, now)
		}
	}
	told := o.told
	o.told, o.toldSize = nil, 0
	o.mu.Unlock()
	if err := o.writeMarks(ctx, marks, all); err != nil {
		o.mu.Lock()
		defer o.mu.Unlock()
		for r, m := range marks {
			o.markLocked(r, m)
		}
		if all != nil {
			o.markAllLocked(*all)
		}
		o.told = append(o.told, told...)
		return
	}
	for _, then := range told {
		then()
	}
}

func (o *owners) writeMarks(ctx context.Context, marks map[route]mark, all *mark) error {
	fields := make([]any, 0, 4*len(marks)+4)
	add := func(key string, m mark) { // always two fields, so that no entry ends between them
		fields = append(fields, exceptField+key, m.except, key, m.String())
	}
	for r, m := range marks {
		add(r.key(), m)
	}
	if all != nil {
		add("*", *all)
	}
	if len(fields) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, claimTimeout)
	defer cancel()
	return o.appendLog(ctx, fields)
}

// noteStale remembers the first sequence that is dispatched, and may be acked, on knowledge that may be old.
func (o *owners) noteStale(seq uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.awaySeq == 0 || seq < o.awaySeq {
		o.awaySeq = seq
	}
}
