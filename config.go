package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"reflect"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// Config holds every setting, each declared once, by its tags:
//
//	set       name, after DAISI_WS_
//	default   as one would write it
//	help      meaning
//	required  may not be empty
//	min, max  bounds, inclusive
//	oneof     the values allowed
//	check     name of its rule in checks (rules.go)
//	list      comma-separated; the rule is for each part
//	secret    masked when printed, may come from a file named by <NAME>_FILE; "url": only the user part is secret
//	live      SIGHUP changes it; any other needs a restart; "unless-empty": from and to empty needs one too
type Config struct {
	ServerHTTPPort         int           `set:"SERVER_HTTP_PORT" default:"8080" min:"0" max:"65535" help:"TCP port of HTTP and WebSocket; 0 = any free one"`
	ServerGRPCPort         int           `set:"SERVER_GRPC_PORT" default:"50051" min:"0" max:"65535" help:"TCP port that peers dial; 0 = any free one"`
	ServerPodID            string        `set:"SERVER_POD_ID" default:"" check:"podID" help:"name of this pod, unique in the cluster (default: host name)"`
	ServerEnableReflection bool          `set:"SERVER_ENABLE_REFLECTION" default:"false" help:"serve gRPC reflection, for development"`
	ServerBindAddress      string        `set:"SERVER_BIND_ADDRESS" default:"" check:"host" help:"address to listen on (default: all interfaces)"`
	ServerAdvertiseAddress string        `set:"SERVER_ADVERTISE_ADDRESS" default:"" check:"dialable" help:"host or host:port that peers dial (default: this machine's address on its way to Redis)"`
	ServerReadTimeout      time.Duration `set:"SERVER_READ_TIMEOUT" default:"10s" min:"1ms" help:"limit for reading a whole HTTP request"`
	ServerWriteTimeout     time.Duration `set:"SERVER_WRITE_TIMEOUT" default:"10s" min:"1ms" help:"limit for writing an HTTP response"`
	ServerIdleTimeout      time.Duration `set:"SERVER_IDLE_TIMEOUT" default:"60s" min:"1ms" help:"how long an idle keep-alive HTTP connection stays"`
	ServerShutdownTimeout  time.Duration `set:"SERVER_SHUTDOWN_TIMEOUT" default:"30s" min:"1ms" help:"limit for the whole drain after SIGTERM"`
	ServerDrainSpread      time.Duration `set:"SERVER_DRAIN_SPREAD" default:"5s" min:"0s" live:"true" help:"over how long a drain spreads the closing of its sockets"`
	ServerMaxConnections   int           `set:"SERVER_MAX_CONNECTIONS" default:"15000" min:"1" live:"true" help:"sockets at most; further ones get 503"`
	ServerTLSCertFile      string        `set:"SERVER_TLS_CERT_FILE" default:"" live:"unless-empty" help:"certificate chain (PEM) for HTTPS and wss"`
	ServerTLSKeyFile       string        `set:"SERVER_TLS_KEY_FILE" default:"" live:"unless-empty" help:"key (PEM) of SERVER_TLS_CERT_FILE"`
	ServerDebugAddress     string        `set:"SERVER_DEBUG_ADDRESS" default:"" check:"hostPort" help:"host:port of net/http/pprof (default: off)"`

	LogLevel  string `set:"LOG_LEVEL" default:"info" oneof:"debug,info,warn,error" live:"true" help:"debug, info, warn or error"`
	LogFormat string `set:"LOG_FORMAT" default:"json" oneof:"json,text" help:"json or text"`

	NATSURL            string        `set:"NATS_URL" default:"nats://127.0.0.1:4222" list:"true" check:"natsURL" secret:"url" help:"NATS servers, comma-separated"`
	NATSStreamName     string        `set:"NATS_STREAM_NAME" default:"wa_stream" check:"natsName" help:"JetStream stream to read"`
	NATSConsumerName   string        `set:"NATS_CONSUMER_NAME" default:"ws_fanout" check:"natsName" help:"durable consumer that all pods share"`
	NATSSubjectPrefix  string        `set:"NATS_SUBJECT_PREFIX" default:"wa" check:"subject" help:"first token(s) of the subjects"`
	NATSCreateStream   bool          `set:"NATS_CREATE_STREAM" default:"false" help:"create the stream if it does not exist"`
	NATSStreamMaxAge   time.Duration `set:"NATS_STREAM_MAX_AGE" default:"24h" min:"1s" help:"max age of a stream created by NATS_CREATE_STREAM"`
	NATSStreamReplicas int           `set:"NATS_STREAM_REPLICAS" default:"1" min:"1" max:"5" help:"replicas of a stream created by NATS_CREATE_STREAM"`
	NATSJSDomain       string        `set:"NATS_JS_DOMAIN" default:"" check:"natsName" help:"JetStream domain of the stream, as behind a leaf node"`
	NATSJSAPIPrefix    string        `set:"NATS_JS_API_PREFIX" default:"" check:"apiPrefix" help:"prefix of JetStream's API, where an account imports it under another one than $JS.API"`
	NATSCredsFile      string        `set:"NATS_CREDS_FILE" default:"" help:"credentials file"`
	NATSNKeyFile       string        `set:"NATS_NKEY_FILE" default:"" help:"file with the seed of the user's NKey"`
	NATSTLSCAFile      string        `set:"NATS_TLS_CA_FILE" default:"" help:"CA (PEM) that signed the servers' certificates"`
	NATSTLSCertFile    string        `set:"NATS_TLS_CERT_FILE" default:"" help:"client certificate (PEM)"`
	NATSTLSKeyFile     string        `set:"NATS_TLS_KEY_FILE" default:"" help:"key (PEM) of NATS_TLS_CERT_FILE"`
	NATSConnectTimeout time.Duration `set:"NATS_CONNECT_TIMEOUT" default:"5s" min:"1ms" help:"limit for one connection attempt"`
	NATSReconnectWait  time.Duration `set:"NATS_RECONNECT_WAIT" default:"2s" min:"1ms" help:"pause between connection attempts"`
	NATSMaxReconnects  int           `set:"NATS_MAX_RECONNECTS" default:"-1" min:"-1" help:"attempts to reconnect before giving up; -1 = never give up"`
	NATSPingInterval   time.Duration `set:"NATS_PING_INTERVAL" default:"20s" min:"1ms" help:"pause between pings to the server"`
	NATSAckWait        time.Duration `set:"NATS_ACK_WAIT" default:"30s" min:"1ms" help:"the consumer's ack wait: JetStream gives an event out again after it"`
	NATSMaxAckPending  int           `set:"NATS_MAX_ACK_PENDING" default:"65536" min:"2" help:"the consumer's limit of unacked events, over all pods"`
	NATSNakDelay       time.Duration `set:"NATS_NAK_DELAY" default:"1s" min:"1ms" help:"delay of the first redelivery; doubled each time up to 16 times it"`
	NATSRetryHorizon   time.Duration `set:"NATS_RETRY_HORIZON" default:"60s" min:"1ms" help:"age in the stream past which a failed event is given up"`
	NATSParkedBudget   int           `set:"NATS_PARKED_BUDGET" default:"500" min:"0" help:"events without an owner that this pod keeps waiting"`
	NATSDeliverPolicy  string        `set:"NATS_DELIVER_POLICY" default:"new" oneof:"new,all" help:"where a newly made consumer starts: new or all"`
	NATSPrefetch       int           `set:"NATS_PREFETCH" default:"500" min:"1" help:"events asked for in advance"`
	NATSPrefetchBytes  byteSize      `set:"NATS_PREFETCH_BYTES" default:"16MiB" min:"1KiB" help:"bytes asked for in advance; room for one event in any case"`

	RedisAddress          string `set:"REDIS_ADDRESS" default:"127.0.0.1:6379" list:"true" check:"hostPort" help:"host:port, comma-separated for cluster and sentinel"`
	RedisMode             string `set:"REDIS_MODE" default:"single" oneof:"single,cluster,sentinel" help:"single, cluster or sentinel"`
	RedisSentinelMaster   string `set:"REDIS_SENTINEL_MASTER" default:"" help:"name of the master that the sentinels watch"`
	RedisSentinelPassword string `set:"REDIS_SENTINEL_PASSWORD" default:"" secret:"true" help:"password of the sentinels"`
	RedisUsername         string `set:"REDIS_USERNAME" default:"" help:"ACL user"`
	RedisPassword         string `set:"REDIS_PASSWORD" default:"" secret:"true" help:"password"`
	RedisDB               int    `set:"REDIS_DB" default:"0" min:"0" help:"database number (single and sentinel)"`
	RedisTLS              bool   `set:"REDIS_TLS" default:"false" help:"connect by TLS"`
	RedisTLSCAFile        string `set:"REDIS_TLS_CA_FILE" default:"" help:"CA (PEM) that signed the server's certificate"`
	RedisTLSCertFile      string `set:"REDIS_TLS_CERT_FILE" default:"" help:"client certificate (PEM)"`
	RedisTLSKeyFile       string `set:"REDIS_TLS_KEY_FILE" default:"" help:"key (PEM) of REDIS_TLS_CERT_FILE"`

	AuthSecretToken        string        `set:"AUTH_SECRET_TOKEN" default:"" required:"true" list:"true" check:"apiKey" secret:"true" live:"true" help:"general API key(s), comma-separated: mints user tokens (required)"`
	AuthTokenAESKey        string        `set:"AUTH_TOKEN_AES_KEY" default:"" required:"true" list:"true" check:"aesKey" secret:"true" live:"true" help:"key(s) of user tokens, 64 hex digits each, the first seals (required)"`
	AuthAdminSecretToken   string        `set:"AUTH_ADMIN_SECRET_TOKEN" default:"" required:"true" list:"true" check:"apiKey" secret:"true" live:"true" help:"admin API key(s), comma-separated (required)"`
	AuthAdminTokenAESKey   string        `set:"AUTH_ADMIN_TOKEN_AES_KEY" default:"" required:"true" list:"true" check:"aesKey" secret:"true" live:"true" help:"key(s) of admin tokens, 64 hex digits each, the first seals (required)"`
	AuthPublicKey          string        `set:"AUTH_PUBLIC_KEY" default:"" list:"true" check:"apiKey" secret:"true" live:"true" help:"key(s) that open user sockets and nothing else; set: the general key opens none"`
	AuthTokenCacheTTL      time.Duration `set:"AUTH_TOKEN_CACHE_TTL" default:"0" min:"0s" live:"true" help:"how long checked claims of users are cached in Redis; 0 = not"`
	AuthAdminTokenCacheTTL time.Duration `set:"AUTH_ADMIN_TOKEN_CACHE_TTL" default:"0" min:"0s" live:"true" help:"how long checked claims of admins are cached in Redis; 0 = not"`

	SessionTTL             time.Duration `set:"SESSION_TTL" default:"30s" min:"1ms" live:"true" help:"life of a session's lock in Redis without renewal"`
	SessionRefreshInterval time.Duration `set:"SESSION_REFRESH_INTERVAL" default:"10s" min:"1ms" live:"true" help:"how often a session's lock is renewed"`

	PodLease time.Duration `set:"POD_LEASE" default:"6s" min:"100ms" help:"life of this pod's lease in Redis; renewed every third of it"`

	WebsocketPingInterval         time.Duration `set:"WEBSOCKET_PING_INTERVAL" default:"20s" min:"1ms" live:"true" help:"pause between pings to a client"`
	WebsocketMaxMissedPongs       int           `set:"WEBSOCKET_MAX_MISSED_PONGS" default:"2" min:"1" live:"true" help:"pings without a pong before the socket is closed"`
	WebsocketWriteTimeout         time.Duration `set:"WEBSOCKET_WRITE_TIMEOUT" default:"10s" min:"1ms" help:"how long an event waits for a socket before it is closed as slow"`
	WebsocketBlockTimeout         time.Duration `set:"WEBSOCKET_BLOCK_TIMEOUT" default:"3s" min:"1ms" help:"policy block: how long an event waits for room"`
	WebsocketBufferSize           int           `set:"WEBSOCKET_BUFFER_SIZE" default:"128" min:"1" max:"65536" help:"events that wait in a socket's ring"`
	WebsocketDropPolicy           string        `set:"WEBSOCKET_DROP_POLICY" default:"drop_oldest" oneof:"drop_oldest,block" help:"what a full ring does: drop_oldest or block"`
	WebsocketMaxMessage           byteSize      `set:"WEBSOCKET_MAX_MESSAGE" default:"64KiB" min:"64" max:"64MiB" help:"largest inbound message"`
	WebsocketRateLimit            ratePerSecond `set:"WEBSOCKET_RATE_LIMIT" default:"20/s" min:"0.01/s" live:"true" help:"inbound messages per second and socket"`
	WebsocketRateBurst            int           `set:"WEBSOCKET_RATE_BURST" default:"40" min:"1" live:"true" help:"inbound messages at once"`
	WebsocketCompression          string        `set:"WEBSOCKET_COMPRESSION" default:"disabled" oneof:"disabled,no_context_takeover,context_takeover" help:"permessage-deflate: disabled or no_context_takeover (context_takeover is taken as that)"`
	WebsocketCompressionThreshold byteSize      `set:"WEBSOCKET_COMPRESSION_THRESHOLD" default:"1KiB" min:"0" help:"smallest message that is compressed"`
	WebsocketAllowedOrigins       string        `set:"WEBSOCKET_ALLOWED_ORIGINS" default:"" list:"true" check:"origin" live:"true" help:"globs on host[:port] of origins, or null, or file://, comma-separated; the request's own host is always allowed"`
	WebsocketInsecureSkipVerify   bool          `set:"WEBSOCKET_INSECURE_SKIP_VERIFY" default:"false" live:"true" help:"accept any origin; for development"`

	EventsTypeInPayload bool `set:"EVENTS_TYPE_IN_PAYLOAD" default:"false" help:"payloads without event_type get one, for clients of the earlier service"`
	EventsAgentsToUsers bool `set:"EVENTS_AGENTS_TO_USERS" default:"false" help:"agents events go to the agent's users too, for clients of the earlier service"`

	ResumeMaxEvents   int `set:"RESUME_MAX_EVENTS" default:"1000" min:"1" help:"missed events that a resume replays at most"`
	ResumeMaxBehind   int `set:"RESUME_MAX_BEHIND" default:"1000000" min:"1" help:"how many sequences before the stream's end a position may be"`
	ResumeConcurrency int `set:"RESUME_CONCURRENCY" default:"4" min:"1" help:"reads of the stream for replays at the same time"`

	PeerTimeout          time.Duration `set:"PEER_TIMEOUT" default:"5s" min:"1ms" help:"how long a peer may take to say that it received an event"`
	PeerIdleTimeout      time.Duration `set:"PEER_IDLE_TIMEOUT" default:"5m" min:"1ms" help:"an unused connection to a peer is closed after it"`
	PeerHealthInterval   time.Duration `set:"PEER_HEALTH_INTERVAL" default:"1m" min:"1ms" help:"pause between health checks of a peer"`
	PeerBreakerThreshold int           `set:"PEER_BREAKER_THRESHOLD" default:"5" min:"1" help:"failures in a row that open a peer's breaker"`
	PeerBreakerOpen      time.Duration `set:"PEER_BREAKER_OPEN" default:"30s" min:"1ms" help:"how long an open breaker refuses before it probes"`
	PeerWindow           int           `set:"PEER_WINDOW" default:"1024" min:"1" help:"events in flight to a peer"`
}

