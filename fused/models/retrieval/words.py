"""From sentences to ids: the clean-up of upstream's captions, and BERT's word pieces."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_DELETED = re.compile(r"[,.'!?\"()*#:;~]")
_BLANKS = re.compile(r"[-/]")


def clean_text(sentence: str) -> str:
    """Return a sentence as upstream's models know them: in lower case, without punctuation, with single blanks.

    >>> clean_text("A man's RED-hat, (2)!")
    'a mans red hat 2'
    """
    text = _BLANKS.sub(" ", _DELETED.sub("", sentence.lower())).replace("<person>", "person")
    return " ".join(text.split())


class Words(NamedTuple):
    """Texts as ids: [CLS], word pieces, [SEP], padding."""

    ids: Int[Tensor, "N L"]  # int64
    visible: Bool[Tensor, "N L"]  # False for padding


class Tokenizer:
    """BERT's uncased word pieces, of the library transformers, by a vocabulary file with a word piece in each line.

    Texts are cleaned by `clean_text` first. Raises FileNotFoundError for a missing file, ValueError for one without the words
    [PAD], [UNK], [CLS], [SEP] and [MASK], ImportError without transformers.
    """

    def __init__(self, vocabulary: str | Path) -> None:
        self.path = Path(os.path.expanduser(vocabulary))
        if not self.path.is_file():
            raise FileNotFoundError(2, "no such vocabulary, a text file with a word piece in each line", str(self.path))
        try:
            words = self.path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"vocabulary is {str(self.path)!r}, which is no UTF-8 text: {error}") from error
        if missing := [word for word in SPECIAL if word not in words]:
            raise ValueError(f"vocabulary is {str(self.path)!r}, which lacks {', '.join(missing)}; allowed: BERT's vocab.txt")
        self.size = len(words)
        self.pad, self.mask, self.cls = (words.index(word) for word in ("[PAD]", "[MASK]", "[CLS]"))
        self._bert: Any = import_transformers().BertTokenizer(str(self.path))

    def __call__(self, sentences: Sequence[str], length: int) -> Words:
        """Return the ids of sentences, cleaned, cut and padded to `length`, which counts [CLS] and [SEP]."""
        found = self._bert(
            [clean_text(sentence) for sentence in sentences], padding="max_length", truncation=True, max_length=length
        )
        ids = torch.tensor(found["input_ids"], dtype=torch.int64).view(len(sentences), length)
        return Words(ids, torch.tensor(found["attention_mask"], dtype=torch.bool).view(len(sentences), length))

    def check_size(self, vocab_size: int) -> None:
        """Raise ValueError unless the vocabulary has as many words as a model."""
        if self.size != vocab_size:
            allowed = f"the {vocab_size} that the model was made for"
            raise ValueError(f"vocabulary is {str(self.path)!r} with {self.size} words; allowed: {allowed}")


def import_transformers() -> Any:
    """Return the library transformers. Raises ImportError that says how to install it."""
    try:
        import transformers
    except ImportError as error:
        raise ImportError("CLIP and BERT need transformers: pip install 'videomamba-bench[teachers]'") from error
    return transformers
