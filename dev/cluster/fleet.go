package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"syscall"
	"time"

	"daisi-ws-service/dev/rig"
)

// podState is what the page shows of a pod.
type podState string

const (
	down     podState = "down"
	starting podState = "starting"
	ready    podState = "ready"
	draining podState = "draining"
)

// pod is one of the service's processes, time after time: an ended one is followed by another of the same name.
type pod struct {
	name string
	up   chan struct{} // closed by keep when the first process is ready

	svc   *rig.Service // of the fleet's mutex, like all below
	http  string       // its address, once it listens
	state podState
}

const pulledKept = 300 // events of which the fleet remembers who pulled them

// fleet keeps pods alive.
type fleet struct {
	start func(name string) (*rig.Service, error)
	pods  []*pod
	done  chan struct{} // closed by run when all pods have ended
	err   error         // valid once done is closed

	mu     sync.Mutex // guards all below, and the pods
	pulled map[uint64]string
	order  []uint64 // the keys of pulled, the oldest first
}

func newFleet(n int, start func(name string) (*rig.Service, error)) *fleet {
	f := &fleet{start: start, done: make(chan struct{}), pulled: map[uint64]string{}}
	for i := range n {
		f.pods = append(f.pods, &pod{name: fmt.Sprintf("pod-%d", i+1), up: make(chan struct{}), state: down})
	}
	return f
}

// run keeps all pods until ctx ends, and drains them then. A pod that ends without being asked to ends them all.
func (f *fleet) run(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	errs := make([]error, len(f.pods))
	var wg sync.WaitGroup
	for i, p := range f.pods {
		wg.Go(func() {
			defer stop()
			errs[i] = f.keep(ctx, p)
		})
	}
	wg.Wait()
	f.err = errors.Join(errs...)
	close(f.done)
}

// waitUp returns when each pod has been ready once, and says whether that is so; it never will be once run has ended.
func (f *fleet) waitUp() bool {
	for _, p := range f.pods {
		select {
		case <-p.up:
		case <-f.done:
			return false
		}
	}
	return true
}

// keep starts p again and again. One that was killed waits for the lease of the one before to end.
func (f *fleet) keep(ctx context.Context, p *pod) error {
	for ctx.Err() == nil {
		if err := f.live(ctx, p); err != nil {
			return err
		}
		f.set(p, func() { p.state = down })
		select {
		case <-time.After(time.Second): // long enough to be seen
		case <-ctx.Done():
		}
	}
	return nil
}

// live is the life of one process. It returns nil if somebody asked for its end.
func (f *fleet) live(ctx context.Context, p *pod) error {
	svc, err := f.start(p.name)
	if err != nil {
		return err
	}
	f.set(p, func() { p.svc, p.http, p.state = svc, "", starting })
	go svc.Log.Find(context.Background(), func(line string) bool { f.note(p, line); return false }) // ends with the process
	if err = f.waitReady(ctx, p, svc); err == nil {
		select {
		case <-svc.Done():
		case <-ctx.Done():
		}
	}
	select {
	case <-svc.Done():
		if fault := svc.Fault(); fault != "" {
			return errors.New(fault + "\n" + svc.Log.Text())
		}
		return nil
	default:
	}
	if err != nil { // not ready in its time, or ctx ended before
		svc.Kill()
		return unlessInterrupted(ctx, err)
	}
	return f.drain(p, svc)
}

func (f *fleet) waitReady(ctx context.Context, p *pod, svc *rig.Service) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	if err := svc.WaitListening(ctx); err != nil {
		return err
	}
	fmt.Printf("# %s: http://%s/metrics; log: %s\n", p.name, svc.HTTP, svc.Log.Path)
	if err := svc.WaitReady(ctx); err != nil {
		return err
	}
	f.set(p, func() {
		p.http = svc.HTTP
		if p.state == starting {
			p.state = ready
		}
	})
	select {
	case <-p.up:
	default:
		close(p.up)
	}
	return nil
}

// drain ends a pod as a deployment does, and says what was wrong with it.
func (f *fleet) drain(p *pod, svc *rig.Service) error {
	if f.get(p) != draining { // a second signal would cut the drain off
		if err := svc.Signal(syscall.SIGTERM); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 7*time.Second)
	defer cancel()
	status, err := svc.Wait(ctx)
	if err != nil {
		svc.Kill()
		return err
	}
	if status != 0 {
		return fmt.Errorf("%s ended with status %d:\n%s", p.name, status, svc.Log.Text())
	}
	return nil
}

// end sends a signal to the pod of that name, if it runs.
func (f *fleet) end(name string, sig syscall.Signal) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		if p.name == name && p.state != down && p.state != draining {
			p.state = draining
			return p.svc.Signal(sig)
		}
	}
	return fmt.Errorf("no pod %q that runs", name)
}

func (f *fleet) set(p *pod, change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

func (f *fleet) get(p *pod) podState {
	f.mu.Lock()
	defer f.mu.Unlock()
	return p.state
}

// note learns from a pod's log which events it pulled: each line "event ended" is one.
func (f *fleet) note(p *pod, line string) {
	var l struct {
		Msg string
		Seq uint64
	}
	if json.Unmarshal([]byte(line), &l) != nil || l.Msg != "event ended" {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, again := f.pulled[l.Seq]; !again {
		f.order = append(f.order, l.Seq)
	}
	f.pulled[l.Seq] = p.name
	if len(f.order) > pulledKept {
		delete(f.pulled, f.order[0])
		f.order = f.order[1:]
	}
}

// serve answers with the pods' states, and who pulled the last events.
func (f *fleet) serve(w http.ResponseWriter, r *http.Request) {
	type row struct {
		Name  string   `json:"name"`
		State podState `json:"state"`
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var rows []row
	for _, p := range f.pods {
		rows = append(rows, row{p.name, p.state})
	}
	answer(w, map[string]any{"pods": rows, "pulled": f.pulled})
}

// ready are the addresses of the pods that take requests.
func (f *fleet) ready() (addresses []string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.pods {
		if p.state == ready {
			addresses = append(addresses, p.http)
		}
	}
	return addresses
}
