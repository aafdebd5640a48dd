package main

import (
	"bufio"
	"bytes"
	"cmp"
	"compress/flate"
	"errors"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"time"
)

// permessage-deflate (RFC 7692), always without context take-over: what a message is compressed to depends on nothing
// but the message, so that one compressed frame serves all sockets, and an idle socket holds no window (1.2 MB in Go).

// deflateLevel is the fastest: 2 KB of events shrink to 23 % in 10 µs, at the default level to 22 % in 16 µs.
const deflateLevel = flate.BestSpeed

// deflateTail is what a compressed message ends in before its last four bytes are cut off (RFC 7692 section 7.2.1),
// and, for a message read, an empty last block behind it, so that the reader comes to an end.
const (
	deflateCut  = "\x00\x00\xff\xff"
	deflateTail = deflateCut + "\x01\x00\x00\xff\xff"
)

// deflateAnswer is the Sec-WebSocket-Extensions of the answer to a request: that of the first offer that can be met,
// "" if there is none. An offer that is malformed is passed over like one that asks for too much: without compression
// the socket works as well.
func deflateAnswer(h http.Header) string {
	for _, line := range h.Values("Sec-Websocket-Extensions") {
		for _, offer := range splitUnquoted(line, ',') {
			if answer := meetOffer(offer); answer != "" {
				return answer
			}
		}
	}
	return ""
}

// meetOffer answers one offer (RFC 7692 section 7.1), "" declines it.
func meetOffer(offer string) string {
	parts := splitUnquoted(offer, ';')
	// Unicode has letters that fold to ASCII ones.
	if !strings.EqualFold(parts[0], "permessage-deflate") || strings.ContainsFunc(offer, func(r rune) bool { return r > '~' }) {
		return ""
	}
	answer := "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
	seen := map[string]bool{}
	for _, part := range parts[1:] {
		name, value, valued := strings.Cut(part, "=")
		name, value = strings.ToLower(strings.TrimRight(name, " \t")), unquote(strings.TrimLeft(value, " \t"))
		if seen[name] {
			return ""
		}
		seen[name] = true
		switch {
		case (name == "server_no_context_takeover" || name == "client_no_context_takeover") && !valued:
		case name == "client_max_window_bits" && (!valued || windowBits(value)):
			// A hint: our reader takes any window up to the largest, so the client need not be held to it.
		case name == "server_max_window_bits" && value == "15":
			answer += "; server_max_window_bits=15" // compress/flate has no smaller window
		default:
			return ""
		}
	}
	return answer
}

// windowBits says whether s is a decimal from 8 to 15 without leading zeros.
func windowBits(s string) bool {
	return s == "8" || s == "9" || len(s) == 2 && s[0] == '1' && s[1] >= '0' && s[1] <= '5'
}

// splitUnquoted splits s at each sep that is not within a quoted string (RFC 9110 section 5.6.4), and trims the parts.
func splitUnquoted(s string, sep byte) []string {
	var parts []string
	begin, quoted := 0, false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			quoted = !quoted
		case c == '\\' && quoted:
			i++
		case c == sep && !quoted:
			parts = append(parts, strings.Trim(s[begin:i], " \t"))
			begin = i + 1
		}
	}
	return append(parts, strings.Trim(s[begin:], " \t"))
}

// unquote returns what a quoted string holds, s itself if it is none, and "" if it is a broken one: no value of a
// parameter is empty.
func unquote(s string) string {
	if !strings.HasPrefix(s, `"`) {
		return s
	}
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch {
		case s[i] == '"' && i == len(s)-1:
			return b.String()
		case s[i] == '"':
			return ""
		case s[i] == '\\' && i+1 < len(s):
			i++
		}
		b.WriteByte(s[i])
	}
	return ""
}

// packer compresses. Its writer is what costs.
type packer struct {
	w   *flate.Writer
	out bytes.Buffer
}

// packers are pooled, and no more are in use than can run at once: with TLS each socket has a writer of its own, and a
// packer for each would take 0.8 MB per socket for a moment.
var (
	packers = sync.Pool{New: func() any {
		w, err := flate.NewWriter(nil, deflateLevel)
		if err != nil {
			panic("make a deflate writer: " + err.Error()) // the level is known
		}
		return &packer{w: w}
	}}
	packing = make(chan struct{}, runtime.GOMAXPROCS(0)) // never closed
)

// deflate makes the compressed form of f, unless it is there already. Any goroutine may call.
func (f *frame) deflate() {
	f.pack.Do(func() {
		packing <- struct{}{}
		defer func() { <-packing }()
		p := packers.Get().(*packer)
		f.z = p.frame(f.b[0]&^finBit, payloadOf(f.b))
		packers.Put(p)
		f.packed.Store(true)
	})
}

