"""Parts 2 and 3 of benchmarks/gpu.py: encoding and training, against open_clip's own blocks over every token.

Shapes: B clips, T frames, C = 3 channels, H x W pixels, L positions of a frame (CLS and patches), F = B * T frames, J
positions of a clip, D width or embedding.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from encode import with_fast_path
from gpu_bench import KEEPS, LAYOUTS, Aim, Bench, Case, Row, Run
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import rlt_retrieval.encoders.video as video_module
from rlt_retrieval import PackedTokens, VideoTextModel
from rlt_retrieval.bench.costs import encoder_cost
from rlt_retrieval.bench.memory import peak_bytes
from rlt_retrieval.encoders.video import VideoEncoder
from rlt_retrieval.model import autocast

PAD_TO = 1024
FLASH = "flash"


# --- 2: encode --------------------------------------------------------------------------------------------------


def dense_joint_clips(visual: nn.Module, pixels_BTCHW: Tensor) -> Tensor:
    """[B, D]: `dense_joint` of encode.py over a batch of clips."""
    num_clips = len(pixels_BTCHW)
    x_BTLD = visual._embeds(pixels_BTCHW.flatten(0, 1)).unflatten(0, (num_clips, -1))  # type: ignore[operator]
    joint_BJD = torch.cat([x_BTLD[:, 0, :1], x_BTLD[:, :, 1:].flatten(1, 2)], dim=1)
    pooled_BD, _ = visual._pool(visual.transformer(joint_BJD))  # type: ignore[operator]
    return F.normalize(pooled_BD @ visual.proj, dim=-1)  # type: ignore[operator]


def dense_frame_clips(visual: nn.Module, pixels_BTCHW: Tensor) -> Tensor:
    """[B, D]: `frame_by_frame` of encode.py over a batch of clips."""
    z_FD = F.normalize(visual(pixels_BTCHW.flatten(0, 1)), dim=-1)
    return F.normalize(z_FD.unflatten(0, (len(pixels_BTCHW), -1)).mean(1), dim=-1)


DENSE = {"joint": dense_joint_clips, "frame": dense_frame_clips}


def encode(bench: Bench) -> Iterator[Case]:
    for name in bench.sizes.backbones:
        for layout in LAYOUTS:
            for keep in KEEPS:
                yield (
                    f"{name}, {layout}, keep {keep:g}",
                    functools.partial(encode_case, bench, name, layout, keep),
                )


@torch.inference_mode()
def encode_case(bench: Bench, name: str, layout: str, keep: float) -> Row:
    model, count = bench.model(name, layout), bench.sizes.clips[name]
    frames_BTCHW = bench.clips(model, keep, count)
    packed = bench.resident(bench.packed(model, frames_BTCHW))
    half = copy.deepcopy(model.video).bfloat16()  # what autocast costs beside it
    dense = dense_runs(bench, model, layout, bench.pixels(model, frames_BTCHW))
    if (name, layout) not in bench.fastest_dense:
        bench.fastest_dense[name, layout] = fastest_of_both(bench, dense)
    flash, fastest = bench.fastest_dense[name, layout]
    runs = {
        "ours": lambda: model.encode_tokens(packed),
        "ours, bf16 weights": lambda: half(packed),
        "dense": dense[flash],
        "dense, any kernel": dense[fastest],
    }
    agreement = F.cosine_similarity(runs["ours"]().float(), runs["dense"]().float()).min()
    times = bench.seconds(runs)
    if (layout, keep) == ("frame", 0.5) and bench.encode_seconds is None:
        bench.encode_seconds = times["ours"] / count
    tokens = model.tokenizer(frames_BTCHW[0])
    flops = count * encoder_cost(model.video, tokens).flops
    started = time.perf_counter()
    model.video.plan(packed)
    figures = {
        "clips/s": count / times["ours"],
        "tokens/s": packed.num_tokens / times["ours"],
        **bench.ceiling_share(flops, times["ours"]),
        "dense clips/s": count / times["dense"],
        "dense clips/s, any kernel": count / times["dense, any kernel"],
        "kept": len(tokens) / tokens.keep_mask.numel(),
        "ms of the host's plan": 1e3 * (time.perf_counter() - started),
        "ms": 1e3 * times["ours"],
        "ms with bf16 weights": 1e3 * times["ours, bf16 weights"],
    }
    note = f"dense: {flash}; any kernel: {fastest}"
    if keep == 1:
        note += f"; least cosine with it {float(agreement):.5f}"
    speed_up = times["dense"] / times["ours"]
    case = f"{name}, {layout}, keep {keep:g}"
    aims = cost_aims(f"encode, {case}", figures["kept"], figures, speed_up, 0.5)
    if keep == 1:
        aims = (*aims, Aim(f"encode, {case}: times as fast as dense", speed_up, 0.97))
    return Row(2, case, figures, aims, note)


def cost_aims(
    case: str, kept: float, figures: Mapping[str, float], speed_up: float, share: float
) -> tuple[Aim, ...]:
    """What a pruned run must reach: a share of the ceiling, and as many times the dense speed as tokens are fewer."""
    aims = []
    if "share of ceiling" in figures:
        aims.append(Aim(f"{case}: share of ceiling", figures["share of ceiling"], share))
    if kept < 0.51:
        aims.append(Aim(f"{case}: times as fast as dense", speed_up, 1 / kept))
    return tuple(aims)


def fastest_of_both(bench: Bench, dense: Mapping[str, Run]) -> tuple[str, str]:
    """The fastest setting with flash attention, which is what ours is held against, and the fastest of all."""
    times = {}
    for name, run in dense.items():
        # One that materialises attention may not fit, or have no kernel.
        with contextlib.suppress(RuntimeError):
            times[name] = bench.seconds({name: run}, repeats=1)[name]
    flash = [name for name in times if name.endswith(FLASH)]
    return min(flash, key=times.__getitem__), min(times, key=times.__getitem__)


def dense_runs(bench: Bench, model: VideoTextModel, layout: str, pixels_BTCHW: Tensor) -> dict[str, Run]:
    """open_clip's blocks in each setting that may be the fastest one; attention by torch's choice and by flash alone.

    On recent cards torch prefers cuDNN's kernel, and with it PyTorch's fast path falls back to plain products.
    """
    half = copy.deepcopy(model.clip.visual).bfloat16()  # type: ignore[union-attr]
    pixels_half = pixels_BTCHW.bfloat16()

    def autocasted() -> Tensor:
        with autocast(bench.device, "bf16"):
            return DENSE[layout](model.clip.visual, pixels_BTCHW)  # type: ignore[arg-type]

    whole = {"autocast": autocasted, "bf16 weights": lambda: DENSE[layout](half, pixels_half)}
    chosen = {
        f"{name}, fast path {'on' if on else 'off'}": with_fast_path(on, run)
        for name, run in whole.items()
        for on in (True, False)
    }
    return chosen | {f"{name}, {FLASH}": by_flash(run) for name, run in chosen.items()}


def by_flash(run: Run) -> Run:
    """With torch's flash kernel for attention, or not at all."""

    def restricted() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            encoded: Tensor = run()
            return encoded

    return restricted


