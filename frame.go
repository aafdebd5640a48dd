package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

// Opcodes of RFC 6455 section 5.2.
const (
	opContinuation byte = 0x0
	opText         byte = 0x1
	opBinary       byte = 0x2
	opClose        byte = 0x8
	opPing         byte = 0x9
	opPong         byte = 0xA

	finBit  byte = 0x80
	rsvBits byte = 0x70
	rsv1    byte = 0x40
	maskBit byte = 0x80

	maxControl = 125 // payload of a control frame, RFC 6455 section 5.5
)

// Close codes of RFC 6455 section 7.4.1, and our own (docs/protocol.md).
const (
	closeNormal      = 1000
	closeGoingAway   = 1001
	closeProtocol    = 1002
	closeUnsupported = 1003
	closeNoStatus    = 1005 // never on the wire: the close frame was empty
	closeAbnormal    = 1006 // never on the wire: the connection just ended
	closeBadUTF8     = 1007
	closeTooBig      = 1009
	closeInternal    = 1011
	closeTryLater    = 1013
	closeForbidden   = 4403
	closeSlowClient  = 4408
	closeRateLimit   = 4429
)

// frame is one outbound WebSocket message, encoded once and shared by every socket that gets it.
type frame struct {
	b     []byte // whole RFC 6455 frame, header included; immutable
	label string // what messages_sent_total counts it as

	pack   sync.Once
	packed atomic.Bool // z is there
	z      []byte      // the same frame compressed (RFC 7692), once a socket needed it; immutable
}

// newEventFrame encodes the json.v1 message of an event around its payload, which stays byte for byte as published.
func newEventFrame(ev *event, replay bool) *frame {
	tail := "}"
	if replay {
		tail = `,"replay":true}`
	}
	kind := ev.kind.String()
	var head [96]byte
	h := append(head[:0], `{"type":"event","event_type":"`...)
	h = append(h, kind...)
	h = append(h, `","seq":`...)
	h = strconv.AppendUint(h, ev.seq, 10)
	h = append(h, `,"payload":`...)

	n := len(h) + len(ev.payload) + len(tail)
	b := appendHeader(make([]byte, 0, 10+n), opText, n)
	b = append(b, h...)
	b = append(b, ev.payload...)
	return &frame{b: append(b, tail...), label: kind}
}

// newReply encodes a json.v1 message other than an event. payload may be nil; it must be something json can encode.
func newReply(typ string, payload any) *frame {
	msg, err := json.Marshal(struct {
		Type    string `json:"type"`
		Payload any    `json:"payload,omitempty"`
	}{typ, payload})
	if err != nil {
		panic("encode " + typ + ": " + err.Error()) // our own types only
	}
	b := appendHeader(make([]byte, 0, 10+len(msg)), opText, len(msg))
	return &frame{b: append(b, msg...), label: typ}
}

// newGap encodes the announcement that events after since may be missing.
func newGap(since uint64, reason string) *frame {
	return newReply("gap", struct {
		Since  uint64 `json:"since"`
		Reason string `json:"reason"`
	}{since, reason})
}

// appendHeader appends the header of a whole, unmasked message of n bytes (RFC 6455 section 5.2).
func appendHeader(b []byte, op byte, n int) []byte {
	switch {
	case n <= 125:
		return append(b, finBit|op, byte(n))
	case n <= 0xFFFF:
		return binary.BigEndian.AppendUint16(append(b, finBit|op, 126), uint16(n))
	default:
		return binary.BigEndian.AppendUint64(append(b, finBit|op, 127), uint64(n))
	}
}

// appendControl appends a control frame; payload is at most maxControl bytes.
func appendControl(b []byte, op byte, payload []byte) []byte {
	return append(appendHeader(b, op, len(payload)), payload...)
}

