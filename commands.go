package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"time"
)

// version is set by -ldflags "-X main.version=…"; empty: what the Go command noted of the checkout is printed.
var version string

const usage = `daisi-ws-service delivers events from a NATS JetStream stream to browsers over WebSockets.

  daisi-ws-service [-config FILE]                  serve until SIGTERM
  daisi-ws-service -version | -help
  daisi-ws-service check [-config FILE]            validate the settings and print them, secrets masked
  daisi-ws-service keygen                          print fresh keys as lines of a settings file
  daisi-ws-service token -company C -agent A -user U [-ttl 1h] [-config FILE]
  daisi-ws-service admin-token -admin ID [-company C] [-agent A] [-restrict C] [-ttl 1h] [-config FILE]
                                                   mint a token offline, from the settings
  daisi-ws-service healthcheck [-config FILE]      ask the local /ready: exit status 0 or 1
  daisi-ws-service migrate < OLD > FILE            translate the earlier service's environment file into settings

Settings come from the environment and from FILE, whose lines are NAME=VALUE or comments (#); the environment wins.
`

// invocation is what a subcommand works with.
type invocation struct {
	flags          *flag.FlagSet
	args           []string // behind the subcommand's name
	file           *string  // -config
	environ        []string
	stdin          io.Reader
	stdout, stderr io.Writer
}

// command does what args (without the program's name) ask for. serve says that this is to run the service, with the
// settings of file and environ; else everything is done, and code is the exit status: 2 for bad usage.
func command(args, environ []string, stdin io.Reader, stdout, stderr io.Writer) (code int, serve bool, file string) {
	in := &invocation{flags: flag.NewFlagSet("daisi-ws-service", flag.ContinueOnError), args: args,
		environ: environ, stdin: stdin, stdout: stdout, stderr: stderr}
	in.file = in.flags.String("config", "", "")
	showVersion := in.flags.Bool("version", false, "")
	if code, done := in.parse(); done {
		return code, false, ""
	}
	if *showVersion {
		fmt.Fprintf(stdout, "daisi-ws-service %s (%s, %s/%s)\n", buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
		return 0, false, ""
	}
	if in.flags.NArg() == 0 {
		return 0, true, *in.file
	}
	name := in.flags.Arg(0)
	run := map[string]func(*invocation) int{
		"check": checkCommand, "keygen": keygenCommand, "token": tokenCommand,
		"admin-token": adminTokenCommand, "healthcheck": healthcheckCommand, "migrate": migrateCommand,
	}[name]
	if run == nil {
		return in.badUsage("there is no command %q", name), false, ""
	}
	in.args = in.flags.Args()[1:]
	in.flags = flag.NewFlagSet("daisi-ws-service "+name, flag.ContinueOnError)
	in.flags.StringVar(in.file, "config", *in.file, "")
	return run(in), false, ""
}

// parse reads the flags. done says that the command ends here: help was asked for, or the flags are wrong.
func (in *invocation) parse() (code int, done bool) {
	in.flags.SetOutput(io.Discard) // the package would print a bare list of flags with each fault
	switch err := in.flags.Parse(in.args); {
	case err == flag.ErrHelp:
		printHelp(in.stdout)
		return 0, true
	case err != nil:
		return in.badUsage("%v", err), true
	}
	return 0, false
}

// parseAll is parse for a subcommand, which takes no arguments but flags.
func (in *invocation) parseAll() (code int, done bool) {
	if code, done := in.parse(); done {
		return code, true
	}
	if in.flags.NArg() > 0 {
		return in.badUsage("unexpected argument %q", in.flags.Arg(0)), true
	}
	return 0, false
}

// badUsage tells what is wrong with the command line, in one line, and returns the exit status.
func (in *invocation) badUsage(format string, args ...any) int {
	fmt.Fprintf(in.stderr, "%s: %s (-help shows the usage)\n", in.flags.Name(), fmt.Sprintf(format, args...))
	return 2
}

// fail prints err, which may be many lines, and returns the exit status.
func (in *invocation) fail(err error) int {
	fmt.Fprintln(in.stderr, err)
	return 1
}

// buildVersion is what -version and the metric dws_build_info say.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "unknown"
}

