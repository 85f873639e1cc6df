"""The shell of every page: one look, and embedded code that draws figures, so that a page loads nothing.

The Vega libraries are embedded once, each capture's table once, and every panel is a small specification that
names the table and columns it draws from. A page is a template that extends `page.html`.
"""

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...capture.store.plan import StoredPlan
from ...errors import os_errors_named
from ..findings import Findings

if TYPE_CHECKING:
    from jinja2 import Environment

    from ..figures.choices import Choice
    from ..figures.marks import Figure, Panel


@contextmanager
def unchecked_charts() -> Iterator[None]:
    """Leaves out the comparison of each chart with the schema, which the tests make: twice as quick."""
    from altair.utils import schemapi

    with schemapi.debug_mode(False):
        yield


def render_page(
    template: str, *, title: str, lead: str, figures: Sequence["Figure"], findings: Sequence[Findings], **more
) -> str:
    """Renders a page as HTML: `template` filled with figures, their captions, and what else it names."""
    from ..figures import axes, marks

    return (
        _environment()
        .get_template(template)
        .render(
            title=title,
            lead=lead,
            findings=findings,
            figures=[_with_panels(figure) for figure in figures],
            choices=_choices(figures, findings),
            panel_height=axes.PANEL_HEIGHT,
            colors={group: ", ".join(colors) for group, colors in marks.GROUP_COLORS.items()},
            bundle=_bundle(),
            tables=_by_column(figures),
            config=marks.config(),
            version=version("looptap"),
            written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            **more,
        )
    )


def write_page(page: str, out_path: str | Path) -> Path:
    """Writes a page; directories above it are made."""
    out_path = Path(out_path)
    with os_errors_named(out_path, "written"):
        out_path.parent.mkdir(parents=True, exist_ok=True)
        out_path.write_text(page, encoding="utf-8")
    return out_path


def model_facts(plan: StoredPlan) -> dict[str, str]:
    """Returns facts about the model that a plan runs, and how it runs it."""
    model, settings = plan.model, plan.settings
    return {
        "Model": model.spec or model.name,
        "Notation": model.notation,
        "Loop": f"{model.core} layers, {model.recurrences} recurrences" if model.core else "none",
        "Injection, norms": "not seen: the module was watched"
        if model.is_watched
        else f"{model.injection or 'none'}, {model.norm}",
        "Parameters": f"{model.num_parameters:,}" if model.num_parameters else "not recorded",
        "Type, device": f"{settings.dtype}, {settings.device}",
    }


def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    folder = files(__name__.rpartition(".")[0])
    environment = Environment(
        loader=FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["unbroken"] = _unbroken
    environment.filters["script_json"] = lambda value: Markup(_script_json(value))
    return environment


def _with_panels(figure: "Figure") -> dict[str, Any]:
    """A figure and its panels as templates take them."""
    panels = [
        {
            "id": f"{figure.name}-{index}",
            "label": panel.label,
            "when": dict(panel.when),
            "packed": _packed(panel, figure),
            "instead": [(dict(other.when), _packed(other, figure)) for other in panel.instead],
        }
        for index, panel in enumerate(figure.panels)
    ]
    return {"figure": figure, "panels": panels}


def _packed(panel: "Panel", figure: "Figure") -> dict[str, Any]:
    """A panel's specification, and the table and columns that it draws from."""
    spec = panel.chart(hover=True).properties(width="container", description=f"{figure.title}, {panel.label}")
    body = spec.to_dict(validate=False)
    if figure.group:  # the page draws that legend once
        body = _without_legends(body)
    body |= {"autosize": {"type": "fit", "contains": "padding"}}
    body.pop("config", None)
    return {"table": panel.data, "columns": list(dict.fromkeys(panel.columns)), "spec": body}


def _choices(figures: Sequence["Figure"], findings: Sequence[Findings]) -> list["Choice"]:
    """The controls that all figures follow, as far as one of them does and there is something to choose."""
    from ..figures.choices import EVERYWHERE, numbered

    followed = {name for figure in figures for panel in figure.panels for name in panel.chosen}
    shapes = [each.depths.core_RL.shape for each in findings]
    most = {
        name: max((shape[axis] for shape in shapes), default=0)
        for axis, name in enumerate(("recurrence", "layer"))
    }
    return [numbered(name, most[name]) for name in EVERYWHERE if name in followed and most[name] > 1]


def _without_legends(spec: Any) -> Any:
    """Returns a specification without the legends that the page draws once for a figure."""
    if isinstance(spec, dict):
        return {k: None if k == "legend" else _without_legends(v) for k, v in spec.items()}
    return [_without_legends(each) for each in spec] if isinstance(spec, list) else spec


def _by_column(figures: Sequence["Figure"]) -> dict[str, dict[str, list[Any]]]:
    """Every table that panels draw from, by column: a third of the size of rows."""
    from ..figures.marks import to_json_column

    packed: dict[str, dict[str, list[Any]]] = {}
    for figure in figures:
        for panel in (each for first in figure.panels for each in (first, *first.instead)):
            table, columns = figure.tables[panel.data], packed.setdefault(panel.data, {})
            columns |= {c: to_json_column(np.asarray(table[c])) for c in panel.columns if c not in columns}
    return packed


def _unbroken(text: str) -> str:
    """Text in which no line ends inside a number such as 2.9e-7 or an option."""
    from markupsafe import Markup, escape

    marked = re.sub(r"\d[\d.]*e-\d+|--[a-z]+", r'<span class="unbroken">\g<0></span>', str(escape(text)))
    return Markup(marked)


def _script_json(value: Any) -> str:
    """JSON that is safe inside a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _bundle() -> str:
    import altair
    from markupsafe import Markup
    from vl_convert import javascript_bundle

    schema = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    script = javascript_bundle("window.vegaEmbed = vegaEmbed;", schema)
    return Markup(script.replace("</script", "<\\/script"))
