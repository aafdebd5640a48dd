package main

import (
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"
)

// TestDesign searches for 20 s, and sees that the walks take every step there is: one that can't be taken would prove nothing.
func TestDesign(t *testing.T) {
	all := world{pods: maxPods, clients: maxClients, events: maxEvents, faults: 6}
	walked, err := checkDesign(t.Output(), all, 1_000_000, 1, time.Now().Add(19*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	steps := regexp.MustCompile(`(?:x\.step|x\.rare|fault)\((?:x, )?("[^"]+")`)
	found := 0
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range steps.FindAllSubmatch(text, -1) {
			kind, err := strconv.Unquote(string(match[1]))
			if err != nil {
				t.Fatal(err)
			}
			if found++; walked.kinds[kind] == 0 {
				t.Errorf("no walk took the step %q", kind)
			}
		}
	}
	if found != len(walked.kinds) {
		t.Errorf("the walks took %d kinds of steps, the model has %d", len(walked.kinds), found)
	}
}
