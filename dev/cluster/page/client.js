"use strict";
// The reference client of the socket: it does what docs/protocol.md asks of clients. Duplicates are told by their sequence, a
// close code decides what to do next, what was missed is resumed until an answer says "gap": false, the selected chat is
// selected again on each new socket, and the token is renewed before it ends. No dependency; a script tag defines Client,
// require returns it. Node needs a global WebSocket: from version 22 on it has one.
//
// Handlers:
//   access()              promise of { url, token, expires_at }, fresh at each call: the socket's URL with the API key, and
//                         what /generate-token answers. Called before each connect and each refresh of the token.
//   event(m, known)       an event message; known: this sequence has come before, there is nothing to apply
//   reload(seq)           what was missed cannot be replayed: fetch everything again; what is fetched is as of seq at least
//   state(what, text, code)  what is "on", "busy" (it tries again by itself), or "off" (it does not: somebody must call connect)
//   ready(m), selected(m), gap(payload), error(payload)   optional

class Client {
  constructor(handlers, { quiet = 25000, least = 500, most = 30000, steady = 60000, renew = 0.75, remember = 3600000 } = {}) {
    this.on = handlers;
    this.quiet = quiet;      // ms without a message until it pings, and then without an answer until it gives the socket up
    this.least = least;      // ms of back-off at first
    this.most = most;        // and at the most
    this.steady = steady;    // ms after which a socket counts as one that works
    this.remember = remember; // ms, at least, for which it knows what has come
    this.renew = renew;      // part of a token's time after which it is replaced
    this.attempt = 0;        // doublings of the back-off
    this.chat = "";          // selected, over all sockets
    this.fresh = new Set();  // sequences seen, a set since a lower number may be new;
    this.old = new Set();    // those from before the last turn
    this.turned = Date.now();
    this.top = 0;            // the highest sequence known,
    this.known = false;      // once one is: that of an empty stream is 0
    this.owed = null;        // the lowest `since` that is not answered yet, also over a reconnect
    this.socket = null;      // the one that counts; what older ones say is ignored
    this.timers = {};
    this.reset();
  }

  // reset forgets what belongs to one socket.
  reset() {
    for (const t of Object.values(this.timers)) clearTimeout(t);
    this.timers = {};
    this.live = false;       // its ready has come
    this.pending = [];       // what was sent and is not answered: answers come in the order of the questions
    this.again = false;      // a gap came while answers were under way, which they may not cover
    this.stale = false;      // an answer said "gap": true
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
    if (this.owed === null && this.known) this.owed = this.top;
    const u = new URL(url);
    u.searchParams.set("errors", "close"); // a page cannot read the HTTP status of a refusal, but a close code
    if (this.owed !== null) u.searchParams.set("since", this.owed);
    this.pending = [{ type: "ready", pays: this.owed !== null }];
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

  // select asks for a chat's messages from now on, and for those after since if it is given; "" = of no chat.
  select(chat, since) {
    this.chat = chat;
    if (since !== undefined) this.owe(since);
    if (this.live) this.askChat(since);
  }

  open() { return this.live; }

  owe(since) { this.owed = Math.min(this.owed ?? since, since); }

  askChat(since) { this.ask("select_chat", { chat_id: this.chat, since }, since !== undefined); }

  askResume() { this.ask("resume", { since: this.owed }, true); }

  // ask sends a message. pays: its answer covers what is owed now.
  ask(type, payload, pays) {
    this.pending.push({ type, pays });
    this.socket.send(JSON.stringify({ type, payload }));
  }

  // underWay says whether answers that pay are still to come.
  underWay() { return this.timers.redo !== undefined || this.pending.some((q) => q.pays); }

  message(m) {
    this.heard = Date.now();
    this.pinged = 0;
    if (m.type === "event") return this.event(m);
    if (m.type === "gap") return this.gap(m.payload);
    if (!["ready", "chat_selected", "resumed", "token_refreshed", "pong", "error"].includes(m.type)) return; // of a later version
    const question = this.pending.shift();
    if (m.type === "ready") this.ready(m);
    if (m.type === "chat_selected") this.on.selected?.(m);
    if (m.type === "error") this.on.error?.(m.payload);
    if (!this.live) return; // one of the handlers has ended this
    if (m.type === "error") this.refused(question, m.payload.code);
    else if (m.type === "token_refreshed") this.refreshAt(m.payload.expires_at);
    else if (m.type !== "pong") this.answered(question, m.payload);
  }

  gap(p) {
    this.owe(p.since);
    this.on.gap?.(p);
    if (this.underWay() || !this.live) this.again = true;
    else this.askResume();
  }

  // ready: a selection ends with its socket. ready speaks for the general events alone, so the chat is asked for before that
  // answer counts.
  ready(m) {
    this.live = true;
    this.timers.steady = setTimeout(() => { this.attempt = 0; }, this.steady);
    this.refreshAt(this.expires);
    this.on.state("on", "connected");
    this.on.ready?.(m);
    if (this.chat && this.live) this.askChat(this.owed ?? undefined);
  }

  // answered: only when nothing is under way any more has everything after owed come.
  answered(question, p) {
    if (p.gap) { // the page reloads, and the stream may have been made anew, and count from 1 again
      this.top = 0;
      this.fresh.clear();
      this.old.clear();
    }
    this.top = Math.max(this.top, p.seq);
    this.known = true;
    this.stale ||= p.gap;
    if (this.underWay()) return;
    if (this.again) {
      this.again = false;
      this.askResume();
    } else if (question.pays) {
      this.owed = null;
    }
    if (this.stale && !this.underWay()) {
      this.stale = false;
      this.on.reload(p.seq);
    }
  }

  // refused: too many messages, or Redis is away: what was asked for is still wanted, but not at once.
  refused(question, code) {
    if (question.type === "refresh_token") return this.refreshAt(this.expires);
    if (question.pays && code === "BadRequest") return this.answered(question, { seq: 0 }); // never will there be another answer
    if (question.type === "ping" || code === "BadRequest" || this.timers.redo) return;
    this.timers.redo = setTimeout(() => {
      delete this.timers.redo;
      if (this.chat) this.askChat(this.owed ?? undefined);
      if (this.owed !== null) this.askResume();
    }, 1000 + Math.random() * 2000);
  }

  event(m) {
    const known = this.fresh.has(m.seq) || this.old.has(m.seq);
    this.fresh.add(m.seq);
    this.top = Math.max(this.top, m.seq);
    // A gap may reach as far back as events are replayed, RESUME_MAX_AGE. While something is owed, old ones may still come.
    if (this.owed === null && Date.now() - this.turned > this.remember) {
      this.old = this.fresh;
      this.fresh = new Set();
      this.turned = Date.now();
    }
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
