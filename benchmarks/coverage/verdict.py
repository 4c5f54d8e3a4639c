"""What the data of a row means: right or wrong, rewritten or refused, and for which of the known reasons."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

EXACT = 1e-10
EXACT_FLOAT32 = 1e-4
LOWERINGS = ("materialize", "recompute")
# What the whole table has to reach.
ARCHITECTURES = 70
REWRITTEN = 0.95
FIND_SECONDS, DEPTH = 0.5, 48
LINEAR = 1.3  # from a quarter of the depth to all of it, the time a layer may grow by this factor
EXACTLY = "exact"

_AFFINE = r"lowering=recompute needs scores of the form α·QKᵀ \+ β, but "

# Every reason for which a sharing may be refused: the error that says it, and what it means.
REASONS: dict[str, tuple[str, str]] = {
    "scores not affine": (
        _AFFINE + r"(its scores go through an operator that is no factor, sum or mask \(\w+: aten\.(tanh|sigmoid|pow)"
        r"|they are multiplied by a matrix of their own shape)",
        "`recompute` runs the fused operator on the leader's queries and keys, which computes α·QKᵀ + β. A soft cap (a "
        "hyperbolic tangent) between that product and the softmax is beyond it, and so is a factor for every score, as "
        "OpenAI GPT's masks, which leave future tokens a score of −10 000 where padding hides all others.",
    ),
    "heads mixed before the softmax": (
        _AFFINE + r".*\(\w+: aten\.(linear|conv2d|einsum|matmul)",
        "For the same reason: the scores of a head are made of the products of all heads (talking heads).",
    ),
    "map changed after the softmax": (
        r"lowering=recompute needs (the softmax to be all that is done to the map|a map that is the value of a softmax"
        r"|a plain product of the map with the values)",
        "The fused operator multiplies the softmax itself with the values; here weak entries are suppressed, rows do "
        "not sum to 1, or heads are mixed, in between.",
    ),
    "dropout of its own kind": (
        r"lowering=recompute cannot express what \w+ does to the map",
        "In training a module of the model's own works on the map, and the fused operator has a plain dropout.",
    ),
    "map of a fused leader returned": (
        r"lowering=recompute does not compute the map of a fused leader, but the model also returns this one",
        "A follower's map is an output of the model, and its leader's is inside a fused operator.",
    ),
    "FlexAttention": (
        r"FlexAttention|flex_attention",
        "`torch.nn.attention.flex_attention` is recognised and not rewritten: its own kernel runs its score function.",
    ),
    "Python that depends on values": (
        r"CaptureError: .* Its Python depends on the values of a tensor",
        "The model cannot be captured as one graph: it branches or loops on values (which experts were hit). The error "
        "names the line, and `target=` captures a part of such a model.",
    ),
    "no two layers repeat": (
        r"is for 2 or more layers; no stack has as many",
        "No two attentions have paths of one form, so that there is no stack to lay a plan over.",
    ),
}


def problems(row: Mapping[str, Any]) -> list[str]:
    """What is wrong with a row; nothing where all is found and each sharing is exact, or refused as is expected."""
    if "failed" in row:
        return [row["failed"]]
    expected = row["refused_expected"].get("whole")
    if "refused" in row:
        return [] if reason(row["refused"]) == expected is not None else [row["refused"]]
    return [f"taken, refused for {expected} expected"] if expected else [*_recognition(row), *_rewriting(row)]


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
        expected = row["refused_expected"].get(lowering, EXACTLY)
        if outcome(row, lowering) != expected:
            yield f"{lowering}: {row[lowering]}, {expected} expected"


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
        "whole": sum("refused" in row for row in attending.values()),
        "unseen": sum(row["expected"] for row in attending.values() if "refused" in row),
        "sites_found": sum(row["found"] for row in found),
        "false_positives": sum(max(0, row["found"] - row["expected"]) for row in found),
        "not_attention": sum(row["rejected_expected"] for row in found),
        "identity_to_the_bit": sum(row.get("identity", {}).get("error_float32") == 0.0 for row in attending.values()),
        "rewritten": sum(map(is_rewritten, attending.values())),
        "find_seconds": max((row["seconds"].get("find", 0.0) for row in found), default=0.0),
        "seconds": sum(sum(row["seconds"].values()) for row in found),
    }


def unreached(data: Mapping[str, Any]) -> list[str]:
    """What the whole table has to reach and does not."""
    numbers = summary(data["rows"])
    found = []
    if numbers["attending"] < ARCHITECTURES:
        found.append(f"{numbers['attending']} architectures, at least {ARCHITECTURES} expected")
    if numbers["sites_found"] != numbers["sites"]:
        found.append(f"{numbers['sites_found']} attentions found of {numbers['sites']}")
    if numbers["false_positives"]:
        found.append(f"{numbers['false_positives']} softmaxes taken that are no attention")
    if numbers["rewritten"] < REWRITTEN * numbers["attending"]:
        found.append(f"{numbers['rewritten']} of {numbers['attending']} rewritten, at least {REWRITTEN:.0%} expected")
    for model, measured in data["scaling"].items():
        by_depth = {one["layers"]: one for one in measured}
        deep, quarter = by_depth[DEPTH]["find"], by_depth[DEPTH // 4]["find"]
        if any(one["found"] != layers for layers, one in by_depth.items()):
            found.append(f"{model}: attentions missed by depth: {by_depth}")
        if deep >= FIND_SECONDS:
            found.append(f"{model}: recognition of {DEPTH} layers takes {deep:.2f} s, under {FIND_SECONDS} s expected")
        if deep / quarter >= LINEAR * 4:
            found.append(f"{model}: recognition takes {deep / quarter:.1f} times as long for four times as many layers")
    return found
