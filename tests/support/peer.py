"""A peer that speaks just enough BitTorrent to be honest, to lie, or to fall silent."""

import contextlib
import random
import struct

from support.listener import Listener


class Peer(Listener):
    """Speaks enough of the protocol to say that it has some pieces and to send their blocks.

    `block` is called with piece, offset and length; if it returns None, nothing is sent. `asked`
    lists the piece of every block that was requested, in order. `has` are the pieces it has, by
    default all. No requests are allowed before the event `ready` is set.
    """

    def __init__(self, info_hash, pieces, block, has=None, ready=None):
        super().__init__()
        self._hash = bytes.fromhex(info_hash)
        self._pieces = pieces
        self._has = range(pieces) if has is None else has
        self._block = block
        self._ready = ready
        self.sent = 0
        self.asked = []

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.settimeout(20)
                with contextlib.suppress(OSError, EOFError), connection:
                    self._talk(connection, connection.makefile("rb"))

    def _talk(self, connection, stream):
        with stream:
            read(stream, 68)
            name = b"\x13BitTorrent protocol" + bytes(8)
            connection.sendall(name + self._hash + b"-XX0000-" + random.randbytes(12))
            have = bytearray(-(-self._pieces // 8))
            for piece in self._has:
                have[piece // 8] |= 128 >> piece % 8
            say(connection, 5, bytes(have))
            if self._ready is not None:
                self._ready.wait(20)
            say(connection, 1, b"")
            while True:
                message = read(stream, struct.unpack(">I", read(stream, 4))[0])
                if message[:1] == b"\x06":
                    piece, begin, length = struct.unpack(">III", message[1:])
                    self.asked.append(piece)
                    block = self._block(piece, begin, length)
                    if block is not None:
                        say(connection, 7, struct.pack(">II", piece, begin) + block)
                        self.sent += 1


def read(stream, count):
    data = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


def say(connection, kind, body):
    connection.sendall(struct.pack(">IB", len(body) + 1, kind) + body)
