"""GraphQL without a schema: parse a document, resolve its top-level fields, project the selections onto the result.

The real schema is not public, and the client asks for a small part of it. So a handler returns nested dicts with
what it knows; whatever else was asked for comes back as null. A value in such a dict may be a function of the field's
arguments (`lambda args: ...`), which is only called when the field is selected: that serves both fields with
arguments and cyclic objects (a run has artifacts, which have a run).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from graphql import (
    DocumentNode,
    FieldNode,
    FragmentDefinitionNode,
    FragmentSpreadNode,
    InlineFragmentNode,
    OperationDefinitionNode,
    SelectionSetNode,
    parse,
    value_from_ast_untyped,
)

Json = dict[str, Any]
Handler = Callable[[Json], Any]


class OperationError(Exception):
    """A request that the server refuses, as W&B would: an answer to the client, not a defect of this server."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class UnknownOperationError(Exception):
    """A top-level field that no handler serves."""


@lru_cache(maxsize=512)
def _parse(query: str) -> DocumentNode:
    return parse(query, no_location=True)


def execute(query: str, variables: Mapping[str, Any], handlers: Mapping[str, Handler]) -> Json:
    """Run the one operation in `query`; returns the `data` object."""
    return _Execution(_parse(query), variables, handlers).run()


class _Execution:
    def __init__(self, document: DocumentNode, variables: Mapping[str, Any], handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
        self.fragments: dict[str, FragmentDefinitionNode] = {}
        operations: list[OperationDefinitionNode] = []
        for definition in document.definitions:
            if isinstance(definition, FragmentDefinitionNode):
                self.fragments[definition.name.value] = definition
            elif isinstance(definition, OperationDefinitionNode):
                operations.append(definition)
        (self.operation,) = operations
        self.variables = dict(variables)
        for variable in self.operation.variable_definitions or ():
            name = variable.variable.name.value
            if self.variables.get(name) is None and variable.default_value is not None:
                self.variables[name] = value_from_ast_untyped(variable.default_value)

    def run(self) -> Json:
        data: Json = {}
        for key, (nodes, type_name) in self._collect([(self.operation.selection_set, None)]).items():
            name = nodes[0].name.value
            if name == "__typename":
                data[key] = type_name
                continue
            handler = self.handlers.get(name)
            if handler is None:
                raise UnknownOperationError(name)
            data[key] = self._project(handler(self._arguments(nodes[0])), nodes, type_name)
        return data

    def _collect(
        self, sets: Sequence[tuple[SelectionSetNode, str | None]]
    ) -> dict[str, tuple[list[FieldNode], str | None]]:
        """The selected fields by response key, fragments expanded, with the type condition they stood under."""
        found: dict[str, tuple[list[FieldNode], str | None]] = {}

        def visit(selection_set: SelectionSetNode, type_name: str | None) -> None:
            for selection in selection_set.selections:
                if not self._included(selection):
                    continue
                if isinstance(selection, FieldNode):
                    key = selection.alias.value if selection.alias else selection.name.value
                    found.setdefault(key, ([], type_name))[0].append(selection)
                elif isinstance(selection, InlineFragmentNode):
                    condition = selection.type_condition
                    visit(selection.selection_set, condition.name.value if condition else type_name)
                elif isinstance(selection, FragmentSpreadNode):
                    fragment = self.fragments[selection.name.value]
                    visit(fragment.selection_set, fragment.type_condition.name.value)

        for selection_set, type_name in sets:
            visit(selection_set, type_name)
        return found

    def _included(self, selection: Any) -> bool:
        for directive in selection.directives or ():
            name = directive.name.value
            if name in ("include", "skip"):
                condition = value_from_ast_untyped(directive.arguments[0].value, self.variables)
                if bool(condition) != (name == "include"):
                    return False
        return True

    def _arguments(self, node: FieldNode) -> Json:
        """The arguments of a field; absent variables and nulls are left out, at every depth."""
        values = {a.name.value: value_from_ast_untyped(a.value, self.variables) for a in node.arguments or ()}
        return {name: _without_nulls(value) for name, value in values.items() if _is_given(value)}

    def _project(self, value: Any, nodes: list[FieldNode], type_name: str | None) -> Any:
        if callable(value):
            value = value(self._arguments(nodes[0]))
        if isinstance(value, (list, tuple)):
            return [self._project(item, nodes, type_name) for item in value]
        sets = [(node.selection_set, None) for node in nodes if node.selection_set]
        if not sets or not isinstance(value, dict):
            return value
        result: Json = {}
        for key, (sub_nodes, sub_type) in self._collect(sets).items():
            name = sub_nodes[0].name.value
            if name == "__typename":
                result[key] = value.get("__typename") or sub_type
            else:
                result[key] = self._project(value.get(name), sub_nodes, sub_type)
        return result


def _is_given(value: Any) -> bool:
    # graphql-core marks an absent variable with its Undefined singleton.
    return value is not None and type(value).__name__ != "UndefinedType"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if _is_given(v)}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def connection(items: list[Any], args: Mapping[str, Any], node: Callable[[Any], Any]) -> Json:
    """A Relay connection over `items`: the page that `first` and `after` ask for. A cursor is a position."""
    start = int(args["after"]) if args.get("after") else 0
    stop = start + int(args["first"]) if args.get("first") else len(items)
    page = items[start:stop]
    return {
        "edges": [{"node": node(item), "cursor": str(start + i + 1)} for i, item in enumerate(page)],
        "pageInfo": {"__typename": "PageInfo", "endCursor": str(start + len(page)), "hasNextPage": stop < len(items)},
        "totalCount": len(items),
    }
