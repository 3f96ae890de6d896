"""A loaded model as the harness sees it, doing only the work a score needs.

Imported only where the harness is there; it loads the harness' Hugging Face backend.
"""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor

from abliterate.common.errors import ModelError
from abliterate.common.reporting import Tick, untold
from abliterate.measure.decode import BATCH, decode
from abliterate.models.batches import Prefix, attention_window, continues_from_cache, inputs, positions, share_prefix
from abliterate.models.handle import Handle
from abliterate.models.memory import in_parts

# Tokens in a batch, when the batch size is "auto": enough to keep the device busy, and what doesn't fit is halved.
TOKENS = {"cpu": 2048, "cuda": 32768}
HEAD_ROWS = 256  # positions whose logits are held at a time
Pair = tuple[Any, list[int], list[int]]  # what to call it, the context's token ids, the continuation's


class ScoredModel(HFLM):
    """The harness' interface to a handle.

    The harness computes the logits of every token of every choice's row. Here the context that a question's choices
    share is run once, the head only where a choice's tokens are predicted, and answers are decoded in batches that
    stay full; a test holds the results to the harness' own.

    Args:
        handle: a loaded model, an edit attached or baked as it may be.
        batch_size: rows at a time; None goes by tokens, and by what memory holds.
        progress: given a number of requests, returns a tick.
    """

    def __init__(
        self,
        handle: Handle,
        *,
        batch_size: int | None = None,
        progress: Callable[[int], Tick] = lambda requests: untold,
    ) -> None:
        with _tied_as_it_is(handle.model):
            super().__init__(
                pretrained=handle.model,
                backend="causal",  # found out by looking at the config otherwise, which not all configs are known to
                tokenizer=handle.tokenizer,
                batch_size=batch_size or 1,
                max_length=handle.context_length,
            )
        self.handle, self.rows, self.progress = handle, batch_size, progress
        self.tokens = TOKENS.get(handle.device.type, TOKENS["cuda"])

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return super().loglikelihood_rolling(requests, disable_tqdm=True)

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: list[Pair], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether it is the greedy one."""
        tick = self.progress(len(requests))
        pairs = [self._cut(context, continuation) for _, context, continuation in requests]
        groups: dict[tuple[int, ...], list[int]] = {}
        for index, (context, _) in enumerate(pairs):
            groups.setdefault(tuple(context), []).append(index)
        longest = max((len(context) + len(continuation) for context, continuation in pairs), default=0)
        window = attention_window(self.handle)
        from_cache = (window is None or longest <= window) and continues_from_cache(self.handle)
        shared: list[tuple[list[int], list[list[int]], list[int]]] = []
        alone: list[int] = []
        for key, members in groups.items():
            if all(len(pairs[i][1]) == 1 for i in members) or (from_cache and len(members) > 1):
                shared.append((list(key), [pairs[i][1] for i in members], members))
            else:
                alone += members
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)

        def note(indices: Sequence[int], answers: Sequence[tuple[float, bool]]) -> None:
            for index, answer in zip(indices, answers, strict=True):
                found[index] = answer
            tick(len(indices))

        costs = [(len(context), sum(map(len, choices))) for context, choices, _ in shared]
        for batch in self._batches([own + more for own, more in costs]):
            part = [shared[i] for i in batch]
            widest = sum(costs[batch[0]])
            answers = self._fitting(self._score_shared, [(context, choices) for context, choices, _ in part], widest)
            note([i for _, _, members in part for i in members], [a for each in answers for a in each])
        for batch in self._batches([len(pairs[i][0]) + len(pairs[i][1]) for i in alone]):
            indices = [alone[i] for i in batch]
            rows = [pairs[i] for i in indices]
            note(indices, self._fitting(self._score_rows, rows, sum(map(len, rows[0]))))
        return found

    def _cut(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The last tokens of a context, as many as fit with the continuation: as the harness cuts."""
        if len(continuation) > self.max_length:
            raise ModelError(
                f"an answer of {len(continuation)} tokens doesn't fit {self.handle.source}, which reads "
                f"{self.max_length}; leave the task out"
            )
        room = self.max_length + 1 - len(continuation)
        return context[-room:], continuation

    def _batches(self, sizes: Sequence[int]) -> Iterator[list[int]]:
        """Indices, longest first, by rows or by tokens with their padding."""
        batch: list[int] = []
        widest = 0
        for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
            full = len(batch) == self.rows if self.rows else widest * (len(batch) + 1) > self.tokens
            if batch and full:
                yield batch
                batch = []
            if not batch:
                widest = sizes[index]
            batch.append(index)
        if batch:
            yield batch

    def _fitting(self, score: Callable[[Sequence[Any]], list[Any]], batch: Sequence[Any], tokens: int) -> list[Any]:
        """The scores of a batch, its widest item of so many tokens; what memory doesn't hold goes through in parts."""
        return [a for _, answers in in_parts(self.handle, batch, score, tokens) for a in answers]

    def _score_shared(self, batch: Sequence[tuple[list[int], list[list[int]]]]) -> list[list[tuple[float, bool]]]:
        """Contexts run once each, and every continuation from its context's keys and values."""
        contexts = [context for context, _ in batch]
        rows = [(place, choice) for place, (_, choices) in enumerate(batch) for choice in choices]
        onward = [number for number, (_, choice) in enumerate(rows) if len(choice) > 1]
        prefix = share_prefix(self.handle, contexts) if len(contexts) > 1 else Prefix(0)
        arguments = {**inputs(self.handle, contexts, prefix), "use_cache": bool(onward) or prefix.cache is not None}
        output, cache = self.handle.hidden_states_and_cache(**arguments)
        states = output.last_hidden_state[:, -1]
        scores, greedy = self._predicted(states, [place for place, _ in rows], [choice[0] for _, choice in rows])
        if onward:
            cache.batch_select_indices(torch.tensor([rows[number][0] for number in onward]))  # CPU: layers lie anywhere
            mask = arguments["attention_mask"][[rows[number][0] for number in onward]]
            states = self._continued(cache, mask, [rows[number][1][:-1] for number in onward])
            for number, answer in zip(onward, self._read(states, [rows[n][1][1:] for n in onward]), strict=True):
                scores[number] += answer[0]
                greedy[number] &= answer[1]
        answers = iter(zip(scores, greedy, strict=True))
        return [[next(answers) for _ in choices] for _, choices in batch]

    def _continued(self, cache: Any, mask: Tensor, rows: Sequence[list[int]]) -> Tensor:
        """States [row, token, d_model] of tokens that follow what the cache holds, padded on the right."""
        from abliterate.models.batches import takes_positions

        ids, own = self._padded(rows)
        whole = torch.cat([mask, own.to(mask.dtype)], dim=1)
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": whole, "cache": cache}
        if takes_positions(self.handle):
            arguments["position_ids"] = positions(whole)[:, mask.shape[1] :]
        return self.handle.hidden_states(**arguments, use_cache=True).last_hidden_state

    def _score_rows(self, batch: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Whole rows, padded on the right, where causal attention doesn't see it."""
        ids, _ = self._padded([(context + continuation)[:-1] for context, continuation in batch])
        states = self.handle.hidden_states(input_ids=ids, use_cache=False).last_hidden_state
        width = max(len(continuation) for _, continuation in batch)
        ends = torch.tensor([len(context) - 1 for context, _ in batch], device=states.device)
        places = (ends[:, None] + torch.arange(width, device=states.device)).clamp_max(states.shape[1] - 1)
        picked = states.gather(1, places[:, :, None].expand(-1, -1, states.shape[2]))
        return self._read(picked, [continuation for _, continuation in batch])

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        """Ids and mask [row, token], padded on the right."""
        width, pad = max(map(len, rows)), self.handle.tokenizer.pad_token_id or 0
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=self.handle.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=self.handle.device)
        return ids, mask

    def _read(self, states: Tensor, targets: Sequence[list[int]]) -> list[tuple[float, bool]]:
        """Sum of log-probabilities of each row's targets, predicted by its first states [row, token, d_model]."""
        kept = torch.cat([row[: len(target)] for row, target in zip(states, targets, strict=True)])
        wanted = [token for target in targets for token in target]
        values, greedy = self._predicted(kept, range(len(wanted)), wanted)
        ends = list(itertools.accumulate(map(len, targets)))
        spans = [slice(end - len(target), end) for end, target in zip(ends, targets, strict=True)]
        return [(math.fsum(values[span]), all(greedy[span])) for span in spans]

    def _predicted(self, states: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> tuple[list[float], list[bool]]:
        """Log-probability (float32) of each token after the state [row, d_model] it names, and whether it is the
        likeliest one. `rows` ascend; the whole vocabulary's logits are held for a few rows at a time."""
        values: list[float] = []
        greedy: list[bool] = []
        start = 0
        for first in range(0, len(states), HEAD_ROWS):
            logits = self.handle.logits(states[first : first + HEAD_ROWS].contiguous()).float()
            total, best = logits.logsumexp(-1), logits.argmax(-1)
            end = bisect.bisect_left(rows, first + len(logits), start)
            places = torch.tensor([row - first for row in rows[start:end]], device=logits.device)
            wanted = torch.tensor(list(tokens[start:end]), device=logits.device)
            values += (logits[places, wanted] - total[places]).tolist()
            greedy += (best[places] == wanted).tolist()
            start = end
        return values, greedy

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers up to a stop text; sampled ones are the harness' own."""
        texts: list[str | None] = [None] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        tick = self.progress(len(requests))
        for members in groups.values():
            kwargs = normalize_gen_kwargs(dict(requests[members[0]].args[1]), self.max_gen_toks)
            if kwargs.get("do_sample") or kwargs.get("num_beams", 1) > 1:
                answers = super().generate_until([requests[i] for i in members], disable_tqdm=True)
                tick(len(members))
            else:
                answers = self._greedy([requests[i].args[0] for i in members], kwargs, tick)
            for index, answer in zip(members, answers, strict=True):
                texts[index] = answer
        return [text or "" for text in texts]

    def _greedy(self, contexts: Sequence[str], kwargs: dict[str, Any], tick: Tick) -> list[str]:
        longest = kwargs["max_gen_toks"]
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(kwargs.get("until"), eos=eos)
        room = self.max_length - longest
        if room <= 0:
            raise ModelError(
                f"answers of {longest} tokens don't fit {self.handle.source}, which reads {self.max_length}; "
                "leave the task out"
            )
        ids = [self.tok_encode(text, left_truncate_len=room) for text in contexts]
        answers = decode(
            self.handle,
            ids,
            max_new_tokens=longest,
            batch_size=self.rows or max(1, min(BATCH, 8 * self.tokens // (max(map(len, ids)) + longest))),
            settled=lambda _index, text: any(stop in text for stop in stops if stop),
            tick=tick,
        )
        texts = (self.tok_decode(answer.ids) for answer in answers)  # halves of characters too, as the harness has them
        return [postprocess_generated_text(generation=text, stop=stops, think_end_token=None) for text in texts]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the handle's own template writes it, its system prompt first and its prefill last."""
        from abliterate.prompts.chat import fixed, resolve_chat_template

        messages = list(chat_history)
        if self.handle.system_prompt and not any(message["role"] == "system" for message in messages):
            messages = [{"role": "system", "content": self.handle.system_prompt}, *messages]
        own, self.tokenizer.chat_template = (
            self.tokenizer.chat_template,
            fixed(resolve_chat_template(self.tokenizer, self.handle.chat_template), self.handle.template_switches),
        )
        try:
            text = super().apply_chat_template(messages, add_generation_prompt)
        finally:
            self.tokenizer.chat_template = own
        return text + (self.handle.prefill or "") if add_generation_prompt else text

    @property
    def tokenizer_name(self) -> str:
        return str(self.handle.source).replace("/", "__")


@contextlib.contextmanager
def _tied_as_it_is(model: Any) -> Iterator[None]:
    """Keep the harness from tying again an embedding and a head that an edit untied."""
    model.tie_weights = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
