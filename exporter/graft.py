"""Join graphs: nodes of one graph continue another's values."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir


def graft(main: ir.Model, part: ir.Model, inputs: Mapping[str, ir.Value], prefix: str) -> dict[str, ir.Value]:
    """Move all of `part` to the end of `main`, its inputs replaced by values of `main`.

    Args:
        main: the graph that grows. part: a graph of the same opset; it is taken apart.
        inputs: for each input of `part`, the value of `main` that takes its place.
        prefix: put before the names of moved nodes, values and initializers, so that none collides.

    Returns:
        The values that were `part`'s outputs, by their old names.

    Raises:
        ValueError: opsets differ, or an input of `part` is not given.
    """
    for domain, version in part.opset_imports.items():
        if main.opset_imports.setdefault(domain, version) != version:
            raise ValueError(
                f"opset {version} of {domain or 'ai.onnx'} cannot be joined to {main.opset_imports[domain]}"
            )
    missing = [v.name for v in part.graph.inputs if v.name not in inputs]
    if missing:
        raise ValueError(f"no value given for {', '.join(map(str, missing))}")
    names = [str(v.name) for v in part.graph.outputs]
    outputs = [inputs[str(v.name)] if v in part.graph.inputs else v for v in part.graph.outputs]
    part.graph.outputs.clear()
    for value in part.graph.inputs:
        ir.convenience.replace_all_uses_with(value, inputs[str(value.name)])
    initializers = list(part.graph.initializers.values())
    part.graph.initializers.clear()
    for value in initializers:
        value.name = f"{prefix}/{value.name}"
        main.graph.initializers[value.name] = value
    nodes = list(part.graph)
    part.graph.remove(nodes)
    for node in nodes:
        node.name = f"{prefix}/{node.name or node.op_type}"
        for value in node.outputs:
            if value.name:
                value.name = f"{prefix}/{value.name}"
    main.graph.extend(nodes)
    main.functions.update(part.functions)
    return dict(zip(names, outputs, strict=True))
