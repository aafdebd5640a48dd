package harness

import (
	"bufio"
	"bytes"
	"fmt"
	"strconv"
	"strings"

	"github.com/nats-io/nats.go/jetstream"
)

// ConsumerInfo asks JetStream itself for the state of the World's consumer.
func (w *World) ConsumerInfo() *jetstream.ConsumerInfo {
	w.T.Helper()
	ctx := Within(w.T, Patience)
	c, err := w.JS.Consumer(ctx, w.Stream, w.Consumer)
	if err != nil {
		w.T.Fatalf("consumer %s of %s: %v", w.Consumer, w.Stream, err)
	}
	info, err := c.Info(ctx)
	if err != nil {
		w.T.Fatalf("consumer %s of %s: %v", w.Consumer, w.Stream, err)
	}
	return info
}

// LastSeq is the stream's last sequence.
func (w *World) LastSeq() uint64 {
	w.T.Helper()
	ctx := Within(w.T, Patience)
	s, err := w.JS.Stream(ctx, w.Stream)
	if err != nil {
		w.T.Fatalf("stream %s: %v", w.Stream, err)
	}
	info, err := s.Info(ctx)
	if err != nil {
		w.T.Fatalf("stream %s: %v", w.Stream, err)
	}
	return info.State.LastSeq
}

// Settled waits until JetStream says that every event published so far is acked or terminated.
func (w *World) Settled() {
	w.T.Helper()
	last := w.LastSeq()
	w.SettledTo(last)
}

// SettledTo waits until every event up to seq is acked or terminated: the consumer's ack floor is there.
func (w *World) SettledTo(seq uint64) {
	w.T.Helper()
	var info *jetstream.ConsumerInfo
	Eventually(w.T, 2*Patience, fmt.Sprintf("the ack floor to reach %d", seq), func() bool {
		info = w.ConsumerInfo()
		return info.AckFloor.Stream >= seq || info.NumPending == 0 && info.NumAckPending == 0 && info.Delivered.Stream >= seq
	})
}

// Series are the values of one scrape, by series as printed.
type Series map[string]float64

// Metrics scrapes /metrics of the pod.
func (p *Pod) Metrics() Series {
	p.W.T.Helper()
	a := p.Do("GET", "/metrics", nil, nil)
	if a.StatusCode != 200 {
		p.W.T.Fatalf("GET /metrics: %s", a.Status)
	}
	s := Series{}
	in := bufio.NewScanner(bytes.NewReader(a.Body))
	for in.Scan() {
		line := in.Text()
		if line == "" || line[0] == '#' {
			continue
		}
		i := strings.LastIndexByte(line, ' ')
		v, err := strconv.ParseFloat(line[i+1:], 64)
		if err != nil {
			p.W.T.Fatalf("line of /metrics: %q: %v", line, err)
		}
		s[line[:i]] = v
	}
	return s
}

// Sum adds all series of a metric that have these labels, each as `name="value"`. Without labels it adds all of the metric.
func (s Series) Sum(name string, labels ...string) float64 {
	sum := 0.0
	for series, v := range s {
		metric, rest, _ := strings.Cut(series, "{")
		if metric != name {
			continue
		}
		all := true
		for _, l := range labels {
			all = all && strings.Contains(","+strings.TrimSuffix(rest, "}")+",", ","+l+",")
		}
		if all {
			sum += v
		}
	}
	return sum
}

// Metric scrapes and sums.
func (p *Pod) Metric(name string, labels ...string) float64 {
	p.W.T.Helper()
	return p.Metrics().Sum(name, labels...)
}

// WaitMetric scrapes until the sum is what ok wants.
func (p *Pod) WaitMetric(ok func(v float64) bool, name string, labels ...string) {
	p.W.T.Helper()
	last := 0.0
	defer func() {
		if p.W.T.Failed() {
			p.W.T.Logf("%s%v of %s was last %v", name, labels, p.ID, last)
		}
	}()
	Eventually(p.W.T, Patience, name+" of "+p.ID, func() bool {
		last = p.Metric(name, labels...)
		return ok(last)
	})
}

// WantLedgers waits until both ledgers of the pod balance: per delivery of JetStream and per target. The parts of a scrape are
// not read at one instant, so only a pod at rest balances for certain.
func (p *Pod) WantLedgers() {
	p.W.T.Helper()
	why := ""
	defer func() {
		if p.W.T.Failed() {
			p.W.T.Logf("ledgers of %s: %s", p.ID, why)
		}
	}()
	Eventually(p.W.T, Patience, "both ledgers of "+p.ID+" to balance", func() bool {
		m := p.Metrics()
		received := m.Sum("dws_nats_messages_received_total")
		ended, inHand := m.Sum("dws_events_total"), m.Sum("dws_events_in_hand")
		pushed := m.Sum("dws_targets_total", `outcome="pushed"`)
		settled, waiting := m.Sum("dws_targets_total")-pushed, m.Sum("dws_websocket_buffer_used")
		why = fmt.Sprintf("received %v = ended %v + in hand %v; pushed %v = settled %v + waiting %v", received, ended, inHand, pushed, settled, waiting)
		return received == ended+inHand && pushed == settled+waiting
	})
}

// WantLine waits until the pod has logged a line that contains text, and returns it.
func (p *Pod) WantLine(text string) string {
	p.W.T.Helper()
	line, err := p.Log.Find(Within(p.W.T, Patience), func(line string) bool { return strings.Contains(line, text) })
	if err != nil {
		p.W.T.Fatalf("%s does not say %q: %v", p.ID, text, err)
	}
	return line
}
