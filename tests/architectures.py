"""Public architectures at toy size, with random weights under which one layer's attention map is not another's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called, and a plan for one of its stacks.

    ``other_inputs`` differ from ``inputs`` in every size that the model leaves free. ``site`` and ``layer`` are the
    paths of the attention and of the layer around it, with ``{}`` for the number of the layer; ``leaders`` is what
    ``plan`` means, layer by layer. ``training_lost`` is set where training does something that no graph captured in
    eval mode has. ``inexact`` says why the identity plan may differ from the model by rounding.
    """

    model: torch.nn.Module
    inputs: Inputs
    other_inputs: Inputs
    site: str
    layer: str
    plan: str = "2x*"
    leaders: tuple[int, ...] = (0, 0, 2, 2)
    stack: str | None = None
    training_lost: bool = False
    inexact: str = ""

    @property
    def layers(self) -> int:
        return len(self.leaders)

    def followers(self) -> dict[tuple[str, int], tuple[str, int]]:
        """For every site that follows, its leader, as `fxreuse.checking.reference.MapSharing` takes them."""
        pairs = enumerate(self.leaders)
        return {(self.site.format(i), 0): (self.site.format(leader), 0) for i, leader in pairs if i != leader}

    def full_plan(self, *options: str) -> str:
        stack = [] if self.stack is None else [f"stack={self.stack}"]
        return " ".join([self.plan, *stack, *options])


def randomise(model: torch.nn.Module, gain: float = 1.4) -> torch.nn.Module:
    """Weights that make maps sharp and biases count.

    The usual initial values give nearly uniform maps and zero biases, under which most mistakes cannot be seen.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                fan_in = parameter.numel() // parameter.shape[0]
                parameter.copy_(gain * fan_in**-0.5 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


ARCHITECTURES: dict[str, Callable[[], Case]] = {}

# The name of the first case with the same model and inputs, where several have them.
SAME_MODEL = {"bart_decoder": "bart_cross", "bart_encoder": "bart_cross"}


def architecture(*variants: Any) -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    """Register a case under the name of its function, or under one name for every variant, which it is given."""

    def register(build: Callable[..., Case]) -> Callable[..., Case]:
        for variant in variants or (None,):
            name = build.__name__ if variant is None else f"{build.__name__}_{variant}"
            ARCHITECTURES[name] = _seeded(build, () if variant is None else (variant,))
        return build

    return register


def _seeded(build: Callable[..., Case], arguments: tuple[Any, ...]) -> Callable[[], Case]:
    def seeded() -> Case:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            case = build(*arguments)
            randomise(case.model)
        return case

    return seeded


_TINY = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
_TEXT = {"vocab_size": 99, "max_position_embeddings": 64}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 99, (batch, length))


def _mask(batch: int, length: int, padding: int, left: bool = False) -> torch.Tensor:
    """A padding mask: the last row loses ``padding`` positions at its end (or its beginning)."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, slice(None, padding) if left else slice(length - padding, None)] = 0
    return mask


def _text(name: str, padding: str, left: bool = False) -> dict[str, Inputs]:
    """Inputs of two sizes. Padded on the left, the first queries of a causal model have no key to look at."""
    captured, other = {name: _ids(2, 11)}, {name: _ids(3, 14)}
    if padding == "padded":
        captured["attention_mask"], other["attention_mask"] = _mask(2, 11, 3), _mask(3, 14, 5, left)
    return {"inputs": captured, "other_inputs": other}


@architecture("dense", "padded")
def bert(padding: str) -> Case:
    model = hf.BertModel(hf.BertConfig(**_TEXT, **_TINY))
    return Case(model, **_text("input_ids", padding), site="encoder.layer.{}.attention.self", layer="encoder.layer.{}")


@architecture("padded")
def roberta(padding: str) -> Case:
    model = hf.RobertaModel(hf.RobertaConfig(**_TEXT, **_TINY, **_ENDS))
    return Case(model, **_text("input_ids", padding), site="encoder.layer.{}.attention.self", layer="encoder.layer.{}")


@architecture("dense", "padded")
def gpt2(padding: str) -> Case:
    config = hf.GPT2Config(vocab_size=99, n_positions=64, n_embd=32, n_layer=4, n_head=4, **_ENDS)
    inputs = _text("input_ids", padding, left=True)
    return Case(hf.GPT2Model(config), **inputs, site="h.{}.attn", layer="h.{}", plan="FSFS")


@architecture("dense", "padded")
def llama(padding: str) -> Case:
    config = hf.LlamaConfig(num_key_value_heads=2, attention_dropout=0.1, **_TEXT, **_TINY, **_ENDS)
    inputs = _text("input_ids", padding, left=True)
    return Case(hf.LlamaForCausalLM(config), **inputs, site="model.layers.{}.self_attn", layer="model.layers.{}")


@architecture("dense", "padded")
def t5_encoder(padding: str) -> Case:
    config = hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=4, num_heads=4)
    inputs = _text("input_ids", padding)
    return Case(
        hf.T5EncoderModel(config), **inputs, site="encoder.block.{}.layer.0.SelfAttention", layer="encoder.block.{}"
    )


