package rig

import (
	"net/http"
	"net/http/httputil"
	"sync"
)

// Balancer stands in for the load balancer in front of the pods: it hands each request, WebSockets too, to the pod that
// has the fewest of its requests open. The host stays the client's, so that a page's origin is its own.
type Balancer struct {
	ready func() []string // addresses of the pods that take requests now

	mu   sync.Mutex // guards open
	open map[string]int
}

func NewBalancer(ready func() []string) *Balancer {
	return &Balancer{ready: ready, open: map[string]int{}}
}

func (b *Balancer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	to, ok := b.take()
	if !ok {
		unavailable(w, "no pod is ready")
		return
	}
	defer b.leave(to)
	proxy := httputil.ReverseProxy{
		Rewrite:      func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = "http", to },
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) { unavailable(w, err.Error()) },
	}
	proxy.ServeHTTP(w, r)
}

func unavailable(w http.ResponseWriter, why string) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, "no pod: "+why, http.StatusServiceUnavailable)
}

func (b *Balancer) take() (address string, ok bool) {
	ready := b.ready()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, a := range ready {
		if !ok || b.open[a] < b.open[address] {
			address, ok = a, true
		}
	}
	if ok {
		b.open[address]++
	}
	return address, ok
}

func (b *Balancer) leave(address string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.open[address]--; b.open[address] == 0 {
		delete(b.open, address)
	}
}
