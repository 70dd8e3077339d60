"""Train a small network in parallel; the same file for one machine and for many.

    windtunnel launch --ranks 2 docs/examples/train.py --zero 3

On each of two machines with eight GPUs, of which the first is called head:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint head:29500 docs/examples/train.py
"""

import argparse
import os

import torch
import windtunnel
from torch import nn
from torch.utils.data import TensorDataset

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 1.0,
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
}


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cuda", torch.cuda.current_device())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--zero", type=int, default=3, help="ZeRO stage, 0 to 3")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(1024, 8)
    y = (x[:, :4] * x[:, 4:]).sum(1, keepdim=True)
    model = nn.Sequential(nn.Linear(8, 64), *(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(4)))
    model.append(nn.Linear(64, 1))
    engine, _, loader, _ = windtunnel.initialize(
        model.to(device()),
        nn.MSELoss(),
        {**CONFIG, "zero_optimization": {"stage": arguments.zero}},
        training_data=TensorDataset(x, y),
    )
    for epoch in range(arguments.epochs):
        total = 0.0
        for inputs, targets in loader:
            loss = engine.criterion(engine(inputs.to(engine.device)), targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        if engine.global_rank == 0:
            print(f"epoch {epoch}: loss {total / len(loader):.4f} on {engine.world_size} ranks", flush=True)
    engine.close()


if __name__ == "__main__":
    main()
