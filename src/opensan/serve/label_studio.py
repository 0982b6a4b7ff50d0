"""Answer Label Studio as one of its "ML backends": pre-annotations of tasks by the labels of their project.

The protocol is that of https://github.com/HumanSignal/label-studio-ml-backend: /setup is given
a project's labelling configuration, /predict the same with tasks. Nothing is kept between requests.
"""

import asyncio
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from pydantic import ValidationError

from opensan.errors import UserError, short
from opensan.outputs import mean_confidence
from opensan.outputs.label_studio import label_studio_regions, mean_score
from opensan.segmenters.base import Segmenter
from opensan.segmenters.results import Encoding
from opensan.serve.limits import Problem, ServiceLimits, busy
from opensan.serve.schemas import Question, WordSpec, one_line
from opensan.serve.task_images import TaskImages
from opensan.vocabulary import Vocabulary

if TYPE_CHECKING:
    from opensan.serve.app import Service

CONTROLS = {"BrushLabels": "brushlabels", "PolygonLabels": "polygonlabels", "KeyPointLabels": "keypointlabels"}
"""Tags with labels that are answered -> the type of their regions."""

MOST_TASKS = 128
"""Tasks of a request; Label Studio sends at most 100."""


@dataclass(frozen=True)
class Control:
    """A tag of labels in a labelling configuration."""

    name: str
    kind: str
    """Type of its regions, one of the values of CONTROLS."""
    image: str
    """Name of its image's tag."""
    key: str
    """The key of the image in a task's data."""
    words: tuple[WordSpec, ...]
    shown: tuple[str, ...]
    """Names of the words in results: their aliases, where they have some."""


class LabelStudioBackend:
    """Answers one Label Studio."""

    def __init__(self, segmenter: Segmenter, limits: ServiceLimits, images: TaskImages) -> None:
        self.version = str(segmenter.identity)
        self._segmenter = segmenter
        self._limits = limits
        self._images = images
        self._requests = 0

    async def setup(self, body: bytes) -> dict[str, str]:
        """Return the model's version for a project. Raises Problem (422) if its configuration can't be used.

        The host and the access token that the request brings are not used: whoever asks could name any.
        """
        data = await _parsed(body)
        self._vocabularies(read_controls(data.get("schema")))
        return {"model_version": self.version}

    async def predict(self, body: bytes, service: "Service") -> dict[str, Any]:
        """Return a prediction for each task, in their order.

        A task whose image can't be read has an `error` in place of a prediction; if that is so for all of them, the
        request is refused. Raises Problem as the service's other routes.
        """
        if self._requests >= self._limits.waiting:
            raise busy(f"{self._requests} requests of Label Studio are waiting already: try again later", 1)
        self._requests += 1
        try:
            data = await _parsed(body)
            tasks = data.get("tasks")
            if not isinstance(tasks, list) or not all(isinstance(task, dict) for task in tasks):
                raise Problem(422, "tasks: a list of tasks is expected")
            if len(tasks) > MOST_TASKS:
                raise Problem(
                    422, f"{len(tasks):,} tasks are more than the limit of {MOST_TASKS}: send fewer at a time"
                )
            controls = read_controls(data.get("label_config"))
            vocabularies = self._vocabularies(controls)
            results, problems = [], []
            for task in tasks:
                try:
                    results.append(await self._predicted(task, controls, vocabularies, service))
                except Problem as problem:
                    if problem.status_code not in (413, 422):  # not about this task
                        raise
                    problems.append(Problem(problem.status_code, f"task {short(task.get('id'))}: {problem.detail}"))
                    results.append({"error": problems[-1].detail})  # which Label Studio logs, and asks again later
            if tasks and len(problems) == len(tasks):
                raise problems[0]
            return {"results": results, "model_version": self.version}
        finally:
            self._requests -= 1

    async def _predicted(
        self,
        task: Mapping[str, Any],
        controls: Sequence[Control],
        vocabularies: Sequence[Vocabulary],
        service: "Service",
    ) -> dict[str, Any]:
        values = task.get("data")
        if not isinstance(values, dict):
            raise Problem(422, "its data is missing")
        encodings: dict[str, Encoding] = {}
        result: list[dict[str, Any]] = []
        for control, vocabulary in zip(controls, vocabularies, strict=True):
            if control.key not in encodings:
                if control.key not in values:
                    raise Problem(422, f"its data has no {short(control.key)}, which the labelling configuration shows")
                data = await self._images.read(values[control.key])
                encodings[control.key] = await service.engine.encode(data, self._segmenter)
                del data
            result += await service.engine.ask(
                lambda control=control, vocabulary=vocabulary: self._regions(  # type: ignore[misc]
                    encodings[control.key], control, vocabulary
                ),
                before=service.reading(self._segmenter, vocabulary),
                accepted=True,
            )
        for number, region in enumerate(result):
            region["id"] = f"opensan-{number}"  # of all controls
        return {"result": result, "score": mean_score(result), "model_version": self.version}

    def _regions(self, encoding: Encoding, control: Control, vocabulary: Vocabulary) -> list[dict[str, Any]]:
        segmentation = self._segmenter.segment(encoding, vocabulary)
        confidence = mean_confidence(segmentation.labels, segmentation.confidence, len(segmentation.names))
        return label_studio_regions(
            control.kind, segmentation.labels, control.shown, confidence, from_name=control.name, to_name=control.image
        )

    def _vocabularies(self, controls: Sequence[Control]) -> list[Vocabulary]:
        """Return each control's words. Where the model can tell, pixels that none of them deserves stay free."""
        found = []
        for control in controls:
            try:
                question = Question.model_validate({"words": list(control.words)})
            except ValidationError as error:
                raise Problem(422, f"{control.name}: {one_line(error.errors())}") from None
            vocabulary = question.vocabulary(self._limits)
            try:
                found.append(self._segmenter.with_rest(vocabulary))
            except UserError:  # the model proposes no masks, or did not learn "no object"
                found.append(vocabulary)
        return found


