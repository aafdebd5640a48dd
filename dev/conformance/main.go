// Program conformance drives a WebSocket echo server from outside, case by case, each against a rule of RFC 6455 or
// RFC 7692: framing, control frames, UTF-8, closing, handshakes, limits, permessage-deflate. It shares no code with any
// server. It prints a line per failed case and a summary:
//
//	go test -run '^TestEchoServer$' -timeout 0 . -args -echo 127.0.0.1:9001 -echo-compression no_context_takeover
//	go -C dev run ./conformance -address 127.0.0.1:9001 -compression no_context_takeover
package main

import (
	"flag"
	"fmt"
	"net"
	"os"
	"regexp"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"
)

// options say what is known of the server.
type options struct {
	address     string
	compression string // disabled, no_context_takeover, or any: whatever it answers, if it is consistent
	max         int    // the largest message that it takes; 0 = not known
	long        bool   // the expensive cases in full
}

// kase is one case. The rule names the RFC's section and says what is expected.
type kase struct {
	name, rule string
	raw        bool   // the case makes the handshake itself
	offer      string // value of Sec-WebSocket-Extensions
	run        func(*peer)
}

// list collects cases that run behind a handshake.
type list []kase

func (l *list) add(rule, name string, run func(*peer)) {
	*l = append(*l, kase{name: name, rule: rule, run: run})
}

// result is a failed case.
type result struct {
	kase
	fault string
}

func (r result) String() string { return fmt.Sprintf("FAIL %s: %s [%s]", r.name, r.fault, r.rule) }

func main() {
	var o options
	flag.StringVar(&o.address, "address", "127.0.0.1:9001", "the echo server's address")
	flag.StringVar(&o.compression, "compression", "disabled", "what the server is set to: disabled, no_context_takeover, or any")
	flag.IntVar(&o.max, "max", 0, "the server's message limit, if it has one")
	flag.BoolVar(&o.long, "long", false, "the expensive cases in full: messages of up to 16 MiB (within -max), 1,000 round trips each")
	pattern := flag.String("run", ".", "only cases whose name matches")
	parallel := flag.Int("parallel", 8, "connections at a time")
	list := flag.Bool("list", false, "print the cases and their rules only")
	flag.Parse()
	cases := matching(cases(&o), *pattern)
	if *list {
		for _, c := range cases {
			fmt.Printf("%s [%s]\n", c.name, c.rule)
		}
		return
	}
	begin := time.Now()
	failed := run(&o, cases, *parallel)
	for _, r := range failed {
		fmt.Println(r)
	}
	fmt.Printf("%d cases, %d failed, %.1f s\n", len(cases), len(failed), time.Since(begin).Seconds())
	if len(failed) > 0 {
		os.Exit(1)
	}
}

// cases are all cases for such a server, by name.
func cases(o *options) []kase {
	all := slices.Concat(handshakes(), negotiations(), limits(o))
	offers := []string{""}
	if o.compression != "disabled" {
		all = append(all, compressed(o)...)
		offers = append(offers, "permessage-deflate")
	}
	// The rules of RFC 6455 hold with the extension too.
	for _, offer := range offers {
		for _, c := range slices.Concat(framing(), utf8Cases(), closings()) {
			if c.offer = offer; offer != "" {
				c.name += ", deflate negotiated"
			}
			all = append(all, c)
		}
	}
	slices.SortStableFunc(all, func(a, b kase) int { return strings.Compare(a.name, b.name) })
	return all
}

func matching(all []kase, pattern string) []kase {
	re := regexp.MustCompile(pattern)
	return slices.DeleteFunc(all, func(c kase) bool { return !re.MatchString(c.name) })
}

// run runs the cases, some at a time, each on a connection of its own, and returns those that failed, in order.
func run(o *options, cases []kase, parallel int) []result {
	faults := make([]string, len(cases))
	next := make(chan int)
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for i := range next {
				faults[i] = one(o, cases[i])
			}
		})
	}
	for i := range cases {
		next <- i
	}
	close(next)
	wg.Wait()
	var failed []result
	for i, fault := range faults {
		if fault != "" {
			failed = append(failed, result{cases[i], fault})
		}
	}
	return failed
}

// one runs a case and returns what went wrong. A minute is for the expensive ones: what must happen soon says so itself.
func one(o *options, c kase) (fault string) {
	defer func() {
		switch r := recover().(type) {
		case nil:
		case failure:
			fault = string(r)
		default:
			fault = fmt.Sprintf("%v\n%s", r, debug.Stack())
		}
	}()
	nc, err := net.Dial("tcp", o.address)
	if err != nil {
		return err.Error()
	}
	defer nc.Close()
	limit := 10 * time.Second
	if o.long {
		limit = 2 * time.Minute
	}
	nc.SetDeadline(time.Now().Add(limit))
	p := newPeer(nc, o)
	if !c.raw {
		p.open101(c.offer)
	}
	c.run(p)
	return ""
}
