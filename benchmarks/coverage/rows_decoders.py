"""Decoder-only language models of transformers: each layer has one causal self-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers as hf

from .row import VOCABULARY, Built, Row, tokens

LAYERS = 2
TINY = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, **ENDS}


def decoder(
    name: str,
    kind: str,
    *,
    layers: int = LAYERS,
    plans: Mapping[str, str] | None = None,
    not_attention: int = 0,
    refused: Mapping[str, str] | None = None,
    sites: Mapping[str, int] | None = None,
    base: Mapping[str, Any] | None = None,
    suffix: str = "",
    **config: Any,
) -> Row:
    """A decoder by the stem of its class in transformers; ``base`` has its sizes where they have names of their own."""

    def build() -> Built:
        sizes = {**TINY, **TEXT, **ENDS, "num_hidden_layers": layers} if base is None else base
        made = getattr(hf, f"{kind}{suffix}Config")(**{**sizes, **config})
        return tokens(getattr(hf, f"{kind}{suffix}Model")(made), left=True)

    return Row(
        name,
        "text decoder",
        sites or {"decoder self": layers},
        build,
        plans=plans or {},
        not_attention=not_attention,
        refused=refused or {},
        needs="transformers",
    )


ROTARY = {"head_dim": 8, **GROUPED}
# Grouped matrix products exist in float32 and below only; the check is in float64.
MIXTURE = {"num_experts_per_tok": 2, "experts_implementation": "batched_mm"}
EXPERTS = {**MIXTURE, "moe_intermediate_size": 16}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": LAYERS,
    **EXPERTS,
}

ROWS = (
    decoder("GPT-2", "GPT2", base=GPT),
    decoder("OpenAI GPT", "OpenAIGPT", base=GPT, refused={"recompute": "scores not affine"}),
    decoder("GPT-J", "GPTJ", base=GPT, rotary_dim=4),
    decoder("GPT-BigCode (multi-query)", "GPTBigCode", base=GPT, multi_query=True),
    # Global and local layers by turns.
    decoder(
        "GPT-Neo",
        "GPTNeo",
        layers=4,
        base={"hidden_size": 32, "num_layers": 4, "num_heads": 4, **TEXT, **ENDS},
        plans={"": "leaders=0,1,0,1"},
        attention_types=[[["global", "local"], 2]],
        window_size=5,
    ),
    decoder("GPT-NeoX", "GPTNeoX"),
    decoder("BLOOM", "Bloom", base={"hidden_size": 32, "n_layer": LAYERS, "n_head": 4, "vocab_size": 99, **ENDS}),
    decoder("OPT", "OPT", ffn_dim=64, word_embed_proj_dim=32),
    decoder("MPT", "Mpt", base={"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": 64, "vocab_size": 99}),
    decoder("Falcon", "Falcon", new_decoder_architecture=True, num_kv_heads=2),
    decoder("Falcon, multi-query, ALiBi", "Falcon", multi_query=True, alibi=True, new_decoder_architecture=False),
    decoder("BioGPT", "BioGpt"),
    decoder(
        "CTRL",
        "CTRL",
        base={"n_embd": 32, "dff": 64, "n_layer": LAYERS, "n_head": 4, "n_positions": 64, "vocab_size": 99},
    ),
    decoder("Llama", "Llama", **GROUPED),
    decoder("Mistral", "Mistral", sliding_window=5, **GROUPED),
    decoder("Persimmon", "Persimmon"),
    decoder("StarCoder 2", "Starcoder2", sliding_window=5, **GROUPED),
    decoder("OLMo", "Olmo", clip_qkv=2.0),
    decoder("Qwen3", "Qwen3", **ROTARY),
    decoder("Gemma", "Gemma", **ROTARY),
    # Sliding and full layers by turns.
    decoder(
        "Gemma 2",
        "Gemma2",
        layers=4,
        plans={"": "leaders=0,1,0,1"},
        refused={"recompute": "scores not affine"},
        sliding_window=5,
        **ROTARY,
    ),
    # Five sliding layers, then a full one.
    decoder(
        "Gemma 3", "Gemma3", suffix="Text", layers=6, plans={"": "leaders=0,0,0,3,3,5"}, sliding_window=5, **ROTARY
    ),
    decoder("Phi", "Phi", partial_rotary_factor=0.5),
    decoder("Phi-3", "Phi3", **GROUPED),
    decoder("StableLM", "StableLm", **GROUPED),
    decoder("Nemotron", "Nemotron", **ROTARY),
    decoder("Cohere", "Cohere", **GROUPED),
    # Three sliding layers, then a full one without positions.
    decoder("Cohere 2", "Cohere2", layers=4, plans={"": "3+1"}, sliding_window=5, **GROUPED),
    decoder("OLMo 2", "Olmo2", **GROUPED),
    decoder("Granite", "Granite", attention_multiplier=0.3, **GROUPED),
    decoder("GLM", "Glm", **ROTARY),
    decoder("Mixtral", "Mixtral", not_attention=LAYERS, num_local_experts=4, **MIXTURE, **GROUPED),
    decoder("Qwen3 MoE", "Qwen3Moe", not_attention=LAYERS, num_experts=4, **EXPERTS, **ROTARY),
    # Attention sinks; sliding and full layers by turns.
    decoder(
        "gpt-oss",
        "GptOss",
        layers=4,
        plans={"": "leaders=0,1,0,1"},
        not_attention=4,
        sliding_window=5,
        num_local_experts=4,
        **MIXTURE,
        **ROTARY,
    ),
    decoder("DeepSeek-V2", "DeepseekV2", **LATENT),
    decoder("DeepSeek-V3", "DeepseekV3", num_key_value_heads=4, **LATENT),
    decoder(
        "MiniCPM 3", "MiniCPM3", q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12
    ),
    # Differential attention, as two fused calls: one map over either half of the values.
    decoder("DiffLlama", "DiffLlama", sites={"first values self": LAYERS, "second values self": LAYERS}, **GROUPED),
    decoder(
        "ModernBERT decoder",
        "ModernBertDecoder",
        layers=6,
        plans={"": "leaders=0,1,1,0,4,4"},
        local_attention=6,
        cls_token_id=1,
        sep_token_id=2,
    ),
)
