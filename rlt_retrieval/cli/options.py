"""Options that several commands share, and what commands make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rlt_retrieval.embed import LoaderOptions
    from rlt_retrieval.model import VideoTextModel

EXIT_ERROR, EXIT_SKIPPED, EXIT_INTERRUPTED = 1, 3, 130  # click's own for wrong usage: 2
WITH_WEIGHTS = ("hf-hub:", "local-dir:")  # backbones that bring their own

device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
model_path_option = click.option(
    "--model", "model_path", help="A trained model: a run folder, or its model folder."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
threads_option = click.option(
    "--threads",
    type=click.IntRange(1),
    help="Threads that compute on a CPU. [default: OMP_NUM_THREADS, else all cores (train: those that workers leave)]",
)
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done, and do nothing.")


def loader_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that decode videos."""
    command = click.option(
        "--decode-timeout-seconds",
        type=click.FloatRange(0, 86400, min_open=True),
        default=60.0,
        show_default=True,
        help="Longest wait for one clip; then its file counts as broken.",
    )(command)
    return click.option(
        "--workers", type=click.IntRange(0), help="Decoding processes. [default: a quarter of the cores]"
    )(command)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of commands that take a trained model or stock weights; see `model_maker`."""
    for option in (
        click.option(
            "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Video setting, e.g. num_frames=8."
        ),
        click.option("--pretrained", help="open_clip tag, weight file, or none (random). [default: openai]"),
        click.option("--backbone", help="open_clip model name. [default: ViT-B-16]"),
        model_path_option,
    ):
        command = option(command)
    return command


def model_maker(
    model_path: str | None,
    backbone: str | None,
    pretrained: str | None,
    overrides: Sequence[str],
    device: str,
) -> Callable[[], VideoTextModel] | None:
    """How to make the model that was asked for; None where nothing was asked (the index's own, else stock)."""
    if model_path and (backbone or pretrained):
        raise click.UsageError("--model excludes --backbone and --pretrained")
    if backbone and not pretrained and not backbone.startswith(WITH_WEIGHTS):
        raise click.UsageError(
            f"--backbone {backbone} needs --pretrained: a tag, a weight file, or none (random)"
        )
    if not (model_path or backbone or pretrained or overrides):
        return None

    def make() -> VideoTextModel:
        from rlt_retrieval.config import parse_video_settings
        from rlt_retrieval.model import VideoTextModel
        from rlt_retrieval.video_index import STOCK

        if model_path:
            return load_model(model_path, overrides, device)
        weights = None if pretrained == "none" else pretrained or STOCK[1]
        settings = parse_video_settings(overrides)
        return VideoTextModel.create(backbone or STOCK[0], weights, device=device, **settings)

    return make


def load_model(model_path: str, overrides: Sequence[str], device: str) -> VideoTextModel:
    """A trained model, with its own settings but for what --set changes."""
    from rlt_retrieval.config import parse_overrides
    from rlt_retrieval.model import VideoTextModel

    model = VideoTextModel.load(model_path, device=device)
    return model.with_settings(**parse_overrides(overrides)) if overrides else model


def to_loader_options(
    workers: int | None,
    decode_timeout_seconds: float,
    max_bad_fraction: float = 0.1,
    threads: int | None = None,
) -> LoaderOptions:
    """What `loader_options` and `threads_option` asked for."""
    from rlt_retrieval.embed import LoaderOptions

    return LoaderOptions(
        to_num_workers(workers), decode_timeout_seconds, max_bad_fraction, num_threads=threads
    )


def to_num_workers(workers: int | None) -> int:
    """The number that --workers gives, or else its default."""
    from rlt_retrieval.config import default_num_workers

    return default_num_workers() if workers is None else workers


def finish(skipped: object) -> None:
    """End a command: with its own exit code where some inputs were skipped."""
    click.get_current_context().exit(EXIT_SKIPPED if skipped else 0)
