"""Multimodal towers of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from .row import VOCABULARY, Built, Row, ids, padding

LAYERS = 2
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
PATCHES = {"image_size": 32, "patch_size": 8}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
TOWERS = {"text self": LAYERS, "vision self": LAYERS}


def _both(model: torch.nn.Module, **more: Any) -> Built:
    """Called with texts and as many images."""

    def call(batch: int, length: int) -> dict[str, Any]:
        pixels = torch.randn(batch, 3, 32, 32)
        return {
            "input_ids": ids(batch, length),
            "attention_mask": padding(batch, length),
            "pixel_values": pixels,
            **more,
        }

    return Built(model, call(2, 11), call(3, 14))


def two_towers(name: str, kind: str, text: dict[str, Any] | None = None, **more: Any) -> Row:
    """A text and a vision tower side by side, by the stem of the class."""

    def build() -> Built:
        texts = {**TINY, **TEXT, **ENDS, **(text or {})}
        config = getattr(hf, f"{kind}Config")(text_config=texts, vision_config={**TINY, **PATCHES}, projection_dim=16)
        return _both(getattr(hf, f"{kind}Model")(config))

    return _row(name, build, TOWERS, **more)


def _row(name: str, build: Any, sites: dict[str, int], **more: Any) -> Row:
    return Row(name, "multimodal", sites, build, needs="transformers", **more)


def _siglip() -> Built:
    config = hf.SiglipConfig(text_config={**TINY, **TEXT}, vision_config={**TINY, **PATCHES})
    return _both(hf.SiglipModel(config))


def _clip_text() -> Built:
    def call(batch: int, length: int) -> dict[str, Any]:
        return {"input_ids": ids(batch, length), "attention_mask": padding(batch, length)}

    return Built(hf.CLIPTextModel(hf.CLIPTextConfig(**TINY, **TEXT, **ENDS)), call(2, 11), call(3, 14))


def _flava() -> Built:
    config = hf.FlavaConfig(
        text_config={**TINY, **TEXT},
        image_config={**TINY, **PATCHES},
        multimodal_config=TINY,
        hidden_size=32,
        projection_dim=16,
    )
    return _both(hf.FlavaModel(config))


def _vilt() -> Built:
    return _both(hf.ViltModel(hf.ViltConfig(**TINY, **TEXT, **PATCHES, max_image_length=-1)), pixel_mask=None)


def _visual_bert() -> Built:
    def call(batch: int, length: int) -> dict[str, Any]:
        regions = {
            "visual_embeds": torch.randn(batch, 5, 16),
            "visual_attention_mask": torch.ones(batch, 5, dtype=torch.long),
        }
        return {"input_ids": ids(batch, length), "attention_mask": padding(batch, length), **regions}

    config = hf.VisualBertConfig(**TINY, **TEXT, visual_embedding_dim=16)
    return Built(hf.VisualBertModel(config), call(2, 11), call(3, 14))


def _lxmert() -> Built:
    config = hf.LxmertConfig(
        vocab_size=99,
        hidden_size=32,
        num_attention_heads=4,
        intermediate_size=64,
        l_layers=2,
        x_layers=2,
        r_layers=2,
        visual_feat_dim=16,
        max_position_embeddings=64,
    )

    def call(batch: int, length: int) -> dict[str, Any]:
        regions = {"visual_feats": torch.randn(batch, 5, 16), "visual_pos": torch.rand(batch, 5, 4)}
        return {"input_ids": ids(batch, length), "attention_mask": padding(batch, length), **regions}

    return Built(hf.LxmertModel(config), call(2, 11), call(3, 14))


def _layoutlmv3() -> Built:
    config = hf.LayoutLMv3Config(
        **TINY,
        **TEXT,
        **ENDS,
        input_size=32,
        patch_size=8,
        coordinate_size=5,
        shape_size=6,
        max_2d_position_embeddings=64,
        rel_pos_bins=8,
        max_rel_pos=16,
        rel_2d_pos_bins=8,
        max_rel_2d_pos=16,
    )

    def call(batch: int, length: int) -> dict[str, Any]:
        corner = torch.randint(0, 30, (batch, length, 2))
        boxes = torch.cat([corner, corner + torch.randint(1, 9, (batch, length, 2))], -1)
        return {
            "input_ids": ids(batch, length),
            "bbox": boxes,
            "attention_mask": padding(batch, length),
            "pixel_values": torch.randn(batch, 3, 32, 32),
        }

    return Built(hf.LayoutLMv3Model(config), call(2, 11), call(3, 14))


def _blip() -> Built:
    config = hf.BlipConfig(
        text_config={**TINY, **TEXT, **ENDS, "encoder_hidden_size": 32, "projection_dim": 16},
        vision_config={**TINY, **PATCHES},
        projection_dim=16,
    )
    return _both(hf.BlipForImageTextRetrieval(config))


def _qformer() -> Built:
    config = hf.Blip2QFormerConfig(**TINY, **TEXT, encoder_hidden_size=16, cross_attention_frequency=1)

    def call(batch: int, length: int) -> dict[str, Any]:
        return {
            "query_embeds": torch.randn(batch, length, 32),
            "encoder_hidden_states": torch.randn(batch, length + 4, 16),
        }

    return Built(hf.Blip2QFormerModel(config), call(2, 6), call(3, 8))


def _git() -> Built:
    config = hf.GitConfig(**TINY, **TEXT, **ENDS, vision_config={**TINY, **PATCHES})
    return _both(hf.GitModel(config))


def _llava() -> Built:
    language = {"model_type": "llama", **TINY, **TEXT, **ENDS, "num_key_value_heads": 2}
    vision = {"model_type": "clip_vision_model", **TINY, **PATCHES, "projection_dim": 16}
    config = hf.LlavaConfig(text_config=language, vision_config=vision, image_token_id=3, vision_feature_layer=-1)

    def call(batch: int, length: int) -> dict[str, Any]:
        text = ids(batch, length)
        text[:, 1:17] = 3
        return {
            "input_ids": text,
            "attention_mask": padding(batch, length),
            "pixel_values": torch.randn(batch, 3, 32, 32),
        }

    # The model ties the number of pictures to that of the placeholders among the tokens.
    return Built(hf.LlavaModel(config), call(2, 30), call(2, 36))


def _bridgetower() -> Built:
    text = {**TINY, **TEXT, **ENDS}
    config = hf.BridgeTowerConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        text_config=text,
        vision_config={"hidden_size": 128, "num_hidden_layers": 2, "patch_size": 8, "image_size": 32},
    )
    return _both(hf.BridgeTowerModel(config))


def _owlvit() -> Built:
    config = hf.OwlViTConfig(text_config={**TINY, **TEXT, **ENDS}, vision_config={**TINY, **PATCHES}, projection_dim=16)
    return _both(hf.OwlViTModel(config))


ROWS = (
    two_towers("CLIP", "CLIP"),
    two_towers("AltCLIP", "AltCLIP", text={"project_dim": 32}),
    two_towers("CLIPSeg", "CLIPSeg"),
    _row("CLIP text", _clip_text, {"text self": LAYERS}),
    # Its image tower ends in a pooling attention with a learned query.
    _row("SigLIP", _siglip, TOWERS, not_attention=1),
    _row("OWL-ViT", _owlvit, TOWERS),
    _row("FLAVA", _flava, {**TOWERS, "multimodal self": LAYERS}),
    _row(
        "ViLT, target=encoder",
        _vilt,
        {"joint self": LAYERS},
        target="encoder",
        note="how many patches the model samples depends on the values of its pixel mask, so its encoder is captured.",
    ),
    _row("VisualBERT", _visual_bert, {"joint self": LAYERS}),
    # Each cross-modality layer: cross-attention both ways by one module, then self-attention of each side.
    _row(
        "LXMERT",
        _lxmert,
        {
            "language self": 2,
            "region self": 2,
            "cross, by language": 2,
            "cross, by region": 2,
            "joint language self": 2,
            "joint region self": 2,
        },
    ),
    _row("LayoutLMv3", _layoutlmv3, {"joint self": LAYERS}),
    _row("BLIP retrieval", _blip, {"vision self": LAYERS, "text self": LAYERS, "text cross": LAYERS}),
    _row("BLIP-2 Q-Former", _qformer, {"query self": LAYERS, "query cross": LAYERS}),
    _row("GIT", _git, {"vision self": LAYERS, "text self": LAYERS}),
    _row(
        "LLaVA",
        _llava,
        {"vision self": LAYERS, "text self": LAYERS},
        note="the model ties the number of pictures to that of the placeholders among the tokens.",
    ),
    # Two cross-modal layers a side, each with self- and cross-attention.
    _row(
        "BridgeTower",
        _bridgetower,
        {
            "text self": 2,
            "vision self": 2,
            "joint text self": 2,
            "joint text cross": 2,
            "joint image self": 2,
            "joint image cross": 2,
        },
    ),
)
