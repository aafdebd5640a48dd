package main

import (
	"bytes"
	"fmt"
	"io"
	"maps"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	vm "github.com/VictoriaMetrics/metrics"
)

// family is one metric with all its label values. Label values must come from a bounded set: never a
// session, user, chat or subject.
type family[T any] struct {
	set    *vm.Set
	name   string
	labels []string // two at the most
	create func(series string) T

	mu sync.Mutex // serializes changes of series
	// series is replaced with each new one, never changed: every event looks several up, and a read lock is a write
	// to memory that all cores share.
	series atomic.Pointer[map[labelValues]T]
}

// labelValues are those of one series, in the order in which the labels were declared; unused ones are empty.
type labelValues [2]string

type (
	counters   = family[*vm.Counter]
	gauges     = family[*vm.Gauge]
	histograms = family[*vm.PrometheusHistogram]
)

// with returns the series of these label values, in the order in which the labels were declared, and makes it if it is
// new. Any goroutine may call; it allocates only for a new series.
func (f *family[T]) with(values ...string) T {
	var key labelValues
	copy(key[:], values)
	if s, ok := (*f.series.Load())[key]; ok {
		return s
	}
	return f.add(key, len(values))
}

func (f *family[T]) add(key labelValues, n int) T {
	f.mu.Lock()
	defer f.mu.Unlock()
	old := *f.series.Load()
	if s, ok := old[key]; ok {
		return s
	}
	if n != len(f.labels) {
		panic(fmt.Sprintf("metric %s has %d labels, got %d values", f.name, len(f.labels), n))
	}
	// The caller's strings may be parts of a large buffer.
	for i, v := range key {
		key[i] = strings.Clone(v)
	}
	next := maps.Clone(old)
	next[key] = f.create(f.seriesName(key))
	f.series.Store(&next)
	return next[key]
}

// forget drops a series: that of a peer which is gone. Who still holds it counts into nothing.
func (f *family[T]) forget(values ...string) {
	var key labelValues
	copy(key[:], values)
	f.mu.Lock()
	defer f.mu.Unlock()
	next := maps.Clone(*f.series.Load())
	delete(next, key)
	f.series.Store(&next)
	f.set.UnregisterMetric(f.seriesName(key))
}

