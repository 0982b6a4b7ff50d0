"""Upload a model to a hub: safetensors, JSON, and a model card, in one commit."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from opensan import __version__
from opensan.assemble.calibration import FILE_NAME as CALIBRATION_NAME
from opensan.assemble.calibration import Calibration
from opensan.checkpoints.card import MARK, model_card, read_evaluation, read_training
from opensan.checkpoints.hub import HUB_ID, load_model, quiet_hub
from opensan.checkpoints.native import WEIGHTS_NAME, load_folder, save_folder
from opensan.config import CONFIG_NAME, TOKENIZER_NAME
from opensan.errors import HubError, UserError, reason, short
from opensan.model import SAN
from opensan.model.identity import model_identity

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_SECONDS = 10
"""Longest time for the hub's first answer; later requests carry files, and have no limit."""


@dataclass(frozen=True)
class Pushed:
    """A model on a hub."""

    page: str
    """Address of the repository."""
    commit: str
    """The commit that holds these files: `opensan.load(f"owner/name@{commit}")` is this model for good."""


def push(
    source: str | os.PathLike[str],
    repository: str,
    *,
    private: bool = False,
    license: str | None = None,
    evaluations: Sequence[str | os.PathLike[str]] = (),
    token: str | None = None,
    identity: str | None = None,
) -> Pushed:
    """Upload a model to the Hugging Face hub, or to the hub that HF_ENDPOINT names; make the repository if need be.

    The card (README.md) is the folder's own if there is one; else it is written from the training's record. A card on
    the hub that somebody has written or changed by hand stays.

    Args:
        source: a model folder, as a training writes it, or any other model that `load_model` takes.
        repository: "owner/name".
        private: make the repository private, if it must be made.
        license: the hub's name of the licence ("mit", "apache-2.0"), for the card.
        evaluations: folders of results of `opensan eval`, one a data set, for the card.
        token: None: the one of HF_TOKEN or `hf auth login`.
        identity: refuse to push unless the model is this one; for whoever loaded it before.

    Raises:
        UserError: no model, a wrong name or no token; one line.
        HubError: the hub can't be reached, or refuses; one line. Nothing is half there: it is one commit.
    """
    _check_name(repository)
    token = token or _own_token()
    with _model_folder(source) as (folder, model):
        if identity is not None and identity != str(model_identity(model)):
            raise UserError(f"{os.fspath(source)}: holds another model now than the one that was loaded, {identity}")
        measured = [read_evaluation(Path(each), model) for each in evaluations]
        files = {name: folder / name for name in (CONFIG_NAME, WEIGHTS_NAME)}
        if model.config.clip.text.own_tokenizer:
            files[TOKENIZER_NAME] = folder / TOKENIZER_NAME
        if (folder / CALIBRATION_NAME).exists():
            files[CALIBRATION_NAME] = _own_calibration(folder / CALIBRATION_NAME, model)
        card: Path | bytes = folder / "README.md"
        if not (folder / "README.md").exists():
            card = model_card(repository, model, read_training(folder, model), measured, license).encode()
        try:
            with quiet_hub():
                return _commit(repository, files, card, f"Upload {model.config.name}", private, token)
        except UserError:
            raise
        except Exception as error:  # the transport library and its errors differ between huggingface_hub's releases
            raise HubError(f"{repository}: not uploaded: {_why(error).replace(token, '***')}") from None


def _check_name(repository: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    match = HUB_ID.fullmatch(repository)
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise UserError(f"{short(repository)} is not a hub id ({reason(error)})") from None
    if match is None or match["revision"]:
        raise UserError(f"{short(repository)} is not a hub id: it has the form owner/name, such as lab/street")


def _own_token() -> str:
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        raise UserError("a hub takes models from users it knows: log in with `hf auth login`, or set HF_TOKEN")
    return token


@contextmanager
def _model_folder(source: str | os.PathLike[str]) -> Iterator[tuple[Path, SAN]]:
    """Yield a folder with the model's files, and the model, which is loaded to see that it can be."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        if not (folder / WEIGHTS_NAME).exists() and (folder / "model" / WEIGHTS_NAME).exists():
            raise UserError(f"{folder}: is the folder of a training; its model is {folder / 'model'}")
        yield folder, load_folder(folder)
        return
    model = load_model(source)
    with TemporaryDirectory(prefix="opensan-") as temporary:
        yield save_folder(model, temporary), model


def _own_calibration(path: Path, model: SAN) -> Path:
    """Return the path of the model's calibration. Raises UserError if it is another model's."""
    if Calibration.load(path).model != str(model_identity(model)):
        raise UserError(f"{path}: is the calibration of another model: fit it again, or remove it")
    return path


def _commit(
    repository: str, files: dict[str, Path], card: Path | bytes, message: str, private: bool, token: str
) -> Pushed:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    api = HfApi(token=token, library_name="opensan", library_version=__version__)
    there: set[str] = set()
    try:
        info = api.model_info(repository, timeout=_SECONDS)
        there = {file.rfilename for file in info.siblings or []}
        if private and not info.private:
            raise UserError(f"{repository}: is there already, and everybody can read it: choose another name")
    except RepositoryNotFoundError:
        api.create_repo(repository, private=private, exist_ok=True)
    additions = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    if not isinstance(card, bytes):
        additions.append(CommitOperationAdd("README.md", str(card)))
    elif "README.md" not in there or MARK in _read_card(api, repository):
        additions.append(CommitOperationAdd("README.md", card))
    commit = api.create_commit(repository, additions, commit_message=f"{message} by opensan {__version__}")
    return Pushed(f"{api.endpoint}/{repository}", commit.oid)


def _read_card(api: "HfApi", repository: str) -> str:
    return Path(api.hf_hub_download(repository, "README.md")).read_text(encoding="utf-8", errors="replace")


def _why(error: BaseException) -> str:
    """Return the reason why the hub did not take the files."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # "Error while uploading"
        error = error.__cause__
    if not isinstance(error, HfHubHTTPError) or error.response is None:
        return (
            f"{constants.ENDPOINT} cannot be reached or broke off ({reason(error)}); the same command again goes on, "
            "and sends no finished file twice"
        )
    status = error.response.status_code
    if status == 401:
        return f"{constants.ENDPOINT} does not know the token: log in with `hf auth login`, or set HF_TOKEN"
    if status == 403:
        return (
            f"{constants.ENDPOINT} refuses (403): the name is somebody else's, or your token may only read; choose "
            "YOUR-NAME/MODEL, and a token that may write"
        )
    said = f" ({reason(Exception(error.server_message))})" if error.server_message else ""
    return f"{constants.ENDPOINT} answered {status}{said}"
