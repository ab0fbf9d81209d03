"""Which config keys a set of source files reads: attribute chains are followed to the section that they come from.

`config.train.seed` is read where a value of the type `Train` is asked for `.seed`. Types come from annotations
(`train: Train`), from what functions return (`load_config(…).data`), and from assignments and loops
(`train = self.config.train`, `for source in data.sources`); an attribute of any object has the type that it is given
somewhere (`self.settings = config.generate`). So another `.seed`, of a section or of anything else, does not count.
"""

import ast
import re
from collections.abc import Iterable
from typing import get_args

from pydantic import BaseModel

Types = dict[str, type[BaseModel]]
SAME_TYPE = ("model_copy", "model_validate", "model_construct")


def read_fields(trees: Iterable[ast.AST], root: type[BaseModel]) -> set[tuple[type[BaseModel], str]]:
    """(section, field) of every read in `trees`; `root` is the schema."""
    trees = list(trees)
    sections = {section.__name__: section for section in _sections(root)}
    returns, attributes = _declared(trees, sections)
    while True:  # a type that is found may be what another assignment waits for
        reader = _Reader(sections, returns, dict(attributes))
        for tree in trees:
            reader.visit(tree)
        if reader.attributes == attributes:
            return reader.reads
        attributes = reader.attributes


def signatures(tree: ast.Module) -> ast.Module:
    """The functions of a module without their bodies: what they return is known, what they read does not count."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        function.body = [ast.Pass()]
    return ast.Module([*functions], [])


def key_fields(root: type[BaseModel], prefix: str = "") -> dict[str, tuple[type[BaseModel], str]]:
    """Dotted key → (section, field), as `read_fields` gives them; items of a list have their section's own name."""
    fields = {}
    for name, field in root.model_fields.items():
        fields[prefix + name] = (root, name)
        inner = _section_of(field.annotation)
        if inner is not None:
            fields |= key_fields(inner, f"{prefix}{name}.")
    return fields


def _section_of(annotation: object) -> type[BaseModel] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, BaseModel):
            return part
    return None


def _sections(root: type[BaseModel]) -> set[type[BaseModel]]:
    return {section for section, _ in key_fields(root).values()}


def _declared(trees: list[ast.AST], sections: Types) -> tuple[Types, Types]:
    """What functions return and attributes of classes are, by their annotations."""
    returns, attributes = dict(sections), {}  # a class called gives its instance
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef) and (section := _annotated(node.returns, sections)):
            returns[node.name] = section
            if any(isinstance(mark, ast.Name) and "property" in mark.id for mark in node.decorator_list):
                attributes[node.name] = section
        elif isinstance(node, ast.ClassDef) and node.name not in sections:  # the schema itself is no evidence
            for line in node.body:
                if isinstance(line, ast.AnnAssign) and (section := _annotated(line.annotation, sections)):
                    attributes[line.target.id] = section
    return returns, attributes


def _annotated(annotation: ast.expr | None, sections: Types) -> type[BaseModel] | None:
    names = [] if annotation is None else list(ast.walk(annotation))
    words = [node.id for node in names if isinstance(node, ast.Name)]
    for text in (node.value for node in names if isinstance(node, ast.Constant) and isinstance(node.value, str)):
        words += re.findall(r"\w+", text)  # "Config | None" in quotes
    return next((sections[word] for word in words if word in sections), None)


class _Reader(ast.NodeVisitor):
    def __init__(self, sections: Types, returns: Types, attributes: Types) -> None:
        self.sections, self.returns, self.attributes = sections, returns, attributes
        self.names: list[Types] = [{}]  # of each scope, the innermost last
        self.reads: set[tuple[type[BaseModel], str]] = set()

    def type_of(self, node: ast.expr) -> type[BaseModel] | None:
        match node:
            case ast.Name():
                return next((scope[node.id] for scope in reversed(self.names) if node.id in scope), None)
            case ast.Attribute():
                section = self.type_of(node.value)
                if section is not None and node.attr in section.model_fields:
                    return _section_of(section.model_fields[node.attr].annotation)
                return self.attributes.get(node.attr)
            case ast.Call(func=ast.Attribute(value=value, attr=attr)) if attr in SAME_TYPE:
                return self.type_of(value) or (self.sections.get(value.id) if isinstance(value, ast.Name) else None)
            case ast.Call(func=ast.Name(id=name)) if name in ("enumerate", "sorted", "list", "reversed", "tqdm"):
                return self.type_of(node.args[0]) if node.args else None
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
                return self.returns.get(name)
            case ast.Subscript():
                return self.type_of(node.value)
            case ast.IfExp():
                return self.type_of(node.body) or self.type_of(node.orelse)
            case ast.NamedExpr():
                return self.type_of(node.value)
        return None

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple | ast.List):
            values = value.elts if isinstance(value, ast.Tuple | ast.List) else [value] * len(target.elts)
            for part, content in zip(target.elts, values, strict=False):
                self.bind(part, content)
        elif (section := self.type_of(value)) is not None:
            if isinstance(target, ast.Name):
                self.names[-1][target.id] = section
            elif isinstance(target, ast.Attribute) and self.type_of(target.value) is None:
                self.attributes[target.attr] = section

    def visit_Attribute(self, node: ast.Attribute) -> None:
        section = self.type_of(node.value)
        if section is not None and isinstance(node.ctx, ast.Load):
            self.reads.add((section, node.attr))
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self.bind(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self.bind(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self.bind(node.target, node.iter)
        self.generic_visit(node)
        match node.iter:  # a section itself, and not a list of sections: its fields come one by one
            case ast.Attribute(value=value, attr=attr) if (outer := self.type_of(value)) and attr in outer.model_fields:
                section = outer.model_fields[attr].annotation
                if isinstance(section, type) and issubclass(section, BaseModel):
                    self.reads |= {(section, field) for field in section.model_fields}

    def _visit_comprehension(self, node: ast.ListComp | ast.DictComp | ast.GeneratorExp | ast.SetComp) -> None:
        self.names.append({})
        for generator in node.generators:
            self.bind(generator.target, generator.iter)
        self.generic_visit(node)
        self.names.pop()

    visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _visit_comprehension  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        scope: Types = {}
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            if section := _annotated(argument.annotation, self.sections):
                scope[argument.arg] = section
        self.names.append(scope)
        self.generic_visit(node)
        self.names.pop()

    visit_AsyncFunctionDef = visit_Lambda = visit_FunctionDef  # noqa: N815
