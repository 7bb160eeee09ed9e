"""Every recipe for real data, as it is shipped but for paths and sizes, takes two steps on synthetic clips.

The other recipes are run by the demo and the acceptance tests.
"""

import json
import shlex
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

from rlt_retrieval.config import Recipe, find_recipe, load_recipe
from rlt_retrieval.data.shards import BadSample, ShardEntry, expand_shards, scan_shard
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training.loop import train

EK100 = ("ek100_mir_vitb16", "ek100_mir_vitb16_1gpu", "ek100_mir_vitl14", "ek100_mir_vitl14_1gpu")
RECIPES = (*EK100, "msrvtt_vitb32")
SIZES = {  # with the backbone, all that differs from the published recipe beside its paths
    "model.pretrained": "none",
    "video.num_frames": 4,
    "data.num_workers": 0,
    "optim.steps": 2,
    "optim.warmup_steps": 1,
    "optim.batch_size": 8,
    "optim.token_budget": 120,
}


def header_of(name: str) -> list[str]:
    """The comment lines at a recipe's top, without their marks; lines that end in a backslash are joined."""
    header = find_recipe(name).read_text().split("\n\n")[0]
    return header.replace("\\\n# ", " ").replace("\n#", "\n").lstrip("#").splitlines()


def variants_of(name: str) -> dict[str, list[str]]:
    """The header's --set lists, by their run_dir."""
    variants = {}
    for line in header_of(name):
        words = shlex.split(line) if line.strip().startswith("--set run_dir=") else []
        if words:
            assert words[::2] == ["--set"] * (len(words) // 2)
            variants[words[1].removeprefix(f"run_dir=runs/{name}_")] = words[1::2]
    return variants


def scan_all(folder: Path) -> list[ShardEntry | BadSample]:
    return [entry for shard in expand_shards([folder]) for entry in scan_shard(shard)]


@pytest.mark.parametrize("reducer", ["rlt", "none"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_steps_on_synthetic_clips(
    name: str,
    reducer: str,
    make_recipe: Callable[..., Recipe],
    tiny_data: Path,
    tiny_ek100: Path,
    tmp_path: Path,
) -> None:
    paths = {
        "run_dir": str(tmp_path / "run"),
        "data.train": [str(tiny_ek100 if name in EK100 else tiny_data / "train")],
        "data.eval": [str(tiny_ek100 if name in EK100 else tiny_data / "test")],
        "model.backbone_config": make_recipe().model.backbone_config,
    }
    recipe = load_recipe(name)
    values = recipe.model_dump()
    for key, value in (paths | SIZES | {"video.reducer": reducer}).items():
        table, _, last = key.rpartition(".")
        (values[table] if table else values)[last] = value
    train(Recipe.model_validate(values), device="cpu")
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["learning_rate"] == recipe.optim.learning_rate
    assert (lines[0]["keep_ratio"] == 1) == (reducer == "none")
    scores = lines[1]["eval"]
    if name in EK100:
        assert 0 < scores["mean"]["mAP"] <= 1
        assert scores["num_videos"] == len(scan_all(tiny_ek100))
    else:
        assert scores["num_videos"] == 5
    assert VideoTextModel.load(tmp_path / "run", device="cpu").config.video.reducer == reducer


@pytest.mark.parametrize("name", EK100)
def test_steps_are_a_hundred_epochs_of_the_official_clips(name: str) -> None:
    for overrides in ([], variants_of(name)["mi_mm"]):
        recipe = load_recipe(name, overrides)
        epoch = 67_217 // recipe.optim.batch_size
        assert recipe.optim.steps == 100 * epoch
        assert recipe.optim.warmup_steps == recipe.checkpoint_every == epoch
        assert recipe.eval_every == 5 * epoch


@pytest.mark.parametrize("name", RECIPES)
def test_variants_of_the_header_are_recipes(name: str) -> None:
    variants = variants_of(name)
    assert set(variants) == ({"dense", "mi_mm"} if name in EK100 else {"dense"})
    assert load_recipe(name, variants["dense"]).video.reducer == "none"
    if name in EK100:
        optim = load_recipe(name, variants["mi_mm"]).optim
        assert (optim.loss, optim.margin, optim.batch_size) == ("mi_mm", None, 512)
        assert (optim.start_learning_rate, optim.learning_rate, optim.final_learning_rate) == (
            1e-6,
            3e-5,
            1e-5,
        )


@pytest.mark.parametrize("name", EK100)
def test_one_gpu_trains_the_same_batch(name: str) -> None:
    """Only what a GPU takes at a time may differ."""
    one = load_recipe(f"{name.removesuffix('_1gpu')}_1gpu")
    many = load_recipe(name.removesuffix("_1gpu"))
    changes = {"run_dir": many.run_dir, "optim": one.optim.model_copy(update={"token_budget": 131072})}
    assert one.optim.token_budget < many.optim.token_budget
    assert one.model_copy(update=changes) == many


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_complete(name: str) -> None:
    """Nothing depends on a default that may change, but for what TOML cannot say (none)."""
    written = tomllib.loads(find_recipe(name).read_text())
    values = load_recipe(name).model_dump(exclude_none=True)
    unused = {"optim": {"tolerance"} if name not in EK100 else set()}
    for table in ("model", "video", "data", "optim"):
        assert values[table].keys() - written[table].keys() == unused.get(table, set())
    assert values.keys() == written.keys()
