"use strict";
// A page, or a program under Node, that lives on the reference client: told by JSON what to do, it says by JSON what it
// applied and in what state it is.

let client;
const tell = (what) => say(JSON.stringify(what));

const commands = {
  start({ access, quiet }) {
    client = new Client({
      async access() {
        const answer = await fetch(access);
        if (!answer.ok) throw new Error(await answer.text());
        return answer.json();
      },
      event(m, known) { if (!known) tell({ got: "event", seq: m.seq, replay: m.replay ?? false }); },
      reload(seq) { tell({ got: "reload", seq }); },
      state(what, text, code) { tell({ got: "state", what, text, code }); },
      gap({ since, reason }) { tell({ got: "gap", seq: since, text: reason }); },
      selected(m) { tell({ got: "selected", seq: m.payload.seq }); },
      error(e) { tell({ got: "error", text: e.code }); },
    }, { quiet, most: 2000, renew: 0.3 });
    client.connect();
  },
  connect() { client.connect(); },
  select({ text }) { client.select(text); },
};

function command(c) { commands[c.do](c); }

if (typeof require !== "undefined") {
  globalThis.WebSocket = require("ws");
  globalThis.Client = require(process.argv[2]);
  globalThis.say = (line) => process.stdout.write(line + "\n");
  require("readline").createInterface({ input: process.stdin }).on("line", (line) => command(JSON.parse(line))).on("close", () => process.exit());
}
