"""How many bits a model spends on each byte that an assistant says in held-out conversations.

Each answer is scored after everything before it, written by the model's own chat template; what
others say does not count. The conversations are those of `corpus.heldout`, a task for each domain.
The chat models' counterpart of `bits_per_byte`: no judge, no sampling, and comparable across
tokenizers and templates.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="response_bits_per_byte",
    title="Response bits per byte",
    tasks=(Task("kfuse_responses", "bits_per_byte", False, None, "conversations"),),
    reference="bits per byte, 2101.00027 section 3.1",
)
