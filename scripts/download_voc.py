"""Download PASCAL VOC 2007 (about 0.9 GB, as much again unpacked): `python scripts/download_voc.py`."""

import argparse
import os
import sys

from experiments.data.download import download


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Download PASCAL VOC 2007 (trainval and test, about 0.9 GB, as much again unpacked) from "
        "the first mirror that has it, check it and unpack it. After an interruption, run it again to go on.",
    )
    parser.add_argument(
        "--root",
        default=os.environ.get("VOC_ROOT", "data/VOCdevkit"),
        help="download to ROOT, unpack to ROOT/VOC2007 (default: $VOC_ROOT, or else data/VOCdevkit)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = parser.parse_args()
    try:
        devkit = download(arguments.root, progress=not arguments.quiet)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"VOC 2007 is in {devkit}; any archive VOC*.tar beside it can be deleted")


if __name__ == "__main__":
    main()
