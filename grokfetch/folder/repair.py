"""Reads everything back, even what the record says is proven, and drops wrong proofs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from grokfetch.events import Finding, PiecesProven, Progress
from grokfetch.folder.ledger import Proofs
from grokfetch.folder.store import Store
from grokfetch.folder.verify import TensorIndex, corrupt
from grokfetch.torrent.layout import Layout
from grokfetch.torrent.read_back import (
    Hashers,
    PieceResult,
    check_pieces,
    in_batches,
    may_be_on_disk,
)

__all__ = ["read_again"]


def read_again(
    store: Store, layout: Layout, proofs: Proofs
) -> Iterator[Finding | PiecesProven | Progress]:
    """Prove every piece again, with the store's exclusive lock held.

    A piece keeps its proof until it reads wrong, so that an interruption costs none.

    Args:
        store: the checkpoint folder.
        layout: the torrent's.
        proofs: what was proven; afterwards, what is.

    Yields:
        Progress in bytes, pieces that are right, and a finding for each bad piece.

    Raises:
        StorageFailed: the record cannot be written.
    """
    tensors = TensorIndex(store.manifest())
    pieces = list(may_be_on_disk(store.root, layout, range(layout.piece_count)))
    proofs.remove(proofs.pieces.difference(pieces))
    proofs.forget_digests()
    total = sum(map(layout.piece_size, pieces))
    done = 0
    jobs = (
        partial(check_pieces, store.root, layout, batch) for batch in in_batches(layout, pieces)
    )
    try:
        with Hashers[list[PieceResult]]() as hashers:
            for results in hashers.run(jobs):
                for result in results:
                    done += layout.piece_size(result.piece)
                    if result.verdict == "good":
                        proofs.add(result.piece)
                    else:
                        proofs.remove([result.piece])
                        yield from corrupt(layout, result, tensors)
                yield PiecesProven(tuple(r.piece for r in results if r.verdict == "good"))
                yield Progress(done, total)
    finally:
        proofs.save()
