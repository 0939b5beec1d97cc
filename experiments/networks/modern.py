"""Networks that practitioners take, from torchvision, for images of any size: ResNet-18, ConvNeXt, ViT, MobileNetV2."""

from itertools import pairwise

from torch import nn
from torchvision.models import VisionTransformer, mobilenet_v2
from torchvision.models import resnet18 as torchvisions_resnet18
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

from experiments.networks.network import as_network

ATTO = ((40, 2), (80, 2), (160, 6), (320, 2))  # channels and blocks of the stages; timm's convnext_atto


def resnet18(num_outputs: int = 10, input_size: int = 32, batch_norm: bool = True) -> nn.Module:
    """ResNet-18 (He et al., 2016); without BatchNorm its convolutions have no bias all the same."""
    norm = {} if batch_norm else {"norm_layer": nn.Identity}
    return as_network(torchvisions_resnet18(num_classes=num_outputs, **norm), input_size)


def convnext_atto(num_outputs: int = 10, input_size: int = 32) -> nn.Module:
    """ConvNeXt (Liu et al., 2022) of timm's smallest size."""
    stages = [CNBlockConfig(channels, after, blocks) for (channels, blocks), (after, _) in pairwise((*ATTO, (None, 0)))]
    return as_network(ConvNeXt(stages, num_classes=num_outputs), input_size)


def vit_tiny(num_outputs: int = 10, input_size: int = 32, patch: int = 4) -> nn.Module:
    """ViT (Dosovitskiy et al., 2021) of DeiT's smallest size: 12 layers of 192 values and 3 heads; patches of 4 px."""
    shape = {"num_layers": 12, "num_heads": 3, "hidden_dim": 192, "mlp_dim": 768}
    return as_network(
        VisionTransformer(image_size=input_size, patch_size=patch, num_classes=num_outputs, **shape), input_size
    )


def mobilenetv2(num_outputs: int = 10, input_size: int = 32) -> nn.Module:
    """MobileNetV2 (Sandler et al., 2018)."""
    return as_network(mobilenet_v2(num_classes=num_outputs), input_size)
