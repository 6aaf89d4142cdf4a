"""Tiny random models of every causal language model of the installed transformers, for sweeps that need no hub."""

from __future__ import annotations

from dataclasses import fields

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

NAMES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCAB = 97

# Types whose AutoModelForCausalLM is no language model over text tokens.
NOT_TEXT: dict[str, str] = {
    "gemma4_assistant": "drafts from the hidden states and keys of a gemma4 model; it embeds no tokens",
    "gemma4_unified_assistant": "drafts from the hidden states and keys of a gemma4_unified model; it embeds no tokens",
    "musicgen": "predicts audio codes, and AutoModelForCausalLM cannot build it from its configuration",
    "musicgen_melody": "predicts audio codes, and AutoModelForCausalLM cannot build it from its configuration",
}

# Types that need a package that the tests do without.
NEEDS: dict[str, str] = {}

# Every field below goes to every configuration class that declares it, text, vision and audio alike.
_TOKENS = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTHS = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "embed_dim", "embedding_dim", "emb_dim"], 32),
    **dict.fromkeys(["embedding_size", "lru_width"], 32),
    **dict.fromkeys(["intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "d_ff", "dff", "dim_ff"], 48),
    **dict.fromkeys(["decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "intermediate_size_mlp"], 48),
    **dict.fromkeys(["num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"], 4),
    **dict.fromkeys(["decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"], 4),
    **dict.fromkeys(["num_encoder_attention_heads", "num_decoder_attention_heads"], 4),
    **dict.fromkeys(["num_key_value_heads", "swa_num_key_value_heads"], 2),
    **dict.fromkeys(["head_dim", "swa_head_dim", "dim_head", "d_head", "kv_channels"], 8),
    "rel_extent": 16,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
}
_DEPTHS = {
    **dict.fromkeys(["num_hidden_layers", "n_layer", "n_layers", "num_layers"], 4),
    **dict.fromkeys(["decoder_layers", "encoder_layers", "num_decoder_layers", "num_encoder_layers"], 2),
    **dict.fromkeys(["num_nextn_predict_layers", "num_mtp_layers"], 0),
}
# Completions outgrow the windows.
_LENGTHS = {
    **dict.fromkeys(["max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"], 256),
    **dict.fromkeys(["sliding_window", "sliding_window_size", "window_size", "attention_window_size"], 7),
    **dict.fromkeys(["attention_chunk_size", "mamba_chunk_size", "chunk_size"], 16),
    "use_sliding_window": True,
    "max_window_layers": 2,
}
_EXPERTS = {
    **dict.fromkeys(["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"], 4),
    **dict.fromkeys(["num_experts_per_tok", "moe_top_k", "top_k_experts", "moe_topk", "moe_k"], 2),
    **dict.fromkeys(["moe_intermediate_size", "shared_expert_intermediate_size"], 24),
    **dict.fromkeys(["moe_shared_expert_intermediate_size", "shared_intermediate_size"], 24),
    **dict.fromkeys(["shared_experts_intermediate_size", "expert_ffn_hidden_size"], 24),
    **dict.fromkeys(["n_group", "topk_group", "first_k_dense_replace", "num_dense_layers"], 1),
    "enable_moe_block": True,
}
_MIXERS = {
    **dict.fromkeys(["q_lora_rank", "kv_lora_rank", "o_lora_rank"], 16),
    **dict.fromkeys(["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"], 8),
    **dict.fromkeys(["index_topk", "index_n_heads", "index_head_dim"], 8),
    **dict.fromkeys(["state_size", "ssm_state_size", "mamba_d_state", "mamba_n_heads", "time_step_rank"], 4),
    **dict.fromkeys(["mamba_num_heads", "n_mamba_heads", "mamba_dt_rank"], 4),
    **dict.fromkeys(["mamba_d_head", "mamba_head_dim"], 16),
    **dict.fromkeys(["linear_num_value_heads", "linear_num_heads"], 4),
    "linear_num_key_heads": 2,
    **dict.fromkeys(["linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"], 8),
}
# No scale is the identity, and every cap bends the logits.
_SCALES = {
    "logit_scale": 0.25,
    "logits_scaling": 3.0,
    "logits_mup_width_multiplier": 3.0,
    "lm_head_multiplier": 3.0,
    **dict.fromkeys(["final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"], 5.0),
    "attn_logit_softcapping": 3.0,
    "query_pre_attn_scalar": 8,
    **dict.fromkeys(["embedding_multiplier", "embedding_scale", "scale_emb"], 2.0),
    **dict.fromkeys(["attention_multiplier", "key_multiplier"], 0.3),
    **dict.fromkeys(["residual_multiplier", "attention_in_multiplier", "ssm_in_multiplier", "scale_depth"], 0.5),
    **dict.fromkeys(["attention_out_multiplier", "ssm_out_multiplier"], 2.0),
    "mlp_multipliers": [0.5, 2.0],
    "ssm_multipliers": [0.5, 2.0, 0.5, 2.0, 0.5],
    "mup_enabled": True,
    "scale_embedding": True,
    "rescale_embeddings": True,
    "scale_attn_by_inverse_layer_idx": True,
    "clip_qkv": 1.0,
    **dict.fromkeys(["gate_soft_cap", "mlp_gate_softcap", "mlp_up_softcap", "moe_router_logit_softcapping"], 3.0),
    **dict.fromkeys(["route_scale", "routed_scaling_factor", "moe_routed_scaling_factor"], 1.5),
    **dict.fromkeys(["full_attn_alpha_factor", "linear_attn_alpha_factor", "mlp_alpha_factor"], 0.5),
    **dict.fromkeys(["full_attn_beta_factor", "linear_attn_beta_factor", "mlp_beta_factor"], 2.0),
    **dict.fromkeys(["floor_scale", "log_scaling_n_floor"], 8),
}
_SWITCHES = {"is_decoder": True, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}
_EVERYWHERE = {**_TOKENS, **_WIDTHS, **_DEPTHS, **_LENGTHS, **_EXPERTS, **_MIXERS, **_SCALES, **_SWITCHES}
# What one class of configuration needs beyond that, by its model type.
_TYPES = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {"encoder_hash_byte_group_vocab": 97, "encoder_hash_byte_group_size": [3, 4], "use_cache": False},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "cpmant": {"position_bias_num_buckets": 16, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4}},
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "doge": {"keep_window_size": 7, "is_moe": True},
    "dots1": {"layer_types": ["sliding_attention", "full_attention"] * 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
    },
    "gemma4_text": {"global_head_dim": 16, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gemma4_unified_vision": {"mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32, "patch_size": 4},
    "gemma4_vision": {"position_embedding_size": 16},
    "got_ocr2_vision": {"image_size": 64, "output_channels": 8, "mlp_dim": 48},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "num_attention_heads_per_layer": [4, 2, 4, 2],
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mellum": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "minimax": {"block_size": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "dense_intermediate_size": 48,
        "index_block_size": 4,
        "index_n_heads": 2,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
    },
    "ministral": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "moshi": {"audio_vocab_size": VOCAB},
    "nemotron_h": {"n_groups": 1},
    "phi4_multimodal_audio": {
        "depthwise_separable_out_channel": 32,
        "ext_pw_out_channel": 32,
        "nemo_conv_channels": 16,
        "num_blocks": 2,
    },
    "qwen4_exp_text": {
        "hc_lowrank": 8,
        "heads_per_ngram": 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "ngram_vocab_size_base": 31,
        "ple_embed_dim": 32,
        "ple_layer_ids": [2],
    },
    "reformer": {
        "attention_head_size": 8,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_embds": False,
        "feed_forward_size": 48,
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_buckets": 4,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 24},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "ffn_round_up_to_multiple_of": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
}
# The classes of parts that a configuration leaves open.
_PARTS = {
    "fuyu": {"text_config": "persimmon"},
    "gemma3": {"vision_config": "siglip_vision_model"},
    "gemma4_assistant": {"text_config": "gemma4_text"},
    "gemma4_unified_assistant": {"text_config": "gemma4_unified_text"},
    "got_ocr2": {"text_config": "qwen2"},
    "moss_transcribe_diarize": {"text_config": "qwen3"},
}
# Fields that give each layer its kind: kinds alternate, or the last kind fills up.
_ALTERNATING = ("layer_types", "layers_block_type")
_LEADING = ("mlp_layer_types", "indexer_types")


def causal_lm(model_type: str, seed: int = 0, **overrides) -> PreTrainedModel:
    """Build a random float32 model in eval mode; `overrides` go to the configuration of its text."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(causal_lm_config(model_type, **overrides), dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def causal_lm_config(model_type: str, **overrides) -> PretrainedConfig:
    """Shrink the configuration of `model_type`; `overrides` go to its text."""
    options = _small(CONFIG_MAPPING[model_type])
    options.get("text_config", options).update(overrides)
    return CONFIG_MAPPING[model_type](**options)


def _small(config_class: type[PretrainedConfig]) -> dict:
    """Return arguments that make a configuration small, and its parts with it."""
    declared = {field.name for field in fields(config_class)}
    options = {name: value for name, value in _EVERYWHERE.items() if name in declared}
    for part, part_class in config_class.sub_configs.items():
        if part_class is AutoConfig:
            if part not in _PARTS.get(config_class.model_type, {}):
                continue
            part_class = CONFIG_MAPPING[_PARTS[config_class.model_type][part]]
        options[part] = {"model_type": part_class.model_type, **_small(part_class)}
    for name in declared.intersection(_ALTERNATING + _LEADING):
        kinds = list(dict.fromkeys(getattr(config_class(), name) or []))
        if len(kinds) > 1:
            options[name] = (kinds * 4 if name in _ALTERNATING else kinds + kinds[-1:] * 4)[:4]
    if "kv_lora_rank" in declared:
        options["num_key_value_heads"] = options["num_attention_heads"]
    return options | _TYPES.get(config_class.model_type, {})
