"""Captions of lab scenes, from which a CLIP learns.

Every word of the lab (base and novel) occurs in captions, and so does every word of the prompt templates, so that
a trained text tower has seen all words that a user may give it.
"""

from collections.abc import Sequence

import numpy as np

from opensan.lab.grounds import GROUNDS
from opensan.lab.scenes import COLOURS, SHAPES, TEXTURES, SceneRegion
from opensan.vocabulary import TEMPLATE_SETS

_OPENINGS = ("a photo of {}.", "a picture of {}.", "there is {} in the scene.", "this is a photo of {}", "{}", "{}.")


def caption(regions: Sequence[SceneRegion], rng: np.random.Generator, *, bare: float = 0.08) -> str:
    """Return a sentence that is true of an image in which `regions` are visible: objects, then perhaps the ground.

    `bare` is the share of objects that are named by their shape alone.
    """
    objects = [region for region in regions if not region.ground]
    grounds = [region.ground for region in regions if region.ground]
    if not objects:
        return (_template(rng) if rng.random() < 0.5 else _opening(rng)).format(" and ".join(grounds))
    if len(objects) == 1 and rng.random() < 0.3:
        return _template(rng).format(_name(objects[0], rng, bare))
    named = [f"a {_name(objects[index], rng, bare)}" for index in rng.permutation(len(objects))]
    listed = " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)
    if grounds and rng.random() < 0.4:
        listed += f" on {' and '.join(grounds)}"
    return _opening(rng).format(listed)


def wrong_caption(regions: Sequence[SceneRegion], rng: np.random.Generator) -> str:
    """Return a caption in which one word is wrong: such negatives teach CLIP which attribute belongs to an object."""
    regions = list(regions)
    true = {region.name for region in regions}
    # A sentence about objects need not say the ground, so it is an object that is misnamed, if there is one.
    sayable = [index for index, region in enumerate(regions) if not region.ground] or range(len(regions))
    index = sayable[int(rng.integers(len(sayable)))]
    changed = regions[index]
    while changed.name in true:
        changed = _with_one_word_changed(regions[index], rng)
    regions[index] = changed
    return caption(regions, rng, bare=0.0)


def lexicon() -> list[str]:
    """Return all texts whose tokens the captions use."""
    return [*COLOURS, *SHAPES, *TEXTURES, *GROUNDS, *_OPENINGS, *TEMPLATE_SETS["vild"], "a, and on a"]


def _opening(rng: np.random.Generator) -> str:
    return _OPENINGS[int(rng.integers(len(_OPENINGS)))]


def _template(rng: np.random.Generator) -> str:
    """Return a random template, as a segmenter uses it, with {} for the bare name."""
    return TEMPLATE_SETS["vild"][int(rng.integers(len(TEMPLATE_SETS["vild"])))]


def _name(region: SceneRegion, rng: np.random.Generator, bare: float) -> str:
    """Name `region`: mostly with its colour, often with its texture too, sometimes by its shape alone."""
    if rng.random() < bare:
        return region.shape
    return region.full_name if rng.random() < 0.6 else region.name


def _with_one_word_changed(region: SceneRegion, rng: np.random.Generator) -> SceneRegion:
    if region.ground:
        return SceneRegion(ground=_other(GROUNDS, region.ground, rng))
    if rng.random() < 0.35:  # less often than the shape, because shapes are harder to learn
        colour = _other(tuple(COLOURS), region.colour, rng)
        return SceneRegion(texture=region.texture, colour=colour, shape=region.shape)
    return SceneRegion(texture=region.texture, colour=region.colour, shape=_other(SHAPES, region.shape, rng))


def _other(words: Sequence[str], word: str, rng: np.random.Generator) -> str:
    others = [other for other in words if other != word]
    return others[int(rng.integers(len(others)))]
