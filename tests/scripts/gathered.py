"""A ZeRO-3 script: zero.Init, a dict config with the usual performance keys, and weights set by one rank."""

from typing import Any

import torch
import windtunnel as deepspeed
import windtunnel.comm as dist
from torch import nn

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 2000,
    "gradient_clipping": 1.0,
    "prescale_gradients": False,
    "wall_clock_breakdown": False,
    "zero_allow_untested_optimizer": True,
    "optimizer": {"type": "Adam", "params": {"lr": 0.01, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.0}},
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "sub_group_size": 1_000_000_000,
        "stage3_max_reuse_distance": 1_000_000_000,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}


def main(stage: int = 3, precision: str = "fp32") -> dict[str, Any]:
    deepspeed.init_distributed(dist_backend="gloo")
    config = {**CONFIG, "zero_optimization": {**CONFIG["zero_optimization"], "stage": stage}}
    config["bf16"] = {"enabled": precision == "bf16"}
    torch.manual_seed(5)
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
        model = nn.Sequential(nn.Linear(4, 7), nn.Linear(7, 7), nn.Linear(7, 1))
    engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    first = model[0]
    with deepspeed.zero.GatheredParameters(first.weight, modifier_rank=1):
        whole = torch.isfinite(first.weight).all().item()
        if dist.get_rank() == 1:
            first.weight.data.fill_(0.25)
    hidden = torch.isnan(first.weight).all().item()
    boundaries = []
    for step in range(4):
        generator = torch.Generator().manual_seed(10 * step + engine.global_rank)
        x = torch.randn(2, 4, generator=generator).to(first.weight.dtype)
        loss = engine(x).float().square().mean()
        before = engine.is_gradient_accumulation_boundary()
        engine.backward(loss)
        boundaries.append((before, engine.is_gradient_accumulation_boundary()))
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: parameter.detach().float().clone() for name, parameter in model.named_parameters()}
    engine.close()
    return {
        "whole": whole,
        "hidden": hidden,
        "weights": weights,
        "boundaries": boundaries,
        "steps": engine.global_steps,
    }
