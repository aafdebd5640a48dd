// Package e2e drives the real binary from outside, with real servers and clients that others wrote.
package e2e

import (
	"os"
	"testing"

	"daisi-ws-service/dev/harness"
)

func TestMain(m *testing.M) {
	if os.Getenv("DWS_TEST_PARENT") == "1" { // TestChildrenDieWithTheirParent's second self needs no servers
		os.Exit(m.Run())
	}
	harness.Main(m)
}
