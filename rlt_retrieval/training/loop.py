"""The training loop: data → model → optimiser → resume → step → evaluate → save.

Shapes: B clips of this rank, b clips of a micro-batch, D embedding.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlt_retrieval.annotations import Ek100Dataset, read_dataset
from rlt_retrieval.config import Recipe, num_cores
from rlt_retrieval.data.batching import batches_by_budget
from rlt_retrieval.data.failures import FailureLog
from rlt_retrieval.data.loading import TrainBatch, TrainClip, TrainLoader, clip_seed, prefetch
from rlt_retrieval.data.shards import expand_shards
from rlt_retrieval.data.streams import StreamPosition
from rlt_retrieval.data.workers import WorkerPool
from rlt_retrieval.embed import (
    LoaderOptions,
    ShardEmbeddings,
    embed_shards,
    model_sampling,
    score,
)
from rlt_retrieval.encoders.packing import pack
from rlt_retrieval.errors import TrainingError
from rlt_retrieval.eval.ek100 import Ek100Result
from rlt_retrieval.eval.protocols import ProtocolResult
from rlt_retrieval.model import VideoTextModel, autocast
from rlt_retrieval.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlt_retrieval.training.distributed import Ranks, join_ranks, leave_ranks
from rlt_retrieval.training.losses import NEED_RELEVANCY, Loss, backward, build_loss
from rlt_retrieval.training.relevancies import batch_relevancy, read_training_dataset
from rlt_retrieval.training.run_folder import (
    MetricsLog,
    checkpoint_folder,
    claim_run,
    model_folder,
    read_metrics,
)
from rlt_retrieval.training.schedule import learning_rate

PREFETCHED_BATCHES = 2
MAX_LOGIT_SCALE = math.log(100)  # CLIP (arXiv 2103.00020), section 2.5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, its last metrics line, how many samples it skipped, and whether this is the first process."""

    model_folder: Path
    last: dict[str, Any]
    num_skipped: int
    is_first: bool


OnStep = Callable[[dict[str, Any], int], None]  # metrics line of a step, number of steps


def train(
    recipe: Recipe,
    *,
    device: str = "auto",
    num_threads: int | None = None,
    on_step: OnStep = lambda line, num_steps: None,
) -> TrainResult:
    """Run a recipe to its end; started again after any interruption, it continues at the checkpoint's step + 1.

    Args:
        num_threads: that compute on a CPU; None: OMP_NUM_THREADS, else the cores that loader workers leave.
        on_step: called after every step, in the first process only.

    Raises:
        RetrievalError: bad shards, a NaN loss, another recipe in the same run folder, a full disk.
    """
    ranks = join_ranks(device)
    try:
        set_num_threads(num_threads, recipe.data.num_workers, ranks.device)
        return _train(recipe, ranks, on_step)
    finally:
        leave_ranks(ranks)


def _train(recipe: Recipe, ranks: Ranks, on_step: OnStep) -> TrainResult:
    run = Path(recipe.run_dir)
    claim_run(run, recipe, ranks)

    # data
    shards = expand_shards(recipe.data.train)
    eval_shards = expand_shards(recipe.data.eval) if recipe.data.eval else []
    dataset = read_training_dataset(shards, recipe.optim.loss)
    max_bad = recipe.data.max_bad_fraction
    failures = FailureLog(run / f"failures{_suffix(ranks)}.jsonl", max_bad)

    # model, optimiser
    model = create_model(recipe, ranks.device)
    loss = create_loss(recipe, model, ranks)
    optimizer = build_optimizer(model, recipe)

    # resume
    done = load_checkpoint(checkpoint_folder(run), model, optimizer) or TrainState(0, {})
    if done.step == recipe.optim.steps:
        logger.info("%s: all %d steps are done", run, done.step)
        return _result(run, ranks)

    with (
        WorkerPool(recipe.data.num_workers, recipe.data.decode_timeout_seconds) as pool,
        closing(
            prefetch(
                build_loader(recipe, model, shards, pool, failures, ranks, done.positions, dataset),
                PREFETCHED_BATCHES,
            )
        ) as batches,
        MetricsLog(run, done.step) if ranks.is_first else nullcontext() as log,
    ):
        for step in range(done.step + 1, recipe.optim.steps + 1):
            started = time.perf_counter()
            batch = next(batches)

            # step
            line = train_step(model, loss, optimizer, batch, step, recipe, ranks)
            line["seconds"] = time.perf_counter() - started

            # evaluate
            is_last = step == recipe.optim.steps
            if eval_shards and (is_last or (recipe.eval_every and step % recipe.eval_every == 0)):
                eval_failures = FailureLog(run / f"failures-eval{_suffix(ranks)}.jsonl", max_bad)
                line["eval"] = evaluate(model, eval_shards, recipe, ranks, eval_failures).to_dict()
            if log:
                log.write(line)

            # save; the model first, so that the last checkpoint means that all is there
            if is_last:
                failures.finish()
            if is_last and ranks.is_first:
                model.eval().save(model_folder(run))
            if is_last or step % recipe.checkpoint_every == 0:
                positions = dict(itertools.chain(*(p.items() for p in ranks.gather(batch.positions))))
                if ranks.is_first:
                    save_checkpoint(checkpoint_folder(run), TrainState(step, positions), model, optimizer)
                ranks.barrier()
            if ranks.is_first:
                on_step(line, recipe.optim.steps)
    return _result(run, ranks)


