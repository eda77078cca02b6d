"""A server in a thread, over the golden model or one that tests control."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import httpx

from grokfetch.serving.app import Access, application
from grokfetch.serving.model import Served
from grokfetch.serving.server import Server, bound
from grokfetch.serving.worker import Worker
from support import golden

DEADLINE_S = 60
SERVED = Served("golden", 128, 512, 2, 4, 5)
EOS = 2


class Letters:
    """A tokenizer with one token for each letter."""

    def encode(self, text):
        return [ord(letter) - 0x4E00 for letter in text]

    def piece(self, token):
        return chr(token + 0x4E00)

    def special(self, token):
        return token == EOS

    def stream(self):
        return self

    def push(self, token):
        return "" if token == EOS else self.piece(token)

    def finish(self):
        return ""


def letters(tokens):
    return "".join(map(Letters().piece, tokens))


P1 = golden.prompt("p1")
WANTED = letters(golden.arrays()["f32/p1_tokens"].tolist())


@contextlib.contextmanager
def serving(model, *, tokenizer=None, queue=2, slots=4, **access):
    """A server over a model, in a thread; yields its address and its worker."""
    worker = Worker(model, slots, queue)
    started = threading.Event()
    app = application(worker, SERVED, tokenizer or Letters(), Access(**access))
    server = Server(app, lambda _: started.set(), "golden")
    with bound("127.0.0.1", 0) as at:
        thread = threading.Thread(target=server.run, args=([at],))
        thread.start()
        assert started.wait(DEADLINE_S)
        try:
            yield f"http://127.0.0.1:{at.getsockname()[1]}", worker
        finally:
            server.should_exit = True
            thread.join()


class Held:
    """A model that gives every text one token whenever `steps` allows a step."""

    prefix_cache = SimpleNamespace(hits=0, tokens=0, nbytes=0)

    def __init__(self):
        self.numbers = []
        self.added = threading.Semaphore(0)
        self.steps = threading.Semaphore(0)
        self.dropped = threading.Event()
        self.fails = False

    @property
    def busy(self):
        return bool(self.numbers)

    @property
    def working(self):
        return len(self.numbers)

    def add(self, number, _generation):
        self.numbers.append(number)
        self.added.release()

    def drop(self, number):
        self.numbers.remove(number)
        self.dropped.set()

    def reset(self):
        self.numbers.clear()

    def step(self):
        if not self.numbers or not self.steps.acquire(timeout=0.01):
            return []
        if self.fails:
            raise RuntimeError("a secret of the machine room")
        token = SimpleNamespace(token=7, logprob=None, best=())
        done, self.numbers = self.numbers, []
        return [
            SimpleNamespace(number=number, prompt=(), token=token, finished="length")
            for number in done
        ]


def post(url, **fields):
    body = {"prompt": P1, "temperature": 0} | fields
    return httpx.post(f"{url}/v1/completions", json=body, timeout=DEADLINE_S)


def error(answer):
    return answer.json()["error"]
