package main

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"
	"unicode/utf8"

	"golang.org/x/net/websocket"
)

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
	first   [8]byte      // where an idle socket waits for what comes next; a whole pong has 6
	broken  error        // what wait met instead
	fr      *frameReader // nil while idle
	max     int          // bytes of a message
	binary  bool         // binary messages are taken
	deflate bool         // permessage-deflate was negotiated
	// control is given each ping and pong as it comes, between the fragments of a message too. p is its own.
	control func(op byte, p []byte) error
	// message is given each whole message; p is good until it returns.
	message func(op byte, p []byte)
	// begun is when the frame or message under way began, in Unix nanoseconds, 0 between two: for whoever sees to it that
	// none takes for ever.
	begun *atomic.Int64

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

var (
	errClosing    = errors.New("close frame")
	errNothingYet = errors.New("nothing has come") // between two messages: call wait
)

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

// wait returns once there is something to read, or the connection's end. It needs little stack.
func (in *inbound) wait() {
	n, err := io.ReadAtLeast(in.nc, in.first[:], 1)
	if in.early = in.first[:n]; n == 0 {
		in.broken = err
	}
}

// start makes a frameReader ready if there is something to read.
func (in *inbound) start() error {
	switch {
	case in.fr != nil && in.fr.br.Buffered() > 0:
	case in.broken != nil:
		return in.broken
	case len(in.early) == 0:
		return errNothingYet
	default:
		if in.fr == nil {
			in.fr = frameReaders.Get().(*frameReader)
		}
		in.fr.br.Reset(in)
	}
	in.begun.Store(time.Now().UnixNano())
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

// next returns the next whole message, or the payload of a close frame; errNothingYet if no byte of one has come. The caller gives buf to recycle when it is done
// with it, whatever err says. Faults of the peer are *wireError, everything else is the connection's end.
func (in *inbound) next() (op byte, buf *[]byte, err error) {
	in.op, in.wire, in.checked, in.fail = 0, 0, 0, nil
	defer in.begun.Store(0)
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
			if err := in.start(); err != nil {
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
		if h.n < 126 {
			return h, protocolError("length in more bytes than it needs")
		}
	case 127:
		if p, err = in.fr.br.Peek(10); err != nil {
			return h, err
		}
		h.n = binary.BigEndian.Uint64(p[2:])
		if h.n>>63 != 0 {
			return h, protocolError("length has its top bit set")
		}
		if h.n <= 0xFFFF {
			return h, protocolError("length in more bytes than it needs")
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
