"""The index of a collection of images: encoded once, searched with any words.

index = opensan.Index("photos.index", "photo")
index.add(["photos"])
for match in index.search("zebra crossing"):
    print(match.path, match.score, match.regions[0].box)
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from opensan.buckets import bucket_path
from opensan.choices import SearchBy
from opensan.errors import UserError, reason
from opensan.files import absolute
from opensan.images import list_images
from opensan.index.adding import Added, Adding, Encoders
from opensan.index.answers import Answer, Match, Region
from opensan.index.contrast import Contrast
from opensan.index.head import NAME, Head, Maker
from opensan.index.relabel import StoredSegmenter, each_encoding, only, stored_encodings
from opensan.index.rows import ABOUT, NOT_THE_SAME, SIZES, ImageRow, cells_of, sizes_of
from opensan.index.scoring import Scorer, distinct, parse_query, score_images
from opensan.index.store import IMAGES, PROPOSALS, Store
from opensan.index.writer import LONGEST_WAIT, Change, writing
from opensan.segmenters.base import Segmenter
from opensan.segmenters.load import load
from opensan.segmenters.proposals import ProposalSegmenter, with_proposals
from opensan.segmenters.results import Encoding, Segmentation
from opensan.vocabulary import Templates, Vocabulary

MOST_REGIONS = 10
"""Regions of an image in an answer."""

CANDIDATES = 40
"""Proposals that an approximate search looks at for each image that is wanted, at least 2,000 in all."""

PROBES = 40
"""Parts of the approximate index that a search looks at."""

_TRIES = 3
"""Times that a reader opens an index whose files a writer removes meanwhile."""

T = TypeVar("T")
Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


class Index:
    """An index of images on disk. Any number of processes may search it while one adds to it."""

    def __init__(
        self, folder: str | os.PathLike[str], model: "Segmenter | str | os.PathLike[str] | None" = None, **options: Any
    ) -> None:
        """Name an index; it is made by the first `add`.

        Args:
            folder: the index.
            model: a segmenter, or what `opensan.load` takes, with `options` for it; None for the model that made the
                index.
            options: as for `opensan.load`: device, speed, dtype and others.
        """
        self.folder = Path(folder)
        self._model, self._options = model, options
        self._segmenter: ProposalSegmenter | None = None

    def __repr__(self) -> str:
        return f"<Index {self.folder}>"

    def add(
        self,
        images: Paths,
        *,
        exact: bool = False,
        batch: int = 1,
        progress: Callable[[int, int], None] | None = None,
        wait: float = LONGEST_WAIT,
        encoders: tuple[Encoders, Maker] | None = None,
    ) -> Added:
        """Encode images into the index, which is made if there is none.

        Images that it has are not encoded again, unless they have changed. What is encoded is committed every few
        seconds, so that a stopped or killed run goes on with the same call.

        Args:
            images: images and folders, which are searched with their sub-folders.
            exact: for a new index: keep encodings whole, so that labels are those of `segment` to the pixel.
            batch: images of one shape that go through the model together.
            progress: called with the number of images that are done, and of those to be done.
            wait: seconds to wait for another process that writes to the index.
            encoders: whoever encodes the images in place of this process, which then loads no model, and what their
                model is.

        Raises:
            UserError: no images, another model, or an index that can't be written; one line. A broken image stops
                nothing: the result's `broken` lists it.
        """
        if batch < 1:
            raise UserError(f"batch must be at least 1, not {batch}")
        paths = list_images(_listed(images))
        known = self._head_if_any()
        segmenter: ProposalSegmenter | Encoders
        if encoders is not None:
            segmenter, maker = encoders
        else:
            segmenter = own = self.segmenter if known is None else self._segmenter_of(known)
            own.check_unadapted("an index, which is searched with any words, can't be made")
            maker = Maker.of(own)
        if known is not None and exact and not known.exact:
            raise UserError(f"{self.folder}: is no exact index, and can't become one; add the images to a new one")
        new = self._new_head(maker, exact) if known is None else None
        with writing(self.folder, new, wait=wait) as writer:
            self._check_model(writer.head, maker, encodes=True)
            if writer.head.width == 0:
                raise UserError(f"{self.folder}: damaged (vectors of 0 numbers)")
            return Adding(writer, segmenter, batch, progress).run(paths)

    def search(
        self,
        words: str,
        *,
        also: Iterable[str] = (),
        without: Iterable[str] = (),
        against: Any = None,
        by: SearchBy = "region",
        top: int = 50,
        least: float = 0.5,
        approximate: bool | None = None,
    ) -> Answer:
        """Return the images that match a word best, with the matching regions.

        Args:
            words: the word; `|` joins synonyms.
            also: words that must be in the image too.
            without: words that must not be in the image.
            against: contrast words, with which the asked ones compete for each region, as `Vocabulary.parse` takes
                them; () for none; None for all words of the bundled label sets.
            by: "region" scores an image by its most probable region, "area" by the mean score of its pixels.
            top: number of images.
            least: least probability of a region, in [0, 1]; the best one is returned in any case.
            approximate: whether the vectors' index proposes images; None: if there is one.

        Raises:
            UserError: an empty query, words the model has never read, another model, or a damaged index; one line.
        """
        if top < 1:
            raise UserError(f"top must be at least 1, not {top}")
        head = Head.read(self.folder)
        segmenter = self._segmenter_of(head)
        query = parse_query(segmenter, words, also, without, against, by)
        asked = query.asked
        question = {
            "search": asked[0],
            "and": asked[1 : 1 + query.also],
            "not": asked[1 + query.also :],
            "against": len(query.vocabulary.words) - len(asked),
            "by": by,
        }

        def read(head: Head, store: Store) -> Answer:
            nearby = store.is_approximate if approximate is None else approximate
            scorer = Scorer(segmenter, query, head.contrast)
            ids, scores = self._ranked(segmenter, store, scorer, top, nearby)
            matches = self._matches(store, scorer, ids[:top].tolist(), scores[:top].tolist(), least)
            return Answer(matches, question, head.images, nearby)

        return self._reading(read)

    def check(self) -> None:
        """Raise UserError, one line, if there is no index, it is damaged, or another model made it."""
        head = Head.read(self.folder)
        self._segmenter_of(head)
        self._reading(lambda head, store: store.check_files())

    def count(self) -> int:
        """Return the number of images in the index now."""
        return Head.read(self.folder).images

    def info(self) -> dict[str, Any]:
        """Return what is in the index, as plain data."""
        head = Head.read(self.folder)
        size = 0
        for path in self.folder.rglob("*"):
            with suppress(FileNotFoundError):  # a writer removes old files
                size += path.stat().st_size if path.is_file() else 0
        return {
            "index": str(self.folder),
            "images": head.images,
            "proposals": head.proposals,
            "bytes": size,
            "model": str(head.model),
            "source": head.source,
            "speed": head.speed,
            "dtype": head.dtype,
            "exact": head.exact,
            "width": head.width,
        }

    def paths(self) -> list[str]:
        """Return the images' paths, in the order in which they were added."""
        return [row.path for row in self._rows()]

    def encodings(self) -> Iterator[tuple[str, Encoding]]:
        """Yield each image's path and its encoding, as far as it is stored, in the order in which they were added.

        Those of an exact index are what `encode` returned; others have the masks' cells and vectors in half precision.
        """
        for row, encoding in each_encoding(self._encodings_of, self._rows()):
            yield row.path, encoding

    def relabel(
        self,
        words: Any,
        *,
        background: Iterable[Any] = (),
        templates: Templates | None = None,
        rest: bool = False,
    ) -> Iterator[tuple[str, Segmentation]]:
        """Yield each image's path and its labels with other words; the model's image half does not run.

        Arguments as for `Segmenter.segment`. Labels of an exact index are those of `segment`, to the pixel.
        """
        vocabulary = Vocabulary.parse(words, background=background, templates=templates)
        segmenter = self._segmenter_of(Head.read(self.folder))
        for path, encoding in self.encodings():
            yield path, segmenter.segment(encoding, vocabulary, rest=rest)

    def stored_segmenter(self, *, pixels: bool = False) -> tuple[list[Path], Segmenter]:
        """Return the images, and a segmenter that takes their encodings from the index, for a `FolderRun`.

        With `pixels` it reads the images too, for results that show them.
        """
        head = Head.read(self.folder)
        rows = self._rows()
        if not rows:
            raise UserError(f"{self.folder}: has no images; add some with `opensan index add`")
        stored = StoredSegmenter(
            self._segmenter_of(head),
            {row.path: row for row in rows},
            lambda number: only(self._encodings_of([number]), number),
            exact=head.exact,
            pixels=pixels,
        )
        return [Path(row.path) for row in rows], cast(Segmenter, stored)

    def remove(self, images: Paths = (), *, missing: bool = False, wait: float = LONGEST_WAIT) -> int:
        """Remove images from the index; their files stay. Returns their number.

        Args:
            images: paths of images, or of folders: all images below. They need not exist any more.
            missing: also those whose files are gone.
            wait: seconds to wait for another process that writes to the index.

        Raises:
            UserError: a path of which the index has no image.
        """
        named = [absolute(bucket_path(path) or Path(path)) for path in _listed(images)]
        with writing(self.folder, None, wait=wait) as writer:
            paths = {row.id: bucket_path(row.path) or Path(row.path) for row in writer.images.values()}
            rows = [
                row
                for row in writer.images.values()
                if any(paths[row.id].is_relative_to(path) for path in named) or (missing and not _exists(paths[row.id]))
            ]
            for path in named:
                if not any(paths[row.id].is_relative_to(path) for row in rows):
                    raise UserError(f"{self.folder}: has no image {path}")
            chosen = {row.path for row in rows}
            for copies in (True, False):  # copies first, so that none of these inherits
                change = Change()
                for row in rows:
                    if (row.same_as != NOT_THE_SAME) == copies:
                        writer.retire(row, change)
                writer.commit(change)
            assert not chosen & writer.images.keys()
            writer.finish()
        return len(rows)

    def compact(self, *, progress: Callable[[int, int], None] | None = None, wait: float = LONGEST_WAIT) -> None:
        """Merge the index's files, drop what was removed, and build the vectors' index of a large collection.

        Where proposals lack their part of the default contrast words, as those of an older index do, it is computed:
        `progress` is called with the number of proposals that have it, and of all.
        """
        contrast = Contrast(self._segmenter_of(Head.read(self.folder)))
        with writing(self.folder, None, wait=wait) as writer:
            if writer.lacks_contrasts(contrast):
                writer.fill_contrasts(contrast, progress)
            writer.merge()

    @property
    def segmenter(self) -> ProposalSegmenter:
        """The model, which is loaded when it is needed first: that of the index, unless another one was given."""
        if self._segmenter is None:
            if self._model is None and (head := self._head_if_any()) is not None:
                return self._segmenter_of(head)
            model = "san-vit-b16" if self._model is None else self._model
            loaded = model if isinstance(model, Segmenter) else load(model, **self._options)
            self._segmenter = with_proposals(loaded, "an index", vectors_suffice=True)
        return self._segmenter

    def _head_if_any(self) -> Head | None:
        try:
            return Head.read(self.folder)
        except UserError:
            if (self.folder / NAME).exists():
                raise
            return None

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `opensan.load` for the index's model, as every process and machine understands them.

        Raises UserError if the model was made in a program.
        """
        head = self._head_if_any()
        source = self._source() if head is None or self._model is not None else head.source
        if not source:
            raise UserError(f"{self.folder}: name its model, which was made in a program")
        speed = {} if head is None or self._model is not None else {"speed": head.speed}
        return {"source": source, **speed, **self._options}

    def _source(self) -> str:
        source = "" if isinstance(self._model, Segmenter) else os.fspath(self._model or "san-vit-b16")
        return str(absolute(Path(source))) if source and Path(source).exists() else source

    def _new_head(self, maker: Maker, exact: bool) -> Head:
        return Head(maker.model, self._source(), maker.speed, maker.dtype, exact, maker.width, contrast=maker.contrast)

    def _segmenter_of(self, head: Head) -> ProposalSegmenter:
        """Return the model of an index. Raises UserError if it is not the one that this object was given."""
        if self._model is None and self._segmenter is None:
            if not head.source:
                raise UserError(f"{self.folder}: name its model ({head.model.name}), which was made in a program")
            self._model = head.source
            self._options = {"speed": head.speed, **self._options}
        self._check_model(head, Maker.of(self.segmenter), encodes=False)
        return self.segmenter

    def _check_model(self, head: Head, maker: Maker, *, encodes: bool) -> None:
        own = maker.model
        if (own.image, own.text) != (head.model.image, head.model.text):
            raise UserError(
                f"{self.folder}: was made by model {head.model}, not by {own}; use that model, or make a new index"
            )
        if encodes and (maker.speed, maker.dtype) != (head.speed, head.dtype):
            raise UserError(
                f"{self.folder}: was made at speed {head.speed} in {head.dtype}, not {maker.speed} in {maker.dtype}; "
                "use the same, or make a new index"
            )

    def _reading(self, read: Callable[[Head, Store], T]) -> T:
        """Return what `read` makes of a snapshot. If a writer removes its files meanwhile, the next one is taken."""
        for tries in range(_TRIES):
            head = Head.read(self.folder)
            try:
                return read(head, Store(self.folder, head.versions))
            except UserError:
                if tries == _TRIES - 1 or Head.read(self.folder) == head:
                    raise
        raise AssertionError

    def _rows(self) -> list[ImageRow]:
        """Return the rows of all images, in the order in which they were added."""
        rows = self._reading(lambda head, store: list(map(ImageRow.of, store.rows(IMAGES, ABOUT))))
        return sorted(rows, key=lambda row: row.id)

    def _encodings_of(self, ids: Sequence[int]) -> dict[int, Encoding]:
        return self._reading(lambda head, store: stored_encodings(head, store, ids))

    def _ranked(
        self, segmenter: ProposalSegmenter, store: Store, scorer: Scorer, top: int, approximate: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and scores of images, best first; of some images alone if the search is approximate."""
        query, columns = scorer.query, ["image", "area", *scorer.columns]
        if not approximate:
            return score_images(scorer, store.batches(PROPOSALS, columns))
        rows = segmenter.text.rows(query.vocabulary)
        first = [row for row, word in zip(rows, query.vocabulary.row_class, strict=True) if word <= query.also]
        count = max(2_000, CANDIDATES * top)
        near = np.unique(np.concatenate([store.nearest(row, count, PROBES) for row in first]))
        return score_images(scorer, store.batches(PROPOSALS, columns, "image", near.tolist()))

    def _matches(
        self,
        store: Store,
        scorer: Scorer,
        ids: Sequence[int],
        scores: Sequence[float],
        least: float,
    ) -> list[Match]:
        """Describe images by id."""
        about = {row["id"]: row for row in store.rows(IMAGES, [*ABOUT, *SIZES], "id", ids)}
        same: dict[int, list[str]] = {}
        for row in store.rows(IMAGES, ["path", "same_as"], "same_as", ids):
            same.setdefault(row["same_as"], []).append(row["path"])
        columns = ["image", "query", "area", "box", "mask"]
        found: dict[int, list[tuple[float, dict[str, Any]]]] = {}
        for batch in store.batches(PROPOSALS, [*columns, *scorer.columns], "image", ids):
            chances = scorer.probabilities(batch)[:, 0].tolist() if batch.num_rows else []
            plain = batch.select(columns).to_pylist()
            for chance, row in zip(chances, plain, strict=True):
                found.setdefault(row["image"], []).append((chance, row))
        return [
            Match(
                about[number]["path"],
                score,
                sizes_of(about[number])[0].image,
                _regions(about[number], found.get(number, []), least),
                sorted(same.get(number, [])),
            )
            for number, score in zip(ids, scores, strict=True)
            if number in about
        ]


