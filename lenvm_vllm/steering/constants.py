"""Every constant of steering: its unit, what it was chosen by, and what a change does.

The measurements are those of docs/benchmarks.md, "How the defaults of steering were chosen":
answers that end naturally, LS and LD (the error of the length) of LIFEBench.
"""

# ---- lengths

# Share of the length: half width of the guard rails where a request names none, and in every
# case the width w of the landing of a limit. 0.05 lands closer (LD 3.1 for 4.4%) and ends fewer
# texts naturally (55 to 60% for 69%; in a smaller run 64 for 61%); 0.2 ends 75% so, at LD 7.7%.
DEFAULT_TOLERANCE = 0.1

# Tokens of the shortest text: a word and the end. A fact of counting, not a choice.
LEAST = 2

# ---- the landing; w is the tolerance times the length, `landing.py` draws it

# w, from where the landing of equal_to opens to its target; behind it, it is w wide. With 1 texts
# end farther off (LD 5.6 for 4.4%, LS 82 for 88) and more of them naturally (74 for 69%).
LANDING_BEFORE_TARGET = 0.5

# w, from where the landing of a limit opens to the limit: the last fifth of the text. By hand;
# wider, texts end earlier.
LANDING_BEFORE_LIMIT = 2.0

# Nats that the odds of an end gain from the first to the last token of a landing, evenly. By hand:
# an end of one in a million stays below one in a thousand. More: more ends inside of sentences.
LANDING_NATS = 6.0

# Times `max_kl`: the trust region in the landing of equal_to. Natural ends: 74% with 6, 67% with 1
# of 144 answers at a tolerance of 0.1, 53 and 39% at 0.05; with 20, 61% of an earlier run.
LANDING_REACH = 6.0

# ---- the ends of sentences

# Tokens of a short sentence. By hand. Within so many before the landing of equal_to no sentence
# should end; with less than so many left, the first natural end is taken. Longer: both sooner.
SENTENCE = 16

# Of LANDING_NATS: what the end of a sentence gains at the opening of the landing, and loses right
# before that of equal_to. Chosen among gains of 0 to 6, 1 to 7, 2 to 8 and 3 to 9 nats, which their
# intervals do not tell apart.
SENTENCE_LEAD = 0.5

# Of LANDING_NATS: what it gains more from there to the close: 3 to 12 nats. By hand: of the texts
# that a rail cut, many had passed an end of 0.0001 to 0.01 there; with 12 nats one in 160,000 is
# as likely as all else.
SENTENCE_RISE = 1.5

# Weight, after its gain and in all other candidates', from which on the end of a sentence outside a
# request's own cut is one of them, and their number. By hand; they bound the work of a step.
LEAST_CLOSER, MORE_CLOSERS = 1e-3, 4

# Tokens that the landing of equal_to has at least, where rails hold its ends: it opens earlier, and
# a text that is whole before its lower rail is filled with empty lines. By hand; at tolerance 0,
# with one place for its last sentence to end, 26 of 100 texts were whole.
SHORTEST_LANDING = 4

# Of a sentence: with less room than that before the close, a finished text of equal_to ends between
# its rails though its landing has not opened. By hand.
FITS = 0.5

# An end is natural where the unguided model gives it at least this probability. By hand; of 33
# unnatural ends none had missed such a place inside the rails. Higher: fewer ends are taken at
# once, and more answers have other endings.
NATURAL = 0.05

# ---- candidates; settings of the plugin of the same names

# Nats that the values may move the text in one step of `project`. Natural ends: 36% with 0, 61%
# with 0.2, 69% with 0.8, which takes the repetition from 5 to 16%.
MAX_KL = 0.2

# Candidates of a request that sets no top_k, and the probability that they have together: 15 is
# the paper's, 0.999 by hand. More: rarer tokens may be steered to, and each step costs more.
TOP_K, TOP_P = 15, 0.999

# Probability, as a share of that of the likeliest: candidates of a tilt that sets no cut. By hand.
TILT_MIN_P = 0.01

# Candidates of a row, whatever its request says. By hand; bounds the work of a step.
MAX_CANDIDATES = 64

# Share of the probability, and number, of the candidates that are scored; the others count with
# the mean of these. Chosen by what a step costs: together they halved it.
SCORED_MASS, MAX_SCORED = 0.9, 8

# ---- words and characters

# Probability with which the next token goes on with a word, or behind a full stop without a space,
# from which on the word or the sentence is not yet whole. By hand: the likelier of the two.
GOES_ON = 0.5

# Probability of the ends of a sentence, from which on one comes behind the last word that fits. As
# at the close of a landing in tokens.
CLOSES = 1e-5

# Characters without which no other word begins before a limit, and of a short limit its part.
# By hand: with fewer, last words are cut.
LAST_WORD, LAST_WORD_PART = 10, 8

# Tokens of a prompt that tell how many a word takes, before the text does. By hand.
TELLING = 64

# ---- thinkings

# A thinking that does not count leaves the answer at least this part of the limit, where no lower
# rail asks for more: a quarter. By hand.
ANSWER_PART = 4

# ---- numbers of the bisection for the tilt, on values scaled to a spread of 1

BISECTIONS = 32  # halvings of the logarithm of the tilt; 32 leave nothing to see
# Below the smallest tilt nothing moves, beyond the largest only the extreme value is left.
SMALLEST_TILT, LARGEST_TILT = 1e-6, 1e4
SAME_VALUE = 1e-9  # values nearer to each other than this are one
NO_END = 1e-9  # probabilities of an end below this are rounding
