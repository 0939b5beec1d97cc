"""Local response normalisation across channels (Krizhevsky et al., 2012) with its constant in the state dict."""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary


class LocalResponseNorm(nn.LocalResponseNorm):
    """y = x / (k + alpha / size * sum of x² over `size` channels)^.75, as `nn.LocalResponseNorm`, but faster.

    `alpha` is a buffer. Multiplying the input by s and `alpha` by 1 / s² multiplies the output by s: that is how the
    between-layer step keeps the function of a network exactly, also when its state dict is saved and loaded.

    Args:
        size: of the window, odd.
        alpha, k: as in `nn.LocalResponseNorm`. The exponent is .75.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, k: float = 1.0) -> None:
        super().__init__(size, beta=0.75, k=k)
        del self.alpha
        self.register_buffer("alpha", torch.tensor(alpha))

    def extra_repr(self) -> str:
        return f"{self.size}, alpha={self.alpha:.4g}, beta={self.beta}, k={self.k}"

    def forward(self, x: Tensor) -> Tensor:
        """Input and output: (N, channels, ...)."""
        return local_response_norm(x, self.size, self.alpha, self.k)


def local_response_norm(x: Tensor, size: int, alpha: Tensor, k: float) -> Tensor:
    """The function of `LocalResponseNorm`; what overrides torch functions sees it by its name."""
    if has_torch_function_unary(x):
        return handle_torch_function(local_response_norm, (x,), x, size, alpha, k)
    precise = torch.promote_types(x.dtype, torch.float32)  # in bfloat16 k + alpha * sums would often be k
    return _Function.apply(x.to(precise), size, alpha, k).to(x.dtype)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: Tensor, k: float) -> Tensor:
        root = _window_sums(x.square(), size).mul_(alpha / size).add_(k).rsqrt_()
        y = root.sqrt().mul_(root).mul_(x)
        ctx.save_for_backward(x, alpha, root, y)
        ctx.size = size
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, alpha, root, y = ctx.saved_tensors
        shared = _window_sums((gradient * y).mul_(root).mul_(root), ctx.size).mul_(x).mul_(-1.5 * alpha / ctx.size)
        return shared.addcmul_(gradient, root.sqrt().mul_(root)), None, None, None


def _window_sums(x: Tensor, size: int) -> Tensor:
    """For each channel the sum over the channels at most size // 2 away."""
    sums = x.clone()
    for distance in range(1, size // 2 + 1):
        sums[:, distance:] += x[:, :-distance]
        sums[:, :-distance] += x[:, distance:]
    return sums
