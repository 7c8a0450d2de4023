"""The lab's word-level tokenizer, a fast tokenizer in the usual files.

What: `tokenizers` WordLevel over whitespace, wrapped in `PreTrainedTokenizerFast`, so that the text
`1 2 3 + 4 5 6 =` becomes exactly the ids of `task.WORDS` and comes back as the same text. It pads
on the left, as generation wants, and adds no special token: a completion starts where its prompt
ends.
Why not a trained BPE: its merges would make "which token is a digit" a question of the corpus.
Not here: a chat template; the prompts are plain text.
Source: https://huggingface.co/docs/tokenizers/components
"""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from taopd.experiments.lab import task


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer that teacher and student share."""
    vocabulary = {word: index for index, word in enumerate(task.WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=task.UNK))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=task.BOS,
        eos_token=task.EOS,
        pad_token=task.PAD,
        unk_token=task.UNK,
        padding_side="left",
        model_max_length=task.MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def token_kinds(tokenizer: PreTrainedTokenizerBase) -> list[task.TokenKind]:
    """Return the kind of every token id, so that `kinds[id]` is its `token_kind`.

    Ids that the tokenizer does not use are "other".
    """
    words = {index: word for word, index in tokenizer.get_vocab().items()}
    return [task.token_kind(words.get(index, "")) for index in range(max(words) + 1)]
