"""Sentences about lab scenes, as people might write them, for a CLIP to learn from.

Every word of the lab (base and novel) occurs in captions, and so does every word of the prompt templates, so that
a trained text tower has seen all that it will be asked.
"""

from collections.abc import Sequence

import numpy as np

from opensan.lab.grounds import GROUNDS
from opensan.lab.scenes import COLOURS, SHAPES, TEXTURES, SceneRegion
from opensan.vocabulary import TEMPLATE_SETS

_OPENINGS = ("a photo of {}.", "a picture of {}.", "there is {} in the scene.", "this is a photo of {}", "{}", "{}.")


def caption(regions: Sequence[SceneRegion], rng: np.random.Generator, *, bare: float = 0.08) -> str:
    """A sentence that is true of a picture in which `regions` are seen: objects, then perhaps the ground.

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
    """A sentence that is false of the picture by one word: what keeps attributes bound to their objects."""
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
    """All texts whose tokens the captions use."""
    return [*COLOURS, *SHAPES, *TEXTURES, *GROUNDS, *_OPENINGS, *TEMPLATE_SETS["vild"], "a, and on a"]


def _opening(rng: np.random.Generator) -> str:
    return _OPENINGS[int(rng.integers(len(_OPENINGS)))]


def _template(rng: np.random.Generator) -> str:
    """What a segmenter will ask with, the bare name put in."""
    return TEMPLATE_SETS["vild"][int(rng.integers(len(TEMPLATE_SETS["vild"])))]


def _name(what: SceneRegion, rng: np.random.Generator, bare: float) -> str:
    """Mostly with its colour; with its texture more often than not; sometimes the bare shape."""
    if rng.random() < bare:
        return what.shape
    return what.full_name if rng.random() < 0.6 else what.name


def _with_one_word_changed(what: SceneRegion, rng: np.random.Generator) -> SceneRegion:
    if what.ground:
        return SceneRegion(ground=_other(GROUNDS, what.ground, rng))
    if rng.random() < 0.35:  # shapes are what is hard to learn
        return SceneRegion(texture=what.texture, colour=_other(tuple(COLOURS), what.colour, rng), shape=what.shape)
    return SceneRegion(texture=what.texture, colour=what.colour, shape=_other(SHAPES, what.shape, rng))


def _other(words: Sequence[str], word: str, rng: np.random.Generator) -> str:
    others = [other for other in words if other != word]
    return others[int(rng.integers(len(others)))]
