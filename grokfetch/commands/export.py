"""`grokfetch export`: proven weights in the file format of another engine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime as dt
import hashlib
import tempfile
import time
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
from grokfetch.errors import StorageFailed, storage_failed
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
    from loader.weights.checkpoint import Checkpoint

TYPES: dict[str, ElementType] = {"q8_0": "Q8_0", "bf16": "BF16", "f16": "F16", "f32": "F32"}


@click.command(
    cls=Explained,
    examples=(
        "grokfetch export /data/grok-1 /data/grok-1-gguf --split 48G --dry-run",
        "grokfetch export grok-1-Q8_0.gguf /data/grok-1 --format shards",
    ),
    groups={
        "What": ("form", "kind", "names", "split", "pad", "dry_run", "tokenizer", "unproven"),
        "Fetching at the same time": ("while_fetching", "source", "up", "down", *NETWORK_NAMES),
        "For machines and screens": ("json", "plain", "state"),
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
    help="gguf is what llama.cpp reads, safetensors what vLLM and SGLang do, shards are the "
    "official files again, DIR being a GGUF of type q8_0.",
)
@click.option(
    "--type",
    "kind",
    type=click.Choice(list(TYPES)),
    help="Of the weights; q8_0 for gguf, and bf16 for safetensors, which has no other. q8_0 keeps "
    "int8 and scales as they are, f32 and bf16 are what they stand for, f16 rounds.",
)
@click.option(
    "--names",
    type=click.Choice(["vllm", "sglang"]),
    help="Whose names safetensors has; vllm by default.",
)
@click.option(
    "--split",
    type=Size(),
    help="Begin another file after so many bytes, 48G say; one file by default, of safetensors 5G "
    "each.",
)
@click.option(
    "--pad",
    is_flag=True,
    help="Fill a small model up with zeros to a shape that llama.cpp loads and q8_0 can hold; what "
    "it computes stays the same.",
)
@click.option("--dry-run", is_flag=True, help="List files and sizes, and write nothing.")
@tokenizer_option
@click.option(
    "--unproven", is_flag=True, help="Export files of the right form that no hash vouches for."
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
    """Write the weights in DIR, all of them proven, into the folder OUT for another engine.

    Or the other way: write the official shards again from a GGUF, byte for byte.

    Whatever ends an export, the same command goes on with what is missing. The files get their
    names when all are whole. Afterwards verify and publish work on OUT.
    """
    _refuse_together(out, form, kind, names, pad=pad)
    if meanwhile is not None and (form == "shards" or pad or dry_run or unproven):
        raise click.UsageError(
            "--while-fetching goes without --format shards, --pad, --dry-run and --unproven"
        )
    if meanwhile is None and not folder.exists():
        raise click.UsageError(f"{folder} is not there")
    start = time.perf_counter()
    if form == "shards":
        _shards(folder, out, start, dry_run=dry_run)
        return
    if folder.is_file():
        raise click.UsageError(f"{folder} is a file; a GGUF is turned back by --format shards")
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
    # A fetch beside it has ended by now.
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
    """Refuse options that do not go together.

    Raises:
        UsageError: they do not.
    """
    if out.suffix == ".gguf":
        raise click.UsageError(f"OUT is a folder, and the file in it gets a name: try {out.stem}")
    if names is not None and form != "safetensors":
        raise click.UsageError("--names goes with --format safetensors")
    if form == "safetensors" and kind not in (None, "bf16"):
        raise click.UsageError("safetensors is written as bf16 only")
    if pad and form != "gguf":
        raise click.UsageError("--pad goes with --format gguf")


def _checkpoint(store: Store, *, proven: bool, as_they_are: bool) -> Checkpoint:
    """The weights, which may still be on their way.

    Args:
        store: their folder.
        proven: whether they must be.
        as_they_are: refuse scales that Q8_0 cannot hold, as far as they are there.
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
            "note: llama.cpp loads only models whose heads times head size are the width; --pad "
            "makes this one so"
        )
    vocabulary = tuple(find_tokenizer(store, tokenizer).entries())
    return gguf_plan(config, vocabulary, _origin(store), TYPES[kind], split)