// closeFrame encodes a close frame, nil for closeAbnormal. A reason that does not fit is cut between runes.
func closeFrame(code int, reason string) []byte {
	switch code {
	case closeAbnormal:
		return nil
	case closeNoStatus:
		return appendControl(nil, opClose, nil)
	}
	for len(reason) > maxControl-2 {
		_, size := utf8.DecodeLastRuneInString(reason)
		reason = reason[:len(reason)-size]
	}
	p := binary.BigEndian.AppendUint16(make([]byte, 0, maxControl), uint16(code))
	return appendControl(nil, opClose, append(p, reason...))
}

// wireError is a fault of the peer that fails the connection with this close code.
type wireError struct {
	code   int
	reason string
}

func (e *wireError) Error() string { return fmt.Sprintf("%d %s", e.code, e.reason) }

func protocolError(reason string) error { return &wireError{closeProtocol, reason} }

var (
	errTooBig  = &wireError{closeTooBig, "message too big"}
	errBadText = &wireError{closeBadUTF8, "text is not UTF-8"}
)

// parseClose checks the payload of a close frame (RFC 6455 sections 5.5.1 and 7.4) and returns its code,
// closeNoStatus where it has none.
func parseClose(p []byte) (int, error) {
	if len(p) == 0 {
		return closeNoStatus, nil
	}
	if len(p) == 1 {
		return 0, protocolError("close frame of one byte")
	}
	code := int(binary.BigEndian.Uint16(p))
	// 1012 to 1014 are in IANA's registry; 1004 is reserved, 1005, 1006 and 1015 never travel.
	known := code >= 1000 && code <= 1014 && (code < 1004 || code > 1006)
	if !known && (code < 3000 || code > 4999) {
		return 0, protocolError("invalid close code")
	}
	if !utf8.Valid(p[2:]) {
		return 0, &wireError{closeBadUTF8, "close reason is not UTF-8"}
	}
	return code, nil
}

// frameReader parses frames: x/net/websocket reads their headers and unmasks their payloads.
type frameReader struct {
	br *bufio.Reader
	ws *websocket.Conn // reads from br
}

// frameReaders serves the sockets that have something to read. One that is idle holds none: with a reader of its own,
// each would cost 1 KB more.
var frameReaders = sync.Pool{New: func() any {
	br := bufio.NewReaderSize(nil, 1<<10)
	ws, err := shake(nowhere{}, br, "AAAAAAAAAAAAAAAAAAAAAA==", false, nil)
	if err != nil {
		panic("handshake with nobody: " + err.Error())
	}
	return &frameReader{br, ws}
}}

// nowhere is the connection of a handshake that only serves to get the package's Conn.
type nowhere struct{ net.Conn }

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }

// inbound assembles messages from a client's frames. The rules are ours, since x/net/websocket's message layer hands out
// fragments as messages and checks neither UTF-8 nor RSV bits nor reserved opcodes nor the length of control frames.
// Used by one goroutine.
type inbound struct {
	nc      net.Conn
	early   []byte       // comes before what nc has
	one     [1]byte      // where an idle socket waits for the next byte
	fr      *frameReader // nil while idle
	max     int          // bytes of a message
	binary  bool         // binary messages are taken
	deflate bool         // permessage-deflate was negotiated
	// control is given each ping and pong as it comes, between the fragments of a message too. p is its own.
	control func(op byte, p []byte) error

	// Of the message under way.
	op      byte      // 0 = none is
	packed  bool      // it is compressed
	fin     bool      // its last frame has begun
	frame   io.Reader // the payload of its current frame,
	left    int       // of which so much is still to come
	wire    int       // bytes of its frames so far, the current one whole
	checked int       // bytes of a text known to be whole runes
	fail    error     // why it will not be completed
	last    []byte    // payload of the close frame that errClosing tells of
}

// errClosing says that a close frame came.
var errClosing = errors.New("close frame")

// Read gives the frameReader's buffer the connection's bytes.
func (in *inbound) Read(p []byte) (int, error) {
	if len(in.early) > 0 {
		n := copy(p, in.early)
		if in.early = in.early[n:]; len(in.early) == 0 {
			in.early = nil
		}
		return n, nil
	}
	return in.nc.Read(p)
}

