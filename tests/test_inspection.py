"""The page about one prompt: every weight as it was, what is said of it true, small, and drawn."""

import re
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from looptap.analysis.depth_axis import depths_of
from looptap.analysis.figures.attention_maps import MOST_MAPS, choose, left_out, seen, strongest, thinned
from looptap.analysis.pages.inspection import visible, write_inspection
from looptap.capture.prompt import inspect_prompt
from looptap.capture.settings import InspectSettings
from looptap.tests.pages import CHROMIUM, Page, open_in_browser
from looptap.tests.synthetic import (
    RNG_SEED,
    depth_coordinates,
    make_dataset,
    quantities_of_attention,
    quantities_of_states,
)

TOKENS = ["The", " cap", "\n", "</script>", "<b>", " é"]
LENS = [("\n", 0.5), (" Paris", 0.25), ("\N{REPLACEMENT CHARACTER}", 0.125)]


def inspected(shape: tuple[int, int, int, int], num_tokens: int = len(TOKENS), heads: int = 2) -> xr.Dataset:
    """One prompt with random states and random causal attention."""
    rng = np.random.default_rng(RNG_SEED)
    num_depths = len(depth_coordinates(shape)[0])
    state_TLD = rng.normal(size=(num_tokens, num_depths, 8))
    score_LHTT = rng.normal(size=(num_depths, heads, num_tokens, num_tokens)) * 2
    weight_LHTT = np.exp(np.where(np.tril(np.ones((num_tokens, num_tokens), bool)), score_LHTT, -np.inf))
    weight_LHTT /= weight_LHTT.sum(-1, keepdims=True)
    quantities = quantities_of_states(state_TLD, shape) | quantities_of_attention(weight_LHTT)
    if not shape[1]:
        quantities = {k: v for k, v in quantities.items() if not k.startswith(("step", "gap"))}
    dataset = make_dataset([quantities], shape, unit_sequences=1, empty_slots=0, states=[state_TLD])
    return dataset.assign(attention=(("depth", "head", "query", "key"), weight_LHTT.astype(np.float32)))


def depths_of_shape(*shape: int):
    stage, layer, recurrence = depth_coordinates(shape)
    coordinates = {"stage": stage, "layer": layer, "recurrence": recurrence}
    return depths_of(xr.Dataset({name: ("depth", values) for name, values in coordinates.items()}))


def page_of(dataset: xr.Dataset, tmp_path: Path, tokens=TOKENS, lens=None) -> Page:
    recurrences = dataset.attrs["plan"]["model"]["recurrences"] or 1
    return Page(
        write_inspection(dataset, tokens, lens or [LENS] * recurrences, tmp_path / "i.html").read_text()
    )


def words(page: Page) -> str:
    return re.sub(r"\s+", " ", " ".join(page.text))


def square(weights: list[int], num_tokens: int) -> np.ndarray:
    """A packed map as a matrix; zero where a query sees nothing."""
    map_TT = np.zeros((num_tokens, num_tokens))
    map_TT[np.tril_indices(num_tokens)] = np.array(weights) / 1000
    return map_TT


@pytest.mark.slow
def test_every_weight_of_a_small_prompt_is_in_the_page(tmp_path):
    dataset = inspected((1, 2, 4, 1))
    page = page_of(dataset, tmp_path)
    (maps,) = page.json(id="maps")
    attention = dataset["attention"].values
    assert list(maps["mean"]) == list(maps["heads"]) == [str(depth) for depth in range(10)]
    for depth, mean in maps["mean"].items():
        mean_TT = attention[int(depth)].mean(axis=0)
        np.testing.assert_allclose(square(mean, len(TOKENS)), mean_TT, atol=5.1e-4)
        for head, weights in enumerate(maps["heads"][depth]):
            expected_TT = attention[int(depth), head]
            np.testing.assert_allclose(square(weights, len(TOKENS)), expected_TT, atol=5.1e-4)
    assert maps["names"]["0"] == "prelude layer 0" and maps["names"]["4"] == "core layer 1, recurrence 1"
    # every block, and the head chosen at first; of the figures all, two layers, four recurrences
    assert page.tags.count("option") == 10 + 1 + (1 + 2) + (1 + 4)


