"""Load models from a preset's name, a folder, a file, or a hub."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from opensan.checkpoints.native import WEIGHTS_NAME, load_folder
from opensan.checkpoints.pickles import load_official
from opensan.checkpoints.presets import PRESETS
from opensan.config import CONFIG_NAME, TOKENIZER_NAME, ModelConfig, read_config
from opensan.errors import HubError, UserError, did_you_mean, reason
from opensan.files import ASSETS, check_regular
from opensan.model import SAN, build_san

OFFICIAL_REPOSITORY = "Mendel192/san"
BUNDLED = {name: ASSETS / "models" / name for name in ("photo", "tiny")}
"""Models that come with the package, by name."""

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
"""A repository "owner/name", or "owner/name@REVISION": a commit, branch or tag."""


def load_model(source: str | os.PathLike) -> SAN:
    """Load a model in float32 on the CPU, in evaluation mode.

    Args:
        source: "san-vit-b16", "san-vit-l14", "photo", "tiny"; a checkpoint folder; a .safetensors beside its
            config.json; an official .pth; or a hub id "owner/name", with "@REVISION" at a commit, branch or tag.

    Raises:
        UserError: one line with the fault of the file, or the possible values of `source`.
        HubError: the hub did not provide the file; names the attempts and what works without a network.
    """
    path = Path(source).expanduser()
    if path.exists():
        return _load_path(path)
    name = os.fspath(source)
    if name in BUNDLED:
        return load_folder(BUNDLED[name])
    if preset := PRESETS.get(name):
        if preset.official is None:
            raise UserError(
                f"no SAN around the encoder {name} was released: train one (start.model={name} in a recipe), "
                "and give the folder that the training writes"
            )
        return load_official(download(name, OFFICIAL_REPOSITORY, preset.official.file), preset.config)
    if (hub_id := HUB_ID.fullmatch(name)) and not name.endswith((".pth", ".safetensors")):
        return _load_from_hub(name, hub_id["repository"], hub_id["revision"])
    known = [*BUNDLED, *(name for name, preset in PRESETS.items() if preset.official)]
    raise UserError(
        f"no model {name!r}: it is no file or folder here; known names are {', '.join(known)}, or a hub id like "
        f"owner/name{did_you_mean(name, known)}"
    )


def _load_from_hub(name: str, repository: str, revision: str | None) -> SAN:
    """Load a model in this package's form from a repository; all files are of one commit."""
    config = download(name, repository, CONFIG_NAME, INSTEAD_OF_A_MODEL, revision)
    commit = config.parent.name  # as the hub's cache names the folders
    if read_config(config).clip.text.own_tokenizer:
        download(name, repository, TOKENIZER_NAME, INSTEAD_OF_A_MODEL, commit)
    return load_folder(config.parent, download(name, repository, WEIGHTS_NAME, INSTEAD_OF_A_MODEL, commit))


def optional_file(source: str | os.PathLike[str], filename: str) -> Path | None:
    """Return a file that may lie beside a hub's weights; None if there is none, or `source` is no hub id."""
    name = os.fspath(source)
    hub_id = HUB_ID.fullmatch(name)
    if hub_id is None or name.endswith((".pth", ".safetensors")) or Path(name).exists():
        return None
    try:
        return download(name, hub_id["repository"], filename, INSTEAD_OF_A_MODEL, hub_id["revision"])
    except UserError:  # there is none; or no hub, which loading the model reports
        return None


def model_on_disk() -> str:
    """Name the best model for photographs that needs no download: the official one in the hub's cache, or `photo`."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("san-vit-b16", "san-vit-l14"):
        official = PRESETS[name].official
        if official and isinstance(try_to_load_from_cache(OFFICIAL_REPOSITORY, official.file), str):
            return name
    return "photo"


def preset_config(name: str) -> ModelConfig:
    """Return the configuration of a preset. Raises UserError naming the known ones."""
    if name in BUNDLED:
        return read_config(BUNDLED[name] / CONFIG_NAME)
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}: known are {', '.join([*BUNDLED, *PRESETS])}")
    return PRESETS[name].config


def random_model(name: str, seed: int) -> SAN:
    """Build a preset's model with random weights, for uses that do not depend on them. Raises as `preset_config`."""
    config = preset_config(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_san(config)


def _load_path(path: Path) -> SAN:
    if path.is_dir():
        return load_folder(path)
    check_regular(path)
    if path.suffix == ".safetensors":
        return load_folder(path.parent, path)
    if path.suffix in (".pth", ".pt", ".bin"):
        return load_official(path)
    raise UserError(f"{path}: not a model (a folder with {CONFIG_NAME}, a .safetensors, or an official .pth)")


INSTEAD_OF_A_MODEL = (
    "download the file elsewhere and give its path as the model (--model PATH), "
    "or use --model photo or --model tiny, which need no network"
)


def download(
    model: str, repository: str, filename: str, advice: str = INSTEAD_OF_A_MODEL, revision: str | None = None
) -> Path:
    """Return a file from the cache, or download it. Raises HubError with the attempts and a remedy."""
    from huggingface_hub import (
        constants,
        get_hf_file_metadata,
        hf_hub_download,
        hf_hub_url,
        try_to_load_from_cache,
    )
    from huggingface_hub.errors import HFValidationError

    try:
        # hf_hub_download retries a silent hub for minutes, so one short request tests first whether it answers.
        try:
            get_hf_file_metadata(hf_hub_url(repository, filename, revision=revision))
        except HFValidationError:
            raise
        except Exception:
            if isinstance(cached := try_to_load_from_cache(repository, filename, revision=revision), str):
                return Path(cached)
            raise
        with quiet_hub():
            return Path(hf_hub_download(repository, filename, revision=revision))
    except HFValidationError as error:
        raise UserError(f"{repository!r} is not a hub id ({reason(error)})") from None
    except Exception as error:  # the transport library and its errors differ between huggingface_hub's releases
        raise HubError(
            f"{model}: tried {constants.ENDPOINT}/{repository} for {filename} and the cache {constants.HF_HUB_CACHE}: "
            f"{_reason(error)}; {advice}"
        ) from None


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Keep huggingface_hub from writing to a log: it tells of every try, and draws its bars where there is no terminal.

    On a terminal its bars stay: a model may take minutes.
    """
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

    before = logging.get_verbosity()
    hide = not sys.stderr.isatty() and not are_progress_bars_disabled()
    logging.set_verbosity_error()
    if hide:
        disable_progress_bars()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if hide:
            enable_progress_bars()


def _reason(error: Exception) -> str:
    """Return the reason why the hub did not provide a file, in a few words."""
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, GatedRepoError):
        return "the repository is gated: ask for access on its page, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has no such repository, or it is private"
    if isinstance(error, RevisionNotFoundError):
        return "the repository has no such commit, branch or tag"
    if isinstance(error, EntryNotFoundError):
        return "the repository has no such file"
    if isinstance(error, HfHubHTTPError):
        return f"the hub answered {error.response.status_code}"
    return f"the hub cannot be reached or broke off ({reason(error)})"
