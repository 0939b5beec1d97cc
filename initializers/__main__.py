"""Initialize a network from a folder of images, and write its weights.

The network is what FACTORY, a callable written module:name, returns; of modules, those installed and those in the
current folder are found. Each image is scaled to a short side of --size pixels, cropped at its centre and normalised
by --mean and --std, which must be those of the training to come. The weights written are a plain state dict.

examples:
  A ResNet-18 for 20 classes, by k-means of 160 of the images:
    python -m initializers torchvision.models:resnet18 --set num_classes=20 --images photos --out resnet18.safetensors

  Your own network in net.py, by PCA, with a report and a picture of the change rates:
    python -m initializers net:Net --images "photos/*.jpg" --size 64 --filters pca --out net.pt \\
        --report net.json --plot net.png

  A pre-trained network, rescaled so that all of its layers learn at one rate, while its function stays:
    python -m initializers torchvision.models:vgg16 --images photos --load vgg16.pth --rescale --out rescaled.pth
"""

import argparse
import ast
import glob
import io
import json
import operator
import os
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

import initializers
from initializers._filters import Filters
from initializers._images import in_one_line, open_image
from initializers._initialize import Nonhomogeneous
from initializers._propagate import Lrn
from initializers._weights_file import read_state, taken, without_prefixes

USAGE = "python -m initializers FACTORY --images WHERE --out FILE [options]"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # RGB in 0..1
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
WEIGHTS = (".safetensors", ".pt", ".pth")
SUFFIXES = {"load": WEIGHTS, "out": WEIGHTS, "report": (".json",), "plot": (".png", ".pdf", ".svg")}


class UserError(Exception):
    """What the user can put right; the message names it and the remedy."""


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Any exception inside as a `UserError` that begins with `what`; for what may raise nearly anything."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} ({type(error).__name__}: {error})") from error


class Parser(argparse.ArgumentParser):
    """Reports every error in one line."""

    def error(self, message: str):
        self.exit(2, f"error: {textwrap.shorten(message, 600)}\n")


