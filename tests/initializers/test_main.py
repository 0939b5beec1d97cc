"""The command: what it writes is what the library gives, and every error is one line that leaves nothing behind."""

import argparse
import copy
import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn

import initializers
from initializers.__main__ import UserError, build, find_images, load, main, read_images, weights_file

NET = """
from torch import nn

number = int

def net(width=6, classes=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, classes),
    )
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a network in net.py, 20 images of 20 x 20 pixels in photos/, and files that are of no use."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "net.py").write_text(NET)
    (folder / "bad.py").write_text("raise RuntimeError('half\\nwritten')")
    (folder / "photos" / "deep").mkdir(parents=True)
    pixels = torch.randint(256, (20, 20, 20, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for i, image in enumerate(pixels):
        name = ("deep/" if i % 2 else "") + f"{i}.png"
        Image.frombytes("RGB", (20, 20), bytes(image.flatten().tolist())).save(folder / "photos" / name)
    (folder / "torn").mkdir()
    (folder / "torn" / "a.jpg").write_bytes((folder / "photos" / "0.png").read_bytes()[:200])
    (folder / "text.pt").write_text("no weights")
    (folder / "text.safetensors").write_text("no weights")
    (folder / "folder.pt").mkdir()
    torch.save([1, 2], folder / "list.pt")
    torch.save({"0.weight": torch.zeros(5, 3, 3, 3), "head": torch.zeros(1)}, folder / "other.pt")
    return folder


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    """A copy of `made`, as current folder."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "net", raising=False)
    return tmp_path


def arguments(*extra, factory="net:net", out="w.pt"):
    return [factory, "--images", "photos", "--size", "20", "--device", "cpu", "--out", out, *extra]


