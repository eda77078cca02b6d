"""A click command whose help groups its options and ends with examples; not a command itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

__all__ = ["Explained"]

REST = "Other options"


class Explained(click.Command):
    """A click command with a longer help text.

    Args:
        examples: calls that can be copied, shown at the end.
        groups: for each title the parameters listed under it; all others come last.
        extra: what to do if there are more arguments than the command takes.
    """

    def __init__(
        self,
        *args: Any,
        examples: Sequence[str],
        groups: Mapping[str, Sequence[str]] | None = None,
        extra: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples = tuple(examples)
        self.groups = dict(groups or {})
        self.extra = extra

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The options under their titles."""
        title_of = {name: title for title, names in self.groups.items() for name in names}
        other = REST if self.groups else "Options"
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (*self.groups, other)}
        for parameter in self.get_params(ctx):
            # The text above explains the arguments; newer versions of click list them, too.
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                sections[title_of.get(parameter.name or "", other)].append(record)
        for title, records in sections.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """The examples."""
        with formatter.section("Examples"):
            for example in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{example}\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the arguments; for a common mistake, say what to do instead."""
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            if self.extra is not None and "unexpected extra argument" in error.message:
                raise click.UsageError(f"{error.message}; {self.extra}", ctx) from None
            raise