def _result(run: Path, ranks: Ranks) -> TrainResult:
    last: dict[str, Any] = next(reversed(read_metrics(run)), {})
    num_skipped = sum(len(path.read_text().splitlines()) for path in run.glob("failures*.jsonl"))
    return TrainResult(model_folder(run), last, num_skipped, ranks.is_first)


def set_num_threads(asked: int | None, num_workers: int, device: torch.device) -> None:
    """On a CPU, as many as asked for; else those of OMP_NUM_THREADS; else leave loader workers the cores they use.

    Threads of one pool meet at every operator, and wait there for the one whose core a worker has taken.
    """
    if device.type != "cpu":
        return
    if asked:
        torch.set_num_threads(asked)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, num_cores() - num_workers))


def create_loss(recipe: Recipe, model: VideoTextModel, ranks: Ranks) -> Loss:
    optim = recipe.optim
    return build_loss(
        optim.loss,
        model.clip,
        rank=ranks.rank,
        world_size=ranks.world_size,
        margin=optim.margin,
        tolerance=optim.tolerance,
    )


def create_model(recipe: Recipe, device: torch.device) -> VideoTextModel:
    """The recipe's model in training mode."""
    pretrained = None if recipe.model.pretrained == "none" else recipe.model.pretrained
    model = VideoTextModel.create(
        recipe.model.backbone_config or recipe.model.backbone,
        pretrained,
        device=str(device),
        quick_gelu=recipe.model.quick_gelu,
        seed=recipe.seed,
        **recipe.video.model_dump(),
    )
    if recipe.optim.loss == "siglip":
        model.add_logit_bias()
    model.clip.logit_scale.requires_grad_(not recipe.optim.freeze_logit_scale)
    model.video.gradient_checkpointing = recipe.optim.gradient_checkpointing
    return model.train()


def build_optimizer(model: VideoTextModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; no weight decay on embeddings and on parameters of fewer than two dimensions.

    What was added beside the towers starts at zero, and learns `added_lr_scale` times faster: the direction of motion
    shows only in products of time and place, whose gradient is as small as the time embedding still is.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    added = {id(parameter) for parameter in model.video.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_plain = parameter.ndim < 2 or "embedding" in name
            decay = 0.0 if is_plain else recipe.optim.weight_decay
            scale = recipe.optim.added_lr_scale if id(parameter) in added else 1.0
            groups[decay, scale].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay, "lr_scale": scale}
            for (decay, scale), parameters in groups.items()
        ],
        lr=recipe.optim.learning_rate,
        betas=recipe.optim.betas,
        fused=True,
    )


