package main

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"
)

func newBufReader(b []byte) *bufio.Reader { return bufio.NewReaderSize(bytes.NewReader(b), 1<<20) }

func TestHandshakeFaults(t *testing.T) {
	th := newTestHub(t, nil)
	good := upgradeRequest("/", "")
	for name, test := range map[string]struct {
		request string
		status  int
	}{
		"POST":                 {strings.Replace(good, "GET", "POST", 1), 405},
		"no upgrade":           {strings.Replace(good, "Upgrade: websocket\r\n", "", 1), 426},
		"another upgrade":      {strings.Replace(good, "websocket", "websockets", 1), 426},
		"no connection":        {strings.Replace(good, "Connection: Upgrade", "Connection: keep-alive", 1), 426},
		"connection upgrades":  {strings.Replace(good, "Connection: Upgrade", "Connection: upgrades", 1), 426},
		"no version":           {strings.Replace(good, "Sec-WebSocket-Version: 13\r\n", "", 1), 426},
		"version 8":            {strings.Replace(good, "Version: 13", "Version: 8", 1), 426},
		"two versions":         {strings.Replace(good, "Version: 13", "Version: 13, 8", 1), 426},
		"no key":               {strings.Replace(good, testKey, "", 1), 400},
		"short key":            {strings.Replace(good, testKey, "Sec-WebSocket-Key: dGhl\r\n", 1), 400},
		"key of 17 bytes":      {strings.Replace(good, testKey, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQAA\r\n", 1), 400},
		"key not base64":       {strings.Replace(good, testKey, "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZ!==\r\n", 1), 400},
		"two keys":             {strings.Replace(good, testKey, testKey+testKey, 1), 400},
		"HTTP/1.0":             {strings.Replace(good, "HTTP/1.1", "HTTP/1.0", 1), 400},
		"body":                 {strings.Replace(good, "Host", "Content-Length: 1\r\nHost", 1) + "x", 400},
		"chunked body":         {strings.Replace(good, "Host", "Transfer-Encoding: chunked\r\nHost", 1) + "0\r\n\r\n", 400},
		"foreign sub-protocol": {upgradeRequest("/", "Sec-WebSocket-Protocol: graphql-ws, bearer.abc\r\n"), 400},
		"lists over lines": {strings.Replace(upgradeRequest("/", "Connection: x, UPGRADE ,y\r\nUpgrade: h2c\r\n"),
			"Connection: Upgrade", "Connection: keep-alive", 1), 101},
		"upper case": {strings.Replace(good, "websocket", "WebSocket", 1), 101},
	} {
		t.Run(name, func(t *testing.T) {
			c := th.dialRaw(test.request)
			res, err := http.ReadResponse(c.br, nil)
			if err != nil || res.StatusCode != test.status {
				t.Fatalf("got %v %v, want %d", res, err, test.status)
			}
			if test.status == 426 && (res.Header.Get("Sec-WebSocket-Version") != "13" || res.Header.Get("Upgrade") != "websocket") {
				t.Fatalf("headers %v", res.Header)
			}
			c.nc.Close()
		})
	}
}

func TestHandshakeAnswer(t *testing.T) {
	th := newTestHub(t, nil)
	for offer, echo := range map[string]string{
		"":                                       "",
		"Sec-WebSocket-Protocol: json.v1\r\n":    "json.v1",
		"Sec-WebSocket-Protocol: bearer.abc\r\n": "",
		"Sec-WebSocket-Protocol: bearer.abc, json.v1\r\n":                      "json.v1",
		"Sec-WebSocket-Protocol: other\r\nSec-WebSocket-Protocol: json.v1\r\n": "json.v1",
		"Sec-WebSocket-Extensions: permessage-deflate\r\n":                     "",
	} {
		c := th.dialRaw(upgradeRequest("/", offer))
		res, err := http.ReadResponse(c.br, nil)
		if err != nil || res.StatusCode != 101 {
			t.Fatal(res, err)
		}
		h := res.Header
		if h.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" || h.Get("Sec-WebSocket-Protocol") != echo ||
			h.Get("Sec-WebSocket-Extensions") != "" {
			t.Fatalf("offer %q: %v", offer, h)
		}
		c.nc.Close()
	}
}

// TLS has no non-blocking write: its sockets always write alone.
func TestTLSSocket(t *testing.T) {
	th := newTestHub(t, func(c *Config) { c.WebsocketWriteTimeout = 4 * slowPause })
	srv := httptest.NewTLSServer(http.HandlerFunc(th.handle))
	defer srv.Close()
	dial := func() *testClient {
		nc, err := tls.Dial("tcp", srv.Listener.Addr().String(), &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		nc.SetDeadline(time.Now().Add(20 * time.Second))
		io.WriteString(nc, upgradeRequest("/", "")+textFrame(`{"type":"ping"}`))
		c := &testClient{t: t, nc: nc, br: bufio.NewReader(nc)}
		if res, err := http.ReadResponse(c.br, nil); err != nil || res.StatusCode != 101 {
			t.Fatal(res, err)
		}
		c.want("ready")
		c.want("pong")
		return c
	}
	c := dial()
	var l ledger
	for seq := range uint64(200) {
		th.publish(&l, kindChat, "", seq+1, 5000)
		if m := c.want("event"); m.Seq != seq+1 {
			t.Fatal(m)
		}
	}
	c.send(clientFrame(finBit|opClose, "\x03\xe8"))
	c.wantClose(1000, "")

	stuck := dial()
	wantEventually(t, "it is a target", func() bool { return len(th.sockets(general)) == 1 })
	for seq := range uint64(200) {
		th.publish(&l, kindChat, "", seq+1, 100<<10)
	}
	wantEventually(t, "counted as stuck", func() bool { return th.stuck() > 0 })
	wantEventually(t, "closed as slow", func() bool { return th.m.closesTotal.with("4408").Get() == 1 })
	stuck.nc.Close()
}
