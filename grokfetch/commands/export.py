"""`grokfetch export`: proven weights in the file format of another engine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from grokfetch import __version__
from grokfetch.commands.help import Explained
from grokfetch.commands.options import (
    NETWORK_NAMES,
    json_option,
    plain_option,
    state_option,
    tokenizer_option,
)
from grokfetch.commands.streaming import Meanwhile, meanwhile_options, reading
from grokfetch.commands.tokenizer import find_tokenizer
from grokfetch.commands.value_types import Size
from grokfetch.errors import Damaged, StorageFailed, storage_failed
from grokfetch.events import Event, Finding
from grokfetch.fetch.preflight import Check, checks, nearest, need, probe
from grokfetch.fetch.waiting_store import Arriving
from grokfetch.folder.store import Store
from grokfetch.manifest.schema import Manifest, ManifestFile, encode
from grokfetch.output.reporting import ended, held, lines, notice, reporter
from grokfetch.units import bytes_text, seconds_text

if TYPE_CHECKING:
    from loader.export.layout import Origin, Plan
    from loader.export.matrices import ElementType
    from loader.export.safetensors import Names
    from loader.export.writing import Export
    from loader.weights.checkpoint import Checkpoint

TYPES: dict[str, ElementType] = {"q8_0": "Q8_0", "bf16": "BF16", "f16": "F16", "f32": "F32"}


@click.command(
    cls=Explained,
    examples=(
        "grokfetch export /data/grok-1 /data/grok-1-gguf --split 48G --dry-run",
        "grokfetch export grok-1-Q8_0.gguf /data/grok-1 --format shards",
    ),
    groups={
        "What to write": (
            *("form", "kind", "names", "split", "pad", "dry_run", "tokenizer", "unproven"),
        ),
        "Fetching at the same time": ("while_fetching", "source", "up", "down", *NETWORK_NAMES),
        "Output and state": ("json", "plain", "state"),
    },
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("out", metavar="OUT", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "form",
    type=click.Choice(["gguf", "safetensors", "shards"]),
    default="gguf",
    show_default=True,
    help="gguf for llama.cpp, safetensors for vLLM and SGLang; shards turns a GGUF of type q8_0, "
    "given as DIR, back into the official files.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(list(TYPES)),
    help="Type of the weights; default q8_0 for gguf, and bf16, the only one, for safetensors. "
    "q8_0 keeps int8 and scales as they are, f32 and bf16 hold their products, f16 rounds them.",
)
@click.option(
    "--names",
    type=click.Choice(["vllm", "sglang"]),
    help="Whose tensor names safetensors uses; vllm by default.",
)
@click.option(
    "--split",
    type=Size(),
    help="Start a new file after this many bytes, such as 48G; by default a GGUF is one file, and "
    "safetensors files have 5G each.",
)
@click.option(
    "--pad",
    is_flag=True,
    help="Pad a small model with zeros to a shape that llama.cpp loads and q8_0 can hold; its "
    "results stay the same.",
)
@click.option("--dry-run", is_flag=True, help="List files and sizes without writing anything.")
@tokenizer_option
@click.option(
    "--unproven", is_flag=True, help="Export files in the right format that no hash has verified."
)
@meanwhile_options
@plain_option
@state_option
@json_option
def export(
    folder: Path,
    out: Path,
    *,
    form: str,
    kind: str | None,
    names: Names | None,
    split: int | None,
    pad: bool,
    dry_run: bool,
    tokenizer: Path | None,
    unproven: bool,
    meanwhile: Meanwhile | None,
    state: Path | None,
) -> None:
    """Write the proven weights in DIR to the folder OUT in the format of another engine.

    Or the reverse: rebuild the official shards from a GGUF, byte for byte.

    If an export is interrupted, the same command continues it. The files get their final names
    when all are complete. Afterwards verify and publish work on OUT.
    """
    _refuse_together(out, form, kind, names, pad=pad)
    if meanwhile is not None and (form == "shards" or pad or dry_run or unproven):
        raise click.UsageError(
            "--while-fetching cannot be combined with --format shards, --pad, --dry-run or "
            "--unproven"
        )
    if meanwhile is None and not folder.exists():
        raise click.UsageError(f"{folder} does not exist")
    start = time.perf_counter()
    if form == "shards":
        _shards(folder, out, start, dry_run=dry_run)
        return
    if folder.is_file():
        raise click.UsageError(
            f"{folder} is a file; to turn a GGUF back into shards: --format shards"
        )
    with reading(folder, state, meanwhile) as store, contextlib.ExitStack() as meantime:
        if form == "safetensors":
            plan = _as_safetensors(store, names or "vllm", split, tokenizer)
        else:
            plan = _as_gguf(store, kind or "q8_0", split, tokenizer, pad=pad)
        if dry_run:
            _list(plan, out, time.perf_counter() - start)
            return
        checkpoint = _checkpoint(
            store, proven=not unproven, as_they_are=form == "gguf" and kind in (None, "q8_0")
        )
        if pad:
            checkpoint = _padded(checkpoint, meantime)
        text, kept = _write(plan, checkpoint, store, Store(out))
    # A concurrent fetch has ended by now.
    seconds = time.perf_counter() - start
    ended(
        f"{text} in {seconds_text(seconds)}",
        seconds,
        folder=str(out),
        files=[file.name for file in plan.files],
        bytes=plan.size,
        tensors=len(plan.parts),
        kept=kept,
    )


def _refuse_together(
    out: Path, form: str, kind: str | None, names: Names | None, *, pad: bool
) -> None:
    """Refuse options that cannot be combined.

    Raises:
        UsageError: they cannot.
    """
    if out.suffix == ".gguf":
        raise click.UsageError(f"OUT is a folder, in which the file is named: try {out.stem}")
    if names is not None and form != "safetensors":
        raise click.UsageError("--names requires --format safetensors")
    if form == "safetensors" and kind not in (None, "bf16"):
        raise click.UsageError("safetensors is written as bf16 only")
    if pad and form != "gguf":
        raise click.UsageError("--pad requires --format gguf")


def _checkpoint(store: Store, *, proven: bool, as_they_are: bool) -> Checkpoint:
    """The weights, which may still be arriving.

    Args:
        store: their folder.
        proven: whether they must be proven.
        as_they_are: refuse scales that Q8_0 cannot hold, unless the weights are still arriving.
    """
    from loader.export.writing import check_scales
    from loader.weights.checkpoint import expect_checkpoint, open_checkpoint

    if isinstance(store, Arriving):
        return expect_checkpoint(store, by_parts=True)
    checkpoint = open_checkpoint(store, proven=proven)
    if as_they_are:
        check_scales(checkpoint)
    return checkpoint


def _padded(checkpoint: Checkpoint, meantime: contextlib.ExitStack) -> Checkpoint:
    """The same model in its padded shape, in a temporary folder."""
    from loader.export.padding import write_padded

    try:
        folder = meantime.enter_context(tempfile.TemporaryDirectory(prefix="grokfetch-export-"))
        return write_padded(checkpoint, Path(folder))
    except OSError as error:
        raise storage_failed(error, Path(tempfile.gettempdir())) from error


def _origin(store: Store) -> Origin:
    from loader.export.layout import Origin

    manifest = store.manifest()
    return Origin(
        manifest.name,
        manifest.info_hash,
        hashlib.sha256(encode(manifest)).hexdigest(),
        __version__,
        manifest.licence,
    )


def _as_gguf(
    store: Store, kind: str, split: int | None, tokenizer: Path | None, *, pad: bool
) -> Plan:
    from loader.export.layout import gguf_plan
    from loader.export.padding import padded_config
    from loader.weights.checkpoint import model_of

    config = padded_config(model_of(store)) if pad else model_of(store)
    if config.num_q_heads * config.key_size != config.emb_size:
        notice(
            "note: llama.cpp cannot load this model, because its heads times its head size are "
            "not its width; --pad makes it loadable"
        )
    vocabulary = tuple(find_tokenizer(store, tokenizer).entries())
    return gguf_plan(config, vocabulary, _origin(store), TYPES[kind], split)


def _as_safetensors(store: Store, names: Names, split: int | None, tokenizer: Path | None) -> Plan:
    from loader.export.safetensors import SPLIT, safetensors_plan
    from loader.inference.tokenizer import USUAL_NAME
    from loader.weights.checkpoint import model_of

    config = model_of(store)
    # Raises if anything is wrong with the tokenizer.
    find_tokenizer(store, tokenizer)
    source = store.manifest().tokenizer
    path = tokenizer or store.root / (USUAL_NAME if source is None else source.path)
    return safetensors_plan(config, path.read_bytes(), _origin(store), names, split or SPLIT)


def _shards(folder: Path, out: Path, start: float, *, dry_run: bool) -> None:
    """Rebuild the official shards from a GGUF."""
    from loader.export.checksums import read_back
    from loader.export.restoring import FOLDER, open_exported, write_shards
    from loader.weights.inventory import expected

    if folder.is_dir():
        raise click.UsageError(f"{folder} is a folder; --format shards takes a GGUF file")
    exported = open_exported(folder)
    files, tensors = expected(exported.config, FOLDER)
    sizes = [(file.path, file.size) for file in files]
    described = Manifest("", files, tensors=tensors, model=exported.config.to_mapping())
    if not dry_run:
        _require_room(out, sizes)
        target = Store(out)
        with held(target, exclusive=True):
            with reporter("export") as sink:
                for event in write_shards(exported, target):
                    sink.take(event)
            _read_back(target, described, partial(read_back, target, written={}))
    seconds = time.perf_counter() - start
    ended(
        f"{out / FOLDER}: {len(files)} shards, {bytes_text(described.size)}"
        + ("" if dry_run else f" in {seconds_text(seconds)}"),
        seconds,
        folder=str(out),
        files=len(files),
        bytes=described.size,
    )


def _read_back(
    target: Store, described: Manifest, read_back: Callable[[Manifest], Iterable[Event]]
) -> bool:
    """Read the written files back from the disk and hash them; from then on they are proven.

    Returns:
        Whether all of them are as they were written; if not, nothing is proven.
    """
    described = dataclasses.replace(
        described,
        name=target.root.resolve().name,
        measured=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
    )
    with reporter("hash") as sink:
        findings = 0
        for event in read_back(described):
            sink.take(event)
            findings += isinstance(event, Finding)
    return not findings


def _list(plan: Plan, out: Path, seconds: float) -> None:
    """Print what would be written, and whether the disk has room."""
    failed = _lacking(out, [(PurePosixPath(file.name), file.size) for file in plan.files])
    rows = [f"{out / file.name}  {file.size:,}" for file in plan.files]
    rows.append(f"{len(plan.parts)} tensors, {bytes_text(plan.size)}")
    ended(
        "\n".join([*rows, *(f"not possible: {it.what}" for it in failed)]),
        seconds,
        files={file.name: file.size for file in plan.files},
        bytes=plan.size,
        possible=not failed,
    )


def _lacking(out: Path, files: list[tuple[PurePosixPath, int]], coming: int = 0) -> list[Check]:
    """The checks of the disk of OUT that fail for files, given by path below OUT and size in bytes.

    `coming` is the number of bytes that a fetch will still write to the same disk.
    """
    needed = need(out, files)
    needed = dataclasses.replace(needed, bytes=needed.bytes + coming)
    return [check for check in checks(needed, probe(out, needed.longest)) if not check.ok]


def _require_room(out: Path, files: list[tuple[PurePosixPath, int]], coming: int = 0) -> None:
    """Refuse to start an export that cannot finish.

    Raises:
        StorageFailed: says what is missing.
    """
    for check in _lacking(out, files, coming):
        raise StorageFailed(
            check.what, path=out, hint="make room, or choose an OUT on another disk"
        )


def _coming(store: Store, out: Path) -> int:
    """The bytes that a concurrent fetch will still write to the disk of the export."""
    if not isinstance(store, Arriving):
        return 0
    if nearest(store.root).stat().st_dev != nearest(out).stat().st_dev:
        return 0
    return need(store.root, ((file.path, file.size) for file in store.manifest().files)).bytes


def _write(plan: Plan, checkpoint: Checkpoint, store: Store, target: Store) -> tuple[str, int]:
    """Write and hash what is missing; returns a message, and how many tensors were there before."""
    from loader.export.writing import Export

    names = ", ".join(file.name for file in plan.files[:2])
    names += ", ..." if len(plan.files) > 2 else ""
    with held(target, exclusive=True):
        job = Export(plan, checkpoint, target)
        kept = job.kept
        if job.whole:
            return f"{target.root / names}: already complete, nothing was written", kept
        _require_room(target.root, job.missing, _coming(store, target.root))
        files = (ManifestFile(PurePosixPath(file.name), file.size) for file in plan.files)
        described = Manifest("", tuple(files), licence=store.manifest().licence)
        _write_missing(job, store)
        if not _read_back(target, described, job.read_back):
            notice("note: what does not read back as it was written is written again")
            _write_missing(job, store)
            if not _read_back(target, described, job.read_back):
                raise Damaged(
                    "the disk does not give back what was written, nor when it is written again",
                    path=target.root,
                    hint="check the disk and the memory, or choose an OUT on another disk; the "
                    "same command writes again what is wrong",
                )
    text = f"{target.root / names}: {len(plan.parts)} tensors, {bytes_text(plan.size)}"
    return text + (f", {kept} of them written before" if kept else ""), kept


def _write_missing(job: Export, store: Store) -> None:
    with reporter("export") as sink:
        for event in job.write():
            # A terminal has one last line; it shows the slower of the two.
            if lines() or not isinstance(store, Arriving) or store.over:
                sink.take(event)
