package main

import (
	"os/exec"
	"testing"

	"daisi-ws-service/dev/rig"
)

// TestPatchesApply finds the patches that a change of the service has left behind. Whether they compile: mutants -check.
func TestPatchesApply(t *testing.T) {
	root, err := rig.Root()
	if err != nil {
		t.Fatal(err)
	}
	all, err := patches(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		cmd := exec.Command("git", "apply", "--check", m.file)
		cmd.Dir = root
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", m.name, err, out)
		}
	}
}
