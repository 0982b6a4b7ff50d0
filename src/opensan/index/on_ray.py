"""Add images to an index by workers on a Ray cluster, or on this machine: they encode, and the driver alone commits.

So whatever dies, a worker, its machine or the driver, the same command adds what is missing, and nothing twice. Needs
the extra `ray`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from opensan.errors import UserError
from opensan.files import absolute
from opensan.index.adding import Encoded, Read, encode_read, read_stamped
from opensan.index.head import Maker
from opensan.jobs.folder import Broken, Job
from opensan.jobs.on_ray import Pool, Refusal

OBJECT_STORE = 256 << 20
"""Bytes of Ray's object store on one machine, through which encodings of a megabyte or so travel."""


@dataclass(frozen=True)
class Answered:
    """A worker's result for an image."""

    job: Job
    encoded: Encoded


class Encoder:
    """A model in a process of its own, of which Ray makes an actor."""

    def __init__(self, loading: Mapping[str, Any]) -> None:
        """`loading` are the arguments of `opensan.load`; errors are told by `describe`."""
        import ray

        from opensan.segmenters.load import load
        from opensan.segmenters.proposals import with_proposals

        self._node = ray.util.get_node_ip_address()
        self._refusal: Refusal | None = None
        try:
            self._segmenter = with_proposals(load(**loading), "an index", vectors_suffice=True)
            self._segmenter.check_unadapted("an index, which is searched with any words, can't be made")
            self._maker = Maker.of(self._segmenter)
        except UserError as error:
            self._refusal = Refusal(f"the worker on {self._node}: {error}")

    def describe(self) -> Maker | Refusal:
        """Return what the worker's model is, or why it can't take part."""
        return self._refusal or self._maker

    def encode(self, key: str, jobs: Sequence[Job]) -> list[Answered | Broken] | Refusal:
        """Read and encode images; `key` is what the driver knows of the model."""
        if self._refusal:
            return self._refusal
        if key != repr(self._maker):
            return Refusal(f"the worker on {self._node}: has another model, or another version of it")
        items = [read_stamped(self._segmenter, job.image) for job in jobs]
        encoded = iter(encode_read(self._segmenter, [item for item in items if isinstance(item, Read)], len(jobs)))
        return [
            Broken(job, item) if isinstance(item, str) else Answered(job, _without_image(next(encoded)))
            for job, item in zip(jobs, items, strict=True)
        ]


def _without_image(encoded: Encoded) -> Encoded:
    """Leave out the picture, which an index does not keep: it need not travel."""
    return replace(encoded, encoding=replace(encoded.encoding, image=None))


class RayEncoders:
    """Workers that encode images for `Index.add`. Use within `cluster`."""

    def __init__(
        self,
        count: int,
        loading: Mapping[str, Any],
        *,
        batch: int = 1,
        cpus: int = 1,
        per_gpu: int = 1,
        note: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start `count` workers; see `opensan.jobs.on_ray.Pool` for the arguments."""
        self._pool: Pool[Maker, Answered] = Pool(
            count, Encoder, "encode", loading, cpus=cpus, per_gpu=per_gpu, note=note
        )
        self._batch = batch

    def maker(self) -> Maker:
        """Return what the first worker's model is, once it is there. Raises UserError if none can start."""
        return self._pool.first()

    def encoded(self, paths: Sequence[Path]) -> Iterator[list[Encoded | str]]:
        """Yield the images at `paths` as they are encoded, in any order; the reason where one can't be read."""
        own = {str(number): path for number, path in enumerate(paths)}
        jobs = [Job(absolute(path), stem) for stem, path in own.items()]
        with closing(self._pool.work(repr(self.maker()), jobs, self._batch)) as groups:
            for group in groups:
                yield [
                    item.reason.replace(str(item.job.image), str(own[item.job.stem]), 1)
                    if isinstance(item, Broken)
                    else replace(item.encoded, path=own[item.job.stem])
                    for item in group
                ]
