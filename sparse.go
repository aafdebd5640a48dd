package main

import (
	"sync"
	"time"
)

// sparse keeps a log line that others can cause as often as they like, a stranger or a faulty publisher, to one a second.
type sparse struct {
	mu         sync.Mutex // guards all below
	last       time.Time  // when a line was written
	suppressed int        // lines since then that were not
}

// turn says whether a line may be written now, and how many were suppressed before it. Any goroutine may call.
func (s *sparse) turn(now time.Time) (suppressed int, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if now.Sub(s.last) < time.Second {
		s.suppressed++
		return 0, false
	}
	suppressed, s.suppressed, s.last = s.suppressed, 0, now
	return suppressed, true
}
