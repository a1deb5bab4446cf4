"""`python -m farthing.quant.tokenizer SOURCE FOLDER`: a fast tokeniser from a slow one's files."""

import sys

from transformers import AutoTokenizer


def main(source: str, folder: str) -> None:
    """Write tokenizer.json and tokenizer_config.json for the model folder `source`."""
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    if not tokenizer.is_fast:
        raise SystemExit(f"{type(tokenizer).__name__} has no fast form")
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
