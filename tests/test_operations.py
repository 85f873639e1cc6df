"""The operations as torch.compile and torch.library see them: schemas, shapes without data, whole graphs."""

import shutil

import pytest
import torch
from torch.library import opcheck

from looptap.capture.models.load import load_model
from looptap.capture.models.tap import Packed
from looptap.kernels import attention_pairs, residual_norm  # noqa: F401  they register operations
from looptap.kernels.attention import make_cu_seqlens

LENGTHS = (5, 0, 7, 7)
N, D, H, K, C, M = sum(LENGTHS), 16, 4, 2, 8, 3


def inputs(dtype: torch.dtype) -> dict[str, tuple]:
    """Operation -> arguments."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=dtype):
        return torch.randn(shape, generator=generator).to(dtype)

    packing = (make_cu_seqlens(LENGTHS), max(LENGTHS), C**-0.5)
    qkv = draw(N, H + 2 * K, C)
    q, k, v = qkv.split([H, K, K], dim=1)  # slices of one matrix, as models make them
    q_M, k_M, lse_M = draw(M, N, H, C), draw(M, N, K, C), draw(M, N, H, dtype=torch.float32) + 5
    weights = [torch.rand(D, generator=generator).to(dtype) for _ in range(3)]
    adding = (draw(N, D), draw(N, D), *weights, 1e-5)
    references = [draw(N, D) for _ in range(3)]
    norms = [torch.rand(N, generator=generator) for _ in range(2)]
    chained = [x.unbind() for x in (q_M, k_M, lse_M)]
    return {
        "attention": (q, k, v, *packing),
        "attention_with_statistics": (q, k, v, *packing, 2, True),
        "attention_chain": (*map(list, chained), *packing, [0, 1, 1, 2]),
        "attention_gram": (q_M, k_M, lse_M, *packing),
        "residual_norm": adding,
        "residual_norm_statistics": (*adding, *references),
        "residual_distance": (draw(N, D), draw(N, D), *norms),
    }


def test_every_operation_is_among_them():
    ours = {
        name.split("::")[1].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("looptap::")
    }
    assert ours == inputs(torch.float32).keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", inputs(torch.float32))
@pytest.mark.slow
def test_schema_and_shapes_hold(name, dtype):
    """What it says of aliases and mutation is so, and shapes without data are those with."""
    opcheck(getattr(torch.ops.looptap, name).default, inputs(dtype)[name])


@pytest.mark.parametrize("without", ["block_input", "next_weight"])
def test_schema_and_shapes_hold_without_an_optional_argument(without):
    """Statistics that are not asked for are NaN, which the check of outputs takes for unequal: left out."""
    operation = torch.ops.looptap.residual_norm_statistics.default
    names = [argument.name for argument in operation._schema.arguments]
    arguments = list(inputs(torch.float32)["residual_norm_statistics"])
    arguments[names.index(without)] = None
    opcheck(operation, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", inputs(torch.float32))
def test_compiled_as_one_graph(name):
    torch._dynamo.reset()  # every operation would count as the same function compiled again
    operation = getattr(torch.ops.looptap, name).default
    arguments = inputs(torch.float32)[name]
    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), operation(*arguments), rtol=0, atol=0)


NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[NEEDS_COMPILER, pytest.mark.full])]
)
@pytest.mark.slow
def test_a_model_compiles_as_one_graph(backend):
    model = load_model("random:(1,2x3,1)I,norm=huginn,width=32,heads=4")
    batch = Packed(torch.arange(N) + 40, LENGTHS)
    initial_ND = torch.randn(N, 32, generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        wanted = model(batch, initial_state_ND=initial_ND)
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        got = compiled(batch, initial_state_ND=initial_ND)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