def main(argv: list[str] | None = None) -> None:
    """The command. An error that the user can put right is one line on stderr and exit status 2; nothing is written."""
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    if rest:
        parser.error(f"unknown argument {rest[0]}: put a glob in quotes; --help shows what there is")
    try:
        run(args)
    except (UserError, initializers.InitializationError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError as error:
        parser.error(f"too little memory on {args.device}: lower --count or --size, or use --device cpu ({error})")


def make_parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(usage=USAGE, description=__doc__, formatter_class=layout)
    add: Any = parser.add_argument
    rgb = {"metavar": ("R", "G", "B"), "nargs": 3, "type": float}
    setting = {"metavar": "NAME=VALUE", "nargs": "+", "action": "extend", "type": assignment, "default": []}
    add("factory", metavar="FACTORY", help="callable that returns the network, such as torchvision.models:resnet18")
    add("--set", **setting, help="its keyword arguments: Python literals; anything else is a string")
    add("--images", metavar="WHERE", required=True, help=f"folder to search for {' '.join(IMAGES)}, or a quoted glob")
    add("--count", metavar="N", type=int, default=160, help="images to draw, where there are more (default: 160)")
    add("--size", metavar="PIXELS", type=int, default=224, help="height and width of the crops (default: 224)")
    add("--mean", **rgb, default=IMAGENET_MEAN, help="subtracted from pixels in 0..1 (default: ImageNet's)")
    add("--std", **rgb, default=IMAGENET_STD, help="what they are divided by then (default: ImageNet's)")
    add("--load", metavar="FILE", type=Path, help="weights to start from: .safetensors, .pt or .pth")
    steps = parser.add_mutually_exclusive_group()
    kinds = [*get_args(Filters), "none"]
    steps.add_argument("--filters", choices=kinds, help="none keeps the weights (default: kmeans)")
    steps.add_argument("--rescale", action="store_true", help="only make the layers learn at one rate")
    add("--nonhomogeneous", choices=get_args(Nonhomogeneous), help="as in initializers.initialize")
    add("--lrn", choices=get_args(Lrn), help="as in initializers.initialize")
    add("--out", metavar="FILE", type=Path, required=True, help="weights to write: .safetensors, .pt or .pth")
    add("--report", metavar="FILE", type=Path, help="report and settings to write: .json")
    add("--plot", metavar="FILE", type=Path, help="picture of the change rates to write: .png, .pdf or .svg")
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--seed", metavar="N", type=int, default=0, help="of all that is random (default: 0)")
    return parser


def assignment(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def run(args: argparse.Namespace) -> None:
    """All of the command; it writes at its end."""
    args.set = dict(args.set)
    args.filters = None if args.rescale else args.filters or "kmeans"
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check(args)
    paths = find_images(args.images, args.count, args.seed)
    torch.manual_seed(args.seed)  # for weights that the factory draws and that are kept
    model = build(args.factory, args.set)
    if args.load:
        load(model, args.load)
    model.to(args.device)
    images = read_images(paths, args.size, args.mean, args.std)

    rates = [initializers.change_rate(model, images, seed=args.seed)] if args.plot else []
    options = {name: getattr(args, name) for name in ("nonhomogeneous", "lrn") if getattr(args, name)}
    if args.rescale:
        report = initializers.rescale(model, images, seed=args.seed, **options)
    else:
        filters = None if args.filters == "none" else args.filters
        report = initializers.initialize(model, images, filters, seed=args.seed, **options)
    print(report)

    settings = vars(args) | {"initializers": initializers.__version__, "torch": torch.__version__}
    files = {args.out: weights_file(model, args.out, settings)}
    if args.report:
        files[args.report] = json.dumps(report.to_dict() | {"settings": settings}, indent=2, default=str).encode()
    if args.plot:
        rates.append(initializers.change_rate(model, images, seed=args.seed))
        files[args.plot] = plot_file(rates, args.plot)
    write(files)
    print(args.out)


def check(args: argparse.Namespace) -> None:
    """What can be found wrong before any work."""
    for name, least in (("count", 1), ("size", 1), ("seed", 0)):
        if not least <= getattr(args, name) < 2**63:
            raise UserError(f"--{name} is {getattr(args, name)}: give a whole number from {least}")
    files = {name: getattr(args, name) for name in SUFFIXES if getattr(args, name)}
    for name, path in files.items():
        if path.suffix not in SUFFIXES[name]:
            raise UserError(f"--{name} {path}: the name must end in {' or '.join(SUFFIXES[name])}")
        if name == "load" and not path.is_file():
            raise UserError(f"--load {path}: there is no such file")
        if name != "load" and (path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK)):
            raise UserError(f"--{name} {path} cannot be written: name a file in a folder that is there and writable")
    needed = {"PIL": "pillow"} | ({"matplotlib": "matplotlib"} if args.plot else {})
    if ".safetensors" in [path.suffix for path in files.values()]:
        needed["safetensors"] = "safetensors"
    for module, package in needed.items():
        if find_spec(module) is None:
            raise UserError(f"this needs {package}, which is not installed: pip install {package}")
    with explained(f"--device {args.device} cannot be used: give cpu, or cuda where torch finds a GPU"):
        torch.empty(0, device=args.device)


def find_images(where: str, count: int, seed: int) -> list[Path]:
    """`count` of the images in a folder or matching a glob, drawn at random; all of them, where there are fewer."""
    where = os.path.expanduser(where)
    if os.path.isdir(where):
        found = [path for path in Path(where).rglob("*") if path.suffix.lower() in IMAGES]
    else:
        found = [Path(path) for path in glob.glob(where, recursive=True)]
    paths = sorted(path for path in found if path.is_file())
    if not paths:
        raise UserError(f"--images {where}: no images; give a folder with {' '.join(IMAGES)} files, or a quoted glob")
    order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed))
    return [paths[i] for i in order[:count]]


