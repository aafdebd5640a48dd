package main

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	coder "github.com/coder/websocket"
	gorilla "github.com/gorilla/websocket"
	"github.com/lxzan/gws"

	"daisi-ws-service/dev/rig"
)

// libraries are plain servers: handshake and read loop with each library's defaults, as its own documentation shows them.
var libraries = map[string]http.HandlerFunc{
	"coder": func(w http.ResponseWriter, r *http.Request) {
		ws, err := coder.Accept(w, r, nil)
		if err != nil {
			return
		}
		defer ws.CloseNow()
		for {
			if _, _, err := ws.Read(r.Context()); err != nil {
				return
			}
		}
	},
	"gorilla": func(w http.ResponseWriter, r *http.Request) {
		var up gorilla.Upgrader
		ws, err := up.Upgrade(w, r, nil)
		if err != nil {
			return
		}
		defer ws.Close()
		for {
			if _, _, err := ws.ReadMessage(); err != nil {
				return
			}
		}
	},
	"gws": func(w http.ResponseWriter, r *http.Request) {
		ws, err := gws.NewUpgrader(gws.BuiltinEventHandler{}, nil).Upgrade(w, r)
		if err != nil {
			return
		}
		go ws.ReadLoop() // returns with the connection's end
	},
}

// servePlain is this program as a child of its own: it serves one library until it is killed, and prints where.
func servePlain(library string) error {
	handle, ok := libraries[library]
	if !ok {
		return fmt.Errorf("no library %q", library)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println("listening", l.Addr())
	return http.Serve(l, handle)
}

// compare measures the memory of this service, with compression off and on, and of plain servers, one after the other.
func compare(ctx context.Context, p plan) error {
	for _, p.deflate = range []string{"disabled", "no_context_takeover"} {
		fmt.Printf("this service, compression %s: ", p.deflate)
		if err := withBench(ctx, p, memory); err != nil {
			return err
		}
	}
	for _, library := range []string{"coder", "gorilla", "gws"} {
		fmt.Printf("plain %s: ", library)
		if err := memoryOfPlain(ctx, p, library); err != nil {
			return fmt.Errorf("plain %s: %w", library, err)
		}
	}
	return nil
}

func memoryOfPlain(ctx context.Context, p plan, library string) error {
	dir, err := os.MkdirTemp("", "dws-load-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	self, err := os.Executable()
	if err != nil {
		return err
	}
	server, err := rig.Start(library, filepath.Join(dir, "log"), []string{fmt.Sprint("GOMAXPROCS=", p.procs)}, self, "plain", library)
	if err != nil {
		return err
	}
	defer server.Kill()
	wait, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	line, err := server.Log.Find(wait, func(line string) bool { return strings.HasPrefix(line, "listening ") })
	if err != nil {
		return fmt.Errorf("wait until it listens: %w", err)
	}
	address := strings.TrimSpace(strings.TrimPrefix(line, "listening "))
	if _, err := http.Get("http://" + address + "/"); err != nil { // refused: its first request costs more than others
		return err
	}
	return idleMemory(ctx, server, p, func() (*crowd, error) {
		return dialAll(ctx, p.sockets, func(int) (string, http.Header) { return "ws://" + address + "/", nil },
			func(*gorilla.Conn) error { return nil }, func(int, []byte) {})
	})
}
