package main

import (
	"bufio"
	"bytes"
	"compress/flate"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	opContinuation = 0x0
	opText         = 0x1
	opBinary       = 0x2
	opClose        = 0x8
	opPing         = 0x9
	opPong         = 0xA

	rsv1 = 0x40
	rsv2 = 0x20
	rsv3 = 0x10
)

// frame is a frame as this client sends it. Its zero values are those of a correct, final, masked one.
type frame struct {
	op       byte
	more     bool // FIN is clear
	rsv      byte
	payload  string
	unmasked bool
	zeroKey  bool   // the masking key is 0
	form     int    // 16 or 64: bits of the length, though fewer would do
	announce uint64 // a length that the payload does not have
}

func text(s string) frame    { return frame{op: opText, payload: s} }
func binaryf(s string) frame { return frame{op: opBinary, payload: s} }
func ping(s string) frame    { return frame{op: opPing, payload: s} }
func pong(s string) frame    { return frame{op: opPong, payload: s} }

func closing(code int, reason string) frame {
	return frame{op: opClose, payload: string(binary.BigEndian.AppendUint16(nil, uint16(code))) + reason}
}

// pieces is a message of one frame per part.
func pieces(op byte, parts ...string) []frame {
	frames := make([]frame, len(parts))
	for i, p := range parts {
		frames[i] = frame{op: opContinuation, payload: p, more: i < len(parts)-1}
	}
	frames[0].op = op
	return frames
}

// split cuts s into parts of n octets.
func split(s string, n int) []string {
	var parts []string
	for len(s) > n {
		parts, s = append(parts, s[:n]), s[n:]
	}
	return append(parts, s)
}

func (f frame) encode() []byte {
	head := f.op | f.rsv
	if !f.more {
		head |= 0x80
	}
	length, mask := uint64(len(f.payload)), byte(0x80)
	if f.announce != 0 {
		length = f.announce
	}
	if f.unmasked {
		mask = 0
	}
	b := make([]byte, 0, len(f.payload)+14)
	switch {
	case f.form == 64 || length > 0xffff:
		b = binary.BigEndian.AppendUint64(append(b, head, mask|127), length)
	case f.form == 16 || length > 125:
		b = binary.BigEndian.AppendUint16(append(b, head, mask|126), uint16(length))
	default:
		b = append(b, head, mask|byte(length))
	}
	if f.unmasked {
		return append(b, f.payload...)
	}
	var key [4]byte
	if !f.zeroKey {
		binary.LittleEndian.PutUint32(key[:], rand.Uint32())
	}
	b = append(b, key[:]...)
	for i := range len(f.payload) {
		b = append(b, f.payload[i]^key[i&3])
	}
	return b
}

// failure is what a case panics with; the runner reports it.
type failure string

func failf(format string, args ...any) { panic(failure(fmt.Sprintf(format, args...))) }

// message is a data message as it arrived.
type message struct {
	op   byte
	data string
}

func (m message) String() string {
	return fmt.Sprintf("%s %s", map[byte]string{opText: "text", opBinary: "binary", opPong: "pong"}[m.op], short(m.data))
}

func short(s string) string {
	if len(s) > 40 {
		return fmt.Sprintf("%.40q... (%d octets)", s, len(s))
	}
	return fmt.Sprintf("%q", s)
}

// peer is the client's end of one connection. Its methods panic with a failure when the server breaks a rule or does not do
// what the case wants.
type peer struct {
	nc      net.Conn
	br      *bufio.Reader
	options *options
	chop    int // octets per write; 0 = all at once

	deflate  bool   // negotiated
	takeover bool   // the server compresses with context
	window   []byte // what it may refer back to

	sentClose  bool
	open       *message // the message whose fragments are arriving
	compressed bool     // open is
	squeezed   int      // compressed messages that came
	messages   []message
	pongs      []message
	code       int // of the server's close frame; 0: none yet, noCode: it was empty
}

const noCode = 1005

// send writes frames. The server may have ended the connection already: reading tells what it thought.
func (p *peer) send(frames ...frame) {
	var b []byte
	for _, f := range frames {
		p.sentClose = p.sentClose || f.op == opClose
		b = append(b, f.encode()...)
	}
	p.write(b)
}

func (p *peer) write(b []byte) {
	step := p.chop
	if step == 0 {
		step = max(len(b), 1)
	}
	for len(b) > 0 {
		n := min(step, len(b))
		if _, err := p.nc.Write(b[:n]); err != nil {
			return
		}
		b = b[n:]
	}
}

// within bounds the next steps: what must be done at once is not done when it comes with the next frame or time-out.
func (p *peer) within(d time.Duration) { p.nc.SetReadDeadline(time.Now().Add(d)) }

