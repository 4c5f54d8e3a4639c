"""Example inputs: what is accepted, what is refused and how, and what is inferred."""

from __future__ import annotations

import collections
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxreuse.errors import InputError
from fxreuse.frontend.inputs import Inputs, bind, infer, normalise

transformers = pytest.importorskip("transformers")

WIDTHS: dict[str, int] = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
SEQ2SEQ: dict[str, int] = {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
}
T5: dict[str, int] = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
WHISPER: dict[str, int] = {
    **SEQ2SEQ,
    "vocab_size": 50,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "decoder_start_token_id": 2,
    "num_mel_bins": 8,
    "max_source_positions": 20,
}
CONVOLUTIONS: dict[str, Any] = {
    "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
KOSMOS = {"embed_dim": 16, "layers": 1, "ffn_dim": 16, "attention_heads": 2, "vocab_size": 50}
REGIONS = {"visual_feat_dim": 6}
MELS = {**WIDTHS, "num_mel_bins": 16, "subsampling_conv_channels": 8}
TEXT = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, **WIDTHS}
VISION = {"image_size": 16, "patch_size": 8, **WIDTHS}


class Masked(nn.Module):
    """One argument is needed; another one may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.linear(x) if mask is None else self.linear(x) * mask


class Fusion(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 8)

    def forward(self, audio: Tensor, token_ids: Tensor, image: Tensor, mask: Any, lengths: Any = None) -> None:
        raise AssertionError("never called")


class Collecting(nn.Module):
    def forward(self, x: Tensor, *rest: Tensor, scale: float = 1.0, **options: Any) -> Tensor:
        return x


def build(name: str, config: str, **settings: Any) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model.eval()


def shapes(inputs: Inputs) -> dict[str, tuple[int, ...]]:
    assert inputs.args == ()
    return {name: tuple(value.shape) for name, value in inputs.kwargs.items()}


def refusal(model: nn.Module, example_inputs: Any) -> str:
    with pytest.raises(InputError) as caught:
        normalise(model, example_inputs)
    return str(caught.value)


# What is accepted.


def test_a_tensor_is_the_one_positional_argument() -> None:
    x = torch.randn(2, 7, 64)
    inputs = normalise(Masked(), x)
    assert inputs.args == (x,)
    assert inputs.kwargs == {}


def test_a_tuple_is_positional_and_a_mapping_named() -> None:
    assert normalise(Masked(), (1, 2)) == Inputs((1, 2), {})
    assert normalise(Masked(), {"x": 1, "mask": 2}) == Inputs((), {"x": 1, "mask": 2})
    assert normalise(Masked(), collections.UserDict(x=1)) == Inputs((), {"x": 1})
    batch = transformers.BatchEncoding({"x": torch.ones(2, 7)})
    assert normalise(Masked(), batch).kwargs["x"] is batch["x"]


def test_normal_inputs_stay_as_they_are() -> None:
    inputs = normalise(Masked(), Inputs((1,), {"mask": 2}))
    assert inputs == Inputs((1,), {"mask": 2})
    assert normalise(Masked(), inputs) == inputs


def test_keywords_come_in_the_order_of_the_signature_and_what_was_passed_is_kept() -> None:
    given = {"mask": 2, "x": 1}
    assert list(normalise(Masked(), given).kwargs) == ["x", "mask"]
    assert list(given) == ["mask", "x"]
    collected = normalise(Collecting(), {"other": 3, "scale": 2.0, "more": 4, "x": 1})
    assert list(collected.kwargs) == ["x", "scale", "other", "more"]


def test_bind_names_every_argument() -> None:
    assert bind(Masked(), Inputs((1, 2), {})) == {"x": 1, "mask": 2}
    assert bind(Masked(), Inputs((), {"mask": 2, "x": 1})) == {"x": 1, "mask": 2}
    assert bind(Collecting(), Inputs((1, 2, 3), {"scale": 4, "other": 5})) == {
        "x": 1,
        "rest": (2, 3),
        "scale": 4,
        "other": 5,
    }
    with pytest.raises(InputError, match=r"missing a required argument: 'x'; forward takes \(x, mask=None\)$"):
        bind(Masked(), Inputs((), {}))


# What is refused.


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"x": 1, "maks": 2}, "unknown 'maks' (did you mean 'mask'?)"),
        ({"hidden": 1}, "unknown 'hidden'"),
        ({"mask": 1}, "missing 'x', found 'mask'"),
        ({}, "missing 'x', found nothing"),
        ((), "missing 'x', found nothing"),
        ((1, 2, 3), "expected at most 2 positional, found 3"),
        (Inputs((1,), {"x": 1}), "both positional and by name: 'x'"),
        (
            "text",
            "expected a tensor, a tuple of positional arguments or a dict of keyword arguments, found str",
        ),
    ],
)
def test_what_does_not_fit_is_refused(given: Any, reason: str) -> None:
    assert refusal(Masked(), given) == f"example_inputs of Masked: {reason}; forward takes (x, mask=None)"


def test_a_list_says_what_to_pass_instead() -> None:
    expected = (
        "example_inputs of Masked: expected a tensor, a tuple of positional arguments or a dict of keyword arguments, "
        "found list; "
    )
    assert refusal(Masked(), [torch.ones(2)]) == expected + (
        "pass tuple(inputs) for positional arguments, or (inputs,) where forward takes a list"
    )
    assert refusal(Masked(), [[1, 2], [3, 4]]) == expected + (
        "pass torch.tensor(inputs) for one tensor, or (inputs,) where forward takes a list"
    )


def test_keys_are_names() -> None:
    assert refusal(Masked(), {0: 1}) == (
        "example_inputs of Masked: expected argument names as keys, found 0; "
        "where forward takes a dict, pass it in a tuple: (inputs,)"
    )


# What is inferred.


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (("BertModel", "BertConfig", TEXT), {"input_ids": (2, 7)}),
        (("LlamaModel", "LlamaConfig", TEXT), {"input_ids": (2, 7)}),
        (("T5Model", "T5Config", T5), {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}),
        (("T5EncoderModel", "T5Config", T5), {"input_ids": (2, 7)}),
        (
            ("BartModel", "BartConfig", {**SEQ2SEQ, "vocab_size": 50}),
            {"input_ids": (2, 7), "decoder_input_ids": (2, 5)},
        ),
        (("ViTModel", "ViTConfig", VISION), {"pixel_values": (2, 3, 16, 16)}),
        (("ViTModel", "ViTConfig", {**VISION, "image_size": (16, 24)}), {"pixel_values": (2, 3, 16, 24)}),
        (("VideoMAEModel", "VideoMAEConfig", {**VISION, "num_frames": 4}), {"pixel_values": (2, 4, 3, 16, 16)}),
        (
            ("CLIPModel", "CLIPConfig", {"text_config": TEXT, "vision_config": VISION}),
            {"input_ids": (2, 7), "pixel_values": (2, 3, 16, 16)},
        ),
        (("HubertModel", "HubertConfig", {**WIDTHS, **CONVOLUTIONS}), {"input_values": (2, 510)}),
        (
            ("ASTModel", "ASTConfig", {**WIDTHS, "max_length": 32, "num_mel_bins": 16}),
            {"input_values": (2, 32, 16)},
        ),
        (
            ("WhisperModel", "WhisperConfig", WHISPER),
            {"input_features": (2, 8, 40), "decoder_input_ids": (2, 5)},
        ),
        (
            ("Wav2Vec2BertModel", "Wav2Vec2BertConfig", {**WIDTHS, "feature_projection_input_dim": 12}),
            {"input_features": (2, 200, 12)},
        ),
        (
            ("ParakeetForCTC", "ParakeetCTCConfig", {"vocab_size": 9, "encoder_config": MELS}),
            {"input_features": (2, 200, 16)},
        ),
        (("ViltModel", "ViltConfig", {**TEXT, **VISION}), {"input_ids": (2, 7), "pixel_values": (2, 3, 16, 16)}),
        (
            (
                "LxmertModel",
                "LxmertConfig",
                {**TEXT, "l_layers": 1, "r_layers": 1, "x_layers": 1, "visual_feat_dim": 6},
            ),
            {"input_ids": (2, 7), "visual_feats": (2, 3, 6), "visual_pos": (2, 3, 4)},
        ),
        (
            (
                "VJEPA2Model",
                "VJEPA2Config",
                {"crop_size": 32, "frames_per_clip": 4, **VISION, "pred_hidden_size": 12, "pred_num_attention_heads": 2}
                | {"pred_num_hidden_layers": 1},
            ),
            {"pixel_values_videos": (2, 4, 3, 32, 32)},
        ),
        (
            ("PatchTSTModel", "PatchTSTConfig", {"d_model": 16, "num_attention_heads": 2, "num_hidden_layers": 1}),
            {"past_values": (2, 32, 1)},
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_hugging_face_models(model: tuple[str, str, dict[str, Any]], expected: dict[str, tuple[int, ...]]) -> None:
    name, config, settings = model
    built = build(name, config, **settings)
    inputs = infer(built)
    assert shapes(inputs) == expected
    with torch.no_grad():
        built(**inputs.kwargs)


def test_encoders_and_decoders_put_together() -> None:
    text, ends = transformers.BertConfig(**TEXT), {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 30}
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(text, transformers.BertConfig(**TEXT))
    assert shapes(infer(transformers.EncoderDecoderModel(pair))) == {"input_ids": (2, 7), "decoder_input_ids": (2, 5)}
    speech = transformers.Wav2Vec2Config(**WIDTHS, **CONVOLUTIONS)
    pair = transformers.SpeechEncoderDecoderConfig.from_encoder_decoder_configs(speech, transformers.GPT2Config(**ends))
    found = infer(transformers.SpeechEncoderDecoderModel(pair))
    assert shapes(found) == {"inputs": (2, 510), "decoder_input_ids": (2, 5)}
    assert found.kwargs["decoder_input_ids"].max() < 30


def test_what_a_configuration_does_not_tell_is_asked_for() -> None:
    """Each set that was tried, why it fails, and what to pass, in the sizes that are known."""
    vision = {**VISION, "model_type": "clip_vision_model"}
    said = refusal(build("Kosmos2Model", "Kosmos2Config", text_config=KOSMOS, vision_config=vision), None)
    assert "tried 2 inputs, pixel_values 2×3×16×16 fails with ValueError: You have to specify either input_ids" in said
    assert "pass example_inputs={'pixel_values': torch.randn(2, 3, 16, 16), 'input_ids': torch.randint(" in said


def test_attention_itself() -> None:
    attention = nn.MultiheadAttention(16, 2, kdim=7, vdim=5, batch_first=True)
    inputs = infer(attention)
    assert shapes(inputs) == {"query": (2, 9, 16), "key": (2, 11, 7), "value": (2, 11, 5)}
    attention(**inputs.kwargs)


def test_speech_has_fifty_frames() -> None:
    model = build("HubertModel", "HubertConfig", **WIDTHS, **CONVOLUTIONS)
    assert model(**infer(model).kwargs).last_hidden_state.shape[1] == 50


def test_part_of_a_model() -> None:
    whisper = build("WhisperModel", "WhisperConfig", **WHISPER)
    assert shapes(infer(whisper.encoder)) == {"input_features": (2, 8, 40)}  # type: ignore[arg-type]
    bert = build("BertModel", "BertConfig", **TEXT)
    assert shapes(infer(bert.encoder)) == {"hidden_states": (2, 7, 16)}  # type: ignore[arg-type]


def test_ids_are_words_of_the_vocabulary() -> None:
    model = build("LlamaModel", "LlamaConfig", **{**TEXT, "vocab_size": 6, "eos_token_id": [2, 4]})
    assert set(infer(model).kwargs["input_ids"].flatten().tolist()) == {3, 5}


def test_decoder_ids_come_from_the_decoder_s_vocabulary() -> None:
    model = build(
        "MarianModel",
        "MarianConfig",
        **SEQ2SEQ,
        vocab_size=50,
        decoder_vocab_size=9,
        pad_token_id=8,
        share_encoder_decoder_embeddings=False,
        decoder_start_token_id=8,
    )
    inputs = infer(model)
    assert inputs.kwargs["decoder_input_ids"].max() < 8
    model(**inputs.kwargs)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("batch_first", [True, False])
def test_torch_transformers(batch_first: bool) -> None:
    def shape(length: int) -> tuple[int, ...]:
        return (2, length, 8) if batch_first else (length, 2, 8)

    options: dict[str, Any] = {"dim_feedforward": 8, "batch_first": batch_first}
    encoder = nn.TransformerEncoderLayer(8, 2, **options)
    decoder = nn.TransformerDecoderLayer(8, 2, **options)
    source, pair = {"src": shape(7)}, {"tgt": shape(5), "memory": shape(7)}
    both = nn.Transformer(8, 2, 1, 1, **options)
    stacked = nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False)
    models = (encoder, decoder, both, stacked, nn.TransformerDecoder(decoder, 2))
    for model, expected in zip(models, (source, pair, {"src": shape(7), "tgt": shape(5)}, source, pair), strict=True):
        inputs = infer(model)
        assert shapes(inputs) == expected
        model.eval()(**inputs.kwargs)


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)), (2, 7, 6)),
        (nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 3)), (2, 7, 6)),
        (nn.Sequential(nn.Dropout(0.1), nn.RMSNorm(7)), (2, 11, 7)),
        (nn.Sequential(nn.Embedding(40, 6, padding_idx=0), nn.Linear(6, 3)), (2, 7)),
        (nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)), (2, 6)),
        (nn.Sequential(nn.Conv2d(1, 4, 8, 8), nn.Flatten(), nn.Linear(256, 3)), (2, 1, 64, 64)),
        (nn.Sequential(nn.Conv1d(1, 4, 10, 5), nn.GELU()), (2, 1, 4000)),
        (nn.ReLU(), (2, 7, 64)),
    ],
    ids=["mlp", "norm", "width 7", "ids", "features", "images", "waveforms", "anything"],
)
def test_one_tensor(model: nn.Module, shape: tuple[int, ...]) -> None:
    inputs = infer(model)
    (value,) = inputs.kwargs.values()
    assert tuple(value.shape) == shape
    model(**inputs.kwargs)


def test_inferred_ids_avoid_the_padding() -> None:
    (ids,) = infer(nn.Sequential(nn.Embedding(3, 6, padding_idx=1))).kwargs.values()
    assert set(ids.flatten().tolist()) == {0, 2}


def test_device_and_precision_are_the_model_s() -> None:
    (half,) = infer(nn.Linear(5, 5, dtype=torch.float16)).kwargs.values()
    (meta,) = infer(nn.Linear(5, 5, device="meta")).kwargs.values()
    assert half.dtype is torch.float16
    assert meta.is_meta


def test_sizes_are_at_least_two_and_differ() -> None:
    model = build("BartModel", "BartConfig", **SEQ2SEQ, vocab_size=50)
    sizes = {size for shape in shapes(infer(model)).values() for size in shape}
    assert sizes == {2, 7, 5}
    assert shapes(infer(nn.TransformerEncoderLayer(7, 1, 8, batch_first=True))) == {"src": (2, 11, 7)}


def test_inference_is_reproducible_and_touches_nothing() -> None:
    class Keeper(nn.Module):
        """Keeps what it sees, in every place that a model can keep something in."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(9, 9)
            self.norm = nn.BatchNorm1d(9)
            self.calls: Tensor
            self.register_buffer("calls", torch.zeros(2))
            self.plain = torch.zeros(2)
            self.cache: dict[int, Tensor] = {}

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.plain[0] = 1
            self.cache[x.shape[1]] = x
            self.last = x
            return self.norm((self.linear(x) + torch.rand(9)).flatten(0, 1))

    model = Keeper().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    first, second = infer(model), infer(model)
    assert torch.equal(first.kwargs["x"], second.kwargs["x"])
    assert torch.equal(random, torch.get_rng_state())
    assert all(part.training for part in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model.plain, torch.zeros(2))
    assert model.cache == {}
    assert not hasattr(model, "last")
    assert not logger.disabled


