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
    """Return the tokenizer of a folder. Raises ValueError where it has none, ImportError without transformers."""
    path, library = Path(os.path.expanduser(folder)), require_transformers()
    logging = library.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of config.json, whose model it does not have
    try:
        return library.AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    except Exception as error:  # the library raises exceptions of many kinds, which do not name the folder
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} holds no tokenizer that transformers reads; allowed: tokenizer.json beside the weights: "
                         f"{reason}") from error  # fmt: skip
    finally:
        logging.set_verbosity(verbosity)


def end_tokens(tokenizer: Any) -> list[int]:
    """Return the token that ends an answer, where the tokenizer has one."""
    end = tokenizer.convert_tokens_to_ids(END)
    return [end] if isinstance(end, int) else []