// settings is the configuration in force. Rooms keep the *settings and call Load where a value may change
// at run time; a value that is not live never differs from the one of the start.
type settings struct {
	atomic.Pointer[Config]
	own atomic.Pointer[ownLimits] // nil until the consumer is known
}

// ownLimits are the consumer's own values of NATS_ACK_WAIT and NATS_MAX_ACK_PENDING. JetStream goes by them, so the service
// does too, whatever its settings say.
type ownLimits struct {
	ackWait    time.Duration
	maxPending int
}

// ackWait is how long JetStream waits for an ack.
func (s *settings) ackWait() time.Duration {
	if l := s.own.Load(); l != nil {
		return l.ackWait
	}
	return s.Load().NATSAckWait
}

// lateAfter is the age from which a delivery gets no answer: JetStream may have given it out again. An ack wait that is not
// much longer than lateSlack leaves at least half of it.
func (s *settings) lateAfter() time.Duration {
	wait := s.ackWait()
	return wait - min(lateSlack, wait/2)
}

// maxAckPending is how many unacked events the consumer allows, over all pods.
func (s *settings) maxAckPending() int {
	if l := s.own.Load(); l != nil {
		return l.maxPending
	}
	return s.Load().NATSMaxAckPending
}

// prefetch is how many events are asked for in advance, a quarter of what the consumer allows at the most.
func (s *settings) prefetch() int {
	return min(s.Load().NATSPrefetch, max(1, s.maxAckPending()/4))
}