def run(*extra, **options):
    """The command as a process of its own, in the current folder."""
    command = [sys.executable, "-m", "initializers", *arguments(*extra, **options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def listing(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"}


def fails(capsys, folder, *argv):
    """The message of a command that must fail, and must neither print nor write anything else."""
    before = listing(folder)
    with pytest.raises(SystemExit) as error:
        main([*argv])
    text = capsys.readouterr()
    assert (error.value.code, text.out) == (2, "")
    assert text.err.startswith("error: ")
    assert text.err.count("\n") == 1
    assert listing(folder) == before
    return text.err.removeprefix("error: ").strip()


def test_it_initializes(folder):
    extra = ("--set", "width=5", "classes=3", "--mean", ".4", ".5", ".6", "--std", ".3", ".2", ".1", "--seed", "7")
    before = set(listing(folder))
    lines = run(*extra, "--count", "12", "--report", "r.json", "--plot", "p.png", out="w.safetensors")
    assert set(listing(folder)) == before | {folder / name for name in ("w.safetensors", "r.json", "p.png")}

    pixels = [
        torch.tensor(list(Image.open(path).tobytes())).view(20, 20, 3) for path in find_images("photos", 12, seed=7)
    ]
    images = (torch.stack(pixels) / 255 - torch.tensor([0.4, 0.5, 0.6])) / torch.tensor([0.3, 0.2, 0.1])
    model = build("net:net", {"width": 5, "classes": 3})
    report = initializers.initialize(model, images.permute(0, 3, 1, 2), "kmeans", seed=7)

    fresh = build("net:net", {"width": 5, "classes": 3})
    fresh.load_state_dict(safetensors.torch.load_file("w.safetensors"))
    for name, tensor in fresh.state_dict().items():
        torch.testing.assert_close(
            tensor, model.state_dict()[name], rtol=1e-4, atol=1e-4
        )  # pixels are rounded otherwise
    assert lines[0] == str(report).splitlines()[0]
    assert [line.split()[:3] for line in lines[2:5]] == [line.split()[:3] for line in str(report).splitlines()[2:5]]
    assert lines[-1] == "w.safetensors"

    written = json.loads(Path("r.json").read_text())
    assert [row["name"] for row in written["layers"]] == ["0", "3", "7"]
    assert written["layers"][1]["rate_after"] == pytest.approx(report.layers[1].rate_after, rel=1e-3)
    settings = {"factory": "net:net", "set": {"width": 5, "classes": 3}, "filters": "kmeans", "seed": 7, "count": 12}
    assert settings.items() <= written["settings"].items()
    with safe_open("w.safetensors", "pt") as file:
        assert {name: str(value) for name, value in settings.items()}.items() <= file.metadata().items()
    with Image.open("p.png") as picture:
        assert picture.width > picture.height > 300


def test_it_rescales(folder):
    """In the way of the help: weights of any origin keep their function, and their layers learn at one rate."""
    torch.manual_seed(0)
    model = build("net:net", {}).eval()
    model[3].weight.data *= 10
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, "pretrained.pth")
    lines = run("--load", "pretrained.pth", "--rescale", "--report", "r.json", out="rescaled.pt")
    assert lines[-1] == "rescaled.pt"
    rescaled = build("net:net", {}).eval()
    rescaled.load_state_dict(torch.load("rescaled.pt", weights_only=True))
    images = read_images(find_images("photos", 20, 0), 20, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    torch.testing.assert_close(rescaled(images), model(images), rtol=1e-4, atol=1e-5)
    written = json.loads(Path("r.json").read_text())
    assert written["spread_after"] < 1.01 < 3 < written["spread_before"]
    assert written["settings"]["filters"] is None


def test_the_seed_decides_all(folder, capsys):
    """With filters that the factory draws, and with images that the command draws."""
    for filters in ("none", "pca"):
        states = []
        for seed in (1, 1, 2):
            main(arguments("--filters", filters, "--count", "10", "--seed", str(seed)))
            states.append(torch.load("w.pt", weights_only=True))
        for name in ("0.weight", "3.weight", "7.weight"):
            first, again, other = (state[name] for state in states)
            assert torch.equal(first, again)
            assert not torch.allclose(first, other)


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("given", [{}, {"nonhomogeneous": "scale"}, {"nonhomogeneous": "pin", "lrn": "exact"}])
def test_options_of_the_library_are_handed_on(rescale, given, folder, monkeypatch, capsys):
    name = "rescale" if rescale else "initialize"
    seen, call = [], getattr(initializers, name)

    def spy(model, images, *filters, seed, **options):
        seen.append(options)
        return call(model, images, *filters, seed=seed)

    monkeypatch.setattr(initializers, name, spy)
    main(arguments(*["--rescale"] * rescale, *(word for name in given for word in (f"--{name}", given[name]))))
    assert seen == [given]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--out", "w.bin"], "--out w.bin: the name must end in .safetensors or .pt or .pth"),
        (["--out", "absent/w.pt"], "--out absent/w.pt cannot be written: name a file in a folder that is there"),
        (["--out", "folder.pt"], "--out folder.pt cannot be written"),
        (["--report", "r.txt"], "--report r.txt: the name must end in .json"),
        (["--plot", "absent/p.png"], "--plot absent/p.png cannot be written"),
        (["--images", "nowhere"], "--images nowhere: no images; give a folder"),
        (["--images", "*/*.gif"], "--images */*.gif: no images; give a folder"),
        (["--images", "folder.pt"], "--images folder.pt: no images; give a folder"),
        (["--images", "torn"], "cannot read the image torn/a.jpg: replace or remove it"),
        (["--images", "photos/0.png", "photos/2.png"], "unknown argument photos/2.png: put a glob in quotes"),
        (["--device", "quantum"], "--device quantum cannot be used: give cpu, or cuda where torch finds a GPU"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used: give cpu"),
        (["--count", "0"], "--count is 0: give a whole number from 1"),
        (["--size", "many"], "argument --size: invalid int value: 'many'"),
        (["--seed", "-1"], "--seed is -1: give a whole number from 0"),
        (["--std", "0", "1", "1"], "images hold NaN or Inf: check the decoding and the normalisation"),
        (["--filters", "k-means"], "argument --filters: invalid choice: 'k-means'"),
        (["--filters", "kmeans", "--rescale"], "argument --rescale: not allowed with argument --filters"),
        (["--lrn", "exactly"], "argument --lrn: invalid choice: 'exactly'"),
        (["--load", "absent.pt"], "--load absent.pt: there is no such file"),
        (["--load", "text.pt"], "--load: text.pt is no state dict of PyTorch, or it is damaged"),
        (["--load", "text.safetensors"], "--load: text.safetensors is no safetensors file, or it is damaged"),
        (["--load", "list.pt"], "--load: list.pt holds no state dict: save model.state_dict()"),
        (
            ["--load", "other.pt"],
            "--load other.pt does not fit the network: 8 missing, such as 1.weight, 1.bias, 1.running_mean; "
            "1 unexpected, such as head; 1 of another shape, such as 0.weight [5, 3, 3, 3] for [6, 3, 3, 3]. Change",
        ),
        (["--set", "width"], "argument --set: 'width' is not of the form name=value"),
        (["--set", "depth=3"], "net:net failed with the arguments {'depth': 3}: give others by --set (TypeError: "),
        (["--set", "width=wide"], "net:net failed with the arguments {'width': 'wide'}"),
    ],
)
def test_errors(extra, message, folder, capsys):
    assert fails(capsys, folder, *arguments(*extra)).startswith(message)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("net", "cannot find net: give module:name of what is installed or in this folder (AttributeError: "),
        (
            "absent:net",
            "cannot find absent:net: give module:name of what is installed or in this folder (ModuleNotFound",
        ),
        ("net:absent", "cannot find net:absent: give"),
        (
            "bad:net",
            "cannot find bad:net: give module:name of what is installed or in this folder (RuntimeError: half wr",
        ),
        ("net:number", "net:number returns a int: it must return a torch.nn.Module"),
    ],
)
def test_no_factory(factory, message, folder, capsys):
    assert fails(capsys, folder, *arguments(factory=factory)).startswith(message)


