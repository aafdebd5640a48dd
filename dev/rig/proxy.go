package rig

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"
)

// Proxy forwards TCP connections to a target and breaks them as it is told. It keeps its port over all of that.
// Any goroutine may call.
type Proxy struct {
	l  net.Listener
	wg sync.WaitGroup

	mu      sync.Mutex // guards all below
	target  string
	taken   int // connections accepted so far, those refused by Cut included
	conns   map[net.Conn]struct{}
	latency time.Duration
	cut     bool
	hole    chan struct{} // open while bytes vanish into a black hole; closed when they may pass; nil = none
	closed  bool
}

// StartProxy listens on a free port of 127.0.0.1.
func StartProxy(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	return NewProxy(l, target), nil
}

// NewProxy is StartProxy with a listener, which it closes in the end.
func NewProxy(l net.Listener, target string) *Proxy {
	p := &Proxy{target: target, l: l, conns: map[net.Conn]struct{}{}}
	p.wg.Go(p.accept)
	return p
}

// Address is where to connect instead of to the target.
func (p *Proxy) Address() string { return p.l.Addr().String() }

// Retarget forwards the connections from now on to another target. A pod that is to be reached through a proxy only must
// know the proxy's address before it listens itself.
func (p *Proxy) Retarget(target string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.target = target
}

// Taken is how many connections have been made to the proxy so far.
func (p *Proxy) Taken() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.taken
}

// Latency delays every byte by d, each way.
func (p *Proxy) Latency(d time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.latency = d
}

// Cut breaks all connections and refuses new ones until Restore.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = true
	p.closeAllLocked()
}

// BlackHole keeps connections open, and accepts new ones, but lets nothing through until Restore. What was sent
// meanwhile arrives then, as it would after a partition that TCP survived.
func (p *Proxy) BlackHole() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hole == nil {
		p.hole = make(chan struct{})
	}
}

// Restore ends Cut and BlackHole.
func (p *Proxy) Restore() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.cut = false
	if p.hole != nil {
		close(p.hole)
		p.hole = nil
	}
}

// Close ends the proxy with all its connections.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	p.closeAllLocked()
	p.mu.Unlock()
	p.Restore()
	p.l.Close()
	p.wg.Wait()
}

func (p *Proxy) closeAllLocked() {
	for c := range p.conns {
		c.Close()
	}
}

// hold registers c, or closes it if it must not live.
func (p *Proxy) hold(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cut || p.closed {
		c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) drop(c net.Conn) {
	c.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
}

func (p *Proxy) accept() {
	for {
		in, err := p.l.Accept()
		if err != nil {
			return
		}
		p.mu.Lock()
		p.taken++
		p.mu.Unlock()
		if p.hold(in) {
			p.wg.Go(func() { p.forward(in) })
		}
	}
}

func (p *Proxy) forward(in net.Conn) {
	defer p.drop(in)
	p.passable()
	p.mu.Lock()
	target := p.target
	p.mu.Unlock()
	out, err := net.DialTimeout("tcp", target, 5*time.Second)
	if err != nil || !p.hold(out) {
		return
	}
	defer p.drop(out)
	var wg sync.WaitGroup
	wg.Go(func() { p.copy(out, in) })
	wg.Go(func() { p.copy(in, out) })
	wg.Wait()
}

// passable returns when no black hole is open.
func (p *Proxy) passable() {
	for {
		p.mu.Lock()
		hole := p.hole
		p.mu.Unlock()
		if hole == nil {
			return
		}
		<-hole
	}
}

type chunk struct {
	data []byte
	due  time.Time
}

// copy moves bytes one way: one goroutine reads and stamps them, this one writes each when it is due, so that
// latency costs no throughput. The half-close is passed on; an error ends both ways.
func (p *Proxy) copy(dst, src net.Conn) {
	chunks := make(chan chunk, 256) // closed by the reader
	p.wg.Go(func() {
		defer close(chunks)
		for {
			buf := make([]byte, 32<<10)
			n, err := src.Read(buf)
			p.mu.Lock()
			due := time.Now().Add(p.latency)
			p.mu.Unlock()
			if n > 0 {
				chunks <- chunk{buf[:n], due}
			}
			if err != nil {
				if !errors.Is(err, io.EOF) {
					dst.Close()
				}
				return
			}
		}
	})
	for c := range chunks {
		time.Sleep(time.Until(c.due))
		p.passable()
		if _, err := dst.Write(c.data); err != nil {
			src.Close()
		}
	}
	if tcp, ok := dst.(*net.TCPConn); ok {
		tcp.CloseWrite()
	}
}