def read_controls(config: Any) -> list[Control]:
    """Return the tags of a labelling configuration that can be answered. Raises Problem (422) if there are none."""
    if not isinstance(config, str):
        raise Problem(422, "the labelling configuration (XML) is missing")
    if re.search(r"<!(?!--)", config):  # an entity could stand for gigabytes, or for a file
        raise Problem(422, "the labelling configuration must not have <!DOCTYPE> or <!ENTITY>")
    try:
        root = ElementTree.fromstring(config)
    except (ElementTree.ParseError, ValueError) as error:
        raise Problem(422, f"the labelling configuration is not XML ({error})") from None
    images = {tag.get("name"): tag.get("value", "") for tag in root.iter("Image")}
    controls = [_control(tag, kind, images) for name, kind in CONTROLS.items() for tag in root.iter(name)]
    if not controls:
        raise Problem(422, f"the labelling configuration has none of {', '.join(CONTROLS)}, which this service answers")
    return controls


def _control(tag: ElementTree.Element, kind: str, images: Mapping[str | None, str]) -> Control:
    name, image = tag.get("name", ""), tag.get("toName", "")
    value = images.get(image, "")
    if not name or not re.fullmatch(r"\$\w+", value):
        raise Problem(422, f"{tag.tag} {short(name)}: its toName must name an <Image> whose value is one like $image")
    labels = [label for label in tag.iter("Label") if label.get("value")]
    if not labels:
        raise Problem(422, f"{tag.tag} {short(name)}: has no <Label value=...>")
    return Control(
        name=name,
        kind=kind,
        image=image,
        key=value[1:],
        words=tuple(_word(label) for label in labels),
        shown=tuple(label.get("alias") or label.get("value") or "" for label in labels),
    )


def _word(label: ElementTree.Element) -> WordSpec:
    """Return a label's word. `predicted_values` are what the model reads instead, as in other backends."""
    name = label.get("value", "")
    read = [text.strip() for text in label.get("predicted_values", "").split(",") if text.strip()]
    read = [name if text.lower() == name.lower() else text for text in read]  # "car" of a label "Car" is no other text
    return WordSpec.model_validate({"name": name, **({"text": read[0], "synonyms": read[1:]} if read else {})})


async def _parsed(body: bytes) -> dict[str, Any]:
    try:
        data = await asyncio.to_thread(json.loads, body)  # up to 20 MB
    except (ValueError, RecursionError):
        raise Problem(400, "the body is not JSON") from None
    if not isinstance(data, dict):
        raise Problem(422, "an object is expected")
    return data
