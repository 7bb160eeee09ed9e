"""The command that lists the models whose image tower can read run-length tokens."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from rlt_retrieval.cli.options import json_option
from rlt_retrieval.errors import ConfigError

if TYPE_CHECKING:
    from rlt_retrieval.encoders.towers.catalogue import ModelRow


@click.command()
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--all", "with_unsupported", is_flag=True, help="Unsupported ones too, with the reason.")
@json_option
def models(names: tuple[str, ...], with_unsupported: bool, as_json: bool) -> None:
    """List the open_clip models whose image tower can read run-length tokens.

    With NAMEs: those whose name contains one of them, supported or not. The tags are the published weights.

    \b
    rlt-retrieval models
    rlt-retrieval models SigLIP2 --json
    """
    from rlt_retrieval.encoders.towers.catalogue import list_models

    rows = [row for row in list_models(names) if row.supported or with_unsupported or names]
    if not rows:
        raise ConfigError(f"no model of open_clip has {' or '.join(names)} in its name; try models --all")
    print(json.dumps([asdict(row) for row in rows], indent=2) if as_json else _models_text(rows))


def _models_text(rows: Sequence[ModelRow]) -> str:
    """A line a model; its tags, or why it is not supported, last: they may be long."""
    cells = [["model", "parameters", "GFLOPs a frame", "input", "pretrained tags (licence)"]]
    for row in rows:
        parameters = (row.image_parameters or 0) + (row.text_parameters or 0)
        size = "x".join(map(str, row.image_size or ()))
        tags = [tag.name if tag.licence == "unknown" else f"{tag.name} ({tag.licence})" for tag in row.tags]
        text = " + text" if row.text_parameters is None else ""
        numbers = (
            [f"{parameters:,.0f} M{text}", f"{row.gflops or 0:,.1f}", size] if row.supported else ["–"] * 3
        )
        cells.append(
            [row.name, *numbers, ", ".join(tags) if row.supported else row.reason.partition(": ")[0]]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:]), last])
        for name, *numbers, last in cells
    ]
    return "\n".join([*lines, "No licence beside a tag: not known here, see its model card."])
