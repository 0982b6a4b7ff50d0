"""Read and write weights."""

from opensan.checkpoints.hub import load_model, preset_config, random_model
from opensan.checkpoints.native import build_empty, fill, load_folder, save_folder
from opensan.checkpoints.pickles import load_official

__all__ = [
    "build_empty",
    "fill",
    "load_folder",
    "load_model",
    "load_official",
    "preset_config",
    "random_model",
    "save_folder",
]
