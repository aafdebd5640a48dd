// Command mutants asks whether make chaos can fail: each patch in this folder switches one safeguard of the service off, in
// a copy of the tree, and chaos must see what it cost, within five seeds. A patch's lines before its diff say what is switched
// off, and with which flags chaos looks for it:
//
//	chaos: -faults cut -clients 30
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"daisi-ws-service/dev/rig"
)

// options are the command's flags.
type options struct {
	check, control bool
	seeds          int
}

func main() {
	var o options
	flag.BoolVar(&o.check, "check", false, "only see that each patch applies and compiles")
	flag.BoolVar(&o.control, "control", false, "leave the service as it is: chaos, with the flags of each patch, must be content")
	flag.IntVar(&o.seeds, "seeds", 5, "how many seeds of chaos a mutant may survive")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "mutants [flags] [name of a patch ...]")
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, flag.Args(), o); err != nil {
		fmt.Fprintln(os.Stderr, "mutants:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, only []string, o options) error {
	root, err := rig.Root()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "dws-mutants-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	chaos := filepath.Join(dir, "chaos")
	if err := command(ctx, filepath.Join(root, "dev"), "go", "build", "-buildvcs=false", "-o", chaos, "./chaos"); err != nil {
		return err
	}
	all, err := patches(root)
	if err != nil {
		return err
	}
	var wrong []string
	for _, m := range all {
		if len(only) > 0 && !slices.Contains(only, m.name) {
			continue
		}
		tree := filepath.Join(dir, m.name)
		if err := m.plant(ctx, root, tree, o.control); err != nil {
			return err
		}
		if o.check {
			fmt.Println(m.name, "applies and compiles")
			continue
		}
		caught, err := m.hunt(ctx, chaos, tree, o.seeds)
		if err != nil {
			return err
		}
		if caught == o.control {
			wrong = append(wrong, m.name)
		}
	}
	if len(wrong) > 0 {
		return fmt.Errorf("chaos was wrong about %v", wrong)
	}
	return nil
}

// mutant is one patch.
type mutant struct {
	name, file string
	flags      []string // of chaos
}

var flagsLine = regexp.MustCompile(`(?m)^chaos: (.*)$`)

func patches(root string) (all []mutant, err error) {
	files, err := filepath.Glob(filepath.Join(root, "dev", "mutants", "*.patch"))
	if err != nil || len(files) == 0 {
		return nil, fmt.Errorf("no patches in dev/mutants: %v", err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, err
		}
		flags := flagsLine.FindSubmatch(text)
		if flags == nil {
			return nil, fmt.Errorf("%s has no line that begins with %q", f, "chaos:")
		}
		all = append(all, mutant{strings.TrimSuffix(filepath.Base(f), ".patch"), f, strings.Fields(string(flags[1]))})
	}
	return all, nil
}

// plant copies the tree as it is here, changed or not, applies the patch to it, and compiles it.
func (m mutant) plant(ctx context.Context, root, tree string, control bool) error {
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	copies := `git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - 2>/dev/null | tar xf - -C "$0"`
	if err := command(ctx, root, "sh", "-c", copies, tree); err != nil {
		return err
	}
	if !control {
		if err := command(ctx, tree, "git", "apply", m.file); err != nil {
			return err
		}
	}
	return command(ctx, tree, "go", "build", "-buildvcs=false", "-o", os.DevNull, ".")
}

// hunt runs chaos until it finds fault with the service, and says whether it did.
func (m mutant) hunt(ctx context.Context, chaos, tree string, seeds int) (caught bool, err error) {
	for seed := 1; seed <= seeds; seed++ {
		cmd := exec.CommandContext(ctx, chaos, append([]string{"-seed", strconv.Itoa(seed)}, m.flags...)...)
		cmd.Dir = filepath.Join(tree, "dev")
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		out, err := cmd.CombinedOutput()
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		var bad []string
		for line := range strings.Lines(string(out)) {
			if what, ok := strings.CutPrefix(line, "BAD: "); ok {
				bad = append(bad, strings.TrimSpace(what))
			}
			if logs, ok := strings.CutPrefix(line, "FAILED: "); ok {
				_, dir, _ := strings.Cut(strings.TrimSpace(logs), "logs in ")
				os.RemoveAll(dir)
			}
		}
		switch {
		case len(bad) > 0:
			fmt.Printf("%s: caught by seed %d: %s\n", m.name, seed, strings.Join(bad, " | "))
			return true, nil
		case err != nil:
			return false, fmt.Errorf("%s, seed %d: %w\n%s", m.name, seed, err, out)
		}
	}
	fmt.Printf("%s: not caught by %d seeds of chaos %s\n", m.name, seeds, strings.Join(m.flags, " "))
	return false, nil
}

func command(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v in %s: %w\n%s", name, args, dir, err, out)
	}
	return nil
}
