package rig

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// StartNATSCluster runs n servers that are one JetStream cluster, each with its data under dir. It returns when they
// listen; the first request that JetStream answers comes some seconds later, when they have elected a leader.
func StartNATSCluster(bin, dir string, n int) ([]*NATS, error) {
	var nodes []*NATS
	// Each names the ports of all, so all are chosen before the first server starts.
	err := onFreePort(func(first int) error {
		ports := []int{first}
		for len(ports) < n {
			port, err := freePort()
			if err != nil {
				return err
			}
			ports = append(ports, port)
		}
		var err error
		nodes, err = startNATSNodes(bin, dir, ports)
		return err
	})
	return nodes, err
}

// startNATSNodes runs a server for each route port, or none.
func startNATSNodes(bin, dir string, ports []int) (nodes []*NATS, err error) {
	var routes []string
	for _, port := range ports {
		routes = append(routes, fmt.Sprintf("nats://127.0.0.1:%d", port))
	}
	for i, port := range ports {
		sub := filepath.Join(dir, fmt.Sprintf("node%d", i))
		if err = os.MkdirAll(sub, 0o755); err != nil {
			break
		}
		var node *NATS
		node, err = StartNATS(bin, sub, fmt.Sprintf("cluster { name: dws, listen: \"127.0.0.1:%d\", routes: [%s] }", port, strings.Join(routes, ", ")))
		if err != nil {
			break
		}
		nodes = append(nodes, node)
		// It says that it is ready before it has bound this port, which somebody may have taken by now.
		if err = untilPrinted(node.Process(), "Listening for route connections"); err != nil {
			break
		}
	}
	if err == nil {
		return nodes, nil
	}
	for _, node := range nodes {
		node.Stop()
	}
	return nil, err
}
