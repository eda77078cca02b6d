"""A server on 127.0.0.1 in a thread, for the duration of a block; subclasses say what it does."""

import socket
import threading


class Listener(threading.Thread):
    """Listens on `port`; a subclass's `run` accepts from `_listener` until that is closed."""

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
