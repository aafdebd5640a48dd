package main

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
)

// documentedMetrics are the names that dashboards and alerts rely on, with their labels.
const documentedMetrics = `
active_connections{type} http_connections_dropped_total upgrades_waiting connections_total{type} connection_duration_seconds closes_total{code}
messages_received_total{message_type} messages_sent_total{message_type}
auth_success_total{token_type} auth_failure_total{token_type,reason} origins_refused_total session_conflicts_total{user_type}
session_lock_attempts_total{user_type,lock_type} session_lock_success_total session_lock_failure_total{reason}
session_lock_renewal_attempts_total session_lock_renewal_success_total session_lock_renewal_failure_total{reason}
nats_messages_received_total{kind} events_total{kind,outcome} events_in_hand event_delivery_seconds redelivered_total
parked_events ack_pending consumer_lag consumer_paused consumer_heartbeat_age_seconds
owner_lookups_total owner_lookup_seconds owner_unanswered position_age_seconds
grpc_messages_sent_total{target_pod_id} grpc_messages_received_total{source_pod_id} grpc_forward_retry_attempts_total
grpc_forward_retry_success_total grpc_forward_retry_failure_total grpc_forward_seconds grpc_pool_size
grpc_pool_connections_created_total grpc_pool_connections_closed_total{reason} grpc_connections_refused_total{reason} grpc_circuitbreaker_tripped_total
grpc_circuitbreaker_open targets_total{outcome} websocket_messages_dropped_total{reason} websocket_buffer_used
websocket_buffer_capacity gaps_total{reason} slow_clients_disconnected_total redis_errors_total{op} resume_requests_total
resume_events_total resume_gaps_total config_reloads_total{result} build_info{version,go_version}`

// labelsOf fills each family with one series of made-up label values and returns name{labels} of all of them.
func labelsOf(m *Metrics) []string {
	var all []string
	note := func(name string, labels []string) (values []string) {
		name = strings.TrimPrefix(name, "dws_")
		if len(labels) > 0 {
			name += "{" + strings.Join(labels, ",") + "}"
		}
		all = append(all, name)
		return make([]string, len(labels))
	}
	for _, f := range []*counters{m.connectionsTotal, m.closesTotal, m.messagesReceivedTotal, m.messagesSentTotal, m.authSuccessTotal,
		m.authFailureTotal, m.httpConnectionsDropped, m.originsRefusedTotal, m.sessionConflictsTotal, m.sessionLockAttemptsTotal, m.sessionLockSuccessTotal, m.sessionLockFailureTotal,
		m.sessionLockRenewalAttempts, m.sessionLockRenewalSuccess, m.sessionLockRenewalFailure, m.natsMessagesReceivedTotal,
		m.eventsTotal, m.redeliveredTotal, m.ownerLookupsTotal, m.grpcMessagesSentTotal,
		m.grpcMessagesReceivedTotal, m.grpcForwardRetryAttempts, m.grpcForwardRetrySuccess, m.grpcForwardRetryFailure,
		m.grpcPoolConnectionsCreated, m.grpcPoolConnectionsClosed, m.grpcConnectionsRefused, m.grpcCircuitbreakerTripped, m.targetsTotal,
		m.websocketMessagesDroppedTotal, m.gapsTotal, m.slowClientsDisconnectedTotal, m.redisErrorsTotal, m.resumeRequestsTotal,
		m.resumeEventsTotal, m.resumeGapsTotal, m.configReloadsTotal} {
		f.with(note(f.name, f.labels)...).Add(7)
	}
	for _, f := range []*gauges{m.activeConnections, m.upgradesWaiting, m.eventsInHand, m.parkedEvents, m.ackPending, m.consumerLag, m.consumerPaused,
		m.consumerHeartbeatAge, m.ownerUnanswered, m.positionAge,
		m.grpcPoolSize, m.grpcCircuitbreakerOpen, m.websocketBufferUsed, m.websocketBufferCapacity, m.buildInfo} {
		f.with(note(f.name, f.labels)...).Set(1.5)
	}
	for _, f := range []*histograms{m.connectionDurationSeconds, m.eventDeliverySeconds, m.ownerLookupSeconds, m.grpcForwardSeconds} {
		f.with(note(f.name, f.labels)...).Update(0.3)
	}
	return all
}

