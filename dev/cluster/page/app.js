"use strict";
// The demo page: what comes over the socket (client.js), and which pods brought it.

const $ = (id) => document.getElementById(id);
const now = () => performance.timeOrigin + performance.now();

const chatList = $("chats");
const chats = new Map();    // chat id -> row, li, button, messages by sequence
const unpulled = new Map(); // sequence -> elements that will say which pod pulled the event
const latencies = [];       // of the last 200 events
const near = { n: 0 }, far = { n: 0 }; // events pulled by the pod that serves this page, and by the others
let selected = "";
let user = "";              // of this page's socket
let serving = "";           // pod of this page's socket
let podsShown = "";
let came = 0, twice = 0;
let readySeq = 0;           // events up to here waited for this socket: their latency says nothing

async function loadChats() {
  const rows = await (await fetch("chats")).json();
  for (const row of rows) applyChat(row.chat_id, row.name, row.text, row.unread, row.seq, Date.parse(row.at));
  sortChats();
}

// applyChat changes a row only by a newer event: no order is promised between events.
function applyChat(id, name, text, unread, seq, at) {
  let row = chats.get(id);
  if (row && seq < row.seq) return;
  if (!row) {
    const li = document.createElement("li"), button = document.createElement("button");
    for (const part of ["name", "unread", "text", "by"]) {
      const span = document.createElement("span");
      span.className = part;
      button.append(span);
    }
    button.dataset.chat = id;
    li.append(button);
    chatList.append(li);
    row = { li, button, messages: new Map() };
    chats.set(id, row);
  }
  Object.assign(row, { id, name, text, unread, seq, at });
  const [nameSpan, unreadSpan, textSpan] = row.button.children;
  nameSpan.textContent = name;
  unreadSpan.textContent = unread ? unread + " new" : "";
  textSpan.textContent = text || "no message yet";
}

let hovered = false; // by a pointer; :hover would stay after a finger's tap
chatList.onpointerenter = () => { hovered = true; };
chatList.onpointerleave = () => { hovered = false; };

async function loadMessages(chat) {
  for (const { seq, text, out } of await (await fetch("messages?chat=" + encodeURIComponent(chat.id))).json()) {
    if (chat.messages.has(seq)) continue;
    const small = document.createElement("small");
    small.append(`loaded · ${seq}`);
    showMessage(chat, seq, text, out, small);
  }
  show(chat);
}

// sortChats puts the latest chat first; the rows slide to their new places. While a pointer or the keyboard is in the list,
// it keeps its order.
function sortChats() {
  if (hovered || chatList.querySelector(":focus-visible")) return;
  const before = new Map([...chats.values()].map((r) => [r, r.li.offsetTop]));
  chatList.append(...[...chats.values()].sort((a, b) => b.at - a.at).map((r) => r.li));
  for (const [row, top] of before) {
    const by = top - row.li.offsetTop;
    if (by === 0) continue;
    row.li.style.transition = "none";
    row.li.style.transform = `translateY(${by}px)`;
    requestAnimationFrame(() => { row.li.style.transition = ""; row.li.style.transform = ""; });
  }
}

// A click opens the chat that was pressed: a row may still slide when the pointer comes, and the release hit another one.
let pressed = "";
const chatAt = (e) => e.target.closest("button")?.dataset.chat;
chatList.onpointerdown = (e) => { pressed = chatAt(e); };
chatList.onclick = (e) => {
  const id = e.detail === 0 ? chatAt(e) : pressed; // 0: by the keyboard
  if (id) select(id);
};

function select(id) {
  selected = id;
  const row = chats.get(id);
  $("messages").replaceChildren(...sortedBySeq(row.messages));
  $("messages").scrollTop = $("messages").scrollHeight;
  $("messages").parentElement.scrollIntoView({ block: "nearest" }); // on a phone it is below the list
  for (const r of chats.values()) r.button.ariaCurrent = r === row ? "true" : null;
  $("title").textContent = row.name + " · " + id;
  client.select(id);
}

const sortedBySeq = (messages) => [...messages].sort(([a], [b]) => a - b).map(([, li]) => li);

function onEvent(m, known) {
  if (known) {
    if (!m.replay) $("twice").textContent = ++twice;
    return;
  }
  const at = Date.parse(m.payload.event_time); // NaN without one: whoever publishes by hand may leave anything out
  const latency = m.replay || m.seq <= readySeq || isNaN(at) ? null : now() - at;
  count(latency);
  const row = m.payload.row_data ?? {}, by = [document.createElement("b")];
  const id = m.payload.chat_id ?? row.chat_id, chat = chats.get(id);
  if (m.event_type === "chat" && id) {
    applyChat(id, row.push_name ?? id, row.last_message?.text, row.unread_count, m.seq, at || now());
    sortChats();
    by.push(chats.get(id).button.children[3]);
  } else if (m.event_type === "message" && chat) {
    const small = document.createElement("small");
    small.append(m.replay ? "replayed" : latency === null ? "no latency" : latency.toFixed(1) + " ms", ` · ${m.seq} · pulled by `, by[0]);
    showMessage(chat, m.seq, row.message_obj?.conversation ?? row.text, row.flow === "OUT", small);
    show(chat);
  }
  unpulled.set(m.seq, by);
  if (unpulled.size > 300) unpulled.delete(unpulled.keys().next().value);
}

