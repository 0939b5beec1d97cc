"""Filters of one kind in the first layer and of another in all others, and both scalings: for `init._target_`.

PYTHONPATH=results/causes python experiments/voc_cls.py preset=mini init=pca init._target_=mixed.layers \
    +init.first=pca +init.rest=gaussian
"""

import initializers


def layers(model, images, *, seed, first, rest):
    initializers.initialize(model, images, filters=first, between=False, seed=seed)
    model.conv1.requires_grad_(False)  # what is frozen stays as it is
    initializers.initialize(model, images, filters=rest, between=False, seed=seed)
    model.conv1.requires_grad_(True)
    initializers.rescale(model, images, seed=seed)
