package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// natsServer answers what replay.go asks of a stream, in place of a NATS server: one connection in memory, of which it understands
// as much of the protocol as the library needs for requests.
type natsServer struct {
	mu      sync.Mutex // guards all below
	created time.Time
	config  jetstream.StreamConfig
	first   uint64 // of the stream
	last    uint64
	removed []uint64          // from within
	msgs    []storedMsg       // in order
	headers map[uint64]string // of those that a publisher gave some
	behind  uint64            // a direct get finds nothing from here on: a replica is behind; 0 = none is
	before  func(what string) // called before a request is answered, if not nil: INFO, DIRECT or MSG.GET; it may use the server
	fails   func(what string, seq uint64) bool
}

type storedMsg struct {
	Subject string    `json:"subject"`
	Seq     uint64    `json:"seq"`
	Data    []byte    `json:"data"`
	Time    time.Time `json:"time"`
}

func newNATSServer() *natsServer {
	return &natsServer{created: time.Unix(1700000000, 0).UTC(), config: jetstream.StreamConfig{Name: "wa_stream", Retention: jetstream.LimitsPolicy, AllowDirect: true}, first: 1, headers: map[uint64]string{}}
}

// publish stores a message under the next sequence.
func (v *natsServer) publish(subject string) uint64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.last++
	v.msgs = append(v.msgs, storedMsg{subject, v.last, []byte(`{"n":` + strconv.FormatUint(v.last, 10) + `}`), time.Now()})
	return v.last
}

// change does something to the server.
func (v *natsServer) change(f func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	f()
}

// InProcessConn makes it the library's server.
func (v *natsServer) InProcessConn() (net.Conn, error) {
	ours, theirs := net.Pipe()
	go v.serve(ours) // ends with the connection
	return theirs, nil
}

func (v *natsServer) serve(c net.Conn) {
	defer c.Close()
	out := make(chan string, 1000) // an answer waits for nobody: the library may be writing
	defer close(out)
	go func() { // ends with out
		for s := range out {
			io.WriteString(c, s)
		}
	}()
	out <- "INFO {\"server_id\":\"S\",\"version\":\"2.12.0\",\"proto\":1,\"max_payload\":1048576,\"headers\":true}\r\n"
	in := bufio.NewReader(c)
	inbox, sid := "", "" // the library has one subscription, for all answers
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			return
		}
		switch w := strings.Fields(line); strings.ToUpper(w[0]) {
		case "PING":
			out <- "PONG\r\n"
		case "SUB":
			inbox, sid = strings.TrimSuffix(w[1], "*"), w[2]
		case "PUB", "HPUB":
			size, _ := strconv.Atoi(w[len(w)-1])
			body := make([]byte, size+2)
			if _, err := io.ReadFull(in, body); err != nil {
				return
			}
			if len(w) > 3 && strings.HasPrefix(w[2], inbox) {
				headers, answer := v.answer(w[1], body[:size])
				out <- fmt.Sprintf("HMSG %s %s %d %d\r\n%s%s\r\n", w[2], sid, len(headers), len(headers)+len(answer), headers, answer)
			}
		}
	}
}

// answer is one to a request for the state of the stream, for a message by a replica, or by the leader.
func (v *natsServer) answer(subject string, body []byte) (headers string, answer []byte) {
	var req struct {
		Seq  uint64 `json:"seq"`
		Next string `json:"next_by_subj"`
	}
	json.Unmarshal(body, &req)
	what := strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(subject, "$JS.API."), "STREAM."), ".wa_stream")
	v.mu.Lock()
	before := v.before
	v.mu.Unlock()
	if before != nil {
		before(what)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.fails != nil && v.fails(what, req.Seq) {
		return "NATS/1.0 503\r\n\r\n", nil
	}
	if what == "INFO" {
		answer, _ = json.Marshal(map[string]any{"config": v.config, "created": v.created, "state": jetstream.StreamState{FirstSeq: v.first, LastSeq: v.last, Deleted: v.removed, NumDeleted: len(v.removed)}})
		return "NATS/1.0\r\n\r\n", answer
	}
	i := slices.IndexFunc(v.msgs, func(m storedMsg) bool {
		return m.Seq >= max(req.Seq, v.first) && (req.Next == "" && m.Seq == req.Seq || req.Next != "" && covers(req.Next, m.Subject))
	})
	switch {
	case what == "DIRECT.GET" && (i < 0 || v.behind > 0 && v.msgs[i].Seq >= v.behind):
		return "NATS/1.0 404 Message Not Found\r\n\r\n", nil
	case i < 0:
		answer, _ = json.Marshal(map[string]any{"error": jetstream.APIError{Code: 404, ErrorCode: jetstream.JSErrCodeMessageNotFound, Description: "no message found"}})
	case what == "DIRECT.GET":
		m := v.msgs[i]
		return fmt.Sprintf("NATS/1.0\r\n%sNats-Stream: wa_stream\r\nNats-Subject: %s\r\nNats-Sequence: %d\r\nNats-Time-Stamp: %s\r\n\r\n",
			v.headers[m.Seq], m.Subject, m.Seq, m.Time.Format(time.RFC3339Nano)), m.Data
	default:
		answer, _ = json.Marshal(map[string]any{"message": v.msgs[i]})
	}
	return "NATS/1.0\r\n\r\n", answer
}

// testConsumer is one that is connected to v and consumes nothing.
func testConsumer(t *testing.T, v *natsServer, cfg *settings, m *Metrics, l *lease) *consumer {
	t.Helper()
	nc, err := nats.Connect("nats://in.process", nats.InProcessServer(v))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(nc.Close)
	c := &consumer{cfg: cfg, m: m, lease: l, nc: nc, doubt: make(chan struct{}, 1), created: v.created}
	c.up.Store(true)
	if c.js, err = jetstream.New(nc); err != nil {
		t.Fatal(err)
	}
	return c
}
