"""Train and test Fast R-CNN on PASCAL VOC 2007 detection (Krähenbühl et al. 2016, Tables 2 and 3).

    python experiments/voc_det.py init=kmeans

Every setting is in configs/voc_det.yaml and the groups beside it. A run that was killed goes on when the same
command is given again. The last line printed is the path of the result record.
"""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.transforms import Bbox
from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

import detection
from detection import Detections, FastRCNN, Proposals, RoIs
from experiments import files
from experiments.data.images import ImageCache, describe
from experiments.data.prepare import prepare
from experiments.data.proposals import objects_of, proposals_of
from experiments.data.regions import RoIBatches, images_with_rois, scale_of, scaled
from experiments.data.voc import Split, open_split, set_outputs
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.figures import encoded
from experiments.engine.initialization import absent_weights, once, timed
from experiments.engine.trainer import train_as
from experiments.networks import make_network
from experiments.progress import pace
from initializers._images import open_image

NEW_LAYERS = ("fast_rcnn", "initialized")
IMAGES_AT_A_TIME = 2  # that are tested: each takes memory for all of its RoIs


@command("voc_det")
def main(cfg: DictConfig) -> None:
    set_outputs(cfg)
    run.execute(cfg, train_and_test, left_out=absent_weights(cfg.init) if cfg.published else "")


