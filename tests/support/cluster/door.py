"""A door between two networks: listens in one and passes each connection on to an address of the other.

    python -m cluster.door LISTEN_NETWORK LISTEN_ADDRESS:PORT TARGET_NETWORK TARGET_ADDRESS:PORT

A network is the name of a namespace, or `-` for the machine's own. A socket stays in the network in which it was made, so one
process can hold both ends. Tests reach the API server of a namespace through one, and pods reach a server of the test process.
"""

import asyncio
import socket
import sys

from cluster.network import Network

_CHUNK_BYTES = 1 << 18


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the sender has closed its side; then close the receiver's side, so that half-closed streams work."""
    try:
        while data := await reader.read(_CHUNK_BYTES):
            writer.write(data)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
    except OSError:
        writer.close()


async def connect(network: Network, address: tuple[str, int]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    with network.entered():
        sock = socket.socket()
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return await asyncio.open_connection(sock=sock, limit=_CHUNK_BYTES)
    except OSError:
        sock.close()
        raise


async def serve(listen: tuple[Network, tuple[str, int]], target: tuple[Network, tuple[str, int]]) -> None:
    async def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            far_reader, far_writer = await connect(*target)
        except OSError:
            writer.close()  # the caller sees a closed connection, as from a server that has gone
            return
        await asyncio.gather(pass_on(reader, far_writer), pass_on(far_reader, writer))
        writer.close()
        far_writer.close()

    network, address = listen
    with network.entered():
        listener = socket.create_server(address, backlog=128)
    server = await asyncio.start_server(accepted, sock=listener, limit=_CHUNK_BYTES)
    async with server:
        await server.serve_forever()


def _network(text: str) -> Network:
    return Network(None if text == "-" else text)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


if __name__ == "__main__":
    asyncio.run(serve((_network(sys.argv[1]), _address(sys.argv[2])), (_network(sys.argv[3]), _address(sys.argv[4]))))