// settingPrefix begins the name of every setting.
const settingPrefix = "DAISI_WS_"

// setting is one field of Config, as its tags declare it.
type setting struct {
	name  string // with its prefix
	def   string
	field int
	tag   reflect.StructTag
}

// settingTable lists every setting in the order of Config, the order in which everything is printed.
var settingTable = func() (all []setting) {
	for f := range reflect.TypeFor[Config]().Fields() {
		all = append(all, setting{settingPrefix + f.Tag.Get("set"), f.Tag.Get("default"), f.Index[0], f.Tag})
	}
	return all
}()

// in is the field of c that holds the value of s.
func (s *setting) in(c *Config) reflect.Value { return reflect.ValueOf(c).Elem().Field(s.field) }

func (s *setting) secret() bool     { return s.tag.Get("secret") != "" }
func (s *setting) live() bool       { return s.tag.Get("live") != "" }
func (s *setting) fileName() string { return s.name + "_FILE" }

// fault is one reason not to start. setting is whose it is, nil for a fault of the file as a whole.
type fault struct {
	setting *setting
	text    string
}

// entry is one NAME=VALUE as it was found. The value may be a secret: it is never printed as it is.
type entry struct {
	where       string // file:line, or environment
	name, value string
}

// loader gathers what one load found.
type loader struct {
	cfg      *Config
	given    map[string]entry // by the name of the setting; the entry's own name may be <NAME>_FILE
	faults   []fault
	warnings []string
}

