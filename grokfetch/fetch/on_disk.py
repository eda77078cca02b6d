"""What a fetch reads from the disk on its own: pieces at the start, digests at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from functools import partial

from grokfetch.errors import Contradiction
from grokfetch.events import FetchEvent, Finding, PiecesProven, Status
from grokfetch.fetch.demand import Demand
from grokfetch.fetch.standing import Standing
from grokfetch.folder.ledger import Saver
from grokfetch.folder.repair import read_again
from grokfetch.folder.verify import hash_files
from grokfetch.manifest.schema import ManifestFile
from grokfetch.torrent.read_back import (
    Hashers,
    PieceResult,
    check_pieces,
    in_batches,
    may_be_on_disk,
)

__all__ = ["check_digests", "doubt_all", "find_pieces"]


def doubt_all(standing: Standing) -> Iterator[FetchEvent]:
    """Read back everything that may be there, proven before or not."""
    plan = standing.plan
    for event in read_again(plan.store, plan.layout, standing.proofs):
        if isinstance(event, Finding | PiecesProven):
            yield event
        else:
            yield Status("checking", event.done, event.total)


def find_pieces(standing: Standing, saver: Saver) -> Iterator[FetchEvent]:
    """Read back what is asked for, is not proven, and may be on the disk already."""
    plan = standing.plan
    root, layout = plan.store.root, plan.layout
    pieces = list(may_be_on_disk(root, layout, standing.missing))
    total, read = plan.weight(pieces), 0
    with Hashers[list[PieceResult]]() as hashers:
        batches = in_batches(layout, _urgent_first(standing.demand, pieces))
        for results in hashers.run(partial(check_pieces, root, layout, b) for b in batches):
            for result in results:
                standing.rehashed += 1
                read += plan.weights[result.piece]
                standing.count(result)
            yield PiecesProven(tuple(r.piece for r in results if r.verdict == "good"))
            saver.turn()
            yield dataclasses.replace(standing.status("checking"), done=read, total=total)


def _urgent_first(demand: Demand, pieces: Iterable[int]) -> Iterator[int]:
    """The pieces in order, except that pieces that a reader waits for come next."""
    left = dict.fromkeys(pieces)
    version = -1
    while left:
        if demand.version != version:
            version = demand.version
            urgent = [piece for piece in demand.waited if piece in left]
            order = iter((*urgent, *left))
        piece = next(order)
        if piece in left:
            del left[piece]
            yield piece


def check_digests(standing: Standing) -> Iterator[FetchEvent]:
    """Hash whole files where the manifest's sha256 decides, not the torrent.

    Raises:
        Contradiction: a file matches the torrent but has another sha256.
    """
    store, proofs = standing.plan.store, standing.proofs
    asked = store.asked()
    files = [
        file
        for file in store.manifest().files
        if not store.pieces_speak_for(file.path)
        and (asked is None or file.path in asked)
        and proofs.sha256(file.path) != file.sha256
    ]
    total, read = sum(file.size for file in files), 0
    wrong: list[ManifestFile] = []
    for file, stamp, result in hash_files(store, files):
        read += file.size
        if stamp and result.sha256 and result.sha256 == file.sha256:
            proofs.add_file(file.path, stamp, result.sha256)
        else:
            wrong.append(file)
        yield dataclasses.replace(standing.status("hashing"), done=read, total=total)
    if wrong:
        proofs.end_writing()
        raise Contradiction(
            f"{wrong[0].path} is as the torrent has it, but not the file whose sha256 the "
            f"manifest gives ({len(wrong)} such files)",
            path=store.root,
        )
