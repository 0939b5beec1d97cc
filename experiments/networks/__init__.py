"""The networks of the experiments, layer for layer as their Caffe definitions have them, and weights from files."""

from experiments.networks.caffenet import CaffeNet
from experiments.networks.fitnet import FitNet4, MNISTFitNet
from experiments.networks.googlenet import GoogLeNet
from experiments.networks.modern import convnext_atto, mobilenetv2, resnet18, vit_tiny
from experiments.networks.network import make_network
from experiments.networks.plain import plain
from experiments.networks.resnet import ResNet
from experiments.networks.vgg import VGG, VGG16
from experiments.networks.weights import load_weights, read_weights

__all__ = [
    "VGG",
    "VGG16",
    "CaffeNet",
    "FitNet4",
    "GoogLeNet",
    "MNISTFitNet",
    "ResNet",
    "convnext_atto",
    "load_weights",
    "make_network",
    "mobilenetv2",
    "plain",
    "read_weights",
    "resnet18",
    "vit_tiny",
]
