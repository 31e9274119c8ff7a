"""`python -m train.harness …`: lm-evaluation-harness, which knows our models here.

Its own program finds no models of others, so this one brings ours and then becomes it: what
follows is as for `lm_eval`, with `--model lsce --model_args model=RUN`.
"""

from __future__ import annotations

if __name__ == "__main__":
    from train import start

    start.begin("python -m train.harness")  # the imports below take seconds

import importlib
import sys
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from train.data.progress import progress
from train.data.records import Message

NAME = "lsce"
OFFLINE = (
    "the harness fetches the questions of its tasks from the Hugging Face hub, which cannot be"
    " reached: run it once with a network, name a YAML file of a task of local files by --tasks, or"
    " ask by python -m train.evaluate --task-data"
)
MISSING = 'lm-evaluation-harness is missing: pip install ".[harness]"'

Pair = tuple[Any, list[int], list[int]]
"""What was asked, the context's tokens, the continuation's."""


def model_class(template_lm: type) -> type:
    """Our model as one of the harness's.

    Args:
      template_lm: its base class `TemplateLM`, which cuts texts in context and continuation.
    """

    class Model(template_lm):
        """Any model of ours: `--model_args model=RUN,dtype=bfloat16,batch_tokens=16384`."""

        def __init__(
            self,
            model: str,
            dtype: str = "float32",
            batch_tokens: int | None = None,
            max_length: int | None = None,
            checkpoint: str = "last",
            template: str = "auto",
            **others: Any,
        ) -> None:
            """`others` are the harness's batch size and device, which do not concern us."""
            super().__init__()
            from train.evaluate import batch_tokens as usual
            from train.models import families
            from train.run import model as run_model

            self.loaded = run_model.read(
                model, dtype=dtype, checkpoint=str(checkpoint), template=template
            )
            self.batch_tokens = batch_tokens or usual()
            context = families.positions(self.loaded.config_json)
            self.max_length = max_length or context or 2048
            self.name = model

        @property
        def eot_token_id(self) -> int:
            return min(self.loaded.tokenizer.stops)

        @property
        def prefix_token_id(self) -> int:
            """What stands before a text that nothing stands before."""
            start = self.loaded.tokenizer.encode_text("")
            return start[0] if start else self.eot_token_id

        @property
        def tokenizer_name(self) -> str:
            return self.name.replace("/", "__")

        def apply_chat_template(
            self, chat_history: list[dict[str, Any]], add_generation_prompt: bool = True
        ) -> str:
            messages = [Message(turn["role"], turn["content"]) for turn in chat_history]
            return self.loaded.tokenizer.template.render(messages, prompt=add_generation_prompt)

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **others: Any
        ) -> list[int]:
            """A chat template may have put the token that begins a text there already."""
            tokenizer = self.loaded.tokenizer
            if add_special_tokens is None:
                start = tokenizer.encode_text("")
                plain = tokenizer.encode_text(string, start=False)
                add_special_tokens = not start or plain[: len(start)] != start
            return tokenizer.encode_text(string, start=add_special_tokens)

        def _loglikelihood_tokens(
            self, requests: list[Pair], disable_tqdm: bool = False, **others: Any
        ) -> list[tuple[float, bool]]:
            found = likelihoods(
                self.loaded.model,
                [(context, continuation) for _, context, continuation in requests],
                self.max_length,
                self.batch_tokens,
            )
            for (asked, _, _), answer in zip(requests, found, strict=True):
                if asked is not None:
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
            return found

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """The log-likelihoods of whole texts, in windows that do not overlap."""
            utils = importlib.import_module("lm_eval.utils")
            pairs, owners = [], []
            for number, request in enumerate(requests):
                windows = utils.get_rolling_token_windows(
                    token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for window in map(utils.make_disjoint_window, windows):
                    pairs.append(window)
                    owners.append(number)
            totals = [0.0] * len(requests)
            answers = likelihoods(self.loaded.model, pairs, self.max_length, self.batch_tokens)
            for number, (log_prob, _) in zip(owners, answers, strict=True):
                totals[number] += log_prob
            return totals

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            from train.models.generation import generate, pieces

            said = []
            with progress("generating", len(requests)) as advance:
                for request in requests:
                    text, options = request.args
                    limit = int(options.get("max_gen_toks", 256))
                    sampling = options.get("do_sample", options.get("temperature", 0) > 0)
                    tokens = generate(
                        self.loaded.model,
                        self.tok_encode(text)[-max(1, self.max_length - limit) :],
                        stops=self.loaded.tokenizer.stops,
                        max_tokens=limit,
                        temperature=options.get("temperature", 1.0) if sampling else 0.0,
                        top_p=options.get("top_p", 1.0),
                    )
                    until = options.get("until", [])
                    until = [until] if isinstance(until, str) else until
                    said.append(_until(pieces(tokens, self.loaded.tokenizer.decode), until))
                    advance(1)
            return said

    return Model


def likelihoods(
    model: Any, pairs: Sequence[tuple[list[int], list[int]]], max_length: int, batch_tokens: int
) -> list[tuple[float, bool]]:
    """log p of each continuation after its context, and whether it is the likeliest throughout.

    Continuations of one context go through the model together, contexts that begin alike share
    their beginning. Of what is too long the beginning is cut off, as the harness does.
    """
    from train.evaluation.likelihood import SHORTEST, Tree, log_likelihoods

    members: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, (context, continuation) in enumerate(pairs):
        room = max(1, max_length + 1 - len(continuation))
        members[tuple(context[-room:])].append(number)
    trees = [Tree(context, [pairs[i][1] for i in those]) for context, those in members.items()]
    groups = [context[:SHORTEST] for context in members]
    numbers = list(members.values())
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    with progress("log-likelihoods", len(pairs)) as advance:
        for batch in log_likelihoods(model, trees, groups, batch_tokens=batch_tokens):
            for tree, answer in batch.items():
                for number, log_prob, greedy in zip(numbers[tree], *answer, strict=True):
                    found[number] = float(log_prob), bool(greedy)
                advance(len(numbers[tree]))
    return found


def register() -> None:
    """Makes `--model lsce` known; ImportError without lm-evaluation-harness."""
    api = importlib.import_module("lm_eval.api.model")
    registry = importlib.import_module("lm_eval.api.registry")
    registry.register_model(NAME)(model_class(api.TemplateLM))


def main() -> int:
    """Returns 2 where the harness is not installed or finds no network; else what it returns."""
    try:
        register()
    except ImportError as error:
        print(f"python -m train.harness: {MISSING} ({error})", file=sys.stderr)
        return 2
    try:
        return importlib.import_module("lm_eval.__main__").cli_evaluate() or 0
    except Exception as error:
        reason = unreachable(error)
        if reason is None:
            raise
        print(f"python -m train.harness: {OFFLINE} ({reason})", file=sys.stderr)
        return 2


def unreachable(error: BaseException | None) -> str | None:
    """What the network said in the first line, where an error comes of there being none.

    The hub's libraries wrap one error in another, and their classes are not ours to import.
    """
    while error is not None:
        offline = {"OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectError"}
        if isinstance(error, ConnectionError) or type(error).__name__ in offline:
            return (str(error).strip() or repr(error)).splitlines()[0]
        error = error.__cause__ or error.__context__
    return None


def _until(parts: Any, stops: Sequence[str]) -> str:
    """The text up to the first of the stops."""
    text = ""
    for part in parts:
        text += part
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        if ends:
            return text[: min(ends)]
    return text


if __name__ == "__main__":
    sys.exit(main())
