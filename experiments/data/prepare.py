"""The data of an experiment, made where they are not there yet."""

from collections.abc import Mapping

from experiments.data.demo import make_demo, make_demo_folders
from experiments.data.download import download, to_download


def prepare(data: Mapping) -> None:
    """Make the images of `configs/data` that are not there yet: draw a demo set, or download VOC 2007."""
    if data["name"] == "demo":
        make_demo(data["root"])
    elif data["name"] == "demo-folders":
        make_demo_folders(data["root"])
    elif data["name"] == "voc2007" and data.get("classes") is None and to_download(data["root"]):
        download(data["root"])