# --- 3: train ---------------------------------------------------------------------------------------------------


def train(bench: Bench) -> Iterator[Case]:
    first, *others = bench.sizes.backbones
    options = ("", "checkpointing", "compiled", "compiled, padded", "compiled, checkpointing")
    cases = [(first, "joint", 0.5, option) for option in options]
    for name in (first, *others):
        plain = [(name, layout, keep, "") for keep in (0.5, 0.2, 1.0, 0.7) for layout in LAYOUTS]
        cases += [case for case in plain if case not in cases]
    for name, layout, keep, option in cases:
        label = f"{name}, {layout}, keep {keep:g}" + (f", {option}" if option else "")
        yield label, functools.partial(train_case, bench, name, layout, keep, option, label)


def train_case(bench: Bench, name: str, layout: str, keep: float, option: str, label: str) -> Row:
    """Image tower, a loss on the embeddings, AdamW; bf16 autocast over float32 weights on both sides."""
    model = copy.deepcopy(bench.model(name, layout)).train()
    dense = copy.deepcopy(model.clip.visual).train()  # type: ignore[union-attr]
    model.video.gradient_checkpointing = "checkpointing" in option
    dense.set_grad_checkpointing("checkpointing" in option)  # type: ignore[operator]
    count, multiple = bench.sizes.train_clips[name], PAD_TO if "padded" in option else 1
    frames_BTCHW = bench.clips(model, keep, count)
    pixels = bench.pixels(model, frames_BTCHW)
    packed = bench.resident(padded(bench.packed(model, frames_BTCHW), multiple))
    runs = {
        "ours": train_step(bench, model.video, lambda: model.video(packed)[:count]),
        "dense": by_flash(train_step(bench, dense, lambda: DENSE[layout](dense, pixels))),
    }
    tokens = model.tokenizer(frames_BTCHW[0])
    kept = len(tokens) / tokens.keep_mask.numel()
    flops = 3 * count * encoder_cost(model.video, tokens).flops
    if "compiled" in option:
        graphs = GraphCounter(bench.compiler)
        with compiled_blocks(bench, model.video, dense, graphs):
            figures = train_figures(bench, runs, flops) | recompilations(bench, model, graphs, multiple)
    else:
        figures = train_figures(bench, runs, flops)
    speed_up = figures["dense ms"] / figures["ms"]
    aims = () if option else cost_aims(f"train, {label}", kept, figures, speed_up, 0.4)
    return Row(3, label, figures, aims, f"speed-up {speed_up:.2f}, 1/keep {1 / kept:.2f}")


