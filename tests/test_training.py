from __future__ import annotations

import random
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

from fxreuse.frontend.mode_modules import marked
from fxreuse.frontend.training import TrainingFacts, probe
from fxreuse.program import module_path

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = {"vocab_size": 99, "max_position_embeddings": 32}
DROP = {"attention_probs_dropout_prob": 0.15}
IMAGE = {"image_size": 16, "patch_size": 8, **TINY}
SPEECH = {
    **{"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "attention_dropout": 0.15},
    **TINY,
}
BART = {
    **{"vocab_size": 99, "d_model": 16, "max_position_embeddings": 32, "attention_dropout": 0.15},
    **{f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in
       {"layers": 2, "attention_heads": 2, "ffn_dim": 32}.items()},
}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.15}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def ids(length=7):
    return torch.randint(3, 99, (2, length))


def text(model):
    return model, {"input_ids": ids()}


def speech(kind, **settings):
    return getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**SPEECH, **settings)), {
        "input_values": torch.randn(2, 300)
    }


def image(model):
    return model, {"pixel_values": torch.randn(2, 3, 16, 16)}


def bert(**settings):
    return text(hf.BertModel(hf.BertConfig(**TEXT, **TINY, **DROP, **settings)))


def albert():
    return text(hf.AlbertModel(hf.AlbertConfig(embedding_size=8, **TEXT, **TINY, **DROP)))


def bart(**settings):
    model = hf.BartModel(hf.BartConfig(use_cache=False, **BART, **ENDS, **settings))
    return model, {"input_ids": ids(), "decoder_input_ids": ids(5)}


def whisper():
    sizes = {"num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 32, "decoder_start_token_id": 1}
    model = hf.WhisperModel(hf.WhisperConfig(encoder_layerdrop=0.2, **sizes, **BART, **ENDS)).get_encoder()
    return model, {"input_features": torch.randn(2, 8, 48)}


def padded_bert():
    model, inputs = bert()
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    return model, {**inputs, "attention_mask": mask}


def swin():
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    return image(hf.SwinModel(hf.SwinConfig(drop_path_rate=0.1, **sizes, **DROP)))


def t5():
    return text(hf.T5EncoderModel(hf.T5Config(**T5)))


def gpt2():
    config = hf.GPT2Config(vocab_size=99, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.15, **ENDS)
    return text(hf.GPT2Model(config))


def llama():
    config = hf.LlamaConfig(num_key_value_heads=1, attention_dropout=0.15, use_cache=False, **TEXT, **TINY)
    return text(hf.LlamaForCausalLM(config))


def conformer(positions):
    return speech("Wav2Vec2Conformer", position_embeddings_type=positions, conv_depthwise_kernel_size=7)


def torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.15, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), {"src": torch.randn(2, 7, 16)}


