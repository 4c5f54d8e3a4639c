"""Vision models of transformers."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

from .row import Built, Row, images

LAYERS = 2
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
PATCHES = {"image_size": 32, "patch_size": 8}


def vit_like(name: str, kind: str, sites: dict[str, int] | None = None, **config: Any) -> Row:
    """A sibling of ViT by the stem of its class: each layer has one self-attention."""

    def build() -> Built:
        settings = {**TINY, **PATCHES, **config}
        return images(getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**settings)))

    return _row(name, build, sites or {"encoder self": LAYERS})


def _row(name: str, build: Any, sites: dict[str, int], **more: Any) -> Row:
    return Row(name, "vision", sites, build, needs="transformers", **more)


def _swin(kind: str) -> Any:
    def build() -> Built:
        settings = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 4], "num_heads": [2, 4]}
        return images(getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**settings, window_size=4)))

    return build


def _videos(kind: str, **config: Any) -> Any:
    def build() -> Built:
        settings = {**TINY, **PATCHES, "num_frames": 4, **config}
        model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**settings))
        return Built(model, *({"pixel_values": torch.randn(batch, 4, 3, 32, 32)} for batch in (2, 3)))

    return build


def _segformer() -> Built:
    config = hf.SegformerConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    )
    return images(hf.SegformerModel(config))


def _pvt() -> Built:
    config = hf.PvtConfig(
        image_size=32,
        num_encoder_blocks=2,
        depths=[2, 2],
        sequence_reduction_ratios=[4, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[4, 2],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    )
    return images(hf.PvtModel(config))


def _pvt_v2() -> Built:
    config = hf.PvtV2Config(
        image_size=32,
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
    )
    return images(hf.PvtV2Model(config))


def _mobilevit() -> Built:
    config = hf.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 16, 16], neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 16], num_attention_heads=2
    )
    return images(hf.MobileViTModel(config), 64)


def _levit() -> Built:
    config = hf.LevitConfig(
        image_size=64,
        hidden_sizes=[16, 32],
        num_attention_heads=[2, 4],
        depths=[2, 2],
        key_dim=[8, 8],
        attention_ratio=[2, 2],
        mlp_ratio=[2, 2],
        down_ops=[["Subsample", 8, 2, 4, 2, 2], [""]],
    )
    return images(hf.LevitModel(config), 64)


def _cvt() -> Built:
    config = hf.CvtConfig(
        patch_sizes=[7, 3],
        patch_stride=[4, 2],
        patch_padding=[2, 1],
        embed_dim=[16, 32],
        num_heads=[2, 4],
        depth=[2, 2],
        mlp_ratio=[2.0, 2.0],
        attention_drop_rate=[0.0, 0.0],
        drop_rate=[0.0, 0.0],
        drop_path_rate=[0.0, 0.0],
        qkv_bias=[True, True],
        cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"],
        kernel_qkv=[3, 3],
        padding_kv=[1, 1],
        stride_kv=[2, 2],
        padding_q=[1, 1],
        stride_q=[1, 1],
    )
    return images(hf.CvtModel(config))


def _hiera() -> Built:
    config = hf.HieraConfig(
        image_size=[32, 32],
        patch_size=[7, 7],
        patch_stride=[4, 4],
        patch_padding=[3, 3],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        masked_unit_size=[4, 4],
        query_stride=[2, 2],
        num_query_pool=1,
        masked_unit_attention=[True, False],
        mlp_ratio=2.0,
    )
    return images(hf.HieraModel(config))


def _dinat_free() -> Built:
    config = hf.FocalNetConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], focal_levels=[2, 2], focal_windows=[3, 3]
    )
    return images(hf.FocalNetModel(config))


def _poolformer() -> Built:
    config = hf.PoolFormerConfig(
        hidden_sizes=[16, 16, 16, 16],
        depths=[1, 1, 1, 1],
        patch_sizes=[7, 3, 3, 3],
        strides=[4, 2, 2, 2],
        padding=[2, 1, 1, 1],
    )
    return images(hf.PoolFormerModel(config), 64)


def _detr() -> Built:
    backbone = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    config = hf.DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_queries=5,
    )
    return images(hf.DetrModel(config), 64)


def _dpt() -> Built:
    config = hf.DPTConfig(
        **{**TINY, "num_hidden_layers": 4},
        **PATCHES,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 16, 16],
    )
    return images(hf.DPTModel(config))


def _sam_vision() -> Built:
    config = hf.SamVisionConfig(
        **{**TINY, "num_hidden_layers": 3},
        image_size=32,
        patch_size=4,
        output_channels=16,
        mlp_dim=64,
        window_size=4,
        global_attn_indexes=[2],
    )
    return images(hf.SamVisionModel(config))


def _vitdet() -> Built:
    config = hf.VitDetConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        **PATCHES,
        window_size=2,
        window_block_indices=[0, 1],
    )
    return images(hf.VitDetModel(config))


def _glpn() -> Built:
    config = hf.GLPNConfig(
        num_encoder_blocks=2,
        depths=[2, 2],
        sr_ratios=[4, 2],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )
    return images(hf.GLPNModel(config))


def _siglip() -> Built:
    return images(hf.SiglipVisionModel(hf.SiglipVisionConfig(**TINY, **PATCHES)))


def _perceiver() -> Built:
    config = hf.PerceiverConfig(
        num_latents=6,
        d_latents=32,
        d_model=32,
        num_blocks=2,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
    )
    model = hf.PerceiverModel(config)
    return Built(model, {"inputs": torch.randn(2, 9, 32)}, {"inputs": torch.randn(3, 12, 32)})


STAGES = {"stage 1 self": 2, "stage 2 self": 2}
SWIN = {"layers.0": "1x*", "layers.1": "leaders=0,1,0,1"}

ROWS = (
    vit_like("ViT", "ViT"),
    vit_like("DeiT", "DeiT"),
    vit_like("BEiT", "Beit", use_relative_position_bias=True),
    vit_like("BEiT, shared bias", "Beit", use_shared_relative_position_bias=True),
    vit_like("Data2Vec vision", "Data2VecVision", use_relative_position_bias=True),
    vit_like("DINOv2", "Dinov2"),
    vit_like("DINOv3 ViT", "DINOv3ViT"),
    vit_like("YOLOS", "Yolos", image_size=[32, 32], num_detection_tokens=4),
    _row("Swin", _swin("Swin"), {"stage 1 self": 2, "stage 2 self": 4}, plans=SWIN),
    _row("Swin v2", _swin("Swinv2"), {"stage 1 self": 2, "stage 2 self": 4}, plans=SWIN),
    _row(
        "Swin2SR",
        lambda: images(
            hf.Swin2SRModel(
                hf.Swin2SRConfig(image_size=16, embed_dim=16, depths=[2, 4], num_heads=[2, 2], window_size=4)
            ),
            16,
        ),
        {"stage 1 self": 2, "stage 2 self": 4},
        plans={"stages.0": "1x*", "stages.1": "leaders=0,1,0,1"},
    ),
    _row("SegFormer", _segformer, STAGES),
    _row("PVT", _pvt, STAGES),
    _row("PVT v2", _pvt_v2, STAGES),
    # Three MobileViT blocks of two, four and three layers.
    _row("MobileViT", _mobilevit, {"block 1 self": 2, "block 2 self": 4, "block 3 self": 3}),
    # Between its stages is one attention whose queries are subsampled.
    _row("LeViT", _levit, {"stage 1 self": 2, "subsampling": 1, "stage 2 self": 2}),
    _row("CvT", _cvt, STAGES),
    # The first attention of the second stage pools its queries.
    _row("Hiera", _hiera, {"stage 1 self": 2, "stage 2 pooling": 1, "stage 2 self": 1}, whole=True, plans={"1": "1x*"}),
    _row("DETR", _detr, {"encoder self": 2, "decoder self": 2, "decoder cross": 2}),
    _row("DPT", _dpt, {"encoder self": 4}),
    # Two layers with windows, one without.
    _row("SAM vision encoder", _sam_vision, {"encoder self": 3}, plans={"": "2+1"}),
    _row("ViTDet", _vitdet, {"encoder self": 3}, plans={"": "2+1"}),
    _row("SigLIP vision", _siglip, {"encoder self": LAYERS}, not_attention=1),
    _row("VideoMAE", _videos("VideoMAE", tubelet_size=2), {"encoder self": LAYERS}),
    _row("ViViT", _videos("Vivit", tubelet_size=[2, 8, 8]), {"encoder self": LAYERS}),
    # Each layer attends over time, then over space.
    _row("TimeSformer", _videos("Timesformer"), {"temporal": LAYERS, "spatial": LAYERS}),
    # The latents ask the input once; then one block of self-attentions over latents, called twice.
    _row("Perceiver", _perceiver, {"latents cross": 1, "latents self, first": 2, "latents self, second": 2}),
    _row("FocalNet (no attention)", _dinat_free, {}),
    _row("PoolFormer (no attention)", _poolformer, {}),
)