func TestEveryDocumentedMetricIsDeclared(t *testing.T) {
	m := newMetrics()
	want, got := strings.Fields(documentedMetrics), labelsOf(m)
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("metrics differ\n got %v\nwant %v", got, want)
	}
	if names := m.names(); len(names) != len(want) {
		t.Errorf("%d metrics declared, %d documented", len(names), len(want))
	}
}

// sample is one line of the text format, taken apart.
type sample struct {
	name, labels, le string
	value            float64
}

// exposition is a strict reading of the text format: of each family its TYPE and samples.
type exposition map[string]*struct {
	typ     string
	samples []sample
}

var (
	helpLine   = regexp.MustCompile(`^# HELP ([a-z_][a-z0-9_]*) (\S.*\S)$`)
	typeLine   = regexp.MustCompile(`^# TYPE ([a-z_][a-z0-9_]*) (counter|gauge|histogram|summary)$`)
	sampleLine = regexp.MustCompile(`^([a-z_][a-z0-9_]*)(\{((?:[a-z_]+="(?:[^"\\]|\\["\\n])*",?)*)\})? (\S+)$`)
	leLabel    = regexp.MustCompile(`,?le="([^"]*)"`)
)

// wantExposition reads text as strictly as any scraper might: HELP and TYPE once and first, families contiguous.
func wantExposition(t *testing.T, text string) exposition {
	t.Helper()
	all := exposition{}
	helped, current := "", ""
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		if m := helpLine.FindStringSubmatch(line); m != nil {
			if all[m[1]] != nil {
				t.Errorf("%s comes twice", m[1])
			}
			helped = m[1]
		} else if m := typeLine.FindStringSubmatch(line); m != nil {
			if m[1] != helped {
				t.Errorf("TYPE of %s follows HELP of %s", m[1], helped)
			}
			current = m[1]
			all[current] = &struct {
				typ     string
				samples []sample
			}{typ: m[2]}
		} else if m := sampleLine.FindStringSubmatch(line); m != nil {
			value, err := strconv.ParseFloat(m[4], 64)
			if err != nil {
				t.Errorf("value in %q: %v", line, err)
			}
			f := all[current]
			base := m[1]
			if f != nil && (f.typ == "histogram" || f.typ == "summary") {
				base = regexp.MustCompile(`_(bucket|sum|count)$`).ReplaceAllString(base, "")
			}
			if base != current {
				t.Errorf("%s stands among the samples of %s", m[1], current)
				continue
			}
			s := sample{name: strings.TrimPrefix(m[1], base), value: value, labels: leLabel.ReplaceAllString(m[3], "")}
			if le := leLabel.FindStringSubmatch(m[3]); le != nil {
				s.le = le[1]
			}
			f.samples = append(f.samples, s)
		} else {
			t.Errorf("not a line of the format: %q", line)
		}
	}
	return all
}

// wantClassicHistogram holds the samples of one histogram without labels to the format: cumulative buckets by rising le
// up to +Inf, which is the count.
func wantClassicHistogram(t *testing.T, name string, samples []sample) {
	t.Helper()
	last, lastLe, inf, endings := 0.0, math.Inf(-1), -1.0, ""
	for _, s := range samples {
		switch s.name {
		case "_bucket":
			le, err := strconv.ParseFloat(s.le, 64)
			if err != nil || le <= lastLe || s.value < last {
				t.Errorf("%s: bucket le=%q %v after le=%v %v", name, s.le, s.value, lastLe, last)
			}
			if last, lastLe = s.value, le; math.IsInf(le, 1) {
				inf = s.value
			}
		case "_sum":
			endings += "_sum"
		case "_count":
			endings += "_count"
			if s.value != inf {
				t.Errorf("%s: count %v, bucket +Inf %v", name, s.value, inf)
			}
		default:
			t.Errorf("%s: a histogram has no sample %q", name, s.name)
		}
	}
	if inf < 0 || endings != "_sum_count" {
		t.Errorf("%s: +Inf bucket %v, then %q", name, inf, endings)
	}
}