#: Per model: the owners of attention whose dropout vanished, the layers that are skipped at random, what is lost.
MODELS = {
    "bert": (bert, ["encoder.layer.{}.attention.self"], [], []),
    "bert, padded": (padded_bert, ["encoder.layer.{}.attention.self"], [], []),
    "bert, unfused": (lambda: bert(attn_implementation="eager"), [], [], []),
    "roberta": (
        lambda: text(hf.RobertaModel(hf.RobertaConfig(**TEXT, **TINY, **DROP, **ENDS))),
        ["encoder.layer.{}.attention.self"], [], [],
    ),
    "gpt2": (gpt2, ["h.{}.attn"], [], []),
    "llama": (llama, ["model.layers.{}.self_attn"], [], []),
    "t5": (t5, ["encoder.block.{}.layer.0.SelfAttention"], [], []),
    "bart": (
        lambda: bart(encoder_layerdrop=0.2, decoder_layerdrop=0.3),
        ["encoder.layers.{}.self_attn", "decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn"],
        ["encoder.layers.0", "encoder.layers.1", "decoder.layers.0", "decoder.layers.1"], [],
    ),
    "vit": (lambda: image(hf.ViTModel(hf.ViTConfig(**IMAGE, **DROP))), ["layers.{}.attention"], [], []),
    "deit": (lambda: image(hf.DeiTModel(hf.DeiTConfig(**IMAGE, **DROP))), ["layers.{}.attention"], [], []),
    "swin": (swin, ["encoder.layers.{}.blocks.0.attention"], [], []),
    "wav2vec2": (
        lambda: speech("Wav2Vec2"), ["encoder.layers.{}.attention"],
        ["encoder.layers.0", "encoder.layers.1"], ["Wav2Vec2Model"],
    ),
    "hubert": (
        lambda: speech("Hubert"), ["encoder.layers.{}.attention"],
        ["encoder.layers.0", "encoder.layers.1"], ["HubertModel"],
    ),
    "hubert without masking": (
        lambda: speech("Hubert", mask_time_prob=0.0), ["encoder.layers.{}.attention"],
        ["encoder.layers.0", "encoder.layers.1"], [],
    ),
    "hubert without augmentation": (
        lambda: speech("Hubert", apply_spec_augment=False, layerdrop=0.0), ["encoder.layers.{}.attention"], [], [],
    ),
    "wavlm": (lambda: speech("WavLM"), ["encoder.layers.{}.attention"], ["encoder.layers.1"], ["WavLMModel"]),
    "conformer, relative": (
        lambda: conformer("relative"), ["encoder.layers.{}.self_attn"],
        ["encoder.layers.0", "encoder.layers.1"], ["Wav2Vec2ConformerModel"],
    ),
    "conformer, rotary": (
        lambda: conformer("rotary"), ["encoder.layers.{}.self_attn"],
        ["encoder.layers.0", "encoder.layers.1"], ["Wav2Vec2ConformerModel"],
    ),
    "whisper encoder": (whisper, ["layers.{}.self_attn"], ["layers.0", "layers.1"], []),
    "torch": (torch_encoder, ["layers.{}.self_attn"], [], []),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_public_architectures(name):
    build, owners, layers, lost = MODELS[name]
    model, inputs = build()
    facts = probe(model, (), inputs)
    assert facts.attention_dropout == {(owner.format(i), 0): 0.15 for owner in owners for i in range(2)}
    assert set(facts.layerdrop) == set(layers)
    assert [note.where for note in facts.lost] == lost, [str(note) for note in facts.lost]


@pytest.mark.parametrize("name", ["bert, unfused", "bart", "swin", "wavlm", "torch"])
def test_places_are_those_of_the_graph(name):
    model, inputs = MODELS[name][0]()
    facts = probe(model, (), inputs)
    attentions, dropouts = places(model, inputs)
    assert set(facts.attention_dropout) <= attentions
    assert set(facts.functional_dropout) == dropouts


def places(model, inputs):
    """The places of attentions and of functional dropouts in the exported graph, counted as a pass would count."""
    model.eval()
    with marked(model):
        program = torch.export.export(model, (), inputs, strict=False)
    found, counts = {"attention": set(), "dropout": set()}, Counter()
    kinds = {"softmax": "attention", "scaled_dot_product_attention": "attention", "dropout": "dropout"}
    for node in program.module(check_guards=False).graph.nodes:
        operator = getattr(node.target, "overloadpacket", None)
        kind = kinds.get(operator.__name__) if operator else None
        if kind:
            path = module_path(node)
            found[kind].add((path, counts[path, kind]))
            counts[path, kind] += 1
    return found["attention"], found["dropout"]


def test_probabilities_of_layerdrop():
    model, inputs = bart(encoder_layerdrop=0.2, decoder_layerdrop=0.3)
    facts = probe(model, (), inputs)
    expected = {f"{part}.layers.{i}": p for part, p in (("encoder", 0.2), ("decoder", 0.3)) for i in range(2)}
    assert facts.layerdrop == pytest.approx(expected)


def test_spec_augment_is_named_with_what_to_do():
    model, inputs = speech("Hubert")
    (note,) = probe(model, (), inputs).lost
    assert note.kind == "training"
    assert note.text == ("does something in training mode that the capture does not show: calls tensor, to, index_put_")
    assert note.remedy == (
        "capture only what holds the attentions with target='encoder', so that this code stays as it is"
    )


def test_calls_of_one_module_are_told_apart():
    model, inputs = albert()
    path = "encoder.albert_layer_groups.0.albert_layers.0.attention"
    assert probe(model, (), inputs).attention_dropout == {(path, 0): 0.15, (f"{path}@1", 0): 0.15}


def test_one_module_under_several_paths():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = FunctionalDropouts()
            self.second = self.first
            self.layers = nn.ModuleList([FunctionalDropouts()] * 2)

        def forward(self, x):
            x = self.first(self.second(self.first(x)))
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    facts = probe(model, (torch.randn(2, 4),), {})
    assert {path for path, _ in facts.functional_dropout} == {"first", "second", "first@1", "layers.0", "layers.1"}
    assert set(facts.functional_dropout) == places(model, {"x": torch.randn(2, 4)})[1]
    assert model.second is model.first
    assert model.layers[0] is model.layers[1]


class FunctionalDropouts(nn.Module):
    def forward(self, x):
        x = F.dropout(x, p=0.1, training=self.training)
        x = F.dropout(x + 1, p=0.2 if self.training else 0.0)
        return F.dropout(x * 2, p=0.3, training=False)


class Attention(nn.Module):
    """Attention in one of the ways that people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.projection = nn.Linear(8, 8)
        self.whole = nn.MultiheadAttention(8, 2, dropout=0.25, batch_first=True)

    def forward(self, x):
        y = self.projection(x)
        if self.way == "fused":
            return F.scaled_dot_product_attention(y, y, x, dropout_p=0.25 * self.training)
        if self.way == "inserted":
            probs = (y @ x.mT).softmax(-1)
            return (F.dropout(probs, 0.25) if self.training else probs) @ x
        if self.way == "functional":
            return F.dropout((y @ x.mT).softmax(-1), 0.25, self.training) @ x
        return self.whole(y, x, x, need_weights=self.way == "with weights")[0]


@pytest.mark.parametrize(
    ("way", "place"),
    [("fused", ("", 0)), ("inserted", ("", 0)), ("fused in torch", ("whole", 0)), ("with weights", ("whole", 0))],
)
def test_ways_to_write_attention(way, place):
    facts = probe(Attention(way), (torch.randn(2, 5, 8),), {})
    assert facts == TrainingFacts(attention_dropout={place: 0.25})


def test_functional_dropouts():
    expected = TrainingFacts(functional_dropout={("", 0): 0.1, ("", 1): 0.2, ("", 2): 0.0})
    assert probe(FunctionalDropouts(), (torch.randn(2, 4),), {}) == expected
    assert probe(Attention("functional"), (torch.randn(2, 5, 8),), {}).functional_dropout == {("", 0): 0.25}


def test_marked_modules_are_not_lost():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Dropout(0.1, inplace=True))
    assert probe(model, (torch.randn(3, 4),), {}) == TrainingFacts()


class Stack(nn.Module):
    """Layers of which some are left out at random in training, in one of the ways that people write it."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.GELU()) for _ in range(3))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            if not (self.training and self.skips(number)):
                x = layer(x)
            elif self.way == "scales":
                x = x * 2
        return x

    def skips(self, number):
        p = 0.1 * (number + 1)
        return {
            "tensor": lambda: torch.rand([]) < p,
            "item": lambda: torch.rand(1).item() <= p,
            "reversed": lambda: p > torch.rand(()),
            "python": lambda: random.random() < p,
            "in place": lambda: torch.empty(1).uniform_() < p,
            "survival": lambda: torch.rand(1) >= 1 - p,
            "elements": lambda: bool((torch.rand(4) < p)[0]),
            "scales": lambda: torch.rand([]) < p,
            "sum": lambda: torch.rand([]) + (1 - p) < 1,
        }[self.way]()


@pytest.mark.parametrize("way", ["tensor", "item", "reversed", "python", "in place", "survival", "elements"])
def test_layers_that_are_skipped_at_random(way):
    facts = probe(Stack(way), (torch.randn(2, 4),), {})
    assert facts.lost == ()
    assert facts.layerdrop == pytest.approx({"layers.0": 0.1, "layers.1": 0.2, "layers.2": 0.3})


def test_layers_that_are_never_skipped_are_not_reported():
    class Never(Stack):
        def skips(self, number):
            return torch.rand([]) < 0.0

    assert probe(Never(""), (torch.randn(2, 4),), {}) == TrainingFacts()


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("scales", "calls mul"),
        ("sum", "skips layers.0 at random, with a probability that could not be read"),
    ],
)
def test_skipping_that_is_more_than_skipping_is_lost(way, text):
    (note,) = probe(Stack(way), (torch.randn(2, 4),), {}).lost
    assert text in note.text


