package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"slices"
	"strings"
	"sync"

	vm "github.com/VictoriaMetrics/metrics"
)

// family is one metric with all its label values. Label values must come from a bounded set: never a
// session, user, chat or subject.
type family[T any] struct {
	set    *vm.Set
	name   string
	labels []string
	create func(series string) T

	mu     sync.RWMutex // guards series
	series map[string]T // key: label values joined by 0x00
}

type (
	counters   = family[*vm.Counter]
	gauges     = family[*vm.Gauge]
	histograms = family[*vm.PrometheusHistogram]
)

// with returns the series of these label values, in the order in which the labels were declared. Any goroutine may call.
func (f *family[T]) with(values ...string) T {
	key := ""
	if len(values) == 1 {
		key = values[0]
	} else {
		key = strings.Join(values, "\x00")
	}
	f.mu.RLock()
	s, ok := f.series[key]
	f.mu.RUnlock()
	if ok {
		return s
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if s, ok = f.series[key]; !ok {
		s = f.create(f.seriesName(values))
		f.series[strings.Clone(key)] = s
	}
	return s
}

// forget drops a series: that of a peer which is gone.
func (f *family[T]) forget(values ...string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.series, strings.Join(values, "\x00"))
	f.set.UnregisterMetric(f.seriesName(values))
}

func (f *family[T]) seriesName(values []string) string {
	if len(values) != len(f.labels) {
		panic(fmt.Sprintf("metric %s has %d labels, got %d values", f.name, len(f.labels), len(values)))
	}
	if len(values) == 0 {
		return f.name
	}
	var b strings.Builder
	for i, v := range values {
		sep := ","
		if i == 0 {
			sep = f.name + "{"
		}
		fmt.Fprintf(&b, "%s%s=%q", sep, f.labels[i], v)
	}
	return b.String() + "}"
}

// Metrics holds every metric, declared once, in newMetrics. The names are those of the fields with the prefix dws_.
type Metrics struct {
	set  *vm.Set
	help map[string]string // by metric name
	typ  map[string]string

	activeConnections             *gauges
	connectionsTotal              *counters
	connectionDurationSeconds     *histograms
	closesTotal                   *counters
	messagesReceivedTotal         *counters
	messagesSentTotal             *counters
	authSuccessTotal              *counters
	authFailureTotal              *counters
	sessionConflictsTotal         *counters
	sessionLockAttemptsTotal      *counters
	sessionLockSuccessTotal       *counters
	sessionLockFailureTotal       *counters
	sessionLockRenewalAttempts    *counters
	sessionLockRenewalSuccess     *counters
	sessionLockRenewalFailure     *counters
	natsMessagesReceivedTotal     *counters
	eventsTotal                   *counters
	eventsInHand                  *gauges
	eventDeliverySeconds          *histograms
	redeliveredTotal              *counters
	parkedEvents                  *gauges
	ackPending                    *gauges
	consumerLag                   *gauges
	consumerHeartbeatAge          *gauges
	ownerCacheHitsTotal           *counters
	ownerCacheMissesTotal         *counters
	grpcMessagesSentTotal         *counters
	grpcMessagesReceivedTotal     *counters
	grpcForwardRetryAttempts      *counters
	grpcForwardRetrySuccess       *counters
	grpcForwardRetryFailure       *counters
	grpcForwardSeconds            *histograms
	grpcPoolSize                  *gauges
	grpcPoolConnectionsCreated    *counters
	grpcPoolConnectionsClosed     *counters
	grpcCircuitbreakerTripped     *counters
	grpcCircuitbreakerOpen        *gauges
	targetsTotal                  *counters
	websocketMessagesDroppedTotal *counters
	websocketBufferUsed           *gauges
	websocketBufferCapacity       *gauges
	gapsTotal                     *counters
	slowClientsDisconnectedTotal  *counters
	redisErrorsTotal              *counters
	resumeRequestsTotal           *counters
	resumeEventsTotal             *counters
	resumeGapsTotal               *counters
	configReloadsTotal            *counters
	buildInfo                     *gauges
}

