"""The command line's contract: exit codes, what is on stdout, and errors of one line."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from windtunnel.experiments import cli
from windtunnel.experiments.layout import Layout
from windtunnel.sim.hardware import cluster_names, fabric_names, load_cluster, processor_names

STEP = {
    "step_time_s", "tokens_per_s", "tflops_per_gpu", "hardware_tflops_per_gpu", "mfu", "breakdown_s",
    "communication_s", "peak_memory_bytes", "fits", "first_to_exceed", "remedies", "bytes_sent_per_gpu",
    "offloaded_bytes_per_node", "wall_s", "events", "layout",
}  # fmt: skip
"""Fields of `simulate --json` (docs/contract.md)."""

BREAKDOWN = {"compute", "exposed_communication", "bubble", "host", "offload"}
MEMORY = {
    "parameters", "gradients", "optimizer", "activations", "buffers", "temporary", "total", "reserved", "framework",
}  # fmt: skip

DEMO = ("simulate", "--model", "gpt-demo", "--cluster", "dgx-a100")


class Answer(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process."""
    monkeypatch.delenv("COLUMNS", raising=False)  # a process of pytest-xdist has one

    def run(*words: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["windtunnel", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        return Answer(int(ended.value.code or 0), out, err)

    return run


def check_refused(answer: Answer, *words: str, code: int = 2) -> None:
    """One line on stderr that has the words, nothing on stdout."""
    assert answer.code == code, answer
    assert answer.out == ""
    assert answer.err.count("\n") == 1, answer.err
    assert answer.err.startswith("windtunnel: ")
    for word in words:
        assert word in answer.err
    assert "Traceback" not in answer.err


# Starting #

PROBE = """
import sys
from windtunnel.experiments.cli import main
import windtunnel, windtunnel.sim
for words in (["--help"], ["hardware", "--json"], ["models", "--json"], ["simulate", "--help"],
              ["hardware", "a100-80gb", "--json"], ["models", "gpt2", "--json"]):
    sys.argv = ["windtunnel", *words]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (words, end.code)
    print("\\n=== loaded", *sorted({"torch", "matplotlib"} & set(sys.modules)))
"""


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, check=False)


def test_help_and_catalogues_load_no_torch() -> None:
    done = python("-c", PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    usage, hardware, models, simulate, gpu, model = done.stdout.split("\n=== loaded\n")[:6]
    for verb in ("demo", "simulate", "verify", "launch", "calibrate", "models", "hardware"):
        assert verb in usage
    for option in ("--micro-batch", "--global-batch", "--save-trace", "--trace", "--chakra", "--perfetto", "--config"):
        assert option in simulate
    entries = json.loads(hardware)
    assert [entry["name"] for entry in entries["gpus"]] == list(processor_names())
    assert [entry["name"] for entry in entries["clusters"]] == list(cluster_names())
    assert [entry["name"] for entry in entries["fabrics"]] == list(fabric_names())
    assert all(entry["sources"] for group in entries.values() for entry in group)
    assert all(entry["source"] for entry in json.loads(models)["models"])
    assert [entry["name"] for entry in json.loads(gpu)["gpus"]] == ["a100-80gb"]
    assert [entry["name"] for entry in json.loads(model)["models"]] == ["gpt2"]


def test_as_a_program() -> None:
    done = python("-m", "windtunnel.experiments.cli", *DEMO, "--gpus", "8", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert set(answer) >= STEP
    refused = python("-m", "windtunnel.experiments.cli", "hardware", "a100-80g")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "did you mean 'a100-80gb'?" in refused.stderr


# simulate #


def test_simulate_keeps_the_contract(command: Command) -> None:
    answer = command(*DEMO, "--gpus", "8", "--zero", "3", "--json")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.count("\n") == 1
    step = json.loads(answer.out)
    # The contract's fields, and the bytes between steps that `verify` compares.
    assert set(step) == STEP
    assert set(step["breakdown_s"]) == BREAKDOWN
    assert sum(step["breakdown_s"].values()) == pytest.approx(step["step_time_s"])
    assert set(step["peak_memory_bytes"]) == MEMORY
    assert set(step["bytes_sent_per_gpu"]) == {"total", "max", "by_axis"}
    assert set(step["layout"]) == {field.name for field in fields(Layout)}
    assert step["fits"] is True


def test_what_does_not_fit_is_an_answer_too(command: Command) -> None:
    answer = command(
        "simulate", "--model", "gpt3-13b", "--cluster", "dgx-a100", "--gpus", "1", "--no-remedies", "--json"
    )
    assert answer.code == 0
    step = json.loads(answer.out)
    assert (step["fits"], step["remedies"]) == (False, [])
    assert step["first_to_exceed"]["phase"] == "initialize"


def test_several_sizes_give_a_table_a_csv_and_a_plot(command: Command, tmp_path: Path) -> None:
    words = (*DEMO, "--gpus", "1,8", "--zero", "1", "--tokens", "1e9", "--out", str(tmp_path / "new"))
    answer = command(*words)
    assert (answer.code, answer.err) == (0, "")
    for part in ("GPUs", "MFU", "exposed", "days", "scaling.csv", "scaling.png", "breakdown.png", "memory.png"):
        assert part in answer.out
    header, *lines = (tmp_path / "new" / "scaling.csv").read_text().splitlines()
    assert header.startswith("gpus,global_batch,step_time_s")
    assert [line.split(",")[0] for line in lines] == ["1", "8"]
    assert (tmp_path / "new" / "scaling.png").read_bytes().startswith(b"\x89PNG")
    as_json = json.loads(command(*words, "--json").out)
    assert [step["layout"]["gpus"] for step in as_json["results"]] == [1, 8]
    assert Path(as_json["csv"]).is_file()
    assert Path(as_json["plot"]).is_file()
    training = as_json["results"][1]["training"]
    assert training["tokens"] == 1e9
    assert training["days"] * 86_400 * as_json["results"][1]["tokens_per_s"] == pytest.approx(1e9)


def test_shapes_compared_by_the_price_of_a_token(command: Command, tmp_path: Path) -> None:
    clusters = "dgx-a100,aws-p4de,azure-nd96amsr-a100-v4"
    words = ("simulate", "--model", "gpt-demo", "--cluster", clusters, "--gpus", "8", "--out", str(tmp_path))
    answer = command(*words, "--tokens", "1e9")
    assert (answer.code, answer.err) == (0, "")
    assert "no price" in answer.out
    assert "cheapest token first" in answer.out
    header, *lines = (tmp_path / "shapes.csv").read_text().splitlines()
    assert header.startswith("cluster,gpu,gpus,")
    assert [line.split(",")[0] for line in lines] == ["aws-p4de", "azure-nd96amsr-a100-v4", "dgx-a100"]
    dgx, aws, _ = json.loads(command(*words, "--json").out)["results"]
    assert dgx["price"] is None
    price = load_cluster("aws-p4de").price
    assert price is not None
    assert aws["price"]["per_hour_usd"] == price.per_hour_usd
    assert aws["price"]["per_million_tokens_usd"] * 3.6e-3 * aws["tokens_per_s"] == pytest.approx(price.per_hour_usd)


def test_what_failures_leave(command: Command, tmp_path: Path) -> None:
    words = (*DEMO, "--cluster", "aws-p4de", "--gpus", "8", "--tokens", "1e12")
    plain = json.loads(command(*words, "--json").out)
    assert "goodput" not in plain
    answer = command(*words, "--goodput", "--restart-s", "900", "--out", str(tmp_path))
    assert (answer.code, answer.err) == (0, "")
    for part in ("interrupted every", "goodput", "a month played", "USD", "goodput.png"):
        assert part in answer.out
    assert (tmp_path / "goodput.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads(
        command(*words, "--mtbf-hours", "24", "--checkpoint-s", "300", "--restart-s", "600", "--json").out
    )
    assert found["goodput"]["interval_s"] / 60 == pytest.approx(117, rel=0.005)  # Daly 2006, figure 3
    assert found["goodput"]["tokens_per_s"] == pytest.approx(found["goodput"]["share"] * found["tokens_per_s"])
    assert found["goodput"]["price_usd"] * found["goodput"]["share"] == pytest.approx(found["training"]["price_usd"])
    check_refused(command(*words, "--mtbf-hours", "0"), "mtbf_hours must be > 0 and finite, got 0")
    check_refused(command(*words, "--failures", "lama3"), "unknown failure profile 'lama3'", "did you mean 'llama3'")


def test_timeline_and_trace_files(command: Command, tmp_path: Path) -> None:
    timeline, trace = tmp_path / "timeline.json", tmp_path / "deep" / "trace.json"
    answer = command(*DEMO, "--gpus", "4", "--perfetto", str(timeline), "--save-trace", str(trace), "--json")
    assert answer.code == 0
    step = json.loads(answer.out)
    assert (step["perfetto"], step["trace"]) == (str(timeline), str(trace))
    assert json.loads(timeline.read_text())["traceEvents"]
    assert json.loads(trace.read_text())["layout"]["gpus"] == 4
    priced = json.loads(command("simulate", "--trace", str(trace), "--cluster", "dgx-a100", "--json").out)
    assert priced["step_time_s"] == step["step_time_s"]
    for words, message in (
        (("--trace", str(trace), "--tp", "2"), "tp = 2 beside --trace; allowed: "),
        (("--trace", str(tmp_path / "none.json")), f"trace = {tmp_path / 'none.json'}: "),
        (("--trace", str(timeline)), "format = None; allowed: 'windtunnel job'"),
        ((), "Missing option '--model'; allowed: a model, or a saved trace by --trace FILE"),
    ):
        refused = command("simulate", "--cluster", "dgx-a100", *words)
        assert refused.code == 2
        assert message in refused.err


def test_a_folder_of_a_pipelined_step(command: Command, tmp_path: Path) -> None:
    words = (*DEMO, "--gpus", "4", "--pp", "2", "--global-batch", "8", "--out", str(tmp_path))
    answer = command(*words, "--chakra", str(tmp_path / "chakra"), "--json")
    assert answer.code == 0, answer.err
    files = json.loads(answer.out)
    for name in ("breakdown", "memory", "pipeline"):
        assert Path(files[name]) == tmp_path / f"{name}.png"
        assert Path(files[name]).read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "result.json").read_text())["step_time_s"] == files["step_time_s"]
    assert json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    names = sorted(path.name for path in (tmp_path / "chakra").iterdir())
    assert names == ["groups.json", *(f"step.{rank}.et" for rank in range(4))]


def test_user_files_and_a_deepspeed_file(command: Command, tmp_path: Path) -> None:
    (tmp_path / "m.toml").write_text('base = "gpt-demo"\nlayers = 2\n')
    (tmp_path / "c.toml").write_text('base = "dgx-a100"\nnodes = 2\n[inter_node]\nbytes_per_s = 5e10\n')
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    words = ("--model", str(tmp_path / "m.toml"), "--cluster", str(tmp_path / "c.toml"), "--gpus", "16")
    answer = command("simulate", *words, "--config", str(tmp_path / "ds.json"), "--json")
    assert answer.code == 0, answer.err
    layout = json.loads(answer.out)["layout"]
    assert (layout["model"], layout["cluster"], layout["zero"], layout["precision"]) == ("m", "c", 2, "bf16")


MODEL = """
layers = "two"
hidden = 64
heads = 2
vocab = 100
seq = 32
mlp = "gelu"
norm = "layernorm"
positions = "learned"
attention = "causal"
tied = true
bias = true
"""
CLUSTER = 'base = "dgx-a100"\nnodes = "four"\n'


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--model", "gpt4"), ("model = 'gpt4'", "did you mean 'gpt2'")),
        (("--cluster", "dgx-a10"), ("unknown cluster 'dgx-a10'", "did you mean 'dgx-a100'")),
        (("--colour", "red"), ("No such option: --colour",)),
        (("--zero", "9"), ("zero stage = 9", "0, 1, 2, 3")),
        (("--zero", "three"), ("--zero", "three", "integer")),
        (("--gpus", "many"), ("gpus = 'many'", "an integer")),
        (("--gpus", "8,"), ("gpus = '8,'", "an integer")),
        (("--gpus", "0"), ("gpus = 0", ">= 1")),
        (("--gpus", "8", "--tp", "3"), ("gpus = 8", "tp * pp * cp = 3 * 1 * 1")),
        (("--gpus", "8", "--dp", "5"), ("dp = 5", "allowed")),
        (("--gpus", "8", "--global-batch", "12"), ("global-batch = 12", "a multiple of micro-batch * dp = 1 * 8")),
        (("--micro-batch", "0"), ("micro-batch = 0", "an integer >= 1")),
        (("--seq", "100000"), ("seq = 100000", "at most")),
        (("--recompute", "some"), ("recompute = some", "none, selective, attention, full, budget")),
        (("--precision", "fp8"), ("precision = fp8", "fp32, bf16, fp16")),
        (("--tokens", "-1"), ("tokens = -1", "> 0")),
        (("--gpus", "100000", "--fidelity", "events"), ("fidelity = 'events'", "allowed: 2,000,000")),
        (("--model", "no/such/model.toml"), ("no/such/model.toml", "cannot read")),
        (("--cluster", "no/such/cluster.toml"), ("no/such/cluster.toml", "cannot read")),
        (("--gpus", "8", "--config", "no/such/ds.json"), ("no/such/ds.json", "cannot read")),
        (("--config", "no/such/ds.json"), ("gpus is missing", "an integer >= 1")),
    ],
)  # fmt: skip
def test_bad_options_are_one_line(command: Command, words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    check_refused(command(*DEMO, *words), *expected)


@pytest.mark.parametrize("missing", ["--model", "--cluster"])
def test_what_must_be_given_is_named(command: Command, missing: str) -> None:
    words = [word for pair in (("--model", "gpt2"), ("--cluster", "dgx-a100")) if pair[0] != missing for word in pair]
    check_refused(command("simulate", *words), f"Missing option '{missing}'")


def test_a_profile_needs_a_file_and_a_base(command: Command, tmp_path: Path) -> None:
    check_refused(command("calibrate", "--from-profile", "x.json"), "base is missing")
    words = ("--from-profile", str(tmp_path / "x.json"), "--base", "dgx-a100", "--out", str(tmp_path))
    check_refused(command("calibrate", *words), "x.json: not a trace of torch.profiler")


def test_an_unknown_verb(command: Command) -> None:
    check_refused(command("simulat"), "No such command 'simulat'")


def test_wrong_types_in_user_files(command: Command, tmp_path: Path) -> None:
    model, cluster, deepspeed = tmp_path / "m.toml", tmp_path / "c.toml", tmp_path / "ds.json"
    model.write_text(MODEL)
    cluster.write_text(CLUSTER)
    deepspeed.write_text('{"zero_optimization": {"stage": "3"}}')
    check_refused(command(*DEMO, "--model", str(model)), "layers = 'two'", "whole number")
    check_refused(command(*DEMO, "--cluster", str(cluster)), "c.toml", "nodes = 'four'", "integer")
    check_refused(command(*DEMO, "--gpus", "8", "--config", str(deepspeed)), "ds.json", "zero_optimization.stage")
    deepspeed.write_text('{"zero_optimization": {"stages": 3}}')
    check_refused(
        command(*DEMO, "--gpus", "8", "--config", str(deepspeed)), "'zero_optimization.stages'", "did you mean 'stage'"
    )
    model.write_text("layers = = 3")
    check_refused(command(*DEMO, "--model", str(model)), "m.toml", "not TOML")


def test_more_gpus_than_the_cluster_has(command: Command, tmp_path: Path) -> None:
    small = tmp_path / "small.toml"
    small.write_text('base = "dgx-a100"\nnodes = 2\n')
    check_refused(command(*DEMO, "--cluster", str(small), "--gpus", "17"), "gpus = 17", "'small' has 16")


def test_a_file_that_cannot_be_written_is_the_system_s_failure(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    answer = command(*DEMO, "--gpus", "1", "--perfetto", str(tmp_path / "file" / "timeline.json"))
    check_refused(answer, "file", code=3)


@pytest.mark.parametrize(("verb", "near"), [("hardware", "did you mean 'a100-80gb'"), ("models", "did you mean")])
def test_unknown_entries(command: Command, verb: str, near: str) -> None:
    check_refused(command(verb, "a100-80" if verb == "hardware" else "gpt22"), near)


def test_listings_as_tables_and_files(command: Command, tmp_path: Path) -> None:
    answer = command("hardware", "dgx-a100", "--out", str(tmp_path))
    assert answer.code == 0
    assert "inter_node.latency_s" in answer.out
    assert "NVIDIA" in answer.out
    assert [entry["name"] for entry in json.loads((tmp_path / "catalogue.json").read_text())["clusters"]] == [
        "dgx-a100"
    ]
    assert "megatron-1t" in command("models").out
    everything = command("hardware").out
    for part in ("mi300x", "aws-p5", "infiniband-ndr", "llama3"):
        assert part in everything
    assert "300 GB/s" in command("hardware", "dgx-a100").out
    assert "interruptions 268" in command("hardware", "llama3").out


# verify #


def test_a_right_model_is_exit_0(command: Command, tmp_path: Path) -> None:
    words = ("verify_targets:mlp", "--zero", "1,3", "--precision", "fp64", "--steps", "2", "--out", str(tmp_path))
    answer = command("verify", *words, "--json")
    assert answer.code == 0
    assert all(line.startswith("verify_targets:mlp: ") for line in answer.err.splitlines())  # progress, no warnings
    found = json.loads(answer.out)
    assert found["world"] == 2
    assert [(result["zero"], result["ok"]) for result in found["results"]] == [(1, True), (3, True)]
    assert json.loads((tmp_path / "verify.json").read_text()) == found


def test_a_wrong_one_is_exit_1_and_says_where(command: Command) -> None:
    answer = command("verify", "verify_targets:no_gradients_are_reduced", "--zero", "1")
    assert answer.code == 1
    assert "OFF" in answer.out
    assert "parameter" in answer.out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("verify_targets:nothing",), ("verify_targets:nothing", "no attribute")),
        (("verify_targets",), ("'verify_targets'", "MODULE:FUNCTION")),
        (("verify_targets:uneven",), ("(5, 7)", "a multiple of 2")),
        (("verify_targets:raises",), ("KeyError", "no data here")),
        (("verify_targets:mlp", "--world", "0"), ("world = 0", ">= 1")),
        (("verify_targets:mlp", "--steps", "99"), ("steps = 99", "1 to 4")),
        (("verify_targets:mlp", "--zero", "1;2"), ("zero = '1;2'", "commas")),
        (("verify_targets:mlp", "--zero", "5"), ("zero stage = 5", "0, 1, 2, 3")),
        (("verify_targets:mlp", "--precision", "fp8"), ("precision = fp8", "fp64, fp32, bf16")),
    ],
)
def test_bad_targets_are_exit_2(command: Command, words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    check_refused(command("verify", *words), *expected)


def test_verify_several_cases_with_a_report(command: Command, tmp_path: Path) -> None:
    file = str(Path(__file__).with_name("verify_targets.py"))
    words = ("--zero", "1", "--precision", "fp64,fp32", "--accumulation", "1,3", "--steps", "1")
    answer = command("verify", f"{file}:mlp", *words, "--junit", str(tmp_path / "report.xml"), "--json")
    assert answer.code == 0, answer
    cases = [(case["world"], case["precision"], case["accumulation"]) for case in json.loads(answer.out)["cases"]]
    assert cases == [(2, "fp64", 1), (2, "fp64", 3), (2, "fp32", 1), (2, "fp32", 3)]
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()[0]
    assert (suite.get("tests"), suite.get("failures")) == ("4", "0")
    assert suite[3].get("name") == "world 2, fp32, accumulation 3, ZeRO 1"


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("killed", ("rank 1 died", "SIGKILL")),
        ("stalled", ("rank 1", "busy")),
        ("failing", ("rank 1 failed", "RuntimeError", "the third forward is too much")),
    ],
)
def test_a_rank_that_breaks_is_exit_3_and_named(command: Command, target: str, words: tuple[str, ...]) -> None:
    answer = command("verify", f"verify_targets:{target}", "--zero", "2", "--timeout", "2")
    *progress, last = answer.err.splitlines(keepends=True)
    assert len(progress) == 2  # one process, and the stage that broke
    check_refused(answer._replace(err=last), *words, code=3)