def _as_safetensors(store: Store, names: Names, split: int | None, tokenizer: Path | None) -> Plan:
    from loader.export.safetensors import SPLIT, safetensors_plan
    from loader.inference.tokenizer import USUAL_NAME
    from loader.weights.checkpoint import model_of

    config = model_of(store)
    # Says what is wrong with the tokenizer, if anything is.
    find_tokenizer(store, tokenizer)
    source = store.manifest().tokenizer
    path = tokenizer or store.root / (USUAL_NAME if source is None else source.path)
    return safetensors_plan(config, path.read_bytes(), _origin(store), names, split or SPLIT)


def _shards(folder: Path, out: Path, start: float, *, dry_run: bool) -> None:
    """Write the official shards again from a GGUF."""
    from loader.export.restoring import FOLDER, open_exported, write_shards
    from loader.weights.inventory import expected

    if folder.is_dir():
        raise click.UsageError(f"{folder} is a folder: --format shards takes a GGUF file")
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
            _read_back(target, described)
    seconds = time.perf_counter() - start
    ended(
        f"{out / FOLDER}: {len(files)} shards, {bytes_text(described.size)}"
        + ("" if dry_run else f" in {seconds_text(seconds)}"),
        seconds,
        folder=str(out),
        files=len(files),
        bytes=described.size,
    )


def _read_back(target: Store, described: Manifest) -> None:
    """Hash what was written as it stands on the disk; from then on it is proven."""
    from loader.export.writing import read_back

    described = dataclasses.replace(
        described,
        name=target.root.resolve().name,
        measured=f"{dt.datetime.now(dt.UTC):%Y-%m-%d}",
    )
    with reporter("hash") as sink:
        for event in read_back(target, described):
            sink.take(event)


def _list(plan: Plan, out: Path, seconds: float) -> None:
    """Say what would be written, and whether the disk has room."""
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
    """What the place of OUT lacks for files, path below it and size in bytes.

    `coming` are bytes that a fetch still writes to the same disk.
    """
    needed = need(out, files)
    needed = dataclasses.replace(needed, bytes=needed.bytes + coming)
    return [check for check in checks(needed, probe(out, needed.longest)) if not check.ok]


def _require_room(out: Path, files: list[tuple[PurePosixPath, int]], coming: int = 0) -> None:
    """Refuse to begin what cannot end.

    Raises:
        StorageFailed: says what is short.
    """
    for check in _lacking(out, files, coming):
        raise StorageFailed(
            check.what, path=out, hint="make room, or choose an OUT on another disk"
        )


def _coming(store: Store, out: Path) -> int:
    """The bytes that a fetch beside the export still writes to its disk."""
    if not isinstance(store, Arriving):
        return 0
    if nearest(store.root).stat().st_dev != nearest(out).stat().st_dev:
        return 0
    return need(store.root, ((file.path, file.size) for file in store.manifest().files)).bytes


def _write(plan: Plan, checkpoint: Checkpoint, store: Store, target: Store) -> tuple[str, int]:
    """Write what is missing, and hash it; what to tell of it, and tensors written before."""
    from loader.export.writing import Export

    names = ", ".join(file.name for file in plan.files[:2])
    names += ", ..." if len(plan.files) > 2 else ""
    with held(target, exclusive=True):
        job = Export(plan, checkpoint, target)
        kept = job.kept
        if job.whole:
            return f"{target.root / names}: whole already, nothing was written", kept
        _require_room(target.root, job.missing, _coming(store, target.root))
        with reporter("export") as sink:
            for event in job.write():
                # A terminal has one last line, and the slower of the two is drawn in it.
                if lines() or not isinstance(store, Arriving) or store.over:
                    sink.take(event)
        files = (ManifestFile(PurePosixPath(file.name), file.size) for file in plan.files)
        _read_back(target, Manifest("", tuple(files), licence=store.manifest().licence))
    text = f"{target.root / names}: {len(plan.parts)} tensors, {bytes_text(plan.size)}"
    return text + (f", {kept} of them written before" if kept else ""), kept
