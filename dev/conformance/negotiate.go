package main

import "fmt"

const (
	accepted = "accepted"
	declined = "declined"
	either   = "either"
)

const d = "permessage-deflate"

// negotiations are cases of RFC 7692, 5 and 7.1, and of the header's grammar in RFC 6455, 9.1.
func negotiations() []kase {
	var s shakes
	s.met()
	s.notMet()
	return s
}

// offer is a handshake with these lines of Sec-WebSocket-Extensions.
func (s *shakes) offer(verdict, rule string, offers ...string) {
	s.add(rule, fmt.Sprintf("negotiate/%q", offers), func(p *peer) {
		p.write([]byte(request(get, lines("Sec-WebSocket-Extensions", offers...))))
		if verdict == either { // a malformed header may also be refused
			if b, err := p.br.Peek(12); err == nil && string(b) != "HTTP/1.1 101" {
				p.refused(400)
				return
			}
		}
		p.want101(sampleKey, offers...)
		if p.options.compression == "no_context_takeover" && verdict != either && p.deflate != (verdict == accepted) {
			failf("the offer must be %s", verdict)
		}
		p.converse()
	})
}

func (s *shakes) met() {
	rule := "7692 7.1: an offer that can be met is met"
	for _, params := range []string{"", "; client_no_context_takeover", "; server_no_context_takeover",
		"; server_no_context_takeover; client_no_context_takeover",
		"; client_max_window_bits", "; server_max_window_bits=15",
		"; server_no_context_takeover; server_max_window_bits=15; client_no_context_takeover; client_max_window_bits=9",
		`; client_max_window_bits="10"`, `; server_max_window_bits="15"`, `; client_max_window_bits="1\0"`,
		";client_max_window_bits", " ; client_max_window_bits",
		" ;\tclient_max_window_bits ", "; client_max_window_bits = 10", "; client_max_window_bits= 10;server_no_context_takeover"} {
		s.offer(accepted, rule, d+params)
	}
	for bits := 8; bits <= 15; bits++ {
		s.offer(accepted, rule, fmt.Sprintf("%s; client_max_window_bits=%d", d, bits))
		s.offer(accepted, rule, fmt.Sprintf("%s; client_max_window_bits=%d; server_max_window_bits=15", d, bits))
	}
	rule = "7692 5.1: the first offer of several that can be met is met, in one line or in several (6455 9.1)"
	s.offer(accepted, rule, d+"; server_max_window_bits=8, "+d)
	s.offer(accepted, rule, d+"; unknown, "+d+"; client_no_context_takeover")
	s.offer(accepted, rule, d+"; client_max_window_bits=7,"+d+"; client_max_window_bits")
	s.offer(accepted, rule, d+", "+d)
	s.offer(accepted, rule, d+"; client_max_window_bits, "+d)
	s.offer(accepted, rule, "foo, "+d)
	s.offer(accepted, rule, d+", foo; bar=1")
	s.offer(accepted, rule, "foo; "+d+", "+d)
	s.offer(accepted, rule, `foo; bar="baz", `+d)
	s.offer(accepted, rule, ", "+d+",, ")
	s.offer(accepted, rule, "foo", d)
	s.offer(accepted, rule, d, "foo")
	s.offer(accepted, rule, d+"; server_max_window_bits=9", d)
	s.offer(accepted, rule, "", d)
	s.offer(accepted, rule, d, d)
	s.offer(accepted, rule, "x-webkit-deflate-frame, "+d+"; client_max_window_bits")
}

func (s *shakes) notMet() {
	rule := "7692 7.1: an offer with a parameter that is unknown, doubled, or without a proper value is declined"
	for _, params := range []string{"unknown", "unknown=1", "client_no_context_takeover=1", "server_no_context_takeover=true",
		"server_no_context_takeover=15",
		"client_no_context_takeover; client_no_context_takeover", "server_no_context_takeover; server_no_context_takeover",
		"client_max_window_bits; client_max_window_bits",
		"client_max_window_bits=10; client_max_window_bits=10", "server_max_window_bits=15; server_max_window_bits=15",
		"server_max_window_bits",
		"client_max_window_bits; unknown", "client_max_window_bits=10; server_no_context_takeover; client_max_window_bits",
		"permessage-deflate"} {
		s.offer(declined, rule, d+"; "+params)
	}
	for _, side := range []string{"client", "server"} {
		for _, v := range []string{"0", "1", "7", "16", "17", "100", "-1", "08", "015", "+15", "15.0", "f", "x", `"7"`, `"015"`,
			"1e1", "99999999999999999999"} {
			s.offer(declined, rule, fmt.Sprintf("%s; %s_max_window_bits=%s", d, side, v))
		}
	}
	for bits := 8; bits < 15; bits++ {
		s.offer(either, "7692 7.1.2.1: a smaller window of the server is kept to, or declined",
			fmt.Sprintf("%s; server_max_window_bits=%d", d, bits))
		s.offer(either, "7692 7.1.2.1: a smaller window of the server is kept to, or declined",
			fmt.Sprintf(`%s; client_max_window_bits; server_max_window_bits="%d"`, d, bits))
	}
	rule = "6455 9.1: other extensions are declined"
	for _, name := range []string{"foo", "permessage-bzip2", "permessage-snappy", "x-webkit-deflate-frame", "deflate-frame",
		"permessage-deflate2", "xpermessage-deflate",
		"permessage", "bbf-usp-protocol", `foo; a="x"; permessage-deflate`} {
		s.offer(declined, rule, name)
	}
	rule = "6455 9.1: a header against the grammar is declined, or refused"
	for _, v := range []string{d + ";", d + ";;client_max_window_bits", ";" + d, d + "; client_max_window_bits=",
		d + `; client_max_window_bits=""`, d + `; client_max_window_bits="10`,
		d + "; =10", d + "=1", d + " client_max_window_bits", `"` + d + `"`, d + "; client_max_window_bits=10 11",
		d + `; client_max_window_bits="1 0"`,
		`foo; a="x, permessage-deflate"`, d + "/1", d + "; (comment)", "", ",", ";", "=", "\x80", d + "; client_max_window_bits='10'",
		d + "; client_max_window_bits=10\x7f", "PERMESSAGE-DEFLATE", d + "; CLIENT_MAX_WINDOW_BITS"} {
		s.offer(either, rule, v)
	}
}

// converse checks that both understood the negotiation alike.
func (p *peer) converse() {
	p.send(text("hello"))
	p.wantText("hello")
	if p.deflate {
		for _, s := range []string{"hello", filler[:2000], filler[:2000]} { // the second time a context would be taken over
			p.send(frame{op: opText, rsv: rsv1, payload: deflated(s, 6)}, binaryf(s))
			p.wantText(s)
			p.wantMessage(opBinary, s)
		}
		p.finish()
		return
	}
	p.send(frame{op: opText, rsv: rsv1, payload: deflated("hello", 6)})
	p.wantClose(1002)
}
