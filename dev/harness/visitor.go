package harness

import (
	"fmt"
	"testing"
)

// Visitor is a person before a page: it looks, points, taps and types. Its methods fail the test themselves.
type Visitor struct {
	t       testing.TB
	b       *Browser
	session string
}

// Visit opens an address in a window of that size. The page must leave its console without an error until the test ends.
func (b *Browser) Visit(t testing.TB, address string, width, height int) *Visitor {
	t.Helper()
	_, session, err := b.newPage(Within(t, Patience))
	if err != nil {
		t.Fatalf("open a page in chromium: %v", err)
	}
	v := &Visitor{t, b, session}
	for _, enable := range []string{"Runtime.enable", "Log.enable"} {
		v.do(enable, nil)
	}
	v.Resize(width, height)
	v.do("Page.navigate", map[string]any{"url": address})
	t.Cleanup(func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		for _, e := range b.errors[session] {
			t.Errorf("the console of %s shows an error: %s", address, e)
		}
	})
	return v
}

func (v *Visitor) do(method string, params any) {
	v.t.Helper()
	if err := v.b.ask(Within(v.t, Patience), v.session, method, params, nil); err != nil {
		v.t.Fatal(err)
	}
}

// Resize gives the window another size.
func (v *Visitor) Resize(width, height int) {
	v.t.Helper()
	v.do("Emulation.setDeviceMetricsOverride", map[string]any{"width": width, "height": height, "screenWidth": width, "screenHeight": height, "deviceScaleFactor": 1, "mobile": width < 500})
}

// Look decodes the value of a JavaScript expression.
func (v *Visitor) Look(expression string, result any) {
	v.t.Helper()
	if err := v.b.evaluate(Within(v.t, Patience), v.session, expression, result); err != nil {
		v.t.Fatalf("%s: %v", expression, err)
	}
}

// Run runs JavaScript.
func (v *Visitor) Run(script string) {
	v.t.Helper()
	v.Look(script, nil)
}

// Text is the value of a JavaScript expression that is a string.
func (v *Visitor) Text(expression string) (s string) {
	v.t.Helper()
	v.Look(expression, &s)
	return s
}

// Wait waits until a JavaScript expression is true; while it throws it is not.
func (v *Visitor) Wait(expression string) {
	v.t.Helper()
	Eventually(v.t, Patience, expression, func() (yes bool) {
		return v.b.evaluate(Within(v.t, Patience), v.session, expression, &yes) == nil && yes
	})
}

// Mouse moves the mouse (mouseMoved), or presses and releases its left button (mousePressed, mouseReleased).
func (v *Visitor) Mouse(event string, x, y int) {
	v.t.Helper()
	button := "left"
	if event == "mouseMoved" {
		button = "none"
	}
	v.do("Input.dispatchMouseEvent", map[string]any{"type": event, "x": x, "y": y, "button": button, "clickCount": 1})
}

// Finger touches the page (touchStart), or leaves it (touchEnd).
func (v *Visitor) Finger(event string, x, y int) {
	v.t.Helper()
	points := []map[string]int{}
	if event == "touchStart" {
		points = append(points, map[string]int{"x": x, "y": y})
	}
	v.do("Input.dispatchTouchEvent", map[string]any{"type": event, "touchPoints": points})
}

// Press presses a key, by its name: Tab, Enter.
func (v *Visitor) Press(key string) {
	v.t.Helper()
	codes := map[string]int{"Tab": 9, "Enter": 13}
	text := map[string]string{"Enter": "\r"}[key]
	v.do("Input.dispatchKeyEvent", map[string]any{"type": "keyDown", "key": key, "code": key, "windowsVirtualKeyCode": codes[key], "text": text})
	v.do("Input.dispatchKeyEvent", map[string]any{"type": "keyUp", "key": key, "code": key, "windowsVirtualKeyCode": codes[key]})
}

// Type replaces what stands in the field that a CSS selector names.
func (v *Visitor) Type(selector, text string) {
	v.t.Helper()
	v.Run(fmt.Sprintf("document.querySelector(%q).select()", selector))
	v.do("Input.insertText", map[string]any{"text": text})
}
