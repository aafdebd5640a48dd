package rig

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"strings"
	"time"
)

// Service is one running daisi-ws-service: a pod.
type Service struct {
	*Process
	HTTP string // host:port, known after WaitListening
	GRPC string
	TLS  *tls.Config // how clients reach it by HTTPS and wss; nil = without TLS
	Host *Host       // of the Network that it is on; nil = none

	client *http.Client // set with TLS or Host, at its first use
}

// Base is what the URLs of its HTTP endpoints begin with.
func (s *Service) Base() string {
	if s.TLS != nil {
		return "https://" + s.HTTP
	}
	return "http://" + s.HTTP
}

// Client reaches it by HTTP. For one goroutine at a time.
func (s *Service) Client() *http.Client {
	if s.TLS == nil && s.Host == nil {
		return http.DefaultClient
	}
	if s.client == nil {
		t := &http.Transport{TLSClientConfig: s.TLS, DisableKeepAlives: true}
		if s.Host != nil {
			t.DialContext = s.Host.Dial
		}
		s.client = &http.Client{Transport: t}
	}
	return s.client
}

// StartService runs the service. Each setting is NAME=VALUE without the prefix DAISI_WS_; names that begin with GO
// (GOMAXPROCS, GOGC, GODEBUG) are handed on as they are. Nothing else of this program's environment but PATH, HOME and
// TZ reaches the service. A later setting of a name wins.
func StartService(bin, name, logPath string, settings []string, args ...string) (*Service, error) {
	p, err := Start(name, logPath, ServiceEnv(settings), bin, args...)
	if err != nil {
		return nil, err
	}
	return &Service{Process: p}, nil
}

// ServiceEnv is the environment that StartService makes of settings, for the other commands of the program.
func ServiceEnv(settings []string) []string {
	var env []string
	for _, name := range []string{"PATH", "HOME", "TZ", "TMPDIR"} {
		if v, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+v)
		}
	}
	for _, s := range settings {
		if !strings.HasPrefix(s, "GO") {
			s = "DAISI_WS_" + s
		}
		env = append(env, s)
	}
	return env
}

// WaitListening reads the addresses from the log line "listening".
func (s *Service) WaitListening(ctx context.Context) error {
	var line struct{ Msg, HTTP, GRPC string }
	_, err := s.Log.Find(ctx, func(text string) bool {
		line.Msg = ""
		return json.Unmarshal([]byte(text), &line) == nil && line.Msg == "listening"
	})
	if err != nil {
		return fmt.Errorf("wait for the line listening of %s: %w", s.Name, err)
	}
	s.HTTP, s.GRPC = line.HTTP, line.GRPC
	return nil
}

// WaitReady asks /ready until it says 200.
func (s *Service) WaitReady(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := s.Ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.Done():
			return fmt.Errorf("wait for /ready of %s: it ended:\n%s", s.Name, s.Log.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for /ready of %s: %w\n%s", s.Name, err, s.Log.tail())
		}
	}
}

// Ready asks /ready once; any answer but 200 is an error.
func (s *Service) Ready(ctx context.Context) error {
	req, err := http.NewRequestWithContext(ctx, "GET", s.Base()+"/ready", nil)
	if err != nil {
		return err
	}
	resp, err := s.Client().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET /ready: %s", resp.Status)
	}
	return nil
}
