"use strict";
// A socket that does what JSON tells it and says by JSON what it sees: under Node by the npm package ws, told by lines of
// the standard input; in a page by the browser's own WebSocket, told by calls of command. A page has no way to send
// headers, pings or bytes that are no message.

let socket;

const commands = {
  open({ url, protocols, headers, compress }) {
    socket = new WebSocket(url, protocols ?? [], { headers, perMessageDeflate: compress ?? false }); // a browser takes no third
    socket.binaryType = "arraybuffer";
    socket.onopen = () => tell({ got: "open", protocol: socket.protocol });
    socket.onmessage = (e) => tell(typeof e.data === "string" ? { got: "text", data: e.data } : { got: "binary" });
    socket.onclose = (e) => tell({ got: "close", code: e.code, reason: e.reason });
    socket.onerror = () => {}; // close follows
    socket.on?.("unexpected-response", (_, response) => tell({ got: "refused", code: response.statusCode }));
    socket.on?.("pong", (payload) => tell({ got: "pong", data: String(payload) }));
  },
  send({ text, bytes }) {
    const data = Uint8Array.from(atob(bytes ?? ""), (c) => c.charCodeAt(0));
    if (socket.ping) socket.send(data, { binary: !text });
    else socket.send(text ? new TextDecoder().decode(data) : data);
  },
  ping({ bytes }) { socket.ping(atob(bytes)); },
  raw({ bytes }) { socket._socket.write(Buffer.from(bytes, "base64")); },
  close({ code, reason }) { socket.close(code, reason); },
};

function command(c) { commands[c.do](c); }
function tell(what) { say(JSON.stringify(what)); }

if (typeof require !== "undefined") {
  globalThis.WebSocket = require("ws");
  globalThis.say = (line) => process.stdout.write(line + "\n");
  require("readline").createInterface({ input: process.stdin }).on("line", (line) => command(JSON.parse(line))).on("close", () => process.exit());
}
