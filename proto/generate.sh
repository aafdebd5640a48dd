#!/bin/sh
# Generates the Go code of peer.proto beside it; with -check it only says, by its exit status, whether that code is
# current. Needs protoc (Debian: protobuf-compiler); the plug-ins are those pinned in the dev module.
set -eu
cd "$(dirname "$0")"
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
mkdir "$tmp/bin" "$tmp/out"
go -C ../dev build -o "$tmp/bin/" google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
protoc --plugin="$tmp/bin/protoc-gen-go" --plugin="$tmp/bin/protoc-gen-go-grpc" \
	--go_out="$tmp/out" --go_opt=paths=source_relative \
	--go-grpc_out="$tmp/out" --go-grpc_opt=paths=source_relative peer.proto
# protoc's own version stands in the comments only: without it the code is the same on every distribution.
sed -i -E '/^\/\/[ \t-]+protoc +v/d' "$tmp"/out/*.go
if [ "${1:-}" = -check ]; then
	for f in peer.pb.go peer_grpc.pb.go; do
		diff -u "$f" "$tmp/out/$f"
	done
else
	cp "$tmp"/out/*.go .
fi