@pytest.mark.slow
def test_page_holds_prompt_lens_and_figures_and_loads_nothing(tmp_path):
    page = page_of(inspected((1, 2, 4, 1)), tmp_path, lens=[[("a", 0.9)], [LENS[1]], [LENS[0]], [LENS[0]]])
    assert page.loads == [] and "b" not in page.tags
    assert {"prompt", "lens", "attention", "trajectory", "steps", "distance_to_the_fixed_point"} <= page.ids
    text = words(page)
    assert "</script>" in text and "␣Paris" in text and "25.0%" in text
    assert "the last token, “␣é”" in text and "mean over the 6 tokens of one sequence" in text
    assert "“⏎” with a probability of 0.5; it is on top from recurrence 2 on" in text
    assert "The coda's one block is left out here" in text


@pytest.mark.slow
def test_the_prompt_is_shown_as_it_is_or_not_at_all(tmp_path):
    dataset = inspected((0, 1, 2, 0), num_tokens=2)
    broken = ["\N{REPLACEMENT CHARACTER}"] * 2
    for tokens, prompt, shown in ((["a", "\nb<"], None, "a\nb<"), (broken, "é<", "é<"), (broken, None, None)):
        page = Page(write_inspection(dataset, tokens, [LENS] * 2, tmp_path / "i.html", prompt).read_text())
        assert (shown in page.text) if shown else ("prompt" not in page.classes)


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" a b", "␣a␣b"),
        ("\n\t", "⏎⇥"),
        ("\r\x00", "\\r\\x00"),
        ("\u200b", "\\u200b"),
        ("", "(empty)"),
        ("é中", "é中"),
    ],
)
def test_what_cannot_be_seen_is_shown_as_a_sign(token, shown):
    assert visible(token) == shown


def test_sentences_hold_what_the_maps_hold():
    dataset = inspected((0, 3, 4, 0))
    attention, depths = dataset["attention"].values, depths_of(dataset)
    attention[7, 1, 1:, 0] = 0.9  # layer 1 of recurrence 2
    attention[5, 0, 4, 2] = 0.97
    attention[5, 0, 5, 5] = attention[6, 0, 3, 0] = 0.99  # itself and the first token do not count
    assert strongest(attention) == (5, 0, 4, 2)
    to_first, elsewhere, change = seen(attention, depths, list("abcdef"))
    assert "Head 1 of core layer 1, recurrence 2" in to_first and "“a”: 90.0%" in to_first
    assert "“e” (position 4) to “c” (position 2): 0.97, in head 0 of core layer 2, recurrence 1" in elsewhere
    apart = [
        np.mean([np.sqrt(((attention[9 + i, h] - attention[3 + i, h]) ** 2).sum()) for h in range(2)])
        for i in range(3)
    ]
    most, least = int(np.argmax(apart)), int(np.argmin(apart))
    assert f"From recurrence 1 to 3 the maps of core layer {most} change most, by {apart[most]:.3g}" in change
    assert f"layer {least} least, by {apart[least]:.3g}" in change


# loops that fit, that are long, wide, both, behind a long prelude; and feedforward models small and large
@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 4, 1),
        (0, 12, 32, 0),
        (0, 70, 4, 0),
        (2, 1, 128, 2),
        (40, 20, 9, 40),
        (30, 0, 0, 0),
        (99, 0, 0, 0),
    ],
)
@pytest.mark.parametrize("num_tokens", [1, 64, 1000])
def test_shown_maps_are_few_and_hold_the_ends(shape, num_tokens):
    depths = depths_of_shape(*shape)
    shown = choose(depths, 8, num_tokens)
    assert 0 < len(shown.depths) <= MOST_MAPS and len(set(shown.depths)) == len(shown.depths)
    assert set(shown.every_head) <= set(shown.depths)
    said = " ".join(left_out(shown, depths, 8))
    assert ("blocks' maps are shown" in said) == (len(shown.depths) < len(depths))
    if shape[1]:
        assert shown.recurrences[0] == 0 and shown.recurrences[-1] == shape[2] - 1
        assert (f"of {shape[2]}" in said) == (len(shown.recurrences) < shape[2])
    if sum(shape) == 8:
        assert len(shown.depths) == len(depths) or num_tokens == 1000


def test_thinned_keeps_order_and_ends():
    assert thinned(range(5), 9) == [0, 1, 2, 3, 4]
    assert thinned(range(9), 3) == [0, 4, 8] and thinned(range(9), 0) == []


