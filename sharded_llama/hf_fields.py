"""Which fields of a Hugging Face config.json are read, which must be neutral, and which change nothing.

A checkpoint may say anything in its config.json. A field that would change the numbers is either read or has to
hold the value at which it does nothing; every other field is harmless and listed here, or a warning names it.
"""

from collections.abc import Callable, Mapping
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "LLaMAForCausalLM")  # the second is the spelling of early LLaMA-1 conversions

# Our name of each size that a config.json must give -> its name there.
SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "ffn_dim": "intermediate_size",
    "vocab_size": "vocab_size",
}

READ = frozenset(SIZES.values()) | {
    "model_type",
    "architectures",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "dtype",
    "torch_dtype",
}

# Not implemented: accepted only at these values, or at null, [] or {}. 1 also matches 1.0, 0 matches False.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    # Biases and norms that Llama does not have.
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "use_bias": (False,),
    "bias": (False,),
    "qk_norm": (False,),
    "use_qk_norm": (False,),
    "qk_layernorm": (False,),
    # Positions.
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    "rope_interleaved": (False,),
    "alibi": (False,),
    "nope_layer_interval": (0,),
    "no_rope_layer_interval": (0,),
    # Attention.
    "sliding_window": (),
    "attention_chunk_size": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
    "logit_softcapping": (),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "parallel_attn": (False,),
    "use_parallel_residual": (False,),
    # Scales (Cohere, Granite, MiniCPM).
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "scale_emb": (1,),
    "scale_embedding": (False,),
    # Layers that differ from each other, or are mixtures of experts.
    "num_experts": (0,),
    "num_local_experts": (0,),
    "n_routed_experts": (0,),
    "block_configs": (),
    "per_layer_config": (),
    "pruned_heads": (),
    # Weights that are not plain arrays.
    "quantization_config": (),
    "compression_config": (),
}

# Lists by layer: every item must be one of these.
NEUTRAL_ITEMS: Mapping[str, tuple[Any, ...]] = {
    "layer_types": ("full_attention", "attention"),
    "no_rope_layers": (1,),  # 1 stands for a layer with rotary embeddings
}

# Scales of the attention scores: neutral is the 1/sqrt(head_dim) that Llama has.
SCORE_SCALES: Mapping[str, Callable[[int], float]] = {
    "attention_multiplier": lambda head_dim: head_dim**-0.5,
    "query_pre_attn_scalar": lambda head_dim: head_dim,
}

# Written by some version of transformers or by popular training tools; without effect on a forward pass.
HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
    _experts_implementation_internal _flash_attn_2_enabled _name_or_path _output_attentions attn_implementation
    name_or_path transformers_version unsloth_fixed unsloth_version is_llama_config _mlx_version
    attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout initializer_range
    use_cache cache_implementation pretraining_tp gradient_checkpointing use_flash_attention use_flash_attn
    output_attentions output_hidden_states return_dict torchscript use_bfloat16 chunk_size_feed_forward
    tie_last_hidden_states keys_to_ignore_at_inference base_model_tp_plan base_model_pp_plan
    is_decoder cross_attention_hidden_size decoder_start_token_id tie_encoder_decoder tf_legacy_loss
    pad_token_id sep_token_id unk_token_id mask_token_id image_token_id tokenizer_class prefix
    id2label label2id num_labels problem_type finetuning_task task_specific_params
    model_max_length max_sequence_length tokenizer_model_max_length tokenizer_padding_side
    max_window_layers use_sliding_window
    max_length max_new_tokens min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty
    temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size bad_words_ids num_return_sequences output_scores return_dict_in_generate
    forced_bos_token_id forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens
    """.split()  # noqa: SIM905 - a block of names reads better than a column of strings
)

# generation_config.json: not implemented, warned of unless at one of these values or null.
GENERATION_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "typical_p": (1,),
    "top_h": (),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "exponential_decay_length_penalty": (),
    "bad_words_ids": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "sequence_bias": ({}, []),
    "stop_strings": ([],),
    "watermarking_config": (),
}
