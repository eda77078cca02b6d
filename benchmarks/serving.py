"""`grokfetch serve` against `grokfetch run` on one model: overhead, throughput, waiting, memory.

Run: python benchmarks/serving.py DIR, a folder that `grokfetch run` accepts, such as the one that
`grokfetch demo --keep` leaves. Clients stream over loopback and share the machine with the server.
`--requests 10000` instead measures the memory for that many short requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from statistics import median

import psutil

PROMPT = (461, 505, 386, 490, 491, 292, 262)
"""How the text of the demo begins: its model then goes on for as long as is measured."""
CLIENTS = (1, 4, 16)
LONG_PROMPT = 200
COMMON, REST = 1024, 64
"""Tokens that prompts begin with alike, and their own: examples, and a question."""
COMPILING = 10
"""Tokens of `run` that are not counted."""


def main() -> None:
    """Measure and print the table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("folder", type=Path)
    options.add_argument("--tokens", type=int, default=200)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--dtype", default="float32")
    options.add_argument("--placement", default="mapped")
    options.add_argument("--requests", type=int, help="measure memory over so many requests")
    chosen = options.parse_args()
    how = [str(chosen.folder), "--dtype", chosen.dtype, "--placement", chosen.placement]
    if chosen.requests:
        with server(how) as (process, port):
            asyncio.run(memory(process, port, chosen.requests))
        return
    alone = min(run_alone(how, chosen.tokens) for _ in range(chosen.rounds))
    print(f"run alone: {alone:.2f} ms a token")
    with server(how) as (_, port):
        asyncio.run(throughput(port, chosen.tokens, chosen.rounds, alone))
        asyncio.run(waiting(port, chosen.tokens))
        asyncio.run(known(port))


def run_alone(how: list[str], tokens: int) -> float:
    """Milliseconds per token of `grokfetch run`, without those during which it compiles."""
    prompt = " ".join(map(str, PROMPT))
    command = ["run", *how, "--tokens", prompt, "--max-tokens", str(tokens), "--json"]
    with subprocess.Popen(
        [sys.executable, "-m", "grokfetch", *command], stdout=subprocess.PIPE, text=True
    ) as process:
        lines = process.stdout or ()
        times = [time.perf_counter() for line in lines if '"token"' in line]
    return (times[-1] - times[COMPILING]) / (len(times) - 1 - COMPILING) * 1e3


@contextmanager
def server(how: list[str]) -> Iterator[tuple[psutil.Process, int]]:
    """A server over the folder: its process and port."""
    command = [sys.executable, "-m", "grokfetch", "serve", *how, "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            said = next(line for line in process.stderr or () if "http://" in line)
            yield psutil.Process(process.pid), int(said.split("/v1")[0].rsplit(":", 1)[1])
        finally:
            process.terminate()


async def ask(port: int, tokens: int, prompt: tuple[int, ...] = PROMPT) -> list[float]:
    """Stream a completion; seconds until each token came."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    content = json.dumps(body).encode()
    start = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
    )
    times = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter() - start)
    writer.close()
    await writer.wait_closed()
    return times


async def throughput(port: int, tokens: int, rounds: int, alone: float) -> None:
    """Tokens a second of so many clients at once, against one client, and that against `run`."""
    one = 0.0
    for clients in CLIENTS:
        rates, steps = [], []
        for turn in range(rounds + 1):
            start = time.perf_counter()
            told = await asyncio.gather(*(ask(port, tokens) for _ in range(clients)))
            seconds = time.perf_counter() - start
            assert {len(times) for times in told} == {tokens}
            # The first turn compiles.
            if turn:
                rates.append(clients * tokens / seconds)
                steps.append((told[0][-1] - told[0][0]) / (tokens - 1) * 1e3)
        rate = max(rates)
        one = one or rate
        print(f"{clients:>2} clients: {rate:7.0f} tokens/s, {rate / one:4.1f} times one client")
        if clients == 1:
            print(f"overhead: {min(steps):.2f} ms a token, {min(steps) - alone:+.2f} ms over run")


async def waiting(port: int, tokens: int) -> None:
    """How long a newcomer waits for its first token while 15 others are served."""
    newcomers = {"short": PROMPT, "long": tuple(range(3, 3 + LONG_PROMPT))}
    for name, prompt in newcomers.items():
        await ask(port, 2, prompt)
        idle = median([(await ask(port, 2, prompt))[0] for _ in range(5)])
        others = [asyncio.create_task(ask(port, tokens)) for _ in range(15)]
        await asyncio.sleep(0.1)
        first = [(await ask(port, 2, prompt))[0] for _ in range(3)]
        await asyncio.gather(*others)
        print(
            f"first token of a {name} prompt ({len(prompt)} tokens): {idle * 1e3:.0f} ms idle, "
            f"{median(first) * 1e3:.0f} ms beside 15 others"
        )


async def known(port: int) -> None:
    """How long a prompt waits for its first token, and then others that begin as it does."""
    draw = Random(0)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 500) for _ in range(count))

    firsts, others = [], []
    for turn in range(4):
        common = drawn(COMMON)
        times = [(await ask(port, 2, common + drawn(REST)))[0] * 1e3 for _ in range(4)]
        # The first turn compiles.
        if turn:
            firsts.append(times[0])
            others += times[1:]
    print(
        f"first token of a prompt of {COMMON + REST} tokens: {median(firsts):.0f} ms, "
        f"{median(others):.0f} ms if {COMMON} of them are known"
    )


async def memory(process: psutil.Process, port: int, requests: int) -> None:
    """Resident memory of the server after the first tenth of some requests, and after all."""
    left = iter(range(requests))
    sizes = []

    async def client() -> None:
        for number in left:
            await ask(port, 2)
            if (number and number % (requests // 10) == 0) or number == requests - 1:
                sizes.append(process.memory_info().rss / 1e6)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(16)))
    seconds = time.perf_counter() - start
    print(f"{requests} requests in {seconds:.0f} s: {requests / seconds:.0f} a second")
    print("resident MB: " + " ".join(f"{size:.0f}" for size in sizes))
    print(f"growth from the first tenth to the end: {sizes[-1] / sizes[0] - 1:+.1%}")


if __name__ == "__main__":
    main()
