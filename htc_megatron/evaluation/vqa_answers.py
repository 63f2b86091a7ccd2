"""How VQA answers are made alike before they are compared: the rules of the official evaluation, and those in front of its server.

Source: https://github.com/GT-Vision-Lab/VQA (vqaEval.py); for `for_server` the processor that LLaVA's submission script uses. Both are
followed to the letter, their slips included, since published figures contain them; `noted` below says which.
"""

import re
from collections.abc import Sequence

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
DIGITS_COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
PERIODS = 32  # noted: a flag (re.UNICODE) stands where `sub` takes the number of periods to remove
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate("zero one two three four five six seven eight nine ten".split())}

# The published table, spelling by spelling. Noted: keys with a capital never match, as words are in lower case by then, and
# "somebody'd" loses its apostrophe.
_SPELLINGS = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've didnt didn't
doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't hed he'd hed've he'd've
he'dve he'd've hes he's howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm Ive I've isnt isn't itd it'd
itd've it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve mightn't've
mightve might've mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at
'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've she's she's shouldve should've
shouldnt shouldn't shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've
somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've
someone'dve someone'd've someonell someone'll someones someone's somethingd something'd somethingd've something'd've
something'dve something'd've somethingll something'll thats that's thered there'd thered've there'd've there'dve there'd've
therere there're theres there's theyd they'd theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've
twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've werent weren't whatll what'll whatre what're whats what's
whatve what've whens when's whered where'd wheres where's whereve where've whod who'd whod've who'd've who'dve who'd've
wholl who'll whos who's whove who've whyll why'll whyre why're whys why's wont won't wouldve would've wouldnt wouldn't
wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll y'allll y'all'll yall'd've y'all'd've
y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've you'dve you'd've youll you'll youre you're youve you've
""".split()
CONTRACTIONS = dict(zip(_SPELLINGS[::2], _SPELLINGS[1::2], strict=True))


def process(text: str) -> str:
    """Without punctuation and articles, in lower case, numbers to ten as digits, contractions with their apostrophes."""
    words = (NUMBERS.get(word, word) for word in _without_punctuation(text).lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _without_punctuation(text: str) -> str:
    """A mark goes without a trace where one stands beside a space, or anywhere once a comma stands between digits; else it is a space."""
    comma = DIGITS_COMMA.search(text)
    made = text
    for mark in PUNCTUATION:
        traceless = comma or f"{mark} " in text or f" {mark}" in text
        made = made.replace(mark, "" if traceless else " ")
    return PERIOD.sub("", made, count=PERIODS)


def for_server(text: str) -> str:
    """An answer as it is submitted: commas and question marks gone, "'s" a word by itself, then `process`."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
    return process(_one_line(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def accuracy(answer: str, given: Sequence[str]) -> float:
    """Mean over the annotators of min(1, matches among the others / 3).

    Noted: answers are processed only where the annotators' own are not all the same.
    """
    answer, given = _one_line(answer), [_one_line(text) for text in given]
    if len(set(given)) > 1:
        answer, given = process(answer), [process(text) for text in given]
    matches = given.count(answer)
    return sum(min(1.0, (matches - (text == answer)) / 3) for text in given) / len(given)
