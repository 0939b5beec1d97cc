"""The networks of the paper, layer for layer as their Caffe definitions."""

from experiments.networks.caffenet import CaffeNet

__all__ = ["CaffeNet"]
