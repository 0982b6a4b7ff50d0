"""How many labels does each precision keep where words win by almost nothing? And which part in bfloat16 loses them?

    python bench/hard_labels.py [--model san-vit-b16] [--words 171] [--draws 24] [--images 7] [--parts] [--curve]
                                [--json FILE]

The measure, chosen to be hard. Weights are filled by the rule of the recorded goldens, so proposals hardly differ. The
packaged scenes and photographs are resized to 640x640. Text rows are random unit vectors in the directions in which an
image's own proposals differ (`RandomWords` of bench/segment.py); of all draws, those in which at least 8 words win are
kept. Labels are compared at 160x160 points. An image is then cut in regions whose two best words nearly tie: a small
change of the embeddings turns whole regions, so what counts is the mean of many draws, not one of them.

`--parts` computes one part at a time in bfloat16 and all else exactly. Blocks are computed as at `speed="fastest"`; for
parts that no speed narrows, weights, inputs and outputs are rounded. `--curve` narrows more and more blocks instead,
from the last of CLIP's to all of both networks', and so shows what labels cost. Seconds are those of a processor for
the image half of an image, the median of the images'; use one thread.
"""

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import opensan
from opensan.assemble.labels import label_map
from opensan.assemble.scores import class_probabilities
from opensan.checkpoints.presets import PRESETS
from opensan.images import prepare
from opensan.model import SAN
from opensan.parity.golden import golden_model
from opensan.segmenters.image_half import narrow_blocks, narrow_matrices
from opensan.structures import ImageSizes, Proposals, TextClassifier
from segment import seconds

ASSETS = Path(opensan.__file__).parent / "assets"
MANY = 8
"""Words that win in a draw that is kept."""

Change = Callable[[SAN], None]


def images() -> list[Path]:
    return sorted([*(ASSETS / "scenes").glob("*.png"), *(ASSETS / "photographs").glob("*.jpg")])


def draws(embeddings: Tensor, words: int) -> Iterator[Tensor]:
    """Yield unit rows [K, D], in the directions in which embeddings [Q, D] differ, of one seed after the other."""
    directions = embeddings - embeddings.mean(dim=0)
    for seed in count():
        mixed = torch.randn(words, len(directions), generator=torch.Generator().manual_seed(seed))
        yield F.normalize(mixed @ directions, dim=-1)


def labels(model: SAN, proposals: Proposals, rows: Tensor, sizes: ImageSizes) -> Tensor:
    text = TextClassifier(rows, torch.arange(len(rows)), len(rows))
    return label_map(proposals.mask_logits[0], class_probabilities(model.classify(proposals, text))[0], sizes)


class HardMeasure:
    """Exact answers of a rule-filled model on the packaged images, and how many of them another precision keeps."""

    def __init__(self, model: SAN, words: int, draws_an_image: int, most_images: int) -> None:
        self.model = model
        self.pixels, self.cases = [], []
        for number, path in enumerate(images()[:most_images]):
            image = np.asarray(Image.open(path).convert("RGB").resize((640, 640), Image.Resampling.BICUBIC))
            prepared = prepare(image, model.config.image)
            self.pixels.append(torch.as_tensor(prepared.pixels).unsqueeze(0))
            exact, sizes = model.propose(self.pixels[-1]), replace(prepared.sizes, image=(160, 160))
            kept = 0
            for tried, rows in enumerate(draws(exact.mask_embeddings[0], words), start=1):
                found = labels(model, exact, rows, sizes)
                if len(found.unique()) >= MANY:
                    self.cases.append((number, rows, sizes, found))
                    kept += 1
                if kept == draws_an_image or tried == 20 * draws_an_image:
                    break

    def kept(self, change: Change) -> tuple[list[float], float]:
        """Shares of labels that stay when `change` was done to a copy of the model, one a draw; and its seconds."""
        changed = copy.deepcopy(self.model)
        change(changed)
        changed.propose(self.pixels[0])
        proposals, taken = [], []
        for pixels in self.pixels:
            taken.append(seconds(lambda pixels=pixels: proposals.append(changed.propose(pixels)), "processor"))
        shares = [
            float((labels(changed, proposals[image], rows, sizes) == exact).float().mean())
            for image, rows, sizes, exact in self.cases
        ]
        return shares, float(np.median(taken))


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


def round_parameters(*parameters: nn.Parameter) -> None:
    for parameter in parameters:
        parameter.data = rounded(parameter.data)


