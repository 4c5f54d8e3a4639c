"""What the data of a row means: right or wrong, rewritten or refused, and for which of the known reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

EXACT = 1e-10
EXACT_FLOAT32 = 1e-4
LOWERINGS = ("materialize", "recompute")
EXACTLY = "exact"

_AFFINE = r"lowering=recompute needs scores of the form α·QKᵀ \+ β, but .*"

# Every reason for which a sharing may be refused: the error that says it, and what it means.
REASONS: dict[str, tuple[str, str]] = {
    "soft-capped scores": (
        _AFFINE + r"\(\w+: aten\.tanh",
        "`recompute` runs the fused operator on the leader's queries and keys, which computes α·QKᵀ + β; a hyperbolic "
        "tangent between that product and the softmax is beyond it.",
    ),
    "heads mixed before the softmax": (
        _AFFINE + r"\(\w+: aten\.(linear|conv2d|einsum|matmul)",
        "For the same reason: the scores of a head are made of the products of all heads (talking heads).",
    ),
    "map changed after the softmax": (
        r"lowering=recompute needs (the softmax to be all that is done to the map|the map to be a softmax as it is"
        r"|a map that is the value of a softmax|a plain product of the map with the values)",
        "The fused operator multiplies the softmax itself with the values; here weak entries are suppressed, or heads "
        "are mixed, in between.",
    ),
    "map returned": (
        r"lowering=recompute does not compute the map, but the model also returns it or writes it",
        "The model gives the map away as an output, and `recompute` never has it.",
    ),
    "FlexAttention": (
        r"FlexAttention|flex_attention",
        "`torch.nn.attention.flex_attention` is recognised and not rewritten.",
    ),
    "no two layers repeat": (
        r"is for 2 or more layers; no stack has as many",
        "No two attentions have paths of one form, so that there is no stack to lay a plan over.",
    ),
}


def problems(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row; nothing where its attentions are found and each sharing is exact or rightly refused."""
    if "failed" in row:
        return [row["failed"]]
    if "refused" in row:
        return [] if reason(row["refused"]) else [row["refused"]]
    return list(_recognition(row)) + list(_rewriting(row))


def _recognition(row: Mapping[str, Any]) -> Iterator[str]:
    if row["found"] != row["expected"]:
        yield f"{row['found']} attentions found, {row['expected']} expected"
    elif not row["parts_match"]:
        yield f"stacks {row['stacks']}, expected {row['source']}"
    if len(row["rejected"]) != row["rejected_expected"]:
        yield f"{len(row['rejected'])} softmaxes rejected, {row['rejected_expected']} expected"


def _rewriting(row: Mapping[str, Any]) -> Iterator[str]:
    if not row["expected"] or not row["found"]:
        return
    same = row["identity"]
    if not is_exact(same) or same["error_float32"] > EXACT_FLOAT32:
        yield f"identity: {same}"
    for lowering in LOWERINGS:
        if outcome(row, lowering) is None:
            yield f"{lowering}: {row[lowering]}"


def is_exact(step: Mapping[str, Any]) -> bool:
    """Whether a rewritten model computed what it should on both inputs."""
    return "error" in step and step["error"] <= EXACT and not step.get("faults")


def outcome(row: Mapping[str, Any], lowering: str) -> str | None:
    """``"exact"``, one of `REASONS`, or None where the sharing is wrong or its refusal is not a known one."""
    if "refused" in row:
        return reason(row["refused"])
    step = row[lowering]
    if "refused" in step:
        return reason(step["refused"])
    return EXACTLY if is_exact(step) and step["followers"] else None


def reason(refusal: str) -> str | None:
    """Which of `REASONS` an error gives."""
    return next((name for name, (pattern, _) in REASONS.items() if re.search(pattern, refusal)), None)


def is_rewritten(row: Mapping[str, Any]) -> bool:
    """Whether both lowerings are exact."""
    return all(lowering in row and outcome(row, lowering) == EXACTLY for lowering in LOWERINGS)


def summary(rows: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers that the claims are made of."""
    attending = {name: row for name, row in rows.items() if row["expected"]}
    found = [row for row in rows.values() if "found" in row]
    return {
        "rows": len(rows),
        "correct": sum(not problems(row) for row in rows.values()),
        "attending": len(attending),
        "sites": sum(row["expected"] for row in rows.values() if "refused" not in row),
        "sites_found": sum(row["found"] for row in found),
        "false_positives": sum(max(0, row["found"] - row["expected"]) for row in found),
        "not_attention": sum(row["rejected_expected"] for row in found),
        "identity_to_the_bit": sum(row.get("identity", {}).get("error_float32") == 0.0 for row in attending.values()),
        "rewritten": sum(map(is_rewritten, attending.values())),
        "find_seconds": max((row["seconds"].get("find", 0.0) for row in found), default=0.0),
        "seconds": sum(sum(row["seconds"].values()) for row in found),
    }
