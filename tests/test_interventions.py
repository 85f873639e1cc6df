"""Initial states from files, prelude outputs replaced, outputs set to zero: what a capture does with them."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from safetensors.torch import save_file

import looptap
from looptap.capture.models.draws import draw_initial_state
from looptap.capture.models.interventions import Interventions
from looptap.capture.models.load import find_model, load_model
from looptap.capture.models.starts import initial_state, prelude_direction
from looptap.capture.models.tap import Packed, Plain
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.selection import select_halves
from looptap.capture.settings import CaptureSettings

GOLDEN = Path(__file__).parent / "golden"
# norms on the stream: every prelude output has the same norm, so a fixed direction is a fixed vector
TINY = "random:(1,2x4,1)I,norm=huginn,width=32,heads=4"
LENGTHS = (5, 19, 12, 19)
ROWS = [[(31 * i + 7 * j) % 256 for j in range(n)] for i, n in enumerate(LENGTHS)]
EVERYTHING = {"quantities": ("residual", "steps", "gaps", "attention", "lens"), "states": ("all",)}


def capture(model: str = TINY, **settings) -> xr.Dataset:
    return looptap.capture(model, ROWS, **{**EVERYTHING, **settings})


def equal(a: xr.Dataset, b: xr.Dataset) -> bool:
    return all(np.array_equal(a[name].values, b[name].values, equal_nan=True) for name in a.data_vars)


def core_states(dataset: xr.Dataset) -> dict[int, np.ndarray]:
    """States of every sequence's tokens inside the loop, by sequence id."""
    core = dataset.isel(depth_state=dataset["stage"].values == 1)
    ids, owners = dataset["sequence_id"].values, dataset["token_sequence"].values
    return {int(ids[q]): core["state"].values[owners == q] for q in np.flatnonzero(ids >= 0)}


@pytest.fixture
def states_file(tmp_path) -> Path:
    """What the capture would draw by itself, in a file with more tokens than are wanted."""
    states_STD = torch.full((len(ROWS), 23, 32), float("nan"))
    for row, length in enumerate(LENGTHS):
        states_STD[row, :length] = draw_initial_state(3, [row], [length], 32, 1.0)
    save_file({"input_states": states_STD}, tmp_path / "start.safetensors")
    return tmp_path / "start.safetensors"


def test_a_file_of_the_drawn_states_gives_the_drawn_capture(states_file):
    drawn = capture(seed=3, unit_tokens=32)
    read = capture(seed=3, unit_tokens=32, initial_state=str(states_file))
    assert equal(drawn, read)
    other = capture(seed=4, unit_tokens=32)
    assert not equal(drawn, other)
    recorded = read.attrs["plan"]["settings"]["initial_state"]
    assert recorded["file"] == "start.safetensors" and len(recorded["sha256"]) == 64
    assert equal(drawn, capture(seed=3, unit_tokens=32, initial_state="random"))


def test_a_file_may_start_a_loop_that_has_no_drawn_state(tmp_path):
    """The prelude's own output, read from a file, changes nothing."""
    model = "random:(1,2x3,1),norm=pre,width=32,heads=4"
    before = capture(model)
    prelude = before.isel(depth_state=0)["state"].values
    states_STD = torch.zeros(len(ROWS), max(LENGTHS), 32)
    owners, ids = before["token_sequence"].values, before["sequence_id"].values
    for q, row in enumerate(ids):
        states_STD[row, : LENGTHS[row]] = torch.from_numpy(prelude[owners == q])
    save_file({"input_states": states_STD}, tmp_path / "start.safetensors")
    assert equal(before, capture(model, initial_state=str(tmp_path / "start.safetensors")))
    save_file({"input_states": states_STD * 2}, tmp_path / "start.safetensors")
    assert not equal(before, capture(model, initial_state=str(tmp_path / "start.safetensors")))


def test_zero_is_a_file_of_zeros(tmp_path):
    save_file({"input_states": torch.zeros(4, 19, 32)}, tmp_path / "zero.safetensors")
    assert equal(capture(initial_state="zero"), capture(initial_state=str(tmp_path / "zero.safetensors")))


def test_what_is_held_fixed_is_the_same_in_every_sequence():
    """Loop states of two sequences with different tokens are equal where all that enters is held fixed."""
    held = core_states(capture(initial_state="fixed", prelude_output="fixed"))
    np.testing.assert_allclose(held[1], held[3], atol=1e-5)
    np.testing.assert_allclose(held[0], held[1][: LENGTHS[0]], atol=1e-5)
    assert np.abs(held[1][1:] - held[1][:-1]).max() > 0.1, "positions differ"
    for one_is_not in ({"initial_state": "fixed"}, {"prelude_output": "fixed"}):
        free = core_states(capture(**one_is_not))
        # at the first core layer of recurrence 0, where neither has been forgotten
        assert np.abs(free[1][:, 0] - free[3][:, 0]).max() > 0.1
    scattered = core_states(capture(initial_state="fixed", prelude_output="random"))
    assert np.abs(scattered[1][:, 0] - scattered[3][:, 0]).max() > 0.1