def round_linears(module: nn.Module) -> None:
    """Round weights, inputs and outputs of every Linear that is called in `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            round_parameters(layer.weight)
            layer.register_forward_pre_hook(lambda _, inputs: tuple(map(rounded, inputs)))
            layer.register_forward_hook(lambda _, inputs, output: rounded(output))


def patch_embeddings(model: SAN) -> None:
    round_parameters(model.clip.visual.conv1.weight, model.side_adapter.patch_embedding.weight)
    shallow, side = model.shallow_features, model.side_adapter.forward
    model.shallow_features = lambda pixels: shallow(rounded(pixels))
    model.side_adapter.forward = lambda pixels, *others: side(rounded(pixels), *others)


def head_outputs(*, masks: bool = False, bias: bool = False) -> Change:
    def change(model: SAN) -> None:
        model.side_adapter.head.register_forward_hook(
            lambda _, inputs, output: (
                rounded(output[0]) if masks else output[0],
                rounded(output[1]) if bias else output[1],
            )
        )

    return change


def last_norm_and_product(model: SAN) -> None:
    round_parameters(model.clip.visual.proj)
    model.clip.visual.ln_post.register_forward_hook(lambda _, inputs, output: rounded(output))


def words_product(model: SAN) -> None:
    classify = model.classify

    def narrow(proposals: Proposals, text: TextClassifier) -> Tensor:
        embeddings = rounded(proposals.mask_embeddings)
        return classify(replace(proposals, mask_embeddings=embeddings), replace(text, rows=rounded(text.rows)))

    model.classify = narrow


def blocks(which: Callable[[SAN], Sequence[nn.Module]]) -> Change:
    return lambda model: narrow_blocks(which(model), torch.bfloat16)


def parts(model: SAN) -> dict[str, Change]:
    """What may be narrowed, a part at a time."""
    first, half = model.config.recognition_layer, len(model.side_adapter.blocks) // 2
    third = first // 3
    clip = {
        f"CLIP's blocks {start + 1} to {stop}": blocks(lambda m, s=start, e=stop: m.clip.blocks()[s:e])
        for start, stop in ((0, third), (third, 2 * third), (2 * third, first))
    }
    return {
        "patch embeddings": patch_embeddings,
        **clip,
        "CLIP's last blocks, with SLS tokens": blocks(lambda m: m.clip.blocks()[first:]),
        "side network's blocks, first half": blocks(lambda m: m.side_adapter.blocks[:half]),
        "side network's blocks, second half": blocks(lambda m: m.side_adapter.blocks[half:]),
        "fusion": lambda m: round_linears(m.side_adapter.fusion),
        "heads": lambda m: round_linears(m.side_adapter.head),
        "attention bias": head_outputs(bias=True),
        "mask logits": head_outputs(masks=True),
        "embeddings' last norm and product": last_norm_and_product,
        "product with words": words_product,
    }


def speeds(model: SAN) -> dict[str, Change]:
    """Sets of blocks in bfloat16: first those of the two speeds."""
    shallow = model.config.recognition_layer
    return {
        "fast": lambda m: narrow_matrices(m, torch.bfloat16, "fast"),
        "fastest": lambda m: narrow_matrices(m, torch.bfloat16, "fastest"),
        "CLIP's shallow blocks": blocks(lambda m: m.clip.blocks()[:shallow]),
        "CLIP's blocks": blocks(lambda m: m.clip.blocks()),
        "side network's blocks": blocks(lambda m: m.side_adapter.blocks),
    }


def curve(model: SAN) -> dict[str, Change]:
    """Ever more blocks in bfloat16: CLIP's last ones, all of CLIP's, and of the side network's, the last first."""
    clip, side = len(model.clip.blocks()), len(model.side_adapter.blocks)
    steps: dict[str, Change] = {"nothing": lambda m: None}
    for last in (1, 2, clip // 4, clip // 2, 3 * clip // 4, clip):
        steps[f"CLIP's last {last} blocks"] = blocks(lambda m, n=last: m.clip.blocks()[-n:])
    for last in (side // 4, side // 2, side):
        steps[f"CLIP's, and the side network's last {last} blocks"] = blocks(
            lambda m, n=last: [*m.clip.blocks(), *m.side_adapter.blocks[-n:]]
        )
    return steps


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="san-vit-b16", choices=("san-vit-b16", "san-vit-l14"))
    parser.add_argument("--words", type=int, default=171)
    parser.add_argument("--draws", type=int, default=24, help="of each image")
    parser.add_argument("--images", type=int, default=7, help="so many of the packaged ones")
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--curve", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measure = HardMeasure(golden_model(PRESETS[options.model].config), options.words, options.draws, options.images)
    winning = np.mean([len(found.unique()) for *_, found in measure.cases])
    print(f"{options.model}, {options.words} words, {len(measure.cases)} draws; {winning:.1f} words win on average\n")
    print("| in bfloat16 | image half, s | labels kept, mean | half of the draws keep | worst draw |")
    print("|---|---|---|---|---|", flush=True)
    results = {}
    changes = {**speeds(measure.model), **(parts(measure.model) if options.parts else {})}
    for name, change in (curve(measure.model) if options.curve else changes).items():
        kept, taken = measure.kept(change)
        results[name] = {"kept": kept, "seconds": taken}
        print(
            f"| {name} | {taken:.3f} | {np.mean(kept):.2%} | {np.median(kept):.2%} | {np.min(kept):.2%} |", flush=True
        )
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "words": options.words, "kept": results}, indent=2))


if __name__ == "__main__":
    main()
