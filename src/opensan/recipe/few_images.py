"""Choose the settings of a fine-tuning on few images, where the recipe leaves them out.

The official recipe's settings are those of 118,000 images. With a hundred or fewer, its crops may show a small model
another scale than it labels at, its first steps are too bold, and words without labels are forgotten. See
docs/results.md.
"""

from collections.abc import Sequence
from typing import Any

from opensan.config import ImageConfig
from opensan.recipe.config import RecipeConfig

MOST_IMAGES = 100
"""A recipe that starts from a model, with so many images or fewer, gets these settings."""

SETTINGS: dict[str, Any] = {
    "start.keep": 0.7,
    "loop.steps": 60,
    "loop.batch_size": 2,
    "loop.learning_rate": 3e-4,
}
"""Values of settings, by their keys in a recipe."""

WARMUP = 10
"""Steps of warm-up; of a shorter training, a sixth."""

SIZES = (0.92, 1.0, 1.08)
"""Short sides of the training images, as shares of the short side that the model labels at."""


def with_few_images(recipe: RecipeConfig, images: int, image: ImageConfig) -> tuple[RecipeConfig, str | None]:
    """Return the recipe with the settings for few images in place of what it leaves out, and the line that says so.

    None, and the recipe as it is, for more images, for a training that does not start from a model's weights or learns
    from images without labels, and where the recipe gives all of these settings. `image` are the model's own sizes.
    """
    spread = recipe.loop.parallel != "ddp"
    if recipe.start.weights != "model" or images > MOST_IMAGES or recipe.unlabelled or spread:
        return recipe, None
    side = max(image.size_divisor, image.short_side // image.size_divisor * image.size_divisor)
    steps = recipe.loop.steps if _is_given(recipe, ("loop", "steps")) else SETTINGS["loop.steps"]
    wanted = SETTINGS | {
        "loop.warmup": min(WARMUP, steps // 6),
        "augment.crop": (side, side),
        "augment.short_sides": tuple(round(share * image.short_side) for share in SIZES),
    }
    missing = {key: value for key, value in wanted.items() if not _is_given(recipe, key.split("."))}
    if not missing:
        return recipe, None
    for key, value in missing.items():
        recipe = _put(recipe, key.split("."), value)
    shown = "; ".join(f"{key} {_shown(value)}" for key, value in missing.items())
    return recipe, f"{images} training images, few: {shown}; to change one, set it in the recipe (docs/training.md)"


def _is_given(config: Any, key: Sequence[str]) -> bool:
    """Return whether a recipe's file or overrides give a setting."""
    first, *rest = key
    return first in config.model_fields_set and (not rest or _is_given(getattr(config, first), rest))


def _put(config: Any, key: Sequence[str], value: Any) -> Any:
    """Return a configuration with one setting changed."""
    first, *rest = key
    return config.model_copy(update={first: _put(getattr(config, first), rest, value) if rest else value})


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
