"""A web server on 127.0.0.1, for the tests of mirrors, that can be told to misbehave."""

import base64
import contextlib
import http.client
import math
import re
import shutil
import socket
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class WebServer:
    """Serves `files`, bytes by path without the leading slash, with ranges.

    Paths in `spoil` are sent with every byte inverted; for paths in `halt` the headers and half of
    the body are sent, then nothing until the test ends. With `cut_after`, every body ends after
    that fraction of its bytes, and so does the connection. With `no_range`, Range is ignored.
    `redirects` maps a path to an address. `status` is the code of every answer until `failures` are
    used up. `pages` are sent whole with 200, whatever range was asked for. `before` is called with
    each path. `asked` are the paths and `tokens` the Authorization headers, one for each request.
    With `context` the server uses TLS.
    """

    def __init__(self, files, context=None):
        self.files = files
        self.context = context
        self.pages = {}
        self.tokens = []
        self.spoil = set()
        self.halt = set()
        self.cut_after = None
        self.no_range = False
        self.redirects = {}
        self.headers = {}
        self.status = None
        self.failures = 10**9
        self.before = lambda _path: None
        self.asked = []
        self.ended = threading.Event()

    def __enter__(self):
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Else a body waits 40 ms for its headers to be acknowledged.
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def handle(self):
                # Clients may go, or be killed, at any moment.
                with contextlib.suppress(ConnectionError):
                    super().handle()

            def do_GET(self):
                answer(server, self)

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        if self.context is not None:
            self._http.socket = self.context.wrap_socket(self._http.socket, server_side=True)
            self.url = f"https://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


def answer(server, request):
    path = request.path.removeprefix("/")
    server.asked.append(path)
    server.tokens.append(request.headers.get("Authorization"))
    server.before(path)
    if server.status is not None and server.failures > 0:
        server.failures -= 1
        headers(request, server.status, 0, server.headers)
    elif path in server.redirects:
        headers(request, 302, 0, {"Location": server.redirects[path]})
    elif path in server.pages:
        headers(request, 200, len(server.pages[path]))
        request.wfile.write(server.pages[path])
    elif path not in server.files:
        headers(request, 404, 0)
    else:
        send(server, request, path, server.files[path])


def headers(request, status, length, more=()):
    request.send_response(status)
    for key, value in {"Content-Length": length, **dict(more)}.items():
        request.send_header(key, str(value))
    request.end_headers()


def send(server, request, path, data):
    if path in server.spoil:
        data = bytes(255 - byte for byte in data)
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", ""))
    body = data
    if found is None or server.no_range:
        headers(request, 200, len(body), server.headers)
    else:
        start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
        body = data[start:stop]
        extent = {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}
        headers(request, 206, len(body), {**extent, **server.headers})
    if path in server.halt:
        body = body[: len(body) // 2]
    if server.cut_after is not None:
        body = body[: math.ceil(len(body) * server.cut_after)]
    request.wfile.write(body)
    if path in server.halt:
        request.wfile.flush()
        server.ended.wait()
    request.close_connection = path in server.halt or server.cut_after is not None


class Proxy:
    """A proxy on 127.0.0.1 for which every host name is this machine.

    `asked` holds the host of each request or tunnel, with the login.
    """

    def __enter__(self):
        self.asked = []
        self._server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class SocksProxy(Proxy):
    """SOCKS5 with passwords; `asked` holds host, user and password."""

    def _handler(self):
        asked = self.asked

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                _, count = self.rfile.read(2)
                self.rfile.read(count)
                self.wfile.write(b"\x05\x02")
                _, length = self.rfile.read(2)
                user = self.rfile.read(length)
                password = self.rfile.read(*self.rfile.read(1))
                self.wfile.write(b"\x01\x00")
                *_, length = self.rfile.read(5)
                asked.append((self.rfile.read(length), user, password))
                port = int.from_bytes(self.rfile.read(2), "big")
                self.wfile.write(b"\x05\x00\x00\x01" + bytes(6))
                relay(self, port)

        return Handler


class HttpProxy(Proxy):
    """Supports absolute URLs and CONNECT; `asked` holds method, host, and user:password."""

    def _handler(self):
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *_):
                pass

            def _note(self, host):
                login = self.headers.get("Proxy-Authorization", "").removeprefix("Basic ")
                asked.append((self.command, host, base64.b64decode(login)))

            def do_GET(self):
                url = urlsplit(self.path)
                self._note(url.hostname)
                there = http.client.HTTPConnection("127.0.0.1", url.port)
                with contextlib.closing(there):
                    there.request("GET", url.path, headers={"Range": self.headers["Range"]})
                    answer = there.getresponse()
                    self.send_response(answer.status)
                    for name in ("Content-Length", "Content-Range"):
                        self.send_header(name, answer.headers[name])
                    self.end_headers()
                    shutil.copyfileobj(answer, self.wfile)

            def do_CONNECT(self):
                host, _, port = self.path.rpartition(":")
                self._note(host)
                self.send_response(200)
                self.end_headers()
                self.close_connection = True
                relay(self, int(port))

        return Handler


def relay(handler, port):
    """Pass bytes both ways between a handler's client and a port of this machine."""
    with socket.create_connection(("127.0.0.1", port)) as there:

        def back():
            with contextlib.suppress(OSError), there.makefile("rb", buffering=0) as answers:
                shutil.copyfileobj(answers, handler.wfile)

        answering = threading.Thread(target=back)
        answering.start()
        with contextlib.suppress(OSError):
            while data := handler.request.recv(65536):
                there.sendall(data)
            there.shutdown(socket.SHUT_RDWR)
        answering.join()
