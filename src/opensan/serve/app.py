"""The routes of the service."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from opensan import __version__
from opensan.errors import UserError
from opensan.outputs.colours import PALETTES, palette
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.serve import answers
from opensan.serve.cache import EncodingCache, Encodings
from opensan.serve.collection import SearchedIndex, add_collection_routes
from opensan.serve.engine import Engine
from opensan.serve.label_studio import LabelStudioBackend
from opensan.serve.limits import Gate, Problem, ServiceLimits, problem_response, stopping
from opensan.serve.metrics import CONTENT_TYPE, Metrics, Observer
from opensan.serve.models import Models
from opensan.serve.negotiation import accepts_gzip, best_media_type
from opensan.serve.schemas import (
    EncodingInfo,
    Format,
    Palettes,
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
from opensan.serve.task_images import TaskImages
from opensan.serve.tuning import add_tuning_route
from opensan.serve.uploads import uploaded
from opensan.serve.waiting import while_there
from opensan.vocabulary import Vocabulary

SWEEP_SECONDS = 5.0
"""Seconds between removals of expired encodings."""

_BINARY = {"schema": {"type": "string", "format": "binary"}}
_FORMS: dict[int | str, dict[str, Any]] = {
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
                    "description": "Comma string, or a JSON list; the field may be sent several times.",
                },
                "background": {
                    "anyOf": [comma_string(without=r"\[", or_blank=True), _JSON_LIST],
                    "description": "As words; may be blank.",
                },
                "templates": {
                    "anyOf": [{"enum": ["vild", "single"]}, _JSON_LIST],
                    "description": '"vild", "single", or a JSON list of texts.',
                },
                "tuned": {
                    **_JSON_LIST,
                    "pattern": r"^\s*\{",
                    "description": "What `opensan tune words` wrote as `tuned`.",
                },
                "rest": {
                    "enum": ["true", "false"],
                    "description": "true: pixels that none of the words deserves are answered as unlabelled.",
                },
            },
        }
    }
}

_THRESHOLD = Query(ge=0, le=1, description="Pixels of less confidence are unlabelled.")
_WITH_CONFIDENCE = Query(description="false leaves the confidences out of a map, which is then there much sooner.")
_MODEL = Query(description="One of the names that `/v1/info` lists; by default the first.")


def _problems(*codes: int) -> dict[int | str, dict[str, Any]]:
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemInfo"}}}
    return {code: {"description": _REASONS[code], "content": content} for code in codes}


_REASONS = {
    400: "Not readable as what it says it is.",
    401: "A bearer token is needed.",
    403: "Only the page of this service may ask it from a browser.",
    404: "No such encoding (any more).",
    406: "None of the forms that `Accept` allows.",
    408: "The request took too long to arrive.",
    413: "The request is too long.",
    415: "Not an image's media type, or an encoded body.",
    421: "The service is not called so.",
    422: "Not an image, or words that cannot be used.",
    429: "Too many wait already; `Retry-After` says when to ask again.",
    503: "The service is stopping, or the answer took too long.",
}
_REFUSED = (401, 403, 415, 421, 503)
_ALWAYS = (400, *_REFUSED, 408, 413, 422, 429)


class Service:
    """The objects that all routes share."""

    def __init__(
        self,
        models: Models,
        limits: ServiceLimits,
        batch: int,
        encodings: Encodings | None = None,
        all_metrics: Callable[[], Awaitable[bytes]] | None = None,
    ) -> None:
        self._all_metrics = all_metrics
        self.models = models
        self.limits = limits
        self.batch = batch
        self.metrics = Metrics()
        if encodings is None:
            encodings = EncodingCache(limits.cache_entries, limits.cache_bytes, limits.cache_seconds)
        self.cache = encodings
        self.metrics.cache_entries.set_function(lambda: len(self.cache))
        self.metrics.cache_bytes.set_function(lambda: self.cache.size)
        self.has_collection = False
        self.engine: Engine

    @asynccontextmanager
    async def running(self, app: FastAPI) -> AsyncIterator[None]:
        """Run the threads from the start of the event loop to its end."""
        self.engine = Engine(self.models.default, self.limits, self.metrics, self.batch)
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

    async def kept(self, name: str) -> Encoding:
        """Return the encoding of that id. Raises Problem (404) if there is none that a model here can use."""
        encoding = await self.cache.get(name)
        if encoding is None or not self.models.can_use(encoding):
            raise _gone()
        return encoding

    def asked(self, question: Question, segmenter: Segmenter) -> Vocabulary:
        """Return a question's vocabulary for a model. Raises Problem (422), one line, if it cannot be asked."""
        vocabulary = question.vocabulary(self.limits)
        try:
            return segmenter.with_rest(vocabulary) if question.rest else vocabulary
        except UserError as error:
            raise Problem(422, str(error)) from None

    async def metrics_page(self) -> bytes:
        """Return the metrics of this process, or of all that serve."""
        return self.metrics.page() if self._all_metrics is None else await self._all_metrics()

    def reading(self, segmenter: Segmenter, vocabulary: Vocabulary) -> list[Callable[[], Any]]:
        """Return functions that embed a long vocabulary, a part each. The rows are cached."""
        return [partial(segmenter.prepare_words, part) for part in text_parts(vocabulary)]

    async def segmented(
        self,
        request: Request,
        encoding: Encoding,
        question: Question,
        form: Format,
        *,
        confidence: bool = True,
        threshold: float = 0.0,
        accepted: bool = False,
    ) -> Response:
        """Segment an encoded image and return the response in the chosen form."""
        segmenter = self.models.of(encoding)
        vocabulary = self.asked(question, segmenter)
        compressed = accepts_gzip(request.headers.get("accept-encoding", ""))
        work = self.engine.ask(
            lambda: answers.answer(
                segmenter,
                encoding,
                vocabulary,
                form,
                confidence,
                threshold=threshold,
                colours=question.colours,
                compressed=compressed,
            ),
            before=self.reading(segmenter, vocabulary),
            accepted=accepted,
        )
        picture = await while_there(request, work)
        return Response(picture.content, media_type=picture.media_type, headers=picture.headers)


