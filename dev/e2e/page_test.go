package e2e

import (
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"daisi-ws-service/dev/harness"
)

// pageUser is a person before the demo's page.
type pageUser struct {
	*harness.Visitor
	t *testing.T
}

// TestDemoPage uses the demo's page in a browser, in a desk's width and a phone's, while the chat list never rests.
func TestDemoPage(t *testing.T) {
	t.Parallel()
	browser := harness.StartBrowser(t)
	d := startAlone(t, "-rate", "40")
	page := d.line(t, `http://127\.0\.0\.1:\d+/`)
	v := pageUser{browser.Visit(t, page, 1280, 800), t}
	v.wantState("Connected")
	// What the page says, asks for, and has under the pointer that presses.
	v.Run(`
		window.states = [];
		new MutationObserver(() => states.push(document.querySelector("#state").textContent)).observe(document.querySelector("#state"), { childList: true });
		window.asked = { token: 0, pods: 0 };
		const fetched = fetch;
		window.fetch = (path, ...rest) => { asked[path]++; return fetched(path, ...rest); };
		addEventListener("pointerdown", (e) => { window.hit = e.target.closest("#chats li")?.querySelector(".name").textContent; }, true);`)

	v.Wait(`getComputedStyle(document.querySelector("#chats button")).backgroundColor.startsWith("rgb(")`) // opaque: rows slide over each other
	for n := range 25 {
		v.wantClickOpens(100, 180+n%7*70, n%2 == 0)
	}
	v.wantKeyboardOpens()
	v.wantPublished(d.line(t, `nats -s .*`))
	v.wantPlainWords(page)
	v.wantUserRefused()

	v.Resize(360, 640)
	v.wantNoOverflow()
	for range 10 {
		v.wantTapOpens()
	}
	v.wantNoOverflow()
	v.wantUserRefused()

	other := pageUser{browser.Visit(t, page, 360, 640), t}
	other.wantState("Connected")
	v.Type("#user", "ann") // as the other
	v.Press("Enter")
	other.wantState("Open in another tab")
}

func (v pageUser) wantState(text string) {
	v.t.Helper()
	v.Wait(fmt.Sprintf(`document.querySelector("#state").textContent.startsWith(%q)`, text))
}

const (
	chatOrder  = `[...document.querySelectorAll("#chats .name")].map((e) => e.textContent).join()`
	eventsCame = `document.querySelector("#count").textContent`
	chatOpened = `document.querySelector("#title").textContent.split(" · ")[0]`
)

// moreEvents waits until some more have come: enough to change the order of a list that is not held.
func (v pageUser) moreEvents() {
	v.t.Helper()
	v.Wait(eventsCame + " - 6 > " + v.Text(eventsCame))
}

// wantClickOpens comes from elsewhere and opens what is at a place. patient: after having looked at it for a while.
func (v pageUser) wantClickOpens(x, y int, patient bool) {
	v.t.Helper()
	order := v.Text(chatOrder)
	v.Mouse("mouseMoved", 800, 300)
	v.Wait(fmt.Sprintf("%s !== %q", chatOrder, order)) // else this test proves nothing
	v.Mouse("mouseMoved", x, y)
	if patient {
		v.Wait(`document.querySelector("#chats").getAnimations({ subtree: true }).length === 0`)
		seen := v.Text(fmt.Sprintf(`document.elementFromPoint(%d, %d).closest("#chats li").querySelector(".name").textContent`, x, y))
		v.moreEvents()
		defer func() {
			if got := v.Text(chatOpened); got != seen {
				v.t.Errorf("a click on %s opened %s", seen, got)
			}
		}()
	}
	v.Mouse("mousePressed", x, y)
	v.moreEvents()
	v.Mouse("mouseReleased", x, y)
	v.wantPressedOpened()
}

// wantPressedOpened: between rows that slide there may be nothing to press.
func (v pageUser) wantPressedOpened() {
	v.t.Helper()
	v.Wait(chatOpened + " === (hit ?? " + chatOpened + ")")
}

func (v pageUser) wantTapOpens() {
	v.t.Helper()
	var y int
	v.Look(`(scrollTo(0, 0), Math.round(document.querySelector("#chats").getBoundingClientRect().top + 100))`, &y)
	v.moreEvents()
	v.Finger("touchStart", 100, y)
	v.Finger("touchEnd", 100, y)
	v.wantPressedOpened()
}

