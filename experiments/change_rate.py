"""Draw how fast each layer of a network learns under various initializations (Krähenbühl et al. 2016, Figure 1).

    python experiments/change_rate.py

Writes figure1.png, its values as figure1.csv and what they were measured with as figure1.json. Every setting is in
configs/change_rate.yaml.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from omegaconf import DictConfig
from tqdm import tqdm

import initializers
from experiments import files
from experiments.data.prepare import prepare
from experiments.data.voc import open_split
from experiments.engine import run
from experiments.engine.command import command
from experiments.engine.figures import MARKERS, encoded, style_of
from experiments.engine.initialization import choose, set_weights
from experiments.networks import make_network


@command("change_rate")
def main(cfg: DictConfig) -> None:
    record = Path(cfg.output) / "figure1.json"
    if cfg.dry:
        run.announce(cfg, record, run.is_of(record, cfg))
        return
    device = run.set_up(cfg.device, cfg.threads, cfg.tf32)
    prepare(cfg.data)
    images, others = (images_of(cfg, split, part).to(device) for split, part in (("train", "init"), ("val", "rates")))

    rates: dict[str, initializers.Rates] = {}
    for line, init in tqdm(cfg.lines.items(), desc="initializations", disable=None):
        model = make_network(cfg.model, cfg.model.get("num_outputs", 1000)).to(device)
        if init._target_ == "initializers.caffe" and not hasattr(model, "caffe_fillers"):
            print(f"not drawn: {line}, as {type(model).__name__} states no reference initialization")
            continue
        set_weights(model, init, images, cfg.seed)
        rates[line] = initializers.change_rate(model, others, seed=cfg.seed)

    rows = [
        {"line": line, "layer": layer, "mean": found.mean[layer], "cv": found.cv[layer], "spread": found.spread}
        for line, found in rates.items()
        for layer in found.layers
    ]
    table = pd.DataFrame(rows)
    folder = Path(cfg.output)
    with run.open_folder(folder):
        files.write_bytes(folder / "figure1.png", draw(rates))
        files.write_text(folder / "figure1.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        spreads = {line: found.spread for line, found in rates.items()}
        run.write_record(record, cfg, device, data=cfg.data.name, spread=spreads)
    print(table.pivot_table(index="line", columns="layer", values="mean", sort=False).to_string(float_format="%.4g"))
    print("\nspread: " + ", ".join(f"{line} {spread:.4g}" for line, spread in spreads.items()))
    print(folder / "figure1.png")


def images_of(cfg: DictConfig, split: str, part: str):
    """The images of one split that a part of the experiment looks at."""
    _, cache = open_split(cfg.data, cfg.data[split], "cpu")
    return choose(cfg, part, cache, range(len(cache)))


def draw(rates: dict[str, initializers.Rates]) -> bytes:
    """The figure, as PNG."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for line, found in rates.items():
        found.plot(axes, label=line)
    for axis in axes:
        axis.get_legend().remove()
        for number, drawn in enumerate(axis.lines):
            drawn.set(**style_of(number), marker=MARKERS[number % len(MARKERS)], markersize=4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return encoded(figure, "png", dpi=110)


if __name__ == "__main__":
    main()
