"""GSM8K: 1,319 word problems of arithmetic with solved examples, asked as chat.

Task, prompt, filters and metric are lm-eval's own `gsm8k`: five solved examples of the training
split, each a question and an answer in turns of its own, then the problem; at most 256 tokens. A
model without a chat template reads them as plain text. The number that counts is the last one in
the answer (lm-eval's "flexible-extract"), so that a model need not write "####".

It departs from lm-eval's `--apply_chat_template` in this: what the template writes is read as it
is, with no BOS before it that the template does not write, and an answer ends with the token that
closes it in the template, too, whatever the model's generation configuration says.
"""

from tasks.suite import Suite, Task

SUITE = Suite(
    name="gsm8k",
    title="GSM8K",
    tasks=(Task("gsm8k", "exact_match", True, None, "GSM8K", filter="flexible-extract", shots=5),),
    datasets=("gsm8k", "gsm8k_train"),
    reference="GSM8K 2110.14168",
    chat=True,
    stock="gsm8k/gsm8k.yaml",
    splits=(("test", "gsm8k"), ("train", "gsm8k_train")),
)