// wantKeyboardOpens opens a chat by keys alone.
func (v pageUser) wantKeyboardOpens() {
	v.t.Helper()
	const focused = `document.activeElement.closest("#chats button")?.querySelector(".name").textContent ?? ""`
	v.Mouse("mouseMoved", 800, 300)
	v.Type("#user", "ann")
	for range 20 {
		if v.Press("Tab"); v.Text(focused) != "" {
			break
		}
	}
	v.Press("Tab")
	order, name := v.Text(chatOrder), v.Text(focused)
	v.Wait(`getComputedStyle(document.activeElement).outlineStyle === "solid"`)
	v.moreEvents()
	if got := v.Text(chatOrder); got != order {
		v.t.Errorf("the keyboard is in the list, and its order goes from %s to %s", order, got)
	}
	v.Press("Enter")
	v.Wait(fmt.Sprintf("%s === %q", chatOpened, name))
	if n := v.Text(`"" + [...document.querySelectorAll("button, input")].filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length)).length`); n != "0" {
		v.t.Errorf("%s buttons and fields have no label", n)
	}
}

// wantPublished publishes what the demo's line does, and what leaves out all that can be left out.
func (v pageUser) wantPublished(line string) {
	v.t.Helper()
	m := regexp.MustCompile(`^nats -s (\S+) pub -J (\S+) '(.*)'$`).FindStringSubmatch(line)
	if m == nil {
		v.t.Fatalf("not a line that publishes: %s", line)
	}
	nc, err := nats.Connect(m[1])
	if err != nil {
		v.t.Fatal(err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		v.t.Fatal(err)
	}
	for _, payload := range []string{`{}`, `{"row_data":{"chat_id":"bare"}}`, m[3]} {
		if _, err := js.Publish(v.t.Context(), m[2], []byte(payload)); err != nil {
			v.t.Fatal(err)
		}
	}
	const texts = `[...document.querySelectorAll("#chats button")].map((e) => e.textContent)`
	v.Wait(texts + `.some((s) => s.startsWith("You1 newHello from the terminal"))`)
	v.Wait(texts + `.some((s) => s.startsWith("bareno message yet"))`)
}

// wantPlainWords ends the pod that serves the page: it says what happens without numbers and codes.
func (v pageUser) wantPlainWords(page string) {
	v.t.Helper()
	v.Wait(`document.querySelector("#serving").textContent !== "-"`)
	resp, err := http.Post(page+"end", "application/json", strings.NewReader(fmt.Sprintf(`{"pod":%q,"kill":true}`, v.Text(`document.querySelector("#serving").textContent`))))
	if err != nil {
		v.t.Fatal(err)
	}
	resp.Body.Close()
	v.Wait(`states.includes("Connection lost, trying again …") && states.at(-1) === "Connected"`)
	if said := v.Text(`states.join()`); !regexp.MustCompile(`^[A-Za-z ,…]+$`).MatchString(said) {
		v.t.Errorf("the page says %s", said)
	}
}

// wantUserRefused gives a name that nobody may have, and then a good one.
func (v pageUser) wantUserRefused() {
	v.t.Helper()
	v.Type("#user", strings.Repeat("é", 300))
	v.Press("Enter")
	v.wantState("Choose another user name")
	v.Wait(`((state, header) => state.left >= header.left && state.right <= header.right && state.bottom <= header.bottom)
		(document.querySelector("#state").getBoundingClientRect(), document.querySelector("header").getBoundingClientRect())`)
	v.Wait(`document.querySelector("#state").textContent.length < 100`)
	v.wantNoOverflow()
	v.Run(`window.before = { ...asked }`)
	v.Wait(`asked.pods > before.pods + 4`) // 2 s: longer than the first back-off of any client
	v.Wait(`asked.token === before.token`)
	v.Type("#user", "bob")
	v.Press("Enter")
	v.wantState("Connected")
}

// wantNoOverflow: nothing is wider than the window.
func (v pageUser) wantNoOverflow() {
	v.t.Helper()
	v.Wait(`document.documentElement.scrollWidth <= screen.width && innerWidth === screen.width`)
}
