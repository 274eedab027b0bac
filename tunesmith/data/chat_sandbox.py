"""The jinja sandbox that chat templates run in."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

OPEN, CLOSE = "\ufdd0", "\ufdd1"
"""Put around {% generation %} blocks while spans are sought: code points that Unicode keeps out of texts."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} … {% endgeneration %}: what stands between is the assistant's."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [jinja2.nodes.ContextReference()])
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context, caller):
        marks = context.get("_generation_marks")
        if marks is None:
            return caller()
        marks.append(None)
        return OPEN + caller() + CLOSE


class _Namespace(jinja2.utils.Namespace):
    """jinja's namespace() without names that begin with _: they would reach Python's internals."""

    def __init__(*args, **values):
        self, *rest = args
        held = dict(*rest, **values)
        for name in held:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, held)

    def __setitem__(self, name, value):
        _check_name(name)
        jinja2.utils.Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace must not hold the name {name}")


def sandbox() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """A jinja environment as chat templates expect it (transformers' rules), in which they can harm nothing."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_Namespace)
    return environment


def _tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    """JSON with letters and order as they are; jinja's own escapes HTML and sorts."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message):
    raise jinja2.TemplateError(str(message))


def _strftime_now(form):
    return datetime.now().strftime(form)