// next reads a frame, holds it against the rules that every frame of a server obeys, and files it.
func (p *peer) next() error {
	var head [10]byte
	if _, err := io.ReadFull(p.br, head[:2]); err != nil {
		return err
	}
	fin, rsv, op := head[0]&0x80 != 0, head[0]&0x70, head[0]&0x0f
	if head[1]&0x80 != 0 {
		failf("the server masked a frame")
	}
	length := uint64(head[1])
	switch length {
	case 126:
		if _, err := io.ReadFull(p.br, head[:2]); err != nil {
			return fmt.Errorf("inside a header: %w", err)
		}
		if length = uint64(binary.BigEndian.Uint16(head[:])); length < 126 {
			failf("length %d in 16 bits", length)
		}
	case 127:
		if _, err := io.ReadFull(p.br, head[:8]); err != nil {
			return fmt.Errorf("inside a header: %w", err)
		}
		if length = binary.BigEndian.Uint64(head[:]); length < 1<<16 || length > 1<<30 {
			failf("length %d in 64 bits", length)
		}
	}
	if op >= opClose && (!fin || length > 125) {
		failf("control frame %x with FIN %v and %d octets", op, fin, length)
	}
	if rsv&^rsv1 != 0 || rsv != 0 && (!p.deflate || op != opText && op != opBinary) {
		failf("frame %x with RSV bits %x", op, rsv)
	}
	payload := make([]byte, length)
	if _, err := io.ReadFull(p.br, payload); err != nil {
		return fmt.Errorf("inside a frame: %w", err)
	}
	if p.code != 0 {
		failf("frame %x after the close frame", op)
	}
	switch op {
	case opText, opBinary, opContinuation:
		p.data(op, rsv != 0, fin, string(payload))
	case opPong:
		p.pongs = append(p.pongs, message{opPong, string(payload)})
	case opClose:
		p.closeFrame(payload)
	default:
		failf("frame with opcode %x", op)
	}
	return nil
}

func (p *peer) data(op byte, compressed, fin bool, payload string) {
	if (op == opContinuation) != (p.open != nil) {
		failf("frame %x inside a message: %v", op, p.open != nil)
	}
	if p.open == nil {
		p.open, p.compressed = &message{op: op}, compressed
	}
	p.open.data += payload
	if !fin {
		return
	}
	m := *p.open
	p.open = nil
	if p.compressed {
		p.squeezed++
		m.data = p.inflate(m.data)
	}
	if m.op == opText && !utf8.ValidString(m.data) {
		failf("text that is not UTF-8: %v", m)
	}
	p.messages = append(p.messages, m)
}

// inflate undoes RFC 7692, 7.2.1. The final empty block lets the reader see an end where the rule has none.
func (p *peer) inflate(s string) string {
	in := io.MultiReader(strings.NewReader(s), strings.NewReader("\x00\x00\xff\xff\x01\x00\x00\xff\xff"))
	out, err := io.ReadAll(flate.NewReaderDict(in, p.window))
	if err != nil {
		failf("the server's compressed message %x: %v", s[:min(len(s), 40)], err)
	}
	if p.takeover {
		p.window = append(p.window, out...)
		p.window = p.window[max(0, len(p.window)-1<<15):]
	}
	return string(out)
}

func (p *peer) closeFrame(payload []byte) {
	switch {
	case len(payload) == 0:
		p.code = noCode
	case len(payload) == 1 || !utf8.Valid(payload[2:]):
		failf("close frame %x", payload)
	default:
		p.code = int(binary.BigEndian.Uint16(payload))
		if !slices.Contains(validCodes, p.code) {
			failf("close code %d", p.code)
		}
	}
}

// wait reads until there is something in the queue. Pongs and messages are told apart: RFC 6455, 5.4, lets a pong overtake.
func (p *peer) wait(queue *[]message, for_ string) message {
	for len(*queue) == 0 {
		if p.code != 0 {
			failf("close %d instead of %s", p.code, for_)
		}
		if err := p.next(); err != nil {
			failf("%v instead of %s", reason(err), for_)
		}
	}
	m := (*queue)[0]
	*queue = (*queue)[1:]
	return m
}

func reason(err error) string {
	var timeout net.Error
	if errors.As(err, &timeout) && timeout.Timeout() {
		return "nothing in time"
	}
	if errors.Is(err, io.EOF) {
		return "the end of TCP"
	}
	return err.Error()
}

func (p *peer) wantMessage(op byte, data string) {
	want := message{op, data}
	if m := p.wait(&p.messages, want.String()); m != want {
		failf("%v instead of %v", m, want)
	}
}

func (p *peer) wantText(data string) { p.wantMessage(opText, data) }

func (p *peer) wantPongs(payloads ...string) {
	for _, s := range payloads {
		want := message{opPong, s}
		if m := p.wait(&p.pongs, want.String()); m != want {
			failf("%v instead of %v", m, want)
		}
	}
}

// wantClose reads the server's close frame, with one of the codes (none: any), answers it, and wants the server to be the
// first to end TCP (RFC 6455, 7.1.1), with nothing sent beside.
func (p *peer) wantClose(codes ...int) {
	p.wantCloseFrame(codes...)
	if !p.sentClose {
		p.send(closing(p.code, ""))
	}
	p.wantEnd()
}

func (p *peer) wantCloseFrame(codes ...int) {
	for p.code == 0 {
		if err := p.next(); err != nil {
			failf("%s instead of close %v", reason(err), codes)
		}
	}
	if left := slices.Concat(p.messages, p.pongs); len(left) > 0 {
		failf("%v, which nothing asked for", left[0])
	}
	if len(codes) > 0 && !slices.Contains(codes, p.code) {
		failf("close %d instead of %v", p.code, codes)
	}
}

// wantEnd wants TCP to end, and a half message not to be left.
func (p *peer) wantEnd() {
	rest, err := io.ReadAll(p.br)
	if len(rest) > 0 {
		failf("% x after the close frame", rest[:min(len(rest), 40)])
	}
	if err != nil {
		failf("%s instead of the end of TCP", reason(err))
	}
}

// finish says goodbye and wants it answered.
func (p *peer) finish() {
	p.chop = 0
	p.send(closing(1000, ""))
	p.wantClose(1000)
}

// deflated compresses a message as RFC 7692, 7.2.1 says, at the given level.
func deflated(s string, level int) string {
	var b bytes.Buffer
	w, _ := flate.NewWriter(&b, level)
	io.WriteString(w, s)
	w.Flush()
	return strings.TrimSuffix(b.String(), "\x00\x00\xff\xff")
}
