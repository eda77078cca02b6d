"""A small file whose size and sha256 are known beforehand, fetched over HTTP: the tokenizer."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from grokfetch.errors import StorageFailed, storage_errors
from grokfetch.events import Notice
from grokfetch.fetch.mirror.addresses import label, unusable
from grokfetch.fetch.mirror.answers import Failed, Faulty, Refused, Span
from grokfetch.fetch.mirror.state import MirrorSettings
from grokfetch.folder.atomic import put
from grokfetch.folder.payload import refuse_linked_folders
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import TokenizerSource
from grokfetch.torrent.read_back import sha256_of

__all__ = ["bring_tokenizer"]

LARGEST = 256 << 20
"""Bytes; a larger tokenizer is not fetched into memory."""

LONGEST_S = 300.0


def bring_tokenizer(store: Store, settings: MirrorSettings | None = None) -> Notice | None:
    """Fetch the tokenizer that the manifest in force names, unless the right one is there.

    It replaces the existing file atomically, and only if size and sha256 are the manifest's.
    Nothing of it is interpreted or executed.

    Args:
        store: the checkpoint folder.
        settings: patience and proxy.

    Returns:
        What happened; None if there was nothing to do.

    Raises:
        StateMissing: there is no manifest.
    """
    manifest = store.manifest()
    source = manifest.tokenizer
    if source is None or source.url is None or manifest.file(source.path) is not None:
        return None
    path = store.payload(source.path)
    if sha256_of(path, memoryview(bytearray(1 << 20))).sha256 == source.sha256:
        return None
    try:
        _bring(store, path, source, source.url, settings or MirrorSettings())
    except (StorageFailed, Refused, Faulty, Failed) as error:
        return Notice(f"the tokenizer could not be fetched from {label(source.url)}: {error}")
    return Notice(f"tokenizer fetched from {label(source.url)}, its sha256 matches the manifest")


def _bring(
    store: Store, path: Path, source: TokenizerSource, url: str, settings: MirrorSettings
) -> None:
    why = unusable(url, stranger=False)
    if why is not None or source.size > LARGEST:
        raise Refused(why or f"{source.size:,} bytes are too many")
    refuse_linked_folders(store, path)
    data = asyncio.run(_read(url, source.size, settings))
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise Refused(f"what is there has another sha256 than {source.sha256}")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, data)


async def _read(url: str, size: int, settings: MirrorSettings) -> bytes:
    from grokfetch.fetch.mirror.http import Http

    data = bytearray()
    try:
        async with (
            asyncio.timeout(LONGEST_S),
            Http(1, settings.patience_s, settings.proxy, settings.environment) as http,
            http.opened(settings.environment.at_hub(url), Span(0, size, size)) as chunks,
        ):
            async for chunk in chunks:
                data += chunk
                if len(data) > size:
                    break
    except TimeoutError:
        raise Failed(f"it did not come within {LONGEST_S:.0f} s") from None
    if len(data) != size:
        raise Refused(f"what is there does not have {size:,} bytes")
    return bytes(data)
