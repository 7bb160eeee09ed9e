"""The loop: every step logged once, stopped and started again without a trace, errors in one line."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_ek100 import made_classes, write_dataset
from signals import default_ctrl_c
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlt_retrieval import cli
from rlt_retrieval.config import Recipe
from rlt_retrieval.data.loading import NO_CLASSES, TrainBatch
from rlt_retrieval.errors import CheckpointError, RetrievalError, ShardError, TrainingError
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training import loop, run_folder
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.loop import build_optimizer, create_model, train, train_step
from rlt_retrieval.training.losses import build_loss

MakeRecipe = Callable[..., Recipe]
ROOT = Path(__file__).resolve().parents[2]


def read_lines(recipe: Recipe) -> list[dict[str, Any]]:
    text = (Path(recipe.run_dir) / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def read_weights(recipe: Recipe) -> dict[str, torch.Tensor]:
    return dict(VideoTextModel.load(Path(recipe.run_dir), device="cpu").state_dict())


def checkpoints(recipe: Recipe) -> list[str]:
    return sorted(path.name for path in (Path(recipe.run_dir) / "checkpoints").glob("*"))


@pytest.fixture(scope="module")
def whole_run(
    make_recipe_in: MakeRecipe, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Recipe:
    """A run that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = make_recipe_in(folder, data={"eval": [str(tiny_data / "test")]}, eval_every=4)
    train(recipe, device="cpu")
    return recipe


# --- what a run leaves --------------------------------------------------------------------------------------