func newMetrics() *Metrics {
	m := &Metrics{set: vm.NewSet(), help: map[string]string{}, typ: map[string]string{}}
	latency := []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

	m.activeConnections = m.gauge("active_connections", "Open sockets of this pod.", "type")
	m.connectionsTotal = m.counter("connections_total", "Sockets opened.", "type")
	m.connectionDurationSeconds = m.histogram("connection_duration_seconds", "Life of closed sockets.", []float64{1, 10, 60, 300, 1800, 3600, 14400, 86400})
	m.closesTotal = m.counter("closes_total", "Sockets closed, by the close code sent or received.", "code")
	m.messagesReceivedTotal = m.counter("messages_received_total", "Messages from clients.", "message_type")
	m.messagesSentTotal = m.counter("messages_sent_total", "Messages written to clients.", "message_type")
	m.authSuccessTotal = m.counter("auth_success_total", "Tokens accepted.", "token_type")
	m.authFailureTotal = m.counter("auth_failure_total", "Keys and tokens refused.", "token_type", "reason")
	m.sessionConflictsTotal = m.counter("session_conflicts_total", "Sockets that found their session held by another.", "user_type")
	m.sessionLockAttemptsTotal = m.counter("session_lock_attempts_total", "Attempts to take a session's lock; lock_type is new or takeover.", "user_type", "lock_type")
	m.sessionLockSuccessTotal = m.counter("session_lock_success_total", "Session locks taken.")
	m.sessionLockFailureTotal = m.counter("session_lock_failure_total", "Session locks not taken.", "reason")
	m.sessionLockRenewalAttempts = m.counter("session_lock_renewal_attempts_total", "Renewals of session locks tried.")
	m.sessionLockRenewalSuccess = m.counter("session_lock_renewal_success_total", "Renewals of session locks done.")
	m.sessionLockRenewalFailure = m.counter("session_lock_renewal_failure_total", "Renewals of session locks failed.", "reason")
	m.natsMessagesReceivedTotal = m.counter("nats_messages_received_total", "Deliveries received from JetStream.", "kind")
	m.eventsTotal = m.counter("events_total", "Deliveries ended, by the worst outcome of their targets; with dws_events_in_hand they add up to dws_nats_messages_received_total.", "kind", "outcome")
	m.eventsInHand = m.gauge("events_in_hand", "Deliveries from JetStream not yet ended.")
	m.eventDeliverySeconds = m.histogram("event_delivery_seconds", "From JetStream's store time to the socket write.", latency)
	m.redeliveredTotal = m.counter("redelivered_total", "Deliveries that were not the first of their event.")
	m.parkedEvents = m.gauge("parked_events", "NAKed events that wait for their redelivery.")
	m.ackPending = m.gauge("ack_pending", "Unacked events of the consumer, all pods.")
	m.consumerLag = m.gauge("consumer_lag", "Events in the stream that the consumer has not given out yet.")
	m.consumerHeartbeatAge = m.gauge("consumer_heartbeat_age_seconds", "Since the consumer last showed life.")
	m.ownerCacheHitsTotal = m.counter("owner_cache_hits_total", "Owner look-ups answered from memory.")
	m.ownerCacheMissesTotal = m.counter("owner_cache_misses_total", "Owner look-ups that asked Redis.")
	m.grpcMessagesSentTotal = m.counter("grpc_messages_sent_total", "Events sent to a peer.", "target_pod_id")
	m.grpcMessagesReceivedTotal = m.counter("grpc_messages_received_total", "Events received from a peer.", "source_pod_id")
	m.grpcForwardRetryAttempts = m.counter("grpc_forward_retry_attempts_total", "Streams to peers opened a second time after Unavailable.")
	m.grpcForwardRetrySuccess = m.counter("grpc_forward_retry_success_total", "Such retries that worked.")
	m.grpcForwardRetryFailure = m.counter("grpc_forward_retry_failure_total", "Such retries that failed.")
	m.grpcForwardSeconds = m.histogram("grpc_forward_seconds", "From the send to a peer until it said received.", latency)
	m.grpcPoolSize = m.gauge("grpc_pool_size", "Connections to peers.")
	m.grpcPoolConnectionsCreated = m.counter("grpc_pool_connections_created_total", "Connections to peers made.")
	m.grpcPoolConnectionsClosed = m.counter("grpc_pool_connections_closed_total", "Connections to peers closed.", "reason")
	m.grpcCircuitbreakerTripped = m.counter("grpc_circuitbreaker_tripped_total", "Times that a peer's breaker opened.")
	m.grpcCircuitbreakerOpen = m.gauge("grpc_circuitbreaker_open", "Peers whose breaker is open or half-open.")
	m.targetsTotal = m.counter("targets_total", "Events for single sockets: pushed = written + dropped + duplicate + failed + waiting (dws_websocket_buffer_used).", "outcome")
	m.websocketMessagesDroppedTotal = m.counter("websocket_messages_dropped_total", "Events that a socket gave up.", "reason")
	m.websocketBufferUsed = m.gauge("websocket_buffer_used", "Events waiting in the send rings of all sockets.")
	m.websocketBufferCapacity = m.gauge("websocket_buffer_capacity", "Room in the send rings of all sockets.")
	m.gapsTotal = m.counter("gaps_total", "Gaps announced to sockets.", "reason")
	m.slowClientsDisconnectedTotal = m.counter("slow_clients_disconnected_total", "Sockets closed with 4408.")
	m.redisErrorsTotal = m.counter("redis_errors_total", "Failed Redis commands.", "op")
	m.resumeRequestsTotal = m.counter("resume_requests_total", "Resumes asked for.")
	m.resumeEventsTotal = m.counter("resume_events_total", "Events replayed.")
	m.resumeGapsTotal = m.counter("resume_gaps_total", "Resumes answered by gap.")
	m.configReloadsTotal = m.counter("config_reloads_total", "Reloads of the settings by SIGHUP.", "result")
	m.buildInfo = m.gauge("build_info", "1, with the build in its labels.", "version", "go_version")
	return m
}

