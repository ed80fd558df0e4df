"""How close generated answers are to the right ones: exact match, ROUGE-1/2/L, BLEU-4 and chrF.

Exact match and ROUGE are between 0 and 1; BLEU and chrF are between 0 and 100, as in sacrebleu. Needs the `metrics`
extra.

For ROUGE, texts of any script are split into words, or into characters if the script is written without spaces; the
tokenizer of rouge-score drops everything but a-z and 0-9. For BLEU, one of sacrebleu's tokenizers is chosen by the
script of the right answers; the signature names it.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from bloomlm.errors import ConfigError

# Scripts written without spaces between words, by the first word of their characters' Unicode names.
_SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, kw_only=True)
class GenerationScores:
    """Scores of a set of answers."""

    exact_match: float
    """Fraction of the answers that equal the right one, apart from surrounding white space (0 to 1)."""
    rouge1: float
    """Mean F1 of the words (0 to 1)."""
    rouge2: float
    """Mean F1 of the pairs of words (0 to 1)."""
    rougeL: float
    """Mean F1 of the longest common subsequence of words (0 to 1)."""
    bleu4: float
    """BLEU-4 of all answers together (0 to 100)."""
    chrf: float
    """chrF2 of all answers together (0 to 100)."""
    bleu4_signature: str
    """How sacrebleu computed bleu4."""

    def numbers(self) -> dict[str, float]:
        """The scores by name, without the signature."""
        return {name: value for name, value in vars(self).items() if isinstance(value, float)}


def score_generations(answers: Sequence[str], references: Sequence[str]) -> GenerationScores:
    """Compare answers with the right ones.

    Args:
        answers: generated texts, at least one.
        references: the right answer to each.

    Raises:
        ConfigError: the `metrics` extra is not installed.
    """
    assert len(answers) == len(references) > 0
    try:
        from rouge_score.rouge_scorer import RougeScorer  # extras: needed only where generations are scored
        from sacrebleu.metrics.bleu import BLEU
        from sacrebleu.metrics.chrf import CHRF
    except ImportError as error:
        raise ConfigError("ROUGE, BLEU and chrF need: pip install 'bloomlm[metrics]'") from error
    answers = [answer.strip() for answer in answers]
    references = [reference.strip() for reference in references]
    scorer = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=_WordTokenizer())
    scores = [scorer.score(right, answer) for right, answer in zip(references, answers, strict=True)]
    bleu = BLEU(tokenize=bleu_tokenizer(references))
    bleu4 = float(bleu.corpus_score(answers, [references]).score)
    return GenerationScores(
        exact_match=sum(map(str.__eq__, answers, references)) / len(answers),
        **{kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in scores[0]},
        bleu4=bleu4,
        chrf=float(CHRF().corpus_score(answers, [references]).score),
        bleu4_signature=str(bleu.get_signature()),
    )


def split_words(text: str) -> list[str]:
    """Split a text into words in lower case, or into characters if the script is written without spaces.

    >>> split_words("Am 3. März: 三月三日")
    ['am', '3', 'märz', '三', '月', '三', '日']
    """
    text = unicodedata.normalize("NFKC", text).lower()
    # Python's \w leaves out combining marks, e.g. the vowel signs of Devanagari, which would cut words apart.
    joined = "".join(" " if not _belongs_to_word(c) else f" {c} " if _is_spaceless(c) else c for c in text)
    return joined.split()


def bleu_tokenizer(references: Sequence[str]) -> str:
    """Name of sacrebleu's tokenizer for the script of most letters of the references.

    "13a", as in published results, for scripts with spaces; "zh", which splits Han characters, for Chinese; "char" for
    Japanese, Thai and other scripts without spaces.
    """
    letters = [c for text in references for c in text if c.isalpha()]
    spaceless = [c for c in letters if _is_spaceless(c)]
    if 2 * len(spaceless) <= len(letters):
        return "13a"
    return "zh" if all(unicodedata.name(c, "").startswith("CJK") for c in spaceless) else "char"


class _WordTokenizer:
    """The interface that rouge-score expects of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def _belongs_to_word(character: str) -> bool:
    return _WORD.match(character) is not None or unicodedata.category(character).startswith("M")


def _is_spaceless(character: str) -> bool:
    return character > "\u0dff" and unicodedata.name(character, "").startswith(_SPACELESS)
