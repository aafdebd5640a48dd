# A socket of the package websockets that does what lines of JSON on the standard input tell it and says by lines of JSON what
# it sees: the same as guest.js.

import asyncio
import base64
import json
import sys

import websockets
from websockets.frames import OP_BINARY, OP_TEXT
from websockets.legacy.client import connect  # the newer one has no way to send bytes that are not UTF-8


def say(**what):
    print(json.dumps(what), flush=True)


async def lines():
    reader = asyncio.StreamReader(limit=64 << 20)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        yield json.loads(line)


async def hear(ws):
    try:
        async for m in ws:
            if isinstance(m, str):
                say(got="text", data=m)
            else:
                say(got="binary")
    except websockets.ConnectionClosed:
        pass
    say(got="close", code=ws.close_code, reason=ws.close_reason)


def send(ws, text, data):
    # Not by ws.send(): that lets nothing out that is not UTF-8, and where the service has closed meanwhile it gives up the
    # close frame that came but was not read yet.
    if ws.open:
        ws.write_frame_sync(True, OP_TEXT if text else OP_BINARY, data)


async def ping(ws, payload):
    await (await ws.ping(payload))
    say(got="pong", data=payload.decode())


async def main():
    commands = lines()
    c = await anext(commands)
    try:
        ws = await connect(
            c["url"], subprotocols=c.get("protocols"), extra_headers=c.get("headers"), max_size=None, ping_interval=None,
            compression="deflate" if c.get("compress") else None)
    except websockets.InvalidStatusCode as e:
        say(got="refused", code=e.status_code)
        return
    say(got="open", protocol=ws.subprotocol or "")
    tasks = {asyncio.create_task(hear(ws))}
    async for c in commands:
        data = base64.b64decode(c.get("bytes", ""))
        match c["do"]:
            case "send":
                send(ws, c.get("text"), data)
            case "ping":
                tasks.add(asyncio.create_task(ping(ws, data)))
            case "raw":
                ws.transport.write(data)
            case "close":
                tasks.add(asyncio.create_task(ws.close(c["code"], c.get("reason", ""))))


asyncio.run(main())
