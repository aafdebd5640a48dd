package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const secondSelf = "DWS_DEV_SECOND_SELF"

// inForeground runs this program once more, as the terminal's foreground group, if there is a terminal, and returns its
// status. ^C goes to that group alone then: make, which would turn any ^C of its own into "Error 130", sees a program
// that ended well. It says false where there is no terminal, or this is the second self already.
func inForeground() (code int, ok bool) {
	if os.Getenv(secondSelf) != "" {
		// ^Z would stop this group and leave make waiting, so that the shell never came back.
		signal.Ignore(syscall.SIGTSTP)
		return 0, false
	}
	tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0)
	if err != nil {
		return 0, false
	}
	defer tty.Close()
	group := syscall.Getpgrp()
	if now, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP); err != nil || now != group {
		return 0, false // in the background
	}
	signal.Ignore(syscall.SIGTTOU) // else taking the terminal back would stop us
	defer unix.IoctlSetPointerInt(int(tty.Fd()), unix.TIOCSPGRP, group)
	return runSecondSelf(int(tty.Fd())), true
}

// runSecondSelf hands on what this process gets: whoever signals its group means the demo.
func runSecondSelf(tty int) int {
	exe, err := os.Executable()
	if err != nil {
		fail(err)
	}
	cmd := exec.Command(exe, os.Args[1:]...)
	cmd.Env = append(os.Environ(), secondSelf+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Foreground: true, Ctty: tty, Pdeathsig: syscall.SIGTERM}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	if err := cmd.Start(); err != nil {
		fail(err)
	}
	go func() {
		for s := range signals {
			cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fail(err)
	}
	if code := cmd.ProcessState.ExitCode(); code >= 0 {
		return code
	}
	return 1 // a signal ended it
}

const makePID = "DWS_DEV_MAKE_PID" // set by the Makefile

// watchMake ends the demo when make was interrupted alone, or is gone. GNU make answers an interrupt by waiting for its
// recipe, with the signal blocked; that it waits shows in /proc only.
func watchMake(ctx context.Context, stop func()) {
	pid := os.Getenv(makePID)
	if pid == "" {
		return
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err != nil || interruptBlocked(string(status)) {
			stop()
			return
		}
	}
}

func interruptBlocked(status string) bool {
	for line := range strings.Lines(status) {
		var mask uint64
		if n, _ := fmt.Sscanf(line, "SigBlk: %x", &mask); n == 1 {
			return mask&(1<<(syscall.SIGINT-1)) != 0
		}
	}
	return false
}
