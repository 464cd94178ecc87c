"""Hugging Face's names, for KerasHub's backbones and what contains one.

PyTorch stores a projection outputs first and folds the heads into one axis; Keras has inputs first, and an axis of
heads. In a model with a language modelling head the embedding may be in the file twice, as the head's own
(`tie_word_embeddings`): what counts is whether the tensors are equal, not what a flag says.
"""

from __future__ import annotations

from typing import Any

from tether.files.tensors.tables import Table, Tensor

Rows = dict[str, Any]


def _dense(ours: str, theirs: str, inputs: int = 1, *, bias: bool = True) -> Rows:
    """A projection of PyTorch's `Linear`."""
    found: Rows = {f"{ours}.kernel": Tensor(f"{theirs}.weight", inputs=inputs)}
    return {**found, f"{ours}.bias": Tensor(f"{theirs}.bias", folded=True)} if bias else found


def _norm(ours: str, *theirs: str) -> Rows:
    """A LayerNorm: `weight` and `bias` there, in old files of BERT `gamma` and `beta`."""
    return {
        f"{ours}.gamma": Tensor(*(f"{each}.{leaf}" for each in theirs for leaf in ("weight", "gamma"))),
        f"{ours}.beta": Tensor(*(f"{each}.{leaf}" for each in theirs for leaf in ("bias", "beta"))),
    }


# --------------------------------------------------------------------------- encoders


def _bert_block(place: str, attention: str = "self_attention_layer") -> Rows:
    """A block of BERT's and RoBERTa's."""
    return {
        **_dense(f"transformer_layer_{{n}}.{attention}.query", f"{place}.attention.self.query"),
        **_dense(f"transformer_layer_{{n}}.{attention}.key", f"{place}.attention.self.key"),
        **_dense(f"transformer_layer_{{n}}.{attention}.value", f"{place}.attention.self.value"),
        **_dense(f"transformer_layer_{{n}}.{attention}.attention_output", f"{place}.attention.output.dense", 2),
        **_dense("transformer_layer_{n}.feedforward_intermediate_dense", f"{place}.intermediate.dense"),
        **_dense("transformer_layer_{n}.feedforward_output_dense", f"{place}.output.dense"),
        **_norm("transformer_layer_{n}.self_attention_layer_norm", f"{place}.attention.output.LayerNorm"),
        **_norm("transformer_layer_{n}.feedforward_layer_norm", f"{place}.output.LayerNorm"),
    }


_CLS = "cls.predictions"
TIED = ("embeddings.word_embeddings.weight", f"{_CLS}.decoder.weight")
"""A table and the head's own copy of it, in BERT."""


def _masked_head(below: str) -> Rows:
    """KerasHub's `MaskedLMHead`, which shares the embedding."""
    return {
        f"{below}output_bias": [Tensor(f"{_CLS}.bias"), Tensor(f"{_CLS}.decoder.bias")],
        f"{below}intermediate_dense.kernel": Tensor(f"{_CLS}.transform.dense.weight", inputs=1),
        f"{below}intermediate_dense.bias": Tensor(f"{_CLS}.transform.dense.bias"),
        **_norm(f"{below}intermediate_layer_norm", f"{_CLS}.transform.LayerNorm"),
    }


_BERT = Table(
    {
        "token_embedding.embeddings": "{p}embeddings.word_embeddings.weight",
        "position_embedding.embeddings": "{p}embeddings.position_embeddings.weight",
        "segment_embedding.embeddings": "{p}embeddings.token_type_embeddings.weight",
        **_norm("embeddings_layer_norm", "{p}embeddings.LayerNorm"),
        **_bert_block("{p}encoder.layer.{n}"),
        **_dense("pooled_dense", "{p}pooler.dense"),
        **_masked_head(""),
        **_masked_head("mlm_head."),
        **_dense("classifier", "classifier"),
    },
    prefixes=("", "bert."),
    within=r"bert_\w*backbone\w*",
    spare=r"(.*\.)?embeddings\.position_ids|cls\..*|(.*\.)?pooler\..*|classifier\..*",
    heads={
        "token_embedding.embeddings": (r"(.*\.)?output_bias", Tensor(f"{_CLS}.decoder.weight")),
    },
)

