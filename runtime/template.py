"""A chat template rendered as transformers renders it: the same sandbox, filters, functions and variables."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

from svdprune.runtime.errors import BundleError

Message = dict[str, Any]
"""{"role": "user" | "assistant" | "system", "content": [{"type": "image"} | {"type": "text", "text": str}, ...]}"""

# What the expressions of a template can raise on values that they were not written for.
_FAULTS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class ChatTemplate:
    """A compiled chat template.

    Args:
        source: jinja2 text.
        variables: what the template may use besides the messages, such as {"bos_token": "<s>", "eos_token": "</s>"}.

    Raises:
        BundleError: the template is not valid jinja2.
    """

    def __init__(self, source: str, variables: dict[str, str]) -> None:
        import jinja2

        self._variables = variables
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise BundleError(f"the chat template is broken at line {error.lineno} ({error.message})") from error

    def render(self, messages: list[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text, ending where the model is to answer when ``add_generation_prompt``.

        Raises:
            BundleError: the template refuses the messages (its own ``raise_exception``) or fails on them.
        """
        import jinja2

        try:
            return self._template.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (jinja2.TemplateError, *_FAULTS) as error:
            raise BundleError(f"the chat template cannot render the conversation ({error})") from error


def _environment() -> Any:
    """The environment of transformers' ``chat_template_utils``: templates come from a hub and are not trusted."""
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _namespace()
    return environment


class _TemplateDict:
    """``dict`` without its class, whose attributes are a way out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _namespace() -> type:
    """jinja2's namespace, refusing names with a leading underscore for the same reason."""
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a chat template cannot store {name!r} in a namespace")

    class TemplateNamespace(Namespace):
        def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's, so that `namespace(self=...)` works
            values = dict(*args[1:], **kwargs)
            for name in values:
                check(name)
            Namespace.__init__(args[0], values)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return TemplateNamespace


def _generation_tag() -> type:
    """``{% generation %}...{% endgeneration %}`` marks what the assistant wrote, for training: here its body is all."""
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser

    class GenerationTag(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Callable[[], str]) -> str:
            return caller()

    return GenerationTag


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja2's own filter escapes HTML characters."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
