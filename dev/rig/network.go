package rig

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Network is a bridge in a network namespace of its own, with hosts, each in another, behind it. Packets between them can
// be made to vanish: unlike a Proxy it sends no FIN and no RST, and TCP's own retries and time-outs decide what happens
// next. No namespace has a name and no device is outside of one: the kernel removes all of it when the last process in
// there, and this program, have ended, however they end.
type Network struct {
	hub   namespace
	hosts []*Host
	ways  []*Proxy
}

// Host is a namespace with one address, reached by the other hosts over the bridge.
type Host struct {
	Address string
	ns      namespace
}

// namespace is an open file of nsfs(5).
type namespace struct{ fd int }

// rules drop what the two sets name, also what the bridge's own addresses send, which does not pass its ports.
const rules = `
table bridge cut {
	set gone { type ipv4_addr . ipv4_addr; }
	set shut { type ipv4_addr . inet_service; }
	chain drops {
		ip saddr . ip daddr @gone drop
		ip daddr . tcp dport @shut drop
		ip saddr . tcp sport @shut drop
	}
	chain forwarded { type filter hook prerouting priority 0; jump drops; }
	chain own { type filter hook output priority 0; jump drops; }
}`

// NewNetwork makes a bridge without hosts. It needs root, iproute2, nftables and nsenter(1); on an error nothing is left.
func NewNetwork() (*Network, error) {
	for _, program := range []string{"ip", "nft", "nsenter"} {
		if _, err := exec.LookPath(program); err != nil {
			return nil, err
		}
	}
	hub, err := newNamespace()
	if err != nil {
		return nil, err
	}
	n := &Network{hub: hub}
	// Without a link address of its own a bridge has one of its ports', another with each port, and who knew the old one is
	// not heard any more.
	err = errors.Join(hub.run("", "ip", "link", "add", "bridge", "address", "02:00:00:00:00:01", "type", "bridge"), hub.run("", "ip", "link", "set", "bridge", "up"),
		hub.run(rules, "nft", "-f", "-"))
	if err != nil {
		n.Close()
		return nil, err
	}
	return n, nil
}

// Join adds a host.
func (n *Network) Join() (*Host, error) {
	ns, err := newNamespace()
	if err != nil {
		return nil, err
	}
	h := &Host{Address: fmt.Sprintf("10.9.1.%d", len(n.hosts)+1), ns: ns}
	n.hosts = append(n.hosts, h)
	port := fmt.Sprintf("port%d", len(n.hosts))
	for _, step := range []struct {
		in   namespace
		args string
	}{
		{n.hub, "link add " + port + " type veth peer name eth0 netns " + ns.path()},
		{n.hub, "link set " + port + " master bridge up"},
		{ns, "link set lo up"},
		{ns, "address add " + h.Address + "/16 dev eth0"},
		{ns, "link set eth0 up"},
	} {
		if err := step.in.run("", "ip", strings.Fields(step.args)...); err != nil {
			return nil, err
		}
	}
	return h, nil
}

// Way gives the hosts an address, host:port, behind which is target, a server outside of the network.
func (n *Network) Way(target string) (string, error) {
	ip := fmt.Sprintf("10.9.0.%d", len(n.ways)+1)
	if err := n.hub.run("", "ip", "address", "add", ip+"/16", "dev", "bridge"); err != nil {
		return "", err
	}
	var l net.Listener
	err := n.hub.do(func() (err error) {
		l, err = net.Listen("tcp", ip+":0")
		return err
	})
	if err != nil {
		return "", err
	}
	n.ways = append(n.ways, NewProxy(l, target))
	return l.Addr().String(), nil
}

// Cut lets all packets between two addresses vanish, both ways. A port is not looked at.
func (n *Network) Cut(a, b string) error {
	a, _, _ = strings.Cut(a, ":")
	b, _, _ = strings.Cut(b, ":")
	return n.hub.run("", "nft", fmt.Sprintf("add element bridge cut gone { %s . %s, %s . %s }", a, b, b, a))
}

// Shut lets all packets to and from one port vanish, as a wrong rule in a firewall does.
func (n *Network) Shut(hostport string) error {
	return n.hub.run("", "nft", "add element bridge cut shut { "+strings.Replace(hostport, ":", " . ", 1)+" }")
}

// Mend ends every Cut and Shut. Connections that TCP has not given up go on at its next retry.
func (n *Network) Mend() error {
	return n.hub.run("", "nft", "flush set bridge cut gone; flush set bridge cut shut")
}

// Close ends the network; the processes on its hosts must have ended.
func (n *Network) Close() {
	for _, p := range n.ways {
		p.Close()
	}
	for _, h := range n.hosts {
		unix.Close(h.ns.fd)
	}
	unix.Close(n.hub.fd)
}

// Command is what runs a program on the host.
func (h *Host) Command(bin string, args ...string) (string, []string) {
	return h.ns.command(bin, args...)
}

// Dial connects from the host, to a program on it: that does not pass the bridge, so nothing vanishes.
func (h *Host) Dial(ctx context.Context, network, address string) (conn net.Conn, err error) {
	err = h.ns.do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

func newNamespace() (ns namespace, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // as in do
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			ns.fd, err = unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		}
	}()
	<-done
	if err != nil {
		return ns, fmt.Errorf("make a network namespace: %w", err)
	}
	return ns, nil
}

// do runs f on a thread in the namespace: a socket belongs to that of the thread which makes it.
func (ns namespace) do(f func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine, and nobody else gets into it
		err := unix.Setns(ns.fd, unix.CLONE_NEWNET)
		if err == nil {
			err = f()
		}
		errs <- err
	}()
	return <-errs
}

func (ns namespace) path() string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.fd) }

func (ns namespace) command(bin string, args ...string) (string, []string) {
	return "nsenter", append([]string{"--net=" + ns.path(), bin}, args...)
}

func (ns namespace) run(input, bin string, args ...string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	enter, all := ns.command(bin, args...)
	cmd := exec.CommandContext(ctx, enter, all...)
	cmd.Stdin = strings.NewReader(input)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", bin, strings.Join(args, " "), err, out)
	}
	return nil
}
