"use strict";
// The reference client of the socket: it does what docs/protocol.md asks of clients. It keeps the highest position that it was given and
// the set of sequences that came since; after a gap it resumes from there; a close code decides what to do next; the selected chat is
// named on each new socket; the token is renewed before it ends. No dependency; a script tag defines Client, require returns it. Node
// needs a global WebSocket: from version 22 on it has one.
//
// Handlers:
//   access()              promise of { url, token, expires_at }, fresh at each call: the socket's URL with the API key, and
//                         what /generate-token answers. Called before each connect and each refresh of the token.
//   load(what, seq)       promise: fetch the state, "all" of it or the selected "chat"; what is fetched is as of seq at least. Called
//                         after a fresh ready, after chat_selected, and where what was missed cannot be replayed; again if it
//                         fails. A further call takes the place of one that has not ended.
//   event(m, known)       an event message; known: it has come before, there is nothing to apply
//   state(what, text, code)  what is "on", "busy" (it tries again by itself), or "off" (it does not: somebody must call connect)
//   ready(m), selected(m), gap(payload), error(payload)   optional

class Client {
  constructor(handlers, { quiet = 25000, least = 500, most = 30000, steady = 60000, renew = 0.75 } = {}) {
    this.on = handlers;
    this.quiet = quiet;      // ms without a message until it pings, and then without an answer until it gives the socket up
    this.least = least;      // ms of back-off at first
    this.most = most;        // and at the most
    this.steady = steady;    // ms after which a socket counts as one that works
    this.renew = renew;      // part of a token's time after which it is replaced
    this.attempt = 0;        // doublings of the back-off
    this.chat = "";          // selected, over all sockets
    this.named = "";         // the chat that the socket was opened with
    this.stream = "";        // what the position is of
    this.position = null;    // everything up to it was had; null = not known
    this.had = new Set();    // sequences above it that came
    this.lacks = "all";      // what is to be loaded: "all", "chat" or ""; until that has ended no position is kept
    this.loads = 0;          // begun so far
    this.socket = null;      // the one that counts; what older ones say is ignored
    this.timers = {};
    this.reset();
  }

  // reset forgets what belongs to one socket.
  reset() {
    for (const t of Object.values(this.timers)) clearTimeout(t);
    this.timers = {};
    this.live = false;       // its ready has come
    this.pending = [];       // types of what was sent and is not answered: answers come in the order of the questions
    this.loading = 0;        // the number of the load that counts: a later one takes its place
    this.given = null;       // the highest position given while something is to be loaded
    this.pinged = 0;         // when a ping was sent that nothing has come after
    this.heard = Date.now();
  }

  // connect opens a socket, in place of the one there is.
  async connect() {
    this.disconnect();
    this.on.state("busy", "connecting");
    const turn = this.socket = { close() {} }; // nobody else connects meanwhile
    this.timers.watch = setTimeout(() => this.watch(), this.quiet / 4);
    let access, s;
    try {
      access = await this.on.access();
      if (turn !== this.socket) return;
      s = this.dial(access);
    } catch (err) {
      if (turn === this.socket) this.closed(0, "no access: " + err.message);
      return;
    }
    this.socket = s;
    this.expires = access.expires_at;
    s.onmessage = (e) => { if (s === this.socket) this.message(JSON.parse(e.data)); };
    s.onclose = (e) => { if (s === this.socket) this.closed(e.code, e.reason); };
    s.onerror = () => {}; // close follows; without a listener Node's would end the program
  }

  dial({ url, token }) {
    const u = new URL(url);
    u.searchParams.set("errors", "close"); // a page cannot read the HTTP status of a refusal, but a close code
    u.searchParams.set("since", this.position ?? "");
    if (this.position !== null) u.searchParams.set("stream", this.stream);
    if (this.chat) u.searchParams.set("chat", this.chat);
    this.named = this.chat;
    this.pending = ["ready"];
    // As a sub-protocol the token is in no URL, and so in nobody's log.
    return new WebSocket(u.href, ["json.v1", "bearer." + token.replace(/=+$/, "")]);
  }

  // disconnect ends the socket for good, or until connect is called.
  disconnect() {
    const s = this.socket;
    this.socket = null;
    this.reset();
    if (s) s.close(1000);
  }

  // select asks for a chat's messages from now on; "" = of no chat.
  select(chat) {
    this.chat = chat;
    this.lacks ||= "chat"; // nothing but the load has what came to it before
    if (this.live) this.ask("select_chat");
  }

  // selecting says whether a confirmation of the chat that is selected now is still to come.
  selecting() { return this.pending.includes("select_chat") || "select_chat" in this.timers; }

  open() { return this.live; }

  ask(type, payload = type === "select_chat" ? { chat_id: this.chat } : undefined) {
    this.pending.push(type);
    this.socket.send(JSON.stringify({ type, payload }));
  }

  message(m) {
    this.heard = Date.now();
    this.pinged = 0;
    if (m.type === "event") return this.event(m);
    if (m.type === "position") return this.know(m.seq);
    if (m.type === "gap") {
      this.ask("resume"); // also while another is under way, which may not cover it
      return this.on.gap?.(m.payload);
    }
    if (!["ready", "chat_selected", "resumed", "token_refreshed", "pong", "error"].includes(m.type)) return; // of a later version
    const question = this.pending.shift();
    if (m.type === "ready") this.ready(m);
    else if (m.type === "chat_selected") this.selected(m);
    else if (m.type === "resumed") this.resumed(m.payload);
    else if (m.type === "token_refreshed") this.refreshAt(m.payload.expires_at);
    else if (m.type === "error") {
      this.on.error?.(m.payload);
      this.refused(question, m.payload.code);
    }
  }