// printHelp prints the usage and every setting with its default and meaning.
func printHelp(w io.Writer) {
	fmt.Fprint(w, usage)
	section := ""
	for _, s := range settingTable {
		if now, _, _ := strings.Cut(strings.TrimPrefix(s.name, settingPrefix), "_"); now != section {
			section = now
			fmt.Fprintln(w)
		}
		fmt.Fprintf(w, "  %s%s\n      %s%s\n", s.name, defaultText(&s), s.tag.Get("help"), remarks(&s))
	}
}

func defaultText(s *setting) string {
	if s.def == "" {
		return ""
	}
	return " (" + s.def + ")"
}

// remarks tells what the tags of a setting mean to its user.
func remarks(s *setting) string {
	var all []string
	if s.secret() {
		all = append(all, "or in a file named by "+s.fileName())
	}
	if s.live() {
		all = append(all, "SIGHUP changes it")
	}
	if len(all) == 0 {
		return ""
	}
	return " [" + strings.Join(all, "; ") + "]"
}

// checkCommand prints the settings as lines of a settings file, secrets masked, or the faults.
func checkCommand(in *invocation) int {
	if code, done := in.parseAll(); done {
		return code
	}
	cfg, warnings, err := loadConfig(*in.file, in.environ)
	for _, w := range warnings {
		fmt.Fprintln(in.stderr, "warning: "+w)
	}
	if err != nil {
		return in.fail(err)
	}
	for _, s := range settingTable {
		fmt.Fprintf(in.stdout, "%s=%s\n", s.name, s.masked(cfg))
	}
	return 0
}

// masked is the value of s in c, without what is secret in it.
func (s *setting) masked(c *Config) string {
	value := formatValue(s.in(c))
	switch s.tag.Get("secret") {
	case "":
		return value
	case "url":
		urls := splitList(value)
		for i, u := range urls {
			scheme, rest, ok := strings.Cut(u, "://")
			if !ok {
				scheme, rest = "nats", u
			}
			if at := strings.LastIndexByte(rest, '@'); at >= 0 {
				rest = "********" + rest[at:]
			}
			urls[i] = scheme + "://" + rest
		}
		return strings.Join(urls, ",")
	}
	if value == "" {
		return ""
	}
	return "********"
}

// keygenCommand prints a fresh value for each of the five settings that hold keys.
func keygenCommand(in *invocation) int {
	if code, done := in.parseAll(); done {
		return code
	}
	for _, name := range []string{"SECRET_TOKEN", "TOKEN_AES_KEY", "ADMIN_SECRET_TOKEN", "ADMIN_TOKEN_AES_KEY", "PUBLIC_KEY"} {
		var key [32]byte
		rand.Read(key[:]) // never fails: the program would end instead
		fmt.Fprintf(in.stdout, "%sAUTH_%s=%s\n", settingPrefix, name, hex.EncodeToString(key[:]))
	}
	return 0
}

// tokenCommand mints a user's token.
func tokenCommand(in *invocation) int {
	var t userToken
	in.flags.StringVar(&t.CompanyID, "company", "", "")
	in.flags.StringVar(&t.AgentID, "agent", "", "")
	in.flags.StringVar(&t.UserID, "user", "", "")
	ttl := in.flags.Duration("ttl", time.Hour, "")
	if code, done := in.parseAll(); done {
		return code
	}
	if err := t.badID(); err != nil {
		return in.badUsage("%v", err)
	}
	if problem := checkTTL(*ttl); problem != "" {
		return in.badUsage("%s", problem)
	}
	t.IssuedAt = time.Now().UTC().Truncate(time.Second)
	t.ExpiresAt = t.IssuedAt.Add(*ttl)
	return in.mint("AUTH_TOKEN_AES_KEY", t)
}