def create_app(
    segmenter: Segmenter,
    *,
    limits: ServiceLimits | None = None,
    token: str | None = None,
    batch: int = 4,
    page: bool = False,
    hosts: Collection[str] | None = None,
    others: Mapping[str, Callable[[], Segmenter]] | None = None,
    label_studio: TaskImages | None = None,
    encodings: Encodings | None = None,
    all_metrics: Callable[[], Awaitable[bytes]] | None = None,
    index: Path | None = None,
) -> "Application":
    """Make the service of a model, and of others that clients may choose.

    Args:
        segmenter: made with `text_cache=False`, unless clients may fill this machine's disk with their words.
        limits: what clients may ask.
        token: a secret that clients must send ("Authorization: Bearer ...") with every request but those for health and
            readiness; None lets everybody in.
        batch: images of equal padded shape that go through the network together.
        page: serve the web page at "/", and refuse what other web pages ask through the user's browser.
        hosts: the names by which clients call the service ("example.org", "127.0.0.1"), without a port. Requests to
            other names are refused, but for health and readiness. None: any name.
        others: functions that load further models, by name; clients choose with `?model=`. Each stays loaded.
        label_studio: the Label Studio that the service answers as its "ML backend", and whose images it reads. Its
            requests may carry the token as the password of basic authentication.
        encodings: where encodings are kept; None: in this process, within `limits`.
        all_metrics: returns the page of metrics, where several processes serve; None: this process's.
        index: an index of images, made by the same model, that clients may search; see `opensan.Index`.

    Raises:
        UserError: there is no such index, it is damaged, or another model made it; one line.
    """
    segmenter.check_unadapted("a service can't answer several clients")
    service = Service(Models(segmenter, others or {}), limits or ServiceLimits(), batch, encodings, all_metrics)
    app = FastAPIOffline(  # its pages at /docs and /redoc need no network
        title="opensan",
        version=__version__,
        summary="Label every pixel of an image with words chosen at run time.",
        lifespan=service.running,
    )
    # The gate checks the token before a body is read; here it is only declared in the schema.
    api = APIRouter(dependencies=[Depends(HTTPBearer(auto_error=False))] if token else [])
    _add_service_routes(app, api, service)
    _add_segmentation_route(api, service)
    _add_encoding_routes(api, service)
    add_tuning_route(api, service, _problems(*_ALWAYS, 404))
    if index is not None:
        service.has_collection = True
        add_collection_routes(api, service, SearchedIndex(index, segmenter), _problems(*_ALWAYS))
    if label_studio is not None:
        _add_label_studio_routes(api, service, label_studio)
    app.include_router(api)
    _add_errors(app)
    if page:
        add_page(app)
    gate = Gate(app, service.limits, token, hosts, same_origin=page, basic=label_studio is not None)
    return Application(app, service, gate)