// await returns once there is something to read, with a frameReader at hand. It waits without one.
func (in *inbound) await() error {
	if in.fr != nil && in.fr.br.Buffered() > 0 {
		return nil
	}
	in.idle()
	if len(in.early) == 0 {
		if _, err := io.ReadFull(in.nc, in.one[:]); err != nil {
			return err
		}
		in.early = in.one[:]
	}
	in.fr = frameReaders.Get().(*frameReader)
	in.fr.br.Reset(in)
	return nil
}

// idle gives the frameReader back, with what it may have buffered.
func (in *inbound) idle() {
	if in.fr != nil {
		in.fr.br.Reset(nil)
		frameReaders.Put(in.fr)
		in.fr = nil
	}
}

// messages holds buffers for inbound messages, so that a socket between two messages holds none.
var messages = sync.Pool{New: func() any { return new([]byte) }}

// recycle gives the buffer of a message back. Huge ones are left to the garbage collector.
func recycle(buf *[]byte) {
	if buf != nil && cap(*buf) <= 64<<10 {
		messages.Put(buf)
	}
}

// next returns the next whole message, or the payload of a close frame. The caller gives buf to recycle when it is done
// with it, whatever err says. Faults of the peer are *wireError, everything else is the connection's end.
func (in *inbound) next() (op byte, buf *[]byte, err error) {
	in.op, in.wire, in.checked, in.fail = 0, 0, 0, nil
	if err = in.advance(); err == nil {
		buf = messages.Get().(*[]byte)
		*buf = (*buf)[:0]
		err = in.assemble(buf)
	}
	in.frame = nil
	if errors.Is(err, errClosing) {
		recycle(buf)
		return opClose, &in.last, nil
	}
	return in.op, buf, err
}

// assemble reads the message that advance has begun into buf.
func (in *inbound) assemble(buf *[]byte) error {
	var err error
	if in.packed {
		err = in.inflate(buf)
	} else {
		err = in.fill((*payload)(in), buf)
	}
	if err == nil && in.op == opText && in.checked != len(*buf) {
		return errBadText
	}
	return err
}

// advance goes on to the next data frame, over the control frames before it.
func (in *inbound) advance() error {
	for {
		if in.op == 0 {
			if err := in.await(); err != nil {
				return err
			}
		}
		h, err := in.header()
		if err != nil {
			return err
		}
		if h.op < opClose {
			return in.begin(h)
		}
		p, err := in.readControl(h)
		switch {
		case err != nil:
			return err
		case h.op == opClose:
			in.last = p
			return errClosing
		}
		if err := in.control(h.op, p); err != nil {
			return err
		}
	}
}

// payload reads the message under way, over the borders of its frames and up to its end.
type payload inbound

func (p *payload) Read(b []byte) (int, error) {
	in := (*inbound)(p)
	for in.left == 0 && in.fail == nil {
		if in.fin {
			return 0, io.EOF
		}
		in.failed(in.advance())
	}
	if in.fail != nil {
		return 0, in.fail
	}
	n, err := in.frame.Read(b[:min(len(b), in.left)])
	in.left -= n
	in.failed(err)
	return n, in.fail
}

// failed notes an error, the same for every read to come. The end of the connection is not that of the message.
func (in *inbound) failed(err error) {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	in.fail = err
}

