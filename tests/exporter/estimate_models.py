"""Small configs of every family that the estimate reads, as a config.json has them."""

from __future__ import annotations

from typing import Any

LLAMA = {
    "model_type": "llama", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3,
    "num_key_value_heads": 1, "vocab_size": 211, "max_position_embeddings": 4096,
}  # fmt: skip
QWEN = {**LLAMA, "model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {
    "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 56,
    "patch_size": 14,
}  # fmt: skip
QWEN_VISION = {"depth": 3, "hidden_size": 32, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 48}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 1]}

CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {"vision_config": {"model_type": "clip_vision_model", **VISION}, "text_config": LLAMA},
    "llava with SigLIP": {
        "model_type": "llava",
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "text_config": {**LLAMA, "model_type": "mistral"},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "llava with DINOv2": {
        "model_type": "llava",
        "vision_config": {
            "model_type": "dinov2", "hidden_size": 32, "mlp_ratio": 3, "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": 56, "patch_size": 14, "use_mask_token": False,
        },
        "text_config": LLAMA,
        "vision_feature_layer": -1,
    },
    "llava_next": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "text_config": {**QWEN, "model_type": "qwen3", "head_dim": 12},
        "image_grid_pinpoints": [[56, 112], [112, 112]],
    },
    "idefics3": {"vision_config": VISION, "text_config": LLAMA, "scale_factor": 2},
    "smolvlm": {"vision_config": VISION, "text_config": LLAMA, "scale_factor": 4, "tie_word_embeddings": True},
    "internvl": {
        "vision_config": {"model_type": "internvl_vision", **VISION, "attention_bias": True, "image_size": [56, 56]},
        "text_config": QWEN,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "vision_config": {**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
        "text_config": {**QWEN, "model_type": "qwen2_5_vl_text", "rope_parameters": ROPE},
    },
    "qwen3_vl": {
        "vision_config": {
            **QWEN_VISION, "patch_size": 16, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 64
        },
        "text_config": {**QWEN, "model_type": "qwen3_vl_text", "head_dim": 12, "rope_parameters": ROPE},
        "tie_word_embeddings": True,
    },
    "paligemma": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "text_config": {**LLAMA, "model_type": "gemma", "head_dim": 16},
        "projection_dim": 48,
    },
    "paligemma on Gemma 2": {
        "model_type": "paligemma",
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "text_config": {**LLAMA, "model_type": "gemma2", "head_dim": 16},
        "projection_dim": 48,
    },
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "text_config": {**LLAMA, "model_type": "gemma3_text", "head_dim": 16},
        "mm_tokens_per_image": 4,
    },
}  # fmt: skip
for _name, _config in CONFIGS.items():
    _config.setdefault("model_type", _name)
PICTURES = {"qwen2_5_vl": (112, 56), "qwen3_vl": (128, 64)}
