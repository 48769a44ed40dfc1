"""benchmarks/on_one_gpu.py on the CPU: every part comes to a result, and crashes, hangs, a budget and signals
cost no more than they should."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
ONE_GPU = [sys.executable, str(ROOT / "benchmarks/on_one_gpu.py")]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


def call(*args: object, timeout: float = 400) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*ONE_GPU, *map(str, args)], cwd=ROOT, capture_output=True, text=True, timeout=timeout
    )


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def results_in(folder: Path, **values):
    from gpu_visit.results import Results

    return Results(folder, rehearsal=True, **values)


def processes_of(folder: Path) -> list[str]:
    """Command lines that name a folder."""
    found = []
    for each in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = each.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory) -> Path:
    """Ceilings, full tuning with both heads, loading and saving: some 50 s."""
    folder = tmp_path_factory.mktemp("visit")
    done = call("--rehearse", "--out", folder, "--minutes", "6", "--parts", "b,d,h")
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{(folder / 'log.txt').read_text()[-3000:]}"
    return folder


@pytest.mark.slow
def test_a_rehearsal_measures_steps_beside_their_plan_and_says_what_cannot_be(rehearsed):
    lines = lines_of(rehearsed)
    assert {line["job"] for line in lines if line["status"] == "done"} == {
        "full tuning",
        "full tuning, heads in bf16",
        "ceilings",
        "loading weights",
        "saving",
    }
    steps = [line for line in lines if line.get("name") == "training step"]
    measured = {
        (line["settings"]["micro_batch"], line["settings"]["recomputation"], line["settings"]["heads"])
        for line in steps
        if line["status"] == "measured"
    }
    assert measured == {
        (2, "none", "TF32"),
        (2, "blocks", "TF32"),
        (2, "none", "fp32"),
        (2, "none", "bf16"),
        (2, "blocks", "bf16"),
    }
    for line in steps:
        if line["status"] == "measured":
            assert (
                line["figures"]["step_s"] > 0
                and line["figures"]["peak_gib"] > 0
                and line["planned"]["step_s"] > 0
                and line["planned"]["peak_gib"] > 0
            )
            assert line["figures"]["images_per_s"] == pytest.approx(2 / line["figures"]["step_s"], rel=1e-3)
    # one image: UPerHead pools it to a point
    assert [line["why"][:10] for line in steps if line["status"] == "skipped"] == ["batch norm"]
    assert {line["torch"] for line in lines} == {torch.__version__.split("+")[0]} and all(
        line["rehearsal"] and line["commit"] for line in lines
    )
    loaded = next(line for line in lines if line.get("name") == "loading")
    assert loaded["figures"]["tensors_that_differ"] == 0
    assert [line["settings"]["background"] for line in lines if line.get("name") == "saving"] == [False, True]


@pytest.mark.slow
def test_the_table_holds_what_the_lines_hold(rehearsed):
    text = (rehearsed / "results.md").read_text()
    lines = lines_of(rehearsed)
    assert (
        "rehearsal" in text
        and "## Training steps" in text
        and "matrix products, convolutions" in text
        and "## What did not come to its end" not in text
    )
    top = max(
        line["figures"]["tflops"]
        for line in lines
        if line.get("name") == "matrix product" and line["settings"]["format"] == "bf16"
    )
    step = next(line for line in lines if line.get("name") == "training step")
    assert f"| {100 * step['figures']['model_tflops'] / top:.1f} |" in text


@pytest.mark.slow
def test_a_later_call_leaves_out_what_was_had(rehearsed, tmp_path):
    done = call(
        "--rehearse",
        "--out",
        tmp_path,
        "--minutes",
        "1",
        "--parts",
        "b,d,h",
        "--skip-done",
        "--earlier",
        rehearsed / "results.jsonl",
        timeout=30,
    )
    assert done.returncode == 0 and not (tmp_path / "results.jsonl").exists()
    assert "## Training steps" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_a_job_that_was_cut_short_goes_on_with_the_settings_that_are_left(rehearsed, tmp_path):
    """As after a call whose time was over in the middle of `ceilings`."""
    kept = [
        line for line in lines_of(rehearsed) if line["job"] == "ceilings" and line["status"] == "measured"
    ]
    (tmp_path / "results.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in kept[:-2]) + '{"part": "b", "cut off'
    )
    assert (
        call("--rehearse", "--out", tmp_path, "--minutes", "1", "--parts", "b", "--skip-done").returncode == 0
    )
    text = (tmp_path / "results.jsonl").read_text()
    assert text.count('"bandwidth"') == 4 and text.count('"matrix product"') == sum(
        line["name"] == "matrix product" for line in kept
    )


def test_the_budget_ends_it_in_time_with_a_table(tmp_path):
    began = time.monotonic()
    done = call("--rehearse", "--out", tmp_path, "--minutes", 0.15, "--parts", "d,c,b")
    assert time.monotonic() - began < 9 + 6
    assert done.returncode in (1, 75)
    statuses = {line["job"]: line["status"] for line in lines_of(tmp_path) if "name" not in line}
    assert (
        statuses["full tuning"] in ("timed out", "unfinished")
        and statuses["ceilings"] == statuses["kernels"] == "no time"
    )
    assert "no time" in (tmp_path / "results.md").read_text() and not processes_of(tmp_path)


def test_a_signal_ends_it_with_a_table_and_leaves_no_process(tmp_path):
    process = subprocess.Popen(
        [*ONE_GPU, "--rehearse", "--out", str(tmp_path), "--parts", "b,c"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (
        (tmp_path / "results.jsonl").exists() and "matrix product" in (tmp_path / "results.jsonl").read_text()
    ):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "stopped by a signal" in out and "**matrix product**" in (tmp_path / "results.md").read_text()
    assert not processes_of(tmp_path)


def test_a_job_that_crashes_hangs_or_lacks_a_package_costs_itself_only(tmp_path):
    from gpu_visit.jobs import BY_NAME
    from gpu_visit.supervisor import Supervisor

    said = []
    (tmp_path / "bad.json").write_text("{}}")
    supervisor = Supervisor(
        results_in(tmp_path),
        ends=time.monotonic() + 120,
        rehearse=True,
        more=["--deepspeed_config", str(tmp_path / "bad.json")],
        say=said.append,
    )
    whole = supervisor.run(
        [
            BY_NAME["full tuning"],  # its ds_config cannot be read
            replace(BY_NAME["kernels"], most_s=0.5),  # is not even imported by then
            replace(BY_NAME["saving"], needs=("no_such_module",)),
            BY_NAME["ceilings"],
        ],
        skip_done=False,
    )
    assert not whole
    ends = {line["job"]: (line["status"], line.get("why", "")) for line in said if "name" not in line}
    assert {job: status for job, (status, _) in ends.items()} == {
        "full tuning": "crashed",
        "kernels": "timed out",
        "saving": "missing",
        "ceilings": "done",
    }
    assert "bad.json" in ends["full tuning"][1] and "no_such_module" in ends["saving"][1]
    assert said == lines_of(tmp_path)


def test_processes_in_sessions_of_their_own_are_ended_too():
    from gpu_visit.supervisor import MARK, kill_marked, marked

    mark = f"test-{os.getpid()}"
    nested = (
        "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; "
        "time.sleep(60)'], start_new_session=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", nested], env={**os.environ, MARK: mark})
    while len(marked(mark)) < 2:
        time.sleep(0.05)
    kill_marked(mark)
    assert process.wait(5) == -signal.SIGKILL and not marked(mark)


def test_what_fails_becomes_a_line_and_the_next_setting_is_measured(tmp_path):
    from gpu_visit.visit import OutOfTime, Visit

    visit = Visit(results_in(tmp_path), "c", "kernels", True, time.monotonic() + 60)

    def out_of_memory():
        raise torch.OutOfMemoryError("tried to allocate")

    assert visit.measure("one", {}, lambda: 1 / 0)["status"] == "failed"
    assert visit.measure("two", {}, out_of_memory)["status"] == "out of memory"
    assert visit.measure("three", {"a": 1}, lambda: {"ms": 2.0}, planned={"ms": 1.0})["figures"] == {
        "ms": 2.0
    }
    assert [(line["status"], line.get("why", "")) for line in lines_of(tmp_path)] == [
        ("failed", "ZeroDivisionError: division by zero"),
        ("out of memory", "tried to allocate"),
        ("measured", ""),
    ]
    later = replace(visit, had=visit.results.had(), deadline=0.0)
    assert later.measure("three", {"a": 1}, lambda: 1 / 0) is None  # was had
    with pytest.raises(OutOfTime):
        later.measure("one", {}, lambda: 1 / 0)  # has failed, and would be tried again


def test_results_of_another_card_do_not_count(tmp_path):
    results = results_in(tmp_path)
    line = results.add("b", "ceilings", "done")
    results.path.write_text(json.dumps({**line, "card": "NVIDIA H100 80GB HBM3"}) + "\n")
    assert not results.finished()
    results.add("b", "ceilings", "done")
    assert results.finished() == {"ceilings"}


def test_tests_are_told_one_by_one(tmp_path):
    (tmp_path / "test_some.py").write_text(
        "import pytest\ndef test_good(): pass\ndef test_bad(): assert 1 == 2\n@pytest.mark.skip\ndef "
        "test_no(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError('no disk')\ndef test_late(broken): pass\n"
    )
    code = (
        "import sys, time; sys.path.insert(0, 'benchmarks')\nfrom pathlib import Path\nfrom gpu_visit "
        "import gpu_tests\n"
        "from gpu_visit.results import Results\nfrom gpu_visit.visit import Visit\n"
        f"gpu_tests.run(Visit(Results(Path({str(tmp_path)!r}), rehearsal=True), 'a', 'gpu tests', True, "
        "time.monotonic() + 60), "
        f"files=({str(tmp_path / 'test_some.py')!r},))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {
        line["name"].rpartition("::")[2]: (line["status"], line.get("why", "")) for line in lines_of(tmp_path)
    }
    assert {name: status for name, (status, _) in found.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_no": "skipped",
        "test_late": "failed",
    }
    assert "1 == 2" in found["test_bad"][1] and "no disk" in found["test_late"][1]


def test_the_gpu_tests_are_those_of_the_project():
    from gpu_visit.gpu_tests import test_files

    found = test_files()
    assert {"tests/end_to_end/test_on_gpu.py", "tests/models/intern_image/test_dcnv3_triton.py"} <= set(found)
    assert not any("benchmarks" in name for name in found)


def step(
    card: str, micro_batch: int, compute_s: float, update_s: float, share: float, update_share: float
) -> dict:
    """A measured step of a card that reaches these shares of its data sheet."""
    seconds = compute_s / share + update_s / update_share
    return {
        "part": "d",
        "job": "full tuning",
        "name": "training step",
        "status": "measured",
        "time": "2026-01-02T03:04:05",
        "card": card,
        "rehearsal": False,
        "commit": "abc",
        "torch": "2.11.0",
        "settings": {
            "config": "upernet",
            "side_px": 504,
            "micro_batch": micro_batch,
            "recomputation": "none",
            "ds_config": "zero1_bf16",
            "heads": "TF32",
        },
        "figures": {
            "step_s": seconds,
            "images_per_s": micro_batch / seconds,
            "model_tflops": 400.0,
            "peak_gib": 117.25,
        },
        "planned": {
            "step_s": 0.4,
            "images_per_s": 5.0,
            "peak_gib": 122.3,
            "tensors_gib": 119.5,
            "sheet": "H200",
            "offloaded": False,
            "at_peak": {"compute_s": compute_s, "update_s": update_s, "host_s": 0.0},
        },
    }


def test_the_report_has_the_steps_and_finds_the_rates_that_they_were_made_with(tmp_path):
    lines = [step("NVIDIA H200", count, 0.083 * count, 0.0426, 0.6, 0.9) for count in (2, 4, 8)]
    lines.append(
        {
            **lines[0],
            "name": "matrix product",
            "part": "b",
            "job": "ceilings",
            "settings": {"format": "bf16"},
            "figures": {"tflops": 800.0},
            "planned": {},
        }
    )
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = call("--report", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "card NVIDIA H200" in done.stdout
        and "commit abc" in done.stdout
        and "| 50.0 | 400 | 117.2 |" in done.stdout
    )
    assert "| compute | 0.45 | 0.600 |" in done.stdout and "| link | 0.8 | 0.900 |" in done.stdout


def test_steps_of_one_size_tell_one_share_under_the_assumed_other(tmp_path):
    from gpu_visit.report import fit

    from internseg_ds.planning.step_time import Assumptions

    found = fit([step("NVIDIA H200", 2, 0.166, 0.0426, 0.5, 0.8)], Assumptions(link=0.8))
    assert (found.compute, found.update, found.steps) == (pytest.approx(0.5), None, 1) and found.error < 1e-9
    assert fit([], Assumptions()) is None


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_tst_128x256_64x4_1x2_h_bz_TNT", "matrix products"),
        ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm>", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("sm90_xmma_wgrad_implicit_gemm_indexed_tf32f32", "convolutions"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy HtoD (Pinned -> Device)", "copies to and from the host"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_layer_norm_kernel", "norms"),
        ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "elementwise"),
        ("void at::native::reduce_kernel<512>", "sums"),
    ],
)
def test_kernels_are_told_apart_by_their_names(kernel, kind):
    from gpu_visit.profile import kernels

    events = [
        {"ph": "X", "cat": "kernel", "name": kernel, "ts": 0, "dur": 1500.0},
        {"ph": "X", "cat": "cpu_op", "dur": 9},
    ]
    by_kind, longest = kernels({"traceEvents": events * 2})
    assert by_kind == {kind: 3.0} and longest == {kernel: (3.0, 2)}


def test_cards_are_known_by_the_names_that_drivers_give_them():
    from gpu_visit.visit import data_sheet

    assert [
        data_sheet(name).name
        for name in (
            "NVIDIA H100 80GB HBM3",
            "NVIDIA H200",
            "NVIDIA A100-SXM4-80GB",
            "NVIDIA GeForce RTX 4090",
        )
    ] == ["H100", "H200", "A100", "RTX4090"]
    assert data_sheet("NVIDIA A100-SXM4-40GB").name == "A100-40GB" and data_sheet("NVIDIA T4") is None


@pytest.mark.parametrize("part", ["a", "c", "e", "f", "g"])
@pytest.mark.benchmark
def test_the_other_parts_come_to_their_end(part, tmp_path):
    done = call("--rehearse", "--out", tmp_path, "--minutes", "9", "--parts", part, timeout=600)
    lines = lines_of(tmp_path)
    assert done.returncode == 0 or {line["status"] for line in lines} & {"missing"}, (
        f"{done.stdout[-3000:]}\n{(tmp_path / 'log.txt').read_text()[-3000:]}"
    )
    assert not {line["status"] for line in lines} & {"crashed", "failed", "timed out", "with failures"}


def training_jobs() -> list[str]:
    return [
        "full tuning",
        "full tuning, heads in bf16",
        "head tuning",
        "linear probe",
        "InternImage-H UPerNet",
        "InternImage-H Mask2Former",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", training_jobs())
def test_what_is_trained_at_full_size_passes_the_checks_of_a_run_and_has_a_plan(name, tmp_path):
    """On the meta device: what is refused here would have cost a visit."""
    from gpu_visit import training
    from gpu_visit.jobs import BY_NAME, JOBS
    from gpu_visit.visit import Visit

    from internseg_ds.config.experiment import read_experiment
    from internseg_ds.distributed.process_group import world_from_environment
    from internseg_ds.preflight.preflight import check

    assert {job.name for job in JOBS if "config" in dict(job.given if not job.is_script else {})} == set(
        training_jobs()
    )
    given, ds_config = BY_NAME[name].given, ROOT / "ds_configs/zero1_bf16.json"
    workload = training._workload(
        given["config"], given["side_px"], given.get("heads_dtype", "float32"), cells=given.get("cells", 8)
    )
    first = replace(workload, micro_batch=given["micro_batches"][0])
    check(read_experiment(first.experiment), ds_config, world_from_environment(), validate=False)
    plans = training.Plans(
        workload, ds_config, Visit(results_in(tmp_path), "d", name, True, time.monotonic())
    )
    if BY_NAME[name].part == "f":
        assert not any(plans.refused(count) for count in given["micro_batches"])
    figures = plans.figures(training.Setting(given["micro_batches"][0], "blocks"))
    assert figures["at_peak"]["compute_s"] > 0 and 10 < figures["tensors_gib"] < 140


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--out", "x", "--parts", "d,z"], "--parts z: the parts are a, b"),
        ([], "--out DIR says where results go"),
        (["--out", "x", "--minutes", "0"], "--minutes 0 must be above 0"),
    ],
)
def test_wrong_words_are_refused(args, said):
    done = call(*args, timeout=30)
    assert done.returncode == 2 and said in done.stderr
