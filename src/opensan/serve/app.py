"""The routes: what is asked, and in which form it is answered."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware

from opensan import __version__
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.serve import answers
from opensan.serve.cache import EncodingCache
from opensan.serve.engine import Engine
from opensan.serve.limits import Gate, Problem, ServiceLimits, problem_response, stopping
from opensan.serve.metrics import CONTENT_TYPE, Metrics, Observer
from opensan.serve.negotiation import best_media_type
from opensan.serve.schemas import (
    EncodingInfo,
    Format,
    PointAnswer,
    PointQuestion,
    ProblemInfo,
    Question,
    ServiceInfo,
    comma_string,
    one_line,
    question_from_form,
    text_parts,
)
from opensan.serve.site import add_page
from opensan.vocabulary import Vocabulary

SWEEP_SECONDS = 5.0
"""Encodings that have expired are let go this often."""

Answer = TypeVar("Answer")

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORMS = {
    200: {
        "description": "The segmentation, in the form that `format` or else `Accept` asks for: areas, confidences and "
        "COCO run-length masks as JSON; the label map as PNG (8-bit with a palette up to 255 words, else 16-bit; the "
        "highest value is unlabelled); an overlay with legend as PNG; or a map, which a page draws itself "
        "(docs/serving.md tells its bytes).",
        "content": {
            "application/json": {"schema": {"type": "object"}},
            "image/png": _BINARY,
            answers.MAP_TYPE: _BINARY,
        },
    }
}
_UPLOADED = {
    "image/*": _BINARY,
    "application/octet-stream": _BINARY,
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["image"],
            "additionalProperties": False,
            "properties": {"image": {"type": "string", "format": "binary"}},
        }
    },
}
_JSON_LIST = {
    "type": "string",
    "contentMediaType": "application/json",
    "pattern": r"^\s*\[",
}
_FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["image", "words"],
            "additionalProperties": False,
            "properties": {
                "image": {"type": "string", "format": "binary"},
                "words": {
                    "anyOf": [comma_string(without=r"\["), _JSON_LIST],
                    "description": "Comma string, or a JSON list.",
                },
                "background": {
                    "anyOf": [comma_string(without=r"\[", or_blank=True), _JSON_LIST],
                    "description": "As words; may be blank.",
                },
                "templates": {
                    "anyOf": [{"enum": ["vild", "single"]}, _JSON_LIST],
                    "description": '"vild", "single", or a JSON list of texts.',
                },
            },
        }
    }
}


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemInfo"}}}
    return {code: {"description": _REASONS[code], "content": content} for code in codes}


_REASONS = {
    400: "Not readable as what it says it is.",
    401: "A bearer token is needed.",
    404: "No such encoding (any more).",
    406: "None of the forms that `Accept` allows.",
    408: "The request took too long to arrive.",
    413: "The request is too long.",
    415: "Not a photograph's media type.",
    422: "Not a photograph, or words that cannot be used.",
    429: "Too many wait already; `Retry-After` says when to ask again.",
    503: "The service is stopping, or the answer took too long.",
}
_ALWAYS = (400, 401, 408, 413, 422, 429, 503)


class Service:
    """What the routes share."""

    def __init__(self, segmenter: Segmenter, limits: ServiceLimits, batch: int) -> None:
        self.segmenter = segmenter
        self.limits = limits
        self.batch = batch
        self.metrics = Metrics()
        self.cache = EncodingCache(limits.cache_entries, limits.cache_bytes, limits.cache_seconds)
        self.metrics.cache_entries.set_function(lambda: len(self.cache))
        self.metrics.cache_bytes.set_function(lambda: self.cache.size)
        self.engine: Engine

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Threads from the start of the event loop to its end."""
        self.engine = Engine(self.segmenter, self.limits, self.metrics, self.batch)
        sweeper = asyncio.create_task(self._sweep())
        try:
            yield
        finally:
            sweeper.cancel()
            self.engine.close()

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.cache.sweep()

    def kept(self, name: str) -> Encoding:
        """Raises Problem (404) if there is none of that name."""
        encoding = self.cache.get(name)
        if encoding is None:
            raise _gone()
        return encoding

    def reading(self, vocabulary: Vocabulary) -> list[Callable[[], Any]]:
        """What makes the text rows of a long vocabulary, a part at a time. They are remembered, also for later."""
        return [partial(self.segmenter.text.classifier, part) for part in text_parts(vocabulary)]

    async def segmented(
        self,
        request: Request,
        encoding: Encoding,
        question: Question,
        form: Format,
        *,
        confidence: bool = True,
        accepted: bool = False,
    ) -> Response:
        vocabulary = question.vocabulary(self.limits)
        work = self.engine.ask(
            lambda: answers.answer(self.segmenter, encoding, vocabulary, form, confidence),
            before=self.reading(vocabulary),
            accepted=accepted,
        )
        picture = await _while_there(request, work)
        return Response(picture.content, media_type=picture.media_type)


