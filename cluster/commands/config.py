"""`medreasoner config [KEY]`: what a configuration key is, and where it is used. Also makes docs/configuration.md and
docs/schemas/, by `python -m cluster.commands.config`."""

import ast
import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel, TypeAdapter
from pydantic_core import PydanticUndefined
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.config import EvaluateConfig, SftConfig, TrainConfig
from cluster.config_keys import Key, keys, models
from serving.config import ServeConfig
from umrg.atomic import write_text
from umrg.config import Config
from umrg.mistake import Mistake

ROOT = Path(__file__).parents[2]
PACKAGES = ("umrg", "rewards", "reasoner", "learner", "actors", "cluster", "serving")
SCHEMAS: Mapping[str, type[Config]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "sft": SftConfig,
    "serve": ServeConfig,
}
"""The configurations by the command that reads them."""

_SAME_MODEL = {"model_validate", "model_copy"}
"""Methods that return an instance of the model that they are called on."""

_INTRODUCTION = """\
# Configuration

A run is configured by a YAML file, over which `key=value` arguments are laid (`learner.lr=1e-4`; values are YAML).
Everything is checked before anything starts, and an unknown key is answered with the nearest known one.
`medreasoner config KEY` prints one key, and where it is used. Editors complete and check the files by the JSON schemas
in [schemas/](schemas); the files in `configs/` name theirs in the first line.

A run resumes (`resume=auto`) with the values that it began with; only keys marked *yes* under "resume" may differ.

Overrides and "did you mean" are a few lines of `cluster/config.py` over PyYAML and pydantic. OmegaConf was weighed: it
would interpolate `${…}` in prompts, and has a grammar of its own for values. pydantic-settings was weighed: its
command-line source takes JSON where this one takes YAML, such as `data.train={phantoms: 100}`.

This page is made from the fields' own documentation by `python -m cluster.commands.config`.
"""


def print_keys(console: Console) -> None:
    """Print all keys with the first sentence on each."""
    table = Table("key", "runs", "what it is", box=None if not console.is_terminal else box.SIMPLE_HEAD)
    for name, found in all_keys().items():
        first = next(iter(found.values()))
        table.add_row(name, " ".join(found), escape(description(first).partition(". ")[0]))
    console.print(table)


def print_key(name: str, console: Console) -> None:
    """Print what a key is, its type and default in each run, and where it is used. Raises ValueError for an unknown
    one."""
    known = all_keys()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        ending = [key for key in known if key.endswith(f".{name}")]
        hint = f"did you mean {' or '.join(ending or near)}?" if ending or near else "medreasoner config lists all"
        raise Mistake(f"there is no configuration key {name!r}; {hint}")
    found = known[name]
    first = next(iter(found.values()))
    console.print(f"{name}\n", style="bold", highlight=False)
    console.print(description(first) + "\n", highlight=False, markup=False)
    for run, key in found.items():
        changes = "may change on resume" if key.may_change else "fixed for the run"
        text = f"{run:10}{_type(key)}, {_default(key)}; {changes}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    beneath = [key for key in known if key.rpartition(".")[0] == name]
    if beneath:
        console.print("\nkeys: " + ", ".join(beneath), highlight=False)
    used = sorted({place for key in found.values() for place in uses(key)})
    for place in used:
        console.print(f"  {place}", highlight=False, markup=False)


def all_keys() -> dict[str, dict[str, Key]]:
    """Every dotted key, with its `Key` in each run that has it."""
    found: dict[str, dict[str, Key]] = {}
    for run, schema in SCHEMAS.items():
        for key in keys(schema):
            found.setdefault(key.name, {})[run] = key
    return found