_ROBERTA = Table(
    {
        "embeddings.token_embedding.embeddings": "{p}embeddings.word_embeddings.weight",
        "embeddings.position_embedding.embeddings": Tensor("{p}embeddings.position_embeddings.weight", skip=2),
        **_norm("embeddings_layer_norm", "{p}embeddings.LayerNorm"),
        **_bert_block("{p}encoder.layer.{n}"),
    },
    prefixes=("", "roberta."),
    within=r"roberta_\w*backbone\w*",
    spare=r"(.*\.)?embeddings\.(position_ids|token_type_ids|token_type_embeddings\.weight)|lm_head\..*|"
    r"(.*\.)?pooler\..*|classifier\..*",
)
"""Positions begin at 2 there. KerasHub has no table of segments: what it adds, the one segment of RoBERTa, is zero."""

_LAYER = "{p}transformer.layer.{n}"
_DISTILBERT = Table(
    {
        "token_and_position_embedding.token_embedding.embeddings": "{p}embeddings.word_embeddings.weight",
        "token_and_position_embedding.position_embedding.embeddings": "{p}embeddings.position_embeddings.weight",
        **_norm("embeddings_layer_norm", "{p}embeddings.LayerNorm"),
        **_dense("transformer_layer_{n}.self_attention_layer.query", f"{_LAYER}.attention.q_lin"),
        **_dense("transformer_layer_{n}.self_attention_layer.key", f"{_LAYER}.attention.k_lin"),
        **_dense("transformer_layer_{n}.self_attention_layer.value", f"{_LAYER}.attention.v_lin"),
        **_dense("transformer_layer_{n}.self_attention_layer.attention_output", f"{_LAYER}.attention.out_lin", 2),
        **_dense("transformer_layer_{n}.feedforward_intermediate_dense", f"{_LAYER}.ffn.lin1"),
        **_dense("transformer_layer_{n}.feedforward_output_dense", f"{_LAYER}.ffn.lin2"),
        **_norm("transformer_layer_{n}.self_attention_layer_norm", f"{_LAYER}.sa_layer_norm"),
        **_norm("transformer_layer_{n}.feedforward_layer_norm", f"{_LAYER}.output_layer_norm"),
    },
    prefixes=("", "distilbert."),
    within=r"distil_bert_\w*backbone\w*",
    spare=r"(.*\.)?embeddings\.position_ids|vocab_\w+\..*|(pre_)?classifier\..*|qa_outputs\..*",
)


# --------------------------------------------------------------------------- decoders


def _fused(ours: str, part: int) -> Rows:
    """One of query, key and value, which are one tensor in GPT-2, inputs first."""
    return {
        f"{ours}.kernel": Tensor("{p}h.{n}.attn.c_attn.weight", axes=(0, (1, 2)), part=(part, 3, 1)),
        f"{ours}.bias": Tensor("{p}h.{n}.attn.c_attn.bias", folded=True, part=(part, 3)),
    }


_GPT2 = Table(
    {
        "token_embedding.embeddings": "{p}wte.weight",
        "position_embedding.embeddings": "{p}wpe.weight",
        **_fused("transformer_layer_{n}.self_attention.query", 0),
        **_fused("transformer_layer_{n}.self_attention.key", 1),
        **_fused("transformer_layer_{n}.self_attention.value", 2),
        "transformer_layer_{n}.self_attention.attention_output.kernel": Tensor(
            "{p}h.{n}.attn.c_proj.weight", axes=((0, 1), 2)
        ),
        "transformer_layer_{n}.self_attention.attention_output.bias": "{p}h.{n}.attn.c_proj.bias",
        "transformer_layer_{n}.feedforward_intermediate_dense.kernel": "{p}h.{n}.mlp.c_fc.weight",
        "transformer_layer_{n}.feedforward_intermediate_dense.bias": "{p}h.{n}.mlp.c_fc.bias",
        "transformer_layer_{n}.feedforward_output_dense.kernel": "{p}h.{n}.mlp.c_proj.weight",
        "transformer_layer_{n}.feedforward_output_dense.bias": "{p}h.{n}.mlp.c_proj.bias",
        **_norm("transformer_layer_{n}.self_attention_layer_norm", "{p}h.{n}.ln_1"),
        **_norm("transformer_layer_{n}.feedforward_layer_norm", "{p}h.{n}.ln_2"),
        **_norm("layer_norm", "{p}ln_f"),
    },
    prefixes=("", "transformer."),
    within=r"gpt2_\w*backbone\w*",
    spare=r"(.*\.)?attn\.(masked_)?bias|lm_head\.weight",
)