// loadConfig reads the settings from file (none if empty) and environ, which wins. err joins all faults, one line each,
// and cfg is nil then. Neither error nor warnings hold a secret.
func loadConfig(file string, environ []string) (cfg *Config, warnings []string, err error) {
	l := load(file, environ)
	if err := l.err(); err != nil {
		return nil, l.warnings, err
	}
	return l.cfg, l.warnings, nil
}

// load reads and checks everything, whatever is wrong. A setting with a fault has its default in cfg.
func load(file string, environ []string) *loader {
	l := &loader{cfg: new(Config), given: map[string]entry{}}
	if file != "" {
		l.takeFile(file)
	}
	l.takeEnviron(environ)
	for i := range settingTable {
		l.assign(&settingTable[i])
	}
	if l.cfg.ServerPodID == "" {
		l.podIDFromHost()
	}
	l.checkRelations(l.cfg)
	l.checkFiles(l.cfg)
	l.warn(l.cfg)
	return l
}

// err joins the faults of these settings, and of the file as a whole; of all if none is named. A command that uses three
// settings is not to fail by a fourth.
func (l *loader) err(names ...string) error {
	var errs []error
	for _, f := range l.faults {
		if len(names) == 0 || f.setting == nil || slices.Contains(names, f.setting.name) {
			errs = append(errs, errors.New(f.text))
		}
	}
	return errors.Join(errs...)
}

