"""Train and test a network on PASCAL VOC 2007 classification (Krähenbühl et al. 2016, Table 2).

    python experiments/voc_cls.py init=kmeans

Every setting is in configs/voc_cls.yaml and the groups beside it. A run that was killed goes on when the same
command is given again. The last line printed is the path of the result record.
"""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import nn

import initializers
from experiments import files
from experiments.data.images import ImageCache, describe
from experiments.data.prepare import prepare
from experiments.data.voc import Split, open_split, read_split, set_outputs
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.initialization import PRETRAINED, absent_weights, choose, once, timed
from experiments.engine.losses import multilabel_loss
from experiments.engine.metrics import average_precision
from experiments.engine.trainer import CropBatches, predict, train_as
from experiments.networks import make_network

PAPER = Path(__file__).resolve().parents[1] / "results" / "paper"


@command("voc_cls")
def main(cfg: DictConfig) -> None:
    set_outputs(cfg)
    run.execute(cfg, train_and_test, left_out=left_out(cfg) if cfg.published else "")


def train_and_test(cfg: DictConfig, folder: Path, device: torch.device) -> None:
    """The run: its record, and what of it is printed."""
    prepare(cfg.data)
    training, training_cache = open_split(cfg.data, cfg.data.train, device)
    test, test_cache = open_split(cfg.data, cfg.data.test, device)
    crops = {"mean": tuple(cfg.data.mean), **cfg.crop}
    model = make_network(cfg.model, len(training.classes)).to(device)

    start = once(folder, lambda: initialize(cfg, model, training_cache, training))
    torch.manual_seed(cfg.seed)  # of dropout
    batches = CropBatches(training_cache, training.labels, **crops, batch_size=cfg.train.batch_size, seed=cfg.seed)
    train_seconds = train_as(cfg, model, multilabel_loss, batches, folder)

    began = time.perf_counter()
    scores = predict(model, test_cache, **crops, **cfg.evaluate, seed=cfg.seed)
    precision = average_precision(scores, test.labels)
    times = {"init": start["seconds"], "train": train_seconds, "evaluate": time.perf_counter() - began}

    metrics = {name: precision[name] for name in ("map_step", "map_voc11")}
    per_class = pd.DataFrame({kind: precision[kind] for kind in ("step", "voc11")}, index=test.classes)
    record = run.record_of(folder, cfg)[0]
    arrays = {"ids": np.array(test.ids), "scores": scores.numpy(), "labels": test.labels.numpy()}
    files.write_arrays(run.scores_of(record), arrays)
    run.write_record(
        record,
        cfg,
        device,
        data=describe(cfg.data.name, training_cache, test_cache),
        metrics=metrics,
        per_class=per_class.astype(object).where(per_class.notna(), None).T.to_dict(),
        times=times,
        curve="curve.csv",
        scores=run.scores_of(record).name,
        init_report=start["report"],
        change_rate=start["change_rate"],
    )
    per_class.loc["mean"] = list(metrics.values())
    print(f"\naverage precision on {cfg.data.test} of {cfg.data.name}, percent")
    print((100 * per_class).to_string(float_format="%.1f"))
    print(run.spent(times))


def initialize(cfg: DictConfig, model: nn.Module, cache: ImageCache, training: Split) -> dict:
    """Initialize `model`, measure its change rates on other images, and print both.

    Returns:
        `report` of the initialization (None if it looks at no images), its `seconds`, and `change_rate`.
    """
    images = choose(cfg, "init", cache, range(len(cache))) if "images" in cfg.init else None
    start = timed(model, cfg.init, images, cfg.seed)

    position = {image_id: index for index, image_id in enumerate(training.ids)}
    ids = read_split(cfg.data.root, cfg.data.val, training.classes).ids
    if unknown := [image_id for image_id in ids if image_id not in position]:
        raise ValueError(
            f"image {unknown[0]} of data.val={cfg.data.val} is not in data.train={cfg.data.train}: change rates are "
            "measured on training images; set data.val to a part of data.train, or to the same list"
        )
    val = [position[image_id] for image_id in ids]
    rates = initializers.change_rate(model, choose(cfg, "rates", cache, val), seed=cfg.seed)
    table = pd.DataFrame({"change rate": rates.mean, "coefficient of variation": rates.cv})
    print(f"\nchange rates on {cfg.rates.images} images of {cfg.data.val}, spread {rates.spread:.4g}")
    print(table.to_string(float_format="%.4g"), flush=True)
    return start | {"change_rate": {"mean": rates.mean, "cv": rates.cv, "spread": rates.spread}}


def left_out(cfg: DictConfig) -> str:
    """Why a cell of the paper's table `cfg.published` is left out: empty there, or without its weights; else ''."""
    if cfg.init._target_ == PRETRAINED:
        return absent_weights(cfg.init)
    table = pd.read_csv(PAPER / f"{cfg.published}.csv")
    same = (table["init"] == run.init_key(cfg.init)) & (table["optimizer"] == cfg.optimizer.name)
    found = table.loc[same & (table["batch_norm"] == cfg.model.batch_norm), "classification"].notna().any()
    return "" if found else f"{cfg.published} of the paper leaves this cell empty; published=null runs it too"


if __name__ == "__main__":
    main()
