"""GPT-2 and Llama of transformers, shared by tensor ranks, against one process."""

from typing import Any

import pytest
import torch
from windtunnel.engine.engine import initialize
from windtunnel.engine.world import World

transformers = pytest.importorskip("transformers", reason="pip install 'windtunnel[hf]'")

from hugging_face import SGD, VOCAB, HfOutcome, HfRun, batch, train_alone  # noqa: E402  (needs transformers)


def train(rank: int, world: int, run: HfRun, parallel: dict[str, Any]) -> HfOutcome:
    """The loss comes from logits that stay cut; without labels they are whole."""
    model: Any = run.build()
    config = {
        "zero_optimization": {"stage": run.stage},
        "optimizer": {"type": "SGD", "params": SGD},
        "parallel": {"tensor": world, **parallel},
        "activation_checkpointing": {"policy": "full" if run.recompute else "none"},
    }
    engine, *_ = initialize(model=model, config=config, timeout_s=20.0)
    losses = []
    for step in range(run.steps):
        outputs = engine(**batch(step), use_cache=False)
        assert outputs.logits.shape[-1] == VOCAB // 2 + 1  # with a padding row on one of the ranks
        engine.backward(outputs)
        engine.step()
        losses.append(outputs.loss.item())
    generated = []
    if not parallel.get("sequence_parallel"):  # the tokens after the prompt come one at a time
        prompt = torch.ones(1, 4, dtype=torch.long)
        generated = engine.generate(prompt, max_new_tokens=3, do_sample=False, pad_token_id=0)[0].tolist()
    outcome = HfOutcome(losses, engine.full_parameters(), True, generated)
    state = engine.full_state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        name: tuple(value.shape) for name, value in run.build().state_dict().items()
    }
    engine.close()
    return outcome


SEQUENCE = {"sequence_parallel": True}


@pytest.mark.parametrize(
    ("run", "parallel"),
    [
        (HfRun("gpt2", steps=4), {}),
        (HfRun("gpt2", "eager", recompute=True, steps=4), SEQUENCE),
        (HfRun("llama", steps=4), {}),
        (HfRun("llama", recompute=True, steps=4), SEQUENCE),
    ],
    ids=str,
)
def test_tensor_ranks_compute_what_one_process_does(two_ranks: World, run: HfRun, parallel: dict[str, Any]) -> None:
    wanted = train_alone(HfRun(run.model, attention="eager", steps=run.steps))
    outcomes = two_ranks.run(train, run, parallel)
    for outcome in outcomes:
        # As tests/test_huggingface.py: parts of the models compute in fp32, and one process's loss does.
        assert outcome.losses == pytest.approx(wanted.losses, rel=1e-6)
        assert outcome.generated in ([], wanted.generated)
        assert outcome.parameters.keys() == wanted.parameters.keys()
        for name, value in wanted.parameters.items():
            assert float((outcome.parameters[name] - value).norm() / value.norm()) < 1e-5, name