// fault notes one line, which may not hold a secret; s is nil where it is no single setting's.
func (l *loader) fault(s *setting, format string, args ...any) {
	l.faults = append(l.faults, fault{s, fmt.Sprintf(format, args...)})
}

// warning notes one line for the log; what it says does not keep the service from starting.
func (l *loader) warning(format string, args ...any) {
	l.warnings = append(l.warnings, fmt.Sprintf(format, args...))
}

// faulty says whether s has a fault already: what follows from it is not reported again.
func (l *loader) faulty(s *setting) bool {
	return slices.ContainsFunc(l.faults, func(f fault) bool { return f.setting == s })
}

// takeFile reads a settings file: what systemd's EnvironmentFile and docker's --env-file read, as far as both
// read it alike. No line is ever printed: it may hold a secret, even a mangled one.
func (l *loader) takeFile(file string) {
	data, err := os.ReadFile(file)
	if err != nil {
		l.fault(nil, "settings file: %v", err)
		return
	}
	var entries []entry
	lineOf := map[string]int{}
	n := 0
	for line := range strings.Lines(string(data)) {
		n++
		where := fmt.Sprintf("%s:%d", file, n)
		line = strings.TrimLeft(strings.TrimRight(line, "\r\n"), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		if name, _, _ := strings.Cut(line, "="); isFormer(name) {
			l.warning("%s: %s: a setting of a former version, ignored", where, name)
			continue
		}
		e, problem := parseLine(where, line)
		if problem != "" {
			l.fault(settingOf(e.name), "%s: %s", where, problem)
			continue
		}
		if first, twice := lineOf[e.name]; twice {
			l.warning("%s: %s is set in line %d already; this line counts", where, e.name, first)
		}
		lineOf[e.name] = n
		l.warnAmbiguous(&e)
		entries = append(entries, e)
	}
	l.take(entries)
}

// parseLine splits a line that is neither blank nor a comment; problem says what is wrong with it.
func parseLine(where, line string) (e entry, problem string) {
	name, value, ok := strings.Cut(line, "=")
	e = entry{where, name, value}
	switch trimmed := strings.Trim(value, " \t"); {
	case !ok || !madeOf(name, "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_"):
		return e, "not of the form KEY=VALUE"
	case settingOf(name) == nil:
		return e, name + ": unknown setting"
	case !utf8.ValidString(value):
		return e, name + ": the value is not valid UTF-8"
	case trimmed != "" && (trimmed[0] == '"' || trimmed[0] == '\''):
		return e, name + ": the value starts with a quote; write it without quotes (systemd would take them off, docker would not)"
	case strings.HasSuffix(value, `\`):
		return e, name + ": the value ends in a backslash (systemd would join the next line to it)"
	}
	return e, ""
}

// warnAmbiguous tells of what systemd and docker read differently but what is likely meant, and trims the value.
func (l *loader) warnAmbiguous(e *entry) {
	if trimmed := strings.Trim(e.value, " \t"); trimmed != e.value {
		l.warning("%s: %s: blanks around the value are left out (docker's --env-file keeps them)", e.where, e.name)
		e.value = trimmed
	}
	if strings.Contains(e.value, `\`) {
		l.warning("%s: %s: the value holds a backslash (systemd's EnvironmentFile leaves it out)", e.where, e.name)
	}
}

// takeEnviron reads the environment. An unknown name there is only a warning: others set names too.
func (l *loader) takeEnviron(environ []string) {
	var entries []entry
	for _, nameValue := range environ {
		name, value, _ := strings.Cut(nameValue, "=")
		switch {
		case !strings.HasPrefix(name, settingPrefix) || madeByKubernetes(name):
		case settingOf(name) == nil:
			l.warning("environment: %s: unknown setting, ignored", name)
		default:
			entries = append(entries, entry{"environment", name, value})
		}
	}
	l.take(entries)
}

// madeByKubernetes says whether name is one of the service links that Kubernetes puts into the environment of every
// container of the namespace: of a service daisi-ws-service (or daisi-ws) DAISI_WS_SERVICE_HOST, DAISI_WS_SERVICE_PORT_…;
// of a service daisi-ws also DAISI_WS_PORT and DAISI_WS_PORT_8080_TCP_….
func madeByKubernetes(name string) bool {
	return strings.HasPrefix(name, settingPrefix+"SERVICE_") ||
		name == settingPrefix+"PORT" || strings.HasPrefix(name, settingPrefix+"PORT_")
}

// take notes the entries of one place, which win over those of the place before. Of a secret and its _FILE only one
// may be set in one place: which of them was meant cannot be told.
func (l *loader) take(entries []entry) {
	found := map[string]entry{}
	for _, e := range entries {
		found[e.name] = e
	}
	for i := range settingTable {
		s := &settingTable[i]
		direct, isDirect := found[s.name]
		file := found[s.fileName()]
		switch {
		case direct.value != "" && file.value != "":
			l.fault(s, "%s: %s and %s are both set; one is enough", file.where, s.name, s.fileName())
		case file.value != "":
			l.given[s.name] = file
		case isDirect:
			l.given[s.name] = direct
		}
	}
}

// formerSettings are those that a former version had. They have no effect any more, and keep no service from starting that was updated.
var formerSettings = []string{"PEER_TLS_CA_FILE", "PEER_TLS_CERT_FILE", "PEER_TLS_KEY_FILE", "PEER_TLS_SERVER_NAME", "POD_OWNER_CACHE_SIZE",
	"RESUME_MAX_AGE", "RESUME_OVERLAP", "SERVER_UPGRADE_RATE"}

func isFormer(name string) bool {
	name, ours := strings.CutPrefix(name, settingPrefix)
	return ours && slices.Contains(formerSettings, name)
}

// settingOf returns the setting that name sets, itself or (of a secret) by a file; nil if there is none.
func settingOf(name string) *setting {
	i := slices.IndexFunc(settingTable, func(s setting) bool {
		return name == s.name || s.secret() && name == s.fileName()
	})
	if i < 0 {
		return nil
	}
	return &settingTable[i]
}

// assign gives s the value that was found, or its default. An empty value means the default: that is what
// templates make of a variable that nobody has set.
func (l *loader) assign(s *setting) {
	v := s.in(l.cfg)
	if err := parseValue(v, s.def); err != nil {
		panic(fmt.Sprintf("default of %s: %v", s.name, err))
	}
	e := l.given[s.name]
	text, err := e.value, error(nil)
	if text != "" && e.name != s.name {
		text, err = readSecret(e.value)
	}
	if err == nil && text != "" {
		err = s.set(v, text)
	}
	switch {
	case err != nil:
		l.fault(s, "%s: %s: %v", e.where, e.name, err)
		parseValue(v, s.def)
	case text == "" && s.tag.Get("required") != "" && !l.faulty(s):
		l.fault(s, "%s: required; set it or %s (daisi-ws-service keygen makes keys)", s.name, s.fileName())
	}
}

// readSecret reads the file that a <NAME>_FILE names. Editors and echo end it with a newline, which is no part of it.
func readSecret(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	text := strings.TrimRight(string(data), "\r\n")
	if text == "" {
		return "", fmt.Errorf("%s is empty", file)
	}
	return text, nil
}

// podIDFromHost makes the host name the pod id: in a container platform it is unique among the living, and told in every log.
func (l *loader) podIDFromHost() {
	host, err := os.Hostname()
	if err == nil {
		err = checkPodID(host)
	}
	if err != nil {
		s := findSetting("SERVER_POD_ID")
		if !l.faulty(s) {
			l.fault(s, "%s: the host name cannot serve as default: %v", s.name, err)
		}
		return
	}
	l.cfg.ServerPodID = host
}

// reload reads file and environ again, and the files that they name. With any fault nothing changes. Else the live
// settings take their new values, all at once, and are named in changed; the others that differ are named in restart and
// keep theirs. Files whose names stay (certificates) may have new contents. For one caller at a time.
func (s *settings) reload(file string, environ []string) (changed, restart []string, err error) {
	l := load(file, environ)
	if err := l.err(); err != nil {
		return nil, nil, err
	}
	next := *s.Load()
	for i := range settingTable {
		t := &settingTable[i]
		v, fresh := t.in(&next), t.in(l.cfg)
		switch {
		case v.Equal(fresh):
		case t.live() && (t.tag.Get("live") != "unless-empty" || !v.IsZero() && !fresh.IsZero()):
			v.Set(fresh)
			changed = append(changed, t.name)
		default:
			restart = append(restart, t.name)
		}
	}
	// The new values of live settings meet the old ones of the others: what holds in the file need not hold now.
	mixed := &loader{cfg: &next}
	if mixed.checkRelations(&next); mixed.faults != nil {
		return nil, nil, fmt.Errorf("with the settings that need a restart: %w", mixed.err())
	}
	for _, w := range l.warnings {
		slog.Warn(w)
	}
	s.Store(&next)
	return changed, restart, nil
}