// fill appends all that r has to buf, up to the limit. A text is checked as it comes, so that a fault ends the
// connection without waiting for the rest. The buffer grows with what arrives, not with what a header promises.
func (in *inbound) fill(r io.Reader, buf *[]byte) error {
	for {
		b := grow(*buf, in.max+1) // one more shows that there is too much
		n, err := r.Read(b[len(b):min(cap(b), in.max+1)])
		*buf = b[:len(b)+n]
		if len(*buf) > in.max {
			return errTooBig
		}
		if in.op == opText {
			var ok bool
			if in.checked, ok = checkRunes(*buf, in.checked); !ok {
				return errBadText
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// grow makes room in b by doubling, but never beyond most: append would overshoot, and copy four times as much.
func grow(b []byte, most int) []byte {
	if len(b) < cap(b) {
		return b
	}
	size := max(512, 2*cap(b))
	if size > most-most/8 { // no last step for a few bytes
		size = most
	}
	return append(make([]byte, 0, size), b...)
}

// header is what matters of a frame's header.
type header struct {
	op     byte
	fin    bool
	packed bool // RSV1 of RFC 7692 section 6
	n      uint64
}

// header looks at the next frame's header before the package parses it, because that one hides faults: it clears the
// top bit of a 64-bit length. Everything that is wrong with a frame by itself is found here.
func (in *inbound) header() (header, error) {
	p, err := in.fr.br.Peek(2)
	if err != nil {
		return header{}, err
	}
	h := header{op: p[0] & 0x0F, fin: p[0]&finBit != 0, n: uint64(p[1] &^ maskBit)}
	rsv := p[0] & rsvBits
	if in.deflate && (h.op == opText || h.op == opBinary) { // the first frame of a message, and no other
		h.packed, rsv = rsv&rsv1 != 0, rsv&^rsv1
	}
	switch {
	case rsv != 0:
		return h, protocolError("RSV bit without an extension")
	case h.op > opBinary && h.op < opClose || h.op > opPong:
		return h, protocolError("reserved opcode")
	case p[1]&maskBit == 0:
		return h, protocolError("frame is not masked")
	case h.op >= opClose && !h.fin:
		return h, protocolError("fragmented control frame")
	case h.op >= opClose && h.n > maxControl:
		return h, protocolError("control frame too long")
	}
	switch h.n {
	case 126:
		if p, err = in.fr.br.Peek(4); err != nil {
			return h, err
		}
		h.n = uint64(binary.BigEndian.Uint16(p[2:]))
	case 127:
		if p, err = in.fr.br.Peek(10); err != nil {
			return h, err
		}
		h.n = binary.BigEndian.Uint64(p[2:])
		if h.n>>63 != 0 {
			return h, protocolError("length has its top bit set")
		}
	}
	return h, nil
}

// begin checks what a data frame may be after the frames before it, and makes it the current one.
func (in *inbound) begin(h header) error {
	first := h.op != opContinuation
	limit := in.max
	if in.packed && !first || h.packed {
		// What a compressed message holds is counted when it is inflated. Its own length is bounded as well, generously:
		// blocks that hold nothing would make a message without end.
		limit = 2*in.max + 1<<10
	}
	switch {
	case !first && in.op == 0:
		return protocolError("continuation of nothing")
	case first && in.op != 0:
		return protocolError("new message inside another")
	case h.op == opBinary && !in.binary:
		return &wireError{closeUnsupported, "binary messages are not taken"}
	case h.n > uint64(limit-in.wire):
		return errTooBig
	}
	if first {
		in.op, in.packed = h.op, h.packed
	}
	fr, err := in.fr.ws.NewFrameReader()
	in.frame, in.left, in.fin, in.wire = fr, int(h.n), h.fin, in.wire+int(h.n)
	return err
}

// readControl reads a whole control frame.
func (in *inbound) readControl(h header) ([]byte, error) {
	if h.n == 0 { // most pongs: nothing to unmask behind two bytes and the mask
		_, err := in.fr.br.Discard(6)
		return nil, err
	}
	fr, err := in.fr.ws.NewFrameReader()
	if err != nil {
		return nil, err
	}
	p := make([]byte, h.n)
	_, err = io.ReadFull(fr, p)
	return p, err
}

// checkRunes extends the known whole runes of b beyond checked. An incomplete one at the end is left for later.
func checkRunes(b []byte, checked int) (int, bool) {
	for checked < len(b) {
		if b[checked] < utf8.RuneSelf {
			checked++
			continue
		}
		r, size := utf8.DecodeRune(b[checked:])
		if r == utf8.RuneError && size == 1 {
			return checked, !utf8.FullRune(b[checked:])
		}
		checked += size
	}
	return checked, true
}

// closeOf says with which code and reason an error of next ends the socket.
func closeOf(err error) (int, string) {
	var w *wireError
	if errors.As(err, &w) {
		return w.code, w.reason
	}
	return closeAbnormal, "connection lost"
}
