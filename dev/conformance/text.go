package main

import (
	"fmt"
	"strings"
	"unicode/utf8"
)

// badText are octets that no UTF-8 text holds (RFC 3629, 3 and 4), by what is wrong with them.
func badText() map[string][]string {
	bad := map[string][]string{
		"lonely continuation": {"\x80", "\xbf", "\x80\xbf", "\x80\xbf\x80", "\x80\xbf\x80\xbf", "\x80\xbf\x80\xbf\x80",
			"\x80\xbf\x80\xbf\x80\xbf"},
		"never in UTF-8":     {"\xfe", "\xff", "\xfe\xfe\xff\xff", "\xc0", "\xc1", "\xf5", "\xf8", "\xfc"},
		"five or six octets": {"\xf8\x88\x80\x80\x80", "\xfb\xbf\xbf\xbf\xbf", "\xfc\x84\x80\x80\x80\x80", "\xfd\xbf\xbf\xbf\xbf\xbf"},
		"above 10FFFF":       {"\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xf7\xbf\xbf\xbf"},
		"overlong /":         {"\xc0\xaf", "\xe0\x80\xaf", "\xf0\x80\x80\xaf", "\xf8\x80\x80\x80\xaf", "\xfc\x80\x80\x80\x80\xaf"},
		"overlong NUL":       {"\xc0\x80", "\xe0\x80\x80", "\xf0\x80\x80\x80", "\xf8\x80\x80\x80\x80", "\xfc\x80\x80\x80\x80\x80"},
		"overlong boundary":  {"\xc1\xbf", "\xe0\x9f\xbf", "\xf0\x8f\xbf\xbf", "\xf8\x87\xbf\xbf\xbf", "\xfc\x83\xbf\xbf\xbf\xbf"},
		"surrogate": {"\xed\xa0\x80", "\xed\xad\xbf", "\xed\xae\x80", "\xed\xaf\xbf", "\xed\xb0\x80", "\xed\xbe\x80",
			"\xed\xbf\xbf"},
		"pair of surrogates": {"\xed\xa0\x80\xed\xb0\x80", "\xed\xad\xbf\xed\xbf\xbf", "\xed\xaf\xbf\xed\xb0\x80",
			"\xed\xaf\xbf\xed\xbf\xbf"},
		"start without the rest": {"\xc3 ", "\xc3\xc3\xa9", "\xe2\x82 ", "\xe2 ", "\xf0\x9f\x98 ", "\xf0\x9f ", "\xf0 ",
			"\xe2\x82\xe2\x82\xac", "\xf0\x9f\x98\xf0\x9f\x98\x80"},
		"Latin-1": {"caf\xe9 au lait", "\xfcber"},
	}
	for c := '\xc0'; c <= '\xfd'; c += 3 {
		bad["start and a space"] = append(bad["start and a space"], string([]byte{byte(c), ' '}))
	}
	return bad
}

// faultAt is the number of octets of s after which no UTF-8 can come of it any more.
func faultAt(s string) int {
	for n := range len(s) {
		rest := s[:n+1]
		for rest != "" && utf8.FullRuneInString(rest) {
			r, size := utf8.DecodeRuneInString(rest)
			if r == utf8.RuneError && size <= 1 {
				return n + 1
			}
			rest = rest[size:]
		}
	}
	return len(s)
}

const greek = "κόσμε"

