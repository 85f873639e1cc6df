"""What a reader chooses: figures hold the numbers found, controls are complete, and drawings follow them."""

import json

import numpy as np
import pytest

from looptap.analysis.answers.heads import HEAD_MEASURES, heads
from looptap.analysis.answers.single_sequences import SEQUENCE_MEASURES, sequences
from looptap.analysis.figures.catalogue import FIGURES
from looptap.analysis.figures.choices import EVERYWHERE
from looptap.analysis.figures.head_figure import attention_heads
from looptap.analysis.figures.sequence_figure import single_sequences
from looptap.analysis.findings import find
from looptap.analysis.measures import measure
from looptap.analysis.pages.report import write_report
from looptap.tests.pages import CHROMIUM, Page, open_in_browser
from looptap.tests.synthetic import ATTENTION, RESIDUAL, SHAPE, make_dataset, random_sequences


def looped(num_sequences: int = 5):
    given, states = random_sequences([5 + index % 3 for index in range(num_sequences)], SHAPE)
    return make_dataset(given, SHAPE, states=states)


def feedforward():
    given, _ = random_sequences([5, 6], (4, 0, 0, 0))
    kept = [{k: v for k, v in s.items() if k in RESIDUAL + ATTENTION} for s in given]
    return make_dataset(kept, (4, 0, 0, 0), name="hub/Plain-1B")


def without(dataset, *names: str):
    return dataset.drop_vars(list(names))


def table_of(figure):
    (table,) = figure.tables.values()
    return table


def test_the_map_holds_what_was_found_of_every_head():
    dataset = looped()
    table, found = table_of(attention_heads(find([dataset]))), heads(dataset)
    for name in HEAD_MEASURES:
        got_DH = table[name].to_numpy().reshape(found[name].shape[1:])
        np.testing.assert_array_equal(got_DH, found[name].sel(statistic="value"))
    assert len(table) == 10 * 3 and table["head"].tolist()[:4] == [0, 1, 2, 0]


def test_single_sequences_and_their_mean_hold_what_was_found():
    dataset = looped(19)
    table, found = table_of(single_sequences(find([dataset]))), sequences(dataset)
    curves = measure(dataset, SEQUENCE_MEASURES)
    assert len(table) == (16 + 1) * 10
    for name in SEQUENCE_MEASURES:
        for row, sequence_id in enumerate(found["sequence_id"].values):
            own = table.query(f"sequence == {sequence_id}")[name]
            np.testing.assert_array_equal(own, found[name][row])
        mean = table.query("sequence == -1")[name]
        np.testing.assert_array_equal(mean, curves[name].sel(statistic="value"))


# every measure must lead to one panel of every capture, whatever else is chosen
@pytest.mark.parametrize("draw", [attention_heads, single_sequences])
@pytest.mark.slow
def test_every_choice_leads_to_one_panel(draw):
    stores = [looped(), without(looped(), "attention_sink", "step_norm"), feedforward()]
    figure = draw(find(stores))
    (measured,) = (choice for choice in figure.choices if choice.name == "measure")
    assert len(figure.panels) == 3
    for panel in figure.panels:
        every = [panel, *panel.instead]
        for name in measured.options:
            for layer in ("all", "one"):
                for recurrence in ("all", "one"):
                    now = {"measure": name, "layer": layer, "recurrence": recurrence}
                    fitting = [p for p in every if all(now[k] == wanted for k, wanted in p.when.items())]
                    assert len(fitting) == 1
    first = next(iter(measured.options))
    assert all(panel.when["measure"] == first for panel in figure.panels)


@pytest.mark.slow
def test_what_every_capture_has_is_shown_first():
    figure = attention_heads(find([looped(), feedforward()]))
    assert next(iter(figure.choices[0].options)) == "sink_score"  # a plain model has no change of entropy
    assert next(iter(attention_heads(find([looped()])).choices[0].options)) == "entropy_change"


@pytest.mark.slow
def test_sequences_that_all_captures_keep_come_first():
    longer, shorter = looped(40), looped(5)  # 100, 102, 105, …; 100 to 104
    (sequence, _) = single_sequences(find([longer, shorter])).choices
    assert list(sequence.options)[:2] == ["100", "102"] and len(sequence.options) == 16 + 5 - 2
    assert sequence.options["101"] == "101 (6 tokens)"


@pytest.mark.parametrize("stores", [[looped()], [looped(), feedforward()], [feedforward()]])
@pytest.mark.slow
def test_pictures_show_what_is_chosen_first(stores):
    findings = find(stores)
    for draw in (attention_heads, single_sequences):
        figure = draw(findings)
        chart = figure.chart().to_dict()  # checked against the Vega-Lite schema
        values = {param["name"]: param["value"] for param in chart["params"] if "value" in param}
        assert values["chosen_layer"] == values["chosen_recurrence"] == -1
        if draw is single_sequences:
            assert values["chosen_sequence"] == 100 and "sequence 100" in figure.subtitle
        assert len(figure.caption) >= 2 and findings[0].label in figure.caption[1]


@pytest.mark.slow
def test_every_parameter_that_an_expression_names_is_declared():
    for figure in filter(None, (draw(find([looped(), feedforward()])) for draw in FIGURES)):
        for panel in (each for first in figure.panels for each in (first, *first.instead)):
            spec = panel.chart(hover=True).to_dict(validate=False)
            declared = {param["name"] for param in spec.get("params", [])}
            text = json.dumps(spec)
            for name in (*EVERYWHERE, "head", "sequence"):
                assert f"chosen_{name}" not in text or f"chosen_{name}" in declared, figure.name


