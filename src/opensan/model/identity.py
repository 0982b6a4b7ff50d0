"""Identify a model by a hash of all its numbers and its configuration, image half and text half apart.

sha256 takes every byte once: 0.35 s of one processor for SAN B/16 and 1 s for L/14, which is less than reading them
from a disk, and it is spread over threads. So it is computed when a segmenter is built, and not stored: nothing can
be out of date.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from opensan.model.mapped import Forget, keep
from opensan.model.san import SAN
from opensan.structures import Identity

_THREADS = min(8, os.cpu_count() or 1)


def model_identity(model: SAN, forget: Forget = keep) -> Identity:
    """Identify `model` as it is now. Equal numbers give equal hashes on any device and in any precision.

    `forget` is called with every tensor that has been read.
    """
    return Identity(model.config.name, image_identity(model, forget), text_identity(model, forget))


def image_identity(model: SAN, forget: Forget = keep) -> str:
    """Hash all parts that encodings and scores depend on: all but the text tower. 64 hexadecimal digits."""
    data = _config(model)
    data["clip"].pop("text", None)
    text = {f"clip.{name}" for name in model.clip.state_dict() if model.clip.is_text(name)}
    return _hash(data, {name: tensor for name, tensor in model.state_dict().items() if name not in text}, forget)


def text_identity(model: SAN, forget: Forget = keep) -> str:
    """Hash all parts that text embeddings depend on: the text tower. 64 hexadecimal digits."""
    data = model.config.clip.model_dump(mode="json")
    data.pop("vision", None)
    if model.config.clip.text.own_tokenizer and model.tokenizer is not None:
        data["tokenizer"] = hashlib.sha256(model.tokenizer).hexdigest()
    text = {name: tensor for name, tensor in model.clip.state_dict().items() if model.clip.is_text(name)}
    return _hash(data, text, forget)


def frozen_identity(model: SAN) -> str:
    """Hash the parts that training does not change, and the configuration. 64 hexadecimal digits."""
    trained = {parameter.name for parameter in model.trained()}
    frozen = {name: tensor for name, tensor in model.state_dict().items() if name not in trained}
    return _hash(_config(model), frozen)


def _config(model: SAN) -> dict[str, Any]:
    """Return the configuration, but for the share of "none of these", which is a part of the vocabulary."""
    data = model.config.model_dump(mode="json")
    data.pop("rest_share", None)
    return data


def _hash(config: dict, tensors: Mapping[str, Tensor], forget: Forget = keep) -> str:
    def hash_of(name: str) -> bytes:
        hashed = _hash_tensor(tensors[name])
        forget(tensors[name])
        return hashed

    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    names = sorted(tensors)
    with ThreadPoolExecutor(_THREADS) as threads:
        for name, hashed in zip(names, threads.map(hash_of, names), strict=True):
            digest.update(f"\0{name} {tuple(tensors[name].shape)}\0".encode())
            digest.update(hashed)
    return digest.hexdigest()


def _hash_tensor(tensor: Tensor) -> bytes:
    tensor = tensor.detach()
    if tensor.is_mkldnn:
        tensor = tensor.to_dense()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return hashlib.sha256(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data).digest()
