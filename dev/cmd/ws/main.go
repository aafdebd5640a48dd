// Command ws is a small client of the service: it connects, prints each message as it comes, one a line, and sends what
// it reads from its standard input: "select CHAT", "select" (none), "ping", "resume", or a line of JSON as it is.
// It ends when the socket does (status 1 unless it ended it itself), after -n messages, or by ^C.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "ws:", err)
		os.Exit(1)
	}
}

func run() error {
	count := flag.Int("n", 0, "end after so many messages; 0 = never")
	flag.Usage = func() {
		fmt.Fprintf(flag.CommandLine.Output(), "usage: ws [-n messages] ws://host:port/ws/COMPANY/AGENT?x-api-key=...&token=...\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if flag.NArg() != 1 {
		flag.Usage()
		return errors.New("want one address")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := dial(ctx, flag.Arg(0))
	if err != nil {
		return err
	}
	defer c.CloseNow()
	go send(ctx, c, os.Stdin)
	return receive(ctx, c, *count)
}

// dial connects; a refusal is told with the service's own words.
func dial(ctx context.Context, url string) (*websocket.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, resp, err := websocket.Dial(ctx, url, &websocket.DialOptions{Subprotocols: []string{"json.v1"}})
	if err == nil {
		c.SetReadLimit(-1)
		return c, nil
	}
	if resp == nil || resp.StatusCode == 101 {
		return nil, err
	}
	body, _ := io.ReadAll(resp.Body)
	return nil, fmt.Errorf("refused: %s %s", resp.Status, strings.TrimSpace(string(body)))
}

// receive prints until the socket or ctx ends, or count messages have come.
func receive(ctx context.Context, c *websocket.Conn, count int) error {
	for i := 1; ; i++ {
		_, data, err := c.Read(ctx)
		var closed websocket.CloseError
		switch {
		case ctx.Err() != nil: // ^C; Read has closed the connection
			return nil
		case errors.As(err, &closed):
			return fmt.Errorf("closed: %d %s", closed.Code, closed.Reason)
		case err != nil:
			return err
		}
		fmt.Printf("%s\n", data)
		if i == count {
			c.Close(websocket.StatusNormalClosure, "") // what it answers does not matter any more
			return nil
		}
	}
}

// send sends the lines of in. Its end is not the socket's: a pasted command may have no input at all.
func send(ctx context.Context, c *websocket.Conn, in io.Reader) {
	lines := bufio.NewScanner(in)
	for lines.Scan() {
		m, err := message(strings.TrimSpace(lines.Text()))
		if err != nil {
			fmt.Fprintln(os.Stderr, "ws:", err)
		} else if m != "" && c.Write(ctx, websocket.MessageText, []byte(m)) != nil {
			return // receive says why
		}
	}
}

// message is what a line of input sends.
func message(line string) (string, error) {
	command, arg, _ := strings.Cut(line, " ")
	switch {
	case line == "" || line[0] == '{':
		return line, nil
	case command == "ping":
		return `{"type":"ping"}`, nil
	case command == "select":
		chat, _ := json.Marshal(strings.TrimSpace(arg))
		return `{"type":"select_chat","payload":{"chat_id":` + string(chat) + `}}`, nil
	case command == "resume":
		return `{"type":"resume"}`, nil
	}
	return "", fmt.Errorf("%q is none of: select CHAT, ping, resume, a line of JSON", line)
}