  ready(m) {
    const fresh = this.position === null;
    this.live = true;
    this.timers.steady = setTimeout(() => { this.attempt = 0; }, this.steady);
    this.refreshAt(this.expires);
    if (this.chat !== this.named) this.ask("select_chat"); // selected since the socket was opened
    this.on.state("on", "connected");
    this.on.ready?.(m);
    if (!this.live) return; // the handler has ended this
    this.resumed(m.payload, fresh);
    if (this.lacks === "chat" && !this.selecting()) this.load(m.payload.seq); // the socket before ended in the midst of it
  }

  selected(m) {
    this.on.selected?.(m);
    if (this.selecting()) return; // another chat was selected meanwhile: what comes to it may pass this socket by until then
    this.lacks ||= "chat";
    this.load(m.payload.seq);
  }

  // resumed: what came since the position was replayed, or all is to be loaded.
  resumed(p, fresh = false) {
    if (p.gap || fresh || p.stream !== this.stream) {
      this.stream = p.stream;
      this.position = null;
      this.given = p.position ?? null; // none, if the pod has none of a new stream yet
      this.had.clear();
      this.lacks = "all";
      this.load(p.seq);
    } else {
      this.know(p.position);
    }
  }

  // know takes a position. While something is to be loaded it counts only once that has ended.
  know(position) {
    if (this.lacks) {
      this.given = Math.max(this.given ?? 0, position);
    } else if (this.position === null || position > this.position) {
      this.position = position;
      for (const seq of this.had) if (seq <= position) this.had.delete(seq);
    }
  }

  // load has the page fetch what is lacking, again and again until that succeeds or something else is to be loaded.
  async load(seq) {
    const turn = this.loading = ++this.loads;
    clearTimeout(this.timers.load);
    try {
      if (this.lacks === "all" || this.chat) await this.on.load(this.lacks, seq);
    } catch (err) {
      if (turn !== this.loading) return;
      this.on.error?.({ code: "NotLoaded", message: err.message });
      this.timers.load = setTimeout(() => this.load(seq), 1000 + Math.random() * 2000);
      return;
    }
    if (turn !== this.loading) return;
    this.lacks = this.selecting() ? "chat" : ""; // a chat's messages are loaded after its confirmation
    if (this.given !== null) this.know(this.given);
  }

  // refused: too many messages, or NATS is away: what was asked for is still wanted, but not at once.
  refused(question, code) {
    if (question === "refresh_token") return this.refreshAt(this.expires);
    if (question !== "select_chat" && question !== "resume" || code === "BadRequest" || question in this.timers) return;
    this.timers[question] = setTimeout(() => {
      delete this.timers[question];
      this.ask(question);
    }, 1000 + Math.random() * 2000);
  }

  event(m) {
    const known = this.position !== null && m.seq <= this.position || this.had.has(m.seq);
    if (!known) this.had.add(m.seq);
    this.on.event(m, known);
  }

  // refreshAt has the token replaced well before it ends.
  refreshAt(expires) {
    this.expires = expires;
    const left = Date.parse(expires) - Date.now();
    clearTimeout(this.timers.refresh);
    // What ends sooner, or is no time, is left to the close code; timers take no more than 2^31 ms.
    if (left > 1000) this.timers.refresh = setTimeout(() => this.refresh(), Math.min(left * this.renew, 2 ** 31 - 1));
  }

  async refresh() {
    const s = this.socket;
    try {
      const { token } = await this.on.access();
      if (s === this.socket && this.live) this.ask("refresh_token", { token });
    } catch (err) {
      if (s !== this.socket) return;
      this.on.error?.({ code: "NoAccess", message: err.message });
      this.refreshAt(this.expires);
    }
  }

  // watch finds out that a connection is dead though nobody has closed it: the network went away, or the machine slept.
  watch() {
    const now = Date.now();
    this.timers.watch = setTimeout(() => this.watch(), this.quiet / 4);
    if (this.pinged && now - this.pinged > this.quiet) {
      this.socket.close(); // its own end may take minutes
      return this.closed(1006, "no answer");
    }
    if (this.pinged || now - this.heard < this.quiet) return;
    this.pinged = now;
    if (this.live) this.ask("ping");
  }

  closed(code, reason) {
    this.socket = null;
    this.reset();
    const why = `${code || ""} ${reason}`.trim();
    // Not as you are: a bad request, a key or token, or a session that another took. An expired token is another matter:
    // access comes with a new one.
    if ([1000, 4400, 4401, 4402, 4403].includes(code) && reason !== "token-expired") return this.on.state("off", "closed: " + why, code);
    // A drain says when to come. Else it is a random part of a doubling time, or all clients of a dead pod would come at once.
    const asked = /retry-after-ms=(\d+)/.exec(reason);
    const wait = asked ? Number(asked[1]) : Math.random() * Math.min(this.most, this.least * 2 ** this.attempt++);
    this.on.state("busy", `${why}: again in ${(wait / 1000).toFixed(1)} s`, code);
    this.timers.retry = setTimeout(() => this.connect(), wait);
  }
}

if (typeof module !== "undefined") module.exports = Client;