function showMessage(chat, seq, text, out, small) {
  const li = document.createElement("li");
  li.className = out ? "out" : "";
  li.append(text, small);
  chat.messages.set(seq, li);
  if (chat.messages.size > 200) chat.messages.delete(Math.min(...chat.messages.keys()));
}

// show brings the messages of the open chat up to date.
function show(chat) {
  if (chat.id !== selected) return;
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.replaceChildren(...sortedBySeq(chat.messages));
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function count(latency) {
  $("count").textContent = ++came;
  $("seq").textContent = client.position ?? "-";
  if (latency === null) return;
  latencies.push(latency);
  if (latencies.length > 200) latencies.shift();
  const sorted = latencies.toSorted((a, b) => a - b);
  $("p50").textContent = sorted[Math.floor(sorted.length * 0.5)].toFixed(1) + " ms";
  $("p99").textContent = sorted[Math.floor(sorted.length * 0.99)].toFixed(1) + " ms";
}

const client = new Client({
  async access() {
    const { refused, key, token, expires_at } = await (await post("token", { user })).json();
    if (refused) {
      disconnect(refused); // the next answer would be no better
      throw new Error(refused);
    }
    return { url: `ws://${location.host}/ws/acme/desk1?x-api-key=${encodeURIComponent(key)}`, token, expires_at };
  },
  ready(m) {
    const { seq, session_id, resumed, gap } = m.payload;
    readySeq = seq;
    $("session").textContent = session_id;
    $("resumed").textContent = gap ? "a gap" : resumed;
    notice("");
  },
  event: onEvent,
  gap() { notice("Some events were missed and are on their way."); },
  async load(what) {
    if (what === "all") {
      for (const row of chats.values()) row.seq = 0; // of another stream, maybe
      await loadChats();
    }
    if (selected) await loadMessages(chats.get(selected));
  },
  error(p) { notice(p.message); },
  state(cls, text, code) {
    state(cls, inWords(cls, code));
    if (cls !== "on") setServing("");
    if (code === 4402) notice("Another tab took this session. Reconnect takes it back.");
  },
});

// inWords says what a visitor wants to know of a state of the client.
function inWords(cls, code) {
  if (cls === "on") return "Connected";
  if (cls === "off") return code === 4402 ? "Open in another tab" : "Access refused";
  if (code === undefined) return "Connecting …";
  if (code === 0) return "The demo does not answer, trying again …";
  return code === 1001 ? "Moving to another pod …" : "Connection lost, trying again …";
}

function connect() {
  user = $("user").value;
  client.connect();
}

function disconnect(why) {
  client.disconnect();
  state("off", why);
  setServing("");
}

async function post(path, body) {
  const resp = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!resp.ok) throw new Error(await resp.text());
  return resp;
}

function setServing(pod) {
  serving = pod;
  $("serving").textContent = pod || "-";
}

// watchPods shows the pods, and which of them pulled the events that came: that is known when they have been acked.
async function watchPods() {
  try {
    // Asked until it is known: pods learn of each other with the renewals of their leases.
    if (!serving && client.open()) setServing((await (await fetch("serving?session=" + $("session").textContent)).json()).pod);
    const { pods, pulled } = await (await fetch("pods")).json();
    const shown = JSON.stringify([pods, serving]);
    if (shown !== podsShown) $("pods").replaceChildren(...pods.map(podRow)); // a button that is replaced takes no click
    podsShown = shown;
    for (const [seq, notes] of unpulled) {
      if (!pulled[seq]) continue;
      for (const note of notes) note.textContent = pulled[seq];
      unpulled.delete(seq);
      (pulled[seq] === serving ? near : far).n++;
    }
    $("near").textContent = near.n;
    $("far").textContent = far.n;
  } catch { /* the demo has ended, or is busy */ }
  setTimeout(watchPods, 500);
}

function podRow(pod) {
  const span = document.createElement("span");
  span.className = "pod " + pod.state + (pod.name === serving ? " serving" : "");
  span.append(`${pod.name} ${pod.state} `);
  for (const [text, kill] of [["SIGTERM", false], ["kill -9", true]]) {
    const button = document.createElement("button");
    button.textContent = text;
    button.ariaLabel = `${text} to ${pod.name}`;
    button.disabled = pod.state !== "ready";
    button.onclick = () => post("end", { pod: pod.name, kill }).catch((err) => notice(err.message));
    span.append(button);
  }
  return span;
}

function state(cls, text) {
  $("state").className = cls;
  $("state").textContent = text;
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

$("who").onsubmit = (e) => { e.preventDefault(); connect(); };
$("disconnect").onclick = () => disconnect("Not connected");
$("tab").onclick = () => window.open(location.href);
loadChats().then(connect);
watchPods();
