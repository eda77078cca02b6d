"""`grokfetch run`: proven files become a model on the devices, a prompt becomes text."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from grokfetch.commands.reporting import json_option, lines, reporter
from grokfetch.commands.state_option import state_option
from grokfetch.errors import OutOfReach, TokenizerMissing
from grokfetch.events import Loaded
from grokfetch.progress import bytes_text, seconds_text

if TYPE_CHECKING:
    from grokfetch.manifest import TokenizerSource
    from grokfetch.progress import Lines
    from grokfetch.store import Store
    from loader.checkpoint import Checkpoint
    from loader.generate import Engine
    from loader.placement import Mesh, Params
    from loader.sharding import MeshShape
    from loader.tokenizer import Tokenizer

TOKENIZER = "tokenizer.model"
Dtype = Literal["bfloat16", "float32"]
Placement = Literal["mapped", "sharded"]


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("prompt", required=False)
@click.option("--tokens", metavar="IDS", help='Token ids as the prompt, "181 13 437"; prints ids.')
@click.option(
    "--tokenizer",
    type=click.Path(path_type=Path),
    help="SentencePiece model; the one beside the weights if not given.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 always takes the most probable token.",
)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(min=1))
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Of activations and the KV cache; weights stay int8.",
)
@click.option(
    "--placement",
    type=click.Choice(["mapped", "sharded"]),
    help="mapped leaves the weights in their files, for CPUs and the default there; sharded copies "
    "them to the devices.",
)
@click.option("--mesh", metavar="expert=N,model=M", help="Devices to use; all of them by default.")
@click.option(
    "--unproven", is_flag=True, help="Run files of the right form that no hash vouches for."
)
@state_option
@json_option
def run(
    folder: Path,
    prompt: str | None,
    tokens: str | None,
    tokenizer: Path | None,
    *,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int | None,
    seed: int,
    dtype: Dtype,
    placement: Placement | None,
    mesh: str | None,
    unproven: bool,
    state: Path | None,
) -> None:
    """Continue PROMPT with the model in DIR.

    The text goes to stdout as it is generated, timings go to stderr.
    """
    from grokfetch.store import Store
    from loader.checkpoint import open_checkpoint
    from loader.generate import Sampling, check_prompts

    if (prompt is None) == (tokens is None):
        raise click.UsageError("give either a PROMPT or --tokens")
    ids = None if tokens is None else _ids(tokens)
    shape = None if mesh is None else _mesh_shape(mesh)
    store = Store(folder, state)
    words = None if prompt is None else _tokenizer(store, tokenizer)
    if words is not None and prompt is not None:
        ids = words.encode(prompt)
    assert ids is not None
    with store.lock(exclusive=False):
        checkpoint = open_checkpoint(store, proven=not unproven)
        # What can be refused is refused before minutes are spent on loading.
        check_prompts(checkpoint.config, [ids])
        engine = load(checkpoint, dtype=dtype, placement=placement, shape=shape)
        sampling = Sampling(temperature, top_p, top_k, seed)
        machine = lines()
        if machine is not None:
            _events(machine, engine.generate(ids, max_tokens, sampling), words)
            return
        generated = _timed(engine.generate(ids, max_tokens, sampling))
        for text in _numbers(generated) if words is None else _texts(generated, words):
            click.echo(text, nl=False)
        click.echo()


def load(
    checkpoint: Checkpoint, *, dtype: Dtype, placement: Placement | None, shape: MeshShape | None
) -> Engine:
    """The weights where the devices have them, ready to generate; says how long it took.

    Raises:
        MeshInvalid: the devices cannot be arranged so.
        OutOfReach: weights that are to be copied take more memory than is free, or mapped weights
            are to be used by devices that are no CPUs.
    """
    from loader import placement as placing
    from loader.generate import Engine

    start = time.perf_counter()
    splits_experts = shape is not None and shape.expert > 1
    if placement == "mapped" or (placement is None and not splits_experts):
        placing.use_cores(checkpoint.config)
    mesh = placing.make_mesh(checkpoint.config, shape)
    kinds = {device.platform for device in mesh.devices.flat}
    platform = "/".join(sorted(kinds)).upper()
    if placement is None:
        placement = "sharded" if splits_experts or kinds != {"cpu"} else "mapped"
    if placement == "mapped" and kinds != {"cpu"}:
        raise OutOfReach(
            f"mapped weights are for CPUs, and the devices are {platform}",
            hint="use --placement sharded, or set JAX_PLATFORMS=cpu",
        )
    copied = placement == "sharded"
    params = _copy(checkpoint, mesh) if copied else placing.share(checkpoint, mesh)
    total = sum(tensor.nbytes for tensor in checkpoint.values())
    seconds = time.perf_counter() - start
    machine = lines()
    if machine is None:
        click.echo(
            f"{'loaded' if copied else 'mapped'} {bytes_text(total)} "
            f"{'onto' if copied else 'for'} {mesh.size} {platform} "
            f"{'device' if mesh.size == 1 else 'devices'} in {seconds_text(seconds)}",
            err=True,
        )
    else:
        machine.take(Loaded(total, mesh.size, platform, placement, round(seconds, 3)))
    return Engine(checkpoint.config, params, mesh, dtype)


def _copy(checkpoint: Checkpoint, mesh: Mesh) -> Params:
    """Every tensor on the devices, with a bar."""
    from grokfetch.verify import Progress
    from loader import placement

    total = sum(tensor.nbytes for tensor in checkpoint.values())
    if {device.platform for device in mesh.devices.flat} == {"cpu"}:
        _check_memory(total)
    done = 0
    with reporter("load") as sink:

        def count(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            sink.take(Progress(done, total, "loading"))

        return placement.load(checkpoint, mesh, on_bytes=count)


def _check_memory(total: int) -> None:
    """Refuse what the kernel would end without a word once the memory is full.

    Raises:
        OutOfReach: less than `total` bytes of memory are free.
    """
    import psutil

    free = psutil.virtual_memory().available
    if total > free:
        raise OutOfReach(
            f"the weights take {bytes_text(total)} of memory, {bytes_text(free)} are free",
            hint="leave them in their files: --placement mapped",
        )


def _events(machine: Lines, tokens: Iterator[int], words: Tokenizer | None) -> None:
    """Tell a machine each token as it comes, and at the end the text and the times."""
    from grokfetch.events import Ended, Token

    start = first = now = time.perf_counter()
    stream = None if words is None else words.stream()
    parts: list[str] = []
    count = 0
    for token in tokens:
        now = time.perf_counter()
        count += 1
        first = now if count == 1 else first
        text = None if stream is None else stream.push(token)
        parts.append(text or "")
        machine.take(Token(token, text))
    if stream is not None:
        parts.append(stream.finish())
    results: dict[str, object] = {
        "tokens": count,
        "text": None if stream is None else "".join(parts),
        "first_token_s": round(first - start, 3) if count else None,
        "tokens_per_s": round((count - 1) / (now - first), 3) if count > 1 else None,
    }
    machine.take(Ended(now - start, results))


def _timed(tokens: Iterator[int]) -> Iterator[int]:
    """The same tokens; says at the end how long the first took, and how many came a second."""
    start = first = time.perf_counter()
    count = 0
    for token in tokens:
        count += 1
        if count == 1:
            first = time.perf_counter()
        yield token
    now = time.perf_counter()
    click.echo(err=True)
    if count == 0:
        click.echo(f"end of sequence at once, after {seconds_text(now - start)}", err=True)
    elif count == 1:
        click.echo(f"1 token after {seconds_text(first - start)}", err=True)
    else:
        click.echo(
            f"first token after {seconds_text(first - start)}, "
            f"then {count - 1} at {(count - 1) / (now - first):.2f} tokens/s",
            err=True,
        )


def _numbers(tokens: Iterable[int]) -> Iterator[str]:
    for index, token in enumerate(tokens):
        yield f" {token}" if index else str(token)


def _texts(tokens: Iterable[int], words: Tokenizer) -> Iterator[str]:
    stream = words.stream()
    for token in tokens:
        yield stream.push(token)
    yield stream.finish()


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(f"not token ids: {text!r:.80}", param_hint="--tokens") from None


def _mesh_shape(text: str) -> MeshShape:
    from loader.sharding import MeshShape

    found = re.fullmatch(r"(?:expert=(\d+))?(?:,?model=(\d+))?", text)
    if not text or found is None:
        raise click.BadParameter(f"not expert=N,model=M: {text!r:.80}", param_hint="--mesh")
    expert, model = (int(digits or 1) for digits in found.groups())
    return MeshShape(expert, model)


def _tokenizer(store: Store, chosen: Path | None) -> Tokenizer:
    """The tokenizer a person chose, or the one beside the weights if it is the right one."""
    from loader.tokenizer import Tokenizer

    source = store.manifest().tokenizer
    if chosen is not None:
        if source is not None and _sha256(chosen) != source.sha256:
            click.echo(f"warning: {chosen} is not the tokenizer that the manifest names", err=True)
        return Tokenizer.load(chosen)
    beside = store.root / (TOKENIZER if source is None else source.path)
    if source is not None and beside.exists() and _sha256(beside) != source.sha256:
        raise TokenizerMissing(
            f"this is not the tokenizer of the model (its sha256 is not {source.sha256})",
            path=beside,
            hint=_where(source, store.root),
        )
    if not beside.exists():
        raise TokenizerMissing(
            "the tokenizer is not there", path=beside, hint=_where(source, store.root)
        )
    return Tokenizer.load(beside)


def _where(source: TokenizerSource | None, folder: Path) -> str:
    alternative = "or use --tokenizer FILE, or give token ids with --tokens"
    if source is None or source.url is None:
        return f"put it there, {alternative}"
    return (
        f"run: grokfetch fetch {folder}, which brings it from {source.url} "
        f"(sha256 {source.sha256}), {alternative}"
    )


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise TokenizerMissing(f"cannot be read: {error.strerror}", path=path) from error
