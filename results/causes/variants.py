"""Xavier by the mean of fan-in and fan-out; Xavier and MSRA with the reference's biases: for `init._target_`.

PYTHONPATH=results/causes python experiments/voc_cls.py preset=mini init=xavier init._target_=variants.average
PYTHONPATH=results/causes python experiments/voc_cls.py preset=mini init=msra init._target_=variants.biased \
    +init.weights=msra
"""

import torch

import initializers


def average(model, images, *, seed):
    initializers.xavier(model, seed=seed, fan="average")


@torch.no_grad()
def biased(model, images, *, seed, weights):
    if weights == "xavier":
        initializers.xavier(model, seed=seed)
    else:
        initializers.msra(model, seed=seed, factors=model.std_factors)
    for name, (_, bias) in model.caffe_fillers.items():
        model.get_submodule(name).bias.fill_(bias)
