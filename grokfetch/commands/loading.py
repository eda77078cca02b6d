"""The options by which a person says how to hold a model, and how its loading is shown."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator
from typing import Any

import click

from grokfetch.commands.reporting import lines, reporter
from grokfetch.events import Loaded, LoadEvent
from grokfetch.units import bytes_text, parse_bytes, seconds_text
from loader.devices.arrangement import Dtype, Loading, Placement
from loader.weights.partition import MeshShape

__all__ = ["Loading", "loading_options", "loading_shown", "mesh_shape"]


class Size(click.ParamType):  # type: ignore[type-arg]
    """Bytes, with k, M, G or T for powers of 1000; an int."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number, at least 1."""
        size = parse_bytes(str(value)) or 0
        if size < 1:
            self.fail(f"{value!r:.40} is no number of bytes, such as 800M or 16G", param, ctx)
        return size


_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["bfloat16", "float32"]),
        default="bfloat16",
        show_default=True,
        help="Of activations and the KV cache; weights stay int8.",
    ),
    click.option(
        "--placement",
        type=click.Choice(["mapped", "sharded"]),
        help="mapped leaves the weights in their files, for CPUs and the default there; sharded "
        "copies them to the devices.",
    ),
    click.option(
        "--mesh",
        metavar="expert=N,model=M",
        help="Devices to use; all of them by default. data=N too makes copies of the weights, each "
        "for some of the texts of a batch.",
    ),
    click.option(
        "--memory",
        type=Size(),
        help="Bytes that mapped weights and all else may take, 16G say; what is free by default.",
    ),
)


def loading_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command these options; it receives them as one `Loading` named `loading`."""

    @functools.wraps(command)
    def wired(
        *args: Any,
        dtype: Dtype,
        placement: Placement | None,
        mesh: str | None,
        memory: int | None,
        **kwargs: Any,
    ) -> None:
        shape = None if mesh is None else mesh_shape(mesh)
        command(*args, loading=Loading(dtype, placement, shape, memory), **kwargs)

    for option in reversed(_OPTIONS):
        wired = option(wired)
    return wired


def mesh_shape(text: str) -> MeshShape:
    """The mesh that `--mesh` names.

    Raises:
        click.BadParameter: it names none.
    """
    counts = {"data": 1, "expert": 1, "model": 1}
    found = [re.fullmatch(r"(data|expert|model)=(\d+)", part) for part in text.split(",")]
    given = [(part[1], int(part[2])) for part in found if part is not None]
    if len(dict(given)) != len(found):
        raise click.BadParameter(f"not expert=N,model=M: {text!r:.80}", param_hint="--mesh")
    counts |= given
    return MeshShape(**counts)


@contextlib.contextmanager
def loading_shown() -> Iterator[Callable[[LoadEvent], None]]:
    """Show how a model is being loaded: a bar while it is copied, notices, and the time it took."""
    with reporter("load") as sink:

        def take(event: LoadEvent) -> None:
            if isinstance(event, Loaded) and lines() is None:
                sink.say(_loaded_text(event))
            else:
                sink.take(event)

        yield take


def _loaded_text(event: Loaded) -> str:
    copied = event.placement == "sharded"
    return (
        f"{'loaded' if copied else 'mapped'} {bytes_text(event.bytes)} "
        f"{'onto' if copied else 'for'} {event.devices} {event.platform} "
        f"{'device' if event.devices == 1 else 'devices'} in {seconds_text(event.seconds)}"
    )