// labelEscapes are the only ones that the text format knows: %q would write others.
var labelEscapes = strings.NewReplacer(`\`, `\\`, `"`, `\"`, "\n", `\n`)

// seriesName is name{label="value",…}, as the library takes it and prints it.
func (f *family[T]) seriesName(key labelValues) string {
	if len(f.labels) == 0 {
		return f.name
	}
	pairs := make([]string, len(f.labels))
	for i, label := range f.labels {
		pairs[i] = label + `="` + labelEscapes.Replace(key[i]) + `"`
	}
	return f.name + "{" + strings.Join(pairs, ",") + "}"
}

// Metrics holds every metric, declared once, in newMetrics.
type Metrics struct {
	set      *vm.Set
	declared map[string]declaration // by metric name; complete after newMetrics

	activeConnections             *gauges
	upgradesWaiting               *gauges
	httpConnectionsDropped        *counters
	connectionsTotal              *counters
	connectionDurationSeconds     *histograms
	closesTotal                   *counters
	messagesReceivedTotal         *counters
	messagesSentTotal             *counters
	authSuccessTotal              *counters
	authFailureTotal              *counters
	originsRefusedTotal           *counters
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
	consumerPaused                *gauges
	consumerHeartbeatAge          *gauges
	ownerLookupsTotal             *counters
	ownerLookupSeconds            *histograms
	ownerUnanswered               *gauges
	positionAge                   *gauges
	grpcMessagesSentTotal         *counters
	grpcMessagesReceivedTotal     *counters
	grpcForwardRetryAttempts      *counters
	grpcForwardRetrySuccess       *counters
	grpcForwardRetryFailure       *counters
	grpcForwardSeconds            *histograms
	grpcPoolSize                  *gauges
	grpcPoolConnectionsCreated    *counters
	grpcPoolConnectionsClosed     *counters
	grpcConnectionsRefused        *counters
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

// latencyBuckets are the buckets of what should take milliseconds and may take until the ack wait.
var latencyBuckets = []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// newMetrics declares every metric and makes those series that are to be seen before they count: a rate needs a first
// sample. To be called once per process; a test may make its own.
func newMetrics() *Metrics {
	m := &Metrics{set: vm.NewSet(), declared: maps.Clone(runtimeMetrics)}
	m.declareSockets()
	m.declareEvents()
	m.declarePeers()
	for _, who := range []string{"user", "admin"} {
		m.activeConnections.with(who)
		m.connectionsTotal.with(who)
		m.authSuccessTotal.with(who)
		m.sessionConflictsTotal.with(who)
	}
	for _, kind := range kindNames {
		m.natsMessagesReceivedTotal.with(kind)
	}
	m.buildInfo.with(buildVersion(), runtime.Version()).Set(1)
	for _, result := range []string{"success", "failure"} {
		m.configReloadsTotal.with(result)
	}
	return m
}

// declareSockets declares what is about sockets, their sessions and the process as a whole.
func (m *Metrics) declareSockets() {
	m.activeConnections = m.gauge("active_connections", "Open sockets of this pod.", "type")
	m.httpConnectionsDropped = m.counter("http_connections_dropped_total", "HTTP connections without a request that were closed since there were too many.")
	m.upgradesWaiting = m.gauge("upgrades_waiting", "Authenticated upgrades that wait for their turn: 64 at a time are set up.")
	m.connectionsTotal = m.counter("connections_total", "Sockets opened.", "type")
	m.connectionDurationSeconds = m.histogram("connection_duration_seconds", "Life of closed sockets.", []float64{1, 10, 60, 300, 1800, 3600, 14400, 86400})
	m.closesTotal = m.counter("closes_total", "Sockets closed, by the close code sent or received.", "code")
	m.messagesReceivedTotal = m.counter("messages_received_total", "Messages from clients.", "message_type")
	m.messagesSentTotal = m.counter("messages_sent_total", "Messages written to clients.", "message_type")
	m.authSuccessTotal = m.counter("auth_success_total", "Tokens accepted.", "token_type")
	m.authFailureTotal = m.counter("auth_failure_total", "Keys and tokens refused.", "token_type", "reason")
	m.originsRefusedTotal = m.counter("origins_refused_total", "Upgrades refused for their origin.")
	m.sessionConflictsTotal = m.counter("session_conflicts_total", "Sockets that found their session held by another.", "user_type")
	m.sessionLockAttemptsTotal = m.counter("session_lock_attempts_total", "Attempts to take a session's lock; lock_type is new or takeover.", "user_type", "lock_type")
	m.sessionLockSuccessTotal = m.counter("session_lock_success_total", "Session locks taken.")
	m.sessionLockFailureTotal = m.counter("session_lock_failure_total", "Session locks not taken.", "reason")
	m.sessionLockRenewalAttempts = m.counter("session_lock_renewal_attempts_total", "Renewals of session locks tried.")
	m.sessionLockRenewalSuccess = m.counter("session_lock_renewal_success_total", "Renewals of session locks done.")
	m.sessionLockRenewalFailure = m.counter("session_lock_renewal_failure_total", "Renewals of session locks failed.", "reason")
	m.configReloadsTotal = m.counter("config_reloads_total", "Reloads of the settings by SIGHUP.", "result")
	m.buildInfo = m.gauge("build_info", "1, with the build in its labels.", "version", "go_version")
}

// declareEvents declares what is about events on their way from JetStream to the sockets.
func (m *Metrics) declareEvents() {
	m.natsMessagesReceivedTotal = m.counter("nats_messages_received_total", "Deliveries received from JetStream.", "kind")
	m.eventsTotal = m.counter("events_total", "Deliveries ended, by the worst outcome of their targets; with dws_events_in_hand they add up to dws_nats_messages_received_total.", "kind", "outcome")
	m.eventsInHand = m.gauge("events_in_hand", "Deliveries from JetStream not yet ended.")
	m.eventDeliverySeconds = m.histogram("event_delivery_seconds", "From JetStream's store time to the socket write.", latencyBuckets)
	m.redeliveredTotal = m.counter("redelivered_total", "Deliveries that were not the first of their event.")
	m.parkedEvents = m.gauge("parked_events", "NAKed events that wait for their redelivery.")
	m.ackPending = m.gauge("ack_pending", "Unacked events of the consumer, all pods.")
	m.consumerLag = m.gauge("consumer_lag", "Events in the stream that the consumer has not given out yet.")
	m.consumerPaused = m.gauge("consumer_paused", "1 while somebody has paused the consumer.")
	m.consumerHeartbeatAge = m.gauge("consumer_heartbeat_age_seconds", "Since the consumer last showed life.")
	m.ownerLookupsTotal = m.counter("owner_lookups_total", "Routes whose owners Redis was asked for.")
	m.ownerLookupSeconds = m.histogram("owner_lookup_seconds", "Answers of Redis about the owners of a batch of events.", latencyBuckets)
	m.ownerUnanswered = m.gauge("owner_unanswered", "Events that wait for Redis to say who owns their agents.")
	m.positionAge = m.gauge("position_age_seconds", "Since the pod last issued a position.")
	m.targetsTotal = m.counter("targets_total", "Events for single sockets: pushed = written + dropped + duplicate + replayed + unselected + gone + failed + waiting (dws_websocket_buffer_used).", "outcome")
	m.websocketMessagesDroppedTotal = m.counter("websocket_messages_dropped_total", "Events that a socket gave up.", "reason")
	m.websocketBufferUsed = m.gauge("websocket_buffer_used", "Events waiting in the send rings of all sockets.")
	m.websocketBufferCapacity = m.gauge("websocket_buffer_capacity", "Room in the send rings of all sockets.")
	m.gapsTotal = m.counter("gaps_total", "Gaps announced to sockets.", "reason")
	m.slowClientsDisconnectedTotal = m.counter("slow_clients_disconnected_total", "Sockets closed with 4408.")
	m.redisErrorsTotal = m.counter("redis_errors_total", "Failed Redis commands.", "op")
	m.resumeRequestsTotal = m.counter("resume_requests_total", "Resumes asked for.")
	m.resumeEventsTotal = m.counter("resume_events_total", "Events replayed.")
	m.resumeGapsTotal = m.counter("resume_gaps_total", "Resumes answered by gap.")
}

// declarePeers declares what is about the talk among pods.
func (m *Metrics) declarePeers() {
	m.grpcMessagesSentTotal = m.counter("grpc_messages_sent_total", "Events sent to a peer.", "target_pod_id")
	m.grpcMessagesReceivedTotal = m.counter("grpc_messages_received_total", "Events received from a peer.", "source_pod_id")
	m.grpcForwardRetryAttempts = m.counter("grpc_forward_retry_attempts_total", "Streams to peers opened a second time after Unavailable.")
	m.grpcForwardRetrySuccess = m.counter("grpc_forward_retry_success_total", "Such retries that worked.")
	m.grpcForwardRetryFailure = m.counter("grpc_forward_retry_failure_total", "Such retries that failed.")
	m.grpcForwardSeconds = m.histogram("grpc_forward_seconds", "From the send to a peer until it said received.", latencyBuckets)
	m.grpcPoolSize = m.gauge("grpc_pool_size", "Connections to peers.")
	m.grpcPoolConnectionsCreated = m.counter("grpc_pool_connections_created_total", "Connections to peers made.")
	m.grpcPoolConnectionsClosed = m.counter("grpc_pool_connections_closed_total", "Connections to peers closed.", "reason")
	m.grpcConnectionsRefused = m.counter("grpc_connections_refused_total", "Connections to the gRPC port that were not let in: handshake (no TLS, or not with a token key), pace and crowd (too many strangers at once).", "reason")
	m.grpcCircuitbreakerTripped = m.counter("grpc_circuitbreaker_tripped_total", "Times that a peer's breaker opened.")
	m.grpcCircuitbreakerOpen = m.gauge("grpc_circuitbreaker_open", "Peers whose breaker is open or half-open.")
}

// declaration is what a HELP and a TYPE line say of a metric.
type declaration struct{ typ, help string }

// runtimeMetrics are those of the library's metrics of the Go runtime and the process that are passed on: all but its
// two histograms without _sum and _count, and names that break the conventions.
var runtimeMetrics = map[string]declaration{
	"go_cpu_count":                        {"gauge", "CPUs usable by the process."},
	"go_gc_cpu_seconds_total":             {"counter", "CPU time spent in garbage collection."},
	"go_gc_duration_seconds":              {"summary", "Pauses of the last garbage collections."},
	"go_gc_mark_assist_cpu_seconds_total": {"counter", "CPU time that goroutines spent helping the garbage collector."},
	"go_gomaxprocs":                       {"gauge", "Threads that may run Go code at once."},
	"go_goroutines":                       {"gauge", "Goroutines."},
	"go_info":                             {"gauge", "1, with the Go version in its label."},
	"go_memlimit_bytes":                   {"gauge", "Soft limit of memory, GOMEMLIMIT."},
	"go_memstats_alloc_bytes":             {"gauge", "Bytes of live and not yet swept heap objects."},
	"go_memstats_alloc_bytes_total":       {"counter", "Bytes allocated for heap objects."},
	"go_memstats_frees_total":             {"counter", "Heap objects freed."},
	"go_memstats_heap_idle_bytes":         {"gauge", "Bytes in unused heap spans."},
	"go_memstats_heap_inuse_bytes":        {"gauge", "Bytes in used heap spans."},
	"go_memstats_heap_objects":            {"gauge", "Heap objects."},
	"go_memstats_heap_released_bytes":     {"gauge", "Bytes of the heap given back to the operating system."},
	"go_memstats_heap_sys_bytes":          {"gauge", "Bytes of the heap obtained from the operating system."},
	"go_memstats_last_gc_time_seconds":    {"gauge", "When the last garbage collection ended, in Unix time."},
	"go_memstats_mallocs_total":           {"counter", "Heap objects allocated."},
	"go_memstats_next_gc_bytes":           {"gauge", "Heap size at which the next garbage collection starts."},
	"go_memstats_stack_inuse_bytes":       {"gauge", "Bytes in stack spans."},
	"go_memstats_sys_bytes":               {"gauge", "Bytes obtained from the operating system."},
	"go_mutex_wait_seconds_total":         {"counter", "Time that goroutines waited for mutexes."},
	"go_threads":                          {"gauge", "Operating system threads made."},
	"process_cpu_seconds_system_total":    {"counter", "CPU time spent in the kernel."},
	"process_cpu_seconds_total":           {"counter", "CPU time spent."},
	"process_cpu_seconds_user_total":      {"counter", "CPU time spent outside the kernel."},
	"process_io_read_bytes_total":         {"counter", "Bytes read by system calls."},
	"process_io_written_bytes_total":      {"counter", "Bytes written by system calls."},
	"process_io_read_syscalls_total":      {"counter", "System calls that read."},
	"process_io_write_syscalls_total":     {"counter", "System calls that wrote."},
	"process_major_pagefaults_total":      {"counter", "Page faults that needed the disk."},
	"process_max_fds":                     {"gauge", "Limit of open file descriptors."},
	"process_num_threads":                 {"gauge", "Operating system threads."},
	"process_open_fds":                    {"gauge", "Open file descriptors."},
	"process_resident_memory_anon_bytes":  {"gauge", "Resident memory that no file backs."},
	"process_resident_memory_bytes":       {"gauge", "Resident memory."},
	"process_resident_memory_peak_bytes":  {"gauge", "Largest resident memory so far."},
	"process_start_time_seconds":          {"gauge", "When the process started, in Unix time."},
	"process_virtual_memory_bytes":        {"gauge", "Virtual memory."},
}

func newFamily[T any](m *Metrics, typ, name, help string, labels []string, create func(string) T) *family[T] {
	name = "dws_" + name
	m.declared[name] = declaration{typ, help}
	f := &family[T]{set: m.set, name: name, labels: labels, create: create}
	f.series.Store(&map[labelValues]T{})
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

// write prints everything in Prometheus' text format, version 0.0.4. HELP and TYPE come from our own table, since the
// library leaves HELP empty. A metric of ours without a series yet has these two lines alone, so that it can be found.
func (m *Metrics) write(w io.Writer) {
	var samples bytes.Buffer
	m.set.WritePrometheus(&samples)
	vm.WriteGoMetrics(&samples)
	vm.WriteProcMetrics(&samples)
	vm.WriteFDMetrics(&samples)
	lines := map[string][]byte{} // by family: the format wants a family's lines together
	for line := range bytes.Lines(samples.Bytes()) {
		name := m.familyOf(string(line[:bytes.IndexAny(line, "{ ")]))
		lines[name] = append(lines[name], line...)
	}
	var out bytes.Buffer
	for _, name := range slices.Sorted(maps.Keys(m.declared)) {
		if strings.HasPrefix(name, "dws_") || lines[name] != nil {
			d := m.declared[name]
			fmt.Fprintf(&out, "# HELP %s %s\n# TYPE %s %s\n", name, d.help, name, d.typ)
			out.Write(lines[name])
		}
	}
	w.Write(out.Bytes()) // a scraper that went away comes again
}

// familyOf is the metric that a sample of this name belongs to: those of histograms and summaries have endings of their own.
func (m *Metrics) familyOf(sample string) string {
	for _, ending := range []string{"_bucket", "_sum", "_count"} {
		base, ok := strings.CutSuffix(sample, ending)
		if typ := m.declared[base].typ; ok && (typ == "histogram" || typ == "summary") {
			return base
		}
	}
	return sample
}

// names lists our metrics, without those of the runtime, for whoever holds documentation against the code.
func (m *Metrics) names() []string {
	var ours []string
	for name := range m.declared {
		if runtimeMetrics[name].typ == "" {
			ours = append(ours, name)
		}
	}
	slices.Sort(ours)
	return ours
}
