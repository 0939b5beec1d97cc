"""Whatever a record holds, tables and figures are made, or one line names the file."""

import copy
import json
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.engine.records import find_records
from scripts import make_figures, make_tables

RESULTS = make_tables.RESULTS
SEED = json.loads(next(iter(sorted((RESULTS / "runs" / "voc_cls").rglob("record.json")))).read_text())
METRICS = {
    "map_step": 0.3,
    "map_voc11": 0.3,
    "map_area": 0.3,
    "coco_ap": 0.1,
    "accuracy": 0.5,
    "top1": 0.5,
    "top5": 0.9,
}
VALID = {key: value for key, value in SEED.items() if key not in ("per_class", "times", "change_rate")}
VALID |= {"metrics": METRICS, "epoch": 8.0, "validation": "validation.csv"}
VALID |= {"converges": {"rule": "a", "holds": True}, "leaves_flat_part": {"rule": "b", "iteration": 4}}
JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([10**30, "kmeans", "\ud800", "|$_"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def places(tree, path=()):
    """The keys of everything in nested dictionaries."""
    for key, value in tree.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@st.composite
def records(draw):
    """The bytes of a record in which a few things were removed, exchanged or added, or which was cut."""
    record = copy.deepcopy(VALID)
    record["experiment"] = draw(st.sampled_from(["voc_cls", "voc_det", "pretrain", "imagenet", "small_images"]))
    for *parents, leaf in draw(st.lists(st.sampled_from([*places(VALID)]), max_size=4)):
        inner = record
        for parent in parents:
            inner = inner.get(parent) if isinstance(inner, dict) else None
        if isinstance(inner, dict):
            if draw(st.booleans()):
                inner[leaf] = draw(JUNK)
            else:
                inner.pop(leaf, None)
            if draw(st.booleans()):
                inner[draw(st.text(max_size=5))] = draw(JUNK)
    content = json.dumps(record).encode()
    return content[: draw(st.integers(0, len(content)))] if draw(st.integers(0, 9)) == 0 else content


def error_of(make, paths):
    """What `make` says of a file; any other error is raised."""
    try:
        for content in make(paths).values():
            assert isinstance(content, bytes) or content.encode()
    except (ValueError, OSError) as error:
        return str(error)
    return ""


@pytest.mark.filterwarnings("ignore:Glyph", "ignore:More than 20 figures")  # names at random, errors in drawings
@pytest.mark.parametrize("examples", [50, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_record_is_read_or_named(examples):
    @settings(max_examples=examples, suppress_health_check=[*HealthCheck], database=None)
    @given(records(), st.booleans())
    def look(content, beside_another):
        with tempfile.TemporaryDirectory() as name:
            path = Path(name) / "a" / "record.json"
            path.parent.mkdir()
            path.write_bytes(content)
            for curve in ("curve.csv", "validation.csv"):
                path.with_name(curve).write_text("step,loss\n1,2.0\n2,1.0\n")
            if beside_another:
                path.with_name("record-b.json").write_text(json.dumps(VALID))
            paths = find_records([Path(name)])
            for make in (partial(make_tables.make_tables, paper=RESULTS / "paper"), make_figures.make_figures):
                if error := error_of(make, paths):
                    assert str(path.parent) in error
                    assert "\n" not in error

    look()
