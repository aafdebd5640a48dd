package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// pages are the texts that these tests hold against the code.
func pages(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("docs/*.md")
	if err != nil || len(files) == 0 {
		t.Fatalf("no pages under docs: %v", err)
	}
	all := map[string]string{}
	for _, f := range append(files, "README.md") {
		all[f] = readPage(t, f)
	}
	return all
}

func readPage(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// wantBlock fails unless page holds block as it is; the message can be pasted.
func wantBlock(t *testing.T, name, page, block string) {
	t.Helper()
	if !strings.Contains(page, block) {
		t.Errorf("%s is not what the code says; it should hold:\n%s", name, block)
	}
}

// TestDocsSettings: the settings' table has each setting, in the order of the code, with its default and meaning.
func TestDocsSettings(t *testing.T) {
	page := readPage(t, "docs/operations.md")
	table := "| setting | default | meaning |\n| --- | --- | --- |\n"
	var secret, live []string
	for _, s := range settingTable {
		def := " "
		if s.def != "" {
			def = " " + s.def + " "
		}
		table += fmt.Sprintf("| %s |%s| %s |\n", s.name, def, s.tag.Get("help"))
		short := "`" + strings.TrimPrefix(s.name, settingPrefix) + "`"
		if s.secret() {
			secret = append(secret, short)
		}
		if s.live() {
			live = append(live, short)
		}
	}
	wantBlock(t, "the table of settings", page, table+"\n")
	wantBlock(t, "the list of secrets", page, "from `<NAME>_FILE`: "+strings.Join(secret, ", ")+".\n")
	wantBlock(t, "the list of live settings", page, "Changed by SIGHUP: "+strings.Join(live, ", ")+".\n")
}

// TestDocsSettingNames: no page names a setting that does not exist.
func TestDocsSettingNames(t *testing.T) {
	name := regexp.MustCompile(`DAISI_WS_[A-Z0-9_]*[A-Z0-9]`)
	for file, page := range pages(t) {
		for _, n := range name.FindAllString(page, -1) {
			if settingOf(n) == nil && !madeByKubernetes(n+"_") {
				t.Errorf("%s names %s, which is no setting", file, n)
			}
		}
	}
}

// TestDocsMetrics: operations.md describes every metric, and no page names one that does not exist.
func TestDocsMetrics(t *testing.T) {
	names := map[string]bool{}
	page := readPage(t, "docs/operations.md")
	for _, n := range newMetrics().names() {
		names[n] = true
		if !strings.Contains(page, "| `"+n+"` |") {
			t.Errorf("docs/operations.md does not describe %s", n)
		}
	}
	for file, page := range pages(t) {
		for _, n := range regexp.MustCompile(`\bdws_[a-z0-9_]+`).FindAllString(page, -1) {
			if !names[n] {
				t.Errorf("%s names %s, which is no metric", file, n)
			}
		}
	}
}

// TestDocsTokenVector: the token that docs/tokens.md gives to authors of other back ends is one that we open.
func TestDocsTokenVector(t *testing.T) {
	page := readPage(t, "docs/tokens.md")
	field := func(name string) string {
		m := regexp.MustCompile(`(?m)^` + name + ` +(\S+)$`).FindStringSubmatch(page)
		if m == nil {
			t.Fatalf("docs/tokens.md has no test vector's %s", name)
		}
		return m[1]
	}
	ring, err := newKeyring(field("key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{field("token"), strings.TrimRight(field("token"), "=")} {
		if plain, _ := ring.open(token); string(plain) != field("plaintext") {
			t.Errorf("%s opens to %q, want %q", token, plain, field("plaintext"))
		}
	}
	cl, apiErr := parseUser([]byte(field("plaintext")))
	if apiErr != nil || cl.sessionKey() != "acme:7:user%3A17" {
		t.Fatalf("the plaintext gives %+v, %v", cl, apiErr)
	}
}

// TestDocsJSON: what stands as JSON in a page is JSON.
func TestDocsJSON(t *testing.T) {
	blocks := regexp.MustCompile("(?s)```json\n(.*?)```")
	for file, page := range pages(t) {
		for _, b := range blocks.FindAllStringSubmatch(page, -1) {
			if !json.Valid([]byte(b[1])) {
				t.Errorf("%s: not JSON: %s", file, b[1])
			}
		}
	}
}

// TestDocsLinks: relative links, and the pages and chapters that comments in the code cite, exist.
func TestDocsLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#:]+)(?:#[^)]*)?\)`)
	for file, page := range pages(t) {
		for _, l := range link.FindAllStringSubmatch(page, -1) {
			if _, err := os.Stat(filepath.Join(filepath.Dir(file), l[1])); err != nil {
				t.Errorf("%s links to %s: %v", file, l[1], err)
			}
		}
	}
	sources, _ := filepath.Glob("*.go")
	cited := regexp.MustCompile(`(docs/[a-z]+\.md)(?:, "([^"]+)")?`)
	for _, src := range sources {
		if src == "docs_test.go" {
			continue
		}
		for _, c := range cited.FindAllStringSubmatch(readPage(t, src), -1) {
			page, err := os.ReadFile(c[1])
			if err != nil {
				t.Errorf("%s cites %s: %v", src, c[1], err)
			}
			if c[2] != "" && !regexp.MustCompile(`(?m)^#+ `+regexp.QuoteMeta(c[2])+`$`).Match(page) {
				t.Errorf("%s cites %s, which has no chapter %q", src, c[1], c[2])
			}
		}
	}
}

// TestDocsAudit: the README's table for auditors names every file of the program.
func TestDocsAudit(t *testing.T) {
	page := readPage(t, "README.md")
	sources, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	for _, src := range sources {
		if !strings.HasSuffix(src, "_test.go") && !strings.Contains(page, "| `"+src+"` | ") {
			t.Errorf("README.md, \"Auditing this code\": no row for %s", src)
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z]+\\.go)` \\|").FindAllStringSubmatch(page, -1) {
		if _, err := os.Stat(row[1]); err != nil {
			t.Errorf("README.md, \"Auditing this code\": %v", err)
		}
	}
}

// TestDocsTests: the end-to-end tests that docs/guarantees.md names for its promises exist.
func TestDocsTests(t *testing.T) {
	tests := ""
	files, err := filepath.Glob("dev/*/*_test.go")
	if err != nil || len(files) == 0 {
		t.Fatalf("no tests under dev: %v", err)
	}
	for _, f := range files {
		tests += readPage(t, f)
	}
	for _, n := range regexp.MustCompile("`(Test\\w+)`").FindAllStringSubmatch(readPage(t, "docs/guarantees.md"), -1) {
		if !strings.Contains(tests, "\nfunc "+n[1]+"(") {
			t.Errorf("docs/guarantees.md names %s, which is no test", n[1])
		}
	}
}