def create_app(
    segmenter: Segmenter,
    *,
    limits: ServiceLimits | None = None,
    token: str | None = None,
    batch: int = 4,
    page: bool = False,
) -> "Application":
    """The service of one model.

    Args:
        segmenter: made with `text_cache=False`, unless clients may fill this machine's disk with their words.
        limits: what clients may ask.
        token: a secret that clients must send ("Authorization: Bearer ..."); None lets everybody in.
        batch: photographs of equal padded shape that go through the network together.
        page: serve the web page at "/".
    """
    service = Service(segmenter, limits or ServiceLimits(), batch)
    app = FastAPI(
        title="opensan",
        version=__version__,
        summary="Label every pixel of a photograph with words chosen at run time.",
        lifespan=service.running,
    )
    # The gate asks for the token, before a body is read; here the schema only tells that it does.
    api = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [])
    _add_service_routes(app, api, service)
    _add_segmentation_route(api, service)
    _add_encoding_routes(api, service)
    app.include_router(api)
    _add_errors(app)
    if page:
        add_page(app)
    app.add_middleware(GZipMiddleware, minimum_size=1024, compresslevel=1)
    return Application(app, service, token)


class Application:
    """The ASGI application, with what stands before the routes."""

    def __init__(self, app: FastAPI, service: Service, token: str | None) -> None:
        self.api = app
        self.service = service
        self.gate = Gate(app, service.limits, token)
        self._outermost = Observer(self.gate, service.metrics)
        app.state.gate = self.gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._outermost(scope, receive, send)


