"""Fields that other servers' clients send, and the values at which they change nothing.

Clients of vLLM, llama.cpp and others send their defaults. Such a value is accepted; any other one
asks for something that this server cannot do, and is refused by name. Source of names and defaults:
vLLM's `CompletionRequest`, llama.cpp's `tools/server/README.md`, OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["IGNORED", "NEUTRAL"]

_OFF = (False,)
_EITHER = (False, True)

NEUTRAL: Mapping[str, tuple[object, ...]] = {
    # OpenAI
    "metadata": ({},),
    "service_tier": ("auto", "default"),
    "store": _OFF,
    "suffix": ("",),
    # vLLM
    # The tokenizer adds none before a prompt.
    "add_special_tokens": _EITHER,
    "allowed_token_ids": ([],),
    "bad_words": ([],),
    "early_stopping": _OFF,
    "include_stop_str_in_output": _OFF,
    "length_penalty": (1,),
    "logits_processors": ([],),
    "priority": (0,),
    "response_format": ({"type": "text"},),
    "return_token_ids": _OFF,
    "return_tokens_as_token_ids": _OFF,
    "spaces_between_special_tokens": _EITHER,
    "stop_token_ids": ([],),
    "use_beam_search": _OFF,
    # llama.cpp
    "cache_prompt": _EITHER,
    "dry_multiplier": (0,),
    "dynatemp_range": (0,),
    "grammar": ("",),
    "grammar_lazy": _OFF,
    "id_slot": (-1,),
    "image_data": ([],),
    "json_schema": ({},),
    "lora": ([],),
    "min_keep": (0, 1),
    "mirostat": (0,),
    "n_indent": (0,),
    "n_keep": (0, -1),
    "n_probs": (0,),
    "post_sampling_probs": _OFF,
    "repeat_penalty": (1,),
    "response_fields": ([],),
    "return_progress": _OFF,
    "return_tokens": _OFF,
    "t_max_predict_ms": (0, -1),
    "tfs_z": (1,),
    "timings_per_token": _OFF,
    "top_n_sigma": (0, -1),
    "typical_p": (1,),
    "xtc_probability": (0,),
    # Others: text-generation-webui, SGLang
    "do_sample": (True,),
    "encoder_repetition_penalty": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "guidance_scale": (1,),
    "no_repeat_ngram_size": (0,),
    "no_stop_trim": _OFF,
    "num_beams": (1,),
    "penalty_alpha": (0,),
    "smoothing_factor": (0,),
    "tfs": (1,),
    "top_a": (0,),
}

IGNORED = (
    # They name the caller.
    "prompt_cache_key",
    "request_id",
    "safety_identifier",
    # Parameters of features that are accepted only if they are switched off.
    "dry_allowed_length",
    "dry_base",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
    "dynatemp_exponent",
    "mirostat_eta",
    "mirostat_tau",
    "repeat_last_n",
    "xtc_threshold",
)
"""Fields that never change the text."""
