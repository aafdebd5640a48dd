package main

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// idError is why a value can't be an id.
type idError struct {
	field string // as JSON names it: agent_id
	why   string
}

func (e *idError) Error() string { return strings.ReplaceAll(e.field, "_", " ") + " " + e.why }

// idRule is what ids of one kind may be.
type idRule struct {
	most  int                // bytes
	fault func(s string) int // where the first sign stands that is not allowed, -1 = nowhere
	text  string
}

var (
	// A company's and an agent's id are tokens of a NATS subject and parts of Redis keys: they hold nothing that means
	// something there.
	tokenIDs = idRule{128, func(s string) int { return firstOther(plainSign, s) }, "1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -"}
	// A user's and an admin's id are names that other systems have given. They enter no subject, and escapeID writes them
	// into keys and paths.
	nameIDs = idRule{256, func(s string) int { return strings.IndexFunc(s, unprintable) }, "1 to 256 bytes of printable UTF-8"}
	// A chat's id is the end of a NATS subject, dots included.
	chatIDs = idRule{256, func(s string) int { return firstOther(chatSign, s) }, "1 to 256 bytes of printable ASCII without blank, * and >"}
)

func plainSign(c byte) bool {
	switch {
	case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
	case c == '_', c == '@', c == '+', c == '=', c == '~', c == '-':
	default:
		return false
	}
	return true
}

func chatSign(c byte) bool { return c > ' ' && c <= '~' && c != '*' && c != '>' }

// unprintable also holds for what is no UTF-8: JSON decoders write U+FFFD for it, so two ids would become one.
func unprintable(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }

func firstOther(sign func(byte) bool, s string) int {
	for i := range len(s) {
		if !sign(s[i]) {
			return i
		}
	}
	return -1
}

// check returns nil if s may be an id.
func (rule *idRule) check(field, s string) *idError {
	why := ""
	switch at := rule.fault(s); {
	case s == "":
		why = "is empty"
	case len(s) > rule.most:
		why = fmt.Sprintf("%.64q has %d bytes", s, len(s))
	case at >= 0:
		r, _ := utf8.DecodeRuneInString(s[at:])
		why = fmt.Sprintf("%.64q holds %q", s, r)
	default:
		return nil
	}
	return &idError{field, why + " (" + rule.text + ")"}
}

// checkPair checks the two ids that subjects, paths and events between pods have in common.
func checkPair(company, agent string) *idError {
	if err := tokenIDs.check("company_id", company); err != nil {
		return err
	}
	return tokenIDs.check("agent_id", agent)
}

func checkChatID(s string) *idError {
	if err := chatIDs.check("chat_id", s); err != nil {
		return err
	}
	if s[0] == '.' || s[len(s)-1] == '.' || strings.Contains(s, "..") {
		return &idError{"chat_id", fmt.Sprintf("%.64q has a dot at its end or two in a row, which no NATS subject can hold", s)}
	}
	return nil
}

// escapeID writes a user's or an admin's id as a part of a Redis key or a segment of a path: what a company's id may not hold
// becomes %XX, as in a URL (RFC 3986 section 2.1).
func escapeID(s string) string {
	var b strings.Builder
	for i := range len(s) {
		if plainSign(s[i]) {
			b.WriteByte(s[i])
		} else {
			fmt.Fprintf(&b, "%%%02X", s[i])
		}
	}
	return b.String()
}