def _llama(within: str, *, bias: bool = False) -> Table:
    """The names that Llama has given, which many have taken over; `bias`: of query, key and value."""
    ours, theirs = "transformer_layer_{n}", "{p}layers.{n}"
    return Table(
        {
            "token_embedding.embeddings": "{p}embed_tokens.weight",
            "token_embedding.reverse_embeddings": Tensor("lm_head.weight", inputs=1),
            **_dense(f"{ours}.self_attention.query", f"{theirs}.self_attn.q_proj", bias=bias),
            **_dense(f"{ours}.self_attention.key", f"{theirs}.self_attn.k_proj", bias=bias),
            **_dense(f"{ours}.self_attention.value", f"{theirs}.self_attn.v_proj", bias=bias),
            **_dense(f"{ours}.self_attention.attention_output", f"{theirs}.self_attn.o_proj", 2, bias=False),
            **_dense(f"{ours}.feedforward_gate_dense", f"{theirs}.mlp.gate_proj", bias=False),
            **_dense(f"{ours}.feedforward_intermediate_dense", f"{theirs}.mlp.up_proj", bias=False),
            **_dense(f"{ours}.feedforward_output_dense", f"{theirs}.mlp.down_proj", bias=False),
            f"{ours}.self_attention_layernorm.scale": f"{theirs}.input_layernorm.weight",
            f"{ours}.feedforward_layernorm.scale": f"{theirs}.post_attention_layernorm.weight",
            "sequence_output_layernorm.scale": "{p}norm.weight",
        },
        prefixes=("model.", ""),
        within=within,
        spare=r".*\.rotary_emb\.inv_freq|lm_head\.weight",
    )


def _headed(ours: str, theirs: str) -> Rows:
    """A projection of Gemma's, with the heads before the inputs."""
    return {f"{ours}.kernel": Tensor(f"{theirs}.weight", axes=((0, 2), 1))}


_BLOCK, _LAYERS = "decoder_block_{n}", "{p}layers.{n}"
_GEMMA = Table(
    {
        "token_embedding.embeddings": "{p}embed_tokens.weight",
        **_headed(f"{_BLOCK}.attention.query", f"{_LAYERS}.self_attn.q_proj"),
        **_headed(f"{_BLOCK}.attention.key", f"{_LAYERS}.self_attn.k_proj"),
        **_headed(f"{_BLOCK}.attention.value", f"{_LAYERS}.self_attn.v_proj"),
        **_dense(f"{_BLOCK}.attention.attention_output", f"{_LAYERS}.self_attn.o_proj", 2, bias=False),
        **_dense(f"{_BLOCK}.ffw_gating", f"{_LAYERS}.mlp.gate_proj", bias=False),
        **_dense(f"{_BLOCK}.ffw_gating_2", f"{_LAYERS}.mlp.up_proj", bias=False),
        **_dense(f"{_BLOCK}.ffw_linear", f"{_LAYERS}.mlp.down_proj", bias=False),
        f"{_BLOCK}.pre_attention_norm.scale": f"{_LAYERS}.input_layernorm.weight",
        f"{_BLOCK}.pre_ffw_norm.scale": f"{_LAYERS}.post_attention_layernorm.weight",
        "final_normalization.scale": "{p}norm.weight",
    },
    prefixes=("model.", ""),
    within=r"gemma_\w*backbone\w*",
    spare=r"lm_head\.weight",
)
"""The first Gemma; the second has more norms, under other names."""

# --------------------------------------------------------------------------- encoder and decoder


def _t5_norm(ours: str, theirs: str) -> Rows:
    return {f"{ours}.weight": f"{theirs}.layer_norm.weight"}


def _t5_attention(ours: str, theirs: str) -> Rows:
    found: Rows = {}
    for role, word in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
        found.update(_dense(f"{ours}.{role}_projector", f"{theirs}.{word}", bias=False))
    return {**found, f"{ours}.embeddings": f"{theirs}.relative_attention_bias.weight"}


def _t5_stack(side: str) -> Rows:
    """The encoder, or the decoder, which looks at the encoder's outputs between its two other sublayers."""
    ours, theirs = f"transformer_{side}_layer_{{n}}", f"{side}.block.{{n}}"
    last = 1 if side == "encoder" else 2
    dense = f"{theirs}.layer.{last}.DenseReluDense"
    found = {
        **_t5_attention(f"{ours}.self_attention", f"{theirs}.layer.0.SelfAttention"),
        **_dense(f"{ours}.input_projector", f"{dense}.wi", bias=False),
        **_dense(f"{ours}.gate_projector", f"{dense}.wi_1", bias=False),
        **_dense(f"{ours}.output_projector", f"{dense}.wo", bias=False),
        f"{side}_output_layer_norm.weight": f"{side}.final_layer_norm.weight",
    }
    for place in range(last + 1):
        found.update(_t5_norm(f"{ours}.t5_layer_norm{{{place}}}", f"{theirs}.layer.{place}"))
    if side == "decoder":
        found.update(_t5_attention(f"{ours}.cross_attention", f"{theirs}.layer.1.EncDecAttention"))
    return found


