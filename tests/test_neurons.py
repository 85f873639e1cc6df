"""Prediction and suppression neurons: moments against float64 on materialised logits, planted neurons, and
the way of the shares from the weights into the plan, the commands, the tables and the figure.
"""

import json
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import looptap
from looptap.analysis.analyze import write_analysis
from looptap.analysis.answers.neuron_shares import neurons
from looptap.analysis.figures.neuron_figures import neurons as neuron_figure
from looptap.analysis.findings import find
from looptap.analysis.pages.report import render
from looptap.capture.engines.work import make_recipe
from looptap.capture.models.load import find_model, load_model
from looptap.capture.plan import make_plan
from looptap.capture.probes import neurons as module
from looptap.capture.probes.neurons import KURTOSIS, QUANTILES, Moments, logit_moments, summarise
from looptap.capture.run import prepare_store
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.writing.commit import Store
from looptap.errors import CannotTellError
from looptap.tests.golden_files import GOLDEN, NAMES, weights_of
from looptap.tests.synthetic import make_dataset, random_sequences

MODEL = "random:(1,2x3,1)I,norm=huginn,width=32,heads=2"

# where each family's files keep what a block's MLP writes with, the norm on it, and the final norm
FILES = {
    "llama": ("model.layers.{}.mlp.down_proj.weight", None, "model.norm.weight"),
    "olmo2": ("model.layers.{}.mlp.down_proj.weight",
              "model.layers.{}.post_feedforward_layernorm.weight", "model.norm.weight"),
    "ouro": ("model.layers.{}.mlp.down_proj.weight",
             "model.layers.{}.post_attention_layernorm_2.weight", "model.norm.weight"),
}  # fmt: skip


