"""Read a request's upload: an image file, or a form with one and fields of text."""

from typing import Any

from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from opensan.serve.limits import Problem

CHARSETS = ("utf-8", "us-ascii", "iso-8859-1", "windows-1252", "utf-16")
"""Charsets of a form's text: `charset` in its Content-Type, else UTF-8 (RFC 7578, section 5.1.2)."""


async def uploaded(request: Request, fields: set[str], most_fields: int = 0) -> tuple[bytes, dict[str, list[str]]]:
    """Return the image file, and the values of each of the other `fields` of a form, in their order.

    Raises Problem, one line: 400 for a form that cannot be read, 415 for another media type, 422 for other fields.
    """
    header = request.headers.get("content-type", "")
    media_type = header.partition(";")[0].strip().lower()
    if media_type != "multipart/form-data":
        raw = media_type.startswith("image/") or media_type == "application/octet-stream"
        if fields or not raw:
            wanted = "a multipart form" if fields else "image/* or a multipart form"
            raise Problem(415, f"the image must come as {wanted}, not as {media_type[:100] or 'nothing'}")
        return await request.body(), {}
    charset = _charset(header)
    # Read as Latin-1, byte for byte, because the parser silently replaces what it cannot decode.
    headers = Headers({"content-type": _with_charset(header)})
    try:
        form = await MultiPartParser(headers, request.stream(), max_files=1, max_fields=most_fields + 1).parse()
    except MultiPartException as error:
        raise Problem(400, f"the form cannot be read ({error.message.rstrip('.')})") from None
    try:
        values: dict[str, list[Any]] = {}
        for name, value in form.multi_items():
            values.setdefault(name, []).append(value)
        unknown = sorted(set(values) - fields - {"image"})
        if unknown:
            known = ", ".join(sorted(fields | {"image"}))
            raise Problem(422, f"unknown field {unknown[0][:100]!r}: known are {known}")
        image, *others = values.pop("image", [None])
        if others or not isinstance(image, UploadFile):
            raise Problem(422, "the form needs the image's file, once, in a field 'image'")
        return await image.read(), {
            name: [_text(value, name, charset) for value in texts] for name, texts in values.items()
        }
    finally:
        await form.close()


def _charset(header: str) -> str:
    given = parse_options_header(header)[1].get(b"charset", b"utf-8").decode("latin-1").strip().lower()
    given = {"utf8": "utf-8", "ascii": "us-ascii", "latin-1": "iso-8859-1", "latin1": "iso-8859-1"}.get(given, given)
    if given not in CHARSETS:
        raise Problem(415, f"charset {given[:40]!r} is not known: send the form in UTF-8, or as {', '.join(CHARSETS)}")
    return given


def _with_charset(header: str) -> str:
    boundary = parse_options_header(header)[1].get(b"boundary")
    if boundary is None:
        raise Problem(400, "the form cannot be read: its Content-Type has no boundary")
    quoted = boundary.decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
    return f'multipart/form-data; charset=latin-1; boundary="{quoted}"'


def _text(value: str | UploadFile, name: str, charset: str) -> str:
    if isinstance(value, UploadFile):
        raise Problem(422, f"the field {name!r} must be text")
    try:
        return value.encode("latin-1").decode(charset)
    except UnicodeDecodeError:
        raise Problem(422, f"the field {name!r} is not {charset}") from None
