"""Data-dependent initialization of neural networks (Krähenbühl et al., ICLR 2016, arXiv 1511.06856).

    import initializers

    report = initializers.initialize(model, images, filters="kmeans")
    print(report)

`initialize` sets the filters from the images, normalises every channel on them (Algorithm 1) and balances the
layers so that all of them learn at one rate (Algorithm 2). `rescale` does only the last step, for pre-trained
weights; `change_rate` measures what it equalises. The baselines are here too: `xavier`, `msra`, `gaussian`,
`caffe`, `torch_default` and `lsuv`.
"""

from initializers._baselines import caffe, gaussian, lsuv, msra, torch_default, xavier
from initializers._initialize import initialize, rescale
from initializers._model import InitializationError
from initializers._rates import Rates, change_rate
from initializers._report import LayerReport, Report

__all__ = [
    "InitializationError",
    "LayerReport",
    "Rates",
    "Report",
    "caffe",
    "change_rate",
    "gaussian",
    "initialize",
    "lsuv",
    "msra",
    "rescale",
    "torch_default",
    "xavier",
]
__version__ = "0.1.0"
