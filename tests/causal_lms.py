"""Tiny random models of every causal language model of the installed transformers, for sweeps that need no hub."""

from __future__ import annotations

from copy import deepcopy
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
NEEDS: dict[str, str] = {"gemma3n": "timm: its vision tower is a timm model; gemma3n_text is its text"}

BUILDABLE = tuple(name for name in NAMES if name not in NOT_TEXT and name not in NEEDS)

# A row's value goes to each of its fields, in every configuration class that declares the field.
_ROWS = [
    # Tokens.
    (VOCAB, "vocab_size vocab_size_per_layer_input"),
    (0, "pad_token_id"),
    (1, "bos_token_id"),
    (2, "eos_token_id"),
    # Widths.
    (32, "hidden_size d_model n_embd embed_dim embedding_dim emb_dim embedding_size lru_width"),
    (48, "intermediate_size intermediate_size_mlp ffn_dim ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
    (48, "n_inner d_inner dff dim_ff"),
    (8, "hidden_size_per_layer_input"),
    # Heads.
    (4, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    (4, "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads"),
    (2, "num_key_value_heads swa_num_key_value_heads"),
    (8, "head_dim swa_head_dim dim_head d_head kv_channels"),
    # Depths. Heads that predict later tokens are left out.
    (4, "num_hidden_layers n_layer n_layers num_layers"),
    (2, "decoder_layers encoder_layers num_decoder_layers num_encoder_layers"),
    (0, "num_nextn_predict_layers num_mtp_layers"),
    # Lengths. A completion outgrows every window.
    (256, "max_position_embeddings n_positions n_ctx max_seq_len context_length"),
    (7, "sliding_window sliding_window_size window_size attention_window_size"),
    (7, "local_attention_window_len"),
    (16, "attention_chunk_size mamba_chunk_size chunk_size rel_extent"),
    (True, "use_sliding_window"),
    (2, "max_window_layers"),
    # Experts.
    (4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    (2, "num_experts_per_tok moe_top_k top_k_experts moe_topk moe_k"),
    (24, "moe_intermediate_size expert_ffn_hidden_size shared_intermediate_size shared_expert_intermediate_size"),
    (24, "moe_shared_expert_intermediate_size shared_experts_intermediate_size"),
    (1, "n_group topk_group first_k_dense_replace num_dense_layers"),
    (True, "enable_moe_block"),
    # Latent, indexed, state-space and linear attention.
    (16, "q_lora_rank kv_lora_rank o_lora_rank"),
    (8, "qk_nope_head_dim qk_rope_head_dim v_head_dim"),
    (8, "index_topk index_n_heads index_head_dim"),
    (4, "state_size ssm_state_size mamba_d_state mamba_n_heads mamba_num_heads n_mamba_heads"),
    (4, "time_step_rank mamba_dt_rank"),
    (16, "mamba_d_head mamba_head_dim"),
    (4, "linear_num_value_heads linear_num_heads"),
    (2, "linear_num_key_heads"),
    (8, "linear_key_head_dim linear_value_head_dim linear_head_dim"),
    # Scales of logits, none the identity, and caps that bend them.
    (0.25, "logit_scale"),
    (3.0, "logits_scaling logits_mup_width_multiplier lm_head_multiplier"),
    (8, "dim_model_base"),
    (5.0, "final_logit_softcapping logits_soft_cap output_logit_soft_cap"),
    # Scales and caps below the logits.
    (3.0, "attn_logit_softcapping gate_soft_cap mlp_gate_softcap mlp_up_softcap moe_router_logit_softcapping"),
    (1.0, "clip_qkv swiglu_limit qk_l2_clip_threshold rel_l2_clip_threshold"),
    (2.0, "embedding_multiplier embedding_scale scale_emb attention_out_multiplier ssm_out_multiplier"),
    (2.0, "full_attn_beta_factor linear_attn_beta_factor mlp_beta_factor"),
    (1.5, "route_scale routed_scaling_factor moe_routed_scaling_factor router_scaling_factor"),
    (0.5, "residual_multiplier attention_in_multiplier ssm_in_multiplier scale_depth attention_value_scale"),
    (0.5, "full_attn_alpha_factor linear_attn_alpha_factor mlp_alpha_factor"),
    (0.3, "attention_multiplier key_multiplier"),
    ([0.5, 2.0], "mlp_multipliers"),
    ([0.5, 2.0, 0.5, 2.0, 0.5], "ssm_multipliers"),
    (8, "query_pre_attn_scalar floor_scale log_scaling_n_floor"),
    (2, "rescale_every"),
    (True, "mup_enabled scale_embedding rescale_embeddings scale_attn_by_inverse_layer_idx"),
    # Switches. Routers draw no noise, so that a model without dropout is deterministic.
    (True, "is_decoder"),
    (0.0, "router_jitter_noise input_jitter_noise"),
]
_EVERYWHERE = {name: value for value, names in _ROWS for name in names.split()}

_SLIDING = ["full_attention", "sliding_attention"] * 2
_CONVOLVING = ["conv", "full_attention"] * 2
_DENSE_FIRST = ["dense", "sparse", "sparse", "sparse"]

# What one class of configuration needs beyond that, by its model type.
_TYPES = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "blt": {
        "encoder_hash_byte_group_size": [3, 4],
        "encoder_hash_byte_group_vocab": VOCAB,
        "patching_threshold": 4.45,
        "use_cache": False,  # a cache asks for a depth that BltConfig lacks
    },
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "codegen": {"rotary_dim": 4},
    "cohere2_moe": {"mlp_layer_types": _DENSE_FIRST},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            "full_attention": None,
        },
    },
    "cpmant": {"position_bias_num_buckets": 16, "prompt_types": 4, "prompt_length": 4, "segment_types": 4},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 1.0, "rope_theta": 1e4}},
    "deepseek_v4": {
        "layer_types": [
            "sliding_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
        ],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "partial_rotary_factor": 0.5,
        "o_groups": 2,
    },
    "doge": {"keep_window_size": 4},
    "dots1": {"layer_types": _SLIDING, "n_shared_experts": 1},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32, "downsample_hidden_size": 8},
    "dots3_note_text": {
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_kv_lora_rank": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
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
    "inkling_text": {"mlp_layer_types": _DENSE_FIRST},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": {
        "layer_types": _SLIDING,
        "num_attention_heads_per_layer": [4, 2, 4, 2],
    },
    "lfm2": {"layer_types": _CONVOLVING, "block_multiple_of": 8},
    "lfm2_moe": {"layer_types": _CONVOLVING},
    "llama4_text": {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "mellum": {
        "layer_types": _SLIDING,
        "mlp_layer_types": _DENSE_FIRST,
    },
    "minimax": {"block_size": 16},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "mlp_layer_types": _DENSE_FIRST,
        "dense_intermediate_size": 48,
        "index_block_size": 4,
        "index_n_heads": 2,
        "index_topk_blocks": 2,
        "rotary_dim": 4,
    },
    "ministral": {"layer_types": _SLIDING},
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
        "ple_layer_ids": [1],
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
    "xlstm": {
        "hidden_size": 64,
        "embedding_dim": 64,
        "ffn_round_up_to_multiple_of": 16,
        "qk_dim_factor": 1.0,
        "autocast_kernel_dtype": "float32",
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_key_value_heads": 4, "attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2},
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * 2, "num_experts_per_tok": 1, "router_hidden_size": 16},
}

