package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"strconv"
	"sync"
	"sync/atomic"
	"unicode/utf8"
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
	closePolicy      = 1008
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

// control says whether it is a control frame, or several (RFC 6455 section 5.5).
func (f *frame) control() bool { return f.b[0]&opClose != 0 }

// newEventFrame encodes the json.v1 message of an event around its payload, which stays byte for byte as published. typed
// (EVENTS_TYPE_IN_PAYLOAD) adds a first member event_type to a payload that has none.
func newEventFrame(ev *event, replay, typed bool) *frame {
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

	opening, member := 0, ""
	if typed && !hasEventType(ev.payload) {
		opening, member = bytes.IndexByte(ev.payload, '{')+1, `"event_type":"`+kind+`"`
		if rest := bytes.TrimLeft(ev.payload[opening:], " \t\r\n"); rest[0] != '}' {
			member += ","
		}
	}
	n := len(h) + len(member) + len(ev.payload) + len(tail)
	b := appendHeader(make([]byte, 0, 10+n), opText, n)
	b = append(b, h...)
	b = append(b, ev.payload[:opening]...)
	b = append(b, member...)
	b = append(b, ev.payload[opening:]...)
	return &frame{b: append(b, tail...), label: kind}
}

// hasEventType says whether a payload that checkPayload has passed has a member event_type at its top. The name is spelled out or
// written with \u; few payloads hold either, and only those are decoded.
func hasEventType(payload []byte) bool {
	if !bytes.Contains(payload, []byte("event_type")) && !bytes.Contains(payload, []byte(`\u`)) {
		return false
	}
	var members map[string]json.RawMessage
	json.Unmarshal(payload, &members)
	_, has := members["event_type"]
	return has
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

// newGap encodes the announcement that events after since, the client's last position, may be missing.
func newGap(since uint64, reason string) *frame {
	return newReply("gap", struct {
		Since  uint64 `json:"since"`
		Reason string `json:"reason"`
	}{since, reason})
}

// newPosition encodes that a client has had everything up to seq.
func newPosition(seq uint64) *frame {
	msg := strconv.AppendUint([]byte(`{"type":"position","seq":`), seq, 10)
	msg = append(msg, '}')
	return &frame{b: append(appendHeader(make([]byte, 0, 10+len(msg)), opText, len(msg)), msg...), label: "position"}
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
