"""Metal Shading Language to C++ for the emulator.

Inlines ``#include``, rewrites the few forms that C++ cannot express, adds one entry point a kernel
that unpacks its ``[[attributes]]``, and rejects what Metal rejects but clang would not: unknown
attributes, kernel pointers without an address space, host headers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path


class MetalError(ValueError):
    """A source that is not Metal, or that the emulator does not know."""


# <cstdint> is for the other languages that read a shared header.
SHIM_HEADERS = {
    "metal_stdlib",
    "metal_math",
    "metal_simdgroup",
    "metal_simdgroup_matrix",
    "cstdint",
}
VECTOR_CALL = re.compile(
    r"\b((?:u?(?:char|short|int|long)|half|float|bfloat|bool)[234]|vec<[^<>()]*>)\("
)
POSITIONS = {  # attribute: field of MslContext, one to three components
    "threadgroup_position_in_grid": "threadgroup_in_grid",
    "thread_position_in_grid": "thread_in_grid",
    "thread_position_in_threadgroup": "thread_in_threadgroup",
    "threads_per_threadgroup": "threads_per_threadgroup",
    "threads_per_grid": "threads_per_grid",
    "threadgroups_per_grid": "threadgroups_per_grid",
}
INDICES = {
    "thread_index_in_threadgroup": "thread_index",
    "thread_index_in_simdgroup": "lane",
    "simdgroup_index_in_threadgroup": "simdgroup",
    "simdgroups_per_threadgroup": "simdgroups",
    "thread_index_in_quadgroup": "quad_lane",
    "quadgroup_index_in_threadgroup": "quad",
}
KNOWN_ATTRIBUTES = (
    set(POSITIONS)
    | set(INDICES)
    | {
        "kernel",
        "buffer",
        "threadgroup",
        "function_constant",
        "host_name",
        "max_total_threads_per_threadgroup",
        "maybe_unused",
        "nodiscard",
        "fallthrough",
        "unroll",
        "clang::fallthrough",
        "always_inline",
        "noinline",
    }
)


def closing(text: str, start: int, opening: str = "(", close: str = ")") -> int:
    """Index of the bracket that closes the one at or after `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] == opening:
            depth += 1
        elif text[i] == close:
            depth -= 1
            if depth == 0:
                return i
    raise MetalError("unbalanced brackets")


def split_arguments(text: str) -> list[str]:
    """Split at the commas outside any bracket."""
    parts, depth, current = [], 0, ""
    for ch in text:
        depth += (ch in "(<[{") - (ch in ")>]}")
        if ch == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += ch
    return [p.strip() for p in parts + ([current] if current.strip() else [])]


def inline(text: str, name: str, directories: Sequence[Path], seen: set[Path]) -> list[str]:
    """The lines of a text with its includes in place; every header counts once."""
    out = [f'#line 1 "{name}"']
    for number, line in enumerate(text.split("\n"), 1):
        include = re.match(r'\s*#include\s+[<"]([^>"]+)[>"]', line)
        if include and include[1] not in SHIM_HEADERS:
            beside = [Path(name).parent, *directories]
            found = next((d / include[1] for d in beside if (d / include[1]).is_file()), None)
            if found is None:
                raise MetalError(f"{name}:{number}: include <{include[1]}> is not there in Metal")
            if (path := found.resolve()) not in seen:
                seen.add(path)
                out += inline(path.read_text(), str(path), directories, seen)
            out.append(f'#line {number + 1} "{name}"')
        elif "#pragma once" in line or "#pragma METAL" in line:
            out.append("")
        else:
            out.append(line)
    return out


def lint(text: str) -> list[str]:
    """What Metal rejects and clang would not."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    unknown = set(re.findall(r"\[\[\s*([\w:]+)", text)) - KNOWN_ATTRIBUTES
    errors = [f"error: attribute [[{a}]] is unknown (or not emulated)" for a in sorted(unknown)]
    for m in re.finditer(r"\[\[kernel\]\]\s*void\s+(\w+)\s*\(|\bkernel\s+void\s+(\w+)\s*\(", text):
        for parameter in split_arguments(text[m.end() : closing(text, m.end() - 1)]):
            bare = re.sub(r"\[\[.*?\]\]", "", parameter)
            if ("*" in bare or "&" in bare) and not re.search(
                r"\b(device|constant|threadgroup)\b", bare
            ):
                errors.append(
                    f"error: kernel {m[1] or m[2]}: pointer or reference without address space: {bare.strip()}"
                )
    return errors


def rewrite(text: str, address_spaces: bool) -> str:
    """Forms that C++ does not have, as it has them."""
    # threadgroup arrays: one block per threadgroup and declaration
    text = re.sub(
        r"(^[ \t]*|[{;][ \t]*)threadgroup[ \t]+([A-Za-z_][\w:<>, ]*?)[ \t]+(\w+)((?:\[[^\]]+\])+);",
        r"\1MSL_THREADGROUP_ARRAY(\2, \3, \4);",
        text,
        flags=re.M,
    )
    # function constants: globals that the host sets before a launch
    text = re.sub(
        r"^constant\s+(\w+)\s+(\w+)\s*\[\[function_constant\((\d+)\)\]\];",
        r"static \1 \2; static int \2_registered = (msl_register_constant(\3, &\2, sizeof(\2)), 0);",
        text,
        flags=re.M,
    )
    # `threadgroup` is a macro, so the attribute of that name needs another one (it is not emulated, see entry_points)
    text = re.sub(r"\[\[threadgroup\((\d+)\)\]\]", r"[[msl_threadgroup(\1)]]", text)
    # float2(a, b) -> float2{a, b}: clang has no multi-argument vector casts
    position = 0
    while m := VECTOR_CALL.search(text, position):
        end = closing(text, m.end() - 1)
        arguments = split_arguments(text[m.end() : end])
        position = m.end()
        if len(arguments) > 1:
            text = text[: m.end() - 1] + "{" + text[m.end() : end] + "}" + text[end + 1 :]
        elif arguments:  # of a scalar, or of a vector of another type
            made = f"msl_vector<{m[0][:-1].strip()}>("
            text = text[: m.start()] + made + text[m.end() :]
            position = m.start() + len(made)
    text = re.sub(r"static_cast<([^<>*&]+)>\(", r"msl_cast<\1>(", text)
    # `constant const T name[n]` parameters decay to pointers
    text = re.sub(r"constant const (\w+) (\w+)\[\d+\](?=[,)])", r"constant const \1* \2", text)
    # a struct assigned across address spaces through casted pointers
    text = re.sub(
        r"\*\(\(threadgroup (\w+)\*\)\((.*?)\)\) =\s*\*\(\(const device \1\*\)\((.*?)\)\);",
        r"msl_copy_to_threadgroup((threadgroup \1*)(\2), (const device \1*)(\3));",
        text,
        flags=re.S,
    )
    if (
        not address_spaces
    ):  # specializations per address space become redefinitions when the qualifiers vanish
        text = re.sub(
            r"template <typename T>\s*struct pointer_element<(device|constant|threadgroup) T\*> \{[^}]*\};",
            lambda m: "\n" * m[0].count("\n"),
            text,
        )
    # address-space qualifiers of member functions are dropped
    return re.sub(r"\)\s*constant\s*(\{|const)", r") \1", text)


def entry_points(text: str) -> list[str]:
    """For each kernel, a function that calls it with its arguments taken from MslArguments and MslContext."""
    out = []
    for m in re.finditer(
        r"(template\s*<(?P<t>[^;{}]*?)>\s*)?(?:\[\[kernel\]\]|\bkernel)\s*void\s+(?P<n>\w+)\s*\(",
        text,
    ):
        call, next_buffer = [], 0
        parameters = text[m.end() : closing(text, m.end() - 1)]
        if "[[msl_threadgroup(" in parameters:
            continue  # not emulated: an instantiation then fails for want of its entry point
        for parameter in split_arguments(parameters):
            attribute = (re.findall(r"\[\[(.*?)\]\]", parameter) or [None])[0]
            bare = re.sub(r"\[\[.*?\]\]", "", parameter).strip()
            kind = re.match(r"(.*?)(\w+)$", bare, re.S)[1].strip()
            if attribute in POSITIONS:
                field = "c." + POSITIONS[attribute]
                width = int(kind[-1]) if kind[-1] in "23" else 1
                components = ", ".join(f"{field}[{i}]" for i in range(width))
                call.append(f"{kind}{{{components}}}" if width > 1 else f"({kind}){components}")
            elif attribute in INDICES:
                call.append(f"({kind})c.{INDICES[attribute]}")
            else:
                if attribute and attribute.startswith("buffer"):
                    next_buffer = int(re.search(r"\d+", attribute)[0])
                data = f"a.buffer[{next_buffer}].data"
                call.append(
                    f"*(std::remove_reference_t<{kind}>*){data}"
                    if kind.endswith("&")
                    else f"({kind}){data}"
                )
                next_buffer += 1
        template, name = m["t"], m["n"]
        names = (
            [re.match(r".*?(\w+)\s*(=.*)?$", p, re.S)[1] for p in split_arguments(template)]
            if template
            else []
        )
        target = f"{name}<{', '.join(names)}>" if template else name
        out.append(
            (f"template <{template}>\n" if template else "")
            + f"void msl_entry_{name}(MslArguments& a, MslContext& c) {{ {target}({', '.join(call)}); }}"
        )
    return out


def registrations(text: str) -> tuple[str, list[str]]:
    """Remove explicit instantiations; return the text and the statements that register every kernel by name."""
    out = []

    def macro(m):  # MLX's instantiate_kernel("name", function, template arguments)
        name, function, *arguments = split_arguments(m[1])
        out.append(f"  msl_register_kernel({name}, &msl_entry_{function}<{', '.join(arguments)}>);")
        return "\n" * m[0].count("\n")

    def standard(m):  # template [[host_name("name")]] [[kernel]] decltype(f<T>) f<T>;
        out.append(f"  msl_register_kernel({m[1]}, &msl_entry_{m[2]}<{m[3]}>);")
        return "\n" * m[0].count("\n")

    text = re.sub(r"^instantiate_kernel\(([^;]*?)\);?$", macro, text, flags=re.M | re.S)
    text = re.sub(
        r'^template\s*\[\[host_name\(\s*("[^"]+")\s*\)\]\]\s*\[\[kernel\]\]\s*decltype\((\w+)<([^;]*?)>\)\s*\2<\3>;',
        standard,
        text,
        flags=re.M,
    )
    for m in re.finditer(
        r"(template\s*<[^;{}]*>\s*)?(?:\[\[kernel\]\]|\bkernel)\s*void\s+(\w+)", text
    ):
        if not m[1]:
            out.append(f'  msl_register_kernel("{m[2]}", &msl_entry_{m[2]});')
    return text, out


def translate(
    source: str, name: str, include: Sequence[Path] = (), *, address_spaces: bool = False
) -> str:
    """C++ of a Metal source.

    Args:
        name: of its file, for messages and for includes beside it.
        include: directories of further headers.
        address_spaces: for the type check, where they are real.

    Raises:
        MetalError: all that was found wrong, a line each.
    """
    text = "\n".join(['#include "msl_shim.h"', *inline(source, name, list(include), set())])
    if errors := lint(text):
        raise MetalError("\n".join(errors))
    text, statements = registrations(rewrite(text, address_spaces))
    parts = [text, *entry_points(text), "static int msl_registered = [] {", *statements]
    return "\n".join([*parts, "  return 0;", "}();", ""])