// frame compresses a message into a frame (RFC 7692 section 7.2.1).
func (p *packer) frame(op byte, message []byte) []byte {
	p.out.Reset()
	p.w.Reset(&p.out)
	p.w.Write(message) // neither can fail into a buffer
	p.w.Flush()
	z := bytes.TrimSuffix(p.out.Bytes(), []byte(deflateCut))
	b := appendHeader(make([]byte, 0, 10+len(z)), op|rsv1, len(z))
	b = append(b, z...)
	if p.out.Cap() > scratchBytes {
		p.out = bytes.Buffer{}
	}
	return b
}

// payloadOf is what follows the header of an unmasked frame.
func payloadOf(b []byte) []byte {
	switch b[1] {
	case 126:
		return b[4:]
	case 127:
		return b[10:]
	}
	return b[2:]
}

// compressible says whether f is long enough for a socket that negotiated compression to get it compressed.
// A control frame never is (RFC 7692 section 6.1).
func (p *sendPolicy) compressible(f *frame) bool {
	return !f.control() && len(payloadOf(f.b)) >= p.threshold
}

// bytes is the frame as this socket gets it.
func (it *item) bytes() []byte {
	if it.packed {
		return it.f.z
	}
	return it.f.b
}

// take is that of the ring, joined in buf; what must be compressed for it is compressed here, by whoever needs it first. Whoever has
// the turn calls it.
func (c *conn) take(b *batch, buf []byte) []byte {
	for {
		raw := c.ring.take(b, cap(buf), time.Now())
		if raw == nil {
			return b.join(buf)
		}
		raw.deflate()
	}
}

// packedSource gives a flate reader the payload of a message and the tail that was cut off. It is an io.ByteReader, so the
// flate reader takes no byte beyond the end of a block.
type packedSource struct {
	br   *bufio.Reader
	tail string // what is left of it
}

var sources = sync.Pool{New: func() any { return &packedSource{br: bufio.NewReaderSize(nil, 4<<10)} }}

func (s *packedSource) Read(p []byte) (int, error) {
	n, err := s.br.Read(p)
	if n == 0 && err == io.EOF && s.tail != "" {
		n = copy(p, s.tail)
		s.tail, err = s.tail[n:], nil
	}
	return n, err
}

func (s *packedSource) ReadByte() (byte, error) {
	b, err := s.br.ReadByte()
	if err == io.EOF && s.tail != "" {
		b, s.tail, err = s.tail[0], s.tail[1:], nil
	}
	return b, err
}

// ended says whether all of the payload was read.
func (s *packedSource) ended() bool {
	_, err := s.br.Peek(1)
	return err == io.EOF
}

// inflaters are readers of 44 KB each; a socket has one only while it decompresses a message.
var inflaters = sync.Pool{New: func() any { return flate.NewReader(nil) }}

// maxFinals bounds the blocks with BFINAL of a message. Nobody needs many, and two bytes of one cost a copy of the window: a
// message of them alone took a second (measured, with a limit of 1 MiB).
const maxFinals = 1000

// inflate reads the compressed message that advance has begun into buf (RFC 7692 section 7.2.2). Behind a block with
// the BFINAL bit the next one begins at the next byte (section 7.2.1), and may refer to what came before.
func (in *inbound) inflate(buf *[]byte) error {
	src := sources.Get().(*packedSource)
	defer sources.Put(src)
	src.br.Reset((*payload)(in))
	defer src.br.Reset(nil)
	src.tail = deflateTail
	// A message that comes a byte a second holds no flate reader, but a big one.
	if _, err := src.br.Peek(src.br.Size()); err != nil && err != io.EOF {
		return err
	}
	fl := inflaters.Get().(io.Reader)
	defer inflaters.Put(fl)
	for finals := 0; !src.ended(); finals++ {
		if finals > maxFinals {
			return protocolError("too many final blocks")
		}
		window := (*buf)[max(0, len(*buf)-32<<10):]
		fl.(flate.Resetter).Reset(src, window)
		if err := in.fill(fl, buf); err != nil {
			return in.inflateError(err)
		}
	}
	return nil
}

// inflateError tells the faults of the compressed data from all others.
func (in *inbound) inflateError(err error) error {
	var w *wireError
	if in.fail != nil || errors.As(err, &w) {
		return cmp.Or(in.fail, err)
	}
	return protocolError("message can't be decompressed")
}
