"""Two processes on the CPU (gloo) take the step that one process takes.

`first_gradients.py` is run by two processes, and here, in float64; `tests/acceptance/test_two_processes.py` does
whole float32 runs under torchrun.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import first_gradients
import pytest
import torch
from safetensors.torch import load_file

from rlt_retrieval.config import Recipe
from rlt_retrieval.errors import ModelError
from rlt_retrieval.training.distributed import Ranks, join_ranks

ROOT = Path(__file__).resolve().parents[2]
Step = dict[str, torch.Tensor]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start_rank(rank: int, port: int, arguments: list[str]) -> subprocess.Popen[str]:
    """A process with the variables that torchrun sets."""
    launch = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return subprocess.Popen(
        [sys.executable, first_gradients.__file__, *arguments],
        env={**os.environ, **{name: str(value) for name, value in launch.items()}, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def steps(
    make_recipe_in: Callable[..., Recipe],
    tiny_data: Path,
    tiny_ek100: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Step, Step]:
    """The first step of one process, and of two; several micro-batches of uneven sizes on either rank."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = make_recipe_in(
        folder,
        data={"train": [str(tiny_ek100)], "eval": [str(tiny_data / "test")]},
        optim={"token_budget": 70, "max_grad_norm": 1e9},
    )
    (folder / "recipe.json").write_text(recipe.model_dump_json())
    port = free_port()
    arguments = [str(folder / "recipe.json"), str(folder / "two.safetensors")]
    processes = [start_rank(rank, port, arguments) for rank in (0, 1)]
    first_gradients.main(str(folder / "recipe.json"), str(folder / "one.safetensors"))
    for process in processes:
        _, err = process.communicate()
        assert process.returncode == 0, err
    return load_file(folder / "one.safetensors"), load_file(folder / "two.safetensors")


@pytest.mark.parametrize("name", first_gradients.LOSSES)
def test_same_gradients_on_the_first_step(steps: tuple[Step, Step], name: str) -> None:
    """Catches gradients summed instead of averaged, features gathered without their gradient, other clips."""
    one, two = steps
    assert one.keys() == two.keys()
    keys = [key for key in one if key.startswith(f"{name}/") and "/number/" not in key]
    assert max(one[key].abs().max() for key in keys) > 0.01, "the tolerance says something about these"
    for key in keys:
        torch.testing.assert_close(two[key], one[key], rtol=0, atol=1e-9, msg=key)


@pytest.mark.parametrize("name", first_gradients.LOSSES)
def test_logged_numbers_are_those_of_the_global_batch(steps: tuple[Step, Step], name: str) -> None:
    """The sigmoid loss differs from rank to rank, and so does the share of tokens kept."""
    one, two = ({k: float(v) for k, v in step.items() if k.startswith(f"{name}/number/")} for step in steps)
    for key in ("loss", "keep_ratio", "grad_norm"):
        assert two[f"{name}/number/{key}"] == pytest.approx(one[f"{name}/number/{key}"], rel=0, abs=1e-9)


def test_evaluation_counts_every_clip_once(steps: tuple[Step, Step]) -> None:
    """Five clips over two ranks: none left out, none twice to make the ranks even."""
    one, two = steps
    assert one["clip/number/eval_clips"] == two["clip/number/eval_clips"] == 5
    assert float(two["clip/number/eval_map"]) == pytest.approx(float(one["clip/number/eval_map"]))


def test_alone_nothing_is_exchanged() -> None:
    ranks = Ranks(0, 1, torch.device("cpu"))
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, 2.0])
    ranks.average_gradients([parameter])
    ranks.barrier()
    assert parameter.grad.tolist() == [1.0, 2.0]
    assert ranks.gather("a") == ["a"]
    assert ranks.mean(torch.tensor(2.5)) == 2.5
    assert ranks.is_first
    assert not Ranks(1, 2, torch.device("cpu")).is_first


def test_device_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="device 'warp:9' cannot be used here"):
        join_ranks("warp:9")
