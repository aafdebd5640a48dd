package rig

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
)

// alarms are what no child may ever print: the race detector's headline and the runtime's last words.
var alarms = [][]byte{[]byte("DATA RACE"), []byte("panic:"), []byte("fatal error:")}

// Log is what a child has printed: in a file, for people, and in memory, for those who wait for a line.
type Log struct {
	Path string

	mu      sync.Mutex
	file    *os.File
	text    []byte
	lines   int           // length of text up to its last line feed
	alarmed string        // first line with an alarm
	changed chan struct{} // closed and replaced at each write; closed for good with the log
	closed  bool
}

func openLog(path string) (*Log, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open log: %w", err)
	}
	return &Log{Path: path, file: f, changed: make(chan struct{})}, nil
}

// Write takes the child's output. Only the goroutine that copies it calls this.
func (l *Log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text = append(l.text, p...)
	if end := bytes.LastIndexByte(l.text, '\n') + 1; end > l.lines {
		l.noteAlarmLocked(l.text[l.lines:end])
		l.lines = end
	}
	close(l.changed)
	l.changed = make(chan struct{})
	return l.file.Write(p)
}

func (l *Log) noteAlarmLocked(fresh []byte) {
	if l.alarmed != "" {
		return
	}
	for line := range bytes.Lines(fresh) {
		for _, a := range alarms {
			if bytes.Contains(line, a) {
				l.alarmed = strings.TrimSpace(string(line))
				return
			}
		}
	}
}

func (l *Log) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	l.noteAlarmLocked(l.text[l.lines:]) // a last line without its line feed
	l.lines = len(l.text)
	l.file.Close()
	close(l.changed)
}

func (l *Log) alarm() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.alarmed
}

// Text is everything printed so far.
func (l *Log) Text() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.text)
}

// Find waits for the first line, from the log's beginning, that is wanted, and returns it. It fails when ctx ends, or
// the log does because its process has.
func (l *Log) Find(ctx context.Context, want func(line string) bool) (string, error) {
	seen := 0
	for {
		l.mu.Lock()
		fresh, changed, closed := string(l.text[seen:l.lines]), l.changed, l.closed
		l.mu.Unlock()
		seen += len(fresh)
		for line := range strings.Lines(fresh) {
			if line = strings.TrimSpace(line); want(line) {
				return line, nil
			}
		}
		if closed {
			return "", fmt.Errorf("process ended; its log is %s:\n%s", l.Path, l.tail())
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", fmt.Errorf("line not seen in %s: %w\n%s", l.Path, ctx.Err(), l.tail())
		}
	}
}

func (l *Log) tail() string {
	text := l.Text()
	return text[max(0, len(text)-2000):]
}
