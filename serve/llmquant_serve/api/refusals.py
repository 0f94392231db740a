"""Why a request is refused: which parameter, what it was, what is allowed.

pydantic finds what is wrong; its words are those of Python's types. What is allowed is read from
the JSON schema of the request instead, which ``/openapi.json`` shows too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from llmquant_serve.api.requests import UNSUPPORTED
from llmquant_serve.errors import ApiError, bad_request

_QUOTED = 80  # characters of a value
_MISSING = object()
Place = tuple[str | int, ...]
# What pydantic calls the branch of a union that takes this type.
_BRANCHES = {"string_type": "string", "int_type": "integer", "list_type": "array"}


def refusal(errors: Sequence[Mapping[str, Any]], body: Any, model: type[BaseModel]) -> ApiError:
    """A 400 for what pydantic reports of ``body``, the most precise of it."""
    first = errors[0]
    if first["type"] == "json_invalid":
        why = first.get("ctx", {}).get("error", first["msg"])
        return bad_request(f"the body is not JSON: {why}", code="invalid_json")
    if not isinstance(body, dict):
        return bad_request(
            f"the body is {'empty' if body is None else _shown(body)}; it must be a JSON object",
            code="invalid_json",
        )
    path, error = _meant(errors, body)
    where = ".".join(str(part)[:_QUOTED] for part in path) or None
    name, value = str(path[-1]) if path else "body", _value(body, path)
    if error["type"] == "extra_forbidden":
        if name in UNSUPPORTED:
            lacks = f"this server does not have {UNSUPPORTED[name]}, so it must be left out"
            return bad_request(
                f"{where} is {_shown(value)}; {lacks}", where, "unsupported_parameter"
            )
        message = f"unrecognized parameter: {where} is {_shown(value)}; it must be left out"
        return bad_request(message, where, "unknown_parameter")
    if error["type"] == "string_unicode":
        message = f"{where or 'the body'} is {_shown(value)}, which is not valid Unicode"
        return bad_request(message, where, "invalid_value")
    schema = model.model_json_schema()
    allowed = _words(_fragment(schema, path), schema.get("$defs", {}), error["type"])
    if name == "type" and value in UNSUPPORTED:
        allowed += f": this server does not have {UNSUPPORTED[value]}"
    said = "missing" if value is _MISSING else _shown(value)
    return bad_request(
        f"{where or 'the body'} is {said}; it must be {allowed}", where, "invalid_value"
    )


def _meant(errors: Sequence[Mapping[str, Any]], body: Any) -> tuple[Place, Mapping[str, Any]]:
    """The error that matters, and its place. Of a union every branch complains; the branch whose
    first complaint comes last is the one that was meant, or the one that only has too many
    entries."""
    first: dict[Place, tuple[Place, Mapping[str, Any]]] = {}
    for error in errors:
        path, branch = _place(error, body)
        first.setdefault(branch, (path, error))

    def rank(placed: tuple[Place, Mapping[str, Any]]) -> tuple[bool, int, list[int]]:
        path, error = placed
        entries = [part if isinstance(part, int) else 0 for part in path]
        return error["type"] == "too_long", len(path), entries

    return max(first.values(), key=rank)


def _place(error: Mapping[str, Any], body: Any) -> tuple[Place, Place]:
    """Where an error is in the body: pydantic's place without the branches of unions; and these."""
    path, branch, here = list[str | int](), list[str | int](), body
    parts = error["loc"][1:] if error["loc"][:1] == ("body",) else error["loc"]
    for i, part in enumerate(parts):
        inside = (
            isinstance(part, int) and part < len(here)
            if isinstance(here, list)
            else isinstance(here, dict) and part in here
        )
        if inside:
            here = here[part]
        elif not (error["type"] == "missing" and i == len(parts) - 1):
            branch.append(part)
            continue
        path.append(part)
    return tuple(path), tuple(branch)