def train_and_test(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """The run: its record, what of it is printed, the devkit's files and a picture."""
    prepare(cfg.data)
    training, cache = open_split(cfg.data, cfg.data.train, device)
    test, test_cache = open_split(cfg.data, cfg.data.test, device)
    objects, truth = objects_of(cfg, training, cache), objects_of(cfg, test, test_cache)
    proposals, recall = proposals_of(cfg, cfg.data.train, training, cache, objects)
    test_proposals, test_recall = proposals_of(cfg, cfg.data.test, test, test_cache, truth)

    rois = detection.make_rois(proposals, [(found.boxes, found.classes) for found in objects])
    model = FastRCNN(make_network(cfg.model, len(training.classes)), len(test.classes), **cfg.detector).to(device)
    statistics = rois.target_statistics(len(test.classes))
    model.target_mean.copy_(statistics[0])
    model.target_std.copy_(statistics[1])
    start = once(folder, lambda: initialize(cfg, model, cache, rois))
    torch.manual_seed(cfg.seed)  # of dropout
    batches = RoIBatches(cache, rois, **cfg.batch, statistics=statistics, seed=cfg.seed, mean=cfg.mean)
    train_seconds = train_as(cfg, model, detection.fast_rcnn_loss, batches, folder)

    began = time.perf_counter()
    found = detect_all(cfg, model, test_cache, test_proposals)
    precision = detection.voc_ap(found, truth, len(test.classes))
    metrics = {name: precision[name] for name in ("map_voc11", "map_area")}
    metrics |= detection.coco_ap(found, truth, len(test.classes))
    record = run.record_of(folder, cfg)[0]
    files.write_arrays(run.scores_of(record), scores_of(found, truth, test))
    detection.write_detections(folder, cfg.data.test, test.ids, test.classes, found)
    files.write_bytes(folder / "detections.jpg", draw(test, found, truth, cfg.evaluate.pictures))
    per_class = pd.DataFrame({kind: precision[kind] for kind in ("voc11", "area")}, index=test.classes)
    about = {
        "data": describe(cfg.data.name, cache, test_cache),
        "proposals": {cfg.data.train: recall, cfg.data.test: test_recall},
        "times": {"init": start["seconds"], "train": train_seconds, "evaluate": time.perf_counter() - began},
        "curve": "curve.csv",
        "scores": run.scores_of(record).name,
        "init_report": start["report"],
    }
    report(cfg, record, device, metrics, per_class, about)


def report(
    cfg: DictConfig, record: Path, device: torch.device, metrics: dict, per_class: pd.DataFrame, about: dict
) -> None:
    """Write the record and print what came out."""
    classes = per_class.astype(object).where(per_class.notna(), None).T.to_dict()
    run.write_record(record, cfg, device, metrics=metrics, per_class=classes, **about)
    per_class.loc["mean"] = [metrics["map_voc11"], metrics["map_area"]]
    print(f"\naverage precision on {cfg.data.test} of {cfg.data.name}, percent")
    print((100 * per_class).to_string(float_format="%.1f"))
    print(", ".join(f"{name} {100 * metrics[name]:.1f} %" for name in ("coco_ap", "coco_ap50")))
    print(run.spent(about["times"]))


def scores_of(found: Detections, truth: list[detection.Truth], split: Split) -> dict[str, np.ndarray]:
    """The ranking of each class, one after the other, to be kept: images, which are right, and how many there are.

    What ranks behind the last right one has no influence on an average precision, and is left out.
    """
    count = len(split.classes)
    ranked = []
    for images, right in detection.rankings(found, truth, count):
        end = int(right.nonzero().max()) + 1 if right.any() else 0
        ranked.append((images[:end].numpy().astype(np.uint32), right[:end].numpy()))
    images, right = (np.concatenate(parts) for parts in zip(*ranked, strict=True))
    lengths = np.array([len(rows) for rows, _ in ranked])
    positives = detection.positives(truth, count).astype(np.uint16)
    return {"ids": np.array(split.ids), "images": images, "right": right, "lengths": lengths, "positives": positives}


def initialize(cfg: DictConfig, model: FastRCNN, cache: ImageCache, rois: RoIs) -> dict:
    """Initialize `model` on images with their RoIs, and print what came of it.

    Returns:
        `report` of the initialization (None if it looks at no images) and its `seconds`.
    """
    if cfg.new_layers not in NEW_LAYERS:
        raise ValueError(f"new_layers={cfg.new_layers}: choose {' or '.join(NEW_LAYERS)}")
    images = None
    if "images" in cfg.init:
        each, foreground = cfg.batch.per_batch // cfg.batch.images, cfg.batch.foreground
        images = images_with_rois(
            cache,
            rois,
            images=cfg.init.images,
            each=each,
            size=cfg.evaluate.short,
            foreground=foreground,
            mean=cfg.mean,
            seed=cfg.seed,
        )
    start = timed(model, cfg.init, images, cfg.seed)
    if cfg.new_layers == "fast_rcnn":
        model.reset_outputs(cfg.seed)
    return start


def detect_all(cfg: DictConfig, model: FastRCNN, cache: ImageCache, proposals: Proposals) -> Detections:
    """Detections in all images, at one scale.

    Two images at a time, on half of the threads each: while the network sees one, boxes of the other are sorted out.
    """
    model.eval()
    options = {"nms_threshold": cfg.evaluate.nms_threshold, "limit": cfg.evaluate.limit}

    def detect(image: int) -> tuple[Tensor, Tensor, Tensor]:
        height, width = int(cache.heights[image]), int(cache.widths[image])
        scale = scale_of(height, width, cfg.evaluate.short, cfg.evaluate.longest)
        picture = scaled(cache, image, scale, cfg.mean)
        return detection.detect(model, picture, proposals[image], scale, height, width, **options)

    threads = torch.get_num_threads()
    workers = min(IMAGES_AT_A_TIME, threads)
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(threads // workers,))
    try:
        results = pool.map(detect, range(len(cache)))
        return Detections.of(list(tqdm(results, "detect", total=len(cache), unit=" images", **pace())))
    finally:
        pool.shutdown(cancel_futures=True)


def draw(split: Split, found: Detections, truth: list[detection.Truth], count: int) -> bytes:
    """The best detections in images evenly spread over the split, and the objects dashed; as JPEG.

    All above a score of 0.5 are drawn, or else one. Each class has a colour; objects are black on white.
    """
    columns = 4
    figure, axes = plt.subplots(-(-count // columns), columns, figsize=(12, 3 * -(-count // columns)), squeeze=False)
    figure.suptitle("detections with their scores; dashed: the objects that there are", fontsize=10)
    figure.tight_layout()
    for axis in axes.flat:
        axis.axis("off")
    for axis, image in zip(axes.flat, range(0, len(split.ids), max(1, len(split.ids) // count)), strict=False):
        axis.imshow(open_image(split.image_paths[image]))
        for box in truth[image].boxes.tolist():
            frame(axis, box, "white", linewidth=2.5)
            frame(axis, box, "black", linestyle="--", linewidth=1.2)
        rows = (found.images == image).nonzero().flatten()
        rows = rows[found.scores[rows].argsort(descending=True)]
        labels: list[Bbox] = []
        for row in rows[: max(1, int((found.scores[rows] > 0.5).sum()))].tolist():
            number = int(found.classes[row])
            colour, box = plt.get_cmap("tab20")(number % 20), found.boxes[row].tolist()
            frame(axis, box, colour, linewidth=2)
            label(axis, box, f"{split.classes[number]} {found.scores[row]:.2f}", colour, labels)
    return encoded(figure, "jpg", dpi=80)


def frame(axis: plt.Axes, box: list[float], colour, **style) -> None:
    """A box, both corners inside it."""
    x1, y1, x2, y2 = box
    axis.add_patch(plt.Rectangle((x1, y1), x2 - x1 + 1, y2 - y1 + 1, fill=False, edgecolor=colour, **style))


def label(axis: plt.Axes, box: list[float], words: str, colour, taken: list[Bbox]) -> None:
    """A label at the upper left corner of a box, moved down past those that are there; it joins them, in pixels."""
    background = {"facecolor": colour, "edgecolor": "none", "pad": 1, "alpha": 0.85}
    text = axis.text(box[0], box[1], words, color="black", fontsize=7, va="top", bbox=background)
    area = text.get_window_extent().padded(2)
    while any(area.overlaps(other) for other in taken):
        area = area.translated(0, -area.height)
    text.set_position(axis.transData.inverted().transform((area.x0 + 2, area.y1 - 2)))
    taken.append(area)


if __name__ == "__main__":
    main()
