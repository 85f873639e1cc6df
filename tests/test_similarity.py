"""Maps of all pairs of block invocations against their definitions over states and attention."""

import numpy as np
import pytest

from looptap.analysis.answers.similarity import (
    ANALYSES,
    across_and_within,
    attention_distance,
    residual_similarity,
)
from looptap.analysis.depth_axis import depths_of
from looptap.analysis.folds import BAND_Z
from looptap.analysis.walk import walk
from looptap.errors import CannotTellError
from looptap.tests.synthetic import RNG_SEED, SHAPE, make_dataset, random_sequences, write_store


def with_maps(lengths: list[int], shape=SHAPE):
    """Sequences with both maps, and the maps in float64, each [sequence, depth, depth]."""
    sequences, states = random_sequences(lengths, shape)
    rng, similarity, distance = np.random.default_rng(RNG_SEED), [], []
    for sequence, x_TLD in zip(sequences, states, strict=True):
        T, L, _ = x_TLD.shape
        unit = x_TLD / np.linalg.norm(x_TLD, axis=-1, keepdims=True)
        similarity.append(np.einsum("tad,tbd->ab", unit, unit) / T)
        a_LHTT = rng.dirichlet(np.ones(T), (L, 3, T))
        apart = a_LHTT[:, None] - a_LHTT[None]
        distance.append(np.sqrt(np.square(apart).sum((-1, -2))).mean(-1))
        sequence |= {"residual_similarity": similarity[-1][None], "attention_distance": distance[-1][None]}
    return sequences, np.stack(similarity), np.stack(distance)


# 5 sequences over 3 units, the last half empty; 1: a sequence of one token
@pytest.mark.parametrize("name", ["residual_similarity", "attention_distance"])
def test_map_and_its_band_equal_their_definition(name):
    sequences, *maps = with_maps([7, 1, 4, 12, 5])
    found = {"residual_similarity": residual_similarity, "attention_distance": attention_distance}[name](
        make_dataset(sequences, SHAPE, empty_units=1)
    )
    value_SDD = maps[name == "attention_distance"]
    mean, error = value_SDD.mean(0), value_SDD.std(0, ddof=1) / np.sqrt(5)
    got = found[name]
    assert got.dims == ("statistic", "depth", "depth_other")
    np.testing.assert_allclose(got.sel(statistic="value"), mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got.sel(statistic="low"), mean - BAND_Z * error, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(got.sel(statistic="high"), mean + BAND_Z * error, rtol=1e-4, atol=1e-6)
    assert (got.sel(statistic="sequences") == 5).all() and found.attrs["non_finite"] == 0


def test_a_layer_against_itself_and_against_the_others_equals_its_definition():
    sequences, similarity, _ = with_maps([7, 4, 12])
    dataset = make_dataset(sequences, SHAPE)
    found, depths = residual_similarity(dataset), depths_of(dataset)
    same, other = np.zeros((2, 2, 3))
    for layer in range(2):
        for s, value_DD in enumerate(similarity):
            pairs = {"same": [], "other": []}
            for a in range(len(depths)):
                for b in range(len(depths)):
                    if depths.stage[a] != 1 or depths.stage[b] != 1 or depths.layer[a] != layer or a == b:
                        continue
                    if depths.layer[b] == layer:
                        pairs["same"].append(value_DD[a, b])
                    elif depths.recurrence[a] == depths.recurrence[b]:
                        pairs["other"].append(value_DD[a, b])
            same[layer, s], other[layer, s] = np.mean(pairs["same"]), np.mean(pairs["other"])
    for name, value_LS in (("same_layer", same[:2]), ("other_layers", other[:2])):
        mean, error = value_LS.mean(1), value_LS.std(1, ddof=1) / np.sqrt(3)
        np.testing.assert_allclose(found[name].sel(statistic="value"), mean, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found[name].sel(statistic="high"), mean + BAND_Z * error, rtol=1e-4)


def test_a_cycle_of_distinct_points_is_like_itself_and_unlike_its_neighbours():
    core_RL = np.arange(12).reshape(4, 3)
    value_DD = (np.arange(12)[:, None] % 3 == np.arange(12) % 3).astype(float)
    same_L, other_L = across_and_within(value_DD, core_RL)
    np.testing.assert_array_equal(same_L, [1, 1, 1])
    np.testing.assert_array_equal(other_L, [0, 0, 0])


@pytest.mark.parametrize("shape, has", [((3, 0, 0, 0), ""), ((0, 1, 4, 0), "same"), ((0, 3, 1, 0), "other")])
def test_only_pairs_that_exist_have_a_mean(shape, has):
    sequences, similarity, _ = with_maps([4, 6], shape)
    found = residual_similarity(make_dataset(sequences, shape))
    np.testing.assert_allclose(found["residual_similarity"][0], similarity.mean(0), rtol=1e-5, atol=1e-7)
    for name in ("same_layer", "other_layers"):
        assert np.isfinite(found[name][0].values).all() == (name.startswith(has) if has else True)
        assert found.sizes["layer_of_core"] == shape[1]


def test_coordinates_tell_both_depths_apart():
    found = residual_similarity(make_dataset(with_maps([4, 6])[0], SHAPE))
    here = found["residual_similarity"].isel(depth=3, depth_other=9)
    assert (int(here.stage), int(here.layer), int(here.recurrence)) == (1, 0, 1)
    assert (int(here.stage_other), int(here.layer_other), int(here.recurrence_other)) == (2, 0, -1)


def test_what_is_not_finite_is_counted_and_left_out():
    sequences, similarity, _ = with_maps([4, 6, 5])
    sequences[1]["residual_similarity"][0, 2, 5] = np.nan
    found = residual_similarity(make_dataset(sequences, SHAPE))
    assert found.attrs["non_finite"] == 1
    assert int(found["residual_similarity"].sel(statistic="sequences")[2, 5]) == 2
    value = float(found["residual_similarity"].sel(statistic="value")[2, 5])
    assert value == pytest.approx(similarity[[0, 2], 2, 5].mean(), rel=1e-5)
    for sequence in sequences:
        sequence["residual_similarity"][:] = np.nan
    with pytest.raises(CannotTellError, match="no finished sequence has a finite residual_similarity"):
        residual_similarity(make_dataset(sequences, SHAPE))


def test_one_map_does_without_the_other(tmp_path):
    sequences, similarity, _ = with_maps([4, 6, 5])
    for sequence in sequences:
        del sequence["attention_distance"]
    path = write_store(make_dataset(sequences, SHAPE), tmp_path / "one.zarr", units=[1])
    found = walk(path, ANALYSES)
    np.testing.assert_allclose(
        found["residual_similarity"]["residual_similarity"][0], similarity[2], rtol=1e-5
    )
    assert "--quantities distances" in found["attention_distance"]