func newFamily[T any](m *Metrics, typ, name, help string, labels []string, create func(string) T) *family[T] {
	name = "dws_" + name
	m.help[name], m.typ[name] = help, typ
	f := &family[T]{set: m.set, name: name, labels: labels, create: create, series: map[string]T{}}
	if len(labels) == 0 {
		f.with() // an unlabelled metric shows from the start, at 0
	}
	return f
}

func (m *Metrics) counter(name, help string, labels ...string) *counters {
	return newFamily(m, "counter", name, help, labels, m.set.GetOrCreateCounter)
}

func (m *Metrics) gauge(name, help string, labels ...string) *gauges {
	return newFamily(m, "gauge", name, help, labels, func(s string) *vm.Gauge { return m.set.GetOrCreateGauge(s, nil) })
}

// histogram makes a classic Prometheus histogram: the library's plain ones have buckets that only VictoriaMetrics reads.
func (m *Metrics) histogram(name, help string, bounds []float64) *histograms {
	return newFamily(m, "histogram", name, help, nil, func(s string) *vm.PrometheusHistogram {
		return m.set.GetOrCreatePrometheusHistogramExt(s, bounds)
	})
}

// write prints everything in Prometheus' text format. HELP and TYPE come from our own table, since the library leaves
// HELP empty; its own lines are sorted by name, so each family stands together.
func (m *Metrics) write(w io.Writer) {
	var buf bytes.Buffer
	m.set.WritePrometheus(&buf)
	out := bufio.NewWriter(w)
	last := ""
	for line := range bytes.Lines(buf.Bytes()) {
		name := string(line[:bytes.IndexAny(line, "{ ")])
		if m.typ[name] == "" {
			for _, suffix := range []string{"_bucket", "_sum", "_count"} {
				if base, ok := strings.CutSuffix(name, suffix); ok && m.typ[base] == "histogram" {
					name = base
				}
			}
		}
		if name != last {
			fmt.Fprintf(out, "# HELP %s %s\n# TYPE %s %s\n", name, m.help[name], name, m.typ[name])
			last = name
		}
		out.Write(line)
	}
	out.Flush()
	vm.WriteProcessMetrics(w)
}

// names lists every metric, for the test that holds the documentation against the code.
func (m *Metrics) names() []string {
	var all []string
	for n := range m.help {
		all = append(all, n)
	}
	slices.Sort(all)
	return all
}
