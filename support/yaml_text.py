"""YAML that somebody else wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssv.support.errors import UserError
from ssv.support.files import read_text


def read_yaml(path: Path) -> Any:
    """What a YAML file says, made of nothing but plain values.

    Raises:
        UserError: it cannot be read, is not YAML, or gives a key twice, of which YAML itself would take the last.
    """
    text = read_text(path)
    try:
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _refuse_double_keys(root)
        return yaml.safe_load(text)
    # The library lets out what its makers of values raise, of a date that is none or of a tag that does not fit.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not YAML ({error})") from error
    except RecursionError as error:
        raise UserError(f"{path} is nested too deeply") from error


def _refuse_double_keys(root: yaml.Node) -> None:
    seen: set[int] = set()  # an alias may refer to what it stands in
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.CollectionNode) and id(node) not in seen:
            seen.add(id(node))
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            keys = [key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.MarkedYAMLError(problem=f"key {twice[0]} is given twice", problem_mark=node.start_mark)
            nodes += [value for _, value in pairs] or node.value