def build_loader(
    recipe: Recipe,
    model: VideoTextModel,
    shards: Sequence[Path],
    pool: WorkerPool,
    failures: FailureLog,
    ranks: Ranks,
    positions: dict[int, StreamPosition],
    dataset: Ek100Dataset | None = None,
) -> TrainLoader:
    """This rank's share of the logical streams: neighbours, so that ranks in order give the global batch in order."""
    num_streams, world_size = recipe.data.num_streams, ranks.world_size
    if num_streams % world_size:
        raise TrainingError(
            f"data.num_streams {num_streams} is no multiple of the {world_size} processes; use --set data.num_streams=…"
        )
    share = num_streams // world_size
    sampling = model_sampling(model)
    sampling = replace(sampling, transform=replace(sampling.transform, crop_scale=recipe.data.crop_scale))
    return TrainLoader(
        shards,
        sampling,
        pool,
        failures,
        clips_per_stream=recipe.optim.batch_size // num_streams,
        num_streams=num_streams,
        streams=range(ranks.rank * share, (ranks.rank + 1) * share),
        seed=recipe.seed,
        shuffle_buffer=recipe.data.shuffle_buffer,
        positions=positions,
        dataset=dataset,
    )


def train_step(
    model: VideoTextModel,
    loss: Loss,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    step: int,
    recipe: Recipe,
    ranks: Ranks,
) -> dict[str, Any]:
    """One optimiser step on a global batch; returns its metrics line.

    Raises:
        TrainingError: the loss or its gradient is not finite; names the step and the batch's keys. Weights are
            left as they were.
    """
    optim = recipe.optim
    rate = learning_rate(step, optim)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    optimizer.zero_grad(set_to_none=True)
    parts = batches_by_budget(batch.clips, lambda clip: model.video.num_rows(clip.tokens), optim.token_budget)
    relevancy_GG = batch_relevancy(batch.clips, ranks) if optim.loss in NEED_RELEVANCY else None
    micro_batches = [_features(model, part, step, recipe) for part in parts]
    mean_loss = ranks.mean(backward(loss, micro_batches, relevancy_GG))
    _check_finite("loss", mean_loss, step, batch)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    ranks.average_gradients(parameters)
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, optim.max_grad_norm))
    _check_finite("gradient norm", norm, step, batch)
    optimizer.step()
    if not optim.freeze_logit_scale:
        with torch.no_grad():
            model.clip.logit_scale.clamp_(0, MAX_LOGIT_SCALE)  # type: ignore[operator]
    kept = sum(len(clip.tokens) for clip in batch.clips)
    keep_ratio = kept / sum(model.video.num_cells(clip.tokens.grid) for clip in batch.clips)
    return {
        "step": step,
        "loss": mean_loss,
        "learning_rate": rate,
        "grad_norm": norm,
        "keep_ratio": ranks.mean(torch.tensor(keep_ratio, device=ranks.device)),
    }


def _check_finite(what: str, value: float, step: int, batch: TrainBatch) -> None:
    if not math.isfinite(value):
        keys = ", ".join(clip.key for clip in batch.clips)
        raise TrainingError(
            f"the {what} is {value} at step {step}; lower optim.learning_rate, or look at the batch: {keys}"
        )


def _features(
    model: VideoTextModel, clips: Sequence[TrainClip], step: int, recipe: Recipe
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Both towers' embeddings of a micro-batch, the same at each call."""
    packed = pack([clip.tokens for clip in clips], [clip_seed(recipe.seed, step, clip.key) for clip in clips])
    captions = [clip.caption for clip in clips]

    def features() -> tuple[Tensor, Tensor]:
        with autocast(model.device, recipe.optim.precision):
            z_text_bD = model.encode_text(captions)
            # Last in, first out: the backward pass frees these activations before it makes the text tower's gradients.
            return model.encode_tokens(packed), z_text_bD

    return features


def evaluate(
    model: VideoTextModel, shards: Sequence[Path], recipe: Recipe, ranks: Ranks, failures: FailureLog
) -> ProtocolResult | Ek100Result:
    """The protocol of the evaluation shards, every clip once over all ranks; bad ones go to `failures`."""
    options = LoaderOptions(
        recipe.data.num_workers,
        recipe.data.decode_timeout_seconds,
        recipe.data.max_bad_fraction,
        recipe.optim.token_budget,
    )
    model.eval()
    mine = embed_shards(
        model, shards, options, failures=failures, rank=ranks.rank, world_size=ranks.world_size
    )
    result = score(model, ShardEmbeddings.joined(ranks.gather(mine)), read_dataset(shards))
    model.train()
    return result


def _suffix(ranks: Ranks) -> str:
    return "" if ranks.is_first else f".rank{ranks.rank}"