// utf8Cases are text messages, valid and not.
func utf8Cases() []kase {
	var l list
	for _, r := range []rune{0, 1, 0x7f, 0x80, 0xe9, 0x7ff, 0x800, 0x20ac, 0xd7ff, 0xe000, 0xfdd0, 0xfdef, 0xfeff, 0xfffd, 0xfffe, 0xffff,
		0x10000, 0x1f600, 0x3ffff, 0x40000, 0xfffff, 0x100000, 0x10fffd} {
		l.goodText(fmt.Sprintf("U+%04X", r), string(r))
	}
	for plane := rune(1); plane <= 16; plane++ {
		l.goodText(fmt.Sprintf("last of plane %d", plane), string([]rune{plane<<16 | 0xfffe, plane<<16 | 0xffff}))
	}
	l.goodText("many alphabets", "Hello-µ@ßöäüàá-UTF-8!! "+greek+" 日本語 \U0001f600 עברית")
	for class, examples := range badText() {
		for _, s := range examples {
			l.badText(fmt.Sprintf("%s % x", class, s), s)
		}
	}
	for _, s := range []string{"\xc3", "\xe2", "\xe2\x82", "\xf0", "\xf0\x9f", "\xf0\x9f\x98", "\xf4\x8f\xbf", "\xed\x9f"} {
		l.halfText(fmt.Sprintf("% x at the end", s), s)
	}
	long := strings.Repeat(greek, 10_000)
	for _, n := range []int{4095, 4096, 8191, 32_767, 65_535} {
		l.add(notText, fmt.Sprintf("utf8/fault at octet %d of a long message", n), fails(bad, []frame{text(long[:n] + "\xff" + long[n:])}))
		l.add(validText, fmt.Sprintf("utf8/long message cut at %d", n), echoes(pieces(opText, long[:n], long[n:]), long))
	}
	return l
}

const (
	validText = "6455 5.6, 8.1: valid UTF-8 is echoed, wherever it is cut"
	notText   = "6455 8.1: text that is not UTF-8 fails the connection with 1007"
	notSoon   = "6455 8.1: and does so as soon as it can be known"
)

var bad = []int{1007}

func (l *list) goodText(name, s string) {
	name = "utf8/" + name
	l.add(validText, name, func(p *peer) {
		p.send(text(s), binaryf(s))
		p.wantText(s)
		p.wantMessage(opBinary, s)
		p.finish()
	})
	l.add(validText, name+", a fragment per octet", echoes(pieces(opText, split(s, 1)...), s))
	l.add(validText, name+", cut everywhere", func(p *peer) {
		for i := range len(s) + 1 {
			p.send(pieces(opText, s[:i], "", s[i:])...)
			p.wantText(s)
		}
		p.chop = 1
		p.send(text(s))
		p.wantText(s)
		p.finish()
	})
}

func (l *list) badText(name, s string) {
	name = "utf8/" + name
	n := faultAt(s)
	l.add(notText, name, fails(bad, []frame{text(s)}))
	l.add(notText, name+" within text", fails(bad, []frame{text("a"), text(greek + s + greek)}, "a"))
	l.add(notText, name+", a fragment per octet", fails(bad, pieces(opText, split(greek+s+"edited", 1)...)))
	l.add(notText, name+" in chops of 1", func(p *peer) {
		p.chop = 1
		fails(bad, []frame{text(s + greek)})(p)
	})
	l.add("6455 5.6: a binary message holds anything", name+" in a binary message", func(p *peer) {
		p.send(binaryf(s))
		p.wantMessage(opBinary, s)
		p.finish()
	})
	l.add(notSoon, name+", the message never ends", failsFast(frame{op: opText, more: true, payload: greek + s[:n]}.encode()))
	l.add(notSoon, name+", the frame never ends", failsFast(frame{op: opText, payload: greek + s[:n], announce: 1000}.encode()))
	l.add(notSoon, name+", the second frame never ends", failsFast(append(frame{op: opText, more: true,
		payload: greek + s[:n-1]}.encode(), frame{payload: s[n-1 : n], announce: 1000}.encode()...)))
}

// halfText is text that ends within a character.
func (l *list) halfText(name, s string) {
	name = "utf8/" + name
	l.add(notText, name, fails(bad, []frame{text(s)}))
	l.add(notText, name+" of text", fails(bad, []frame{text(greek + s)}))
	l.add(notText, name+" of a fragment, then the end", fails(bad, pieces(opText, greek+s, "")))
	l.add(notText, name+" of a fragment, then another start", fails(bad, pieces(opText, greek+s, greek)))
	l.add("6455 8.1: a half character is no fault before the end", name+" of a fragment, then a ping", func(p *peer) {
		p.send(frame{op: opText, more: true, payload: greek + s}, ping("p"))
		p.wantPongs("p")
		p.finish()
	})
}

// failsFast sends octets after which the connection is lost, and nothing more.
func failsFast(b []byte) func(*peer) {
	return func(p *peer) {
		p.write(b)
		p.within(soon)
		p.wantClose(1007)
	}
}
