"""Chat templates, rendered so that it is known which characters a message says and which the template does.

A template sees what it sees in `transformers` (`apply_chat_template`): the same variables, functions, filters and tags,
in jinja2's sandbox. Contents of messages are given as `Said`, a text that knows where its characters are from, through
whatever the template does with it. What cannot be followed counts as said by a message: a control token in it is then
text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from itertools import accumulate
from types import GeneratorType
from typing import Any, SupportsIndex

from jinja2 import TemplateError, Undefined, nodes
from jinja2.environment import Template
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATE, ASSISTANT, OTHERS = range(3)
"""Who wrote a character: the template, an assistant's message, another message."""

_TOGETHER = "written one after the other"  # a filter in the place of the operator ~; no template can name it
_FIRST_MARK, _NUM_MARKS = 0xF0000, 0x20000  # the two private planes


class Said(str):
    """A text with the origin of each of its characters.

    Attributes:
        origin: `TEMPLATE`, `ASSISTANT` or `OTHERS` for each character.
    """

    __slots__ = ("origin",)
    origin: bytes

    def __new__(cls, text: str, origin: bytes | int = OTHERS) -> Said:
        made = super().__new__(cls, text)
        made.origin = bytes([origin]) * len(made) if isinstance(origin, int) else origin
        assert len(made.origin) == len(made)
        return made

    def __str__(self) -> str:
        return self

    def __getitem__(self, key: SupportsIndex | slice) -> Said:
        place = key if isinstance(key, slice) else range(len(self))[key]
        return Said(super().__getitem__(key), self.origin[place])

    def __iter__(self) -> Iterator[str]:
        return (self[place] for place in range(len(self)))

    def __add__(self, other: str) -> str:
        return together([self, other]) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> str:
        return together([other, self]) if isinstance(other, str) else NotImplemented

    def __mul__(self, times: SupportsIndex) -> Said:
        return Said(super().__mul__(times), self.origin * int(times))

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> Said:
        return Said(super().__mod__(values))

    def strip(self, chars: str | None = None, /) -> Said:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> Said:
        return self[len(self) - len(super().lstrip(chars)) :]

    def rstrip(self, chars: str | None = None, /) -> Said:
        return self[: len(super().rstrip(chars))]

    def removeprefix(self, prefix: str, /) -> Said:
        return self[len(self) - len(super().removeprefix(prefix)) :]

    def removesuffix(self, suffix: str, /) -> Said:
        return self[: len(super().removesuffix(suffix))]

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().split(sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._found(super().rsplit(sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        with_ends, lines = super().splitlines(keepends=True), super().splitlines(keepends)
        starts = accumulate(map(len, with_ends), initial=0)
        return [self[start : start + len(line)] for start, line in zip(starts, lines, strict=False)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().partition(sep)
        return self._at(len(before), len(before) + len(found))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, found, _ = super().rpartition(sep)
        return self._at(len(before), len(before) + len(found))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if old:
            return Said("").join_with(new, self.split(old, count))
        return Said(super().replace(old, new, count))

    def join(self, parts: Iterable[str], /) -> str:
        return self.join_with(self, parts)

    @staticmethod
    def join_with(between: str, parts: Iterable[str]) -> str:
        return together([piece for part in parts for piece in (between, part)][1:])

    def _at(self, start: int, end: int) -> tuple[str, str, str]:
        return self[:start], self[start:end], self[end:]

    def _found(self, parts: Sequence[str], sep: str | None) -> list[str]:
        found: list[str] = []
        at = 0
        for part in parts:
            at = at if sep else self.find(part, at)
            found.append(self[at : at + len(part)])
            at += len(part) + len(sep or "")
        return found


def _keep_places(name: str) -> None:
    """Makes a method that changes characters one by one give a text that knows their origin."""
    method = getattr(str, name)

    @wraps(method)
    def changed(self: Said, *args: Any) -> Said:
        text = method(self, *args)
        return Said(text, self.origin if len(text) == len(self) else OTHERS)  # ß becomes SS

    setattr(Said, name, changed)


for _name in ("capitalize", "casefold", "lower", "swapcase", "title", "translate", "upper"):
    _keep_places(_name)
for _name in ("center", "expandtabs", "ljust", "rjust", "zfill"):  # no change, or another length
    _keep_places(_name)


def origin_of(text: str) -> bytes:
    """The origin of each character of a text; one that does not know is the template's."""
    return text.origin if isinstance(text, Said) else bytes(len(text))


def together(parts: Iterable[str]) -> str:
    """Texts one after the other."""
    parts = list(parts)
    text = "".join(parts)
    return Said(text, b"".join(map(origin_of, parts))) if any(isinstance(part, Said) for part in parts) else text


OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""What a template is given of the conversation itself."""


class ChatTemplate:
    """A chat template that has been compiled.

    Attributes:
        source: its text.
    """

    def __init__(self, source: str) -> None:
        """Compiles a template.

        Raises:
            jinja2.TemplateError: it does not compile.
        """
        self.source = source
        self._template = _compile(source)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        special_tokens: Mapping[str, str],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Text of a conversation; a `Said` if a message has some.

        Args:
            special_tokens: texts of those that have a name, such as "bos_token".
            tools: descriptions of functions, as OpenAI has them.
            variables: others that the template may read, such as "enable_thinking"; none of `OWN_VARIABLES`.

        Raises:
            jinja2.TemplateError: it refuses the conversation.
        """
        return self._template.render(
            messages=[dict(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=add_generation_prompt,
            **special_tokens,
            **(variables or {}),
        )


# --- following texts through what a template calls ------------------------------------------------------------------


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"%"})  # 'a text' % (b, c) asks none of them
    concat = staticmethod(together)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        return _followed(lambda a, b: super(_Environment, self).call_binop(context, operator, a, b), (left, right), {})

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return super(_Environment, __self).call(__context, __obj, *args, **kwargs)

        # What a macro writes is put together by `concat`, and methods of texts that know their origin give such.
        if isinstance(__obj, Macro):
            return call(*args, **kwargs)
        if isinstance(getattr(__obj, "__self__", None), Said):
            if isinstance(given := call(*args, **kwargs), bytes):
                raise TemplateError(
                    "it makes bytes of a message, of which nobody knows afterwards that they were one's"
                )
            return given
        return _followed(call, args, kwargs)


def _followed(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a function gives, whose texts know their origin even if the function's do not.

    It is called a second time with private characters in the place of what messages say. If both results are the same
    but for those, it only moved them; if not, all it gave counts as said by a message. A `Said` that it gives is no
    better than a plain text: it may have been put together with a plain one.
    """
    args = [list(each) if isinstance(each, GeneratorType) else each for each in args]
    given = function(*args, **kwargs)
    if not _has_text(given) or not _is_said([args, kwargs]):
        return given
    if args and isinstance(args[0], Said) and isinstance(given, str) and str.lower(given) == str.lower(args[0]):
        return Said(given, args[0].origin)  # no more than upper and lower case
    marks = _Marks(args, kwargs, given)
    try:
        marked = marks.read(function(*marks.put(args), **marks.put(kwargs)))
    except Exception:  # whatever it says of such characters, of the right ones it has said nothing
        marked = None
    return marked if marked == given and marks.fit else _all_said(given)


def _is_said(value: Any) -> bool:
    """Whether there is something of a message in a value."""
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    return isinstance(value, Said) or (isinstance(value, list | tuple) and any(map(_is_said, value)))


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping):
        value = list(value.values())
    return isinstance(value, str) or (isinstance(value, list | tuple) and any(map(_has_text, value)))


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: _changed(each, change) for key, each in value.items()}
    return type(value)(_changed(each, change) for each in value) if type(value) in (list, tuple) else value


def _all_said(value: Any) -> Any:
    return _changed(value, lambda text: Said(str.__str__(text)))


class _Marks:
    """A private character for each character and origin.

    Attributes:
        fit: whether they sufficed.
    """

    def __init__(self, *values: Any) -> None:
        """Begins without a mark.

        Args:
            values: no mark is a character that occurs in these.
        """
        self._marks: dict[tuple[str, int], str] = {}
        self._meant: dict[str, tuple[str, int]] = {}
        self._used: set[str] = set()
        _changed(values, self._use)
        self._free = (chr(code) for code in range(_FIRST_MARK, _FIRST_MARK + _NUM_MARKS))
        self.fit = True

    def put(self, value: Any) -> Any:
        return _changed(value, self._put)

    def read(self, value: Any) -> Any:
        return _changed(value, self._read)

    def _use(self, text: str) -> str:
        self._used.update(str.__str__(text))
        return text

    def _put(self, text: str) -> str:
        return "".join(map(self._mark, str.__str__(text), origin_of(text)))

    def _mark(self, char: str, origin: int) -> str:
        if origin == TEMPLATE:
            return char
        if (char, origin) not in self._marks:
            mark = next((mark for mark in self._free if mark not in self._used), "")
            self.fit &= bool(mark)
            self._marks[char, origin], self._meant[mark] = mark, (char, origin)
        return self._marks[char, origin]

    def _read(self, text: str) -> str:
        chars = zip(str.__str__(text), origin_of(text), strict=True)
        read = [self._meant.get(char, (char, origin)) for char, origin in chars]
        return Said("".join(char for char, _ in read), bytes(origin for _, origin in read))


# --- jinja2 ---------------------------------------------------------------------------------------------------------


class _Generation(Extension):
    """The tag `{% generation %}`, which marks what training learns; what it encloses is written as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """The filter `tojson`; unlike jinja2's it does not escape for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


# Filters that hand on what they are given, and such that of a text call no more than a method.
_HANDING_ON = {
    *("attr", "d", "default", "first", "items", "last", "list", "map", "reject", "rejectattr", "reverse", "select"),
    "selectattr",
}
_METHODS = {"capitalize", "lower", "replace", "trim", "upper"}


def _filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def followed(*args: Any, **kwargs: Any) -> Any:
        if name in _METHODS and isinstance(next((one for one in args if not isinstance(one, EvalContext)), None), Said):
            return function(*args, **kwargs)
        return _followed(function, args, kwargs)

    return function if name in _HANDING_ON else followed


def _shown(value: Any) -> Any:
    """What a template writes of a value.

    Lists and objects may have something of a message in them, so all of their text counts as a message's.
    """
    return value if value is None or isinstance(value, str | int | float | Undefined) else Said(str(value))


def _compile(source: str) -> Template:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, finalize=_shown, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.filters = {name: _filter(name, function) for name, function in environment.filters.items()}
    environment.filters[_TOGETHER] = lambda parts: together(str(_shown(part)) for part in parts)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(_without_concat(environment.parse(source)))


def _without_concat(node: Any) -> Any:
    """The same syntax tree with a filter of ours in the place of the operator ~, which makes plain texts."""
    for name, value in node.iter_fields():
        if isinstance(value, nodes.Node):
            setattr(node, name, _without_concat(value))
        elif isinstance(value, list):
            setattr(node, name, [_without_concat(each) if isinstance(each, nodes.Node) else each for each in value])
        elif isinstance(value, tuple):  # nodes of pairs, such as the body of an elif, are lists
            setattr(
                node, name, tuple(_without_concat(each) if isinstance(each, nodes.Node) else each for each in value)
            )
    if not isinstance(node, nodes.Concat):
        return node
    parts = nodes.List(node.nodes, lineno=node.lineno)
    made = nodes.Filter(parts, _TOGETHER, [], [], None, None, lineno=node.lineno)
    assert node.environment is not None
    return made.set_environment(node.environment)
