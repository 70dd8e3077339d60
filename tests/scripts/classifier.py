"""As tutorials have it: argparse, a JSON file, training_data, and a criterion outside of the model."""

import argparse
import json
from pathlib import Path

import torch
import windtunnel as deepspeed
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 12)
        self.layers = nn.ModuleList([nn.Linear(12, 12) for _ in range(2)])
        self.out = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.hidden(x))
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.out(x)


def get_args(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser = deepspeed.add_config_arguments(parser)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    args = get_args(words)
    deepspeed.init_distributed()
    torch.manual_seed(0)
    data = torch.randn(48, 6)
    labels = data[:, :3].argmax(1)
    net = Net()
    parameters = filter(lambda p: p.requires_grad, net.parameters())
    model_engine, _, loader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=TensorDataset(data, labels)
    )
    criterion = nn.CrossEntropyLoss()
    losses = []
    model_engine.train()
    for _ in range(args.epochs):
        for inputs, targets in loader:
            inputs, targets = inputs.to(model_engine.device), targets.to(model_engine.device)
            outputs = model_engine(inputs)
            loss = criterion(outputs, targets)
            model_engine.backward(loss)
            model_engine.step()
            losses.append(loss.item())
    model_engine.eval()
    with torch.no_grad():
        accuracy = (model_engine(data).argmax(1) == labels).float().mean().item()
    report = {
        "rank": model_engine.global_rank,
        "local_rank": args.local_rank,
        "world": model_engine.world_size,
        "first": losses[0],
        "last": losses[-1],
        "accuracy": accuracy,
        "steps": model_engine.global_steps,
        "micro_steps": model_engine.micro_steps,
        "samples": model_engine.global_samples,
        "batch": model_engine.train_batch_size(),
        "lr": model_engine.get_lr(),
        "norm": model_engine.get_global_grad_norm(),
    }
    (args.report / f"rank{model_engine.global_rank}.json").write_text(json.dumps(report))
    model_engine.close()


if __name__ == "__main__":
    main()
