"""The tokenizer of a model's folder, from the library transformers."""

import os
from pathlib import Path
from typing import Any

END = "<|im_end|>"


def require_transformers() -> Any:
    """Return the library transformers. Raises ImportError without it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("a conversation needs transformers: pip install 'videomamba-bench[teachers,train]'") from error
    return transformers


def read_tokenizer(folder: str | Path) -> Any:
    """Return the tokenizer of a folder. Raises OSError or ValueError where it has none, ImportError without transformers."""
    return require_transformers().AutoTokenizer.from_pretrained(str(Path(os.path.expanduser(folder))))


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the token that ends an answer, where the tokenizer has one."""
    end = tokenizer.convert_tokens_to_ids(END)
    return [end] if isinstance(end, int) else []