def test_draws_have_nothing_to_do_with_one_another():
    """What is held fixed is no sequence's own draw, and a prelude's direction is not the initial state's."""
    own, held = core_states(capture()), core_states(capture(initial_state="fixed"))
    assert all(np.abs(own[row][:, 0] - held[row][:, 0]).max() > 0.1 for row in own)
    start_ND = draw_initial_state(0, range(4), LENGTHS, 32, 1.0)
    fixed_ND = initial_state("fixed", find_model(TINY).description, 0, range(4), LENGTHS, None)
    for wanted in ("random", "fixed"):
        direction_ND = prelude_direction(wanted, 0, range(4), LENGTHS, 32)
        for other_ND in (start_ND, fixed_ND):
            assert abs(torch.corrcoef(torch.stack([direction_ND.flatten(), other_ND.flatten()]))[0, 1]) < 0.1


@pytest.mark.parametrize("settings", [{"prelude_output": "random"}, {"initial_state": "fixed"}])
def test_units_and_batches_change_nothing(settings):
    whole = core_states(capture(unit_tokens=64, batch_tokens=64, **settings))
    cut = core_states(capture(unit_tokens=19, batch_tokens=1, **settings))
    for row in whole:
        np.testing.assert_allclose(cut[row], whole[row], atol=1e-5)


def test_a_turned_prelude_output_keeps_its_norm():
    """Pre-norm, where prelude outputs differ in norm; read where it enters the loop, through the adapter."""
    model = load_model("random:(2,1x1,0)I,norm=pre,width=32,heads=4")
    batch = Packed(torch.tensor(ROWS[1]), (LENGTHS[1],))
    generator = torch.Generator().manual_seed(0)
    direction_ND, initial_ND = (torch.randn(LENGTHS[1], 32, generator=generator) for _ in range(2))

    class Entering(Plain):
        def residual(self, step, half, x_ND, branch_ND, norms):
            result = super().residual(step, half, x_ND, branch_ND, norms)
            if (step.depth, half) == (1, "mlp"):
                self.prelude_ND = result.residual_ND
            if (step.depth, half) == (2, "attention"):
                self.entering_ND = x_ND
            return result

    tap = Entering()
    with torch.inference_mode():
        model(batch, Interventions(prelude_direction_ND=direction_ND * 5).around(tap), initial_ND)
    norm_N = tap.prelude_ND.norm(dim=-1, keepdim=True)
    turned_ND = direction_ND / direction_ND.norm(dim=-1, keepdim=True) * norm_N
    wanted = torch.cat([initial_ND, turned_ND], dim=-1) @ model.adapter.T
    torch.testing.assert_close(tap.entering_ND, wanted, atol=1e-5, rtol=1e-5)
    assert norm_N.max() > 1.2 * norm_N.min()


class Zeroing(Plain):
    """Sets branches to zero where the tap sees them, without knowing of interventions."""

    def __init__(self, halves):
        self.halves, self.residuals = halves, []

    def residual(self, step, half, x_ND, branch_ND, norms):
        branch_ND = (
            branch_ND * 0 if (step.stage, step.layer, step.recurrence, half) in self.halves else branch_ND
        )
        result = super().residual(step, half, x_ND, branch_ND, norms)
        if half == "mlp":
            self.residuals.append(result.residual_ND)
        return result


@pytest.mark.parametrize("norm", ["pre", "ouro", "huginn", "olmo2"])
@pytest.mark.parametrize(
    ("zero", "halves"),
    [
        (("mlp:core[1]",), [("core", 1, r, "mlp") for r in range(3)]),
        (("attention:core[0]@1",), [("core", 0, 1, "attention")]),
        (
            ("mlp:prelude", "attention:coda[0]", "mlp:core[-1]@last"),
            [("prelude", 0, -1, "mlp"), ("coda", 0, -1, "attention"), ("core", 1, 2, "mlp")],
        ),
    ],
)
@pytest.mark.slow
def test_zeroed_outputs(norm, zero, halves):
    model = f"random:(1,2x3,1)I,norm={norm},width=32,heads=4"
    dataset = looptap.capture(model, ROWS[:1], states=("all",), quantities=("residual",), zero=zero)
    tap, loaded = Zeroing(halves), load_model(model)
    with torch.inference_mode():
        start_ND = draw_initial_state(0, [0], [5], 32, 1.0)
        loaded(Packed(torch.tensor(ROWS[0]), (5,)), tap, start_ND)
    wanted = torch.stack(tap.residuals, dim=1).numpy()
    np.testing.assert_allclose(dataset["state"].values[:5], wanted, atol=1e-6)
    untouched = looptap.capture(model, ROWS[:1], states=("all",), quantities=("residual",))
    assert np.abs(untouched["state"].values[:5] - wanted).max() > 0.01


