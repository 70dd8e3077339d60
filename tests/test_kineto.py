"""Profiles of torch.profiler as measured kernel times."""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import PROCESSOR
from torch import nn
from torch.nn import functional
from windtunnel.collectives.trace import Kernel
from windtunnel.experiments.calibrate import to_toml
from windtunnel.experiments.kineto import Profile, read_profile
from windtunnel.experiments.primitives import recorded
from windtunnel.experiments.profiled import calibrate_from_profile, operator_table, to_dict
from windtunnel.sim.kernel import kernel_seconds

WIDTH, ROWS = 16, 8


class Tiny(nn.Module):
    """Products, a norm, fused attention, an activation and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        query, key, value = self.mix(self.norm(x)).view(1, ROWS, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = functional.gelu(mixed.transpose(1, 2).reshape(ROWS, WIDTH), approximate="tanh")
        return functional.cross_entropy(self.head(hidden), labels)


def step() -> None:
    """Forward and backward from fresh parameters, so that every call does the same."""
    torch.manual_seed(0)
    model = Tiny()
    model(torch.randn(ROWS, WIDTH), torch.arange(ROWS) % 5).backward()


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A step profiled on the CPU."""
    path = tmp_path_factory.mktemp("kineto") / "step.json"
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiler:
        step()
    profiler.export_chrome_trace(str(path))
    return path


def base(folder: Path, kind: str) -> Path:
    """A hand-made cluster of CPU ranks or of GPUs as files."""
    processor = replace(PROCESSOR, kind=kind, asynchronous=kind == "gpu", memory_bytes_per_s=1e9)
    figures = {name: value for name, value in asdict(processor).items() if value != ()}
    (folder / f"{kind}.processor.toml").write_text(to_toml(figures))
    cluster = folder / f"{kind}.toml"
    fabric = {"bytes_per_s": 1e9, "latency_s": 1e-6}
    cluster.write_text(
        to_toml({"gpu": f"./{kind}.processor.toml", "gpus_per_node": 2, "nodes": 1, "intra_node": fabric})
    )
    return cluster


def described_as(kernel: Kernel) -> tuple[Any, ...]:
    return kernel.name, kernel.family, kernel.shape, kernel.dtype


def test_a_profile_has_the_kernels_that_a_recorder_sees(trace: Path) -> None:
    profile = read_profile(trace)
    assert profile.device == "cpu"
    found: Counter[Kernel] = Counter()
    for one in profile.measured:
        found[one.kernel] += len(one.seconds)
        assert all(0 < seconds < 1 for seconds in one.seconds)
    seen = Counter(recorded(step))
    known = {"mm", "addmm", "native_layer_norm", "native_layer_norm_backward", "gelu", "gelu_backward", "_log_softmax"}
    for kernel, times in seen.items():
        if kernel.name in known:
            assert found[kernel] == times, kernel
    assert known <= {kernel.name for kernel in found}
    # Fused attention goes by the names that it has in flights.
    families = {kernel.name: kernel.family for kernel in found}
    assert families["attention"] == families["attention_backward"] == "attention"


def test_what_is_not_understood_is_told(trace: Path) -> None:
    profile = read_profile(trace)
    understood = sum(sum(one.seconds) for one in profile.measured)
    lost = sum(seconds for _, seconds in profile.unknown.values())
    assert lost < 0.2 * understood
    assert all(reason for reason, _ in profile.unknown.values())


def test_a_fitted_profile_predicts_what_was_measured(trace: Path, tmp_path: Path) -> None:
    made = calibrate_from_profile(trace, base(tmp_path, "cpu"), tmp_path / "out")
    assert made.written == tmp_path / "out" / "profile.toml"
    processor = made.cluster.processor
    assert "step.json" in processor.sources["matmul_points"]
    for one in read_profile(trace).measured:
        if one.kernel.family == "matmul":
            times = sorted(one.seconds)
            assert times[0] * 0.999 <= kernel_seconds(one.kernel, processor) <= times[-1] * 1.001
    rows = {row.name: row for row in made.rows}
    assert rows["addmm"].calls == 2
    assert rows["addmm"].predicted_s is not None
    answer = to_dict(made)
    assert json.loads(json.dumps(answer))["operators"][0]["measured_s"] == made.rows[0].measured_s
    assert operator_table(made).row_count == len(made.rows) + len(made.unknown)


def cpu_op(name: str, number: int, start: float, end: float, **arguments: Any) -> dict[str, Any]:
    args = {"External id": number, **arguments}
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 1, "ts": start, "dur": end - start, "args": args}


def on_gpu(name: str, number: int, seconds: float, category: str = "kernel") -> dict[str, Any]:
    args = {"External id": number, "correlation": 100 + number, "stream": 7}
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "pid": 0,
        "tid": 7,
        "ts": 500.0,
        "dur": seconds * 1e6,
        "args": args,
    }


