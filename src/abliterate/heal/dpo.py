"""`dpo`: preference tuning of the edited model (Rafailov et al. 2023), the article's recipe for winning quality back.

A LoRA is trained by TRL's DPOTrainer; with the LoRA switched off the model is the edited one, which is the reference
that the loss compares with, so no second model is in memory.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

from abliterate.common.names import public_name
from abliterate.common.reporting import Reporter, Silent
from abliterate.heal.preferences import as_row, load_preferences
from abliterate.heal.training import Job, Training, lora_config, write_configuration
from abliterate.measure.judges import make_judge
from abliterate.measure.rates import Rate

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

CHUNK = 256  # positions whose logits are in float32 at once


def train(job: Job, *, reporter: Reporter | None = None) -> Training:
    """Train a LoRA that prefers the chosen answers, starting from the edited model.

    Leaves in the job's folder: `adapter/`, `checkpoints/`, TensorBoard's `runs/` and `heal.json`, the resolved
    configuration. On one CPU, a training that was killed and resumed leaves the same adapter, byte for byte.

    Args:
        job: what to train; `job.original` isn't needed.
        reporter: told how it goes.

    Returns:
        The training; `results` has the data's counts and, where pairs are held out, `held_out`: the share of them
        of which the model gives the chosen answer the higher likelihood per token, before and after, and the share
        with the higher implicit reward (eq. 5 of the paper; before training every reward is 0).

    Raises:
        AbliterateError: TRL isn't installed, the data or the model can't be used, or memory ran out.
    """
    from abliterate.heal import trainer as common

    common.check_packages(job.settings.heal)
    from datasets import Dataset
    from trl import DPOConfig

    said: Reporter = (reporter or Silent()) if common.is_main() else Silent()
    heal = common.resolve_auto(job.settings.heal)
    with common.watched(job, said) as callbacks:
        handle = common.open_for_training(job, said)
        judge = make_judge(job.settings.measure.judge)
        data = load_preferences(heal, handle, seed=job.settings.seed, judge=judge, reporter=said)
        common.without_dropout(handle.model)
        # The LoRA's dropout is wanted; the model's own was turned off before.
        arguments = {**common.trainer_arguments(job), "beta": heal.beta, "max_length": heal.max_length}
        trainer = _trainer_class()(
            model=handle.model,
            args=DPOConfig(**arguments, disable_dropout=False),
            train_dataset=Dataset.from_list([as_row(pair, handle) for pair in data.train]),
            eval_dataset=Dataset.from_list([as_row(pair, handle) for pair in data.held_out]) if data.held_out else None,
            processing_class=handle.tokenizer,
            peft_config=lora_config(heal),
            callbacks=callbacks,
        )
        seconds = common.run_trainer(trainer, job)
        adapter = common.save_adapter(trainer, job)
        results: dict[str, Any] = {"data": data.to_json(), "steps": trainer.state.global_step}
        if data.held_out:
            said.say(f"asking for preferences between {len(data.held_out)} held-out pairs")
            results["held_out"] = held_out_document(trainer.preferences(), heal.beta)
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    resolved = {
        **heal.model_dump(mode="json"),
        "seed": job.settings.seed,
        "processes": common.processes(),
        "distributed": str(trainer.accelerator.distributed_type.value),
        "global_batch": heal.micro_batch * heal.accumulation * common.processes(),
        "chat_template": handle.chat_template or "the model's own",
        "dtype": str(handle.dtype).removeprefix("torch."),
        "lora_modules": sorted({name.split(".lora_A")[0].rpartition(".")[2] for name in trained if "lora_A" in name}),
        "trainable_parameters": sum(parameter.numel() for parameter in trained.values()),
    }
    history = common.history_of(trainer)
    if common.is_main():
        source = public_name(data.source)
        shown = {**resolved, "data": public_name(resolved["data"])}
        write_configuration(job, {**data.to_json(), "source": source}, shown, packages=("trl", "accelerate"))
    return Training(adapter, history, resolved, seconds, results)


def held_out_document(log_probs: np.ndarray, beta: float) -> dict[str, Any]:
    """What held-out pairs say, for results.json.

    Args:
        log_probs: pairs x 6: the answers' log-probabilities, summed over their tokens, and their lengths:
            chosen and rejected of the trained model, then of the reference, then tokens of chosen and rejected.
        beta: of the loss.
    """
    chosen, rejected, reference_chosen, reference_rejected, chosen_tokens, rejected_tokens = log_probs.T
    before = reference_chosen / chosen_tokens > reference_rejected / rejected_tokens
    after = chosen / chosen_tokens > rejected / rejected_tokens
    margins = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    pairs = len(log_probs)
    losses = [math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins.tolist()]
    return {
        "pairs": pairs,
        "likelihood_accuracy": {
            "before": Rate(int(before.sum()), pairs).to_json(),
            "after": Rate(int(after.sum()), pairs).to_json(),
            "only_before": int((before & ~after).sum()),
            "only_after": int((after & ~before).sum()),
        },
        "reward_accuracy": Rate(int((margins > 0).sum()), pairs).to_json(),
        "reward_margin": float(margins.mean()),
        "loss": {"before": math.log(2), "after": sum(losses) / pairs},
    }


def answer_log_probs(model: Any, ids: Tensor, mask: Tensor, answer: Tensor) -> Tensor:
    """Log-probability of each row's answer, summed over its tokens.

    Args:
        model: a causal language model.
        ids, mask: token ids and attention mask, rows x positions, padded on the right.
        answer: 1 at the answer's tokens.

    Returns:
        One float32 per row.
    """
    import torch
    from torch.nn.functional import cross_entropy

    sums = []
    for row in range(len(ids)):  # one at a time: a vocabulary of 128k times 2,048 positions is large enough
        length = int(mask[row].sum())
        tokens, counts = ids[row, 1:length], answer[row, 1:length].bool()
        logits = model(input_ids=ids[row : row + 1, :length], use_cache=False).logits[0, :-1]
        total = torch.zeros((), device=logits.device)
        for at in counts.nonzero().flatten().split(CHUNK):
            total = total - cross_entropy(logits[at].float(), tokens[at], reduction="sum")
        sums.append(total)
    return torch.stack(sums)


@cache
def _trainer_class() -> Any:
    """DPOTrainer that can also say what it prefers; made when it is needed, for trl is slow to import."""
    import torch
    from trl import DPOTrainer

    class PreferenceTrainer(DPOTrainer):
        """TRL's trainer, whose evaluation gives log-probabilities of every pair (see `held_out_document`)."""

        def prediction_step(
            self, model: torch.nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
        ) -> tuple[None, Tensor, Tensor]:
            inputs = self._prepare_inputs(inputs)
            ids, mask, answer = (inputs[name] for name in ("input_ids", "attention_mask", "completion_mask"))
            with torch.no_grad(), self.compute_loss_context_manager():
                trained = answer_log_probs(model, ids, mask, answer)
                with self.accelerator.unwrap_model(self.model).disable_adapter():
                    reference = answer_log_probs(model, ids, mask, answer)
            lengths = answer.sum(-1).to(trained)
            # a batch is the chosen answers' rows, then the rejected ones'
            columns = torch.stack([part for both in (trained, reference, lengths) for part in both.chunk(2)], -1)
            return None, columns, torch.zeros(len(columns), device=columns.device)

        def preferences(self) -> np.ndarray:
            """Log-probabilities of all held-out pairs, gathered from all processes."""
            dataloader = self.get_eval_dataloader()
            found: Any = self.evaluation_loop(dataloader, "held-out pairs", prediction_loss_only=False).predictions
            return found

    return PreferenceTrainer
