"""How many bits a model spends on each byte of held-out text, in five kinds of English prose.

The unit in which models with different tokenizers can be compared. FuseLLM (2401.10491) has no such
column; it stands here because it moves with the training loss and resolves small differences. A
document is held out by a hash of its text, and what the corpus trains on shares no document and no
long line with it. Source code is left out: the only code that every machine has is the standard
library of its own Python, which differs from version to version.

A text longer than 4,096 bytes is read in windows that slide by 2,048 bytes: each byte counts once,
and stands behind the same text for every model, whatever its tokenizer. The perplexity of a token
is reported beside it; it is one of the row's own tokenizer and compares with no other tokenizer's.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="bits_per_byte",
    title="Bits per byte",
    tasks=(
        Task("kfuse_bits_papers", "bits_per_byte", False, None, "papers"),
        Task("kfuse_bits_biomedical", "bits_per_byte", False, None, "biomedical"),
        Task("kfuse_bits_stories", "bits_per_byte", False, None, "stories"),
        Task("kfuse_bits_wikipedia", "bits_per_byte", False, None, "Wikipedia"),
        Task("kfuse_bits_textbook", "bits_per_byte", False, None, "textbook"),
    ),
    datasets=("papers", "biomedical", "stories", "wikipedia", "textbook"),
    reference="bits per byte, 2101.00027 section 3.1",
)
