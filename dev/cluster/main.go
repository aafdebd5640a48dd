// Command cluster is the demo behind make dev: three pods of the service, behind one address, on a NATS and a Redis of
// their own; a publisher of realistic events; and a page that shows them arrive, and which pod brought them. Everything
// listens on 127.0.0.1 and lives in one temporary folder; an interrupt ends it with status 0 and leaves nothing behind.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	dir := flag.String("dir", "", "folder to work in; it is removed at the end (default: a new temporary one)")
	listen := flag.String("listen", "127.0.0.1:0", "address of the page")
	rate := flag.Float64("rate", 4, "published events per second")
	flag.Parse()
	if *dir == "" {
		var err error
		if *dir, err = os.MkdirTemp("", "dws-dev-"); err != nil {
			fail(err)
		}
	}
	if code, ok := inForeground(); ok {
		os.RemoveAll(*dir)
		os.Exit(code)
	}
	ctx, stop := untilInterrupted()
	defer stop()
	err := run(ctx, *dir, *listen, *rate)
	os.RemoveAll(*dir)
	if err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "dev:", err)
	os.Exit(1)
}

// untilInterrupted is a context that the first signal ends; a second one then ends the program, and the kernel its children.
func untilInterrupted() (context.Context, context.CancelFunc) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	context.AfterFunc(ctx, stop)
	// A reader of our output that is gone must not kill us before we have cleaned up (SIGPIPE). Not ignored, but received
	// by nobody: what is ignored would be so in the children too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE)
	go watchMake(ctx, stop)
	return ctx, stop
}
