package harness

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// None, as Key or Token of a Dial, sends none.
const None = "\x00"

// Dial says who connects, and how. The zero value of every field is what a well-behaved client does.
type Dial struct {
	Company, Agent, User string
	Admin                string // set: an admin's socket, with scope and restriction
	ScopeCompany         string
	ScopeAgent           string
	Restriction          string
	TTL                  time.Duration // of the token; 0 = 1 h

	Path        string // instead of that of company and agent
	Key         string // instead of the API key that fits
	Token       string // instead of a token sealed for this Dial
	Bearer      bool   // the token travels as sub-protocol bearer.<token>, not in the query
	Query       url.Values
	Header      http.Header
	Protocols   []string
	Gorilla     bool     // gorilla/websocket instead of coder/websocket
	Via         *Library // a client in another program instead of both
	Compression bool
	RcvBuf      int // SO_RCVBUF of the client
}

// User is the Dial of a user.
func User(company, agent, user string) Dial {
	return Dial{Company: company, Agent: agent, User: user}
}

// Admin is the Dial of an admin; "" = every company, every agent.
func Admin(id, company, agent string) Dial {
	return Dial{Admin: id, ScopeCompany: company, ScopeAgent: agent}
}

// With returns d with a query parameter set.
func (d Dial) With(name, value string) Dial {
	d.Query = maps.Clone(d.Query)
	if d.Query == nil {
		d.Query = url.Values{}
	}
	d.Query.Set(name, value)
	return d
}

// Positions returns d as a client that keeps positions and has none yet.
func (d Dial) Positions() Dial { return d.With("since", "") }

// From returns d as a client that comes back with a position.
func (d Dial) From(p Place) Dial {
	return d.With("since", strconv.FormatUint(p.Seq, 10)).With("stream", p.Stream)
}

// Origin returns d as a page of that origin would dial.
func (d Dial) Origin(origin string) Dial {
	d.Header = d.Header.Clone()
	if d.Header == nil {
		d.Header = http.Header{}
	}
	d.Header.Set("Origin", origin)
	return d
}

// complete fills in key, token and path.
func (d Dial) complete(w *World) Dial {
	if d.TTL == 0 {
		d.TTL = time.Hour
	}
	path, key, token := "/ws/"+d.Company+"/"+d.Agent, APIKey, ""
	if d.Admin != "" {
		path, key = "/ws/admin", AdminAPIKey
	}
	switch {
	case d.Token != "":
		token = d.Token
	case d.Admin != "":
		token = AdminToken(w.T, d.Admin, d.ScopeCompany, d.ScopeAgent, d.Restriction, d.TTL)
	default:
		token = UserToken(w.T, d.Company, d.Agent, d.User, d.TTL)
	}
	d.Token = token
	if d.Key == "" {
		d.Key = key
	}
	if d.Path == "" {
		d.Path = path
	}
	return d
}

func (d Dial) dialer(address string) dialer {
	q := maps.Clone(d.Query)
	if q == nil {
		q = url.Values{}
	}
	protocols := d.Protocols
	if d.Key != None {
		q.Set("x-api-key", d.Key)
	}
	if d.Token != None && d.Bearer {
		protocols = append([]string{"json.v1"}, "bearer."+strings.TrimRight(d.Token, "="))
	} else if d.Token != None {
		q.Set("token", d.Token)
	}
	return dialer{url: "ws://" + address + d.Path + "?" + q.Encode(), header: d.Header, protocols: protocols, compression: d.Compression, rcvBuf: d.RcvBuf}
}

// TryDial opens a socket, or returns the HTTP answer of the refusal, or an error where there was not even that. Unlike
// the other methods it may be called from any goroutine, as may the Try methods of the Client.
func (p *Pod) TryDial(ctx context.Context, d Dial) (*Client, Answer, error) {
	return p.tryDial(ctx, d.complete(p.W), p.HTTP)
}

func (p *Pod) tryDial(ctx context.Context, d Dial, address string) (*Client, Answer, error) {
	dial := dialCoder
	switch {
	case d.Via != nil:
		dial = d.Via.dial
	case d.Gorilla:
		dial = dialGorilla
	}
	at := d.dialer(address)
	at.host = p.Host
	if at.tls = p.TLS; at.tls != nil {
		at.url = "wss" + strings.TrimPrefix(at.url, "ws")
	}
	w, resp, err := dial(ctx, at)
	if err != nil {
		if resp == nil {
			return nil, Answer{}, err
		}
		body, _ := io.ReadAll(resp.Body) // both libraries keep the first 1024 bytes
		return nil, Answer{resp, body}, fmt.Errorf("%s: %s %s", d.Path, resp.Status, body)
	}
	c := newClient(p, d, w)
	p.W.T.Cleanup(c.Abort)
	return c, Answer{Response: resp}, nil
}

// Dial opens a socket and does not wait for its ready. Its TCP connection is closed at the end of the test.
func (p *Pod) Dial(d Dial) *Client {
	p.W.T.Helper()
	return p.DialAt(p.HTTP, d)
}

// DialAt is Dial through another address: a proxy's. A 503 means "come again", and so it does, for a while: on a loaded
// machine Redis may be away for a moment by the service's measure.
func (p *Pod) DialAt(address string, d Dial) *Client {
	p.W.T.Helper()
	d = d.complete(p.W)
	var c *Client
	var err error
	Eventually(p.W.T, Patience, "an answer other than 503", func() bool {
		var a Answer
		c, a, err = p.tryDial(Within(p.W.T, Patience), d, address)
		return a.Response == nil || a.StatusCode != http.StatusServiceUnavailable
	})
	if err != nil {
		p.W.T.Fatalf("dial %s: %v", p.ID, err)
	}
	return c
}

// Connect opens a socket and returns once it has got its ready: what is published from then on reaches it. It comes again
// after a close with 1013 as Dial does after a 503.
func (p *Pod) Connect(d Dial) *Client {
	p.W.T.Helper()
	return p.ConnectAt(p.HTTP, d)
}

// ConnectAt is Connect through another address.
func (p *Pod) ConnectAt(address string, d Dial) *Client {
	p.W.T.Helper()
	for began := time.Now(); ; {
		c := p.DialAt(address, d)
		m, err := c.TryTake(Within(p.W.T, Patience), func(Message) bool { return true })
		if end := c.Ended(); err != nil && end != nil && end.Code == 1013 && time.Since(began) < Patience {
			continue
		}
		if err != nil {
			p.W.T.Fatalf("%s on %s waits for ready: %v", c.who(), p.ID, err)
		}
		c.greeted(m)
		return c
	}
}

// WantRefused dials and expects an HTTP error with this status and code of the error table.
func (p *Pod) WantRefused(d Dial, status int, code string) Answer {
	p.W.T.Helper()
	c, a, err := p.TryDial(Within(p.W.T, Patience), d)
	if c != nil {
		p.W.T.Fatalf("%s was let in, want %d %s", d.Path, status, code)
	}
	if a.Response == nil {
		p.W.T.Fatalf("want %d %s, got no answer: %v", status, code, err)
	}
	if a.StatusCode != status || a.Error(p.W.T).Code != code {
		p.W.T.Fatalf("want %d %s, got %v", status, code, err)
	}
	return a
}