def materialised(u_VD: np.ndarray, w_DI: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Skewness and kurtosis of U w of every column, by their definitions."""
    logits_VI = u_VD @ w_DI
    z_VI = (logits_VI - logits_VI.mean(0)) / np.sqrt(((logits_VI - logits_VI.mean(0)) ** 2).mean(0))
    return (z_VI**3).mean(0), (z_VI**4).mean(0)


def folded(model) -> tuple[np.ndarray, list[np.ndarray]]:
    """U with the final norm's gain, and what every block writes with the gains of its own norms, float64."""
    u_VD = (model.head_weight.double() * model.final_norm.double()).numpy()
    writes = []
    for block in model.blocks:
        w_DI = block.mlp_out.double()
        for norm in (block.mlp_branch_output_norm, block.mlp_stream_norm):
            w_DI = w_DI if norm is None else torch.diag(norm.double()) @ w_DI
        writes.append(w_DI.numpy())
    return u_VD, writes


def assert_close(found: Moments, wanted: tuple[np.ndarray, np.ndarray]) -> None:
    """A skewness is as exact as it would be at 1: around 0 it is a difference of two sums."""
    np.testing.assert_allclose(found.kurtosis_I, wanted[1], rtol=1e-4)
    np.testing.assert_allclose(found.skewness_I, wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cosines", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_moments_equal_their_definitions(name, cosines):
    model = load_model(str(GOLDEN / name))
    found, (u_VD, writes), d = logit_moments(model, cosines=cosines), folded(model), model.description
    if cosines:
        u_VD = u_VD / np.sqrt((u_VD**2).sum(1, keepdims=True))
    assert [(each.stage, each.layer) for each in found] == [
        *(("prelude", i) for i in range(d.prelude)),
        *(("core", i) for i in range(d.core)),
        *(("coda", i) for i in range(d.coda)),
    ]
    for each, w_DI in zip(found, writes, strict=True):
        assert each.kurtosis_I.dtype == torch.float64
        assert_close(each, materialised(u_VD, w_DI))


# from the files themselves, so that a norm that is left out, or folded twice, shows
@pytest.mark.parametrize("name", FILES)
def test_the_right_gains_are_folded(name):
    tensors, (write, gain, final) = weights_of(name), FILES[name]
    tensors = {key: tensor.double().numpy() for key, tensor in tensors.items()}
    head_VD = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    for i, each in enumerate(logit_moments(load_model(str(GOLDEN / name)))):
        w_DI = tensors[write.format(i)]
        if gain is not None:
            w_DI = tensors[gain.format(i)][:, None] * w_DI
        wanted = materialised(head_VD * tensors[final], w_DI)
        assert_close(each, wanted)
        bare = materialised(head_VD, tensors[write.format(i)])
        assert np.abs(bare[1] - wanted[1]).max() > 1e-3, "the gains are too even to be missed"


# 700 tokens, 300 neurons: masked tails of tiles of 1024 x 256, and of smaller ones in both directions
@pytest.mark.parametrize("tiles", [(1024, 256), (64, 7), (1, 300)])
def test_tiles_do_not_change_the_moments(tiles, monkeypatch):
    monkeypatch.setitem(module._TILES, "cpu", tiles)
    model = shaped(700, 300)
    u_VD, (w_DI,) = folded(model)
    (found,) = logit_moments(model)
    assert_close(found, materialised(u_VD, w_DI))


# an offset shared by all tokens is far larger than what tells them apart, and neurons differ in size by 1e12
def test_a_common_offset_and_tiny_neurons_cost_no_accuracy():
    model = shaped(700, 300)
    with torch.inference_mode():
        model.embedding += 30.0 * torch.randn(model.description.width)
        model.mlp = model.blocks[0].mlp_out.mul_(torch.logspace(-12, 0, 300))
        model.blocks[0].mlp_out[:, 5] = 0
    u_VD, (w_DI,) = folded(model)
    (found,) = logit_moments(model)
    with np.errstate(invalid="ignore"):
        wanted = materialised(u_VD, w_DI)
    assert found.kurtosis_I[5].isnan() and np.isnan(wanted[1][5])
    assert_close(found, wanted)


def test_bfloat16_weights_are_read_as_they_are():
    model = shaped(700, 300).bfloat16()
    u_VD, (w_DI,) = folded(model)
    (found,) = logit_moments(model)
    assert_close(found, materialised(u_VD, w_DI))


def shaped(num_tokens: int, num_neurons: int):
    """A model of one block with so many tokens and neurons and nothing else in it."""
    source = find_model("random:(1,0,0),width=48,heads=2,seed=3")
    d = replace(source.description, vocab_size=num_tokens, mlp_width=num_neurons, tied_head=True)
    model = source.origin.load(d, "cpu", torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.inference_mode():
        model.final_norm.uniform_(0.2, 3, generator=generator)
    return model


@pytest.mark.parametrize("norm", ["pre", "ouro", "huginn", "olmo2"])
def test_planted_neurons_are_found(norm):
    """A neuron that writes along one row of the unembedding raises that token, one along its negative lowers
    it; a negated pair of `up` and output weights is the same function, and changes sides.
    """
    model = load_model(f"random:(0,2x3,0),norm={norm},width=128,heads=2")
    block, token = model.blocks[1], 17
    with torch.inference_mode():
        # what comes out of the folded norms is the row itself
        gain_D = torch.ones(128)
        for weight in (block.mlp_branch_output_norm, block.mlp_stream_norm):
            if weight is not None:
                gain_D *= weight.uniform_(0.5, 2)
        row_D = model.head_weight[token] * model.final_norm.uniform_(0.5, 2) / gain_D
        block.mlp_out[:, 3], block.mlp_out[:, 8] = row_D, -0.01 * row_D
    clean, planted = logit_moments(model)
    for sign, neuron in ((1, 3), (-1, 8)):
        assert planted.kurtosis_I[neuron] > KURTOSIS and sign * planted.skewness_I[neuron] > 1
    others = np.delete(planted.kurtosis_I, [3, 8])
    assert max(others.max(), clean.kurtosis_I.max()) < KURTOSIS
    first, second = summarise([clean, planted])["blocks"]
    assert (first["prediction"], first["suppression"]) == (0, 0)
    assert (second["prediction"], second["suppression"]) == (1 / 512, 1 / 512)
    with torch.inference_mode():
        block.mlp_out[:, 3] *= -1
    flipped = summarise(logit_moments(model))["blocks"][1]
    assert (flipped["prediction"], flipped["suppression"]) == (0, 2 / 512)


def test_summary_of_known_moments():
    kurtosis_I = torch.tensor([3.0, 20.0, 11.0, 10.0, torch.nan, 30.0], dtype=torch.float64)
    skewness_I = torch.tensor([1.0, 1.0, -1.0, 1.0, torch.nan, 0.0], dtype=torch.float64)
    found = summarise([Moments("coda", 4, skewness_I, kurtosis_I)])
    (block,) = found["blocks"]
    assert (block["stage"], block["layer"], block["num_neurons"]) == ("coda", 4, 6)
    assert (block["prediction"], block["suppression"]) == (1 / 6, 1 / 6)
    assert block["kurtosis"] == pytest.approx(np.quantile([3, 10, 11, 20, 30], QUANTILES))
    assert (found["threshold"], found["quantiles"]) == (KURTOSIS, list(QUANTILES))
    lower = summarise([Moments("coda", 4, skewness_I, kurtosis_I)], threshold=9)["blocks"][0]
    assert (lower["prediction"], lower["suppression"]) == (2 / 6, 1 / 6)
    silent = torch.full((2,), torch.nan, dtype=torch.float64)
    assert summarise([Moments("core", 0, silent, silent)])["blocks"][0]["kurtosis"] == [None] * 4
    assert json.loads(json.dumps(found)) == found


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("neurons") / "run.zarr"
    looptap.capture(MODEL, ["abcdef", "xyz"], path, quantities=("residual",), neurons=True)
    return path


def test_a_capture_records_them_and_goes_on(store, tmp_path, monkeypatch):
    data = tmp_path / "texts.jsonl"
    data.write_text('{"text": "abcdef"}\n{"text": "xyz"}\n')
    settings = CaptureSettings.of(model=MODEL, data=data, store=store, quantities=("residual",), neurons=True)
    plan = make_plan(settings)
    wanted = summarise(logit_moments(load_model(MODEL)))
    assert Store.open(store).plan.model.neurons == json.loads(json.dumps(wanted))
    assert Store.open(store).plan.hash == plan.stored().hash
    # going on takes neither the time again nor the same last digits
    monkeypatch.setattr("looptap.capture.run.neurons_of", lambda plan: pytest.fail("taken twice"))
    make_recipe(plan, prepare_store(plan))()
    with pytest.raises(ValueError, match=r"settings\.neurons: True -> False"):
        prepare_store(make_plan(settings.but(neurons=False)))


def test_analysis_reads_what_was_recorded(store):
    found, wanted = neurons(store), summarise(logit_moments(load_model(MODEL)))
    assert found["stage"].values.tolist() == ["prelude", "core", "core", "coda"]
    assert found["layer"].values.tolist() == [0, 0, 1, 0]
    assert found.attrs["threshold"] == wanted["threshold"]
    for block, each in enumerate(wanted["blocks"]):
        assert found["share"].sel(kind="prediction").values[block] == each["prediction"]
        assert found["share"].sel(kind="suppression").values[block] == each["suppression"]
        assert found["kurtosis"].values[:, block].tolist() == each["kurtosis"]
        assert found["num_neurons"].values[block] == each["num_neurons"]


def dataset(shares, stages, label="random:test"):
    """A Dataset whose plan tells of these shares, [block][prediction, suppression]."""
    sequences, _ = random_sequences([5, 6], (1, 2, 3, 1))
    made = make_dataset(sequences, (1, 2, 3, 1), name=label)
    blocks = [
        {"stage": stage, "layer": layer, "num_neurons": 100, "prediction": a, "suppression": b,
         "kurtosis": [3.1, 4.0, 9.0, 40.0]}
        for (stage, layer), (a, b) in zip(stages, shares, strict=True)
    ]  # fmt: skip
    made.attrs["plan"]["model"]["neurons"] = {
        "threshold": 10.0,
        "quantiles": [0.5, 0.9, 0.99, 1.0],
        "blocks": blocks,
    }
    return made


STAGES = [("prelude", 0), ("core", 0), ("core", 1), ("coda", 0)]
SHARES = [(0.0, 0.0), (0.02, 0.01), (0.03, 0.0), (0.05, 0.07)]


def test_the_figure_draws_the_shares():
    without = make_dataset(random_sequences([5], (1, 2, 3, 1))[0], (1, 2, 3, 1), name="random:other")
    findings = find([dataset(SHARES, STAGES), without])
    figure = neuron_figure(findings)
    assert figure is not None and len(figure.panels) == 1
    (table,) = figure.tables.values()
    for kind, column in (("prediction", 0), ("suppression", 1)):
        rows = table[table["kind"] == kind].sort_values("from")
        np.testing.assert_allclose(rows["high"] - rows["low"], [s[column] for s in SHARES], atol=1e-15)
    both = table[table["kind"] == "suppression"].sort_values("from")
    np.testing.assert_allclose(both["high"], np.sum(SHARES, axis=1))
    np.testing.assert_allclose(both["low"], np.array(SHARES)[:, 0])
    assert "core layer 0 is the first" in figure.caption[1]
    assert "coda layer 0 has most: 5.0% prediction and 7.0% suppression" in figure.caption[1]
    assert "--neurons" in figure.absent[findings[1].label]
    chart = figure.chart().to_dict()  # checked against the Vega-Lite schema
    assert '"url"' not in json.dumps(chart)
    assert neuron_figure(findings[1:]) is None
    none = neuron_figure(find([dataset([(0.0, 0.0)] * 4, STAGES)]))
    assert none is not None and "there are none: the largest kurtosis is 40" in none.caption[1]


@pytest.mark.slow
def test_tables_and_the_report_have_them_or_say_why(tmp_path):
    told = dataset(SHARES, STAGES)
    paths = {path.stem: path for path in write_analysis(told, tmp_path, "csv", figure_format=("svg",))}
    table = pd.read_csv(paths["neurons_share"])
    assert table[table["kind"] == "suppression"]["value"].tolist() == [s[1] for s in SHARES]
    assert table["stage"].tolist()[:4] == [stage for stage, _ in STAGES]
    assert "share of neurons" in paths["neurons"].read_text()
    sequences, _ = random_sequences([5], (1, 2, 3, 1))
    untold = make_dataset(sequences, (1, 2, 3, 1))
    page = re.sub(r"\s+", " ", render(find([untold])))
    assert "prediction and suppression neurons" in page and "not asked for when the store was made" in page
    assert "neurons-0" in render(find([told])) and "neurons-0" not in page


def test_what_has_none_says_why():
    plain = looptap.capture("random:(0,2x3,0),width=16,heads=2", ["abc"], quantities=("residual_norm",))
    assert isinstance(plain, xr.Dataset) and "neurons" not in plain.attrs["plan"]["model"]
    with pytest.raises(CannotTellError, match="new store with --neurons"):
        neurons(plain)
    watched = plain.copy()
    model = plain.attrs["plan"]["model"] | {"norm": "unknown"}
    watched.attrs["plan"] = plain.attrs["plan"] | {"model": model}
    with pytest.raises(CannotTellError, match="the module was watched"):
        neurons(watched)
