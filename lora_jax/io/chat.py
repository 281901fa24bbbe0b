"""Chat templates, run in a sandbox: they come with the weights and are not trusted."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lora_jax.errors import InputError


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    special: Mapping[str, str] | None = None,
) -> str:
    """The text a chat template makes of messages; `special` are names such as eos_token.

    Templates see what transformers gives them: raise_exception, strftime_now, tojson. They can
    reach neither files nor Python. A template's own complaint is an InputError.

    >>> text = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(text, [{"role": "user", "content": "hi"}])
    '<user>hi'
    """
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **(special or {}),
            )
        )
    # Type errors are how a template fails on a message without text, or on an include.
    except (jinja2.TemplateError, TypeError) as fault:
        raise InputError(f"the chat template refuses these messages: {fault}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    # Not jinja's own, which escapes for HTML.
    return json.dumps(value, ensure_ascii=False, indent=indent)
