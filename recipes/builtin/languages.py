"""The languages of the built-in model and of its task, and how their dates are written.

Dates come from CLDR (Unicode licence) through Babel. CLDR also says which digits a language uses by default; Babel
leaves digits Latin in dates, so `written_date` puts them in.
"""

import datetime

from babel import Locale
from babel.dates import format_date, format_skeleton

# The languages of builtin:dates: CLDR locales, all among BLOOM's 46 natural languages. Arabic comes twice: as
# written in Morocco (Latin digits) and in Egypt (Arabic-Indic digits).
# fmt: off
TASK_LOCALES = (
    "ar_MA", "ar_EG", "bn", "ca", "en", "es", "eu", "fr", "hi", "id", "ig", "mr", "pt", "sw", "ta",
    "ur", "vi", "yo", "zh",
)
# fmt: on

# What the model reads besides: the other BLOOM languages that CLDR knows, and large neighbours that BLOOM lacks.
# fmt: off
OTHER_LOCALES = (
    "ak", "as", "bm", "de", "gu", "it", "kn", "ki", "lg", "ln", "ml", "ne", "nl", "nso", "ny", "or",
    "pa", "rn", "ru", "rw", "sn", "st", "te", "tn", "tr", "ts", "wo", "xh", "zh_Hant", "zu",
)
# fmt: on

# Offset of the digit zero of CLDR's numbering systems that are not Latin.
_ZERO = {"arab": 0x0660, "arabext": 0x06F0, "beng": 0x09E6, "deva": 0x0966}

DATE_LENGTHS = ("full", "long", "medium")


def native_digits(text: str, locale: Locale) -> str:
    """Write the digits of `text` in the locale's default numbering system."""
    system = locale.default_numbering_system
    if system == "latn":
        return text
    zero = _ZERO[system]
    return text.translate({ord("0") + digit: zero + digit for digit in range(10)})


def written_date(date: datetime.date, length: str, locale_name: str) -> str:
    """A date as people write it: CLDR's full, long or medium form with the locale's own digits."""
    locale = Locale.parse(locale_name)
    return native_digits(format_date(date, length, locale=locale), locale)


def numeric_date(date: datetime.date, locale_name: str) -> str:
    """A date in the locale's all-digits form (CLDR skeleton yMd): 12/03/2019, 2019/3/12, ..."""
    locale = Locale.parse(locale_name)
    return native_digits(format_skeleton("yMd", date, locale=locale), locale)


def names_its_month(written: str) -> bool:
    """Whether the month is spelled out or marked as one (mars, 3月, thg 3), so that nobody can mistake it."""
    return any(character.isalpha() for character in written)
