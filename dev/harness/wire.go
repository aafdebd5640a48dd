package harness

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"

	"daisi-ws-service/dev/rig"
)

// wire is what the client libraries have in common. One goroutine at a time reads; any may call the others.
type wire interface {
	read() (text bool, data []byte, err error)
	write(ctx context.Context, text bool, data []byte) error
	raw(data []byte) error                          // sends bytes that need not be a frame, or errCannot
	ping(ctx context.Context, payload string) error // returns when the pong is there; errCannot
	close(code int, reason string)                  // sends a close frame
	abort()                                         // closes the TCP connection
	pause(on bool)                                  // stands still; for those that read without being asked to
	protocol() string
}

// errCannot says that a library offers no such thing.
var errCannot = errors.New("this client library cannot do that")

type dialer struct {
	url         string
	header      http.Header
	protocols   []string
	compression bool
	rcvBuf      int // SO_RCVBUF; 0 = the kernel's choice
	tls         *tls.Config
	host        *rig.Host // to dial from; nil = from here
}

func (d dialer) netDial(ctx context.Context, network, addr string) (net.Conn, error) {
	if d.host != nil {
		return d.host.Dial(ctx, network, addr)
	}
	nd := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) error {
		if d.rcvBuf == 0 {
			return nil
		}
		var err error
		cerr := raw.Control(func(fd uintptr) {
			err = syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUF, d.rcvBuf)
		})
		return errors.Join(cerr, err)
	}}
	return nd.DialContext(ctx, network, addr)
}

// coderWire is a client of github.com/coder/websocket.
type coderWire struct{ c *coder.Conn }

func dialCoder(ctx context.Context, d dialer) (wire, *http.Response, error) {
	mode := coder.CompressionDisabled
	if d.compression {
		mode = coder.CompressionNoContextTakeover
	}
	transport := &http.Transport{DialContext: d.netDial, TLSClientConfig: d.tls, DisableKeepAlives: true}
	c, resp, err := coder.Dial(ctx, d.url, &coder.DialOptions{
		HTTPClient: &http.Client{Transport: transport}, HTTPHeader: d.header, Subprotocols: d.protocols, CompressionMode: mode,
	})
	if err != nil {
		return nil, resp, err
	}
	c.SetReadLimit(-1)
	return coderWire{c}, resp, nil
}

func (w coderWire) read() (bool, []byte, error) {
	typ, data, err := w.c.Read(context.Background()) // ends when the connection does: abort
	return typ == coder.MessageText, data, err
}

func (w coderWire) write(ctx context.Context, text bool, data []byte) error {
	typ := coder.MessageBinary
	if text {
		typ = coder.MessageText
	}
	return w.c.Write(ctx, typ, data)
}

func (w coderWire) raw([]byte) error                         { return errCannot }
func (w coderWire) ping(ctx context.Context, _ string) error { return w.c.Ping(ctx) } // checks a payload of its own
func (w coderWire) pause(bool)                               {}

func (w coderWire) close(code int, reason string) { w.c.Close(coder.StatusCode(code), reason) }
func (w coderWire) abort()                        { w.c.CloseNow() }
func (w coderWire) protocol() string              { return w.c.Subprotocol() }

// gorillaWire is a client of github.com/gorilla/websocket.
type gorillaWire struct {
	c     *gorilla.Conn
	pongs pongs
	mu    sync.Mutex // guards writes: the library allows one writer
}

// pongs are the payloads of pongs that came.
type pongs chan string

func (p pongs) add(payload string) {
	select {
	case p <- payload:
	default: // nobody waits
	}
}

// wait returns when a pong with that payload has come.
func (p pongs) wait(ctx context.Context, payload string) error {
	for {
		select {
		case got := <-p:
			if got == payload {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("wait for the pong %q: %w", payload, ctx.Err())
		}
	}
}

func dialGorilla(ctx context.Context, d dialer) (wire, *http.Response, error) {
	gd := gorilla.Dialer{NetDialContext: d.netDial, TLSClientConfig: d.tls, Subprotocols: d.protocols, EnableCompression: d.compression}
	c, resp, err := gd.DialContext(ctx, d.url, d.header)
	if err != nil {
		return nil, resp, err
	}
	w := &gorillaWire{c: c, pongs: make(pongs, 16)}
	c.SetPongHandler(func(payload string) error { w.pongs.add(payload); return nil })
	return w, resp, nil
}

func (w *gorillaWire) read() (bool, []byte, error) {
	typ, data, err := w.c.ReadMessage()
	return typ == gorilla.TextMessage, data, err
}

func (w *gorillaWire) write(ctx context.Context, text bool, data []byte) error {
	typ := gorilla.BinaryMessage
	if text {
		typ = gorilla.TextMessage
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	deadline, _ := ctx.Deadline()
	w.c.SetWriteDeadline(deadline)
	return w.c.WriteMessage(typ, data)
}

func (w *gorillaWire) raw(data []byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, err := w.c.NetConn().Write(data)
	return err
}

func (w *gorillaWire) ping(ctx context.Context, payload string) error {
	if err := w.c.WriteControl(gorilla.PingMessage, []byte(payload), time.Now().Add(5*time.Second)); err != nil {
		return err
	}
	return w.pongs.wait(ctx, payload)
}

func (w *gorillaWire) pause(bool) {}

func (w *gorillaWire) close(code int, reason string) {
	w.c.WriteControl(gorilla.CloseMessage, gorilla.FormatCloseMessage(code, reason), time.Now().Add(5*time.Second))
}

func (w *gorillaWire) abort()           { w.c.Close() }
func (w *gorillaWire) protocol() string { return w.c.Subprotocol() }

// closeFrame finds the close frame behind a read error: code 0 when there was none.
func closeFrame(err error) (code int, reason string) {
	var c coder.CloseError
	if errors.As(err, &c) {
		return int(c.Code), c.Reason
	}
	var g *gorilla.CloseError
	if errors.As(err, &g) && g.Code != gorilla.CloseAbnormalClosure {
		return g.Code, g.Text
	}
	if f := (foreignClose{}); errors.As(err, &f) && f.Code != gorilla.CloseAbnormalClosure {
		return f.Code, f.Reason
	}
	return 0, ""
}