def train_figures(bench: Bench, runs: Mapping[str, Run], flops: float) -> dict[str, float]:
    times = bench.seconds(runs)
    figures = {"steps/s": 1 / times["ours"], **bench.ceiling_share(flops, times["ours"])}
    figures |= {"ms": 1e3 * times["ours"], "dense ms": 1e3 * times["dense"]}
    for name, run in (("peak MB", runs["ours"]), ("dense peak MB", runs["dense"])):
        peak = peak_bytes(run, bench.device)[1]
        if peak is not None:
            figures[name] = peak / 1e6
    return figures


def train_step(bench: Bench, module: nn.Module, embed: Callable[[], Tensor]) -> Run:
    """A step that leaves no gradient behind, so that its peak holds its own."""
    parameters = [parameter for parameter in all_parameters(module) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, fused=True)

    def step() -> None:
        with autocast(bench.device, "bf16"):
            z_BD = embed()
        (z_BD @ z_BD.T).logsumexp(1).mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def all_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Of a tower; of a video encoder with those of its tower, which it does not own."""
    own = list(module.parameters())
    return own + list(module.tower.visual.parameters()) if isinstance(module, VideoEncoder) else own  # type: ignore[attr-defined]


class GraphCounter:
    """A backend of torch.compile that counts what it compiles."""

    def __init__(self, backend: str) -> None:
        self.count = 0
        self._compile = torch._dynamo.lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.count += 1
        return self._compile(graph, inputs)


@contextlib.contextmanager
def compiled_blocks(
    bench: Bench, video: VideoEncoder, dense: nn.Module, backend: GraphCounter
) -> Iterator[None]:
    """Ours compiled for any number of rows, attention staying a call of its kernel; the dense blocks for theirs."""
    torch._dynamo.reset()
    for block in dense.transformer.resblocks:  # type: ignore[union-attr]
        block.compile(backend=bench.compiler)
    attend = torch.compiler.disable(video_module.attend_rows)
    compiled = torch.compile(video._run_block, backend=backend, dynamic=True)
    with (
        mock.patch.object(video_module, "attend_rows", attend),
        mock.patch.object(video, "_run_block", compiled),
    ):
        yield


def padded(packed: PackedTokens, multiple: int) -> PackedTokens:
    """With one more clip (to be dropped from the output) whose tokens fill the axis up to a multiple.

    What is a multiple is the rows of layout "joint": tokens, and a CLS each clip.
    """
    if multiple == 1:
        return packed
    count = -(packed.num_tokens + len(packed) + 1) % multiple or multiple
    filler = torch.arange(count).clamp(max=packed.max_seqlen - 1)
    end = packed.cu_seqlens[-1:]
    return replace(
        packed,
        patches=torch.cat([packed.patches, packed.patches[filler]]),
        positions=torch.cat([packed.positions, packed.positions[filler]]),
        run_lengths=torch.cat([packed.run_lengths, packed.run_lengths[filler]]),
        cu_seqlens=torch.cat([packed.cu_seqlens, end + count]),
        max_seqlen=max(packed.max_seqlen, count),
        grids=(*packed.grids, packed.grids[0]),
        coverings=(*packed.coverings, None),
    )


def recompilations(
    bench: Bench, model: VideoTextModel, graphs: GraphCounter, multiple: int
) -> dict[str, float]:
    """Graphs of the first batch, and how many more batches of other lengths need."""
    first = graphs.count
    for keep in (0.3, 0.4, 0.6, 0.8):
        packed = bench.packed(model, bench.clips(model, keep, 2))
        with autocast(bench.device, "bf16"):
            model.video(padded(packed, multiple)).sum().backward()
    return {"graphs of the first batch": first, "graphs of 4 other lengths": graphs.count - first}
