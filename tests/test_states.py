"""States on their way from the model to the disk: chunks of every depth fill batch by batch."""

import json

import numpy as np
import pytest
import torch
import zarr

from looptap.benchmarks.bare_plan import bare_plan
from looptap.capture.plan import make_plan
from looptap.capture.plan_cost import ring_bytes
from looptap.capture.run import prepare_store, run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.layout import BFLOAT16_NAN, ArraySpec, create_store
from looptap.capture.store.writing.attempt import begin_attempt
from looptap.capture.store.writing.commit import Store
from looptap.capture.store.writing.ring import PAGE_BYTES, Ring
from looptap.capture.store.writing.shard import buffer_bytes
from looptap.capture.taps.state_stream import StateStream, make_ring, num_buffers
from looptap.capture.taps.statistics import StateSink
from looptap.capture.worker import Worker

CPU = torch.device("cpu")
DEPTHS, HIDDEN, ROWS = 3, 5, 1024


def make_store(path, dtype: str) -> Store:
    attributes = {"bits_of": "bfloat16"} if dtype == "uint16" else {}
    shape = (ROWS, DEPTHS, HIDDEN)
    axes = ("token", "depth_state", "hidden")
    spec = ArraySpec(axes, shape, ROWS, dtype, attributes, "none", shard_rows=512)  # and so are buffers
    create_store(path, plan=bare_plan(1), coordinates={}, arrays={"state": spec})
    return Store.open(path)