func TestExpositionIsStrict(t *testing.T) {
	m := newMetrics()
	labelsOf(m)
	m.messagesSentTotal.with("odd \"value\"\n\\ of a label").Inc()
	m.grpcMessagesSentTotal.with("pod-a").Inc()
	m.grpcMessagesSentTotal.with("pod-b").Inc()
	var b strings.Builder
	m.write(&b)
	all := wantExposition(t, b.String())
	for name := range m.declared {
		f := all[name]
		switch {
		case f == nil && strings.HasPrefix(name, "dws_"):
			t.Errorf("%s is declared but not printed", name)
		case f == nil: // not every system has every process metric
		case f.typ == "histogram":
			wantClassicHistogram(t, name, f.samples)
		case f.typ == "counter" && !strings.HasSuffix(name, "_total"), f.typ == "gauge" && strings.HasSuffix(name, "_total"):
			t.Errorf("%s is called a %s", name, f.typ)
		}
	}
	for _, name := range []string{"go_goroutines", "go_memstats_heap_inuse_bytes", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"} {
		if all[name] == nil || len(all[name].samples) != 1 || all[name].samples[0].value <= 0 && name != "process_cpu_seconds_total" {
			t.Errorf("%s: want one sample above 0, got %+v", name, all[name])
		}
	}
}

// Without any traffic, what a dashboard asks for is there: names always, samples where the labels are known.
func TestExpositionAtTheStart(t *testing.T) {
	m := newMetrics()
	var b strings.Builder
	m.write(&b)
	for _, want := range []string{
		"# TYPE dws_closes_total counter\n", "dws_connections_total{type=\"admin\"} 0\n", "dws_redelivered_total 0\n",
		"dws_nats_messages_received_total{kind=\"message\"} 0\n", "dws_event_delivery_seconds_bucket{le=\"+Inf\"} 0\n",
	} {
		if !strings.Contains(b.String(), want) {
			t.Errorf("missing %q", want)
		}
	}
}

func TestForgetDropsTheSeries(t *testing.T) {
	m := newMetrics()
	m.grpcMessagesSentTotal.with("left").Add(3)
	m.grpcMessagesSentTotal.with("stays").Add(4)
	m.grpcMessagesSentTotal.forget("left")
	m.grpcMessagesSentTotal.forget("never-there")
	var b strings.Builder
	m.write(&b)
	if strings.Contains(b.String(), "left") || !strings.Contains(b.String(), `{target_pod_id="stays"} 4`) {
		t.Errorf("series after forget:\n%s", b.String())
	}
	if n := m.grpcMessagesSentTotal.with("left").Get(); n != 0 {
		t.Errorf("a series made again starts at %d", n)
	}
}

func TestWrongNumberOfLabelsPanics(t *testing.T) {
	m := newMetrics()
	for _, values := range [][]string{nil, {"user", "extra"}} {
		func() {
			defer func() {
				if want := fmt.Sprintf("metric dws_closes_total has 1 labels, got %d values", len(values)); recover() != want {
					t.Errorf("with(%q): no panic %q", values, want)
				}
			}()
			m.closesTotal.with(values...)
		}()
	}
}

func TestSeriesFromManyGoroutines(t *testing.T) {
	m := newMetrics()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 500 {
				m.eventsTotal.with("chat", strconv.Itoa(i%10)).Inc()
			}
		})
	}
	wg.Wait()
	sum := uint64(0)
	for i := range 10 {
		sum += m.eventsTotal.with("chat", strconv.Itoa(i)).Get()
	}
	if sum != 4000 {
		t.Errorf("counted %d of 4000", sum)
	}
}

func TestLookingUpASeriesAllocatesNothing(t *testing.T) {
	m := newMetrics()
	kind, outcome := "chat", "written"
	m.eventsTotal.with(kind, outcome)
	if n := testing.AllocsPerRun(100, func() { m.eventsTotal.with(kind, outcome).Inc() }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
