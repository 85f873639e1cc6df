"""What measures the kernels: both sides of every comparison compute the same, faults are found, and one
failure does not lose the rest. No test here says how fast anything is.
"""

import json
import math
import os
import platform
import subprocess
import sys

import pytest
import torch

from looptap.benchmarks import kernels_cpu, materialised
from looptap.benchmarks.bench_kernels import bench_kernels
from looptap.benchmarks.bench_settings import KernelsBench
from looptap.benchmarks.timing import Goal
from looptap.errors import UnavailableError

MODEL = "random:(1,2,1),width=48,heads=3"
HAS_TRITON = (sys.platform, platform.machine()) == ("linux", "x86_64")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton has wheels for Linux on x86-64 alone")


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, dict):
        results = results.values()
    return [tensor for inner in results for tensor in flat(inner)]


@pytest.mark.parametrize(
    ("group", "ours", "theirs", "skipped"),
    [
        ("attention", "with statistics", "eager, weights and statistics", 1),  # the log-sum-exp
        ("pairs", "chain of 4", "chain of 4, eager", 0),
        ("pairs", "gram of 4", "gram of 4, eager", 0),
        ("model", "all attention statistics", "eager, weights and statistics", 0),
    ],
)
def test_both_sides_compute_the_same(group, ours, theirs, skipped):
    # 70: more than a block of queries, and no multiple of one
    cases = kernels_cpu.make_cases(group, 70, MODEL)
    with torch.inference_mode():
        found, expected = flat(cases[ours]()), flat(cases[theirs]())
    if skipped:
        del found[1]
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.to(b), b, rtol=2e-5, atol=2e-5)


def test_residual_sides_compute_the_same():
    cases = kernels_cpu.make_cases("residual", 70, MODEL)
    (residual, y), measured = cases["with statistics"]()
    expected = cases["eager, with statistics"]()
    torch.testing.assert_close((residual, y, *measured[:5]), expected, rtol=1e-5, atol=1e-6)


def test_plain_attention_is_the_one_with_weights():
    # grouped heads, two sequences
    q, k, v = torch.randn(20, 4, 8), torch.randn(20, 2, 8), torch.randn(20, 2, 8)
    cu_seqlens = torch.tensor([0, 10, 20], dtype=torch.int32)
    o, a = materialised.attention_with_weights(q, k, v, 10, 0.3)
    torch.testing.assert_close(kernels_cpu.attention(q, k, v, cu_seqlens, 10, 0.3), o)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 4, 10))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells the memory")
@pytest.mark.slow
def test_extra_memory_is_seen():
    T, (H, _, _) = 1024, kernels_cpu.HEADS
    eager = kernels_cpu.extra_bytes("attention", "eager, weights and statistics", T, MODEL)
    ours = kernels_cpu.extra_bytes("attention", "with statistics", T, MODEL)
    one_matrix = 4 * H * T * T
    assert eager > 2 * one_matrix  # scores and weights
    assert ours < one_matrix / 2


