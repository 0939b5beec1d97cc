"""The networks of the paper, layer for layer as their Caffe definitions, and their weights from files."""

from experiments.networks.caffenet import CaffeNet
from experiments.networks.googlenet import GoogLeNet
from experiments.networks.network import make_network
from experiments.networks.vgg import VGG16
from experiments.networks.weights import load_weights, read_weights

__all__ = ["VGG16", "CaffeNet", "GoogLeNet", "load_weights", "make_network", "read_weights"]