def read_images(paths: list[Path], size: int, mean: list[float], std: list[float]) -> Tensor:
    """Images scaled to a short side of `size`, cropped at the centre and normalised; float32 (N, 3, size, size)."""
    from PIL import Image, ImageOps

    def read(path: Path) -> Tensor:
        with explained(f"cannot read the image {in_one_line(path)}: replace or remove it"):
            pixels = ImageOps.fit(open_image(path), (size, size), Image.Resampling.BILINEAR).tobytes()
        return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(size, size, 3)

    with ThreadPoolExecutor() as pool:
        images = torch.stack(list(pool.map(read, paths)))
    return ((images / 255 - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).contiguous()


def build(factory: str, options: dict[str, object]) -> nn.Module:
    """What the `factory`, "module:name", returns."""
    module, _, name = factory.partition(":")
    with explained(f"cannot find {factory}: give module:name of what is installed or in this folder"):
        function = operator.attrgetter(name)(import_module(module))
    with explained(f"{factory} failed with the arguments {options}: give others by --set"):
        model = function(**options)
    if not isinstance(model, nn.Module):
        raise UserError(f"{factory} returns a {type(model).__name__}: it must return a torch.nn.Module")
    return model


def load(model: nn.Module, path: Path) -> None:
    """Load the state dict that the file is or holds, in any of the layouts of `_weights_file`; say what was taken."""
    try:
        state, key = read_state(path)
        state, prefixes = without_prefixes(state, model.state_dict())
    except (ValueError, OSError) as error:
        raise UserError(f"--load: {error}") from error
    shapes = {name: [*tensor.shape] for name, tensor in state.items()}
    own = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    misshaped = [name for name in own if shapes.get(name, own[name]) != own[name]]
    integers = [name for name, _ in model.named_parameters() if name in state and not state[name].is_floating_point()]
    fitting = {name: tensor for name, tensor in state.items() if name not in (*misshaped, *integers)}
    missing, unexpected = model.load_state_dict(fitting, strict=False)  # forgives what torch forgives in old files
    wrong = {
        "missing": [name for name in missing if name not in (*misshaped, *integers)],
        "unexpected": unexpected,
        "of another shape": [f"{name} {shapes[name]} for {own[name]}" for name in misshaped],
        "not of floats": integers,
    }
    texts = [f"{len(names)} {what}, such as {', '.join(names[:3])}" for what, names in wrong.items() if names]
    if texts:
        raise UserError(f"--load {path} does not fit the network: {'; '.join(texts)}. Change FACTORY or --set")
    if text := taken(key, prefixes):
        print(f"--load {path}: {text}")


def weights_file(model: nn.Module, path: Path, settings: dict[str, object]) -> bytes:
    """The state dict as a file of the kind of `path`; a .safetensors file holds the `settings` too."""
    state = {  # copies, since safetensors takes neither tied weights nor memory formats
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        return save(state, {name: str(value) for name, value in settings.items()} | {"format": "pt"})
    torch.save(state, file := io.BytesIO())
    return file.getvalue()


def plot_file(rates: list[initializers.Rates], path: Path) -> bytes:
    """The rates before and after as a picture of the kind of `path`."""
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    axes = rates[0].plot(label="before")
    rates[1].plot(axes, label="after")
    axes[0].figure.savefig(file := io.BytesIO(), format=path.suffix[1:], dpi=150)
    return file.getvalue()


def write(files: dict[Path, bytes]) -> None:
    """Write all files, each whole or not at all."""
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}") for path in files}
    try:
        with explained(f"cannot write {', '.join(map(str, files))}: make room, or choose another folder"):
            for path, content in files.items():
                parts[path].write_bytes(content)
            for path in files:
                os.replace(parts[path], path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