def test_an_attention_that_is_cut_off_is_still_measured():
    cut = capture(zero=("attention:core[0]",))
    core_0 = (cut["stage"].values == 1) & (cut["layer"].values == 0)
    filled = cut["token_sequence"].values >= 0
    assert np.isfinite(cut["attention_entropy"].values[filled][:, core_0]).all()


def test_select_halves():
    d = find_model(TINY).description
    assert select_halves((), d) == frozenset()
    assert select_halves(("mlp:core[1]@0,last", "attention:all"), d) == {
        (2, "mlp"),
        (8, "mlp"),
        *((depth, "attention") for depth in range(10)),
    }


def test_a_store_goes_on_with_the_same_interventions_only(tmp_path):
    np.save(tmp_path / "ids.npy", np.array([ROWS[1], ROWS[3]]))
    settings = CaptureSettings.of(
        model=TINY, data=tmp_path / "ids.npy", store=tmp_path / "s", quantities=("residual",),
        zero=("mlp:core[1]",), prelude_output="fixed", initial_state="zero",
    )  # fmt: skip
    run_capture(make_plan(settings))
    assert run_capture(make_plan(settings)).num_resumed == 1
    for change, named in (
        ({"zero": ()}, r"settings\.zero: \['mlp:core\[1\]'\] -> \[\]"),
        ({"prelude_output": "random"}, r"settings\.prelude_output: fixed -> random"),
        ({"initial_state": None}, r"settings\.initial_state: zero -> None"),
    ):
        with pytest.raises(ValueError, match=named):
            run_capture(make_plan(settings.but(**change)))


FEEDFORWARD, PLAIN_LOOP = "random:(3,0,0),width=32,heads=4", "random:(1,2x3,1),norm=pre,width=32,heads=4"


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (
            TINY,
            {"initial_state": "nowhere.safetensors"},
            r"nowhere\.safetensors is no file; give random, fixed, zero",
        ),
        (FEEDFORWARD, {"initial_state": "zero"}, r"\(3,0,0\) has no loop that could start"),
        (PLAIN_LOOP, {"initial_state": "fixed"}, r"starts from the prelude's output; give a file, or"),
        (FEEDFORWARD, {"prelude_output": "fixed"}, r"\(3,0,0\) has no loop after it"),
        (TINY, {"zero": ("core[0]",)}, r"zero 'core\[0\]': write mlp:STAGE"),
        (
            TINY,
            {"zero": ("mlp:core[2]",)},
            r"zero 'mlp:core\[2\]': after the colon, 2 is not among the layers",
        ),
        (TINY, {"zero": ("mlp:coda[0]@1",)}, r"only the core has recurrences"),
        (TINY, {"zero": ("norm:core",)}, r"zero 'norm:core': write mlp:"),
        (TINY, {"quantities": ("exit_probability",)}, r"cannot be captured: this model has no exit gate"),
        (FEEDFORWARD, {"quantities": ("lens_kl",)}, r"lens_kl cannot be captured: \(3,0,0\) has no loop"),
        (FEEDFORWARD, {"quantities": ("lens",)}, r"lens holds nothing of this model: \(3,0,0\) has no loop"),
    ],
)
def test_what_the_model_does_not_have_is_refused(model, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        looptap.capture(model, ROWS, tmp_path / "s", **settings)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"states": torch.zeros(4, 19, 32)}, r"has no tensor input_states; it holds states"),
        (
            {"input_states": torch.zeros(3, 19, 32)},
            r"is \[3, 19, 32\], and the data's 4 rows of up to 19 tokens",
        ),
        ({"input_states": torch.zeros(4, 18, 32)}, r"need \[4, 19, 32\]; more rows and tokens may be there"),
        ({"input_states": torch.zeros(4, 19, 31)}, r"at width 32 need"),
        ({"input_states": torch.zeros(76, 32)}, r"is \[76, 32\]"),
        ({"input_states": torch.zeros(4, 19, 32, dtype=torch.int32)}, r"of type I32; floats are wanted"),
        (
            {"input_states": torch.zeros(4, 19, 32).index_fill(1, torch.tensor(7), float("nan"))},
            r"of row 1, position 7 is not finite",  # row 0 has five tokens
        ),
        (
            {"input_states": torch.full((4, 19, 32), 1e300, dtype=torch.float64)},
            r"row 0, position 0 is not finite",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tensors, message, tmp_path):
    save_file(tensors, tmp_path / "start.safetensors")
    with pytest.raises(ValueError, match=message):
        looptap.capture(TINY, ROWS, tmp_path / "s", initial_state=str(tmp_path / "start.safetensors"))
    (tmp_path / "start.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        looptap.capture(TINY, ROWS, tmp_path / "s", initial_state=str(tmp_path / "start.safetensors"))
    assert not (tmp_path / "s").exists()
