"""A model, a criterion and sizes of a mesh; a loop over single samples."""

from typing import Any

import torch
from torch import nn
from windtunnel import DeepSpeedEngine


def main(config: dict[str, Any], samples: int = 1000, epochs: int = 10) -> tuple[float, float]:
    torch.manual_seed(0)
    model = nn.Linear(10, 1)
    criterion = nn.MSELoss()
    data = torch.randn(samples, 10)
    targets = data.sum(1, keepdim=True)
    engine = DeepSpeedEngine(model, criterion, config=config)
    means = []
    for _ in range(epochs):
        total = 0.0
        for x, y in zip(data, targets, strict=True):
            engine.zero_grad()
            outputs = engine(x)
            loss = engine.criterion(outputs, y)
            engine.backward(loss)
            engine.step()
            total += loss.item()
        means.append(total / samples)
    engine.close()
    return means[0], means[-1]
