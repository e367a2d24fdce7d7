"""Check that a program of torch.export can be loaded without running code of its author.

A bundle may come from anybody, and `torch.export.load` (torch 2.13) trusts its file: it unpickles whatever it cannot
read otherwise, evaluates sizes and guards as Python, looks operators up by name in all of torch, and loads machine
code. So a file is compared with what `torch_export.write` writes, and anything unknown is refused.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from torch.export.pt2_archive import PT2ArchiveReader

from espalier.errors import ConfigError

PROGRAM = "models/model.json"
SAMPLE = "data/sample_inputs/model.pt"
CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
TENSOR = re.compile(r"(weight|tensor)_\d+")  # raw bytes; constants under other names are unpickled, whatever is said
OTHER = re.compile(rf"\.data/(version|serialization_id)|byteorder|archive_(format|version)|data/\w+/({TENSOR.pattern})")
OPERATOR = re.compile(r"torch\.ops\.(aten|quantized_decomposed)\.(?!__)\w+\.(?!__)\w+")
OF_SIZES = re.compile(r"_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|eq|ne|lt|le|gt|ge)|torch\.sym_\w+")
WITH_FILES = re.compile(r"torch\.ops\.aten\.(save|from_file)\..*")
ARGUMENT = re.compile(  # plain values and tensors; not operators, graphs and objects
    r"as_(optional_|nested_|sym_)?"
    r"(tensor|int|float|bool|string|complex|scalar_type|memory_format|layout|device|none|name|expr)(s|_lists)?"
)
SIZE = re.compile(  # such as Mul(Integer(4), Symbol('s77', positive=True, integer=True)); a letter fits one place alone
    r"(?:Symbol|Integer|Add|Mul|Pow|FloorDiv|CleanDiv|Mod|PythonMod|Max|Min|(?:positive|nonnegative|integer)=True"
    r"|'[a-z]\d++'|[a-z](?=\d)|[-+*/(), \d])*+"
)
CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict")  # of arguments; others import modules
CONTEXTS = (None, "null", "[]")


def require_harmless(path: Path) -> None:
    """Raise `ConfigError` if loading or running the program could run anything but operators on tensors."""
    try:
        problem = next(_problems(path), None)
    except (
        OSError,
        RuntimeError,
        BadZipFile,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
    ) as error:
        raise ConfigError(f"{path}: not loaded, no program of torch.export; export it again") from error
    if problem:
        raise ConfigError(f"{path}: not loaded, {problem}; export it again, from a run that you trust")


def _problems(path: Path) -> Iterator[str]:
    archive = PT2ArchiveReader(str(path))
    names = archive.get_file_names()
    with ZipFile(path) as file:  # torch falls back to this reader, and both must see the same
        if sorted(names) != sorted(name.partition("/")[2] for name in file.namelist()):
            yield "its directory is ambiguous"
    for name in names:
        if name not in (PROGRAM, SAMPLE, *CONFIGS) and not OTHER.fullmatch(name):
            yield f"holds {name}, which is no part of a program"
    try:
        torch.load(io.BytesIO(archive.read_bytes(SAMPLE)), weights_only=True)
    except Exception:  # torch takes any as a reason to unpickle without limits
        yield f"holds pickled objects in {SAMPLE}"
    for name in CONFIGS:
        for entry in json.loads(archive.read_bytes(name))["config"].values():
            if entry["use_pickle"] is not False or not TENSOR.fullmatch(entry["path_name"]):
                yield f"holds pickled objects by {name}"
    program = json.loads(archive.read_bytes(PROGRAM))
    if program["guards_code"]:
        yield "holds guards, which are Python"
    yield from _problems_of_program(program)


def _problems_of_program(node: Any) -> Iterator[str]:
    """Yield the problems of a program, from all of its JSON, so that no place where torch looks is forgotten."""
    for key, value in node.items() if isinstance(node, dict) else ():
        is_text = isinstance(value, str)
        if key == "target" and is_text and (not _is_operator(value) or WITH_FILES.fullmatch(value)):
            yield f"calls {value[:80]!r}, which is no operator on tensors"
        elif key == "expr_str" and not (is_text and SIZE.fullmatch(value)):
            yield f"has a size that is no number: {str(value)[:80]!r}"
        elif key.startswith("as_") and not ARGUMENT.fullmatch(key):
            yield f"has an argument of the kind {key}, which is no tensor and no number"
        elif key in ("metadata", "custom_obj_values", "treespec_namedtuple_fields") and value:
            yield f"has {key}, which torch would look up by name"
        elif key in ("in_spec", "out_spec") and is_text:
            yield from _problems_of_containers(json.loads(value))
        else:
            yield from _problems_of_program(value)
    for value in node if isinstance(node, list) else ():
        yield from _problems_of_program(value)


def _is_operator(name: str) -> bool:
    return bool(OPERATOR.fullmatch(name) or OF_SIZES.fullmatch(name))


def _problems_of_containers(node: Any) -> Iterator[str]:
    if isinstance(node, list):
        for each in node:
            yield from _problems_of_containers(each)
    elif isinstance(node, dict):
        if node["type"] not in CONTAINERS or node["context"] not in CONTEXTS:
            yield f"takes or returns a {str(node['type'])[:80]!r}, which torch would look up by name"
        yield from _problems_of_containers(node["children_spec"])
