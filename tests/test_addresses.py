"""Addresses of stores: what is given works wherever a store is taken, or one message refuses it by name.

What obstore is given unchecked ends in a panic, which is no Exception.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import looptap
from looptap.analysis.analyze import write_analysis
from looptap.analysis.measures import measure
from looptap.analysis.pages.report import write_report
from looptap.capture.store.care.repair import repair_store
from looptap.capture.store.care.status import store_status
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.places.lock import lock_holder
from looptap.capture.store.places.open import open_place
from looptap.cli import commands
from looptap.errors import StoreAddressError
from looptap.tests.s3_server import BUCKET, serve_s3_here

TINY = "random:(0,2x3,0)I,width=32,heads=2"


@pytest.fixture(scope="module")
def door():
    with serve_s3_here() as door:
        yield door


@pytest.mark.slow
def test_every_function_takes_a_url(door, tmp_path, capsys):
    url = f"s3://{BUCKET}/functions/run.zarr"
    rows = np.random.default_rng(0).integers(0, 256, (6, 12)).tolist()
    settings = {"states": ("core[all]@all",), "device": "cpu"}
    captured = looptap.capture(TINY, rows, url, **settings)
    here = looptap.capture(TINY, rows, **settings)
    for name, values in here.variables.items():
        np.testing.assert_array_equal(captured[name], values, err_msg=str(name))
    again = looptap.capture(TINY, rows, store=url, **settings)
    assert again.attrs["units_done"] == looptap.open(url).attrs["units_total"]
    assert next(iter(looptap.batches(url, depths=[1], batch_rows=4))).shape == (4, 32)
    assert store_status(url).complete and verify_store(url).ok and not repair_store(url).problems
    np.testing.assert_array_equal(measure(url)["residual_norm"], measure(here)["residual_norm"])
    assert write_analysis(url, tmp_path, figure_format=())
    assert write_report([url, here], tmp_path / "report.html").exists()
    for command in (commands.status, commands.verify, commands.info):
        assert command(url) == 0 and url in capsys.readouterr().out.replace("\n", "")
    assert commands.info("S3" + url[2:]) == 0
    module, watched_url = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), f"s3://{BUCKET}/of-addresses.zarr"
    with looptap.watch(module, ["0", "1"], quantities=["residual"], store=watched_url):
        module(torch.zeros(1, 3, 4))
    assert looptap.open(watched_url).sizes["depth"] == 2


@pytest.mark.parametrize(
    "prefix",
    ["", "/", "a b", "100%", "a%20b", "q?x=1", "h#1", "pl+us", "ü/日本", "[b]*", "a&b=c;d", "q'u\"o", "x//"],
)
def test_prefixes(door, prefix):
    """Objects lie under the prefix as it was written, and are found again."""
    place = open_place(f"S3://{BUCKET}/{prefix}")
    place.create("folder/key", b"value")
    assert place.names("") and place.sizes("folder") == {"key": 5} and place.read("folder/key") == b"value"
    assert str(place) == f"s3://{BUCKET}/{prefix}".rstrip("/") and lock_holder(str(place)) is None
    place.remove(["folder/key"])
    assert not place.exists("folder/key")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3:/bucket/x", "two slashes"),
        ("s3:bucket", "two slashes"),
        (Path("s3://bucket/x"), "s3:/bucket/x is not s3://bucket/prefix: give two slashes, and text"),
        ("s3://", "names no bucket"),
        ("s3:///x", "names no bucket"),
        ("s3://a b/x", "'a b' is no name of a bucket"),
        ("s3://key:secret@bucket/x", "is no name of a bucket"),
        ("s3://bucket/a//b", "no empty part"),
        ("s3://bucket/a/../b", "no . or .. as a part"),
        ("s3://bucket/a\nb", "no control characters"),
        ("gs://bucket/x", "cannot hold a store"),
    ],
)
def test_what_is_no_address(address, message):
    for take in (open_place, looptap.open, store_status):
        with pytest.raises(StoreAddressError) as caught:
            take(address)
        assert message in str(caught.value)
        assert str(address) in str(caught.value).replace("\\n", "\n")


@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT"])
@pytest.mark.parametrize(
    "endpoint",
    [
        *("foo", "ftp://x", "http://", "http://host:notaport", "", "127.0.0.1:9", "http://host:99999"),
        *("http://a b", " http://host", "http://[::1", "http://ü.de", "http://:9", "http://host:0"),
        "http://host/?x=1",
    ],
)
def test_nonsense_endpoints(monkeypatch, name, endpoint):
    monkeypatch.setenv(name, endpoint)
    with pytest.raises(StoreAddressError) as caught:
        open_place("s3://bucket/x")
    assert str(caught.value).startswith(f"{name} is {endpoint!r}, wh")


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
@pytest.mark.parametrize("region", ["", "us east", "ü", "a\nb", "{}", "us-east-1/"])
def test_nonsense_regions(monkeypatch, name, region):
    monkeypatch.setenv(name, region)
    with pytest.raises(StoreAddressError, match="which is no region") as caught:
        open_place("s3://bucket/x")
    assert str(caught.value).startswith(f"{name} is {region!r}")


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_nonsense_keys(monkeypatch, name):
    monkeypatch.setenv(name, "abc\n")
    with pytest.raises(StoreAddressError, match=f"{name} holds") as caught:
        open_place("s3://bucket/x")
    assert "abc" not in str(caught.value)


@pytest.mark.parametrize(
    "endpoint", ["https://host", "http://host:9000/", "HTTP://[::1]:9", "http://u:p@host/path"]
)
def test_endpoints_that_can_be(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert str(open_place("s3://bucket/x")) == "s3://bucket/x"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"AWS_ENDPOINT_URL": "foo"}, "AWS_ENDPOINT_URL is 'foo'"),
        ({"AWS_REGION": "a b"}, "AWS_REGION is 'a b'"),
    ],
)
@pytest.mark.slow
def test_the_command_says_it_in_one_line(door, variables, message):
    done = subprocess.run(
        [sys.executable, "-m", "looptap", "status", f"s3://{BUCKET}/x"],
        capture_output=True,
        text=True,
        env=os.environ | variables,
    )
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith(f"looptap: {message}") and done.stderr.count("\n") == 1
