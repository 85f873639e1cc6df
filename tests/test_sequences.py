"""Single sequences: the right ones, with their own values, and no more of them as the store grows."""

import numpy as np
import pandas as pd
import pytest

from looptap.analysis.analyze import write_analysis
from looptap.analysis.answers.single_sequences import (
    MOST_SEQUENCES,
    SEQUENCE_MEASURES,
    long_table,
    sequences,
    spread,
)
from looptap.analysis.measures import measure
from looptap.errors import CannotTellError
from looptap.tests.golden_files import NAMES
from looptap.tests.synthetic import SHAPE, make_dataset, random_sequences, write_store
from looptap.tests.test_golden_measures import ATOL, RTOL, definitions, replayed


# 1: one; 16 and 17: every one, and one more than are shown; 40: no multiple
@pytest.mark.parametrize(
    "num_sequences, chosen",
    [
        (1, [0]),
        (16, list(range(16))),
        (17, [*range(16)]),
        (40, [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27, 30, 32, 35, 37]),
    ],
)
def test_the_first_of_equal_parts(num_sequences, chosen):
    assert spread(num_sequences).tolist() == chosen


def test_each_sequence_has_what_a_store_of_it_alone_has():
    # unit 1 is missing in the middle, the last unit half empty: 33 sequences, of which 16 are shown
    given, _ = random_sequences([3 + index % 5 for index in range(35)], SHAPE)
    dataset = make_dataset(given, SHAPE)
    dataset["unit_done"][1] = 0
    dataset["sequence_length"][2:4] = 0
    left = [index for index in range(35) if index not in (2, 3)]
    found = sequences(dataset)
    assert found.sizes["sequence"] == MOST_SEQUENCES and found.attrs["missing"] == {}
    for row in range(MOST_SEQUENCES):
        place = left[row * 33 // 16]
        assert int(found["sequence_id"][row]) == 100 + place
        assert int(found["num_tokens"][row]) == 3 + place % 5
        alone = measure(make_dataset([given[place]], SHAPE), SEQUENCE_MEASURES)
        for name in SEQUENCE_MEASURES:
            np.testing.assert_array_equal(found[name][row], alone[name].sel(statistic="value"))


@pytest.mark.parametrize("name", NAMES)
def test_every_measure_equals_its_definition_on_the_authors_tensors(name):
    dataset, x_S2TLD, a_SLHTT, lens_STRV, _, shape = replayed(name)
    found = sequences(dataset)
    assert found.sizes["sequence"] == len(x_S2TLD)
    for s in range(len(x_S2TLD)):
        lens_TRV = None if lens_STRV is None else lens_STRV[s]
        wanted = definitions(x_S2TLD[s], a_SLHTT[s], lens_TRV, None, shape)
        for measured in SEQUENCE_MEASURES:
            if measured in found:
                np.testing.assert_allclose(
                    found[measured][s], wanted[measured], rtol=RTOL, atol=ATOL.get(measured, 1e-7)
                )
            else:
                assert np.isnan(wanted[measured]).all() and not shape[1]


def test_memory_does_not_grow_with_the_store():
    given, _ = random_sequences([2] * 60, (1, 0, 0, 0))
    kept = [{"residual_norm": s["residual_norm"]} for s in given]
    found = sequences(make_dataset(kept, (1, 0, 0, 0)))
    assert found["residual_norm"].shape == (MOST_SEQUENCES, 1)
    assert set(found.attrs["missing"]) == set(SEQUENCE_MEASURES) - {"residual_norm"}
    with pytest.raises(CannotTellError, match="capture again with --quantities"):
        sequences(make_dataset([{"attention_peak": np.ones((2, 10, 3))}], SHAPE))


def test_the_table_has_a_row_for_every_depth_of_every_sequence(tmp_path):
    given, _ = random_sequences([4, 6, 5], SHAPE)
    path = write_store(make_dataset(given, SHAPE), tmp_path / "one.zarr")
    written = write_analysis(path, tmp_path / "out", "csv", figure_format=())
    table = pd.read_csv(tmp_path / "out" / "sequences.csv")
    assert not [p for p in written if p.stem.startswith("sequences_")]
    pd.testing.assert_frame_equal(table, long_table(sequences(path)), check_dtype=False)
    assert len(table) == 3 * 10 and table["sequence_id"].unique().tolist() == [100, 101, 102]