# The model types of parts that a configuration leaves open.
_PARTS = {
    ("fuyu", "text_config"): "persimmon",
    ("gemma3", "vision_config"): "siglip_vision_model",
    ("got_ocr2", "text_config"): "qwen2",
    ("moss_transcribe_diarize", "text_config"): "qwen3",
}

# Fields that give each layer its kind. The published kinds take turns, or the last of them fills up.
_TAKE_TURNS = ("layer_types", "layers_block_type")
_FILL_UP = ("mlp_layer_types", "indexer_types")


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
    return CONFIG_MAPPING[model_type](**deepcopy(options))  # a configuration edits its lists and dicts in place


def _small(config_class: type[PretrainedConfig]) -> dict:
    """Return arguments that make a configuration small, and its parts with it."""
    declared = {field.name for field in fields(config_class)}
    options = {name: value for name, value in _EVERYWHERE.items() if name in declared}
    for part, part_class in config_class.sub_configs.items():
        if part_class is AutoConfig:
            if (config_class.model_type, part) not in _PARTS:
                continue
            part_class = CONFIG_MAPPING[_PARTS[config_class.model_type, part]]
        options[part] = {"model_type": part_class.model_type, **_small(part_class)}
    for name in declared.intersection(_TAKE_TURNS + _FILL_UP):
        kinds = list(dict.fromkeys(getattr(config_class(), name) or []))
        if len(kinds) > 1:
            options[name] = (kinds * 4 if name in _TAKE_TURNS else kinds + kinds[-1:] * 4)[:4]
    if "kv_lora_rank" in declared:  # latent attention gives every head its own key
        options["num_key_value_heads"] = options["num_attention_heads"]
    return options | _TYPES.get(config_class.model_type, {})
