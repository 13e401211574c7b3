"""What a model is made of: its modules as a tree, folded by layer, with shapes, dtypes and bytes."""

from __future__ import annotations

import math
from collections import Counter

import torch

CONTAINERS = (torch.nn.ModuleDict, torch.nn.ParameterDict)


def show_outline(model) -> dict:
    """Print tree and sums of any transformers model on stdout; one on the meta device will do."""
    tree = describe(model)
    print(f"{'module':48} {'shape (out x in)':>24}   {'stored as':16} {'bytes':>13} {'constants':>10} {'bits/value':>10}")
    _show(tree, 0)
    sums = _sums(tree)
    footprint = model.get_memory_footprint()
    _show_sums(sums, tree, footprint)
    return {"tree": tree, "sums": sums, "bytes": tree["bytes"], "constants": tree["constants"], "memory_footprint": footprint}


def describe(module, name: str = "", owners: dict | None = None) -> dict:
    """A module's node: its own tensors, bytes with all below, children; `owners` knows the tensors met before (tied ones)."""
    owners = {} if owners is None else owners
    node = {"name": name.rpartition(".")[2], "kind": type(module).__name__, "count": 1, "tied": "", "own_bytes": 0, "own_constants": 0, "values": 0}
    shapes, stored = [], []
    for label, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        state = getattr(tensor, "quant_state", None)
        shape = tensor.shape if state is None else state.shape  # the packed tensor's own is (bytes, 1)
        shapes.append(" x ".join(map(str, shape)) or "1")
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored.append(dtype if state is None else f"{state.quant_type} in {dtype}")
        if id(tensor) in owners:
            node["tied"] = owners[id(tensor)]
            continue
        owners[id(tensor)] = f"{name}.{label}".lstrip(".")
        node["own_bytes"] += tensor.numel() * tensor.element_size()
        node["own_constants"] += sum(t.numel() * t.element_size() for t in constants(module, tensor))
        node["values"] += math.prod(shape)
    node |= {"shape": ", ".join(shapes) if len(shapes) < 3 else f"{len(shapes)} tensors", "stored": ", ".join(dict.fromkeys(stored))}
    # PEFT puts empty containers into every layer.
    inside = [(label, child) for label, child in module.named_children() if not isinstance(child, CONTAINERS) or len(child)]
    children = [describe(child, f"{name}.{label}".lstrip("."), owners) for label, child in inside]
    node["bytes"] = node["own_bytes"] + sum(child["bytes"] for child in children)
    node["constants"] = node["own_constants"] + sum(child["constants"] for child in children)
    return node | {"children": _fold(children)}


def constants(module, tensor) -> list[torch.Tensor]:
    """What bitsandbytes needs to turn a quantized weight's codes back into numbers: scales of blocks or rows, tables of levels."""
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        return [state.absmax, state.code, *([state.offset, state.state2.absmax, state.state2.code] if state.nested else [])]
    if hasattr(tensor, "SCB"):  # LLM.int8: the first forward pass moves the scales from the weight to the layer
        scales = tensor.SCB if tensor.SCB is not None else module.state.SCB
        return [] if scales is None else [scales]
    return []


def _fold(children: list[dict]) -> list[dict]:
    """Neighbours in a list that differ in nothing but their number become one node: '0', …, '29' -> '0-29', count 30."""
    folded: list[dict] = []
    for child in children:
        last = folded[-1] if folded else {}
        if child["name"].isdigit() and {**last, "name": child["name"], "count": 1} == child:
            last["name"], last["count"] = f"{last['name'].split('-')[0]}-{child['name']}", last["count"] + 1
        else:
            folded.append(child)
    return folded


def _show(node: dict, depth: int) -> None:
    many = f"{node['count']} x " if node["count"] > 1 else ""
    title = "  " * depth + (f"{node['name']}: " if node["name"] else "") + many + node["kind"]
    if node["tied"]:
        print(f"{title} {node['shape']:>{72 - len(title)}}   tied to {node['tied']}")
    elif node["shape"]:
        bits = 8 * (node["own_bytes"] + node["own_constants"]) / max(1, node["values"])
        amounts = f"{node['own_bytes']:13,} {_number(node['own_constants']):>10} {bits:10.3f}"
        print(f"{title} {node['shape']:>{72 - len(title)}}   {node['stored']:16} {amounts}")
    elif many and node["bytes"]:
        each = f"{node['bytes'] + node['constants']:,} bytes each; all"
        print(f"{title} {each:>{92 - len(title)}} {node['count'] * node['bytes']:13,} {_number(node['count'] * node['constants']):>10}".rstrip())
    else:
        print(title)
    for child in node["children"]:
        _show(child, depth + 1)


def _number(value: int) -> str:
    return f"{value:,}" if value else ""


def _sums(tree: dict) -> list[dict]:
    """Modules, values, bytes and constants by (module type, stored as), most bytes first."""
    sums: dict[tuple, Counter] = {}

    def add(node: dict, times: int) -> None:
        times *= node["count"]
        if node["own_bytes"]:
            amounts = {"modules": 1, "values": node["values"], "bytes": node["own_bytes"], "constants": node["own_constants"]}
            sums.setdefault((node["kind"], node["stored"]), Counter()).update({key: times * amount for key, amount in amounts.items()})
        for child in node["children"]:
            add(child, times)

    add(tree, 1)
    return [{"kind": kind, "stored": stored, **counts} for (kind, stored), counts in sorted(sums.items(), key=lambda item: -item[1]["bytes"])]


def _show_sums(sums: list[dict], tree: dict, footprint: int) -> None:
    print(f"\n{'in all':48} {'modules':>7} {'values':>16}   {'stored as':16} {'bytes':>13} {'constants':>10} {'bits/value':>10}")
    for row in sums:
        kind = f"  {row['kind']}, {'quantized' if row['constants'] else 'not quantized'}"
        bits = 8 * (row["bytes"] + row["constants"]) / row["values"]
        amounts = f"{row['bytes']:13,} {_number(row['constants']):>10} {bits:10.3f}"
        print(f"{kind:48} {row['modules']:7} {row['values']:16,}   {row['stored']:16} {amounts}")
    total, values = tree["bytes"] + tree["constants"], sum(row["values"] for row in sums)
    print(f"{'  sum':48} {'':7} {values:16,}   {'':16} {tree['bytes']:13,} {_number(tree['constants']):>10} {8 * total / values:10.3f}")
    same = "the same" if footprint == tree["bytes"] else f"{footprint - tree['bytes']:+,}"
    more = f"; with the constants, which it leaves out: {total:,}" if tree["constants"] else ""
    print(f"  get_memory_footprint(): {footprint:,} bytes ({same}){more}")