@architecture("encoder", "decoder", "cross")
def bart(stack: str) -> Case:
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _BART_SIZES.items()}
    config = hf.BartConfig(d_model=32, **sizes, **_TEXT, **_ENDS)
    inputs, other = _text("input_ids", "padded").values()
    inputs["decoder_input_ids"], other["decoder_input_ids"] = _ids(2, 7), _ids(3, 9)
    layer, attention, name = {
        "encoder": ("encoder.layers.{}", "self_attn", "encoder"),
        "decoder": ("decoder.layers.{}", "self_attn", "decoder.layers.{i}·self"),
        "cross": ("decoder.layers.{}", "encoder_attn", "cross"),
    }[stack]
    model = hf.BartModel(config)
    return Case(model, inputs, other, f"{layer}.{attention}", layer, plan="1+3", leaders=(0, 1, 1, 1), stack=name)


_BART_SIZES = {"layers": 4, "attention_heads": 4, "ffn_dim": 64}


def _images() -> dict[str, Inputs]:
    return {
        "inputs": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "other_inputs": {"pixel_values": torch.randn(5, 3, 32, 32)},
    }


_DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}


@architecture()
def vit() -> Case:
    model = hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **_DROPOUT, **_TINY))
    return Case(model, **_images(), site="layers.{}.attention", layer="layers.{}", plan="2x2")


@architecture()
def deit() -> Case:
    model = hf.DeiTModel(hf.DeiTConfig(image_size=32, patch_size=8, **_DROPOUT, **_TINY))
    return Case(model, **_images(), site="layers.{}.attention", layer="layers.{}", plan="4x1", leaders=(0, 0, 0, 0))


@architecture()
def swin() -> Case:
    """The second stage has four layers; every other one shifts its windows, and those have a mask of their own."""
    config = hf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 4], num_heads=[2, 4], window_size=4)
    site, layer = "encoder.layers.1.blocks.{}.attention", "encoder.layers.1.blocks.{}"
    plan, leaders, stack = "leaders=0,1,0,1", (0, 1, 0, 1), "encoder.layers.1"
    return Case(hf.SwinModel(config), **_images(), site=site, layer=layer, plan=plan, leaders=leaders, stack=stack)


_SPEECH = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    **_TINY,
}
_VARIANTS = {
    "unmasked": {"apply_spec_augment": False, "layerdrop": 0.0},
    "layerdrop": {"apply_spec_augment": False, "layerdrop": 0.5},
}


def _samples(padding: str) -> dict[str, Inputs]:
    captured, other = {"input_values": torch.randn(2, 230)}, {"input_values": torch.randn(3, 301)}
    if padding == "padded":
        captured["attention_mask"], other["attention_mask"] = _mask(2, 230, 70), _mask(3, 301, 130)
    return {"inputs": captured, "other_inputs": other}


def _speech(kind: type, config: type, variant: str, attention: str = "attention", **settings: Any) -> Case:
    """``dense`` and ``padded`` are as published, with LayerDrop and SpecAugment, which is Python that no graph has."""
    model = kind(config(**_SPEECH, **settings, **_VARIANTS.get(variant, {})))
    site, lost = f"encoder.layers.{{}}.{attention}", variant not in _VARIANTS
    return Case(model, **_samples(variant), site=site, layer="encoder.layers.{}", training_lost=lost)


@architecture("padded", "unmasked")
def wav2vec2(variant: str) -> Case:
    return _speech(hf.Wav2Vec2Model, hf.Wav2Vec2Config, variant)


@architecture("dense", "padded", "unmasked", "layerdrop")
def hubert(variant: str) -> Case:
    return _speech(hf.HubertModel, hf.HubertConfig, variant)


@architecture("padded", "unmasked")
def wavlm(variant: str) -> Case:
    return _speech(hf.WavLMModel, hf.WavLMConfig, variant, num_buckets=16, max_bucket_distance=20)


@architecture("relative", "rotary")
def conformer(positions: str) -> Case:
    settings = {"position_embeddings_type": positions, "conv_depthwise_kernel_size": 7}
    kind, config = hf.Wav2Vec2ConformerModel, hf.Wav2Vec2ConformerConfig
    return _speech(kind, config, "unmasked", "self_attn", **settings)


@architecture()
def whisper_encoder() -> Case:
    """Its positions are as many as its frames, so that only the batch is free."""
    sizes = {f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in _BART_SIZES.items()}
    lengths = {"max_source_positions": 24, "max_target_positions": 32, "num_mel_bins": 8}
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    config = hf.WhisperConfig(vocab_size=99, d_model=32, decoder_start_token_id=1, **sizes, **lengths, **rates, **_ENDS)
    inputs, other = {"input_features": torch.randn(2, 8, 48)}, {"input_features": torch.randn(3, 8, 48)}
    return Case(hf.WhisperModel(config).get_encoder(), inputs, other, "layers.{}.self_attn", "layers.{}")


@architecture("postnorm", "prenorm", "padded")
def torch_encoder(variant: str) -> Case:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=variant == "prenorm")
    model = torch.nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    inputs, other = (torch.randn(2, 11, 32),), (torch.randn(3, 14, 32),)
    if variant == "padded":
        inputs = {"src": inputs[0], "src_key_padding_mask": _mask(2, 11, 3) == 0}
        other = {"src": other[0], "src_key_padding_mask": _mask(3, 14, 5) == 0}
    return Case(model, inputs, other, "layers.{}.self_attn", "layers.{}")