def uses(key: Key) -> list[str]:
    """`file:line: source` of each place that reads a key, where the type of what it is read from can be told from
    annotations. Of a section that is where it is handed on."""
    attribute = key.name.rpartition(".")[2]
    return [
        f"{read.path}:{read.line}: {read.source}"
        for read in _reads()
        if read.attribute == attribute and any(_related(each, key.owner, attribute) for each in read.models)
    ]


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One attribute read from a configuration."""

    path: str
    line: int
    source: str
    attribute: str
    models: tuple[type[BaseModel], ...]
    """Those that it may be read from."""


@cache
def _reads() -> tuple[_Read, ...]:
    found: list[_Read] = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            text = path.read_text(encoding="utf-8")
            reader = _Reader(str(path.relative_to(ROOT)), text.splitlines())
            reader.visit(ast.parse(text))
            found += reader.found
    return tuple(found)


class _Reader(ast.NodeVisitor):
    """Finds the reads of one module. What a name is, its annotation says, or the value that it is assigned."""

    def __init__(self, path: str, lines: list[str]) -> None:
        self.found: list[_Read] = []
        self._path, self._lines = path, lines
        self._names: dict[str, set[str]] = {}
        self._attributes: dict[str, set[str]] = {}
        self._models = _config_models()

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._attributes = self._attributes, {}
        inside = dict(self._names)
        if node.name in self._models:
            self._names["self"] = {node.name}
        # Annotated attributes first: a method above them may read them.
        for each in (*(n for n in node.body if isinstance(n, ast.AnnAssign)), *node.body):
            self.visit(each)
        self._attributes, self._names = before, inside

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        before = dict(self._names)
        for argument in (*node.args.args, *node.args.kwonlyargs):
            if argument.annotation is not None:
                self._names[argument.arg] = self._annotated(argument.annotation)
        self.generic_visit(node)
        self._names = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self._attributes[node.target.id] = self._annotated(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            pairs = [(target, node.value)]
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                pairs = list(zip(target.elts, node.value.elts, strict=False))
            for place, value in pairs:
                if kinds := self._kinds(value):
                    self._assign(place, kinds)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        kinds = self._kinds(node.value)
        if kinds and isinstance(node.ctx, ast.Load):
            line = node.end_lineno or node.lineno
            read = _Read(
                path=self._path,
                line=line,
                source=self._lines[line - 1].strip(),
                attribute=node.attr,
                models=tuple(self._models[kind] for kind in kinds),
            )
            self.found.append(read)
        self.generic_visit(node)

    def _assign(self, place: ast.expr, kinds: set[str]) -> None:
        if isinstance(place, ast.Name):
            self._names[place.id] = kinds
        elif isinstance(place, ast.Attribute) and isinstance(place.value, ast.Name) and place.value.id == "self":
            self._attributes[place.attr] = kinds

    def _annotated(self, annotation: ast.expr) -> set[str]:
        names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
        return names & self._models.keys()

    def _kinds(self, value: ast.expr) -> set[str]:
        """The configuration models that an expression may be of."""
        if isinstance(value, ast.Name):
            return self._names.get(value.id, set())
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute) and value.func.attr in _SAME_MODEL:
            made_by = value.func.value
            return self._kinds(made_by) or {ast.unparse(made_by)} & self._models.keys()
        if not isinstance(value, ast.Attribute):
            return set()
        if isinstance(value.value, ast.Name) and value.value.id == "self" and value.attr in self._attributes:
            return self._attributes[value.attr]
        found: set[str] = set()
        for kind in self._kinds(value.value):
            field = self._models[kind].model_fields.get(value.attr)
            found |= {model.__name__ for model in models(field.annotation)} if field else set()
        return found & self._models.keys()


def _related(read: type[BaseModel], owner: type[BaseModel], attribute: str) -> bool:
    """Whether what is read from one model may be the field of the other: they are the same, or one derives from the
    other and both have it."""
    return issubclass(read, owner) or (issubclass(owner, read) and attribute in read.model_fields)


@cache
def _config_models() -> dict[str, type[BaseModel]]:
    """Every model of the configurations, bases included, by its name."""
    owners = {key.owner for found in all_keys().values() for key in found.values()}
    return {base: model for owner in owners for base, model in _bases(owner).items()}


def _bases(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """A model and those that it derives from, by name."""
    return {each.__name__: each for each in model.__mro__ if issubclass(each, Config) and each is not Config}


def description(key: Key) -> str:
    text = key.field.description or (key.section.__doc__ if key.section else "") or ""
    return " ".join(text.split())


def _type(key: Key) -> str:
    """A field's type in words, from its JSON schema."""
    if key.section:
        return "keys"
    whole = key.owner.model_json_schema()
    return _in_words(whole["properties"][key.name.rpartition(".")[2]], whole.get("$defs", {}))


def _in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    for choice in ("anyOf", "oneOf"):
        if choice in schema:
            return " or ".join(dict.fromkeys(_in_words(each, definitions) for each in schema[choice]))
    kind = schema.get("type", "value")
    if kind == "array":
        return f"list of {_in_words(schema['items'], definitions)}" if "items" in schema else "list"
    kind = {
        "string": "path" if schema.get("format") == "path" else "text",
        "boolean": "true or false",
        "object": "keys",
    }.get(kind, kind)
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return " ".join([kind, *bounds[:1], *(f"and {bound}" for bound in bounds[1:])])


def _default(key: Key) -> str:
    value = key.field.get_default(call_default_factory=True, validated_data={})
    if value is PydanticUndefined:
        return "required"
    if isinstance(value, BaseModel):
        others = ", ".join(
            f"{name} {value}" for name, value in value.model_dump(mode="json", exclude_unset=True).items()
        )
        return "default: its keys' defaults" + (f", but {others} if the section is not given" if others else "")
    plain = TypeAdapter(Any).dump_python(value, mode="json")
    return f"default: {json.dumps(plain)}"


def documentation() -> str:
    """The text of docs/configuration.md."""
    parts = [_INTRODUCTION]
    sections: dict[type[BaseModel], list[str]] = {}
    for run, schema in SCHEMAS.items():
        for key in keys(schema):
            for model in [key.section] if key.section else _listed_models(key):
                place = f"`{key.name}` of {run}" + ("" if key.section else " (each)")
                sections.setdefault(model, []).append(place)
    for run, schema in SCHEMAS.items():
        parts.append(f"## {run}\n\n{_first_sentence(schema)}\n\n{_key_table(schema)}")
    for model, places in sections.items():
        parts.append(f"### {', '.join(places)}\n\n{_first_sentence(model)}\n\n{_key_table(model)}")
    return "\n".join(parts)


def _listed_models(key: Key) -> list[type[BaseModel]]:
    """The models of a field that may also be something else, such as rows that are drawn, or of a list's items."""
    return [model for model in models(key.field.annotation) if issubclass(model, Config)]


def _first_sentence(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _key_table(model: type[BaseModel]) -> str:
    lines = ["| key | type | default | resume | |", "|---|---|---|---|---|"]
    for key in keys(model):
        if "." not in key.name:
            default = _default(key).removeprefix("default: ")
            cells = (f"`{key.name}`", _type(key), default, "yes" if key.may_change else "", description(key))
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def generated() -> Iterator[tuple[Path, str]]:
    """The files that are made from the configuration's fields, and their texts."""
    yield ROOT / "docs" / "configuration.md", documentation()
    for run, schema in SCHEMAS.items():
        text = json.dumps(schema.model_json_schema(), indent=1, ensure_ascii=False) + "\n"
        yield ROOT / "docs" / "schemas" / f"{run}.json", text


def write_generated() -> None:
    """Write the files that are made from the configuration's fields."""
    for path, text in generated():
        write_text(path, text)
        typer.echo(path.relative_to(ROOT))


if __name__ == "__main__":
    write_generated()
