"""A server of one thread on 127.0.0.1 for the time of a block; what it says is its heir's."""

import socket
import threading


class Listener(threading.Thread):
    """Listens on `port`; an heir's `run` accepts from `_listener` until that is closed."""

    def __init__(self):
        super().__init__(daemon=True)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.join()
