"""The eager reference for map sharing, against attention written out by hand and against other implementations."""

import collections
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fxreuse.checking.numerics import KeepFloat64, difference
from fxreuse.checking.reference import MapSharing, site_calls, site_key, site_name
from fxreuse.errors import UnsupportedError
from fxreuse.program import module_path

LEADER, FOLLOWER = ("layers.0", 0), ("layers.1", 0)


class Attention(nn.Module):
    """Attention with grouped key heads, in one of the ways that people write it."""

    def __init__(self, way="fused", heads=4, kv_heads=2, dropout=0.0, causal=False):
        super().__init__()
        self.way, self.heads, self.kv_heads, self.dropout, self.causal = way, heads, kv_heads, dropout, causal
        self.q, self.o = nn.Linear(16, heads * 4), nn.Linear(heads * 4, 16)
        self.k, self.v = nn.Linear(16, kv_heads * 4), nn.Linear(16, kv_heads * 4)

    def project(self, layer, x):
        return layer(x).unflatten(-1, (-1, 4)).transpose(1, 2)

    def probs(self, x, mask=None):
        q, k = self.project(self.q, x), self.project(self.k, x).repeat_interleave(self.heads // self.kv_heads, 1)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / 2
        return SOFTMAX[self.way](scores if mask is None else scores + mask)

    def context(self, probs, x):
        v = self.project(self.v, x).repeat_interleave(self.heads // self.kv_heads, 1)
        return self.o(torch.einsum("bhqk,bhkd->bhqd", probs, v).transpose(1, 2).flatten(2))

    def forward(self, x, mask=None):
        if self.way != "fused":
            return x + self.context(F.dropout(self.probs(x, mask), self.dropout, self.training), x)
        q, k, v = (self.project(layer, x) for layer in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(
            q, k, v, mask, self.dropout * self.training, self.causal, enable_gqa=self.heads != self.kv_heads
        )
        return x + self.o(out.transpose(1, 2).flatten(2))


SOFTMAX = {
    "fused": lambda scores: torch.softmax(scores, -1),
    "torch": lambda scores: torch.softmax(scores, dim=-1),
    "functional": lambda scores: F.softmax(scores, dim=-1, dtype=torch.float64),
    "method": lambda scores: scores.softmax(-1),
    "special": lambda scores: torch.special.softmax(input=scores, dim=-1),
    "aten": lambda scores: torch.ops.aten.softmax.int(scores, -1),
    "module": nn.Softmax(-1),
}


class Stack(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, mask=None):
        for layer in self.layers:
            x = layer(x, mask)
        return x


def stack(*ways, **options):
    torch.manual_seed(0)
    return Stack(*(Attention(way, **options) for way in ways)).double().eval()


def by_hand(model, x, maps):
    """The stack whose layer i attends by ``maps[i](its input)``, or by the map of layer ``maps[i]``."""
    made = []
    for layer, how in zip(model.layers, maps, strict=True):
        made.append(made[how] if isinstance(how, int) else how(layer, x))
        x = x + layer.context(made[-1], x)
    return x


def plain(layer, x):
    return layer.probs(x)


@pytest.fixture
def x():
    return torch.randn(3, 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("way", [way for way in SOFTMAX if way != "module"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_follower_uses_the_map_of_its_leader(way, kv_heads, x):
    model = stack(way, way, way, kv_heads=kv_heads)
    with MapSharing(model, {FOLLOWER: LEADER}) as sharing:
        shared = model(x)
    torch.testing.assert_close(shared, by_hand(model, x, [plain, 0, plain]), rtol=0, atol=1e-12)
    assert sharing.met == [("layers.0", 0), ("layers.1", 0), ("layers.2", 0)]
    assert sharing.shapes == {LEADER: (3, 4, 6, 6)}
    assert (shared - model(x)).abs().max() > 1e-4


@pytest.mark.parametrize("ways", [("fused", "torch"), ("method", "fused")])
def test_fused_and_open_attention_can_share(ways, x):
    model = stack(*ways)
    with MapSharing(model, {FOLLOWER: LEADER}):
        shared = model(x)
    torch.testing.assert_close(shared, by_hand(model, x, [plain, 0]), rtol=0, atol=1e-12)


def test_a_follower_may_lead_with_the_map_it_follows(x):
    model = stack("fused", "fused", "fused")
    with MapSharing(model, {FOLLOWER: LEADER, ("layers.2", 0): FOLLOWER}):
        shared = model(x)
    torch.testing.assert_close(shared, by_hand(model, x, [plain, 0, 0]), rtol=0, atol=1e-12)


def test_causal_maps_are_aligned_at_the_top_left():
    q, k, v = torch.randn(2, 3, 4, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    model = Calls(lambda: [F.scaled_dot_product_attention(q, k, v, is_causal=True) for _ in range(2)])
    first, second = model()
    with MapSharing(model, {("", 1): ("", 0)}):
        torch.testing.assert_close(model(), [first, second])


@pytest.mark.parametrize("boolean", [True, False])
def test_a_row_that_is_masked_as_a_whole_gives_zeros_and_no_nan_gradient(boolean, x):
    model, x = stack("fused", "fused"), x.requires_grad_()
    mask = torch.ones(3, 1, 6, 6, dtype=torch.bool).tril()
    mask[1, :, 2] = False
    mask = mask if boolean else torch.zeros(mask.shape, dtype=x.dtype).masked_fill(~mask, -math.inf)
    alone = model.layers[0](x, mask)
    with MapSharing(model, {FOLLOWER: LEADER}):
        shared = model(x, mask)
        x.grad = None
        shared.sum().backward()
    assert x.grad.isfinite().all()
    with MapSharing(model.layers[0], {}) as sharing:
        torch.testing.assert_close(model.layers[0](x, mask), alone)
    assert sharing.met == [("", 0)]
    bias = model.layers[0].o.bias
    torch.testing.assert_close(alone[1, 2], x[1, 2] + bias)
    torch.testing.assert_close(shared[1, 2], x[1, 2] + bias + model.layers[1].o.bias)


@pytest.mark.parametrize("way", ["fused", "functional"])
def test_gradients_flow_through_the_shared_map(way, x):
    model = stack(way, way).train()
    weights = list(model.parameters())
    expected = torch.autograd.grad(by_hand(model, x, [plain, 0]).pow(2).sum(), weights, allow_unused=True)
    with MapSharing(model, {FOLLOWER: LEADER}):
        found = torch.autograd.grad(model(x).pow(2).sum(), weights, allow_unused=True)
    unused = {name for (name, _), gradient in zip(model.named_parameters(), found, strict=True) if gradient is None}
    assert unused == {"layers.1.q.weight", "layers.1.q.bias", "layers.1.k.weight", "layers.1.k.bias"}
    for one, other in zip(expected, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=0, atol=1e-10)


@pytest.mark.parametrize("way", ["fused", "method"])
def test_every_site_has_its_own_dropout_on_the_map_before_dropout(way, x):
    model = stack(way, way, dropout=0.5).train()

    def by_hand_with_dropout():
        torch.manual_seed(7)
        first, second = model.layers
        probs = first.probs(x)
        hidden = x + first.context(F.dropout(probs, 0.5), x)
        return hidden + second.context(F.dropout(probs, 0.5), hidden)

    with MapSharing(model, {FOLLOWER: LEADER}):
        torch.manual_seed(7)
        shared = model(x)
    torch.testing.assert_close(shared, by_hand_with_dropout(), rtol=0, atol=1e-12)


class Calls(nn.Module):
    """A module whose forward is a function."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args):
        return self.function(*args)


def test_a_map_that_its_model_overwrites_is_shared_as_it_was():
    def run(scores):
        maps = [scores[0].softmax(-1), scores[1].softmax(-1), scores[2].softmax(-1)]
        maps[0].mul_(0), maps[1].mul_(0)
        return maps

    scores = torch.randn(3, 4, 5)
    model = Calls(run)
    with MapSharing(model, {("", 1): ("", 0), ("", 2): ("", 0)}):
        found = model(scores)
    torch.testing.assert_close(found[2], scores[0].softmax(-1))


@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_is_entered(need_weights):
    mha = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2)).eval()
    model = Calls(lambda x: [part(x, x, x, need_weights=need_weights) for part in mha], mha=mha)
    x = torch.randn(3, 5, 8)
    with MapSharing(model, {("mha.1", 0): ("mha.0", 0)}) as sharing, torch.no_grad():
        (_, first), (out, second) = model(x)
    assert sharing.shapes[("mha.0", 0)] == ((6, 5, 5) if need_weights else (3, 2, 5, 5))
    weights = mha[0](x, x, x, average_attn_weights=False)[1]
    value = F.linear(x, mha[1].in_proj_weight[16:], mha[1].in_proj_bias[16:]).unflatten(-1, (2, 4)).transpose(1, 2)
    torch.testing.assert_close(out, mha[1].out_proj((weights @ value).transpose(1, 2).flatten(2)))
    if need_weights:
        torch.testing.assert_close(second, first)


def test_encoder_layers_do_not_take_their_fast_path():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    with torch.no_grad():
        padding = torch.zeros(2, 5, dtype=torch.bool)
        with MapSharing(encoder, {}) as sharing:
            encoder(torch.randn(2, 5, 8), src_key_padding_mask=padding)
    assert sharing.met == [("layers.0.self_attn", 0), ("layers.1.self_attn", 0)]
    assert torch.backends.mha.get_fastpath_enabled()


def test_composite_functions_are_entered_and_others_are_left_alone():
    def run(x):
        F.gumbel_softmax(x, dim=-1), F.softmin(x, dim=-1), F.log_softmax(x, dim=-1), F.layer_norm(x, (4,))
        return torch.softmax(x.unflatten(-1, (2, 2)), -1)

    assert site_calls(Calls(run), torch.randn(3, 4)) == [("", 0), ("", 1), ("", 2)]


def test_the_order_counts_within_the_innermost_module_call():
    def run(x):
        return model.soft(x.softmax(-1)).softmax(-1) + model.soft(x)

    model = Calls(run, soft=nn.Softmax(-1))
    assert site_calls(model, (torch.randn(2, 3),)) == [("", 0), ("soft", 0), ("", 1), ("soft@1", 0)]


def exported_sites(model, args, kwargs=None):
    """The sites that a captured graph of the model shows."""
    program = torch.export.export(model, args, kwargs or {}).module(check_guards=False)
    targets = {torch.ops.aten.softmax.int, torch.ops.aten.scaled_dot_product_attention.default}
    met, sites = collections.Counter(), []
    for node in program.graph.nodes:
        if node.target in targets:
            path = module_path(node)
            sites.append((path, met[path]))
            met[path] += 1
    return sites


def test_repeated_and_shared_modules_have_the_names_of_the_captured_graph():
    x, layer, other = torch.randn(2, 5, 16), Attention(), Attention("module")
    repeated = Stack(*[layer] * 3)
    names = [(f"layers.{index}", 0) for index in range(3)]
    assert site_calls(repeated, x) == exported_sites(repeated, (x,)) == names
    nested = Stack(Stack(layer, other), Stack(layer, other), layer)
    names = [(f"layers.{index // 2}.layers.{index % 2}", 0) for index in range(4)] + [("layers.2", 0)]
    assert site_calls(nested, x) == exported_sites(nested, (x,)) == names


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = Attention()

    def forward(self, x):
        return self.layer(self.layer(x))


def test_a_module_that_is_called_again_is_numbered_in_every_forward_anew(x):
    model = Twice().double()
    names = [("layer", 0), ("layer@1", 0)]
    assert site_calls(model, x) == exported_sites(model, (x,)) == names
    with MapSharing(model, {names[1]: names[0]}) as sharing:
        first, again = model(x), model(x)
        assert sharing.met == names
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    probs = model.layer.probs(x)
    hidden = x + model.layer.context(probs, x)
    torch.testing.assert_close(first, hidden + model.layer.context(probs, hidden), rtol=0, atol=1e-12)


def test_a_model_may_call_itself():
    model = Calls(lambda x, depth: x.softmax(-1) if depth == 0 else model(x, depth - 1).softmax(-1))
    assert site_calls(model, (torch.randn(2, 3), 2)) == [("@2", 0), ("@1", 0), ("", 0)]


def test_what_is_computed_outside_of_the_model_is_no_site(x):
    model = stack("fused")
    with MapSharing(model, {}) as sharing:
        model(x).softmax(-1)
    assert sharing.met == [("layers.0", 0)]


def traces(model):
    """All that sharing could leave behind."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    keys = [sorted(m.__dict__) for m in model.modules()]
    return (
        hooks,
        keys,
        torch.backends.mha.get_fastpath_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
    )


def stop(*_):
    raise ValueError("stop")


def test_nothing_is_left_behind(x):
    model = stack("fused", "torch")
    before, plain_out = traces(model), model(x)
    with MapSharing(model, {FOLLOWER: LEADER}):
        model(x)
    assert traces(model) == before
    stopping = model.layers[1].register_forward_hook(stop, prepend=True)
    with pytest.raises(ValueError, match="stop"), MapSharing(model, {FOLLOWER: LEADER}):
        model(x)
    stopping.remove()
    assert traces(model) == before
    torch.testing.assert_close(model(x), plain_out, rtol=0, atol=0)


def test_a_failed_call_does_not_shift_the_names(x):
    model = stack("fused", "fused")
    with MapSharing(model, {FOLLOWER: LEADER}) as sharing:
        with pytest.raises(RuntimeError):
            model(x[..., :5])
        model(x)
    assert sharing.met == [LEADER, FOLLOWER]


def test_a_site_that_is_never_met_is_named_with_those_that_are(x):
    model = stack("fused", "fused")
    with pytest.raises(UnsupportedError) as raised, MapSharing(model, {("layers.7", 1): LEADER}):
        model(x)
    assert str(raised.value) == (
        "maps cannot be shared as asked: layers.7#1 never ran; "
        "the softmaxes and fused attentions that ran are: layers.0, layers.1"
    )
    with pytest.raises(UnsupportedError, match=r"layers\.0, layers\.1 never ran; .* are: none"):
        MapSharing(model, {FOLLOWER: LEADER}).check()


def test_a_leader_has_to_run_before_its_follower(x):
    model = stack("fused", "fused")
    with (
        pytest.raises(UnsupportedError, match=r"layers\.0 is to use the map of layers\.1, which did not run before"),
        MapSharing(model, {LEADER: FOLLOWER}),
    ):
        model(x)


@pytest.mark.parametrize("way", ["fused", "torch"])
def test_maps_of_different_shape_cannot_be_shared(way, x):
    model = Stack(Attention(way, heads=4), Attention(way, heads=2)).double()
    with (
        pytest.raises(UnsupportedError, match=r"layers\.1 needs a map of shape \(3, 2, 6, 6\), .* is \(3, 4, 6, 6\)"),
        MapSharing(model, {FOLLOWER: LEADER}),
    ):
        model(x)


def test_a_site_cannot_follow_itself():
    with pytest.raises(UnsupportedError, match=r"layers\.0#2: a site cannot follow itself"):
        MapSharing(nn.Identity(), {("layers.0", 2): ("layers.0", 2)})


@pytest.mark.parametrize("name", ["a.b", "a.b@3", "a.b#2", "a.b@3#1", ""])
def test_names_of_sites_and_their_keys_are_one_to_one(name):
    assert site_name(site_key(name)) == name


# Real architectures: the fused and the open implementation of one model have to agree on what sharing means.

transformers = pytest.importorskip("transformers")
TINY = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
CONV = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "num_feat_extract_layers": 2,
}
IDS, PIXELS, WAVES = "input_ids", "pixel_values", "input_values"
ARCHITECTURES = {
    "Bert": ({"vocab_size": 99, **TINY}, IDS),
    "Roberta": ({"vocab_size": 99, **TINY}, IDS),
    "GPT2": ({"vocab_size": 99, "n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}, IDS),
    "Llama": ({"vocab_size": 99, "num_key_value_heads": 2, **TINY}, IDS),
    "ViT": ({"image_size": 32, "patch_size": 8, **TINY}, PIXELS),
    "Albert": ({"vocab_size": 99, "embedding_size": 16, **TINY}, IDS),
    "Wav2Vec2": ({**TINY, **CONV}, WAVES),
    "Hubert": ({**TINY, **CONV}, WAVES),
}
UNFUSED = {
    "T5Encoder": (
        "T5",
        {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4},
        IDS,
        3,
    ),
    "Swin": (
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [4], "num_heads": [4], "window_size": 4},
        PIXELS,
        4,
    ),
    "WavLM": ("WavLM", {**TINY, **CONV}, WAVES, 3),
    "Wav2Vec2Conformer": (
        "Wav2Vec2Conformer",
        {"position_embeddings_type": "relative", "conv_depthwise_kernel_size": 7, **TINY, **CONV},
        WAVES,
        3,
    ),
}


def architecture(model, config, kind, **options):
    torch.manual_seed(0)
    config = getattr(transformers, f"{config[0]}Config")(**config[1])
    built = getattr(transformers, f"{model}Model")._from_config(config, **options).double().eval()
    return built, {kind: inputs_of(kind)}


def inputs_of(kind):
    shapes = {PIXELS: (2, 3, 32, 32), WAVES: (2, 400)}
    return torch.randint(3, 90, (2, 11)) if kind == IDS else torch.randn(shapes[kind], dtype=torch.float64)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_and_open_implementations_agree_on_sharing(name):
    config, kind = ARCHITECTURES[name]
    fused, inputs = architecture(name, (name, config), kind, attn_implementation="sdpa")
    opened, _ = architecture(name, (name, config), kind, attn_implementation="eager")
    opened.load_state_dict(fused.state_dict())
    sites = site_calls(fused, inputs)
    assert sites == site_calls(opened, inputs)
    assert len(sites) == 3
    with torch.no_grad(), KeepFloat64():
        with MapSharing(fused, {sites[1]: sites[0], sites[2]: sites[0]}):
            expected = fused(**inputs)
        with MapSharing(opened, {sites[1]: sites[0], sites[2]: sites[0]}):
            found = opened(**inputs)
        unshared = fused(**inputs)
    assert difference(expected, found).error < 1e-12
    assert difference(expected, unshared).error > 1e-10


@pytest.mark.parametrize("name", UNFUSED)
def test_attention_with_scores_of_its_own_shares(name):
    *config, kind, count = UNFUSED[name]
    model, inputs = architecture(name, config, kind)
    sites = site_calls(model, inputs)
    assert len(sites) == count
    with torch.no_grad(), KeepFloat64():
        unshared = model(**inputs)
        with MapSharing(model, {sites[1]: sites[0]}):
            shared = model(**inputs)
    assert difference(unshared, shared).error > 1e-10
    assert difference(unshared, shared).faults == ()


def test_calls_of_albert_have_the_names_of_the_captured_graph():
    config, kind = ARCHITECTURES["Albert"]
    model, inputs = architecture("Albert", ("Albert", config), kind)
    sites = site_calls(model, inputs)
    assert sites == exported_sites(model, (), inputs)
    path = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert sites == [(path, 0), (f"{path}@1", 0), (f"{path}@2", 0)]