def test_every_step_is_logged_once_with_its_evaluation(whole_run: Recipe) -> None:
    lines = read_lines(whole_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ["eval" in line for line in lines] == [False, False, False, True, False, True]
    assert lines[3]["eval"]["num_videos"] == 5
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert all(0 < line["keep_ratio"] < 1 and line["grad_norm"] > 0 for line in lines)
    assert checkpoints(whole_run) == ["step-00000004", "step-00000006"]
    assert not list(Path(whole_run.run_dir).rglob("*.pt"))


def test_tensorboard_has_every_step(whole_run: Recipe) -> None:
    """Its writer thread keeps events back for two minutes: without closing it, a short run leaves nothing."""
    board = EventAccumulator(str(Path(whole_run.run_dir) / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("eval/text_to_video/recall@1")] == [4, 6]
    assert [e.value for e in board.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in read_lines(whole_run)]
    )


def test_final_model_loads_alone_and_gives_the_logged_evaluation(whole_run: Recipe) -> None:
    from rlt_retrieval.embed import LoaderOptions, evaluate_shards

    model = VideoTextModel.load(Path(whole_run.run_dir) / "model", device="cpu")
    scores = evaluate_shards(model, whole_run.data.eval, LoaderOptions(num_workers=0)).to_dict()
    assert scores["text_to_video"] == read_lines(whole_run)[-1]["eval"]["text_to_video"]


def test_run_again_when_finished_changes_nothing(whole_run: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    def contents() -> dict[str, bytes]:
        files = (path for path in sorted(Path(whole_run.run_dir).rglob("*")) if path.is_file())
        return {str(path): path.read_bytes() for path in files}

    before = contents()
    with caplog.at_level("INFO", logger="rlt_retrieval"):
        result = train(whole_run, device="cpu")
    assert "all 6 steps are done" in caplog.text
    assert contents() == before
    assert result.last == read_lines(whole_run)[-1]


def test_seed_decides_everything(make_recipe: MakeRecipe) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        recipe = make_recipe(name, seed=seed, optim={"steps": 2})
        train(recipe, device="cpu")
        losses.append([line["loss"] for line in read_lines(recipe)])
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    "video",
    [
        {"reducer": "rlt"},
        {"reducer": "motion"},
        {"reducer": "tome", "keep_ratio": 0.6},
        {"reducer": "rlt+tome", "keep_ratio": 0.6},
    ],
)
def test_stock_layout_learns_in_micro_batches(make_recipe: MakeRecipe, video: dict[str, Any]) -> None:
    """Layout "frame", also with merging inside the network: gradient caching replays the same choices."""
    frame = {"layout": "frame", "patch_dropout": 0.0, **video}
    recipes = [
        make_recipe(name, video=frame, optim={"steps": 10, "token_budget": budget})
        for name, budget in (("many", 60), ("one", 10**6))
    ]
    losses = []
    for recipe in recipes:
        train(recipe, device="cpu")
        losses.append([line["loss"] for line in read_lines(recipe)])
    assert losses[0] == pytest.approx(losses[1], rel=0, abs=1e-4)
    assert sum(losses[0][-3:]) < sum(losses[0][:3])


@pytest.mark.parametrize("loss", ["sms", "adaptive_mi_mm", "mi_mm", "clip"])
def test_relevancy_aware_run_learns_and_can_be_stopped(
    make_recipe: MakeRecipe, tiny_ek100: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """The sentences drawn depend on seed, epoch and clip alone: the losses go on as if never stopped."""
    changes = {
        "data": {"train": [str(tiny_ek100)]},
        "optim": {"loss": loss, "steps": 12, "freeze_logit_scale": True, "max_grad_norm": math.inf},
    }
    whole, stopped = make_recipe("whole", **changes), make_recipe("stopped", **changes)
    train(whole, device="cpu")
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 6)
        with pytest.raises(StoppedError):
            train(stopped, device="cpu")
    train(stopped, device="cpu")
    losses = [line["loss"] for line in read_lines(whole)]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert [line["loss"] for line in read_lines(stopped)] == pytest.approx(losses, rel=0, abs=1e-5)


def test_siglip_run_can_be_stopped_and_loaded(
    make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias is a parameter that open_clip's configuration must mention, or `load` misses it."""
    recipe = make_recipe(optim={"loss": "siglip", "steps": 4})
    stop_at(monkeypatch, "train_step", 4)
    with pytest.raises(StoppedError):
        train(recipe, device="cpu")
    monkeypatch.undo()
    train(recipe, device="cpu")
    assert read_weights(recipe)["clip.logit_bias"] != -10


# --- stopped and started again ------------------------------------------------------------------------------


class StoppedError(Exception):
    """Stands for a kill."""


def stop_at(monkeypatch: pytest.MonkeyPatch, place: str, call: int, *, after: bool = False) -> list[int]:
    """Make the `call`-th call of `loop.<place>` (or of MetricsLog.write) stop the run before or after its work."""
    owner = run_folder.MetricsLog if place == "write" else loop
    original, calls = getattr(owner, place), [0]

    def wrapped(*args: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise StoppedError
        result = original(*args)
        if calls[0] == call:
            raise StoppedError
        return result

    monkeypatch.setattr(owner, place, wrapped)
    return calls


@pytest.mark.parametrize(
    ("place", "call", "after", "first_step"),
    [
        ("train_step", 1, False, 1),
        ("train_step", 2, True, 1),
        ("write", 2, True, 1),
        ("save_checkpoint", 1, False, 1),  # the line of step 2 is there, its checkpoint is not
        ("save_checkpoint", 1, True, 3),
        ("train_step", 4, False, 3),
        ("evaluate", 1, True, 3),
        ("train_step", 6, False, 5),
        ("save_checkpoint", 3, False, 5),  # the model is saved, the last checkpoint is not
        ("save_checkpoint", 3, True, None),
    ],
)
def test_goes_on_after_the_checkpoint_as_if_never_stopped(
    make_recipe: MakeRecipe,
    tiny_data: Path,
    whole_run: Recipe,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    call: int,
    after: bool,
    first_step: int | None,
) -> None:
    recipe = make_recipe("stopped", data={"eval": [str(tiny_data / "test")]}, eval_every=4)
    with monkeypatch.context() as patch:
        stop_at(patch, place, call, after=after)
        with pytest.raises(StoppedError):
            train(recipe, device="cpu")
    steps: list[int] = []

    def counted(*args: Any) -> dict[str, Any]:
        steps.append(args[4])
        return train_step(*args)

    monkeypatch.setattr(loop, "train_step", counted)
    result = train(recipe, device="cpu")

    assert steps == ([] if first_step is None else list(range(first_step, 7)))
    expected = read_lines(whole_run)
    lines = read_lines(recipe)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for name in ("loss", "grad_norm", "learning_rate", "keep_ratio"):
        values = [line[name] for line in lines]
        assert values == pytest.approx([line[name] for line in expected], rel=0, abs=1e-5)
    assert result.last["loss"] == pytest.approx(expected[-1]["loss"], rel=0, abs=1e-5)
    assert result.last["eval"] == expected[-1]["eval"]
    expected_weights = read_weights(whole_run)
    for name, tensor in read_weights(recipe).items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=0, atol=1e-5)


def test_torn_last_line_is_written_again(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill can fall into the middle of a line; joined to the next, both steps would be lost."""
    recipe = make_recipe()
    with monkeypatch.context() as patch:
        stop_at(patch, "train_step", 4)
        with pytest.raises(StoppedError):
            train(recipe, device="cpu")
    with (Path(recipe.run_dir) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    train(recipe, device="cpu")
    assert [line["step"] for line in read_lines(recipe)] == [1, 2, 3, 4, 5, 6]


# --- one run folder, one recipe -----------------------------------------------------------------------------


def test_another_recipe_in_the_same_run_folder_is_refused(make_recipe: MakeRecipe) -> None:
    train(make_recipe(optim={"steps": 2}), device="cpu")
    other = make_recipe(optim={"steps": 2, "learning_rate": 1e-4}, video={"threshold": 0.2})
    with pytest.raises(
        CheckpointError, match=r"\(optim.learning_rate, video.threshold changed\); use another run_dir"
    ):
        train(other, device="cpu")


def test_settings_that_change_no_step_may_differ(make_recipe: MakeRecipe) -> None:
    """E.g. the ways out that other errors name: a smaller token_budget, a larger max_bad_fraction."""
    train(make_recipe(optim={"steps": 2}), device="cpu")
    again = make_recipe(
        checkpoint_every=1,
        eval_every=1,
        optim={"steps": 2, "token_budget": 1, "gradient_checkpointing": True},
        data={"num_workers": 1, "decode_timeout_seconds": 5.0, "max_bad_fraction": 0.5},
    )
    train(again, device="cpu")


def test_recipe_can_be_mended_before_the_first_checkpoint(make_recipe: MakeRecipe) -> None:
    """A wrong path must not spoil the run folder."""
    with pytest.raises(ShardError, match="no such shard file or folder"):
        train(make_recipe(data={"train": ["nowhere"]}), device="cpu")
    train(make_recipe(optim={"steps": 1}), device="cpu")


# --- errors -------------------------------------------------------------------------------------------------


def test_nan_loss_stops_with_step_and_keys(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the bad step is saved, and the keys are those of its batch."""
    recipe = make_recipe(checkpoint_every=1)
    batches: list[TrainBatch] = []

    def poisoned(model: VideoTextModel, loss: Any, optimizer: Any, batch: TrainBatch, *rest: Any) -> Any:
        batches.append(batch)
        if len(batches) == 3:
            with torch.no_grad():
                model.clip.logit_scale.fill_(torch.nan)
        return train_step(model, loss, optimizer, batch, *rest)

    monkeypatch.setattr(loop, "train_step", poisoned)
    with pytest.raises(TrainingError, match=r"the loss is nan at step 3; lower optim.learning_rate") as error:
        train(recipe, device="cpu")
    assert "\n" not in str(error.value)
    assert all(clip.key in str(error.value) for clip in batches[2].clips)
    assert checkpoints(recipe) == ["step-00000001", "step-00000002"]
    assert [line["step"] for line in read_lines(recipe)] == [1, 2]
    assert not (Path(recipe.run_dir) / "model").exists()


def test_infinite_gradient_of_a_finite_loss_stops_too(
    make_recipe: MakeRecipe, random_batch: TrainBatch
) -> None:
    """Else the weights are NaN and saved before the next step's loss tells."""
    recipe = make_recipe(video={"stochastic_depth": 0.0, "patch_dropout": 0.0})
    model = create_model(recipe, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def steep(z_video_BD: torch.Tensor, z_text_BD: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        return (z_video_BD * 0).abs().sqrt().sum() + 0 * z_text_BD.sum()  # 0, with the slope 0 · ∞

    with pytest.raises(TrainingError, match=r"the gradient norm is nan at step 1; .*clip-0, clip-1"):
        train_step(
            model,
            steep,
            build_optimizer(model, recipe),
            random_batch,
            1,
            recipe,
            Ranks(0, 1, torch.device("cpu")),
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_run_folder_that_cannot_be_written(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    recipe = make_recipe("file/run")
    with pytest.raises(
        CheckpointError, match=r"cannot write to .*file/run: .*choose another run_dir"
    ) as error:
        train(recipe, device="cpu")
    assert "\n" not in str(error.value)


def test_full_disk_when_logging(make_recipe: MakeRecipe, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(checkpoint_every=1)
    original = Path.open

    def full(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode == "a" and len(checkpoints(recipe)) == 2:
            raise OSError(28, "No space left on device", str(path))
        return original(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: No space left on device; free space") as error:
        train(recipe, device="cpu")
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    train(recipe, device="cpu")
    assert [line["step"] for line in read_lines(recipe)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": {"num_streams": 1}, "optim": {"batch_size": 33}}, ShardError, "fewer usable clips"),
        ({"data": {"train": ["pipe:cat x"]}}, ShardError, "URLs and shell forms are not read"),
    ],
)
def test_impossible_data(
    make_recipe: MakeRecipe, changes: dict[str, Any], error: type[RetrievalError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train(make_recipe(**changes), device="cpu")


@pytest.mark.parametrize("loss", ["sms", "adaptive_mi_mm"])
def test_loss_that_needs_relevancies_on_other_shards(make_recipe: MakeRecipe, loss: str) -> None:
    """Said before a model is made, with both ways out."""
    expected = rf"loss '{loss}' needs relevancies, but .*/train has no EK-100 dataset.json; .*--format ek100"
    with pytest.raises(TrainingError, match=f"{expected}.*, or use loss clip, siglip or mi_mm") as error:
        train(make_recipe(optim={"loss": loss}), device="cpu")
    assert "\n" not in str(error.value)


def test_clips_without_classes_beside_a_dataset(
    make_recipe: MakeRecipe, tiny_data: Path, tmp_path: Path
) -> None:
    shards = shutil.copytree(tiny_data / "train", tmp_path / "shards")
    write_dataset(shards, [made_classes(0)])
    recipe = make_recipe(data={"train": [str(shards)], "max_bad_fraction": 0.1}, optim={"loss": "sms"})
    with pytest.raises(ShardError, match="fewer usable clips"):
        train(recipe, device="cpu")
    failures = (Path(recipe.run_dir) / "failures.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in failures} == {NO_CLASSES}


def test_streams_that_ranks_cannot_share(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe()
    model = create_model(recipe, torch.device("cpu"))
    three = Ranks(0, 3, torch.device("cpu"))
    with pytest.raises(TrainingError, match="num_streams 4 is no multiple of the 3 processes"):
        loop.build_loader(recipe, model, [], None, None, three, {})  # type: ignore[arg-type]


def test_batch_that_streams_cannot_share(make_recipe: MakeRecipe) -> None:
    with pytest.raises(ValueError, match=r"batch_size 6 is no multiple of data\.num_streams 4"):
        make_recipe(optim={"batch_size": 6})


# --- optimiser ----------------------------------------------------------------------------------------------


def test_no_weight_decay_on_vectors_and_embeddings(make_recipe: MakeRecipe) -> None:
    recipe = make_recipe(optim={"weight_decay": 0.5, "loss": "siglip"})
    model = create_model(recipe, torch.device("cpu"))
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, recipe).param_groups
        for p in group["params"]
    }
    plain = {name for name, p in model.named_parameters() if decay[id(p)] == 0}
    assert {
        *("video.temporal_embedding", "video.run_length_embedding", "clip.positional_embedding"),
        *("clip.visual.positional_embedding", "clip.visual.class_embedding", "clip.token_embedding.weight"),
        *("clip.logit_scale", "clip.logit_bias", "clip.ln_final.weight"),
        "clip.visual.transformer.resblocks.0.mlp.c_fc.bias",
    } <= plain
    decayed = {name: p for name, p in model.named_parameters() if name not in plain}
    assert {"clip.visual.conv1.weight", "clip.visual.proj", "clip.text_projection"} <= decayed.keys()
    assert all(p.ndim >= 2 and "embedding" not in name for name, p in decayed.items())


def test_added_embeddings_learn_faster_when_asked(make_recipe: MakeRecipe, random_batch: TrainBatch) -> None:
    """Only what lies beside the towers: Adam's first step moves a parameter by its own rate."""
    recipe = make_recipe(
        optim={"learning_rate": 1e-3, "added_lr_scale": 40.0, "warmup_steps": 1, "weight_decay": 0.0}
    )
    model = create_model(recipe, torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = build_loss("clip", model.clip, rank=0, world_size=1)
    optimizer = build_optimizer(model, recipe)
    train_step(model, loss, optimizer, random_batch, 1, recipe, Ranks(0, 1, torch.device("cpu")))
    moved = {name: (p.detach() - before[name]).abs().max().item() for name, p in model.named_parameters()}
    assert moved["video.temporal_embedding"] == pytest.approx(0.04, rel=0.01)
    assert moved["video.run_length_embedding"] == pytest.approx(0.04, rel=0.01)
    assert max(rate for name, rate in moved.items() if name.startswith("clip.")) < 1.01e-3


def test_temperature_stays_at_most_100(make_recipe: MakeRecipe, random_batch: TrainBatch) -> None:
    recipe = make_recipe(optim={"learning_rate": 1e-3, "warmup_steps": 0})
    model = create_model(recipe, torch.device("cpu"))
    with torch.no_grad():
        model.clip.logit_scale.fill_(5.0)  # ln 100 is 4.605
    optimizer = build_optimizer(model, recipe)
    ranks = Ranks(0, 1, torch.device("cpu"))
    loss = build_loss("clip", model.clip, rank=0, world_size=1)
    train_step(model, loss, optimizer, random_batch, 1, recipe, ranks)
    assert model.clip.logit_scale.exp().item() == pytest.approx(100)


def test_frozen_temperature_is_left_alone(make_recipe: MakeRecipe, random_batch: TrainBatch) -> None:
    """Not even kept below 100: it is what the weights came with."""
    recipe = make_recipe(optim={"learning_rate": 1e-3, "warmup_steps": 0, "freeze_logit_scale": True})
    model = create_model(recipe, torch.device("cpu"))
    with torch.no_grad():
        model.clip.logit_scale.fill_(5.0)
    optimizer = build_optimizer(model, recipe)
    assert not any(p is model.clip.logit_scale for group in optimizer.param_groups for p in group["params"])
    ranks = Ranks(0, 1, torch.device("cpu"))
    loss = build_loss("clip", model.clip, rank=0, world_size=1)
    train_step(model, loss, optimizer, random_batch, 1, recipe, ranks)
    assert model.clip.logit_scale.item() == 5.0
    assert model.clip.logit_scale.grad is None


def test_infinite_max_grad_norm_does_not_clip(make_recipe: MakeRecipe, random_batch: TrainBatch) -> None:
    norms = {}
    for limit in (1e-3, math.inf):
        recipe = make_recipe(optim={"max_grad_norm": limit})
        model = create_model(recipe, torch.device("cpu"))
        loss = build_loss("clip", model.clip, rank=0, world_size=1)
        ranks = Ranks(0, 1, torch.device("cpu"))
        line = train_step(model, loss, build_optimizer(model, recipe), random_batch, 1, recipe, ranks)
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        norms[limit] = line["grad_norm"], torch.cat(gradients).norm().item()
    assert norms[math.inf][1] == pytest.approx(norms[math.inf][0], rel=1e-5)
    assert norms[1e-3] == pytest.approx((norms[math.inf][0], 1e-3), rel=1e-2)


# --- the command --------------------------------------------------------------------------------------------


def run_command(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.fixture
def recipe_file(make_recipe: MakeRecipe, tmp_path: Path) -> Path:
    """The tiny recipe as a user would have it: a TOML file."""
    values = make_recipe().model_dump(mode="json", exclude_none=True)
    path = tmp_path / "tiny.toml"
    path.write_text(_toml(values))
    return path


def _toml(values: dict[str, Any], table: str = "") -> str:
    plain = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    tables = {f"{table}{key}": value for key, value in values.items() if isinstance(value, dict)}
    parts = [f"\n[{name}]\n{_toml(inner, f'{name}.')}" for name, inner in tables.items()]
    return "\n".join(plain) + "\n" + "".join(parts)


def test_command_is_quiet_without_a_terminal(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """stdout is data; stderr has words (random weights), but no progress bar's control characters."""
    code, out, err = run_command("train", str(recipe_file), "--device", "cpu", "--json", capsys=capsys)
    assert code == 0
    assert json.loads(out)["step"] == 6
    assert "random weights" in err
    assert "\x1b" not in err
    assert "━" not in err
    code, out, err = run_command("train", str(recipe_file), "--device", "cpu", "--json", capsys=capsys)
    assert (code, json.loads(out)["step"]) == (0, 6)
    assert "all 6 steps are done" in err


def test_command_tells_errors_in_one_line(recipe_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run_command("train", str(recipe_file), "--set", "data.train=nowhere", capsys=capsys)
    assert (code, out) == (1, "")
    assert "Traceback" not in err
    code, out, err = run_command("train", str(recipe_file), "--set", "optim.stepps=3", capsys=capsys)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "did you mean 'steps'" in err


def test_interrupted_command_says_so_and_goes_on(recipe_file: Path, tmp_path: Path) -> None:
    """Ctrl-C reaches the whole process group, the decoding worker too."""
    command = [sys.executable, "-m", "rlt_retrieval", "train", str(recipe_file), "--device", "cpu"]
    settings = ["--set", "optim.steps=100000", "--set", "data.num_workers=1"]
    process = subprocess.Popen(
        [*command, *settings],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_ctrl_c,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate()
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in err
    with contextlib.suppress(ProcessLookupError):
        while True:  # a worker that outlives the command keeps the test here
            os.killpg(process.pid, 0)
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("environment", "asked", "expected"), [(None, None, [3]), ("2", None, []), ("2", 4, [4])]
)
def test_workers_get_their_cores_unless_the_user_decides(
    monkeypatch: pytest.MonkeyPatch, environment: str | None, asked: int | None, expected: list[int]
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(loop, "num_cores", lambda: 4)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    for device in ("cpu", "cuda"):
        loop.set_num_threads(asked, num_workers=1, device=torch.device(device))
    assert threads == expected