# every head of 4 fits, of 32 only those of some blocks
@pytest.mark.parametrize("heads", [4, 32])
@pytest.mark.slow
def test_a_page_of_64_tokens_and_100_depths_stays_small(tmp_path, heads):
    tokens = [f" t{i}" for i in range(64)]
    dataset = inspected((0, 10, 10, 0), num_tokens=64, heads=heads)
    page = page_of(dataset, tmp_path, tokens)
    assert (tmp_path / "i.html").stat().st_size < 8e6
    (maps,) = page.json(id="maps")
    assert 0 < len(maps["mean"]) <= MOST_MAPS
    assert f"{len(maps['mean'])} of 100 blocks' maps are shown, recurrences 0, 1, " in words(page)
    assert len(maps["heads"]) > 0 and (len(maps["heads"]) == len(maps["mean"])) == (heads == 4)
    held = f"single heads are held for {len(maps['heads'])} of the {len(maps['mean'])}"
    assert (held in words(page)) == (heads == 32)


@pytest.mark.parametrize(
    ("shape", "num_tokens", "heads"),
    [((4, 0, 0, 0), 6, 2), ((0, 1, 1, 0), 6, 1), ((0, 2, 2, 0), 1, 2), ((1, 1, 2, 1), 2, 1)],
)
@pytest.mark.slow
def test_small_models_and_prompts_make_a_page(tmp_path, shape, num_tokens, heads):
    page = page_of(inspected(shape, num_tokens, heads), tmp_path, TOKENS[:num_tokens])
    text = words(page)
    assert ("From recurrence 0 to 1" in text) == (shape[2] == 2 and num_tokens > 1)
    assert ("the model has no loop" in text) == (shape[1] == 0)
    assert "To keep the page small" not in text


@pytest.mark.slow
def test_weights_that_are_not_finite_are_counted_and_marked(tmp_path):
    dataset = inspected((0, 2, 3, 0))
    dataset["attention"].values[0, 1, 2, :3] = np.nan
    page = page_of(dataset, tmp_path)
    assert "3 weights are not finite" in words(page)
    (maps,) = page.json(id="maps")
    assert maps["heads"]["0"][1][3:6] == [-1, -1, -1] and min(maps["heads"]["0"][0]) >= 0
    dataset["attention"].values[:] = np.nan
    assert f"{6 * 2 * 21} weights are not finite" in words(page_of(dataset, tmp_path))


@pytest.mark.slow
def test_a_real_prompt(tmp_path):
    found = inspect_prompt(InspectSettings.of(model="random:(1,2x3,1)I,width=32", prompt="ab cab"))
    path = write_inspection(found.dataset, found.tokens, found.lens, tmp_path / "deep" / "i.html")
    page = Page(path.read_text())
    (maps,) = page.json(id="maps")
    assert maps["tokens"] == ["a", "b", "␣", "c", "a", "b"] and len(maps["mean"]) == 8
    entropy = found.dataset["attention_entropy"].values[-1]  # of the last query, [depth, head]
    for depth, heads in maps["heads"].items():
        for head, weights in enumerate(heads):
            row = square(weights, 6)[-1]
            assert abs(-(row * np.log(row)).sum() - entropy[int(depth), head]) < 0.01


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("shape", [(1, 2, 4, 1), (4, 0, 0, 0)])
def test_the_page_draws_in_a_browser_without_an_error(tmp_path, width, shape):
    dataset = inspected(shape)
    page = page_of(dataset, tmp_path)
    depth, head, _, _ = strongest(dataset["attention"].values)
    hover = """maps: root.dataset.maps, chosen: block.value + " " + head.value, said: (() => {
      const box = large.getBoundingClientRect(), said = new Set();
      for (let x = 0; x < box.width; x += 7) for (let y = 0; y < box.height; y += 7) {
        const at = { clientX: box.left + x, clientY: box.top + y };
        large.dispatchEvent(new PointerEvent("pointermove", at));
        if (!weight.hidden) said.add(weight.textContent);
      }
      return [...said].join("|");
    })()"""
    said, data = open_in_browser(tmp_path / "i.html", width, tmp_path, hover)
    assert not said
    assert int(data["drawn"]) == len(page.json(**{"class": "spec"}))
    assert int(data["maps"]) == dataset.sizes["depth"] and data["chosen"] == f"{depth} {head}"
    assert int(data["needed"]) <= int(data["width"]) and int(data["resources"]) == 0
    weights = dict(
        re.findall(r"query (\d+ “[^|]*” → key \d+) “[^|]*: (0\.\d+|1\.000|below 0\.0005) \(", data["said"])
    )
    map_TT = dataset["attention"].values[depth, head]
    assert len(weights) == len(TOKENS) * (len(TOKENS) + 1) // 2
    for place, weight in weights.items():
        query, key = int(place.split()[0]), int(place.split()[-1])
        assert abs(float(weight.removeprefix("below ")) - map_TT[query, key]) < 6e-4
