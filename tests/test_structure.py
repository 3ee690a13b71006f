"""What keeps the package livable: short functions, few arguments, and each option documented once."""

import ast
import inspect
import pydoc
import re
from pathlib import Path

import pytest

import dho2_optax as dho2

_MOST_LINES = 80  # of a function, without its signature and docstring
_MOST_ARGUMENTS = 14
_OPTIONS = (dho2.Eigensolver, dho2.Newton, dho2.BaseScale, dho2.Split)
_CONSTRUCTORS = (dho2.dho2, dho2.mr_dho2, dho2.fosi, dho2.CurvatureGroup)


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    body = function.body
    if ast.get_docstring(function) is not None:
        body = body[1:]
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def test_functions_are_short():
    long = set()
    for path in Path(dho2.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and _lines(node) > _MOST_LINES:
                long.add(f"{path.stem}.{node.name}")
    assert long == set()


def test_public_constructors_have_few_arguments():
    states = {"DHO2State", "Density", "Spectrum"}  # made by us
    for name in set(dho2.__all__) - states - {"__version__"}:
        assert len(inspect.signature(getattr(dho2, name)).parameters) <= _MOST_ARGUMENTS, name


def _documented(thing: object) -> dict[str, str]:
    """What a docstring's section `Args:` says, by argument."""
    section = re.search(r"^Args:\n((?:  .*\n?)+)", inspect.getdoc(thing) or "", flags=re.MULTILINE)
    assert section is not None, thing
    entries = re.split(r"^  (\w+): ", section[1], flags=re.MULTILINE)[1:]
    return {name: " ".join(text.split()) for name, text in zip(entries[::2], entries[1::2], strict=True)}


def test_every_option_is_documented_once():
    by_option: dict[str, list[str]] = {}
    for thing in (*_CONSTRUCTORS, *_OPTIONS):
        documented = _documented(thing)
        assert documented.keys() <= set(inspect.signature(thing).parameters)
        for name, text in documented.items():
            if not re.fullmatch(r"as in :\w+:`\w+`\.|see above\.", text):
                by_option.setdefault(name, []).append(text)
    assert {name: texts for name, texts in by_option.items() if len(texts) > 1} == {}


@pytest.mark.parametrize("thing", [*_CONSTRUCTORS, *_OPTIONS], ids=lambda x: x.__name__)
def test_what_is_not_documented_here_is_said_to_be_documented_elsewhere(thing):
    missing = set(inspect.signature(thing).parameters) - _documented(thing).keys()
    others = "All other arguments are those of :func:`dho2`." in (inspect.getdoc(thing) or "")
    assert others == bool(missing)
    if others:
        assert missing <= set(inspect.signature(dho2.dho2).parameters)


@pytest.mark.parametrize("name", sorted(set(dho2.__all__) - {"DHO2State", "Spectrum", "__version__"}))  # made by us
def test_signatures_can_be_read(name):
    """In `help()` types have the names that the source gives them, not what these stand for."""
    signature = inspect.signature(getattr(dho2, name))
    for parameter in signature.parameters.values():
        assert len(str(parameter)) <= 70
    assert "Literal" not in str(signature)
    assert len(str(signature)) <= 500
    assert str(signature) in pydoc.plain(pydoc.render_doc(getattr(dho2, name)))
