package harness

import (
	"context"
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"

	"daisi-ws-service/dev/rig"
)

// wire is what the two client libraries have in common. One goroutine at a time reads; any may call the others.
type wire interface {
	read() (text bool, data []byte, err error)
	write(ctx context.Context, text bool, data []byte) error
	close(code int, reason string) // sends a close frame
	abort()                        // closes the TCP connection
	protocol() string
}

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

func (w coderWire) close(code int, reason string) { w.c.Close(coder.StatusCode(code), reason) }
func (w coderWire) abort()                        { w.c.CloseNow() }
func (w coderWire) protocol() string              { return w.c.Subprotocol() }

// gorillaWire is a client of github.com/gorilla/websocket.
type gorillaWire struct {
	c  *gorilla.Conn
	mu sync.Mutex // guards writes: the library allows one writer
}

func dialGorilla(ctx context.Context, d dialer) (wire, *http.Response, error) {
	gd := gorilla.Dialer{NetDialContext: d.netDial, TLSClientConfig: d.tls, Subprotocols: d.protocols, EnableCompression: d.compression}
	c, resp, err := gd.DialContext(ctx, d.url, d.header)
	if err != nil {
		return nil, resp, err
	}
	return &gorillaWire{c: c}, resp, nil
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
	return 0, ""
}
