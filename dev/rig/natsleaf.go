package rig

import (
	"fmt"
	"os"
	"path/filepath"
)

// StartNATSLeaf runs two servers with JetStream of their own, each in a domain that is called as here: a hub, and a leaf that
// is connected to it. Clients of the leaf reach the hub's streams by the domain's name.
func StartNATSLeaf(bin, dir string) (hub, leaf *NATS, err error) {
	err = onFreePort(func(port int) error { // where the hub takes leaves
		if hub, err = startIn(bin, dir, "hub", fmt.Sprintf("leafnodes { listen: \"127.0.0.1:%d\" }", port)); err != nil {
			return err
		}
		if err = untilPrinted(hub.Process(), "Listening for leafnode connections"); err != nil {
			return err
		}
		leaf, err = startIn(bin, dir, "leaf", fmt.Sprintf("leafnodes { remotes: [{ url: \"nats-leaf://127.0.0.1:%d\" }] }", port))
		if err == nil {
			err = untilPrinted(leaf.Process(), "Leafnode connection created")
		}
		if err != nil {
			hub.Stop()
		}
		return err
	})
	return hub, leaf, err
}

// startIn runs a server whose JetStream is in a domain.
func startIn(bin, dir, domain string, extra ...string) (*NATS, error) {
	sub := filepath.Join(dir, domain)
	if err := os.MkdirAll(sub, 0o755); err != nil {
		return nil, err
	}
	n := &NATS{bin: bin, dir: sub, domain: domain}
	return n, n.start(extra)
}