class Host(nn.Module):
    """Two attentions, and something that happens only in training."""

    def __init__(self, what: str = "") -> None:
        super().__init__()
        self.what = what
        self.layers = nn.Sequential(*(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(2)))
        self.scale = nn.Parameter(torch.ones(8))
        self.other_scale = nn.Parameter(torch.ones(8))
        self.loss = None

    def happens(self, what: str) -> bool:
        return self.training and self.what == what

    def forward(self, x):
        x = self.layers(x)
        if self.happens("auxiliary loss"):
            self.loss = x.pow(2).mean()
        if self.happens("noise"):
            x = x + torch.randn_like(x)
        if self.happens("dropout"):
            x = F.dropout(x, 0.1)
        if self.happens("failure"):
            raise RuntimeError("no labels")
        if self.happens("detached"):
            x = x.detach()
        with torch.set_grad_enabled(not self.happens("no gradient")):
            x = x * (self.other_scale if self.happens("another parameter") else self.scale)
        return (x, x) if self.happens("another result") else x


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("auxiliary loss", "calls pow, mean"),
        ("noise", "calls randn_like, add"),
        ("dropout", "applies dropout with probability 0.1"),
        ("failure", "could not be run in training mode: RuntimeError: no labels"),
        ("detached", "calls detach"),
        ("no gradient", "calls _set_grad_enabled with other arguments"),
        ("another parameter", "calls mul with other arguments"),
        ("another result", "gives back something else"),
    ],
)
def test_what_is_lost(what, text):
    (note,) = probe(Host(what), (torch.randn(2, 5, 8),), {}).lost
    assert note.where == "Host"
    assert text in note.text
    assert "target='layers'" in note.remedy


