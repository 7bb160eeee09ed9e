"""One training step on one rank of many (or alone): loss, averaged gradients and evaluation, to a file.

python first_gradients.py RECIPE.json OUT.safetensors        # or under torchrun
"""

import sys
from itertools import islice
from pathlib import Path

import torch
from safetensors.torch import save_file

from rlt_retrieval.config import Recipe
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.shards import expand_shards
from rlt_retrieval.data.workers import WorkerPool
from rlt_retrieval.training.distributed import Ranks, join_ranks, leave_ranks
from rlt_retrieval.training.loop import (
    build_loader,
    build_optimizer,
    create_loss,
    create_model,
    evaluate,
    train_step,
)
from rlt_retrieval.training.relevancies import read_training_dataset

LOSSES = ("clip", "siglip", "mi_mm", "adaptive_mi_mm", "sms")


def main(recipe_path: str, out_path: str) -> None:
    recipe = Recipe.model_validate_json(Path(recipe_path).read_text())
    torch.set_num_threads(1)
    ranks = join_ranks("cpu")
    try:
        found: dict[str, torch.Tensor] = {}
        for name in LOSSES:
            found |= _first_step(recipe, name, ranks)
        if ranks.is_first:
            save_file(found, out_path)
        ranks.barrier()
    finally:
        leave_ranks(ranks)


def _first_step(recipe: Recipe, name: str, ranks: Ranks) -> dict[str, torch.Tensor]:
    recipe = recipe.model_copy(update={"optim": recipe.optim.model_copy(update={"loss": name})})
    model = create_model(recipe, ranks.device).double()  # so that a difference is a mistake, not rounding
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide mistakes
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    scores = evaluate(
        model, expand_shards(recipe.data.eval), recipe, ranks, FailureLog(None, recipe.data.max_bad_fraction)
    )
    failures = FailureLog(None, 0.1)
    with WorkerPool(0, 60.0) as pool:
        shards = expand_shards(recipe.data.train)
        dataset = read_training_dataset(shards, recipe.optim.loss)
        (batch,) = islice(build_loader(recipe, model, shards, pool, failures, ranks, {}, dataset), 1)
    loss = create_loss(recipe, model, ranks)
    line = train_step(model, loss, build_optimizer(model, recipe), batch, 1, recipe, ranks)
    gradients = {f"{name}/{key}": p.grad for key, p in model.named_parameters() if p.grad is not None}
    numbers = {
        "loss": line["loss"],
        "keep_ratio": line["keep_ratio"],
        "grad_norm": line["grad_norm"],
        "eval_clips": scores.num_videos,
        "eval_map": scores.text_to_video.mean_average_precision,
    }
    return gradients | {
        f"{name}/number/{key}": torch.tensor(float(v), dtype=torch.float64) for key, v in numbers.items()
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
