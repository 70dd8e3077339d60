"""Models of Hugging Face's transformers through `initialize`, unchanged, against one process."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hand_made import PROCESSOR
from windtunnel.collectives.zero import UnitSize, Zero, model_state_bytes, padded, sent_bytes_per_step
from windtunnel.engine.fused_modules import fuse
from windtunnel.engine.kernel_section import KernelSection
from windtunnel.engine.pilot import Plan, fly
from windtunnel.engine.world import World
from windtunnel.sim.memory import replay_memory
from windtunnel.sim.replay import sent_bytes_by_axis

transformers = pytest.importorskip("transformers", reason="pip install 'windtunnel[hf]'")

from hugging_face import BLOCKS, MODELS, HfOutcome, HfRun, batch, gpt2, save, train_alone, train_rank  # noqa: E402  (needs transformers)

REFERENCES: dict[Any, HfOutcome] = {}


def alone(model: str) -> HfOutcome:
    """One process, plain attention: neither fused attention nor recomputation may change the result."""
    if model not in REFERENCES:
        REFERENCES[model] = train_alone(HfRun(model, attention="eager"))
    return REFERENCES[model]


CASES = [
    *(HfRun(model, stage=stage) for model in ("gpt2", "llama") for stage in range(4)),
    HfRun("gpt2", "eager", recompute=True, stage=3),
    HfRun("llama", "eager", recompute=True, stage=2),
    HfRun("llama", "sdpa", recompute=True, stage=3),
]


@pytest.mark.parametrize("run", CASES, ids=str)
def test_ranks_compute_what_one_process_does(two_ranks: World, run: HfRun) -> None:
    wanted = alone(run.model)
    outcomes = two_ranks.run(train_rank, run)
    means = torch.tensor([outcome.losses for outcome in outcomes], dtype=torch.float64).mean(0)
    # float64: 6 steps of sums in another order cost about 1e-13. Some parts of the models compute in fp32 whatever
    # the parameters are (Llama's norms and rotations), which leaves 1e-8; a missing reduction makes 1e-2.
    torch.testing.assert_close(means, torch.tensor(wanted.losses, dtype=torch.float64), rtol=1e-6, atol=0)
    for outcome in outcomes:
        assert outcome.blocks
        assert outcome.generated == wanted.generated
        assert outcome.parameters.keys() == wanted.parameters.keys()
        for name, value in wanted.parameters.items():
            assert float((outcome.parameters[name] - value).norm() / value.norm()) < 1e-5, name


def units_of(model: str, world: int) -> list[UnitSize]:
    """The root and the blocks, from parameters counted by name."""
    numbered = re.compile(re.escape(BLOCKS[model]) + r"\.(\d+)\.")
    sizes: Counter[int] = Counter()
    for name, parameter in MODELS[model]().named_parameters():
        block = numbered.match(name)
        sizes[int(block[1]) if block else -1] += parameter.numel()
    assert sorted(sizes) == [-1, 0, 1, 2]
    return [UnitSize(elements=padded(n, world), element_bytes=4, padding=padded(n, world) - n) for n in sizes.values()]


@pytest.mark.parametrize(
    ("model", "attention", "recompute", "stage"),
    [("gpt2", "sdpa", False, 3), ("gpt2", "eager", True, 1), ("llama", "sdpa", True, 3), ("llama", "eager", False, 0)],
)
def test_they_fly_too(model: str, attention: str, recompute: bool, stage: int) -> None:
    """Bytes and memory on the simulated device are those of the closed forms."""
    world, zero = 6, Zero.of_stage(stage)
    config = {"zero_optimization": {"stage": stage}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}}
    arguments = {"model": model, "attention": attention, "recompute": recompute}
    trace = fly(Plan(factory="hugging_face:sample", arguments=arguments, config=config, world=world))
    units = units_of(model, world)
    assert sum(sent_bytes_by_axis(trace, scalars=False).values()) == sent_bytes_per_step(units, zero, world, 1)
    assert dict(replay_memory(trace, PROCESSOR).state) == model_state_bytes(
        units, zero, world, moments=2, master_bytes=4
    )


def test_whole_weights_load_in_transformers(two_ranks: World, tmp_path: Path) -> None:
    two_ranks.run(save, str(tmp_path))
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, local_files_only=True)
    wanted = gpt2().state_dict()
    assert loaded.state_dict().keys() == wanted.keys()
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_llamas_norms_become_one_operator_each() -> None:
    model = MODELS["llama"]()
    names = [name for name, _ in model.named_parameters()]
    inputs = batch(0)
    wanted = model(**inputs).loss
    assert fuse(model, KernelSection(fused=["norm"])) == {"norm": 2 * model.config.num_hidden_layers + 1}
    # the model's own computes in fp32 whatever the parameters are
    torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-6, atol=0)
    assert [name for name, _ in model.named_parameters()] == names
