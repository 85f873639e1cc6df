"""The Ray engine on a cluster of three nodes in this machine: the contract of all pools, nodes that leave and
come, and captures that end the same whatever was killed.

One cluster for the whole file, as starting one takes seconds, with a temporary directory of its own. It asks
for a token, as Ray's do by default from 2.61 on.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray
from ray._raylet import Config  # pyright: ignore[reportAttributeAccessIssue]
from ray.cluster_utils import Cluster

from looptap.capture.engines.drive import run_on
from looptap.capture.engines.engine import open_engine
from looptap.capture.engines.events import WorkerJoined, WorkerLost
from looptap.capture.engines.patience import Limits
from looptap.capture.engines.ray import Actors, cluster
from looptap.capture.plan import make_plan
from looptap.capture.run import run_capture
from looptap.capture.settings import CaptureSettings
from looptap.capture.store.care.verify import verify_store
from looptap.capture.store.writing.commit import Store
from looptap.errors import ClusterError, EngineError
from looptap.tests.engine_contract import Files, ProcessPoolContract, ended, is_alive, run

pytestmark = pytest.mark.apart

TINY = "random:(0,2x3,0)I,width=32,heads=2"
TOKEN = "0123456789abcdef" * 4
NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80 << 20}  # there is no GPU; Ray takes our word


@pytest.fixture(scope="module")
def nodes():
    """A cluster of a head and two nodes; this process is a driver of it."""
    # pytest's own directories are too long for the sockets in there
    directory = tempfile.mkdtemp(prefix="looptap-")
    (Path(directory) / "ray").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", directory)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        Config.initialize("")  # which read the environment when Ray was imported
        made = Cluster(
            initialize_head=True, head_node_args={**NODE, "num_gpus": 0, "include_dashboard": False}
        )
        try:
            made.add_node(**NODE)
            made.add_node(**NODE)
            ray.init(made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            ray.shutdown()
            made.shutdown()
            shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(autouse=True)
def whole(nodes):
    """Every test finds, and leaves, all three nodes."""
    yield
    while len(nodes.worker_nodes) < 2:
        nodes.add_node(**NODE)


class TestActors(ProcessPoolContract):
    @pytest.fixture
    def make_pool(self):
        return lambda recipe, num_workers: Actors(recipe, 0, num_workers)


def test_an_actor_for_each_gpu(tmp_path):
    files = Files(tmp_path, seconds=0.3)
    events = run(lambda recipe, _: Actors(recipe, 1), files, 8, None)
    assert ended(events) == dict.fromkeys(range(8), "done")
    assert max(event.num_workers for event in events if isinstance(event, WorkerJoined)) == 2
    assert len(files.gpus()) == 2 and set(files.gpus().values()) == {"0"}, "the only one of its node"


def test_places_are_counted_by_node(tmp_path):
    files = Files(tmp_path)
    assert Actors(files, 0).num_places() == 3, "a worker for each node"
    assert Actors(files, 0, 2).num_places() == 3, "no share of all cores is more than a node's"
    assert Actors(files, 1).num_places() == 2
    assert Actors(files, 2).num_places() == 0, "no node has two"


def remove_node(nodes: Cluster) -> float:
    """Kills it; returns when, by the clock that stamps files."""
    removed_s = time.time()
    nodes.remove_node(next(iter(nodes.worker_nodes)), allow_graceful=False)
    return removed_s


@pytest.mark.parametrize("is_replaced", [False, True], ids=["without", "with"])
def test_a_node_is_removed(nodes, tmp_path, is_replaced, capsys):
    """The run goes on with what is left if there is no spare node; with one a new worker comes."""
    files, events, removed_s = Files(tmp_path, seconds=1.0), [], None
    num_units = 24 if is_replaced else 14
    with Actors(files, 0, 3) as pool:
        for event in run_on(pool, range(num_units), committed=files.committed, wanted=3):
            events.append(event)
            if removed_s is None and len(files.done()) >= 3 and len(files.workers()) == 3:
                removed_s = remove_node(nodes)
                if is_replaced:
                    nodes.add_node(**NODE)
    assert set(ended(events).values()) == {"done"} and len(ended(events)) == num_units
    assert any(isinstance(event, WorkerLost) for event in events)
    joined = [event for event in events if isinstance(event, WorkerJoined)]
    assert len(joined) == (4 if is_replaced else 3), events
    # none, where the worker lived on for long enough to commit what it had
    if again_s := [path.stat().st_mtime for path in tmp_path.glob("begun.*.2")]:
        with capsys.disabled():
            print(f" the first lost unit began again after {min(again_s) - removed_s:.1f} s", end=" ")


def test_the_last_node_leaves(nodes, tmp_path):
    """GPUs are on two nodes; without them the run waits for as long as it was told to, and says so."""
    files = Files(tmp_path, seconds=0.2)
    limits = Limits(reissue_s=0.5, lost_s=1, no_worker_s=10)  # the first worker has that long to come, too
    message = r"no worker is left and none came for 10 s; \d+ units are not done"
    with pytest.raises(OSError, match=message), Actors(files, 1) as pool:
        for _ in run_on(pool, range(99), committed=files.committed, limits=limits):
            while len(files.done()) >= 4 and nodes.worker_nodes:
                remove_node(nodes)
    assert 4 <= len(files.done()) < 99


@pytest.fixture(scope="module")
def calm(tmp_path_factory, nodes) -> CaptureSettings:
    """Thirty units, captured in peace and in a process of its own with one thread."""
    path = tmp_path_factory.mktemp("calm")
    np.save(path / "ids.npy", np.random.default_rng(0).integers(0, 256, (30, 25)))
    settings = CaptureSettings.of(
        model=TINY, data=path / "ids.npy", store=path / "calm.zarr", unit_tokens=48, tokens="last",
        states=("core[all]@last",), workers=1, device="cpu",
    )  # fmt: skip
    assert run_capture(make_plan(settings)).complete
    return settings


def content(path: Path) -> dict[str, bytes]:
    """Every file that holds values."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("c.*"))}


