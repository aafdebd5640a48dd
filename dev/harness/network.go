package harness

import (
	"testing"

	"daisi-ws-service/dev/rig"
)

// Network is a World whose pods are each on a host of their own: between them, and between them and the servers, packets can
// be made to vanish. The test itself reaches each pod all the time.
type Network struct {
	*World
	Redis, NATS string // where the pods reach them
	net         *rig.Network
}

// NewNetwork makes a World with a network around it. Where there is no root, or no ip, nft or nsenter, it skips the test.
func NewNetwork(t *testing.T, opts ...Option) *Network {
	t.Helper()
	NeedRealRedis(t)
	network, err := rig.NewNetwork()
	if err != nil {
		t.Skipf("SKIPPED: this test needs root, network namespaces, iproute2, nftables and util-linux (Debian: apt-get install iproute2 nftables): %v", err)
	}
	t.Cleanup(network.Close) // after the pods have ended
	n := &Network{World: New(t, opts...), net: network}
	if n.Redis, err = network.Way(n.World.Redis.Address()); err != nil {
		t.Fatal(err)
	}
	if n.NATS, err = network.Way(n.World.NATS.Address()); err != nil {
		t.Fatal(err)
	}
	return n
}

// StartPods starts n pods at once, each on a host of its own; they know each other when it returns.
func (n *Network) StartPods(count int, settings ...string) (pods []*Pod) {
	n.T.Helper()
	for range count {
		host, err := n.net.Join()
		if err != nil {
			n.T.Fatal(err)
		}
		at := []string{"SERVER_BIND_ADDRESS=" + host.Address, "SERVER_ADVERTISE_ADDRESS=" + host.Address, "REDIS_ADDRESS=" + n.Redis, "NATS_URL=nats://" + n.NATS}
		pods = append(pods, n.launch(host, append(at, settings...)...))
	}
	for _, p := range pods {
		p.WaitListening()
		p.WaitReady()
	}
	return pods
}

// Cut lets all packets vanish between the pod and each of the others: hosts of pods (p.GRPC), or Redis and NATS.
func (n *Network) Cut(p *Pod, others ...string) {
	n.T.Helper()
	for _, other := range others {
		if err := n.net.Cut(p.Host.Address, other); err != nil {
			n.T.Fatal(err)
		}
	}
}

// Shut lets all packets vanish to and from the port that the pod's peers connect to.
func (n *Network) Shut(p *Pod) {
	n.T.Helper()
	if err := n.net.Shut(p.GRPC); err != nil {
		n.T.Fatal(err)
	}
}

// Mend ends every Cut and Shut.
func (n *Network) Mend() {
	n.T.Helper()
	if err := n.net.Mend(); err != nil {
		n.T.Fatal(err)
	}
}