@pytest.mark.slow
def test_controls_are_labelled_and_wait_for_the_script(tmp_path):
    text = write_report([looped(), feedforward()], tmp_path / "r.html").read_text()
    page = Page(text)
    for control in ("layer", "recurrence", "attention_heads-measure", "attention_heads-head",
                    "single_sequences-sequence", "single_sequences-measure"):  # fmt: skip
        assert f'<label for="choose-{control}">' in text and f"choose-{control}" in page.ids
    assert text.count('class="choices') == text.count("hidden>") == 3  # shown by the script alone
    assert text.count("<noscript>") == 1
    assert page.tags.count("option") == 3 + 5 + 7 + 4 + 5 + 6


@pytest.mark.slow
def test_a_model_without_a_loop_has_no_layer_to_choose(tmp_path):
    page = Page(write_report([feedforward()], tmp_path / "r.html").read_text())
    assert "choose-layer" not in page.ids and "choose-attention_heads-head" in page.ids


# what stands in a figure's scene: items of marks of one type, with what they were drawn from
PROBE = """...(await (async () => {
  const marks = (id, type) => {
    const found = [], go = (mark) => mark.items.forEach((item) => {
      if (mark.marktype === type) found.push(item);
      if (mark.marktype === "group") item.items.forEach(go);
    });
    go(document.getElementById(id).view.scenegraph().root);
    return found;
  };
  const choose = async (name, value) => {
    const control = document.getElementById(`choose-${name}`);
    control.focus();
    if (document.activeElement !== control) throw Error(`${name} takes no focus`);
    control.value = value;
    control.dispatchEvent(new Event("change"));
    await new Promise((resolve) => setTimeout(resolve, 3000));
  };
  const lines = (id) => JSON.stringify(Object.fromEntries(marks(id, "line")
    .filter(({ datum }) => datum.sequence !== -1).map(({ datum, opacity }) => [datum.layer, opacity])));
  const cells = (id) => JSON.stringify(marks(id, "rect").map(({ datum, opacity }) =>
    [datum.layer, datum.recurrence, datum.head, opacity]));
  const words = (id) => marks(id, "text").map(({ text }) => text).join("|");
  const rules = (id) => marks(id, "rule").filter(({ datum }) => datum.at === 1 && !datum.text).length;
  const before = { linesBefore: lines("steps-0"), cellsBefore: cells("attention_heads-0"),
    rulesBefore: rules("stages_by_recurrence-0") };
  await choose("layer", "1");
  await choose("attention_heads-head", "2");
  const layer = { linesAfter: lines("steps-1"), otherLines: lines("stages_by_layer-0"),
    cellsAfter: cells("attention_heads-0"), rulesAfter: rules("stages_by_recurrence-0"),
    picked: marks("stages_by_depth-0", "symbol").filter(({ fill }) => fill === "#bf3f55").length };
  document.getElementById("choose-all").click();
  await choose("recurrence", "3");
  await choose("attention_heads-measure", "sink_score");
  await choose("single_sequences-measure", "mixing_score");
  await choose("single_sequences-sequence", "102");
  const more = { linesAll: lines("steps-0"), cellsAtRecurrence: cells("attention_heads-0"),
    mapWords: words("attention_heads-0"), own: JSON.stringify(marks("single_sequences-0", "line")
      .filter(({ datum }) => datum.sequence !== -1)
      .map(({ datum }) => [datum.sequence, datum.layer, datum.recurrence, datum.mixing_score])),
    wide: document.documentElement.scrollWidth, layerNow: document.getElementById("choose-layer").value };
  return { ...before, ...layer, ...more };
})())"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_drawings_follow_what_is_chosen(tmp_path, width):
    dataset = looped()
    path = write_report([dataset], tmp_path / "r.html")
    said, data = open_in_browser(path, width, tmp_path, PROBE)
    assert not said
    seen = {key.replace("-", ""): value for key, value in data.items()}

    def of(key: str):
        return json.loads(seen[key.lower()])

    full, faded = {"0": 0.95, "1": 0.95}, {"0": pytest.approx(0.095), "1": 0.95}
    assert of("linesBefore") == full and of("linesAll") == full
    assert of("linesAfter") == faded and of("otherLines") == faded  # in every panel and figure
    assert (of("rulesBefore"), of("rulesAfter")) == (0, 1)  # where layer 1 stands among layers
    assert of("picked") == 4  # its invocations along depth, one a recurrence
    assert seen["layernow"] == "-1"
    # entropy changes from recurrence 1 on: 2 layers, 3 recurrences, 3 heads; of a layer; of a recurrence
    assert len(of("cellsBefore")) == 18 and {cell[3] for cell in of("cellsBefore")} == {1}
    wanted = {(1, r, h, 1 if h == 2 else 0.1) for r in (1, 2, 3) for h in range(3)}
    assert {tuple(cell) for cell in of("cellsAfter")} == wanted
    assert {tuple(cell[:3]) for cell in of("cellsAtRecurrence")} == {
        (layer, 3, head) for layer in (0, 1) for head in range(3)
    }
    assert "Sink score (probability)" in seen["mapwords"]
    found = sequences(dataset)["mixing_score"][2]
    own = of("own")
    assert {row[0] for row in own} == {102} and len(own) == 8
    for _, layer, recurrence, value in own:
        assert value == pytest.approx(float(found[1 + 2 * recurrence + layer]), rel=1e-6)
    assert of("wide") <= int(data["width"])
