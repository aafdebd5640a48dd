"use strict";
// A page, or a program under Node, that lives on the reference client: told by JSON what to do, it says by JSON what comes to it
// and in what state it is.

let client;
const loads = []; // promises of what is loaded, where the test ends each load itself
const tell = (what) => say(JSON.stringify(what));

const commands = {
  // start: access answers with an URL and a token; state, if there is one, with what is loaded.
  start({ access, state, quiet }) {
    const get = async (address) => {
      const answer = await fetch(address);
      if (!answer.ok) throw new Error(await answer.text());
      return answer.json();
    };
    client = new Client({
      access: () => get(access),
      load(what, seq) {
        tell({ got: "load", what, seq, text: client.chat });
        if (state) return get(state).then(() => tell({ got: "loaded", what }));
        return new Promise((resolve, reject) => loads.push({ resolve, reject }));
      },
      event(m, known) { tell({ got: "event", seq: m.seq, known }); },
      state(what, text, code) { tell({ got: "state", what, text, code }); },
      gap({ since, reason }) { tell({ got: "gap", seq: since, text: reason }); },
      selected(m) { tell({ got: "selected", seq: m.payload.seq }); },
      error(e) { tell({ got: "error", text: e.code }); },
    }, { quiet, most: 2000, renew: 0.3 });
    client.connect();
  },
  connect() { client.connect(); },
  select({ text }) { client.select(text); },
  loaded({ n }) { loads[n].resolve(); },
  unloaded({ n }) { loads[n].reject(new Error("no state today")); },
};

function command(c) {
  commands[c.do](c);
  setTimeout(() => tell({ got: "did", what: c.do })); // behind what follows from a promise
}

if (typeof require !== "undefined") {
  globalThis.WebSocket = require("ws");
  globalThis.Client = require(process.argv[2]);
  globalThis.say = (line) => process.stdout.write(line + "\n");
  require("readline").createInterface({ input: process.stdin }).on("line", (line) => command(JSON.parse(line))).on("close", () => process.exit());
}
