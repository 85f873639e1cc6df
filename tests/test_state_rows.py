"""States come a block of tokens at a time, the same whatever the block, and never more than one in memory."""

import numpy as np
import pytest
import xarray as xr

from looptap.analysis import state_rows
from looptap.analysis.answers.common_plane import trajectories
from looptap.analysis.answers.distinctness import distinctness
from looptap.analysis.answers.two_scale import acceleration
from looptap.analysis.figures import paths
from looptap.analysis.findings import find
from looptap.analysis.state_rows import StateRows, StateWindow
from looptap.analysis.streaming import iter_sequences
from looptap.tests.synthetic import make_dataset, random_sequences

SHAPE = (1, 3, 5, 1)
LENGTHS = [4, 7, 1, 6]


@pytest.fixture
def every_token() -> tuple[xr.Dataset, list[np.ndarray]]:
    """A Dataset that keeps all tokens' states, and them, [token, depth, hidden] of each sequence."""
    sequences, states = random_sequences(LENGTHS, SHAPE)
    dataset = make_dataset(sequences, SHAPE, states=states).drop_vars(["state", "state_token"])
    state = np.full((dataset.sizes["token"], *states[0].shape[1:]), np.nan, np.float32)
    starts = dataset["sequence_start"].values
    for start, x_TLD in zip(starts[starts >= 0], states, strict=True):
        state[start : start + len(x_TLD)] = x_TLD
    return dataset.assign(state=(("token", "depth_state", "hidden"), state)), states


def test_each_sequence_has_its_own_kept_states(every_token):
    dataset, states = every_token
    found = list(iter_sequences(dataset, ["residual_norm", "state"]))
    assert [list(arrays) for arrays in found] == [["residual_norm"]] * len(LENGTHS)
    for arrays, x_TLD in zip(found, states, strict=True):
        (block,) = arrays.states.blocks()
        np.testing.assert_array_equal(block, x_TLD.astype(np.float32))
    last = make_dataset(*random_sequences(LENGTHS, SHAPE)[:1], SHAPE, states=states)
    for arrays, x_TLD in zip(iter_sequences(last, []), states, strict=True):
        (block,) = arrays.states.blocks()
        np.testing.assert_array_equal(block, x_TLD[-1:].astype(np.float32))


# of 7 tokens: one a block, three and a rest, all; every, from a first one that need not be there
@pytest.mark.parametrize("tokens_a_block", [1, 3, 100])
@pytest.mark.parametrize("every, first", [(1, 0), (2, 1), (3, 0), (5, 9)])
@pytest.mark.parametrize("places", [slice(None), slice(0, 1), np.array([4, 2])], ids=["all", "one", "some"])
def test_blocks_are_the_rows(every_token, monkeypatch, tokens_a_block, every, first, places):
    dataset, states = every_token
    x_TLD = states[1].astype(np.float32)
    K = x_TLD.shape[1] if isinstance(places, slice) else len(places)
    monkeypatch.setattr(state_rows, "_BLOCK_BYTES", tokens_a_block * 4 * K * x_TLD.shape[2])
    start = int(dataset["sequence_start"][1])
    rows = StateRows(StateWindow(dataset["state"], dataset.sizes["token"]), slice(start, start + len(x_TLD)))
    blocks = list(rows.blocks(places, every, first))
    assert all(len(block) <= tokens_a_block for block in blocks)
    wanted = x_TLD[first::every, places]
    np.testing.assert_array_equal(np.concatenate(blocks) if blocks else wanted[:0], wanted)
    assert len(blocks) >= len(wanted) / tokens_a_block


def test_answers_do_not_depend_on_blocks(every_token, monkeypatch):
    dataset, _ = every_token
    whole = [ask(dataset) for ask in (acceleration, distinctness, trajectories)]
    monkeypatch.setattr(state_rows, "_BLOCK_BYTES", 1)
    for ask, before in zip((acceleration, distinctness, trajectories), whole, strict=True):
        xr.testing.assert_allclose(ask(dataset), before, rtol=1e-12)


def test_bits_of_bfloat16_are_read_as_float32(every_token):
    _, states = every_token
    bits = (states[1].astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    state = xr.DataArray(bits, dims=("token", "depth_state", "hidden"), attrs={"bits_of": "bfloat16"})
    (block,) = StateRows(StateWindow(state, len(bits)), slice(0, len(bits))).blocks()
    assert block.dtype == np.float32
    np.testing.assert_array_equal(block.view(np.uint32), bits.astype(np.uint32) << 16)


def test_a_plane_of_many_states_is_fitted_to_some_spread_over_the_store(every_token, monkeypatch):
    dataset, states = every_token
    D, core = states[0].shape[2], slice(1, 16)
    monkeypatch.setattr("looptap.analysis.answers.common_plane._MOST_PRODUCTS", sum(LENGTHS) * 15 * D**2 // 4)
    found = trajectories(dataset)
    assert found.attrs["every"] == 4
    figure = paths.trajectories(find([dataset]))
    assert figure.subtitle.endswith(f"of {found.attrs['num_states']} states, of one in 4 kept tokens")
    chosen = np.concatenate([x[:, core] for x in states])[::4].reshape(-1, D).astype(np.float32)
    assert found.attrs["num_states"] == len(chosen)
    np.testing.assert_allclose(found["mean"], chosen.mean(0, dtype=np.float64), rtol=1e-6, atol=1e-7)
    scale_K = np.linalg.svd(chosen - chosen.mean(0, dtype=np.float64), compute_uv=False)
    np.testing.assert_allclose(found["explained"], (scale_K**2 / (scale_K**2).sum())[:3], rtol=1e-6)


# a window of all, of a sequence and some of the next, of less than one
@pytest.mark.parametrize("tokens_a_block", [100, 9, 3])
def test_short_sequences_are_read_ahead(every_token, monkeypatch, tokens_a_block):
    dataset, states = every_token
    _, K, D = states[0].shape
    monkeypatch.setattr(state_rows, "_BLOCK_BYTES", tokens_a_block * 4 * K * D)
    num_read = []
    monkeypatch.setattr(state_rows, "decoded", lambda values: num_read.append(len(values)) or values.values)
    for arrays, x_TLD in zip(iter_sequences(dataset, []), states, strict=True):
        for _ in range(2):  # two analyses
            found = np.concatenate(list(arrays.states.blocks()))
            np.testing.assert_array_equal(found, x_TLD.astype(np.float32))
    assert max(num_read) <= tokens_a_block
    if tokens_a_block == 100:  # two units, two sequences each
        assert num_read == [LENGTHS[0] + LENGTHS[1], LENGTHS[2] + LENGTHS[3]]
