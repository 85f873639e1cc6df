"""The authors' code on tiny models: our forward pass and statistics against its stored residuals, attention
and logits.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from looptap.capture.models.load import load_model
from looptap.capture.models.tap import Packed
from looptap.capture.tap import Buffers, Statistics

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 1e-4  # the references differ among themselves by up to 3e-5
FEEDFORWARD = ("llama", "olmo2")


def run(name: str):
    """Model, reference tensors, and every statistic of the two stored sequences."""
    model = load_model(str(GOLDEN / name))
    d = model.description
    reference = load_file(GOLDEN / name / "reference.safetensors")
    ids_ST = load_file(GOLDEN / name / "inputs.safetensors")["input_ids"]
    S, T = ids_ST.shape
    names = ("entropy", "peak", "sink", "received")
    values = {f"attention_{n}": torch.full((d.depth, S * T, d.num_heads), float("nan")) for n in names}
    values |= {
        n: torch.full((d.depth, S * T), float("nan"))
        for n in ("residual_norm", "residual_peak", "update_norm")
    }
    state = torch.full((d.depth, S * T, d.width), float("nan"))
    tap = Statistics(d, Buffers(values, state, torch.arange(S * T)), state_depths=range(d.depth))
    with torch.inference_mode():
        logits = model.logits(model(Packed(ids_ST.flatten().long(), (T,) * S), tap))
    return model, reference, values, state, logits


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_every_residual_and_logit(name):
    model, reference, _, state, logits = run(name)
    for step in model.description.steps():
        wanted = reference[f"residual.r0.l{step.layer}"].flatten(0, 1)
        torch.testing.assert_close(state[step.depth], wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits, reference["logits"].flatten(0, 1), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FEEDFORWARD)
def test_statistics_from_the_stored_matrices(name):
    model, reference, values, _, _ = run(name)
    before = reference["embed"].flatten(0, 1)
    for step in model.description.steps():
        a_SHTT = reference[f"attn.r0.l{step.layer}"].double()
        of_matrix = {
            "attention_entropy": torch.special.entr(a_SHTT).sum(-1),
            "attention_peak": a_SHTT.amax(-1),
            "attention_sink": a_SHTT[..., 0],
            "attention_received": a_SHTT.sum(-2),
        }
        for quantity, value_SHT in of_matrix.items():
            wanted_NH = value_SHT.transpose(1, 2).flatten(0, 1).float()
            torch.testing.assert_close(values[quantity][step.depth], wanted_NH, atol=TOLERANCE, rtol=0)
        after = reference[f"residual.r0.l{step.layer}"].flatten(0, 1)
        for quantity, wanted in {
            "residual_norm": after.norm(dim=-1),
            "residual_peak": after.abs().amax(-1),
            "update_norm": (after - before).norm(dim=-1),
        }.items():
            torch.testing.assert_close(values[quantity][step.depth], wanted, atol=TOLERANCE, rtol=1e-5)
        before = after


@pytest.mark.parametrize("name", FEEDFORWARD)
@pytest.mark.parametrize("side", ["padleft", "padright"])
def test_packing_equals_the_references_padding(name, side):
    """The reference pads a batch and masks it; packed, the same tokens need neither."""
    model = load_model(str(GOLDEN / name))
    inputs, reference = (load_file(GOLDEN / name / f"{kind}.safetensors") for kind in ("inputs", "reference"))
    mask = inputs[f"{side}.attention_mask"].bool()
    lengths = tuple(mask.sum(-1).tolist())
    assert len(set(lengths)) > 1, "the fixture pads one row only"
    with torch.inference_mode():
        logits = model.logits(model(Packed(inputs[f"{side}.input_ids"][mask].long(), lengths)))
    torch.testing.assert_close(logits, reference[f"{side}.logits"][mask], atol=TOLERANCE, rtol=0)