def model_of(folder: Path) -> str | None:
    """Return the argument of `opensan.load` for the model of an index; None if it was made in a program.

    Raises UserError, one line, if there is no index.
    """
    return Head.read(folder).source or None


def _regions(about: dict[str, Any], rows: list[tuple[float, dict[str, Any]]], least: float) -> list[Region]:
    """Return an image's regions, most probable first, without repetitions."""
    sizes, _ = sizes_of(about)
    rows = sorted(rows, key=lambda pair: (-pair[0], pair[1]["query"]))
    rows = [pair for index, pair in enumerate(rows) if index == 0 or pair[0] >= least]
    masks = cells_of(about, [row["mask"] for _, row in rows])
    return [
        Region(
            rows[index][0],
            rows[index][1]["area"],
            tuple(rows[index][1]["box"]),
            rows[index][1]["query"],
            masks[index],
            sizes,
        )
        for index in distinct(masks, MOST_REGIONS)
    ]


def _exists(path: Path) -> bool:
    """Return whether a file exists. Raises UserError if a bucket can't be reached: nobody knows then."""
    try:
        return path.exists()
    except OSError as error:
        raise UserError(f"{path}: can't be reached ({reason(error)})") from None


def _listed(paths: Paths) -> list[str | os.PathLike[str]]:
    return [paths] if isinstance(paths, str | os.PathLike) else list(paths)
