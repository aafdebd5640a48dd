package main

import (
	"sync/atomic"
	"time"
)

// Config holds every setting, each declared once: its name (after DAISI_WS_), default, meaning, and whether it is
// secret (masked, may come from <NAME>_FILE), live (SIGHUP changes it) or of a later version (refuses any value but its default).
type Config struct {
	ServerHTTPPort         int           `set:"SERVER_HTTP_PORT" default:"8080" help:"TCP port of HTTP and WebSocket; 0 = any free one"`
	ServerGRPCPort         int           `set:"SERVER_GRPC_PORT" default:"50051" help:"TCP port that peers dial; 0 = any free one"`
	ServerPodID            string        `set:"SERVER_POD_ID" default:"" help:"name of this pod, unique in the cluster (default: host name)"`
	ServerEnableReflection bool          `set:"SERVER_ENABLE_REFLECTION" default:"false" help:"serve gRPC reflection, for development"`
	ServerBindAddress      string        `set:"SERVER_BIND_ADDRESS" default:"" help:"address to listen on (default: all interfaces)"`
	ServerAdvertiseAddress string        `set:"SERVER_ADVERTISE_ADDRESS" default:"" help:"host or host:port that peers dial (default: this machine's address on its way to Redis)"`
	ServerReadTimeout      time.Duration `set:"SERVER_READ_TIMEOUT" default:"10s" help:"limit for reading a whole HTTP request"`
	ServerWriteTimeout     time.Duration `set:"SERVER_WRITE_TIMEOUT" default:"10s" help:"limit for writing an HTTP response"`
	ServerIdleTimeout      time.Duration `set:"SERVER_IDLE_TIMEOUT" default:"60s" help:"how long an idle keep-alive HTTP connection stays"`
	ServerShutdownTimeout  time.Duration `set:"SERVER_SHUTDOWN_TIMEOUT" default:"30s" help:"limit for the whole drain after SIGTERM"`
	ServerDrainSpread      time.Duration `set:"SERVER_DRAIN_SPREAD" default:"5s" live:"true" help:"over how long a drain spreads the closing of its sockets"`
	ServerMaxConnections   int           `set:"SERVER_MAX_CONNECTIONS" default:"15000" live:"true" help:"sockets at most; further ones get 503"`
	ServerTLSCertFile      string        `set:"SERVER_TLS_CERT_FILE" default:"" live:"true" help:"certificate chain (PEM) for HTTPS and wss"`
	ServerTLSKeyFile       string        `set:"SERVER_TLS_KEY_FILE" default:"" live:"true" help:"key (PEM) of SERVER_TLS_CERT_FILE"`
	ServerDebugAddress     string        `set:"SERVER_DEBUG_ADDRESS" default:"" help:"host:port of net/http/pprof (default: off)"`

	LogLevel  string `set:"LOG_LEVEL" default:"info" live:"true" help:"debug, info, warn or error"`
	LogFormat string `set:"LOG_FORMAT" default:"json" help:"json or text"`

	NATSURL            string        `set:"NATS_URL" default:"nats://127.0.0.1:4222" secret:"url" help:"NATS servers, comma-separated"`
	NATSStreamName     string        `set:"NATS_STREAM_NAME" default:"wa_stream" help:"JetStream stream to read"`
	NATSConsumerName   string        `set:"NATS_CONSUMER_NAME" default:"ws_fanout" help:"durable consumer that all pods share"`
	NATSSubjectPrefix  string        `set:"NATS_SUBJECT_PREFIX" default:"wa" help:"first token(s) of the subjects"`
	NATSCreateStream   bool          `set:"NATS_CREATE_STREAM" default:"false" help:"create the stream if it does not exist"`
	NATSStreamMaxAge   time.Duration `set:"NATS_STREAM_MAX_AGE" default:"24h" help:"max age of a stream created by NATS_CREATE_STREAM"`
	NATSStreamReplicas int           `set:"NATS_STREAM_REPLICAS" default:"1" help:"replicas of a stream created by NATS_CREATE_STREAM"`
	NATSCredsFile      string        `set:"NATS_CREDS_FILE" default:"" help:"credentials file"`
	NATSTLSCAFile      string        `set:"NATS_TLS_CA_FILE" default:"" help:"CA (PEM) that signed the servers' certificates"`
	NATSTLSCertFile    string        `set:"NATS_TLS_CERT_FILE" default:"" help:"client certificate (PEM)"`
	NATSTLSKeyFile     string        `set:"NATS_TLS_KEY_FILE" default:"" help:"key (PEM) of NATS_TLS_CERT_FILE"`
	NATSConnectTimeout time.Duration `set:"NATS_CONNECT_TIMEOUT" default:"5s" help:"limit for one connection attempt"`
	NATSReconnectWait  time.Duration `set:"NATS_RECONNECT_WAIT" default:"2s" help:"pause between connection attempts"`
	NATSMaxReconnects  int           `set:"NATS_MAX_RECONNECTS" default:"-1" help:"attempts to reconnect before giving up; -1 = never give up"`
	NATSPingInterval   time.Duration `set:"NATS_PING_INTERVAL" default:"20s" help:"pause between pings to the server"`
	NATSAckWait        time.Duration `set:"NATS_ACK_WAIT" default:"30s" help:"the consumer's ack wait: JetStream gives an event out again after it"`
	NATSMaxAckPending  int           `set:"NATS_MAX_ACK_PENDING" default:"16384" help:"the consumer's limit of unacked events, over all pods"`
	NATSNakDelay       time.Duration `set:"NATS_NAK_DELAY" default:"1s" help:"delay of the first redelivery; doubled each time up to 16 times it"`
	NATSRetryHorizon   time.Duration `set:"NATS_RETRY_HORIZON" default:"60s" help:"age in the stream past which a failed event is given up"`
	NATSParkedBudget   int           `set:"NATS_PARKED_BUDGET" default:"500" help:"events without an owner that this pod keeps waiting"`
	NATSDeliverPolicy  string        `set:"NATS_DELIVER_POLICY" default:"new" help:"where a newly made consumer starts: new or all"`
	NATSPrefetch       int           `set:"NATS_PREFETCH" default:"500" help:"events asked for in advance"`
	NATSPrefetchBytes  byteSize      `set:"NATS_PREFETCH_BYTES" default:"16MiB" help:"bytes asked for in advance"`

	RedisAddress          string `set:"REDIS_ADDRESS" default:"127.0.0.1:6379" help:"host:port, comma-separated for cluster and sentinel"`
	RedisMode             string `set:"REDIS_MODE" default:"single" help:"single, cluster or sentinel"`
	RedisSentinelMaster   string `set:"REDIS_SENTINEL_MASTER" default:"" help:"name of the master that the sentinels watch"`
	RedisSentinelPassword string `set:"REDIS_SENTINEL_PASSWORD" default:"" secret:"true" help:"password of the sentinels"`
	RedisUsername         string `set:"REDIS_USERNAME" default:"" help:"ACL user"`
	RedisPassword         string `set:"REDIS_PASSWORD" default:"" secret:"true" help:"password"`
	RedisDB               int    `set:"REDIS_DB" default:"0" help:"database number (single and sentinel)"`
	RedisTLS              bool   `set:"REDIS_TLS" default:"false" help:"connect by TLS"`
	RedisTLSCAFile        string `set:"REDIS_TLS_CA_FILE" default:"" help:"CA (PEM) that signed the server's certificate"`
	RedisTLSCertFile      string `set:"REDIS_TLS_CERT_FILE" default:"" help:"client certificate (PEM)"`
	RedisTLSKeyFile       string `set:"REDIS_TLS_KEY_FILE" default:"" help:"key (PEM) of REDIS_TLS_CERT_FILE"`

	AuthSecretToken        string        `set:"AUTH_SECRET_TOKEN" default:"" secret:"true" live:"true" help:"general API key(s), comma-separated: mints user tokens (required)"`
	AuthTokenAESKey        string        `set:"AUTH_TOKEN_AES_KEY" default:"" secret:"true" live:"true" help:"key(s) of user tokens, 64 hex digits each, the first seals (required)"`
	AuthAdminSecretToken   string        `set:"AUTH_ADMIN_SECRET_TOKEN" default:"" secret:"true" live:"true" help:"admin API key(s), comma-separated (required)"`
	AuthAdminTokenAESKey   string        `set:"AUTH_ADMIN_TOKEN_AES_KEY" default:"" secret:"true" live:"true" help:"key(s) of admin tokens, 64 hex digits each, the first seals (required)"`
	AuthPublicKey          string        `set:"AUTH_PUBLIC_KEY" default:"" secret:"true" live:"true" help:"key(s) that open user sockets and nothing else; set: the general key opens none"`
	AuthTokenCacheTTL      time.Duration `set:"AUTH_TOKEN_CACHE_TTL" default:"0s" live:"true" help:"how long checked claims of users are cached in Redis; 0 = not"`
	AuthAdminTokenCacheTTL time.Duration `set:"AUTH_ADMIN_TOKEN_CACHE_TTL" default:"0s" live:"true" help:"how long checked claims of admins are cached in Redis; 0 = not"`

	SessionTTL             time.Duration `set:"SESSION_TTL" default:"30s" live:"true" help:"life of a session's lock in Redis without renewal"`
	SessionRefreshInterval time.Duration `set:"SESSION_REFRESH_INTERVAL" default:"10s" live:"true" help:"how often a session's lock is renewed"`

	PodLease          time.Duration `set:"POD_LEASE" default:"6s" help:"life of this pod's lease in Redis; renewed every third of it"`
	PodOwnerCacheSize int           `set:"POD_OWNER_CACHE_SIZE" default:"65536" help:"routes whose owners are cached"`

	WebsocketPingInterval         time.Duration `set:"WEBSOCKET_PING_INTERVAL" default:"20s" live:"true" help:"pause between pings to a client"`
	WebsocketMaxMissedPongs       int           `set:"WEBSOCKET_MAX_MISSED_PONGS" default:"2" live:"true" help:"pings without a pong before the socket is closed"`
	WebsocketWriteTimeout         time.Duration `set:"WEBSOCKET_WRITE_TIMEOUT" default:"10s" help:"how long an event waits for a socket before it is closed as slow"`
	WebsocketBlockTimeout         time.Duration `set:"WEBSOCKET_BLOCK_TIMEOUT" default:"3s" help:"policy block: how long an event waits for room"`
	WebsocketBufferSize           int           `set:"WEBSOCKET_BUFFER_SIZE" default:"128" help:"events that wait in a socket's ring"`
	WebsocketDropPolicy           string        `set:"WEBSOCKET_DROP_POLICY" default:"drop_oldest" help:"what a full ring does: drop_oldest or block"`
	WebsocketMaxMessage           byteSize      `set:"WEBSOCKET_MAX_MESSAGE" default:"64KiB" help:"largest inbound message"`
	WebsocketRateLimit            ratePerSecond `set:"WEBSOCKET_RATE_LIMIT" default:"20/s" live:"true" help:"inbound messages per second and socket"`
	WebsocketRateBurst            int           `set:"WEBSOCKET_RATE_BURST" default:"40" live:"true" help:"inbound messages at once"`
	WebsocketCompression          string        `set:"WEBSOCKET_COMPRESSION" default:"disabled" later:"true" help:"permessage-deflate: disabled or no_context_takeover"`
	WebsocketCompressionThreshold byteSize      `set:"WEBSOCKET_COMPRESSION_THRESHOLD" default:"1KiB" later:"true" help:"smallest message that is compressed"`
	WebsocketAllowedOrigins       string        `set:"WEBSOCKET_ALLOWED_ORIGINS" default:"" live:"true" help:"globs on host[:port] of origins, comma-separated; the request's own host is always allowed"`
	WebsocketInsecureSkipVerify   bool          `set:"WEBSOCKET_INSECURE_SKIP_VERIFY" default:"false" live:"true" help:"accept any origin; for development"`

	ResumeMaxEvents   int           `set:"RESUME_MAX_EVENTS" default:"1000" later:"true" help:"events that a resume replays at most"`
	ResumeMaxAge      time.Duration `set:"RESUME_MAX_AGE" default:"1h" later:"true" help:"oldest point to resume from"`
	ResumeOverlap     time.Duration `set:"RESUME_OVERLAP" default:"2m" help:"how much earlier than asked a replay starts"`
	ResumeConcurrency int           `set:"RESUME_CONCURRENCY" default:"32" later:"true" help:"replays at the same time"`

	PeerTimeout          time.Duration `set:"PEER_TIMEOUT" default:"5s" help:"how long a peer may take to say that it received an event"`
	PeerIdleTimeout      time.Duration `set:"PEER_IDLE_TIMEOUT" default:"5m" later:"true" help:"an unused connection to a peer is closed after it"`
	PeerHealthInterval   time.Duration `set:"PEER_HEALTH_INTERVAL" default:"1m" later:"true" help:"pause between health checks of a peer"`
	PeerBreakerThreshold int           `set:"PEER_BREAKER_THRESHOLD" default:"5" later:"true" help:"failures in a row that open a peer's breaker"`
	PeerBreakerOpen      time.Duration `set:"PEER_BREAKER_OPEN" default:"30s" later:"true" help:"how long an open breaker refuses before it probes"`
	PeerWindow           int           `set:"PEER_WINDOW" default:"1024" later:"true" help:"events in flight to a peer"`
	PeerTLSCertFile      string        `set:"PEER_TLS_CERT_FILE" default:"" later:"true" help:"certificate (PEM) for mTLS between pods"`
	PeerTLSKeyFile       string        `set:"PEER_TLS_KEY_FILE" default:"" later:"true" help:"key (PEM) of PEER_TLS_CERT_FILE"`
	PeerTLSCAFile        string        `set:"PEER_TLS_CA_FILE" default:"" later:"true" help:"CA (PEM) that signed the pods' certificates"`
	PeerTLSServerName    string        `set:"PEER_TLS_SERVER_NAME" default:"" later:"true" help:"name that the pods' certificates carry"`
}

// byteSize is a size in bytes, written as 512, 64KiB, 16MiB or 1GiB.
type byteSize int64

// ratePerSecond is a rate, written as 20/s.
type ratePerSecond float64

// settings is the configuration in force. Rooms keep the *settings and call Load where a value may change
// at run time; a value that is not live never differs from the one of the start.
type settings struct {
	atomic.Pointer[Config]
}
