"""Search of an index of images over HTTP: the matches come as lines of JSON, each as soon as its picture is drawn."""

import json
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from opensan.errors import UserError
from opensan.index.answers import DIGITS, Match
from opensan.index.collection import Index
from opensan.index.page import drawn_match
from opensan.outputs.drawing import jpeg_url
from opensan.segmenters.base import Segmenter
from opensan.serve.waiting import while_there

if TYPE_CHECKING:
    from opensan.serve.app import Service

LINES = "application/x-ndjson"

_Word = Annotated[str, Field(min_length=1, max_length=300)]


class SearchQuestion(BaseModel):
    """The word to find in the collection."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"words": "car|automobile"}]}
    )

    words: _Word = Field(description="The word; | joins synonyms.")
    also: list[_Word] = Field([], max_length=8, description="Words that must be in the image too.")
    without: list[_Word] = Field([], max_length=8, description="Words that must not be in the image.")
    top: int = Field(24, ge=1, le=200, description="Number of images.")
    least: float = Field(0.5, ge=0, le=1, description="Least probability of a region beside the best one.")


class CollectionInfo(BaseModel):
    """Description of the collection that can be searched."""

    name: str = Field(description="Name of the index's folder.")
    images: int


class SearchedIndex:
    """An index that the service searches."""

    def __init__(self, folder: Path, segmenter: Segmenter) -> None:
        """Open an index. Raises UserError, one line, if there is none, it is damaged, or another model made it."""
        self._index = Index(folder, segmenter)
        self._index.check()

    def info(self) -> CollectionInfo:
        """Return what the index has now: images may be added meanwhile."""
        return CollectionInfo(name=self._index.folder.absolute().name, images=self._index.count())

    def search(self, question: SearchQuestion) -> Any:
        """Return the answer to a question. Raises UserError for words that can't be searched for."""
        return self._index.search(
            question.words,
            also=question.also,
            without=question.without,
            top=question.top,
            least=question.least,
        )

    def line(self, match: Match) -> dict[str, Any]:
        """Return a match with its picture, reduced, in colour inside the regions and pale outside.

        A file's folder stays in this machine: only its name is told.
        """
        picture, problem = drawn_match(match, max_pixels=self._index.segmenter.max_pixels)
        height, width = picture.shape[:2]
        return {
            "kind": "match",
            "name": Path(match.path).name,
            "score": round(match.score, DIGITS),
            "regions": [
                {
                    "probability": round(region.probability, DIGITS),
                    "area": round(region.area, DIGITS),
                    "box": region.box,
                }
                for region in match.regions
            ],
            "copies": len(match.same),
            "width": width,
            "height": height,
            "picture": jpeg_url(picture).partition(",")[2],
            "missing": problem is not None,
        }


def add_collection_routes(
    api: APIRouter, service: "Service", collection: SearchedIndex, problems: dict[Any, Any]
) -> None:
    """Add the routes that search a collection; `problems` describes their refusals in the schema."""

    @api.get("/v1/collection", tags=["collection"], responses=problems)
    async def about() -> CollectionInfo:
        """Return the collection's name and its number of images."""
        return await service.engine.ask(collection.info)

    @api.post("/v1/collection/search", tags=["collection"], response_class=StreamingResponse, responses={
        200: {"description": "Lines of JSON: one for each matching image, best first, with its regions and a JPEG in "
              "base64; then one with the number of images.", "content": {LINES: {"schema": {"type": "string"}}}},
        **problems,
    })  # fmt: skip
    async def search(question: SearchQuestion, request: Request) -> StreamingResponse:
        """Find the images of the collection that show a word."""
        answer = await while_there(request, service.engine.ask(partial(collection.search, question)))
        return StreamingResponse(_lines(service, collection, answer), media_type=LINES)


async def _lines(service: "Service", collection: SearchedIndex, answer: Any) -> AsyncIterator[str]:
    """Yield the lines of an answer; a client that leaves ends the drawing."""
    for match in answer:
        try:
            line = await service.engine.ask(partial(collection.line, match), accepted=True)
        except UserError as error:
            line = {"kind": "problem", "detail": str(error)}
        yield json.dumps(line) + "\n"
    yield json.dumps({"kind": "end", "images": answer.images, "approximate": answer.approximate}) + "\n"