def test_nothing_is_lost_where_nothing_differs():
    assert probe(Host(), (torch.randn(2, 5, 8),), {}) == TrainingFacts()


def test_dropout_between_recurrent_layers():
    assert probe(nn.Sequential(nn.LSTM(8, 8, 2)), (torch.randn(2, 5, 8),), {}) == TrainingFacts()
    facts = probe(nn.Sequential(nn.LSTM(8, 8, 2, dropout=0.1)), (torch.randn(2, 5, 8),), {})
    assert "calls lstm with other arguments" in facts.lost[0].text


def test_one_note_for_all_modules_of_a_class():
    class Balanced(nn.TransformerEncoderLayer):
        def forward(self, x, *args, **kwargs):
            x = super().forward(x, *args, **kwargs)
            if self.training:
                self.balance = x.mean((0, 1)).std()
            return x

    model = nn.TransformerEncoder(Balanced(8, 2, 16, 0.1, batch_first=True), 3, enable_nested_tensor=False)
    facts = probe(model, (torch.randn(2, 5, 8),), {})
    assert [note.where for note in facts.lost] == ["layers.0 (Balanced) and 2 more"]
    assert facts.lost[0].text.startswith("does something in training mode")
    assert facts.lost[0].remedy.startswith("capture only a submodule without this code")
    assert facts.attention_dropout == {(f"layers.{i}.self_attn", 0): 0.1 for i in range(3)}


def test_training_flag_read_outside_of_the_class():
    def helper(module, x):
        return x + 1 if module.training else x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(4)

        def forward(self, x):
            return helper(self, self.norm(x))

    assert [note.where for note in probe(Model(), (torch.randn(2, 4),), {}).lost] == ["Model"]


def test_a_flag_passed_on_is_put_down_to_who_passes_it():
    class Child(nn.Module):
        def forward(self, x, noisy):
            return x * 2 if noisy else x

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def forward(self, x):
            return self.child(x, self.training)

    notes = probe(nn.Sequential(Parent(), nn.Linear(4, 4)), (torch.randn(2, 4),), {}).lost
    assert [note.where for note in notes] == ["0 (Parent)"]


def test_branches_on_values_are_followed_with_real_tensors():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention("fused")
            self.register_buffer("steps", torch.zeros(()))

        def forward(self, x):
            self.steps += 1
            x = self.attention(F.dropout(x, 0.5, self.training))
            return x * 2 if x.sum() > 0 else x.numpy().tolist()

    model, x = Model(), torch.randn(2, 5, 8)
    facts = probe(model, (x.abs(),), {})
    assert facts == TrainingFacts({("attention", 0): 0.25}, {("", 0): 0.5})
    assert probe(model, (-x.abs(),), {}).lost == ()
    assert model.steps == 0


def test_a_model_that_cannot_be_run():
    facts = probe(nn.Linear(4, 4), (torch.randn(2, 5),), {})
    (note,) = facts.lost
    assert note.where == "Linear"
    assert note.text.startswith("what it does in training mode could not be found out: RuntimeError")
    assert facts == TrainingFacts(lost=(note,))


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_and_the_generators_are_left_as_they_were(fails):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.BatchNorm1d(4), nn.Dropout())
            self.register_buffer("seen", torch.zeros(4))
            self.history, self.cache, self.calls = [], {}, 0

        def forward(self, x):
            self.seen.add_(x.detach().mean(0))
            self.history.append(x)
            self.cache["x"] = x
            self.calls += 1
            self.table = torch.rand(3)
            return self.layers(x) if not fails else x.undefined

    model = Model()
    model.layers[1].eval()
    model.layers[0].register_forward_hook(lambda module, args, result: result * 2)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = [{k: v for k, v in module.__dict__.items() if k != "_modules"} for module in model.modules()]
    x = torch.randn(3, 4)
    generators = torch.get_rng_state(), random.getstate()
    facts = probe(model, (x,), {})
    assert bool(facts.lost) == fails
    assert [{k: v for k, v in module.__dict__.items() if k != "_modules"} for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.history, model.cache, model.calls) == ([], {}, 0)
    assert [module.training for module in model.layers] == [True, False, True, True]
    assert torch.equal(generators[0], torch.get_rng_state())
    assert generators[1] == random.getstate()
