"""Search on a GPU gives the CPU's answer, float16 included."""

import numpy as np
import pytest

from rlt_retrieval.indexing.vectors import VectorIndex, require_faiss

pytestmark = pytest.mark.needs_cuda


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_a_search_on_the_gpu_equals_one_on_the_cpu(float16: bool, k: int) -> None:
    """Scores and order to the last bit, ties among repeated vectors included."""
    faiss = require_faiss()
    if not (hasattr(faiss, "StandardGpuResources") and faiss.get_num_gpus() > 0):
        pytest.skip("this faiss sees no GPU: install the extra rlt-retrieval[gpu]")
    rng = np.random.default_rng(0)
    vectors_ND = rng.standard_normal((5000, 64), dtype=np.float32)
    vectors_ND[4000:] = vectors_ND[:1000]
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    queries_QD = rng.standard_normal((7, 64), dtype=np.float32)
    chunks = [(np.arange(5000), vectors_ND)]
    on_cpu = VectorIndex.build(64, chunks)
    on_gpu = VectorIndex.build(64, chunks, device="cuda", float16=float16)
    assert on_gpu._gpu is not None
    assert on_gpu.search(queries_QD, k) == on_cpu.search(queries_QD, k)
