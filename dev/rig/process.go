package rig

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Process is a child process with its log. It leads a process group of its own, so that a terminal's ^C reaches
// only the program that started it, and the kernel kills it when that program dies, however it dies.
type Process struct {
	Name string
	Log  *Log

	cmd      *exec.Cmd
	wanted   atomic.Bool   // somebody asked it to end
	done     chan struct{} // closed by the goroutine that reaps it
	exitCode int           // valid once done is closed; -1 = ended by a signal
}

// startOn hands the start of children to one thread that lives as long as this program: Linux sends the
// parent-death signal when the *thread* that forked ends (prctl(2)), not only when the process does.
var startOn = sync.OnceValue(func() chan<- func() {
	c := make(chan func()) // never closed
	go func() {
		runtime.LockOSThread()
		for f := range c {
			f()
		}
	}()
	return c
})

// Start runs a program with exactly this environment; its output goes to the file logPath, which is appended to.
func Start(name, logPath string, env []string, bin string, args ...string) (*Process, error) {
	log, err := openLog(logPath)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, args...)
	cmd.Env = env
	cmd.Stdout, cmd.Stderr = log, log // the same writer: exec serialises both
	return start(name, log, cmd)
}

// Converse is Start for a program that is spoken to: in leads to its standard input, its standard output comes from out,
// and only what it complains of goes to the log. Whoever reads out closes it, and so ends a program that still writes.
func Converse(name, logPath string, env []string, bin string, args ...string) (p *Process, in io.WriteCloser, out io.ReadCloser, err error) {
	log, err := openLog(logPath)
	if err != nil {
		return nil, nil, nil, err
	}
	theirIn, in, inErr := os.Pipe()
	out, theirOut, outErr := os.Pipe()
	if err = errors.Join(inErr, outErr); err != nil { // there are no file descriptors left
		log.close()
		return nil, nil, nil, err
	}
	cmd := exec.Command(bin, args...)
	cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = env, theirIn, theirOut, log
	p, err = start(name, log, cmd)
	theirIn.Close()
	theirOut.Close()
	if err != nil {
		in.Close()
		out.Close()
	}
	return p, in, out, err
}

func start(name string, log *Log, cmd *exec.Cmd) (*Process, error) {
	p := &Process{Name: name, Log: log, cmd: cmd, done: make(chan struct{})}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = time.Second // a child of its own in another group may live on with its output
	started := make(chan error)
	startOn() <- func() { started <- cmd.Start() }
	if err := <-started; err != nil {
		log.close()
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go p.reap()
	return p, nil
}

// SignalGroup signals the process with all its children.
func (p *Process) SignalGroup(sig syscall.Signal) error {
	if sig == syscall.SIGKILL {
		p.wanted.Store(true)
	}
	if err := syscall.Kill(-p.PID(), sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("signal the group of %s with %s: %w", p.Name, sig, err)
	}
	return nil
}

func (p *Process) reap() {
	p.cmd.Wait() // its error says no more than the state does
	p.exitCode = p.cmd.ProcessState.ExitCode()
	p.Log.close()
	close(p.done)
}

// PID is the process' id, for a look at /proc.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Resident and PeakResident are the memory of the process in KiB, now and at its highest (proc(5), VmRSS and VmHWM).
func (p *Process) Resident() int     { return p.status("VmRSS:") }
func (p *Process) PeakResident() int { return p.status("VmHWM:") }

func (p *Process) status(field string) int {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
	for line := range strings.Lines(string(status)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			n, _ := strconv.Atoi(strings.Fields(rest)[0])
			return n
		}
	}
	return 0
}

// Stopped says whether every thread of the process stands still after SIGSTOP: the signal takes a moment to reach all.
func (p *Process) Stopped() bool {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.PID()))
	if err != nil || len(stats) == 0 {
		return false
	}
	for _, name := range stats {
		stat, err := os.ReadFile(name)
		// The state is the first field behind the name of the program, which stands in brackets (proc(5)).
		if i := bytes.LastIndexByte(stat, ')'); err != nil || i < 0 || !bytes.HasPrefix(stat[i:], []byte(") T")) {
			return false
		}
	}
	return true
}

// Done is closed when the process has ended and its log is complete.
func (p *Process) Done() <-chan struct{} { return p.done }

// Signal sends a signal to the process alone. One that usually ends a process makes its end expected.
func (p *Process) Signal(sig syscall.Signal) error {
	switch sig {
	case syscall.SIGKILL, syscall.SIGTERM, syscall.SIGINT, syscall.SIGQUIT:
		p.wanted.Store(true)
	}
	if err := p.cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("signal %s with %s: %w", p.Name, sig, err)
	}
	return nil
}

// Kill ends the process by SIGKILL and returns when it is gone.
func (p *Process) Kill() {
	p.Signal(syscall.SIGKILL)
	<-p.done
}

// Stop asks the process to end by SIGTERM, and kills it if it has not within the time.
func (p *Process) Stop(within time.Duration) {
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(within):
		p.Kill()
	}
}

// Wait returns the exit status, -1 for a process that a signal ended. Its end is expected from now on.
func (p *Process) Wait(ctx context.Context) (int, error) {
	p.wanted.Store(true)
	select {
	case <-p.done:
		return p.exitCode, nil
	case <-ctx.Done():
		return 0, fmt.Errorf("%s (pid %d) still runs: %w", p.Name, p.PID(), ctx.Err())
	}
}

// Fault says what is wrong with how the process behaved, or "": it ended without being asked to, it panicked,
// or its race detector spoke.
func (p *Process) Fault() string {
	if line := p.Log.alarm(); line != "" {
		return fmt.Sprintf("%s printed %q", p.Name, line)
	}
	select {
	case <-p.done:
		if !p.wanted.Load() {
			return fmt.Sprintf("%s ended by itself with status %d", p.Name, p.exitCode)
		}
	default:
	}
	return ""
}
