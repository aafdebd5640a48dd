package harness

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"
)

// Opcodes of RFC 6455 section 5.2, and the bit that ends a message.
const (
	FIN          byte = 0x80
	Continuation byte = 0x0
	Text         byte = 0x1
	Binary       byte = 0x2
	CloseFrame   byte = 0x8
	Ping         byte = 0x9
	Pong         byte = 0xA
)

// Raw is a client that sends what no library would. It never answers a ping by itself, and reads when it is told to.
type Raw struct {
	Pod *Pod

	nc net.Conn
	br *bufio.Reader
}

// DialRaw opens a socket. behind goes out with the handshake in one write, so in the same TCP segment if it is short.
func (p *Pod) DialRaw(d Dial, behind ...[]byte) *Raw {
	p.W.T.Helper()
	at := d.complete(p.W).dialer(p.HTTP)
	u, err := url.Parse(at.url)
	if err != nil {
		p.W.T.Fatal(err)
	}
	nc, err := at.netDial(Within(p.W.T, Patience), "tcp", p.HTTP)
	if err != nil {
		p.W.T.Fatalf("dial %s: %v", p.ID, err)
	}
	p.W.T.Cleanup(func() { nc.Close() })
	r := &Raw{Pod: p, nc: nc, br: bufio.NewReader(nc)}
	// The key is RFC 6455's own example, as is the answer.
	out := fmt.Appendf(nil, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n", u.RequestURI(), u.Host)
	for _, b := range behind {
		out = append(out, b...)
	}
	r.Write(out)
	nc.SetReadDeadline(time.Now().Add(Patience))
	resp, err := http.ReadResponse(r.br, nil)
	if err != nil {
		p.W.T.Fatalf("handshake with %s: %v", p.ID, err)
	}
	if resp.StatusCode != http.StatusSwitchingProtocols || resp.Header.Get("Sec-Websocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" {
		p.W.T.Fatalf("handshake with %s: %s %v", p.ID, resp.Status, resp.Header)
	}
	return r
}

// Frame is a client's frame; first is its first byte: FIN, the RSV bits and the opcode. The mask is that of RFC 6455's
// section 5.7: a test's bytes are to be the same each time.
func Frame(first byte, payload []byte) []byte {
	b := FrameHeader(first, true, uint64(len(payload)))
	mask := []byte{0x37, 0xfa, 0x21, 0x3d}
	b = append(b, mask...)
	for i, c := range payload {
		b = append(b, c^mask[i%4])
	}
	return b
}

// FrameHeader is a frame's header up to the mask, in the shortest form for n bytes.
func FrameHeader(first byte, masked bool, n uint64) []byte {
	bit := byte(0)
	if masked {
		bit = 0x80
	}
	switch {
	case n <= 125:
		return []byte{first, bit | byte(n)}
	case n <= 0xFFFF:
		return binary.BigEndian.AppendUint16([]byte{first, bit | 126}, uint16(n))
	default:
		return binary.BigEndian.AppendUint64([]byte{first, bit | 127}, n)
	}
}

// Write sends bytes as they are.
func (r *Raw) Write(b []byte) {
	r.Pod.W.T.Helper()
	if err := r.TryWrite(b); err != nil {
		r.Pod.W.T.Fatalf("write to %s: %v", r.Pod.ID, err)
	}
}

// TryWrite is Write to a pod that may have closed the socket.
func (r *Raw) TryWrite(b []byte) error {
	r.nc.SetWriteDeadline(time.Now().Add(Patience))
	_, err := r.nc.Write(b)
	return err
}

// Read reads the next frame, whatever it is. The service sends whole, unmasked messages; others are an error.
func (r *Raw) Read() (op byte, payload []byte, err error) {
	r.nc.SetReadDeadline(time.Now().Add(Patience))
	var h [8]byte
	if _, err := io.ReadFull(r.br, h[:2]); err != nil {
		return 0, nil, err
	}
	if h[0]&0xF0 != FIN || h[1]&0x80 != 0 {
		return 0, nil, fmt.Errorf("frame from the service begins with %x", h[:2])
	}
	op, n := h[0]&0x0F, uint64(h[1])
	switch n {
	case 126:
		_, err = io.ReadFull(r.br, h[:2])
		n = uint64(binary.BigEndian.Uint16(h[:]))
	case 127:
		_, err = io.ReadFull(r.br, h[:])
		n = binary.BigEndian.Uint64(h[:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(r.br, payload)
	return op, payload, err
}

// WantMessage expects a text message of that type as the next frame but for pings.
func (r *Raw) WantMessage(typ string) Message {
	r.Pod.W.T.Helper()
	for {
		op, p, err := r.Read()
		if err == nil && op == Ping {
			continue
		}
		m := Message{Raw: string(p), At: time.Now()}
		if err == nil && op == Text {
			err = json.Unmarshal(p, &m)
		}
		if err != nil || op != Text || m.Type != typ {
			r.Pod.W.T.Fatalf("want message %s, got frame %d %.300q, %v", typ, op, p, err)
		}
		return m
	}
}

// WantFrame expects exactly this frame next.
func (r *Raw) WantFrame(op byte, payload string) {
	r.Pod.W.T.Helper()
	gotOp, p, err := r.Read()
	if err != nil || gotOp != op || string(p) != payload {
		r.Pod.W.T.Fatalf("want frame %d %q, got %d %.300q, %v", op, payload, gotOp, p, err)
	}
}

// WantClose expects a close frame as the next frame but for pings, and behind it the connection's end and nothing else.
// Code 1005 is a close frame without a code.
func (r *Raw) WantClose(code int, reason string) {
	r.Pod.W.T.Helper()
	if err := r.ReadClose(code, reason); err != nil {
		r.Pod.W.T.Fatal(err)
	}
}

// ReadClose is WantClose for tests that know better what to say.
func (r *Raw) ReadClose(code int, reason string) error {
	op, p, err := r.Read()
	for err == nil && op == Ping {
		op, p, err = r.Read()
	}
	got, why := 1005, ""
	if len(p) >= 2 {
		got, why = int(binary.BigEndian.Uint16(p)), string(p[2:])
	}
	if err != nil || op != CloseFrame || got != code || why != reason {
		return fmt.Errorf("want close %d %q, got frame %d: %d %.300q, %v", code, reason, op, got, why, err)
	}
	if op, p, err := r.Read(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("behind the close frame came frame %d %.300q, %v", op, p, err)
	}
	return nil
}

// Abort closes the TCP connection.
func (r *Raw) Abort() { r.nc.Close() }
