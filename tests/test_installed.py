"""What an installed looptap says of itself and brings along."""

import re
import subprocess
import sys
from pathlib import Path

import looptap

ROOT = Path(__file__).parents[1]

SHOW_VERSION = """
import sys, looptap.cli.entry
sys.argv = ["looptap", "--version"]
try:
    looptap.cli.entry.main()
except SystemExit as stop:
    print(stop.code, *({"torch", "zarr", "ray", "xarray"} & set(sys.modules)))
"""

# what a wheel would hold beside modules, as setuptools finds it; the manifest is left out, which writes files
LIST_DATA = """
from setuptools import Distribution
distribution = Distribution()
distribution.parse_config_files()
distribution.include_package_data = False
build = distribution.get_command_obj("build_py")
build.ensure_finalized()
for package, _, _, names in build.data_files:
    print(*(f"{package}/{name}" for name in names), sep="\\n")
"""


def test_the_version_is_printed_and_nothing_heavy_loaded(tmp_path):
    shown = subprocess.run(
        [sys.executable, "-I", "-c", SHOW_VERSION], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert shown.stdout == f"looptap {looptap.__version__}\n0\n"


def test_the_changelog_has_the_version():
    released = re.findall(r"^## \[?([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[0] == looptap.__version__


def test_a_wheel_says_that_it_is_typed():
    listed = subprocess.run(
        [sys.executable, "-c", LIST_DATA], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "looptap/py.typed" in listed.stdout.split()
    assert "looptap.analysis.pages/report.html" in listed.stdout.split()
