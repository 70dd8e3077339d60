"""Full weights in safetensors: what plain PyTorch and Hugging Face read, from an engine and from a folder."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from small_models import Gpt, Run, start_engine, train_step
from torch import Tensor, nn
from windtunnel.engine.checkpoint_files import CheckpointError
from windtunnel.engine.engine import initialize
from windtunnel.engine.export import Weight, consolidate, divide, export, main
from windtunnel.engine.world import World

RUN = Run("tied", dtype=torch.float32)


def train_and_export(rank: int, world: int, stage: int, folder: str, overrides: dict[str, Any]) -> dict[str, Tensor]:
    """A checkpoint and exports of the same moment; the parameters as the engine itself gathers them."""
    run = Run("tied", stage=stage, dtype=torch.float32)
    engine = start_engine(run, run.build(), **overrides)
    train_step(engine, run, 0, rank, world)
    engine.save_checkpoint(Path(folder, "checkpoint"))
    export(engine, Path(folder, "own"))
    export(engine, Path(folder, "wide"), dtype="fp32")
    export(engine, Path(folder, "files"), dtype="fp16", max_file_bytes=1000)
    engine.save_16bit_model(Path(folder, "short"))
    engine.save_16bit_model(Path(folder, "short"), "short.safetensors")
    whole = engine.full_state_dict()
    engine.close()
    return whole


def load_all(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "fp32"), (1, "bf16"), (3, "bf16"), (3, "fp32"), (0, "files"), (3, "files")]
)
def test_an_engine_and_its_checkpoint_give_the_same_weights(
    two_ranks: World, tmp_path: Path, stage: int, precision: str
) -> None:
    overrides: dict[str, Any] = {"bf16": {"enabled": True}} if precision == "bf16" else {}
    if precision == "files":
        off = {"device": "nvme", "nvme_path": str(tmp_path)}
        parameters = {"offload_param": off} if stage == 3 else {}
        overrides["zero_optimization"] = {"stage": stage, "offload_optimizer": off, **parameters}
    whole, _ = two_ranks.run(train_and_export, stage, str(tmp_path), overrides)
    own, wide = load_all(tmp_path / "own"), load_all(tmp_path / "wide")
    assert own.keys() == wide.keys() == whole.keys()
    assert all(torch.equal(own[name], whole[name]) for name in whole)
    assert all(value.dtype == torch.float32 for value in wide.values())
    # Rounded to what the run computes with, the masters are the parameters; in bf16 they say more.
    assert all(torch.equal(wide[name].to(whole[name].dtype), whole[name]) for name in whole)
    assert all(torch.equal(wide[name], own[name].float()) for name in whole) == (precision != "bf16")
    written = consolidate(tmp_path / "checkpoint", tmp_path / "offline")
    assert [path.name for path in written] == ["model.safetensors"]
    offline = load_file(written[0])
    assert all(torch.equal(offline[name], wide[name]) for name in whole)
    model = Gpt(tied=True)
    model.load_state_dict(offline)  # strict: tied weights are there under both names
    short = torch.load(tmp_path / "short" / "pytorch_model.bin", weights_only=True)
    for name, value in load_file(tmp_path / "short" / "short.safetensors").items():
        assert torch.equal(value, wide[name].bfloat16())
        assert torch.equal(value, short[name])


def test_several_files_and_their_index(two_ranks: World, tmp_path: Path) -> None:
    two_ranks.run(train_and_export, 2, str(tmp_path), {})
    folder = tmp_path / "files"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    total = 0
    for name in files:
        with safe_open(folder / name, framework="pt") as content:
            assert content.metadata() == {"format": "pt"}
            tensors = [content.get_tensor(key) for key in content.keys()]  # noqa: SIM118  (no mapping)
        assert {key for key, file in index["weight_map"].items() if file == name} == set(load_file(folder / name))
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors) <= 1000
        total += sum(tensor.nbytes for tensor in tensors)
    assert index["metadata"]["total_size"] == total
    wide = load_all(tmp_path / "wide")
    for name, value in load_all(folder).items():
        assert torch.equal(value, wide[name].half())
    # The next export takes away what it does not overwrite, or readers would mix the two.
    consolidate(tmp_path / "checkpoint", folder)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors"}


@given(st.lists(st.integers(1, 40), max_size=12), st.integers(1, 60))
def test_weights_are_divided_in_order(sizes: list[int], limit: int) -> None:
    weights = [Weight((str(number),), size, torch.uint8) for number, size in enumerate(sizes)]
    divided = divide(weights, limit)
    assert [weight for part in divided for weight in part] == weights
    totals = [sum(weight.nbytes for weight in part) for part in divided]
    assert all(total <= limit or len(part) == 1 for total, part in zip(totals, divided, strict=True))
    # No file could have taken the next one's first weight too.
    assert all(total + part[0].nbytes > limit for total, part in zip(totals, divided[1:], strict=False))


class Odd(nn.Module):
    """What has no elements, no dimensions, two names, or no gradient, and buffers of integers."""

    def __init__(self) -> None:
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.scalar = self.tied = nn.Parameter(torch.tensor(2.0))
        self.frozen = nn.Parameter(torch.arange(3.0), requires_grad=False)
        self.register_buffer("count", torch.tensor([1, 2]))
        self.register_buffer("cache", torch.zeros(5), persistent=False)

    def forward(self) -> Tensor:
        return self.scalar * self.frozen.sum()


def test_odd_tensors(tmp_path: Path) -> None:
    engine, *_ = initialize(Odd(), {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    engine.backward(engine())
    engine.step()
    engine.save_checkpoint(tmp_path / "saved", "it")
    (live,), (offline,) = (
        export(engine, tmp_path / "live", dtype="bf16"),
        consolidate(tmp_path / "saved" / "it", tmp_path / "off", dtype="bf16"),
    )
    for path in (live, offline):
        found = load_file(path)
        assert {name: (tuple(value.shape), value.dtype) for name, value in found.items()} == {
            "empty": ((0, 3), torch.bfloat16),
            "scalar": ((), torch.bfloat16),
            "tied": ((), torch.bfloat16),
            "frozen": ((3,), torch.bfloat16),
            "count": ((2,), torch.int64),
        }
        assert found["scalar"].item() == found["tied"].item() == 0.5  # 2 - 0.5 * 3
        assert found["count"].tolist() == [1, 2]
    resumed, *_ = initialize(Odd(), {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    resumed.load_checkpoint(tmp_path / "saved")
    assert resumed.full_parameters()["scalar"].item() == 0.5


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), str(tmp_path / "out")]) == 2
    assert "is no checkpoint, and no folder with a file 'latest'" in capsys.readouterr().err
    engine, *_ = initialize(Odd(), {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    engine.save_checkpoint(tmp_path / "saved", "first")
    arguments = [str(tmp_path / "saved"), str(tmp_path / "out"), "--dtype", "own"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'model.safetensors'}\n"
    data = tmp_path / "saved" / "first" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])
    assert main(arguments) == 2
    assert "'first'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"dtype": "int8"}, "dtype = 'int8'; allowed: fp32, bf16, fp16"), ({"max_file_bytes": 0}, "max_file_bytes = 0")],
)
def test_refusals(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    engine, *_ = initialize(Odd(), {"optimizer": {"type": "SGD", "params": {"lr": 0.5}}})
    with pytest.raises(ValueError, match=message):
        export(engine, tmp_path, **arguments)
    with pytest.raises(ValueError, match=message):
        consolidate(tmp_path, tmp_path, **arguments)


def export_into_a_file(rank: int, world: int, path: str) -> tuple[str, bool]:
    """(the error, whether training goes on after it)"""
    run = Run("gpt", stage=3)
    engine = start_engine(run, run.build())
    message = ""
    try:
        export(engine, path)
    except CheckpointError as error:
        message = str(error)
    loss = train_step(engine, run, 0, rank, world)
    engine.close()
    return message, loss > 0


def test_a_folder_that_cannot_be_written_is_an_error_on_all_ranks(two_ranks: World, tmp_path: Path) -> None:
    path = tmp_path / "taken"
    path.write_text("")
    for message, trained in two_ranks.run(export_into_a_file, str(path)):
        assert "full weights were not written: rank 0: FileExistsError" in message
        assert trained


def test_hugging_face_reads_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, vocab_size=17, n_positions=6)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    tokens = torch.arange(6)[None]
    engine, *_ = initialize(model, {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2}}})
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    export(engine, tmp_path, max_file_bytes=2000)
    assert (tmp_path / "model.safetensors.index.json").exists()
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert again.lm_head.weight is again.transformer.wte.weight
    model.eval()
    again.eval()
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, model(tokens).logits)
