"""Loading takes little host memory beyond the model itself, measured in processes that do nothing else."""

import pytest

from looptap.benchmarks.bench_load import measure_load, write_checkpoint
from looptap.benchmarks.bench_settings import LoadBench

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_peak_memory_of_loading(tmp_path, stored):
    """Peaks are measured in the stored dtype and in the other, of 200 MB in eight shards."""
    path = tmp_path / "model"
    write_checkpoint(path, LoadBench(megabytes=200, stored=stored))
    sizes = [file.stat().st_size for file in path.glob("*.safetensors")]
    assert len(sizes) == 8 and abs(sum(sizes) / 200e6 - 1) < 0.05 and max(sizes) < 1.5 * sum(sizes) / 8
    for dtype in ("float32", "bfloat16"):
        found = measure_load(path, dtype)
        assert found["model_bytes"] == pytest.approx(
            sum(sizes) * {"float32": 4, "bfloat16": 2}[dtype] / {"float32": 4, "bfloat16": 2}[stored],
            rel=1e-3,
        )
        assert found["beyond_bytes"] < 1.2 * max(sizes), dtype
    # what is measured would show a loader that keeps the shards
    assert measure_load(path, stored, "safetensors")["beyond_bytes"] > 5 * max(sizes)