class Application:
    """Return the ASGI application, with the layers before the routes."""

    def __init__(self, app: FastAPI, service: Service, gate: Gate) -> None:
        self.api = app
        self.service = service
        self.gate = gate
        self._outermost = Observer(self.gate, service.metrics)
        app.state.gate = self.gate

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._outermost(scope, receive, send)


def _add_service_routes(app: FastAPI, api: APIRouter, service: Service) -> None:
    @app.get("/healthz", tags=["service"])
    async def health() -> dict[str, str]:
        """Report that the process runs."""
        return {"status": "ok"}

    @app.get("/readyz", tags=["service"], responses=_problems(503))
    async def ready() -> dict[str, str]:
        """Report whether new requests are accepted and completed."""
        if app.state.gate.closing:
            raise stopping()
        if service.engine.hangs:
            raise Problem(503, f"nothing was finished for {service.limits.queue_seconds:g} s", {"Retry-After": "5"})
        return {"status": "ready"}

    for path, answer in (("/healthz", health), ("/readyz", ready)):
        app.head(path, include_in_schema=False)(answer)

    @api.get("/metrics", tags=["service"], response_class=Response, responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_problems(*_REFUSED),
    })  # fmt: skip
    async def metrics() -> Response:
        """Return metrics for Prometheus."""
        return Response(await service.metrics_page(), headers={"Content-Type": CONTENT_TYPE})

    @api.get("/v1/info", tags=["service"], responses=_problems(*_REFUSED))
    async def info() -> ServiceInfo:
        """Return the model's name and the limits of requests."""
        names = ("request_bytes", "pixels", "words", "characters", "templates")
        return ServiceInfo(
            opensan=__version__,
            model=str(service.models.default.identity),
            models=service.models.names,
            device=str(service.models.default.device),
            limits={name: getattr(service.limits, name) for name in names},
            collection=service.has_collection,
        )

    @api.get("/v1/palettes", tags=["service"], responses=_problems(*_REFUSED))
    async def palettes() -> Palettes:
        """Return the colours that words have in overlays, and those of other palettes."""
        return Palettes(
            palettes={
                name: [f"#{bytes(colour).hex()}" for colour in palette(service.limits.words, name)] for name in PALETTES
            }
        )


def _add_segmentation_route(api: APIRouter, service: Service) -> None:
    @api.post(
        "/v1/segmentation", tags=["segmentation"], response_class=Response,
        responses={**_FORMS, **_problems(*_ALWAYS, 406)},
        openapi_extra={"requestBody": {"required": True, "content": _FORM}},
    )  # fmt: skip
    async def segment(
        request: Request,
        format: Annotated[Format | None, Query()] = None,
        confidence: Annotated[bool, _WITH_CONFIDENCE] = True,
        threshold: Annotated[float, _THRESHOLD] = 0.0,
        model: Annotated[str | None, _MODEL] = None,
    ) -> Response:
        """Segment an image, in one request."""
        service.engine.check_room()
        form = _form(request, format)
        segmenter = await service.models.get(model)
        known = {"words", "background", "templates", "tuned", "rest"}
        data, fields = await uploaded(request, known, service.limits.words)
        question = question_from_form(fields)
        service.asked(question, segmenter)  # before the work, to report mistakes early
        encoding = await while_there(request, service.engine.encode(data, segmenter))
        return await service.segmented(
            request, encoding, question, form, confidence=confidence, threshold=threshold, accepted=True
        )


