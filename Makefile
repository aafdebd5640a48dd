# Everything here needs Go, make and git only; no cgo, so no gcc (the race detector's runs are in .ci/run).
SHELL := /bin/sh
VERSION := $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
TESTFLAGS ?=
RUN ?= .
FUZZTIME ?= 20s
SEED ?= 1
SEEDS ?= 1 2 3
DURATION ?= 60s
POLICY ?= drop_oldest
CHAOSFLAGS ?=
MUTANTS ?=
SECONDS ?= 600
MODELFLAGS ?=

.PHONY: build dev test e2e chaos chaos-seeds mutants model model-mutants lint generate check-generated fuzz

build: ## bin/daisi-ws-service: static, the same bytes from the same commit
	CGO_ENABLED=0 go build -buildvcs=false -trimpath -ldflags '-s -w -X main.version=$(VERSION)' -o bin/daisi-ws-service .

dev: ## the service with servers, publisher and a page of its own; ^C ends it
	@echo "# building (the first time takes a few minutes)"
	@dir=$$(mktemp -d) || exit 1; trap 'rm -rf "$$dir"' EXIT; trap 'exit 130' INT TERM; \
	CGO_ENABLED=0 go -C dev build -buildvcs=false -o "$$dir/cluster" ./cluster && \
	export DWS_DEV_MAKE_PID=$$PPID && exec "$$dir/cluster" -dir "$$dir"

test: ## all tests, with servers that they start themselves
	CGO_ENABLED=0 go test -count=1 $(TESTFLAGS) ./...
	CGO_ENABLED=0 go -C dev test -count=1 -timeout 30m $(TESTFLAGS) ./...

e2e: ## one end-to-end test: make e2e RUN=TestX (DWS_RACE=1: the service with the race detector)
	CGO_ENABLED=0 go -C dev test -count=1 -timeout 30m -v $(TESTFLAGS) -run '$(RUN)' ./e2e

# Before Go 1.27 a run may end in a bare "context deadline exceeded" when its time is over (golang/go#75804): no failure,
# unless an input that fails was written.
fuzz: ## every fuzz target for FUZZTIME, one after the other; what fails is left under testdata/fuzz
	@for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9]*\)(.*/\1/p' *_test.go); do \
		echo "$$target"; \
		out=$$(CGO_ENABLED=0 go test -run '^$$' -fuzz "^$$target\$$" -fuzztime '$(FUZZTIME)' -fuzzminimizetime 1s . 2>&1); status=$$?; \
		case "$$status$$out" in \
			0*) ;; \
			*"Failing input"*) status=fail;; \
			*"    context deadline exceeded"*) out="ok	$$target: its time was over, no input fails";; \
			*) status=fail;; \
		esac; \
		printf '%s\n' "$$out"; [ "$$status" != fail ] || exit 1; \
	done

chaos: ## three pods, 500 clients that resume, faults drawn from SEED for DURATION; fails when a promise is broken
	CGO_ENABLED=0 go -C dev run -buildvcs=false ./chaos -seed $(SEED) -duration $(DURATION) -policy $(POLICY) $(CHAOSFLAGS)

chaos-seeds: ## make chaos for each of SEEDS, under both policies
	@for seed in $(SEEDS); do for policy in drop_oldest block; do $(MAKE) chaos SEED=$$seed POLICY=$$policy || exit 1; done; done

mutants: ## eight safeguards of the service, each switched off in a copy: make chaos must notice (MUTANTS=name ...)
	CGO_ENABLED=0 go -C dev run -buildvcs=false ./mutants $(MUTANTS)

model: ## searches the model of the delivery protocol for SECONDS: in every order, then at random (MODELFLAGS="-seed 7")
	CGO_ENABLED=0 go -C dev run -buildvcs=false ./model -seconds $(SECONDS) $(MODELFLAGS)

model-mutants: ## rules of the delivery protocol, each broken in the model: the search must notice
	CGO_ENABLED=0 go -C dev run -buildvcs=false ./model -mutant all -seconds 110

lint: ## gofmt, vet and the pinned staticcheck, in both modules
	@files=$$(gofmt -l .); test -z "$$files" || { echo "gofmt would change: $$files"; exit 1; }
	go vet ./...
	go -C dev vet ./...
	tool=$$(go -C dev tool -n staticcheck) && $$tool ./... && cd dev && $$tool ./...

generate: ## the Go code of proto/peer.proto (needs protoc)
	sh proto/generate.sh

check-generated: ## fails where the generated code is not that of proto/peer.proto
	sh proto/generate.sh -check