// adminTokenCommand mints an admin's token.
func adminTokenCommand(in *invocation) int {
	var t adminToken
	in.flags.StringVar(&t.AdminID, "admin", "", "")
	in.flags.StringVar(&t.SubscribedCompanyID, "company", "", "")
	in.flags.StringVar(&t.SubscribedAgentID, "agent", "", "")
	in.flags.StringVar(&t.CompanyIDRestriction, "restrict", "", "")
	ttl := in.flags.Duration("ttl", time.Hour, "")
	if code, done := in.parseAll(); done {
		return code
	}
	if err := t.badID(); err != nil {
		return in.badUsage("%v", err)
	}
	if _, _, err := t.scope(); err != nil {
		return in.badUsage("-company %s contradicts -restrict %s: the admin would see nothing", t.SubscribedCompanyID, t.CompanyIDRestriction)
	}
	if problem := checkTTL(*ttl); problem != "" {
		return in.badUsage("%s", problem)
	}
	t.IssuedAt = time.Now().UTC().Truncate(time.Second)
	t.ExpiresAt = t.IssuedAt.Add(*ttl)
	return in.mint("AUTH_ADMIN_TOKEN_AES_KEY", t)
}

// checkTTL holds -ttl to the bounds that the token endpoints have.
func checkTTL(ttl time.Duration) (problem string) {
	if ttl < time.Second || ttl > maxTokenTTL {
		return fmt.Sprintf("-ttl must be 1s to %ds", int(maxTokenTTL.Seconds()))
	}
	return ""
}

// mint prints the token alone, for $(…). It asks for no setting but the key: whoever mints need not have the rest.
func (in *invocation) mint(keySetting string, plaintext any) int {
	l := load(*in.file, in.environ)
	s := findSetting(keySetting)
	if err := l.err(s.name); err != nil {
		return in.fail(err)
	}
	token, err := sealToken(s.in(l.cfg).String(), plaintext)
	if err != nil {
		return in.fail(err)
	}
	fmt.Fprintln(in.stdout, token)
	return 0
}

// healthcheckCommand asks /ready of the service on this machine, for containers that have neither shell nor curl.
func healthcheckCommand(in *invocation) int {
	if code, done := in.parseAll(); done {
		return code
	}
	l := load(*in.file, in.environ)
	if err := l.err(settingPrefix+"SERVER_HTTP_PORT", settingPrefix+"SERVER_BIND_ADDRESS"); err != nil {
		return in.fail(err)
	}
	if l.cfg.ServerHTTPPort == 0 {
		return in.fail(errors.New("DAISI_WS_SERVER_HTTP_PORT is 0: which port the service has taken cannot be known"))
	}
	if err := askReady(readyURL(l.cfg)); err != nil {
		return in.fail(err)
	}
	return 0
}

// readyURL is where the service of these settings answers on this machine.
func readyURL(c *Config) string {
	host := c.ServerBindAddress
	if host == "" {
		host = "127.0.0.1"
	}
	// What listens on all interfaces listens on loopback too. A name would need /etc/hosts, which a bare image may lack.
	if ip, err := netip.ParseAddr(host); err == nil && ip.IsUnspecified() {
		host = "127.0.0.1"
		if ip.Is6() {
			host = "::1"
		}
	}
	scheme := "http"
	if c.ServerTLSCertFile != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, strconv.Itoa(c.ServerHTTPPort)) + "/ready"
}

// askReady returns nil if url answers 200. The certificate is not verified: it names the service as clients know it, and
// the way there never leaves this machine. No proxy is asked, for the same reason.
func askReady(url string) error {
	client := http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, DisableKeepAlives: true}}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("healthcheck: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		body, _ := io.ReadAll(io.LimitReader(res.Body, 4096))
		return fmt.Errorf("healthcheck: %s answered %s: %s", url, res.Status, strings.TrimSpace(string(body)))
	}
	return nil
}