def _value(body: Any, path: Sequence[str | int]) -> Any:
    """What the body has in a place; ``_MISSING`` where it has nothing."""
    for part in path:
        if isinstance(body, dict) and part not in body:
            return _MISSING
        body = body[part]
    return body


def _shown(value: Any) -> str:
    """A value as JSON, a long one by its length."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (ValueError, RecursionError):  # numbers of thousands of digits, a hundred brackets
        return "a value that is too large to show"
    if isinstance(value, list) and value:
        return (
            f"a list of {len(value)}: {text}" if len(text) <= _QUOTED else f"a list of {len(value)}"
        )
    if len(text) > _QUOTED and isinstance(value, str):
        return f"a text of {len(value)} characters"
    return text if len(text) <= _QUOTED else f"{text[:_QUOTED]}…"


def _fragment(schema: Mapping[str, Any], path: Sequence[str | int]) -> Mapping[str, Any]:
    """The part of a JSON schema that a place of the body must fit."""
    defs, here = schema.get("$defs", {}), [schema]
    for part in path:
        options = [o for s in here for o in _options(s, defs)]
        here = [o["items"] for o in options if "items" in o and isinstance(part, int)]
        here += [o["properties"][part] for o in options if part in o.get("properties", {})]
        here += [
            o["additionalProperties"]
            for o in options
            if isinstance(o.get("additionalProperties"), dict) and isinstance(part, str)
        ]
    return {"anyOf": here}


def _options(schema: Mapping[str, Any], defs: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The branches of a schema, references followed, null left out."""
    if "$ref" in schema:
        return _options(defs[schema["$ref"].rpartition("/")[2]], defs)
    if "anyOf" in schema:
        return [o for s in schema["anyOf"] for o in _options(s, defs)]
    return [] if schema.get("type") == "null" else [schema]


def _words(schema: Mapping[str, Any], defs: Mapping[str, Any], error: str = "") -> str:
    """What a schema allows, in words; of several types the one that ``error`` misses."""
    if described := [s["description"] for s in schema.get("anyOf", ()) if "description" in s]:
        return str(described[0])
    options = _options(schema, defs)
    options = [o for o in options if o.get("type") == _BRANCHES.get(error)] or options
    words = [_kind(option, defs) for option in options]
    return " or ".join(dict.fromkeys(words)) or "left out"


def _kind(option: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "enum" in option or "const" in option:
        return " or ".join(json.dumps(v) for v in option.get("enum", [option.get("const")]))
    match option.get("type"):
        case "integer" | "number" as kind:
            return f"{'an integer' if kind == 'integer' else 'a number'}{_bounds(option)}"
        case "boolean":
            return "true or false"
        case "string":
            most = option.get("maxLength")
            return "a text" if most is None else f"a text of at most {most} characters"
        case "array":
            least, most = option.get("minItems", 0), option.get("maxItems")
            count = f"{least or 'at most'}{f' to {most}' if least else f' {most}'}" if most else ""
            count = count or (f"at least {least}" if least else "")
            return f"a list{f' of {count}' if count else ''}, each {_words(option.get('items', {}), defs)}"
        case "object":
            names = ", ".join(option.get("properties", ()))
            return f"an object with {names}" if names else "an object"
    return "any value"


def _bounds(option: Mapping[str, Any]) -> str:
    least = option.get("minimum")
    most = option.get("maximum")
    above, below = option.get("exclusiveMinimum"), option.get("exclusiveMaximum")
    if below is not None and option["type"] == "integer":
        most, below = below - 1, None
    low = (
        f" from {_plain(least)}"
        if least is not None
        else f" above {_plain(above)}"
        if above is not None
        else ""
    )
    high = (
        f" to {_plain(most)}"
        if most is not None
        else f" below {_plain(below)}"
        if below is not None
        else ""
    )
    return low + high


def _plain(number: float) -> str:
    return str(int(number)) if number == int(number) else str(number)
