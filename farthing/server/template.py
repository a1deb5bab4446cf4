"""A model's chat template, rendered in a sandbox as Hugging Face's templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class ChatTemplateError(ValueError):
    """The template refused the messages, or could not be rendered with them."""


class ChatTemplate:
    """Messages to the prompt of one model.

    `special_tokens` are the names a template may use: bos_token, eos_token, …
    Raises ChatTemplateError when the source is no valid template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
        environment.globals |= special_tokens
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"not a valid chat template: {error}") from error
        self._knows_developer = "developer" in source

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The prompt, up to where the assistant's answer begins. Raises ChatTemplateError."""
        try:
            return self._template.render(
                messages=[self._translate(message) for message in messages],
                add_generation_prompt=True,
                tools=None,
                documents=None,
            )
        except _Refusal as refusal:
            raise ChatTemplateError(str(refusal)) from refusal
        except Exception as error:  # whatever a template does with messages it did not foresee
            raise ChatTemplateError(f"{type(error).__name__}: {error}") from error

    def _translate(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """`developer` is OpenAI's newer name for `system`; few templates know it."""
        if message["role"] == "developer" and not self._knows_developer:
            return {**message, "role": "system"}
        return dict(message)


class _Refusal(jinja2.TemplateError):
    """A template called `raise_exception`."""


def _refuse(message: str) -> NoReturn:
    raise _Refusal(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which a prompt must not."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _GenerationBlock(Extension):
    """`{% generation %}` marks what to train on; here its body is rendered as if unmarked."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 reads it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
