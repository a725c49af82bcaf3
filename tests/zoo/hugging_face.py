"""Tiny random models of `transformers`, wrapped as people wrap them. Nothing is downloaded.

subject = SUBJECTS[0]; subject.model_fn()         # imports transformers then, not before
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.subject import (
    ADAMW,
    CLIPPED,
    SGD,
    Subject,
    cross_entropy,
    generator,
    padded_texts,
    rows_of,
    texts,
    token_loss,
    values,
)


class Logits(nn.Module):
    """A model of `transformers` from its positional inputs to its logits."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], **fixed: Any) -> None:
        super().__init__()
        self.model, self.names, self.fixed = model, names, fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        return self.model(**given, **self.fixed).logits


class Output(nn.Module):
    """The whole of what a model gives, a `ModelOutput`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, mask: Tensor) -> Any:
        return self.model(input_ids=tokens, attention_mask=mask)


def made(kind: str, config: str, options: Mapping[str, Any], names: tuple[str, ...], **fixed: Any):
    """A function that builds `transformers.<kind>` of `transformers.<config>`."""

    def build() -> nn.Module:
        import transformers

        configuration = getattr(transformers, config)(**options)
        return Logits(getattr(transformers, kind)(configuration), names, **fixed)

    return build


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 31}
GPT2 = {"n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 8, "vocab_size": 31,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
UNDROPPED = {"attn_pdrop": 0.0, "resid_pdrop": 0.1, "embd_pdrop": 0.1}
LLAMA = {**SMALL, "intermediate_size": 20, "num_key_value_heads": 2, "head_dim": 4,
         "max_position_embeddings": 16}  # fmt: skip
BERT = {**SMALL, "intermediate_size": 20, "max_position_embeddings": 16, "num_labels": 4,
        "attention_probs_dropout_prob": 0.0}  # fmt: skip
VIT = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3,
       "intermediate_size": 20, "image_size": 8, "patch_size": 4, "num_channels": 2,
       "num_labels": 5}  # fmt: skip
T5 = {"d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "vocab_size": 31,
      "dropout_rate": 0.0, "relative_attention_num_buckets": 8}  # fmt: skip
MIXTRAL = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2,
           "experts_implementation": "batched_mm"}  # fmt: skip

QWEN = {**LLAMA, "tie_word_embeddings": True}
BART = {"d_model": 12, "encoder_layers": 1, "decoder_layers": 2, "encoder_attention_heads": 3,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 20, "decoder_ffn_dim": 22,
        "vocab_size": 31, "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}  # fmt: skip
SWIN = {"image_size": 16, "patch_size": 2, "num_channels": 2, "embed_dim": 6, "depths": [2, 2],
        "num_heads": [2, 3], "window_size": 2, "num_labels": 5, "drop_path_rate": 0.0}  # fmt: skip

TOKENS = ("input_ids",)
MASKED = ("input_ids", "attention_mask")
NO_CACHE = {"use_cache": False}
DECODED = texts(6, words=31, rows=(7, 5, 2))
PADDED = padded_texts(7, words=31, classes=4, rows=(9, 7, 3))


def bert_output() -> nn.Module:
    import transformers

    config = transformers.BertConfig(**{**BERT, "hidden_dropout_prob": 0.0})
    return Output(transformers.BertForSequenceClassification(config))


def output_loss(outputs: Any, targets: Tensor) -> Tensor:
    return cross_entropy(outputs["logits"], targets)


def translated(step: int) -> tuple[Any, Any]:
    """(source ids, their mask, target ids), and the next target ids."""
    seed, n = generator(step), rows_of((5, 7, 2), step)
    source = torch.randint(2, 31, (n, 7), generator=seed)
    mask = (torch.arange(7) < torch.randint(3, 8, (n, 1), generator=seed)).long()
    target = torch.randint(2, 31, (n, 4), generator=seed)
    return (source * mask, mask, target), target.roll(-1, 1)


def decoder(name: str, build: Callable[[], nn.Module], note: str, optimizer=ADAMW, **others):
    return Subject(
        name, build, DECODED, token_loss, note, optimizer, family="transformers", **others
    )


SUBJECTS = [
    decoder(
        "hf-gpt2", made("GPT2LMHeadModel", "GPT2Config", GPT2 | UNDROPPED, TOKENS, **NO_CACHE),
        "tied, Conv1D weights, dropout layers",
    ),
    decoder(
        "hf-gpt2-default", made("GPT2LMHeadModel", "GPT2Config", GPT2, TOKENS, **NO_CACHE),
        "as it comes: dropout inside attention too",
    ),
    decoder(
        "hf-llama", made("LlamaForCausalLM", "LlamaConfig", LLAMA, TOKENS, **NO_CACHE),
        "grouped queries, rotary, norms in float32", CLIPPED,
    ),
    Subject(
        "hf-llama-padded", made("LlamaForCausalLM", "LlamaConfig", LLAMA, MASKED, **NO_CACHE),
        lambda step: (PADDED(step)[0], PADDED(step)[0][0]), token_loss,
        "grouped queries with a padding mask", SGD, family="transformers",
    ),
    Subject(
        "hf-bert", made("BertForSequenceClassification", "BertConfig", BERT, MASKED),
        PADDED, cross_entropy, "padding mask, pooler, dropout layers", ADAMW,
        family="transformers",
    ),
    Subject(
        "hf-bert-output", bert_output, PADDED, output_loss,
        "the same, giving a ModelOutput", family="transformers",
    ),
    Subject(
        "hf-vit", made("ViTForImageClassification", "ViTConfig", VIT, ("pixel_values",)),
        values(2, 8, 8, classes=5, rows=(7, 9, 2)), cross_entropy,
        "patches, a class token", ADAMW, family="transformers",
    ),
    Subject(
        "hf-t5",
        made(
            "T5ForConditionalGeneration", "T5Config", T5,
            ("input_ids", "attention_mask", "decoder_input_ids"), **NO_CACHE,
        ),
        translated, token_loss,
        "encoder and decoder, one embedding for both, relative positions", ADAMW,
        family="transformers",
    ),
    decoder(
        "hf-mixtral", made("MixtralForCausalLM", "MixtralConfig", MIXTRAL, TOKENS, **NO_CACHE),
        "mixture of experts, batched",
    ),
    decoder(
        "hf-qwen3", made("Qwen3ForCausalLM", "Qwen3Config", QWEN, TOKENS, **NO_CACHE),
        "tied, norms of queries and keys", CLIPPED,
    ),
    Subject(
        "hf-bart",
        made(
            "BartForConditionalGeneration", "BartConfig", BART,
            ("input_ids", "attention_mask", "decoder_input_ids"), **NO_CACHE,
        ),
        translated, token_loss, "tied three times, a bias that is a buffer, other head counts",
        ADAMW, family="transformers",
    ),
    Subject(
        "hf-swin", made("SwinForImageClassification", "SwinConfig", SWIN, ("pixel_values",)),
        values(2, 16, 16, classes=5, rows=(5, 7, 2)), cross_entropy,
        "windows of attention, patches merged", family="transformers",
    ),
]  # fmt: skip