_T5 = Table(
    {
        "token_embedding.embeddings": Tensor("shared.weight", "encoder.embed_tokens.weight"),
        "token_embedding.reverse_embeddings": Tensor("lm_head.weight", inputs=1),
        **_t5_stack("encoder"),
        **_t5_stack("decoder"),
    },
    within=r"t5_\w*backbone\w*",
    spare=r"(en|de)coder\.embed_tokens\.weight|lm_head\.weight",
    instead={
        f"transformer_{side}_layer_{{n}}.input_projector.kernel": (
            r".*\.gate_projector\.kernel",
            Tensor(f"{side}.block.{{n}}.layer.{last}.DenseReluDense.wi_0.weight", inputs=1),
        )
        for side, last in (("encoder", 1), ("decoder", 2))
    },
)
"""With a gate, from T5 1.1 on, the first projection has another name. KerasHub does not name the norms."""

# --------------------------------------------------------------------------- pictures


_BLOCK_OF_VIT = "vit_encoder.transformer_block_{n}"
_PATCHES = "vit_patching_and_embedding"
_VIT_NAMES = {
    "mha.query": ("attention.attention.query", "attention.q_proj"),
    "mha.key": ("attention.attention.key", "attention.k_proj"),
    "mha.value": ("attention.attention.value", "attention.v_proj"),
    "mha.attention_output": ("attention.output.dense", "attention.o_proj"),
    "mlp.dense_1": ("intermediate.dense", "mlp.fc1"),
    "mlp.dense_2": ("output.dense", "mlp.fc2"),
    "ln_1": ("layernorm_before", "layernorm_before"),
    "ln_2": ("layernorm_after", "layernorm_after"),
}
"""Of each layer of a block: its name in files, and that of the module in transformers 5."""


def _vit(first: int) -> Table:
    """The table that writes the names in files (0), or of modules (1), and reads either. KerasHub counts from 1."""
    found: Rows = {
        f"{_PATCHES}.class_token": "{p}embeddings.cls_token",
        f"{_PATCHES}.patch_embedding.kernel": Tensor(
            "{p}embeddings.patch_embeddings.projection.weight", axes=(3, 2, 0, 1)
        ),
        f"{_PATCHES}.patch_embedding.bias": "{p}embeddings.patch_embeddings.projection.bias",
        f"{_PATCHES}.position_embedding.embeddings": Tensor("{p}embeddings.position_embeddings", axes=((), 0, 1)),
        **_norm("vit_encoder.ln", "{p}layernorm"),
    }
    for ours, names in _VIT_NAMES.items():
        places = [f"{{p}}encoder.layer.{{n-1}}.{names[0]}", f"{{p}}layers.{{n-1}}.{names[1]}"]
        places = places[::-1] if first else places
        weights, biases = ([f"{place}.{leaf}" for place in places] for leaf in ("weight", "bias"))
        name = f"{_BLOCK_OF_VIT}.{ours}"
        if ours.startswith("ln"):
            found.update({f"{name}.gamma": Tensor(*weights), f"{name}.beta": Tensor(*biases)})
        else:
            inputs = 2 if ours == "mha.attention_output" else 1
            found.update(
                {f"{name}.kernel": Tensor(*weights, inputs=inputs), f"{name}.bias": Tensor(*biases, folded=True)}
            )
    return Table(
        found,
        prefixes=("", "vit."),
        within=r"vi_?t_\w*backbone\w*",
        spare=r"(.*\.)?pooler\..*|classifier\..*|(.*\.)?mask_token",
    )


# --------------------------------------------------------------------------- by word


PRESETS: dict[str, Table] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "gemma": _GEMMA,
    "gpt2": _GPT2,
    "llama": _llama(r"llama3?_\w*backbone\w*"),
    "mistral": _llama(r"mistral_\w*backbone\w*"),
    "qwen2": _llama(r"qwen_\w*backbone\w*", bias=True),
    "roberta": _ROBERTA,
    "t5": _T5,
    "vit": _vit(0),
    "vit5": _vit(1),
}
"""The tables by a word for the architecture."""

__all__ = ["PRESETS", "TIED"]
