"""Caffe's solvers by torch's: a learning rate per kind of blob, inside the velocity of SGD; learning rate policies."""

from collections.abc import Callable, Mapping

import torch
from omegaconf import DictConfig
from torch import nn


def make_optimizer(model: nn.Module, cfg: DictConfig) -> torch.optim.Optimizer:
    """SGD, Adam or RMSProp over two groups of parameters: weights, and biases (every parameter of the name `bias`).

    torch's RMSprop without momentum is Caffe's RMSProp (BVLC/caffe, rmsprop_solver.cpp): h = d h + (1 - d) g² and
    w -= lr g / (sqrt(h) + eps), with h = 0 at first and the weight decay in g. Caffe has no momentum there.

    Args:
        model: on its device; parameters that require no gradient are left out.
        cfg: `name` (sgd, adam or rmsprop), `lr`, `weight_decay`, `bias_lr_mult` and `bias_decay_mult` (Caffe's lr_mult
            and decay_mult of the biases, where those of the weights are 1), `momentum` (sgd), `betas` (adam),
            `rms_decay` (rmsprop).

    Raises:
        ValueError: another `name`.
    """
    blobs = [(name, blob) for name, blob in model.named_parameters() if blob.requires_grad]
    biases = [blob for name, blob in blobs if name.endswith("bias")]
    weights = [blob for name, blob in blobs if not name.endswith("bias")]
    groups = [
        {"params": weights, "lr_mult": 1, "weight_decay": cfg.weight_decay},
        {
            "params": biases,
            "lr_mult": cfg.bias_lr_mult,
            "weight_decay": cfg.weight_decay * cfg.bias_decay_mult,
        },
    ]
    for group in groups:
        group["lr"] = cfg.lr * group["lr_mult"]
    if cfg.name == "sgd":
        return torch.optim.SGD(groups, momentum=cfg.momentum, fused=True)
    if cfg.name == "adam":
        return torch.optim.Adam(groups, betas=tuple(cfg.betas), fused=True)
    if cfg.name == "rmsprop":
        return torch.optim.RMSprop(groups, alpha=cfg.rms_decay, eps=1e-8)  # Caffe's delta
    raise ValueError(f"optimizer.name={cfg.name}: choose sgd, adam or rmsprop")


def lr_policy(lr: float, cfg: Mapping) -> Callable[[int], float]:
    """Caffe's learning rate policies: a function of the iteration, from 0.

    Args:
        lr: at the start.
        cfg: `lr_policy` "step", which is taken where there is none: lr * lr_gamma ** (iteration // lr_every);
            "multistep": lr * lr_gamma ** (number of `lr_steps` that are past); or "poly":
            lr * (1 - iteration / iterations) ** lr_power. With what it needs.

    Raises:
        ValueError: another policy.
    """
    policy = cfg.get("lr_policy", "step")
    if policy == "step":
        return lambda iteration: lr * cfg["lr_gamma"] ** (iteration // cfg["lr_every"])
    if policy == "multistep":
        return lambda iteration: lr * cfg["lr_gamma"] ** sum(iteration >= step for step in cfg["lr_steps"])
    if policy == "poly":
        return lambda iteration: lr * (1 - iteration / cfg["iterations"]) ** cfg["lr_power"]
    raise ValueError(f"train.lr_policy={policy}: choose step, multistep or poly")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of each group to `lr` times its `lr_mult`; SGD's velocity stays, as in Caffe.

    Caffe (BVLC/caffe, sgd_solver.cpp) has the learning rate inside the velocity, v = momentum * v + lr * g
    and w -= v. In torch it is outside, b = momentum * b + g and w -= lr * b: the same with v = lr * b, until
    lr changes. Then b is multiplied by the old lr over the new, so that v is what it was.
    """
    for group in optimizer.param_groups:
        old, group["lr"] = group["lr"], lr * group["lr_mult"]
        if group["lr"] == old:
            continue
        for blob in group["params"]:
            if (momentum := optimizer.state[blob].get("momentum_buffer")) is not None:  # Adam and RMSProp have none
                momentum.mul_(old / group["lr"])
