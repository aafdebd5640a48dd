package main

import (
	"errors"
	"fmt"
	"io"
	"reflect"
	"regexp"
	"strings"
)

// migrateCommand translates an environment file of the earlier service, read from standard input, into a settings file.
func migrateCommand(in *invocation) int {
	if code, done := in.parseAll(); done {
		return code
	}
	old, err := io.ReadAll(in.stdin)
	if err != nil {
		return in.fail(fmt.Errorf("read standard input: %w", err))
	}
	conf, notes, whole := migrate(string(old))
	fmt.Fprint(in.stdout, conf)
	for _, note := range notes {
		fmt.Fprintln(in.stderr, note)
	}
	fmt.Fprintln(in.stderr, "choose before the start, see docs/migrating.md: the prefix of subjects, the name of the consumer, origins, switches for old clients")
	if !whole {
		return in.fail(errors.New("the settings are not whole: complete them by hand"))
	}
	return 0
}

// migrate returns conf, with a line for each line of old, and notes of what became of those that set something. whole says
// that conf can be used: the required keys are there, and each address, name and key of old. No note holds a secret.
func migrate(old string) (conf string, notes []string, whole bool) {
	var lines []*oldLine
	for text := range strings.Lines(strings.TrimPrefix(old, "\ufeff")) { // which some editors put before a text
		lines = append(lines, readOldLine(strings.TrimSpace(text)))
	}
	taken := onePerSetting(lines)
	leaveOutContradictions(taken)
	whole = true
	for i, l := range lines {
		if l.comment != "" || l.name == "" {
			conf += l.comment + "\n"
		}
		if l.name == "" {
			continue
		}
		note := l.name + " is now " + l.to.name
		if l.problem == "" {
			conf += l.to.name + "=" + l.to.value + "\n"
		} else {
			note = l.name + " is left out: " + l.problem
			conf += "# " + note + "\n"
			if l.setting != nil && l.setting.essential() {
				whole = false
				note += "; set " + l.setting.name + " by hand"
			}
		}
		notes = append(notes, fmt.Sprintf("line %d: %s", i+1, note))
	}
	for i := range settingTable {
		s := &settingTable[i]
		if l := taken[s]; s.tag.Get("required") != "" && (l == nil || l.to.value == "") {
			whole = false
			notes = append(notes, fmt.Sprintf("no line sets %s, which is required", s.name))
		}
	}
	return conf, notes, whole
}

// essential says whether nothing can stand in for a value of s: for an address, a name or a key. A number or a choice has a
// default that can.
func (s *setting) essential() bool {
	return s.in(new(Config)).Kind() == reflect.String && s.tag.Get("oneof") == ""
}

// oldLine is one line of an environment file of the earlier service.
type oldLine struct {
	comment string   // to be kept
	name    string   // empty: the line sets nothing
	to      entry    // what stands for it here
	setting *setting // whose value to is; nil: nobody's
	problem string   // why the line is left out; empty: it is not
}

// oldForm is NAME=VALUE as shells and docker compose read it: the value in quotes or not, a comment behind it or not.
var oldForm = regexp.MustCompile(`^(?:export\s+)?(\w+)\s*=\s*(?:"([^"]*)"|'([^']*)'|(.*?))(?:\s+(#.*))?$`)

// renamed are the settings whose names differ by more than the prefix and _SECONDS.
var renamed = map[string]string{"GRPC_POOL_IDLE_TIMEOUT": "PEER_IDLE_TIMEOUT"}

// readOldLine splits and translates a line. The earlier service's names are those of today, with or without DAISI_WS_; its
// durations are numbers under names that end in _SECONDS.
func readOldLine(text string) *oldLine {
	if text == "" || text[0] == '#' {
		return &oldLine{comment: text}
	}
	part := oldForm.FindStringSubmatch(text)
	if part == nil {
		return &oldLine{name: "the line", problem: "it is not of the form NAME=VALUE"} // its text may hold a secret
	}
	l := &oldLine{comment: part[5], name: part[1]}
	name, seconds := strings.CutSuffix(strings.TrimPrefix(l.name, settingPrefix), "_SECONDS")
	if now := renamed[name]; now != "" {
		name = now
	}
	l.to = entry{name: settingPrefix + name, value: part[2] + part[3] + part[4]}
	if name == "WEBSOCKET_ALLOWED_ORIGINS" { // which hold for any scheme now
		l.to.value = strings.NewReplacer("https://", "", "http://", "").Replace(l.to.value)
	}
	if seconds && l.to.value != "" {
		l.to.value += "s"
	}
	if l.setting = settingOf(l.to.name); l.setting == nil {
		l.problem = "this service has no such setting"
		return l
	}
	if _, l.problem = parseLine("", l.to.name+"="+l.to.value); l.problem == "" {
		if err := l.applyTo(new(Config)); err != nil {
			l.problem = err.Error()
		}
	}
	return l
}

// applyTo gives the setting in c the line's value. That of a file, and the empty one for the default, change nothing.
func (l *oldLine) applyTo(c *Config) error {
	if l.to.name != l.setting.name || l.to.value == "" {
		return nil
	}
	return l.setting.set(l.setting.in(c), l.to.value)
}

// onePerSetting leaves all lines but one for each setting out, and returns those that stay. The later line wins, but a name
// without prefix over one with it: the earlier service read the former.
func onePerSetting(lines []*oldLine) map[*setting]*oldLine {
	taken := map[*setting]*oldLine{}
	for _, prefixed := range []bool{true, false} {
		for _, l := range lines {
			if l.setting == nil || l.problem != "" || strings.HasPrefix(l.name, settingPrefix) != prefixed {
				continue
			}
			if other := taken[l.setting]; other != nil {
				other.setting, other.problem = nil, "it is set again as "+l.name+", and that counts"
			}
			taken[l.setting] = l
		}
	}
	return taken
}

// leaveOutContradictions takes the lines that break a relation between settings out of taken. The defaults break none, so
// this ends.
func leaveOutContradictions(taken map[*setting]*oldLine) {
	for {
		l := &loader{cfg: load("", nil).cfg}
		for _, line := range taken {
			line.applyTo(l.cfg) // without an error: each was tried
		}
		l.checkRelations(l.cfg)
		if len(l.faults) == 0 {
			return
		}
		for s, line := range taken {
			for _, f := range l.faults {
				if strings.Contains(f.text, s.name) {
					line.problem = f.text
					delete(taken, s)
				}
			}
		}
	}
}