def _add_service_routes(app: FastAPI, api: APIRouter, service: Service) -> None:
    @app.get("/healthz", tags=["service"])
    async def health() -> dict[str, str]:
        """The process lives."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"], responses=_problems(503))
    async def ready() -> dict[str, str]:
        """New requests are accepted."""
        if app.state.gate.closing:
            raise stopping()
        if service.engine.hangs:
            raise Problem(503, f"nothing was finished for {service.limits.queue_seconds:g} s", {"Retry-After": "5"})
        return {"status": "ready"}

    @api.get("/metrics", tags=["service"], response_class=Response, responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_problems(401),
    })  # fmt: skip
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})

    @api.get("/v1/info", tags=["service"], responses=_problems(401, 503))
    async def info() -> ServiceInfo:
        """The model, and what may be asked of it."""
        names = ("request_bytes", "pixels", "words", "characters", "templates")
        return ServiceInfo(
            opensan=__version__,
            model=service.segmenter.fingerprint,
            device=str(service.segmenter.device),
            limits={name: getattr(service.limits, name) for name in names},
        )


def _add_segmentation_route(api: APIRouter, service: Service) -> None:
    @api.post(
        "/v1/segmentation", tags=["segmentation"], response_class=Response,
        responses={**_FORMS, **_problems(*_ALWAYS, 406, 415)},
        openapi_extra={"requestBody": {"required": True, "content": _FORM}},
    )  # fmt: skip
    async def segment(request: Request, format: Annotated[Format | None, Query()] = None) -> Response:
        """Segment a photograph, once."""
        service.engine.check_room()
        form = _form(request, format)
        data, fields = await _uploaded(request, {"words", "background", "templates"})
        question = question_from_form(fields)
        question.vocabulary(service.limits)  # before the work, for what is wrong with it
        encoding = await _while_there(request, service.engine.encode(data))
        return await service.segmented(request, encoding, question, form, accepted=True)


def _add_encoding_routes(api: APIRouter, service: Service) -> None:
    @api.post(
        "/v1/encodings", tags=["encodings"], status_code=201, responses=_problems(*_ALWAYS, 415),
        openapi_extra={"requestBody": {"required": True, "content": _UPLOADED}},
    )  # fmt: skip
    async def encode(request: Request, response: Response) -> EncodingInfo:
        """Encode a photograph: its body is an image file, or a form with the file as `image`."""
        service.engine.check_room()
        data, _ = await _uploaded(request, set())
        encoding = await _while_there(request, service.engine.encode(data))
        name = service.cache.add(encoding)
        height, width = encoding.sizes.image
        response.headers["Location"] = f"/v1/encodings/{name}"
        return EncodingInfo(id=name, width=width, height=height, expires_in=service.cache.seconds)

    @api.delete("/v1/encodings/{id}", tags=["encodings"], status_code=204, responses=_problems(401, 404, 503))
    async def forget(id: str) -> None:
        """Let go of an encoding and its photograph."""
        if not service.cache.remove(id):
            raise _gone()

    @api.post(
        "/v1/encodings/{id}/segmentation", tags=["encodings"], response_class=Response,
        responses={**_FORMS, **_problems(*_ALWAYS, 404, 406)},
    )  # fmt: skip
    async def segment_encoding(
        id: str,
        question: Question,
        request: Request,
        format: Annotated[Format | None, Query()] = None,
        confidence: Annotated[
            bool, Query(description="false leaves the confidences out of a map, which is then there much sooner.")
        ] = True,
    ) -> Response:
        """Ask an encoded photograph words; neither ViT runs."""
        form = _form(request, format)
        return await service.segmented(request, service.kept(id), question, form, confidence=confidence)

    @api.post("/v1/encodings/{id}/point", tags=["encodings"], responses=_problems(*_ALWAYS, 404))
    async def point(id: str, question: PointQuestion, request: Request) -> PointAnswer:
        """What decides one pixel: its best words, and the proposals that speak for the winner."""
        encoding, vocabulary = service.kept(id), question.vocabulary(service.limits)
        work = service.engine.ask(
            lambda: answers.point(service.segmenter, encoding, vocabulary, question.x, question.y),
            before=service.reading(vocabulary),
        )
        return await _while_there(request, work)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, one_line(error.errors()))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # uvicorn logs the traceback, and closes the connection: a client that knows sends nothing more over it.
        return problem_response(500, "a mistake of the service; its log says more", {"Connection": "close"})

    # The schema of answers that no route returns itself.
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        schema["components"]["schemas"].setdefault("ProblemInfo", ProblemInfo.model_json_schema())
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _gone() -> Problem:
    return Problem(404, "there is no encoding of that id (any more): send the photograph again")


def _form(request: Request, format: Format | None) -> Format:
    """Raises Problem (406) if the client accepts nothing that there is."""
    accept = ",".join(request.headers.getlist("accept"))
    offered = [Format.json, Format.labels, Format.map] if format is None else [format]
    types = [answers.MEDIA_TYPES[form] for form in offered]
    chosen = best_media_type(accept, types)
    if chosen is None:
        raise Problem(406, f"this can be answered as {', '.join(types)}, of which Accept allows none")
    return offered[types.index(chosen)]


async def _uploaded(request: Request, fields: set[str]) -> tuple[bytes, dict[str, Any]]:
    """The photograph's file, and of a form the other `fields`. Raises Problem (415, 422)."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raw = media_type.startswith("image/") or media_type == "application/octet-stream"
        if fields or not raw:
            wanted = "a multipart form" if fields else "image/* or a multipart form"
            raise Problem(415, f"the photograph must come as {wanted}, not as {media_type or 'nothing'}")
        return await request.body(), {}
    async with request.form(max_files=1, max_fields=len(fields) + 1) as form:
        unknown = set(form) - fields - {"image"}
        if unknown:
            raise Problem(
                422, f"unknown field {sorted(unknown)[0]!r}: known are {', '.join(sorted(fields | {'image'}))}"
            )
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise Problem(422, "the form needs the photograph's file in a field 'image'")
        return await image.read(), {name: form[name] for name in fields if name in form}


async def _while_there(request: Request, work: Awaitable[Answer]) -> Answer:
    """`work`, given up when the client leaves."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_left(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Problem(499, "the client left")
        return task.result()
    finally:
        for each in (task, watcher):
            each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await each


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
