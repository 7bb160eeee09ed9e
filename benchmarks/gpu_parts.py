"""Parts 1 and 4 to 7 of benchmarks/gpu.py: ceilings, the tokenizer, attention kernels, copies and search.

Shapes: B clips, T frames, C = 3 channels, H x W pixels, D dimensions, Q queries, V vectors.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Iterator
from typing import Any

import measuring
import numpy as np
import torch
from gpu_bench import KEEPS, LAYOUTS, Aim, Bench, Case, Row, Run
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval import RunLengthTokenizer, pack
from rlt_retrieval.encoders.attention import attend_biased
from rlt_retrieval.indexing.vectors import require_faiss

# --- 1: what the card can do ------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> Iterator[Case]:
    yield "bf16 matmul", lambda: matmul_ceiling(bench)
    yield "device copy", lambda: copy_ceiling(bench)


def matmul_ceiling(bench: Bench) -> Row:
    side = bench.sizes.matmul_side
    a, b = (torch.randn(side, side, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    seconds = bench.seconds({"matmul": lambda: a @ b})["matmul"]
    bench.flops_ceiling = 2 * side**3 / seconds
    return Row(1, f"bf16 matmul, {side} x {side}", {"TFLOP/s": bench.flops_ceiling / 1e12})


def copy_ceiling(bench: Bench) -> Row:
    source = torch.randint(0, 256, (bench.sizes.copy_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds({"copy": lambda: target.copy_(source)})["copy"]
    bench.copy_ceiling = 2 * len(source) / seconds
    return Row(1, "device copy, bytes read and written", {"GB/s": bench.copy_ceiling / 1e9})


# --- 4: tokenize on the device ----------------------------------------------------------------------------------


def tokenize(bench: Bench) -> Iterator[Case]:
    """The fused kernels first, for they are what is judged; compiling a mask takes long, so one tokenizer's alone."""
    settings = (("anchor", 8), ("anchor", 0), ("previous", 0))
    cases = [(*setting, way) for way in ("fused", "eager") for setting in settings]
    for reference, every, way in (*cases, (*settings[0], "compiled mask")):
        label = f"{reference}, refresh {every}, {way}"
        yield label, functools.partial(tokenize_case, bench, reference, every, way, label)


@torch.inference_mode()
def tokenize_case(bench: Bench, reference: Any, every: int, way: str, label: str) -> Row:
    """Bytes count once: every frame is read, every kept patch written."""
    model = bench.model(bench.first_backbone, "frame")
    patch = model.video.tower.patch_size
    tokenizer = RunLengthTokenizer(patch, reference=reference, refresh_every=every)
    frames_BTCHW = bench.clips(model, 0.5, bench.sizes.tokenizer_clips).to(bench.device)
    run = tokenizing(way, tokenizer, frames_BTCHW, bench.compiler)
    seconds = bench.seconds({way: run}, repeats=3)[way]
    expected = pack([tokenizer(frames_TCHW) for frames_TCHW in frames_BTCHW])
    moved = frames_BTCHW.numel() + expected.patches.numel()
    figures = {"GB/s": moved / seconds / 1e9, "ms": 1e3 * seconds}
    aims = []
    if bench.copy_ceiling is not None:
        aims.append(
            Aim(f"tokenize, {label}: share of copy bandwidth", moved / seconds / bench.copy_ceiling, 0.5)
        )
    if bench.encode_seconds is not None:
        share = seconds / len(frames_BTCHW) / bench.encode_seconds
        aims.append(Aim(f"tokenize, {label}: share of encode time", share, 0.01, at_least=False))
    figures |= {aim.name.split(": ")[1]: aim.value for aim in aims}
    if way != "fused":
        return Row(4, label, figures, note="a clip at a time" + ("; mask alone" if way != "eager" else ""))
    if bench.is_cuda:
        figures["waits for the device"] = num_waits(run)
        aims.append(
            Aim(f"tokenize, {label}: waits for the device", figures["waits for the device"], 1, False)
        )
    seen = run()
    names = ("patches", "positions", "run_lengths", "cu_seqlens")
    is_equal = all(torch.equal(getattr(seen, name), getattr(expected, name)) for name in names)
    aims.append(Aim(f"tokenize, {label}: equal to the plain tokenizer", float(is_equal), 1))
    return Row(4, label, figures, tuple(aims))


