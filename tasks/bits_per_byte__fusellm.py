"""Bits per byte in the three domains of the recipe `domains`, FuseLLM's Table 7 in small.

The paper takes PhilPapers, NIH ExPorter and USPTO Backgrounds from the Pile and calls the unit
perplexity; values below 1 can only be bits or nats a byte. Its text is not to be had in a package,
so other domains stand in (papers on language processing, biomedical sentences, stories), and no
number here is the paper's. A recipe's own `corpus.heldout` takes the place of all three.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="bits_per_byte@fusellm",
    title="Bits per byte in three domains",
    tasks=(
        Task("kfuse_bits_papers", "bits_per_byte", False, None, "papers"),
        Task("kfuse_bits_biomedical", "bits_per_byte", False, None, "biomedical"),
        Task("kfuse_bits_stories", "bits_per_byte", False, None, "stories"),
    ),
    datasets=("papers", "biomedical", "stories"),
    reference="FuseLLM 2401.10491, table 7",
)
