"""Three tiny models with three different tokenizers, and a corpus, made on the spot.

They know nothing and are the same bytes on every machine of one torch version: what `kfuse run
tiny` and the tests run the whole loop on. Architectures: Llama, GPT-NeoX, Gemma-3 (sliding window);
tokenizers: byte-level BPE, SentencePiece-style BPE with byte fallback and BOS, Unigram.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion.errors import RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PretrainedConfig

CORPORA = ("corpus", "conversations")
_PEOPLE = ("the baker", "a teacher", "our neighbour", "the old captain", "my sister", "a farmer")
_DEEDS = (
    "counts seven apples",
    "walks along the river",
    "mends a broken wheel",
    "reads a long letter",
    "waits for the morning train",
    "paints the garden gate",
)
_ENDS = ("before the rain", "in early spring", "with great care", "for the third time", "at noon")
TEXT = [
    f"{who.capitalize()} {does} {when}. Then {other} {also}, and nobody asks why."
    for i, who in enumerate(_PEOPLE)
    for j, does in enumerate(_DEEDS)
    for when in _ENDS
    for other in (_PEOPLE[(i + 1 + j) % len(_PEOPLE)],)
    for also in (_DEEDS[(j + 2 + i) % len(_DEEDS)],)
]


def _byte_level() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _sentencepiece() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers

    specials = ["<pad>", "<s>", "</s>", "<unk>"]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trainer = trainers.BpeTrainer(
        vocab_size=640,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    trained.train_from_iterator([w for line in TEXT for w in _words(line)], trainer)
    tokenizer = Tokenizer.from_str(_byte_tokens_ordinary(trained.to_str(), specials))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def _words(line: str) -> list[str]:
    """Pieces that begin with their space, so that merges do not run across words."""
    first, *rest = line.split(" ")
    return [first, *(" " + word for word in rest)]


def _byte_tokens_ordinary(saved: str, specials: list[str]) -> str:
    """Byte tokens belong to the vocabulary, not to the tokens that are matched in the text."""
    content = json.loads(saved)
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in specials]
    return json.dumps(content)


def _unigram() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.Unigram(_pieces(), unk_id=0, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def _pieces() -> list[tuple[str, float]]:
    """Pieces and their log frequencies, counted: the library's Unigram trainer differs by run."""
    counts = Counter(chr(code) for code in range(33, 127))
    for line in TEXT:
        for word in ("\u2581" + word for word in line.split(" ")):
            counts.update(
                word[i:j] for i in range(len(word)) for j in range(i + 1, min(i + 6, len(word)) + 1)
            )
    single = sorted((p, n) for p, n in counts.items() if len(p) == 1)
    longer = sorted((p, n) for p, n in counts.items() if len(p) > 1)
    longer.sort(key=lambda found: -found[1] * len(found[0]))
    chosen = [*single, *longer[: 397 - len(single)]]
    total = sum(n for _, n in chosen)
    specials = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    return specials + [(piece, math.log(n / total)) for piece, n in chosen]


def _llama(vocabulary: int) -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )


def _gemma(vocabulary: int) -> PretrainedConfig:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=1024,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"],
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _neox(vocabulary: int) -> PretrainedConfig:
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
    )


# Two ways to write a conversation, of which the second takes no system message.
_CHAT = (
    "{% for m in messages %}{{ m.role + ':\\n' + m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\\n' }}{% endif %}"
)
_TURNS = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ '[' + m.role + ']\\n' + m.content.strip() + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\\n' }}{% endif %}"
)
MODELS: dict[str, tuple[Callable, Callable, dict[str, str], int]] = {
    "llama": (_byte_level, _llama, {"eos_token": "<|end|>", "chat_template": _CHAT}, 1),
    "gemma": (
        _sentencepiece,
        _gemma,
        {
            "pad_token": "<pad>",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "chat_template": _TURNS,
        },
        2,
    ),
    "neox": (
        _unigram,
        _neox,
        {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
        3,
    ),
}


def make_model(name: str, out: Path) -> None:
    """Write one tiny model folder; RunError lists the known names."""
    if name not in MODELS:
        raise RunError(f"tiny:{name}: unknown; known: {', '.join(f'tiny:{n}' for n in MODELS)}")
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from fusion.models import quiet

    quiet()
    train, config, specials, seed = MODELS[name]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train(), **specials)
    # A generator of our own would not reach the layers' initialisation; the state is put back.
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(len(tokenizer)), dtype=torch.float32)
    torch.random.set_rng_state(state)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def make_corpus(home: Path, name: str = "corpus") -> Path:
    """A tiny corpus as a JSONL file in the store: texts, or `conversations` about them.

    RunError lists the known names.
    """
    if name not in CORPORA:
        known = ", ".join(f"tiny:{one}" for one in CORPORA)
        raise RunError(f"corpus.path: tiny:{name}: unknown; known: {known}")
    path = home / "data" / ("tiny.jsonl" if name == "corpus" else f"tiny-{name}.jsonl")
    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "conversations":
        path.write_text("".join(json.dumps(row) + "\n" for row in _conversations()))
        return path
    groups = [" ".join(TEXT[start : start + 6]) for start in range(0, len(TEXT), 6)]
    lines = [
        json.dumps({"domain": ("village", "town")[number % 2], "text": text})
        for number, text in enumerate(groups)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def _conversations() -> Iterator[dict[str, Any]]:
    """Who does what; every third conversation has a system message, and two turns."""
    for number, (who, does) in enumerate((who, does) for who in _PEOPLE for does in _DEEDS):
        asked = [("user", f"What does {who} do?"), ("assistant", f"{who.capitalize()} {does}.")]
        if number % 3 == 0:
            also = _DEEDS[(number + 2) % len(_DEEDS)]
            asked = [("system", "Answer in one line."), *asked]
            asked += [("user", "And then?"), ("assistant", f"Then {who} {also}.")]
        turns = [{"role": role, "content": content} for role, content in asked]
        yield {"domain": ("village", "town")[number % 2], "messages": turns}
