"""The demo: one loop with input injection and one without, over prompts that come with the package."""

from importlib.resources import as_file, files
from pathlib import Path

from ..capture.plan import make_plan
from ..capture.settings import CaptureSettings
from .progress import run_with_progress

MODELS = {
    "with-injection": "random:(0,12x32,0)I,norm=pre",
    "without-injection": "random:(0,12x32,0),norm=pre",
}
UNIT_TOKENS = 1024  # a handful of units, so that progress shows and an interrupted demo resumes


def capture_demo(out_dir: Path) -> list[Path]:
    """Captures both models into `out_dir`, or goes on with what is there; returns the stores' paths."""
    stores = []
    with as_file(files("looptap.capture.studies") / "demo_prompts.jsonl") as prompts:
        for name, model in MODELS.items():
            stores.append(out_dir / f"{name}.zarr")
            settings = CaptureSettings.of(
                model=model,
                data=prompts,
                store=stores[-1],
                states=("core[all]",),
                tokens="last",
                unit_tokens=UNIT_TOKENS,
            )
            run_with_progress(make_plan(settings))
    return stores
