"""A whole training loop: schedule, loader, evaluation, metrics, progress, on any number of ranks.

    python -m windtunnel.experiments.train [OUT]
    torchrun --standalone --nproc-per-node 2 -m windtunnel.experiments.train [OUT]

A tiny GPT learns to foretell the next byte of real text; OUT/char-gpt/metrics.jsonl gets what is known of each step.
"""

import sys
from typing import Any

from ..engine.engine import initialize
from ..engine.evaluation import Evaluation
from ..engine.loader import RepeatingLoader
from .progress import progress
from .tasks import Characters, tiny_gpt

STEPS = 200
CONFIG: dict[str, Any] = {
    "train_batch_size": 32,
    "zero_optimization": {"stage": 2},
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 20, "total_num_steps": STEPS}},
}


def train(out: str, steps: int = STEPS) -> Evaluation:
    """Train, and evaluate on text that was held out; every rank calls it."""
    text, held_out = Characters(), Characters(samples=256, skipped_bytes=1 << 18)
    monitor = {"jsonl_monitor": {"enabled": True, "output_path": out, "job_name": "char-gpt"}}
    engine, _, loader, _ = initialize(tiny_gpt(text), {**CONFIG, **monitor}, training_data=text)
    assert loader is not None
    batches = iter(RepeatingLoader(loader))
    with progress("char-GPT", steps, show=engine.communicator.rank == 0) as advance:
        for step in range(steps):
            tokens, targets = next(batches)
            engine.backward(engine(tokens, targets))
            engine.step()
            advance(CONFIG["train_batch_size"], CONFIG["train_batch_size"] * text.seq)
            if (step + 1) % 50 == 0:
                engine.evaluate(held_out)
    found = engine.evaluate(held_out)
    engine.close()
    return found


if __name__ == "__main__":
    found = train(sys.argv[1] if len(sys.argv) > 1 else "out/train")
    print(f"held-out loss {found.loss:.3f}, perplexity {found.perplexity:.1f}")
