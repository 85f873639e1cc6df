"""One self-contained page about one prompt: its tokens, the logit lens, its path, and attention maps."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import xarray as xr

from ..figures import attention_maps
from ..figures.words import number
from ..findings import Findings, find
from .page import model_facts, render_page, write_page

Lens = Sequence[tuple[str, float]]  # tokens and their probability, likeliest first

_BROKEN = "\N{REPLACEMENT CHARACTER}"  # a token that is part of a character decodes to it
_SIGNS = {" ": "\N{OPEN BOX}", "\n": "\N{RETURN SYMBOL}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
_TICKS = (0, 0.01, 0.1, 0.25, 0.5, 1)


def write_inspection(
    dataset: xr.Dataset,
    tokens: Sequence[str],
    lens: Sequence[Lens],
    out_path: str | Path,
    prompt: str | None = None,
) -> Path:
    """Writes the page about a prompt.

    Args:
        dataset: a store of the prompt alone with every state, and `attention` (depth, head, query, key).
        tokens: the prompt's tokens as text.
        lens: likeliest next tokens after the last one, by recurrence; one entry for a feedforward model.
        out_path: the HTML file; directories above it are made.
        prompt: its text; the tokens joined if left out, and not shown if one of them is part of a character.
    Returns:
        the path written.
    """
    if prompt is None:
        prompt = "" if any(_BROKEN in token for token in tokens) else "".join(tokens)
    return write_page(_render(dataset, list(tokens), lens, prompt), out_path)


def visible(text: str) -> str:
    """Returns a token's text with visible signs for spaces, line ends and whatever else cannot be seen."""
    seen = (_SIGNS.get(each) or (each if each.isprintable() else repr(each)[1:-1]) for each in text)
    return "".join(seen) or "(empty)"


def _render(dataset: xr.Dataset, tokens: list[str], lens: Sequence[Lens], prompt: str) -> str:
    (findings,) = find([dataset])
    shown_tokens = [visible(token) for token in tokens]
    return render_page(
        "inspection.html",
        title=f"One prompt through {findings.label}",
        lead=f"{len(tokens):,} tokens, {len(findings.depths):,} block invocations each.",
        figures=_figures(findings, shown_tokens[-1]),
        findings=[findings],
        prompt=prompt,
        tokens=shown_tokens,
        facts=[(name, [value]) for name, value in model_facts(findings.plan).items()],
        lens=_lens_rows(lens),
        lens_seen=_lens_seen(lens, findings),
        has_core=bool(len(findings.depths.core_RL)),
        attention=_attention(dataset["attention"].values, findings, shown_tokens),
    )


def _figures(findings: Findings, last_token: str) -> list:
    from ..figures.convergence_figures import distance_to_the_fixed_point, steps
    from ..figures.paths import trajectory
    from ..figures.stage_figures import stages_by_depth

    draws = (trajectory, steps, distance_to_the_fixed_point, stages_by_depth)
    drawn = [figure for draw in draws if (figure := draw([findings])) is not None]
    subtitle = f"the last token, “{last_token}”"
    return [replace(each, subtitle=subtitle) if each.name == "trajectory" else each for each in drawn]


def _attention(attention_DHTT: Any, findings: Findings, tokens: list[str]) -> dict[str, Any]:
    depths, num_heads = findings.depths, attention_DHTT.shape[1]
    shown = attention_maps.choose(depths, num_heads, len(tokens))
    depth, head, *_ = attention_maps.strongest(attention_DHTT) or (shown.depths[0], None)
    if depth not in shown.depths:
        depth, head = shown.depths[0], None
    return {
        "maps": attention_maps.packed(attention_DHTT, shown, depths, tokens),
        "sections": attention_maps.sections(shown, depths),
        "first": (depth, head if depth in shown.every_head else None),
        "seen": attention_maps.seen(attention_DHTT, depths, tokens),
        "left_out": attention_maps.left_out(shown, depths, num_heads),
        "ticks": [(f"{value:g}", f"{100 * value**0.5:.1f}") for value in _TICKS],
        "gradient": ", ".join(attention_maps.WEIGHT_COLORS),
    }


def _lens_rows(lens: Sequence[Lens]) -> list[list[dict[str, str]]]:
    return [[_lens_cell(visible(token), share) for token, share in row] for row in lens]


def _lens_cell(token: str, share: float) -> dict[str, str]:
    return {"token": token, "share": f"{share:.1%}", "width": f"{100 * share:.1f}"}


def _lens_seen(lens: Sequence[Lens], findings: Findings) -> str:
    """Says which token comes out on top, since when, and what that leaves out."""
    tops = [row[0][0] for row in lens]
    token, share = lens[-1][0]
    text = f"The likeliest token at the end is “{visible(token)}” with a probability of {number(share)}"
    if len(tops) > 1 and _BROKEN not in token:  # as text, broken tokens cannot be told apart
        since = max((index + 1 for index, top in enumerate(tops) if top != token), default=0)
        text += f"; it is on top from recurrence {since} on"
    text += "."
    coda = findings.plan.model.coda
    if coda and len(findings.depths.core_RL):
        blocks = f"coda's {coda} blocks are" if coda > 1 else "coda's one block is"
        text += f" The {blocks} left out here, so this is not what the whole model predicts."
    if any(_BROKEN in token for row in lens for token, _ in row):
        text += f" {_BROKEN} stands for a token that is no whole character."
    return text
