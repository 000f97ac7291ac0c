"""lm-eval's own models in place of shared-prefix scoring, where a recipe asks for one of them.

`evaluate.backend: hf` is lm-eval's transformers backend, `vllm` its vLLM model. Both are passed
what lm-eval itself would pass; what they do not say (why a text ended) is told from its length.
Runs of unlike backends are not compared: their engine is in the signature.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from fusion.errors import RunError
from harness.generation import Generation
from harness.scoring import Instance, stock

LIBRARIES = {"hf": "transformers", "vllm": "vllm"}


class StockLM:
    """A model of lm-eval's, asked as ours is.

    engine: what computed the scores. notes: what a report should say of it. forward_tokens: tokens
    of all that was asked and generated; how often the model read them is not known. device: where
    the model is; None where lm-eval's model finds that by itself.
    """

    def __init__(self, folder: str, backend: str, dtype: str, device: str, seed: int) -> None:
        try:
            self.lm: Any = stock(folder, device, dtype, backend)
            libraries = {name: version(name) for name in ("lm_eval", LIBRARIES[backend])}
        except ImportError as error:
            raise RunError(
                f"evaluate.backend: {backend} cannot be imported ({error}); install it beside "
                f"kfuse (pip install 'lm-eval[{backend}]') on a machine that it supports, or "
                "measure with backend: kfuse or hf"
            ) from error
        self.seed = seed
        self.device = device if backend == "hf" else None
        self.forward_tokens = 0
        self.engine = {"name": backend, "dtype": dtype, "torch": torch.__version__, **libraries}
        self.notes = [f"scored by lm-eval's {backend}, as the recipe asks"]

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """(log-probability, whether greedy) of each continuation."""
        self._count(requests)
        return self.lm.loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Log-probability of each whole text."""
        self._count(requests)
        return self.lm.loglikelihood_rolling(requests, disable_tqdm=disable_tqdm)

    def generate(self, requests: Sequence[Instance]) -> list[Generation]:
        """Generations; one with as many tokens as were allowed counts as cut.

        lm-eval's hf draws from torch's global generator, which is seeded here by the recipe's seed
        and the prompts and put back afterwards. vLLM draws from its own: its samples depend on what
        was asked before, too.
        """
        self._count(requests)
        asked = "\n".join(str(request.args[0]) for request in requests)
        key = hashlib.blake2b(f"{self.seed}\n{asked}".encode(), digest_size=8).digest()
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            torch.manual_seed(int.from_bytes(key, "little") >> 1)
            texts = self.lm.generate_until(list(requests), disable_tqdm=True)
        return [self._ended(*pair) for pair in zip(texts, requests, strict=True)]

    def _ended(self, text: str, request: Instance) -> Generation:
        how = request.args[1]
        most = int(how.get("max_gen_toks", how.get("max_new_tokens", self.lm.max_gen_toks)))
        made = len(self.lm.tok_encode(text, add_special_tokens=False)) if text else 0
        self.forward_tokens += made
        return Generation(text, "length" if made >= most else "stop", made)

    def _count(self, requests: Sequence[Instance]) -> None:
        texts = (part for r in requests for part in r.args if isinstance(part, str) and part)
        self.forward_tokens += sum(len(self.lm.tok_encode(text)) for text in texts)