def check(path: Path, calm: CaptureSettings) -> None:
    """Sound, complete, and bit for bit what was captured in peace."""
    report = verify_store(path)
    assert report.ok and not report.units_missing and not report.uncommitted, report
    assert content(path) == content(Path(calm.run.store))


def test_a_capture_whose_worker_is_killed(calm, tmp_path):
    settings = calm.but(store=tmp_path / "run.zarr", engine="ray", workers=2)
    workers, killed, num_ended = [], [], 0

    def kill_one(event):
        nonlocal num_ended
        num_ended += 1
        if isinstance(event, WorkerJoined):
            workers.append(int(re.search(r"process (\d+)", event.where)[1]))
        elif num_ended > 8 and workers and not killed:
            killed.append(workers[0])
            os.kill(workers[0], signal.SIGKILL)

    assert run_capture(make_plan(settings), kill_one).complete
    check(tmp_path / "run.zarr", calm)
    assert killed and not any(map(is_alive, killed))
    assert {entry["pid"] for entry in Store.open(tmp_path / "run.zarr").entries()} <= set(workers)


def start(calm: CaptureSettings, path: Path, *options: str, **changes: str | None) -> subprocess.Popen:
    """The command, in a process group of its own as a shell's job is, with variables changed or unset."""
    command = ["capture", TINY, "--data", str(calm.data.data), "--store", str(path), "--unit-tokens", "48"]
    command += ["--states", "core[all]@last", "--tokens", "last", "--device", "cpu", "--engine", "ray"]
    command += options
    return subprocess.Popen(
        [sys.executable, "-m", "looptap", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={k: v for k, v in {**os.environ, "COLUMNS": "1000", **changes}.items() if v is not None},
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_units(capture: subprocess.Popen, path: Path, num_units: int) -> None:
    ledger = path / ".looptap" / "ledger"
    while capture.poll() is None and not (ledger.exists() and len(os.listdir(ledger)) >= num_units):
        time.sleep(0.005)


def test_the_driver_is_killed_and_run_again(nodes, calm, tmp_path):
    """Its actors die with it, some time later: the next driver works beside them."""
    path, address = tmp_path / "run.zarr", ["--ray-address", nodes.address]
    capture = start(calm, path, *address)
    wait_for_units(capture, path, 4)
    capture.kill()
    capture.communicate()
    before = len(Store.open(path).done())
    assert 4 <= before < 30
    again = start(calm, path, *address)
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert re.search(r"30 of 30 units are in .*, \d+ of them before", said)
    check(path, calm)


def test_ctrl_c_with_a_cluster_of_its_own(calm, tmp_path):
    """Ctrl-C goes to every process of the group, as from a terminal, so also to those that Ray started."""
    path = tmp_path / "run.zarr"
    capture = start(calm, path, "--workers", "1")
    wait_for_units(capture, path, 3)
    os.killpg(capture.pid, signal.SIGINT)
    said, _ = capture.communicate()
    assert capture.returncode == 130, said
    assert "finishing the units in flight; Ctrl-C again stops at once" in said and "Traceback" not in said
    assert "is lost" not in said, "a worker was hit by the signal"
    done = Store.open(path).done()
    assert 3 <= len(done) < 30 and f"{len(done)} of 30 units are in {path}" in said
    assert not (path / ".looptap" / "driver.lock").exists()
    assert run_capture(make_plan(calm.but(store=path))).complete
    check(path, calm)


NO_TOKEN = {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN": None}


@pytest.mark.parametrize(
    "mode", [None, pytest.param("token", marks=pytest.mark.full)], ids=["by default", "asked for"]
)
def test_a_cluster_of_its_own_without_a_home(nodes, calm, tmp_path, mode):
    """Ray asks for a token there by default, and would write a new one to ~/.ray."""
    (tmp_path / "file").touch()
    home = str(tmp_path / "file" / "home")
    variables = NO_TOKEN | {"HOME": home, "RAY_AUTH_MODE": mode, "MPLCONFIGDIR": str(tmp_path)}
    capture = start(calm, tmp_path / "run.zarr", "--workers", "1", **variables)
    said, _ = capture.communicate()
    assert capture.returncode == 0, said
    check(tmp_path / "run.zarr", calm)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        (
            {"RAY_AUTH_TOKEN": "another"},
            "asks for its token, and that of RAY_AUTH_TOKEN is another: set",
        ),
        ({"RAY_AUTH_TOKEN": None}, "asks for its token, and none is set here: set RAY_AUTH_MODE=token, and"),
        (NO_TOKEN, "asks for its token, and none is set here: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN"),
        ({"RAY_AUTH_MODE": "disabled"}, "asks for its token, and RAY_AUTH_MODE is not token: set RAY_"),
        ({"RAY_AUTH_TOKEN": "a b"}, "RAY_AUTH_TOKEN holds a space, a line break or another character"),
        (
            {"RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": "/nowhere/token"},
            "RAY_AUTH_TOKEN_PATH (/nowhere/token) names no file that can be read",
        ),
    ],
    ids=["wrong", "missing", "unset", "disabled", "no token", "no file"],
)
def test_a_token_that_is_not_the_clusters(nodes, calm, tmp_path, variables, message):
    """One message, at once: Ray itself asks on for 20 seconds."""
    options = ["--ray-address", nodes.address]
    capture = start(calm, tmp_path / "run.zarr", *options, **variables, HOME=str(tmp_path))
    said, _ = capture.communicate(timeout=60)
    (line,) = [line for line in said.splitlines() if line.startswith("looptap: ")]
    assert capture.returncode == 2 and message in line and "Traceback" not in said, said
    assert "gcs_client" not in said and not (tmp_path / "run.zarr").exists()


def test_a_token_in_a_file(nodes, calm, tmp_path):
    """It is enough that it is there."""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    variables = NO_TOKEN | {"HOME": str(tmp_path)}
    capture = start(calm, tmp_path / "run.zarr", "--ray-address", nodes.address, **variables)
    said, _ = capture.communicate()
    assert capture.returncode == 0, said
    check(tmp_path / "run.zarr", calm)


def test_ray_leaves_sigterm_to_the_command(nodes):
    """Its own handler, which it puts in place when it starts, would leave at once."""
    code = f"""
import signal
from looptap.capture.engines.ray import cluster
handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)
with cluster({nodes.address!r}):
    assert signal.getsignal(signal.SIGTERM) is handler
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_gpus_that_only_the_cluster_has(calm):
    """The plan would be one for the CPU without anybody having said so."""
    settings = calm.but(workers=None, engine="ray", device="auto")
    plan = make_plan(settings)
    with pytest.raises(EngineError, match="the cluster has 2 GPUs and this machine none"):
        open_engine(replace(plan, device="cpu")).__enter__()


def test_a_ray_client_is_refused():
    ray_is_up = ray.is_initialized
    ray.is_initialized = lambda: False
    try:
        with pytest.raises(ClusterError, match="run the command on a node of the cluster"):
            cluster("ray://127.0.0.1:10001").__enter__()
    finally:
        ray.is_initialized = ray_is_up


@pytest.mark.parametrize(
    ("before", "message"),
    [
        ("sys.modules['ray'] = None", "looptap: --engine ray needs Ray: pip install 'looptap[ray]'"),
        (
            "import os; os.environ['RAY_ADDRESS'] = '127.0.0.1:1'",
            "looptap: no Ray cluster answers at 127.0.0.1:1",
        ),
    ],
    ids=["no ray", "no cluster"],
)
def test_what_is_missing_is_said_before_a_store_is_made(calm, tmp_path, before, message):
    command = ["capture", TINY, "--data", str(calm.data.data), "--store", str(tmp_path / "s")]
    command += ["--engine", "ray"]
    run = "from looptap.cli.entry import main; main()"
    code = f"import sys; {before}\nsys.argv = {['looptap', *command]}\n{run}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "s").exists()