# rows of each batch: nothing; one row; exactly a chunk and one more; over three chunks' ends; a ragged tail
@pytest.mark.parametrize(
    "batches", [[0], [1], [512], [513], [1, 511, 512], [511, 1, 3], [100, 0, 900], [3, 500, 20, 77]]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stream_writes_rows_in_order(tmp_path, batches, dtype):
    stored_as = "uint16" if dtype == "bfloat16" else dtype
    store = make_store(tmp_path / "run.zarr", stored_as)
    generator = torch.Generator().manual_seed(0)
    total = sum(batches)
    states_LKD = torch.randn(DEPTHS, total, HIDDEN, generator=generator).to(getattr(torch, dtype))
    if total > 2:
        states_LKD[1, 2, 3] = torch.inf
        states_LKD[2, total - 1, 0] = torch.nan
    with begin_attempt(store, 0) as attempt:
        writer = attempt.open_writer("state", ring=make_ring(store.arrays["state"], CPU))
        stream = StateStream(writer, states_LKD.dtype, CPU)
        first = 0
        for num_rows in batches:
            for depth in range(DEPTHS):
                stream.add(depth, states_LKD[depth, first : first + num_rows])
            first += num_rows
        assert stream.finish() == (2 if total > 2 else 0)
        attempt.commit({"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}})
    assert writer.ring._free.qsize() == num_buffers(DEPTHS)
    found = np.asarray(zarr.open_array(str(tmp_path / "run.zarr"), path="state")[...])
    bits_LKD = states_LKD.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
    bits = f"i{found.dtype.itemsize}"
    np.testing.assert_array_equal(found[:total].view(bits), bits_LKD.transpose(1, 0, 2))
    tail = found[total:]
    assert (tail == BFLOAT16_NAN).all() if dtype == "bfloat16" else np.isnan(tail).all()


def test_stream_copies_what_it_is_given(tmp_path):
    """The model may write over its tensors when the tap has returned."""
    store = make_store(tmp_path / "run.zarr", "float32")
    state_ND = torch.ones(ROWS, HIDDEN)
    with begin_attempt(store, 0) as attempt:
        stream = StateStream(
            attempt.open_writer("state", ring=make_ring(store.arrays["state"], CPU)), torch.float32, CPU
        )
        for depth in range(DEPTHS):
            state_ND.fill_(depth)
            stream.add(depth, state_ND)
        state_ND.fill_(-1)
        stream.finish()
        attempt.commit({"num_sequences": 1, "num_tokens": 1, "seconds": 0.0, "non_finite": {}})
    found = np.asarray(zarr.open_array(str(tmp_path / "run.zarr"), path="state")[...])
    np.testing.assert_array_equal(found, np.broadcast_to(np.arange(DEPTHS)[:, None], found.shape))


def test_ring_that_could_run_dry_is_refused(tmp_path):
    store = make_store(tmp_path / "run.zarr", "float32")
    with begin_attempt(store, 0) as attempt:
        writer = attempt.open_writer("state", ring=Ring(DEPTHS, buffer_bytes(store.arrays["state"])))
        with pytest.raises(AssertionError, match="run dry"):
            StateStream(writer, torch.float32, CPU)
        attempt.discard()


class Everything:
    """What the tap gave, in order."""

    def __init__(self, num_depths: int) -> None:
        self.parts: list[list[torch.Tensor]] = [[] for _ in range(num_depths)]

    def add(self, index: int, kept_KD: torch.Tensor) -> None:
        self.parts[index].append(kept_KD.clone())


# unit 640: inner chunks of 320, which neither sequences nor batches end at
@pytest.mark.parametrize("tokens", ["all", "every:3", "last"])
@pytest.mark.parametrize("codec", ["none", "lossless"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_capture_streams_the_very_residuals(tmp_path, tokens, codec, dtype):
    lengths = [200, 190, 150, 90, 140, 133, 120, 1, 70]
    data = tmp_path / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": ("abcdefg" * n)[:n]}) + "\n" for n in lengths))
    settings = CaptureSettings.of(
        model="random:(1,2x3,0)I,width=32,heads=2", data=data, store=tmp_path / "run.zarr", dtype=dtype,
        quantities=("residual_norm",), states=("prelude", "core[-1]@0,last"), tokens=tokens,
        state_codec=codec, unit_tokens=640, batch_tokens=256,
    )  # fmt: skip
    plan = make_plan(settings)
    outcome = run_capture(plan)
    assert outcome.complete
    store = Store.open(settings.run.store)
    worker = Worker(plan.load_model(), store)
    stored = np.asarray(zarr.open_array(str(settings.run.store), path="state")[...])
    for unit in range(store.num_units):
        sink: StateSink = Everything(len(plan.state_depths))
        worker._measure(unit, worker._sequences(unit), sink)
        expected = torch.stack([torch.cat(parts) for parts in sink.parts], 1)
        if dtype == "bfloat16":
            expected = expected.view(torch.int16)
        K = len(expected)
        slots = np.asarray(store.group()["state_token" if tokens != "all" else "token_id"])
        assert (slots.reshape(store.num_units, -1)[unit] >= 0).sum() == K
        here = stored[unit * store.unit_rows("state") :][: store.unit_rows("state")]
        np.testing.assert_array_equal(here[:K].view(expected.numpy().dtype), expected.numpy())
        assert (here[K:] == BFLOAT16_NAN).all() if dtype == "bfloat16" else np.isnan(here[K:]).all()
    assert store.plan.settings.state_codec == codec
    ring = make_ring(store.arrays["state"], CPU)
    assert ring_bytes(plan) == ring.num_buffers * ring.num_bytes, "what the plan says it takes"


def test_failed_unit_gives_every_buffer_back(tmp_path):
    settings = CaptureSettings.of(
        model="random:(1,2x3,0)I,width=32,heads=2", data=tmp_path / "ids.npy", store=tmp_path / "run.zarr",
        quantities=("residual_norm",), states=("all",), batch_tokens=8,
    )  # fmt: skip
    np.save(tmp_path / "ids.npy", np.ones((3, 8), np.int64))
    plan = make_plan(settings)
    worker = Worker(plan.load_model(), prepare_store(plan))
    calls = []
    measure = worker._measure_batch

    def fail_in_the_second(batch, buffers) -> None:
        measure(batch, buffers)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("a bad kernel")

    worker._measure_batch = fail_in_the_second
    with pytest.raises(RuntimeError, match="a bad kernel"):
        worker.run(0)
    assert worker._ring is not None
    assert worker._ring._free.qsize() == worker._ring.num_buffers
    assert not any((tmp_path / "run.zarr" / "state").glob("c.*"))
    worker._measure_batch = measure
    assert worker.run(0)["attempt"] == 2


class FakeRuntime:
    """CUDA's, as far as pinning goes."""

    def __init__(self, answer: int) -> None:
        self.answer, self.pinned = answer, {}

    def cudaHostRegister(self, address: int, num_bytes: int, flags: int) -> int:
        self.pinned[address] = num_bytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_memory_is_pinned_as_long_as_a_buffer_of_it_lives(tmp_path, monkeypatch):
    store = make_store(tmp_path / "run.zarr", "float32")
    runtime = FakeRuntime(0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    ring = make_ring(store.arrays["state"], torch.device("cuda"))
    buffer = ring.take()
    num_bytes = -(-ring.num_bytes // PAGE_BYTES) * PAGE_BYTES * num_buffers(DEPTHS)
    assert list(runtime.pinned.values()) == [num_bytes]
    (start,) = runtime.pinned
    assert start % PAGE_BYTES == 0
    assert start <= buffer.ctypes.data <= start + num_bytes - len(buffer)
    del ring
    assert runtime.pinned, "a buffer may be in use by a copy"
    del buffer
    assert not runtime.pinned


def test_memory_that_cuda_does_not_pin(tmp_path, monkeypatch):
    store = make_store(tmp_path / "run.zarr", "float32")
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeRuntime(2))
    with pytest.raises(RuntimeError, match=r"CUDA did not pin 0 MiB .*error 2.*fewer depths with --states"):
        make_ring(store.arrays["state"], torch.device("cuda"))
