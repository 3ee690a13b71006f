"""What keeps the package livable: short functions, few arguments, and each option documented once."""

import ast
import inspect
import pydoc
import re
import typing
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


def _imports(module: str) -> set[str]:
    """Which of our modules a module imports."""
    package = Path(dho2.__file__).parent
    found = set()
    for path in (package / module).glob("*.py") if (package / module).is_dir() else [package / f"{module}.py"]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "dho2_optax":
                found |= {name.name for name in node.names}
            elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dho2_optax."):
                found.add(node.module.split(".")[1])
    ours = {path.stem for path in package.glob("[a-z]*")}
    return (found & ours) - {module}


def test_modules_import_what_the_architecture_says():
    page = (Path(__file__).parent.parent / "ARCHITECTURE.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \|.*\|([^|]*)\|$", page, flags=re.MULTILINE))
    assert rows.keys() >= {path.stem for path in Path(dho2.__file__).parent.glob("[a-z]*.py")}
    above: list[str] = []
    for module, said in rows.items():
        named, imports = set(re.findall(r"`(\w+)`", said)), _imports(module)
        assert named <= imports <= set(above), module
        if "and below" in said:
            named |= set(above[: max(map(above.index, named))])
        assert imports <= named or "the public interface" in said, (module, imports - named)
        above.append(module)


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


def _signatures(thing: object) -> list[inspect.Signature]:
    """Of a function, or of a class and of the methods that it does not inherit."""
    methods = vars(thing).items() if inspect.isclass(thing) else ()
    own = [method for name, method in methods if inspect.isfunction(method) and not name.startswith("_")]
    return [inspect.signature(x) for x in (thing, *own)]


@pytest.mark.parametrize("name", sorted(set(dho2.__all__) - {"__version__"}))
def test_signatures_can_be_read(name):
    """In `help()` types have the names that the source gives them, not what these stand for."""
    shown = pydoc.plain(pydoc.render_doc(getattr(dho2, name)))
    assert "ForwardRef" not in shown.partition("inherited from")[0]
    for signature in _signatures(getattr(dho2, name)):
        for parameter in signature.parameters.values():
            assert len(str(parameter)) <= 70
        assert not re.search("Literal|ForwardRef|<|jaxlib", str(signature))  # "<" as in <object object at 0x7f...>
        assert len(str(signature)) <= 500
        assert str(signature) in shown


@pytest.mark.parametrize("kind", [dho2.Density, dho2.Metric, dho2.Spectrum])  # of `DHO2State` those of optax are not
def test_types_of_the_fields_of_tuples_are_found(kind):
    hints = typing.get_type_hints(kind)
    assert tuple(hints) == kind._fields
    assert not any(isinstance(hint, str | typing.ForwardRef) for hint in hints.values())
