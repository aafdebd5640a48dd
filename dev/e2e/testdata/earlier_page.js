"use strict";
// The page around earlier.js: told by JSON what to do, it says by JSON what the client made of it.

let client;
const tell = (what) => say(JSON.stringify(what));

const commands = {
  open(access) {
    client = connectChatSocket({
      ...access,
      onReady() { tell({ got: "ready" }); },
      onChat(row) { tell({ got: "chat", row }); },
      onMessage(chat, row) { tell({ got: "message", chat, row }); },
      onContact(row) { tell({ got: "contact", row }); },
      onAgent(row) { tell({ got: "agent", row }); },
      onError(e) { tell({ got: "error", text: e.code + " " + e.message }); },
      onClose(code, text) { tell({ got: "close", code, text }); },
    });
  },
  select({ chat }) { client.selectChat(chat); },
  close() { client.close(); },
};

function command(c) { commands[c.do](c); }
