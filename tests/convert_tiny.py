"""Convert folders of tiny models to float32 GGUFs with llama.cpp's converter, many in one process.

Usage: convert_tiny.py CONVERTER FOLDER OUT [FOLDER OUT ...]. The tiny tokenizer is none that llama.cpp knows, so it is
passed off as GPT-2's; nothing else of the converter is touched. Prints a line "FOLDER: reason" for those it refuses.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    converter, *rest = sys.argv[1:]
    root = Path(converter).parent
    sys.path[:0] = [str(root), str(root / "gguf-py")]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    for folder, out in zip(rest[::2], rest[1::2], strict=True):
        try:
            hparams = ModelBase.load_hparams(Path(folder), False)
            kind = get_model_class(get_model_architecture(hparams, ModelType.TEXT))
            kind.set_vocab = lambda self: self._set_vocab_gpt2()
            kind(Path(folder), gguf.LlamaFileType.ALL_F32, Path(out)).write()
        except Exception as error:
            print(f"{folder}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    main()