HALF, NONE = "c10::Half", ""
LINEAR = cpu_op("aten::linear", 1, 0, 40, **{"Input Dims": [[64, 32], [48, 32], []], "Input type": [HALF, HALF, NONE]})
PRODUCT = cpu_op(
    "aten::mm",
    2,
    10,
    30,
    **{"Input Dims": [[64, 32], [32, 48]], "Input type": [HALF, HALF], "Concrete Inputs": ["", ""]},
)
ADD = cpu_op(
    "aten::add", 3, 50, 60,
    **{"Input Dims": [[64, 48], [64, 48], []], "Input type": [HALF, HALF, "Scalar"], "Concrete Inputs": ["", "", "1"]},
)  # fmt: skip
COPY = cpu_op(
    "aten::copy_", 4, 70, 80,
    **{"Input Dims": [[8], [8], []], "Input type": ["float", "float", "Scalar"], "Concrete Inputs": ["", "", "False"]},
)  # fmt: skip
VIEW = cpu_op("aten::t", 5, 81, 82, **{"Input Dims": [[64, 48]], "Input type": [HALF], "Concrete Inputs": [""]})
STRANGE = cpu_op("aten::no_such_operator", 6, 90, 95, **{"Input Dims": [[3]], "Input type": ["float"]})
INNER = cpu_op("aten::zero_", 8, 12, 15, **{"Input Dims": [[64, 48]], "Input type": [HALF], "Concrete Inputs": [""]})
GPU_EVENTS = [
    LINEAR, PRODUCT, INNER, ADD, COPY, VIEW, STRANGE,
    on_gpu("ampere_fp16_gemm", 2, 3e-6), on_gpu("memset", 8, 1e-6, "gpu_memset"),
    on_gpu("vectorized_elementwise", 3, 2e-6), on_gpu("Memcpy DtoD", 4, 5e-6, "gpu_memcpy"), on_gpu("strange", 6, 7e-6),
    cpu_op("aten::_local_scalar_dense", 9, 96, 99, **{"Input Dims": [[]], "Input type": ["float"]}),
    on_gpu("Memcpy DtoH", 9, 1e-6, "gpu_memcpy"), on_gpu("ncclDevKernel_AllReduce", 77, 9e-6),
    {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": 1, "tid": 1, "ts": 12, "dur": 5, "args": {}},
]  # fmt: skip


def written(folder: Path, events: list[dict[str, Any]]) -> Path:
    path = folder / "gpu.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def gpu_profile(folder: Path, *events: dict[str, Any]) -> Profile:
    return read_profile(written(folder, [*GPU_EVENTS, *events]))


def test_on_a_gpu_an_operator_takes_what_its_kernels_take(tmp_path: Path) -> None:
    profile = gpu_profile(tmp_path)
    assert profile.device == "gpu"
    times = {described_as(one.kernel): one.seconds for one in profile.measured}
    assert times == {
        ("mm", "matmul", (1, 64, 48, 32), "fp16"): (pytest.approx(4e-6),),
        ("add", "memory", (64, 48), "fp16"): (pytest.approx(2e-6),),
        ("copy_", "memory", (8,), "fp32"): (pytest.approx(5e-6),),
    }
    add = next(one.kernel for one in profile.measured if one.kernel.name == "add")
    assert (add.read_bytes, add.write_bytes) == (2 * 2 * 64 * 48, 2 * 64 * 48)
    assert set(profile.unknown) == {"aten::no_such_operator", "ncclDevKernel_AllReduce", "aten::_local_scalar_dense"}
    assert profile.unknown["ncclDevKernel_AllReduce"] == (
        "no operator that was understood started it",
        pytest.approx(9e-6),
    )
    assert profile.unknown["aten::no_such_operator"][1] == pytest.approx(7e-6)


def test_a_gpu_profile_replaces_the_roofline(tmp_path: Path) -> None:
    path = written(tmp_path, GPU_EVENTS)
    made = calibrate_from_profile(path, "dgx-a100", tmp_path / "out")
    product = Kernel("mm", "matmul", 2.0 * 64 * 48 * 32, 1, 1, "fp16", (1, 64, 48, 32))
    assert kernel_seconds(product, made.cluster.processor) == pytest.approx(4e-6)
    assert made.cluster.gpus_per_node == 8
    assert "profiler trace gpu.json" in made.cluster.processor.sources["kernel_curves"]


def test_files_and_bases_that_do_not_fit_are_refused(tmp_path: Path, trace: Path) -> None:
    with pytest.raises(ValueError, match="base = dgx-a100: a gpu for a profile of a cpu; allowed: a cluster of cpus"):
        calibrate_from_profile(trace, "dgx-a100", tmp_path)
    shapeless = [{**PRODUCT, "args": {"External id": 2}}]
    with pytest.raises(ValueError, match="record it with record_shapes=True"):
        read_profile(written(tmp_path, shapeless))
    with pytest.raises(ValueError, match="it holds no operators"):
        read_profile(written(tmp_path, []))
    with pytest.raises(ValueError, match=r"nowhere\.json: not a trace of torch\.profiler"):
        read_profile(tmp_path / "nowhere.json")
