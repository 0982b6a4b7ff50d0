"""Schemas of requests and responses, for OpenAPI."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema, field_validator

from opensan.errors import UserError
from opensan.serve.limits import Problem, ServiceLimits
from opensan.vocabulary import Vocabulary, Word
from opensan.word_lists import TunedWords, word_list

PROMPTS_AT_ONCE = 256
"""Prompts embedded while other requests wait: about a second of B/16 on a CPU."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


# The rules for texts, as far as patterns can express them; `Vocabulary` checks them and explains mistakes.
_CONTROL = r"\x00-\x08\x0e-\x1b\x7f"


def _some(without: str) -> str:
    """Return the pattern of a text that is not blank, without control characters and characters of `without`."""
    return rf"[^{_CONTROL}{without}]*[^{_CONTROL}{without}\s][^{_CONTROL}{without}]*"


def _text(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": f"^{pattern}$"}


def comma_string(without: str = "", *, or_blank: bool = False) -> dict[str, Any]:
    """Return the schema of "road, car|automobile, sky"."""
    word = _some(rf",|{without}")
    return _text(rf"({word}([,|]{word})*{r'|[ ]*' if or_blank else ''})")


_TEMPLATE = rf"([^{_CONTROL}{{]|\{{(?!\}}))*\{{\}}([^{_CONTROL}{{]|\{{(?!\}}))*"
_COLOUR = "^#[0-9a-f]{6}$"
_Text = Annotated[str, WithJsonSchema(_text(_some("")))]
_Synonyms = Annotated[str, WithJsonSchema(_text(rf"{_some('|')}(\|{_some('|')})*"))]
_CommaString = Annotated[str, WithJsonSchema(comma_string())]
_Template = Annotated[str, WithJsonSchema(_text(_TEMPLATE))]


class WordSpec(_Strict):
    """A word with all its fields."""

    name: _Text = Field(description="What answers call it.")
    text: _Text | None = Field(None, description="What prompts say instead of the name.")
    synonyms: list[_Text] = Field([], description="Other texts for it; the best of all is its score.")
    prompts: list[_Text] = Field([], description="Full sentences instead of the templates.")
    background: bool = Field(False, description="It takes pixels, and they are answered as unlabelled.")


class TunedSpec(_Strict):
    """Vectors of words for one model."""

    model: str = Field("", max_length=200, description="Name of the model.")
    image: str = Field(max_length=200, description="Hash of its image half.")
    text: str = Field(max_length=200, description="Hash of its text half.")
    rows: dict[str, str] = Field({}, description="Word or synonym to its vector: float16, little-endian, base64.")
    context: str | None = Field(None, description="A vector that is added to the rows of all other words.")
    about: dict[str, Any] = Field({}, description="How they were found; not used.")


Words = _CommaString | Annotated[list[_Synonyms | WordSpec], Field(json_schema_extra={"minItems": 1})]
Background = Annotated[str, WithJsonSchema(comma_string(or_blank=True))] | list[_Synonyms | WordSpec]


class AskedWords(_Strict):
    """Words, as all questions name them."""

    words: Words = Field(description='"road, car|automobile, sky", or a list; | joins synonyms.')
    background: Background = Field([], description="Words whose pixels are answered as unlabelled.")
    templates: (
        Literal["vild", "single"]
        | Annotated[list[_Template], Field(json_schema_extra={"minItems": 1, "uniqueItems": True})]
        | None
    ) = Field(None, description='The prompts: a set\'s name, or texts with one "{}" each.')

    @field_validator("words", "background", mode="before")
    @classmethod
    def _listed(cls, words: Any) -> Any:
        """Return the entries that a text lists."""
        if not isinstance(words, str):
            return words
        if not isinstance(listed := word_list(words), list):
            raise UserError("an object with words and background: send them as fields of their own")
        return listed

    def vocabulary(self, limits: ServiceLimits) -> Vocabulary:
        """Return the vocabulary. Raises Problem (422), one line, if it exceeds `limits` or is not valid."""
        self._check(limits)
        try:
            return Vocabulary.parse(_plain(self.words), background=_plain(self.background), templates=self.templates)
        except UserError as error:
            raise Problem(422, str(error)) from None

    def _check(self, limits: ServiceLimits) -> None:
        texts = [*_texts(self.words), *_texts(self.background)]
        if len(texts) > limits.words:
            raise Problem(422, f"{len(texts):,} words and synonyms are more than the limit of {limits.words:,}")
        templates = self.templates if isinstance(self.templates, list) else []
        if len(templates) > limits.templates:
            raise Problem(422, f"{len(templates):,} templates are more than the limit of {limits.templates:,}")
        characters = sum(map(len, texts)) + sum(map(len, templates))
        if characters > limits.characters:
            raise Problem(422, f"{characters:,} characters are more than the limit of {limits.characters:,}")


class Question(AskedWords):
    """The words to look for."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"examples": [{"words": ["road", "car|automobile", "sky"]}]}
    )

    tuned: TunedSpec | None = Field(
        None, description="Vectors in the place of words' texts: what `opensan tune words` wrote as `tuned`."
    )
    rest: bool = Field(False, description="Pixels that none of the words deserves are answered as unlabelled.")
    colours: dict[_Text, Annotated[str, Field(pattern=_COLOUR)]] | None = Field(
        None, description="Colours of words in an overlay; other words have the palette's."
    )

    def vocabulary(self, limits: ServiceLimits) -> Vocabulary:
        """Return the vocabulary. Raises Problem (422), one line, if it exceeds `limits` or is not valid."""
        vocabulary = super().vocabulary(limits)
        if self.tuned is not None:
            if len(self.tuned.rows) > limits.words:
                raise Problem(
                    422, f"{len(self.tuned.rows):,} tuned vectors are more than the limit of {limits.words:,}"
                )
            try:
                vocabulary = replace(vocabulary, tuned=TunedWords.parse(self.tuned.model_dump(exclude_none=True)))
            except UserError as error:
                raise Problem(422, str(error)) from None
        if unknown := sorted(set(self.colours or ()).difference(vocabulary.names)):
            raise Problem(422, f"colours: there is no word {unknown[0][:100]!r}")
        return vocabulary


class PointQuestion(Question):
    """The words to look for, and a pixel."""

    x: Annotated[int, Field(ge=0, description="Column, from the left.")]
    y: Annotated[int, Field(ge=0, description="Row, from the top.")]


MOST_MARKED_IMAGES = 16
MOST_MARKS = 1_000
"""The marks that one image may have, at most."""
MOST_PLACES = 2_000
"""The points that one mark may have, at most."""

_Place = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=2, max_length=2)]


class MarkSpec(_Strict):
    """Points of a word in an image, or a line through them."""

    word: _Text = Field(description="The name of one of the words, or a synonym.")
    places: list[_Place] = Field(
        min_length=1, max_length=MOST_PLACES, description="Column and row of each point, from the top left corner."
    )
    joined: bool = Field(False, description="The line through the points is meant, not the points alone.")


class MarkedImage(_Strict):
    """An encoded image in which somebody marked words."""

    id: Annotated[str, Field(max_length=200)] = Field(description="Of the encoding.")
    marks: list[MarkSpec] = Field(min_length=1, max_length=MOST_MARKS)


class TuningQuestion(AskedWords):
    """Words, and where they are in some images."""

    images: list[MarkedImage] = Field(
        min_length=1, max_length=MOST_MARKED_IMAGES, description="Encoded by one and the same model."
    )


class TuningAnswer(BaseModel):
    """Words fitted to marks."""

    tuned: TunedSpec = Field(description="What questions take as `tuned`.")
    images: int
    pixels: int = Field(description="Marked pixels.")
    unmarked: list[str] = Field(description="Words without a mark: they keep their text.")
    before: float = Field(description="Mean IoU over the marked words, at the marked pixels themselves, in [0, 1].")
    after: float = Field(description="The same, with the fitted words.")


class EncodingInfo(BaseModel):
    """An encoded image, ready to be labelled."""

    id: str
    width: int
    height: int
    expires_in: float = Field(description="Seconds; every use begins them anew.")


class PointWord(BaseModel):
    """A word at the pixel."""

    name: str
    background: bool
    score: float = Field(description="Sum over proposals of class times mask probability, not clipped.")


class PointProposal(BaseModel):
    """One of the mask proposals that contribute to the pixel's word."""

    index: int
    share: float = Field(description="Of the winner's score, in [0, 1].")
    mask: float = Field(description="Its mask's probability at the pixel.")
    word_probability: float = Field(description="With which it is the winning word.")
    word: str = Field(description="The word it most probably is.")
    picture: str = Field(description="Its mask over the image, an 8-bit PNG at stride 16, base64.")


class PointAnswer(BaseModel):
    """Explanation of one pixel."""

    x: int
    y: int
    words: list[PointWord] = Field(description="Best first.")
    proposals: list[PointProposal] = Field(description="Largest share first.")


class Palettes(BaseModel):
    """The colours of words, as many as a request may have."""

    palettes: dict[str, list[str]] = Field(
        description='Name of a palette, the default first: "#rrggbb", first word\'s first.'
    )


class ServiceInfo(BaseModel):
    """Description of this service."""

    opensan: str
    model: str
    models: list[str] = Field(description="Names of the models that an image can be sent to, the default first.")
    device: str
    limits: dict[str, int]
    collection: bool = Field(False, description="Whether there is a collection to search: `/v1/collection`.")


class ProblemInfo(BaseModel):
    """The reason why a request was refused (RFC 9457)."""

    type: str
    title: str
    status: int
    detail: str


class Format(StrEnum):
    """The form of a segmentation."""

    json = "json"
    labels = "labels"
    overlay = "overlay"
    map = "map"


def question_from_form(fields: Mapping[str, Sequence[str]]) -> Question:
    """Read a question from a form's text fields: words in any form, templates a set's name, a text, or a JSON list.

    A field that is sent several times is one list; HTML forms and many clients send lists so.
    """
    try:
        values = {name: _from_field(name, texts) for name, texts in fields.items()}
        return Question.model_validate(values)
    except ValidationError as error:
        raise Problem(422, one_line(error.errors())) from None
    except UserError as error:
        raise Problem(422, str(error)) from None


def _from_field(name: str, texts: Sequence[str]) -> Any:
    if name == "rest":
        return {"true": True, "false": False}.get(texts[-1].strip().lower(), texts[-1])
    if name not in ("templates", "tuned"):  # these may hold commas
        return texts[0] if len(texts) == 1 else [word for text in texts for word in Question._listed(text)]
    if len(texts) > 1 or not texts[0].lstrip().startswith(("[", "{")):
        return texts[0] if len(texts) == 1 else list(texts)
    try:
        return json.loads(texts[0])
    except (ValueError, RecursionError):
        raise Problem(422, f"the field {name!r} is not valid JSON") from None


def text_parts(vocabulary: Vocabulary) -> list[Vocabulary]:
    """Split a long vocabulary into vocabularies of few prompts; none if it is short itself."""
    rows = vocabulary.prompts()
    if sum(map(len, rows)) <= 2 * PROMPTS_AT_ONCE:
        return []
    texts = [text for word in vocabulary.words for text in word.synonyms]
    parts: list[list[Word]] = [[]]
    size = 0
    for text, prompts in zip(texts, rows, strict=True):
        if parts[-1] and size + len(prompts) > PROMPTS_AT_ONCE:
            parts.append([])
            size = 0
        parts[-1].append(Word(text, prompts=tuple(prompts)))
        size += len(prompts)
    return [Vocabulary(tuple(words)) for words in parts]


def one_line(errors: Any) -> str:
    """Return the first of pydantic's errors as one line with the field."""
    error = errors[0]
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON ({error['ctx']['error']})"
    if error["type"] == "value_error":  # this package's message, a whole sentence
        return str(error["ctx"]["error"])
    field = next((part for part in error["loc"] if part in _FORMS), None)
    if field is not None:  # pydantic reports an error for each form that would be valid
        return f"{field}: {_FORMS[field]}"
    field_path = ".".join(str(part) for part in error["loc"] if part != "body")
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{field_path}: {error['msg']}{more}" if field_path else f"{error['msg']}{more}"


_FORMS = {
    "places": f"must be a list of 1 to {MOST_PLACES:,} points, each a column and a row, whole numbers from 0",
    "words": 'must be text, or a list of texts or of objects with a "name" (and "text", "synonyms", "prompts", '
    '"background")',
    "background": "must be text, or a list like words",
    "tuned": "must be what `opensan tune words` wrote",
    "rest": "must be true or false",
    "templates": 'must be "vild", "single", or a list of texts',
}


def _plain(words: Words) -> list[Any]:
    return [word if isinstance(word, str) else word.model_dump(exclude_none=True) for word in words]


def _texts(words: Words) -> Iterator[str]:
    """Return all texts for the model, before templates."""
    for word in words:
        if isinstance(word, str):
            yield from word.split("|")
        else:
            yield from (word.name, *([word.text] if word.text else []), *word.synonyms, *word.prompts)