def test_required_arguments(folder, capsys):
    message = "the following arguments are required: FACTORY, --images, --out"
    assert fails(capsys, folder) == message


@pytest.mark.parametrize(
    ("module", "package"), [("PIL", "pillow"), ("safetensors", "safetensors"), ("matplotlib", "matplotlib")]
)
def test_packages_that_are_missing(module, package, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    message = fails(capsys, folder, *arguments("--plot", "p.png", out="w.safetensors"))
    assert message == f"this needs {package}, which is not installed: pip install {package}"


def test_too_little_memory(folder, monkeypatch, capsys):
    def flatten(module, x):
        raise torch.OutOfMemoryError("of 9 GiB")

    monkeypatch.setattr(nn.Flatten, "forward", flatten)
    message = fails(capsys, folder, *arguments())
    assert message == "too little memory on cpu: lower --count or --size, or use --device cpu (of 9 GiB)"


def test_a_full_disk(folder, monkeypatch, capsys):
    (folder / "w.pt").write_text("of an earlier run")
    write = Path.write_bytes

    def full(path, content):
        write(path, content[:99])
        if "r.json" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    before = listing(folder)
    with pytest.raises(SystemExit):
        main(arguments("--report", "r.json"))
    assert listing(folder) == before
    assert "error: cannot write w.pt, r.json: make room, or choose another folder (OSError: " in capsys.readouterr().err


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
def test_weights_that_can_be_loaded(key, suffix, folder):
    model, other = build("net:net", {}), build("net:net", {})
    # as saved before BatchNorm counted its batches
    state = {name: tensor for name, tensor in other.state_dict().items() if "num_batches" not in name}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, f"saved{suffix}")
    else:
        torch.save({key: state, "epoch": 1} if key else state, f"saved{suffix}")
    load(model, Path(f"saved{suffix}"))
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_tied_weights_and_memory_formats(name, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Linear(4, 4), nn.Linear(4, 4)).to(memory_format=torch.channels_last)
    model[2].weight = model[1].weight
    (tmp_path / name).write_bytes(weights_file(model, tmp_path / name, {"seed": 0}))
    fresh = copy.deepcopy(model)
    for parameter in fresh.parameters():
        nn.init.zeros_(parameter)
    load(fresh, tmp_path / name)
    assert all(torch.equal(tensor, fresh.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_images_are_drawn_whatever_the_order_of_the_listing(tmp_path, monkeypatch):
    names = [f"{i:02}.JPG" for i in range(20)] + [f"deep/{i}.webp" for i in range(5)]
    (tmp_path / "deep" / "folder.jpg").mkdir(parents=True)
    for name in [*names, "notes.txt"]:
        (tmp_path / name).touch()

    def draw(count, seed):
        return [path.relative_to(tmp_path).as_posix() for path in find_images(tmp_path, count, seed)]

    assert sorted(draw(100, 0)) == sorted(names)
    drawn = draw(7, 0)
    assert len(set(drawn)) == 7
    assert draw(20, 0)[:7] == drawn != draw(7, 1)
    assert len(find_images(f"{tmp_path}/*/*.webp", 100, 0)) == 5
    rglob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: reversed([*rglob(path, pattern)]))
    assert draw(7, 0) == drawn


def test_images_are_scaled_and_cropped(tmp_path):
    colours = {"red": 0, "lime": 1, "blue": 2}
    tall = Image.new("RGB", (20, 60))
    for i, colour in enumerate(colours):
        tall.paste(colour, (0, 20 * i, 20, 20 * (i + 1)))
    tall.save(tmp_path / "tall.png")
    tall.rotate(90, expand=True).quantize().save(tmp_path / "wide.bmp")
    Image.new("L", (9, 7), 51).save(tmp_path / "grey.jpg")
    paths = [tmp_path / name for name in ("tall.png", "wide.bmp", "grey.jpg")]
    images = read_images(paths, 10, mean=(0, 0.5, 0.1), std=(1, 0.5, 2))
    assert images.shape == (3, 3, 10, 10)
    lime, grey = torch.tensor([0, 1, -0.05]), torch.tensor([0.2, -0.6, 0.05])
    torch.testing.assert_close(images[:2, :, 2:-2, 2:-2], lime.view(3, 1, 1).expand(2, 3, 6, 6))
    torch.testing.assert_close(images[2], grey.view(3, 1, 1).expand(3, 10, 10))


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict", "net", "weights", "mine"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "backbone.", "module._orig_mod.model."])
def test_layouts_of_checkpoints(key, prefix, tmp_path, capsys):
    saved, fresh = nn.Sequential(nn.Linear(2, 3)), nn.Sequential(nn.Linear(2, 3))
    options = argparse.Namespace(lr=0.1, out=tmp_path)
    state = {f"{prefix}{name}": tensor for name, tensor in saved.state_dict().items()}
    beside = {"args": options, "epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "best": torch.tensor(1.0)}
    torch.save({key: state} | (beside if key != "mine" else {}), tmp_path / "a.pth")
    load(fresh, tmp_path / "a.pth")
    assert torch.equal(fresh[0].weight, saved[0].weight)
    out = capsys.readouterr().out
    assert f"taken from '{key}'" in out
    assert (f"prefix '{prefix}' removed" in out) is bool(prefix)


def unusable():
    values = {"meta": torch.empty(3, 2, device="meta"), "sparse": torch.eye(3).to_sparse()}
    values |= {"complex": torch.ones(3, 2, dtype=torch.complex64), "claims": torch.zeros(1).expand(10**12)}
    return values | {"not of floats": torch.ones(3, 2, dtype=torch.int8)}


@pytest.mark.parametrize("kind", [*unusable()])
def test_tensors_that_are_of_no_use(kind, tmp_path):
    torch.save({"0.weight": unusable()[kind], "0.bias": torch.zeros(3)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=kind):
        load(nn.Sequential(nn.Linear(2, 3)), tmp_path / "a.pth")


class Foreign:
    pass


def test_no_foreign_class_is_built(tmp_path):
    torch.save({"state_dict": {}, "what": Foreign()}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"Foreign, which is not built: save model.state_dict\(\) alone"):
        load(nn.Sequential(nn.Linear(2, 3)), tmp_path / "a.pth")


def test_grey_images_of_16_bits_are_scaled_and_floats_refused(tmp_path):
    Image.new("I;16", (12, 12), 128 * 257).save(tmp_path / "a.png")
    images = read_images([tmp_path / "a.png"], 10, mean=(0, 0, 0), std=(1, 1, 1))
    torch.testing.assert_close(images, torch.full((1, 3, 10, 10), 128 / 255))
    Image.new("F", (12, 12), 0.5).save(tmp_path / "b.tif")
    with pytest.raises(UserError, match=r"cannot read the image .*b\.tif.* mode F, have no known range"):
        read_images([tmp_path / "b.tif"], 10, mean=(0, 0, 0), std=(1, 1, 1))
