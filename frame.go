package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strconv"
	"sync"
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
	nc     net.Conn
	early  []byte       // comes before what nc has
	one    [1]byte      // where an idle socket waits for the next byte
	fr     *frameReader // nil while idle
	max    int          // bytes of a message
	binary bool         // binary messages are taken
	// control is given each ping and pong as it comes, between the fragments of a message too. p is its own.
	control func(op byte, p []byte) error
}

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
	checked := 0 // bytes of a text known to be whole runes
	for {
		if buf == nil {
			if err := in.await(); err != nil {
				return 0, nil, err
			}
		}
		h, err := in.header()
		if err != nil {
			return 0, buf, err
		}
		if h.op >= opClose {
			p, err := in.readControl(h)
			if err != nil {
				return 0, buf, err
			}
			if h.op == opClose {
				recycle(buf)
				return opClose, &p, nil
			}
			if err := in.control(h.op, p); err != nil {
				return 0, buf, err
			}
			continue
		}
		if buf == nil {
			buf = messages.Get().(*[]byte)
			*buf = (*buf)[:0]
		}
		if op, err = in.begin(op, h, len(*buf)); err != nil {
			return 0, buf, err
		}
		if checked, err = in.readData(op, h, buf, checked); err != nil {
			return 0, buf, err
		}
		if !h.fin {
			continue
		}
		if op == opText && checked != len(*buf) {
			return 0, buf, &wireError{closeBadUTF8, "text is not UTF-8"}
		}
		return op, buf, nil
	}
}

// header is what matters of a frame's header.
type header struct {
	op  byte
	fin bool
	n   uint64
}

// header looks at the next frame's header before the package parses it, because that one hides faults: it clears the
// top bit of a 64-bit length. Everything that is wrong with a frame by itself is found here.
func (in *inbound) header() (header, error) {
	p, err := in.fr.br.Peek(2)
	if err != nil {
		return header{}, err
	}
	h := header{op: p[0] & 0x0F, fin: p[0]&finBit != 0, n: uint64(p[1] &^ maskBit)}
	switch {
	case p[0]&rsvBits != 0:
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

// begin checks what a data frame may be after the frames before it: op is that of the message under way, 0 for none,
// and have its bytes so far. It returns the message's opcode.
func (in *inbound) begin(op byte, h header, have int) (byte, error) {
	switch {
	case h.op == opContinuation && op == 0:
		return 0, protocolError("continuation of nothing")
	case h.op != opContinuation && op != 0:
		return 0, protocolError("new message inside another")
	case h.op == opBinary && !in.binary:
		return 0, &wireError{closeUnsupported, "binary messages are not taken"}
	case h.n > uint64(in.max-have):
		return 0, &wireError{closeTooBig, "message too big"}
	}
	if h.op != opContinuation {
		op = h.op
	}
	return op, nil
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

// readData appends a data frame's payload to buf. A text is checked as it comes, so that a fault ends the connection
// without waiting for the rest; checked counts the bytes of whole runes. The buffer grows with what arrives, not with
// what the header promises.
func (in *inbound) readData(op byte, h header, buf *[]byte, checked int) (int, error) {
	fr, err := in.fr.ws.NewFrameReader()
	if err != nil {
		return 0, err
	}
	for left := int(h.n); left > 0; {
		b := slices.Grow(*buf, min(left, 512))
		room := b[len(b):min(cap(b), len(b)+left)]
		n, err := fr.Read(room)
		*buf = b[:len(b)+n]
		left -= n
		if op == opText {
			if checked, err = checkRunes(*buf, checked, err); err != nil {
				return 0, err
			}
		}
		if err != nil {
			return 0, err
		}
	}
	return checked, nil
}

// checkRunes extends the known whole runes of b beyond checked. An incomplete one at the end is left for later.
// The error of the read that brought the bytes is passed on if they are well.
func checkRunes(b []byte, checked int, err error) (int, error) {
	for checked < len(b) {
		if b[checked] < utf8.RuneSelf {
			checked++
			continue
		}
		r, size := utf8.DecodeRune(b[checked:])
		if r == utf8.RuneError && size == 1 {
			if !utf8.FullRune(b[checked:]) {
				break
			}
			return 0, &wireError{closeBadUTF8, "text is not UTF-8"}
		}
		checked += size
	}
	return checked, err
}

// closeOf says with which code and reason an error of next ends the socket.
func closeOf(err error) (int, string) {
	var w *wireError
	if errors.As(err, &w) {
		return w.code, w.reason
	}
	return closeAbnormal, "connection lost"
}