def test_the_command_prints_goals_and_json(monkeypatch, capsys):
    # memory linear in T, without the processes that measure it
    monkeypatch.setattr(kernels_cpu, "extra_bytes", lambda group, case, length, model: 1000 * length)
    monkeypatch.setattr(kernels_cpu, "_MIN_S", 0)
    bench_kernels(KernelsBench(device="cpu", model=MODEL, lengths=(8, 16), rounds=1))
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert {row["group"] for row in record["rows"]} == {"attention", "pairs", "residual", "model"}
    assert {row["length"] for row in record["rows"]} == {8, 16}
    power = next(goal for goal in record["goals"] if goal["name"].startswith("power of T"))
    assert power["value"] == pytest.approx(1) and power["is_met"]
    assert record["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("settings", [{"lengths": ()}, {"lengths": (8, 0)}, {"rounds": 0}])
def test_senseless_settings_are_refused(settings):
    with pytest.raises(ValueError, match=r"at least (1|once)"):
        KernelsBench(**settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused():
    with pytest.raises(UnavailableError, match=r"no GPU was found .* --device cpu"):
        bench_kernels(KernelsBench(device="cuda"))


def test_a_goal_without_a_figure_is_missed():
    assert Goal("ratio", 1.0, at_most=1.0).is_met and Goal("speed", 2.0, at_least=2.0).is_met
    assert not Goal("ratio", 1.1, at_most=1.0).is_met and not Goal("speed", 1.9, at_least=2.0).is_met
    assert not Goal("ratio", math.nan, at_most=1.0).is_met and not Goal("speed", math.nan, at_least=2).is_met


def run_gpu_script(*arguments):
    command = [sys.executable, "-m", "looptap.benchmarks.gpu", *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@needs_triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.slow
def test_the_gpu_script_says_that_there_is_none():
    done = run_gpu_script()
    assert done.returncode == 2 and "no GPU was found" in done.stderr


@needs_triton
@pytest.mark.full
def test_the_gpu_script_collects_everything(tmp_path):
    done = run_gpu_script("--collect", "--out", str(tmp_path / "results.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "results.json").read_text())
    from looptap.benchmarks.gpu import FORBIDDEN, PLAN

    assert list(record["steps"]) == list(PLAN)
    assert {step["status"] for step in record["steps"].values()} <= {"ok", "missing", "not run"}
    assert "zarr" in FORBIDDEN and record["steps"]["imports"]["status"] == "ok"
    assert record["steps"]["tests"]["num_collected"] > 0


@needs_triton
@pytest.mark.slow
def test_the_gpu_script_runs_steps_in_processes(tmp_path):
    done = run_gpu_script("--collect", "--out", str(tmp_path / "results.json"), "graphs", "consan")
    assert done.returncode == 0, done.stdout + done.stderr
    steps = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert {name: step["status"] for name, step in steps.items()} == {"graphs": "ok", "consan": "not run"}
    assert steps["graphs"]["operations"] and steps["graphs"]["faults"] == {}


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["repeats", "compiled", "calls", "norms_once", "norms", "attention", "pairs", "model"]
)
def test_every_step_of_the_gpu_script_runs_small_on_a_cpu(name):
    from looptap.benchmarks.gpu_steps import STEPS, without_nan

    (step,) = (step for step in STEPS if step.__name__ == name)
    found = without_nan(step(torch.device("cpu")))
    json.dumps(found, allow_nan=False)
    if name in ("repeats", "compiled", "calls"):
        operations = {"attention", "attention_chain", "attention_gram", "residual_norm"}
        assert operations < set(found["operations"]) and found["faults"] == {}
    elif name != "norms_once":
        assert found["cases"] and "goals" not in found, "figures of tiny sizes say nothing"
        assert len(found["goal_names"]) > (5 if name == "attention" else 0)


@needs_triton
@pytest.mark.slow
def test_what_is_forbidden_is_found(tmp_path):
    from looptap.benchmarks import gpu

    context = gpu.Context("cpu", tmp_path, deadline_s=math.inf)
    assert gpu.import_alone(context)["status"] == "ok"
    code, output = context.run([sys.executable, "-c", gpu._GUARD.format(names=("statistics",))])
    assert code and "statistics is not on the GPU machine" in output


@needs_triton
def test_one_failure_does_not_lose_the_rest(tmp_path, monkeypatch):
    from looptap.benchmarks import gpu

    def fail(context):
        raise RuntimeError("a fault")

    steps = {"bad": fail, "good": lambda context: {"status": "ok"}}
    monkeypatch.setattr(gpu, "PLAN", steps)
    path = tmp_path / "results.json"
    gpu.run_plan(["bad", "good"], "cpu", 1, path)
    found = json.loads(path.read_text())["steps"]
    assert found["bad"]["status"] == "failed" and "a fault" in found["bad"]["error"]
    assert found["good"]["status"] == "ok"
    gpu.run_plan(["good"], "cpu", 0, path)
    assert json.loads(path.read_text())["steps"]["good"]["status"] == "not started"


@needs_triton
def test_a_step_that_hangs_is_stopped(tmp_path, monkeypatch):
    from looptap.benchmarks import gpu

    monkeypatch.setattr(gpu, "STEP_S", 1)
    context = gpu.Context("cpu", tmp_path, deadline_s=math.inf)
    code, output = context.run([sys.executable, "-c", "print('begun'); import time; time.sleep(60)"])
    assert code is None and "begun" in output


@needs_triton
def test_counted_bytes_are_read():
    from looptap.benchmarks.gpu import _read_counts

    output = (
        "==PROF== Connected\n"
        '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"\n'
        '"0","_kernel","dram__bytes.sum","byte","2,147,483"\n'
        '"1","_kernel","dram__bytes.sum","byte","12.5"\n'
    )
    assert _read_counts(output) == [2147483.0, 12.5]
    assert _read_counts("==ERROR== no permission\n") == []


@needs_triton
def test_what_changes_between_repeats_is_found():
    from looptap.benchmarks.gpu_checks import check_compiled, check_repeats, differing

    x = torch.tensor([1.0, math.nan])
    assert differing((x, x), (x.clone(), x.clone())) == []
    assert differing((x, x), (x, torch.tensor([1.0000001, math.nan]))) == [1]
    state = torch.zeros(3)
    calls = {"same": lambda: (x * 2,), "counts": lambda: (state.add_(1).clone(),)}
    assert list(check_repeats(calls, 3)) == ["counts"]
    calls = {"same": lambda: (x * 2,), "breaks": lambda: (x * x.sum().item(), print("a break"))}
    assert list(check_compiled(calls, "aot_eager")) == ["breaks"]


@needs_triton
def test_candidates_take_the_place_of_the_table(monkeypatch):
    from looptap.benchmarks import tune
    from looptap.kernels.gpu.tuned import Settings, find_settings

    entries = tune.entries_in_use("sm_90")
    assert len({(e.kernel, e.width, e.dtype) for e in entries}) == len(entries) > 10
    for entry in entries:
        candidates = tune.list_candidates(entry, "sm_90")
        assert candidates[0] == entry.settings and len(set(candidates)) == len(candidates) > 5
    entry = next(e for e in entries if e.kernel == "residual_norm" and e.width == 2048 and e.dtype == "half")
    odd = Settings(rows=3, num_warps=1)
    with tune.taking(tune.replace(entry, settings=odd)):
        assert find_settings("residual_norm", 2048, torch.bfloat16, torch.device("cpu")) == odd
        assert find_settings("attention_chain_2", 64, torch.bfloat16, torch.device("cpu")) != odd
    assert find_settings("residual_norm", 2048, torch.bfloat16, torch.device("cpu")) != odd


@needs_triton
def test_every_kernel_has_a_workload(monkeypatch):
    from looptap.benchmarks import tune
    from looptap.benchmarks.timing_gpu import Timer

    for name, value in (("_TOKENS", 32), ("_LENGTH", 16), ("_MODEL_WIDTH", 64), ("_GRAM_LENGTH", 8)):
        monkeypatch.setattr(tune, name, value)
    for entry in tune.entries_in_use("sm_90"):
        if entry.width <= 64 or entry.kernel == "residual_norm":
            candidates = tune.list_candidates(entry, "sm_90")[:2]
            best, before_s, after_s = tune.tune(entry, candidates, Timer(torch.device("cpu")))
            assert best in candidates and 0 < after_s <= before_s


@needs_triton
@pytest.mark.slow
def test_a_row_that_spills_is_no_candidate():
    from looptap.benchmarks import tune
    from looptap.kernels.gpu.tuned import Entry, Settings

    entry = Entry(
        kernel="residual_norm", target="sm_90", triton="any", width=2048, dtype="half",
        settings=Settings(rows=4, num_warps=2),
    )  # fmt: skip
    assert "spilled" in tune.check(entry, "sm_90")
    assert tune.check(tune.replace(entry, settings=Settings(rows=1, num_warps=4)), "sm_90") == ""
    assert "does not compile" in tune.check(tune.replace(entry, settings=Settings(rows=3)), "sm_90")