def test_refused_candidates_leave_no_log(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch._subclasses.fake_tensor"), "handle", refused.append)
    infer(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)))
    assert refused == []


def test_candidates_are_tried_in_evaluation_mode() -> None:
    class Deployed(Masked):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            assert not self.training
            return self.linear(x)

    assert shapes(infer(Deployed().train())) == {"x": (2, 7, 64)}


# Where nothing can be inferred.


def test_a_branch_on_values_says_what_to_pass() -> None:
    class Branching(Masked):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x if x.sum() > 0 else self.linear(x)

    assert refusal(Branching(), None) == (
        "no example inputs can be inferred for Branching: tried 10 inputs, torch.randn(2, 7, 64) fails with "
        "DataDependentOutputException: aten._local_scalar_dense.default; "
        "pass example_inputs={'x': torch.randn(2, 7, 64)}; forward takes (x, mask=None)"
    )


def test_several_arguments_are_sketched() -> None:
    assert refusal(Fusion(), None) == (
        "no example inputs can be inferred for Fusion: forward needs 4 arguments; pass example_inputs={"
        "'audio': torch.randn(2, 7, 12), 'token_ids': torch.randint(32, (2, 7)), "
        "'image': torch.randn(2, 3, 224, 224), 'mask': torch.ones(2, 7, dtype=torch.bool)}; "
        "forward takes (audio, token_ids, image, mask, lengths=None)"
    )


def test_a_forward_without_names() -> None:
    class Anything(nn.Module):
        def forward(self, *values: Any) -> None:
            raise AssertionError("never called")

    assert refusal(Anything(), None) == (
        "no example inputs can be inferred for Anything: forward names no argument; "
        "pass example_inputs=(tensor, …), a tuple of positional arguments; forward takes (*values)"
    )


def test_parameters_without_a_size() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    assert refusal(model, None) == (
        "no example inputs can be inferred for Sequential: some of its parameters have no size yet; "
        "call the model once, on inputs as it will get them"
    )
    assert nn.parameter.is_lazy(next(model.parameters()))


def test_a_model_that_cannot_be_copied() -> None:
    class Streaming(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.stream = (item for item in range(3))

    assert refusal(Streaming(), None) == (
        "no example inputs can be inferred for Streaming: it cannot be copied "
        "(TypeError: cannot pickle 'generator' object); "
        "pass example_inputs={'input': torch.randn(2, 7, 4)}; forward takes (input)"
    )
