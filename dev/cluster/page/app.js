"use strict";
// The demo page: one socket, spoken to as docs/protocol.md tells clients to.

const $ = (id) => document.getElementById(id);
const now = () => performance.timeOrigin + performance.now();

const chats = new Map();   // chat id -> row, li
const seen = new Set();    // sequences of this session: an event may come twice
const latencies = [];      // of the last 200 events
let socket = null;         // the one that counts; events of older ones are ignored
let attempt = 0;           // of reconnecting, since the last ready
let retryTimer = 0;
let selected = "";
let twice = 0;
let readySeq = 0;          // events up to here waited for this socket: their latency says nothing

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
    const li = document.createElement("li");
    for (const part of ["name", "unread", "text"]) {
      const span = document.createElement("span");
      span.className = part;
      li.append(span);
    }
    li.onclick = () => select(id);
    row = { li };
    chats.set(id, row);
  }
  Object.assign(row, { id, name, text, unread, seq, at });
  const [nameSpan, unreadSpan, textSpan] = row.li.children;
  nameSpan.textContent = name;
  unreadSpan.textContent = unread || "";
  textSpan.textContent = text || "no message yet";
}

// sortChats puts the latest chat first; the rows slide to their new places.
function sortChats() {
  const before = new Map([...chats.values()].map((r) => [r, r.li.offsetTop]));
  $("chats").append(...[...chats.values()].sort((a, b) => b.at - a.at).map((r) => r.li));
  for (const [row, top] of before) {
    const by = top - row.li.offsetTop;
    if (by === 0) continue;
    row.li.style.transition = "none";
    row.li.style.transform = `translateY(${by}px)`;
    requestAnimationFrame(() => { row.li.style.transition = ""; row.li.style.transform = ""; });
  }
}

function select(id) {
  selected = id;
  $("messages").replaceChildren();
  for (const row of chats.values()) row.li.classList.toggle("selected", row.id === id);
  $("title").textContent = chats.get(id).name + " · " + id;
  send({ type: "select_chat", payload: { chat_id: id } });
}

function onEvent(m) {
  if (seen.has(m.seq)) {
    $("twice").textContent = ++twice;
    return;
  }
  seen.add(m.seq);
  const latency = now() - Date.parse(m.payload.event_time);
  count(m.seq, m.replay || m.seq <= readySeq ? null : latency);
  const row = m.payload.row_data;
  if (m.event_type === "chat") {
    applyChat(m.payload.chat_id, row.push_name, row.last_message.text, row.unread_count, m.seq, Date.parse(m.payload.event_time));
    sortChats();
  } else if (m.event_type === "message" && m.payload.chat_id === selected) {
    showMessage(row.message_obj.conversation, row.flow === "OUT", `${latency.toFixed(1)} ms · ${m.seq}`);
  }
}

function showMessage(text, out, small) {
  const li = document.createElement("li");
  li.className = out ? "out" : "";
  li.textContent = text;
  const note = document.createElement("small");
  note.textContent = small;
  li.append(note);
  const list = $("messages");
  const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 40;
  list.append(li);
  if (list.children.length > 200) list.firstChild.remove();
  if (atEnd) list.scrollTop = list.scrollHeight;
}

function count(seq, latency) {
  $("count").textContent = seen.size;
  $("seq").textContent = seq;
  if (latency === null) return;
  latencies.push(latency);
  if (latencies.length > 200) latencies.shift();
  const sorted = latencies.toSorted((a, b) => a - b);
  $("p50").textContent = sorted[Math.floor(sorted.length * 0.5)].toFixed(1) + " ms";
  $("p99").textContent = sorted[Math.floor(sorted.length * 0.99)].toFixed(1) + " ms";
}

async function connect() {
  clearTimeout(retryTimer);
  leave();
  state("busy", "connecting");
  let minted;
  try {
    const resp = await fetch("token", {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ user: $("user").value }),
    });
    if (!resp.ok) throw new Error(await resp.text());
    minted = await resp.json();
  } catch (err) {
    return retry("no token: " + err.message);
  }
  // errors=close: a page cannot read the HTTP status of a refused upgrade, but it can read a close code.
  const query = new URLSearchParams({ "x-api-key": minted.key, token: minted.token, errors: "close" });
  const s = socket = new WebSocket(`${minted.socket}/ws/acme/desk1?${query}`, "json.v1");
  s.onmessage = (e) => { if (s === socket) onMessage(JSON.parse(e.data)); };
  s.onclose = (e) => { if (s === socket) onClose(e.code, e.reason); };
}

// leave closes the socket without a new one in mind.
function leave() {
  const s = socket;
  socket = null;
  if (s) s.close(1000);
}

function send(m) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(m));
}

function onMessage(m) {
  switch (m.type) {
    case "ready":
      attempt = 0;
      readySeq = m.payload.seq;
      state("on", "connected");
      notice("");
      $("session").textContent = m.payload.session_id;
      loadChats(); // what changed while there was no socket
      if (selected) send({ type: "select_chat", payload: { chat_id: selected } });
      break;
    case "event":
      onEvent(m);
      break;
    case "gap":
      notice(`gap after ${m.payload.since} (${m.payload.reason}): the chats are loaded again`);
      loadChats();
      break;
    case "error":
      notice(`${m.payload.code}: ${m.payload.message}`);
      break;
  }
}

// Not as you are: a bad request, key, token or a session that another took. The rest is worth another try.
const final = new Set([1000, 4400, 4401, 4402, 4403]);

function onClose(code, reason) {
  socket = null;
  const why = `${code} ${reason}`.trim();
  if (!final.has(code)) return retry(why, Number(/retry-after-ms=(\d+)/.exec(reason)?.[1] ?? NaN));
  state("off", "closed: " + why);
  notice(code === 4402 ? "Another tab took this session. Reconnect takes it back." : "");
}

// retry waits as long as the service asked for, or a random part of a doubling time: all clients of a pod that ended come at once else.
function retry(why, asked) {
  const wait = asked >= 0 ? asked : Math.random() * Math.min(30000, 500 * 2 ** attempt);
  attempt++;
  state("busy", `${why}: again in ${(wait / 1000).toFixed(1)} s`);
  retryTimer = setTimeout(connect, wait);
}

function state(cls, text) {
  $("state").className = cls;
  $("state").textContent = text;
}

function notice(text) {
  $("notice").hidden = !text;
  $("notice").textContent = text;
}

$("connect").onclick = connect;
$("disconnect").onclick = () => { clearTimeout(retryTimer); leave(); state("off", "not connected"); };
$("tab").onclick = () => window.open(location.href);
loadChats().then(connect);
