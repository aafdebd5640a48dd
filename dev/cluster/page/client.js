"use strict";
// A client of the socket as docs/protocol.md tells clients to be: duplicates are dropped by their sequence, a close code
// decides what to do next, and what was missed is resumed, until an answer says "gap": false.
//
// Handlers (all are called with this page's socket only):
//   address()            -> promise of the URL to open, with a token that is valid now
//   event(m), ready(m), gap(m), error(payload), state("on" | "busy" | "off", text)
//   reload()             what was missed cannot be replayed: load everything again

class Client {
  constructor(handlers) {
    this.on = handlers;
    this.socket = null;   // the one that counts; events of older ones are ignored
    this.attempt = 0;     // of reconnecting, since the last ready
    this.timer = 0;
    this.chat = "";
    this.seen = new Set(); // in the order of their coming; a lower number may be new
    this.top = 0;          // the highest sequence known
    this.owed = null;      // the lowest `since` that is not answered yet, also over a reconnect
    this.asked = 0;        // answers that are under way
    this.again = false;    // a gap came meanwhile, which those answers may not cover
  }

  async connect() {
    this.disconnect();
    this.on.state("busy", "connecting");
    const socket = this.socket = { close() {} }; // nobody else connects meanwhile
    let url;
    try {
      url = await this.on.address();
    } catch (err) {
      if (socket === this.socket) this.retry("no token: " + err.message);
      return;
    }
    if (socket !== this.socket) return;
    this.asked = 0;
    this.again = false;
    if (this.owed === null && this.top > 0) this.owed = this.top;
    if (this.owed !== null) {
      url += "&since=" + this.owed;
      this.asked = 1;
    }
    const s = this.socket = new WebSocket(url, "json.v1");
    s.onmessage = (e) => { if (s === this.socket) this.message(JSON.parse(e.data)); };
    s.onclose = (e) => { if (s === this.socket) this.closed(e.code, e.reason); };
  }

  disconnect() {
    clearTimeout(this.timer);
    const s = this.socket;
    this.socket = null;
    if (s) s.close(1000);
  }

  // select asks for a chat's messages from now on, and for those after since.
  select(chat, since) {
    this.chat = chat;
    if (since !== undefined) this.owed = Math.min(this.owed ?? since, since);
    if (this.open()) this.ask({ type: "select_chat", payload: { chat_id: chat, since } });
  }

  open() { return this.socket instanceof WebSocket && this.socket.readyState === WebSocket.OPEN; }

  ask(m) {
    this.asked++;
    this.socket.send(JSON.stringify(m));
  }

  message(m) {
    const p = m.payload;
    switch (m.type) {
      case "event":
        this.event(m);
        break;
      case "gap":
        this.owed = Math.min(this.owed ?? p.since, p.since);
        this.on.gap(p);
        if (this.asked > 0) this.again = true;
        else this.ask({ type: "resume", payload: { since: this.owed } });
        break;
      case "ready":
        this.attempt = 0;
        this.on.state("on", "connected");
        this.on.ready(m);
        // A selection ends with its socket. ready speaks for the general events alone, so this comes before its answer counts.
        if (this.chat) this.select(this.chat, this.owed ?? undefined);
        if (this.owed !== null) this.answered(p);
        else this.top = Math.max(this.top, p.seq);
        break;
      case "chat_selected":
      case "resumed":
        this.answered(p);
        break;
      case "error":
        this.on.error(p);
        if (this.asked > 0) this.answered({ gap: true, seq: 0 }); // a selection that failed: nothing was replayed
        break;
    }
  }

  // answered: only when nothing is under way any more has everything after owed come.
  answered(p) {
    this.asked--;
    this.top = Math.max(this.top, p.seq);
    if (p.gap) this.on.reload();
    if (this.asked > 0) return;
    if (this.again) {
      this.again = false;
      this.ask({ type: "resume", payload: { since: this.owed } });
    } else {
      this.owed = null;
    }
  }

  event(m) {
    const known = this.seen.has(m.seq);
    if (!known) this.seen.add(m.seq);
    if (this.seen.size > 20000) this.seen.delete(this.seen.values().next().value);
    this.top = Math.max(this.top, m.seq);
    this.on.event(m, known);
  }

  closed(code, reason) {
    this.socket = null;
    const why = `${code} ${reason}`.trim();
    // Not as you are: a bad request, a key or token, or a session that another took. The rest is worth another try, an
    // expired token too: address comes with a new one.
    if ([1000, 4400, 4401, 4402, 4403].includes(code) && reason !== "token-expired") {
      this.on.state("off", "closed: " + why);
      return;
    }
    this.retry(why, Number(/retry-after-ms=(\d+)/.exec(reason)?.[1] ?? NaN));
  }

  // retry waits as long as the service asked for, or a random part of a doubling time: else all clients of a pod that
  // ended come at once.
  retry(why, asked) {
    const wait = asked >= 0 ? asked : Math.random() * Math.min(30000, 500 * 2 ** this.attempt);
    this.attempt++;
    this.on.state("busy", `${why}: again in ${(wait / 1000).toFixed(1)} s`);
    this.timer = setTimeout(() => this.connect(), wait);
  }
}