def tokenizing(way: str, tokenizer: RunLengthTokenizer, frames_BTCHW: Tensor, compiler: str) -> Run:
    if way == "fused":
        from rlt_retrieval.encoders.fused import tokenize_on_device  # needs Triton

        return lambda: tokenize_on_device(frames_BTCHW, tokenizer)
    if way == "eager":
        return lambda: pack([tokenizer(frames_TCHW) for frames_TCHW in frames_BTCHW])
    keep_mask = torch.compile(tokenizer.keep_mask, backend=compiler)
    return lambda: [keep_mask(frames_TCHW) for frames_TCHW in frames_BTCHW]


def num_waits(run: Run) -> int:
    """How often a warmed-up call waits for the device."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    # Switching this mode on warns too, of what it does not see.
    return sum("called a synchronizing" in str(warning.message) for warning in caught)


# --- 5: attention -----------------------------------------------------------------------------------------------


def attention(bench: Bench) -> Iterator[Case]:
    for layout in LAYOUTS:
        for head_size in (64, 80):
            for biased in (False, True):
                for backend in ("flash_attn", "torch", "sdpa"):
                    label = f"{layout}, head size {head_size}{', length bias' if biased else ''}, {backend}"
                    yield (
                        label,
                        functools.partial(attention_case, bench, layout, head_size, biased, backend, label),
                    )


def attention_case(bench: Bench, layout: str, head_size: int, biased: bool, backend: Any, label: str) -> Row:
    """Joint: whole clips of half their tokens; frame: half of a frame's tokens over all of its keys."""
    frames, whole = bench.sizes.attended_frames, bench.sizes.attended_clip
    lengths = ([98] * frames, [197] * frames) if layout == "frame" else ([whole] * max(1, frames // 16),) * 2
    cu_q, cu_k = (F.pad(torch.tensor(x).cumsum(0), (1, 0)).int().to(bench.device) for x in lengths)
    shape = bench.sizes.heads, head_size
    q, k, v = (
        torch.randn(sum(x), *shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
        for x in (lengths[0], lengths[1], lengths[1])
    )
    bias = torch.rand(len(k), device=bench.device) if biased else None

    def forward() -> Tensor:
        return attend_biased(q, k, v, cu_q, cu_k, lengths[0][0], lengths[1][0], bias, backend=backend)

    def both() -> None:
        q.grad = k.grad = v.grad = None
        forward().sum().backward()

    flops = 4 * shape[0] * head_size * sum(a * b for a, b in zip(*lengths, strict=True))
    with torch.no_grad():
        seconds = bench.seconds({"forward": forward}, repeats=3)["forward"]
    seconds_both = bench.seconds({"both": both}, repeats=3)["both"]
    figures = {"forward TFLOP/s": flops / seconds / 1e12, "forward ms": 1e3 * seconds}
    figures |= {
        "with gradients TFLOP/s": 3.5 * flops / seconds_both / 1e12,
        "with gradients ms": 1e3 * seconds_both,
    }
    return Row(5, label, figures)


# --- 6: host to device ------------------------------------------------------------------------------------------


def transfer(bench: Bench) -> Iterator[Case]:
    for keep in KEEPS:
        yield f"keep {keep:g}", functools.partial(transfer_case, bench, keep)


@torch.inference_mode()
def transfer_case(bench: Bench, keep: float) -> Row:
    """Bytes a clip, and how much of the copy hides behind the encoding of the batch before.

    One batch's copy is too short beside its encoding to be told from noise, so it is made as often as fills half of it.
    """
    model = bench.model(bench.first_backbone, "frame")
    frames_BTCHW = bench.clips(model, keep, bench.sizes.clips[bench.first_backbone])
    packed = bench.packed(model, frames_BTCHW)
    figures = {
        "packed KB/clip": packed.patches.nbytes / len(packed) / 1e3,
        "frames KB/clip": frames_BTCHW.nbytes / len(packed) / 1e3,
    }
    if not bench.is_cuda:
        return Row(6, f"keep {keep:g}", figures, note="no copy to overlap on a CPU")
    side, resident = torch.cuda.Stream(), bench.resident(packed)
    source, target = packed.patches.pin_memory(), torch.empty_like(resident.patches)

    def upload(times: int) -> None:
        for _ in range(times):
            target.copy_(source, non_blocking=True)

    def encode_resident() -> None:
        model.encode_tokens(resident)

    def together(times: int) -> None:
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            upload(times)
        encode_resident()
        torch.cuda.current_stream().wait_stream(side)

    alone = bench.seconds({"copy": lambda: upload(1), "encode": encode_resident})
    times = max(1, round(alone["encode"] / alone["copy"] / 2))
    seen = bench.seconds(
        {"copies": lambda: upload(times), "encode": encode_resident, "together": lambda: together(times)}
    )
    hidden = (seen["copies"] + seen["encode"] - seen["together"]) / min(seen["copies"], seen["encode"])
    figures |= {f"{what} ms": 1e3 * seconds for what, seconds in (alone | seen).items()}
    figures |= {"GB/s": source.nbytes / alone["copy"] / 1e9, "copies": times, "share of them hidden": hidden}
    return Row(6, f"keep {keep:g}", figures)


# --- 7: search --------------------------------------------------------------------------------------------------


def search(bench: Bench) -> Iterator[Case]:
    yield "flat", lambda: flat_case(bench)
    yield "IVF", lambda: ivf_case(bench)


def flat_case(bench: Bench) -> Row:
    """All vectors on the GPU in float16; the CPU searches its fastest exact index of fewer, and is scaled up."""
    faiss, sizes = require_faiss(), bench.sizes
    on_cpu = faiss.IndexFlatIP(sizes.dimension)
    on_cpu.add(vectors(bench, 0, sizes.cpu_vectors))
    scale = sizes.vectors / sizes.cpu_vectors
    figures = search_times(bench, "CPU", on_cpu, scale)
    note = f"CPU: {sizes.cpu_vectors:,} vectors, time x {scale:g}"
    if not sees_gpu(faiss):
        return Row(7, "flat", figures, note=f"{note}; this faiss sees no GPU")
    config = faiss.GpuIndexFlatConfig()
    config.useFloat16 = True
    resources = faiss.StandardGpuResources()
    on_gpu = faiss.GpuIndexFlatIP(resources, sizes.dimension, config)
    for start in range(0, sizes.vectors, sizes.cpu_vectors):
        on_gpu.add(vectors(bench, start, sizes.cpu_vectors))
    return Row(
        7,
        f"flat, {sizes.vectors:,} x {sizes.dimension}",
        figures | search_times(bench, "GPU", on_gpu),
        note=note,
    )


def ivf_case(bench: Bench) -> Row:
    """The same inverted lists in float16 on both: built where there is a GPU, then copied to the host."""
    faiss, sizes = require_faiss(), bench.sizes
    count = sizes.vectors if sees_gpu(faiss) else sizes.cpu_vectors
    kind = sizes.dimension, sizes.lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    if sees_gpu(faiss):
        resources = faiss.StandardGpuResources()
        index = faiss.GpuIndexIVFScalarQuantizer(resources, *kind, False)
    else:
        quantizer = faiss.IndexFlatIP(sizes.dimension)
        index = faiss.IndexIVFScalarQuantizer(quantizer, *kind, False)
    index.train(vectors(bench, 0, min(count, 64 * sizes.lists)))
    for start in range(0, count, sizes.cpu_vectors):
        index.add(vectors(bench, start, sizes.cpu_vectors))
    index.nprobe = min(64, sizes.lists)
    case = f"IVF {sizes.lists}, 64 probes, {count:,} x {sizes.dimension}"
    if not sees_gpu(faiss):
        return Row(7, case, search_times(bench, "CPU", index), note="this faiss sees no GPU")
    on_cpu = faiss.index_gpu_to_cpu(index)
    on_cpu.nprobe = index.nprobe
    return Row(7, case, search_times(bench, "CPU", on_cpu) | search_times(bench, "GPU", index))


def sees_gpu(faiss: Any) -> bool:
    return hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0


def vectors(bench: Bench, seed: int, count: int) -> np.ndarray:
    """float32 [V, D], unit norm; drawn on the device, for that is much faster."""
    generator = torch.Generator(bench.device).manual_seed(seed)
    drawn_VD = torch.randn(count, bench.sizes.dimension, device=bench.device, generator=generator)
    return F.normalize(drawn_VD, dim=-1).cpu().numpy()


def search_times(bench: Bench, where: str, index: Any, scale: float = 1.0) -> dict[str, float]:
    """Milliseconds of a search for the nearest ten, by batch; host time, for FAISS returns when it is done."""
    times = {}
    for batch in bench.sizes.batches:
        queries_QD = vectors(bench, 1 << 40, batch)
        index.search(queries_QD, 10)
        seconds = statistics.median(
            measuring.seconds(lambda q=queries_QD: index.search(q, 10)) for _ in range(3)
        )
        times[f"{where} ms, batch {batch}"] = 1e3 * seconds * scale
    return times
