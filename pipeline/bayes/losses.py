"""The gradient of a likelihood with respect to the outputs of many networks at once, written over the outputs.

Outputs are features-major, (walks, columns, rows): rows lie innermost, so that every operation runs along memory.
Each loss is prepared once for its targets, and again for a subset of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.bayes.likelihood import LOG_2PI, Bernoulli, Categorical, Gaussian, Heteroscedastic, Likelihood

Loss = Callable[[Tensor, Tensor], None]
"""(outputs (W, C, n), nll (W,)): overwrites outputs by the gradient of the summed NLL, and nll by the summed NLL."""


def _categorical(likelihood: Categorical, y: Tensor, dtype: torch.dtype) -> Loss:
    target = functional.one_hot(y, likelihood.classes).to(dtype).T.contiguous()

    def loss(outputs: Tensor, nll: Tensor) -> None:
        log_p = torch.log_softmax(outputs, dim=1)
        torch.mv(log_p.flatten(1), target.flatten(), out=nll)
        nll.neg_()
        torch.sub(log_p.exp_(), target, out=outputs)

    return loss


def _bernoulli(likelihood: Bernoulli, y: Tensor, dtype: torch.dtype) -> Loss:
    target = y.to(dtype)

    def loss(outputs: Tensor, nll: Tensor) -> None:
        logit = outputs[:, 0]
        torch.sub(functional.softplus(logit).sum(1), logit @ target, out=nll)
        logit.sigmoid_().sub_(target)

    return loss


def _gaussian(likelihood: Gaussian, y: Tensor, dtype: torch.dtype) -> Loss:
    target, sd = y.to(dtype), likelihood.noise_std
    constant = len(y) * (math.log(sd) + 0.5 * LOG_2PI)

    def loss(outputs: Tensor, nll: Tensor) -> None:
        scaled = outputs[:, 0].sub_(target).div_(sd)
        nll.copy_(scaled.square().sum(1).mul_(0.5).add_(constant))
        scaled.div_(sd)

    return loss


def _heteroscedastic(likelihood: Heteroscedastic, y: Tensor, dtype: torch.dtype) -> Loss:
    target, low = y.to(dtype), math.log(likelihood.floor)

    def loss(outputs: Tensor, nll: Tensor) -> None:
        mean, raw = outputs[:, 0], outputs[:, 1]
        share = (raw - low).sigmoid_()  # of the network in the variance; the rest is the floor
        log_variance = functional.softplus(raw - low).add_(low)
        error = mean - target
        slope = (-log_variance).exp_().mul_(error)
        scaled = slope * error
        nll.copy_((scaled + log_variance).sum(1).add_(len(y) * LOG_2PI).mul_(0.5))
        mean.copy_(slope)
        torch.sub(0.5, scaled, alpha=0.5, out=raw)
        raw.mul_(share)

    return loss


def _by_autograd(likelihood: Likelihood, y: Tensor, dtype: torch.dtype) -> Loss:
    def loss(outputs: Tensor, nll: Tensor) -> None:
        with torch.enable_grad():
            leaf = outputs.detach().clone().requires_grad_(True)
            each = likelihood.nll(leaf.transpose(1, 2), y).sum(-1)
            (slope,) = torch.autograd.grad(each.sum(), leaf)
        nll.copy_(each.detach())
        outputs.copy_(slope)

    return loss


_WRITTEN_OUT: dict[type, Callable[..., Loss]] = {
    Categorical: _categorical,
    Bernoulli: _bernoulli,
    Gaussian: _gaussian,
    Heteroscedastic: _heteroscedastic,
}


def loss_of(likelihood: Likelihood, y: Tensor, dtype: torch.dtype) -> Loss:
    """The loss of targets y (n,). A likelihood that is not one of ours, a subclass included, is differentiated."""
    return _WRITTEN_OUT.get(type(likelihood), _by_autograd)(likelihood, y, dtype)
