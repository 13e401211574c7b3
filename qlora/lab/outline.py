"""What a model is made of: its modules as a tree, equal layers folded, with shapes, dtypes and bytes."""

import math
from collections import Counter
from collections.abc import Iterator

import torch

from qlora.packed import PackedLinear
from qlora.tables import table
from qlora.weights import constants

CONTAINERS = (torch.nn.ModuleDict, torch.nn.ParameterDict)


def show_outline(model) -> dict:
    """Print tree and sums of any transformers model, also of one on the meta device; return them."""
    tree = describe(model)
    sums, footprint = sum_up(tree), model.get_memory_footprint()
    amounts = ["bytes", "constants", "bits/value"]
    print(table(["module", "shape (out x in)", "stored as", *amounts], list(tree_rows(tree))))
    rows = [sum_row(row) for row in sums]
    total = {key: sum(row[key] for row in sums) for key in ("modules", "values", "bytes", "constants")}
    rows.append(("sum", "", f"{total['values']:,}", "", *shown_amounts(**total)))
    print()
    print(table(["in all", "modules", "values", "stored as", *amounts], rows))
    whole = tree["bytes"] + tree["constants"]  # it counts GPTQ's and AWQ's constants, not bitsandbytes'
    same = "the same" if footprint in (tree["bytes"], whole) else f"{footprint - tree['bytes']:+,}"
    left_out = tree["constants"] and footprint != whole
    more = f"; with the constants, which it leaves out: {whole:,}" if left_out else ""
    print(f"  get_memory_footprint(): {footprint:,} bytes ({same}){more}")
    measured = {"bytes": tree["bytes"], "constants": tree["constants"], "memory_footprint": footprint}
    return {"tree": tree, "sums": sums, **measured}


def describe(module, name: str = "", owners: dict | None = None) -> dict:
    """A module's node: its own tensors, bytes with all below it, children.

    `owners` knows the tensors that were met before: those that come again are tied, and count once.
    """
    owners = {} if owners is None else owners
    node = {"name": name.rpartition(".")[2], "kind": type(module).__name__, "count": 1, "tied": ""}
    node |= {"own_bytes": 0, "own_constants": 0, "values": 0}
    shapes, stored = [], []
    packed = isinstance(module, PackedLinear)
    for label, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        state = getattr(tensor, "quant_state", None)
        if packed and label in ("zeros", "scales", "group_of"):
            node["own_constants"] += tensor.nbytes
            continue
        shape = tensor.shape if state is None else state.shape  # the packed tensor's own is (bytes, 1)
        if packed and label == "codes":
            shape = (module.out_features, module.in_features)
        shapes.append(" x ".join(map(str, shape)) or "1")
        dtype = str(tensor.dtype).removeprefix("torch.")
        codes = f"{module.bits}-bit codes in {dtype}" if packed and label == "codes" else dtype
        stored.append(codes if state is None else f"{state.quant_type} in {dtype}")
        if id(tensor) in owners:
            node["tied"] = owners[id(tensor)]
            continue
        owners[id(tensor)] = f"{name}.{label}".lstrip(".")
        node["own_bytes"] += tensor.numel() * tensor.element_size()
        node["own_constants"] += sum(t.numel() * t.element_size() for t in constants(module, tensor))
        node["values"] += math.prod(shape)
    node["shape"] = ", ".join(shapes) if len(shapes) < 3 else f"{len(shapes)} tensors"
    node["stored"] = ", ".join(dict.fromkeys(stored))
    # PEFT puts empty containers into every layer.
    children = [
        describe(child, f"{name}.{label}".lstrip("."), owners)
        for label, child in module.named_children()
        if not isinstance(child, CONTAINERS) or len(child)
    ]
    node["bytes"] = node["own_bytes"] + sum(child["bytes"] for child in children)
    node["constants"] = node["own_constants"] + sum(child["constants"] for child in children)
    return node | {"children": fold(children)}


def fold(children: list[dict]) -> list[dict]:
    """Neighbours in a list that differ in their number only become one: '0', …, '29' -> '0-29', count 30."""
    folded: list[dict] = []
    for child in children:
        last = folded[-1] if folded else {}
        if child["name"].isdigit() and {**last, "name": child["name"], "count": 1} == child:
            last["name"], last["count"] = f"{last['name'].split('-')[0]}-{child['name']}", last["count"] + 1
        else:
            folded.append(child)
    return folded


def tree_rows(node: dict, depth: int = 0) -> Iterator[tuple]:
    many = f"{node['count']} x " if node["count"] > 1 else ""
    title = "  " * depth + (f"{node['name']}: " if node["name"] else "") + many + node["kind"]
    if node["tied"]:
        yield f"{title}, tied to {node['tied']}", node["shape"], "", "", "", ""
    elif node["shape"]:
        amounts = shown_amounts(node["own_bytes"], node["own_constants"], node["values"])
        yield title, node["shape"], node["stored"], *amounts
    elif many and node["bytes"]:
        each, constant = node["bytes"], node["constants"]
        title += f", {each + constant:,} bytes each"
        yield title, "", "", *shown_amounts(node["count"] * each, node["count"] * constant)
    else:
        yield title, "", "", "", "", ""
    for child in node["children"]:
        yield from tree_rows(child, depth + 1)


def shown_amounts(bytes: int, constants: int, values: int = 0, **_) -> tuple[str, str, str]:
    """(bytes, bytes of constants, bits per value) as text; '' for nothing."""
    bits = f"{8 * (bytes + constants) / values:.3f}" if values else ""
    return f"{bytes:,}", f"{constants:,}" if constants else "", bits


def sum_up(tree: dict) -> list[dict]:
    """Modules, values, bytes and constants by (module type, stored as), most bytes first."""
    sums: dict[tuple, Counter] = {}

    def add(node: dict, times: int) -> None:
        times *= node["count"]
        if node["own_bytes"]:
            amounts = {"modules": 1, "values": node["values"]}
            amounts |= {"bytes": node["own_bytes"], "constants": node["own_constants"]}
            counter = sums.setdefault((node["kind"], node["stored"]), Counter())
            counter.update({key: times * amount for key, amount in amounts.items()})
        for child in node["children"]:
            add(child, times)

    add(tree, 1)
    largest_first = sorted(sums.items(), key=lambda item: -item[1]["bytes"])
    return [{"kind": kind, "stored": stored, **counts} for (kind, stored), counts in largest_first]


def sum_row(row: dict) -> tuple:
    kind = f"{row['kind']}, {'quantized' if row['constants'] else 'not quantized'}"
    return kind, row["modules"], f"{row['values']:,}", row["stored"], *shown_amounts(**row)