def _add_encoding_routes(api: APIRouter, service: Service) -> None:
    @api.post(
        "/v1/encodings", tags=["encodings"], status_code=201, responses=_problems(*_ALWAYS),
        openapi_extra={"requestBody": {"required": True, "content": _UPLOADED}},
    )  # fmt: skip
    async def encode(request: Request, response: Response, model: Annotated[str | None, _MODEL] = None) -> EncodingInfo:
        """Encode an image: the body is an image file, or a form with the file as `image`."""
        service.engine.check_room()
        segmenter = await service.models.get(model)
        data, _ = await uploaded(request, set())
        encoding = await while_there(request, service.engine.encode(data, segmenter))
        name = await service.cache.add(encoding)
        height, width = encoding.sizes.image
        response.headers["Location"] = f"/v1/encodings/{name}"
        return EncodingInfo(id=name, width=width, height=height, expires_in=service.cache.seconds)

    @api.delete("/v1/encodings/{id}", tags=["encodings"], status_code=204, responses=_problems(*_REFUSED, 404))
    async def forget(id: str) -> None:
        """Remove an encoding and its image."""
        if not await service.cache.remove(id):
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
        confidence: Annotated[bool, _WITH_CONFIDENCE] = True,
        threshold: Annotated[float, _THRESHOLD] = 0.0,
    ) -> Response:
        """Label an encoded image with words; neither ViT runs."""
        form = _form(request, format)
        return await service.segmented(
            request, await service.kept(id), question, form, confidence=confidence, threshold=threshold
        )

    @api.post("/v1/encodings/{id}/point", tags=["encodings"], responses=_problems(*_ALWAYS, 404))
    async def point(id: str, question: PointQuestion, request: Request) -> PointAnswer:
        """Explain one pixel: its best words, and the mask proposals that contribute to the winner's score."""
        encoding = await service.kept(id)
        segmenter = service.models.of(encoding)
        vocabulary = service.asked(question, segmenter)
        work = service.engine.ask(
            lambda: answers.point(segmenter, encoding, vocabulary, question.x, question.y),
            before=service.reading(segmenter, vocabulary),
        )
        return await while_there(request, work)


def _add_label_studio_routes(api: APIRouter, service: Service, images: TaskImages) -> None:
    """Add the routes that Label Studio asks of an "ML backend"."""
    backend = LabelStudioBackend(service.models.default, service.limits, images)

    @api.get("/", tags=["Label Studio"], responses=_problems(*_REFUSED))
    @api.get("/health", tags=["Label Studio"], responses=_problems(*_REFUSED))
    async def up() -> dict[str, str]:
        """Tell Label Studio that the service is there."""
        return {"status": "UP", "model_class": f"opensan {service.models.default.identity}"}

    @api.get("/versions", tags=["Label Studio"], responses=_problems(*_REFUSED))
    async def versions() -> dict[str, list[str]]:
        """Name the model's version, the only one: its identity."""
        return {"versions": [backend.version]}

    @api.post("/setup", tags=["Label Studio"], responses=_problems(*_ALWAYS))
    async def setup(request: Request) -> dict[str, str]:
        """Check a project's labelling configuration."""
        return await backend.setup(await request.body())

    @api.post("/predict", tags=["Label Studio"], responses=_problems(*_ALWAYS))
    async def predict(request: Request) -> dict[str, Any]:
        """Label the images of tasks with the labels of the configuration."""
        service.engine.check_room()
        return await while_there(request, backend.predict(await request.body(), service))

    @api.post("/webhook", tags=["Label Studio"], responses=_problems(*_REFUSED))
    async def webhook() -> dict[str, str]:
        """Take note of an event: there is nothing to do, because the model does not learn from annotations."""
        return {"status": "nothing to do"}


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return problem_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return problem_response(422, one_line(error.errors()))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        # uvicorn logs the traceback and closes the connection, which the header tells the client.
        return problem_response(500, "a mistake of the service; its log says more", {"Connection": "close"})

    # The schema of responses that no route returns itself.
    original = app.openapi

    def openapi() -> dict[str, Any]:
        schema = original()
        schema["components"]["schemas"].setdefault("ProblemInfo", ProblemInfo.model_json_schema())
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _gone() -> Problem:
    return Problem(404, "there is no encoding of that id (any more): send the image again")


def _form(request: Request, format: Format | None) -> Format:
    """Choose the response's form. Raises Problem (406) if the client accepts none."""
    accept = ",".join(request.headers.getlist("accept"))
    offered = [Format.json, Format.labels, Format.map] if format is None else [format]
    types = [answers.MEDIA_TYPES[form] for form in offered]
    chosen = best_media_type(accept, types)
    if chosen is None:
        raise Problem(406, f"this can be answered as {', '.join(types)}, of which Accept allows none")
    return offered[types.index(chosen)]
