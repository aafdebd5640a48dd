package main

import (
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// rooms says which files may import what the standard library does not have: whoever audits one of these modules has
// only these files to read. Tests may use what the file that they test may.
var rooms = map[string][]string{
	"github.com/nats-io/nats.go":         {"consumer.go", "durable.go", "replay.go", "router.go", "stream.go", "verdict.go"},
	"github.com/redis/go-redis/v9":       {"auth.go", "lease.go", "main.go", "owner.go", "redis.go", "renewal.go", "session.go"},
	"google.golang.org/grpc":             {"link.go", "peer.go", "pool.go", "trust.go"},
	"golang.org/x/net/websocket":         {"inbound.go", "upgrade.go"},
	"golang.org/x/net/idna":              {"origin.go"},
	"github.com/VictoriaMetrics/metrics": {"hub.go", "metrics.go", "peer.go", "pool.go"},
	"daisi-ws-service/proto":             {"link.go", "peer.go", "pool.go", "renewal.go", "roster.go", "session.go", "trust.go"},
}

// requirements are the modules that go.mod may require directly, each with what it is there for. A new one is a decision,
// not a side effect: it is audited with everything that it requires.
var requirements = map[string]string{
	"github.com/nats-io/nats.go":         "the client of NATS and its jetstream package",
	"github.com/redis/go-redis/v9":       "Redis single, cluster and sentinel behind one client",
	"google.golang.org/grpc":             "streams between pods, with health service and mTLS",
	"google.golang.org/protobuf":         "the messages generated from proto/peer.proto",
	"golang.org/x/net":                   "its websocket package: handshake and frame reading; its idna for names of origins",
	"github.com/VictoriaMetrics/metrics": "counters and Prometheus histograms without a dependency tree",
}

func TestDependenciesStayInTheirRooms(t *testing.T) {
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	used := map[string]bool{}
	for _, file := range files {
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ImportsOnly)
		if err != nil {
			t.Fatal(err)
		}
		for _, spec := range parsed.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			first, _, _ := strings.Cut(path, "/")
			if !strings.Contains(first, ".") && first != "daisi-ws-service" {
				continue
			}
			module, allowed := roomsOf(path)
			used[module] = true
			if file == "world_test.go" { // stands in for NATS and Redis
				continue
			}
			if !slices.Contains(allowed, strings.TrimSuffix(strings.TrimSuffix(file, ".go"), "_test")+".go") {
				t.Errorf("%s imports %s, which is for %v", file, path, allowed)
			}
		}
	}
	for module := range rooms {
		if !used[module] {
			t.Errorf("nothing imports %s any more", module)
		}
	}
}

// roomsOf finds the entry of rooms that covers an imported package.
func roomsOf(path string) (module string, allowed []string) {
	for module, allowed = range rooms {
		if path == module || strings.HasPrefix(path, module+"/") {
			return module, allowed
		}
	}
	return path, nil
}

func TestDirectRequirements(t *testing.T) {
	text, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	var direct []string
	for line := range strings.Lines(string(text)) {
		fields := strings.Fields(strings.TrimPrefix(line, "require "))
		if len(fields) >= 2 && strings.HasPrefix(fields[1], "v") && !strings.Contains(line, "// indirect") {
			direct = append(direct, fields[0])
		}
		if strings.HasPrefix(line, "replace") {
			t.Errorf("go.mod replaces a module: %s", line)
		}
	}
	slices.Sort(direct)
	if want := slices.Sorted(maps.Keys(requirements)); !slices.Equal(direct, want) {
		t.Errorf("go.mod requires %v, the list says %v", direct, want)
	}
}
