"""What people hand to looptap from Python: taken as it is plainly meant, or refused by name."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import looptap
from looptap.capture.settings import CaptureSettings
from looptap.capture.watch.write import hash_weights
from looptap.errors import DataError, RequestError, UserError
from looptap.tests.golden_files import GOLDEN

MODEL = "random:(0,1x2,0)I,width=16,heads=2"
IDS = [[1, 2, 3], [4, 5]]


def same(one, other) -> bool:
    return one.drop_attrs().identical(other.drop_attrs())


@pytest.mark.parametrize("states", ["core[all]@last", ["core[all]@last"], lambda: iter(["core[all]@last"])])
@pytest.mark.parametrize("quantities", ["residual", ["residual"], {"residual": 1}.keys()])
def test_one_value_or_any_sequence_stands_for_a_tuple(states, quantities):
    states = states() if callable(states) else states
    settings = CaptureSettings.of(
        model=MODEL, data=Path("x"), store="y", states=states, quantities=quantities
    )
    assert settings.measure.states == ("core[all]@last",) and settings.measure.quantities == ("residual",)
    assert settings.but(seed=3).measure.states == ("core[all]@last",)


def test_texts_are_taken_from_anything_that_tells_them_in_order():
    texts = ["ab", "cdef"]
    wanted = looptap.capture(MODEL, texts)
    for rows in (tuple(texts), (text for text in texts), np.array(texts), dict.fromkeys(texts).keys()):
        assert same(looptap.capture(MODEL, rows), wanted)
    limited = looptap.capture(MODEL, iter(texts), limit=1)
    assert limited.sequence_length.values.sum() == 2


def test_ids_are_taken_from_arrays_and_tensors():
    matrix = [[1, 2, 3], [4, 5, 6]]
    wanted = looptap.capture(MODEL, matrix)
    for rows in (np.array(matrix), torch.tensor(matrix), iter(matrix), [torch.tensor(row) for row in matrix]):
        assert same(looptap.capture(MODEL, rows), wanted)


@pytest.mark.parametrize("rows", [{"text": ["ab"]}, {"ab", "cd"}, b"ab"])
def test_what_has_no_rows_in_order_is_refused(rows):
    with pytest.raises(RequestError, match=f"data is a {type(rows).__name__}, which has no rows in order"):
        looptap.capture(MODEL, rows)


@pytest.mark.parametrize("rows", [[{"text": "ab"}], [1, 2, 3], [[1.5]], ["ab", [1]], [None], []])
def test_rows_that_are_neither_texts_nor_ids_are_refused(rows):
    with pytest.raises((RequestError, DataError)):
        looptap.capture(MODEL, rows)


def test_a_text_is_no_data():
    with pytest.raises(UserError, match="is no file"):
        looptap.capture(MODEL, "Two trains leave the station.")


def test_a_model_may_be_a_path():
    path = GOLDEN / "llama"
    wanted = looptap.capture(str(path), IDS)
    found = looptap.capture(path, IDS)
    assert same(found, wanted) and found.attrs["plan"]["model"] == wanted.attrs["plan"]["model"]
    assert looptap.load_model(path).description == looptap.load_model(str(path)).description


class Wrapped(torch.Tensor):
    """A class of its own around plain tensors, as sharded and quantised weights are."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner, self.mesh = inner, None

    def __tensor_flatten__(self):
        return ["inner", "mesh"], None  # torch 2.13 names what is no tensor as well

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return Wrapped(args[0].inner)


class Part:
    """A mesh of several processes."""

    def size(self) -> int:
        return 2


def module_with(weight: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("weight", weight)
    return module


def test_the_hash_of_weights_is_of_their_bytes_or_not_known():
    one, other = torch.arange(6.0), torch.arange(6.0) + 1
    for kind in (lambda t: t, nn.Parameter, Wrapped):
        hashes = [hash_weights(module_with(kind(weight))) for weight in (one, one.clone(), other)]
        assert hashes[0] == hashes[1] != hashes[2] and None not in hashes
    part = Wrapped(one)
    part.device_mesh = Part()
    part.detach = lambda: part
    meta = torch.empty(3, device="meta")
    for unknown in (part, meta, one.to_sparse(), torch.quantize_per_tensor(one, 0.1, 0, torch.qint8)):
        assert hash_weights(module_with(unknown)) is None


SHARDED = """
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from looptap.capture.watch.write import hash_weights
dist.init_process_group("gloo", init_method="file://" + __import__("sys").argv[1], rank=0, world_size=1)
for seed in (0, 0, 1):
    torch.manual_seed(seed)
    module = torch.nn.Linear(4, 4)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    print(hash_weights(module))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_models_are_told_apart(tmp_path):
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "group")]
    one, again, other = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert one == again != other and len(one) == len(other) == 64


def test_a_module_whose_weights_cannot_be_read_is_recorded_as_unknown(tmp_path):
    module = nn.Sequential(nn.Embedding(9, 4), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    module.register_buffer("elsewhere", torch.empty(2, device="meta"))
    with looptap.watch(module, "1.*", quantities=("residual",)) as watched:
        module(torch.tensor([[1, 2, 3]]))
    assert watched.dataset().attrs["plan"]["model"]["weights_sha256"] is None
