"""Find the attentions of a program by data flow, from every softmax and every fused attention outwards."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

from torch import fx

from ..attention import AttentionSite, AttentionSites, Rejected, SiteNodes
from ..program import Program, input_sizes, module_path, module_stack, source_line
from ..tokens import Tokens
from .addends import Addends, split_addends
from .axes import Layout, Size, sizes
from .bias_names import bias_name
from .contexts import find_contexts
from .flow import FUSED, Flow
from .follow import arguments, packet
from .heads import Roles, fused_roles, map_shape, score_roles
from .mask_names import MaskNames
from .scores import Scores, find_scores, push
from .softmaxes import EXPONENTIAL, Softmax, is_summed, softmax_of
from .stacks import Place, assign_stacks
from .suppression import suppressed
from .token_axes import TokenAxes
from .unknown import is_unknown_attention, unknown_attention
from .value_numbers import ValueNumbers

_UNNORMALISED = (
    "its exponentials are multiplied with the values before they are divided by their sum, so that no map is made; "
    "write it as a softmax"
)


def find(program: Program) -> AttentionSites:
    """The attentions of a program, in order of execution, and every softmax that is none, with the reason.

    An attention is a fused operator, or a softmax over a product of queries and keys whose value is contracted over
    the softmax's own axis with values. Names of modules and classes play no part in that.
    """
    finder = _Finder(program)
    candidates = [c for c in map(finder.candidate, program.graph.nodes) if c is not None]
    candidates += finder.unnormalised(candidates)
    found = [(c, c.found) for c in candidates if isinstance(c.found, _Found)]
    rejected = [
        Rejected(module_path(c.node), c.node.name, c.found, source_line(c.node))
        for c in candidates
        if isinstance(c.found, str)
    ]
    orders = _orders(candidates)
    placed = _placed([dataclasses.replace(f, order=orders[c.node]) for c, f in found])
    return AttentionSites(placed, rejected, input_sizes(program))


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """What may be an attention: the attention that it is, or why it is none; ``exponential`` if it is written out."""

    node: fx.Node
    found: _Found | str
    exponential: fx.Node | None = None


def _orders(candidates: list[_Candidate]) -> dict[fx.Node, int]:
    """The number of every candidate in its module call: the operators in order, then what is written out.

    So the numbers of operators are those that a model shows which is run and watched.
    """
    counts: Counter[str] = Counter()
    orders = {}
    for candidate in sorted(candidates, key=lambda c: c.exponential is not None):
        path = module_path(candidate.node)
        orders[candidate.node] = counts[path]
        counts[path] += 1
    return orders


@dataclasses.dataclass(frozen=True)
class _Found:
    """An attention before it has its place in a stack."""

    node: fx.Node
    kind: str
    shape: tuple[Size, Size, Size, Size]
    kv_heads: Size
    head_dim: Size
    value_dim: Size
    fused: bool
    mask: str
    mask_key: str
    bias: str
    nodes: SiteNodes
    tokens: Tokens
    order: int = 0


def _with_known_heads(found: _Found | str) -> _Found | str:
    """The attention, or a reason where its heads or their width are not numbers."""
    if isinstance(found, str):
        return found
    numbers = {
        "number of heads": found.shape[1],
        "number of key heads": found.kv_heads,
        "head width": found.head_dim,
        "value width": found.value_dim,
    }
    for name, size in numbers.items():
        if not getattr(size, "is_Integer", isinstance(size, int)):
            return f"its {name} is {size}, which depends on the size of an input"
    return found


def _placed(found: list[_Found]) -> list[AttentionSite]:
    places = [Place(tuple(module_stack(f.node)), f.kind) for f in found]
    return [
        AttentionSite(
            path=place.path,
            order=f.order,
            stack=position.stack,
            layer=position.layer,
            layer_path=position.layer_path,
            kind=f.kind,
            heads=int(f.shape[1]),
            kv_heads=int(f.kv_heads),
            head_dim=int(f.head_dim),
            value_dim=int(f.value_dim),
            fused=f.fused,
            map_shape=f.shape,
            mask=f.mask,
            mask_key=f.mask_key,
            bias=f.bias,
            nodes=f.nodes,
            tokens=f.tokens,
        )
        for f, place, position in zip(found, places, assign_stacks(places), strict=True)
    ]


class _Finder:
    """What is computed once for a program, and the recognition of one node."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._flow = Flow(program)
        self._numbers = ValueNumbers(program)
        self._names = MaskNames(program, self._flow)
        self._tokens = TokenAxes(self._flow, self._numbers)

    def candidate(self, node: fx.Node) -> _Candidate | None:
        """A node as an attention, or as something that could have been one."""
        if node.op != "call_function":
            return None
        if is_unknown_attention(node):
            return _Candidate(node, unknown_attention(node))
        if packet(node) in FUSED:
            return _Candidate(node, _with_known_heads(self.fused(node)))
        softmax = softmax_of(node)
        if softmax is None:
            return None
        return _Candidate(node, _with_known_heads(self.softmax(softmax)), softmax.exponential)

    def unnormalised(self, candidates: list[_Candidate]) -> list[_Candidate]:
        """Exponentials of scores that meet their values before they are normalised."""
        graph = self._program.graph
        claimed = {c.exponential for c in candidates}
        found = []
        for node in graph.nodes:
            if packet(node) not in EXPONENTIAL or node in claimed or node not in self._flow.tokens:
                continue
            for dim in range(len(sizes(node))):
                scores = find_scores(node.args[0], dim, self._flow) if is_summed(node, dim) else ""
                if isinstance(scores, Scores) and isinstance(find_contexts(node, dim, self._flow), list):
                    found.append(_Candidate(node, _UNNORMALISED, node))
        return found

    def softmax(self, softmax: Softmax) -> _Found | str:
        """A softmax as an attention, or why it is none."""
        node, dim, rank = softmax.node, softmax.dim, len(sizes(softmax.node))
        scores = find_scores(softmax.scores, dim, self._flow)
        contexts = find_contexts(node, dim, self._flow)
        reasons = [result for result in (contexts, scores) if isinstance(result, str)]
        if isinstance(scores, str) or isinstance(contexts, str):
            return ", and ".join(reasons)
        if self._tokens.is_over_map(scores.product):
            return f"its scores come from {scores.product.node.name}, a product with a map, not of queries and keys"
        roles = score_roles(scores.product, scores.query, self._flow)
        layout = _at_softmax(roles.layout, scores, self._flow)
        top = scores.spine[-1]
        addends = split_addends(top, scores.spine, self._flow, self._numbers, dim - rank, softmax.masks)
        contracted = suppressed(node, [c.node for c in contexts], self._flow, self._numbers)
        nodes = SiteNodes(
            map=contracted.map.name,
            contexts=tuple(c.node.name for c in contexts),
            query=scores.query.name,
            key=scores.key.name,
            values=tuple(c.values.name for c in contexts),
            mask=None,
            scores=top.name,
            axis=dim - rank,
        )
        shape = (*map_shape(layout)[:3], sizes(node)[dim])
        names = self._names if dim == rank - 1 else self._names.transposed
        masks = names.describe(addends.masks, False), names.key(addends.masks, False)
        if contracted.name:
            masks = _joined(masks[0], contracted.name), _joined(masks[1], contracted.number)
        return self._found(node, scores.query, scores.key, shape, roles, contexts[0].value_dim, masks, addends, nodes)

    def fused(self, node: fx.Node) -> _Found | str:
        """A fused operator as an attention, or why it is none."""
        named = arguments(node)
        query, key, value = (named[name] for name in ("query", "key", "value"))
        bias = named.get("attn_mask", named.get("attn_bias"))
        roles = fused_roles(query, key, bool(named.get("enable_gqa", False)), self._flow)
        nodes = SiteNodes(
            map=node.name,
            contexts=(node.name,),
            query=query.name,
            key=key.name,
            values=(value.name,),
            mask=None if bias is None else bias.name,
            scores=None,
            axis=-1,
        )
        addends = Addends((), ()) if bias is None else split_addends(bias, (), self._flow, self._numbers)
        causal = bool(named.get("is_causal", False))
        masks = self._names.describe(addends.masks, causal), self._names.key(addends.masks, causal)
        return self._found(node, query, key, map_shape(roles.layout), roles, sizes(value)[-1], masks, addends, nodes)

    def _found(
        self,
        node: fx.Node,
        query: fx.Node,
        key: fx.Node,
        shape: tuple[Size, Size, Size, Size],
        roles: Roles,
        value_dim: Size,
        masks: tuple[str, str],
        addends: Addends,
        nodes: SiteNodes,
    ) -> _Found | str:
        flow = self._flow
        if query not in flow.tokens and (shape[2] == 1 or query not in flow.projected):
            return f"its queries ({query.name}) are learned vectors, the same for every input: it pools over tokens"
        if roles.over_channels:
            return "its channels attend to channels: the product of its scores sums over tokens"
        if key not in flow.tokens and key not in flow.projected:
            return f"its keys ({key.name}) are learned vectors, the same for every input"
        return _Found(
            node=node,
            kind="self" if flow.same_source(query, key) else "cross",
            shape=shape,
            kv_heads=roles.kv_heads,
            head_dim=roles.head_dim,
            value_dim=value_dim,
            fused=nodes.scores is None,
            mask=masks[0],
            mask_key=masks[1],
            bias=bias_name(addends, flow),
            nodes=nodes,
            tokens=self._tokens.of_map(node),
        )


def _at_softmax(layout: Layout, scores: Scores, flow: Flow) -> Layout:
    """The roles of the axes of a softmax's input, from those of the product behind it."""
    current: Layout = layout
    for operand, node in itertools.pairwise(scores.spine):
        after = push(node, operand, current, flow)
        assert after is not None
        current = after
    return current


def _joined(one: str, other: str) -> str:
    return other if one == "none" else f"{one}+{other}"
