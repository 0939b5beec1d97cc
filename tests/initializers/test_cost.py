"""What an initialization costs, in forward passes of one image, counted by the multiplications of all layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from initializers import initialize


class Generator(nn.Sequential):
    """As DCGAN's: many layers of few positions."""

    def __init__(self):
        sizes = [(12, 16, 1, 0), (16, 16, 2, 1), (16, 8, 2, 1)]
        parts = [nn.ConvTranspose2d(a, b, 4, stride, padding, bias=False) for a, b, stride, padding in sizes]
        super().__init__(*(layer for part in parts for layer in (part, nn.BatchNorm2d(part.out_channels), nn.ReLU())))


class Heads(nn.Module):
    """As detectors: one head on maps of several sizes."""

    def __init__(self):
        super().__init__()
        self.body = nn.ModuleList([nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)])
        self.side, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x):
        maps = []
        for layer in self.body:
            x = F.relu(layer(x))
            maps.append(x)
        return [self.head(F.relu(self.side(each))) for each in maps]


class Segments(nn.Module):
    """As FCN and DeepLab: branches of a small map, scaled up again."""

    def __init__(self):
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, 4, 1), nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.pooled, self.top = nn.Conv2d(8, 8, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        y = F.relu(self.stem(x))
        whole = F.relu(self.pooled(y.mean((2, 3), keepdim=True))).expand_as(y)
        return F.interpolate(self.top(torch.cat([F.relu(self.wide(y)), whole], 1)), size=x.shape[2:], mode="bilinear")


@pytest.mark.parametrize("make", [Generator, Heads, Segments])
@pytest.mark.parametrize("count", [40, 160])
def test_the_cost_in_forward_passes(make, count):
    torch.manual_seed(0)
    model = make().eval()
    images = torch.randn(count, 12, 1, 1) if make is Generator else torch.randn(count, 3, 16, 16)
    with torch.no_grad(), FlopCounterMode(display=False) as once:
        model(images[:1])
    with FlopCounterMode(display=False) as total:
        initialize(model, images, "gaussian")
    cost = total.get_total_flops() / once.get_total_flops()  # in images
    assert count < cost < count + 400
    assert cost / count < (5 if count == 160 else 11)
