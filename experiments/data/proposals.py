"""The objects of VOC images, and proposals for where they are: from a file, or computed."""

import hashlib
from pathlib import Path

import torch
from omegaconf import DictConfig
from tqdm import tqdm

import detection
from detection import Proposals, Truth
from experiments.data.images import ImageCache
from experiments.data.voc import Split, read_objects

PUBLISHED = "data/selective_search_data"  # where rbgirshick/fast-rcnn unpacks its proposals
THRESHOLDS = (0.5, 0.7)  # IoU at which the recall of the proposals is told
FIRST_PIXEL = 1  # the devkit counts from 1


def objects_of(cfg: DictConfig, split: Split, cache: ImageCache) -> list[Truth]:
    """The objects of all images of a split, their pixels counted from 0; boxes that reach out of an image are cut.

    How many were cut is printed.

    Raises:
        ValueError: a box lies outside of its image altogether; others as of `read_objects`.
    """
    found, cut = [], 0
    for image, image_id in enumerate(tqdm(split.ids, "objects", disable=None)):
        objects = read_objects(cfg.data.root, image_id, split.classes)
        last = torch.stack([cache.widths[image], cache.heights[image]]).cpu().repeat(2) - 1.0
        boxes = objects.boxes - FIRST_PIXEL
        inside = boxes.clamp(min=0).minimum(last)
        empty = (boxes[:, 2:] < 0).any(1) | (boxes[:, :2] > last[:2]).any(1)
        if empty.any():
            number = int(empty.nonzero()[0])
            raise ValueError(
                f"the annotation of image {image_id} in {cfg.data.root}: object {number + 1} has the box "
                f"{objects.boxes[number].tolist()}, outside of the image's {last[0] + 1:.0f} x {last[1] + 1:.0f} "
                "pixels: correct it"
            )
        cut += int((inside != boxes).any(1).sum())
        found.append(Truth(inside, objects.classes, objects.difficult))
    if cut:
        print(f"{cut} boxes of objects reach out of their images and are cut at the border", flush=True)
    return found


def proposals_of(
    cfg: DictConfig, name: str, split: Split, cache: ImageCache, truth: list[Truth]
) -> tuple[Proposals, dict]:
    """The proposals of a split, from the file that is configured or published, or else computed; and how good they are.

    Raises:
        ValueError: OpenCV is not there to compute them; others as of `read_proposals`.
    """
    given = Path(cfg.proposals or PUBLISHED)
    if given.is_dir():
        given /= f"voc_2007_{name}.mat"
    if cfg.proposals is None and not given.exists():
        key = hashlib.sha256(repr([str(path) for path in split.image_paths]).encode()).hexdigest()[:8]
        given = Path(cfg.data.cache) / f"selective-search-{name}-{key}.npz"
        if not given.exists():
            try:
                detection.compute_proposals(split.image_paths, given)
            except ImportError as error:
                raise ValueError(str(error)) from error
    proposals = detection.read_proposals(given, split.ids, cache.heights, cache.widths)
    counted = [found.boxes[~found.difficult] for found in truth]
    about = {"file": given.name, "per_image": len(proposals.boxes) / len(proposals)}
    about |= {f"recall_{threshold}": detection.recall(proposals, counted, threshold) for threshold in THRESHOLDS}
    text = ", ".join(f"{100 * about[f'recall_{threshold}']:.1f} % at IoU {threshold}" for threshold in THRESHOLDS)
    print(f"{name}: {about['per_image']:.0f} proposals an image from {given}, recall {text}", flush=True)
    return proposals, about
