"""`grokfetch seed`: share proven files with others, until told to stop."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import click

from grokfetch.commands.help import Explained
from grokfetch.commands.options import (
    SWARM_NAMES,
    bundle,
    folder_argument,
    json_option,
    state_option,
    swarm_options,
)
from grokfetch.commands.value_types import Duration, Number
from grokfetch.errors import NotProven, StateMissing
from grokfetch.events import Ended, Seeding
from grokfetch.fetch.swarm import Seeder, Shared, SwarmSettings
from grokfetch.fetch.swarm import seed as seeding
from grokfetch.folder import lock
from grokfetch.folder.ledger import Proofs
from grokfetch.folder.store import Store
from grokfetch.interruption import honour
from grokfetch.output.progress import Lines
from grokfetch.output.reporting import held, lines
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.metainfo import TorrentFile, encode_torrent
from grokfetch.units import bytes_text, count_text, seconds_text

LOOK_INTERVAL_S = 5.0
"""How often to check that the files have not changed; a changed file is not shared."""

LINE_INTERVAL_S = 60.0
"""How often to print a line about progress."""

EVENT_INTERVAL_S = 1.0
"""How often to write an event about progress."""


@dataclasses.dataclass(frozen=True, slots=True)
class Goal:
    """When to stop: uploaded bytes divided by shared bytes, and seconds; None: no limit."""

    ratio: float | None = None
    seconds: float | None = None

    def reached(self, ratio: float, seconds: float) -> bool:
        """Whether one of the two is reached."""
        return (self.ratio is not None and ratio >= self.ratio) or (
            self.seconds is not None and seconds >= self.seconds
        )


_goal_options = (
    click.option(
        "--ratio",
        type=Number(min=0, min_open=True),
        help="Stop seeding when this many times the size has been uploaded.",
    ),
    click.option(
        "--for",
        "seconds",
        type=Duration(),
        help="Stop seeding after this time: 90s, 30m, 12h, 7d.",
    ),
)

goal_options = bundle("goal", Goal, *_goal_options)


def _sharing(ratio: float | None, seconds: float | None, *, go_on: bool) -> Goal | None:
    goal = Goal(ratio, seconds)
    if goal != Goal() and not go_on:
        raise click.UsageError("--ratio and --for require --seed")
    return goal if go_on else None


sharing_options = bundle(
    "sharing",
    _sharing,
    click.option("--seed", "go_on", is_flag=True, help="Seed it afterwards, to share it."),
    *_goal_options,
)
"""For a command that can seed its result afterwards; None if it is not to."""


@click.command(
    cls=Explained,
    examples=(
        "grokfetch seed /data/grok-1",
        "grokfetch seed /data/grok-1 --up 5M --ratio 2",
    ),
    groups={
        "How long": ("ratio", "seconds"),
        "Peers": SWARM_NAMES,
        "Rates": ("up", "down"),
        "Output and state": ("json", "state"),
    },
)
@folder_argument
@goal_options
@swarm_options
@state_option
@json_option
def seed(folder: Path, *, goal: Goal, swarm: SwarmSettings, state: Path | None) -> None:
    """Share the proven pieces of DIR, and only these, until Ctrl-C or the given ratio or time.

    It stops if a file changes. Other commands can read DIR at the same time, but not write to it.
    """
    share(Store(folder, state), swarm, goal, lines())


def share(store: Store, settings: SwarmSettings, goal: Goal, machine: Lines | None = None) -> None:
    """Seed a folder; print progress now and then, and a summary at the end.

    Args:
        store: the folder.
        settings: of the swarm.
        goal: when to stop.
        machine: where events go; without it, lines go to stderr.

    Raises:
        StateMissing: the folder has no torrent.
        NotProven: nothing is proven, or a file has changed while it was seeded.
        StateLocked: another process is writing the folder.
    """
    with held(store), lock.seeding(store.state):
        torrent, layout = store.torrent(), store.layout()
        if torrent is None or layout is None:
            raise StateMissing(
                "this folder has no torrent",
                path=store.root,
                hint=store.hint_nearby()
                or f"fetch something into it, or make one: grokfetch publish {store.root}",
            )
        look = Unchanged(store, torrent, layout)
        parts = (part for piece in look.pieces for part in layout.segments(piece))
        size = sum(part.length for part in parts if not part.file.pad)
        start = time.monotonic()
        data = encode_torrent(torrent)
        with seeding(data, store.root, settings, look.pieces, layout) as seeder:
            teller = _Teller(store, layout, seeder.port, len(look.pieces), size, machine)
            uploaded = _follow(seeder, look, goal, teller)
    teller.end(uploaded, time.monotonic() - start)


@dataclasses.dataclass(frozen=True, slots=True)
class _Teller:
    """Reports progress as lines or as events. `size` is the number of shared bytes."""

    store: Store
    layout: Layout
    port: int
    pieces: int
    size: int
    machine: Lines | None

    def begin(self) -> None:
        if self.machine is not None:
            self.go_on(Shared(0, 0.0, 0))
            return
        _say(
            f"{self.store.root}: sharing {self.pieces} of {self.layout.piece_count} pieces, "
            f"{bytes_text(self.size)}, on port {self.port}; Ctrl-C stops it"
        )

    @property
    def interval_s(self) -> float:
        """How often to call `go_on`."""
        return LINE_INTERVAL_S if self.machine is None else EVENT_INTERVAL_S

    def go_on(self, shared: Shared) -> None:
        if self.machine is None:
            rate = f"{bytes_text(shared.rate)}/s to {count_text(shared.peers, 'peer')}"
            _say(f"seed {bytes_text(shared.uploaded)}, {rate}")
            return
        now = dataclasses.asdict(shared)
        self.machine.take(Seeding(self.port, self.pieces, self.size, **now))

    def end(self, uploaded: int, seconds: float) -> None:
        ratio = uploaded / self.size
        if self.machine is not None:
            self.machine.take(Ended(seconds, {"uploaded": uploaded, "ratio": round(ratio, 3)}))
            return
        _say(
            f"{self.store.root}: {bytes_text(uploaded)} uploaded in {seconds_text(seconds)}, "
            f"ratio {ratio:.2f}"
        )


def _follow(seeder: Seeder, look: Unchanged, goal: Goal, teller: _Teller) -> int:
    """Wait until the goal is reached or somebody presses Ctrl-C; returns the bytes sent."""
    start = time.monotonic()
    look_at, line_at = start + LOOK_INTERVAL_S, start + teller.interval_s
    try:
        teller.begin()
        while not goal.reached(seeder.uploaded() / teller.size, time.monotonic() - start):
            shared = seeder.wait()
            now = time.monotonic()
            if now >= look_at:
                look_at = now + LOOK_INTERVAL_S
                look.again()
            if now >= line_at:
                line_at = now + teller.interval_s
                teller.go_on(shared)
    except KeyboardInterrupt as error:
        honour(error)
    return seeder.uploaded()


class Unchanged:
    """The state of the files when their proofs were read.

    Args:
        store: with the lock held.
        torrent: the one in the store.
        layout: the torrent's.
    """

    def __init__(self, store: Store, torrent: TorrentFile, layout: Layout) -> None:
        self._store = store
        self._before = {file.path: store.stamp(file.path) for file in layout.payload}
        self.pieces = frozenset(Proofs(store, layout, torrent.info_hash).pieces)
        if not self.pieces:
            raise NotProven(
                "nothing is proven, and only proven pieces are shared",
                path=store.root,
                hint=f"run: grokfetch verify {store.root}",
            )

    def again(self) -> None:
        """Check that the files have not changed.

        Raises:
            NotProven: one has changed.
        """
        for path, before in self._before.items():
            if self._store.stamp(path) != before:
                raise NotProven(
                    "has changed since it was verified, and is no longer shared",
                    path=self._store.payload(path),
                    hint=f"run: grokfetch verify {self._store.root} --repair",
                )


def _say(text: str) -> None:
    click.echo(text, err=True)
