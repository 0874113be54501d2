"""The whole model in transformers' classes: tower, projector, language model with a picture token; the processor."""

from __future__ import annotations

import torch
from transformers import (
    CLIPImageProcessor,
    Dinov2Model,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from tools.real_llava.pictures import FEATURE_LAYER, IMAGE_SIZE, MEAN, PATCH_SIZE, STD

IMAGE, END = "<image>", "<|im_end|>"
HEAD, QUESTION_END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"  # around the picture and the question
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""
VOCABULARY_STEP = 64  # the embedding table is padded to a multiple of this


def assemble(
    tower: Dinov2Model, language: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> LlavaForConditionalGeneration:
    """The model, with a freshly initialised projector; `tokenizer` gets the picture's token."""
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=VOCABULARY_STEP, mean_resizing=False)
    text = language.config
    for leftover in ("quantization_config", "pretraining_tp", "_name_or_path"):
        if hasattr(text, leftover):
            delattr(text, leftover)
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=image,
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(END)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.eval().to(torch.float32)


def processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that belongs to it."""
    image = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=MEAN.tolist(),
        image_std=STD.tolist(),
    )
    return LlavaProcessor(
        image_processor=image,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
