package main

import (
	"net/url"
	"strings"
	"testing"
)

func TestIDs(t *testing.T) {
	check := map[string]func(string) *idError{
		"agent": func(s string) *idError { return tokenIDs.check("agent_id", s) },
		"user":  func(s string) *idError { return nameIDs.check("user_id", s) },
		"chat":  checkChatID,
	}
	for _, c := range []struct{ kinds, id, why string }{
		{"agent user chat", "", ` is empty`},
		{"agent user chat", "a-Z_09@+=~", ""},
		{"agent user", strings.Repeat("x", 128), ""},
		{"agent", strings.Repeat("x", 129), " has 129 bytes"},
		{"user chat", strings.Repeat("x", 256), ""},
		{"user chat", strings.Repeat("x", 257), " has 257 bytes"},
		{"user", strings.Repeat("é", 128), ""},
		{"user", strings.Repeat("é", 129), " has 258 bytes"},
		{"agent", "agent:1", ` "agent:1" holds ':'`},
		{"agent", "a.b", ` "a.b" holds '.'`},
		{"agent", "désk", ` "désk" holds 'é'`},
		{"user", "john.doe@example.com", ""},
		{"user", "auth0|5f7c8ec7c33c6c004bbafe82", ""},
		{"user", "user:1", ""},
		{"user", "Jane Doe", ""},
		{"user", "..", ""},
		{"user", "山田 太郎 💩 %2F/*>{}\"'\\#", ""},
		{"user chat", "a\nb", ` "a\nb" holds '\n'`},
		{"user", "a\u202eb", ` "a\u202eb" holds '\u202e'`},
		{"user", "a\x00", ` "a\x00" holds '\x00'`},
		{"user agent chat", "a\xff", ` "a\xff" holds '�'`},
		{"user agent chat", "a�", ` "a�" holds '�'`},
		{"chat", "628.11@c.us", ""},
		{"chat", "a b", ` "a b" holds ' '`},
		{"chat", "a*", ` "a*" holds '*'`},
		{"chat", "a..b", ` "a..b" has a dot`},
		{"chat", ".a", ` ".a" has a dot`},
		{"chat", "a.", ` "a." has a dot`},
	} {
		for _, kind := range strings.Fields(c.kinds) {
			err := check[kind](c.id)
			if (err == nil) != (c.why == "") || err != nil && (!strings.HasPrefix(err.Error(), kind+" id ") || !strings.Contains(err.Error(), c.why)) {
				t.Errorf("%s %q: %v, want %s", kind, c.id, err, c.why)
			}
		}
	}
}

// TestSessionKeys: no two bearers share a key, its parts are as a path has them, and of the ids that there were before nothing changes.
func TestSessionKeys(t *testing.T) {
	for _, c := range []struct {
		cl   claims
		want string
	}{
		{claims{company: "acme", agent: "a-1", user: "u@x+y=z~_"}, "acme:a-1:u@x+y=z~_"},
		{claims{company: "acme", agent: "7", user: "john.doe@example.com"}, "acme:7:john%2Edoe@example%2Ecom"},
		{claims{company: "acme", agent: "7", user: "user:1"}, "acme:7:user%3A1"},
		{claims{company: "acme", agent: "7", user: "user%3A1"}, "acme:7:user%253A1"},
		{claims{company: "acme", agent: "7", user: "Jané D{o}e"}, "acme:7:Jan%C3%A9%20D%7Bo%7De"},
		{claims{company: "admin", agent: "x", user: "y"}, "admin:x:y"},
		{claims{admin: "x:y"}, "admin:x%3Ay"},
	} {
		key := c.cl.sessionKey()
		if key != c.want {
			t.Errorf("%+v has the key %s, want %s", c.cl, key, c.want)
		}
		last := key[strings.LastIndexByte(key, ':')+1:]
		if id, err := url.PathUnescape(last); err != nil || id != c.cl.user+c.cl.admin {
			t.Errorf("%s as a part of a path is %q, %v", last, id, err)
		}
	}
}

func TestSubjectFaults(t *testing.T) {
	for subject, want := range map[string]string{
		"wa.acme.agent:1.chats":    `: agent id "agent:1" holds ':' (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)`,
		"wa.ac!me.1.chats":         `: company id "ac!me" holds '!' (1 to 128 bytes of A-Z a-z 0-9 _ @ + = ~ -)`,
		"wa.acme.agent.1.chats":    `: "1.chats" follows the agent id "agent"`,
		"wa.acme.7.messages.c\x7f": `: chat id "c\x7f" holds '\x7f' (1 to 256 bytes of printable ASCII without blank, * and >)`,
		"wa.acme":                  "",
		"websocket.acme.7.chats":   "",
	} {
		if _, err := parseSubject("wa", subject); err == nil || err.Error() != errSubject.Error()+want {
			t.Errorf("%q: %v, want %s", subject, err, want)
		}
	}
}
