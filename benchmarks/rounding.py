"""What rounding a model's weights costs, in the divergence by which edits are chosen: the reason for --free-divergence.

    python benchmarks/rounding.py [MODEL] [--prompts 48]

Every matrix is rounded as llama.cpp's formats do (by the gguf package, there and back) and the model is compared with
itself before, behind its own answers to baseline prompts of the test split, in float32.
"""

from __future__ import annotations

import argparse

import torch
from gguf import GGMLQuantizationType, quants

import abliterate as ab
from abliterate.measure.decode import decode
from abliterate.measure.divergence import compare, make_reference

FORMATS = ("Q8_0", "Q5_0", "Q4_0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=None, help="the demo model by default")
    parser.add_argument("--prompts", type=int, default=48)
    options = parser.parse_args()
    handle = ab.load(options.model or ab.demo_model(), dtype="float32")
    texts = ab.load_sides("bundled", "bundled", limit_test=options.prompts).baseline.test.texts
    ids = handle.prompt_ids(texts)
    reference = make_reference(handle, ids, decode(handle, ids, max_new_tokens=24), answer_tokens=24)
    matrices = {n: p for n, p in handle.model.named_parameters() if p.ndim == 2 and p.shape[-1] % 32 == 0}
    kept = {name: parameter.detach().clone() for name, parameter in matrices.items()}
    print("| format | first token, nats | along 24 tokens, nats |\n| --- | --- | --- |")
    for name in FORMATS:
        kind = GGMLQuantizationType[name]
        with torch.no_grad():
            for key, parameter in matrices.items():
                rounded = quants.dequantize(quants.quantize(kept[key].float().numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(rounded))
        found = compare(handle, reference)
        print(f"| {name} | {found.first_token:.4f} | {found.answer:.4f} |", flush=True)


if __name__ == "__main__":
    main()
